"""Building request files: photos read, scaled and written as JSONL, against the plain loop in one process."""

from __future__ import annotations

import base64
import contextlib
import csv
import importlib
import io
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

from PIL import Image

import common
from bench import Case

clean = importlib.import_module("1_clean")


def photo(side: int, seed: int) -> bytes:
    """A JPEG with smooth areas, edges and a little grain, about as heavy as a shop's photo."""
    rng = random.Random(seed)
    small = Image.frombytes("RGB", (8, 8), rng.randbytes(192)).resize((side, side), Image.Resampling.BICUBIC)
    grain = Image.effect_noise((side, side), 24).convert("RGB")
    image = Image.blend(small, grain, 0.12)
    for _ in range(24):
        x, y = rng.randrange(side), rng.randrange(side)
        box = (x, y, x + rng.randrange(side // 3), y + rng.randrange(side // 3))
        image.paste(tuple(rng.randbytes(3)), box)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def shop(folder: Path, side: int, count: int) -> Path:
    (folder / "images").mkdir(parents=True)
    kept = [photo(side, seed) for seed in range(12)]
    with open(folder / "catalogue.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(common.REQUIRED_COLUMNS)
        for number in range(count):
            (folder / f"images/{number}.jpg").write_bytes(kept[number % len(kept)])
            writer.writerow([number, f"ACME chair {number}", f"images/{number}.jpg"])
    return folder


def plain(folder: Path) -> float:
    """Seconds a photo for what one would write first: open, thumbnail, white, JPEG, base64, json.dumps, one process."""
    start = time.perf_counter()
    fixed = json.loads(clean.request_line(clean.CleaningConfig(), "", "", b"", 1))
    count = 0
    with open(folder / "catalogue.csv", newline="") as rows, open(folder / "plain.jsonl", "w") as out:
        for row in csv.DictReader(rows):
            count += 1
            with Image.open(folder / row["image_path"]) as image:
                image.thumbnail((512, 512), Image.Resampling.LANCZOS)
                white = Image.new("RGB", image.size, "white")
                white.paste(image)
            buffer = io.BytesIO()
            white.save(buffer, "JPEG", quality=85)
            content = fixed["body"]["messages"][1]["content"]
            content[0]["text"] = "Title: " + row["name"]
            content[1]["image_url"]["url"] = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
            out.write(json.dumps(fixed | {"custom_id": row["id"]}) + "\n")
    return (time.perf_counter() - start) / count


def ours(folder: Path, count: int, workers: int = 2) -> float:
    """Seconds a photo for `prepare`: also checks, digests, rejects, the plan, and files that survive a kill."""
    workspace = folder / "batch"
    shutil.rmtree(workspace, ignore_errors=True)
    arguments = ["prepare", "--input", str(folder / "catalogue.csv"), "--workspace", str(workspace)]
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        assert clean.main([*arguments, "--workers", str(workers), "--pilot", "0"]) == 0
    return (time.perf_counter() - start) / count


def bound(folder: Path, count: int) -> str:
    """Where the time of one photo goes, part by part, in one process."""
    seconds_of = {"read and digest": 0.0, "photo to JPEG": 0.0}
    paths = [folder / f"images/{number}.jpg" for number in range(count)]
    for path in paths:
        start = time.perf_counter()
        data = path.read_bytes()
        common.digest(data)
        middle = time.perf_counter()
        clean.photo_jpeg(data, 512)
        seconds_of["read and digest"] += middle - start
        seconds_of["photo to JPEG"] += time.perf_counter() - middle
    whole = ours(folder, count, 1) * 1e3
    parts = {name: seconds / count * 1e3 for name, seconds in seconds_of.items()}
    parts["the rest"] = whole - sum(parts.values())
    most = max(parts, key=parts.get)
    listed = ", ".join(f"{name} {ms:.2f}" for name, ms in parts.items())
    return f"{most}: {parts[most] / whole:.0%} of {whole:.2f} ms a photo in one process ({listed})"


def cases(workdir: Path) -> list[Case]:
    made = []
    for side, count, target in ((500, 2400, 5.0), (1600, 360, 5.0)):
        folder = shop(workdir / str(side), side, count)
        made.append(
            Case(
                name=f"building requests from {side} px photos, 2 workers",
                ours=lambda folder=folder, count=count: ours(folder, count),
                theirs=lambda folder=folder: plain(folder),
                target=target,
                unit="photo",
                bound=lambda folder=folder, count=count: bound(folder, count),
            )
        )
    return made


if __name__ == "__main__":
    sys.exit("run `python tests/bench.py --stage 1`")
