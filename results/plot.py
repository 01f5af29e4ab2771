"""Figures of the recorded runs (needs matplotlib, which the scripts do not): `python results/plot.py`.

results/ppo_rewards.png   PPO with each kind of reward: exact accuracy, what the reward says, and the KL, over rollouts
results/ppo_stability.png PPO with and without the KL penalty and the detached value branch
results/genrm.png         PPO rewarded by the answer check and by a generative reward model beside two kinds of references
Lines are means over the seeds, bands reach from the lowest to the highest seed."""

import json
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
