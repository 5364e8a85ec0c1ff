"""The data half of stage 4: what the shards hold, and a store in which every vector is computed once.

    <folder>/index/<sha256 of a shard>.parquet      its rows, their digests, and where the pictures lie
    <folder>/<model>/{image,text}/<name>.npy        parts: digests and vectors of up to 1,024 rows, each written whole
    <folder>/<model>/model.json                     which model and precision that is

A vector is known by the digest of its picture (or prompt) and by its model. So what is there is never computed again:
after a kill, for new products, or under another fine-tuned model. It does not depend on its neighbours in a batch
either (Encoder), hence what was computed in whichever order, by however many processes, is the same to the bit.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import common
import retrieval
import storage
from common import EmbeddingConfig, Fail
from imaging import BadImage

FORMAT = 2  # of the folder; another one shares nothing with it
PART = 1024  # vectors in a part file
PART_SECONDS = 30  # or what was made in this time, so that a kill costs no more
AHEAD = 3  # batches read and decoded before they are needed
FAR_THREADS = 64  # where each read waits for the network
READ_TOGETHER = 16  # pictures a thread reads in one go: a future for each would cost as much as decoding
CHECKED = 32  # pictures and prompts that half precision is checked on
COSINE = 0.999  # it must reach, against float32
ROWS = 16  # a batch is filled up to a multiple: products of fewer rows add up in another order
FIELDS = ("id", "image_path", "title", "prompt", *common.ATTRIBUTES, "group", "image_digest", "text_digest")
INHERITED = ("id", "title", "image_path", "group", *common.ATTRIBUTES)  # as they stand in a sample's json

# --------------------------------------------------------------------------------------------------------------------
# One process or many


class Ranks:
    """This process among those that torchrun started, or the only one."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        if self.size > 1:
            import datetime

            import torch.distributed as dist

            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=datetime.timedelta(hours=12))

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def share(self, items: list) -> list:
        """This process's part of a list that is the same everywhere."""
        return items[self.rank :: self.size]

    def say(self, line: str) -> None:
        """Print a line, once whatever the number of processes."""
        if self.rank == 0:
            print(line, flush=True)


def device_of(name: str, ranks: Ranks) -> str:
    """auto: this process's own GPU where there is one."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{ranks.local}" if name == "cuda" else name
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise Fail(f"--device {name}: {str(error).splitlines()[0]}; use --device cpu or auto") from None
    return name


# --------------------------------------------------------------------------------------------------------------------
# What the shards hold


class Items:
    """The rows of some splits in shard order. Per row only digests and offsets stay in memory (84 bytes)."""

    def __init__(self, shards: str, folder: Path, splits: Iterable[str], ranks: Ranks, cache_bytes: float = 0):
        self.shards, self.folder = shards, folder
        self.manifest = storage.load_manifest(shards)
        self.entries = [
            (split, entry)
            for split in splits
            for entry in self.manifest["splits"].get(split, {}).get("shards", [])
            if entry["samples"]
        ]
        if not self.entries:
            names = ", ".join(splits)
            raise Fail(f"{shards}: no rows in {names}; give more rows, or check the split report of 2_prepare.py")
        mine = ranks.share(list({entry["sha256"]: entry for _, entry in self.entries}.values()))  # before any is made
        room, jobs = cache_bytes / ranks.size, []
        for entry in mine:
            if not self._index(entry).is_file():
                room -= entry["bytes"]
                jobs.append((entry, room >= 0))
        with ThreadPoolExecutor(4 if storage.is_s3(shards) else 1) as pool:  # a shard on S3 mostly waits
            work = pool.map(lambda job: self._make_index(*job), jobs)
            for _ in common.progress(work, "reading", len(jobs), "shard") if jobs else ():
                pass
        ranks.wait()
        self._load()

    def __len__(self) -> int:
        return len(self.shard)

    def _index(self, entry: dict[str, Any]) -> Path:
        return self.folder / "index" / f"{FORMAT}-{entry['sha256']}.parquet"

    def _copy(self, entry: dict[str, Any]) -> Path:
        return self.folder / "shards" / f"{entry['sha256']}.tar"

    def _make_index(self, entry: dict[str, Any], keep: bool) -> None:
        """Read one shard from end to end. What lies on S3 is copied first, and kept where there is room."""
        path = storage.join(self.shards, entry["name"])
        if not storage.is_s3(path):
            if not Path(path).is_file():
                raise Fail(f"{path}: missing shard; run 2_prepare.py again, or copy the folder again, whole")
            return self._write_index(entry, path)
        local = self._copy(entry)
        if not local.is_file():
            with (
                common.whole_file(local) as temporary,
                storage.open_read(path) as source,
                open(temporary, "wb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
        self._write_index(entry, str(local))
        if not keep:
            local.unlink()

    def _write_index(self, entry: dict[str, Any], path: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows: dict[str, list] = {name: [] for name in (*FIELDS, "offset", "size")}
        if common.file_digest(path) != entry["sha256"]:
            name = storage.join(self.shards, entry["name"])
            raise Fail(f"{name}: not the bytes its manifest tells of; run 2_prepare.py again, or copy it again, whole")
        with open(path, "rb") as handle:
            for sample in storage.index_shard(path):
                try:
                    jpg, record, prompt = (
                        storage.read_member(handle, sample.members[kind]) for kind in ("jpg", "json", "txt")
                    )
                    record = json.loads(record)
                    fields = {name: str(record[name] or "") for name in INHERITED} | {"prompt": prompt.decode()}
                except (KeyError, TypeError, ValueError) as error:
                    raise Fail(f"{path}, sample {sample.key}: {error!r}; make the shards again") from None
                fields["image_digest"] = hashlib.sha256(jpg).hexdigest()
                fields["text_digest"] = hashlib.sha256(prompt).hexdigest()
                fields["offset"], fields["size"] = sample.members["jpg"]
                for name, value in fields.items():
                    rows[name].append(value)
        with common.whole_file(self._index(entry)) as temporary:
            pq.write_table(pa.table(rows), temporary, compression="zstd")

    def _load(self) -> None:
        total = sum(entry["samples"] for _, entry in self.entries)
        self.image, self.text = np.empty(total, "S32"), np.empty(total, "S32")
        self.shard, self.offset, self.size = np.empty(total, np.int32), np.empty(total, np.int64), np.empty(total, int)
        first = 0
        for number in range(len(self.entries)):
            table = self.table(number, ["image_digest", "text_digest", "offset", "size"])
            part = slice(first, first + table.num_rows)
            self.shard[part], self.offset[part], self.size[part] = number, table["offset"], table["size"]
            for array, name in ((self.image, "image_digest"), (self.text, "text_digest")):
                array[part] = [bytes.fromhex(value) for value in table[name].to_pylist()]
            first += table.num_rows

    def table(self, number: int, columns: list[str] | None = None):
        """The rows of one shard as an Arrow table."""
        import pyarrow.parquet as pq

        path = self._index(self.entries[number][1])
        try:
            return pq.read_table(path, columns=columns)
        except (OSError, ValueError) as error:
            raise Fail(f"{path}: damaged ({str(error)[:100]}); remove it and run again") from None

    def fields(self, rows: np.ndarray, names: Iterable[str]) -> dict[str, list[str]]:
        """Columns of some rows, which are in ascending order."""
        found: dict[str, list[str]] = {name: [] for name in names}
        for number in np.unique(self.shard[rows]):
            inside = rows[self.shard[rows] == number] - int(np.searchsorted(self.shard, number))
            table = self.table(int(number), list(found)).take(inside)
            for name, values in found.items():
                values += table[name].to_pylist()
        return found

    def prompts(self, rows: np.ndarray) -> list[str]:
        """The prompts of some rows, which are in ascending order."""
        return self.fields(rows, ["prompt"])["prompt"]

    def name(self, row: int) -> str:
        """Shard and place of a row, for messages."""
        entry = self.entries[self.shard[row]][1]
        return f"{storage.join(self.shards, entry['name'])} at byte {self.offset[row]}"

    def jpegs(self, rows: Iterable[int]) -> list[bytes | BadImage]:
        """The pictures of some rows as they stand in the shards, or what is wrong with them."""
        found: list[bytes | BadImage] = []
        with contextlib.ExitStack() as stack:
            handles: dict[int, Any] = {}
            for row in rows:
                number, place = int(self.shard[row]), (int(self.offset[row]), int(self.size[row]))
                entry = self.entries[number][1]
                if number not in handles:
                    path = storage.join(self.shards, entry["name"])
                    if storage.is_s3(path):
                        path = str(self._copy(entry)) if self._copy(entry).is_file() else path
                    far = storage.is_s3(path)
                    handles[number] = (path, None if far else stack.enter_context(_open(path)))
                path, handle = handles[number]
                if handle is None:
                    with storage.open_read(path, *place) as far:
                        data = far.read(place[1])
                else:
                    data = storage.read_member(handle, place)
                changed = hashlib.sha256(data).digest().rstrip(b"\0") != self.image[row]
                found.append(BadImage("changed shard", "not the bytes that were indexed") if changed else data)
        return found

    def forget_copies(self) -> None:
        """Remove the local copies of shards on S3."""
        shutil.rmtree(self.folder / "shards", ignore_errors=True)


def _open(path: str):
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise Fail(f"{path}: missing shard; run 2_prepare.py again, or copy the folder again, whole") from None


# --------------------------------------------------------------------------------------------------------------------
# The store


class Store:
    """Vectors of one tower of one model by digest: part files that appear whole."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.refresh()

    def refresh(self) -> None:
        """Look again at which parts are there. Per vector 44 bytes stay in memory, none of it the vector."""
        self.parts = sorted(self.folder.glob("*.npy"))
        found = []
        for path in list(self.parts):
            try:
                with open(path, "rb") as handle:
                    found.append(np.load(handle, allow_pickle=False))
                    start, shape = _rest(handle)
                if len(found[-1]) != shape[0] or path.stat().st_size != start + 4 * shape[0] * shape[1]:
                    raise ValueError("cut")
            except (ValueError, EOFError):
                print(f"{path}: damaged; its vectors are computed again", flush=True)
                path.unlink(missing_ok=True)
                return self.refresh()
        counts = [len(one) for one in found]
        digests = np.concatenate([np.empty(0, "S32"), *found])
        del found
        order = np.argsort(digests, kind="stable")
        self.digests = digests[order]
        del digests
        self.part = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
        starts = np.cumsum([0, *counts])[self.part]
        self.row = (order - starts).astype(np.int32)

    def has(self, digests: np.ndarray) -> np.ndarray:
        """bool [n]: whether each vector is there."""
        place = np.searchsorted(self.digests, digests)
        place[place == len(self.digests)] = 0
        return self.digests[place] == digests if len(self.digests) else np.zeros(len(digests), bool)

    def add(self, digests: np.ndarray, vectors: np.ndarray) -> None:
        """Write one part. The name comes from the digests, so that no two processes want the same one."""
        name = f"{common.digest(digests.tobytes())[:24]}.npy"
        with common.whole_file(self.folder / name) as temporary, open(temporary, "wb") as handle:
            np.save(handle, digests.astype("S32"))
            np.save(handle, vectors.astype(np.float32, copy=False))

    def get(self, digests: np.ndarray) -> np.ndarray:
        """float32 [n, D] of digests that are all there."""
        place = np.searchsorted(self.digests, digests)
        parts, rows = self.part[place], self.row[place]
        vectors = None
        for number in np.unique(parts):
            with open(self.parts[number], "rb") as handle:
                np.load(handle, allow_pickle=False)
                start, shape = _rest(handle)
            there = np.memmap(self.parts[number], np.float32, "r", start, shape)
            if vectors is None:
                vectors = np.empty((len(digests), shape[1]), np.float32)
            mine = parts == number
            vectors[mine] = there[rows[mine]]
            del there
        return vectors


class Vectors:
    """The vectors of some digests, all there, read when they are asked for: float32 [N, D], of which N is not held."""

    def __init__(self, store: Store, digests: np.ndarray):
        self.store, self.digests = store, digests

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, rows: slice | list[int]) -> np.ndarray:
        return self.store.get(self.digests[rows])

    def blocks(self) -> Iterator[np.ndarray]:
        """float32 [n, D] pieces, as retrieval.top_k takes them."""
        step = retrieval.SEARCH_VECTORS
        return (self[start : start + step] for start in range(0, len(self), step))


def _rest(handle) -> tuple[int, tuple[int, int]]:
    """Where the second array of a part begins, and its shape."""
    np.lib.format.read_magic(handle)
    shape, _, _ = np.lib.format.read_array_header_1_0(handle)
    return handle.tell(), shape


# --------------------------------------------------------------------------------------------------------------------
# A model and its vectors


class Encoder:
    """A CLIP at a precision, and the store of its vectors.

    The vector of a picture or prompt is a function of that alone. Matrix products of a multiple of 16 rows give each
    row the same bits wherever it stands; prompts are encoded among prompts of their own length, cut behind their end,
    since other lengths add up attention in another order. (On a GPU the kernel depends on the number of rows as well:
    there every batch is filled up.)
    """

    def __init__(self, clip, precision: str, folder: Path):
        from clip import split_attention

        split_attention(clip.model)
        self.clip, self.precision = clip, precision
        self.key = model_key(clip, precision)
        self.image, self.text = Store(folder / self.key / "image"), Store(folder / self.key / "text")

    def autocast(self):
        """bfloat16 where that is the precision. Its copy of the weights lasts as long as the outermost context."""
        import torch

        return torch.autocast(self.clip.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def images(self, pixels, batch_size: int):
        """float32 [B, D] of uint8 [B, 3, S, S]; still on the device."""
        from clip import encode_image

        with self.autocast():
            return encode_image(self.clip, self._filled(pixels, batch_size))[: len(pixels)]

    def texts(self, captions: list[str], batch_size: int) -> np.ndarray:
        """float32 [B, D] of captions."""
        import torch
        import torch.nn.functional as F

        from clip import text_features

        tokens = self.clip.tokenizer(captions)  # (B, L)
        ends = tokens.argmax(dim=-1) * tokens.shape[1] + (tokens != 0).sum(dim=-1)
        vectors = None
        with torch.no_grad(), self.autocast():
            for end in ends.unique():
                for rows in torch.nonzero(ends == end)[:, 0].split(batch_size):
                    some = self._filled(tokens[rows], batch_size).to(self.clip.device)
                    x = F.normalize(text_features(self.clip.model, some).float(), dim=-1)[: len(rows)].cpu()
                    vectors = x.new_empty((len(captions), x.shape[1])) if vectors is None else vectors
                    vectors[rows] = x
        return vectors.numpy()

    def _filled(self, inputs, batch_size: int):
        """Rows repeated up to a multiple of 16, on a GPU up to a whole batch."""
        whole = batch_size if self.clip.device.type == "cuda" else -(-len(inputs) // ROWS) * ROWS
        if len(inputs) >= whole:
            return inputs
        return inputs[[*range(len(inputs)), *[0] * (whole - len(inputs))]]


def model_key(clip, precision: str) -> str:
    """The folder name of a model's vectors: weights, configuration, preprocessing and precision."""
    return common.digest([FORMAT, clip.fingerprint, clip.size, list(clip.mean), list(clip.std), precision])[:24]


def open_encoder(clip, items: Items, config: EmbeddingConfig, ranks: Ranks) -> Encoder:
    """A model with its store, in half precision where that is wanted and proves true on the first pictures."""
    from clip import auto_precision

    wanted = auto_precision(clip.device.type) if config.precision == "auto" else config.precision
    if wanted == "bf16":
        note = items.folder / model_key(clip, "bf16") / "model.json"
        if ranks.rank == 0 and not note.is_file():
            cosine = half_cosine(clip, items, config)
            common.write_json(note, {"model": clip.name, "fingerprint": clip.fingerprint, "cosine": cosine})
        ranks.wait()
        cosine = common.read_json(note)["cosine"]
        if not cosine >= COSINE:
            ranks.say(f"{clip.name}: bf16 agrees with float32 to a cosine of {cosine:.5f} only; float32 is used")
            wanted = "fp32"
    if wanted == "fp32" and ranks.rank == 0:
        note = items.folder / model_key(clip, "fp32") / "model.json"
        if not note.is_file():
            common.write_json(note, {"model": clip.name, "fingerprint": clip.fingerprint})
    return Encoder(clip, wanted, items.folder)


def half_cosine(clip, items: Items, config: EmbeddingConfig) -> float:
    """The smallest cosine of bf16 to float32 over the first pictures and prompts."""
    import torch

    from clip import decode_jpeg

    rows = np.arange(min(len(items), CHECKED))
    pixels = []
    for data in items.jpegs(rows):
        with contextlib.suppress(BadImage):
            pixels += [] if isinstance(data, BadImage) else [decode_jpeg(data, clip.size)]
    made = []
    for precision in ("fp32", "bf16"):
        encoder = Encoder(clip, precision, items.folder)
        texts = encoder.texts(items.prompts(rows), config.batch_size)
        images = [encoder.images(torch.stack(pixels), config.batch_size).cpu().numpy()] if pixels else []
        made.append(np.concatenate([texts, *images]).astype(np.float64))
    smallest = float(np.einsum("ij,ij->i", *made).min())
    return smallest if np.isfinite(smallest) else 0.0


# --------------------------------------------------------------------------------------------------------------------
# Computing what is missing


def first_of_each(digests: np.ndarray) -> np.ndarray:
    """The first row of every distinct digest, ascending."""
    return np.sort(np.unique(digests, return_index=True)[1])


def compute(items: Items, encoders: list[Encoder], config: EmbeddingConfig, ranks: Ranks) -> dict[str, int]:
    """Make every vector that a store lacks, this process its share; how many pictures and prompts that were in all."""
    import torch

    ranks.wait()  # every process has seen what is there before one adds to it: their lists must be the same
    counts = {}
    half = any(encoder.precision == "bf16" for encoder in encoders)
    device = encoders[0].clip.device.type
    for tower, digests, work, unit in (
        ("image", items.image, _pictures, "picture"),
        ("text", items.text, _prompts, "prompt"),
    ):
        rows = first_of_each(digests)
        lacking = [~getattr(encoder, tower).has(digests[rows]) for encoder in encoders]
        todo = rows[np.any(lacking, axis=0)]
        counts[tower] = len(todo)
        mine = ranks.share([todo[start : start + PART] for start in range(0, len(todo), PART)])
        total = sum(map(len, mine))
        if not total:
            continue
        with Writer(items, encoders, tower) as writer, torch.autocast(device, torch.bfloat16, enabled=half):
            for _ in common.progress(work(items, mine, encoders, config, writer), "encoding", total, unit):
                pass
    ranks.wait()
    for encoder in encoders:
        encoder.image.refresh()
        encoder.text.refresh()
    return counts


class Writer:
    """Gathers vectors and writes them as parts; on the way out, too, so that Ctrl-C loses nothing."""

    def __init__(self, items: Items, encoders: list[Encoder], tower: str):
        self.items, self.encoders, self.tower = items, encoders, tower
        self.digests = items.image if tower == "image" else items.text
        self.waiting: list[list[tuple[np.ndarray, Any]]] = [[] for _ in encoders]
        self.written = time.monotonic()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error) -> None:
        self.flush()

    def add(self, number: int, rows: np.ndarray, vectors) -> None:
        """Take vectors, which may still be in the making on a GPU."""
        self.waiting[number].append((rows, vectors))

    def batch_done(self) -> None:
        """Write where enough has come together."""
        most = max(sum(len(rows) for rows, _ in waiting) for waiting in self.waiting)
        if most >= PART or time.monotonic() - self.written >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write all that waits. Raises Fail for a vector that is none."""
        for encoder, waiting in zip(self.encoders, self.waiting, strict=True):
            if not waiting:
                continue
            rows = np.concatenate([rows for rows, _ in waiting])
            vectors = np.concatenate([np.asarray(v if isinstance(v, np.ndarray) else v.cpu()) for _, v in waiting])
            waiting.clear()
            lengths = np.linalg.norm(vectors, axis=1)
            wrong = np.flatnonzero(~(abs(lengths - 1) < 1e-3))  # NaN is wrong, too
            if len(wrong):
                raise Fail(
                    f"{encoder.clip.name}: the {self.tower} vector of {self.items.name(rows[wrong[0]])} has length "
                    f"{lengths[wrong[0]]}; the model is broken: train it again, or try --precision fp32"
                )
            getattr(encoder, self.tower).add(self.digests[rows], vectors)
        self.written = time.monotonic()


def _pieces(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _pictures(items: Items, parts: list[np.ndarray], encoders: list[Encoder], config: EmbeddingConfig, writer: Writer):
    """Encode the pictures of rows; each is read and decoded once, by threads that run ahead. Yields the rows."""
    import torch

    from clip import decode_jpeg

    sizes = sorted({encoder.clip.size for encoder in encoders})
    pin = encoders[0].clip.device.type == "cuda"

    def read(rows: np.ndarray):
        """The rows that can be decoded, and their pixels at every size."""
        good, pixels = [], {size: [] for size in sizes}
        for row, data in zip(rows, items.jpegs(rows), strict=True):
            with contextlib.suppress(BadImage):  # they are named when the rows are put together
                if isinstance(data, BadImage):
                    raise data
                decoded = {size: decode_jpeg(data, size) for size in sizes}
                good.append(row)
                for size in sizes:
                    pixels[size].append(decoded[size])
        return good, {size: torch.stack(some) if some else None for size, some in pixels.items()}

    threads = config.workers or os.cpu_count() or 1
    far = storage.is_s3(items.shards)
    with ThreadPoolExecutor(FAR_THREADS if far else threads) as pool:
        batches = (batch for part in parts for batch in _pieces(part, config.batch_size))
        asked = ((batch, [pool.submit(read, rows) for rows in _pieces(batch, READ_TOGETHER)]) for batch in batches)
        for batch, futures in _ahead(asked, AHEAD):
            answers = [answer for answer in (future.result() for future in futures) if answer[0]]
            rows = np.array([row for good, _ in answers for row in good], dtype=np.int64)
            for size in sizes if len(rows) else ():
                pixels = torch.cat([some[size] for _, some in answers])
                pixels = pixels.pin_memory() if pin else pixels
                for number, encoder in enumerate(encoders):
                    if encoder.clip.size == size:
                        lacks = ~encoder.image.has(items.image[rows])
                        if lacks.any():
                            some = pixels if lacks.all() else pixels[torch.from_numpy(lacks)]
                            writer.add(number, rows[lacks], encoder.images(some, config.batch_size))
            writer.batch_done()
            yield from batch


def _ahead(items: Iterator, count: int) -> Iterator:
    """The same items, of which `count` are asked for before they are needed."""
    waiting: collections.deque = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _prompts(items: Items, parts: list[np.ndarray], encoders: list[Encoder], config: EmbeddingConfig, writer: Writer):
    """Encode the prompts of rows. Yields the rows."""
    for rows in parts:
        captions = items.prompts(rows)
        for number, encoder in enumerate(encoders):
            lacks = ~encoder.text.has(items.text[rows])
            if lacks.any():
                some = [caption for caption, lack in zip(captions, lacks, strict=True) if lack]
                writer.add(number, rows[lacks], encoder.texts(some, config.batch_size))
        writer.batch_done()
        yield from rows
