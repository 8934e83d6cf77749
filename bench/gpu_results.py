"""From results of `gpu_check.py` to the table in README: `python bench/gpu_results.py`.

Takes every `bench/results/gpu_*.json`, a run on a real GPU each. With `--add FOLDER/result.json`
such a result is copied there first, under the name of its GPU and its date. README has the table
between two marks; without results there is none.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_stages.measurement import Measurement, figure
from harness.table import ABSENT, markdown_table, number

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- gpu results -->", "<!-- end of gpu results -->"
STAGES = ("times", "model", "handoff")  # whose figures are for people

Result = Mapping[str, Any]


class ResultError(Exception):
    """What was given is no result of a GPU, or README has no place for it."""


def name_of(result: Result) -> str:
    """The file of a result. Raises ResultError for one that no GPU gave."""
    device: str = result["device"]
    if device.startswith("cpu"):
        raise ResultError(f"the result is of {device}; only those of GPUs are kept")
    title = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    return f"gpu_{title}_{result['date'].partition('T')[0]}.json"


def section(results: Sequence[Result]) -> str:
    """What README says of them, in Markdown."""
    return "\n\n".join(_of_one(result) for result in results)


def _of_one(result: Result) -> str:
    versions = result["versions"]
    software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "cuda"))
    verdict = "all passed" if result["passed"] else "not all passed"
    rows = [row for stage in result["stages"] if stage["name"] in STAGES for row in _rows(stage)]
    header = ("what", "value", "floor", "ratio", "pass")
    title = f"{result['device']}, {result['date'].partition('T')[0]}, {software}: {verdict}."
    return f"{title}\n\n{markdown_table(header, rows)}"


def _rows(stage: Mapping[str, Any]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for fields in stage["measurements"]:
        measured = Measurement(**fields)
        value = f"{figure(measured.value)} {measured.unit}".rstrip()
        rows.append((measured.name, value, figure(measured.floor), *_verdict(measured)))
    for failure in stage["failures"]:
        rows.append((failure["item"], failure["reason"], ABSENT, ABSENT, "failed"))
    return rows


def _verdict(measured: Measurement) -> tuple[str, str]:
    passed = {None: ABSENT, True: "yes", False: "NO"}[measured.passed]
    return number(measured.ratio, digits=2), passed


def insert(readme: str, text: str) -> str:
    """README with `text` between its marks. Raises ResultError where they are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ResultError(f"README has no {BEGIN} with an {END} behind it; add both")
    inside = f"\n\n{text}\n\n" if text else "\n"
    return f"{before}{begin}{inside}{end}{after}"


def add(result: Path, results: Path) -> Path:
    """Copy a result to where they are kept. Raises ResultError."""
    text = result.read_text(encoding="utf-8")
    kept = results / name_of(json.loads(text))
    kept.write_text(text, encoding="utf-8")
    return kept


def update(readme: Path, results: Path) -> None:
    """Write the table into README. Raises ResultError."""
    kept = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("gpu_*.json"))
    ]
    text = insert(readme.read_text(encoding="utf-8"), section(kept))
    readme.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--add", type=Path, help="a result.json of gpu_check to keep")
    parser.add_argument("--readme", type=Path, default=README, help="where the table goes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept")
    arguments = parser.parse_args()
    try:
        if arguments.add is not None:
            print(add(arguments.add, arguments.results))
        update(arguments.readme, arguments.results)
    except ResultError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
