"""Stage 4 at ViT-B/32, two models, against the plain loop: PIL open, processor, get_image_features in float32."""

from __future__ import annotations

import contextlib
import functools
import io
import shutil
import tarfile
import time
from pathlib import Path

import tiny
from bench import Case
from bench_train import operations

PHOTOS = 128


@functools.cache
def pictures(folder: Path) -> tuple[Path, list[Path]]:
    """Shards of 224 px pictures, and the same pictures as files."""
    shards = tiny.make_shards(folder / "shards", train=PHOTOS - 16, validation=8, test=8, size=224)
    files = []
    for shard in sorted(shards.glob("*/*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    files.append(folder / member.name)
                    files[-1].write_bytes(tar.extractfile(member).read())
    return shards, files


@functools.cache
def our_models():
    return [tiny.vit_b32(seed) for seed in (0, 1)]


@functools.cache
def their_models():
    from transformers import CLIPConfig, CLIPModel

    return [CLIPModel(CLIPConfig()).eval() for _ in range(2)]


def ours(folder: Path, precision: str) -> float:
    """Seconds a picture: read and decode, both image towers, vectors written to disk. Prompts are not counted."""
    import common
    import vectors

    shards, _ = pictures(folder)
    work = folder / f"vectors-{precision}"
    shutil.rmtree(work, ignore_errors=True)
    ranks, config = vectors.Ranks(), common.EmbeddingConfig(precision=precision)
    items = vectors.Items(str(shards), work, common.SPLITS, ranks)
    encoders = [vectors.open_encoder(clip, items, config, ranks) for clip in our_models()]
    items.text = items.text[:0]
    with contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        made = vectors.compute(items, encoders, config, ranks)
    assert made == {"image": PHOTOS, "text": 0}, made
    return (time.perf_counter() - start) / PHOTOS


def plain(folder: Path, batch: int) -> float:
    """Seconds a picture of the loop that one would write."""
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessor

    _, files = pictures(folder)
    processor = CLIPImageProcessor()
    start = time.perf_counter()
    for model in their_models():
        for first in range(0, len(files), batch):
            images = [Image.open(path).convert("RGB") for path in files[first : first + batch]]
            with torch.no_grad():
                model.get_image_features(**processor(images=images, return_tensors="pt"))
    return (time.perf_counter() - start) / len(files)


def cases(workdir: Path) -> list[Case]:
    """The cases of stage 4."""

    def bound(precision: str) -> str:
        return operations(lambda: ours(workdir, precision))

    return [
        Case(
            f"two models' vectors, {precision} / CLIPModel in float32, {batch} at a time",
            functools.partial(ours, workdir, precision),
            functools.partial(plain, workdir, batch),
            aim,
            "picture",
            functools.partial(bound, precision),
        )
        for precision, batch, aim in (("auto", 1, 2.0), ("auto", 32, 2.0))
    ]
