"""Every table, every interval and every decimal number of the pages equals the records."""

import bisect
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

RESULTS = ROOT / "results"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", RESULTS / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
ALL_PAGES = "\n".join(PAGES.values())
EXPERIMENTS = [f"results/{n}.jsonl" for n in "arithmetic ppo_longer ei_samples ei_continue".split()]
SCRIPTS = {
    "tables": ["tables.py"],
    "table": ["table.py", *EXPERIMENTS],
    "claims": ["claims.py"],
    "compare": ["compare.py", "results/pre_ppo.jsonl", "original"],
    "genrm": ["genrm.py"],
}
FILES = {path.stem: path for path in sorted(RESULTS.glob("*.jsonl"))}
NUMBER = r"[-+]?\d+\.\d+"


def run_script(script: str, *args, **how) -> subprocess.CompletedProcess:
    command = [sys.executable, RESULTS / script, *args]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, **how)


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """Return the output of the scripts of results/."""
    return {name: run_script(*script, check=True).stdout for name, script in SCRIPTS.items()}


# ---- The pages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tables", "table"])
def test_the_tables_of_the_pages_equal_the_records(printed, name):
    rows = [line for line in printed[name].splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    written = set(ALL_PAGES.splitlines())
    missing = [row for row in rows if row not in written]
    assert not missing, "\n".join(["rows that no page has:", *missing])


def test_the_table_of_the_generative_reward_model_equals_the_records(printed):
    rows = [
        line for line in printed["genrm"].splitlines() if re.match(r"\| (verifier|GenRM)", line)
    ]
    assert len(rows) == 3
    for cell in (cell.strip() for row in rows for cell in row.split("|") if cell.strip()):
        assert cell in ALL_PAGES


def intervals(text: str) -> set[tuple[float, float, int]]:
    """Return the bounds of intervals and the number of digits after the point.

    Intervals are written "(+0.012 to +0.034" or "-0.012 to +0.034". Without a bracket the first
    number needs its sign.
    """
    found = re.findall(rf"\(({NUMBER}) to ({NUMBER})", text)
    found += re.findall(rf"([-+]\d+\.\d+) to ({NUMBER})", text)
    return {(float(low), float(high), len(high.partition(".")[2])) for low, high in found}


def test_the_pages_have_intervals():
    assert len(intervals(ALL_PAGES)) > 40


@pytest.mark.parametrize("page", PAGES)
def test_the_intervals_of_a_page_equal_the_records(printed, page):
    """An interval with one digit is in points (times 100).

    It may be negated: "8.8 points below (5.4 to 12.2)".
    """
    given = {(low, high) for text in printed.values() for low, high, _ in intervals(text)}
    given |= {(-high, -low) for low, high in given}
    unknown = []
    for low, high, digits in sorted(intervals(PAGES[page])):
        scale, slack = {1: (100, 0.051), 2: (1, 0.0051), 3: (1, 1e-6)}[digits]
        near = (max(abs(low - scale * a), abs(high - scale * b)) < slack for a, b in given)
        if not any(near):
            unknown.append(f"{low} to {high}")
    assert not unknown, f"intervals that no record gives: {unknown}"


def test_differences_by_seed_equal_the_records(printed):
    def by_seed(text: str) -> list[str]:
        return re.findall(r"by seed ([-+.,\d ]+\d)", text)

    def values(found: str) -> tuple[float, ...]:
        return tuple(map(float, re.findall(NUMBER, found)))

    lists = by_seed(ALL_PAGES)
    in_points = [found for found in lists if not re.search(r"\d\.\d{3}", found)]
    given = {values(found) for found in by_seed("\n".join(printed.values()))}
    rounded = {tuple(round(100 * value + 1e-9, 1) for value in each) for each in given}
    assert len(lists) > len(in_points) > 0
    for found in lists:
        assert values(found) in (rounded if found in in_points else given), found


# Sections with numbers of other authors, without results, or with a test of their own.
NOT_OURS = {"The first claim is disputed", "Results of others", "Versions", "Problems of your own"}
NOT_OURS |= {"Which model fits which card"}
# Records that are small enough to compare a page with all of their numbers.
SMALL = ["smollm2_cpu", "defaults"]


def sections(page: str) -> list[tuple[str, str]]:
    """Return the title and the text of every section of a page."""
    parts = re.split(r"^#+ ", PAGES[page], flags=re.MULTILINE)
    return [(part.splitlines()[0], part) for part in parts[1:]]


def names_of(text: str) -> list[str]:
    """Return the experiments whose records a text names."""
    return [name for name in FILES if f"`{name}`" in text or f"{name}.jsonl" in text]


def numbers_of(text: str) -> list[tuple[float, int]]:
    """Return the decimal numbers of a text and their digits after the point.

    Numbers in code, links, names and versions do not count.
    """
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|(arXiv|Python) [\d.]+", "", text)
    found = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", text)
    return [(float(number), len(number.partition(".")[2])) for number in found]


def is_near(value: float, slack: float, given: list[float]) -> bool:
    """Return whether a sorted list has a number at most slack away."""
    i = bisect.bisect_left(given, value - slack)
    return i < len(given) and given[i] <= value + slack


@pytest.fixture(scope="module")
def evidence(printed) -> dict[str, str]:
    """Return all numbers that are printed for an experiment, and those of small records."""
    tables = {name: run_script("table.py", f"results/{name}.jsonl").stdout for name in FILES}
    for name in SMALL:
        tables[name] += FILES[name].read_text("utf-8")
    logs = "".join(path.read_text("utf-8") for path in RESULTS.glob("first_command*.log"))
    tables["genrm"] += printed["genrm"]
    tables["pre_ppo"] += printed["compare"] + printed["tables"]
    tables["rerank"] += (RESULTS / "slips.txt").read_text("utf-8")
    tables["ei_lr"] += logs
    return tables


@pytest.mark.parametrize("page", [p for p in PAGES if p not in ("docs/speed.md", "docs/tour.md")])
def test_the_numbers_of_a_section_equal_the_records_that_it_names(printed, evidence, page):
    """A number with one digit may be in points (times 100).

    A section that names no records may use all that its page names. The tables of tables.py are
    compared elsewhere.
    """
    tables, unknown = set(printed["tables"].splitlines()), []
    for title, text in sections(page):
        names = names_of(text) or names_of(PAGES[page]) or list(FILES)
        given = "\n".join([printed["claims"], *(evidence[name] for name in names)])
        given = sorted({float(number) for number in re.findall(r"\d+\.\d+", given)})
        lines = (line for line in text.splitlines() if line not in tables)
        rest = "\n".join(line for line in lines if not re.match(r"\| `\w+\.py`", line))
        for value, digits in numbers_of(rest) if title not in NOT_OURS else []:
            in_points = digits == 1 and is_near(value / 100, 0.00051, given)
            if not in_points and not is_near(value, 0.5 * 10**-digits + 1e-9, given):
                unknown.append(f"{title}: {value}")
    assert not unknown, f"numbers that no record gives: {unknown}"


def test_the_speeds_equal_the_measurements():
    files = [*RESULTS.glob("generation/*.json"), *RESULTS.glob("generation/*.txt")]
    given = "\n".join(file.read_text("utf-8") for file in files)
    given = sorted({float(number) for number in re.findall(r"\d+\.\d+(?:e-\d+)?", given)})
    numbers = numbers_of(PAGES["docs/speed.md"])
    assert len(numbers) > 20
    unknown = [v for v, digits in numbers if not is_near(v, 0.5 * 10**-digits + 1e-9, given)]
    assert not unknown, unknown


def test_the_memory_of_the_page_is_that_of_the_formula_and_of_the_measurement():
    (text,) = [t for name, t in sections("docs/gsm8k.md") if name in NOT_OURS and "fits" in name]
    table = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "memory.py"], capture_output=True, text=True
    ).stdout
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 5 and all(row in text for row in rows)
    measured = json.loads((RESULTS / "generation" / "memory_smollm2.json").read_text())
    given = {f"{row[key] / 2**30:.2f}" for row in measured for key in ("peak", "formula")}
    found = {f"{value:.2f}" for value, digits in numbers_of(text) if digits == 2}
    assert len(measured) == 4 and found == given
    assert all(0.85 < row["formula"] / row["peak"] < 1.15 for row in measured)


def test_the_scripts_of_the_first_page_have_the_numbers_of_the_table(printed):
    rows = {"sft": "SFT", "expert_iteration": "two rounds, norm 0.1", "ppo": "PPO", "rcrl": "RCRL"}
    for script, label in rows.items():
        (row,) = [r for r in printed["tables"].splitlines() if r.startswith(f"| {label} | 4 |")][:1]
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        (line,) = [r for r in PAGES["README.md"].splitlines() if r.startswith(f"| `{script}.py`")]
        assert line.endswith(f"| {cells[2]} | {cells[-2]} |")


@pytest.mark.parametrize("method", ["sft_1e-3", "ei"])
def test_the_earlier_round_on_gsm8k_equals_its_recorded_evaluations(method):
    found = [record for record in read("gsm8k_smollm2_h200") if record["name"] == method]
    value = f"{found[0]['evaluation']['test']['maj@1']['value']:.3f}"
    lines = [line for line in ALL_PAGES.splitlines() if "gsm8k_smollm2_h200" in line]
    assert any(value in re.findall(NUMBER, line) for line in lines)


# ---- The records ---------------------------------------------------------------------------------


def read(experiment: str) -> list[dict]:
    return [json.loads(line) for line in FILES[experiment].read_text("utf-8").splitlines()]


@pytest.mark.parametrize("experiment", FILES)
def test_records_are_well_formed(experiment):
    records = read(experiment)
    for record in records:
        assert list(record) == ["name", "seed", "args", "metrics", "evaluation"]
        assert isinstance(record["args"], dict | None) and isinstance(record["evaluation"], dict)
        assert record["metrics"] or record["evaluation"]
        assert all("seconds" in row and "step" in row for row in record["metrics"])
    runs = [(record["name"], record["seed"]) for record in records]
    assert runs == sorted(set(runs)) and runs


def test_every_experiment_has_its_command():
    commands = {path.stem for path in RESULTS.glob("commands/*.sh")}
    # The commands of "defaults" are in README.md.
    assert FILES.keys() - commands == {"defaults"}


def make_run(folder, rows: list[dict]):
    folder.mkdir()
    (folder / "args.json").write_text('{"model": "elsewhere/sft/model"}')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_is_added_to_the_records_or_replaced_there(tmp_path):
    run, file = make_run(tmp_path / "run", [{"step": 1, "seconds": 2.0}]), tmp_path / "new/x.jsonl"
    (run / "test.json").write_text('{"maj@1": {"value": 0.5}}')
    (run / "test.args.json").write_text('{"split": "test"}')
    for name, seed in (("ppo", 1), ("ei", 10), ("ei", 2)):
        run_script("record.py", run, file, name, seed, "--work", "elsewhere", check=True)
    (run / "test.json").write_text('{"maj@1": {"value": 0.75}}')
    run_script("record.py", run, file, "ei", 10, "--work", "elsewhere", check=True)
    lines = file.read_text().splitlines()
    # results/commands/steps.sh searches for a line with this start.
    assert [line.split('"args"')[0] for line in lines] == [
        '{"name": "ei", "seed": 2, ',
        '{"name": "ei", "seed": 10, ',
        '{"name": "ppo", "seed": 1, ',
    ]
    values = [json.loads(line)["evaluation"]["test"]["maj@1"]["value"] for line in lines]
    assert values == [0.5, 0.75, 0.5]
    record = json.loads(lines[1])
    assert record["args"] == {"model": "runs/results/sft/model"}
    assert record["metrics"] == [{"step": 1, "seconds": 2.0}]
    assert list(record["evaluation"]) == ["test"]


# ---- The figures ---------------------------------------------------------------------------------


def test_plot_draws_the_curves_of_a_run(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the figures; it is not installed")
    rows = [
        {"step": 0, "samples": 0, "maj@1": 0.5},
        {"step": 4, "samples": 8, "reward": 0.5, "ref_kl_k3": 0.1, "ref_kl_k1": 0.2},
        {"step": 8, "samples": 16, "reward": 0.7, "ref_kl_k3": None, "maj@1": 0.6},
    ]
    run, file = make_run(tmp_path / "run", rows), tmp_path / "new" / "curves.png"
    run_script("plot.py", run, run, "--out", file, check=True)
    assert file.read_bytes().startswith(b"\x89PNG")
    for rows, folder, reason in (
        ([{"step": 0, "samples": 0}], "begun", "nothing to draw"),
        (None, "missing", "is no run"),
    ):
        if rows:
            make_run(tmp_path / folder, rows)
        done = run_script("plot.py", tmp_path / folder, "--out", tmp_path / "none.png")
        assert done.returncode and reason in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_the_error_names_the_install_command(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    done = run_script("plot.py", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode and "pip install matplotlib" in done.stderr
    assert done.stderr.count("\n") == 1


def test_figures_are_small():
    sizes = {path.name: path.stat().st_size for path in RESULTS.glob("*.png")}
    assert sizes and max(sizes.values()) < 150_000, sizes
