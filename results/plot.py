"""Draw the curves of runs, or the figures of the pages. Needs matplotlib.

`python results/plot.py RUN [RUN ...] [--out FILE.png]` draws the metrics of the runs in these
folders, one line per run. The x axis is the number of training samples. It is the number of steps
if no run samples while it trains.

`python results/plot.py` draws the figures of the pages from the records:

    methods.png        All methods: maj@1 over samples, pass@16, distinct correct solutions.
    hard.png           The same for the harder task.
    sft_epochs.png     The effect of more epochs of SFT on maj@1 and pass@8.
    rcrl.png           Return-conditioned RL: mixtures and labels.
    ppo_rewards.png    PPO with each kind of reward: accuracy, reward and KL.
    ppo_stability.png  PPO with and without the KL penalty and the detached value branch.
    genrm.png          PPO rewarded by the verifier and by a generative reward model.
    comparison.png     PPO, RLOO, GRPO, VinePPO and expert iteration on both tasks.

Lines and bars are means over the seeds. Bands and whiskers show the range of the seeds.
"""

import argparse
import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from records import RESULTS, mean, metrics, test_metric

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image
except ImportError:
    sys.exit("error: matplotlib is missing; run `pip install matplotlib`")

SAMPLES = "samples for training"

# ---- 1. The curves of run folders ----------------------------------------------------------------


def panels_of(logs: dict[str, list[dict]]) -> dict[str, list[str]]:
    """Return title -> keys of each panel. A panel needs one run with one of its keys."""
    logged = {key for log in logs.values() for row in log for key in row if row[key] is not None}
    sizes = [int(key[5:]) for key in logged if key.startswith("pass@") and key != "pass@1"]
    pass_at_k = f"pass@{max(sizes, default=1)}"
    panels = {
        "maj@1 on dev": ["maj@1"],
        f"{pass_at_k} on dev": [pass_at_k],
        "AUC of the reward model on dev": ["auc"],
        "mean reward of the samples": ["reward"],
        # k3 is the better estimate: it has less variance and is never negative.
        "KL to the reference, nats per token": ["ref_kl_k3", "ref_kl_k1"],
        "entropy, nats per token": ["entropy"],
        "response length, tokens": ["response_length"],
    }
    return {title: keys for title, keys in panels.items() if logged & set(keys)}


def curve(log: list[dict], keys: list[str], x: str) -> tuple[list, list]:
    """Return x and y of the rows that have one of the keys. The first key of a row counts."""
    points = []
    for row in log:
        values = [row[key] for key in keys if row.get(key) is not None]
        points += [(row[x], values[0])] if values else []
    return [x for x, _ in points], [y for _, y in points]


def draw_runs(folders: list[str], out: Path) -> None:
    """Draw one panel per metric and one line per run."""
    logs = {}
    for folder in folders:
        file = Path(folder) / "metrics.jsonl"
        if not file.is_file():
            sys.exit(f"error: {folder} is no run (it has no metrics.jsonl)")
        # A run that has not ended may have written half of its last line.
        lines = file.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        logs[folder] = [json.loads(line) for line in lines]
    panels = panels_of(logs)
    if not panels:
        sys.exit("error: nothing to draw yet; no run has logged a metric that has a panel")
    # Most runs generate all their samples first, or none. Their curves must be over steps.
    grows = any(len({row["samples"] for row in log}) > 1 for log in logs.values())
    x, label = ("samples", SAMPLES) if grows else ("step", "optimizer steps")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.6 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=False):
        for i, (name, log) in enumerate(logs.items()):
            axis.plot(*curve(log, keys, x), "o-", color=f"C{i}", label=name, markersize=3)
        axis.set(title=title, xlabel=label)
        axis.grid(alpha=0.3)
    names = axes.flat[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=2, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    save(figure, out)
    print(f"drawn: {out}")


def save(figure, file: Path) -> None:
    """Write a figure in 128 colours. That is enough for curves, and a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    image = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(file, format="png", optimize=True)


# ---- 2. The figures of the pages -----------------------------------------------------------------

# Each method: colour, label, record.
SPARSE = "tab:blue", "sparse: answer correct", "arithmetic/ppo"
REWARDS = [
    SPARSE,
    ("tab:orange", "dense: steps of the reference", "ppo_variants/dense"),
    ("tab:green", "ORM, last token", "ppo_variants/orm"),
    ("tab:red", "ORM, line by line", "ppo_variants/orm_dense"),
]
STABLE = [
    SPARSE,
    ("tab:brown", "no KL penalty", "ppo_variants/kl0"),
    ("tab:pink", "value not detached", "ppo_variants/attached"),
]
FAST = [
    ("tab:blue", "sparse: answer correct", "ppo_stability/kl"),
    ("tab:brown", "no KL penalty", "ppo_stability/kl0"),
    ("tab:pink", "value not detached", "ppo_stability/attached"),
    ("tab:olive", "no KL penalty, phases end at a KL of 0.02", "ppo_stability/limit"),
]
GENRM = [
    SPARSE,
    ("tab:orange", "GenRM next to the gold solution", "genrm/gold"),
    ("tab:red", "GenRM next to the best of 16", "genrm/best"),
    ("tab:green", "half checked, a quarter each GenRM", "genrm/hybrid"),
]
METHODS = [
    ("tab:olive", "SFT", "arithmetic/sft"),
    ("gold", "SFT, 35 epochs", "arithmetic/sft_more"),
    ("tab:blue", "PPO", "arithmetic/ppo"),
    ("navy", "PPO, 36 phases", "ppo_longer/phases36"),
    ("lightblue", "PPO from the base", "arithmetic/ppo_base"),
    ("tab:purple", "expert iteration, K = 4", "arithmetic/ei"),
    ("orchid", "K = 4, de-duplicated", "arithmetic/ei_dedup"),
    ("tab:cyan", "K = 16, de-duplicated", "ei_samples/k16_dedup"),
    ("tab:brown", "K = 4, de-duplicated, continued", "ei_continue/continue_dedup"),
    ("deeppink", "K = 8 from the base", "arithmetic/ei_base"),
    ("tab:gray", "K = 8 from the base, de-duplicated", "arithmetic/ei_base_dedup"),
    ("tab:green", "RCRL, 10 : 1", "rcrl/ratio10"),
]
HARD = [
    ("tab:olive", "SFT", "hard/sft"),
    ("tab:blue", "PPO", "hard/ppo"),
    ("navy", "PPO, 36 phases", "hard/phases36"),
    ("gold", "PPO, 72 phases", "hard/phases72"),
    ("tab:purple", "expert iteration, K = 4", "hard/ei"),
    ("black", "K = 4, a third round", "hard/rounds3"),
    ("dimgray", "K = 4, four rounds", "hard/rounds4"),
    ("tab:red", "K = 4, continued", "hard/continue"),
    ("tab:orange", "K = 16, a quarter of the epochs", "hard/k16_once"),
    ("orchid", "K = 4, de-duplicated", "hard/ei_dedup"),
    ("plum", "K = 4, de-duplicated, 12 epochs", "hard/long_dedup"),
    ("tab:cyan", "K = 16, de-duplicated", "hard/k16_dedup"),
    ("tab:green", "RCRL, 10 : 1", "hard_rcrl/ratio10"),
    ("limegreen", "its correct solutions, no labels", "hard_rcrl/control"),
]
COMPARISON = [
    ("tab:blue", "PPO", "comparison/{}_ppo"),
    ("tab:green", "RLOO", "comparison/{}_loo"),
    ("tab:orange", "GRPO", "comparison/{}_group_std"),
    ("tab:red", "VinePPO", "comparison/{}_mc"),
    ("tab:purple", "expert iteration", "clipping/{}"),
]
MAJ = "maj@1", "dev: fraction of greedy solutions correct"
CORRECT = "correct", "training samples: fraction correct"
KL = "ref_kl_k3", "KL to the SFT policy, nats per token"
VALUE = "explained_variance", "explained variance of the value"
FALSE_POSITIVE = "false_positive_rate", "fraction of incorrect samples scored 0.5 or more"


def band(axis, curves: list[dict], style: str, colour: str, label: str) -> None:
    """Draw the mean and the range of the seeds. curves: x -> y of each seed.

    Some runs ended early. Some rows lack some keys. So an x is drawn only if all seeds have it.
    """
    x = [x for x in curves[0] if all(x in points for points in curves)]
    y = np.array([[points[at] for at in x] for points in curves])
    label = f"{label} ({len(y)} seed{'s' * (len(y) > 1)})"
    axis.plot(x, y.mean(0), style, color=colour, label=label, markersize=3)
    axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)


def over_samples(axis, method: str, key: str, style: str, colour: str, label: str) -> None:
    """Draw a recorded metric over samples, if it was logged while the samples grew."""
    curves = []
    for log in metrics(method).values():
        curves.append({row["samples"]: row[key] for row in log if row.get(key) is not None})
    if any(len(points) > 1 for points in curves):
        band(axis, curves, style, colour, label)


def whiskers(values: list[float]) -> dict:
    """Return the arguments that make a bar show the range of the values."""
    average = np.mean(values)
    return {"yerr": [[average - min(values)], [max(values) - average]], "capsize": 3}


def draw_ppo(file: str, rows: dict[str, list], panels: list[tuple], with_reward: bool) -> None:
    """Draw metrics of variants of PPO over samples.

    rows: start of the titles of a row -> variants. panels: (key, title). with_reward: also draw the
    mean learned reward, dashed, next to the accuracy of the samples.
    """
    shape = len(rows), len(panels)
    size = 4.6 * shape[1], 4.2 * shape[0]
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    for line, (what, variants) in zip(axes, rows.items(), strict=True):
        for axis, (key, title) in zip(line, panels, strict=True):
            for colour, label, method in variants:
                over_samples(axis, method, key, "-", colour, label)
                is_learned = method not in ("arithmetic/ppo", "ppo_variants/dense")
                if with_reward and key == "correct" and is_learned:
                    over_samples(axis, method, "reward", "--", colour, f"{label}: its reward")
            axis.set(xlabel=SAMPLES, title=what + title)
            axis.grid(alpha=0.3)
        if not with_reward:
            line[1].legend(fontsize=8)
    # Too many lines for a legend inside a panel.
    if with_reward:
        names = axes[0][1].get_legend_handles_labels()
        figure.legend(*names, loc="outside lower center", ncols=4, fontsize=8)
    save(figure, RESULTS / file)


def draw_methods(file: str, methods: list[tuple[str, str, str]]) -> None:
    """Draw maj@1 over samples, pass@16 over maj@1, and the number of distinct solutions."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    curves, quality, distinct = axes
    for i, (colour, label, method) in enumerate(methods):
        over_samples(curves, method, "maj@1", "o-", colour, label)
        maj, pass_16 = (list(test_metric(method, key).values()) for key in ("maj@1", "pass@16"))
        quality.plot(maj, pass_16, "o", color=colour, label=label, markersize=6)
        values = list(test_metric(method, "distinct@16").values())
        interval = whiskers(values)
        interval["xerr"] = interval.pop("yerr")
        distinct.barh(i, np.mean(values), 0.7, color=colour, **interval)
    curves.set(xlabel=SAMPLES, ylabel="fraction of greedy solutions correct (256 dev problems)")
    curves.set_xscale("symlog", linthresh=2048, linscale=0.5)
    curves.set_xlim(left=0)
    curves.set_title("mean and range of the seeds; colours as at the right", fontsize=9)
    curves.legend(fontsize=7)
    greedy = "maj@1: fraction of greedy solutions correct (test)"
    quality.set(xlabel=greedy, ylabel="pass@16: any of 16 samples correct (test)")
    distinct.set(xlabel="distinct correct solutions of 16 samples (test)", xlim=(0.8, None))
    distinct.set_yticks(range(len(methods)), [label for _, label, _ in methods])
    distinct.invert_yaxis()
    for axis in axes:
        axis.grid(alpha=0.3)
    save(figure, RESULTS / file)


def draw_epochs() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained")
    titles = {"maj@1": "greedy solutions correct", "pass@8": "any of 8 samples correct"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        # Epochs -> metric in the last row of the run, one dictionary per seed.
        curves = {}
        for n in (2, 4, 16):
            for seed, log in metrics(f"sft_epochs/epochs{n}").items():
                curves.setdefault(seed, {})[n] = log[-1][key]
        band(axis, list(curves.values()), "o-", "tab:blue", "SFT")
        fraction = "fraction of 256 dev problems"
        axis.set(xlabel="epochs of SFT on 24 solutions", ylabel=fraction, title=title, xscale="log")
        axis.set_xticks([2, 4, 16], ["2", "4", "16"], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save(figure, RESULTS / "sft_epochs.png")


def draw_labels() -> None:
    """Draw the accuracy after each label of return-conditioned RL and of its controls."""
    mixtures = {
        "ratio1": "1 : 1,\nper line",
        "ratio10": "10 : 1,\nper line",
        "ratio100": "100 : 1,\nper line",
        "outcome1": "1 : 1,\nper solution",
        "control": "only correct,\nno labels",
        "control_1600": "1,600 correct,\nno labels",
        "control_mixed": "1 : 1,\nno labels",
    }
    kinds = [
        ("test", "tab:green", "conditioned on [GOOD]"),
        ("bad", "tab:red", "conditioned on [BAD]"),
        ("none", "tab:gray", "no label"),
    ]
    figure, axis = plt.subplots(figsize=(10, 4.2), layout="constrained")
    for i, name in enumerate(mixtures):
        for j, (kind, colour, label) in enumerate(kinds):
            values = list(test_metric(f"rcrl/{name}", "maj@1", kind).values())
            if not values:
                continue
            x, label = i + 0.27 * (j - 1), label if i == 0 else None
            # A control was tested without a label only.
            if name.startswith("control"):
                x, colour = i, "tab:gray"
            axis.bar(x, np.mean(values), 0.25, color=colour, label=label, **whiskers(values))
    sft = mean(test_metric("arithmetic/sft", "maj@1"))
    axis.axhline(sft, color="black", linestyle=":", label="SFT")
    axis.set(ylabel="fraction of greedy solutions correct (test)", ylim=(0.4, 1))
    axis.set_xticks(range(len(mixtures)), mixtures.values())
    axis.legend(fontsize=8, loc="lower right")
    axis.grid(alpha=0.3, axis="y")
    save(figure, RESULTS / "rcrl.png")


def draw_comparison() -> None:
    """Draw maj@1 on dev over samples, steps and seconds, the latter of seed 0 alone."""
    x_axes = {"samples": SAMPLES, "step": "optimizer steps", "seconds": "seconds of one core"}
    figure, rows = plt.subplots(2, 3, figsize=(15, 8.4), layout="constrained")
    panels = itertools.product(("easy", "hard"), x_axes.items())
    for axis, (task, (x, label)) in zip(rows.flat, panels, strict=True):
        for colour, name, method in COMPARISON:
            method = method.format(task)
            if x == "seconds":  # of runs that were made on the same day
                method = method.replace(f"clipping/{task}", f"comparison/{task}_ei")
            logs = metrics(method)
            logs = [logs[0]] if x == "seconds" else logs.values()
            points = [[(row[x], row["maj@1"]) for row in log if "maj@1" in row] for log in logs]
            x_values, y = np.moveaxis(np.array(points), 2, 0)  # each [seeds, evaluations]
            curves = [dict(zip(x_values.mean(0), each, strict=True)) for each in y]
            band(axis, curves, "o-", colour, name)
        axis.set(title=f"{task.replace('hard', 'harder')} task, {MAJ[1]}", xlabel=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        if x == "step":
            axis.set_xscale("symlog", linthresh=32)
    save(figure, RESULTS / "comparison.png")


def draw_pages() -> None:
    draw_methods("methods.png", METHODS)
    draw_methods("hard.png", HARD)
    draw_epochs()
    draw_labels()
    draw_ppo("ppo_rewards.png", {"": REWARDS}, [MAJ, CORRECT, KL], with_reward=True)
    rows = {"": STABLE, "five times the learning rate\n": FAST}
    draw_ppo("ppo_stability.png", rows, [MAJ, KL, VALUE], with_reward=False)
    draw_comparison()
    draw_ppo("genrm.png", {"": GENRM}, [MAJ, CORRECT, FALSE_POSITIVE], with_reward=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", default="runs/plot.png", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.runs:
        draw_runs(args.runs, Path(args.out))
    else:
        draw_pages()


if __name__ == "__main__":
    main(sys.argv[1:])
