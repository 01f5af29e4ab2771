"""Figures of the recorded runs (needs matplotlib, which the scripts do not): `python results/plot.py`.

results/methods.png       all methods: greedy accuracy over rollouts, beside pass@16, and how many different right solutions
results/hard.png          the same for the harder variant of the task
results/sft_epochs.png    what more epochs of SFT do to the greedy accuracy and to pass@8
results/rcrl.png          return-conditioned RL: mixtures and what the policy is conditioned on
results/ppo_rewards.png   PPO with each kind of reward: exact accuracy, what the reward says, and the KL, over rollouts
results/ppo_stability.png PPO with and without the KL penalty and the detached value branch
results/genrm.png         PPO rewarded by the answer check and by a generative reward model beside two kinds of references
Lines are means over the seeds, bands (in bar charts, whiskers) reach from the lowest to the highest seed."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from records import RESULTS, methods, recorded, test_metric  # noqa: E402

COLOURS = {
    "sparse": "tab:blue", "dense": "tab:orange", "orm": "tab:green", "orm_dense": "tab:red", "kl0": "tab:brown",
    "attached": "tab:pink", "limit": "tab:olive", "gold": "tab:orange", "best": "tab:red", "hybrid": "tab:green",
}  # fmt: skip
NAMES = {
    "sparse": "sparse: answer right", "dense": "dense: steps of the reference", "orm": "ORM, last token",
    "orm_dense": "ORM, line by line", "kl0": "no KL penalty", "attached": "value not detached",
    "limit": "no KL penalty, phases end at a KL of 0.02",
    "gold": "GenRM beside the gold solution", "best": "GenRM beside the best of 16", "hybrid": "half checked, a quarter each GenRM",
}  # fmt: skip


def band(axis, logs: list[list[tuple]], style: str, colour: str, label: str) -> None:
    """The mean over the seeds, and from the lowest to the highest, at every x that all seeds have."""
    seeds = [
        dict(log) for log in logs
    ]  # some ended early, some older ones did not measure what they began with
    x = [x for x in seeds[0] if all(x in seed for seed in seeds)]
    y = np.array([[seed[at] for at in x] for seed in seeds])
    axis.plot(
        x,
        y.mean(0),
        style,
        color=colour,
        label=f"{label} ({len(y)} seed{'s' * (len(y) > 1)})",
        markersize=3,
    )
    axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)


def over_rollouts(axis, name: str, key: str, style: str, colour: str, label: str) -> None:
    """A metric of a recorded method over the rollouts, if there is one."""
    logs = [
        [(row["samples"], row[key]) for row in log if row.get(key) is not None]
        for log in recorded(name).values()
    ]
    if any(logs):
        band(axis, logs, style, colour, label)


def variants(*names: str) -> dict[str, str]:
    """The records of variants of PPO; "sparse" is PPO as it is by default."""
    folders = {
        name: "genrm" if name in ("gold", "best", "hybrid") else "ppo_variants" for name in names
    }
    return {
        name: "arithmetic/ppo" if name == "sparse" else f"{folders[name]}/{name}" for name in names
    }


def figure(
    file: str, rows: dict[str, dict[str, str]], panels: list[tuple[str, str]], proxy: bool
) -> None:
    """rows: what the row says before its titles -> variants and their records"""
    shape = len(rows), len(panels)
    shown, axes = plt.subplots(
        *shape, figsize=(4.6 * shape[1], 4.2 * shape[0]), layout="constrained", squeeze=False
    )
    for line, (what, records) in zip(axes, rows.items(), strict=True):
        for axis, (key, title) in zip(line, panels, strict=True):
            for name, record in records.items():
                over_rollouts(axis, record, key, "-", COLOURS[name], NAMES[name])
                if proxy and key == "correct" and name not in ("sparse", "dense"):
                    over_rollouts(
                        axis, record, "reward", "--", COLOURS[name], NAMES[name] + ": its reward"
                    )
            axis.set(xlabel="rollouts", title=what + title)
            axis.grid(alpha=0.3)
        if not proxy:
            line[1].legend(fontsize=8)
    if proxy:  # too many lines for a place among them
        shown.legend(
            *axes[0][1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
        )
    shown.savefig(RESULTS / file, dpi=110)


figure(
    "ppo_rewards.png", {"": variants("sparse", "dense", "orm", "orm_dense")},
    [("maj@1", "dev: share of greedy solutions right"), ("correct", "training samples: share right"), ("ref_kl_k3", "KL to the SFT policy, nats per token")],
    proxy=True,
)  # fmt: skip
figure(
    "ppo_stability.png",
    {
        "": variants("sparse", "kl0", "attached"),
        "five times the learning rate\n": {"sparse": "ppo_stability/kl", "kl0": "ppo_stability/kl0", "attached": "ppo_stability/attached", "limit": "ppo_stability/limit"},
    },
    [("maj@1", "dev: share of greedy solutions right"), ("ref_kl_k3", "KL to the SFT policy, nats per token"), ("explained_variance", "explained variance of the value")],
    proxy=False,
)  # fmt: skip
figure(
    "genrm.png", {"": variants("sparse", "gold", "best", "hybrid")},
    [("maj@1", "dev: share of greedy solutions right"), ("correct", "training samples: share right"), ("false_positive_rate", "share of wrong samples scored 0.5 or more")],
    proxy=True,
)  # fmt: skip


METHODS = {  # folder/method: colour, name, whether its log is drawn over rollouts
    "arithmetic/sft": ("tab:olive", "SFT", False),
    "arithmetic/sft_more": ("gold", "SFT, 35 epochs", False),
    "arithmetic/ppo": ("tab:blue", "PPO", True),
    "ppo_longer/phases36": ("navy", "PPO, 36 phases", True),
    "arithmetic/ppo_base": ("lightblue", "PPO from the base", True),
    "arithmetic/ei": ("tab:purple", "expert iteration, K = 4", True),
    "arithmetic/ei_dedup": ("orchid", "K = 4, de-duplicated", True),
    "ei_samples/k16_dedup": ("tab:cyan", "K = 16, de-duplicated", True),
    "ei_continue/continue_dedup": ("tab:brown", "K = 4, de-duplicated, continued", True),
    "arithmetic/ei_base": ("deeppink", "K = 8 from the base", True),
    "arithmetic/ei_base_dedup": ("tab:gray", "K = 8 from the base, de-duplicated", True),
    "rcrl/ratio10": ("tab:green", "RCRL, 10 : 1", False),
}
HARD = {
    "hard/sft": ("tab:olive", "SFT", False),
    "hard/ppo": ("tab:blue", "PPO", True),
    "hard/phases36": ("navy", "PPO, 36 phases", True),
    "hard/phases72": ("gold", "PPO, 72 phases", True),
    "hard/ei": ("tab:purple", "expert iteration, K = 4", True),
    "hard/rounds3": ("black", "K = 4, a third round", True),
    "hard/rounds4": ("dimgray", "K = 4, four rounds", True),
    "hard/continue": ("tab:red", "K = 4, continued", True),
    "hard/k16_once": ("tab:orange", "K = 16, a quarter of the epochs", True),
    "hard/ei_dedup": ("orchid", "K = 4, de-duplicated", True),
    "hard/long_dedup": ("plum", "K = 4, de-duplicated, 12 epochs", True),
    "hard/k16_dedup": ("tab:cyan", "K = 16, de-duplicated", True),
    "hard_rcrl/ratio10": ("tab:green", "RCRL, 10 : 1", False),
    "hard_rcrl/control": ("limegreen", "its right solutions, no labels", False),
}


def all_methods(compared: dict[str, tuple[str, str, bool]], file: str) -> None:
    shown, (rollouts, quality, distinct) = plt.subplots(
        1, 3, figsize=(16, 4.8), layout="constrained"
    )
    compared = {name: style for name, style in compared.items() if recorded(name)}
    for place, (name, (colour, label, drawn)) in enumerate(compared.items()):
        if drawn:
            over_rollouts(rollouts, name, "maj@1", "o-", colour, label)
        first, last, count = (
            list(test_metric(name, key).values()) for key in ("maj@1", "pass@16", "distinct@16")
        )
        quality.plot(first, last, "o", color=colour, label=label, markersize=6)
        if count:
            mean = np.mean(count)
            distinct.barh(
                place,
                mean,
                0.7,
                color=colour,
                xerr=[[mean - min(count)], [max(count) - mean]],
                capsize=3,
            )
    rollouts.set(
        xlabel="rollouts sampled for training",
        ylabel="share of greedy solutions right (256 dev problems)",
    )
    rollouts.set_xscale("symlog", linthresh=2048, linscale=0.5)
    rollouts.set_xlim(left=0)
    quality.set(
        xlabel="maj@1: share of greedy solutions right (test)",
        ylabel="pass@16: any of 16 samples right (test)",
    )
    distinct.set(xlabel="distinct right solutions of 16 samples (test)", xlim=(0.8, None))
    distinct.set_yticks(range(len(compared)), [label for _, label, _ in compared.values()])
    distinct.invert_yaxis()
    for axis in (rollouts, quality, distinct):
        axis.grid(alpha=0.3)
    rollouts.set_title("mean and range of the seeds; colours as at the right", fontsize=9)
    rollouts.legend(fontsize=7)
    shown.savefig(RESULTS / file, dpi=100)


def over_epochs() -> None:
    found = {
        int(name.removeprefix("epochs")): name
        for name in methods(RESULTS / "sft_epochs", "metrics.jsonl")
    }
    shown, axes = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained")
    for axis, key, title in zip(axes, ("maj@1", "pass@8"), ("greedy solutions right", "any of 8 samples right"), strict=True):  # fmt: skip
        last = {
            n: {s: log[-1][key] for s, log in recorded(f"sft_epochs/{found[n]}").items()}
            for n in sorted(found)
        }
        seeds = set.intersection(*(set(values) for values in last.values()))
        band(
            axis,
            [[(n, values[s]) for n, values in last.items()] for s in sorted(seeds)],
            "o-",
            "tab:blue",
            "SFT",
        )
        axis.set(
            xlabel="epochs of SFT on 24 solutions",
            ylabel="share of 256 dev problems",
            title=title,
            xscale="log",
        )
        axis.set_xticks(list(last), [str(epochs) for epochs in last], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    shown.savefig(RESULTS / "sft_epochs.png", dpi=110)


def conditioning() -> None:
    mixtures = {
        "ratio1": "1 : 1,\nper line", "ratio10": "10 : 1,\nper line", "ratio100": "100 : 1,\nper line", "outcome1": "1 : 1,\nper solution",
        "control": "only right,\nno labels", "control_1600": "1,600 right,\nno labels", "control_mixed": "1 : 1,\nno labels",
    }  # fmt: skip
    shown, axis = plt.subplots(figsize=(10, 4.2), layout="constrained")
    for place, name in enumerate(mixtures):
        kinds = [
            ("test", "tab:green", "conditioned on [GOOD]"),
            ("bad", "tab:red", "conditioned on [BAD]"),
            ("none", "tab:gray", "no label"),
        ]
        for i, (file, colour, label) in enumerate(kinds):
            values = list(test_metric(f"rcrl/{name}", "maj@1", f"{file}.json").values())
            if values:
                control = name.startswith("control")
                x = place if control else place + 0.27 * (i - 1)
                mean = np.mean(values)
                axis.bar(x, mean, 0.25, color="tab:gray" if control else colour, label=None if place else label,
                         yerr=[[mean - min(values)], [max(values) - mean]], capsize=3)  # fmt: skip
    sft = np.mean(list(test_metric("arithmetic/sft", "maj@1").values()))
    axis.axhline(sft, color="black", linestyle=":", label="SFT")
    axis.set(ylabel="share of greedy solutions right (test)", ylim=(0.4, 1))
    axis.set_xticks(range(len(mixtures)), mixtures.values())
    axis.legend(fontsize=8, loc="lower right")
    axis.grid(alpha=0.3, axis="y")
    shown.savefig(RESULTS / "rcrl.png", dpi=110)


all_methods(METHODS, "methods.png")
all_methods(HARD, "hard.png")
over_epochs()
conditioning()
