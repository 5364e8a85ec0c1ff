"""The data half of stage 3: the samples of a split in any order, their captions and augmentation, batches read ahead.

An index of offsets into the tar files instead of a stream: a global shuffle is an array made from (seed, epoch), every
process gets equal shares, an epoch holds each sample exactly once, and going on in its middle takes no reading.
Shards on S3 are copied to a bounded folder; what does not fit is read by ranges, 64 at a time.
Where a tower is frozen its features are kept on disk (keep), since its weights never change.
"""

from __future__ import annotations

import collections
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import common
import storage
from common import Fail, TrainingConfig
from imaging import BadImage

READ_TOGETHER = 8  # samples a thread reads in one go: a future for each would cost a fifth of the decoding
FAR_THREADS = 64  # where each read waits for the network

# --------------------------------------------------------------------------------------------------------------------
# Where each sample lies


def hashed(text: str) -> int:
    """A signed 64-bit number for a string, the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


class Samples:
    """The samples of one split in any order. Per sample only offsets stay in memory (52 bytes)."""

    KINDS = ("jpg", "json", "txt")

    def __init__(self, shards: str, manifest: dict[str, Any], split: str, cache: Path, cache_bytes: float, limit=None):
        import numpy as np

        storage.shard_names(manifest, split)  # Fail where the split is empty
        self.split, self.entries = split, manifest["splits"][split]["shards"]
        self.bad: dict[int, str] = {}  # sample -> what is wrong with it
        self.damaged: dict[str, str] = {}  # shard -> what is wrong with it
        room = cache_bytes
        placed = []
        with ThreadPoolExecutor(8) as pool:
            for entry in self.entries:
                room -= entry["bytes"]
                placed.append(pool.submit(self.place, shards, entry, cache if room >= 0 else None))
            self.paths = [future.result() for future in placed]
        shard: list[int] = []
        places: list[list[tuple[int, int]]] = []
        for number, (entry, path) in enumerate(zip(self.entries, self.paths, strict=True)):
            try:
                index = storage.index_shard(path)
                if len(index) != entry["samples"]:
                    raise Fail(f"{len(index)} of {entry['samples']} samples are left in it")
            except Fail as error:
                self.damaged[entry["name"]] = str(error)
                continue
            shard += [number] * len(index)
            places += [[sample.members.get(kind, (0, -1)) for kind in self.KINDS] for sample in index]
        self.shard = np.array(shard[:limit], dtype=np.int32)
        self.places = np.array(places[:limit], dtype=np.int64).reshape(-1, len(self.KINDS), 2)

    def __len__(self) -> int:
        return len(self.shard)

    @staticmethod
    def place(shards: str, entry: dict[str, Any], cache: Path | None) -> str:
        """Where a shard is read: at its own place, or in a local copy of an S3 object."""
        path = storage.join(shards, entry["name"])
        if storage.is_s3(path) and cache is not None:
            local = cache / f"{entry['sha256']}.tar"
            if not local.is_file() or local.stat().st_size != entry["bytes"]:
                with (
                    common.whole_file(local) as temporary,
                    storage.open_read(path) as source,
                    open(temporary, "wb") as target,
                ):
                    shutil.copyfileobj(source, target, 1 << 20)
            path = str(local)
        if not storage.is_s3(path) and not Path(path).is_file():
            raise Fail(f"{path}: missing shard; run 2_prepare.py again, or copy the folder again, whole")
        return path

    def name(self, i: int) -> str:
        """Shard and offset of a sample, for messages."""
        return f"{self.entries[self.shard[i]]['name']} at byte {self.places[i, 0, 0]}"

    def read(self, i: int, kinds: list[str]) -> list[bytes]:
        """The bytes of members of sample i, read in one piece, since they lie side by side. Raises BadImage."""
        wanted = [tuple(map(int, self.places[i, self.KINDS.index(kind)])) for kind in kinds]
        start, end = min(offset for offset, _ in wanted), max(offset + size for offset, size in wanted)
        if min(size for _, size in wanted) < 0:
            raise BadImage(f"a member is missing ({', '.join(kinds)} wanted)")
        with storage.open_read(self.paths[self.shard[i]], start, end - start) as handle:
            data = handle.read(end - start)
        if len(data) < end - start:
            raise BadImage("the shard ends early")
        return [data[offset - start : offset - start + size] for offset, size in wanted]

    def fail(self, i: int, reason: str, max_failed: float) -> None:
        """Count and name an unreadable sample."""
        self.bad[i] = f"{self.name(i)}: {reason}"
        self.check(max_failed)

    def lost(self) -> tuple[int, int]:
        """(unreadable samples known so far, samples of the split)."""
        gone = sum(entry["samples"] for entry in self.entries if entry["name"] in self.damaged)
        return gone + len(self.bad), gone + len(self)

    def check(self, max_failed: float) -> None:
        """Fail where more than this share is unreadable."""
        lost, total = self.lost()
        if not len(self) or lost > max_failed * total:
            first = next((f"{name}: {reason}" for name, reason in self.damaged.items()), None)
            first = first or next(iter(self.bad.values()), "none left")
            raise Fail(
                f"{lost} of {total} {self.split} samples are unreadable; first: {first}; run 2_prepare.py --verify, "
                "make the shards again, or raise --max-failed"
            )


# --------------------------------------------------------------------------------------------------------------------
# In which order


class Step(NamedTuple):
    """What this process contributes to one effective batch."""

    ids: list[int]  # samples
    positions: list[int]  # their places in the effective batch
    total: int  # pairs in the effective batch, over all processes

    def only(self, keep: list[int]) -> Step:
        return Step([self.ids[k] for k in keep], [self.positions[k] for k in keep], self.total)


def epoch_plan(count: int, size: int, seed: int, epoch: int, rank: int, ranks: int, skip: int = 0) -> Iterator[Step]:
    """An epoch's steps for this process: every sample exactly once, in an order made from (seed, epoch).

    There is no small rest at the end: the epoch is cut into steps that differ by one sample at most.
    """
    import numpy as np

    order = np.random.default_rng([seed, epoch]).permutation(count)
    steps = math.ceil(count / size)
    for step in range(skip, steps):
        first, last = count * step // steps, count * (step + 1) // steps
        mine = range((last - first) * rank // ranks, (last - first) * (rank + 1) // ranks)
        yield Step(order[first + mine.start : first + mine.stop].tolist(), list(mine), last - first)


def in_order(count: int, size: int, rank: int = 0, ranks: int = 1) -> Iterator[Step]:
    """This process's share of a split, in batches of `size`; positions are those in the whole split."""
    stop = count * (rank + 1) // ranks
    for first in range(count * rank // ranks, stop, size):
        ids = list(range(first, min(first + size, stop)))
        yield Step(ids, ids, count)


# --------------------------------------------------------------------------------------------------------------------
# What a sample is in an epoch


def caption_of(record: dict[str, Any], own: str, config: TrainingConfig, epoch: int | None) -> str:
    """The shard's own prompt, or in training the next of the item's prompts each epoch, from a seeded one on."""
    if epoch is None or config.captions == "fixed" or not record.get("title"):
        return own
    filled = common.prompts({name: record.get(name) or "" for name in ("title", *common.ATTRIBUTES)})
    return filled[(hashed(f"{config.seed} {record.get('id')}") + epoch) % len(filled)]


def augmented(pixels, kind: str, seed: str):
    """uint8 [3, S, S] -> the same shape: cropped, flipped, for `advanced` turned and blurred too; never recoloured."""
    import torch.nn.functional as F
    from torchvision.transforms.v2 import functional as T

    draw, size = random.Random(seed), pixels.shape[-1]
    if kind == "advanced":
        pixels = T.rotate(pixels, draw.uniform(-10, 10), T.InterpolationMode.BILINEAR, fill=[255.0] * 3)
        if draw.random() < 0.3:
            pixels = T.gaussian_blur(pixels, [3, 3], [draw.uniform(0.1, 1.0)])
    side = max(1, round(size * math.sqrt(draw.uniform(0.8 if kind == "simple" else 0.6, 1.0))))
    top, left = draw.randint(0, size - side), draw.randint(0, size - side)
    crop = pixels[None, :, top : top + side, left : left + side]
    pixels = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
    return pixels.flip(-1) if draw.random() < 0.5 else pixels


# --------------------------------------------------------------------------------------------------------------------
# Batches


class Batch(NamedTuple):
    """A part of an effective batch. What could not be read is missing from it, never replaced."""

    total: int  # pairs in the effective batch, over all processes
    positions: Any  # int64 [B]: place of each pair in the effective batch
    keys: Any  # int64 [B, 2]: duplicate group and caption; pairs that agree in one are positives of each other
    images: Any  # uint8 [B, 3, S, S], or a frozen tower's float32 [B, W]
    texts: Any  # tokens int64 [B, L], or a frozen tower's float32 [B, W]

    def part(self, start: int, size: int) -> Batch:
        return Batch(self.total, *(field[start : start + size] for field in self[1:]))


class KeptTexts(NamedTuple):
    """What a frozen text tower gives for every caption that will be used."""

    features: Any  # float32 [U, W], one row a different caption
    table: Any  # int64 [N, epochs]: each sample's row in each epoch
    groups: Any  # int64 [N]


class Data:
    """Batches of one split: pictures and captions from the shards, or kept features where a tower is frozen."""

    def __init__(self, samples: Samples, clip, config: TrainingConfig, training: bool):
        self.samples, self.clip, self.config, self.training = samples, clip, config, training
        self.images = None  # float32 [views, N, W] once kept
        self.texts: KeptTexts | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, i: int, epoch: int | None, image: bool, text: bool) -> tuple[Any, str, str]:
        """(uint8 [3, S, S], caption, duplicate group) of sample i, as far as wanted. Raises BadImage."""
        from clip import decode_jpeg

        kinds = ["jpg"] * image + ["json", "txt"] * text
        members = dict(zip(kinds, self.samples.read(i, kinds), strict=True))
        pixels, caption, group = None, "", ""
        if image:
            pixels = decode_jpeg(members["jpg"], self.clip.size)
            if self.training and self.config.augment != "none":
                pixels = augmented(pixels, self.config.augment, f"{self.config.seed} {epoch} {i}")
        if text:
            try:
                record = json.loads(members["json"] or b"{}")
                caption = caption_of(record, members["txt"].decode().strip(), self.config, epoch)
                group = str(record.get("group") or record.get("id") or self.samples.name(i))
            except (ValueError, AttributeError) as error:
                raise BadImage(f"damaged text ({error})") from None
        return pixels, caption, group

    def load_some(self, ids: list[int], epoch: int | None, image: bool, text: bool) -> list[tuple | BadImage]:
        """What one thread does for a few samples: (keys, pixels, tokens) of each, or what is wrong with it."""
        import torch

        loaded: list[tuple | BadImage] = []
        for i in ids:
            try:
                pixels, caption, group = self.load(i, epoch, image, text)
            except BadImage as error:
                loaded.append(error)
                continue
            tokens = self.clip.tokenizer([caption])[0] if text else None
            loaded.append((torch.tensor([hashed(group), hashed(caption)]), pixels, tokens))
        return loaded

    def items(self, plan: Iterable[Step], epoch: int | None, image: bool, text: bool) -> Iterator[tuple[Step, list]]:
        """Each step of the plan with its items, less what could not be read; the next step is read meanwhile.

        Threads, not processes: decoding leaves the interpreter's lock, and nothing passes through /dev/shm.
        """
        far = any(storage.is_s3(path) for path in self.samples.paths)  # then threads wait, rather than work
        chunk = 1 if far else READ_TOGETHER
        queue: collections.deque[tuple[Step, list]] = collections.deque()

        def finished() -> tuple[Step, list]:
            step, futures = queue.popleft()
            items = [item for future in futures for item in future.result()]
            for i, item in zip(step.ids, items, strict=True):
                if isinstance(item, BadImage):
                    self.samples.fail(i, str(item), self.config.max_failed)
            good = [k for k, item in enumerate(items) if not isinstance(item, BadImage)]
            return step.only(good), [items[k] for k in good]

        pool = ThreadPoolExecutor(FAR_THREADS if far else max(1, self.config.workers))
        try:
            for step in plan:
                ids = [step.ids[start : start + chunk] for start in range(0, len(step.ids), chunk)]
                queue.append((step, [pool.submit(self.load_some, some, epoch, image, text) for some in ids]))
                if len(queue) > 1:
                    yield finished()
            while queue:
                yield finished()
        finally:
            pool.shutdown(cancel_futures=True)

    def batches(self, plan: Iterable[Step], epoch: int | None = None) -> Iterator[Batch]:
        """A Batch for each step of the plan. epoch None: the shard's own captions, no augmentation."""
        import torch

        image, text = self.images is None, self.texts is None
        if self.samples.bad:  # found earlier: leave them out before reading
            plan = (step.only([k for k, i in enumerate(step.ids) if i not in self.samples.bad]) for step in plan)
        for step, items in self.items(plan, epoch, image, text) if image or text else ((step, []) for step in plan):
            keys, images, texts = (list(column) for column in zip(*items, strict=True)) if items else ([], [], [])
            if text and not items:
                keys = torch.empty(0, 2, dtype=torch.int64)
            if not image:
                images = torch.from_numpy(self.images[(epoch or 0) % len(self.images), step.ids])
            if not text:
                rows = self.texts.table[step.ids, (epoch or 0) % self.texts.table.shape[1]]
                texts = torch.from_numpy(self.texts.features[rows])
                keys = torch.stack([torch.from_numpy(self.texts.groups[step.ids]), torch.from_numpy(rows)], dim=1)
            stacked = (torch.stack(x) if isinstance(x, list) and x else x for x in (keys, images, texts))
            yield Batch(step.total, torch.tensor(step.positions, dtype=torch.int64), *stacked)


# --------------------------------------------------------------------------------------------------------------------
# What a frozen tower gives, computed once


def keep(data: Data, tower: str, folder: Path, encode: Callable, size: int, variants: int) -> None:
    """Run a frozen tower over a split once, unless `folder` has what it gives, and let `data` use that from now on.

    encode: uint8 pictures or int64 tokens -> float32 [B, W], before projection; size: how many at once;
    variants: views of each picture, or epochs with their own captions.
    """
    import numpy as np

    if not (folder / "failed.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (_keep_images if tower == "image" else _keep_texts)(data, folder, encode, size, variants)
        common.write_json(folder / "failed.json", sorted(data.samples.bad.items()))
    data.samples.bad |= dict(common.read_json(folder / "failed.json"))
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
    if tower == "image":
        data.images = arrays["features"]
    else:
        data.texts = KeptTexts(arrays["features"], arrays["table"], arrays["groups"])


def _new_array(path: Path, shape: tuple[int, ...]):
    """A float32 array in a file. Its room on the disk is taken first: to meet a full disk in a mapping is to die."""
    import numpy as np

    array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
    return array


def _keep_images(data: Data, folder: Path, encode: Callable, size: int, views: int) -> None:
    """features.npy, float32 [views, N, W]."""
    import torch

    kept = None
    for view in range(views):
        items = data.items(in_order(len(data), size), view, True, False)
        total = math.ceil(len(data) / size)
        for step, loaded in common.progress(items, f"{data.samples.split} pictures, once", total, "batch"):
            if loaded:
                x = encode(torch.stack([pixels for _, pixels, _ in loaded]))
                if kept is None:
                    shape = (views, len(data), x.shape[1])
                    kept = _new_array(folder / "features.npy", shape)
                kept[view, step.ids] = x.numpy()
    kept.flush()


def _keep_texts(data: Data, folder: Path, encode: Callable, size: int, epochs: int) -> None:
    """features.npy, table.npy and groups.npy: see KeptTexts."""
    import numpy as np

    rows: dict[str, int] = {}
    table, groups = np.zeros((len(data), epochs), np.int64), np.zeros(len(data), np.int64)
    for i in range(len(data)):
        try:
            for epoch in range(epochs):
                _, caption, group = data.load(i, epoch if data.training else None, False, True)
                table[i, epoch], groups[i] = rows.setdefault(caption, len(rows)), hashed(group)
        except BadImage as error:
            data.samples.fail(i, str(error), data.config.max_failed)
    captions, kept = list(rows), None
    by_length = sorted(range(len(captions)), key=lambda row: len(captions[row]))  # little is padded this way
    starts = range(0, len(captions), size)
    for start in common.progress(starts, f"{data.samples.split} captions, once", len(starts), "batch"):
        some = by_length[start : start + size]
        x = encode(data.clip.tokenizer([captions[row] for row in some]))
        if kept is None:
            kept = _new_array(folder / "features.npy", (len(captions), x.shape[1]))
        kept[some] = x.numpy()
    kept.flush()
    np.save(folder / "table.npy", table)
    np.save(folder / "groups.npy", groups)
