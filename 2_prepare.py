"""Stage 2: split the cleaned catalogue without leaks and write it as WebDataset shards, the same bytes every time.

Reads   --input: cleaned.csv (id, name, image_path, clean_title, style, material, color, object_type) and --images
Writes  --output, a folder or s3://bucket/prefix: {train,validation,test,mini_train}/shard-%06d.tar, each with a small
        .json record; items.csv (id, split, duplicate group), rejects.jsonl, split_report.json, contact_sheet.jpg,
        prepare.json, and manifest.json last

    python 2_prepare.py --input data/cleaned.csv --images data/photos --output data/shards
    python 2_prepare.py --input data/cleaned.csv --images data/photos --output /tmp/first --limit 50 --image-size 64
    torchrun --nnodes 4 --nproc-per-node 1 ... 2_prepare.py ...     the same bytes, by four machines with the same files
    python 2_prepare.py --verify --output data/shards
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import textwrap
import time
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
from common import DONE, FAILED, MIN_SIDE, SPLITS, USAGE, BadImage, Fail, World, is_s3, join, setting

FORMAT = 3  # of shards, records and manifest; with a new number every photo is scanned and every shard written again
SHARD_SAMPLES, SHARD_BYTES = 1000, 500_000_000  # at most, tar headers counted
LEAST_SIDE = 224  # pixels: people look at the pictures too; a model that takes smaller ones scales them
MINI_SHARDS = 5  # train shards that mini_train holds again: 5,000 samples to try a training on
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}

# --------------------------------------------------------------------------------------------------------------------
# Settings


@dataclasses.dataclass(frozen=True)
class PrepConfig:
    """Stage 2."""

    model: str = setting("ViT-B-32", "what will be trained; it says how large the pictures are")
    image_size: int | None = setting(None, "pixels a side (unset: --model's, at least 224)", low=MIN_SIDE, high=4096)
    quality: int = setting(95, "JPEG quality in the shards", low=1, high=100)
    seed: int = setting(42, "of the split, the order and the prompt templates")
    fold: str = setting("", "K/N: of N equal parts of the catalogue test on part K (from 0), validate on the next")
    max_failed: float = setting(0.05, "share of rows that may be rejected before the exit code is 1", low=0, high=1)
    limit: int | None = setting(None, "use the first N rows only", low=1)
    photos: int = setting(1, "photos of a product that become samples, all of them in one split", low=1, high=100)
    workers: int | None = setting(None, "processes that read photos (unset: one a core)", low=1, high=1000)


def photo_settings(config: PrepConfig) -> list:
    """What a JPEG in the shards depends on beside the photo's file."""
    return [FORMAT, config.image_size, config.quality, common.versions("pillow")["pillow"]]


# --------------------------------------------------------------------------------------------------------------------
# Perceptual hashes: which photos show the same

HASH_VERSION = 5  # with a new number every photo is scanned again
HASH_SIDE, GRID = 16, 8  # 16 x 16 gradients and 8 x 8 mean colors describe a picture
GRADIENT_BYTES, COLOR_BYTES = HASH_SIDE * HASH_SIDE // 4, GRID * GRID * 3
# Near duplicates: few gradients differ, and colors in fewer than five cells (a small product on white fills no more).
# Of 400 shop photos all are found again that were encoded anew, scaled to a third, mirrored or watermarked, and 97% of
# those cropped or padded by 2 to 5%. Of the 63 in full color 2 to 5% pass for copies when they are dyed.
GRADIENT_DISTANCE, COLOR_DISTANCE, COLOR_CELLS = 0.2, 14, 5
BORDER = 16  # levels of brightness by which a picture differs from its border
NEIGHBORS = 64  # that a picture is compared with in each band
PAIRS = 1 << 13  # compared at once


def image_hashes(image) -> tuple[bytes, bytes]:
    """(gradients, colors) of an RGB picture as it is, mirrored and, where it has a plain border, without that border.

    One to three views, each of 64 bytes (256 bits of left-to-right and 256 of top-to-bottom gradients) and of 192
    (8 x 8 x 3 mean colors).
    """
    brightness = image.convert("L")
    border = brightness.getpixel((0, 0))
    views = [view := _small(image, brightness), [part[:, ::-1] for part in view]]
    box = brightness.point(lambda level: 255 * (abs(level - border) > BORDER)).getbbox()
    if box and min(box[2] - box[0], box[3] - box[1]) > HASH_SIDE and box != (0, 0, *image.size):
        views.append(_small(image.crop(box), brightness.crop(box)))
    return b"".join(_gradients(grey) for grey, _ in views), b"".join(grid.tobytes() for _, grid in views)


def _small(image, brightness) -> list:
    """[int16 [17, 17] of brightness, uint8 [8, 8, 3] of color] of a picture."""
    import numpy as np
    from PIL import Image

    grey = np.asarray(brightness.resize((HASH_SIDE + 1, HASH_SIDE + 1), Image.Resampling.BOX), np.int16)
    return [grey, np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), np.uint8)]


def _gradients(grey) -> bytes:
    """Where grey rises to the right, and where downwards, 512 bits."""
    import numpy as np

    # A step of 3 levels and more: what is flat stays flat when a picture is encoded again.
    across = grey[:-1, 1:] - grey[:-1, :-1] > 2
    down = grey[1:, :-1] - grey[:-1, :-1] > 2
    return np.packbits(np.stack([across, down])).tobytes()


def near_pairs(gradients, colors) -> Iterator[tuple[Any, Any]]:
    """Near duplicates among uint8 [N, 64] gradients and uint8 [N, 192] colors: two arrays of numbers at a time.

    Candidates agree in one of 32 bands of 16 gradients (of copies, most bands do). A band without any gradient is
    plain ground and says nothing; in a crowded band each picture meets its 64 neighbors in order of all gradients.
    """
    import numpy as np

    words = gradients.view(np.uint64)  # (N, 8)
    weight = np.bitwise_count(words).sum(axis=1, dtype=np.int16)
    ranked = np.argsort(gradients.view(f"S{GRADIENT_BYTES}").ravel()).astype(np.uint32)  # in order of all gradients
    for band in range(GRADIENT_BYTES // 2):
        key = gradients[ranked, 2 * band].astype(np.uint16) << 8 | gradients[ranked, 2 * band + 1]
        order = np.argsort(key, kind="stable").astype(np.uint32)
        key, order = key[order], ranked[order]
        for start in range(int(np.searchsorted(key, 1)), len(order), PAIRS):
            some, same = order[start : start + PAIRS + NEIGHBORS], key[start : start + PAIRS + NEIGHBORS]
            count = weight[some]
            bits = np.ascontiguousarray(words[some].T)  # numpy adds up rows six times as fast as columns
            for gap in range(1, min(NEIGHBORS + 1, len(some))):
                a, b = slice(min(PAIRS, len(some) - gap)), slice(gap, gap + PAIRS)
                if not (near := same[a] == same[b]).any():
                    break
                differ = np.bitwise_count(bits[:, a] ^ bits[:, b]).sum(axis=0, dtype=np.int16)
                near &= differ <= GRADIENT_DISTANCE * (count[a] + count[b])
                a, b = some[a][near], some[b][near]
                cells = np.abs(colors[a].astype(np.int16) - colors[b]).reshape(len(a), GRID * GRID, 3).max(axis=2)
                near = np.partition(cells, -COLOR_CELLS, axis=1)[:, -COLOR_CELLS] <= COLOR_DISTANCE
                yield a[near], b[near]


# --------------------------------------------------------------------------------------------------------------------
# Scan: what each photo holds, kept in parts between runs, which all processes of torchrun read


UNREADABLE = "unreadable file"  # perhaps only now, as from a network disk: tried again by the next run
PART_PHOTOS, PART_PIXELS = 256, 1 << 26  # of a part, at most; a killed process loses the one that it was making
PLACE = ["part", "offset", "length", "crc"]  # where a photo's JPEG lies, and its crc32


class Photo(NamedTuple):
    """What was made of one photo. Where it cannot be used, `reason` and `detail` say why and the rest is empty."""

    key: str  # size, time of change and path of its file
    source: str = ""  # sha256 of its file
    reason: str = ""
    detail: str = ""
    gradients: bytes = b""  # 64 a view
    colors: bytes = b""  # 192 a view
    jpeg: bytes = b""  # letterboxed


def photo_key(images: Path, image_path: str) -> str:
    """Size, time of change and path of the file that a row names. Raises BadImage."""
    path = common.resolve_image(images, image_path)
    try:
        stat = path.stat()
    except OSError as error:
        raise BadImage(UNREADABLE, error.strerror or str(error)) from None
    return f"{stat.st_size}:{stat.st_mtime_ns}:{path}"


def scan_photo(key: str, config: PrepConfig) -> Photo:
    """Decode a photo once, and make of it all that is needed."""
    try:
        data = Path(key.split(":", 2)[2]).read_bytes()
        # A JPEG is decoded at 1/2, 1/4 or 1/8 where that is still large enough, in half the time.
        image = common.fit(common.load_image(data, config.image_size), config.image_size)
        jpeg = io.BytesIO()
        common.letterbox(image, config.image_size).save(jpeg, "JPEG", quality=config.quality)
        return Photo(key, common.digest(data), "", "", *image_hashes(image), jpeg.getvalue())
    except BadImage as error:
        return Photo(key, "", error.reason, error.detail)
    except OSError as error:
        return Photo(key, "", UNREADABLE, error.strerror or str(error))


def scan_photos(keys: list[str], config: PrepConfig) -> list[Photo]:
    """Scan some photos. Runs in the workers."""
    return [scan_photo(key, config) for key in keys]


class PhotoParts:
    """Photos that were scanned, by whichever process, in parts below `place`, a folder or an S3 prefix.

    A part is NAME.jpegs, a tar, and, written last, NAME.parquet, all else. NAME is a digest of what photos depend on
    beside their files, and one of the Parquet file. What lies on S3 is read from copies of whole files in `local`.
    """

    def __init__(self, place: str, local: Path, config: PrepConfig):
        self.place, self.local, self.config = place, local, config
        self.made_with = common.digest([HASH_VERSION, *photo_settings(config)])[:16]

    def load(self) -> Any:
        """A DataFrame of all photos: Photo without looks and JPEG; views, PLACE, and photo, the row in the part."""
        import numpy as np
        import pandas as pd
        import pyarrow

        present = dict(common.list_files(self.place))
        names = [name.removesuffix(".jpegs") for name in present if name.startswith(self.made_with)]
        names = [name for name in names if f"{name}.parquet" in present and f"{name}.jpegs" in present]
        self.fetch(f"{name}.parquet" for name in names)
        columns, tables = ["key", "source", "reason", "detail", "views", *PLACE[1:]], {}
        for name in names:
            try:
                tables[name] = self._read(name, columns)
            except Fail as error:  # its photos are scanned again
                print(error, file=sys.stderr)
        empty = pyarrow.table([[] for _ in columns], columns)  # there may be no part yet
        photos = pyarrow.concat_tables([empty, *tables.values()], promote_options="default").to_pandas()
        part = np.repeat(np.arange(len(tables)), [len(table) for table in tables.values()])
        photos = photos.assign(part=pd.Categorical.from_codes(part, list(tables)))
        photos["photo"] = photos.groupby("part", observed=True).cumcount()
        return photos.drop_duplicates("key")

    def _read(self, name: str, columns: list[str]) -> Any:
        """Columns of a part that was fetched, as an Arrow table."""
        import pyarrow.parquet

        data = (self.local / f"{name}.parquet").read_bytes()
        if common.digest(data)[:16] != name[-16:]:
            raise self._damaged(name)
        return pyarrow.parquet.read_table(pyarrow.BufferReader(data), columns=columns, use_threads=False)

    def _damaged(self, name: str) -> Fail:
        """Remove a part; the error that says so."""
        for place, ending in itertools.product((self.place, self.local), (".parquet", ".jpegs")):
            common.remove(join(place, name + ending))
        return Fail(f"{join(self.place, name)}: was damaged and is removed; run again, which scans its photos again")

    def scan(self, keys: list[str], world: World) -> dict[str, str]:
        """Scan these photos and store them. When all processes have done so: {key: detail} of the unreadable ones."""
        workers = self.config.workers
        if workers == 1 < world.size:  # as in the workers that there are else
            common.keep_freed_memory()
        work, unreadable = functools.partial(scan_photos, config=self.config), {}
        photos = common.photo_pool(work, common.batches(keys, 16), workers)
        if world.main:
            what = f"scan, process 1 of {world.size}" if world.size > 1 else "scan"
            photos = common.progress(photos, what, len(keys), "photo")
        for some in common.batches(photos, min(PART_PHOTOS, 1 + PART_PIXELS // self.config.image_size**2)):
            unreadable |= {photo.key: photo.detail for photo in some if photo.reason == UNREADABLE}
            if readable := [photo for photo in some if photo.reason != UNREADABLE]:
                self._store(readable)
        return dict(itertools.chain.from_iterable(found.items() for found in world.share(unreadable)))

    def _store(self, photos: list[Photo]) -> None:
        """Write one part."""
        import pyarrow.parquet

        packed, facts, out = io.BytesIO(), [], io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, photo in enumerate(photos):
                member = tarfile.TarInfo(f"{number:04d}.jpg")
                member.size = len(photo.jpeg)
                at = tar.offset + tarfile.BLOCKSIZE, member.size, zlib.crc32(photo.jpeg)
                facts.append((*photo[:-1], *at, len(photo.gradients) // GRADIENT_BYTES))
                tar.addfile(member, io.BytesIO(photo.jpeg))
        columns = list(map(list, zip(*facts, strict=True)))
        pyarrow.parquet.write_table(pyarrow.table(columns, [*Photo._fields[:-1], *PLACE[1:], "views"]), out)
        name = f"{self.made_with}-{common.digest(out.getvalue())[:16]}"
        for place in dict.fromkeys((str(self.local), self.place)):
            common.upload_atomic(packed.getvalue(), join(place, f"{name}.jpegs"))
            common.upload_atomic(out.getvalue(), join(place, f"{name}.parquet"))

    def fetch(self, files: Iterable[str]) -> None:
        """Copy these files from S3 where they are not here yet."""
        from concurrent.futures import ThreadPoolExecutor

        files = [file for file in files if is_s3(self.place) and not (self.local / file).is_file()]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda file: common.download_atomic(join(self.place, file), self.local / file), files))

    def looks(self, items) -> tuple[Any, Any, Any]:
        """(positions int [V], gradients uint8 [V, 64], colors uint8 [V, 192]) of these items' views, in their order."""
        import numpy as np

        owners = np.repeat(np.arange(len(items), dtype=np.int32), items["views"])
        views = {"gradients": np.empty((len(owners), GRADIENT_BYTES), np.uint8)}
        views["colors"] = np.empty((len(owners), COLOR_BYTES), np.uint8)
        order = np.argsort(items["part"].cat.codes.to_numpy()[owners], kind="stable")  # part by part
        for name, photos in items.groupby("part", observed=True)["photo"]:
            table = self._read(name, list(views)).take(photos.to_numpy())
            for column, out in views.items():
                data = np.frombuffer(b"".join(table[column].to_pylist()), np.uint8).reshape(-1, out.shape[1])
                out[order[: len(data)]] = data
            order = order[len(data) :]
        return owners, *views.values()

    def jpeg(self, part: str, offset: int, length: int, crc: int) -> bytes:
        """The letterboxed JPEG at this place, of a part that was fetched."""
        data = b""
        with contextlib.suppress(FileNotFoundError), open(self.local / f"{part}.jpegs", "rb") as file:
            file.seek(offset)
            data = file.read(length)
        if zlib.crc32(data) != crc:
            raise self._damaged(part)
        return data

    def tidy(self, kept: set[str]) -> None:
        """Remove all other parts, also those of an earlier version, and what killed runs left."""
        for left in self.local.glob(".*.tmp"):
            left.unlink()
        for place in {self.place, str(self.local)}:
            for name, _ in common.list_files(place):
                if name.endswith((".jpegs", ".parquet", ".bin")) and name.rpartition(".")[0] not in kept:
                    common.remove(join(place, name))


def scan(rows, reasons, images: Path, parts: PhotoParts, config: PrepConfig, world: World) -> tuple:
    """(items, rejects, names of the parts to keep).

    items: a DataFrame of the photos that become samples, in order of ids and of their views: id, row (number), view
    (from 0 within a product), image_path, type (object type) and the columns of PhotoParts.load. Of each product the
    first usable photos count.
    """
    import pandas as pd

    queues: dict[str, list[tuple[int, str]]] = {}  # id -> (row, photo) still to be tried, the first ones last
    chosen, failed, unreadable, kept, photos = defaultdict(list), {}, {}, set(), parts.load()
    for id, candidates in common.products(rows, reasons):
        queues[id] = [(number, name) for number, _, names in candidates for name in dict.fromkeys(names)][::-1]
    while queues:
        turn = []
        for id, queue in queues.items():
            for _ in range(min(len(queue), config.photos - len(chosen[id]))):
                number, name = queue.pop()
                try:
                    turn.append((id, number, name, photo_key(images, name)))
                except BadImage as error:
                    failed.setdefault(number, (error.reason, error.detail))
        keys = pd.Series([key for *_, key in turn], dtype="str").drop_duplicates()
        if turn and len(new := keys[~keys.isin(photos["key"])].tolist()):
            del photos
            unreadable |= parts.scan(world.deal([new[rank :: world.size] for rank in range(world.size)]), world)
            photos = parts.load()
        here = photos[photos["key"].isin(keys)] if turn else photos.iloc[:0]
        kept |= {*here["part"]}
        bad = {key: (UNREADABLE, unreadable.get(key, "")) for key in keys[~keys.isin(here["key"])]}
        bad |= {key: why for key, *why in here.loc[here["reason"] != "", ["key", "reason", "detail"]].to_numpy(object)}
        for id, number, name, key in turn:
            if key in bad:
                failed.setdefault(number, bad[key])
            elif not chosen[id] or rows.at[chosen[id][0][0], "name"] == rows.at[number, "name"]:  # else another product
                chosen[id].append((number, name, key))
        queues = {id: queue for id, queue in queues.items() if queue and len(chosen[id]) < config.photos}
    world.deal([None] * world.size)  # there is nothing more to scan
    used = {found[0][0] for found in chosen.values() if found}
    why = {number: failed.get(number) or (reason or "missing image_path", "") for number, reason in reasons.items()}
    shown = rows.loc[[number for number in why if number not in used], ["id", "image_path", "name"]]
    found = zip(shown.to_dict("records"), map(why.get, shown.index), strict=True)
    rejects = [line | {"reason": reason, "detail": detail} for line, (reason, detail) in found]
    return _items(rows, chosen, photos), rejects, kept if config.limit is None else {*photos["part"]}


def _items(rows, chosen: dict[str, list[tuple]], photos):
    """The items of scan, from {id: [(row, name, key)]}."""
    import pandas as pd

    found = [
        (id, own[0][0], view, name, key)
        for id, own in sorted(chosen.items())
        for view, (_, name, key) in enumerate(own)
    ]
    items = pd.DataFrame(found, columns=["id", "row", "view", "image_path", "key"])
    if not found:
        return items
    items = items.merge(photos, how="left").drop(columns=["key", "reason", "detail"])
    # A further photo of many products (a logo, a table of sizes) shows none of them, and would make them one group.
    shared = items.groupby("source")["id"].nunique()
    items = items[(items["view"] == 0) | items["source"].isin(shared.index[shared <= common.SAME_PHOTO])]
    kinds = rows["object_type"].map(common.normalise_attribute) if "object_type" in rows else None
    return items.assign(type="" if kinds is None else kinds[items["row"]].to_numpy()).reset_index(drop=True)


# --------------------------------------------------------------------------------------------------------------------
# Groups: items that must be on the same side of the split


def group_items(items, looks: tuple[Any, Any, Any]) -> Any:
    """The group of each item, which are in order of ids: the smallest id among its exact and near duplicates.

    looks: positions of items int [V], gradients uint8 [V, 64] and colors uint8 [V, 192] of views. Union-find, in which
    a group is known by its smallest member: scipy's connected components would take 20 MB to import.
    """
    import numpy as np
    import pandas as pd

    parent = array("q", range(len(items)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def connect(some: Iterable[int], others: Iterable[int]) -> None:
        for i, j in zip(some.tolist(), others.tolist(), strict=True):
            i, j = sorted((find(i), find(j)))
            parent[j] = i

    for column in ("id", "source"):
        codes = pd.factorize(items[column])[0]
        first = np.unique(codes, return_index=True)[1][codes]  # the first item with the same value
        again = np.flatnonzero(first < np.arange(len(codes)))
        connect(first[again], again)
    owners, *views = looks
    for a, b in near_pairs(*views):
        connect(owners[a], owners[b])
    return items["id"].take([find(i) for i in range(len(items))]).reset_index(drop=True)


# --------------------------------------------------------------------------------------------------------------------
# Split


def choose_splits(groups: Iterable[tuple[int, int]], shares: dict[str, float]) -> list[str]:
    """The split of each group, given as (number of its object type, items).

    Groups come type by type, the large ones of a type first. Each goes where its type and the whole together lack most
    against the shares. So a type is off by an item or two, the whole by less than its largest group, and hundreds of
    one-item types add up right.
    """
    have, whole, chosen = defaultdict(Counter), Counter(), []
    for kind, size in groups:
        of_kind, of_all = have[kind].total() + size, whole.total() + size
        lack = {name: share * (of_kind + of_all) - have[kind][name] - whole[name] for name, share in shares.items()}
        # Half the catalogue in one group is no test set.
        too_large = size if size > of_all * 0.1 else 0
        split = max(shares, key=lambda name: lack[name] - (too_large if name != "train" else 0))
        have[kind][split] += size
        whole[split] += size
        chosen.append(split)
    return chosen


def draw(values: Iterable[list]) -> Any:
    """uint64: a number for each value, at random, and the same on every machine."""
    import numpy as np

    return np.fromiter((int(common.digest(value)[:16], 16) for value in values), np.uint64)


def parse_fold(text: str) -> tuple[int, int] | None:
    """(K, N) of "K/N", None of ""; raises Fail."""
    if not text:
        return None
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts) >= 3):
        raise Fail(f"--fold {text}: write K/N, part 0 to N-1 of at least 3, such as 0/5", USAGE)
    return int(part), int(parts)


def split_items(items, seed: int, fold: tuple[int, int] | None = None) -> Any:
    """The split of each item, an array of str. items: columns type and group.

    With `fold` (K, N) the catalogue is cut into N equal parts, the same for each K: part K is the test split, the part
    after it the validation split, and so over all K each item is tested on once.
    """
    import numpy as np
    import pandas as pd

    shares, sides = SHARES, {split: split for split in SPLITS}
    if fold:
        part, parts = fold
        shares = {str(i): 1 / parts for i in range(parts)}
        sides = dict.fromkeys(shares, "train") | {str(part): "test", str((part + 1) % parts): "validation"}
    group, groups = pd.factorize(items["group"])
    kind, kinds = pd.factorize(items["type"], sort=True)
    of_type, size = np.full(len(groups), len(kinds)), np.bincount(group)
    np.minimum.at(of_type, group, kind)
    order = np.lexsort((draw([seed, name] for name in groups), -size, of_type))
    chosen = np.empty(len(groups), object)
    facts = zip(of_type[order].tolist(), size[order].tolist(), strict=True)
    chosen[order] = [sides[name] for name in choose_splits(facts, shares)]
    return chosen[group]


# --------------------------------------------------------------------------------------------------------------------
# Samples and shards


class Shard(NamedTuple):
    """A shard to be: split/shard-000000, the number of its first sample, and the items that go into it, in order."""

    name: str
    first: int
    items: Any  # DataFrame


def in_order(items, seed: int) -> Any:
    """The items in the order in which they go into shards, split by split. It depends on the ids alone."""
    import numpy as np

    views = items["view"] if "view" in items else itertools.repeat(0)
    place = draw([seed, "place", id, *([view] if view else ())] for id, view in zip(items["id"], views, strict=False))
    return items.iloc[np.lexsort((place, items["split"].map(SPLITS.index)))]


def plan_shards(items, config: PrepConfig) -> list[Shard]:
    """Successive runs of each split's items, which are in order. Which share a shard depends on the items alone."""
    # No JPEG of this size at quality 95 is larger than its pixels; so the byte limit holds whatever the pictures.
    size = min(SHARD_SAMPLES, max(1, SHARD_BYTES // (3 * config.image_size**2 + 20_000)))
    counts, shards, first = items["split"].value_counts(), [], 0
    for split in SPLITS:
        for start in range(0, count := counts.get(split, 0), size):
            some = items.iloc[first : first + min(size, count - start)]
            shards.append(Shard(f"{split}/shard-{start // size:06d}", first, some))
            first += len(some)
    return shards


def sample_texts(items, rows, seed: int) -> list[tuple[bytes, bytes]]:
    """(json, txt) of each item. Samples of one product have its id, and where there are several, a view from 0."""
    used = {"id", "image_path", "clean_title", common.FURTHER, *common.ATTRIBUTES}
    own = items[["image_path", "group", "source", *(["view"] if "view" in items else ())]]
    texts = []
    for fields, facts in zip(rows.loc[items["row"]].to_dict("records"), own.to_dict("records"), strict=True):
        meta = common.clean_metadata(fields)
        row = {name: value for name, value in fields.items() if name not in used}
        record = {"id": fields["id"], **meta, **facts, "row": row}
        texts.append((common.canonical(record), common.pick_prompt(meta, fields["id"], seed).encode()))
    return texts


def write_shard(shard: Shard, texts: list, plan: str, parts: PhotoParts, output: str) -> dict:
    """Write one shard; returns its record. The same samples give the same bytes on any machine and day.

    An older shard goes, the record comes, then the shard, whole: a shard at its place is always that of its record.
    """
    import webdataset  # brings torch along: seconds that only a run pays that has a shard to write

    name = f"{shard.name}.tar"
    parts.fetch(f"{part}.jpegs" for part in shard.items["part"].unique())
    places = shard.items[PLACE].itertuples(index=False)
    local = parts.local / "shard.tar" if is_s3(output) else Path(output, name)
    with common.atomic_file(local) as temporary:
        with open(temporary, "wb") as file, webdataset.TarWriter(file, "", "", 0o644, encoder=False, mtime=0) as tar:
            for number, ((meta, prompt), place) in enumerate(zip(texts, places, strict=True), shard.first):
                tar.write({"__key__": f"{number:09d}", "jpg": parts.jpeg(*place), "json": meta, "txt": prompt})
        record = {
            "name": name, "samples": len(shard.items), "bytes": temporary.stat().st_size,
            "sha256": common.file_digest(temporary), "plan": plan,
        }  # fmt: skip
        if record["bytes"] > SHARD_BYTES:
            raise Fail(f"{name}: {record['bytes']} bytes, over the limit of {SHARD_BYTES}; shorten the columns")
        common.remove(join(output, name))
        common.upload_atomic(common.canonical(record), join(output, f"{shard.name}.json"))
    if is_s3(output):
        common.upload_atomic(local, join(output, name))
        local.unlink()
    return record


def write_dataset(shards: list[Shard], rows, parts: PhotoParts, output: str, config: PrepConfig, world: World) -> list:
    """Write the shards that are not there yet, each process its own; returns the records of all, in order.

    The first process of torchrun knows the shards and the items that go into them, and deals them out.
    """
    shards = world.deal([shards[rank :: world.size] for rank in range(world.size)])
    present, records, there = dict(common.list_files(output)), {}, 0
    for shard in common.progress(shards, "write", len(shards), "shard") if world.main else shards:
        texts = sample_texts(shard.items, rows, config.seed)
        contents = common.digest(b"\n".join(itertools.chain.from_iterable(texts)))
        plan = common.digest([photo_settings(config), shard.first, contents, shard.items["source"].tolist()])
        name, kept = f"{shard.name}.tar", f"{shard.name}.json"
        record = None
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged record: the shard is written anew
            if {name, kept} <= present.keys():
                found = json.loads(common.read_bytes(join(output, kept)))
                record = found if (found["plan"], found["bytes"]) == (plan, present[name]) else None
        there += record is not None
        records[shard.first] = record or write_shard(shard, texts, plan, parts, output)
    records, there = zip(*world.share((records, there)), strict=True)
    records = dict(itertools.chain.from_iterable(some.items() for some in records))
    if world.main:
        print(f"shards: {len(records)}, of which {sum(there)} were there already")
    return [record for _, record in sorted(records.items())]


def create_mini_train(records: list[dict], output: str) -> list[dict]:
    """mini_train: the first train shards again, under the same numbers."""
    mini = []
    for record in [record for record in records if record["name"].startswith("train/")][:MINI_SHARDS]:
        mini.append(record | {"name": record["name"].replace("train/", "mini_train/")})
        source, target = (join(output, one["name"]) for one in (record, mini[-1]))
        if is_s3(output):
            copy = {"CopySource": source.removeprefix("s3://")}
            common.s3_call(target, lambda client, to, key, copy=copy: client.copy_object(Bucket=to, Key=key, **copy))
        else:
            with common.atomic_file(target) as temporary:
                temporary.unlink(missing_ok=True)
                try:
                    os.link(source, temporary)
                except OSError:  # a file system without hard links
                    shutil.copyfile(source, temporary)
    return mini


def remove_stale(output: str, splits: dict[str, dict]) -> None:
    """Remove shards and records of an older, larger catalogue, and what killed runs left; no file of another name."""
    for split, content in splits.items():
        folder = join(output, split)
        wanted = {Path(shard["name"]).stem for shard in content["shards"]}
        for name, _ in common.list_files(folder):
            if re.fullmatch(r"shard-\d{6}\.(tar|json)", name) and Path(name).stem not in wanted:
                common.remove(join(folder, name))
        for left in Path(folder).glob(".shard-*.tmp"):
            left.unlink()


# --------------------------------------------------------------------------------------------------------------------
# Report: counts, leaks, and a contact sheet for the eye

SHEET = {"train": 32, "validation": 8, "test": 8}  # samples on the contact sheet, six rows of eight


def split_report(items) -> dict[str, Any]:
    """Counts by type and split, duplicate groups, and what a random split would have leaked."""
    import pandas as pd

    by_type = pd.crosstab(items["type"], items["split"]).reindex(columns=SPLITS, fill_value=0)
    by_type = by_type.rename(index={"": "unknown"})
    copies = items[items["group"].duplicated(keep=False)].groupby("group", sort=False)
    # The expected share of held-out items with a duplicate in train, had the splits been drawn item by item.
    sizes = Counter(items["group"].value_counts().tolist())
    held = 1 - SHARES["train"]
    leaked = sum(count * size * (1 - held ** (size - 1)) for size, count in sorted(sizes.items()))
    return {
        "splits": by_type.sum().to_dict(),
        "types": by_type.to_dict("index"),
        "duplicate_groups": copies["id"].agg(list).to_dict(),
        "random_split_leak": round(leaked / max(1, len(items)), 4),
    }


def print_report(report: dict[str, Any]) -> None:
    """The split report, short enough for a terminal."""
    import pandas as pd

    types = pd.DataFrame.from_dict(report["types"], "index").rename(lambda kind: kind[:23])
    types = types.iloc[(-types.sum(axis=1)).argsort(kind="stable")]  # the largest first
    rest = types[12:].sum().to_frame(f"{len(types) - 12} more types").T if len(types) > 12 else None
    print(pd.concat([types[:12], rest, types.sum().to_frame("all").T]).to_string())
    groups = report["duplicate_groups"]
    print(
        f"{len(groups)} duplicate groups of {sum(map(len, groups.values()))} items, each on one side; a random split "
        f"would have leaked {report['random_split_leak']:.1%} of validation and test"
    )


def contact_sheet(items, rows, parts: PhotoParts, seed: int) -> bytes:
    """A JPEG of 48 samples, the first of each split, each with prompt, split and type. The items are in order."""
    import pandas as pd
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    sheet = Image.new("RGB", (8 * 232, 6 * 284), "white")
    pen = ImageDraw.Draw(sheet)
    shown = pd.concat([items[items["split"] == split].head(count) for split, count in SHEET.items()])
    parts.fetch(f"{part}.jpegs" for part in shown["part"].unique())
    texts = sample_texts(shown, rows, seed)
    for position, (item, (_, prompt)) in enumerate(zip(shown.to_dict("records"), texts, strict=True)):
        x, y = position % 8 * 232 + 4, position // 8 * 284 + 4
        photo = common.load_image(parts.jpeg(*map(item.get, PLACE)))
        sheet.paste(photo.resize((224, 224)), (x, y))
        pen.text((x, y + 227), f"{item['split']} · {item['type'] or 'unknown'}"[:36], "#666666", font)
        for line, text in enumerate(textwrap.wrap(prompt.decode(), 36, max_lines=2, placeholder=" …")):
            pen.text((x, y + 243 + 15 * line), text, "black", font)
    out = io.BytesIO()
    sheet.save(out, "JPEG", quality=88)
    return out.getvalue()


def count_reasons(rejects: list[dict]) -> str:
    """ "3 missing file, 1 not an image"."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(r["reason"] for r in rejects).most_common())


# --------------------------------------------------------------------------------------------------------------------
# The whole stage, and its check


def prepare(args: argparse.Namespace, config: PrepConfig) -> int:
    """Scan, group, split, write, report; the manifest last. Under torchrun the first process plans for all."""
    import pyarrow

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # Arrow's own keeps what is freed from all others
    start, world = time.monotonic(), World(None)
    images, output = common.images_folder(args.images, args.input), args.output
    fold = parse_fold(config.fold)
    rows, reasons = (table[: config.limit] for table in common.read_catalogue(args.input))
    facts = [photo_settings(config), config.seed, config.limit, [common.file_digest(path) for path in args.input]]
    if len(set(world.share(common.digest(facts)))) > 1:
        raise Fail("the processes have different catalogues, settings or versions of Pillow; give all the same", USAGE)
    # Beside the shards, or for S3 beside the CSV, for each process: the lock, and photos or copies of them.
    folder = Path(f"{args.input[0]}.work", str(world.rank)) if is_s3(output) else Path(output, ".work")
    parts = PhotoParts(join(output, ".work"), folder, config)
    if not world.main:
        while (keys := world.deal()) is not None:
            parts.scan(keys, world)
        write_dataset([], rows, parts, output, config, world)
        if is_s3(output):
            shutil.rmtree(folder, ignore_errors=True)
        return DONE
    with common.exclusive(folder / "lock") as held:
        if not held:
            raise Fail(f"{folder}: in use by another 2_prepare.py; wait until it has ended")
        items, rejects, wanted = scan(rows, reasons, images, parts, config, world)
        if items.empty:
            why = count_reasons(rejects) or "it has no rows"
            raise Fail(f"{args.input[0]}: none of {len(rows)} rows is usable ({why}); check --images")
        items = assign_splits(items, parts, config.seed, fold)
        products = items[items["view"] == 0]
        items = in_order(items if items["view"].any() else items.drop(columns="view"), config.seed)
        common.remove(join(output, "manifest.json"))  # it never describes a folder that is being changed
        records = write_dataset(plan_shards(items, config), rows, parts, output, config, world)
        sheet = contact_sheet(items, rows, parts, config.seed)
        report = finish(products, records, rejects, sheet, len(rows), args, config, start)
        parts.tidy(wanted)
    print_report(report)
    return say_counts(rejects, len(rows), set(products["id"]), args, config, time.monotonic() - start)


def assign_splits(items, parts: PhotoParts, seed: int, fold: tuple[int, int] | None) -> Any:
    """The items with group and split."""
    import numpy as np

    distinct = np.flatnonzero(~items["source"].duplicated())  # items that share a photo are known by the first
    owners, *views = parts.looks(items.iloc[distinct])
    items = items.assign(group=group_items(items, (distinct[owners], *views)))
    first = items["view"] == 0  # of a product; its further photos follow
    return items.assign(split=split_items(items[first], seed, fold)[np.cumsum(first) - 1])


def finish(items, records, rejects, sheet: bytes, count: int, args, config: PrepConfig, start: float) -> dict[str, Any]:
    """Everything beside the shards, the manifest last; returns the split report."""
    output, splits = args.output, {}
    mini = create_mini_train(records, output)
    for split in (*SPLITS, "mini_train"):
        own = [record for record in (*records, *mini) if record["name"].startswith(f"{split}/")]
        listed = [{key: record[key] for key in ("name", "samples", "bytes", "sha256")} for record in own]
        splits[split] = {"samples": sum(record["samples"] for record in own), "shards": listed}
    remove_stale(output, splits)
    report = split_report(items)
    table, columns = io.StringIO(), ["id", "split", "group"]
    common.csv_writer(table).writerows([columns, *items[columns].itertuples(index=False, name=None)])
    listing = table.getvalue().encode()
    manifest = {
        "format": FORMAT,
        "settings": {"seed": config.seed, "image_size": config.image_size, "quality": config.quality}
        | ({"photos": config.photos} if config.photos > 1 else {}),
        "versions": common.versions("pillow", "numpy", "webdataset"),
        "fold": config.fold,
        "splits": splits,
        "counts": {"input": count, "written": len(items), "rejected": len(rejects)},
        "items_sha256": common.digest(listing),
    }
    sidecar = {"settings": dataclasses.asdict(config), "counts": manifest["counts"]}
    sidecar |= {"seconds": round(time.monotonic() - start, 2), "versions": manifest["versions"]}
    sidecar["inputs"] = {path: common.file_digest(path) for path in args.input}
    for name, data in {
        "items.csv": listing,
        "rejects.jsonl": b"".join(line + b"\n" for line in sorted(map(common.canonical, rejects))),
        "split_report.json": json.dumps(report, indent=2, ensure_ascii=False).encode(),
        "contact_sheet.jpg": sheet,
        "prepare.json": json.dumps(sidecar, indent=2).encode(),
        "manifest.json": json.dumps(manifest, indent=1, ensure_ascii=False).encode(),
    }.items():
        common.upload_atomic(data, join(output, name))
    return report


def say_counts(rejects: list[dict], count: int, written: set[str], args, config: PrepConfig, seconds: float) -> int:
    """Print what became of all rows; returns the exit code. Raises Fail for too many rejects."""
    if rejects:
        print(f"rejected: {count_reasons(rejects)}; see {join(args.output, 'rejects.jsonl')}")
    print(f"input {count} = written {len(written)} + rejected {len(rejects)}")
    print(f"{count / max(seconds, 1e-9):.0f} rows a second; look at {join(args.output, 'contact_sheet.jpg')}")
    lost = sum(line["id"] not in written for line in rejects)  # a product of which another row is written is not
    if lost > config.max_failed * count:
        raise Fail(
            f"{lost} of {count} rows were rejected, more than --max-failed {config.max_failed}; "
            "mend those rows (see rejects.jsonl) or raise --max-failed"
        )
    return DONE


def shard_digest(path: str) -> str:
    """Sha256 of a shard; one on S3 passes through a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        if is_s3(path):
            common.download_atomic(path, path := Path(folder, "shard"))
        return common.file_digest(path)


def verify(output: str) -> int:
    """Compare a shard folder with its manifest; prints each fault and returns the exit code."""
    manifest = common.load_manifest(output)
    present = dict(common.list_files(output))
    listed = {shard["name"]: shard for split in manifest["splits"].values() for shard in split["shards"]}
    faults = []
    for name, shard in common.progress(listed.items(), "verify", len(listed), "shard"):
        if name not in present:
            faults.append(f"{name}: missing")
        elif present[name] != shard["bytes"]:
            faults.append(f"{name}: {present[name]} bytes, {shard['bytes']} by the manifest")
        elif shard_digest(join(output, name)) != shard["sha256"]:
            faults.append(f"{name}: content is not that of the manifest")
    faults += [f"{name}: not in the manifest" for name in present if name.endswith(".tar") and name not in listed]
    for fault in faults:
        print(fault)
    remedy = "; remove those shards and run 2_prepare.py again, which makes them anew" if faults else ""
    print(f"{len(listed)} shards checked, {len(faults)} faults{remedy}")
    return FAILED if faults else DONE


# --------------------------------------------------------------------------------------------------------------------
# Command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", help="cleaned.csv, one or several")
    parser.add_argument("--images", help="folder that image_path is relative to (default: the CSV's)")
    parser.add_argument("--output", required=True, help="folder or s3://bucket/prefix for the shards")
    parser.add_argument("--verify", action="store_true", help="compare --output with its manifest, and stop")
    common.add_flags(parser, PrepConfig)
    return parser


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.verify:
        return verify(args.output)
    if not args.input:
        raise Fail("--input is needed: the cleaned CSV", USAGE)
    config = common.from_flags(PrepConfig, args)
    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # torchrun's, on this machine
    config = dataclasses.replace(config, workers=config.workers or cores)
    if config.image_size is None:
        side = common.image_side(config.model, common.model_config(common.model_source(config.model)[0]))
        config = dataclasses.replace(config, image_size=max(LEAST_SIDE, side))
    return prepare(args, config)


if __name__ == "__main__":
    sys.exit(main())
