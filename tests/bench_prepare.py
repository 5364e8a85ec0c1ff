"""Stage 2 against the plain loop: pandas rows, Pillow letterbox, JPEG 95, webdataset.ShardWriter, one process."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
from PIL import Image

import common
from bench import Case

prepare = importlib.import_module("2_prepare")

PHOTOS, SIDE = 8000, 500  # a catalogue has more: the second that the start takes must not weigh more here than there


def make_shop(folder: Path) -> Path:
    """A cleaned catalogue of photos of 39 KB, smooth forms with a fine texture (real ones of that size have 26 KB)."""
    (folder / "images").mkdir(parents=True)
    draw = np.random.default_rng(0)
    with open(folder / "cleaned.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["id", "name", "image_path", "clean_title", "style", "material", "color", "object_type"])
        for i in range(PHOTOS):
            forms = Image.fromarray(draw.integers(0, 255, (12, 12, 3), np.uint8)).resize((SIDE, SIDE), Image.BICUBIC)
            pixels = np.asarray(forms, np.int16) + draw.integers(-2, 3, (SIDE, SIDE, 1))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/{i}.jpg", quality=90)
            writer.writerow(
                [f"{i:05d}", f"Chair {i}", f"images/{i}.jpg", f"Chair {i}", "modern", "oak", "brown", "chair"]
            )
    return folder / "cleaned.csv"


def plain(cleaned: Path, output: Path) -> float:
    """Seconds a photo of the loop that one would write."""
    import pandas
    import webdataset

    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    start = time.perf_counter()
    frame = pandas.read_csv(cleaned, dtype=str)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        webdataset.ShardWriter(str(output / "%06d.tar"), maxcount=1000) as sink,
    ):
        for i, row in frame.iterrows():
            image = Image.open(cleaned.parent / row["image_path"]).convert("RGB")
            image.thumbnail((224, 224), Image.LANCZOS)
            square = Image.new("RGB", (224, 224), "white")
            square.paste(image, ((224 - image.width) // 2, (224 - image.height) // 2))
            out = io.BytesIO()
            square.save(out, "JPEG", quality=95)
            record = json.dumps(row.to_dict()).encode()
            sink.write({"__key__": f"{i:09d}", "jpg": out.getvalue(), "json": record, "txt": row["clean_title"]})
    return (time.perf_counter() - start) / len(frame)


def ours(cleaned: Path, output: Path) -> float:
    """Seconds a photo of the whole stage with two workers: scan, groups, split, shards, manifest."""
    shutil.rmtree(output, ignore_errors=True)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = prepare.main(["--input", str(cleaned), "--output", str(output), "--workers", "2"])
    assert code == common.DONE
    return (time.perf_counter() - start) / PHOTOS


def parts(cleaned: Path) -> str:
    """What one core spends on one photo, part by part."""
    paths = [cleaned.parent / f"images/{i}.jpg" for i in range(60)]

    def each(act, items) -> tuple[float, list]:
        start = time.perf_counter()
        made = [act(item) for item in items]
        return (time.perf_counter() - start) / len(items) * 1e3, made

    datas = [path.read_bytes() for path in paths]
    decode, images = each(lambda data: common.load_image(data, 4 * 224), datas)
    scale, squares = each(lambda image: common.letterbox(image, 224), images)
    compare, _ = each(prepare.image_hashes, squares)
    encode, _ = each(lambda square: square.save(io.BytesIO(), "JPEG", quality=95), squares)
    spent = {"decode": decode, "resize": scale, "compare": compare, "encode": encode}
    shares = ", ".join(f"{name} {ms:.1f}" for name, ms in spent.items())
    return f"{max(spent, key=spent.get)}: {shares} ms a photo and core"


def cases(workdir: Path) -> list[Case]:
    cleaned = make_shop(workdir / "shop")
    return [
        Case(
            "shards from 500 px photos, 2 workers",
            lambda: ours(cleaned, workdir / "ours"),
            lambda: plain(cleaned, workdir / "theirs"),
            3.0,
            "photo",
            lambda: parts(cleaned),
        )
    ]
