"""Which items look alike, and on which side of the split each one goes (stage 2).

Works on the tables `items` and `pictures` that 2_prepare.py fills. What is kept in memory for an item is its look, 64
bytes; all else stays in SQLite, which sorts on disk.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import sqlite3
import tempfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import common
import storage
from common import Fail
from storage import SPLITS

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
HASH_SIDE, GRID = 16, 8  # 16 x 16 gradients and 8 x 8 mean colours describe a picture
LOOKS = 4  # version of what is kept of a picture; a new one has all pictures looked at again
# Near duplicates: few gradients differ, and colours in fewer than five cells (a small product on white fills no more).
# Of 400 shop photos all are found again that were encoded anew, scaled to a third, mirrored or watermarked, and 97% of
# those cropped or padded by 2 to 5%. Of the 63 in full colour 2 to 5% pass for copies when they are dyed.
GRADIENT_DISTANCE, COLOR_DISTANCE, COLOR_CELLS = 0.2, 14, 5
BORDER = 16  # levels of brightness by which a picture differs from its border
NEIGHBOURS = 64  # that a picture is compared with in each band
PAIRS = 1 << 13  # compared at once

# --------------------------------------------------------------------------------------------------------------------
# Looks


def looks(image) -> tuple[bytes, bytes]:
    """(gradients, colours) of an RGB picture as it is, mirrored and, where it has a plain border, without that.

    Each look is 256 bits of left-to-right and 256 of top-to-bottom gradients, and 8 x 8 x 3 mean colours.
    """
    brightness = image.convert("L")
    seen = [shown := _small(image, brightness), [part[:, ::-1] for part in shown]]
    box = brightness.point(_beyond(brightness.getpixel((0, 0)))).getbbox()
    if box and min(box[2] - box[0], box[3] - box[1]) > HASH_SIDE and box != (0, 0, *image.size):
        seen.append(_small(image.crop(box), brightness.crop(box)))
    return b"".join(_gradients(grey) for grey, _ in seen), b"".join(grid.tobytes() for _, grid in seen)


@functools.cache
def _beyond(ground: int) -> list[int]:
    """What Image.point() needs to blacken all levels that are near to that of the border."""
    return [255 * (abs(level - ground) > BORDER) for level in range(256)]


def _small(image, brightness) -> list:
    """[int16 [17, 17] of brightness, uint8 [8, 8, 3] of colour] of a picture."""
    import numpy as np
    from PIL import Image

    grey = np.asarray(brightness.resize((HASH_SIDE + 1, HASH_SIDE + 1), Image.BOX), np.int16)
    return [grey, np.asarray(image.resize((GRID, GRID), Image.BOX), np.uint8)]


def _gradients(grey) -> bytes:
    """Where grey rises to the right, and where downwards, 512 bits."""
    import numpy as np

    # A step of 3 levels and more: what is flat stays flat when a picture is encoded again.
    across = grey[:-1, 1:] - grey[:-1, :-1] > 2
    down = grey[1:, :-1] - grey[:-1, :-1] > 2
    return np.packbits(np.stack([across, down])).tobytes()


def near_pairs(bits, grids) -> Iterator[tuple[int, int]]:
    """Pairs of near duplicates among uint8 [N, 64] gradients and uint8 [N, 192] colours, without comparing all pairs.

    Candidates agree in one of 32 bands of 16 gradients (of copies, most bands do). A band without any gradient is
    plain ground and says nothing; in a crowded band each picture meets its 64 neighbours in order of all gradients.
    """
    import numpy as np

    words = bits.view(np.uint64)  # (N, 8)
    weight = np.bitwise_count(words).sum(axis=1, dtype=np.int32)
    ranked = np.argsort(bits.view(f"S{bits.shape[1]}").ravel()).astype(np.uint32)  # in order of all gradients
    for band in range(bits.shape[1] // 2):
        key = bits[ranked, 2 * band].astype(np.uint16) << 8 | bits[ranked, 2 * band + 1]
        order = np.argsort(key, kind="stable").astype(np.uint32)
        key, order = key[order], ranked[order]
        plain = np.searchsorted(key, 1)
        key, order = key[plain:], order[plain:]
        for gap in range(1, min(NEIGHBOURS + 1, len(order))):
            same = np.flatnonzero(key[:-gap] == key[gap:])
            if not len(same):
                break
            for start in range(0, len(same), PAIRS):
                place = same[start : start + PAIRS]
                a, b = order[place], order[place + gap]
                apart = np.bitwise_count(words[a] ^ words[b]).sum(axis=1, dtype=np.int32)
                near = apart <= GRADIENT_DISTANCE * (weight[a] + weight[b])
                a, b = a[near], b[near]
                cells = np.abs(grids[a].astype(np.int16) - grids[b]).reshape(len(a), GRID * GRID, 3).max(axis=2)
                tint = np.partition(cells, -COLOR_CELLS, axis=1)[:, -COLOR_CELLS]
                near = tint <= COLOR_DISTANCE
                yield from zip(a[near].tolist(), b[near].tolist(), strict=True)


# --------------------------------------------------------------------------------------------------------------------
# Groups


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

    def join_equals(self, pairs: Iterable[tuple[str, int]]) -> None:
        """Join those whose value is the same; (value, member) come in order of the values. "" equals nothing."""
        last, first = "", 0
        for value, i in pairs:
            if value and value == last:
                self.join(first, i)
            else:
                last, first = value, i


def group_items(work: sqlite3.Connection, group_by: str | None) -> None:
    """Set `position`, the rank by id, and `grp`, the smallest id among its exact and near duplicates, of every item.

    With `group_by`, items with the same text in that column are one group as well.
    """
    work.execute(
        "UPDATE items SET position = ranked.position FROM"
        " (SELECT id, ROW_NUMBER() OVER (ORDER BY id) - 1 AS position FROM items) AS ranked WHERE ranked.id = items.id"
    )
    (count,) = work.execute("SELECT COUNT(*) FROM items").fetchone()
    groups = Groups(count)
    same_file = "SELECT source, position FROM items JOIN pictures USING (path, size, changed) ORDER BY source, position"
    groups.join_equals(work.execute(same_file))
    if group_by:
        work.create_function("cell", 1, lambda fields: json.loads(fields).get(group_by, ""), deterministic=True)
        groups.join_equals(work.execute("SELECT cell(fields) AS value, position FROM items ORDER BY value, position"))
    with tempfile.TemporaryFile() as scratch:
        positions, bits, grids = _read_looks(work, scratch)
        for i, j in near_pairs(bits, grids):
            groups.join(positions[i], positions[j])
        del grids
    shared = {root for i in range(count) if (root := groups.find(i)) != i}
    names = {}  # of the groups with several members

    def named() -> Iterator[tuple[str, int]]:
        for i, (id,) in enumerate(work.execute("SELECT id FROM items ORDER BY position")):
            if i in shared:
                names[i] = id
            yield names.get(groups.find(i), id), i

    work.execute("CREATE INDEX by_position ON items (position)")
    work.executemany("UPDATE items SET grp = ? WHERE position = ?", named())
    work.commit()


def _read_looks(work: sqlite3.Connection, scratch) -> tuple:
    """(positions, uint8 [N, 64] gradients, uint8 [N, 192] colours mapped from `scratch`) of each look of each picture.

    Several items that share a picture are known by the first.
    """
    import numpy as np

    width, depth = HASH_SIDE * HASH_SIDE // 4, GRID * GRID * 3
    positions, bits = array("l"), bytearray()
    query = (
        "SELECT MIN(position) AS first, bits, grid FROM items JOIN pictures USING (path, size, changed)"
        " GROUP BY source ORDER BY first"
    )
    for position, some, grid in work.execute(query):
        positions.extend([position] * (len(some) // width))
        bits += some
        scratch.write(grid)
    scratch.flush()
    grids = np.memmap(scratch, np.uint8, "r", shape=(len(positions), depth)) if positions else np.empty((0, depth))
    return positions, np.frombuffer(bits, np.uint8).reshape(-1, width), grids


# --------------------------------------------------------------------------------------------------------------------
# Sides


def choose_splits(
    groups: Iterable[tuple[str, str, int, str | None]], shares: dict[str, float] = SHARES
) -> Iterator[tuple[str, str]]:
    """(group, split) for each (group, object type, size, split that it must keep).

    Groups come type by type, the large ones of a type first, those that must stay before all. Each goes where its type
    and the whole together lack most against the shares. So a type is off by an item or two, the whole by less than its
    largest group, and hundreds of one-item types add up right.
    """
    have, whole = defaultdict(Counter), Counter()
    for group, kind, size, split in groups:
        if not split:
            of_kind, of_all = sum(have[kind].values()) + size, sum(whole.values()) + size
            lack = {name: share * (of_kind + of_all) - have[kind][name] - whole[name] for name, share in shares.items()}
            # Half the catalogue in one group is no test set.
            too_large = size if size > of_all * 0.1 else 0
            split = max(shares, key=lambda name: lack[name] - (too_large if name != "train" else 0))
        have[kind][split] += size
        whole[split] += size
        yield group, split


def fold_of(text: str) -> tuple[int, int] | None:
    """(K, N) of "K/N", None of ""; raises Fail."""
    part, _, parts = text.partition("/")
    if not text:
        return None
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts) >= 3):
        raise Fail(f"--fold {text}: write K/N, part 0 to N-1 of at least 3, such as 0/5", common.USAGE)
    return int(part), int(parts)


def split_items(work: sqlite3.Connection, seed: int, fold: tuple[int, int] | None = None) -> None:
    """Set `split` and the seeded `place` of every item; those in the table `kept` stay where they were.

    With `fold` (K, N) the catalogue is cut into N equal parts, the same for each K: part K is the test split, the part
    after it the validation split, and so over all K each item is tested on once.
    """
    shares, sides = SHARES, {split: split for split in SPLITS}
    if fold:
        part, parts = fold
        shares = {str(i): 1 / parts for i in range(parts)}
        sides = dict.fromkeys(shares, "train") | {str(part): "test", str((part + 1) % parts): "validation"}
    work.create_function("drawn", -1, lambda *what: bytes.fromhex(common.digest([seed, *what])), deterministic=True)
    work.execute("CREATE TEMP TABLE sides (grp TEXT PRIMARY KEY, split TEXT)")
    groups = work.execute(
        "SELECT grp, MIN(type) AS kind, COUNT(*) AS count, MIN(kept.split) AS side FROM items LEFT JOIN kept USING (id)"
        " GROUP BY grp ORDER BY side IS NULL, kind, count DESC, drawn(grp)"
    )
    chosen = ((group, sides[side]) for group, side in choose_splits(groups, shares))
    work.executemany("INSERT INTO sides VALUES (?, ?)", chosen)
    work.execute(
        "UPDATE items SET place = drawn('place', id), split = COALESCE("
        "(SELECT split FROM kept WHERE kept.id = items.id), (SELECT split FROM sides WHERE sides.grp = items.grp))"
    )
    work.execute("CREATE INDEX by_place ON items (split, place)")
    work.commit()


def keep_splits(work: sqlite3.Connection, path: str | None) -> None:
    """Fill the table `kept` with the split of every item of an older run, from the items.csv beside its manifest.

    While a run is under way its folder has no manifest; then items.csv, which is older or of that very run, will do.
    """
    work.execute("CREATE TEMP TABLE kept (id TEXT PRIMARY KEY, split TEXT)")
    if not path:
        return
    base = path.removesuffix("manifest.json") or "."
    items = storage.join(base, "items.csv")
    listed = storage.exists(items)
    if storage.exists(storage.join(base, "manifest.json")) or not listed:
        expected = storage.load_manifest(base).get("items_sha256")
        if not listed or common.digest(storage.read_bytes(items)) != expected:
            raise Fail(f"{items}: does not belong to that manifest; give --keep-split a whole shard folder")
    with storage.open_read(items) as handle:
        rows = csv.DictReader(io.TextIOWrapper(handle, encoding="utf-8", newline=""))
        work.executemany("INSERT INTO kept VALUES (:id, :split)", rows)


# --------------------------------------------------------------------------------------------------------------------
# Report


def random_split_leaks(work: sqlite3.Connection) -> float:
    """Expected share of held-out items with a duplicate in train, had 80/10/10 been drawn item by item."""
    held = 1 - SHARES["train"]
    leaked = whole = 0
    for size, count in work.execute(
        "SELECT size, COUNT(*) FROM (SELECT COUNT(*) AS size FROM items GROUP BY grp) GROUP BY size"
    ):
        leaked += count * size * (1 - held ** (size - 1))
        whole += count * size
    return leaked / max(1, whole)


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
    apart = work.execute("SELECT grp FROM items GROUP BY grp HAVING COUNT(DISTINCT split) > 1 ORDER BY grp").fetchall()
    return {
        "splits": {split: sum(counts[split] for counts in by_type.values()) for split in SPLITS},
        "types": by_type,
        "duplicate_groups": dict(groups),
        "groups_kept_apart": [group for (group,) in apart],  # only by --keep-split, which moves nothing
        "random_split_leak": round(random_split_leaks(work), 4),
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
