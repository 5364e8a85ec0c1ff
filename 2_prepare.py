"""Stage 2: split the cleaned catalogue without leaks and write it as WebDataset shards, the same bytes every time.

Reads   --input: cleaned.csv (id, name, image_path, clean_title, style, material, color, object_type) and --images
Writes  --output, a folder or s3://bucket/prefix: {train,validation,test,mini_train}/shard-%06d.tar, each with a small
        .json record; items.csv (id, split, duplicate group), rejects.jsonl, split_report.json, contact_sheet.jpg,
        prepare.json, and manifest.json last

    python 2_prepare.py --input data/cleaned.csv --images data/photos --output data/shards
    python 2_prepare.py --input data/cleaned.csv --images data/photos --output /tmp/first --limit 50 --image-size 64
    python 2_prepare.py --verify --output data/shards
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import json
import os
import struct
import sys
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
from common import DONE, FAILED, SPLITS, USAGE, BadImage, Fail, is_s3, join, setting

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
    image_size: int | None = setting(None, "pixels a side (unset: what --model takes, at least 224)", low=1, high=4096)
    quality: int = setting(95, "JPEG quality in the shards", low=1, high=100)
    seed: int = setting(42, "of the split, the order and the prompt templates")
    fold: str = setting("", "K/N: of N equal parts of the catalogue test on part K (from 0), validate on the next")
    max_failed: float = setting(0.05, "share of rows that may be rejected before the exit code is 1", low=0, high=1)
    limit: int | None = setting(None, "use the first N rows only", low=1)
    photos: int = setting(1, "photos of a product that become samples, all of them in one split", low=1, high=100)


def photo_settings(config: PrepConfig) -> list:
    """What a JPEG in the shards depends on beside the photo's file."""
    return [FORMAT, config.image_size, config.quality, common.versions("pillow")["pillow"]]


# --------------------------------------------------------------------------------------------------------------------
# Storage: what only this stage does to files and objects


def remove(path: str) -> None:
    """Delete a file or object if it is there."""
    if is_s3(path):
        common.s3_call(path, lambda client, bucket, key: client.delete_object(Bucket=bucket, Key=key))
    else:
        Path(path).unlink(missing_ok=True)


def copy_atomic(source: str, target: str) -> None:
    """The same content under a second path of the same storage: a hard link where possible, S3's own copy there."""
    if is_s3(source):
        bucket, _, key = source.removeprefix("s3://").partition("/")
        place = {"Bucket": bucket, "Key": key}
        common.s3_call(target, lambda client, to, key: client.copy_object(Bucket=to, Key=key, CopySource=place))
        return
    with common.atomic_file(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            import shutil

            shutil.copyfile(source, temporary)


@contextlib.contextmanager
def atomic_output(path: str, scratch: Path) -> Iterator[Path]:
    """Give a temporary local path; on a clean exit its content stands at `path`, local or on S3, whole."""
    if not is_s3(path):
        with common.atomic_file(path) as temporary:
            yield temporary
        return
    temporary = scratch / "upload.tmp"
    try:
        yield temporary
        common.upload_atomic(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def abort_uploads(folder: str) -> None:
    """End the multipart uploads below an S3 folder that killed runs left: nobody sees their parts, but they cost money.

    A policy that forbids listing them is no failure.
    """

    def act(client, bucket: str, key: str) -> None:
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=key):
            for upload in page.get("Uploads", []) if page["Bucket"] else ():  # a cut answer lacks it: KeyError
                client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    try:
        common.s3_call(f"{folder.rstrip('/')}/", act)
    except Fail as error:
        if "S3 answers" not in str(error):
            raise


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
    views = [view := _small(image, brightness), [part[:, ::-1] for part in view]]
    box = brightness.point(_unlike_border(brightness.getpixel((0, 0)))).getbbox()
    if box and min(box[2] - box[0], box[3] - box[1]) > HASH_SIDE and box != (0, 0, *image.size):
        views.append(_small(image.crop(box), brightness.crop(box)))
    return b"".join(_gradients(grey) for grey, _ in views), b"".join(grid.tobytes() for _, grid in views)


@functools.cache
def _unlike_border(level: int) -> list[int]:
    """What Image.point() needs to blacken all levels that are near to that of the border."""
    return [255 * (abs(other - level) > BORDER) for other in range(256)]


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


def near_pairs(gradients, colors) -> Iterator[tuple[int, int]]:
    """Pairs of near duplicates among uint8 [N, 64] gradients and uint8 [N, 192] colors, without comparing all pairs.

    Candidates agree in one of 32 bands of 16 gradients (of copies, most bands do). A band without any gradient is
    plain ground and says nothing; in a crowded band each picture meets its 64 neighbors in order of all gradients.
    """
    import numpy as np

    words = gradients.view(np.uint64)  # (N, 8)
    weight = np.bitwise_count(words).sum(axis=1, dtype=np.int32)
    ranked = np.argsort(gradients.view(f"S{GRADIENT_BYTES}").ravel()).astype(np.uint32)  # in order of all gradients
    for band in range(GRADIENT_BYTES // 2):
        key = gradients[ranked, 2 * band].astype(np.uint16) << 8 | gradients[ranked, 2 * band + 1]
        order = np.argsort(key, kind="stable").astype(np.uint32)
        key, order = key[order], ranked[order]
        plain = np.searchsorted(key, 1)
        key, order = key[plain:], order[plain:]
        for gap in range(1, min(NEIGHBORS + 1, len(order))):
            same = np.flatnonzero(key[:-gap] == key[gap:])
            if not len(same):
                break
            for start in range(0, len(same), PAIRS):
                place = same[start : start + PAIRS]
                a, b = order[place], order[place + gap]
                differ = np.bitwise_count(words[a] ^ words[b]).sum(axis=1, dtype=np.int32)
                near = differ <= GRADIENT_DISTANCE * (weight[a] + weight[b])
                a, b = a[near], b[near]
                cells = np.abs(colors[a].astype(np.int16) - colors[b]).reshape(len(a), GRID * GRID, 3).max(axis=2)
                near = np.partition(cells, -COLOR_CELLS, axis=1)[:, -COLOR_CELLS] <= COLOR_DISTANCE
                yield from zip(a[near].tolist(), b[near].tolist(), strict=True)


# --------------------------------------------------------------------------------------------------------------------
# Scan: what each photo holds, kept between runs


UNREADABLE = "unreadable file"  # perhaps only now, as from a network disk: tried again by the next run


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


def scan_photos(keys: list[str], config: PrepConfig) -> list[Photo]:
    """Decode each photo once, and make of it all that is needed. Runs in the workers."""
    return [_scan_photo(key, config) for key in keys]


def _scan_photo(key: str, config: PrepConfig) -> Photo:
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


class PhotoCache:
    """Photos by key in one scratch file, so that a later run decodes only what is new.

    The file begins with a digest of what its photos depend on; each record is the length and crc32 of its payload, and
    the payload. It is only appended to; what a killed run left unfinished, or a damaged disk spoilt, is cut off.
    """

    FRAME = struct.Struct("<II")
    LARGEST = 1 << 27  # bytes of a payload, more than any JPEG of 4,096 x 4,096 has

    def __init__(self, path: Path, config: PrepConfig):
        self.path, self.config, self.offsets = path, config, {}
        head = common.digest([HASH_VERSION, *photo_settings(config)]).encode() + b"\n"
        path.touch()
        self.file = open(path, "r+b")
        if self.file.readline(len(head)) != head:
            self.file.truncate(0)
            self.file.seek(0)
            self.file.write(head)
            self.file.flush()
        end = self.file.tell()
        while (payload := self._next_payload()) is not None:
            key, _, reason, *_ = json.loads(payload.partition(b"\n")[0])
            if reason != UNREADABLE:
                self.offsets[key] = end
            end += self.FRAME.size + len(payload)
        if cut := path.stat().st_size - end:
            print(f"{path}: {cut} bytes at its end are damaged; those photos are scanned again", file=sys.stderr)
            self.file.truncate(end)

    def __enter__(self) -> PhotoCache:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def _next_payload(self) -> bytes | None:
        """The payload of the record at the file's position, None where there is none or it is damaged."""
        frame = self.file.read(self.FRAME.size)
        if len(frame) < self.FRAME.size:
            return None
        length, crc = self.FRAME.unpack(frame)
        payload = self.file.read(length) if length <= self.LARGEST else b""
        return payload if len(payload) == length and zlib.crc32(payload) == crc else None

    def add(self, photo: Photo) -> None:
        """Append one photo."""
        facts = json.dumps([*photo[:4], len(photo.gradients), len(photo.colors)]).encode()
        payload = b"".join((facts, b"\n", *photo[4:]))
        self.offsets[photo.key] = self.file.seek(0, os.SEEK_END)
        self.file.write(self.FRAME.pack(len(payload), zlib.crc32(payload)) + payload)

    def read(self, offset: int) -> Photo:
        """The photo whose record begins there."""
        self.file.seek(offset)
        if (payload := self._next_payload()) is None:
            raise Fail(f"{self.path}: damaged while it was in use; run the same command again")
        facts, _, rest = payload.partition(b"\n")
        *names, gradients, colors = json.loads(facts)
        return Photo(*names, rest[:gradients], rest[gradients : gradients + colors], rest[gradients + colors :])

    def shrink(self, keys: dict[str, Any]) -> None:
        """Leave out all but these photos, where they are less than half."""
        if 2 * len(keys) >= len(self.offsets):
            return
        with common.atomic_file(self.path) as temporary:
            temporary.unlink(missing_ok=True)
            smaller = PhotoCache(temporary, self.config)
            for key in keys:
                if key in self.offsets:
                    smaller.add(self.read(self.offsets[key]))
            smaller.file.flush()
        self.file.close()
        self.file, self.offsets = smaller.file, smaller.offsets


def read_rows(args: argparse.Namespace, config: PrepConfig) -> tuple[Any, Any]:
    """(rows, reasons) as common.read_catalogue gives them, --limit taken into account."""
    rows, reasons = common.read_catalogue(args.input)
    if args.group_by and args.group_by not in rows.columns:
        raise Fail(f"--group-by {args.group_by}: no such column in {args.input[0]}", USAGE)
    return rows.iloc[: config.limit], reasons.iloc[: config.limit]


def fields_of(rows, number: int) -> dict[str, str]:
    """One row as {column: value}."""
    return rows.loc[number].to_dict()


def reject(fields: dict[str, str], reason: str, detail: str = "") -> dict[str, str]:
    """One line of rejects.jsonl; without the row's number, for rows in another order are the same catalogue."""
    named = {name: fields[name] for name in ("id", "image_path", "name")}
    return named | {"reason": reason, "detail": detail}


def scan(rows, reasons, images: Path, cache: PhotoCache, config: PrepConfig, workers: int) -> tuple[Any, list[dict]]:
    """(items, rejects). items: a DataFrame of the photos that become samples, in order of ids and of their views.

    Columns: id, row (number), view (from 0 within a product), image_path, type (object type), photo (offset in the
    cache) and source (sha256 of the photo's file). Of each product the first usable photos count.
    """
    queues: dict[str, list[tuple[int, str]]] = {}  # id -> (row, photo) still to be tried, the first ones last
    chosen, failed, wanted = defaultdict(list), {}, {}
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
        wanted |= (keys := dict.fromkeys(key for *_, key in turn))
        _scan_new([key for key in keys if key not in cache.offsets], cache, config, workers)
        for id, number, name, key in turn:
            photo = cache.read(cache.offsets[key])
            if photo.reason:
                failed.setdefault(number, (photo.reason, photo.detail))
            elif not chosen[id] or rows.at[chosen[id][0][0], "name"] == rows.at[number, "name"]:  # else another product
                chosen[id].append((number, name, key, photo.source))
        queues = {id: queue for id, queue in queues.items() if queue and len(chosen[id]) < config.photos}
    if config.limit is None:  # else the next run, without it, wants the others again
        cache.shrink(wanted)
    used = {found[0][0] for found in chosen.values() if found}
    why = {number: failed.get(number) or (reason or "missing image_path", "") for number, reason in reasons.items()}
    rejects = [reject(fields_of(rows, number), *reason) for number, reason in why.items() if number not in used]
    return _items(rows, chosen, cache), rejects


def _scan_new(keys: list[str], cache: PhotoCache, config: PrepConfig, workers: int) -> None:
    """Add photos to the cache."""
    made = common.photo_pool(functools.partial(scan_photos, config=config), common.batches(keys, 16), workers)
    for photo in common.progress(made, "scan", len(keys), "photo"):
        cache.add(photo)


def _items(rows, chosen: dict[str, list[tuple]], cache: PhotoCache):
    """The items of scan, from {id: [(row, name, key, source)]}."""
    import pandas as pd

    found = [
        (id, photos[0][0], view, name, cache.offsets[key], source)
        for id, photos in sorted(chosen.items())
        for view, (_, name, key, source) in enumerate(photos)
    ]
    items = pd.DataFrame(found, columns=["id", "row", "view", "image_path", "photo", "source"])
    # A further photo of many products (a logo, a table of sizes) shows none of them, and would make them one group.
    shared = items.groupby("source")["id"].nunique()
    items = items[(items["view"] == 0) | items["source"].isin(shared.index[shared <= common.SAME_PHOTO])]
    kinds = rows["object_type"].map(common.normalise_attribute) if "object_type" in rows else None
    return items.assign(type="" if kinds is None else kinds[items["row"]].to_numpy()).reset_index(drop=True)


# --------------------------------------------------------------------------------------------------------------------
# Groups: items that must be on the same side of the split


class Groups:
    """Union-find over 0..n-1; a group is known by its smallest member."""

    def __init__(self, count: int):
        self.parent = array("q", range(count))

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        i, j = sorted((self.find(i), self.find(j)))
        self.parent[j] = i

    def join_equal(self, values: Iterable[str]) -> None:
        """Join those whose value is the same; "" equals nothing."""
        first: dict[str, int] = {}
        for i, value in enumerate(values):
            if value and (j := first.setdefault(value, i)) != i:
                self.join(i, j)


def group_items(items, cache: PhotoCache, values: Iterable[str] = ()) -> list[str]:
    """The group of each item: the smallest id among its exact and near duplicates, and those with the same value."""
    import numpy as np

    groups = Groups(len(items))
    groups.join_equal(items["id"].tolist())
    groups.join_equal(items["source"].tolist())
    groups.join_equal(values)
    owners, gradients, colors = array("q"), bytearray(), bytearray()
    distinct = ~items["source"].duplicated().to_numpy()  # items that share a photo are known by the first
    for position in np.flatnonzero(distinct).tolist():
        photo = cache.read(int(items["photo"].iat[position]))
        owners.extend([position] * (len(photo.gradients) // GRADIENT_BYTES))
        gradients += photo.gradients
        colors += photo.colors
    views = (np.frombuffer(gradients, np.uint8).reshape(-1, GRADIENT_BYTES),
             np.frombuffer(colors, np.uint8).reshape(-1, COLOR_BYTES))  # fmt: skip
    for i, j in near_pairs(*views):
        groups.join(owners[i], owners[j])
    ids = items["id"].tolist()
    return [ids[groups.find(i)] for i in range(len(ids))]


# --------------------------------------------------------------------------------------------------------------------
# Split


def choose_splits(groups: Iterable[tuple[str, str, int, str | None]], shares: dict[str, float]) -> dict[str, str]:
    """{group: split} for each (group, object type, size, split that it must keep).

    Groups come type by type, the large ones of a type first, those that must stay before all. Each goes where its type
    and the whole together lack most against the shares. So a type is off by an item or two, the whole by less than its
    largest group, and hundreds of one-item types add up right.
    """
    have, whole, chosen = defaultdict(Counter), Counter(), {}
    for group, kind, size, split in groups:
        if not split:
            of_kind, of_all = sum(have[kind].values()) + size, sum(whole.values()) + size
            lack = {name: share * (of_kind + of_all) - have[kind][name] - whole[name] for name, share in shares.items()}
            # Half the catalogue in one group is no test set.
            too_large = size if size > of_all * 0.1 else 0
            split = max(shares, key=lambda name: lack[name] - (too_large if name != "train" else 0))
        have[kind][split] += size
        whole[split] += size
        chosen[group] = split
    return chosen


def parse_fold(text: str) -> tuple[int, int] | None:
    """(K, N) of "K/N", None of ""; raises Fail."""
    part, _, parts = text.partition("/")
    if not text:
        return None
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts) >= 3):
        raise Fail(f"--fold {text}: write K/N, part 0 to N-1 of at least 3, such as 0/5", USAGE)
    return int(part), int(parts)


def split_items(items, seed: int, fold: tuple[int, int] | None = None, kept: dict[str, str] | None = None) -> list[str]:
    """The split of each item; those in `kept` stay where they were. items: columns id, type and group.

    With `fold` (K, N) the catalogue is cut into N equal parts, the same for each K: part K is the test split, the part
    after it the validation split, and so over all K each item is tested on once.
    """
    shares, sides = SHARES, {split: split for split in SPLITS}
    if fold:
        part, parts = fold
        shares = {str(i): 1 / parts for i in range(parts)}
        sides = dict.fromkeys(shares, "train") | {str(part): "test", str((part + 1) % parts): "validation"}
    kept = kept or {}
    groups: dict[str, list] = {}  # group: [split to keep, object type, size]
    rows = items[["id", "type", "group"]].to_numpy(object).tolist()
    for id, kind, group in rows:
        known = groups.setdefault(group, [kept.get(id), kind, 0])
        known[0] = min(filter(None, (known[0], kept.get(id))), default=None)
        known[1], known[2] = min(known[1], kind), known[2] + 1
    order = sorted(
        (side is None, side or "", kind, -size, common.digest([seed, group]), group)
        for group, (side, kind, size) in groups.items()
    )
    chosen = choose_splits(((group, kind, -size, side) for _, side, kind, size, _, group in order), shares)
    return [kept.get(id) or sides[chosen[group]] for id, _, group in rows]


def kept_splits(manifest: str | None) -> dict[str, str]:
    """{id: split} of an older run, from the items.csv beside its manifest.

    While a run is under way its folder has no manifest; then items.csv, which is older or of that very run, will do.
    """
    if not manifest:
        return {}
    base = manifest.removesuffix("manifest.json") or "."
    path = join(base, "items.csv")
    listed = common.exists(path)
    if common.exists(join(base, "manifest.json")) or not listed:
        expected = common.load_manifest(base).get("items_sha256")
        if not listed or common.digest(common.read_bytes(path)) != expected:
            raise Fail(f"{path}: does not belong to that manifest; give --keep-split a whole shard folder")
    text = io.StringIO(common.read_bytes(path).decode(), newline="")
    return {row["id"]: row["split"] for row in csv.DictReader(text)}


# --------------------------------------------------------------------------------------------------------------------
# Samples and shards


class Shard(NamedTuple):
    """A shard to be: its name, the number of its first sample, and the rows that go into it, in order."""

    name: str
    first: int
    rows: list[int]

    @property
    def record(self) -> str:
        """Name of the file that says that the shard is finished, and what it was made of."""
        return self.name.removesuffix(".tar") + ".json"


def sample_text(fields: dict[str, str], facts: dict[str, Any], seed: int) -> tuple[bytes, bytes]:
    """(json, txt) of one item. Samples of one product have its id, and where there are several, a view from 0."""
    meta = common.clean_metadata(fields)
    used = {"id", "image_path", "clean_title", common.FURTHER, *common.ATTRIBUTES}
    row = {name: value for name, value in fields.items() if name not in used}
    record = {"id": fields["id"], **meta, **facts, "row": row}
    return common.canonical(record), common.pick_prompt(meta, fields["id"], seed).encode()


def draw_order(items, seed: int) -> dict[str, list[int]]:
    """{split: row numbers in the order in which they go into shards}, which depends on the ids alone."""
    keys = zip(items.index, items["id"].tolist(), items["view"].tolist(), strict=True)
    drawn = {number: common.digest([seed, "place", id, *([view] if view else ())]) for number, id, view in keys}
    return {split: sorted(items.index[items["split"] == split], key=drawn.get) for split in SPLITS}


def plan_shards(order: dict[str, list[int]], config: PrepConfig) -> list[Shard]:
    """Successive runs of each split's order. Which items share a shard depends on the items alone."""
    # No JPEG of this size at quality 95 is larger than its pixels; so the byte limit holds whatever the pictures.
    size = min(SHARD_SAMPLES, max(1, SHARD_BYTES // (3 * config.image_size**2 + 20_000)))
    shards, first = [], 0
    for split, numbers in order.items():
        for start in range(0, len(numbers), size):
            rows = numbers[start : start + size]
            shards.append(Shard(f"{split}/shard-{start // size:06d}.tar", first, rows))
            first += len(rows)
    return shards


def sample_texts(numbers: list[int], rows, items, seed: int) -> list[tuple[bytes, bytes]]:
    """(json, txt) of each of these rows."""
    some = items.loc[numbers]
    fields = [dict(zip(rows.columns, row, strict=True)) for row in rows.loc[some["row"]].to_numpy(object).tolist()]
    names = ["image_path", "group", "source", *(["view"] if items["view"].any() else ())]
    return [sample_text(*one, seed) for one in zip(fields, some[names].to_dict("records"), strict=True)]


def write_shard(shard: Shard, texts: list, offsets: Iterable[int], plan: str, cache: PhotoCache, output: str) -> dict:
    """Write one shard; returns its record. The same samples give the same bytes on any machine and day.

    An older shard goes, the record comes, then the shard, whole: a shard at its place is always that of its record.
    """
    import webdataset  # brings torch along: seconds that only a run pays that has a shard to write

    with atomic_output(join(output, shard.name), cache.path.parent) as temporary:
        with open(temporary, "wb") as file, webdataset.TarWriter(file, "", "", 0o644, encoder=False, mtime=0) as tar:
            for number, ((meta, prompt), offset) in enumerate(zip(texts, offsets, strict=True), shard.first):
                tar.write({"__key__": f"{number:09d}", "jpg": cache.read(offset).jpeg, "json": meta, "txt": prompt})
        record = {
            "name": shard.name, "samples": len(shard.rows), "bytes": temporary.stat().st_size,
            "sha256": common.file_digest(temporary), "plan": plan,
        }  # fmt: skip
        if record["bytes"] > SHARD_BYTES:
            raise Fail(f"{shard.name}: {record['bytes']} bytes, over the limit of {SHARD_BYTES}; shorten the columns")
        remove(join(output, shard.name))
        common.upload_atomic(common.canonical(record), join(output, shard.record))
    return record


def finished_record(output: str, shard: Shard, plan: str, present: dict[str, int]) -> dict[str, Any] | None:
    """The record of a shard that is there already with just this content, else None."""
    if shard.name not in present or shard.record not in present:
        return None
    try:
        record = json.loads(common.read_bytes(join(output, shard.record)))
        return record if record["plan"] == plan and record["bytes"] == present[shard.name] else None
    except (ValueError, KeyError, TypeError):
        return None


def write_dataset(shards: list[Shard], rows, items, cache: PhotoCache, output: str, config: PrepConfig) -> list[dict]:
    """Write the shards that are not there yet; returns the records of all."""
    present, records, there = dict(common.list_files(output)), [], 0
    remove(join(output, "manifest.json"))  # it never describes a folder that is being changed
    for shard in common.progress(shards, "write", len(shards), "shard"):
        texts = sample_texts(shard.rows, rows, items, config.seed)
        sources = items.loc[shard.rows, "source"].tolist()
        contents = common.digest(b"\n".join(itertools.chain.from_iterable(texts)))
        plan = common.digest([photo_settings(config), shard.first, contents, sources])
        record = finished_record(output, shard, plan, present)
        there += record is not None
        offsets = items.loc[shard.rows, "photo"].tolist()
        records.append(record or write_shard(shard, texts, offsets, plan, cache, output))
    print(f"shards: {len(shards)}, of which {there} were there already")
    return records


def create_mini_train(records: list[dict], output: str) -> list[dict]:
    """mini_train: the first train shards again, under the same numbers."""
    mini = []
    for record in [record for record in records if record["name"].startswith("train/")][:MINI_SHARDS]:
        name = record["name"].replace("train/", "mini_train/")
        copy_atomic(join(output, record["name"]), join(output, name))
        mini.append(record | {"name": name})
    return mini


def remove_stale(output: str, splits: dict[str, dict]) -> None:
    """Remove shards and records of an older, larger catalogue, and what killed runs left."""
    for split, content in splits.items():
        folder = join(output, split)
        wanted = {Path(shard["name"]).stem for shard in content["shards"]}
        for name, _ in common.list_files(folder):
            if Path(name).stem not in wanted:
                remove(join(folder, name))
        if is_s3(output):
            abort_uploads(folder)
        else:
            for left in Path(folder).glob(".*.tmp"):
                left.unlink()


# --------------------------------------------------------------------------------------------------------------------
# Report: counts, leaks, and a contact sheet for the eye

SHEET = {"train": 32, "validation": 8, "test": 8}  # samples on the contact sheet, six rows of eight


def split_report(items) -> dict[str, Any]:
    """Counts by type and split, duplicate groups, and what a random split would have leaked."""
    by_type: dict[str, dict[str, int]] = {}
    for (kind, split), count in items.groupby(["type", "split"]).size().items():
        by_type.setdefault(kind or "unknown", dict.fromkeys(SPLITS, 0))[split] += int(count)
    groups: dict[str, list[str]] = {}
    copies = items[items["group"].duplicated(keep=False)]
    for id, group in zip(copies["id"], copies["group"], strict=True):
        groups.setdefault(group, []).append(id)
    sides = copies.groupby("group")["split"].nunique()
    # The expected share of held-out items with a duplicate in train, had the splits been drawn item by item.
    sizes = Counter(items["group"].value_counts().tolist())
    held = 1 - SHARES["train"]
    leaked = sum(count * size * (1 - held ** (size - 1)) for size, count in sorted(sizes.items()))
    return {
        "splits": {split: sum(counts[split] for counts in by_type.values()) for split in SPLITS},
        "types": by_type,
        "duplicate_groups": groups,
        "groups_kept_apart": sorted(sides.index[sides > 1]),  # only by --keep-split, which moves nothing
        "random_split_leak": round(leaked / max(1, len(items)), 4),
    }


def print_report(report: dict[str, Any]) -> None:
    """The split report, short enough for a terminal."""
    largest = sorted(report["types"].items(), key=lambda item: -sum(item[1].values()))
    lines = largest[:12]
    if len(largest) > 12:
        rest = {split: sum(counts[split] for _, counts in largest[12:]) for split in SPLITS}
        lines.append((f"{len(largest) - 12} more types", rest))
    print(f"{'object type':<24}{'train':>8}{'validation':>12}{'test':>8}")
    for kind, counts in [*lines, ("all", report["splits"])]:
        print(f"{kind[:23]:<24}{counts['train']:>8}{counts['validation']:>12}{counts['test']:>8}")
    groups, apart = report["duplicate_groups"], report["groups_kept_apart"]
    where = f"{len(apart)} of them kept apart by --keep-split" if apart else "each on one side"
    print(
        f"{len(groups)} duplicate groups of {sum(map(len, groups.values()))} items, {where}; a random split would "
        f"have leaked {report['random_split_leak']:.1%} of validation and test"
    )


def contact_sheet(order: dict[str, list[int]], rows, items, cache: PhotoCache, seed: int) -> bytes:
    """A JPEG of 48 samples, the first of each split, each with prompt, split and type."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    sheet = Image.new("RGB", (8 * 232, 6 * 284), "white")
    pen = ImageDraw.Draw(sheet)
    shown = [(split, number) for split, count in SHEET.items() for number in order[split][:count]]
    texts = sample_texts([number for _, number in shown], rows, items, seed)
    for position, ((split, number), (_, prompt)) in enumerate(zip(shown, texts, strict=True)):
        x, y = position % 8 * 232 + 4, position // 8 * 284 + 4
        photo = cache.read(int(items.at[number, "photo"]))
        sheet.paste(common.load_image(photo.jpeg).resize((224, 224)), (x, y))
        pen.text((x, y + 227), f"{split} · {items.at[number, 'type'] or 'unknown'}"[:36], "#666666", font)
        for line, text in enumerate(textwrap.wrap(prompt.decode(), 36, max_lines=2, placeholder=" …")):
            pen.text((x, y + 243 + 15 * line), text, "black", font)
    out = io.BytesIO()
    sheet.save(out, "JPEG", quality=88)
    return out.getvalue()


def items_csv(items) -> bytes:
    """items.csv: id, split and duplicate group of every item."""
    out = io.StringIO()
    writer = common.csv_writer(out)
    writer.writerow(["id", "split", "group"])
    writer.writerows(items[["id", "split", "group"]].to_numpy(object).tolist())
    return out.getvalue().encode()


def rejects_jsonl(rejects: list[dict]) -> bytes:
    """rejects.jsonl, sorted."""
    return b"".join(line + b"\n" for line in sorted(map(common.canonical, rejects)))


def count_reasons(rejects: list[dict]) -> str:
    """ "3 missing file, 1 not an image"."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(r["reason"] for r in rejects).most_common())


# --------------------------------------------------------------------------------------------------------------------
# The whole stage, and its check


def prepare(args: argparse.Namespace, config: PrepConfig) -> int:
    """Scan, group, split, write, report; the manifest last."""
    start = time.monotonic()
    images = common.images_folder(args.images, args.input)
    output, fold = args.output, parse_fold(config.fold)
    if fold and args.keep_split:
        raise Fail("--fold with --keep-split: the parts of a catalogue are cut anew; leave one of them out", USAGE)
    rows, reasons = read_rows(args, config)
    count = len(rows)
    if is_s3(output):  # a refusal is told now, not after the scan
        common.upload_atomic(b"", join(output, ".writable"))
        remove(join(output, ".writable"))
    kept = kept_splits(args.keep_split)
    # Beside the shards, or for S3 beside the CSV: what is known of each photo serves the next run.
    folder = Path(f"{args.input[0]}.work") if is_s3(output) else Path(output, ".work")
    with common.exclusive(folder / "lock") as held:
        if not held:
            raise Fail(f"{folder}: in use by another 2_prepare.py; wait until it has ended")
        for old in folder.glob("scan-*"):  # scratch files of an earlier version
            old.unlink()
        with PhotoCache(folder / "photos.bin", config) as cache:
            items, rejects = scan(rows, reasons, images, cache, config, args.workers)
            if not len(items):
                raise Fail(
                    f"{args.input[0]}: none of {count} rows is usable ({count_reasons(rejects) or 'it has no rows'})"
                )
            same = rows.loc[items["row"], args.group_by] if args.group_by else ()
            items["group"] = group_items(items, cache, same)
            whole = items[items["view"] == 0]
            split = dict(zip(whole["id"], split_items(whole, config.seed, fold, kept), strict=True))
            items["split"] = items["id"].map(split)
            order = draw_order(items, config.seed)
            records = write_dataset(plan_shards(order, config), rows, items, cache, output, config)
            sheet = contact_sheet(order, rows, items, cache, config.seed)
    whole = items[items["view"] == 0]
    report = finish(whole, records, rejects, sheet, count, args, config, start)
    print_report(report)
    return say_counts(rejects, count, set(whole["id"]), args, config, time.monotonic() - start)


def finish(items, records, rejects, sheet: bytes, count: int, args, config: PrepConfig, start: float) -> dict[str, Any]:
    """Everything beside the shards, the manifest last; returns the split report."""
    output, splits = args.output, {}
    mini = create_mini_train(records, output)
    for split in (*SPLITS, "mini_train"):
        own = [record for record in (*records, *mini) if record["name"].startswith(f"{split}/")]
        listed = [{key: record[key] for key in ("name", "samples", "bytes", "sha256")} for record in own]
        splits[split] = {"samples": sum(record["samples"] for record in own), "shards": listed}
    remove_stale(output, splits)
    report, listing = split_report(items), items_csv(items)
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
        "rejects.jsonl": rejects_jsonl(rejects),
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
        raise Fail(f"{lost} of {count} rows were rejected, more than --max-failed {config.max_failed}")
    return DONE


def verify(output: str) -> int:
    """Compare a shard folder with its manifest; prints each fault and returns the exit code."""
    manifest = common.load_manifest(output)
    present = dict(common.list_files(output))
    listed = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    faults = []
    for shard in common.progress(listed, "verify", len(listed), "shard"):
        name = shard["name"]
        if name not in present:
            faults.append(f"{name}: missing")
        elif present[name] != shard["bytes"]:
            faults.append(f"{name}: {present[name]} bytes, {shard['bytes']} by the manifest")
        elif stored_digest(join(output, name)) != shard["sha256"]:
            faults.append(f"{name}: content is not that of the manifest")
    known = {shard["name"] for shard in listed}
    faults += [f"{name}: not in the manifest" for name in present if name.endswith(".tar") and name not in known]
    for fault in faults:
        print(fault)
    remedy = "; remove those shards and run 2_prepare.py again, which makes them anew" if faults else ""
    print(f"{len(listed)} shards checked, {len(faults)} faults{remedy}")
    return FAILED if faults else DONE


def stored_digest(path: str) -> str:
    """sha256 (hex) of a local file, or of an S3 object, which is copied to a temporary file for that."""
    if not is_s3(path):
        return common.file_digest(path)
    with tempfile.TemporaryDirectory() as folder:
        common.download_atomic(path, Path(folder, "object"))
        return common.file_digest(Path(folder, "object"))


# --------------------------------------------------------------------------------------------------------------------
# Command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", help="cleaned.csv, one or several")
    parser.add_argument("--images", help="folder that image_path is relative to (default: the CSV's)")
    parser.add_argument("--output", required=True, help="folder or s3://bucket/prefix for the shards")
    parser.add_argument("--verify", action="store_true", help="compare --output with its manifest, and stop")
    parser.add_argument("--keep-split", metavar="MANIFEST", help="an older manifest.json: no item of it changes sides")
    parser.add_argument("--group-by", metavar="COLUMN", help="keep rows equal in this column on one side too")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
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
    if config.image_size is None:
        side = common.image_side(config.model, common.model_config(common.model_source(config.model)[0]))
        config = dataclasses.replace(config, image_size=max(LEAST_SIDE, side))
    return prepare(args, config)


if __name__ == "__main__":
    sys.exit(main())
