"""Add a run to the records of an experiment: `python results/record.py RUN FILE.jsonl NAME SEED`.

RUN is the folder of a run. Its args.json, metrics.jsonl and evaluations become one line of the file
(records.py explains the keys). A line with the same name and seed is replaced.
"""

import argparse
import fcntl
import json
import os
import sys
from pathlib import Path


def read_run(folder: Path) -> dict:
    """Return args, metrics and evaluation of a run.

    Evaluations are all other .json files in the folder. The questions that `ppo.py --select` chose
    are one as well.
    """
    args, log = folder / "args.json", folder / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    files = [*folder.glob("*.json"), *folder.glob("samples/selected.json")]
    evaluation = {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(files, key=lambda file: file.name)
        if not file.name.endswith("args.json")
    }
    return {
        "args": json.loads(args.read_text(encoding="utf-8")) if args.exists() else None,
        "metrics": [json.loads(line) for line in lines],
        "evaluation": evaluation,
    }


def add(file: Path, record: dict) -> None:
    """Add a record to a file that is sorted by name and seed, or replace it there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Two jobs may record at the same time.
    folder = os.open(file.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines] + [record]
    by_run = {(each["name"], each["seed"]): each for each in records}
    temporary = file.with_name(file.name + ".part")
    with open(temporary, "w", encoding="utf-8") as new:
        for run in sorted(by_run):
            new.write(json.dumps(by_run[run], ensure_ascii=False) + "\n")
    os.replace(temporary, file)
    os.close(folder)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("file", type=Path, help="records of the experiment")
    parser.add_argument("name", help="method")
    parser.add_argument("seed", type=int)
    parser.add_argument("--work", help="folder of all runs, which the record calls runs/results")
    args = parser.parse_args(argv)
    record = {"name": args.name, "seed": args.seed, **read_run(args.run)}
    if not record["metrics"] and not record["evaluation"]:
        parser.error(f"{args.run}: no metrics.jsonl and no evaluation")
    if args.work:
        text = json.dumps(record, ensure_ascii=False)
        record = json.loads(text.replace(f"{args.work.rstrip('/')}/", "runs/results/"))
    add(args.file, record)


if __name__ == "__main__":
    main(sys.argv[1:])
