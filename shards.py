"""Writing WebDataset shards, each whole and with the same bytes whoever makes it, and holding them to their manifest.

Stage 2 plans which items make up a shard, any process of any machine writes it, and a record beside it says what it
was made of.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sqlite3
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import common
import storage
from common import DONE, FAILED, Fail, PrepConfig
from storage import SPLITS

FORMAT = 2  # of manifest and records; a new one rebuilds every shard
SHARD_SAMPLES, SHARD_BYTES = 1000, 500_000_000  # at most, tar headers counted
REMEDY = "remove those shards, run 2_prepare.py again, and they are made anew"
WAIT = 1.0  # seconds between two looks at what other machines have finished

# --------------------------------------------------------------------------------------------------------------------
# One sample


def sample_text(fields: dict[str, str], group: str, source: str, seed: int) -> tuple[bytes, bytes]:
    """(json, txt) of one item."""
    meta = common.clean_metadata(fields)
    filled = common.prompts(meta)
    prompt = filled[int(common.digest([seed, "prompt", fields["id"]])[:8], 16) % len(filled)]
    used = {"id", "image_path", "clean_title", *common.ATTRIBUTES}
    record = {
        "id": fields["id"],
        **meta,
        "image_path": fields["image_path"],
        "group": group,
        "source": source,
        "row": {name: value for name, value in fields.items() if name not in used},
    }
    return common.canonical(record), prompt.encode()


_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # fixed owner, mode and time: the same on any machine and day


def tar_member(name: str, data: bytes) -> bytes:
    """Header (POSIX ustar, as tarfile makes it, in a fifth of the time), content and padding of one file."""
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode()
    header[124:136] = b"%011o\0" % len(data)
    header[148:156] = b" " * 8  # the checksum counts itself as blanks
    header[148:156] = b"%06o\0 " % sum(header)
    return b"".join((header, data, bytes(-len(data) % tarfile.BLOCKSIZE)))


# --------------------------------------------------------------------------------------------------------------------
# Plan


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard to be: its name, the number of its first sample, and the digest of all that goes into it."""

    name: str
    split: str
    first: int
    offset: int  # of its first sample within the split's order
    count: int
    plan: str

    @property
    def record(self) -> str:
        """Name of the file that says that the shard is finished."""
        return self.name.removesuffix(".tar") + ".json"


def picture_settings(config: PrepConfig) -> list:
    """What a JPEG in the shards depends on beside the picture's file."""
    return [FORMAT, config.image_size, config.quality, common.versions("pillow")["pillow"]]


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
            plan = common.digest([made_by, first, chunk])
            yield Shard(f"{split}/shard-{number:06d}.tar", split, first, start, len(chunk), plan)
            first += len(chunk)


# --------------------------------------------------------------------------------------------------------------------
# Write


def write_shard(job: tuple[Shard, str, str, PrepConfig]) -> dict[str, Any]:
    """Make one shard; any process of any machine gives the same bytes. Returns its record.

    An older shard goes, the record comes, then the shard, whole: a shard at its place is always that of its record.
    """
    shard, database, output, config = job
    target = storage.join(output, shard.name)
    temporary = Path(f"{database}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as tar:
            for position, (fields, group, source, jpg) in enumerate(_samples(shard, database), shard.first):
                members = (jpg, *sample_text(json.loads(fields), group, source, config.seed))
                for extension, data in zip(("jpg", "json", "txt"), members, strict=True):
                    tar.write(tar_member(f"{position:09d}.{extension}", data))
            tar.write(bytes(2 * tarfile.BLOCKSIZE))  # two empty blocks end a tar, which fills whole records
            tar.write(bytes(-tar.tell() % tarfile.RECORDSIZE))
        record = {
            "name": shard.name, "samples": shard.count, "bytes": temporary.stat().st_size,
            "sha256": common.file_digest(temporary), "plan": shard.plan,
        }  # fmt: skip
        if record["bytes"] > SHARD_BYTES:
            raise Fail(f"{shard.name}: {record['bytes']} bytes, over the limit of {SHARD_BYTES}; shorten the columns")
        storage.remove(target)
        storage.put_whole(storage.join(output, shard.record), common.canonical(record))
        _publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return record


def _publish(temporary: Path, target: str) -> None:
    """Put a finished file at its place: uploaded, or renamed, for the scratch database lies on the same disk."""
    if storage.is_s3(target):
        storage.put_whole(target, temporary)
        return
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, target)


def _samples(shard: Shard, database: str) -> Iterator[tuple[str, str, str, bytes]]:
    """(fields, group, source, JPEG) of a shard's items in order, one in memory at a time."""
    work = sqlite3.connect(f"{Path(database).resolve().as_uri()}?mode=ro", uri=True)
    order = "SELECT rowid FROM items WHERE split = ? ORDER BY place LIMIT ? OFFSET ?"
    for (rowid,) in work.execute(order, (shard.split, shard.count, shard.offset)).fetchall():
        yield work.execute(
            "SELECT fields, grp, source, jpg FROM items JOIN pictures USING (path, size, changed)"
            " WHERE items.rowid = ?",
            (rowid,),
        ).fetchone()
    work.close()


def finished(output: str, shard: Shard, present: dict[str, int]) -> dict[str, Any] | None:
    """The record of a shard that is there already with just this content, else None."""
    if shard.name not in present or shard.record not in present:
        return None
    try:
        record = json.loads(storage.read_bytes(storage.join(output, shard.record)))
        return record if record["plan"] == shard.plan and record["bytes"] == present[shard.name] else None
    except (ValueError, KeyError, TypeError):
        return None


def write_dataset(
    shards: list[Shard], mine: list[Shard], database: Path, output: str, config: PrepConfig, pool: Executor
) -> dict[str, dict]:
    """Write those of `mine` that are not there yet; returns {name: record} of all that are there then."""
    records = look_for(shards, output)
    todo = [shard for shard in mine if shard.name not in records]
    if len(records) < len(shards):  # a manifest never describes a folder that is being changed
        storage.remove(storage.join(output, "manifest.json"))
    jobs = [(shard, str(database), output, config) for shard in todo]
    for record in common.progress(pool.map(write_shard, jobs), "write", len(jobs), "shard"):
        records[record["name"]] = record
    print(f"shards: {len(shards)}, of which {len(mine) - len(todo)} were there already")
    return records


def look_for(shards: list[Shard], output: str) -> dict[str, dict]:
    """{name: record} of those shards that are finished."""
    present = dict(storage.list_files(output))
    return {shard.name: record for shard in shards if (record := finished(output, shard, present))}


def wait_for_others(shards: list[Shard], records: dict[str, dict], output: str) -> None:
    """Add to `records` what the other machines make, until all is there."""
    said = 0.0
    while missing := [shard for shard in shards if shard.name not in records]:
        if time.monotonic() - said >= 60:
            said = time.monotonic()
            print(
                f"waiting for {len(missing)} shards of the other machines, {missing[0].name} the first; they need the"
                " same input and WORLD_SIZE. To make them here, stop this and run without RANK and WORLD_SIZE",
                flush=True,
            )
        time.sleep(WAIT)
        records |= look_for(missing, output)


def create_mini_train(records: list[dict], output: str, count: int) -> list[dict]:
    """mini_train: the first train shards again, under the same numbers."""
    mini = []
    for record in [record for record in records if record["name"].startswith("train/")][:count]:
        name = record["name"].replace("train/", "mini_train/")
        storage.copy_whole(storage.join(output, record["name"]), storage.join(output, name))
        mini.append(record | {"name": name})
    return mini


# --------------------------------------------------------------------------------------------------------------------
# Verify


def verify(output: str) -> int:
    """Hold a shard folder against its manifest; prints each fault and returns the exit code."""
    manifest = storage.load_manifest(output)
    present = dict(storage.list_files(output))
    listed = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    faults = []
    for shard in common.progress(listed, "verify", len(listed), "shard"):
        name = shard["name"]
        if name not in present:
            faults.append(f"{name}: missing")
            continue
        total, size = hashlib.sha256(), 0
        with storage.open_read(storage.join(output, name)) as handle:
            while block := handle.read(1 << 20):
                total.update(block)
                size += len(block)
        if size != shard["bytes"]:
            faults.append(f"{name}: {size} bytes, {shard['bytes']} by the manifest")
        elif total.hexdigest() != shard["sha256"]:
            faults.append(f"{name}: content is not that of the manifest")
    known = {shard["name"] for shard in listed}
    faults += [f"{name}: not in the manifest" for name in present if name.endswith(".tar") and name not in known]
    for fault in faults:
        print(fault)
    print(f"{len(listed)} shards checked, {len(faults)} faults" + (f"; {REMEDY}" if faults else ""))
    return FAILED if faults else DONE
