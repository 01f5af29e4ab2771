"""Figures of the recorded runs (needs matplotlib, which the scripts do not): `python results/plot.py`.

results/methods.png       expert iteration and PPO over rollouts: greedy accuracy, and the chance of one right among eight
results/sft_epochs.png    what more epochs of SFT do to the greedy accuracy and to pass@8
results/rcrl.png          return-conditioned RL: mixtures and what the policy is conditioned on
results/ppo_rewards.png   PPO with each kind of reward: exact accuracy, what the reward says, and the KL, over rollouts
results/ppo_stability.png PPO with and without the KL penalty and the detached value branch
results/genrm.png         PPO rewarded by the answer check and by a generative reward model beside two kinds of references
Lines are means over the seeds, bands (in bar charts, whiskers) reach from the lowest to the highest seed."""

import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

RESULTS = Path(__file__).parent
COLOURS = {
    "sparse": "tab:blue", "dense": "tab:orange", "orm": "tab:green", "orm_dense": "tab:red", "kl0": "tab:brown",
    "attached": "tab:pink", "gold": "tab:orange", "best": "tab:red", "hybrid": "tab:green",
}  # fmt: skip
NAMES = {
    "sparse": "sparse: answer right", "dense": "dense: steps of the reference", "orm": "ORM, last token",
    "orm_dense": "ORM, line by line", "kl0": "no KL penalty", "attached": "value not detached",
    "gold": "GenRM beside the gold solution", "best": "GenRM beside the best of 16", "hybrid": "half checked, a quarter each GenRM",
}  # fmt: skip


def runs(name: str) -> list[list[dict]]:
    """The metrics of every seed of a variant; "sparse" is PPO as it is by default."""
    folder = "genrm" if name in ("gold", "best", "hybrid") else "ppo_variants"
    pattern = "arithmetic/ppo_[0-9]" if name == "sparse" else f"{folder}/{name}_[0-9]"
    files = sorted(RESULTS.glob(f"{pattern}/metrics.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def draw(axis, name: str, key: str, style: str = "-", label: str | None = None) -> None:
    logs = [[(row["samples"], row[key]) for row in log if row.get(key) is not None] for log in runs(name)]
    if not logs:
        return
    x = [samples for samples, _ in logs[0]]
    y = np.array([[value for _, value in log] for log in logs])
    axis.plot(x, y.mean(0), style, color=COLOURS[name], label=label or f"{NAMES[name]} ({len(logs)} seeds)")
    axis.fill_between(x, y.min(0), y.max(0), color=COLOURS[name], alpha=0.15, linewidth=0)


def figure(file: str, names: list[str], panels: list[tuple[str, str]], proxy: bool) -> None:
    shown, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.2), layout="constrained")
    for axis, (key, title) in zip(axes, panels, strict=True):
        for name in names:
            draw(axis, name, key)
            if proxy and key == "correct" and name not in ("sparse", "dense"):
                draw(axis, name, "reward", "--", f"{NAMES[name]}: its reward")
        axis.set(xlabel="rollouts", title=title)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    shown.savefig(RESULTS / file, dpi=110)


figure(
    "ppo_rewards.png", ["sparse", "dense", "orm", "orm_dense"],
    [("maj@1", "dev: share of greedy solutions right"), ("correct", "training samples: share right"), ("kl_k3", "KL to the SFT policy, nats per token")],
    proxy=True,
)  # fmt: skip
figure(
    "ppo_stability.png", ["sparse", "kl0", "attached"],
    [("maj@1", "dev: share of greedy solutions right"), ("kl_k3", "KL to the SFT policy, nats per token"), ("explained_variance", "explained variance of the value")],
    proxy=False,
)  # fmt: skip
figure(
    "genrm.png", ["sparse", "gold", "best", "hybrid"],
    [("maj@1", "dev: share of greedy solutions right"), ("correct", "training samples: share right"), ("half_if_wrong", "share of wrong samples scored 0.5 or more")],
    proxy=True,
)  # fmt: skip


def recorded(pattern: str, file: str = "metrics.jsonl") -> list:
    """What the runs recorded, one entry a seed: the rows of metrics.jsonl, or the object in another file."""
    files = sorted(RESULTS.glob(f"{pattern}_[0-9]/{file}"))
    return [[json.loads(line) for line in f.read_text().splitlines()] if file.endswith("l") else json.loads(f.read_text()) for f in files]  # fmt: skip


def band(axis, x: list, by_seed: list[list[float]], colour: str, label: str, style: str = "o-") -> None:
    """The mean over the seeds, and from the lowest to the highest."""
    y = np.array(by_seed)
    axis.plot(x, y.mean(0), style, color=colour, label=f"{label} ({len(y)} seed{'s' * (len(y) > 1)})", markersize=3)
    axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)


def over_rollouts() -> None:
    lines = [
        ("ei_samples/k1", "tab:olive", "expert iteration, K = 1"), ("arithmetic/ei", "tab:purple", "expert iteration, K = 4"),
        ("ei_samples/k16", "tab:cyan", "expert iteration, K = 16"), ("ei_continue/continue", "tab:brown", "the same, K = 4, never restarted"),
        ("arithmetic/ei_base", "tab:gray", "from the base, K = 8"), ("equal_rollouts/ppo", "tab:blue", "PPO"),
        ("arithmetic/ppo_base", "lightblue", "PPO from the base"),
    ]  # fmt: skip
    shown, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for pattern, colour, label in lines:
        logs = recorded(pattern)
        for axis, key in zip(axes, ("maj@1", "pass@8"), strict=True):
            rows = [[(row["samples"], row[key]) for row in log if row.get(key) is not None] for log in logs]
            length = min(map(len, rows), default=0)  # a run of expert iteration ends when a round gains nothing
            if length > 1 or (length and key == "pass@8"):
                x = [samples for samples, _ in rows[0][:length]]
                band(axis, x, [[value for _, value in row[:length]] for row in rows], colour, label)
    for axis, title in zip(axes, ("share of greedy solutions right", "pass@8"), strict=True):
        axis.set(xlabel="rollouts sampled for training", ylabel=f"{title} (256 dev problems)", xscale="symlog")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    shown.savefig(RESULTS / "methods.png", dpi=110)


def over_epochs() -> None:
    names = {int(re.search(r"epochs(\d+)_", f.name)[1]) for f in RESULTS.glob("sft_epochs/epochs*_0")}
    last = {epochs: [log[-1] for log in recorded(f"sft_epochs/epochs{epochs}")] for epochs in sorted(names)}
    shown, axes = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained")
    for axis, key, title in zip(axes, ("maj@1", "pass@8"), ("greedy solutions right", "any of 8 samples right"), strict=True):  # fmt: skip
        n_seeds = min(map(len, last.values()))
        band(axis, list(last), [[rows[s][key] for rows in last.values()] for s in range(n_seeds)], "tab:blue", "SFT")
        axis.set(xlabel="epochs of SFT on 24 solutions", ylabel=f"{title} (share of 256 dev problems)", xscale="log")
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
        kinds = [("test", "tab:green", "[GOOD]"), ("bad", "tab:red", "[BAD]"), ("none", "tab:gray", "no label")]
        for i, (file, colour, label) in enumerate(kinds):
            values = [report["maj@1"]["value"] for report in recorded(f"rcrl/{name}", f"{file}.json")]
            if values:
                x, control = place + 0.27 * (i - 1), name.startswith("control")
                mean = np.mean(values)
                axis.bar(x, mean, 0.25, color="tab:gray" if control else colour, label=None if place else f"conditioned on {label}".replace("conditioned on no", "no"),
                         yerr=[[mean - min(values)], [max(values) - mean]], capsize=3)  # fmt: skip
    sft = np.mean([report["maj@1"]["value"] for report in recorded("arithmetic/sft", "test.json")])
    axis.axhline(sft, color="black", linestyle=":", label="SFT")
    axis.set(ylabel="share of greedy solutions right (test)", ylim=(0.4, 1))
    axis.set_xticks(range(len(mixtures)), mixtures.values())
    axis.legend(fontsize=8, loc="lower right")
    axis.grid(alpha=0.3, axis="y")
    shown.savefig(RESULTS / "rcrl.png", dpi=110)


over_rollouts()
over_epochs()
conditioning()
