"""Stage 5: people vote, blind, on which of two models searches better.

Reads   embeddings/master.parquet (stage 4) and the photos; with two --embeddings, their fine-tuned models are compared
Writes  arena.sqlite: trials and votes, inserted only; arena.sqlite.cache/ and arena.sqlite.keys.json beside it

serve   the voting page (A, B, T tie, N skip, U undo, Q quit), and the results page behind the admin link it prints
stats   the results, computed from the log, as text or with --format json
votes   every vote, as CSV or with --format json

    python 5_arena.py serve --embeddings data/embeddings/master.parquet --images data/photos \\
        --database data/arena.sqlite --host 127.0.0.1 --port 8000
    python 5_arena.py serve --embeddings data/embeddings/master.parquet --images data/sample \\
        --database data/try.sqlite --queries 20 --reveal
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import hmac
import io
import json
import math
import os
import random
import secrets
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import common
from common import ATTRIBUTES, DONE, USAGE, BadImage, Fail, digest, letterbox, load_image, setting

LOOPBACK = ("127.0.0.1", "localhost", "::1")
THREADS = 32  # requests answered at once; pictures take turns among them
CONNECTIONS = 800  # open at once: a browser keeps up to six, and most systems allow a process 1,024 files
BODY_LIMIT = 4_096  # bytes of a vote or a name
UPLOAD_LIMIT = 12_000_000  # bytes of a picture on the search page
TEMPLATES = Path(__file__).parent / "templates"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def note(message: str) -> None:
    """One line for the person at the terminal."""
    print(message, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Settings and keys


@dataclass(frozen=True)
class ArenaConfig:
    """Settings of stage 5; each is a flag."""

    top_k: int = setting(4, "results shown in each row", low=1)
    query: str = setting("image", "what is searched with: a picture, or its prompt", ("image", "text"))
    queries: int = setting(2000, "most queries; one a duplicate group of the test split, object types in turn", low=1)
    votes_needed: int = setting(210, "decided votes aimed at; 820, 210, 97 find 55, 60, 65% at 80% power", low=1)
    shared: float = setting(0.2, "share of the queries that three judges see, for their agreement", low=0, high=1)
    picture_size: int = setting(480, "pixels a side of every picture shown", low=1, high=4096)
    seed: int = setting(42, "seed of the choice of queries and of each judge's order")
    host: str = setting("127.0.0.1", "address to listen at; any but loopback needs the judges' token")
    port: int = setting(8000, "port to listen at; 0 takes a free one", low=0, high=65_535)
    trusted_host: str | None = setting(None, "further names, separated by commas, that browsers may call the server by")
    reveal: bool = setting(False, "show results and search to everybody who is not in the middle of voting")


@dataclass(frozen=True)
class Setup:
    """What an application needs besides its settings; without keys, those of `read_keys`."""

    embeddings: tuple[str, ...]
    images: str
    database: str
    settings: ArenaConfig = field(default_factory=ArenaConfig)
    keys: dict[str, str] | None = None


def read_keys(database: str | Path) -> dict[str, str]:
    """The cookie's key, the judges' and the admin's token: kept beside the database, readable by its owner only.

    ARENA_JUDGE_TOKEN and ARENA_ADMIN_TOKEN in the environment take precedence.
    """
    path = Path(f"{database}.keys.json")
    keys = {name: secrets.token_urlsafe(24) for name in ("cookie_key", "judge_token", "admin_token")}
    if path.is_file():
        kept = common.read_json(path, "file of keys")
        if not isinstance(kept, dict) or not all(str(kept.get(name)).isascii() for name in keys):
            raise Fail(f"{path}: not a file of keys; remove it, and give judges and admin the new links")
        keys |= {name: str(kept[name]) for name in keys if kept.get(name)}
    else:
        with common.atomic_file(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(json.dumps(keys, indent=2) + "\n")
    given = {name: os.environ.get(f"ARENA_{name.upper()}") for name in ("judge_token", "admin_token")}
    return keys | {name: value for name, value in given.items() if value}


# --------------------------------------------------------------------------------------------------------------------
# The log in SQLite: judges, trials as they were shown, votes, and votes taken back. All results are computed from it.
# A vote is acknowledged after its commit, and a commit is on the disk. One process writes; others may read meanwhile.

CHOICES = ("A", "B", "T", "N")  # row A, row B, tie, abstained
PRAGMAS = ("journal_mode = WAL", "synchronous = FULL", "busy_timeout = 10000", "foreign_keys = ON")
VOTES = """
  id INTEGER PRIMARY KEY, trial INTEGER NOT NULL REFERENCES trials, session INTEGER NOT NULL REFERENCES sessions,
  choice TEXT NOT NULL CHECK (choice IN ('A', 'B', 'T', 'N')), time TEXT NOT NULL
"""
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS experiments (      -- key: digest of models, items, queries and length of the rows
  id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, facts TEXT NOT NULL, time TEXT NOT NULL  -- facts: JSON
);
CREATE TABLE IF NOT EXISTS judges (id TEXT PRIMARY KEY, name TEXT NOT NULL, time TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sessions (         -- a vote can be taken back until its session ends
  id INTEGER PRIMARY KEY, experiment INTEGER NOT NULL REFERENCES experiments, judge TEXT NOT NULL REFERENCES judges,
  time TEXT NOT NULL, ended TEXT
);
CREATE TABLE IF NOT EXISTS trials (
  id INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE,  -- 128 random bits; all that a browser ever learns of a trial
  experiment INTEGER NOT NULL REFERENCES experiments, judge TEXT NOT NULL REFERENCES judges,
  place INTEGER NOT NULL,                              -- 1, 2, 3 ... for each judge
  query TEXT NOT NULL, category TEXT NOT NULL,         -- image_id and object type of the query
  left_model TEXT NOT NULL, right_model TEXT NOT NULL, -- fingerprints of the models behind row A and row B
  left_items TEXT NOT NULL, right_items TEXT NOT NULL, -- JSON lists of image_id, best first
  facts TEXT NOT NULL,                         -- JSON: picture digests of both rows, attributes shared with the query
  identical INTEGER NOT NULL DEFAULT 0,        -- 1: both rows were the same, so that nothing was shown or asked
  repeat_of INTEGER REFERENCES trials,         -- only in older logs: the same trial again, sides exchanged
  reissue_of INTEGER UNIQUE REFERENCES trials, -- only in older logs: the same trial again, after undo
  time TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS votes ({VOTES});    -- of one trial's votes at most one stands, the others were taken back
CREATE TABLE IF NOT EXISTS revocations (
  id INTEGER PRIMARY KEY, vote INTEGER NOT NULL UNIQUE REFERENCES votes, time TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS trials_of_judge ON trials (experiment, judge, place);
CREATE INDEX IF NOT EXISTS trials_of_type ON trials (experiment, category, query, identical);
CREATE INDEX IF NOT EXISTS votes_of_trial ON votes (trial);
CREATE INDEX IF NOT EXISTS choices_of_session ON votes (session, choice);
""" + "".join(
    f"CREATE TRIGGER IF NOT EXISTS {table}_{verb.lower()} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, '{table} are insert-only'); END;\n"
    for table in ("trials", "votes", "revocations")
    for verb in ("UPDATE", "DELETE")
)
# Older databases allow a trial one vote for ever; with this it can be voted on again when that was taken back.
ONE_VOTE = "SELECT 1 FROM sqlite_master WHERE name = 'votes' AND sql LIKE '%trial INTEGER NOT NULL UNIQUE%'"
REBUILD_VOTES = f"""
PRAGMA foreign_keys = OFF; BEGIN IMMEDIATE; CREATE TABLE new_votes ({VOTES});
INSERT INTO new_votes SELECT id, trial, session, choice, time FROM votes; DROP TABLE votes;
ALTER TABLE new_votes RENAME TO votes; COMMIT; PRAGMA foreign_keys = ON;
"""
STANDS = "NOT EXISTS (SELECT 1 FROM revocations r WHERE r.vote = v.id)"  # the vote v was not taken back
LAST = "NOT EXISTS (SELECT 1 FROM trials n WHERE n.reissue_of = t.id)"  # no later trial took the place of t
VOTED = f"FROM votes v JOIN trials t ON t.id = v.trial WHERE {STANDS} AND t.experiment = ?"


class Refused(Exception):
    """A request that is not granted; `status` is the HTTP status that says so."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def now() -> str:
    """UTC, ISO 8601, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Log:
    """The log of one database file. Threads share it; each has its own connection."""

    def __init__(self, path: str | Path, create: bool = True):
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise Fail(f"{path}: no such database; run `5_arena.py serve` first, or check --database")
        self._local = threading.local()
        self._writer = threading.Lock()  # waiting writers queue here fairly; SQLite's own waiting polls
        try:
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if self.one(ONE_VOTE):
                    self.connection.executescript(REBUILD_VOTES)
                self.connection.executescript(SCHEMA)
            self.one("SELECT COUNT(*) FROM experiments")
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise Fail(f"{path}: cannot be used as the arena's database ({error}); check --database") from None

    @property
    def connection(self) -> sqlite3.Connection:
        """This thread's connection, in autocommit mode, with every PRAGMA set."""
        if not hasattr(self._local, "connection"):
            connection = sqlite3.connect(self.path, timeout=10, isolation_level=None)
            connection.row_factory = sqlite3.Row
            for pragma in PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
            self._local.connection = connection
        return self._local.connection

    def all(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """Every row of a query."""
        return self.connection.execute(sql, values).fetchall()

    def one(self, sql: str, *values: Any) -> sqlite3.Row | None:
        """The first row of a query."""
        return self.connection.execute(sql, values).fetchone()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its first statement on; leaving it commits."""
        db = self.connection
        with self._writer:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    # Experiments, judges, sessions

    def experiment(self, key: str, facts: dict[str, Any]) -> dict[str, Any]:
        """The experiment with this key; a new one is written down with its facts."""
        with self.writing() as db:
            if not self.one("SELECT 1 FROM experiments WHERE key = ?", key):
                values = (key, json.dumps(facts, ensure_ascii=False), now())
                db.execute("INSERT INTO experiments (key, facts, time) VALUES (?, ?, ?)", values)
        return next(row for row in self.experiments() if row["key"] == key)

    def experiments(self) -> list[dict[str, Any]]:
        """Every experiment of the database, oldest first, facts decoded."""
        rows = self.all("SELECT * FROM experiments ORDER BY id")
        return [dict(row) | {"facts": json.loads(row["facts"])} for row in rows]

    def judge(self, judge: str | None) -> sqlite3.Row | None:
        """A judge by id."""
        return self.one("SELECT * FROM judges WHERE id = ?", judge)

    def start(self, experiment: int, judge: str | None, name: str = "") -> str:
        """Open a session, for a new judge where none is given; returns the judge's id. The first name stays."""
        judge = judge or secrets.token_hex(16)
        with self.writing() as db:
            db.execute("INSERT OR IGNORE INTO judges (id, name, time) VALUES (?, ?, ?)", (judge, name, now()))
            if not self.session(experiment, judge):
                values = (experiment, judge, now())
                db.execute("INSERT INTO sessions (experiment, judge, time) VALUES (?, ?, ?)", values)
        return judge

    def session(self, experiment: int, judge: str) -> int | None:
        """The judge's open session."""
        sql = "SELECT id FROM sessions WHERE experiment = ? AND judge = ? AND ended IS NULL"
        row = self.one(sql, experiment, judge)
        return row["id"] if row else None

    def quit(self, experiment: int, judge: str) -> None:
        """End the judge's session, if one is open."""
        sql = "UPDATE sessions SET ended = ? WHERE experiment = ? AND judge = ? AND ended IS NULL"
        with self.writing() as db:
            db.execute(sql, (now(), experiment, judge))

    # Trials

    def open_trials(self, experiment: int, judge: str) -> list[sqlite3.Row]:
        """The judge's trials that wait for a vote, in the order of their places."""
        return self.all(
            f"SELECT * FROM trials t WHERE experiment = ? AND judge = ? AND NOT identical AND {LAST} "
            f"AND NOT EXISTS (SELECT 1 FROM votes v WHERE v.trial = t.id AND {STANDS}) ORDER BY place, id",
            experiment, judge,
        )  # fmt: skip

    def trial(self, experiment: int, judge: str, after: str | None, draw: Callable) -> sqlite3.Row | None:
        """The judge's current trial (the oldest without a vote), or with its token as `after` the one to come.

        What is missing is drawn by `draw(history) -> list of columns` and committed before it is returned: first the
        queries passed over because both rows are identical, then the trial to show; None where nothing is left to
        show. Only one trial ahead is given.
        """
        waiting = self.open_trials(experiment, judge)
        if after is None and waiting:
            return waiting[0]
        with self.writing():
            waiting = self.open_trials(experiment, judge)
            if after is not None:
                if not waiting or waiting[0]["token"] != after:
                    raise Refused(409, "That is not the trial to be judged now; load the page again.")
                waiting = waiting[1:]
            if waiting:
                return waiting[0]
            sql = "SELECT place, query, category FROM trials WHERE experiment = ? AND judge = ? AND NOT identical"
            history = self.all(sql, experiment, judge)
            place = max((row["place"] for row in history), default=0) + 1
            own = {"experiment": experiment, "judge": judge, "place": place}
            rows = [self.insert_trial(columns | own) for columns in draw(history)]
        return rows[-1] if rows and not rows[-1]["identical"] else None

    def insert_trial(self, columns: dict[str, Any]) -> sqlite3.Row:
        """Write a trial down, within a transaction; lists and dicts become JSON."""
        columns = columns | {"token": secrets.token_hex(16), "time": now()}
        marks = ", ".join("?" * len(columns))
        values = [json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v for v in columns.values()]
        self.connection.execute(f"INSERT INTO trials ({', '.join(columns)}) VALUES ({marks})", values)
        return self.one("SELECT * FROM trials WHERE token = ?", columns["token"])

    def find(self, experiment: int, judge: str, token: str) -> sqlite3.Row:
        """The judge's own trial with this token and its standing vote. Raises Refused (404) for any other token."""
        row = self.one(
            f"SELECT t.*, v.id AS vote, v.choice FROM trials t LEFT JOIN votes v ON v.trial = t.id AND {STANDS} "
            f"WHERE t.token = ? AND t.experiment = ? AND t.judge = ? AND {LAST}",
            token, experiment, judge,
        )  # fmt: skip
        if row is None:
            raise Refused(404, "There is no such trial for you.")
        return row

    # Votes

    def vote(self, experiment: int, judge: str, token: str, choice: str) -> dict[str, Any]:
        """Write a vote down, once. The same vote again gets the same answer; another choice is Refused (409)."""
        if choice not in CHOICES:
            raise Refused(400, f"A choice is one of {', '.join(CHOICES)}.")
        with self.writing() as db:
            trial = self.find(experiment, judge, token)
            vote = trial["vote"]
            if vote is None:
                session = self.session(experiment, judge)
                if session is None:
                    raise Refused(403, "Your session has ended; start again to go on voting.")
                sql = "INSERT INTO votes (trial, session, choice, time) VALUES (?, ?, ?, ?)"
                vote = db.execute(sql, (trial["id"], session, choice, now())).lastrowid
            elif trial["choice"] != choice:
                raise Refused(409, "You have judged this pair already, with another choice.")
            number = self.one(f"SELECT COUNT(*) {VOTED} AND t.judge = ? AND v.id <= ?", experiment, judge, vote)[0]
        return {"trial": token, "choice": choice, "number": number}

    def last_vote(self, experiment: int, judge: str) -> sqlite3.Row | None:
        """The newest standing vote of the judge's open session, with its trial's token: the one undo takes back."""
        sql = f"SELECT v.*, t.token {VOTED} AND v.session = ? ORDER BY v.id DESC"
        return self.one(sql, experiment, self.session(experiment, judge))

    def undo(self, experiment: int, judge: str, token: str) -> None:
        """Take the session's newest vote back, which opens its trial again; asked twice, it is done once."""
        with self.writing() as db:
            trial, last = self.find(experiment, judge, token), self.last_vote(experiment, judge)
            if trial["vote"] is None and self.one("SELECT 1 FROM votes WHERE trial = ?", trial["id"]):
                return
            if last is None or last["trial"] != trial["id"]:
                raise Refused(409, "Only the newest vote of this session can be taken back.")
            db.execute("INSERT INTO revocations (vote, time) VALUES (?, ?)", (last["id"], now()))

    def own_counts(self, experiment: int, judge: str) -> dict[str, int]:
        """How often the judge chose what; for the judge only."""
        rows = self.all(f"SELECT v.choice, COUNT(*) {VOTED} AND t.judge = ? GROUP BY v.choice", experiment, judge)
        return dict.fromkeys(CHOICES, 0) | dict(map(tuple, rows))

    def decided(self, experiment: int) -> int:
        """Standing votes for either row, by all judges: what the question is still short of."""
        sql = "SELECT COUNT(*) FROM sessions s JOIN votes v ON v.session = s.id WHERE s.experiment = ? "
        return self.one(f"{sql} AND v.choice IN ('A', 'B') AND {STANDS}", experiment)[0]

    def votes(self, experiment: int) -> list[dict[str, Any]]:
        """Every vote ever cast in an experiment, oldest first; `revoked` is the time it was taken back, or None.

        Queries passed over for identical rows come first, with neither vote nor choice.
        """
        rows = self.all(
            "SELECT t.*, t.id AS trial, t.time AS drawn, v.id AS vote, v.choice, v.time AS voted, j.name judge_name, "
            "r.time AS revoked FROM trials t JOIN judges j ON j.id = t.judge LEFT JOIN votes v ON v.trial = t.id "
            "LEFT JOIN revocations r ON r.vote = v.id WHERE t.experiment = ? AND (v.id OR t.identical) ORDER BY v.id",
            experiment,
        )
        lists = ("left_items", "right_items", "facts")
        return [dict(row) | {"time": row["voted"]} | {name: json.loads(row[name]) for name in lists} for row in rows]

    def state(self) -> tuple:
        """Changes with every line of the log."""
        newest = "SELECT (SELECT MAX(id) FROM trials), (SELECT MAX(id) FROM votes), (SELECT MAX(id) FROM revocations)"
        return tuple(self.one(newest))

    def shown_types(self, experiment: int) -> Counter[str]:
        """How often queries of each object type have been shown."""
        sql = "SELECT category, SUM(NOT identical) FROM trials WHERE experiment = ? GROUP BY category"
        return Counter(dict(map(tuple, self.all(sql, experiment))))

    def shown_queries(self, experiment: int, category: str) -> list[sqlite3.Row]:
        """query, identical (whether it is passed over) and times drawn, of the queries of a type drawn so far."""
        sql = (
            "SELECT query, identical, COUNT(*) AS times FROM trials WHERE experiment = ? AND category = ? GROUP BY 1, 2"
        )
        return self.all(sql, experiment, category)


# --------------------------------------------------------------------------------------------------------------------
# What is compared: items, two models, queries, and each model's answers

COLUMNS = ("image_id", "split", "image_path", "title", "prompt", *ATTRIBUTES, "group", "image_digest")
CHUNK = 1_024  # vectors read at once: the row groups of 4_embed.py


def unreadable(path: Path, error: Exception) -> Fail:
    """One line for what pyarrow says in several."""
    return Fail(f"{path}: not a readable Parquet file ({' '.join(str(error).split())}); run 4_embed.py again")


class Items:
    """The rows of master.parquet: text in memory, vectors read from the file, block by block.

    table: the columns of text (pyarrow: a DataFrame would take twice the bytes); row: image_id -> row number.
    """

    def __init__(self, path: str | Path):
        import pyarrow as pa
        import pyarrow.parquet

        self.path = Path(path)
        try:
            self.file = pyarrow.parquet.ParquetFile(self.path)
            missing = [name for name in (*COLUMNS, "base_embedding") if name not in self.file.schema_arrow.names]
            if missing:
                raise Fail(f"{path}: no column {', '.join(missing)}; make it with 4_embed.py")
            self.table = self.file.read(columns=list(COLUMNS)).combine_chunks()
            self.table.validate(full=True)  # that every text is UTF-8
            self.facts = {k.decode(): v.decode() for k, v in (self.file.schema_arrow.metadata or {}).items()}
        except FileNotFoundError:
            raise Fail(f"{path}: no such file; run 4_embed.py first, or check --embeddings", USAGE) from None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise unreadable(self.path, error) from None
        self.row = {id: row for row, id in enumerate(self.table["image_id"].to_pylist())}

    def __len__(self) -> int:
        return self.table.num_rows

    def text(self, column: str, row: int) -> str:
        """One value; "" where it is missing."""
        return self.table[column][row].as_py() or ""

    @functools.cached_property
    def digest(self) -> str:
        """Digest of which items there are: it does not change when the file is written anew."""
        columns = [self.table[name].to_pylist() for name in ("image_id", "split", "group", "image_digest")]
        return digest([digest("\n".join(map(str, column))) for column in columns])

    @functools.cached_property
    def groups(self):
        """int [N]: equal for items of one duplicate group."""
        return self.table["group"].combine_chunks().dictionary_encode().indices.to_numpy()

    def vectors(self, column: str) -> Iterator:
        """The column's vectors in blocks, float32 [n, D]."""
        import numpy as np
        import pyarrow as pa

        try:
            width = self.file.schema_arrow.field(column).type.list_size
            for batch in self.file.iter_batches(CHUNK, columns=[column]):
                block = batch.column(0).flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
                if block.size != batch.num_rows * width or not np.isfinite(block).all():
                    raise Fail(f"{self.path}: {column} has missing or not finite vectors; run 4_embed.py again")
                yield block.reshape(-1, width)
        except (KeyError, AttributeError):
            raise Fail(f"{self.path}: no column {column} of fixed-size lists; make it with 4_embed.py") from None
        except (pa.ArrowException, OSError) as error:
            raise unreadable(self.path, error) from None


@dataclass(frozen=True)
class Model:
    """One of the two models that are compared, and where its vectors stand."""

    name: str
    fingerprint: str
    items: Items
    kind: str  # "base" or "finetuned": the columns' prefix


def read_models(files: list[Items]) -> list[Model]:
    """[base, challenger]: the two models of one file, or the fine-tuned ones of two files."""
    sources = [(files[0], "base"), (files[0], "finetuned")]
    if len(files) > 1:
        sources = [(items, "finetuned") for items in files]
    if len(sources) > 2:
        raise Fail("more than two --embeddings: one compares its two models, two compare their fine-tuned ones", USAGE)
    models = []
    for items, kind in sources:
        if items.digest != files[0].digest:
            raise Fail(f"{items.path} and {files[0].path} hold different items; embed the same shards for both models")
        fingerprint = items.facts.get(f"{kind}_fingerprint")
        if not fingerprint:
            raise Fail(f"{items.path}: no {kind}_fingerprint in its metadata; make it with 4_embed.py")
        name = (items.facts.get("scenario") if kind == "finetuned" else "") or items.facts.get(f"{kind}_model") or kind
        models.append(Model(Path(name).name if name.startswith(common.LOCAL) else name, fingerprint, items, kind))
    if models[0].fingerprint == models[1].fingerprint:
        raise Fail(f"{files[-1].path}: both models are the same ({models[1].name}); nothing to compare")
    if models[0].name == models[1].name:
        models = [replace(model, name=f"{model.name} ({model.fingerprint[:8]})") for model in models]
    return models


@dataclass(frozen=True)
class Query:
    """What a judge is asked about: an item by its picture, or by words where there are any."""

    id: str  # the item's image_id; the log knows a query by it
    row: int
    category: str
    words: str | None = None


def choose_queries(items: Items, settings: ArenaConfig) -> list[Query]:
    """One query a duplicate group of the test split; at most settings.queries, object types in turn; by row."""
    table = items.table.select(["image_id", "split", "group", "object_type", "prompt"]).to_pandas(ignore_metadata=True)
    test = table[table["split"] == "test"].drop_duplicates("group").fillna("")
    if not len(test):
        raise Fail(f"{items.path}: no row of the test split; there is nothing to ask about")
    order = test.index.tolist()
    random.Random(f"{settings.seed} queries").shuffle(order)
    turn = test.loc[order].groupby("object_type").cumcount().to_dict()  # a type's first, second, ... query
    chosen = test.loc[sorted(sorted(order, key=turn.get)[: settings.queries])]
    words = chosen["prompt"] if settings.query == "text" else [None] * len(chosen)
    kinds = chosen["object_type"].replace("", "other")
    return [Query(*values) for values in zip(chosen["image_id"], chosen.index.tolist(), kinds, words, strict=True)]


class Experiment:
    """Models, queries and each model's answers: all that a draw needs. Nothing in it depends on a vote.

    key: the experiment's identity; votes are only ever counted together under one key.
    lists: int64 [2, Q, K], row numbers of the base's and the challenger's answers, best first; see `find_answers`.
    """

    def __init__(self, embeddings: Sequence[str | Path], settings: ArenaConfig):
        files = [Items(path) for path in embeddings]
        self.settings, self.items, self.models = settings, files[0], read_models(files)
        self.queries = {query.id: query for query in choose_queries(self.items, settings)}
        self.places = {id: number for number, id in enumerate(self.queries)}
        self.rows = [query.row for query in self.queries.values()]
        fingerprints = sorted(model.fingerprint for model in self.models)
        self.key = digest([fingerprints, self.items.digest, self.rows, settings.query, settings.top_k])
        self.types: dict[str, list[str]] = {}
        for query in self.queries.values():
            self.types.setdefault(query.category, []).append(query.id)
        names, count = list(self.queries), round(settings.shared * len(self.queries))
        self.shared = {names[i] for i in random.Random(f"{settings.seed} shared").sample(range(len(names)), count)}

    def find_answers(self, cache: Path) -> None:
        """Set `lists`: the nearest items to each query, its own duplicates left out; computed once, kept in `cache`."""
        import numpy as np

        lists, k, groups = [], self.settings.top_k, self.items.groups
        for model in self.models:
            facts = [model.fingerprint, self.items.digest, self.rows, k, self.settings.query]
            target = cache / common.file_digest(model.items.path)[:16] / f"answers-{digest(facts)[:16]}.npy"
            if not target.is_file():
                gallery = model.items.vectors(f"{model.kind}_embedding")
                _, found = common.top_k(self._query_vectors(model), gallery, k, (groups[self.rows], groups))
                if (found < 0).any():
                    few = f"fewer than {k} items besides a query's own duplicates"
                    raise Fail(f"{few}; lower --top-k or give more rows")
                with common.atomic_file(target) as temporary, open(temporary, "wb") as handle:
                    np.save(handle, found)
                note(f"{model.name}: found the answers to {len(found)} queries among {len(self.items)} items")
            lists.append(np.load(target))
        self.lists = np.stack(lists)

    def _query_vectors(self, model: Model):
        """float32 [Q, D]: the queries as the model sees them, by their pictures or words."""
        import numpy as np

        found, start, rows = [], 0, np.array(self.rows)  # ascending
        for block in model.items.vectors(f"{model.kind}_{'text_' if self.settings.query == 'text' else ''}embedding"):
            found.append(block[rows[(rows >= start) & (rows < start + len(block))] - start])
            start += len(block)
        return np.concatenate(found)

    @property
    def facts(self) -> dict[str, Any]:
        """What is written down of the experiment in the log."""
        models = [{"name": model.name, "fingerprint": model.fingerprint} for model in self.models]
        facts = {"models": models, "query": self.settings.query, "top_k": self.settings.top_k}
        return facts | {"queries": len(self.queries), "items": len(self.items), "categories": len(self.types)}

    def trial(self, query: Query, left: int) -> dict[str, Any]:
        """The columns of a trial, with model `left` (0 the base, 1 the challenger) as row A."""
        columns, facts = {"query": query.id, "category": query.category}, {}
        for side, model in (("left", left), ("right", 1 - left)):
            rows = self.lists[model, self.places[query.id]].tolist()
            columns[f"{side}_model"] = self.models[model].fingerprint
            columns[f"{side}_items"] = [self.items.text("image_id", row) for row in rows]
            # By digest, since two items with the same picture look the same to a judge.
            facts[f"{side}_pictures"] = [self.items.text("image_digest", row) for row in rows]
            facts[f"{side}_attributes"] = {name: self._agreement(name, query, rows) for name in ATTRIBUTES}
        a, b = facts["left_pictures"], facts["right_pictures"]
        return columns | {"facts": facts | {"same_set": set(a) == set(b) and a != b}, "identical": int(a == b)}

    def _agreement(self, attribute: str, query: Query, rows: list[int]) -> float | None:
        """Share of the answers that agree with the query in an attribute; None where the query's is unknown."""
        wanted = self.items.text(attribute, query.row)
        return sum(self.items.text(attribute, row) == wanted for row in rows) / len(rows) if wanted else None


# --------------------------------------------------------------------------------------------------------------------
# The draw: what a judge is shown next. No choice depends on how anybody voted.

SHARED_JUDGES = 3  # a shared query is shown to so many


def draw(experiment: Experiment, log: Log, number: int, judge: str, history: list) -> list[dict[str, Any]]:
    """Columns of the trials to write down: identical rows passed over, then at most one to show.

    Object types take turns: one with the fewest showings so far comes next. Within it: a shared query that other
    judges have begun and that three are to see; else the query shown least often, in the order of the judge's own
    seeded permutation. Which model stands as row A is a fair coin's choice.
    history: the judge's trials so far. Called with the log's write lock held.
    """
    rank, by_type, drawn = judge_order(experiment, judge), log.shown_types(number), []
    seen, own = {row["query"] for row in history}, Counter(row["category"] for row in history)

    def urgency(query: str) -> tuple:
        times = shown.get(query, 0)
        return not (query in experiment.shared and 0 < times < SHARED_JUDGES), times, rank[query]

    types = experiment.types
    for kind in sorted(types, key=lambda kind: (by_type[kind], own[kind], rank[types[kind][0]])):
        found = log.shown_queries(number, kind)
        shown = {query: times for query, identical, times in found if not identical}
        passed = {query for query, identical, _ in found if identical}
        for query in sorted({*types[kind]} - seen - passed, key=urgency):
            drawn.append(experiment.trial(experiment.queries[query], secrets.randbits(1)))
            if not drawn[-1]["identical"]:
                return drawn
    return drawn


@functools.lru_cache(256)
def judge_order(experiment: Experiment, judge: str) -> dict[str, int]:
    """The judge's own permutation of the queries: query -> rank."""
    count, chance = len(experiment.queries), random.Random(f"{experiment.settings.seed} {judge}")
    return dict(zip(experiment.queries, chance.sample(range(count), count), strict=True))


# --------------------------------------------------------------------------------------------------------------------
# Pictures


class Pictures:
    """Photos as the browser gets them: letterboxed to one size, encoded anew, so that no byte tells a file's origin."""

    def __init__(self, items: Items, folder: Path, side: int):
        self.items, self.folder, self.side = items, folder, side
        self.turns = threading.Semaphore(max(1, (os.cpu_count() or 2) - 1))  # votes must not wait behind pictures
        self.jpeg = functools.lru_cache(2_000)(self._jpeg)  # about 60 MB at 480 px

    def _jpeg(self, row: int) -> bytes:
        try:
            path = common.resolve_image(self.folder, self.items.text("image_path", row))
            with self.turns:
                return self.encode(load_image(path, self.side))
        except BadImage as error:
            note(f"missing picture: item {self.items.text('image_id', row)!r}: {error}; a grey one is shown")
            return self.placeholder

    def encode(self, image) -> bytes:
        """An RGB picture of any size as a square JPEG on white, without metadata."""
        buffer = io.BytesIO()
        letterbox(image, self.side).save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    @functools.cached_property
    def placeholder(self) -> bytes:
        from PIL import Image

        return self.encode(Image.new("RGB", (self.side, self.side), (216, 216, 213)))


# --------------------------------------------------------------------------------------------------------------------
# Statistics. A win is the challenger's. Randomness is seeded: the same votes give the same page.

ALPHA = 0.05  # two-sided level of every test; intervals are 95%
Z = 1.959963984540054  # the normal distribution's quantile at 1 - ALPHA / 2
PRIOR = 10  # a of Beta(a, a): the mixture of the e-value, fixed before any vote; bets mostly on win rates of 0.35-0.65
DRAWS = 10_000  # resamples of a bootstrap
TYPE_VOTES = 20  # an object type with fewer votes gets no test
LOOKS = 200  # points of a plotted course
# Decided votes with which the exact binomial test finds a win rate in 4 of 5 studies: the smallest number from which on
# no larger one does worse (exact power saws up and down).
NEEDED = {0.55: 820, 0.60: 210, 0.65: 97}


def ratio(part: float, whole: float) -> float | None:
    """part / whole; None where there is nothing."""
    return part / whole if whole else None


def wilson(wins: float, n: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927, without continuity correction); (0, 1) without votes."""
    if n == 0:
        return 0.0, 1.0
    center = (wins + Z * Z / 2) / (n + Z * Z)
    half = Z * math.sqrt(wins * (n - wins) / n + Z * Z / 4) / (n + Z * Z)
    # At 0 and n the bound is exact; rounding must not leave it at 1e-17.
    return (0.0 if wins == 0 else center - half), (1.0 if wins == n else center + half)


def vote_rate(hits: int, votes: int, queries: int) -> dict[str, Any]:
    """Share of votes with Wilson's interval for as many votes as there are queries.

    Judges of one query may simply agree, so together they count as one.
    """
    value = ratio(hits, votes)
    low, high = wilson((value or 0) * queries, queries)
    return {"value": value, "low": low, "high": high, "n": votes}


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values in the order given (Holm 1979); valid under any dependence."""
    adjusted, most = [0.0] * len(p), 0.0
    for step, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        most = adjusted[i] = max(most, min(1.0, (len(p) - step) * p[i]))
    return adjusted


def binomial_test(wins: int, n: int) -> float:
    """Exact two-sided p-value of "each of n independent votes is a fair coin"; 1 without votes.

    Valid when n was planned: looked at after every vote, it raises a false alarm in about 36% of 500-vote studies.
    """
    from scipy.stats import binomtest

    return float(binomtest(wins, n).pvalue) if n else 1.0


def bootstrap_mean(values: Sequence[float], groups: Sequence[str]) -> tuple[float, float | None, float | None, float]:
    """(mean of values in [-1, 1], low, high: its 95% interval, two-sided p-value of "the mean is 0").

    groups: [N] labels; values of one label are drawn together, so only groups need be independent of each other.
    Symmetric studentised bootstrap: mean -+ q * s, where s is the standard error over groups, and q the 95% quantile of
    |mean* - mean| / s* over resamples (Hall 1988, "On symmetric bootstrap confidence intervals"). The spread of one
    more group is added to every variance, s and s* alike, so that a resample without any spread stays finite.
    p <= 0.05 exactly when the interval leaves out 0; where too few groups leave it unknown it is (None, None).
    """
    import numpy as np

    codes = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums, sizes = np.bincount(codes, weights=values), np.bincount(codes).astype(float)
    count, mean = len(sums), float(sums.sum() / sizes.sum())
    residuals = sums - mean * sizes
    if count < 2 or abs(residuals).max() <= 1e-12 * abs(sums).max():  # no spread: the sign test is what is left
        p = 2.0 ** max(1 - count, -1000) if mean else 1.0
        return (mean, mean, mean, p) if count > 1 and (p <= ALPHA or not mean) else (mean, None, None, p)
    scale, more = count / (count - 1), (residuals**2).mean() / sizes.sum() ** 2
    error = math.sqrt(scale * (residuals**2).sum() / sizes.sum() ** 2 + more)
    # Groups of equal residual and size are interchangeable: how often each kind is drawn is multinomial.
    kinds, repeats = np.unique(np.stack([residuals, sizes], axis=1), axis=0, return_counts=True)  # [K, 2], [K]
    e, n = kinds.T
    times = np.random.default_rng(0).multinomial(count, repeats / count, size=DRAWS)  # [DRAWS, K]
    total, shift = times @ n, times @ e / (times @ n)  # shift: mean* - mean
    square = times @ (e * e) - 2 * shift * (times @ (e * n)) + shift**2 * (times @ (n * n))
    far = np.sort(abs(shift) / np.sqrt(scale * np.maximum(square, 0) / total**2 + more))
    half = error * float(far[-math.floor(ALPHA * (DRAWS + 1))])
    p = (1 + int((far >= abs(mean) / error * (1 - 1e-12)).sum())) / (DRAWS + 1)
    if p > ALPHA:  # rounding must not let the two disagree
        half = max(half, abs(mean))
    return mean, max(-1.0, mean - half), min(1.0, mean + half), p


def log_e_value(wins: Any, losses: Any, theta: Any = 0.5) -> Any:
    """Natural logarithm of the e-value against "each vote is won with probability theta"; arrays broadcast.

    E = integral of Beta(a, a)(q) (q / theta)^w ((1 - q) / (1 - theta))^l dq, which is 2^n B(a+w, a+l) / B(a, a) at
    theta = 1/2 (Robbins 1970, "Statistical methods related to the law of the iterated logarithm"). It is a
    martingale under the null, so by Ville's inequality P(E ever reaches 20) <= 1/20, whenever and however often
    people look. w of n = 100,000 is safe, for nothing leaves the logarithm.
    """
    import numpy as np
    from scipy.special import betaln, xlogy

    fair = xlogy(wins, theta) + xlogy(losses, 1 - np.asarray(theta, dtype=float))
    return betaln(PRIOR + np.asarray(wins), PRIOR + np.asarray(losses)) - betaln(PRIOR, PRIOR) - fair


def confidence_sequence(wins: Any, losses: Any) -> tuple:
    """Win rates that the e-value has not rejected so far: low [T], high [T] from cumulative counts [T].

    The rates with E < 1 / ALPHA after each vote, intersected over time: the true rate lies in all of them at once with
    probability 1 - ALPHA. log E is convex in the rate and at most 0 at w / n, so bisection finds both ends. low > high,
    an empty intersection, says that no one rate explains the whole course (or that the one case in twenty has come).
    """
    import numpy as np

    wins, losses = np.asarray(wins, dtype=float), np.asarray(losses, dtype=float)
    center, ends = np.where(wins + losses > 0, wins / np.maximum(wins + losses, 1), 0.5), []
    for far in (0.0, 1.0):
        inside, outside = center, np.full_like(center, far)
        for _ in range(50):
            middle = (inside + outside) / 2
            kept = log_e_value(wins, losses, np.clip(middle, 1e-15, 1 - 1e-15)) < -math.log(ALPHA)
            inside, outside = np.where(kept, middle, inside), np.where(kept, outside, middle)
        ends.append(outside)
    return np.maximum.accumulate(ends[0]), np.minimum.accumulate(ends[1])


def krippendorff_alpha(units: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Krippendorff's alpha for nominal labels, with any number of judges a unit (Krippendorff 2011).

    units: for each query the labels that its judges gave; units with fewer than two say nothing and are left out.
    alpha = 1 - observed / expected disagreement, None when every label is the same, for then nothing could have
    disagreed; 95% percentile interval over units drawn with replacement. agreement is the raw share of agreeing pairs
    of judges, each label weighing the same.
    """
    import numpy as np

    pairable = [Counter(unit) for unit in units if len(unit) >= 2]
    found = {"units": len(pairable), "labels": sum(unit.total() for unit in pairable)}
    found |= dict.fromkeys(("agreement", "alpha", "low", "high"))
    if not pairable:
        return found
    labels = sorted({label for unit in pairable for label in unit})
    counts = np.array([[unit[label] for label in labels] for unit in pairable], dtype=float)  # [units, labels]
    size = counts.sum(axis=1)
    apart = (size**2 - (counts**2).sum(axis=1)) / (size - 1)  # ordered disagreeing pairs, each weighing 1 / (m - 1)
    draws = np.random.default_rng(0).multinomial(len(size), np.full(len(size), 1 / len(size)), size=1_000)
    times = np.concatenate([np.ones((1, len(size))), draws])  # the units as they are, then resampled: [1001, units]
    each, total = times @ counts, times @ size
    expected = (total**2 - (each**2).sum(axis=1)) / (total - 1)
    alpha = 1 - np.divide(times @ apart, expected, out=np.full(len(total), np.nan), where=expected > 0)
    found["agreement"] = float(1 - apart.sum() / size.sum())
    if not np.isnan(alpha[0]):
        low, high = np.nanquantile(alpha[1:], [ALPHA / 2, 1 - ALPHA / 2])
        found |= {"alpha": float(alpha[0]), "low": float(low), "high": float(high)}
    return found


# --------------------------------------------------------------------------------------------------------------------
# Results: what the votes of one experiment say. One vote a query, its first decided one, feeds the tests that need
# independent votes (binomial, e-value, object types); all votes count for rates, net preference and agreement.

REASONS = ("undone", "identical", "abstained", "repeat")  # why a row of the log does not count
OUTCOMES = {"wins": 1, "losses": -1, "ties": 0}  # of the challenger


def mark_votes(votes: list[dict[str, Any]], base: str, challenger: str) -> None:
    """Give each of `Log.votes` its `outcome`, and the `reason` why it does not count, or None.

    base, challenger: fingerprints. "identical": both rows were, and nobody was asked; "repeat": the judge has answered
    this query before, as older versions planned it.
    """
    answered, scores = set(), {base: -1, challenger: 1}
    for vote in votes:
        if not vote["identical"] and vote["choice"] not in CHOICES:
            raise Fail(f"unknown choice {vote['choice']} among the votes; the log was tampered with")
        key = vote["judge"], vote["query"]
        holds = (vote["revoked"], vote["identical"], vote["choice"] == "N", key in answered)
        vote["reason"] = next((reason for reason, yes in zip(REASONS, holds, strict=True) if yes), None)
        vote["outcome"] = {"A": scores[vote["left_model"]], "B": scores[vote["right_model"]]}.get(vote["choice"], 0)
        if vote["reason"] is None:
            answered.add(key)


def group(votes: Iterable[dict], name: str) -> dict[str, list[dict]]:
    """The votes by one of their columns, in order."""
    found: dict[str, list[dict]] = {}
    for vote in votes:
        found.setdefault(vote[name], []).append(vote)
    return found


def tally(votes: list[dict]) -> dict[str, int]:
    """Wins, losses and ties."""
    return {name: sum(vote["outcome"] == value for vote in votes) for name, value in OUTCOMES.items()}


def arena_statistics(votes: list[dict[str, Any]], base: dict[str, str], challenger: dict[str, str]) -> dict[str, Any]:
    """Everything the results page shows, as JSON-ready values (absent numbers are None), from `Log.votes`.

    base, challenger: {"name", "fingerprint"}. Rates have "value", "low", "high" (see `vote_rate`), like the net
    preference: wins minus losses, query by query (see `bootstrap_mean`). planned: "p" of the binomial test,
    "p_binomial" over all votes, and whether these are "independent". For the other parts see the functions below.
    """
    mark_votes(votes, base["fingerprint"], challenger["fingerprint"])
    counted = [vote for vote in votes if vote["reason"] is None]
    decided = [vote for vote in counted if vote["outcome"]]
    by_query, counts = group(counted, "query"), tally(counted)
    first = {query: own[0]["outcome"] for query, own in group(decided, "query").items()}
    first_wins, wins, n = list(first.values()).count(1), counts["wins"], len(decided)
    scores = [sum(vote["outcome"] for vote in own) / len(own) for own in by_query.values()]
    net = bootstrap_mean(scores, list(by_query))[:3] if scores else (None,) * 3
    same = group((vote for vote in votes if vote["identical"]), "query").keys() - by_query
    excluded = {reason: sum(vote["reason"] == reason for vote in votes) for reason in REASONS}
    counts |= {"votes": len(counted), "abstained": excluded["abstained"], "queries": len(by_query)}
    judges, types = _judges(votes), _object_types(counted, first)
    agreement = krippendorff_alpha([[str(vote["outcome"]) for vote in own] for own in by_query.values()])
    found = {"challenger": challenger["name"], "base": base["name"], "judges": judges, "agreement": agreement}
    found |= {
        "votes": {"rows": len(votes), "counted": len(counted), "excluded": excluded, "judges": len(judges)},
        "counts": counts | {"judges": len(group(counted, "judge"))},
        "win_rate": vote_rate(wins, n, len(first)),
        "tie_rate": vote_rate(counts["ties"], len(counted), len(by_query)),
        "net": dict(zip(("value", "low", "high"), net, strict=True)),
        "identical": {"queries": len(same), "share": ratio(len(same), len(same) + len(by_query))},
        "planned": {"p": binomial_test(first_wins, len(first)), "p_binomial": binomial_test(wins, n)}
        | {"independent": len(by_query) == len(counted)},
        "anytime": _anytime(list(first.values())),
        "position": _position(decided),
        "categories": types,
        "heterogeneity": _heterogeneity(types),
        "needed": _needed(n, counts["ties"]),
        "results": _results_distribution([_rows(own[0], "pictures", challenger) for own in by_query.values()]),
        "attributes": _attributes(decided, challenger),
        "course": _course(counted),
    }
    return found | {"verdict": _verdict(found)}


def _looks(count: int) -> list[int]:
    """At most LOOKS numbers from 0 to count, evenly spread, both ends among them: the points of a plot."""
    steps = max(1, min(count, LOOKS - 1))
    return sorted({round(i * count / steps) for i in range(steps + 1)})


def _anytime(first: list[int]) -> dict[str, Any]:
    """The e-value after each query's first decided vote, and the confidence sequence of the win rate.

    {"log10_e": now; "max_e", "direction": so far, and who led then; "p": 1 / max E; "win_low", "win_high": now;
    "course": lists for a plot}.
    """
    import numpy as np

    wins, losses = (np.cumsum([0, *(outcome == value for outcome in first)]) for value in (1, -1))
    log_e, (low, high) = log_e_value(wins, losses), confidence_sequence(wins, losses)
    peak, at = int(np.argmax(log_e)), _looks(len(first))
    found = {"log10_e": float(log_e[-1]) / math.log(10), "max_e": math.exp(min(float(log_e[peak]), 690.0))}
    found |= {"p": math.exp(-float(log_e[peak])), "direction": int(np.sign(wins[peak] - losses[peak]))}
    found |= {"threshold": 1 / ALPHA, "queries": len(first), "win_low": float(low[-1]), "win_high": float(high[-1])}
    course = {"n": at, "log10_e": (log_e[at] / math.log(10)).tolist(), "low": low[at].tolist()}
    return found | {"course": course | {"high": high[at].tolist(), "win_rate": [ratio(int(wins[n]), n) for n in at]}}


def _course(counted: list[dict]) -> dict[str, list]:
    """How wins, losses and ties came, vote by vote: lists for a plot."""
    at = _looks(len(counted))
    course = [tally(counted[:n]) for n in at]
    times = [counted[n - 1]["time"] if n else None for n in at]
    return {"n": at, "time": times} | {name: [counts[name] for counts in course] for name in OUTCOMES}


def _position(decided: list[dict]) -> dict[str, Any]:
    """How often row A was chosen: does the top row win because it is the top row?

    Sides come from a fair coin, so without such a habit these are fair coins whatever models and judges are like.
    """
    chosen, n = sum(vote["choice"] == "A" for vote in decided), len(decided)
    low, high = wilson(chosen, n)
    found = {"n": n, "chose_a": chosen, "share_a": ratio(chosen, n), "share_a_low": low, "share_a_high": high}
    return found | {"p": binomial_test(chosen, n)}


def _object_types(counted: list[dict], first: dict[str, int]) -> list[dict]:
    """Each type's rates; p, and p_holm over all types, of those with at least TYPE_VOTES votes."""
    rows = []
    for name, own in sorted(group(counted, "category").items()):
        queries, counts = group(own, "query"), tally(own)
        decided = [first[query] for query in queries if query in first]
        row = {"category": name, "queries": len(queries), "votes": len(own)} | counts | {"p": None, "p_holm": None}
        rate = vote_rate(counts["wins"], counts["wins"] + counts["losses"], len(decided))
        row |= {"win_rate": rate["value"], "win_low": rate["low"], "win_high": rate["high"]}
        row["net"] = sum(sum(vote["outcome"] for vote in votes) / len(votes) for votes in queries.values()) / len(
            queries
        )
        row |= {"first_wins": decided.count(1), "first_losses": decided.count(-1)}
        if len(own) >= TYPE_VOTES:
            row["p"] = binomial_test(row["first_wins"], len(decided))
        rows.append(row)
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return rows


def _heterogeneity(types: list[dict]) -> dict[str, Any]:
    """Do the tested types differ? Pearson's chi-square of first decided votes; p None where nothing could differ."""
    from scipy.stats import chi2_contingency

    table = [(row["first_wins"], row["first_losses"]) for row in types if row["p"] is not None]
    table = [pair for pair in table if any(pair)]
    known = len(table) > 1 and all(map(any, zip(*table, strict=True)))
    return {"p": float(chi2_contingency(table, correction=False).pvalue) if known else None, "categories": len(table)}


def _needed(have: int, ties: int) -> list[dict]:
    """For each win rate the decided votes that find it, those still missing, and all votes that takes with ties."""
    rows = [{"rate": rate, "needed": needed, "missing": max(0, needed - have)} for rate, needed in NEEDED.items()]
    more = (have + ties) / have if have else 1
    return [row | {"missing_with_ties": math.ceil(row["missing"] * more)} for row in rows]


def _rows(vote: dict, fact: str, challenger: dict[str, str]) -> tuple:
    """(the challenger's, the base's) "pictures" or "attributes" of a vote's rows."""
    sides = ("left", "right") if vote["left_model"] == challenger["fingerprint"] else ("right", "left")
    return tuple(vote["facts"][f"{side}_{fact}"] for side in sides)


def _results_distribution(lists: list[tuple[list, list]]) -> dict[str, Any]:
    """How the two models' rows differ, from both lists of each query.

    overlap: {shared results: queries}; `differs`[r]: share of queries whose results at rank r + 1 differ;
    same_set: queries with the same results in another order.
    """
    shared, depth = Counter(len(set(a) & set(b)) for a, b in lists), len(lists[0][0]) if lists else 0
    found = {"queries": len(lists), "k": depth, "overlap": {str(k): shared[k] for k in range(depth + 1)}}
    found["mean_overlap"] = ratio(sum(k * count for k, count in shared.items()), len(lists))
    found["differs"] = [sum(a[rank] != b[rank] for a, b in lists) / len(lists) for rank in range(depth)]
    return found | {"same_set": sum(set(a) == set(b) and a != b for a, b in lists)}


def _attributes(decided: list[dict], challenger: dict[str, str]) -> list[dict]:
    """For each attribute the share of results that agree with the query, in the rows that won and those that lost."""
    rows = []
    for name in sorted(ATTRIBUTES):
        pairs = [[side.get(name) for side in _rows(v, "attributes", challenger)][:: v["outcome"]] for v in decided]
        known = [(*pair, vote["query"]) for pair, vote in zip(pairs, decided, strict=True) if None not in pair]
        if known:
            won, lost, queries = zip(*known, strict=True)
            test = bootstrap_mean([one - other for one, other in zip(won, lost, strict=True)], queries)
            row = {"attribute": name, "votes": len(known), "won": sum(won) / len(won), "lost": sum(lost) / len(lost)}
            rows.append(row | dict(zip(("difference", "low", "high", "p"), test, strict=True)))
    return rows


def _judges(votes: list[dict]) -> list[dict]:
    """One row a judge: what they chose."""
    rows, asked = [], [vote for vote in votes if vote["reason"] in (None, "abstained")]
    for number, (judge, own) in enumerate(sorted(group(asked, "judge").items()), start=1):
        chose = Counter(vote["choice"] for vote in own)
        row = {"judge": judge, "name": own[0]["judge_name"] or f"anonymous {number}", "votes": len(own) - chose["N"]}
        row |= {"ties": chose["T"], "abstained": chose["N"], "share_a": ratio(chose["A"], chose["A"] + chose["B"])}
        rows.append(row)
    return rows


def _verdict(found: dict[str, Any]) -> dict[str, str]:
    """{"answer": a model's name, "not yet", "no difference shown" or "no votes"; "sentence" for people}."""
    planned, anytime = found["planned"]["p"], found["anytime"]
    best, p = f"{anytime['max_e']:.4g}", p_value(planned)
    better, worse = (found["challenger"], found["base"])[:: anytime["direction"] or 1]
    early = f"the test that stays valid when people look early has reached E {best} of the {1 / ALPHA:.0f} it needs."
    if not found["counts"]["votes"]:
        answer, sentence = "no votes", "No votes yet."
    elif anytime["p"] <= ALPHA:
        answer, sentence = better, f"{better} is preferred to {worse}: E reached {best}, p {p_value(anytime['p'])}, "
        sentence += "which holds however often the votes were looked at."
        if found["net"]["value"] * anytime["direction"] < 0:
            sentence += " The votes have turned since: look at their course before deciding."
    elif planned <= ALPHA:
        answer, sentence = "not yet", f"Not yet: p {p} would do at an end planned beforehand, but {early}"
    else:
        answer, sentence = "no difference shown", f"No difference shown so far: p {p}, and {early}"
    return {"answer": answer, "sentence": sentence}


def results(log: Log, experiment: dict[str, Any]) -> dict[str, Any]:
    """Everything about one experiment, computed from the log."""
    facts = {"id": experiment["id"], "key": experiment["key"], "started": experiment["time"]} | experiment["facts"]
    return {"experiment": facts} | arena_statistics(log.votes(experiment["id"]), *experiment["facts"]["models"])


def percent(value: float | None, digits: int = 1) -> str:
    """0.534 -> 53.4%; a dash for what is not known."""
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def p_value(p: float | None) -> str:
    """Two significant digits; never a p of zero."""
    return "–" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def add_formats(environment) -> None:
    """How templates write numbers, and that their blocks leave no blank lines."""
    environment.filters |= {"percent": percent, "p_value": p_value, "log10": math.log10}
    environment.filters["e_value"] = lambda log10_e: f"{10**log10_e:.3g}" if log10_e < 300 else f"10^{log10_e:.0f}"
    environment.globals["interval"] = lambda low, high: (
        "unknown" if low is None or high is None else f"{percent(low)} to {percent(high)}"
    )
    environment.trim_blocks = environment.lstrip_blocks = True


def report(found: dict[str, Any]) -> str:
    """The results as text for a terminal, by templates/stats.txt."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(TEMPLATES), keep_trailing_newline=True)
    add_formats(environment)
    return environment.get_template("stats.txt").render(found=found)


EXPORTED = "experiment vote trial judge judge_name place query category choice preferred left_model right_model "
EXPORTED += "left_items right_items same_set identical repeat_of reissue_of drawn time revoked"


def export(log: Log, experiments: Iterable[dict[str, Any]], form: str) -> str:
    """Every vote ever cast, those taken back included, as CSV or JSON; `preferred` is the name of the chosen model."""
    rows = []
    for experiment in experiments:
        names = {model["fingerprint"]: model["name"] for model in experiment["facts"]["models"]}
        for vote in log.votes(experiment["id"]):
            left, right = names[vote["left_model"]], names[vote["right_model"]]
            vote |= {"left_model": left, "right_model": right, "same_set": int(vote["facts"]["same_set"])}
            vote["preferred"] = {"A": left, "B": right, "T": "tie"}.get(vote["choice"])
            rows.append({name: vote[name] for name in EXPORTED.split()})
    if form == "json":
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    buffer = io.StringIO()
    writer = common.csv_writer(buffer)
    writer.writerow(EXPORTED.split())
    for row in rows:
        row |= {name: " ".join(row[name]) for name in ("left_items", "right_items")}
        if row["judge_name"].startswith(("=", "+", "-", "@")):  # a stranger's text is no formula for a spreadsheet
            row["judge_name"] = "'" + row["judge_name"]
        writer.writerow(row.values())
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------------------
# Search, for --reveal


class Finder:
    """Searches all items with both models, which are loaded by the first search."""

    def __init__(self, models: list[Model]):
        self.models, self.lock, self.clips = models, threading.Lock(), []

    def load(self, model: Model):
        """The model's CLIP. Raises Fail where the weights are not those that made the vectors."""
        name = model.items.facts.get(f"{model.kind}_model", "")
        clip = common.load_clip(*common.model_place(name, model.items.path))
        if clip.fingerprint != model.fingerprint:
            raise Fail(f"{name}: not the model that made the vectors any more; run 4_embed.py again")
        return clip

    def __call__(self, words: str = "", picture=None, k: int = 8) -> list[tuple[str, list[dict[str, Any]]]]:
        """(model's name, its k hits, best first) for words, or for an RGB picture."""
        import numpy as np
        import torch

        found = []
        with self.lock:
            self.clips = self.clips or [self.load(model) for model in self.models]
            for model, clip in zip(self.models, self.clips, strict=True):
                if picture is None:
                    asked = common.encode(clip, captions=[words])
                else:
                    pixels = np.array(letterbox(picture, clip.size))
                    asked = common.encode(clip, torch.from_numpy(pixels).permute(2, 0, 1)[None])
                scores, rows = common.top_k(asked.numpy(), model.items.vectors(f"{model.kind}_embedding"), k)
                hits = [
                    (row, score) for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True) if row >= 0
                ]
                names, text = ("title", "object_type"), model.items.text
                shown = [
                    {"row": row, "score": score} | {name: text(name, row) for name in names} for row, score in hits
                ]
                found.append((model.name, shown))
        return found


# --------------------------------------------------------------------------------------------------------------------
# The application


class Arena:
    """An experiment with its log, its draw and its pictures: what the pages work on."""

    def __init__(self, setup: Setup):
        self.setup, self.settings = setup, setup.settings
        self.keys = setup.keys or read_keys(setup.database)
        folder = common.images_folder(setup.images, [setup.embeddings[0]])
        self.experiment = Experiment(setup.embeddings, self.settings)
        self.experiment.find_answers(Path(f"{setup.database}.cache"))
        self.log = Log(setup.database)
        self.row = self.log.experiment(self.experiment.key, self.experiment.facts)
        self.number = self.row["id"]
        self.pictures = Pictures(self.experiment.items, folder, self.settings.picture_size)
        self.computed = functools.lru_cache(1)(lambda state: results(self.log, self.row))

    def results(self, named: bool) -> dict[str, Any]:
        """The results of all votes so far, computed again when there is another; `named` with the judges' names."""
        found = self.computed(self.log.state())
        if named:
            return found
        judges = [row | {"name": f"judge {number}"} for number, row in enumerate(found["judges"], start=1)]
        return found | {"judges": [{k: v for k, v in row.items() if k != "judge"} for row in judges]}

    def trial(self, judge: str, after: str | None = None) -> dict[str, Any]:
        """What the browser learns of the current trial, or of the one after it."""
        row = self.log.trial(
            self.number, judge, after, functools.partial(draw, self.experiment, self.log, self.number, judge)
        )
        last = self.log.last_vote(self.number, judge)
        answer = {"trial": row["token"] if row else None, "undo": last["token"] if last else None}
        answer["votes"] = sum(self.log.own_counts(self.number, judge).values())
        answer["decided"] = self.log.decided(self.number)
        if row and (words := self.experiment.queries[row["query"]].words) is not None:
            answer["words"] = words
        return answer

    def picture(self, judge: str, token: str, place: int) -> bytes:
        """JPEG: place 0 is the query, then row A, then row B. Raises Refused for a token that is not the judge's."""
        row = self.log.find(self.number, judge, token)
        shown = [row["query"], *json.loads(row["left_items"]), *json.loads(row["right_items"])]
        hidden = place == 0 and self.experiment.queries[row["query"]].words is not None  # they are the query then
        if row["vote"] is not None or row["identical"] or hidden or place >= len(shown):
            raise Refused(404, "There is no such picture for you.")
        return self.pictures.jpeg(self.experiment.items.row[shown[place]])


def create_app(setup: Setup):
    """The Flask application: pages for judges, the results page, and the search page where --reveal allows it."""
    from flask import Flask

    app = Flask(
        "arena", root_path=str(TEMPLATES), template_folder=str(TEMPLATES), static_folder=str(TEMPLATES / "static")
    )
    arena = app.extensions["arena"] = Arena(setup)
    app.config.update(
        SECRET_KEY=arena.keys["cookie_key"],
        SESSION_COOKIE_NAME="judge",
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_REFRESH_EACH_REQUEST=False,
        MAX_CONTENT_LENGTH=BODY_LIMIT,
        MAX_FORM_MEMORY_SIZE=BODY_LIMIT,
        TRUSTED_HOSTS=trusted_hosts(setup.settings),
        SEND_FILE_MAX_AGE_DEFAULT=0,
        PERMANENT_SESSION_LIFETIME=90 * 86_400,
    )
    app.url_map.merge_slashes = False
    add_formats(app.jinja_env)
    protect(app)
    explain_errors(app)
    add_judge_pages(app, arena)
    add_result_pages(app, arena)
    if arena.settings.reveal:
        add_search_page(app, arena)
    return app


def trusted_hosts(settings: ArenaConfig) -> list[str]:
    """Names that the Host header may carry."""
    import socket

    names = {"127.0.0.1", "localhost", "[::1]", *filter(None, (settings.trusted_host or "").split(","))}
    if settings.host not in LOOPBACK:
        names |= {socket.gethostname(), socket.getfqdn(), settings.host} - {"0.0.0.0", "::"}
    if settings.host in ("0.0.0.0", "::"):
        try:
            names |= {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
        except OSError:
            note("this machine's addresses are unknown; name them with --trusted-host")
    return sorted(names)


def sign(app, *parts: str) -> str:
    """What only this server can make of these texts."""
    return hmac.new(app.secret_key.encode(), " ".join(parts).encode(), "sha256").hexdigest()


def same(given: str, secret: str) -> bool:
    """Whether both are equal, in constant time."""
    return hmac.compare_digest(given.encode(), secret.encode())


def protect(app) -> None:
    """For every request: posts from the own pages only, and the headers."""
    from flask import request, session

    @app.template_global()
    def csrf() -> str:
        """What the forms and the script of this browser's pages send along, and no other site's page can know.

        A browser without a cookie gets one here, with a judge's id that the log does not hold yet.
        """
        if "judge" not in session:
            session["judge"], session.permanent = secrets.token_hex(16), True
        return sign(app, "csrf", session["judge"])

    @app.before_request
    def check_csrf():
        """Refuse posts without the token. The Origin header would not do: no-referrer makes browsers hide it."""
        if request.method in ("GET", "HEAD", "OPTIONS"):
            return
        if request.endpoint == "search_picture":
            request.max_content_length = UPLOAD_LIMIT
        given = request.headers.get("X-CSRF-Token") or request.form.get("csrf", "")
        if "judge" not in session or not same(given, csrf()):
            raise Refused(403, "This did not come from the arena's own page. Open that anew, with cookies allowed.")

    @app.after_request
    def add_headers(response):
        response.headers.update(HEADERS)
        return response


def explain_errors(app) -> None:
    """Errors in a person's words: JSON for the voting page's script, else a page."""
    from flask import jsonify, render_template, request
    from werkzeug.exceptions import HTTPException, SecurityError

    def answer(status: int, message: str, headers: dict | None = None):
        if request.path.startswith(("/trial", "/vote", "/undo", "/picture")):
            return jsonify(error=message), status, headers
        return render_template("message.html", status=status, message=message), status, headers

    def http_error(error: HTTPException):
        if isinstance(error, SecurityError):  # of the Host header; no page can be made then
            return "The server is not known by that name; --trusted-host would make it known.\n", 400
        return answer(error.code, "There is no such page." if error.code == 404 else error.description)

    def failed(error: Fail):
        note(str(error))
        return answer(500, str(error))

    def not_saved(error: sqlite3.Error):
        """Nothing was committed, so nothing is acknowledged; the page keeps the vote and tries again."""
        note(f"database: {error}; requests are answered with 503 until this is mended")
        sorry = "The vote could not be saved just now. Nothing is lost; it is tried again."
        return answer(503, sorry, {"Retry-After": "2"})

    app.register_error_handler(HTTPException, http_error)
    app.register_error_handler(Refused, lambda error: answer(error.status, str(error)))
    app.register_error_handler(Fail, failed)
    app.register_error_handler(sqlite3.Error, not_saved)


def add_judge_pages(app, arena: Arena) -> None:
    """Start, vote, thanks: nothing here knows more of a model than a trial's token."""
    from flask import Response, redirect, render_template, request, session

    log, number = arena.log, arena.number

    def judge(must: bool = True) -> str | None:
        """The judge of this request's cookie who has an open session."""
        found = session.get("judge")
        if found and log.session(number, found):
            return found
        if must:
            raise Refused(403, "Your session has ended, or this browser has none yet; open the first page to start.")
        return None

    def read_fields(*names: str) -> list:
        """Fields of the JSON object in the request's body."""
        try:
            body = request.get_json()
        except RecursionError:  # lists in lists in lists
            body = None
        if not isinstance(body, dict) or not all(isinstance(body.get(name), str | None) for name in names):
            raise Refused(400, "A JSON object is expected.")
        return [body.get(name) for name in names]

    @app.get("/")
    def index():
        """The voting page; before it, once, the page that asks for a name."""
        if judge(must=False):
            return render_template("arena.html", settings=arena.settings)
        known, token = log.judge(session.get("judge")), request.args.get("token", "")
        asked = arena.settings.host not in LOOPBACK and not known
        return render_template("start.html", known=known, asked=asked, token=token, settings=arena.settings)

    @app.post("/start")
    def start():
        """Open a session; who comes from another machine for the first time needs the judges' token."""
        free = arena.settings.host in LOOPBACK or log.judge(session.get("judge"))
        if not free and not same(request.form.get("token", "").strip(), arena.keys["judge_token"]):
            raise Refused(403, "That is not the judges' token. Ask for the link with the token in it.")
        log.start(number, session["judge"], " ".join(request.form.get("name", "").split())[:60])
        session.modified = True  # the cookie's 90 days begin anew
        return redirect("/", 303)

    @app.post("/trial")
    def trial():
        """The trial to judge now, or the one `after` it, which the page fetches ahead."""
        return arena.trial(judge(), *read_fields("after"))

    @app.get("/picture/<token>/<int:place>")
    def picture(token: str, place: int):
        return Response(arena.picture(judge(), token, place), mimetype="image/jpeg")

    @app.post("/vote")
    def vote():
        return log.vote(number, judge(), *read_fields("trial", "choice"))

    @app.post("/undo")
    def undo():
        log.undo(number, judge(), *read_fields("trial"))
        return arena.trial(judge())

    @app.post("/quit")
    def quit_session():
        if who := judge(must=False):
            log.quit(number, who)
        return redirect("/thanks", 303)

    @app.get("/thanks")
    def thanks():
        counts, finished = log.own_counts(number, session.get("judge")), judge(must=False) is None
        return render_template("thanks.html", counts=counts, settings=arena.settings, finished=finished)


def require_results_access(app, arena: Arena) -> bool:
    """Whether the admin asks. Raises Refused for others, but with --reveal only for judges who have not finished."""
    from flask import request, session

    if same(request.cookies.get("admin", ""), sign(app, "admin", arena.keys["admin_token"])):
        return True
    if not arena.settings.reveal:
        raise Refused(403, "Results are for the admin: open the link that the server printed when it started.")
    if arena.log.session(arena.number, session.get("judge")):
        raise Refused(403, "Results would color your next answers. Quit first; then you may look.")
    return False


def add_result_pages(app, arena: Arena) -> None:
    """Results for the admin; with --reveal for everybody who is not in the middle of voting."""
    from flask import Response, redirect, render_template, request

    @app.get("/results")
    def show_results():
        token = request.args.get("token")
        if token is None:
            admin = require_results_access(app, arena)
            shown = {"found": arena.results(named=admin), "search": arena.settings.reveal, "admin": admin}
            return render_template("results.html", **shown)
        if not same(token, arena.keys["admin_token"]):
            raise Refused(403, "That is not the admin's token.")
        response = redirect("/results", 303)  # the token does not stay in the address bar
        # Another admin token makes the old cookies worthless.
        response.set_cookie("admin", sign(app, "admin", token), httponly=True, samesite="Lax")
        return response

    @app.get("/results.json")
    def results_json():
        return arena.results(named=require_results_access(app, arena))

    @app.get("/votes.csv")
    def votes_csv():
        if not require_results_access(app, arena):
            raise Refused(403, "The votes one by one, with the judges' names, are for the admin.")
        named = {"Content-Disposition": "attachment; filename=votes.csv"}
        return Response(export(arena.log, [arena.row], "csv"), mimetype="text/csv", headers=named)


def add_search_page(app, arena: Arena) -> None:
    """Type words or give a picture, and see both models' answers with their names on them."""
    from flask import Response, render_template, request

    finder, items = Finder(arena.experiment.models), arena.experiment.items

    def page(found: list, words: str = "", asked: bytes = b""):
        shown = {"words": words, "asked": base64.b64encode(asked).decode(), "size": arena.settings.picture_size}
        return render_template("search.html", found=found, items=f"{len(items):,}", **shown)

    @app.get("/search")
    def search():
        require_results_access(app, arena)
        words = " ".join(request.args.get("q", "").split())[:200]
        return page(finder(words) if words else [], words)

    @app.post("/search")
    def search_picture():
        require_results_access(app, arena)
        given = request.files.get("picture")
        try:
            picture = load_image(given.read() if given else b"", arena.settings.picture_size)
        except BadImage as error:
            raise Refused(400, f"That picture cannot be used: {error}.") from None
        return page(finder(picture=picture), asked=arena.pictures.encode(picture))

    @app.get("/item/<int:row>")
    def item(row: int):
        require_results_access(app, arena)
        if row >= len(items):
            raise Refused(404, "There is no such item.")
        return Response(arena.pictures.jpeg(row), mimetype="image/jpeg")


# --------------------------------------------------------------------------------------------------------------------
# The command line


def serve(setup: Setup) -> int:
    """Serve until interrupted."""
    import socket

    import waitress

    settings = setup.settings
    with common.exclusive(f"{setup.database}.lock") as free:
        if not free:
            raise Fail(f"{setup.database}: another arena serves it; stop that one, or give another --database")
        app = create_app(setup)
        arena = app.extensions["arena"]
        try:
            server = waitress.create_server(
                app, host=settings.host, port=settings.port, threads=THREADS, ident=None,
                max_request_body_size=UPLOAD_LIMIT + 65_536, channel_timeout=60, connection_limit=CONNECTIONS,
                asyncore_use_poll=True,
            )  # fmt: skip
        except OSError as error:
            raise Fail(f"{settings.host}:{settings.port}: {error.strerror}; choose another --host or --port") from None
        name = socket.gethostname() if settings.host in ("0.0.0.0", "::") else settings.host
        home = f"http://{f'[{name}]' if ':' in name else name}:{getattr(server, 'effective_port', settings.port)}/"
        token = "" if settings.host in LOOPBACK else f"?token={quote(arena.keys['judge_token'])}"
        facts = arena.experiment.facts
        print(f"{facts['queries']} queries among {facts['items']} items; votes go to {setup.database}")
        print(f"Vote at      {home}{token}")
        print(f"Results at   {home}results?token={quote(arena.keys['admin_token'])}", flush=True)
        server.run()  # returns on Ctrl-C and SIGTERM
        note(f"stopped; {arena.log.decided(arena.number)} decided votes so far")
    return DONE


def print_log(args: argparse.Namespace, settings: ArenaConfig) -> str:
    """What `stats` or `votes` says of the experiment of these embeddings and settings; of all without embeddings."""
    log = Log(args.database, create=False)
    try:
        experiments = log.experiments()
        if not experiments:
            raise Fail(f"{log.path}: holds no experiment yet; vote first")
        if args.embeddings:
            key = Experiment(args.embeddings, settings).key
            experiments = [experiment for experiment in experiments if experiment["key"] == key]
        if not experiments:
            raise Fail(
                f"{log.path}: no votes on these embeddings with this --query and --top-k; leave out --embeddings"
            )
        if args.command == "votes":
            return export(log, experiments, args.format or "csv")
        for experiment in [one for one in experiments if len(one["facts"]["models"]) > 2]:
            note(f"experiment {experiment['id']} compares more than two models, as is no longer done; see `votes`")
            experiments.remove(experiment)
        found = [results(log, experiment) for experiment in experiments]
    except (sqlite3.DatabaseError, LookupError, TypeError, ValueError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise Fail(f"{log.path}: damaged, or not written by this program ({why}); go back to a copy") from None
    if args.format == "json":
        return json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    return "\n".join(map(report, found))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("serve", "stats", "votes"), help="what to do")
    parser.add_argument(
        "--embeddings", action="append", help="master.parquet of stage 4; twice to compare the fine-tuned models of two"
    )
    parser.add_argument("--images", help="folder that image_path is relative to")
    parser.add_argument("--database", required=True, help="SQLite file of trials and votes; made if it is not there")
    parser.add_argument("--format", choices=("text", "csv", "json"), help="of stats (text, json) and votes (csv, json)")
    parser.add_argument("--output", help="write stats or votes to this file instead of the terminal")
    common.add_flags(parser, ArenaConfig)
    return parser


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    settings = common.from_flags(ArenaConfig, args)
    if args.command == "serve":
        if not args.embeddings or not args.images:
            raise Fail("serve needs --embeddings and --images", USAGE)
        return serve(Setup(tuple(args.embeddings), args.images, args.database, settings))
    if args.format == ("csv" if args.command == "stats" else "text"):
        raise Fail(f"{args.command} has no --format {args.format}; see --help", USAGE)
    text = print_log(args, settings)
    if args.output:
        common.atomic_write(args.output, text)
    else:
        sys.stdout.write(text)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
