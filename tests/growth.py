"""How each stage grows: seconds, peak memory and disk at 1,000, 5,000 and 20,000 drawn products.

    python tests/growth.py [--rows 1000 5000 20000] [--side 160]     measures, appends to growth.jsonl
    python tests/growth.py --markdown [--side 160]       the newest results as the table of docs/performance.md
    python tests/growth.py --plot docs/growth.svg        and as a picture
    python tests/growth.py --plan 10000000               stage 2's groups, split and plan for that many drawn looks

Each stage runs as its command, stage 1 against the stand-in, stages 3 and 4 with the small CLIP; pictures are 160 px
wide so that rows, not pixels, decide (--side draws larger ones). Memory is the largest resident set of any one process
of the stage, disk what the stage left there.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import csv
import datetime
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import common

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "growth.jsonl"
SMALL = "local-dir:tests/small_clip"
SIDE = 160
STAGES = {
    "clean": "1 clean",
    "prepare": "2 prepare",
    "train": "3 train, linear_probe",
    "embed": "4 embed",
    "arena": "5 start",
}
COLORS = {"clean": "#1b6ca8", "prepare": "#c2571a", "train": "#2a7d4f", "embed": "#7a4fa3", "arena": "#8a6d00"}


def draw_photos(folder: Path, numbers: range, side: int) -> None:
    """Pictures unlike each other, `side` px wide and high."""
    import numpy as np
    from PIL import Image

    for i in numbers:
        forms = Image.fromarray(np.random.default_rng(i).integers(0, 255, (9, 9, 3), np.uint8))
        forms.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=85)


def make_shop(folder: Path, count: int, side: int) -> Path:
    """A catalogue whose pictures are all unlike each other."""
    (folder / "images").mkdir(parents=True)
    kinds, colors, materials = ("chair", "table", "lamp", "bed", "desk"), ("red", "black", "white"), ("oak", "steel")
    with open(folder / "catalogue.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["id", "name", "image_path"])
        for i in range(count):
            name = f"{colors[i % 3]} {materials[i % 2]} {kinds[i % 5]} {i}"
            writer.writerow([f"p{i}", name, f"images/{i}.jpg"])
    with concurrent.futures.ProcessPoolExecutor() as pool:
        some = [range(start, min(count, start + 1000)) for start in range(0, count, 1000)]
        list(pool.map(draw_photos, [folder / "images"] * len(some), some, [side] * len(some)))
    return folder / "catalogue.csv"


def on_disk(folder: Path) -> int:
    """Bytes that the files below a folder take."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def commands(shop: Path, work: Path) -> dict[str, list[str]]:
    """What a user would type, stage by stage."""
    photos, cleaned, shards, run = str(shop.parent), str(work / "cleaned.csv"), str(work / "shards"), work / "run"
    master = str(work / "master.parquet")
    setup = f"arena.Setup(({master!r},), {photos!r}, {str(work / 'arena.sqlite')!r})"
    return {
        "clean": ["1_clean.py", "run", "--input", str(shop), "--images", photos, "--workspace", str(work / "batch"),
                  "--output", cleaned, "--poll-interval", "0"],
        "prepare": ["2_prepare.py", "--input", cleaned, "--images", photos, "--output", shards],
        # The pictures teach nothing, so that the base itself would be exported, with which the arena compares nothing.
        "train": ["3_train.py", "--shards", shards, "--scenario", "linear_probe", "--model", SMALL,
                  "--pretrained", SMALL, "--output", str(run), "--wise", "off"],
        "embed": ["4_embed.py", "--shards", shards, "--model", SMALL, "--pretrained", SMALL,
                  "--finetuned", str(run / "model"), "--output", master],
        "arena": ["-c", f"import importlib; arena = importlib.import_module('5_arena'); arena.create_app({setup})"],
    }  # fmt: skip


@contextlib.contextmanager
def api(place: str | None) -> Iterator[dict[str, str]]:
    """An environment in which a stand-in, in a process of its own, answers for OpenAI."""
    with (
        tempfile.TemporaryDirectory(dir=place) as state,
        subprocess.Popen(
            [sys.executable, "tests/openai_standin.py", "--state", state], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as server,
    ):
        try:
            yield os.environ | {"OPENAI_BASE_URL": server.stdout.readline().strip(), "OPENAI_API_KEY": "stand-in"}
        finally:
            server.terminate()


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Seconds and the largest resident set in bytes. Raises Fail with the output of a command that fails."""
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        child = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log)
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        if os.waitstatus_to_exitcode(status) != common.DONE:
            log.seek(0)
            raise common.Fail(f"{' '.join(command)}: {log.read()[-2000:]}")
    return seconds, used.ru_maxrss * 1024


def draw_looks(count: int) -> tuple:
    """(gradients uint8 [count, 64], colors uint8 [count, 192]) of smooth forms on white; a fifth are copies of others.

    As of photos, neighboring gradients are alike, so that bands are crowded; copies differ by a little noise.
    """
    import numpy as np

    rng, place = np.random.default_rng(0), np.arange(17) / 16
    gradients, colors = np.empty((count, 64), np.uint8), np.empty((count, 192), np.uint8)
    finer = [np.maximum(0, 1 - abs(np.linspace(0, 5, side)[:, None] - np.arange(6))) for side in (17, 8)]  # of 6 cells
    grey_side, color_side = (weights.astype(np.float32) for weights in finer)
    for start in range(0, count, 10_000):
        size = min(10_000, count - start)
        source = np.where(rng.random(size) < 0.2, rng.integers(0, size, size), np.arange(size))
        noise = (source != np.arange(size))[:, None, None]
        cells = rng.uniform(0, 255, (size, 3, 6, 6)).astype(np.float32)[source]
        edges = rng.uniform(0, 0.3, (4, size, 1))[:, source]
        inside = [(place > low) & (place < 1 - high) for low, high in (edges[:2], edges[2:])]
        grey = np.where(inside[0][:, :, None] & inside[1][:, None], grey_side @ cells.mean(axis=1) @ grey_side.T, 250)
        grey = (grey + noise * rng.normal(0, 0.5, grey.shape)).astype(np.int16)
        steps = grey[:, :-1, 1:] - grey[:, :-1, :-1] > 2, grey[:, 1:, :-1] - grey[:, :-1, :-1] > 2
        gradients[start : start + size] = np.packbits(np.stack(steps, axis=1).reshape(size, -1), axis=1)
        grid = (color_side @ cells @ color_side.T).transpose(0, 2, 3, 1).reshape(size, 192)
        colors[start : start + size] = np.clip(grid + noise[:, 0] * rng.normal(0, 1, grid.shape), 0, 255)
    return gradients, colors


def plan(count: int) -> None:
    """Print seconds and peak memory of stage 2 between scan and shards, for drawn looks."""
    import importlib

    import numpy as np
    import pyarrow

    prepare, started = importlib.import_module("2_prepare"), time.process_time()
    texts = lambda make: pyarrow.chunked_array([pyarrow.array(map(make, some)) for some in blocks])  # noqa: E731
    blocks = [range(start, min(count, start + 100_000)) for start in range(0, count, 100_000)]
    columns = {"id": texts("{:012}".format), "source": texts(lambda i: common.digest([i]))}
    items = pyarrow.table(columns | {"type": texts(lambda i: f"type {i * i % 997 % 40}")}).to_pandas().assign(view=0)
    looks = (np.arange(count, dtype=np.int32), *draw_looks(count))
    del columns

    def show(what: str) -> None:
        nonlocal started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"{count:,} looks, {what}: {time.process_time() - started:.1f} s of one core, at most {memory:.2f} GB",
            flush=True,
        )
        started = time.process_time()

    show("drawn")
    items["group"] = prepare.group_items(items, looks)
    show(f"{items['group'].nunique():,} groups")
    del looks
    items["split"] = prepare.split_items(items, 42)
    show("split")
    shards = prepare.plan_shards(prepare.in_order(items, 42), prepare.PrepConfig(image_size=224))
    show(f"{len(shards):,} shards")


def newest(side: int = SIDE) -> dict[int, dict]:
    """rows -> the last result for that many, with pictures of that size. Raises Fail where there is none."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    found = {line["rows"]: line for line in lines if line["side"] == side}
    if not found:
        raise common.Fail(f"{RESULTS}: no result with pictures of {side} px; measure with --side {side}")
    return dict(sorted(found.items()))


def markdown(found: dict[int, dict]) -> str:
    """The table of docs/performance.md: seconds, memory, disk."""
    head = "| stage | " + " | ".join(f"{rows:,} products" for rows in found) + " |"
    lines = [head, "|---|" + "---|" * len(found)]
    for stage, name in STAGES.items():
        cells = [
            f"{one['seconds']:,.0f} s, {one['bytes'] / 1e6:,.0f} MB, {one['disk'] / 1e6:,.0f} MB"
            for one in (line[stage] for line in found.values())
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict[int, dict]) -> str:
    """Seconds over rows, both logarithmic; the grey lines are what grows exactly as the rows do."""
    rows = list(found)
    seconds = [line[stage]["seconds"] for line in found.values() for stage in STAGES]
    left, right = math.log10(rows[0]), math.log10(rows[-1])
    low, high = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))

    def place(count: float, value: float) -> str:
        x = 60 + 480 * (math.log10(count) - left) / (right - left)
        return f"{x:.1f},{330 - 300 * (math.log10(value) - low) / (high - low):.1f}"

    def line(points: list[str], color: str, width: float) -> str:
        return f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" stroke-width="{width}"/>'

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 370" font-family="sans-serif" font-size="13">',
             '<rect width="700" height="370" fill="white"/>',
             '<clipPath id="c"><rect x="60" y="30" width="480" height="300"/></clipPath>',
             '<g clip-path="url(#c)">']  # fmt: skip
    for power in range(2 * (low - 2), 2 * high):
        start = 10 ** (power / 2)
        parts.append(line([place(rows[0], start), place(rows[-1], start * rows[-1] / rows[0])], "#ddd", 1))
    parts.append("</g>")
    for power in range(low, high + 1):
        x, y = place(rows[0], 10**power).split(",")
        parts.append(f'<text x="52" y="{float(y) + 4}" text-anchor="end">{10**power:g} s</text>')
    for count in rows:
        parts.append(f'<text x="{place(count, 10**low).split(",")[0]}" y="350" text-anchor="middle">{count:,}</text>')
    for stage, name in STAGES.items():
        points = [place(count, found[count][stage]["seconds"]) for count in rows]
        x, y = points[-1].split(",")
        parts.append(line(points, COLORS[stage], 2.5))
        parts.append(f'<text x="{float(x) + 8}" y="{float(y) + 4}" fill="{COLORS[stage]}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 5000, 20_000], help="catalogue sizes")
    parser.add_argument("--side", type=int, default=SIDE, help="width and height of the pictures in pixels")
    parser.add_argument("--folder", help="where to work; by default a temporary folder")
    parser.add_argument("--markdown", action="store_true", help="print the last results as a table and stop")
    parser.add_argument("--plan", type=int, metavar="LOOKS", help="measure stage 2's planning alone, and stop")
    parser.add_argument("--plot", metavar="FILE", help="draw the last results and stop")
    return parser


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.markdown:
        print(markdown(newest(args.side)))
    elif args.plan:
        plan(args.plan)
    elif args.plot:
        common.atomic_write(args.plot, plot(newest(args.side)))
    else:
        for rows in args.rows:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder, api(args.folder) as environment:
                result = {"date": datetime.date.today().isoformat(), "rows": rows, "side": args.side}
                shop = make_shop(Path(folder) / "shop", rows, args.side)
                used = on_disk(Path(folder))
                for stage, command in commands(shop, Path(folder)).items():
                    seconds, memory = measure(command, environment)
                    before, used = used, on_disk(Path(folder))
                    result[stage] = {"seconds": round(seconds, 2), "bytes": memory, "disk": used - before}
                    sizes = f"{memory / 1e6:,.0f} MB of memory, {(used - before) / 1e6:,.0f} MB of disk"
                    print(f"{rows:,} products, {STAGES[stage]}: {seconds:.1f} s, {sizes}", flush=True)
                shutil.rmtree(shop.parent)
            with open(RESULTS, "a") as results:
                results.write(json.dumps(result) + "\n")
    return common.DONE


if __name__ == "__main__":
    sys.exit(main())
