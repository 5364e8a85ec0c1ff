"""Learning rates and batch tried on the validation split: to see whether what `auto` chooses can be bettered.

    python tests/sweep.py --shards data/shards --model local-dir:tests/small_clip --output data/sweep

One setting after the other, from the defaults, each at the best found so far; every try is a run of 3_train.py in its
own folder. Call it again after a stop: what is finished is not repeated. Writes sweep.json and prints a table. Flags
that are not its own go to 3_train.py as they are.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import common

AXES = {
    "lora_lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "lr": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "effective_batch_size": (32, 64, 128),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="folder or s3://bucket/prefix made by 2_prepare.py")
    parser.add_argument("--model", required=True, help="as for 3_train.py")
    parser.add_argument("--pretrained", help="as for 3_train.py")
    parser.add_argument("--output", required=True, type=Path, help="folder of the runs and of sweep.json")
    parser.add_argument("--scenario", default="dual_lora")
    parser.add_argument("--epochs", default="auto", help="of every try (default auto)")
    return parser


def attempt(args: argparse.Namespace, others: list[str], chosen: dict[str, float]) -> dict[str, float]:
    """One run; returns the settings and what it validates at."""
    name = "-".join(f"{key}={value:g}" for key, value in sorted(chosen.items())) or "defaults"
    output = args.output / args.scenario / name
    flags = {"--shards": args.shards, "--model": args.model, "--output": output, "--scenario": args.scenario}
    flags |= {"--epochs": args.epochs, "--wise": "off"} | ({"--pretrained": args.pretrained} if args.pretrained else {})
    flags |= {f"--{key.replace('_', '-')}": value for key, value in chosen.items()}
    code = importlib.import_module("3_train").main([*others, *(str(part) for pair in flags.items() for part in pair)])
    if code:
        raise common.Fail(f"{output}: training failed; see above", code)
    facts = common.read_json(output / "train.json")
    scores = facts["validation"]
    return {**chosen, "zero_shot_mrr": scores["zero_shot"]["mrr"], "mrr": scores["best"]["mrr"],
            "loss": scores["best"]["loss"], "best_epoch": scores["best_epoch"]}  # fmt: skip


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    """Sweep."""
    args, others = build_parser().parse_known_args(argv)
    chosen: dict[str, float] = {}
    tries = []
    for axis, values in AXES.items():
        if axis == "lora_lr" and args.scenario == "linear_probe":
            continue
        row = [attempt(args, others, chosen | {axis: value}) for value in values]
        best = max(row, key=lambda facts: facts["mrr"])
        chosen[axis] = best[axis]
        tries += [facts | {"axis": axis, "won": facts is best} for facts in row]
        found = {"tries": tries, "chosen": chosen, "epochs": args.epochs, "flags": others}
        common.write_json(args.output / "sweep.json", found)
    print(
        f"\n{'setting':<22}{'value':>10}{'validation MRR':>16}{'loss':>9}   (zero-shot {tries[0]['zero_shot_mrr']:.4f})"
    )
    for facts in tries:
        mark = "  <- best" if facts["won"] else ""
        print(f"{facts['axis']:<22}{facts[facts['axis']]:>10g}{facts['mrr']:>16.4f}{facts['loss']:>9.4f}{mark}")
    return common.DONE


if __name__ == "__main__":
    sys.exit(main())
