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
import io
import json
import multiprocessing
import os
import signal
import sqlite3
import sys
import textwrap
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import common
import imaging
import storage
from common import DONE, Fail, PrepConfig
from imaging import BadImage
from shards import (
    FORMAT,
    create_mini_train,
    picture_settings,
    plan_shards,
    sample_text,
    verify,
    wait_for_others,
    write_dataset,
)
from splits import LOOKS, fold_of, group_items, keep_splits, looks, print_report, split_items, split_report
from storage import SPLITS

SHEET = {"train": 32, "validation": 8, "test": 8}  # samples on the contact sheet
BATCH = 256  # pictures asked for at once

# --------------------------------------------------------------------------------------------------------------------
# Scan: what every picture is, by digest and by looks


def scan_image(job: tuple[int, str, PrepConfig]) -> tuple[int, str, bytes, bytes, bytes, str]:
    """(row, sha256 of the file, gradients, colours, letterboxed JPEG, reason). Each picture is decoded once."""
    number, path, config = job
    try:
        data = Path(path).read_bytes()
        # Above four times the size wanted, decoding at half scale changes nothing that Lanczos would keep.
        inner = imaging.fit(imaging.load_image(data, 4 * config.image_size), config.image_size)
        out = io.BytesIO()
        imaging.on_square(inner, config.image_size).save(out, "JPEG", quality=config.quality)
        bits, grid = looks(inner)
    except BadImage as error:
        return number, "", b"", b"", b"", json.dumps([error.reason, error.detail])
    except OSError as error:
        return number, "", b"", b"", b"", json.dumps(["unreadable file", error.strerror or str(error)])
    return number, common.digest(data), bits, grid, out.getvalue(), ""


@contextlib.contextmanager
def worker_pool(count: int) -> Iterator[Executor]:
    """Processes that read photos. Fails where one dies, for which a multiprocessing.Pool would wait without end."""
    os.environ.update(imaging.WORKER_ENVIRONMENT)
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start_worker)
    pool.submit(os.getpid)  # starts them, while the first rows are read
    try:
        yield pool
    except BrokenProcessPool:
        raise Fail("a process that read photos died; if memory ran out, lower --workers and run again") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    """In a worker: keep memory for the next photo, leave Ctrl-C to the parent, and end when that is gone."""
    common.keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def open_work(path: Path, config: PrepConfig) -> sqlite3.Connection:
    """The scratch database: rows by id, and what was made of each picture file; rows stay on disk, not in memory."""
    work = sqlite3.connect(path)
    work.executescript(
        """PRAGMA page_size = 32768;
        PRAGMA journal_mode = WAL;
        PRAGMA synchronous = NORMAL;
        CREATE TABLE IF NOT EXISTS made_by (settings TEXT);
        CREATE TABLE IF NOT EXISTS pictures (path TEXT, size INT, changed INT, source TEXT, bits BLOB, grid BLOB,
            reason TEXT, jpg BLOB, PRIMARY KEY (path, size, changed));
        DROP TABLE IF EXISTS items;
        CREATE TABLE items (id TEXT PRIMARY KEY, fields TEXT, type TEXT, reason TEXT, path TEXT, size INT, changed INT,
            position INT, grp TEXT, split TEXT, place BLOB);"""
    )
    settings = json.dumps([LOOKS, *picture_settings(config)])
    if work.execute("SELECT settings FROM made_by").fetchone() != (settings,):
        work.execute("DELETE FROM pictures")
        work.execute("DELETE FROM made_by")
        work.execute("INSERT INTO made_by VALUES (?)", (settings,))
        work.commit()
    return work


def damaged(database: Path) -> bool:
    """Whether a SQLite file is. Its errors do not tell: for some damage SQLite says that the disk is full."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        try:
            return db.execute("PRAGMA quick_check(1)").fetchall() != [("ok",)]
        except sqlite3.OperationalError as error:  # a disk that is full indeed, or may not be written to
            return error.sqlite_errorcode == sqlite3.SQLITE_ERROR  # but not: a header that SQLite does not know
        except sqlite3.DatabaseError:
            return True


@contextlib.contextmanager
def work_file(folder: Path) -> Iterator[Path]:
    """The first scratch database in `folder` that no living process uses; what a dead one left beside it is removed.

    So calls for several ranges may run side by side, and a later call finds what an earlier one knew of the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for number in range(1 << 20):
            path = folder / f"scan-{number}.sqlite"
            if stack.enter_context(common.exclusive(folder / f"scan-{number}.lock")):
                break
        for left in folder.glob(f"{path.name}.*.tmp"):
            left.unlink(missing_ok=True)
        try:
            yield path
        except sqlite3.DatabaseError as error:
            if not damaged(path):
                raise
            for left in folder.glob(f"{path.name}*"):
                left.unlink()
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:  # a full disk damages it as well
                raise
            raise Fail(f"{path}: was damaged, and is removed ({error}); run the same command again") from None


def scan(
    work: sqlite3.Connection,
    rows: common.Catalogue,
    images: Path,
    config: PrepConfig,
    pool: Executor,
    rejects: list[dict],
) -> int:
    """Fill `items` with the usable rows and `pictures` with what their files hold; returns the count of rows read."""
    count = 0
    wanted: dict[int, tuple] = {}  # pictures that are not known yet
    asked: deque[tuple[dict, Iterator]] = deque()  # those that the workers are looking at

    def ask() -> None:
        jobs = [(number, path, config) for number, (path, *_) in wanted.items()]
        asked.append((wanted.copy(), pool.map(scan_image, jobs, chunksize=16)))
        wanted.clear()

    def settle() -> None:
        keys, results = asked.popleft()
        for number, source, bits, grid, jpg, reason in results:
            facts = (*keys[number], source, bits, grid, reason, jpg)
            work.execute("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?, ?, ?, ?)", facts)
        work.commit()

    for row in common.progress(rows, "scan"):
        if config.limit is not None and count >= config.limit:
            break
        count += 1
        key = take_row(work, row, images, rejects)
        if key and not work.execute("SELECT 1 FROM pictures WHERE (path, size, changed) = (?, ?, ?)", key).fetchone():
            wanted[row.number] = key
        if len(wanted) == BATCH:  # the workers have two such lists, so that they never wait for this process
            ask()
            if len(asked) > 2:
                settle()
    ask()
    while asked:
        settle()
    unusable = work.execute(
        "SELECT id, fields, COALESCE(pictures.reason, items.reason) AS why"
        " FROM items LEFT JOIN pictures USING (path, size, changed) WHERE why != ''"
    ).fetchall()
    for id, fields, why in unusable:
        rejects.append(common.reject(common.Row(0, id, json.loads(fields), None), *json.loads(why)))
        work.execute("DELETE FROM items WHERE id = ?", (id,))
    work.execute("""DELETE FROM pictures WHERE reason LIKE '["unreadable file"%'""")  # the next run tries it again
    if config.limit is None:  # what is in the catalogue no longer
        used = "SELECT path, size, changed FROM items"
        work.execute(f"DELETE FROM pictures WHERE reason = '' AND (path, size, changed) NOT IN ({used})")
    work.commit()
    return count


def take_row(work: sqlite3.Connection, row: common.Row, images: Path, rejects: list[dict]) -> tuple | None:
    """Put one row into `items`; returns (path, size, time of change) of its picture, where there is one.

    Of rows with the same id the smallest counts, not the first: rows in another order are the same catalogue.
    """
    if row.reason in ("missing id", "too many fields"):
        rejects.append(common.reject(row, row.reason))
        return None
    fields = common.canonical(row.fields).decode()
    other = work.execute("SELECT fields FROM items WHERE id = ?", (row.id,)).fetchone()
    if other:
        fields, larger = sorted([fields, other[0]])
        rejects.append(common.reject(row._replace(fields=json.loads(larger)), "duplicate id"))
        if fields == other[0]:
            return None
        work.execute("DELETE FROM items WHERE id = ?", (row.id,))
    key, reason = (), ""
    try:
        if not row.fields["image_path"].strip():
            raise BadImage("missing image_path")
        path = imaging.resolve_image(images, row.fields["image_path"])
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
    except BadImage as error:
        reason = json.dumps([error.reason, error.detail])
    kind = common.clean_metadata(row.fields)["object_type"]
    work.execute(
        "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, 0, '', '', x'')",
        (row.id, fields, kind, reason, *(key or (None, None, None))),
    )
    return key or None


# --------------------------------------------------------------------------------------------------------------------
# The contact sheet


def contact_sheet(work: sqlite3.Connection, seed: int) -> bytes:
    """A JPEG of 48 samples, the first of each split, each with prompt, split and type."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    sheet = Image.new("RGB", (8 * 232, 6 * 284), "white")
    pen = ImageDraw.Draw(sheet)
    for position, (split, fields, *facts, jpg) in enumerate(sheet_samples(work)):
        meta, prompt = sample_text(json.loads(fields), *facts, seed)
        kind = json.loads(meta)["object_type"] or "unknown"
        x, y = position % 8 * 232 + 4, position // 8 * 284 + 4
        sheet.paste(imaging.load_image(jpg).resize((224, 224)), (x, y))
        pen.text((x, y + 227), f"{split} · {kind}"[:36], "#666666", font)
        for line, text in enumerate(textwrap.wrap(prompt.decode(), 36, max_lines=2, placeholder=" …")):
            pen.text((x, y + 243 + 15 * line), text, "black", font)
    out = io.BytesIO()
    sheet.save(out, "JPEG", quality=88)
    return out.getvalue()


def sheet_samples(work: sqlite3.Connection) -> Iterator[tuple[str, str, str, str, bytes]]:
    """(split, fields, group, source, JPEG) of the samples to show; their order within a split is drawn already."""
    for split, count in SHEET.items():
        yield from work.execute(
            "SELECT split, fields, grp, source, jpg FROM items JOIN pictures USING (path, size, changed)"
            " WHERE split = ? ORDER BY place LIMIT ?",
            (split, count),
        )


# --------------------------------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace, config: PrepConfig) -> int:
    """Scan, group, split, write, report; the manifest last."""
    start = time.monotonic()
    rows = common.Catalogue(args.input)
    images = common.images_folder(args.images, args.input)
    output = args.output
    if storage.is_s3(output):  # a refusal is told now, not after the scan
        storage.put_whole(storage.join(output, ".writable"), b"")
        storage.remove(storage.join(output, ".writable"))
    rejects: list[dict] = []
    # Beside the shards, or for S3 beside the CSV: what is known of each picture serves the next run.
    folder = Path(f"{args.input[0]}.work") if storage.is_s3(output) else Path(output, ".work")
    with work_file(folder) as database, contextlib.closing(open_work(database, config)) as work:
        keep_splits(work, args.keep_split)
        with worker_pool(args.workers) as pool:
            count = scan(work, rows, images, config, pool, rejects)
            if not work.execute("SELECT 1 FROM items LIMIT 1").fetchone():
                raise Fail(f"{args.input[0]}: none of {count} rows is usable ({_reasons(rejects) or 'it has no rows'})")
            group_items(work, args.group_by)
            split_items(work, config.seed, fold_of(config.fold))
            shards = list(plan_shards(work, config))
            low, high = args.shard_range or (0, len(shards))
            mine = [shard for i, shard in enumerate(shards) if low <= i < high and i % args.world == args.rank]
            records = write_dataset(shards, mine, database, output, config, pool)
        if args.rank or args.shard_range:
            print(
                f"{len(mine)} of {len(shards)} shards are this call's part; the manifest is written by a call without"
                " --shard-range, or by rank 0"
            )
            return DONE
        wait_for_others(shards, records, output)
        found = [records[shard.name] for shard in shards]
        return finish(work, found, rejects, count, args, config, time.monotonic() - start)


def _reasons(rejects: list[dict]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(r["reason"] for r in rejects).most_common())


def finish(
    work: sqlite3.Connection,
    records: list[dict],
    rejects: list[dict],
    count: int,
    args: argparse.Namespace,
    config: PrepConfig,
    seconds: float,
) -> int:
    """Everything beside the shards, the manifest last; returns the exit code. Raises Fail for too many rejects."""
    output = args.output

    def put(name: str, data: bytes) -> None:
        storage.put_whole(storage.join(output, name), data)

    storage.remove(storage.join(output, "manifest.json"))
    mini = create_mini_train(records, output, config.mini_shards)
    splits = {}
    for split in (*SPLITS, "mini_train"):
        own = [record for record in (*records, *mini) if record["name"].startswith(f"{split}/")]
        listed = [{key: record[key] for key in ("name", "samples", "bytes", "sha256")} for record in own]
        splits[split] = {"samples": sum(record["samples"] for record in own), "shards": listed}
    remove_stale(output, splits)
    report = split_report(work)
    items = write_items(work)
    put("items.csv", items)
    put("rejects.jsonl", rejects_file(rejects))
    put("split_report.json", json.dumps(report, indent=2, ensure_ascii=False).encode())
    put("contact_sheet.jpg", contact_sheet(work, config.seed))
    written = sum(record["samples"] for record in records)
    manifest = {
        "format": FORMAT,
        "settings": {"seed": config.seed, "image_size": config.image_size, "quality": config.quality},
        "versions": common.versions("pillow", "numpy"),
        "fold": config.fold,
        "splits": splits,
        "counts": {"input": count, "written": written, "rejected": len(rejects)},
        "items_sha256": common.digest(items),
    }
    sidecar = {"settings": dataclasses.asdict(config), "counts": manifest["counts"], "seconds": round(seconds, 2)}
    sidecar |= {"inputs": {path: common.file_digest(path) for path in args.input}, "versions": manifest["versions"]}
    put("prepare.json", json.dumps(sidecar, indent=2).encode())
    put("manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    print_report(report)
    if rejects:
        print(f"rejected: {_reasons(rejects)}; see {storage.join(output, 'rejects.jsonl')}")
    print(f"input {count} = written {written} + rejected {len(rejects)}")
    print(f"{count / max(seconds, 1e-9):.0f} rows a second; look at {storage.join(output, 'contact_sheet.jpg')}")
    if len(rejects) > config.max_failed * count:
        raise Fail(f"{len(rejects)} of {count} rows were rejected, more than --max-failed {config.max_failed}")
    return DONE


def remove_stale(output: str, splits: dict[str, dict]) -> None:
    """Remove shards and records of an older, larger catalogue, and parts of uploads that were killed."""
    for split, content in splits.items():
        folder = storage.join(output, split)
        wanted = {Path(shard["name"]).stem for shard in content["shards"]}
        for name, _ in storage.list_files(folder):
            if Path(name).stem not in wanted:
                storage.remove(storage.join(folder, name))
        if storage.is_s3(output):
            storage.abort_uploads(f"{folder}/")


def write_items(work: sqlite3.Connection) -> bytes:
    """items.csv: id, split and duplicate group of every item."""
    items = io.StringIO()
    writer = csv.writer(common.csv_rows(items))
    writer.writerow(["id", "split", "group"])
    writer.writerows(work.execute("SELECT id, split, grp FROM items ORDER BY position"))
    return items.getvalue().encode()


def rejects_file(rejects: list[dict]) -> bytes:
    """rejects.jsonl; without numbers of rows, for rows in another order are the same catalogue."""
    lines = sorted(
        common.canonical({name: value for name, value in reject.items() if name != "row"}) for reject in rejects
    )
    return b"".join(line + b"\n" for line in lines)


def shard_range(text: str) -> tuple[int, int]:
    """A:B as two numbers, for argparse."""
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text}: write two numbers, 0:8 for the first eight shards")
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
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    common.add_flags(parser, PrepConfig)
    return parser


def machine() -> tuple[int, int]:
    """RANK and WORLD_SIZE as torchrun and the like set them; (0, 1) for one machine."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        said = "these must be numbers, RANK below WORLD_SIZE; unset both on one machine"
        raise Fail(f"RANK={rank} WORLD_SIZE={world}: {said}", common.USAGE)
    return int(rank), int(world)


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.verify:
        return verify(args.output)
    args.rank, args.world = machine()
    if not args.input:
        raise Fail("--input is needed: the cleaned CSV", common.USAGE)
    if args.group_by and args.group_by not in common.Catalogue(args.input).columns:
        raise Fail(f"--group-by {args.group_by}: no such column in {args.input[0]}", common.USAGE)
    if fold_of(args.fold) and args.keep_split:
        raise Fail(
            "--fold with --keep-split: the parts of a catalogue are cut anew; leave one of them out", common.USAGE
        )
    args.workers = max(1, args.workers)
    return prepare(args, common.from_flags(PrepConfig, args))


if __name__ == "__main__":
    sys.exit(main())
