"""What runs without a flag find and forget, against the plain loop that one would write instead, on the test split.

    python tests/bench_search.py --shards data/shards --model local-dir:tests/small_clip --run data/runs/linear_probe

The plain loop trains the projections with open_clip's own loss, 64 pairs a batch, at a constant rate; its rate is the
one of four that validates best. "general" is retrieval over pictures away from the catalogue: drawn, or --probe's.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import common

RATES, EPOCHS, BATCH, SEED = (1e-4, 3e-4, 1e-3, 3e-3), (5, 20), 64, 42


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, type=Path, help="folder made by 2_prepare.py")
    parser.add_argument("--model", required=True, help="the base, as for 3_train.py")
    parser.add_argument("--pretrained", help="as for 3_train.py")
    parser.add_argument("--run", action="append", default=[], type=Path, help="finished run of 3_train.py; repeatable")
    parser.add_argument("--probe", default="drawn", help="as for 3_train.py")
    return parser


def batches(args: argparse.Namespace, clip) -> dict:
    """{"train", "validation", "test", "general"}: Batch of each, with the shard's own captions."""
    import torch

    stage = importlib.import_module("3_train")
    config, found = stage.TrainingConfig(captions="fixed", augment="none"), {}
    for name, split in common.load_manifest(args.shards)["splits"].items():
        entries = split["shards"]
        data = stage.Split(name, entries, [args.shards / entry["name"] for entry in entries], clip, config)
        parts = list(data.batches(stage.in_order(len(data), 64)))
        fields = [torch.cat([part[i] for part in parts]) for i in range(1, 5)]
        found[name] = stage.Batch(len(data), *fields)
    drawn = args.probe == "drawn"
    return found | {"general": stage.draw_probe(clip) if drawn else stage.load_probe(args.probe, clip)}


def with_features(towers, data: dict) -> dict:
    """The same with what the towers give before their projections."""
    import torch

    with torch.no_grad():
        parts = {
            name: [
                torch.cat([towers.features(tower, some) for some in inputs.split(64)])
                for tower, inputs in (("image", batch.images), ("text", batch.texts))
            ]
            for name, batch in data.items()
        }
    return {name: data[name]._replace(images=images, texts=texts) for name, (images, texts) in parts.items()}


def scores(towers, data: dict) -> dict[str, float]:
    """MRR, both ways, on validation, test and general pictures."""
    import torch

    stage, found = importlib.import_module("3_train"), {}
    for name in ("validation", "test", "general"):
        with torch.no_grad():
            found[name] = stage.retrieval_metrics(*towers.embed(data[name]), data[name].keys)[0]["mrr"]
    return found


def plain_loop(towers, train, rate: float, epochs: int) -> None:
    """Twenty lines that anybody would write."""
    import open_clip
    import torch

    torch.manual_seed(SEED)
    loss, weights = open_clip.loss.ClipLoss(), list(towers.trained.values())
    optimizer = torch.optim.AdamW(weights, lr=rate)
    for _ in range(epochs):
        for rows in torch.randperm(len(train.ids)).split(BATCH):
            part = train._replace(images=train.images[rows], texts=train.texts[rows])
            optimizer.zero_grad()
            loss(*towers.embed(part), towers.model.logit_scale.exp()).backward()
            optimizer.step()


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    args = build_parser().parse_args(argv)
    stage = importlib.import_module("3_train")
    probing = stage.TrainingConfig(scenario="linear_probe", precision="fp32")
    clip = common.load_clip(args.model, args.pretrained)
    plain = batches(args, clip)
    towers = stage.Towers(clip, probing)
    data, start = with_features(towers, plain), towers.copy()
    base, tried = scores(towers, data), {}
    for epochs in EPOCHS:
        for rate in RATES:
            towers.interpolate(1.0, start)
            plain_loop(towers, data["train"], rate, epochs)
            tried[f"plain loop, {epochs} epochs at {rate:g}"] = scores(towers, data)
    best = max(tried, key=lambda name: tried[name]["validation"])
    judged = {name: batch for name, batch in plain.items() if name != "train"}
    rows = {"base": base} | tried | {f"best on validation: {best}": tried[best]}
    for run in args.run:
        other = stage.Towers(common.load_clip(f"local-dir:{run / 'model'}"), probing)
        rows[str(run)] = scores(other, with_features(other, judged))
    print(f"{'':<56}{'validation':>12}{'test':>8}{'general':>10}{'forgotten':>11}")
    for name, row in rows.items():
        row = row | {"forgotten": base["general"] - row["general"]}
        print(
            f"{name:<56}{row['validation']:>12.3f}{row['test']:>8.3f}{row['general']:>10.3f}{row['forgotten']:>11.3f}"
        )
    return common.DONE


if __name__ == "__main__":
    sys.exit(main())
