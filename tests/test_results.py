"""Every table and every interval of README.md, docs/ and results/README.md is what the records give."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

NAMES = [
    "README.md",
    "results/README.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
SCRIPTS = {
    "tables": ["tables.py"],
    "table": [
        "table.py",
        *(f"results/{name}" for name in ("arithmetic", "ppo_longer", "ei_samples", "ei_continue")),
    ],
    "claims": ["claims.py"],
    "compare": ["compare.py", "results/pre_ppo", "original"],
    "genrm": ["genrm/report.py"],
}
NUMBER = r"[-+]?\d+\.\d+"


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What the scripts of results/ print."""
    said = {}
    for name, (script, *args) in SCRIPTS.items():
        command = [sys.executable, str(ROOT / "results" / script), *args]
        said[name] = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    return said


@pytest.mark.parametrize("name", ["tables", "table"])
def test_tables_are_those_of_the_records(printed, name):
    rows = [line for line in printed[name].splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    written = {line for page in PAGES.values() for line in page.splitlines()}
    missing = [row for row in rows if row not in written]
    assert not missing, "\n".join(["rows that no page has:", *missing])


def test_table_of_the_generative_reward_model_is_that_of_the_records(printed):
    rows = [
        line for line in printed["genrm"].splitlines() if re.match(r"\| (verifier|GenRM) ", line)
    ]
    assert len(rows) == 3
    for cell in (cell.strip() for row in rows for cell in row.split("|") if cell.strip()):
        assert cell in PAGES["docs/findings.md"]


def intervals(text: str) -> set[tuple[float, float, int]]:
    """The bounds of "(+0.012 to +0.034" and of "-0.012 to +0.034", which without a bracket needs its sign; and how many
    digits follow the point."""
    found = re.findall(rf"\(({NUMBER}) to ({NUMBER})", text) + re.findall(
        rf"([-+]\d+\.\d+) to ({NUMBER})", text
    )
    return {(float(low), float(high), len(high.partition(".")[2])) for low, high in found}


@pytest.mark.parametrize("page", PAGES)
def test_intervals_are_those_of_the_records(printed, page):
    """With one digit an interval is in points (times 100); it may be the other way round: "8.8 points below (5.4 to 12.2)"."""
    given = {(low, high) for said in printed.values() for low, high, _ in intervals(said)}
    written = intervals(PAGES[page])
    assert len(written) > 20 or page not in ("docs/claims.md", "docs/findings.md")
    unknown = []
    for low, high, digits in sorted(written):
        scale, slack = {1: (100, 0.051), 2: (1, 0.0051), 3: (1, 1e-6)}[digits]
        either_way = given | {(-b, -a) for a, b in given}
        if not any(
            abs(low - scale * a) < slack and abs(high - scale * b) < slack for a, b in either_way
        ):
            unknown.append(f"{low} to {high}")
    assert not unknown, f"intervals that no record gives: {unknown}"


def test_differences_by_seed_are_those_of_the_records(printed):
    said = "\n".join(printed.values())
    lists = [
        found for page in PAGES.values() for found in re.findall(r"by seed ([-+.,\d ]+\d)", page)
    ]
    in_points = [found for found in lists if not re.search(r"\d\.\d{3}", found)]
    given = {
        tuple(map(float, re.findall(NUMBER, line)))
        for line in re.findall(r"by seed ([-+.,\d ]+\d)", said)
    }
    rounded = {tuple(round(100 * value + 1e-9, 1) for value in values) for values in given}
    assert len(lists) > len(in_points) > 0
    for found in lists:
        values = tuple(map(float, re.findall(NUMBER, found)))
        assert values in (rounded if found in in_points else given), found


@pytest.mark.parametrize("file", ["sft", "ei"])
def test_the_earlier_round_on_gsm8k_is_what_its_evaluations_printed(file):
    said = (ROOT / "results" / "gsm8k_smollm2" / "h200" / f"{file}_test.txt").read_text()
    value = re.search(rf" maj@1 +({NUMBER}) ", said)[1]
    line = next(
        line
        for line in PAGES["docs/gsm8k.md"].splitlines()
        if "`results/gsm8k_smollm2/h200`" in line
    )
    assert value in re.findall(NUMBER, line)
