"""Stage 4: the vectors of every item under the base and the fine-tuned model, and the proof of which finds better.

Reads   --shards: a folder or s3://bucket/prefix from 2_prepare.py; the base model; --finetuned: a run of 3_train.py
Writes  --output: master.parquet, one row an item, or a folder, local or on S3, of one part a process; beside it
        report.json, report.html, queries.parquet (the scores of each query), rejects, and vectors/: kept ones

    python 4_embed.py --shards data/shards --model ViT-B-32 \\
        --finetuned data/runs/dual_lora/model --output data/embeddings/master.parquet
    torchrun --nproc-per-node 8 4_embed.py ... --output s3://shop/master/     the same, on eight GPUs or several nodes
    python 4_embed.py report --shards data/shards --model local-dir:tests/small_clip \\
        --run data/runs/zero_shot --run data/runs/dual_lora --output data/report         any number of runs; a minute
    python 4_embed.py pool --report data/folds/5/0/report-dual_lora --report ... --output data/proof
    python 4_embed.py search "grey fabric sofa" [--image photo.jpg]                      seconds on a CPU
    python 4_embed.py queries --output queries.csv     what shoppers may type, for you to correct; then: --queries
    python 4_embed.py export --output vectors.parquet  ids and vectors alone, to serve from
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
import os
import random
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
from common import ALPHA, ATTRIBUTES, DONE, LOCAL, SPLITS, USAGE, BadImage, Clip, Fail, World, setting

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
RECALLS = (1, 5, 10)  # the k of recall@k, of prompts, pictures and what shoppers type
RANKED = {f"recall@{k}": f"recall@{k}" for k in RECALLS} | {"mrr": "MRR"}  # see rank_metrics
METRICS = {  # of the report, in the order of its tables, and their labels
    **{f"text_to_image_{name}": f"text → image  {label}" for name, label in RANKED.items()},
    **{f"image_to_text_{name}": f"image → text  {label}" for name, label in RANKED.items()},
    **{f"agreement@{NEAREST}_{name}": f"image → image  agreement@{NEAREST} {name.replace('_', ' ')}"
       for name in ("object_type", "style", "material", "color", "all")},
    "mrr": "both ways  MRR",
}  # fmt: skip
QUERY_METRICS = {"ndcg@10": "nDCG@10"} | RANKED
WAYS = ("words in titles", "CLIP on titles", "CLIP on pictures", "CLIP on both")  # to search; the first is the base
WEIGHTS = tuple(number / 10 for number in range(11))  # of the picture in the mixture
CHOOSING = 10  # queries of the validation split, at least, that choose the weight; fewer leave it at a half
GALLERY = 4096  # items whose vectors are in memory at once

FEW = 20  # queries; an agreement judged on fewer is shown, but not tested
COMMANDS = ("embed", "report", "pool", "search", "export", "queries")

MOVED = 10  # queries shown that gained or lost most
THUMBNAIL = 128  # pixels a side


# --------------------------------------------------------------------------------------------------------------------
# Settings and flags


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """Stage 4."""

    batch_size: int = setting(128, "pictures encoded at once; lower it when memory runs out", low=1)
    precision: str = setting("auto", "auto: bf16 where hardware has it, checked against fp32", ("auto", "fp32", "bf16"))
    max_failed: float = setting(0.05, "share of pictures that may be unreadable", low=0, high=1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int | None = setting(None, "threads that decode pictures (unset: one a core, up to 4)", low=1)
    cache_gb: float = setting(50.0, "disk for the local copies of shards that lie on S3", low=0)


def build_parser() -> argparse.ArgumentParser:
    """The command line; `embed` is meant where no command is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    shards = argparse.ArgumentParser(add_help=False)
    shards.add_argument("--shards", required=True, help="folder or s3://bucket/prefix made by 2_prepare.py")
    shards.add_argument("--model", required=True, help="base: open_clip name, hf-hub:USER/NAME, or local-dir:FOLDER")
    shards.add_argument("--pretrained", help="open_clip tag or weights file (unset: the usual weights of --model)")
    shards.add_argument("--queries", help="CSV of what people type: columns query, id, and grade or weight, if any")
    shards.add_argument("--vectors", help="folder or s3://bucket/prefix of kept vectors (default: beside the output)")
    common.add_flags(shards, EmbeddingConfig)

    one = commands.add_parser("embed", parents=[shards], help="vectors of all items under two models, and the report")
    one.add_argument("--finetuned", required=True, help="run of 3_train.py, or the model folder in it")
    where = "data/embeddings/master.parquet; or a folder of parts, one a process, here or on s3://"
    one.add_argument("--output", required=True, help=where)
    many = commands.add_parser("report", parents=[shards], help="compare any number of runs on the test split")
    many.add_argument("--run", action="append", required=True, help="folder of a run; may be given several times")
    several = commands.add_parser("pool", help="one report of several, whose test splits are folds of one catalogue")
    several.add_argument("--report", action="append", required=True, help="folder of a report; give each fold's")
    for command in (many, several):
        command.add_argument("--output", required=True, help="folder of report.json and report.html")
    find = commands.add_parser("search", help="the items nearest to words or to a picture")
    find.add_argument("words", nargs="?", help='such as "grey fabric sofa"')
    find.add_argument("--image", help="a picture to search with; with words: for what lies between the two")
    find.add_argument("--using", choices=("finetuned", "base"), default="finetuned", help="which model searches")
    find.add_argument("--top-k", type=int, default=10, help="results shown (default 10)")
    slim = commands.add_parser("export", help="a file of ids and fine-tuned vectors alone, to serve from")
    slim.add_argument("--output", required=True, help="such as data/vectors.parquet")
    slim.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="default float16")
    slim.add_argument("--mixture", type=float, metavar="W", help="W of each vector is the picture, the rest its title")
    slim.add_argument("--vectors", help="folder or s3://… of kept vectors (default: beside --embeddings)")
    slim.add_argument("--device", default="auto", help="where titles are encoded (default auto)")
    made = commands.add_parser("queries", help="a first file of queries, made up from attributes, for you to correct")
    made.add_argument("--output", default="queries.csv", help="the CSV (default queries.csv)")
    made.add_argument("--count", type=int, default=200, help="queries (default 200)")
    made.add_argument("--seed", type=int, default=42, help="of the choice (default 42)")
    for command in (find, slim, made):
        command.add_argument("--embeddings", default="data/embeddings/master.parquet", help="made by 4_embed.py")
    for command in (find, slim):
        command.add_argument("--model", help="where that model is (default: where master.parquet says)")
        command.add_argument("--pretrained", help="its tag or weights file")
    parser.epilog = f"Without a command, embed is meant:\n\n{one.format_help()}"
    return parser


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """The flags; `embed` is meant where no command is named."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in (*COMMANDS, "-h", "--help"):
        argv = ["embed", *argv]
    args = build_parser().parse_args(argv)
    if args.command != "embed" and common.is_s3(getattr(args, "output", "")):
        raise Fail(f"--output {args.output}: {args.command} writes to a local disk; give a local path", USAGE)
    return args


# --help and mistakes are answered here: what is imported next takes seconds.
if __name__ == "__main__" and (code := common.entry_point(lambda argv: read_flags(argv) and DONE)()):
    sys.exit(code)

# ruff: noqa: E402
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

# --------------------------------------------------------------------------------------------------------------------
# The models that are judged


@dataclasses.dataclass
class Run:
    """One model to be judged: a run of 3_train.py, a folder with a model alone, or the base."""

    name: str
    model: str  # as load_clip takes it
    pretrained: str | None = None
    folder: Path | None = None  # where curves.png is; None for the base
    base_fingerprint: str | None = None  # of the model it was trained from


def read_run(folder: str, args: argparse.Namespace) -> Run:
    """A run by its folder or by the model folder in it. Raises Fail where there is none."""
    path = Path(folder.removeprefix(LOCAL))
    place = path if (path / "train.json").is_file() else path.parent
    if not (place / "train.json").is_file():
        if (path / "open_clip_config.json").is_file():
            return Run(path.name, f"{LOCAL}{path}", folder=path)
        raise Fail(f"{path}: no finished run there (no train.json); train it with 3_train.py, or check the path")
    facts = common.read_json(place / "train.json", "run")
    try:
        name, model = facts.get("scenario"), facts.get("model_dir")
        base = facts.get("inputs", {}).get("base_fingerprint")
        if not all(isinstance(text, str | None) for text in (name, model, base)):
            raise TypeError("a name is no text")
    except (AttributeError, TypeError) as error:
        raise Fail(f"{place}/train.json: not written by 3_train.py ({error}); train that run again") from None
    weights = (f"{LOCAL}{place / model}", None) if model else (args.model, args.pretrained)  # zero_shot has no model
    return Run(name or place.name, *weights, place, base)


def run_names(runs: list[Run]) -> list[str]:
    """Names for the report, the base's first; runs of one scenario are told apart by their folders."""
    names = ["zero_shot"]
    for run in runs[1:]:
        twins = [other.folder for other in runs if other.name == run.name]
        place = run.folder.name if [one.name for one in twins].count(run.folder.name) == 1 else run.folder
        names.append(run.name if len(twins) == 1 else f"{run.name} ({place})")
    return names


def check_base(run: Run, base: Clip, world: World) -> None:
    """Say where a run was trained from another base than the one that it is compared with."""
    if world.main and run.base_fingerprint not in (None, base.fingerprint):
        print(f"NOTE: {run.name} was not trained from {base.name}, with which it is compared here", flush=True)


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

    def own(self, world: World) -> list[int]:
        """The numbers of those that this process reads and writes: a stretch, so that parts hold the rows in order."""
        samples = [entry["samples"] for _, entry in self.entries]
        middles = [end - count / 2 for end, count in zip(itertools.accumulate(samples), samples, strict=True)]
        return [n for n, middle in enumerate(middles) if int(middle * world.size / sum(samples)) == world.rank]


def open_shards(root: str, splits: tuple[str, ...], folder: Path, config: EmbeddingConfig) -> Shards:
    """The manifest's shards of these splits; copies of what lies on S3 go to `folder`. Fail where none is to test."""
    manifest = common.load_manifest(root)
    shards = ((split, entry) for split in splits for entry in manifest["splits"].get(split, {}).get("shards", []))
    entries = [(split, entry) for split, entry in shards if entry["samples"]]
    if not any(split == "test" for split, _ in entries):
        raise Fail(f"{root}: the test split is empty, nothing can be compared; give 2_prepare.py more rows")
    return Shards(root, manifest, entries, folder / "shards", config.cache_gb)


def read_shard(shards: Shards, number: int) -> Iterator[tuple[dict[str, Any], bytes]]:
    """(row, JPEG) of each sample in order: COLUMNS, view, the shard's number, the sample's place in it, reason, detail.

    A sample that cannot be read is a row with a reason and without a JPEG. No sample that the manifest counts is lost:
    a shard with other bytes than the manifest names is not trusted, and every sample of it is such a row.
    """
    import webdataset

    split, entry = shards.entries[number]
    (path,), place, problem = shards.paths([number]), -1, "it holds fewer samples than its manifest says"
    blank = dict.fromkeys((*COLUMNS, "reason", "detail"), "") | {"split": split, "shard": number, "view": 0}
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


def pictures_of(shards: Shards, rows) -> Iterator[tuple[int, bytes]]:
    """(index, JPEG) of some rows of a DataFrame, shard by shard."""
    for number, some in rows.groupby("shard"):
        places = dict(zip(some["place"], some.index, strict=True))
        for row, jpg in read_shard(shards, number):
            if row["place"] in places and not row["reason"]:
                yield places[row["place"]], jpg


def sample_columns(sample: dict[str, bytes]) -> dict[str, Any]:
    """COLUMNS and view of one sample. Raises KeyError, TypeError or ValueError for what 2_prepare.py did not write."""
    record, prompt = json.loads(sample["json"]), sample["txt"].decode()
    columns = {name: str(record[name] or "") for name in ("image_path", "title", "group")}
    columns |= {name: str(record.get(name) or "") for name in ATTRIBUTES}  # one may be newer than the shards
    columns |= {"image_id": str(record["id"] or ""), "prompt": prompt, "view": int(record.get("view") or 0)}
    digests = [hashlib.sha256(sample[kind]).hexdigest() for kind in ("jpg", "txt")]
    return columns | {"image_digest": digests[0], "text_digest": digests[1]}


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


def local_copy(place: str | Path) -> Path:
    """The local folder for what lies at a place: itself, or one that holds copies of what lies on S3."""
    return Path("data/s3", common.digest(place)[:16]) if common.is_s3(place) else Path(place)


class VectorStore:
    """The vectors of one model, in one SQLite table: sha256 of a picture or prompt -> float32 vector.

    Several processes may use it at once. Vectors are written 1,024 at a time or every 30 seconds. Where the place is on
    S3, each such block is an object, put there first; the table is this machine's copy of them all.
    """

    def __init__(self, place: str | Path, key: str, model: str):
        self.path, self.model = local_copy(place) / f"{key}.sqlite", model
        self.objects = common.join(place, key) if common.is_s3(place) else None
        self.claimed: set[str] = set()  # digests whose vectors are in the making
        self.waiting: list[tuple[list[Job], Any]] = []  # vectors that are not written yet
        self.flushed = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.database = sqlite3.connect(self.path, timeout=600)  # another process may be writing
        self.database.execute("CREATE TABLE IF NOT EXISTS vectors (digest TEXT PRIMARY KEY, vector BLOB)")
        if self.objects:  # of which copies are here
            self.database.execute("CREATE TABLE IF NOT EXISTS objects (name TEXT PRIMARY KEY)")

    def fetch(self) -> None:
        """Copy what other machines put on S3; what S3 has lost is forgotten here, too, for others would lack it."""
        if not self.objects:
            return
        there = {name for name, _ in common.list_files(self.objects)}
        known = {name for (name,) in self.database.execute("SELECT name FROM objects")}
        if known - there:
            with self.database:
                self.database.execute("DELETE FROM vectors")
                self.database.execute("DELETE FROM objects")
            known = set()
        new = sorted(there - known)
        for name in common.progress(new, "fetching vectors", len(new), "object") if new else ():
            path = common.join(self.objects, name)
            try:
                rows = pd.read_parquet(io.BytesIO(common.read_bytes(path)))
            except ValueError as error:  # as pyarrow's errors are
                raise Fail(f"{path}: damaged ({error}); remove it and run again: its vectors are made again") from None
            self._insert(rows.itertuples(index=False, name=None), name)

    def _insert(self, rows: Iterable[tuple[str, bytes]], name: str) -> None:
        """Write (digest, vector), and the name of their object on S3."""
        with self.database:
            self.database.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)
            if self.objects:
                self.database.execute("INSERT OR IGNORE INTO objects VALUES (?)", [name])

    def claim(self, digest: str) -> bool:
        """Whether the caller is to make this vector: it is not there, and nobody in this process is making it."""
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
        name = f"{common.digest([digest for digest, _ in rows])}.parquet"
        if self.objects:
            table = pd.DataFrame(rows, columns=["digest", "vector"]).to_parquet(index=False)
            common.upload_atomic(table, common.join(self.objects, name))
        self._insert(rows, name)
        self.claimed.difference_update(digest for digest, _ in rows)

    def get(self, digests: Sequence[str]) -> Any:
        """float32 [n, D] of digests that are all there."""
        found: dict[str, bytes] = {}
        for some in common.batches(dict.fromkeys(digests), 500):
            marks = ",".join("?" * len(some))
            found.update(self.database.execute(f"SELECT * FROM vectors WHERE digest IN ({marks})", some))
        if len(found) < len({*digests}):
            needs = "put --output, or --vectors, on S3 or on a disk that all machines share"
            raise Fail(f"{self.path}: lacks vectors that another process made; {needs}")
        return np.frombuffer(b"".join(found[digest] for digest in digests), np.float32).reshape(len(digests), -1)


class Encoder:
    """A CLIP at a precision, and the store of its vectors.

    The vector of a picture or prompt is a function of that alone, so that what was made in whichever order, by however
    many processes, is the same to the bit. Matrix products of a multiple of 16 rows give each row the same bits
    wherever it stands; prompts are encoded among prompts of their own length, since other lengths add up attention in
    another order. (On a GPU the kernel depends on the number of rows as well: there every batch is filled up.)
    """

    def __init__(self, clip: Clip, precision: str, place: str | Path, batch_size: int):
        key = [VECTORS_FORMAT, clip.fingerprint, clip.size, list(clip.mean), list(clip.std), precision]
        self.clip, self.precision, self.batch_size = clip, precision, batch_size
        self.key = common.digest(key)[:24]
        self.store = VectorStore(place, self.key, clip.name)

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


def open_encoder(clip: Clip, shards: Shards, place: str | Path, config: EmbeddingConfig, world: World) -> Encoder:
    """A model with its store, in bf16 where that is wanted and agrees with float32 on the first pictures and prompts.

    The agreement is kept beside the vectors, with the model's name and fingerprint.
    """
    precision = common.auto_precision(world.device.type) if config.precision == "auto" else config.precision
    if precision == "bf16":
        half, whole = (Encoder(clip, name, place, config.batch_size) for name in ("bf16", "fp32"))
        note = half.store.path.with_suffix(".json")
        if world.main and not note.is_file():
            facts = {"model": clip.name, "fingerprint": clip.fingerprint, "cosine": bf16_cosine(half, whole, shards)}
            common.write_json(note, facts)
        cosine = world.share(common.read_json(note)["cosine"] if world.main else None)[0]
        if cosine < LEAST_COSINE and world.main:
            print(f"{clip.name}: bf16 agrees with float32 to a cosine of {cosine:.5f} only; float32 is used")
        return half if cosine >= LEAST_COSINE else whole
    return Encoder(clip, "fp32", place, config.batch_size)


def bf16_cosine(half: Encoder, whole: Encoder, shards: Shards) -> float:
    """The smallest cosine between two encoders' vectors of the first pictures and prompts."""
    import torch

    samples = (sample for number in range(len(shards.entries)) for sample in read_shard(shards, number))
    prompts, pixels = ["a"], []
    for row, jpg in itertools.islice((sample for sample in samples if not sample[0]["reason"]), CHECKED):
        prompts.append(row["prompt"])
        with contextlib.suppress(BadImage):
            pixels.append(common.decode_jpeg(jpg, half.clip.size))
    pictures = [torch.stack(some) for some in common.batches(pixels, half.batch_size)]
    a, b = (torch.cat([one.texts(prompts), *map(one.images, pictures)]).double() for one in (half, whole))
    return (a * b).sum(dim=1).min().nan_to_num(0.0).item()


# --------------------------------------------------------------------------------------------------------------------
# Computing what is missing, in one pass over the shards


def text_digest(text: str) -> str:
    """sha256 (hex), by which its vector is kept."""
    return common.digest(text.encode())


def title_text(title: str) -> str:
    """What is encoded of a title."""
    return title or "product"


def exchange(encoders: list[Encoder], world: World) -> None:
    """Wait until every process has made its vectors; then every machine has those of all."""
    world.share(None)
    for encoder in encoders if world.local_rank == 0 else ():
        encoder.store.fetch()
    world.share(None)


def make_vectors(
    shards: Shards, encoders: list[Encoder], config: EmbeddingConfig, world: World, queries: str | None = None
) -> tuple[Any, dict]:
    """Make every vector that a store lacks, this process its share; with queries, a file, theirs and those of titles.

    Returns the rows of all products in order (a DataFrame: COLUMNS, view, shard, place, reason, detail, photos: their
    number), the same in every process, and how many pictures and prompts were computed in all.
    """
    exchange(encoders, world)
    rows, pictures = embed_pictures(shards, encoders, config, world)
    shared = world.share((rows, pictures))
    rows = pd.concat([part for part, _ in shared], ignore_index=True)
    good = rows[rows["reason"] == ""]
    texts = dict(zip(good["text_digest"], good["prompt"], strict=True))
    if queries:
        more = [*good["title"].map(title_text), *common.read_queries(queries)[0]["query"]]
        texts |= {text_digest(text): text for text in more}
    computed = sum(world.share(embed_texts(texts, encoders, world)))
    exchange(encoders, world)
    return merge_views(rows, encoders, world), {"image": sum(count for _, count in shared), "text": computed}


def merge_views(rows, encoders: list[Encoder], world: World) -> Any:
    """The rows with one row a product, where some have several photos: its vector is their normalised mean.

    The mean is kept as that of a picture whose digest is the digest of the list of theirs; column views has the lists.
    """
    import torch

    rows, good = rows.assign(photos=1), rows[rows["reason"] == ""].sort_values(["image_id", "view"], kind="stable")
    if not (good["view"] > 0).any():
        return rows
    photos = good.groupby("image_id")["image_digest"].agg(list)
    keys = {id: (common.digest(some), some) for id, some in photos.items() if len(some) > 1}
    rows = rows.drop(good.index[good["image_id"].duplicated()]).reset_index(drop=True)
    ids = rows["image_id"].where(rows["reason"] == "")
    rows["image_digest"] = ids.map({id: key for id, (key, _) in keys.items()}).fillna(rows["image_digest"])
    rows["views"], rows["photos"] = ids.map(photos), ids.map(photos.map(len)).fillna(1)
    for encoder in encoders if world.main else ():
        for batch in common.batches((one for one in keys.values() if encoder.store.claim(one[0])), 512):
            means = mean_vectors(encoder, [some for _, some in batch])
            jobs = [Job(key, "a product with several photos", b"", []) for key, _ in batch]
            encoder.store.add(jobs, torch.from_numpy(means))
        encoder.store.flush()
    exchange(encoders, world)
    return rows


def mean_vectors(encoder: Encoder, photos: Iterable[list[str]]):
    """float32 [N, D]: the normalised mean of the photos, given by their digests, of each of N products."""
    means = [encoder.store.get(some).mean(axis=0, dtype=np.float64) for some in photos]
    return np.stack([(one / np.linalg.norm(one)).astype(np.float32) for one in means])


def compute(batches: Iterable[tuple], encode: Callable, encoders: list[Encoder], world: World) -> Iterator[Job]:
    """The jobs of batches of (jobs, inputs), whose vectors are made: encode(encoder, inputs, places in the batch)."""
    import torch

    half = any(encoder.precision == "bf16" for encoder in encoders)
    try:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=half):  # keeps the weights' copies in bf16
            for batch, inputs in batches:
                for encoder in encoders:
                    places = [i for i, job in enumerate(batch) if encoder in job.encoders and not job.problem]
                    if places:
                        encoder.store.add([batch[i] for i in places], encode(encoder, inputs, places))
                yield from batch
    finally:  # after Ctrl-C, too
        for encoder in encoders:
            encoder.store.flush()


def embed_pictures(shards: Shards, encoders: list[Encoder], config: EmbeddingConfig, world: World) -> tuple[Any, int]:
    """Read this process's shards from end to end and make the vectors of pictures that a store lacks.

    Returns the rows of these shards, with the reason of each picture that cannot be decoded, and the number computed.
    Each picture is read and decoded once for all models, by threads that run ahead of the encoders.
    """
    numbers = shards.own(world)
    shards.paths(numbers)  # from S3, several at once
    tables, problems, computed = [pd.DataFrame(columns=[*COLUMNS, "view", "reason", "detail", "shard", "place"])], {}, 0

    def encode(encoder: Encoder, pixels, places: list[int]):
        return encoder.images(pixels if len(places) == len(pixels) else pixels[places])

    total = sum(shards.entries[number][1]["samples"] for number in numbers)
    batches = decoded(lacking_pictures(shards, numbers, encoders, tables), encoders[0].clip.size, config, world)
    for job in common.progress(compute(batches, encode, encoders, world), "encoding", total, "picture"):
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
    for number in numbers:
        rows = []
        for row, jpg in read_shard(shards, number):
            rows.append(row)
            wanted = [one for one in encoders if not row["reason"] and one.store.claim(row["image_digest"])]
            if wanted:
                name = f"{shards.entries[number][1]['name']}, sample {row['place']}"
                yield Job(row["image_digest"], name, jpg, wanted)
        tables.append(pd.DataFrame(rows))


def decoded(pictures: Iterable[Job], size: int, config: EmbeddingConfig, world: World) -> Iterator[tuple]:
    """(batch, uint8 [B, 3, size, size]), decoded by threads that run ahead; pinned where a GPU fetches them."""
    import torch

    def decode(batch: list[Job], first: int, pixels) -> None:
        for place, job in enumerate(batch[first : first + DECODE_TOGETHER], first):
            try:
                pixels[place] = common.decode_jpeg(job.content, size)
            except BadImage as error:
                job.problem = error
            job.content = b""

    pin, started = world.device.type == "cuda", collections.deque()
    with ThreadPoolExecutor(config.workers or min(4, os.cpu_count() or 1)) as pool:
        for batch in itertools.chain(common.batches(pictures, config.batch_size), [None] * AHEAD):
            if batch:
                pixels = torch.empty((len(batch), 3, size, size), dtype=torch.uint8, pin_memory=pin)
                starts = range(0, len(batch), DECODE_TOGETHER)
                started.append((batch, pixels, [pool.submit(decode, batch, start, pixels) for start in starts]))
            if started and (not batch or len(started) > AHEAD):
                ready, pixels, futures = started.popleft()
                for future in futures:
                    future.result()
                yield ready, pixels


def embed_texts(texts: dict[str, str], encoders: list[Encoder], world: World) -> int:
    """Make the vectors of texts, by digest, that a store lacks, this process its share; returns how many that were."""
    jobs = []
    for digest, text in texts.items():
        if int(digest[:8], 16) % world.size == world.rank:
            jobs.append(Job(digest, f"the text '{text}'", text, [e for e in encoders if e.store.claim(digest)]))
    jobs = sorted((job for job in jobs if job.encoders), key=lambda job: len(job.content))  # few lengths in a batch

    def encode(encoder: Encoder, some: list[Job], places: list[int]):
        return encoder.texts([some[i].content for i in places])

    made = compute(((some, some) for some in common.batches(jobs, FLUSH_VECTORS)), encode, encoders, world)
    return sum(1 for _ in common.progress(made, "encoding", len(jobs), "text")) if jobs else 0


# --------------------------------------------------------------------------------------------------------------------
# What cannot be read, and master.parquet


@dataclasses.dataclass
class Output:
    """Where master.parquet goes: one file, or a folder, local or on S3, of which each process writes one part."""

    place: str  # the folder or S3 prefix that it lies in, and the report beside it
    name: str
    is_folder: bool

    @property
    def work(self) -> Path:
        """The local folder in which files are made: the place itself, or that of its copies."""
        return local_copy(self.place)

    def parts(self, world: World) -> list[str]:
        """The names, in the folder, of the parts that the processes write, in the order of their ranks."""
        return [f"part-{rank:05d}-of-{world.size:05d}.parquet" for rank in range(world.size)]

    def publish(self, *names: str) -> None:
        """Where the place is on S3, copy finished files there, in this order."""
        for name in names if common.is_s3(self.place) else ():
            common.upload_atomic(self.work / name, common.join(self.place, name))


def find_output(path: str) -> Output:
    """What --output means: a folder of parts on S3, with a slash at its end, or without .parquet; else one file."""
    if common.is_s3(path):
        place, _, name = path.rstrip("/").rpartition("/")
        if not place.removeprefix("s3:/").strip("/"):
            raise Fail(f"--output {path}: names no folder in the bucket; write s3://bucket/master/", USAGE)
        return Output(place, name, True)
    target = Path(path)
    is_folder = path.endswith("/") or target.is_dir() or (target.suffix != ".parquet" and not target.is_file())
    return Output(str(target.parent), target.name, is_folder)


def write_rejects(output: Output, name: str, rows, max_failed: float) -> None:
    """Name the rows that are left out, each with its reason; Fail where they are too many."""
    path = common.join(output.place, name)
    bad = rows.loc[rows["reason"] != "", ["image_id", "reason", "detail", "image_path", "title"]]
    bad = bad.rename(columns={"image_id": "id", "title": "name"}).reset_index(names="row")
    if len(bad) or common.exists(path):
        common.atomic_write(output.work / name, "".join(json.dumps(line) + "\n" for line in bad.to_dict("records")))
        output.publish(name)
    if len(bad) > max_failed * (total := int(rows["photos"].sum())):
        reasons = ", ".join(f"{count} {reason}" for reason, count in bad["reason"].value_counts().items())
        problem = f"{len(bad)} of {total} pictures are unreadable ({reasons}; first {bad['detail'].iloc[0][:120]})"
        raise Fail(f"{problem}, named in {path}; make or copy the shards again, or raise --max-failed")


def master_facts(shards: Shards, rows, encoders: list[Encoder], run: Run, output: Output) -> dict[str, str]:
    """master.parquet's metadata. The model is named by its way from there, so that the data can be moved."""
    base, finetuned = encoders
    folder = run.model.removeprefix(LOCAL)
    if not common.is_s3(output.place):
        folder = os.path.relpath(Path(folder).resolve(), Path(output.place).resolve())
    entries = [(split, entry["sha256"]) for split, entry in shards.entries]
    inputs = [entries, base.key, finetuned.key, COLUMNS, rows.index[rows["reason"] != ""].tolist()]
    origin = f"{LOCAL}{base.clip.folder}" if base.clip.folder else base.clip.name
    return {
        "base_model": origin, "base_fingerprint": base.clip.fingerprint,
        "finetuned_model": f"{LOCAL}{folder}", "finetuned_fingerprint": finetuned.clip.fingerprint,
        "scenario": run.name, "precision": f"{base.precision}/{finetuned.precision}", "inputs": common.digest(inputs),
    }  # fmt: skip


def holds(path: Path, facts: dict[str, str]) -> bool:
    """Whether a Parquet file is there, whole, with these facts."""
    try:
        there = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):  # not there, or damaged
        return False
    return all(there.get(key.encode()) == value.encode() for key, value in facts.items())


def prepare_output(output: Output, facts: dict[str, str], world: World) -> bool:
    """Whether there is something to write. A folder of other facts loses its list of parts first, then those parts.

    So nobody reads it before all parts are there, and no part of another run or number of processes stays beside them.
    """
    if not output.is_folder:
        return not holds(output.work / output.name, facts)
    folder = common.join(output.place, output.name)
    found, ours = {name for name, _ in common.list_files(folder)}, {*output.parts(world)}
    if common.PARTS in found:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            listed = json.loads(common.read_bytes(common.join(folder, common.PARTS)))
            if listed["facts"] == facts and {*listed["parts"]} <= found:
                return False
    for name in sorted(found - ours):  # the list's name comes first
        if name == common.PARTS or name.startswith("part-"):
            common.remove(common.join(folder, name))
    return True


def write_master(path: Path, rows, encoders: Sequence[Encoder], facts: dict[str, str]) -> None:
    """Write rows of master.parquet, shard by shard: COLUMNS, then base and finetuned embedding and text embedding."""
    kinds = (("base", encoders[0]), ("finetuned", encoders[1]))
    vectors = [(f"{kind}_{text}embedding", encoder.store, f"{of}_digest")
               for text, of in (("", "image"), ("text_", "text")) for kind, encoder in kinds]  # fmt: skip
    rows = rows[rows["reason"] == ""]
    fields = [pa.field(name, pa.string()) for name in COLUMNS]
    width = encoders[0].clip.config["embed_dim"]
    fields += [pa.field(name, pa.list_(pa.float32(), width)) for name, *_ in vectors]
    schema = pa.schema(fields, metadata=facts)
    compression = {f"{name}.list.element": "none" for name, _, _ in vectors} | dict.fromkeys(COLUMNS, "zstd")
    options = {"compression": compression, "use_dictionary": ["split", *ATTRIBUTES], "write_statistics": list(COLUMNS)}
    with common.atomic_file(path) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:
        pieces = [shard[start : start + ROW_GROUP]
                  for _, shard in rows.groupby("shard") for start in range(0, len(shard), ROW_GROUP)]  # fmt: skip
        for some in common.progress(pieces, "writing", len(pieces), "row group"):
            columns = {name: pa.array(some[name].tolist(), pa.string()) for name in COLUMNS}
            for name, store, digest in vectors:
                matrix = store.get(some[digest].tolist())
                columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROW_GROUP)


def write_part(output: Output, rows, encoders: Sequence[Encoder], facts: dict[str, str], world: World) -> None:
    """Write this process's part, unless an earlier run that was killed has written it."""
    name = f"{output.name}/{output.parts(world)[world.rank]}"
    if not holds(output.work / name, facts):
        write_master(output.work / name, rows, encoders, facts)
    output.publish(name)


def finish_output(output: Output, rows, encoders: Sequence[Encoder], facts: dict[str, str], world: World) -> None:
    """Write what is last, so that where it is, all is: the list of the parts, or the one file."""
    if not output.is_folder:
        return write_master(output.work / output.name, rows, encoders, facts)
    common.write_json(output.work / output.name / common.PARTS, {"parts": output.parts(world), "facts": facts})
    output.publish(f"{output.name}/{common.PARTS}")


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
    return np.stack([pd.factorize(items[name])[0] for name in ("prompt", "group")], axis=1)


def clusters_of(keys):
    """int64 [N]: items that share right answers, directly or through others, are one draw of the bootstrap."""
    return components(np.tile(np.arange(len(keys)), 2), np.concatenate([keys[:, 0], len(keys) + keys[:, 1]]), len(keys))


def components(queries, labels, count: int):
    """int64 [count]: one number for queries that share labels, directly or through others; queries[i] has labels[i]."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    size = count + int(labels.max(initial=0)) + 1  # a graph of the queries and the labels
    graph = coo_matrix((np.ones(len(queries), np.int8), (queries, count + labels)), (size, size))
    return np.unique(connected_components(graph, directed=False)[1][:count], return_inverse=True)[1]


def rank_metrics(rank) -> dict[str, Any]:
    """{metric: float64 [Q]} for RANKED, of the rank of each query's first right answer, and that rank, int64 [Q]."""
    return {f"recall@{k}": (rank <= k).astype(float) for k in RECALLS} | {"mrr": 1 / rank, "rank": rank}


def judge(images, texts, items) -> dict[str, Any]:
    """{metric: float64 [N]} for METRICS, and WAY_rank; NaN where a query cannot be judged.

    images, texts: float32 [N, D], L2-normalised. items: a DataFrame with prompt, group and attributes.
    """
    keys, scores = answer_keys(items), {}
    for way, queries, gallery in (("text_to_image", texts, images), ("image_to_text", images, texts)):
        rank = common.right_ranks(queries, gallery, keys)
        scores |= {f"{way}_{name}": values for name, values in rank_metrics(rank).items()}
    nearest = common.top_k(images, images, NEAREST, exclude=(keys[:, 1], keys[:, 1]))[1]
    scores |= {f"agreement@{NEAREST}_{name}": values for name, values in agreement(nearest, items).items()}
    return scores | {"mrr": (scores["text_to_image_mrr"] + scores["image_to_text_mrr"]) / 2}


def agreement(nearest, items) -> dict[str, Any]:
    """{attribute, all: float64 [N]}: the share of nearest [N, k] (-1: no result) with the query's attribute, or NaN."""
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
# Every model against the base, in numbers and words


def mean(values) -> float | None:
    """Mean over the queries that could be judged."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def compare(base: dict, others: list[dict], clusters, names: Iterable[str] = METRICS) -> list[dict[str, dict]]:
    """For each other model, {metric: value, queries, difference to base, 95% interval, p, Holm's p}.

    The interval and p are those of a paired bootstrap over clusters; Holm's correction is over all models and metrics
    together. An agreement that can be judged on fewer than 20 queries has no p and counts in no correction.
    """
    compared = []
    for scores in others:
        metrics: dict[str, dict] = {}
        for name in names:
            judged = np.isfinite(base[name]) & np.isfinite(scores[name])
            facts: dict[str, Any] = {"value": mean(scores[name]), "queries": int(judged.sum())}
            if judged.any():
                found = common.bootstrap_mean((scores[name] - base[name])[judged], clusters[judged], limit=1)
                facts |= dict(zip(("difference", "low", "high", "p"), found, strict=True))
                if facts["low"] == facts["high"] == 0:  # no query differs: 0 wide would be too sure of those not asked
                    facts |= {"low": None, "high": None}
                if name.startswith("agreement") and facts["queries"] < FEW:
                    del facts["p"]
            metrics[name] = facts
        compared.append(metrics)
    tested = [facts for metrics in compared for facts in metrics.values() if "p" in facts]
    for facts, p in zip(tested, common.holm([facts["p"] for facts in tested]), strict=True):
        facts["p_holm"] = p
    return compared


def compare_one(before, after, clusters) -> dict[str, Any]:
    """Mean of `after`, float64 [N], its difference to `before`, 95% interval and p."""
    facts = compare({"only": before}, [{"only": after}], clusters, ["only"])[0]["only"]
    return {key: facts[key] for key in ("value", "difference", "low", "high", "p")}


def by_type(scores: dict[str, Any], types: Sequence[str]) -> dict[str, dict]:
    """{object type: {items, metric: mean}}, the most frequent type first."""
    types = np.array([kind or "unknown" for kind in types], dtype=object)
    found = {}
    for kind, count in sorted(collections.Counter(types).items(), key=lambda pair: (-pair[1], pair[0])):
        found[kind] = {"items": count} | {name: mean(scores[name][types == kind]) for name in METRICS}
    return found


def compare_with_first(
    names: Sequence[str], scores: list[dict], clusters, labels: dict[str, str], headline: str
) -> dict:
    """What report.json says of models, or of ways to search, against the first of them, by the same N queries.

    scores: {metric: float64 [N]} of each, for the metrics of labels.
    """
    measure, runs = labels[headline].split("  ")[-1], []
    for name, found in zip(names[1:], compare(scores[0], scores[1:], clusters, labels), strict=True):
        runs.append({"name": name, "metrics": found, "verdict": verdict(name, found[headline], measure, names[0])})
    base = {"name": names[0], "metrics": {name: mean(scores[0][name]) for name in labels}}
    return {"independent": len(np.unique(clusters)), "base": base, "runs": runs}


def compare_models(about: list[dict], scores: list[dict], types: Sequence[str], clusters) -> dict[str, Any]:
    """What report.json says of models, the base first, on the N items of the test split.

    about: name, fingerprint and precision of each; types: object type, N texts.
    """
    names = ["zero-shot", *(one["name"] for one in about[1:])]
    facts = {"split": "test", "items": len(types), "headline": "mrr"}
    facts["settings"] = {"draws": common.DRAWS, "seed": common.SEED, "nearest": NEAREST}
    facts |= compare_with_first(names, scores, clusters, METRICS, "mrr")
    for one, own, score in zip([facts["base"], *facts["runs"]], about, scores, strict=True):
        one |= own | {"by_type": by_type(score, types)}
    return facts


def verdict(name: str, facts: dict, measure: str = "MRR", base: str = "zero-shot") -> str:
    """In words: is this run better than the base, corrected for every difference that was tested?"""
    change = f"{measure} {facts['value']:.3f}, {facts['difference']:+.3f} against {base}"
    if facts["difference"] == 0 and facts["low"] is None:
        return f"{name}: no query differs from {base}, {measure} {facts['value']:.3f}"
    if facts["low"] is None:
        return f"{name}: {change}; too few independent queries for an interval"
    interval = f"{change}, 95% interval {shown_interval(facts)}"
    p = f"p = {facts['p_holm']:.4f} after Holm's correction"
    way = "better" if facts["difference"] > 0 else "WORSE"
    if facts["p_holm"] <= ALPHA:
        return f"{name} is {way} than {base}: {interval}, {p}"
    if facts["p"] <= ALPHA:
        return f"{name} looks {way.lower()}, but that is not certain: {interval}, {p}"
    return f"{name}: no difference to {base} is shown: {interval}"


def shown_interval(facts: dict) -> str:
    """The interval of a difference as text."""
    if facts["low"] is None:
        return "no query differs" if facts["difference"] == 0 else "unknown"
    return f"[{facts['low']:+.3f}, {facts['high']:+.3f}]"


# --------------------------------------------------------------------------------------------------------------------
# What shoppers type: queries of their own, answered from the whole catalogue
#
# Definitions. A query's right answers are the products that its file names, each with a gain (grade or weight, else 1).
# Results stand by score; of equal scores the one of lower gain comes first, a wrong one before all: ties count against
# the search. recall@k is 1 where a right answer is among the first k; the reciprocal rank is that of the first right
# answer; nDCG@10 adds up gain / log2(rank + 1) over the first ten, and divides by the same of the best order (Järvelin
# and Kekäläinen 2002). Only queries without a right answer in the training split judge.


@dataclasses.dataclass
class Asked:
    """Q queries with P right answers in a catalogue, by query."""

    texts: list[str]
    query: Any  # int64 [P], ascending: whose right answer it is
    item: Any  # int64 [P]: its row in the catalogue
    gain: Any  # float64 [P], above 0

    def only(self, chosen) -> Asked:
        """Some of the queries, by their numbers, ascending."""
        kept = np.isin(self.query, chosen)
        query = np.searchsorted(chosen, self.query[kept])
        return Asked([self.texts[number] for number in chosen], query, self.item[kept], self.gain[kept])


def read_asked(path: str, items) -> tuple[Asked, dict[str, Any]]:
    """The queries of a file whose products are among the items, and what report.json says of the file."""
    rows, left_out = common.read_queries(path, items["image_id"])
    codes, _ = pd.factorize(rows["query"].str.lower())
    rows = rows.assign(code=codes).sort_values(["code", "gain"], ascending=[True, False], ignore_index=True)
    first = rows.drop_duplicates("code")
    item = pd.Series(items.index, index=items["image_id"])[rows["id"]].to_numpy()
    asked = Asked(first["query"].tolist(), rows["code"].to_numpy(), item, rows["gain"].to_numpy())
    facts = {"file": Path(path).name, "sha256": common.file_digest(path), "rows": len(rows) + sum(left_out.values())}
    facts |= {"left_out": left_out, "queries": len(first), "right_answers": len(rows)}
    return asked, facts | {"made_up": int(first["made_up"].sum())}


def measure(asked: Asked, right, blocks: Iterable[tuple[int, int, Any]]) -> dict[str, Any]:
    """{metric: float64 [Q]} for QUERY_METRICS, and the rank of the first right answer, of one way to search.

    right: float32 [P], the score of each right answer. blocks: (first query, first item, scores float32 [q, n]), which
    cover all Q x N scores once, one block in memory at a time; they are overwritten.
    """

    def in_order(*keys):  # right answers by query and then by keys, at most ten a query, and their places from 0
        order = np.lexsort((*keys[::-1], asked.query))
        place = np.arange(len(order)) - np.searchsorted(asked.query, asked.query)
        return order[place < 10], place[place < 10]

    order, place = in_order(-right, asked.gain)
    query, above = asked.query[order], np.zeros(len(order), np.int64)  # above: wrong ones that score at least as high
    for first, start, scores in blocks:
        ends = [first, first + len(scores)]
        mine = slice(*np.searchsorted(asked.query, ends))
        item = asked.item[mine] - start
        here = (item >= 0) & (item < scores.shape[1])
        scores[asked.query[mine][here] - first, item[here]] = -np.inf
        low, high = np.searchsorted(query, ends)
        for number in range(10):
            rows = low + np.flatnonzero(place[low:high] == number)
            above[rows] += np.count_nonzero(scores[query[rows] - first] >= right[order[rows], None], axis=1)
    ranks = above + place + 1
    gains = np.where(ranks <= 10, asked.gain[order] / np.log2(ranks + 1.0), 0)
    best, place_of_best = in_order(-asked.gain)
    ideal = np.bincount(asked.query[best], asked.gain[best] / np.log2(place_of_best + 2.0))
    return {"ndcg@10": np.bincount(query, gains) / ideal} | rank_metrics(ranks[place == 0])


def judge_vectors(asked: Asked, queries, vectors: Callable, count: int) -> dict[str, Any]:
    """measure() of dot products: queries float32 [Q, D]; vectors(rows) gives float32 [n, D] of `count` items' rows.

    Scores are added up in float64 and rounded to float32, so that equal vectors tie.
    """

    def blocks() -> Iterator[tuple[int, int, Any]]:
        for start in range(0, count, GALLERY):
            block = vectors(np.arange(start, min(start + GALLERY, count))).astype(np.float64)
            for first in range(0, len(queries), 512):
                yield first, start, (queries[first : first + 512].astype(np.float64) @ block.T).astype(np.float32)

    parts = np.array_split(np.arange(len(asked.query)), 1 + len(asked.query) // GALLERY)
    pairs = ((queries[asked.query[part]], vectors(asked.item[part])) for part in parts)
    right = [np.einsum("ij,ij->i", *pair, dtype=np.float64).astype(np.float32) for pair in pairs]
    return measure(asked, np.concatenate(right), blocks())


def judge_words(asked: Asked, titles: list[str]) -> dict[str, Any]:
    """measure() of BM25 over titles, as a shop's text search ranks them (bm25s with its defaults: k1 1.5, b 0.75)."""
    import logging

    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    index, tokens, words = bm25s.BM25(), bm25s.tokenize(titles, show_progress=False), [[]] * len(asked.texts)
    if any(tokens.ids):  # it fails where no title has a word
        index.index(tokens, show_progress=False)
        words = bm25s.tokenize(asked.texts, return_ids=False, show_progress=False)
    nothing, found = np.zeros(len(titles), np.float32), []
    for some in common.batches(range(len(words)), max(1, common.BLOCK_SCORES // len(titles))):
        scores = np.stack([index.get_scores(words[number]) if words[number] else nothing for number in some])
        part = asked.only(some)
        found.append(measure(part, scores[part.query, part.item], [(0, 0, scores)]))
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def mixed(pictures, titles, weight: float):
    """float32 [n, D], L2-normalised, between items' pictures and titles; weight 1 is the picture alone."""
    total = np.float32(weight) * pictures + np.float32(1 - weight) * titles
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), np.float32(1e-12))


def vectors_by(encoder: Encoder, digests) -> Callable:
    """A function that gives float32 [n, D] of some rows of a column of digests."""
    digests = digests.to_numpy(dtype=object)
    return lambda rows: encoder.store.get(digests[rows])


def search_with_words(asked: Asked, left, chooses, items, encoder: Encoder) -> tuple[list[dict], float]:
    """measure() of each of WAYS for the queries that are left, and the mixture's weight: best for those that choose it.

    left, chooses: the queries' numbers, ascending.
    """
    titles, texts = items["title"].map(title_text), encoder.store.get(list(map(text_digest, asked.texts)))
    by_picture, by_title = (vectors_by(encoder, some) for some in (items["image_digest"], titles.map(text_digest)))

    def judge(chosen, vectors: Callable) -> dict[str, Any]:
        return judge_vectors(asked.only(chosen), texts[chosen], vectors, len(items))

    def by_both(weight: float) -> Callable:
        return lambda rows: mixed(by_picture(rows), by_title(rows), weight)

    weight = 0.5
    if len(chooses):
        weight = max(WEIGHTS, key=lambda weight: mean(judge(chooses, by_both(weight))["ndcg@10"]))
    ways = [judge(left, vectors) for vectors in (by_title, by_picture, by_both(weight))]
    return [judge_words(asked.only(left), titles.tolist()), *ways], weight


def judge_queries(path: str, items, names: list[str], encoders: list[Encoder], best: int) -> tuple[dict, Asked]:
    """What report.json says of the queries of a file: every model, and the best run's vectors beside words in titles.

    items: a DataFrame of the whole catalogue. A model's vectors are read in blocks.
    """
    asked, facts = read_asked(path, items)
    splits, total = items["split"].to_numpy()[asked.item], np.bincount(asked.query)
    trained, validation = (np.bincount(asked.query, splits == name) for name in ("train", "validation"))
    judged = trained == 0
    pairs = judged[asked.query]
    clusters = components(asked.query[pairs], pd.factorize(items["group"])[0][asked.item[pairs]], len(total))
    scores = []
    for encoder in encoders:
        by_picture = vectors_by(encoder, items["image_digest"])
        texts = encoder.store.get(list(map(text_digest, asked.texts)))
        scores.append(judge_vectors(asked, texts, by_picture, len(items)))
    facts |= {"judged": None, "beside": [], "ways": None}
    if judged.any():
        own = [{metric: score[metric][judged] for metric in QUERY_METRICS} for score in scores]
        found = compare_with_first(["zero-shot", *names[1:]], own, clusters[judged], QUERY_METRICS, "ndcg@10")
        facts["judged"] = {"queries": int(judged.sum())} | found
    for part, some in (("all", trained == total), ("some", (trained > 0) & (trained < total))):
        means = {name: {metric: mean(score[metric][some]) for metric in QUERY_METRICS}
                 for name, score in zip(names, scores, strict=True)}  # fmt: skip
        facts["beside"].append({"in_training": part, "queries": int(some.sum()), "means": means})
    chooses = np.flatnonzero(judged & (validation > 0))
    chooses = chooses if len(chooses) >= CHOOSING else chooses[:0]
    if len(left := np.setdiff1d(np.flatnonzero(judged), chooses)):
        ways, weight = search_with_words(asked, left, chooses, items, encoders[best])
        facts["ways"] = compare_with_first(WAYS, ways, clusters[left], QUERY_METRICS, "ndcg@10")
        about = {"run": names[best], "weight": weight, "chosen_on": len(chooses)}
        facts["ways"] |= {"queries": len(left)} | about
    first = asked.item[np.searchsorted(asked.query, np.arange(len(total)))]
    ranks = pd.DataFrame({"number": range(len(total)), "item": first, "prompt": asked.texts, "right_answers": total})
    ranks = ranks.assign(zero_shot_rank=scores[0]["rank"], rank=scores[best]["rank"])[judged]
    ranks[["id", "title"]] = items.loc[ranks["item"], ["image_id", "title"]].to_numpy()
    worst = ranks[ranks["rank"] > 1].sort_values("rank", ascending=False, kind="stable")[:MOVED]
    facts["moved"] = {"run": names[best]} | most_moved(ranks) | {"worst": worst.to_dict("records")}
    return facts, asked


# --------------------------------------------------------------------------------------------------------------------
# What further photos bring: from a photo to the product that it shows


def judge_photos(items, names: Sequence[str], encoders: Sequence[Encoder]) -> dict[str, Any]:
    """recall@10 of every model where products are found by their first photo alone, and by all but the last; or {}.

    The queries are the last photos of the test split's products, which are part of no vector that is searched; a right
    answer is a product of the photo's duplicate group. items: a DataFrame of the whole catalogue with split, group and
    views, each product's photos in order. A product with fewer than three is searched like the others, but is no query.
    """
    views, groups = items["views"].tolist(), pd.factorize(items["group"])[0]
    several = [some[:-1] if len(some) > 2 else some for some in views]
    searched = set(itertools.chain.from_iterable(several))
    judges = [split == "test" and len(some) > 2 and some[-1] not in searched
              for split, some in zip(items["split"], views, strict=True)]  # fmt: skip
    asked, models = np.flatnonzero(judges), []
    for name, encoder in zip(names, encoders, strict=True) if len(asked) else ():
        queries, scores = encoder.store.get([views[i][-1] for i in asked]), []
        for photos in ([some[:1] for some in views], several):
            blocks = (mean_vectors(encoder, some) for some in common.batches(photos, GALLERY))
            found = common.top_k(queries, blocks, 10)[1]  # (Q, 10)
            right = (found >= 0) & (groups[found] == groups[asked, None])
            scores.append(right.any(axis=1).astype(float))
        models.append({"name": name, "one_photo": mean(scores[0])} | compare_one(*scores, groups[asked]))
    facts = {"queries": len(asked), "products": len(views), "most": max(map(len, several)), "models": models}
    return facts if models else {}


# --------------------------------------------------------------------------------------------------------------------
# The report: report.json, report.html, queries.parquet


def make_report(
    shards: Shards, rows, models: list[tuple[Run, Encoder]], folder: Path, crop: dict, queries: str | None = None
) -> dict[str, Any]:
    """Judge every run against the first, the base; write the report's files, print and return what they say.

    models: runs with their encoders; crop: see judge_centre_crop; queries: a file of them. The test split's vectors of
    one model are in memory at a time.
    """
    tested = rows[(rows["split"] == "test") & (rows["reason"] == "")].reset_index(drop=True)
    if tested.empty:
        raise Fail(f"{shards.root}: no picture of the test split can be read; make the shards again")
    clusters = clusters_of(answer_keys(tested))
    scores = [judge(*vectors_of(encoder, tested), tested) for _, encoder in models]
    names = run_names([run for run, _ in models])
    about = [{"name": name, "fingerprint": encoder.clip.fingerprint, "precision": encoder.precision}
             for name, (_, encoder) in zip(names, models, strict=True)]  # fmt: skip
    each = tested[["image_id", "object_type"]].rename(columns={"image_id": "id"}).assign(draw=clusters)
    for name, score in zip(names, scores, strict=True):
        each = each.assign(**{f"{name}/{metric}": score[metric] for metric in METRICS})
    with common.atomic_file(folder / "queries.parquet") as temporary:
        each.to_parquet(temporary, index=False)
    facts = compare_models(about, scores, tested["object_type"].tolist(), clusters)
    facts["base"]["centre_crop"] = crop
    page: dict[str, Any] = {}
    best = max(range(1, len(models)), key=lambda i: facts["runs"][i - 1]["metrics"]["mrr"]["value"], default=0)
    encoders, both = [encoder for _, encoder in models], (models[0][1], models[best][1])
    if "views" in rows and (photos := judge_photos(rows[rows["reason"] == ""], names, encoders)):
        facts["photos"] = photos
    if best:
        ranks = tested[["image_id", "title", "prompt"]].rename(columns={"image_id": "id"}).reset_index(names="item")
        ranks["zero_shot_rank"], ranks["rank"] = (scores[i]["text_to_image_rank"] for i in (0, best))
        facts["moved"], keys = {"run": names[best]} | most_moved(ranks), answer_keys(tested)
        page = show_moved(facts["moved"], lambda query: (keys == keys[query["item"]]).any(axis=1).nonzero()[0],
                          shards, tested, both)  # fmt: skip
    typed: dict[str, Any] = {}
    if queries:
        items = rows[rows["reason"] == ""].reset_index(drop=True)
        facts["queries"], asked = judge_queries(queries, items, names, encoders, best)
        typed = show_moved(facts["queries"]["moved"], lambda query: asked.item[asked.query == query["number"]],
                           shards, items, both)  # fmt: skip
    curves = {name: run.folder / "curves.png" for name, (run, _) in zip(names, models, strict=True) if run.folder}
    write_report(folder, facts, curves, page, typed)
    print_comparison(facts, folder, suggest_proof=not shards.manifest.get("fold"))
    return facts


def centre_crop(pixels):
    """uint8 [3, S, S]: about what a centre crop shows of the photo in a letterboxed picture; itself if it is square.

    A letterbox is white on two sides; what is white on all four is a product on white.
    """
    import torch

    white, side = (pixels > 240).all(dim=0).int(), pixels.shape[-1]  # (S, S)
    lines = (white.amin(dim=1), white.amin(dim=0))
    above, beside = (int(min(line.cumprod(0).sum(), line.flip(0).cumprod(0).sum())) for line in lines)
    frame = max(above, beside)
    if not side / 32 < frame < side / 2 - 4:
        return pixels
    inside = slice(frame, side - frame)
    ends = (pixels if above > beside else pixels.transpose(1, 2))[:, inside][:, :, [0, -1]]  # (3, s, 2) of the photo
    if ends.float().mean(dim=(0, 1)).max() > 245:
        return pixels
    crop = pixels[None, :, inside, inside]
    return torch.nn.functional.interpolate(crop, (side, side), mode="bicubic", antialias=True)[0]


def judge_centre_crop(shards: Shards, rows, base: Encoder) -> dict[str, Any]:
    """The base's MRR with centre crops of the photos, its difference to letterboxed ones, interval and p; or {}.

    Both models see letterboxed pictures, but a base is mostly trained on centre crops: what it loses by the white frame
    and training gives back is no knowledge of the catalogue.
    """
    import torch

    tested = rows[(rows["split"] == "test") & (rows["reason"] == "") & (rows["photos"] == 1)].reset_index(drop=True)
    if tested.empty:
        return {}
    framed, texts = vectors_of(base, tested)
    names = [common.digest(["centre crop", digest]) for digest in tested["image_digest"]]
    pictures = pictures_of(shards, tested[[base.store.claim(name) for name in names]])
    for some in common.batches(pictures, base.batch_size):
        crops = torch.stack([centre_crop(common.decode_jpeg(jpg, base.clip.size)) for _, jpg in some])
        base.store.add([Job(names[i], tested.at[i, "image_id"], b"", [base]) for i, _ in some], base.images(crops))
    base.store.flush()
    cropped = base.store.get(names)
    count = int((abs(cropped - framed).max(axis=1) > 1e-3).sum())
    if not count:
        return {}
    before, after = (judge(vectors, texts, tested)["mrr"] for vectors in (framed, cropped))
    return {"photos": count} | compare_one(before, after, clusters_of(answer_keys(tested)))


def centre_crop_note(facts: dict[str, Any]) -> str:
    """In words, where a centre crop of the photos is shown to serve the base better; else ""."""
    crop = facts["base"].get("centre_crop") or {}
    if (crop.get("low") or 0) <= 0:
        return ""
    change = f"MRR {crop['value']:.3f}, {crop['difference']:+.3f} {shown_interval(crop)}"
    return (f"a centre crop of the {crop['photos']} photos that are not square, in place of a white frame, serves the "
            f"base better: {change}; so much of a gain is the frame's")  # fmt: skip


def vectors_of(encoder: Encoder, rows) -> tuple[Any, Any]:
    """float32 [N, D] of the pictures and of the prompts of some rows."""
    return encoder.store.get(rows["image_digest"].tolist()), encoder.store.get(rows["text_digest"].tolist())


def print_comparison(facts: dict[str, Any], folder: Path, suggest_proof: bool) -> None:
    """What report.json says, by templates/report.txt; where no difference is shown, how small a one would be."""
    headlines = [run["metrics"]["mrr"] for run in facts["runs"]]
    widest = max((one["high"] - one["low"] for one in headlines if one["low"] is not None), default=0)
    unsure = suggest_proof and all(one["p_holm"] > ALPHA for one in headlines)
    text = render("report.txt", facts, page=folder / "report.html", smallest=unsure and widest / 2)
    print(text, end="", flush=True)


def most_moved(queries) -> dict[str, list[dict]]:
    """gained, lost: the queries that now find their picture much earlier, and much later, for report.json.

    queries: a DataFrame with prompt, zero_shot_rank, rank and more. By reciprocal rank, then by rank; one query a
    prompt: with the same words the same is found.
    """
    change = queries.assign(change=1 / queries["rank"] - 1 / queries["zero_shot_rank"])
    change["steps"] = queries["zero_shot_rank"] - queries["rank"]
    found = {}
    for kind, moved in (("gained", change["change"] > 0), ("lost", change["change"] < 0)):
        order = change[moved].sort_values(["change", "steps"], ascending=kind == "lost").drop_duplicates("prompt").index
        found[kind] = queries.loc[order[:MOVED]].to_dict("records")
    return found


def show_moved(moved: dict, right: Callable, shards: Shards, items, encoders: Sequence[Encoder]) -> dict[str, Any]:
    """The queries that moved with the pictures that the base and the run find among the items, for report.html.

    right(query): the rows of its right answers.
    """
    kinds = {kind: [dict(query) for query in moved.get(kind, ())] for kind in ("gained", "lost", "worst")}
    queries = [query for some in kinds.values() for query in some]
    if not queries:
        return moved
    found = []
    for encoder in encoders:
        texts = encoder.store.get([text_digest(query["prompt"]) for query in queries])
        vectors = (encoder.store.get(some) for some in common.batches(items["image_digest"], GALLERY))
        found.append([[j for j in rows if j >= 0] for rows in common.top_k(texts, vectors, NEAREST)[1].tolist()])
    wanted = {*(query["item"] for query in queries), *(j for lists in found for some in lists for j in some)}
    pictures = thumbnails(shards, items, wanted)
    for query, *lists in zip(queries, *found, strict=True):
        rows = {*right(query).tolist()}
        query["picture"] = pictures.get(query["item"], "")
        for name, some in zip(("zero_shot", "run"), lists, strict=True):
            query[name] = [{"picture": pictures.get(j, ""), "title": items.at[j, "title"], "right": j in rows}
                           for j in some]  # fmt: skip
    return moved | kinds


def thumbnails(shards: Shards, items, wanted: set[int]) -> dict[int, str]:
    """{row: a small JPEG in base64} of some rows; what cannot be read is left out."""
    found = {}
    for i, jpg in pictures_of(shards, items.loc[sorted(wanted)]):
        with contextlib.suppress(BadImage):  # Pillow may refuse what torchvision read
            image, buffer = common.load_image(jpg), io.BytesIO()
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            image.save(buffer, "JPEG", quality=80)
            found[i] = base64.b64encode(buffer.getvalue()).decode()
    return found


def render(template: str, facts: dict[str, Any], **values: Any) -> str:
    """A page or a text by one of templates/, of what report.json says."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    pages = Environment(loader=templates, autoescape=template.endswith(".html"), **options)
    values |= {"labels": METRICS, "query_labels": QUERY_METRICS, "interval": shown_interval}
    return pages.get_template(template).render(facts=facts, note=centre_crop_note(facts), **values)


def write_report(folder: Path, facts: dict[str, Any], curves: dict[str, Path], moved: dict, typed: dict) -> None:
    """report.json, which holds facts, and report.html: one file with everything in it, by templates/report.html.

    curves: each run's curves.png; moved, of prompts, and typed, of people's queries: see show_moved.
    """
    from matplotlib.ticker import MaxNLocator

    measured = [name for name in METRICS if facts["base"]["metrics"][name] is not None]
    chart = [(METRICS[name], [run["metrics"][name] for run in facts["runs"]]) for name in measured]
    ends = [fact.get(name) or 0.0 for _, some in chart for fact in some for name in ("difference", "low", "high")]
    ticks = [round(tick, 10) + 0.0 for tick in MaxNLocator(5).tick_values(min([0.0, *ends]), max([0.01, *ends]))]
    images = {name: base64.b64encode(png.read_bytes()).decode() for name, png in curves.items() if png.is_file()}
    page = render(
        "report.html", facts, shown=measured, agreements=[name for name in measured if name.startswith("agreement")],
        chart=chart, ticks=ticks, curves=images, moved=moved, typed=typed,
    )  # fmt: skip
    common.atomic_write(folder / "report.html", page)
    common.write_json(folder / "report.json", facts)


# --------------------------------------------------------------------------------------------------------------------
# The commands: embed, report, pool


@contextlib.contextmanager
def working_alone(place: str, world: World) -> Iterator[None]:
    """Keep a second command out of a place of vectors; on S3, out of this machine's copy."""
    with common.exclusive(local_copy(place) / ".lock") if world.main else contextlib.nullcontext(True) as free:
        if not free:
            raise Fail(f"{place}: another 4_embed.py is working there; wait until it has ended")
        try:
            yield
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # a full disk and the like: common names these
                raise
            problem = f"kept vectors are damaged ({error}); remove its *.sqlite and run again: they are made again"
            raise Fail(f"{local_copy(place)}: {problem}") from None


def fill_card(run: Run, report: dict[str, Any]) -> None:
    """Put the test split's numbers and their intervals into the model card that 3_train.py wrote."""
    path, (begin, end) = Path(run.model.removeprefix(LOCAL), "README.md"), common.CARD_TEST
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    if begin not in card or end not in card:
        return
    numbers = render("card.md", report)
    with contextlib.suppress(OSError):  # a model that may only be read goes without
        common.atomic_write(path, f"{card.partition(begin)[0]}{begin}\n{numbers}{end}{card.partition(end)[2]}")


def embed(args: argparse.Namespace, config: EmbeddingConfig) -> int:
    """Vectors of all items under both models, master.parquet, and the report of the two."""
    start, output = time.monotonic(), find_output(args.output)
    base, run = Run("zero_shot", args.model, args.pretrained), read_run(args.finetuned, args)
    if run.model == args.model:
        raise Fail(f"{args.finetuned}: that run is the base model itself; choose a --finetuned that was trained")
    world, place = World(config.device), args.vectors or common.join(output.place, "vectors")
    with working_alone(place, world):
        clips = [common.load_clip(one.model, one.pretrained, world.device) for one in (base, run)]
        check_base(run, clips[0], world)
        ours, theirs = (f"width {clip.config['embed_dim']} from pictures of {clip.size}" for clip in clips)
        if ours != theirs:
            problem = f"makes vectors of {theirs} pixels, the base {clips[0].name} of {ours}"
            raise Fail(f"{clips[1].name}: {problem}; give the --model that it was fine-tuned from")
        shards = open_shards(args.shards, SPLITS, local_copy(place), config)
        encoders = [open_encoder(clip, shards, place, config, world) for clip in clips]
        rows, computed = make_vectors(shards, encoders, config, world, args.queries)
        if world.main:
            write_rejects(output, f"{output.name}.rejects.jsonl", rows, config.max_failed)
        facts = master_facts(shards, rows, encoders, run, output)
        lacking = world.share(world.main and prepare_output(output, facts, world))[0]
        if lacking and output.is_folder:
            write_part(output, rows[rows["shard"].isin(shards.own(world))], encoders, facts, world)
        world.share(None)  # every part is there
        if world.main:
            crop, models = judge_centre_crop(shards, rows, encoders[0]), list(zip((base, run), encoders, strict=True))
            found = make_report(shards, rows, models, output.work, crop, args.queries)
            output.publish("report.json", "report.html", "queries.parquet")
            fill_card(run, found)
            bad, photos = int((rows["reason"] != "").sum()), int(rows["photos"].sum())
            counts = {"input": photos, "written": photos - bad, "rejected": bad, "computed": computed}
            if lacking:
                packages = common.versions("torch", "open_clip_torch", "pyarrow", "numpy")
                about, sidecar = {"shards": args.shards} | facts, f"{output.name}.json"
                seconds = time.monotonic() - start
                common.write_sidecar(output.work / sidecar, config, counts, about, seconds, versions=packages)
                output.publish(sidecar)
                finish_output(output, rows, encoders, facts, world)
            products = f" of {len(rows) - bad} products" if photos > len(rows) else ""
            print(f"{args.output}: input {photos} = written {photos - bad}{products} + rejected {bad}", flush=True)
            print("computed: {image} pictures, {text} texts; the rest was there".format(**computed), flush=True)
        world.share(None)  # the report reads pictures, too, perhaps by the same copies
        shutil.rmtree(shards.cache, ignore_errors=True)  # copies of what lies on S3
    return DONE


def report(args: argparse.Namespace, config: EmbeddingConfig) -> int:
    """Compare any number of runs with the base on the test split; models are loaded one after another."""
    output = Path(args.output)
    runs = list({run.folder.resolve(): run for run in (read_run(path, args) for path in args.run)}.values())
    world = World(config.device)
    place = args.vectors or str(output.parent / "embeddings" / "vectors")
    with working_alone(place, world):
        several = common.load_manifest(args.shards).get("settings", {}).get("photos", 1) > 1  # all are searched, too
        splits = SPLITS if args.queries or several else ("test",)
        shards = open_shards(args.shards, splits, local_copy(place), config)
        models: list[tuple[Run, Encoder]] = []
        base = Run("zero_shot", args.model, args.pretrained)
        for run in (base, *(run for run in runs if run.model != args.model)):
            clip = common.load_clip(run.model, run.pretrained, world.device)
            check_base(run, models[0][1].clip if models else clip, world)
            encoder = open_encoder(clip, shards, place, config, world)
            rows, _ = make_vectors(shards, [encoder], config, world, args.queries)
            if world.main and run is base:
                crop = judge_centre_crop(shards, rows, encoder)
            clip.model = None  # one model in memory at a time
            models.append((run, encoder))
        if world.main:
            write_rejects(Output(args.output, "", True), "rejects.jsonl", rows, config.max_failed)
            make_report(shards, rows, models, output, crop, args.queries)
        world.share(None)
        shutil.rmtree(shards.cache, ignore_errors=True)
    return DONE


def pool(args: argparse.Namespace) -> int:
    """One report of those of several folds: each product was asked for once, by models that never saw it."""
    reports = [common.read_json(Path(folder, "report.json"), "report") for folder in args.report]
    names, queries, draws = [run["name"] for run in reports[0]["runs"]], [], 0
    models = ("zero_shot", *names)
    columns = ["id", "object_type", "draw", *(f"{name}/{metric}" for name in models for metric in METRICS)]
    for folder, facts in zip(args.report, reports, strict=True):
        same = facts["base"]["fingerprint"] == reports[0]["base"]["fingerprint"]
        if not same or [run["name"] for run in facts["runs"]] != names:
            raise Fail(f"{folder}: compares other runs or another base than {args.report[0]}; pool folds of one report")
        try:
            found = pd.read_parquet(Path(folder, "queries.parquet"), columns=columns)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors; a column that an older version lacks
            raise Fail(f"{folder}: not a readable report ({error}); make the report again") from None
        queries.append(found.assign(draw=found["draw"] + draws, folder=folder))
        draws += found["draw"].max() + 1
    whole = pd.concat(queries, ignore_index=True)
    if (twice := whole["id"].duplicated()).any():
        id, folder = whole.loc[twice, ["id", "folder"]].iloc[0]
        raise Fail(f"{folder}: tests on {id}, as another report does; pool folds, made with 2_prepare.py --fold")
    scores = [{metric: whole[f"{name}/{metric}"].to_numpy() for metric in METRICS} for name in models]
    about = [{key: reports[0]["base"][key] for key in ("name", "fingerprint", "precision")}]
    for runs in zip(*(facts["runs"] for facts in reports), strict=True):
        fingerprint = common.digest([run["fingerprint"] for run in runs])
        about.append({"name": runs[0]["name"], "fingerprint": fingerprint, "precision": runs[0]["precision"]})
    facts = compare_models(about, scores, whole["object_type"].tolist(), whole["draw"].to_numpy())
    facts["folds"] = []
    for fold in reports:
        gains = {run["name"]: run["metrics"]["mrr"]["difference"] for run in fold["runs"]}
        facts["folds"].append({"items": fold["items"]} | gains)
    write_report(Path(args.output), facts, {}, {}, {})
    for name in names:
        gains = ", ".join(f"{fold[name]:+.3f}" for fold in facts["folds"])
        print(f"{name}: MRR gained in each of {len(reports)} folds: {gains}")
    print_comparison(facts, Path(args.output), suggest_proof=False)
    return DONE


# --------------------------------------------------------------------------------------------------------------------
# A slim file to serve from, and queries for a shop that has none


def export(args: argparse.Namespace) -> int:
    """Id and fine-tuned vector of every item: of its picture, or of picture and title mixed."""
    weight = args.mixture
    if weight is not None and not 0 <= weight <= 1:
        raise Fail(f"--mixture {weight:g}: must be from 0 to 1, the share of the picture", USAGE)
    master = common.Master(args.embeddings, "image_id", "title", "finetuned_embedding")
    items, start = master.text("image_id", "title"), 0
    titles = [title_text(title or "") for title in items["title"].to_pylist()]
    store = title_vectors(args, master, titles) if weight is not None else None
    holds = "picture" if weight is None else f"{weight:g} picture + {1 - weight:g} title"
    about = dict(zip(("model", "fingerprint"), master.model("finetuned"), strict=True)) | {"vector": holds}
    width = master.width("finetuned_embedding")
    kind = pa.list_(pa.float16() if args.dtype == "float16" else pa.float32(), width)
    schema = pa.schema([("id", pa.string()), ("vector", kind)], metadata=about)
    with (
        common.atomic_file(args.output) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for matrix in master.vectors("finetuned_embedding"):
            end = start + len(matrix)
            if store:
                matrix = mixed(matrix, store.get(list(map(text_digest, titles[start:end]))), weight)
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(matrix.astype(args.dtype).ravel()), width)
            writer.write_table(pa.table([items["image_id"][start:end], vectors], schema=schema))
            start = end
    print(f"{args.output}: {master.rows} items, {args.dtype} [{width}] of {holds}")
    return DONE


def title_vectors(args: argparse.Namespace, master: common.Master, titles: list[str]) -> VectorStore:
    """The vectors of titles, by the model that made the fine-tuned ones."""
    world = World(args.device)
    place = args.vectors or str(master.path.parent / "vectors")
    with working_alone(place, world):
        clip = master.load_model("finetuned", (args.model, args.pretrained) if args.model else None, world.device)
        precision = master.facts.get("precision", "fp32").split("/")[-1]
        encoder = Encoder(clip, precision, place, EmbeddingConfig.batch_size)
        exchange([encoder], world)
        embed_texts({text_digest(title): title for title in titles}, [encoder], world)
    return encoder.store


def write_queries(args: argparse.Namespace) -> int:
    """Write a first file of queries for a person to correct: short words for what the catalogue's attributes say."""
    output = Path(args.output)
    if args.count < 1:
        raise Fail(f"--count {args.count}: must be at least 1", USAGE)
    if output.exists():
        raise Fail(f"{output}: is there already, and may hold somebody's corrections; give another --output", USAGE)
    columns = ["image_id", "split", "object_type", *common.DETAILS]
    items = common.Master(args.embeddings, *columns).text(*columns).to_pandas().fillna("")
    lines, text = list(invent_queries(items, args.count, args.seed)), io.StringIO()
    writer = common.csv_writer(text)
    writer.writerow(["query", "id", "source"])
    for query, rows in lines:
        writer.writerows([query, items.at[row, "image_id"], common.MADE_UP] for row in rows)
    if not lines:
        raise Fail(f"{args.embeddings}: no item has an object type to ask for; run 1_clean.py and what follows again")
    common.atomic_write(output, text.getvalue())
    unseen = sum(not (items.loc[rows, "split"] == "train").any() for _, rows in lines)
    print(f"{output}: {len(lines)} queries MADE UP from the catalogue's attributes; {unseen} have no right answer in "
          "training, so they judge. Correct words and answers, delete what nobody would type, add what people do type, "
          "and empty the column source of what is real")  # fmt: skip
    return DONE


def invent_queries(items, count: int, seed: int) -> Iterator[tuple[str, list[int]]]:
    """(words, rows of all items that fit) of made-up queries: half of them fit items of the test split only.

    A quarter fits none of the training split, one at least of the validation split; a quarter is what most items fit.
    Each asks for an object type and as few attributes as that takes, in the words of common.SYNONYMS now and then.
    """
    rng, fits, others = random.Random(seed), collections.defaultdict(list), collections.defaultdict(list)
    for word, name in common.SYNONYMS.items():
        others[name].append(word)
    sets = [some for size in range(len(common.DETAILS) + 1) for some in itertools.combinations(common.DETAILS, size)]
    for row, values in enumerate(items[[*common.DETAILS, "object_type"]].to_dict("records")):
        for some in sets if values["object_type"] else ():
            if all(values[name] for name in some):
                fits[(*(values[name] for name in some), values["object_type"])].append(row)
    splits, used, taken = items["split"].to_numpy(), set(), 0
    for kinds, share in (({"test"}, 0.5), ({"test", "validation"}, 0.75), (set(SPLITS), 1.0)):
        keys = [key for key, rows in fits.items() if {*splits[rows]} <= kinds]
        rng.shuffle(keys)
        for key in sorted(keys, key=lambda key: (len(key), -len(fits[key])) if share == 1 else len(key)):
            words = [rng.choice(others[word]) if word in others and rng.random() < 0.5 else word for word in key]
            words = [*words[-1:], *words[:-1]] if rng.random() < 0.25 else words  # "sofa grey"
            if taken < round(count * share) and (text := " ".join(words).lower()) not in used:
                used.add(text)
                taken += 1
                yield text, fits.pop(key)


# --------------------------------------------------------------------------------------------------------------------
# Search at a terminal


def search(args: argparse.Namespace) -> int:
    """Print place, score, id, title and path of the items nearest to words, to a picture, or to both together."""
    if args.top_k < 1 or not (args.words or args.image):
        raise Fail("search for what? give words, or --image FILE, and a --top-k of at least 1", USAGE)
    column = f"{args.using}_embedding"
    master = common.Master(args.embeddings, "image_id", "title", "image_path", column)
    scores, rows = common.top_k(query_vector(args, master), master.vectors(column), args.top_k)
    items = master.text("image_id", "title", "image_path").take(rows[0][rows[0] >= 0]).to_pandas().fillna("")
    lines = [(str(place), f"{score:.3f}", *item)
             for place, score, item in zip(itertools.count(1), scores[0], items.to_numpy())]  # fmt: skip
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return DONE


def query_vector(args: argparse.Namespace, master: common.Master):
    """float32 [1, D] of words, of a picture, or of both: the middle between the two."""
    import torch

    try:
        picture = common.load_image(Path(args.image)) if args.image else None
    except (BadImage, OSError) as error:
        raise Fail(f"{args.image}: {error}", USAGE) from None
    clip = master.load_model(args.using, (args.model, args.pretrained) if args.model else None)
    parts = [common.encode(clip, captions=[args.words])] if args.words else []
    if picture is not None:
        square = torch.from_numpy(np.array(common.letterbox(picture, clip.size))).permute(2, 0, 1)
        parts.append(common.encode(clip, pixels=square[None]))
    return torch.nn.functional.normalize(torch.stack(parts).mean(dim=0), dim=-1).numpy()


# --------------------------------------------------------------------------------------------------------------------
# Running it


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    args = read_flags(argv)
    alone = {"pool": pool, "search": search, "export": export, "queries": write_queries}
    if args.command in alone:
        return alone[args.command](args)
    config = common.from_flags(EmbeddingConfig, args)
    if args.queries:
        common.read_queries(args.queries)  # a broken file is named before anything is computed
    common.keep_freed_memory()
    with common.explain_out_of_memory("lower --batch-size"):
        return embed(args, config) if args.command == "embed" else report(args, config)


if __name__ == "__main__":
    sys.exit(main())
