"""The numbers behind README.md's table of claims: `python results/claims.py`.

Differences are between runs of the same seed, with the 95 % interval of their mean over the seeds (Student's t). A test
metric is that of the epoch, round or phase with the best maj@1 on dev, and so says nothing of what came after it."""

import functools
import sys

import numpy as np
from records import RESULTS, methods, over_phases, paired, recorded
from records import test_metric as test

sys.path.insert(0, str(RESULTS.parent))
from evaluate import paired_test  # noqa: E402


def dev(name: str, key: str, **where) -> dict[int, float]:
    """seed -> a metric on dev in the row of metrics.jsonl with these values, or in the last row that has it"""
    rows = {
        seed: [
            row[key] for row in log if key in row and all(row.get(k) == v for k, v in where.items())
        ]
        for seed, log in recorded(name).items()
    }
    return {seed: values[-1] for seed, values in rows.items() if values}


def show(what: str, values: dict[int, float], control: dict[int, float] | None = None) -> None:
    each = ", ".join(f"{v:.3f}" for v in values.values())
    if not values or (control is not None and not values.keys() & control.keys()):
        print(f"  {what}: no runs")
    elif control is None:
        print(f"  {what}: {np.mean(list(values.values())):.3f} ({each})")
    else:
        pairs, apart = paired(values, control)
        print(f"  {what}: {apart}; by seed {', '.join(f'{p:+.3f}' for p in pairs)}")


print("Reranking by the reward model of results/orm")
for tested in (
    "orm/orm_on_sft",
    "orm/orm_on_ppo",
    "rerank/ei",
    "rerank/ei_dedup",
    "rerank/rcrl_ratio10",
):
    for metric in ("rerank@32", "weighted@32"):
        show(f"{metric} - maj@32, {tested}", test(tested, metric), test(tested, "maj@32"))

TASKS = ("arithmetic", "hard")
print("C1 expert iteration reaches at least PPO's maj@1")
for task in TASKS:
    ei, ppo = (test(f"{task}/{method}", "maj@1") for method in ("ei", "ppo"))
    show(f"{task}, test maj@1, ei (18,432 samples) - ppo (10,240)", ei, ppo)
for task, longer in (("arithmetic", "ppo_longer/phases36"), ("hard", "hard/phases36")):
    for metric in ("maj@1", "pass@1", "pass@16"):
        ei, ppo, ppo36 = (test(name, metric) for name in (f"{task}/ei", f"{task}/ppo", longer))
        show(f"{task}, test {metric}, ei - ppo of 36 phases (both 18,432 samples)", ei, ppo36)
        show(f"{task}, test {metric}, ppo of 36 phases - of 20", ppo36, ppo)
    for phase in (20, 24, 28, 32, 36):
        show(f"{task}, dev maj@1 of 36 phases at phase {phase}", dev(longer, "maj@1", phase=phase))
for metric in ("maj@1", "pass@1", "pass@16", "distinct@16"):
    rounds4, phases72, ei = (test(f"hard/{name}", metric) for name in ("rounds4", "phases72", "ei"))
    show(
        f"hard, test {metric}, ei of 4 rounds - ppo of 72 phases (both 36,864 samples)",
        rounds4,
        phases72,
    )
    show(f"hard, test {metric}, ei of 4 rounds - of two", rounds4, ei)
    show(f"hard, test {metric}, ppo of 72 phases - ei of two rounds (18,432 samples)", phases72, ei)
for phase in (20, 36, 48, 60, 72):
    show(
        f"hard, dev maj@1 of 72 phases at phase {phase}", dev("hard/phases72", "maj@1", phase=phase)
    )
for n in (1, 2, 3, 4):
    show(
        f"hard, dev maj@1 of 4 rounds of ei after round {n}", dev("hard/rounds4", "maj@1", round=n)
    )
for key in ("entropy", "informative", "correct"):
    for first, last in ((2, 6), (31, 36), (67, 72)):
        shares = over_phases("hard/phases72", key, first, last)
        show(f"hard, {key} of phases {first} to {last} of 72", shares)
for task in TASKS:
    show(
        f"{task}, dev maj@1, ei after 9,216 samples - ppo after 10,240",
        dev(f"{task}/ei", "maj@1", round=1),
        dev(f"{task}/ppo", "maj@1", phase=20),
    )
for method in ("ei_base", "ei_base_dedup"):
    show(
        f"from the base, dev maj@1, {method} after 18,432 samples - ppo after 10,240",
        dev(f"arithmetic/{method}", "maj@1", round=1),
        dev("arithmetic/ppo_base", "maj@1", phase=20),
    )
    show(
        f"from the base, test maj@1, {method} (36,864 samples) - ppo (10,240)",
        test(f"arithmetic/{method}", "maj@1"),
        test("arithmetic/ppo_base", "maj@1"),
    )

print("C2 more epochs of SFT: maj@1 up, pass@n down (dev, after the last epoch)")
for key in ("maj@1", "pass@8"):
    for epochs in (2, 4, 16):
        show(f"{key} after {epochs} epochs", dev(f"sft_epochs/epochs{epochs}", key))
    for more, fewer in ((4, 2), (16, 4)):
        both = (dev(f"sft_epochs/epochs{n}", key) for n in (more, fewer))
        show(f"{key}, {more} epochs - {fewer}", *both)
show("maj@1 after 840 updates of one solution each (sft_more)", dev("arithmetic/sft_more", "maj@1"))

print("C3 RL raises maj@1 without losing pass@n, but does not pass SFT's pass@n")
for task in TASKS:
    for method in (
        "ppo",
        "ei",
        *(["phases36", "phases72", "rounds3", "rounds4"] if task == "hard" else []),
    ):
        for metric in ("maj@1", "pass@16"):
            rl, sft = (test(f"{task}/{name}", metric) for name in (method, "sft"))
            show(f"{task}, test {metric}, {method} - sft", rl, sft)

print("C4 dense and ORM rewards help sample efficiency, not the final score")
for reward in ("dense", "orm", "orm_dense", "orm_outcome"):
    for phase in (4, 8):
        show(
            f"dev maj@1 at phase {phase}, {reward} - sparse",
            dev(f"ppo_variants/{reward}", "maj@1", phase=phase),
            dev("arithmetic/ppo", "maj@1", phase=phase),
        )
    show(
        f"test maj@1, {reward} - sparse",
        test(f"ppo_variants/{reward}", "maj@1"),
        test("arithmetic/ppo", "maj@1"),
    )
for metric in ("maj@1", "pass@1", "pass@16"):
    with_outcome, alone = (
        test(f"ppo_variants/{reward}", metric) for reward in ("orm_outcome", "orm")
    )
    show(f"test {metric}, the outcome added to the ORM - the ORM alone", with_outcome, alone)

print("C5 expert iteration with K = 4 ends a few points below large K")
for large, small, what in (
    ("ei_samples/k16_dedup", "arithmetic/ei_dedup", "de-duplicated"),
    ("hard/k16_dedup", "hard/ei_dedup", "de-duplicated"),
    ("hard/k16_once", "hard/ei", "a quarter of the epochs"),
):
    for n in (1, 2):
        k16, k4 = (dev(name, "maj@1", round=n) for name in (large, small))
        show(f"{small}, dev maj@1 after round {n}, K = 16 ({what}) - K = 4", k16, k4)
    for metric in ("maj@1", "pass@1", "pass@16", "distinct@16"):
        show(
            f"{small}, test {metric}, K = 16 ({what}) - K = 4",
            test(large, metric),
            test(small, metric),
        )
print(
    "   all right solutions against de-duplicated, and against de-duplicated for longer (long_dedup)"
)
for all_of_them, one_of_each in (
    ("arithmetic/ei", "arithmetic/ei_dedup"),
    ("hard/ei", "hard/ei_dedup"),
    ("hard/ei", "hard/long_dedup"),
    ("hard/k16_round", "hard/k16_dedup"),
    ("hard/k16_round", "hard/ei"),
):
    for metric in ("maj@1", "pass@1", "pass@8", "follows_reference"):
        pair = (dev(name, metric, round=1) for name in (all_of_them, one_of_each))
        where = "training samples'" if metric == "follows_reference" else "dev"
        show(f"{where} {metric} in round 1, {all_of_them} - {one_of_each}", *pair)
    for metric in (
        ("maj@1", "pass@1", "pass@16", "distinct@16") if "round" not in all_of_them else ()
    ):
        show(
            f"test {metric}, {all_of_them} - {one_of_each}",
            test(all_of_them, metric),
            test(one_of_each, metric),
        )

print("C6 restarting from the base beats continuing")
for restart, other in (
    ("arithmetic/ei_dedup", "ei_continue/continue_dedup"),
    ("hard/ei", "hard/continue"),
):
    for metric in ("maj@1", "pass@1", "pass@16", "distinct@16"):
        show(
            f"{restart}, test {metric}, restart - continue",
            test(restart, metric),
            test(other, metric),
        )


def by_policy(values: dict[int, float]) -> dict[int, float]:
    """Seeds 4 and 5 of the ratios draw other samples from the policy of seed 0; their mean with it is one observation."""
    same = [values[seed] for seed in (0, 4, 5) if seed in values]
    return {0: float(np.mean(same))} | {
        seed: v for seed, v in values.items() if seed not in (0, 4, 5)
    }


print("C7 RCRL stays below expert iteration; 1:1 is the worst ratio")
for metric in ("maj@1", "pass@1"):
    for ratio in (1, 10, 100):
        for name in ("arithmetic/ei_dedup", "arithmetic/ei", "rcrl/control"):
            show(
                f"test {metric}, rcrl {ratio}:1 - {name}",
                test(f"rcrl/ratio{ratio}", metric),
                test(name, metric),
            )
    for name in ("rcrl/ratio1", "rcrl/control_mixed"):
        show(
            f"test {metric}, {name} - rcrl/control_1600",
            test(name, metric),
            test("rcrl/control_1600", metric),
        )
    for ratio in (10, 100):
        both = (by_policy(test(f"rcrl/ratio{n}", metric)) for n in (1, ratio))
        show(f"test {metric}, rcrl 1:1 - {ratio}:1, by the policy that they sample from", *both)
    show(
        f"test {metric}, rcrl/control - arithmetic/ei",
        test("rcrl/control", metric),
        test("arithmetic/ei", metric),
    )
for metric in ("maj@1", "pass@1", "pass@16", "distinct@16"):
    for other in ("hard/ei", "hard/rounds3", "hard_rcrl/control", "hard/sft"):
        show(
            f"harder task, test {metric}, rcrl 10:1 - {other}",
            test("hard_rcrl/ratio10", metric),
            test(other, metric),
        )
    for other in ("hard/ei", "hard/rounds3"):
        show(
            f"harder task, test {metric}, control - {other}",
            test("hard_rcrl/control", metric),
            test(other, metric),
        )
for metric in ("maj@1", "pass@1", "pass@16"):
    for one, other in (("ratio10", "control"), ("ratio10", "policy"), ("control", "policy")):
        both = (test(f"rcrl_all/hard_{name}", metric) for name in (one, other))
        show(f"harder task, all samples, test {metric}, {one} - {other}", *both)
for metric in ("maj@1", "pass@1", "pass@16", "distinct@16"):
    show(
        f"harder task, test {metric}, ei of three rounds - of two",
        test("hard/rounds3", metric),
        test("hard/ei", metric),
    )


def lowest(name: str) -> dict[int, float]:
    """The worst accuracy on dev of each seed's phases."""
    return {
        seed: min(row["maj@1"] for row in log if "maj@1" in row)
        for seed, log in recorded(name).items()
    }


print("C8 the KL penalty and the detached value branch keep PPO stable")
for variant in ("kl0", "attached"):
    show(
        f"test maj@1, {variant} - ppo",
        test(f"ppo_variants/{variant}", "maj@1"),
        test("arithmetic/ppo", "maj@1"),
    )
    show(
        f"dev maj@1 at phase 20, {variant} - ppo",
        dev(f"ppo_variants/{variant}", "maj@1", phase=20),
        dev("arithmetic/ppo", "maj@1", phase=20),
    )
    show(f"last KL to the initial policy, {variant}", dev(f"ppo_variants/{variant}", "ref_kl_k3"))
for name in ("kl", "kl0", "attached", "kl4", "limit", "both"):
    show(
        f"five times the rate, dev maj@1 at phase 20, {name}",
        dev(f"ppo_stability/{name}", "maj@1", phase=20),
    )
    show(f"five times the rate, lowest dev maj@1, {name}", lowest(f"ppo_stability/{name}"))
    show(
        f"five times the rate, last KL to the initial policy, {name}",
        dev(f"ppo_stability/{name}", "ref_kl_k3"),
    )
for name in ("kl0", "attached", "kl4", "limit", "both"):
    both = (dev(f"ppo_stability/{each}", "maj@1", phase=20) for each in (name, "kl"))
    show(f"five times the rate, dev maj@1 at phase 20, {name} - kl", *both)
    both = (lowest(f"ppo_stability/{each}") for each in (name, "kl"))
    show(f"five times the rate, lowest dev maj@1, {name} - kl", *both)
    both = (over_phases(f"ppo_stability/{each}", "correct", 2, 20) for each in (name, "kl"))
    show(f"five times the rate, share of right samples in phases 2 to 20, {name} - kl", *both)
for what, found in (
    ("at phase 20", functools.partial(dev, key="maj@1", phase=20)),
    ("at the lowest", lowest),
):
    both = (found(f"ppo_stability/{each}") for each in ("limit", "kl0"))
    show(f"five times the rate, dev maj@1 {what}, limit - kl0", *both)
for metric in ("maj@1", "pass@16"):
    show(
        f"test {metric}, adapters of rank 16 - all weights",
        test("ppo_variants/lora", metric),
        test("arithmetic/ppo", metric),
    )
show("last KL to the initial policy, ppo", dev("arithmetic/ppo", "ref_kl_k3"))

print("Lambda of GAE, and curricula of PPO")
for task, name in (
    ("arithmetic", "ppo_variants/lam095"),
    ("hard", "hard/backtracking"),
    ("hard", "hard/plr"),
):
    for metric in ("maj@1", "pass@1", "pass@16"):
        show(
            f"{task}, test {metric}, {name} - ppo", test(name, metric), test(f"{task}/ppo", metric)
        )
    for phase in (4, 8, 12, 20):
        both = (dev(each, "maj@1", phase=phase) for each in (name, f"{task}/ppo"))
        show(f"{task}, dev maj@1 at phase {phase}, {name} - ppo", *both)
    for what, first, last in (("2 to 6", 2, 6), ("16 to 20", 16, 20)):
        for key in ("correct", "informative", "explained_variance"):
            both = (over_phases(each, key, first, last) for each in (name, f"{task}/ppo"))
            show(f"{task}, {key} of phases {what}, {name} - ppo", *both)

print("C9 RL without SFT closes most of the gap to SFT + RL (less than 10 points remain)")
show(
    "test maj@1, ppo from the base - from SFT (both 10,240 samples)",
    test("arithmetic/ppo_base", "maj@1"),
    test("arithmetic/ppo", "maj@1"),
)
for method, from_base in (("ei", "ei_base"), ("ei_dedup", "ei_base_dedup")):
    for metric in ("maj@1", "pass@1", "pass@16"):
        show(
            f"test {metric}, {method} from the base (36,864 samples) - from SFT (18,432)",
            test(f"arithmetic/{from_base}", metric),
            test(f"arithmetic/{method}", metric),
        )
for metric in ("maj@1", "pass@1", "pass@16"):
    show(
        f"from the base, all solutions - de-duplicated, test {metric}",
        *(test(f"arithmetic/{name}", metric) for name in ("ei_base", "ei_base_dedup")),
    )

print("Learning rates of expert iteration")
first = (dev(name, "maj@1", round=1) for name in ("ei_lr/hard_3e-4", "hard/ei"))
show("harder task, dev maj@1 after round 1, 3e-4 - 1e-3", *first)
for metric in ("maj@1", "pass@1"):
    for what, one, other in (
        (
            "one round of seed 0, by tokens of a micro-batch, 3e-4 - 1e-3",
            "ei_lr/round_3e-4",
            "ei_lr/round_1e-3",
        ),
        ("harder task, two rounds, 3e-4 - 1e-3", "ei_lr/hard_3e-4", "hard/ei"),
        ("harder task, two rounds, once more - recorded before", "rcrl_all/hard_policy", "hard/ei"),
    ):
        show(f"test {metric}, {what}", test(one, metric), test(other, metric))

print("SmolLM2-135M-Instruct on GSM8K, one run each: differences on the same test problems")


def greedily_right(method: str) -> list[float]:
    (right,), (report,) = (
        recorded(f"gsm8k_smollm2/{method}", file).values()
        for file in ("greedy_right.json", "test.json")
    )
    return np.isin(np.arange(report["n_problems"]), right).astype(float).tolist()


def shown_test(found: dict) -> str:
    low, high = found["ci95"]
    return f"{found['difference']:+.3f} ({low:+.3f} to {high:+.3f}), p {found['p']:.2g}"


for method in ("ei", "ppo", "ppo_1e-4"):
    print(
        f"  maj@1, {method} - sft: {shown_test(paired_test(greedily_right(method), greedily_right('sft')))}"
    )
for method in ("sft", "ei"):
    (report,) = recorded(f"gsm8k_smollm2/{method}", "test.json").values()
    for metric in ("rerank@96", "weighted@96"):
        print(
            f"  {metric} - maj@96, samples of {method}: {shown_test(report[f'{metric} - maj@96'])}"
        )
for method in ("ppo", "ppo_1e-4"):
    (log,) = recorded(f"gsm8k_smollm2/{method}").values()
    phases, shown = max(row.get("phase", 0) for row in log), []
    for first, last in ((1, 3), (phases - 2, phases)):
        (share,) = over_phases(f"gsm8k_smollm2/{method}", "correct", first, last).values()
        shown.append(f"{share:.3f} in phases {first} to {last}")
    print(f"  {method}: right on training questions {', '.join(shown)}")

print(
    "hours, as recorded: training, evaluation (some runs with two threads, most with one beside another job)"
)
for folder in sorted(
    path
    for path in RESULTS.iterdir()
    if path.is_dir() and path.name not in ("defaults", "generation")
):
    logs = [
        log for name in methods(folder, "metrics.jsonl") for log in recorded(folder / name).values()
    ]
    trained = sum(log[-1]["seconds"] for log in logs)
    reports = [
        report
        for file in ("test.json", "bad.json", "none.json")
        for name in methods(folder, file)
        for report in recorded(folder / name, file).values()
    ]
    if logs or reports:
        print(
            f"  {folder.name}: {trained / 3600:.1f}, {sum(report.get('seconds') or 0 for report in reports) / 3600:.1f}"
        )
