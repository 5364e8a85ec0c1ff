"""Stage 2: split the cleaned catalogue without leaks and write it as WebDataset shards, the same bytes every time.

Reads   --input: cleaned.csv (id, name, image_path, clean_title, style, material, color, object_type) and --images
Writes  --output, a folder or s3://bucket/prefix: {train,validation,test,mini_train}/shard-%06d.tar, each with a small
        .json record; items.csv (id, split, duplicate group), rejects.jsonl, split_report.json, contact_sheet.jpg,
        prepare.json, and manifest.json last

    python 2_prepare.py --input data/cleaned.csv --images data/photos --output data/shards
    python 2_prepare.py --verify --output data/shards
    RANK=0 WORLD_SIZE=2 python 2_prepare.py ...     one of two machines; rank 0 writes the manifest
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import multiprocessing
import os
import signal
import sqlite3
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import common
from common import DONE, FAILED, SPLITS, BadImage, Fail, PrepConfig

FORMAT = 1  # of manifest and records; a new one rebuilds every shard
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
SHARD_SAMPLES, SHARD_BYTES = 1000, 500_000_000  # at most, tar headers counted
SHEET = 48  # samples on the contact sheet
HASH_SIDE, GRID = 16, 8  # 16 x 16 gradients and 8 x 8 mean colours describe a picture
# Near duplicates: few gradients differ, and colours in fewer than five cells (a small product on white fills no more).
# 98% of re-encoded, rescaled and slightly cropped shop photos are below both, 12% of copies with shifted colours are.
GRADIENT_DISTANCE, COLOR_DISTANCE, COLOR_CELLS = 0.2, 14, 5

# --------------------------------------------------------------------------------------------------------------------
# Scan: what every picture is, by digest and by looks


def gradients(image) -> tuple[bytes, bytes]:
    """(256 bits of left-to-right and 256 of top-to-bottom gradients, 8 x 8 x 3 mean colours) of an RGB picture."""
    import numpy as np
    from PIL import Image

    grey = np.asarray(image.resize((HASH_SIDE + 1, HASH_SIDE + 1), Image.BOX).convert("L"), np.int16)
    # A step of 3 levels and more: what is flat stays flat when a picture is encoded again.
    across = grey[:-1, 1:] - grey[:-1, :-1] > 2
    down = grey[1:, :-1] - grey[:-1, :-1] > 2
    grid = np.asarray(image.resize((GRID, GRID), Image.BOX), np.uint8)
    return np.packbits(np.stack([across, down])).tobytes(), grid.tobytes()


def scan_image(job: tuple[int, str, PrepConfig]) -> tuple[int, str, bytes, bytes, bytes, str]:
    """(row, sha256 of the file, gradients, colours, letterboxed JPEG, reason). Each picture is decoded once."""
    number, path, config = job
    try:
        data = Path(path).read_bytes()
        # Above four times the size wanted, decoding at half scale changes nothing that Lanczos would keep.
        inner = common.fit(common.load_image(data, 4 * config.image_size), config.image_size)
        out = io.BytesIO()
        common.on_square(inner, config.image_size).save(out, "JPEG", quality=config.quality)
        bits, grid = gradients(inner)
    except BadImage as error:
        return number, "", b"", b"", b"", json.dumps([error.reason, error.detail])
    except OSError as error:
        return number, "", b"", b"", b"", json.dumps(["unreadable file", error.strerror or str(error)])
    return number, common.digest(data), bits, grid, out.getvalue(), ""


@contextlib.contextmanager
def worker_pool(count: int) -> Iterator[Executor]:
    """Processes that read photos. Fails where one dies, for which a multiprocessing.Pool would wait without end."""
    os.environ.update(common.WORKER_ENVIRONMENT)
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _live_with_parent)
    try:
        yield pool
    except BrokenProcessPool:
        raise Fail("a process that read photos died; if memory ran out, lower --workers and run again") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _live_with_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def open_work(path: Path, config: PrepConfig) -> sqlite3.Connection:
    """The scratch database: rows by id, and what was made of each picture file; rows stay on disk, not in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = sqlite3.connect(path)
    work.executescript(
        """PRAGMA page_size = 32768;
        PRAGMA journal_mode = WAL;
        PRAGMA synchronous = NORMAL;
        CREATE TABLE IF NOT EXISTS made_by (settings TEXT);
        CREATE TABLE IF NOT EXISTS pictures (path TEXT, size INT, changed INT, source TEXT, bits BLOB, grid BLOB,
            reason TEXT, jpg BLOB, PRIMARY KEY (path, size, changed));
        DROP TABLE IF EXISTS items;
        CREATE TABLE items (id TEXT PRIMARY KEY, number INT, path TEXT, size INT, changed INT, fields TEXT,
            type TEXT, grp TEXT, split TEXT, place BLOB);"""
    )
    settings = json.dumps(picture_settings(config))
    if work.execute("SELECT settings FROM made_by").fetchone() != (settings,):
        work.execute("DELETE FROM pictures")
        work.execute("DELETE FROM made_by")
        work.execute("INSERT INTO made_by VALUES (?)", (settings,))
        work.commit()
    return work


def picture_settings(config: PrepConfig) -> list:
    """What a JPEG in the shards depends on beside the picture's file."""
    return [FORMAT, config.image_size, config.quality, common.versions("pillow")["pillow"]]


def scan(
    work: sqlite3.Connection,
    rows: common.Catalogue,
    args: argparse.Namespace,
    images: Path,
    config: PrepConfig,
    pool: Any,
    rejects: list,
) -> int:
    """Fill `items` with the usable rows and `pictures` with what their files hold; returns the count of rows read."""
    count = 0
    wanted: dict[int, tuple] = {}  # pictures that are not known yet
    asked: deque[tuple[dict, Any]] = deque()  # those that the workers are looking at

    def ask() -> None:
        jobs = [(number, path, config) for number, (path, *_) in wanted.items()]
        asked.append((wanted.copy(), pool.map(scan_image, jobs, chunksize=8)))
        wanted.clear()

    def settle() -> None:
        keys, results = asked.popleft()
        for number, source, bits, grid, jpg, reason in results:
            facts = (*keys[number], source, bits, grid, reason, jpg)
            work.execute("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?, ?, ?, ?)", facts)
        work.commit()

    for row in common.progress(rows, "scan"):
        if args.limit is not None and count >= args.limit:
            break
        count += 1
        try:
            if row.reason:
                raise BadImage(row.reason)
            path = common.resolve_image(images, row.fields["image_path"])
            stat = path.stat()
        except BadImage as error:
            rejects.append(common.reject(row, error.reason, error.detail))
            continue
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        kind = common.clean_metadata(row.fields)["object_type"]
        facts = (row.id, row.number, *key, json.dumps(row.fields), kind)
        work.execute("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, '', '', x'')", facts)
        known = work.execute("SELECT 1 FROM pictures WHERE path = ? AND size = ? AND changed = ?", key).fetchone()
        if not known:
            wanted[row.number] = key
        if len(wanted) == 256:  # the workers have two such lists, so that they never wait for this process
            ask()
            if len(asked) > 2:
                settle()
    ask()
    while asked:
        settle()
    joined = "SELECT id, number, fields, reason FROM items JOIN pictures USING (path, size, changed) WHERE reason != ''"
    for id, number, fields, reason in work.execute(joined).fetchall():
        row = common.Row(number, id, json.loads(fields), None)
        rejects.append(common.reject(row, *json.loads(reason)))
        work.execute("DELETE FROM items WHERE id = ?", (id,))
    if args.limit is None:  # what is in the catalogue no longer
        used = "SELECT 1 FROM items i WHERE (i.path, i.size, i.changed) = (p.path, p.size, p.changed)"
        work.execute(f"DELETE FROM pictures AS p WHERE reason = '' AND NOT EXISTS ({used})")
    work.commit()
    return count


# --------------------------------------------------------------------------------------------------------------------
# Duplicate groups


class Groups:
    """Union-find over 0..n-1; a group is known by its smallest member."""

    def __init__(self, count: int):
        self.parent = list(range(count))

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        i, j = sorted((self.find(i), self.find(j)))
        self.parent[j] = i


def near_pairs(bits, grids) -> Iterator[tuple[int, int]]:
    """Pairs of near duplicates among uint8 [N, 64] gradients and uint8 [N, 192] colours, without comparing all pairs.

    Candidates agree in one of 32 bands of 16 gradients (of copies, most bands do). A band without any gradient is
    plain ground and says nothing; in a crowded band each picture meets its 64 neighbours in order of all gradients.
    """
    import numpy as np

    weight = np.unpackbits(bits, axis=1).sum(1).astype(np.int32)
    colors = grids.astype(np.int16)
    everything = np.ascontiguousarray(bits).view(f"S{bits.shape[1]}").ravel()
    for band in range(bits.shape[1] // 2):
        key = bits[:, 2 * band].astype(np.uint16) << 8 | bits[:, 2 * band + 1]
        order = np.lexsort((everything, key))
        order = order[key[order] != 0]
        for gap in range(1, 65):
            a, b = order[:-gap], order[gap:]
            if not len(a):
                break
            same = key[a] == key[b]
            if not same.any():
                break
            a, b = a[same], b[same]
            apart = np.unpackbits(bits[a] ^ bits[b], axis=1).sum(1) / np.maximum(weight[a] + weight[b], 1)
            cells = np.abs(colors[a] - colors[b]).reshape(len(a), GRID * GRID, 3).max(2)
            tint = np.partition(cells, -COLOR_CELLS, axis=1)[:, -COLOR_CELLS]
            near = (apart <= GRADIENT_DISTANCE) & (tint <= COLOR_DISTANCE)
            yield from zip(a[near].tolist(), b[near].tolist(), strict=True)


def group_items(work: sqlite3.Connection, group_by: str | None) -> None:
    """Set `grp` of every item: the smallest id among its exact and near duplicates (and equals in --group-by)."""
    import numpy as np

    ids, sources, kinds, bits, grids = [], [], [], [], []
    query = "SELECT id, source, fields, bits, grid FROM items JOIN pictures USING (path, size, changed) ORDER BY id"
    for id, source, fields, some, grid in work.execute(query):
        ids.append(id)
        sources.append(source[:16])
        if group_by:
            kinds.append(json.loads(fields).get(group_by, ""))
        bits.append(some)
        grids.append(grid)
    groups = Groups(len(ids))
    for values in (sources, kinds):
        first: dict[str, int] = {}
        for i, value in enumerate(values):
            if value:
                groups.join(first.setdefault(value, i), i)
    if ids:
        rows = [np.frombuffer(b"".join(some), np.uint8).reshape(len(ids), -1) for some in (bits, grids)]
        for i, j in near_pairs(*rows):
            groups.join(i, j)
    work.executemany("UPDATE items SET grp = ? WHERE id = ?", ((ids[groups.find(i)], id) for i, id in enumerate(ids)))
    work.commit()


# --------------------------------------------------------------------------------------------------------------------
# Split


def choose_splits(groups: list[tuple[str, str, int, str | None]], seed: int) -> dict[str, str]:
    """{group: split} for (group, object type, size, split that it must keep).

    Groups come in a seeded order, type by type; each goes where its type lacks most against 80/10/10, and among equals
    where the whole does. So a type is never further off than a group, and hundreds of one-item types add up right.
    """
    chosen, have, whole = {}, defaultdict(Counter), Counter()
    for group, kind, size, kept in groups:
        if kept:
            chosen[group] = kept
            have[kind][kept] += size
            whole[kept] += size

    def order(item: tuple[str, str, int, str | None]) -> tuple:
        group, kind, size, _ = item
        return kind, -size, common.digest([seed, group])

    for group, kind, size, _ in sorted((item for item in groups if not item[3]), key=order):
        of_kind, of_all = sum(have[kind].values()) + size, sum(whole.values()) + size
        lack = {
            split: share * of_kind - have[kind][split] + 0.5 * (share * of_all - whole[split])
            for split, share in SHARES.items()
        }
        split = max(SPLITS, key=lambda name: lack[name] - (size if name != "train" and size > of_all * 0.1 else 0))
        chosen[group] = split
        have[kind][split] += size
        whole[split] += size
    return chosen


def split_items(work: sqlite3.Connection, config: PrepConfig, kept: dict[str, str]) -> None:
    """Set `split` and the seeded `place` of every item; items that `kept` knows stay where they were."""
    members: dict[str, list] = {}
    for group, id, kind in work.execute("SELECT grp, id, type FROM items ORDER BY grp, id"):
        entry = members.setdefault(group, [kind, 0, None])
        entry[1] += 1
        entry[2] = entry[2] or kept.get(id)
    chosen = choose_splits([(group, *entry) for group, entry in members.items()], config.seed)
    rows = work.execute("SELECT id, grp FROM items").fetchall()
    places = (
        (kept.get(id, chosen[group]), bytes.fromhex(common.digest([config.seed, "place", id])), id)
        for id, group in rows
    )
    work.executemany("UPDATE items SET split = ?, place = ? WHERE id = ?", places)
    work.execute("CREATE INDEX by_place ON items (split, place)")
    work.commit()


def read_kept(path: str | None) -> dict[str, str]:
    """{id: split} of an older run, from the items.csv beside its manifest."""
    if not path:
        return {}
    base = path.removesuffix("manifest.json")
    manifest = common.load_manifest(base or ".")
    data = common.read_bytes(common.join(base or ".", "items.csv"))
    if common.digest(data) != manifest.get("items_sha256"):
        raise Fail(f"{base}items.csv: does not belong to that manifest; give --keep-split a whole shard folder")
    return {row["id"]: row["split"] for row in csv.DictReader(io.StringIO(data.decode(), newline=""))}


def random_split_leaks(work: sqlite3.Connection) -> float:
    """Expected share of held-out items with a duplicate in train, had 80/10/10 been drawn item by item."""
    sizes = [count for (count,) in work.execute("SELECT COUNT(*) FROM items GROUP BY grp")]
    held = 1 - SHARES["train"]
    return sum(size * (1 - held ** (size - 1)) for size in sizes) / max(1, sum(sizes))


# --------------------------------------------------------------------------------------------------------------------
# Shards


def sample_text(fields: dict[str, str], group: str, source: str, seed: int) -> tuple[bytes, bytes]:
    """(json, txt) of one item."""
    meta = common.clean_metadata(fields)
    filled = common.prompts(meta)
    prompt = filled[int(common.digest([seed, "prompt", fields["id"]])[:8], 16) % len(filled)]
    used = {"id", "image_path", "clean_title", *common.ATTRIBUTES}
    row = {name: value for name, value in fields.items() if name not in used}
    record = {
        "id": fields["id"],
        **meta,
        "image_path": fields["image_path"],
        "group": group,
        "source": source,
        "row": row,
    }
    return common.canonical(record), prompt.encode()


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """One file with fixed owner, mode and time: the same bytes on any machine and day."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard to be: its name, the number of its first sample, and the digest of all that goes into it."""

    name: str
    split: str
    first: int
    offset: int  # of its first sample within the split's order
    count: int
    plan: str


def plan_shards(work: sqlite3.Connection, config: PrepConfig) -> Iterator[Shard]:
    """Successive runs of each split's order. Which items share a shard depends on the items alone."""
    # No JPEG of this size at quality 95 is larger than its pixels; so the byte limit holds whatever the pictures.
    size = min(SHARD_SAMPLES, max(1, SHARD_BYTES // (3 * config.image_size**2 + 20_000)))
    made_by = [*picture_settings(config), config.seed]
    first = 0
    for split in SPLITS:
        rows = work.execute(
            "SELECT id, grp, fields, source FROM items JOIN pictures USING (path, size, changed)"
            " WHERE split = ? ORDER BY place",
            (split,),
        )
        for number, start in enumerate(range(0, 1 << 40, size)):
            chunk = rows.fetchmany(size)
            if not chunk:
                break
            plan = hashlib.sha256(common.canonical([made_by, first]))
            for id, group, fields, source in chunk:
                plan.update(common.canonical([id, group, json.loads(fields), source]))
            yield Shard(f"{split}/shard-{number:06d}.tar", split, first, start, len(chunk), plan.hexdigest())
            first += len(chunk)


def write_shard(job: tuple[Shard, str, str, PrepConfig]) -> dict[str, Any]:
    """Make one shard whole at its place and then its record; any process of any machine gives the same bytes."""
    shard, database, output, config = job
    work = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    rows = work.execute(
        "SELECT fields, grp, source, jpg FROM items JOIN pictures USING (path, size, changed)"
        " WHERE id IN (SELECT id FROM items WHERE split = ? ORDER BY place LIMIT ? OFFSET ?) ORDER BY place",
        (shard.split, shard.count, shard.offset),
    )
    remote = common.is_s3(output)
    folder = Path(tempfile.gettempdir() if remote else common.join(output, shard.split))
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{os.getpid()}-{Path(shard.name).name}.tmp"
    try:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for position, (fields, group, source, jpg) in enumerate(rows, shard.first):
                members = (jpg, *sample_text(json.loads(fields), group, source, config.seed))
                for extension, data in zip(("jpg", "json", "txt"), members, strict=True):
                    add_member(tar, f"{position:09d}.{extension}", data)
        record = {
            "name": shard.name, "samples": shard.count, "bytes": temporary.stat().st_size,
            "sha256": common.file_digest(temporary), "plan": shard.plan,
        }  # fmt: skip
        if record["bytes"] > SHARD_BYTES:
            raise Fail(f"{shard.name}: {record['bytes']} bytes, over the limit of {SHARD_BYTES}; shorten the columns")
        common.put_whole(common.join(output, shard.name), temporary)
    finally:
        temporary.unlink(missing_ok=True)
    common.put_whole(common.join(output, record_name(shard.name)), common.canonical(record))
    return record


def record_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".json"


def finished(output: str, shard: Shard, present: dict[str, int]) -> dict[str, Any] | None:
    """The record of a shard that is there already with just this content, else None."""
    if shard.name not in present or record_name(shard.name) not in present:
        return None
    try:
        record = json.loads(common.read_bytes(common.join(output, record_name(shard.name))))
        return record if record["plan"] == shard.plan and record["bytes"] == present[shard.name] else None
    except (ValueError, KeyError, TypeError):
        return None


def write_dataset(
    shards: list[Shard], mine: list[Shard], database: Path, args, config: PrepConfig, pool: Any
) -> list[dict]:
    """Write those of `mine` that are not there yet; wait for the other machines' where rank 0; returns all records."""
    output = args.output
    present = dict(common.list_files(output))
    records = {shard.name: record for shard in shards if (record := finished(output, shard, present))}
    todo = [shard for shard in mine if shard.name not in records]
    if len(records) < len(shards):  # a manifest never describes a folder that is being changed
        common.remove(common.join(output, "manifest.json"))
    jobs = [(shard, str(database), output, config) for shard in todo]
    for record in common.progress(pool.map(write_shard, jobs), "write", len(jobs), "shard"):
        records[record["name"]] = record
    print(f"shards: {len(shards)}, of which {len(mine) - len(todo)} were there already")
    if len(mine) < len(shards) and args.rank == 0 and args.shard_range is None:
        for shard in common.progress(shards, "wait for the other machines", len(shards), "shard"):
            while shard.name not in records:
                time.sleep(1)
                if record := finished(output, shard, dict(common.list_files(output))):
                    records[shard.name] = record
    return [records[shard.name] for shard in shards if shard.name in records]


def create_mini_train(records: list[dict], output: str, count: int) -> list[dict]:
    """mini_train: the first train shards again, under the same numbers."""
    mini = []
    for record in [record for record in records if record["name"].startswith("train/")][:count]:
        name = record["name"].replace("train/", "mini_train/")
        source, target = common.join(output, record["name"]), common.join(output, name)
        if common.is_s3(output):
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder, "shard.tar")
                copy.write_bytes(common.read_bytes(source))
                common.put_whole(target, copy)
        elif not (Path(target).is_file() and common.file_digest(target) == record["sha256"]):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            with common.whole_file(target) as temporary:
                os.link(source, temporary)
        mini.append(record | {"name": name})
    return mini


# --------------------------------------------------------------------------------------------------------------------
# What is told about it


def split_report(work: sqlite3.Connection) -> dict[str, Any]:
    """Counts by type and split, duplicate groups, and what a random split would have leaked."""
    by_type: dict[str, dict[str, int]] = {}
    for kind, split, count in work.execute(
        "SELECT type, split, COUNT(*) FROM items GROUP BY type, split ORDER BY type"
    ):
        by_type.setdefault(kind or "unknown", dict.fromkeys(SPLITS, 0))[split] += count
    groups = defaultdict(list)
    query = (
        "SELECT grp, id FROM items WHERE grp IN (SELECT grp FROM items GROUP BY grp HAVING COUNT(*) > 1) ORDER BY id"
    )
    for group, id in work.execute(query):
        groups[group].append(id)
    apart = work.execute("SELECT grp FROM items GROUP BY grp HAVING COUNT(DISTINCT split) > 1").fetchall()
    return {
        "splits": {split: sum(counts[split] for counts in by_type.values()) for split in SPLITS},
        "types": by_type,
        "duplicate_groups": dict(groups),
        "groups_kept_apart": [group for (group,) in apart],  # only by --keep-split, which moves nothing
        "random_split_leak": round(random_split_leaks(work), 4),
    }


def print_report(report: dict[str, Any]) -> None:
    """The split report, short enough for a terminal."""
    print(f"{'object type':<24}{'train':>8}{'validation':>12}{'test':>8}")
    largest = sorted(report["types"].items(), key=lambda item: -sum(item[1].values()))
    for kind, counts in largest[:12]:
        print(f"{kind[:23]:<24}{counts['train']:>8}{counts['validation']:>12}{counts['test']:>8}")
    if len(largest) > 12:
        rest = {split: sum(counts[split] for _, counts in largest[12:]) for split in SPLITS}
        print(f"{f'{len(largest) - 12} more types':<24}{rest['train']:>8}{rest['validation']:>12}{rest['test']:>8}")
    whole = report["splits"]
    print(f"{'all':<24}{whole['train']:>8}{whole['validation']:>12}{whole['test']:>8}")
    items = sum(map(len, report["duplicate_groups"].values()))
    print(
        f"{len(report['duplicate_groups'])} duplicate groups of {items} items, each on one side; a random split would "
        f"have leaked {report['random_split_leak']:.1%} of validation and test"
    )


def contact_sheet(records: list[dict], output: str) -> bytes:
    """A JPEG of 48 samples, spread over the splits, each with prompt, split and type."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    sheet = Image.new("RGB", (8 * 232, 6 * 284), "white")
    pen = ImageDraw.Draw(sheet)
    wanted = {split: [r for r in records if r["name"].startswith(split) and r["samples"]] for split in SPLITS}
    position = 0
    for split, share in zip(SPLITS, (32, 8, 8), strict=True):
        taken = 0
        for record in wanted[split]:
            path = common.join(output, record["name"])
            samples = common.index_shard(path)
            step = max(1, len(samples) // (share - taken))
            with common.open_read(path) as handle:
                for sample in samples[::step][: share - taken]:
                    x, y = position % 8 * 232 + 4, position // 8 * 284 + 4
                    image = common.load_image(common.read_member(handle, sample.members["jpg"])).resize((224, 224))
                    sheet.paste(image, (x, y))
                    meta = json.loads(common.read_member(handle, sample.members["json"]))
                    prompt = common.read_member(handle, sample.members["txt"]).decode()
                    pen.text((x, y + 227), f"{split} · {meta['object_type'] or 'unknown'}"[:36], "#666666", font)
                    pen.text((x, y + 243), prompt[:36], "black", font)
                    pen.text((x, y + 258), prompt[36:72], "black", font)
                    position, taken = position + 1, taken + 1
            if taken >= share:
                break
    out = io.BytesIO()
    sheet.save(out, "JPEG", quality=88)
    return out.getvalue()


def verify(output: str) -> int:
    """Hold a shard folder against its manifest; prints each fault and returns the exit code."""
    manifest = common.load_manifest(output)
    present = dict(common.list_files(output))
    faults, checked = [], 0
    listed = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    for shard in common.progress(listed, "verify", len(listed), "shard"):
        checked += 1
        name = shard["name"]
        if name not in present:
            faults.append(f"{name}: missing")
            continue
        total, size = hashlib.sha256(), 0
        with common.open_read(common.join(output, name)) as handle:
            while block := handle.read(1 << 20):
                total.update(block)
                size += len(block)
        if size != shard["bytes"]:
            faults.append(f"{name}: {size} bytes, {shard['bytes']} by the manifest")
        elif total.hexdigest() != shard["sha256"]:
            faults.append(f"{name}: content is not that of the manifest")
        elif len(common.index_shard(common.join(output, name))) != shard["samples"]:
            faults.append(f"{name}: not {shard['samples']} samples")
    known = {shard["name"] for shard in listed}
    faults += [f"{name}: not in the manifest" for name in present if name.endswith(".tar") and name not in known]
    for fault in faults:
        print(fault)
    print(f"{checked} shards checked, {len(faults)} faults" + ("; run 2_prepare.py again" if faults else ""))
    return FAILED if faults else DONE


# --------------------------------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace, config: PrepConfig) -> int:
    """Scan, group, split, write, report; the manifest last."""
    start = time.monotonic()
    rows = common.Catalogue(args.input)
    images = common.images_folder(args.images, args.input)
    output = args.output
    # Beside the shards, or for S3 beside the CSV: what is known of each picture serves the next run.
    work_file = Path(
        f"{args.input[0]}.work" if common.is_s3(output) else Path(output, ".work"), f"scan-{args.rank}.sqlite"
    )
    kept = read_kept(args.keep_split)
    rejects: list[dict] = []
    work = open_work(work_file, config)
    with worker_pool(args.workers) as pool:
        count = scan(work, rows, args, images, config, pool, rejects)
        if not work.execute("SELECT 1 FROM items LIMIT 1").fetchone():
            raise Fail(f"{args.input[0]}: none of {count} rows is usable ({_reasons(rejects) or 'it has no rows'})")
        group_items(work, args.group_by)
        split_items(work, config, kept)
        shards = list(plan_shards(work, config))
        low, high = args.shard_range or (0, len(shards))
        mine = [shard for i, shard in enumerate(shards) if low <= i < high and i % args.world == args.rank]
        records = write_dataset(shards, mine, work_file, args, config, pool)
    if args.rank or args.shard_range:
        print(
            f"{len(mine)} of {len(shards)} shards are this call's part; the manifest is written by one without a range"
        )
        return DONE
    code = finish(work, records, rejects, count, args, config, time.monotonic() - start)
    work.close()
    return code


def _reasons(rejects: list[dict]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(r["reason"] for r in rejects).most_common())


def finish(work, records, rejects, count, args, config: PrepConfig, seconds: float) -> int:
    """Everything beside the shards, the manifest last; returns the exit code."""
    output = args.output
    put = functools.partial(lambda name, data: common.put_whole(common.join(output, name), data))
    mini = create_mini_train(records, output, config.mini_shards)
    report = split_report(work)
    items = io.StringIO()
    writer = csv.writer(items, lineterminator="\n")
    writer.writerow(["id", "split", "group"])
    writer.writerows(work.execute("SELECT id, split, grp FROM items ORDER BY id"))
    rejects.sort(key=lambda reject: (reject["id"], reject["reason"], reject["image_path"]))
    for reject in rejects:
        reject.pop("row")  # rows in another order are the same catalogue
    put("items.csv", items.getvalue().encode())
    put("rejects.jsonl", b"".join(common.canonical(reject) + b"\n" for reject in rejects))
    put("split_report.json", json.dumps(report, indent=2, ensure_ascii=False).encode())
    put("contact_sheet.jpg", contact_sheet(records, output))
    written = sum(record["samples"] for record in records)
    splits = {}
    for split in (*SPLITS, "mini_train"):
        own = [record for record in (*records, *mini) if record["name"].split("/")[0] == split]
        listed = [{key: record[key] for key in ("name", "samples", "bytes", "sha256")} for record in own]
        splits[split] = {"samples": sum(record["samples"] for record in own), "shards": listed}
    for name, _ in common.list_files(output):  # of an older, larger catalogue
        folder = name.split("/")[0]
        base = name.removesuffix(".json").removesuffix(".tar") + ".tar"
        if folder in splits and base not in {shard["name"] for shard in splits[folder]["shards"]}:
            common.remove(common.join(output, name))
    manifest = {
        "format": FORMAT,
        "settings": {"seed": config.seed, "image_size": config.image_size, "quality": config.quality},
        "versions": common.versions("pillow", "numpy"),
        "splits": splits,
        "counts": {"input": count, "written": written, "rejected": len(rejects)},
        "items_sha256": common.digest(items.getvalue().encode()),
    }
    sidecar = {"settings": dataclasses.asdict(config), "counts": manifest["counts"], "seconds": round(seconds, 2)}
    sidecar |= {"inputs": {path: common.file_digest(path) for path in args.input}, "versions": manifest["versions"]}
    put("prepare.json", json.dumps(sidecar, indent=2).encode())
    put("manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    print_report(report)
    if rejects:
        print(f"rejected: {_reasons(rejects)}; see {common.join(output, 'rejects.jsonl')}")
    print(f"input {count} = written {written} + rejected {len(rejects)}")
    print(f"{count / max(seconds, 1e-9):.0f} rows a second; look at {common.join(output, 'contact_sheet.jpg')}")
    if len(rejects) > config.max_failed * count:
        raise Fail(f"{len(rejects)} of {count} rows were rejected, more than --max-failed {config.max_failed}")
    return DONE


def shard_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    return int(low), int(high)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", help="cleaned.csv, one or several")
    parser.add_argument("--images", help="folder that image_path is relative to (default: the CSV's)")
    parser.add_argument("--output", required=True, help="folder or s3://bucket/prefix for the shards")
    parser.add_argument("--verify", action="store_true", help="hold --output against its manifest, and stop")
    parser.add_argument("--keep-split", metavar="MANIFEST", help="an older manifest.json: no item of it changes sides")
    parser.add_argument("--group-by", metavar="COLUMN", help="keep rows equal in this column on one side too")
    parser.add_argument(
        "--shard-range", type=shard_range, metavar="A:B", help="write only shards A to B-1, no manifest"
    )
    parser.add_argument("--limit", type=int, help="use the first N rows only")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    common.add_flags(parser, PrepConfig)
    return parser


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.verify:
        return verify(args.output)
    if not args.input:
        raise Fail("--input is needed: the cleaned CSV", common.USAGE)
    if args.group_by and args.group_by not in common.Catalogue(args.input).columns:
        raise Fail(f"--group-by {args.group_by}: no such column in {args.input[0]}", common.USAGE)
    args.workers = max(1, args.workers)
    return prepare(args, common.from_flags(PrepConfig, args))


if __name__ == "__main__":
    sys.exit(main())
