"""The rows, request files and results of stage 1, and the cleaned CSV that they become.

One SQLite file in the workspace, whose transactions are what survives a kill. Items are keyed by the digest of model,
prompt, title and photo; a row points to its item. A request file is registered when it is whole, in one transaction
with its items; a batch's results are taken in in one transaction. What is not registered was never sent.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import hashlib
import itertools
import json
import math
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import common
from chat import (
    ANSWER_TOKENS,
    FIELDS,
    PATCH_FACTOR,
    PROMPT_VERSION,
    Built,
    Outcome,
    build_rows,
    queue_tokens,
    read_result,
    request_template,
    speakable,
    with_more_room,
)
from common import CleaningConfig, Fail

# Batch prices, US dollars for a million tokens (input, output). Without the Batch API it is twice as much.
PRICES = {"gpt-5-nano": (0.025, 0.20), "gpt-5-mini": (0.125, 1.00), "gpt-5.4-nano": (0.10, 0.625)}

FLUSH = 500  # planned rows that are held before they are written


def say(text: str) -> None:
    print(text, flush=True)


TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS rows (number INTEGER PRIMARY KEY, id TEXT, digest TEXT, reason TEXT, detail TEXT);
CREATE INDEX IF NOT EXISTS rows_by_digest ON rows (digest);
CREATE TABLE IF NOT EXISTS items (  -- status: queued (in a request file), again, ok, failed
    digest TEXT PRIMARY KEY, status TEXT, attempts INTEGER DEFAULT 0, reason TEXT, detail TEXT,
    clean_title TEXT, style TEXT, material TEXT, color TEXT, object_type TEXT,
    prompt_tokens INTEGER DEFAULT 0, output_tokens INTEGER DEFAULT 0, usd REAL DEFAULT 0,
    file TEXT, offset INTEGER, length INTEGER, tokens INTEGER, patches INTEGER) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS items_by_file ON items (file, offset);
CREATE INDEX IF NOT EXISTS items_by_status ON items (status);
CREATE TABLE IF NOT EXISTS files (
    name TEXT PRIMARY KEY, sha256 TEXT, bytes INTEGER, requests INTEGER, tokens INTEGER, patches INTEGER,
    pilot INTEGER, done INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS collected (batch TEXT PRIMARY KEY, file TEXT, status TEXT, summary TEXT);
CREATE TABLE IF NOT EXISTS failures (digest TEXT, batch TEXT, attempt INTEGER, reason TEXT);
"""


class RequestFile:
    """A request file being written: at its temporary name until closed."""

    def __init__(self, folder: Path, name: str, pilot: bool):
        self.name, self.pilot = name, pilot
        self.bytes = self.requests = self.tokens = self.patches = 0
        self.stack = contextlib.ExitStack()
        self.handle = self.stack.enter_context(common.whole_file(folder / name)).open("wb")
        self.hash = hashlib.sha256()
        self.items: list[tuple] = []

    def add(self, key: str, line: bytes, tokens: int, patches: int) -> None:
        self.handle.write(line)
        self.hash.update(line)
        self.items.append((key, self.name, self.bytes, len(line), tokens, patches))
        self.bytes += len(line)
        self.requests += 1
        self.tokens += tokens
        self.patches += patches

    def close(self) -> tuple:
        """Move it to its name; gives the row for the files table."""
        self.handle.close()
        self.stack.close()
        counts = (self.bytes, self.requests, self.tokens, self.patches)
        return (self.name, self.hash.hexdigest(), *counts, int(self.pilot))


class DataProcessor:
    """Rows -> request files, results -> items, items -> the cleaned CSV."""

    def __init__(self, args: argparse.Namespace, settings: CleaningConfig):
        self.args, self.settings = args, settings
        self.workspace = Path(args.workspace)
        self.requests, self.raw = self.workspace / "requests", self.workspace / "raw"
        for folder in (self.requests, self.raw):
            folder.mkdir(parents=True, exist_ok=True)
        self.path = self.workspace / "results.sqlite"
        try:
            self.db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self.db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA cache_size=-512;" + TABLES)
        except sqlite3.OperationalError:  # a full disk, a forbidden folder
            raise
        except sqlite3.DatabaseError as error:
            raise Fail(
                f"{self.path}: {error}; move it away and run again: results are read back from {self.raw}"
            ) from None
        if not self.meta("read back"):
            self.read_back()

    def query(self, sql: str, *values: Any) -> list[tuple]:
        return self.db.execute(sql, values).fetchall()

    def one(self, sql: str, *values: Any) -> Any:
        row = self.db.execute(sql, values).fetchone()
        return row[0] if row else None

    def meta(self, key: str, value: str | None = None) -> str | None:
        if value is not None:
            self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
        return self.one("SELECT value FROM meta WHERE key = ?", key)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def read_back(self) -> None:
        """Fill a new store with the answers that the raw results hold: the store may be lost, paid answers not."""
        with self.transaction():
            self.meta("read back", "1")
            for path in sorted(self.raw.glob("*.jsonl")):
                for line in read_lines(path):
                    outcome = read_result(line)
                    key = speakable(str(line.get("custom_id")))
                    new = "INSERT OR IGNORE INTO items (digest) VALUES (?)"
                    if outcome.kind == "ok" and self.db.execute(new, (key,)).rowcount:
                        self.store(key, outcome, "read back")

    # -- planning
    def signature(self) -> str:
        """What the plan depends on: the input files and the settings that shape requests."""
        inputs = [common.file_digest(path) for path in self.args.input]
        return common.digest([inputs, str(self.folder), PROMPT_VERSION, self.shape(), self.settings.limit])

    def shape(self) -> str:
        """What a request line is made by, beside title and photo."""
        template = b"@@".join(request_template(self.settings)).decode()
        return common.digest([template, self.settings.image_size, self.settings.jpeg_quality])

    @property
    def folder(self) -> Path:
        return common.images_folder(self.args.images, self.args.input)

    def catalogue(self) -> tuple[common.Catalogue, Iterator[common.Row]]:
        catalogue = common.Catalogue(self.args.input)
        return catalogue, itertools.islice(catalogue, self.settings.limit)

    def planned(self) -> bool:
        """Whether rows and request files are those of the present input, and the files are there."""
        again = "SELECT DISTINCT file FROM items WHERE status = 'again' AND file IS NOT NULL"
        needed = self.query(f"SELECT name FROM files WHERE NOT done UNION {again}")
        there = all((self.requests / name).exists() for (name,) in needed)
        return there and self.meta("plan") == self.signature()

    def prepare(self, sent: set[str]) -> int:
        """Give every row its digest or reason, and write request files for what was never asked; gives their number.

        `sent` names the files that are, or may be, in flight.
        """
        _, rows = self.catalogue()
        signature = self.signature()
        if self.meta("shape") not in (None, self.shape()):
            self.meta("plan", "")  # first, so that after a kill all is planned anew
            self.forget_lines(sent)
        self.meta("shape", self.shape())
        self.heal(sent)
        with self.transaction():
            self.meta("plan", ""), self.meta("written", "")
            self.db.execute("DELETE FROM rows")

        def blocks() -> Iterator[list]:
            while block := list(itertools.islice(rows, 32)):
                good = [row for row in block if not row.reason]
                self.db.executemany(
                    "INSERT INTO rows VALUES (?, ?, NULL, ?, '')",
                    [(r.number, r.id, r.reason) for r in block if r.reason],
                )
                yield [(row.number, row.id, row.fields["name"], row.fields["image_path"]) for row in good]

        workers = self.settings.workers or os.cpu_count() or 1
        built = build_rows(blocks(), workers, self.settings, self.folder, self.path)
        pilot = self.settings.pilot if self.meta("sound") != self.sound_key() else 0
        fresh = self.write_plan(common.progress(built, "prepare"), pilot)
        if self.settings.retry_failed:
            self.db.execute(
                "UPDATE items SET status = 'again', attempts = 0 WHERE status = 'failed' AND file IS NOT NULL"
                " AND digest IN (SELECT digest FROM rows)"
            )
        if not self.one("SELECT COUNT(*) FROM rows"):
            raise Fail(f"{', '.join(self.args.input)}: no rows; check --input and --limit")
        self.meta("plan", signature)
        return fresh

    def write_plan(self, built: Iterable[Built], pilot: int) -> int:
        """Write rows and request files. Items are 'building' until their file is whole and registered."""
        rows: list[tuple] = []
        keys: set[str] = set()  # not in the database yet
        file: RequestFile | None = None
        fresh = 0

        def flush() -> None:
            self.db.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?)", rows)
            if file:
                self.db.executemany(
                    "INSERT INTO items (digest, file, offset, length, tokens, patches, status)"
                    " VALUES (?, ?, ?, ?, ?, ?, 'building')", file.items)  # fmt: skip
                file.items.clear()
            rows.clear(), keys.clear()

        def register() -> None:
            with self.transaction():
                flush()
                self.add_file(file)
                self.db.execute(
                    "UPDATE items SET status = 'queued' WHERE file = ? AND status = 'building'", (file.name,)
                )

        for row in built:
            new = row.line is not None and row.digest not in keys
            if new and not self.one("SELECT 1 FROM items WHERE digest = ?", row.digest):
                if file and self.full(file, row.line, pilot):
                    register()
                    file = None
                file = file or RequestFile(self.requests, self.next_name(), pilot=bool(pilot) and fresh == 0)
                file.add(row.digest, row.line, row.tokens, row.patches)
                keys.add(row.digest)
                fresh += 1
            rows.append((row.number, row.id, row.digest, row.reason, row.detail))
            if len(rows) >= FLUSH:
                with self.transaction():
                    flush()
        if file:
            register()
        with self.transaction():
            file = None
            flush()
        return fresh

    def full(self, file: RequestFile, line: bytes, pilot: int) -> bool:
        requests = min(self.settings.max_requests_per_file, pilot if file.pilot else math.inf)
        return file.bytes + len(line) >= self.settings.max_batch_file_size or file.requests >= requests

    def add_file(self, file: RequestFile) -> None:
        columns = "name, sha256, bytes, requests, tokens, patches, pilot"
        self.db.execute(f"INSERT INTO files ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", file.close())

    def next_name(self) -> str:
        last = self.one("SELECT MAX(name) FROM files")
        return f"{int(last[:6]) + 1 if last else 1:06d}.jsonl"

    def heal(self, sent: set[str]) -> None:
        """Bring request files and their table together after a kill, or after somebody tidied up."""
        self.db.execute("DELETE FROM items WHERE status = 'building'")
        registered = {name for (name,) in self.query("SELECT name FROM files")}
        for path in [*self.requests.glob("*.jsonl"), *self.requests.glob(".*.tmp")]:
            if path.name not in registered:  # never sent, for only registered files are
                path.unlink()
        for name in sorted(registered):
            if not (self.requests / name).exists():
                self.forget(name, ["again"] if name in sent else ["again", "queued"], done=name not in sent)

    def forget(self, name: str, statuses: list[str], done: bool = True) -> None:
        """Drop a file's items of these statuses, to be built anew; what their attempts cost stays in the sum."""
        chosen = f"FROM items WHERE file = ? AND status IN ({', '.join('?' * len(statuses))})"
        with self.transaction():
            self.db.execute(
                "INSERT INTO items (digest, status, prompt_tokens, output_tokens, usd)"
                f" SELECT '', 'forgotten', TOTAL(prompt_tokens), TOTAL(output_tokens), TOTAL(usd) {chosen}"
                " ON CONFLICT (digest) DO UPDATE SET usd = usd + excluded.usd,"
                " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
                " output_tokens = output_tokens + excluded.output_tokens",
                (name, *statuses),
            )
            self.db.execute(f"DELETE {chosen}", (name, *statuses))
            if done:
                self.db.execute("UPDATE files SET done = 1 WHERE name = ?", (name,))

    def forget_lines(self, sent: set[str]) -> None:
        """The settings that shape requests have changed: lines that wait are built anew, with --retry-failed those
        that failed too."""
        for (name,) in self.query("SELECT name FROM files"):
            if name not in sent:
                self.forget(name, ["again", "queued", *(["failed"] if self.settings.retry_failed else [])])

    def unsent(self, busy: set[str]) -> list[tuple[str, str, int, int, int, int]]:
        """(name, sha256, requests, tokens, patches, pilot) of the files to be sent, the pilot first."""
        sql = (
            "SELECT name, sha256, requests, tokens, patches, pilot FROM files WHERE NOT done ORDER BY pilot DESC, name"
        )
        return [row for row in self.query(sql) if row[0] not in busy]

    def sound_key(self) -> str:
        return f"{self.settings.model} {PROMPT_VERSION}"

    def needed(self, name: str) -> int:
        """Requests of a file that the present rows still need."""
        sql = "SELECT COUNT(*) FROM items WHERE file = ? AND status = 'queued' AND digest IN (SELECT digest FROM rows)"
        return self.one(sql, name)

    def put_back(self, name: str, batch: str | None = None, status: str = "") -> None:
        """Close a file without results: its lines are grouped anew, no attempt is used; those of no row are dropped."""
        with self.transaction():
            self.db.execute(
                "DELETE FROM items WHERE file = ? AND status = 'queued' AND attempts = 0"
                " AND digest NOT IN (SELECT digest FROM rows WHERE digest IS NOT NULL)",
                (name,),
            )
            self.db.execute("UPDATE items SET status = 'again' WHERE file = ? AND status = 'queued'", (name,))
            self.close_file(name, batch, status, {})

    def close_file(self, name: str, batch: str | None, status: str, summary: dict) -> None:
        self.db.execute("UPDATE files SET done = 1 WHERE name = ?", (name,))
        if batch:
            self.note_batch(batch, name, status, summary)

    def requests_of(self, name: str) -> int:
        return self.one("SELECT requests FROM files WHERE name = ?", name) or 0

    def is_pilot(self, name: str) -> bool:
        return bool(self.one("SELECT pilot FROM files WHERE name = ?", name))

    def refuse_lines(self, batch: str, name: str, bad: dict[int, tuple[str, str]]) -> None:
        """A batch that failed for some of its lines (counted from 1): those are rejected, the others go back."""
        keys = {}
        with contextlib.suppress(FileNotFoundError), open(self.requests / name, "rb") as source:
            keys = {n: json.loads(line)["custom_id"] for n, line in enumerate(source, 1) if n in bad}
        with self.transaction():
            for number, key in keys.items():
                code, detail = bad[number]
                self.store(key, Outcome("final", reason=f"request refused: {code}", detail=detail), batch)
        self.put_back(name, batch, "failed")

    def note_batch(self, batch: str, name: str, status: str, summary: dict) -> None:
        text = json.dumps(summary, ensure_ascii=False)
        self.db.execute("INSERT OR REPLACE INTO collected VALUES (?, ?, ?, ?)", (batch, name, status, text))

    def regroup(self, max_tokens: int | None = None, pilot: bool = False) -> int:
        """Copy the lines to be asked again into new request files; gives the number of lines."""
        sql = (
            "SELECT digest, file, offset, length, tokens, patches, reason FROM items WHERE status = 'again'"
            " AND digest IN (SELECT digest FROM rows) ORDER BY file, offset"
        )
        file, count = None, 0

        def register() -> None:
            update = (
                "UPDATE items SET status = 'queued', file = ?2, offset = ?3, length = ?4, tokens = ?5, patches = ?6"
                " WHERE digest = ?1"
            )
            with self.transaction():
                self.add_file(file)
                self.db.executemany(update, file.items)

        for key, name, offset, length, tokens, patches, reason in self.query(sql):  # offsets, not lines
            line = read_at(self.requests / name, offset, length)
            if reason == "length":
                line = with_more_room(line)
            taken = queue_tokens(file.tokens + tokens, file.patches + patches) if file else 0
            if file and (self.full(file, line, self.settings.pilot) or (max_tokens and taken > max_tokens)):
                register()
                file = None
            file = file or RequestFile(self.requests, self.next_name(), pilot=pilot and count == 0)
            file.add(key, line, tokens, patches)
            count += 1
        if file:
            register()
        return count

    def next_lines(self, count: int) -> dict[str, bytes]:
        """Up to `count` request lines that wait for an answer, by digest."""
        sql = (
            "SELECT digest, file, offset, length, reason FROM items WHERE status IN ('queued', 'again')"
            " AND digest IN (SELECT digest FROM rows) ORDER BY attempts, file, offset LIMIT ?"
        )
        lines = {}
        for key, name, offset, length, reason in self.query(sql, count):
            line = read_at(self.requests / name, offset, length)
            lines[key] = with_more_room(line) if reason == "length" else line
        return lines

    # -- results
    def store(self, key: str, outcome: Outcome, batch: str) -> None:
        """Write an outcome to its item (inside a transaction)."""
        used_tokens = (outcome.prompt_tokens, outcome.output_tokens)
        tokens = (*used_tokens, self.cost(*used_tokens), key)
        used = "prompt_tokens = prompt_tokens + ?, output_tokens = output_tokens + ?, usd = usd + ? WHERE digest = ?"
        if outcome.kind == "ok":
            columns = ", ".join(f"{name} = ?" for name in FIELDS)
            values = [outcome.fields[name] for name in FIELDS]
            sql = f"UPDATE items SET status = 'ok', reason = NULL, detail = NULL, {columns}, {used}"
            self.db.execute(sql, (*values, *tokens))
            return
        attempt = int(outcome.kind in ("again", "final"))
        tries = attempt + self.one("SELECT attempts FROM items WHERE digest = ?", key)
        spent = outcome.kind == "final" or tries >= self.settings.max_attempts
        status = "failed" if attempt and spent else "again"
        sql = f"UPDATE items SET status = ?, attempts = ?, reason = ?, detail = ?, {used}"
        self.db.execute(sql, (status, tries, outcome.reason, outcome.detail, *tokens))
        self.db.execute("INSERT INTO failures VALUES (?, ?, ?, ?)", (key, batch, tries, outcome.reason))

    def collect(self, batch: str, name: str, status: str, paths: Iterable[Path], rest: Outcome) -> dict[str, int]:
        """Take in a batch's results, once: each line of the file gets its own result, or `rest` where it has none."""
        summary: collections.Counter = collections.Counter()
        if taken := self.one("SELECT summary FROM collected WHERE batch = ?", batch):  # killed right after that
            return collections.Counter(json.loads(taken))
        with self.transaction():
            for path in paths:
                for line in read_lines(path):
                    key = speakable(str(line.get("custom_id")))
                    # It stands in another file where the store was lost and the rows were planned anew.
                    if self.one("SELECT status FROM items WHERE digest = ?", key) != "queued":
                        summary["unreadable, unknown or repeated result"] += 1
                        continue
                    outcome = read_result(line)
                    self.store(key, outcome, batch)
                    summary[outcome.reason or "ok"] += 1
                    summary["quota stop"] += outcome.kind == "quota"
            for (key,) in self.query("SELECT digest FROM items WHERE file = ? AND status = 'queued'", name):
                self.store(key, rest, batch)
                summary[rest.reason] += 1
            self.close_file(name, batch, status, dict(summary))
        return summary

    # -- counts and cost
    def counts(self) -> dict[str, int]:
        """input, cleaned, rejected and pending rows."""
        total = self.one("SELECT COUNT(*) FROM rows")
        sql = "SELECT COUNT(*) FROM rows JOIN items USING (digest) WHERE status = ?"
        cleaned, failed = self.one(sql, "ok"), self.one(sql, "failed")
        rejected = failed + self.one("SELECT COUNT(*) FROM rows WHERE digest IS NULL")
        return {"input": total, "cleaned": cleaned, "rejected": rejected, "pending": total - cleaned - rejected}

    def prices(self) -> tuple[float, float] | None:
        given = (self.settings.price_input, self.settings.price_output)
        if None not in given:
            return given
        model = re.sub(r"-\d{4}-\d\d-\d\d$", "", self.settings.model)
        factor = 2 if self.settings.sync else 1
        return tuple(factor * price for price in PRICES[model]) if model in PRICES else None

    def cost(self, prompt_tokens: float, output_tokens: float) -> float:
        prices = self.prices() or (0.0, 0.0)
        return (prompt_tokens * prices[0] + output_tokens * prices[1]) / 1e6

    def spent(self) -> float:
        """US dollars for every answer that ever came back, by its usage and the price of its model."""
        return self.one("SELECT TOTAL(usd) FROM items")

    def estimate(self, names: Iterable[str] | None) -> tuple[int, int, float, float]:
        """(requests, high tokens, low cost, high cost) of request files; None: of all that rows still wait for."""
        sums = "SELECT {}, COALESCE(SUM(tokens), 0), COALESCE(SUM(patches), 0) FROM"
        waiting = "items WHERE status IN ('queued', 'again') AND digest IN (SELECT digest FROM rows)"
        found = [self.query(f"{sums.format('COUNT(*)')} {waiting}")[0]] if names is None else [
            self.query(f"{sums.format('COALESCE(SUM(requests), 0)')} files WHERE name = ?", name)[0] for name in names
        ]  # fmt: skip
        requests, tokens, patches = (sum(column) for column in zip((0, 0, 0), *found, strict=True))
        low, high = (
            self.cost(tokens + factor * patches, requests * answer)
            for factor, answer in zip(PATCH_FACTOR, ANSWER_TOKENS, strict=True)
        )
        return requests, queue_tokens(tokens, patches), low, high

    # -- the end
    def finalize(self, started: float) -> str | None:
        """Write the cleaned CSV, rejects, report and sidecar; gives what is wrong where too many were rejected."""
        output, counts = Path(self.args.output), self.counts()
        if self.meta("plan") != self.signature():
            raise Fail(f"{', '.join(self.args.input)} changed while the command ran; run it again")
        catalogue, rows = self.catalogue()
        columns = [*(name for name in catalogue.columns if name not in FIELDS), *FIELDS]
        sql = (
            "SELECT rows.id, rows.reason, rows.detail, items.status, items.reason, items.detail,"
            " clean_title, style, material, color, object_type"
            " FROM rows LEFT JOIN items USING (digest) ORDER BY rows.number"
        )
        rejects = output.with_name(output.name + ".rejects.jsonl")
        with (
            common.whole_file(output) as cleaned_path, common.whole_file(rejects) as rejects_path,
            open(cleaned_path, "w", encoding="utf-8", newline="") as cleaned,
            open(rejects_path, "w", encoding="utf-8") as rejected,
        ):  # fmt: skip
            writer = csv.DictWriter(common.csv_rows(cleaned), columns, extrasaction="ignore")
            writer.writeheader()
            for row, found in zip(rows, self.db.execute(sql), strict=True):
                id, reason, detail, status, failure, failure_detail, *values = found
                if row.id != id:
                    raise Fail(f"row {row.number} changed while the command ran; run it again")
                if status == "ok":
                    writer.writerow(row.fields | dict(zip(FIELDS, values, strict=True)))
                else:
                    line = common.reject(row, reason or failure, (detail if reason else failure_detail) or "")
                    rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
            report = self.report()  # it and the sidecar come first: where the CSV is, all is
            common.write_json(output.with_name(output.name + ".report.json"), report)
            inputs = {str(path): common.file_digest(path) for path in self.args.input}
            more = {
                "versions": common.versions("openai", "pillow"),
                "prompt_version": PROMPT_VERSION,
                "cost": report["cost"],
            }
            sidecar = output.with_name(output.name + ".json")
            common.write_sidecar(sidecar, self.settings, counts, inputs, time.time() - started, **more)
        say(f"wrote {output}, {rejects.name}, {output.name}.report.json")
        for reason, fact in report["rejected"].items():
            say(f"  rejected {fact['rows']}: {reason} (such as {', '.join(fact['ids'][:3])})")
        say(f"cost by usage: ${report['cost']['usd']:.4f} ({report['cost']['prompt_tokens']} tokens in,"
            f" {report['cost']['output_tokens']} out)")  # fmt: skip
        if counts["rejected"] > self.settings.max_failed * counts["input"]:
            return (
                f"{counts['rejected']} of {counts['input']} rows were rejected, more than --max-failed"
                f" {self.settings.max_failed}; see {rejects}, mend the rows or raise --max-failed"
            )
        self.meta("written", self.written())
        return None

    def written(self) -> str:
        """What the finished output was made from, and what it holds."""
        return common.digest([self.signature(), self.settings.max_failed, common.file_digest(self.args.output)])

    def is_written(self) -> bool:
        """Whether the output is there as `finalize` would make it: a later poll leaves it, and its date, alone."""
        return Path(self.args.output).exists() and self.meta("written") == self.written()

    def report(self) -> dict[str, Any]:
        """What failed and why: rejected rows per reason, failed attempts per reason, batches, cost."""
        sql = (
            "SELECT COALESCE(rows.reason, items.reason) AS why, COUNT(*) FROM rows LEFT JOIN items USING (digest)"
            " WHERE rows.reason IS NOT NULL OR items.status = 'failed' GROUP BY why ORDER BY 2 DESC, 1"
        )
        examples = (
            "SELECT rows.id FROM rows LEFT JOIN items USING (digest) WHERE (rows.reason = ?1 OR"
            " (rows.reason IS NULL AND items.status = 'failed' AND items.reason = ?1)) ORDER BY rows.number LIMIT 20"
        )
        rejected = {
            why: {"rows": count, "ids": [id for (id,) in self.query(examples, why)]} for why, count in self.query(sql)
        }
        attempts = dict(self.query("SELECT reason, COUNT(*) FROM failures GROUP BY reason ORDER BY 2 DESC, 1"))
        prompt, output = self.query("SELECT TOTAL(prompt_tokens), TOTAL(output_tokens) FROM items")[0]
        batches = [
            {"batch": batch, "file": name, "status": status, "results": json.loads(summary)}
            for batch, name, status, summary in self.query("SELECT * FROM collected ORDER BY rowid")
        ]
        cost = {"usd": round(self.spent(), 6), "prompt_tokens": int(prompt), "output_tokens": int(output)}
        return {"rejected": rejected, "failed_attempts": attempts, "cost": cost, "batches": batches}


def read_at(path: Path, offset: int, length: int) -> bytes:
    """Part of a request file. Raises Fail where somebody removed it."""
    try:
        with open(path, "rb") as handle:
            handle.seek(offset)
            return handle.read(length)
    except FileNotFoundError:
        raise Fail(f"{path} is gone; run the same command again: it is built anew") from None


def read_lines(path: Path) -> Iterator[dict]:
    """JSON objects of a results file; an unreadable line gives an empty object."""
    if not path.exists():
        return
    with open(path, "rb") as handle:
        for text in handle:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            yield line if isinstance(line, dict) else {}
