"""Speed of each stage against what one would do instead, measured in turn in one run.

    python tests/bench.py              every stage: a table, and a line a case appended to bench.jsonl
    python tests/bench.py --stage 3    one stage
    python tests/bench.py --markdown   the last run in bench.jsonl as the README's table

Each case runs ours, theirs, ours, theirs ... so that a machine whose speed drifts slows both; the ratio is that of the
medians, its spread the smallest and largest ratio of neighbours.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import common

STAGES = {"1": "bench_clean", "2": "bench_prepare", "3": "bench_train", "4": "bench_embed", "5": "bench_arena"}
RESULTS = Path(__file__).parents[1] / "bench.jsonl"


@dataclass(frozen=True)
class Case:
    """One line of the table. `ours` and `theirs` run once and return seconds for a unit of work."""

    name: str
    ours: Callable[[], float]
    theirs: Callable[[], float]
    target: float  # ratio theirs / ours that is to be met
    unit: str  # what the seconds are for: "photo", "training pair", "page"
    bound: Callable[[], str]  # what bounds ours now, with the number that shows it


def processor() -> str:
    """The processor's name as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(case: Case, rounds: int) -> dict:
    """Run both sides in turn `rounds` times after one warm-up each."""
    case.ours(), case.theirs()
    pairs = [(case.ours(), case.theirs()) for _ in range(rounds)]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    return {
        "case": case.name, "unit": case.unit, "ours_ms": round(ours * 1e3, 4), "theirs_ms": round(theirs * 1e3, 4),
        "ratio": round(theirs / ours, 2), "low": round(ratios[0], 2), "high": round(ratios[-1], 2),
        "target": case.target, "met": theirs / ours >= case.target, "bound": case.bound(),
    }  # fmt: skip


def markdown(path: Path) -> str:
    """The README's table: the newest result of each case that the newest run of its stage still had."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    runs = {line["stage"]: line["date"] for line in lines}
    newest = {line["case"]: line for line in lines if line["date"] == runs[line["stage"]]}
    rows = ["| what | times as fast | aim | now bound by |", "|---|---|---|---|"]
    for line in sorted(newest.values(), key=lambda line: line["stage"]):
        spread = f"{line['ratio']} ({line['low']}-{line['high']})"
        rows.append(f"| {line['case']} | {spread} | {line['target']} | {line['bound']} |")
    return "\n".join(rows)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, help="measure one stage only")
    parser.add_argument("--rounds", type=int, default=5, help="times that both sides run in turn (default 5)")
    parser.add_argument("--markdown", action="store_true", help="print the last results as a table and stop")
    return parser


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.markdown:
        print(markdown(RESULTS))
        return common.DONE
    packages = common.versions("torch", "open_clip_torch", "transformers", "peft", "pillow", "webdataset")
    began = datetime.datetime.now().isoformat(timespec="seconds")
    facts = {"date": began, "processor": processor(), "versions": packages}
    print(f"{facts['processor']}; a ratio is theirs / ours, median of {args.rounds}, spread in brackets")
    missed = 0
    for stage in [args.stage] if args.stage else STAGES:
        with tempfile.TemporaryDirectory() as folder:
            for case in importlib.import_module(STAGES[stage]).cases(Path(folder)):
                line = {"stage": int(stage)} | measure(case, args.rounds)
                with open(RESULTS, "a") as results:
                    results.write(json.dumps(line | facts) + "\n")
                mark = "met" if line["met"] else "MISSED"
                missed += not line["met"]
                print(
                    f"{stage} {line['case']}: {line['ratio']}x ({line['low']}-{line['high']}), aim {line['target']}x "
                    f"{mark}; {line['ours_ms']} against {line['theirs_ms']} ms a {line['unit']}; {line['bound']}",
                    flush=True,
                )
    print(f"{missed} aims missed" if missed else "every aim met")
    return common.DONE


if __name__ == "__main__":
    sys.modules["bench"] = sys.modules[__name__]  # so that the cases' modules import this one, not a second copy
    sys.exit(main())
