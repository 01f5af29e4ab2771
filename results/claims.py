"""Print the numbers behind the table of claims: `python results/claims.py`.

The script compares runs with the same seed. It prints the 95 % interval of the mean difference over
the seeds (Student's t). A test metric is from the epoch, round or phase with the best maj@1 on dev.
It says nothing about later checkpoints.
"""

import sys

import numpy as np
from records import RESULTS, evaluations, mean, metrics, over_phases, paired, read, spread
from records import test_metric as test

sys.path.insert(0, str(RESULTS.parent))
from evaluate import paired_test  # noqa: E402

TASKS = "arithmetic", "hard"


def dev(method: str, key: str, **where) -> dict[int, float]:
    """Return a metric on dev by seed.

    The value is from the last row with the metric. `where` restricts the rows to these values.
    """
    found = {}
    for seed, log in metrics(method).items():
        for row in log:
            if key in row and all(row.get(name) == value for name, value in where.items()):
                found[seed] = row[key]
    return found


def minutes(method: str, **where) -> dict[int, float]:
    """Return the minutes of a run by seed, up to its last row or the last one with these values."""
    return {seed: seconds / 60 for seed, seconds in dev(method, "seconds", **where).items()}


def lowest(method: str) -> dict[int, float]:
    """Return the lowest maj@1 on dev of a run by seed."""
    logs = metrics(method).items()
    return {seed: min(row["maj@1"] for row in log if "maj@1" in row) for seed, log in logs}


def show(what: str, values: dict[int, float], control: dict[int, float] | None = None) -> None:
    """Print values by seed, or their differences to a control by seed."""
    if not values or (control is not None and not values.keys() & control.keys()):
        print(f"  {what}: no runs")
    elif control is None:
        print(f"  {what}: {mean(values):.3f} ({', '.join(f'{v:.3f}' for v in values.values())})")
    else:
        pairs, interval = paired(values, control)
        print(f"  {what}: {interval}; by seed {', '.join(f'{p:+.3f}' for p in pairs)}")


def show_test(what: str, metric: str, method: str, control: str) -> None:
    """Print the differences of a metric on the test split between two methods."""
    show(what, test(method, metric), test(control, metric))


def reranking() -> None:
    print("Reranking by the reward model of results/orm")
    policies = "orm/orm_on_sft", "orm/orm_on_ppo", "rerank/ei", "rerank/ei_dedup"
    for policy in (*policies, "rerank/rcrl_ratio10"):
        for metric in ("rerank@32", "weighted@32"):
            show(f"{metric} - maj@32, {policy}", test(policy, metric), test(policy, "maj@32"))


def show_spread(what: str, values: dict[int, float]) -> None:
    print(f"  {what}: {spread(values)}")


def reward_models() -> None:
    print("Quality of the reward models on dev, mean (lowest - highest) over the seeds")
    for model in ("orm/orm", "orm/orm_again"):
        reports = evaluations(model, "quality").items()
        for key in ("auc", "auc_within", "accuracy", "calibration_error"):
            show_spread(f"{key}, {model}", {seed: report[key] for seed, report in reports})
    reports = evaluations("orm/orm", "quality").items()
    for position in (0.0, 0.25, 0.5, 0.75, 1.0):
        found = ((s, row) for s, report in reports for row in report["by_position"])
        found = {seed: row["auc"] for seed, row in found if row["position"] == position}
        show_spread(f"auc after {position:.0%} of a solution, orm/orm", found)
    for n in (8, 16):
        found = ((s, row) for s, report in reports for row in report["best_of_n"])
        found = {seed: row for seed, row in found if row["n"] == n}
        show(f"best of {n}, orm/orm", {seed: row["orm"] for seed, row in found.items()})
        show_spread(f"any of {n}", {seed: row["oracle"] for seed, row in found.items()})
    for model in ("genrm/genrm", "genrm/genrm_again", "genrm/genrm_third"):
        reports = evaluations(model, "quality").items()
        show(f"auc, {model}", {seed: report["auc"] for seed, report in reports})


def expert_iteration_and_ppo() -> None:
    print("C1 expert iteration reaches at least PPO's maj@1")
    for task in TASKS:
        what = f"{task}, test maj@1, ei (18,432 samples) - ppo (10,240)"
        show_test(what, "maj@1", f"{task}/ei", f"{task}/ppo")
    for task, longer in (("arithmetic", "ppo_longer/phases36"), ("hard", "hard/phases36")):
        for metric in ("maj@1", "pass@1", "pass@16"):
            what = f"{task}, test {metric}, ei - ppo of 36 phases (both 18,432 samples)"
            show_test(what, metric, f"{task}/ei", longer)
            what = f"{task}, test {metric}, ppo of 36 phases - of 20"
            show_test(what, metric, longer, f"{task}/ppo")
        for phase in (20, 24, 28, 32, 36):
            values = dev(longer, "maj@1", phase=phase)
            show(f"{task}, dev maj@1 of 36 phases at phase {phase}", values)
    for metric in ("maj@1", "pass@1", "pass@16", "distinct@16"):
        what = f"hard, test {metric}, ei of 4 rounds - ppo of 72 phases (both 36,864 samples)"
        show_test(what, metric, "hard/rounds4", "hard/phases72")
        what = f"hard, test {metric}, ei of 4 rounds - of two"
        show_test(what, metric, "hard/rounds4", "hard/ei")
        what = f"hard, test {metric}, ppo of 72 phases - ei of two rounds (18,432 samples)"
        show_test(what, metric, "hard/phases72", "hard/ei")
    for phase in (20, 36, 48, 60, 72):
        values = dev("hard/phases72", "maj@1", phase=phase)
        show(f"hard, dev maj@1 of 72 phases at phase {phase}", values)
    for n in (1, 2, 3, 4):
        values = dev("hard/rounds4", "maj@1", round=n)
        show(f"hard, dev maj@1 of 4 rounds of ei after round {n}", values)
    for key in ("entropy", "informative", "correct"):
        for first, last in ((2, 6), (31, 36), (67, 72)):
            values = over_phases("hard/phases72", key, first, last)
            show(f"hard, {key} of phases {first} to {last} of 72", values)
    for task in TASKS:
        show(f"{task}, dev maj@1 of ppo at phase 4", dev(f"{task}/ppo", "maj@1", phase=4))
        ei, ppo = dev(f"{task}/ei", "maj@1", round=1), dev(f"{task}/ppo", "maj@1", phase=20)
        show(f"{task}, dev maj@1 of ei after round 1", ei)
        show(f"{task}, dev maj@1 of ppo at phase 20", ppo)
        show(f"{task}, dev maj@1, ei after 9,216 samples - ppo after 10,240", ei, ppo)
    for method in ("ei_base", "ei_base_dedup"):
        ei = dev(f"arithmetic/{method}", "maj@1", round=1)
        ppo = dev("arithmetic/ppo_base", "maj@1", phase=20)
        what = f"from the base, dev maj@1, {method} after 18,432 samples - ppo after 10,240"
        show(what, ei, ppo)
        what = f"from the base, test maj@1, {method} (36,864 samples) - ppo (10,240)"
        show_test(what, "maj@1", f"arithmetic/{method}", "arithmetic/ppo_base")


def settings_of_ppo() -> None:
    print("PPO with other settings, harder task")
    for name in ("hard/phases36_t1", "hard/phases36", "hard/ei"):
        show(f"test maj@1, {name}", test(name, "maj@1"))
    for phase in (4, 8, 16, 36):
        for name in ("phases36", "phases36_t1"):
            values = dev(f"hard/{name}", "maj@1", phase=phase)
            show(f"dev maj@1 at phase {phase}, {name}", values)
        show(f"dev maj@1 at phase {phase}, loo", dev("advantages/hard_loo", "maj@1", phase=phase))
    for phase in (8, 12, 36):
        for name in ("lr5e-4", "long_lr5e-4"):
            values = dev(f"tuning/{name}", "maj@1", phase=phase)
            show(f"dev maj@1 at phase {phase}, {name}", values)
    for first, last in ((2, 8), (9, 16)):
        values = over_phases("tuning/t1", "explained_variance", first, last)
        show(f"explained variance of phases {first} to {last}, t1", values)
    for metric in ("maj@1", "pass@1", "pass@16"):
        for control in ("hard/phases36", "hard/ei", "clipping/hard"):
            what = f"test {metric}, loo of 36 phases at temperature 1 - {control}"
            show_test(what, metric, "advantages/hard_loo", control)
        what = f"test {metric}, loo of 144 phases - of 36"
        show_test(what, metric, "comparison/hard_loo", "advantages/hard_loo")
        what = f"test {metric}, ei with norm 0.1 - ppo of 36 phases"
        show_test(what, metric, "clipping/hard", "hard/phases36")
    for key in ("entropy", "ref_kl_k3"):
        for name in ("hard/phases36", "hard/phases36_t1", "advantages/hard_loo"):
            show(f"last {key}, {name}", dev(name, key))


def epochs_of_sft() -> None:
    print("C2 more epochs of SFT: maj@1 up, pass@n down (dev, after the last epoch)")
    for key in ("maj@1", "pass@8"):
        after = {n: dev(f"sft_epochs/epochs{n}", key) for n in (2, 4, 16)}
        for n, values in after.items():
            show(f"{key} after {n} epochs", values)
        for more, fewer in ((4, 2), (16, 4)):
            show(f"{key}, {more} epochs - {fewer}", after[more], after[fewer])
    values = dev("arithmetic/sft_more", "maj@1")
    show("maj@1 after 840 updates of one solution each (sft_more)", values)


def pass_at_n() -> None:
    print("C3 RL raises maj@1 without losing pass@n, but does not pass SFT's pass@n")
    longer = {"arithmetic": (), "hard": ("phases36", "phases72", "rounds3", "rounds4")}
    for task in TASKS:
        for method in ("ppo", "ei", *longer[task]):
            for metric in ("maj@1", "pass@16"):
                what = f"{task}, test {metric}, {method} - sft"
                show_test(what, metric, f"{task}/{method}", f"{task}/sft")


def rewards() -> None:
    print("C4 dense and ORM rewards help sample efficiency, not the final score")
    for reward in ("dense", "orm", "orm_dense", "orm_outcome"):
        method = f"ppo_variants/{reward}"
        for phase in (4, 8):
            both = (dev(name, "maj@1", phase=phase) for name in (method, "arithmetic/ppo"))
            show(f"dev maj@1 at phase {phase}, {reward} - sparse", *both)
        show_test(f"test maj@1, {reward} - sparse", "maj@1", method, "arithmetic/ppo")
    for metric in ("maj@1", "pass@1", "pass@16"):
        what = f"test {metric}, the outcome added to the ORM - the ORM alone"
        show_test(what, metric, "ppo_variants/orm_outcome", "ppo_variants/orm")


def samples_per_question() -> None:
    print("C5 expert iteration with K = 4 ends a few points below large K")
    for large, small, what in (
        ("ei_samples/k16_dedup", "arithmetic/ei_dedup", "de-duplicated"),
        ("hard/k16_dedup", "hard/ei_dedup", "de-duplicated"),
        ("hard/k16_once", "hard/ei", "a quarter of the epochs"),
    ):
        for n in (1, 2):
            both = (dev(name, "maj@1", round=n) for name in (large, small))
            show(f"{small}, dev maj@1 after round {n}, K = 16 ({what}) - K = 4", *both)
        for metric in ("maj@1", "pass@1", "pass@16", "distinct@16"):
            show_test(f"{small}, test {metric}, K = 16 ({what}) - K = 4", metric, large, small)
    for control in ("hard/k16_once", "hard/ei"):
        for metric in ("maj@1", "pass@1", "pass@16", "distinct@16"):
            what = f"test {metric}, at most 10 solutions of a question (k16_max10) - {control}"
            show_test(what, metric, "hard/k16_max10", control)
    longer = "against de-duplicated for longer (long_dedup)"
    print(f"   all right solutions against de-duplicated, and {longer}")
    for method, control in (
        ("arithmetic/ei", "arithmetic/ei_dedup"),
        ("hard/ei", "hard/ei_dedup"),
        ("hard/ei", "hard/long_dedup"),
        ("hard/k16_round", "hard/k16_dedup"),
        ("hard/k16_round", "hard/ei"),
    ):
        for n in (1, 2):
            values, others = (dev(name, "maj@1", round=n) for name in (method, control))
            same = sorted(values.keys() & others.keys())
            if len(same) > 1:
                what = f"dev maj@1 after round {n}, {len(same)} seeds"
                show_spread(f"{what}, {method}", {seed: values[seed] for seed in same})
                show_spread(f"{what}, {control}", {seed: others[seed] for seed in same})
        for metric in ("maj@1", "pass@1", "pass@8", "follows_reference"):
            both = (dev(name, metric, round=1) for name in (method, control))
            where = "training samples'" if metric == "follows_reference" else "dev"
            show(f"{where} {metric} in round 1, {method} - {control}", *both)
        # k16_round has one round only.
        if method != "hard/k16_round":
            for metric in ("maj@1", "pass@1", "pass@16", "distinct@16"):
                show_test(f"test {metric}, {method} - {control}", metric, method, control)


def restarting() -> None:
    print("C6 restarting from the base beats continuing")
    for restart, other in (
        ("arithmetic/ei_dedup", "ei_continue/continue_dedup"),
        ("hard/ei", "hard/continue"),
    ):
        for metric in ("maj@1", "pass@1", "pass@16", "distinct@16"):
            what = f"{restart}, test {metric}, restart - continue"
            show_test(what, metric, restart, other)


def by_policy(values: dict[int, float]) -> dict[int, float]:
    """Average the seeds 0, 4 and 5 of a ratio. All three sample from the policy of seed 0."""
    same = {seed: value for seed, value in values.items() if seed in (0, 4, 5)}
    return {0: mean(same)} | {seed: v for seed, v in values.items() if seed not in same}


def return_conditioned_rl() -> None:
    print("C7 RCRL stays below expert iteration; 1:1 is the worst ratio")
    for metric in ("maj@1", "pass@1"):
        for ratio in (1, 10, 100):
            for name in ("arithmetic/ei_dedup", "arithmetic/ei", "rcrl/control"):
                what = f"test {metric}, rcrl {ratio}:1 - {name}"
                show_test(what, metric, f"rcrl/ratio{ratio}", name)
        for name in ("rcrl/ratio1", "rcrl/control_mixed"):
            what = f"test {metric}, {name} - rcrl/control_1600"
            show_test(what, metric, name, "rcrl/control_1600")
        for ratio in (10, 100):
            both = (by_policy(test(f"rcrl/ratio{n}", metric)) for n in (1, ratio))
            show(f"test {metric}, rcrl 1:1 - {ratio}:1, by the policy that they sample from", *both)
        what = f"test {metric}, rcrl/control - arithmetic/ei"
        show_test(what, metric, "rcrl/control", "arithmetic/ei")
    for metric in ("maj@1", "pass@1", "pass@16", "distinct@16"):
        for other in ("hard/ei", "hard/rounds3", "hard_rcrl/control", "hard/sft"):
            what = f"harder task, test {metric}, rcrl 10:1 - {other}"
            show_test(what, metric, "hard_rcrl/ratio10", other)
        for other in ("hard/ei", "hard/rounds3"):
            what = f"harder task, test {metric}, control - {other}"
            show_test(what, metric, "hard_rcrl/control", other)
    for name in ("monotone", "any_monotone"):
        for metric in ("maj@1", "pass@1", "pass@16"):
            what = f"harder task, test {metric}, labels {name} - mean of the completions"
            show_test(what, metric, f"hard_rcrl/{name}", "hard_rcrl/again")
        for key in ("good_lines", "good_if_incorrect"):
            show(f"harder task, {key}, {name}", dev(f"hard_rcrl/{name}", key))
            show(f"harder task, {key}, mean of the completions", dev("hard_rcrl/again", key))
    for metric in ("maj@1", "pass@1", "pass@16"):
        for one, other in (("ratio10", "control"), ("ratio10", "policy"), ("control", "policy")):
            what = f"harder task, all samples, test {metric}, {one} - {other}"
            show_test(what, metric, f"rcrl_all/hard_{one}", f"rcrl_all/hard_{other}")
    for metric in ("maj@1", "pass@1", "pass@16", "distinct@16"):
        what = f"harder task, test {metric}, ei of three rounds - of two"
        show_test(what, metric, "hard/rounds3", "hard/ei")


def stability() -> None:
    print("C8 the KL penalty and the detached value branch keep PPO stable")
    for variant in ("kl0", "attached"):
        method = f"ppo_variants/{variant}"
        show_test(f"test maj@1, {variant} - ppo", "maj@1", method, "arithmetic/ppo")
        both = (dev(name, "maj@1", phase=20) for name in (method, "arithmetic/ppo"))
        show(f"dev maj@1 at phase 20, {variant} - ppo", *both)
        show(f"last KL to the initial policy, {variant}", dev(method, "ref_kl_k3"))
    fast, control = "five times the rate", "ppo_stability/kl"
    for name in ("kl", "kl0", "attached", "kl4", "limit", "both"):
        method = f"ppo_stability/{name}"
        show(f"{fast}, dev maj@1 at phase 20, {name}", dev(method, "maj@1", phase=20))
        show(f"{fast}, lowest dev maj@1, {name}", lowest(method))
        show(f"{fast}, last KL to the initial policy, {name}", dev(method, "ref_kl_k3"))
    for name in ("kl0", "attached", "kl4", "limit", "both"):
        method = f"ppo_stability/{name}"
        both = (dev(each, "maj@1", phase=20) for each in (method, control))
        show(f"{fast}, dev maj@1 at phase 20, {name} - kl", *both)
        show(f"{fast}, lowest dev maj@1, {name} - kl", lowest(method), lowest(control))
        both = (over_phases(each, "correct", 2, 20) for each in (method, control))
        show(f"{fast}, share of right samples in phases 2 to 20, {name} - kl", *both)
    limit, kl0 = "ppo_stability/limit", "ppo_stability/kl0"
    both = (dev(each, "maj@1", phase=20) for each in (limit, kl0))
    show(f"{fast}, dev maj@1 at phase 20, limit - kl0", *both)
    show(f"{fast}, dev maj@1 at the lowest, limit - kl0", lowest(limit), lowest(kl0))
    for metric in ("maj@1", "pass@16"):
        what = f"test {metric}, adapters of rank 16 - all weights"
        show_test(what, metric, "ppo_variants/lora", "arithmetic/ppo")
    show("last KL to the initial policy, ppo", dev("arithmetic/ppo", "ref_kl_k3"))
    for method in ("arithmetic/ppo", "ppo_variants/kl0", "ppo_variants/attached"):
        show(f"right samples of phases 17 to 20, {method}", over_phases(method, "correct", 17, 20))


def lambda_and_curricula() -> None:
    print("Lambda of GAE, and curricula of PPO")
    for task, method in (
        ("arithmetic", "ppo_variants/lam095"),
        ("hard", "hard/backtracking"),
        ("hard", "hard/plr"),
    ):
        control = f"{task}/ppo"
        for metric in ("maj@1", "pass@1", "pass@16"):
            show_test(f"{task}, test {metric}, {method} - ppo", metric, method, control)
        for phase in (4, 8, 12, 20):
            both = (dev(each, "maj@1", phase=phase) for each in (method, control))
            show(f"{task}, dev maj@1 at phase {phase}, {method} - ppo", *both)
        for first, last in ((2, 6), (16, 20)):
            for key in ("correct", "informative", "explained_variance"):
                both = (over_phases(each, key, first, last) for each in (method, control))
                show(f"{task}, {key} of phases {first} to {last}, {method} - ppo", *both)


def from_the_base() -> None:
    print("C9 RL without SFT closes most of the gap to SFT + RL (less than 10 points remain)")
    what = "test maj@1, ppo from the base - from SFT (both 10,240 samples)"
    show_test(what, "maj@1", "arithmetic/ppo_base", "arithmetic/ppo")
    for method, base in (("ei", "ei_base"), ("ei_dedup", "ei_base_dedup")):
        for metric in ("maj@1", "pass@1", "pass@16"):
            what = f"test {metric}, {method} from the base (36,864 samples) - from SFT (18,432)"
            show_test(what, metric, f"arithmetic/{base}", f"arithmetic/{method}")
    for metric in ("maj@1", "pass@1", "pass@16"):
        what = f"from the base, all solutions - de-duplicated, test {metric}"
        show_test(what, metric, "arithmetic/ei_base", "arithmetic/ei_base_dedup")


def adapters() -> None:
    print("Expert iteration with adapters of rank 16, learning rate 3e-3, and with all weights")
    for lr in ("1e-3", "3e-3", "1e-2"):
        for key in ("maj@1", "pass@1"):
            show(f"dev {key} after one round with {lr}, seed 0", dev(f"adapters/lr_{lr}", key))
    for n in (1, 2):
        both = (dev(name, "maj@1", round=n) for name in ("adapters/rank16", "arithmetic/ei"))
        show(f"dev maj@1 after round {n}, rank 16 - all weights", *both)
        for name in ("adapters/rank16", "arithmetic/ei"):
            show(f"dev maj@1 after round {n}, {name}", dev(name, "maj@1", round=n))
    for metric in ("maj@1", "pass@1", "pass@16"):
        what = f"test {metric}, rank 16 - all weights"
        show_test(what, metric, "adapters/rank16", "arithmetic/ei")
        show(f"test {metric}, rank 16", test("adapters/rank16", metric))


def advantages() -> None:
    print("Ten phases of PPO from SFT with each estimator of the advantages, dev")
    for name in ("gae", "group", "loo"):
        method = f"advantages/{name}"
        start, end = (dev(method, "maj@1", phase=phase) for phase in (0, 10))
        show(f"maj@1 before, {name}", start)
        show(f"maj@1 after ten phases, {name}", end)
        show(f"maj@1, after - before, {name}", end, start)
        show(f"last KL to the initial policy, {name}", dev(method, "ref_kl_k3"))
        for first, last in ((1, 2), (9, 10)):
            values = over_phases(method, "correct", first, last)
            show(f"right samples of phases {first} to {last}, {name}", values)


def comparison() -> None:
    print("PPO's estimators of the advantages and expert iteration, 18,432 samples each")
    controls = {
        "easy": ("arithmetic/sft", ["clipping/easy", "arithmetic/ei"], ["ppo_longer/phases36"]),
        "hard": ("hard/sft", ["clipping/hard", "hard/ei"], ["hard/phases36", "hard/phases36_t1"]),
    }
    for task, (sft, rounds, large_phases) in controls.items():
        names = "ppo", "loo", "group_std", "mc", "mc_small"
        ppo, *others = (f"comparison/{task}_{name}" for name in names)
        for metric in ("maj@1", "pass@1", "pass@16"):
            for method in (ppo, *others):
                for ei in rounds:
                    show_test(f"test {metric}, {ei} - {method}", metric, ei, method)
            for method in others:
                show_test(f"test {metric}, {method} - {ppo}", metric, method, ppo)
            for method in (ppo, *others):
                show_test(f"test {metric}, {method} - {sft}", metric, method, sft)
            for large in large_phases:
                what = f"test {metric}, {ppo} - {large} (512 samples a phase)"
                show_test(what, metric, ppo, large)
        for first, last in ((2, 36), (37, 72), (73, 144)):
            values = over_phases(ppo, "explained_variance", first, last)
            show(f"explained variance of phases {first} to {last}, {ppo}", values)
        for method in (ppo, *others):
            show(f"last KL to the initial policy, {method}", dev(method, "ref_kl_k3"))
        for method in (ppo, *others, f"comparison/{task}_ei"):
            show(f"minutes, {method}", {0: minutes(method)[0]})
            show(f"dev maj@1 after the last phase or round, {method}", dev(method, "maj@1"))
            show(f"test maj@1, {method}", test(method, "maj@1"))
        show(f"minutes of round 1, {task}_ei", minutes(f"comparison/{task}_ei", round=1))
    for task in controls:
        vine = f"comparison/{task}_mc_more"
        for name in ("ppo", "group_std"):
            what = f"test maj@1, {vine} - {name} (as many updates)"
            show_test(what, "maj@1", vine, f"comparison/{task}_{name}")
        show(f"minutes, {vine}", minutes(vine))
    print("PPO with twice as many samples, harder task")
    ppo = "comparison/hard_ppo_more"
    for metric in ("maj@1", "pass@1", "pass@16"):
        what = f"test {metric}, hard/rounds4 - {ppo} (both 36,864 samples)"
        show_test(what, metric, "hard/rounds4", ppo)
        show_test(f"test {metric}, {ppo} - 512 samples a phase", metric, ppo, "hard/phases72")
        show_test(f"test {metric}, {ppo} - ei of two rounds", metric, ppo, "hard/ei")
    for phase in (96, 144, 192, 224, 256, 288):
        show(f"dev maj@1 of {ppo} at phase {phase}", dev(ppo, "maj@1", phase=phase))
    for key in ("entropy", "informative", "correct"):
        for first, last in ((2, 24), (121, 144), (265, 288)):
            values = over_phases(ppo, key, first, last)
            show(f"{key} of phases {first} to {last}, {ppo}", values)
    penalty = "comparison/hard_group_std_penalty"
    show("test maj@1, GRPO that divides the KL penalty too", test(penalty, "maj@1"))


def learning_rates() -> None:
    print("Learning rates of expert iteration")
    both = (dev(name, "maj@1", round=1) for name in ("ei_lr/hard_3e-4", "hard/ei"))
    show("harder task, dev maj@1 after round 1, 3e-4 - 1e-3", *both)
    one_round = "one round of seed 0, by tokens of a micro-batch, 3e-4 - 1e-3"
    again = "harder task, two rounds, once more - recorded before"
    for metric in ("maj@1", "pass@1"):
        show_test(f"test {metric}, {one_round}", metric, "ei_lr/round_3e-4", "ei_lr/round_1e-3")
        what = f"test {metric}, harder task, two rounds, 3e-4 - 1e-3"
        show_test(what, metric, "ei_lr/hard_3e-4", "hard/ei")
        show_test(f"test {metric}, {again}", metric, "rcrl_all/hard_policy", "hard/ei")


def clipping() -> None:
    print("Gradients clipped at norm 0.1 with a warm-up of 10 % (before: 1 and 3 %)")
    for name in ("round", "moment", "rcrl", "rcrl_old", "easy"):
        for metric in ("maj@1", "pass@1"):
            show(f"test {metric}, {name}", test(f"clipping/{name}", metric))
    for name in ("hard", "hard_moment"):
        for n in (1, 2):
            both = (dev(method, "maj@1", round=n) for method in (f"clipping/{name}", "hard/ei"))
            show(f"harder task, dev maj@1 after round {n}, {name} - before", *both)
        for metric in ("maj@1", "pass@1", "pass@16"):
            what = f"harder task, two rounds, test {metric}, {name} - before"
            show_test(what, metric, f"clipping/{name}", "hard/ei")
    for metric in ("maj@1", "pass@1", "pass@16"):
        what = f"two rounds, test {metric}, easy - before"
        show_test(what, metric, "clipping/easy", "arithmetic/ei")


def gsm8k() -> None:
    print("SmolLM2-135M-Instruct on GSM8K, one run each: differences on the same test problems")

    def solved(method: str) -> list[float]:
        """Return 1 for each test problem with a correct greedy solution, else 0."""
        (indices,) = evaluations(f"gsm8k_smollm2/{method}", "greedy_right").values()
        (report,) = evaluations(f"gsm8k_smollm2/{method}").values()
        return np.isin(np.arange(report["n_problems"]), indices).astype(float).tolist()

    def text(found: dict) -> str:
        interval = "({:+.3f} to {:+.3f})".format(*found["ci95"])
        return f"{found['difference']:+.3f} {interval}, p {found['p']:.2g}"

    for method in ("ei", "ppo", "ppo_1e-4"):
        print(f"  maj@1, {method} - sft: {text(paired_test(solved(method), solved('sft')))}")
    for method in ("sft", "ei"):
        (report,) = evaluations(f"gsm8k_smollm2/{method}").values()
        for metric in ("rerank@96", "weighted@96"):
            found = text(report[f"{metric} - maj@96"])
            print(f"  {metric} - maj@96, samples of {method}: {found}")
    for method in ("ppo", "ppo_1e-4"):
        (log,) = metrics(f"gsm8k_smollm2/{method}").values()
        n, shares = max(row["phase"] for row in log), []
        for first, last in ((1, 3), (n - 2, n)):
            (share,) = over_phases(f"gsm8k_smollm2/{method}", "correct", first, last).values()
            shares.append(f"{share:.3f} in phases {first} to {last}")
        print(f"  {method}: right on training questions {', '.join(shares)}")


def hours() -> None:
    """Print the hours of each experiment. The runs on the H200 are left out: they shared it."""
    note = "some runs with two threads, most with one beside another job"
    print(f"hours, as recorded: training, evaluation ({note})")
    for file in sorted(RESULTS.glob("*.jsonl"), key=lambda file: file.stem):
        if file.stem in ("defaults", "gsm8k_smollm2_h200"):
            continue
        trained = sum(run["metrics"][-1]["seconds"] for run in read(file) if run["metrics"])
        kinds = "test", "bad", "none"
        reports = [run["evaluation"].get(kind, {}) for run in read(file) for kind in kinds]
        evaluated = sum(report.get("seconds") or 0 for report in reports)
        print(f"  {file.stem}: {trained / 3600:.1f}, {evaluated / 3600:.1f}")


if __name__ == "__main__":
    reranking()
    reward_models()
    expert_iteration_and_ppo()
    settings_of_ppo()
    epochs_of_sft()
    pass_at_n()
    rewards()
    samples_per_question()
    restarting()
    return_conditioned_rl()
    stability()
    lambda_and_curricula()
    from_the_base()
    learning_rates()
    clipping()
    adapters()
    advantages()
    comparison()
    gsm8k()
    hours()
