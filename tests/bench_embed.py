"""Stage 4 at ViT-B/32, two models, against the plain loop: PIL open, processor, get_image_features in float32."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import shutil
import tarfile
import time
from pathlib import Path

import common
import tiny
from bench import Case
from bench_train import operations

stage = importlib.import_module("4_embed")

PHOTOS = 128
QUERIES, GALLERY, WIDTH, NEAREST = 5000, 1_000_000, 64, 10  # of the search


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
    shards, _ = pictures(folder)
    work = folder / f"vectors-{precision}"
    shutil.rmtree(work, ignore_errors=True)
    world, config = common.World(), stage.EmbeddingConfig(precision=precision)
    found = stage.open_shards(str(shards), common.SPLITS, work, config)
    encoders = [stage.open_encoder(clip, found, work, config, world) for clip in our_models()]
    with contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        _, made = stage.embed_pictures(found, encoders, config, world)
    assert made == PHOTOS, made
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


@functools.cache
def unit_vectors(count: int, seed: int):
    """float32 [count, WIDTH], L2-normalised."""
    import numpy as np

    vectors = np.random.default_rng(seed).standard_normal((count, WIDTH), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def search_ours() -> float:
    """Seconds a query, of all queries at once."""
    queries, gallery = unit_vectors(QUERIES, 1), unit_vectors(GALLERY, 2)
    start = time.perf_counter()
    common.top_k(queries, gallery, NEAREST)
    return (time.perf_counter() - start) / QUERIES


def search_plain(count: int = 100) -> float:
    """Seconds a query of whole rows of scores, in float32, of which the best are taken."""
    import numpy as np

    queries, gallery = unit_vectors(QUERIES, 1)[:count], unit_vectors(GALLERY, 2)
    start = time.perf_counter()
    for first in range(0, count, 50):
        scores = queries[first : first + 50] @ gallery.T
        best = np.argpartition(-scores, NEAREST, axis=1)[:, :NEAREST]
        np.take_along_axis(scores, best, 1).argsort(axis=1)
    return (time.perf_counter() - start) / count


def search_memory() -> str:
    """What the search allocates beside queries and vectors."""
    import tracemalloc

    unit_vectors(QUERIES, 1), unit_vectors(GALLERY, 2)
    tracemalloc.start()
    search_ours()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return f"{peak / 1e6:.0f} MB beside the vectors; all scores would take {4 * QUERIES * GALLERY / 1e9:.0f} GB"


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
        for precision, batch, aim in (("auto", 1, 2.5), ("auto", 32, 2.0))
    ] + [
        Case(
            f"search of {QUERIES:,} queries in {GALLERY:,} vectors of width {WIDTH}, exact / whole rows of scores",
            search_ours,
            search_plain,
            5.0,
            "query",
            search_memory,
        )
    ]
