"""Stage 4: the vectors of every item under the base and the fine-tuned model, and the proof of which finds better.

Reads   --shards: a folder or s3://bucket/prefix from 2_prepare.py; the base model; --finetuned: a run of 3_train.py
Writes  --output: master.parquet, one row an item; beside it report.json, report.html, queries.parquet (the scores of
        each query), rejects, and vectors/: one SQLite file a model, so that no vector is ever computed twice

    python 4_embed.py --shards data/shards --model ViT-B-32 --pretrained openai \\
        --finetuned data/runs/dual_lora/model --output data/embeddings/master.parquet
    torchrun --nproc-per-node 8 4_embed.py ...                 the same, on eight GPUs
    python 4_embed.py report --shards data/shards --model local-dir:tests/small_clip \\
        --run data/runs/zero_shot --run data/runs/dual_lora --output data/report         any number of runs; a minute
    python 4_embed.py pool --report data/folds/5/0/report-dual_lora --report ... --output data/proof
    python 4_embed.py search "grey fabric sofa" [--image photo.jpg]                      seconds on a CPU
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
from common import ATTRIBUTES, DONE, LOCAL, SPLITS, USAGE, BadImage, Clip, Fail, World, setting

COLUMNS = ("image_id", "split", "image_path", "title", "prompt", *ATTRIBUTES, "group", "image_digest", "text_digest")
ROW_GROUP = 1024  # rows, at most; a shard begins a new one

VECTORS_FORMAT = 3  # of the vectors' files; what another one made is computed again
FLUSH_VECTORS, FLUSH_SECONDS = 1024, 30  # what a kill costs at most
AHEAD = 3  # batches that are read and decoded before they are needed
DECODE_TOGETHER = 16  # pictures a thread decodes in one go: a future for each would cost as much as decoding
CHECKED = 32  # pictures and prompts that bf16 is checked on
LEAST_COSINE = 0.999  # that bf16 must reach against float32
EVEN_ROWS = 16  # batches are filled up to a multiple: matrix products of fewer rows add up in another order

NEAREST = 4  # results of a picture that are judged, as many as the arena shows
METRICS = {  # of the report, in the order of its tables, and their labels
    "text_to_image_recall@1": "text → image  recall@1",
    "text_to_image_recall@5": "text → image  recall@5",
    "text_to_image_recall@10": "text → image  recall@10",
    "text_to_image_mrr": "text → image  MRR",
    "image_to_text_recall@1": "image → text  recall@1",
    "image_to_text_recall@5": "image → text  recall@5",
    "image_to_text_recall@10": "image → text  recall@10",
    "image_to_text_mrr": "image → text  MRR",
    "agreement@4_object_type": "image → image  agreement@4 object type",
    "agreement@4_style": "image → image  agreement@4 style",
    "agreement@4_material": "image → image  agreement@4 material",
    "agreement@4_color": "image → image  agreement@4 color",
    "agreement@4_all": "image → image  agreement@4 all",
    "mrr": "both ways  MRR",
}
CHARTED = {"mrr", "text_to_image_recall@1", "text_to_image_mrr", "image_to_text_recall@1", "image_to_text_mrr",
           "agreement@4_object_type", "agreement@4_all"}  # where there are several runs  # fmt: skip

ALPHA = 0.05  # two-sided level of every test; intervals are 95%
DRAWS, SEED = 10_000, 42  # resamples behind each interval: its ends move by less than 2% of its width
BOOTSTRAP_NUMBERS = 400_000  # drawn at once: 3 MB an array stay in the cache, which is twice as fast as 32 MB
THUMBNAIL = 128  # pixels a side


# --------------------------------------------------------------------------------------------------------------------
# Settings, and the models that are judged


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """Stage 4."""

    batch_size: int = setting(128, "pictures encoded at once; lower it when memory runs out", low=1)
    precision: str = setting("auto", "auto: bf16 where hardware has it, checked against fp32", ("auto", "fp32", "bf16"))
    max_failed: float = setting(0.05, "share of pictures that may be unreadable", low=0, high=1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int | None = setting(None, "threads that decode pictures (unset: one a core, up to 4)", low=1)
    cache_gb: float = setting(50.0, "disk for the local copies of shards that lie on S3", low=0)


@dataclasses.dataclass
class Run:
    """One model to be judged: a run of 3_train.py, a folder with a model alone, or the base."""

    name: str
    model: str  # as load_clip takes it
    pretrained: str | None = None
    folder: Path | None = None  # where curves.png is
    base_fingerprint: str | None = None  # of the model it was trained from


def read_run(folder: str, args: argparse.Namespace) -> Run:
    """A run by its folder or by the model folder in it. Raises Fail where there is none."""
    path = Path(folder.removeprefix(LOCAL))
    place = path if (path / "train.json").is_file() else path.parent
    if not (place / "train.json").is_file():
        if (path / "open_clip_config.json").is_file():
            return Run(path.name, f"{LOCAL}{path}")
        raise Fail(f"{path}: no finished run there (no train.json); train it with 3_train.py, or check the path")
    facts = common.read_json(place / "train.json", "run")
    try:
        name, model = facts.get("scenario"), facts.get("model_dir")
        base = facts.get("inputs", {}).get("base_fingerprint")
        if not all(isinstance(text, str | None) for text in (name, model, base)):
            raise TypeError("a name is no text")
    except (AttributeError, TypeError) as error:
        raise Fail(f"{place}/train.json: not written by 3_train.py ({error!r}); train that run again") from None
    weights = (f"{LOCAL}{place / model}", None) if model else (args.model, args.pretrained)  # zero_shot has no model
    return Run(name or place.name, *weights, place, base)


def load_run(run: Run, world: World, base: Clip | None = None) -> Clip:
    """The run's CLIP; says so where it comes from another base than the one it is compared with."""
    clip = common.load_clip(run.model, run.pretrained, world.device)
    if world.main and base and run.base_fingerprint and run.base_fingerprint != base.fingerprint:
        print(f"NOTE: {run.name} was not trained from {base.name}, with which it is compared here", flush=True)
    return clip


# --------------------------------------------------------------------------------------------------------------------
# The shards, read in order by webdataset


@dataclasses.dataclass
class Shards:
    """The shards of some splits, in order; what lies on S3 is copied when it is needed."""

    root: str
    manifest: dict[str, Any]
    entries: list[tuple[str, dict[str, Any]]]  # split, entry of the manifest
    cache: Path
    cache_gb: float

    def paths(self, numbers: Iterable[int]) -> list[Path]:
        """Local paths of some of the entries."""
        return common.local_shards(self.root, [self.entries[n][1] for n in numbers], self.cache, self.cache_gb)


def open_shards(root: str, splits: tuple[str, ...], folder: Path, config: EmbeddingConfig) -> Shards:
    """The manifest's shards of these splits. Fail where there is nothing to test on."""
    manifest = common.load_manifest(root)
    shards = ((split, entry) for split in splits for entry in manifest["splits"].get(split, {}).get("shards", []))
    entries = [(split, entry) for split, entry in shards if entry["samples"]]
    if not any(split == "test" for split, _ in entries):
        raise Fail(f"{root}: the test split is empty, nothing can be compared; give 2_prepare.py more rows")
    return Shards(root, manifest, entries, folder / "shards", config.cache_gb)


def read_shard(shards: Shards, number: int) -> Iterator[tuple[dict[str, Any], bytes]]:
    """(row, JPEG) of each sample in order: COLUMNS, the shard's number, the sample's place in it, reason and detail.

    A sample that cannot be read is a row with a reason and without a JPEG. No sample that the manifest counts is lost:
    a shard with other bytes than the manifest names is not trusted, and every sample of it is such a row.
    """
    import webdataset

    split, entry = shards.entries[number]
    (path,), place, problem = shards.paths([number]), -1, "it holds fewer samples than its manifest says"
    blank = dict.fromkeys((*COLUMNS, "reason", "detail"), "") | {"split": split, "shard": number}
    try:
        if common.file_digest(path) != entry["sha256"]:
            if common.is_s3(shards.root):
                path.unlink(missing_ok=True)  # the copy: the next run fetches it again
            raise ValueError("not the bytes that its manifest names")
        shard = webdataset.SimpleShardList([str(path)])
        for place, sample in enumerate(webdataset.DataPipeline(shard, webdataset.tarfile_to_samples())):
            row = blank | {"place": place}
            try:
                yield row | sample_columns(sample), sample["jpg"]
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                yield row | {"image_id": sample["__key__"], "reason": "broken sample", "detail": repr(error)}, b""
    except Exception as error:  # tarfile and webdataset raise many kinds for a damaged archive
        problem = " ".join(str(error).split())[:200]
    for lost in range(place + 1, entry["samples"]):
        yield blank | {"place": lost, "reason": "damaged shard", "detail": f"{entry['name']}: {problem}"}, b""


def sample_columns(sample: dict[str, bytes]) -> dict[str, str]:
    """COLUMNS of one sample. Raises KeyError, TypeError or ValueError for what 2_prepare.py did not write."""
    record, prompt = json.loads(sample["json"]), sample["txt"].decode()
    columns = {name: str(record[name] or "") for name in ("image_path", "title", *ATTRIBUTES, "group")}
    columns |= {"image_id": str(record["id"] or ""), "prompt": prompt}
    digests = [hashlib.sha256(sample[kind]).hexdigest() for kind in ("jpg", "txt")]
    return columns | {"image_digest": digests[0], "text_digest": digests[1]}


def batches(items: Iterable, size: int) -> Iterator[list]:
    """The items in lists of `size`, the last one shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


# --------------------------------------------------------------------------------------------------------------------
# Vectors, kept by digest: what is there is never computed again


@dataclasses.dataclass(eq=False)
class Job:
    """A picture or prompt on its way to its vectors."""

    digest: str
    name: str  # for messages
    content: Any  # JPEG or text
    encoders: list[Encoder]  # that lack its vector
    problem: BadImage | None = None


class VectorStore:
    """The vectors of one model, in one SQLite table: sha256 of a picture or prompt -> float32 vector.

    Several processes may use it at once. Vectors are written 1,024 at a time or every 30 seconds.
    """

    def __init__(self, path: Path, model: str):
        self.path, self.model = path, model
        self.claimed: set[str] = set()  # digests whose vectors are in the making
        self.waiting: list[tuple[list[Job], Any]] = []  # vectors that are not written yet
        self.flushed = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._explain_damage():
            self.database = sqlite3.connect(path, timeout=600)  # another process may be writing
            self.database.execute("CREATE TABLE IF NOT EXISTS vectors (digest TEXT PRIMARY KEY, vector BLOB)")

    @contextlib.contextmanager
    def _explain_damage(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # a full disk and the like: common names these
                raise
            raise Fail(f"{self.path}: damaged ({error}); remove it and run again: its vectors are made again") from None

    def claim(self, digest: str) -> bool:
        """Whether the caller is to make this vector: it is not there, and nobody in this process is making it."""
        with self._explain_damage():
            there = self.database.execute("SELECT 1 FROM vectors WHERE digest = ?", [digest]).fetchone()
        if there or digest in self.claimed:
            return False
        self.claimed.add(digest)
        return True

    def add(self, jobs: list[Job], vectors: Any) -> None:
        """Take their vectors, float32 [B, D], which may still be in the making on a GPU."""
        self.waiting.append((jobs, vectors))
        count, seconds = sum(len(some) for some, _ in self.waiting), time.monotonic() - self.flushed
        if count >= FLUSH_VECTORS or seconds >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits. Raises Fail for a vector whose length is not 1."""
        import numpy as np

        waiting, self.waiting, self.flushed = self.waiting, [], time.monotonic()
        if not waiting:
            return
        jobs = [job for some, _ in waiting for job in some]
        vectors = np.concatenate([part.cpu().numpy() for _, part in waiting])
        lengths = np.linalg.norm(vectors, axis=1)
        wrong = np.flatnonzero(~(abs(lengths - 1) < 1e-3))  # NaN is wrong, too
        if len(wrong):
            name, length = jobs[wrong[0]].name, lengths[wrong[0]]
            raise Fail(f"{self.model}: the vector of {name} has length {length}; the model is broken: train it again")
        rows = [(job.digest, vector.tobytes()) for job, vector in zip(jobs, vectors, strict=True)]
        with self._explain_damage(), self.database:
            self.database.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)
        self.claimed.difference_update(digest for digest, _ in rows)

    def get(self, digests: Sequence[str]) -> Any:
        """float32 [n, D] of digests that are all there."""
        import numpy as np

        found: dict[str, bytes] = {}
        for some in batches(dict.fromkeys(digests), 500):
            marks = ",".join("?" * len(some))
            with self._explain_damage():
                found.update(self.database.execute(f"SELECT * FROM vectors WHERE digest IN ({marks})", some))
        return np.frombuffer(b"".join(found[digest] for digest in digests), np.float32).reshape(len(digests), -1)


class Encoder:
    """A CLIP at a precision, and the store of its vectors.

    The vector of a picture or prompt is a function of that alone, so that what was made in whichever order, by however
    many processes, is the same to the bit. Matrix products of a multiple of 16 rows give each row the same bits
    wherever it stands; prompts are encoded among prompts of their own length, since other lengths add up attention in
    another order. (On a GPU the kernel depends on the number of rows as well: there every batch is filled up.)
    """

    def __init__(self, clip: Clip, precision: str, folder: Path, batch_size: int):
        key = [VECTORS_FORMAT, clip.fingerprint, clip.size, list(clip.mean), list(clip.std), precision]
        self.clip, self.precision, self.batch_size = clip, precision, batch_size
        self.key = common.digest(key)[:24]
        self.store = VectorStore(folder / f"{self.key}.sqlite", clip.name)

    def autocast(self):
        """bfloat16 where that is the precision. Its copy of the weights lasts as long as the outermost context."""
        import torch

        return torch.autocast(self.clip.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def images(self, pixels):
        """float32 [B, D], still on the device, of uint8 [B, 3, S, S] with B <= batch_size."""
        with self.autocast():
            return common.encode(self.clip, pixels=self._filled(pixels))[: len(pixels)]

    def texts(self, captions: list[str]):
        """float32 [N, D], still on the device, of any number of captions."""
        import torch

        tokens = self.clip.tokenizer(captions)  # (N, L)
        padding = (tokens == tokens[:, -1:]).flip(1).cumprod(1).sum(1)  # equal tokens at the end
        lengths = torch.stack([padding, tokens[:, -1]], dim=1).unique(dim=0, return_inverse=True)[1]
        order, found = [], []
        with self.autocast():
            for length in range(int(lengths.max()) + 1):
                for rows in torch.nonzero(lengths == length)[:, 0].split(self.batch_size):
                    order.append(rows)
                    found.append(common.encode(self.clip, captions=self._filled(tokens[rows]))[: len(rows)])
        return torch.cat(found)[torch.cat(order).argsort().to(found[0].device)]

    def _filled(self, inputs):
        """The first row repeated up to a multiple of 16 rows, on a GPU up to a whole batch."""
        cuda = self.clip.device.type == "cuda"
        lacking = self.batch_size - len(inputs) if cuda else -len(inputs) % EVEN_ROWS
        return inputs[[*range(len(inputs)), *[0] * lacking]] if lacking else inputs


def open_encoder(clip: Clip, shards: Shards, folder: Path, config: EmbeddingConfig, world: World) -> Encoder:
    """A model with its store, in bf16 where that is wanted and agrees with float32 on the first pictures and prompts.

    The agreement is kept beside the vectors, with the model's name and fingerprint.
    """
    precision = common.auto_precision(world.device.type) if config.precision == "auto" else config.precision
    if precision == "bf16":
        half, whole = (Encoder(clip, name, folder, config.batch_size) for name in ("bf16", "fp32"))
        note = half.store.path.with_suffix(".json")
        if world.main and not note.is_file():
            facts = {"model": clip.name, "fingerprint": clip.fingerprint, "cosine": bf16_cosine(half, whole, shards)}
            common.write_json(note, facts)
        cosine = world.share(common.read_json(note)["cosine"] if world.main else None)[0]
        if cosine >= LEAST_COSINE:
            return half
        if world.main:
            print(f"{clip.name}: bf16 agrees with float32 to a cosine of {cosine:.5f} only; float32 is used")
    return Encoder(clip, "fp32", folder, config.batch_size)


def bf16_cosine(half: Encoder, whole: Encoder, shards: Shards) -> float:
    """The smallest cosine between two encoders' vectors of the first pictures and prompts."""
    import torch

    samples = (sample for number in range(len(shards.entries)) for sample in read_shard(shards, number))
    prompts, pixels = ["a"], []
    for row, jpg in itertools.islice((sample for sample in samples if not sample[0]["reason"]), CHECKED):
        prompts.append(row["prompt"])
        with contextlib.suppress(BadImage):
            pixels.append(common.decode_jpeg(jpg, half.clip.size))
    pictures = [torch.stack(some) for some in batches(pixels, half.batch_size)]
    a, b = (torch.cat([one.texts(prompts), *map(one.images, pictures)]).double() for one in (half, whole))
    return (a * b).sum(dim=1).min().nan_to_num(0.0).item()


# --------------------------------------------------------------------------------------------------------------------
# Computing what is missing, in one pass over the shards


def make_vectors(shards: Shards, encoders: list[Encoder], config: EmbeddingConfig, world: World) -> tuple[Any, dict]:
    """Make every vector that a store lacks, this process its share.

    Returns the rows of all samples in order (a DataFrame: COLUMNS, shard, place, reason, detail), the same in every
    process, and how many pictures and prompts were computed in all.
    """
    import pandas as pd

    rows, pictures = embed_pictures(shards, encoders, config, world)
    shared = world.share((rows, pictures))
    rows = pd.concat([part for part, _ in shared], ignore_index=True)
    rows = rows.sort_values(["shard", "place"], kind="stable", ignore_index=True)
    prompts = sum(world.share(embed_prompts(rows, encoders, world)))  # when all have done theirs, all is there
    return rows, {"image": sum(count for _, count in shared), "text": prompts}


def embed_pictures(shards: Shards, encoders: list[Encoder], config: EmbeddingConfig, world: World) -> tuple[Any, int]:
    """Read this process's shards from end to end and make the vectors of pictures that a store lacks.

    Returns the rows of these shards, with the reason of each picture that cannot be decoded, and the number computed.
    Each picture is read and decoded once for all models, by threads that run ahead of the encoders.
    """
    import pandas as pd

    numbers = range(world.rank, len(shards.entries), world.size)
    shards.paths(numbers)  # from S3, several at once
    sizes = {encoder.clip.size for encoder in encoders}
    tables, problems, computed = [pd.DataFrame(columns=[*COLUMNS, "reason", "detail", "shard", "place"])], {}, 0

    def encoded() -> Iterator[Job]:
        with computing(encoders, world):
            for batch, pixels in decoded(lacking_pictures(shards, numbers, encoders, tables), sizes, config, world):
                for encoder in encoders:
                    places = [i for i, job in enumerate(batch) if encoder in job.encoders and not job.problem]
                    if places:
                        some = pixels[encoder.clip.size]
                        some = some if len(places) == len(some) else some[places]
                        encoder.store.add([batch[i] for i in places], encoder.images(some))
                yield from batch

    total = sum(shards.entries[number][1]["samples"] for number in numbers)
    for job in common.progress(encoded(), "encoding", total, "picture"):
        computed += job.problem is None
        if job.problem:
            problems[job.digest] = job.problem
    rows = pd.concat(tables, ignore_index=True)
    for i in rows.index[rows["image_digest"].isin(list(problems))]:
        problem = problems[rows.at[i, "image_digest"]]
        rows.at[i, "reason"], rows.at[i, "detail"] = problem.reason, problem.detail
    return rows, computed


def lacking_pictures(shards: Shards, numbers: Iterable[int], encoders: list[Encoder], tables: list) -> Iterator[Job]:
    """The pictures of some shards whose vector a store lacks; each shard's rows are put to `tables` on the way."""
    import pandas as pd

    for number in numbers:
        rows = []
        for row, jpg in read_shard(shards, number):
            rows.append(row)
            wanted = [one for one in encoders if not row["reason"] and one.store.claim(row["image_digest"])]
            if wanted:
                name = f"{shards.entries[number][1]['name']}, sample {row['place']}"
                yield Job(row["image_digest"], name, jpg, wanted)
        tables.append(pd.DataFrame(rows))


@contextlib.contextmanager
def computing(encoders: list[Encoder], world: World) -> Iterator[None]:
    """Keep what autocast makes of the weights while inside; on the way out, after Ctrl-C too, write what waits."""
    import torch

    half = any(encoder.precision == "bf16" for encoder in encoders)
    try:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=half):
            yield
    finally:
        for encoder in encoders:
            encoder.store.flush()


def decoded(pictures: Iterable[Job], sizes: set[int], config: EmbeddingConfig, world: World) -> Iterator[tuple]:
    """(batch, {size: uint8 [B, 3, size, size]}), decoded by threads that run ahead; pinned where a GPU fetches them."""
    import torch

    def decode(batch: list[Job], first: int, pixels: dict[int, Any]) -> None:
        for place, job in enumerate(batch[first : first + DECODE_TOGETHER], first):
            try:
                for size in sizes:
                    pixels[size][place] = common.decode_jpeg(job.content, size)
            except BadImage as error:
                job.problem = error
            job.content = b""

    pin, started = world.device.type == "cuda", collections.deque()
    with ThreadPoolExecutor(config.workers or min(4, os.cpu_count() or 1)) as pool:
        for batch in itertools.chain(batches(pictures, config.batch_size), [None] * AHEAD):
            if batch:
                pixels = {n: torch.empty((len(batch), 3, n, n), dtype=torch.uint8, pin_memory=pin) for n in sizes}
                starts = range(0, len(batch), DECODE_TOGETHER)
                started.append((batch, pixels, [pool.submit(decode, batch, start, pixels) for start in starts]))
            if started and (not batch or len(started) > AHEAD):
                ready, pixels, futures = started.popleft()
                for future in futures:
                    future.result()
                yield ready, pixels


def embed_prompts(rows, encoders: list[Encoder], world: World) -> int:
    """Make the vectors of prompts that a store lacks, this process its share; returns how many prompts that were."""
    some = rows[rows["reason"] == ""].drop_duplicates("text_digest")
    jobs = []
    for digest, prompt in zip(some["text_digest"], some["prompt"], strict=True):
        if int(digest[:8], 16) % world.size == world.rank:
            jobs.append(Job(digest, f"the prompt '{prompt}'", prompt, [e for e in encoders if e.store.claim(digest)]))
    jobs = sorted((job for job in jobs if job.encoders), key=lambda job: len(job.content))  # few lengths in a batch

    def encoded() -> Iterator[Job]:
        with computing(encoders, world):
            for batch in batches(jobs, FLUSH_VECTORS):
                for encoder in encoders:
                    if wanted := [job for job in batch if encoder in job.encoders]:
                        encoder.store.add(wanted, encoder.texts([job.content for job in wanted]))
                yield from batch

    return sum(1 for _ in common.progress(encoded(), "encoding", len(jobs), "prompt")) if jobs else 0


# --------------------------------------------------------------------------------------------------------------------
# What cannot be read, and master.parquet


def write_rejects(path: str, rows, max_failed: float) -> None:
    """Name the rows that are left out, each with its reason; Fail where they are too many."""
    bad = rows.loc[rows["reason"] != "", ["image_id", "reason", "detail", "image_path", "title"]]
    bad = bad.rename(columns={"image_id": "id", "title": "name"}).reset_index(names="row")
    if len(bad) or Path(path).is_file():
        common.atomic_write(path, "".join(json.dumps(line) + "\n" for line in bad.to_dict("records")))
    if len(bad) > max_failed * len(rows):
        reasons = ", ".join(f"{count} {reason}" for reason, count in bad["reason"].value_counts().items())
        problem = f"{len(bad)} of {len(rows)} pictures are unreadable ({reasons}; first {bad['detail'].iloc[0][:120]})"
        raise Fail(f"{problem}, named in {path}; make or copy the shards again, or raise --max-failed")


def master_facts(shards: Shards, rows, encoders: list[Encoder], run: Run, args: argparse.Namespace) -> dict[str, str]:
    """master.parquet's metadata. No path of this machine is among it, so that the same work gives the same bytes."""
    base, finetuned = encoders
    folder = os.path.relpath(Path(run.model.removeprefix(LOCAL)).resolve(), Path(args.output).parent.resolve())
    entries = [(split, entry["sha256"]) for split, entry in shards.entries]
    inputs = [entries, base.key, finetuned.key, COLUMNS, rows.index[rows["reason"] != ""].tolist()]
    origin = f"{LOCAL}{base.clip.folder}" if base.clip.folder else f"{args.model}/{args.pretrained}"
    return {
        "base_model": origin, "base_fingerprint": base.clip.fingerprint,
        "finetuned_model": f"{LOCAL}{folder}", "finetuned_fingerprint": finetuned.clip.fingerprint,
        "scenario": run.name, "precision": f"{base.precision}/{finetuned.precision}", "inputs": common.digest(inputs),
    }  # fmt: skip


def holds(output: Path, facts: dict[str, str]) -> bool:
    """Whether master.parquet is there, whole, with these facts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    there = {}
    with contextlib.suppress(OSError, pa.ArrowInvalid):  # not there, or damaged
        there = pq.read_schema(output).metadata or {}
    return there.items() >= {key.encode(): value.encode() for key, value in facts.items()}.items()


def write_master(output: Path, rows, encoders: Sequence[Encoder], facts: dict[str, str]) -> None:
    """Write master.parquet, row group by row group: COLUMNS, then base and finetuned embedding and text embedding."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = (("base", encoders[0]), ("finetuned", encoders[1]))
    vectors = [(f"{kind}_{text}embedding", encoder.store, f"{of}_digest")
               for text, of in (("", "image"), ("text_", "text")) for kind, encoder in kinds]  # fmt: skip
    rows = rows[rows["reason"] == ""]
    widths = [store.get([rows[digest].iloc[0]]).shape[1] for _, store, digest in vectors]
    fields = [pa.field(name, pa.string()) for name in COLUMNS]
    fields += [pa.field(name, pa.list_(pa.float32(), width)) for (name, *_), width in zip(vectors, widths, strict=True)]
    schema = pa.schema(fields, metadata=facts)
    compression = {f"{name}.list.element": "none" for name, _, _ in vectors} | dict.fromkeys(COLUMNS, "zstd")
    options = {"compression": compression, "use_dictionary": ["split", *ATTRIBUTES], "write_statistics": list(COLUMNS)}
    with common.atomic_file(output) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:
        pieces = [shard[start : start + ROW_GROUP]
                  for _, shard in rows.groupby("shard") for start in range(0, len(shard), ROW_GROUP)]  # fmt: skip
        for some in common.progress(pieces, "writing", len(pieces), "row group"):
            columns = {name: pa.array(some[name].tolist(), pa.string()) for name in COLUMNS}
            for name, store, digest in vectors:
                matrix = store.get(some[digest].tolist())
                columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROW_GROUP)


# --------------------------------------------------------------------------------------------------------------------
# Metrics: how well vectors find products
#
# Definitions, for the N items of one split. Scores are dot products of L2-normalised vectors.
# - text -> image: the prompt of item i searches all N pictures; image -> text the reverse. Item j is a right answer to
#   i where they share prompt or duplicate group: people could not tell such answers apart, so each of them is right.
#   The rank of the best right answer is 1 + the wrong answers that score at least as high: ties count against the
#   model. recall@k is 1 where rank <= k; the reciprocal rank is 1 / rank; MRR is its mean over queries.
# - image -> image agreement@4: the share of the 4 nearest pictures that have the query's attribute; the query and its
#   duplicate group are no results, and of equal scores the earlier row is the nearer. Only queries whose attribute is
#   known are judged. "all": results that agree in every attribute known of the query.
# - mrr, the headline: the mean of both reciprocal ranks of an item.


def answer_keys(items):
    """int64 [N, 2] of a DataFrame: numbers of prompt and duplicate group. Items that share one are right answers."""
    import numpy as np
    import pandas as pd

    return np.stack([pd.factorize(items[name])[0] for name in ("prompt", "group")], axis=1)


def clusters_of(keys):
    """int64 [N]: items that share right answers, directly or through others, are one draw of the bootstrap."""
    import numpy as np
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(keys)  # a graph of the items, their prompts and their groups
    items, labels = np.tile(np.arange(count), 2), count + np.concatenate([keys[:, 0], count + keys[:, 1]])
    graph = coo_matrix((np.ones(2 * count, np.int8), (items, labels)), (3 * count, 3 * count))
    return np.unique(connected_components(graph, directed=False)[1][:count], return_inverse=True)[1]


def judge(images, texts, items) -> dict[str, Any]:
    """{metric: float64 [N]} for METRICS, and WAY_rank; NaN where a query cannot be judged.

    images, texts: float32 [N, D], L2-normalised. items: a DataFrame with prompt, group and attributes.
    """
    keys, scores = answer_keys(items), {}
    for way, queries, gallery in (("text_to_image", texts, images), ("image_to_text", images, texts)):
        rank = common.right_ranks(queries, gallery, keys)
        scores |= {f"{way}_recall@{k}": (rank <= k).astype(float) for k in (1, 5, 10)}
        scores |= {f"{way}_mrr": 1 / rank, f"{way}_rank": rank}
    nearest = common.top_k(images, images, NEAREST, exclude=(keys[:, 1], keys[:, 1]))[1]
    scores |= {f"agreement@{NEAREST}_{name}": values for name, values in agreement(nearest, items).items()}
    return scores | {"mrr": (scores["text_to_image_mrr"] + scores["image_to_text_mrr"]) / 2}


def agreement(nearest, items) -> dict[str, Any]:
    """{attribute, all: float64 [N]}: the share of nearest [N, k] (-1: no result) with the query's attribute, or NaN."""
    import numpy as np

    found = nearest >= 0
    agreeing, judged, shares = found.copy(), np.zeros(len(nearest), bool), {}
    for name in ATTRIBUTES:
        values = items[name].to_numpy(dtype=object)
        known = values != ""
        same = found & (values[nearest] == values[:, None])
        shares[name] = (same, known)
        agreeing &= same | ~known[:, None]
        judged |= known
    shares["all"] = (agreeing, judged)
    counts = found.sum(axis=1)
    part = {name: same.sum(axis=1) / np.maximum(counts, 1) for name, (same, _) in shares.items()}
    return {name: np.where(known & (counts > 0), part[name], np.nan) for name, (_, known) in shares.items()}


# --------------------------------------------------------------------------------------------------------------------
# Is a difference more than chance? Paired bootstrap and Holm's correction


def paired_bootstrap(a, b, draws: int = DRAWS, seed: int = SEED, groups=None) -> dict[str, float | None]:
    """difference: mean(b - a), its 95% interval low to high, and p of "no difference", two-sided.

    Symmetric studentised bootstrap of mean(b - a), where a[i] and b[i] are one query's score under two models.

    a, b: float [N], finite. groups: [N] labels; queries of one label (a duplicate group) are drawn together, so only
    groups need be independent of each other. None: every query is its own group.
    The interval is mean -+ q * s: s is the standard error over groups (a ratio of sums: Cochran 1977, 6.4), and q the
    95% quantile of |mean* - mean| / s* over resamples (Hall 1988, "On symmetric bootstrap confidence intervals":
    coverage error of order N^-2, where the percentile interval has N^-1). Recall differs on few queries, and a resample
    that holds none of those has s* = 0; so the spread of one more group is added to every variance, s and s* alike.
    p is the share of resamples at least as far out, counted with the one observed: never below 1 / (draws + 1).
    p <= 0.05 exactly when the interval leaves out 0. Where too few groups leave it unknown, low and high are None.
    """
    import numpy as np
    import pandas as pd

    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    groups = np.arange(len(a)) if groups is None else pd.factorize(np.asarray(groups))[0]
    if not len(a) or not a.shape == b.shape == groups.shape or not np.isfinite(b - a).all():
        raise ValueError(
            f"need finite, equally long scores and groups, got shapes {a.shape}, {b.shape}, {groups.shape}"
        )
    sums, sizes = np.bincount(groups, weights=b - a), np.bincount(groups).astype(float)  # [G]
    count, mean = len(sums), float(sums.sum() / sizes.sum())
    residuals = sums - mean * sizes
    if count < 2:
        return {"difference": mean, "low": None, "high": None, "p": 1.0}
    if abs(residuals).max() <= 1e-12 * abs(sums).max():  # no spread to draw from: the sign test is what is left
        p = 2.0 ** max(1 - count, -1000) if mean else 1.0
        ends = mean if p <= ALPHA or not mean else None
        return {"difference": mean, "low": ends, "high": ends, "p": p}
    more = (residuals**2).mean() / sizes.sum() ** 2
    error = math.sqrt(count / (count - 1) * (residuals**2).sum() / sizes.sum() ** 2 + more)
    far = np.sort(resampled_distances(residuals, sizes, more, draws, np.random.default_rng(seed)))
    half = error * float(far[-math.floor(ALPHA * (draws + 1))])
    p = (1 + int((far >= abs(mean) / error * (1 - 1e-12)).sum())) / (draws + 1)
    if p > ALPHA:  # rounding must not let the two disagree
        half = max(half, abs(mean))
    return {"difference": mean, "low": mean - half, "high": mean + half, "p": p}


def resampled_distances(residuals, sizes, more: float, draws: int, rng) -> Any:
    """|mean* - mean| / s* of `draws` resamples of whole groups, float [draws].

    residuals, sizes: float [G]; more is added to every variance. Groups of equal residual and size are interchangeable:
    with few kinds (recall is 0 or 1) their multinomial counts are drawn instead of the groups, which has the same
    distribution and costs a hundredth.
    """
    import numpy as np

    count = len(sizes)
    kinds, repeats = np.unique(np.stack([residuals, sizes], axis=1), axis=0, return_counts=True)  # [K, 2], [K]
    few = len(kinds) * 10 <= count
    if not few:
        kinds = np.stack([residuals, sizes], axis=1)
    e, n = kinds.T
    terms = np.stack([e, n, e * e, e * n, n * n], axis=1)  # [K, 5]
    far = np.empty(draws)
    step = max(1, BOOTSTRAP_NUMBERS // (2 * len(kinds)))
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        if few:
            times = rng.multinomial(count, repeats / count, size=rows)  # how often each kind was drawn: [rows, K]
        else:
            picks = rng.integers(0, count, size=(rows, count)) + count * np.arange(rows)[:, None]
            times = np.bincount(picks.ravel(), minlength=rows * count).reshape(rows, count)
        totals = times @ terms  # [rows, 5]
        shift = totals[:, 0] / totals[:, 1]  # mean* - mean
        square = totals[:, 2] - 2 * shift * totals[:, 3] + shift**2 * totals[:, 4]
        variance = count / (count - 1) * np.maximum(square, 0) / totals[:, 1] ** 2
        far[start : start + rows] = abs(shift) / np.sqrt(variance + more)
    return far


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values in the order given (Holm 1979); valid under any dependence.

    Hypothesis i is rejected at level alpha, with family-wise error at most alpha, when its adjusted value is <= alpha.
    """
    import numpy as np

    values = np.asarray(p, dtype=float)
    if values.size and not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p-values must lie in [0, 1], got {list(p)}")
    order = np.argsort(values, kind="stable")
    adjusted = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    return np.minimum(adjusted, 1.0)[np.argsort(order)].tolist()


# --------------------------------------------------------------------------------------------------------------------
# Every model against the base, in numbers and words


def mean(values) -> float | None:
    """Mean over the queries that could be judged."""
    import numpy as np

    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def compare(base: dict, others: list[dict], clusters, draws: int = DRAWS, seed: int = SEED) -> list[dict[str, dict]]:
    """For each other model, {metric: value, difference to base, 95% interval, p, Holm's p}.

    The interval and p are those of paired_bootstrap over clusters; Holm's correction is over every difference that the
    report shows, all models and metrics together.
    """
    import numpy as np

    compared = []
    for scores in others:
        metrics: dict[str, dict] = {}
        for name in METRICS:
            judged = np.isfinite(base[name]) & np.isfinite(scores[name])
            facts: dict[str, Any] = {"value": mean(scores[name]), "queries": int(judged.sum())}
            if judged.any():
                facts |= paired_bootstrap(base[name][judged], scores[name][judged], draws, seed, clusters[judged])
                if facts["low"] == facts["high"] == 0:  # no query differs: 0 wide would be too sure of those not asked
                    facts |= {"low": None, "high": None}
            metrics[name] = facts
        compared.append(metrics)
    tested = [facts for metrics in compared for facts in metrics.values() if "p" in facts]
    for facts, p in zip(tested, holm([facts["p"] for facts in tested]), strict=True):
        facts["p_holm"] = p
    return compared


def by_type(scores: dict[str, Any], types: Sequence[str]) -> dict[str, dict]:
    """{object type: {items, metric: mean}}, the most frequent type first."""
    import numpy as np

    types = np.array([kind or "unknown" for kind in types], dtype=object)
    found = {}
    for kind, count in sorted(collections.Counter(types).items(), key=lambda pair: (-pair[1], pair[0])):
        found[kind] = {"items": count} | {name: mean(scores[name][types == kind]) for name in METRICS}
    return found


def compare_models(about: list[dict], scores: list[dict], types: Sequence[str], clusters) -> dict[str, Any]:
    """What report.json says of models, the base first, by the scores of the same N queries.

    about: name, fingerprint and precision of each; scores: {metric: float64 [N]}; types: object type, N texts.
    """
    about = [one | {"by_type": by_type(score, types)} for one, score in zip(about, scores, strict=True)]
    compared = zip(about[1:], compare(scores[0], scores[1:], clusters), strict=True)
    runs = [run | {"metrics": found, "verdict": verdict(run["name"], found["mrr"])} for run, found in compared]
    facts = {"split": "test", "items": len(types), "independent": int(clusters.max()) + 1, "headline": "mrr"}
    facts["settings"] = {"draws": DRAWS, "seed": SEED, "nearest": NEAREST}
    return facts | {"base": about[0] | {"metrics": {name: mean(scores[0][name]) for name in METRICS}}, "runs": runs}


def verdict(name: str, facts: dict) -> str:
    """In words: is this run better than the base, corrected for every difference that was tested?"""
    if "p" not in facts:
        return f"{name}: nothing could be judged"
    change = f"MRR {facts['value']:.3f}, {facts['difference']:+.3f} against zero-shot"
    if facts["difference"] == 0 and facts["low"] is None:
        return f"{name}: no query differs from zero-shot, MRR {facts['value']:.3f}"
    if facts["low"] is None:
        return f"{name}: {change}; too few independent queries for an interval"
    interval = f"{change}, 95% interval {shown_interval(facts)}"
    p = f"p = {facts['p_holm']:.4f} after Holm's correction"
    way = "better" if facts["difference"] > 0 else "WORSE"
    if facts["p_holm"] <= ALPHA:
        return f"{name} is {way} than zero-shot: {interval}, {p}"
    if facts["p"] <= ALPHA:
        return f"{name} looks {way.lower()}, but that is not certain: {interval}, {p}"
    return f"{name}: no difference to zero-shot is shown: {interval}"


def shown_interval(facts: dict) -> str:
    """The interval of a difference as text."""
    if facts["low"] is None:
        return "no query differs" if facts["difference"] == 0 else "unknown"
    return f"[{facts['low']:+.3f}, {facts['high']:+.3f}]"


def table(base: dict[str, Any], runs: list[dict]) -> str:
    """A line a metric: every run's value, * where Holm's p <= 0.05; a single run's difference and interval, too."""
    alone = ["difference", "95% interval", "p (Holm)"] if len(runs) == 1 else []
    lines = [["", "zero-shot", *(f"{run['name']} " for run in runs), *alone]]
    for name in METRICS:
        if base["metrics"][name] is not None:
            facts = [run["metrics"][name] for run in runs]
            stars = ("*" if fact["p_holm"] <= ALPHA else " " for fact in facts)
            values = [f"{fact['value']:.3f}{star}" for fact, star in zip(facts, stars, strict=True)]
            if alone:
                values += [f"{facts[0]['difference']:+.3f}", shown_interval(facts[0]), f"{facts[0]['p_holm']:.4f}"]
            lines.append([METRICS[name], f"{base['metrics'][name]:.3f}", *values])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    shown = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    if runs:
        shown.append("* differs from zero-shot: p <= 0.05 after Holm's correction over every difference shown")
    return "\n".join(line.rstrip() for line in shown)


# --------------------------------------------------------------------------------------------------------------------
# The report: report.json, report.html, queries.parquet


def make_report(shards: Shards, rows, models: list[tuple[Run, Encoder]], folder: Path) -> None:
    """Judge every run against the first, the base; write the report's files and print what they say.

    models: runs with their encoders. The test split's vectors of one model are in memory at a time.
    """
    tested = rows[(rows["split"] == "test") & (rows["reason"] == "")].reset_index(drop=True)
    if tested.empty:
        raise Fail(f"{shards.root}: no picture of the test split can be read; make the shards again")
    clusters = clusters_of(answer_keys(tested))
    scores = [judge(*vectors_of(encoder, tested), tested) for _, encoder in models]
    names = ["zero_shot", *(run.name for run, _ in models[1:])]
    names = [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]
    about = [{"name": name, "fingerprint": encoder.clip.fingerprint, "precision": encoder.precision}
             for name, (_, encoder) in zip(names, models, strict=True)]  # fmt: skip
    queries = tested[["image_id", "object_type"]].rename(columns={"image_id": "id"}).assign(draw=clusters)
    for name, score in zip(names, scores, strict=True):
        queries = queries.assign(**{f"{name}/{metric}": score[metric] for metric in METRICS})
    with common.atomic_file(folder / "queries.parquet") as temporary:
        queries.to_parquet(temporary, index=False)
    facts = compare_models(about, scores, tested["object_type"].tolist(), clusters)
    facts["shards"] = common.digest([entry["sha256"] for split, entry in shards.entries if split == "test"])
    page: dict[str, Any] = {}
    if facts["runs"]:
        best = 1 + max(range(len(facts["runs"])), key=lambda i: facts["runs"][i]["metrics"]["mrr"]["value"])
        facts["moved"] = {"run": names[best]} | most_moved(tested, scores[0], scores[best])
        page = show_moved(facts["moved"], shards, tested, (models[0][1], models[best][1]))
    curves = {name: run.folder / "curves.png" for name, (run, _) in zip(names, models, strict=True) if run.folder}
    write_report(folder, facts, curves, page)
    print_comparison(facts, folder, suggest_proof=not shards.manifest.get("fold"))


def vectors_of(encoder: Encoder, rows) -> tuple[Any, Any]:
    """float32 [N, D] of the pictures and of the prompts of some rows."""
    return encoder.store.get(rows["image_digest"].tolist()), encoder.store.get(rows["text_digest"].tolist())


def print_comparison(facts: dict[str, Any], folder: Path, suggest_proof: bool) -> None:
    """The table and the verdicts of report.json; where no difference is shown, how small a one would be."""
    print(f"\ntest split: {facts['items']} items, {facts['independent']} of them independent of each other\n")
    print(table(facts["base"], facts["runs"]))
    print("", *(run["verdict"] for run in facts["runs"]), f"report: {folder / 'report.html'}", sep="\n", flush=True)
    headlines = [run["metrics"]["mrr"] for run in facts["runs"]]
    widest = max((one["high"] - one["low"] for one in headlines if one.get("low") is not None), default=0)
    if suggest_proof and widest and not any(one.get("p_holm", 1) <= ALPHA for one in headlines):
        print(f"{facts['items']} test items show only differences beyond about {widest / 2:.2f}; `make proof` tests on "
              "every product, fold by fold", flush=True)  # fmt: skip


def most_moved(tested, base: dict, scores: dict, count: int = 10) -> dict[str, list[dict]]:
    """gained, lost: the queries that now find their picture much earlier, and much later, for report.json.

    By reciprocal rank, then by rank; one query a prompt: with the same words the same is found.
    """
    queries, way = tested[["image_id", "title", "prompt"]].rename(columns={"image_id": "id"}), "text_to_image"
    queries["zero_shot_rank"], queries["rank"] = base[f"{way}_rank"], scores[f"{way}_rank"]
    change = queries.assign(change=1 / queries["rank"] - 1 / queries["zero_shot_rank"])
    change["steps"] = queries["zero_shot_rank"] - queries["rank"]
    found = {}
    for kind, moved in (("gained", change["change"] > 0), ("lost", change["change"] < 0)):
        order = change[moved].sort_values(["change", "steps"], ascending=kind == "lost").drop_duplicates("prompt").index
        found[kind] = queries.loc[order[:count]].reset_index(names="item").to_dict("records")
    return found


def show_moved(moved: dict, shards: Shards, tested, encoders: tuple[Encoder, Encoder]) -> dict[str, Any]:
    """The queries that moved with the pictures that the base and the run find, for report.html."""
    queries = [*moved["gained"], *moved["lost"]]
    asked, keys, found = [query["item"] for query in queries], answer_keys(tested), []
    for encoder in encoders:
        images, texts = vectors_of(encoder, tested)
        found.append(common.top_k(texts[asked], images, NEAREST)[1].tolist() if asked else [])
    pictures = thumbnails(shards, tested, {*asked, *(j for lists in found for some in lists for j in some if j >= 0)})

    def shown(j: int, right: bool) -> dict[str, Any]:
        return {"picture": pictures.get(j, ""), "title": tested.at[j, "title"], "right": right}

    pages = []
    for query, *lists in zip(queries, *found, strict=True):
        right = (keys == keys[query["item"]]).any(axis=1)
        results = [[shown(j, right[j]) for j in some if j >= 0] for some in lists]
        pages.append(query | {"picture": pictures.get(query["item"], ""), "zero_shot": results[0], "run": results[1]})
    return moved | {"gained": pages[: len(moved["gained"])], "lost": pages[len(moved["gained"]) :]}


def thumbnails(shards: Shards, tested, wanted: set[int]) -> dict[int, str]:
    """{row: a small JPEG in base64} of some rows; what cannot be read is left out."""
    found = {}
    for number, some in tested.loc[sorted(wanted)].groupby("shard"):
        rows = dict(zip(some["place"], some.index, strict=True))
        for row, jpg in read_shard(shards, number):
            if row["place"] in rows and not row["reason"]:
                with contextlib.suppress(BadImage):  # Pillow may refuse what torchvision read
                    image, buffer = common.load_image(jpg), io.BytesIO()
                    image.thumbnail((THUMBNAIL, THUMBNAIL))
                    image.save(buffer, "JPEG", quality=80)
                    found[rows[row["place"]]] = base64.b64encode(buffer.getvalue()).decode()
    return found


def write_report(folder: Path, facts: dict[str, Any], curves: dict[str, Path], moved: dict[str, Any]) -> None:
    """report.json, which holds facts, and report.html: one file with everything in it, by templates/report.html.

    curves: each run's curves.png; moved: see show_moved.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from matplotlib.ticker import MaxNLocator

    measured = [name for name in METRICS if facts["base"]["metrics"][name] is not None]
    charted = [name for name in measured if len(facts["runs"]) == 1 or name in CHARTED]
    chart = [(METRICS[name], [run["metrics"][name] for run in facts["runs"]]) for name in charted]
    ends = [fact.get(name) or 0.0 for _, some in chart for fact in some for name in ("difference", "low", "high")]
    ticks = [round(tick, 10) + 0.0 for tick in MaxNLocator(5).tick_values(min(ends, default=0), max(ends, default=0))]
    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, **options)
    pages.filters |= dict.fromkeys(("percent", "ticks", "e_value", "log10"), str)  # what charts.html has for the arena
    images = {name: base64.b64encode(png.read_bytes()).decode() for name, png in curves.items() if png.is_file()}
    page = pages.get_template("report.html").render(
        facts=facts, labels=METRICS, shown=measured, chart=chart, ticks=ticks, curves=images, moved=moved,
        headline="mrr", interval=shown_interval,
        agreements=[name for name in measured if name.startswith("agreement")],
    )  # fmt: skip
    common.atomic_write(folder / "report.html", page)
    common.write_json(folder / "report.json", facts)


# --------------------------------------------------------------------------------------------------------------------
# The commands: embed, report, pool


@contextlib.contextmanager
def vectors_folder(path: Path, world: World) -> Iterator[Path]:
    """The folder of vectors; a second command is kept out of it."""
    with common.exclusive(path / ".lock") if world.main else contextlib.nullcontext(True) as free:
        if not free:
            raise Fail(f"{path}: another 4_embed.py is working there; wait until it has ended")
        if world.main and (path / "index").is_dir():
            print(f"{path}: its folders are of an earlier version and not read any more; remove them", flush=True)
        yield path


def embed(args: argparse.Namespace, config: EmbeddingConfig) -> int:
    """Vectors of all items under both models, master.parquet, and the report of the two."""
    start, output = time.monotonic(), Path(args.output)
    base, run = Run("zero_shot", args.model, args.pretrained), read_run(args.finetuned, args)
    if run.model == args.model:
        raise Fail(f"{args.finetuned}: that run is the base model itself; choose a --finetuned that was trained")
    world = World(config.device)
    with vectors_folder(Path(args.vectors or output.parent / "vectors"), world) as folder:
        clips = [load_run(base, world)]
        clips.append(load_run(run, world, clips[0]))
        ours, theirs = (common.encode(clip, captions=["a"]).shape[1] for clip in clips)
        if ours != theirs:
            problem = f"makes vectors of width {theirs}, the base {clips[0].name} of {ours}"
            raise Fail(f"{clips[1].name}: {problem}; give the --model that it was fine-tuned from")
        shards = open_shards(args.shards, SPLITS, folder, config)
        encoders = [open_encoder(clip, shards, folder, config, world) for clip in clips]
        rows, computed = make_vectors(shards, encoders, config, world)
        if not world.main:
            return DONE
        write_rejects(f"{output}.rejects.jsonl", rows, config.max_failed)
        make_report(shards, rows, list(zip((base, run), encoders, strict=True)), output.parent)
        rejected = int((rows["reason"] != "").sum())
        counts = {"input": len(rows), "written": len(rows) - rejected, "rejected": rejected, "computed": computed}
        facts = master_facts(shards, rows, encoders, run, args)
        if not holds(output, facts):
            packages = common.versions("torch", "open_clip_torch", "pyarrow", "numpy")
            inputs, seconds = {"shards": args.shards} | facts, time.monotonic() - start
            common.write_sidecar(f"{output}.json", config, counts, inputs, seconds, versions=packages)
            write_master(output, rows, encoders, facts)  # last: where it is, all is
        shutil.rmtree(shards.cache, ignore_errors=True)  # copies of what lies on S3
        print(f"{output}: input {len(rows)} = written {counts['written']} + rejected {rejected}", flush=True)
        print("computed: {image} pictures, {text} prompts; the rest was there".format(**computed), flush=True)
    return DONE


def report(args: argparse.Namespace, config: EmbeddingConfig) -> int:
    """Compare any number of runs with the base on the test split; models are loaded one after another."""
    output = Path(args.output)
    runs = [read_run(path, args) for path in args.run]
    world = World(config.device)
    with vectors_folder(Path(args.vectors or output.parent / "embeddings" / "vectors"), world) as folder:
        shards = open_shards(args.shards, ("test",), folder, config)
        models: list[tuple[Run, Encoder]] = []
        base = Run("zero_shot", args.model, args.pretrained)
        for run in (base, *(run for run in runs if run.model != args.model)):
            clip = load_run(run, world, models[0][1].clip if models else None)
            encoder = open_encoder(clip, shards, folder, config, world)
            rows, _ = make_vectors(shards, [encoder], config, world)
            clip.model = None  # one model in memory at a time
            models.append((run, encoder))
        if world.main:
            write_rejects(str(output / "rejects.jsonl"), rows, config.max_failed)
            make_report(shards, rows, models, output)
            shutil.rmtree(shards.cache, ignore_errors=True)
    return DONE


def pool(args: argparse.Namespace) -> int:
    """One report of those of several folds: each product was asked for once, by models that never saw it."""
    import pandas as pd

    reports = [common.read_json(Path(folder, "report.json"), "report") for folder in args.report]
    names, queries, draws = [run["name"] for run in reports[0]["runs"]], [], 0
    for folder, facts in zip(args.report, reports, strict=True):
        same = facts["base"]["fingerprint"] == reports[0]["base"]["fingerprint"]
        if not same or [run["name"] for run in facts["runs"]] != names:
            raise Fail(f"{folder}: compares other runs or another base than {args.report[0]}; pool folds of one report")
        try:
            found = pd.read_parquet(Path(folder, "queries.parquet"))
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise Fail(f"{folder}: its queries.parquet cannot be read ({error}); make the report again") from None
        queries.append(found.assign(draw=found["draw"] + draws, folder=folder))
        draws += found["draw"].max() + 1
    whole = pd.concat(queries, ignore_index=True)
    if (twice := whole["id"].duplicated()).any():
        id, folder = whole.loc[twice, ["id", "folder"]].iloc[0]
        raise Fail(f"{folder}: tests on {id}, as another report does; pool folds, made with 2_prepare.py --fold")
    scores = [{metric: whole[f"{name}/{metric}"].to_numpy() for metric in METRICS} for name in ("zero_shot", *names)]
    about = [{key: reports[0]["base"][key] for key in ("name", "fingerprint", "precision")}]
    for runs in zip(*(facts["runs"] for facts in reports), strict=True):
        fingerprint = common.digest([run["fingerprint"] for run in runs])
        about.append({"name": runs[0]["name"], "fingerprint": fingerprint, "precision": runs[0]["precision"]})
    facts = compare_models(about, scores, whole["object_type"].tolist(), whole["draw"].to_numpy())
    facts["folds"] = []
    for fold in reports:
        gains = {run["name"]: run["metrics"]["mrr"]["difference"] for run in fold["runs"]}
        facts["folds"].append({"items": fold["items"]} | gains)
    write_report(Path(args.output), facts, {}, {})
    for name in names:
        gains = ", ".join(f"{fold[name]:+.3f}" for fold in facts["folds"])
        print(f"{name}: MRR gained in each of {len(reports)} folds: {gains}")
    print_comparison(facts, Path(args.output), suggest_proof=False)
    return DONE


# --------------------------------------------------------------------------------------------------------------------
# Search at a terminal


def search(args: argparse.Namespace) -> int:
    """Print the items nearest to words, to a picture, or to both together."""
    import pyarrow as pa

    if args.top_k < 1 or not (args.words or args.image):
        raise Fail("search for what? give words, or --image FILE, and a --top-k of at least 1", USAGE)
    try:
        lines = nearest_items(args)
    except FileNotFoundError:
        raise Fail(f"{args.embeddings}: no such file; run 4_embed.py first, or check --embeddings", USAGE) from None
    except (pa.ArrowException, OSError, ValueError) as error:  # pyarrow finds damage only when it comes to it
        raise Fail(f"{args.embeddings}: not a readable Parquet file ({error}); run 4_embed.py again") from None
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:  # outside: a closed pipe says nothing about the file
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return DONE


def nearest_items(args: argparse.Namespace) -> list[tuple[str, ...]]:
    """(place, score, id, title, path) of each item that is found, best first."""
    import pyarrow.parquet as pq

    file, column = pq.ParquetFile(args.embeddings), f"{args.using}_embedding"
    facts = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
    types = {field.name: field.type for field in file.schema_arrow}
    width = getattr(types.get(column), "list_size", None)
    needed = {f"{args.using}_model", f"{args.using}_fingerprint", "image_id", "title", "image_path"}
    if width is None or not needed <= facts.keys() | types.keys():
        raise Fail(f"{args.embeddings}: no {column} with its model in it; make it with 4_embed.py")
    query = query_vector(args, facts)
    if query.shape[1] != width:
        raise Fail(f"{args.embeddings}: vectors of width {width}, the query's has {query.shape[1]}")
    pieces = file.iter_batches(4096, columns=[column])
    blocks = (piece.column(0).flatten().to_numpy().reshape(-1, width) for piece in pieces)
    scores, rows = common.top_k(query, blocks, args.top_k)
    items = file.read(columns=["image_id", "title", "image_path"]).take(rows[0][rows[0] >= 0]).to_pydict()
    cells = zip(*items.values(), strict=True)
    return [(str(i + 1), f"{scores[0, i]:.3f}", *(str(text or "") for text in row)) for i, row in enumerate(cells)]


def query_vector(args: argparse.Namespace, facts: dict[str, str]):
    """float32 [1, D] of words, of a picture, or of both: the middle between the two."""
    import numpy as np
    import torch

    recorded = common.model_place(facts[f"{args.using}_model"], args.embeddings)
    try:
        picture = common.load_image(Path(args.image)) if args.image else None
    except BadImage as error:
        raise Fail(f"{args.image}: {error}", USAGE) from None
    clip = common.load_clip(*((args.model, args.pretrained) if args.model else recorded))
    if clip.fingerprint != facts[f"{args.using}_fingerprint"]:
        raise Fail(f"{clip.name}: not the model that made the vectors of {args.embeddings}; set --model")
    parts = [common.encode(clip, captions=[args.words])] if args.words else []
    if picture is not None:
        square = torch.from_numpy(np.array(common.letterbox(picture, clip.size))).permute(2, 0, 1)
        parts.append(common.encode(clip, pixels=square[None]))
    return torch.nn.functional.normalize(torch.stack(parts).mean(dim=0), dim=-1).numpy()


# --------------------------------------------------------------------------------------------------------------------
# The command line


def build_parser() -> argparse.ArgumentParser:
    """The command line; `embed` is meant where no command is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{embed,report,pool,search}")
    shards = argparse.ArgumentParser(add_help=False)
    shards.add_argument("--shards", required=True, help="folder or s3://bucket/prefix made by 2_prepare.py")
    shards.add_argument("--model", required=True, help="base model: open_clip name, or local-dir:FOLDER")
    shards.add_argument("--pretrained", help="open_clip tag (openai), weights file, or local-dir:FOLDER")
    shards.add_argument("--vectors", help="folder in which vectors are kept (default: that of master.parquet)")
    common.add_flags(shards, EmbeddingConfig)

    one = commands.add_parser("embed", parents=[shards], help="vectors of all items under two models, and the report")
    one.add_argument("--finetuned", required=True, help="run of 3_train.py, or the model folder in it")
    one.add_argument("--output", required=True, help="such as data/embeddings/master.parquet")
    many = commands.add_parser("report", parents=[shards], help="compare any number of runs on the test split")
    many.add_argument("--run", action="append", required=True, help="folder of a run; may be given several times")
    several = commands.add_parser("pool", help="one report of several, whose test splits are folds of one catalogue")
    several.add_argument("--report", action="append", required=True, help="folder of a report; give each fold's")
    for command in (many, several):
        command.add_argument("--output", required=True, help="folder of report.json and report.html")
    find = commands.add_parser("search", help="the items nearest to words or to a picture")
    find.add_argument("words", nargs="?", help='such as "grey fabric sofa"')
    find.add_argument("--image", help="a picture to search with; with words: for what lies between the two")
    find.add_argument("--embeddings", default="data/embeddings/master.parquet", help="made by 4_embed.py")
    find.add_argument("--using", choices=("finetuned", "base"), default="finetuned", help="which model searches")
    find.add_argument("--top-k", type=int, default=10, help="results shown (default 10)")
    find.add_argument("--model", help="where that model is (default: where master.parquet says)")
    find.add_argument("--pretrained", help="its tag or weights file")
    parser.epilog = f"Without a command, embed is meant:\n\n{one.format_help()}"
    return parser


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in ("embed", "report", "pool", "search", "-h", "--help"):
        argv = ["embed", *argv]
    args = build_parser().parse_args(argv)
    if args.command in ("pool", "search"):
        return pool(args) if args.command == "pool" else search(args)
    config = common.from_flags(EmbeddingConfig, args)
    common.keep_freed_memory()
    with common.explain_out_of_memory("lower --batch-size"):
        return embed(args, config) if args.command == "embed" else report(args, config)


if __name__ == "__main__":
    sys.exit(main())
