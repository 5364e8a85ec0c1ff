"""Stage 5: people vote, blind, on which of two models searches better.

Reads   embeddings/master.parquet (stage 4), or a folder of its parts, and the photos; of two --embeddings, the
        fine-tuned models are compared
Writes  arena.sqlite: trials and votes, inserted only; arena.sqlite.cache/ and arena.sqlite.keys.json beside it

serve   the voting page (A, B, T tie, N skip, U undo, Q quit), and the results page behind the admin link it prints
stats   the results, computed from the log, as text or with --format json
votes   every vote, as CSV

    python 5_arena.py serve --embeddings data/embeddings/master.parquet --images data/photos \\
        --database data/arena.sqlite --host 127.0.0.1 --port 8000
    python 5_arena.py serve --embeddings data/embeddings/master.parquet --images data/sample \\
        --database data/try.sqlite --limit 20 --reveal
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import common
from common import ALPHA, ATTRIBUTES, DONE, USAGE, BadImage, Fail, digest, letterbox, load_image, setting

LOOPBACK = ("127.0.0.1", "localhost")
FORWARDED = ("Forwarded", "X-Forwarded-", "X-Real-Ip", "Via")  # how headers begin that a proxy adds
THREADS = 32  # requests answered at once
PICTURE_THREADS = THREADS - 8  # how many of them pictures may hold: votes must not wait behind those
CONNECTIONS = 800  # open at once: a browser keeps up to six, and most systems allow a process 1,024 files
BODY_LIMIT = 4_096  # bytes of a vote or a name
UPLOAD_LIMIT = 12_000_000  # bytes of a picture on the search page
TEMPLATES = Path(__file__).parent / "templates"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
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
    query: str = setting("image", "what is searched with: a picture, or words (its prompt)", ("image", "text"))
    queries: str | None = setting(None, "CSV of query,id (weight or grade): for --query text, words that people type")
    limit: int = setting(
        2000, "most queries: of the test split, one a duplicate group, spread over object types", low=1
    )
    votes_needed: int = setting(210, "decided queries aimed at; 820, 210, 97 find 55, 60, 65% at 80% power", low=1)
    shared: float = setting(0.2, "share of the queries that three judges see, for their agreement", low=0, high=1)
    picture_size: int = setting(480, "pixels a side of every picture shown", low=1, high=4096)
    seed: int = setting(42, "seed of the choice of queries and of each judge's order")
    host: str = setting("127.0.0.1", "address to listen at; any but loopback needs the judges' token")
    port: int = setting(8000, "port to listen at; 0 takes a free one", low=0, high=65_535)
    trusted_host: str | None = setting(None, "names that a proxy or DNS gives the server, with commas; needs the token")
    reveal: bool = setting(False, "show results and search to all who are not voting; who has looked votes no more")


@dataclass(frozen=True)
class Setup:
    """What an application needs besides its settings; without keys, those of `read_keys`."""

    embeddings: tuple[str, ...]
    images: str
    database: str
    settings: ArenaConfig = field(default_factory=ArenaConfig)
    keys: dict[str, str] | None = None


KEYS = ("cookie_key", "judge_token", "admin_token")


def read_keys(database: str | Path) -> dict[str, str]:
    """The cookie's key, the judges' and the admin's token: kept beside the database, readable by its owner only.

    ARENA_JUDGE_TOKEN and ARENA_ADMIN_TOKEN in the environment take precedence.
    """
    path = Path(f"{database}.keys.json")
    if not path.is_file():
        with common.atomic_file(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(json.dumps({name: secrets.token_urlsafe(24) for name in KEYS}, indent=2) + "\n")
    kept = common.read_json(path, "file of keys")
    if not isinstance(kept, dict) or not all(kept.get(name) and str(kept[name]).isascii() for name in KEYS):
        raise Fail(f"{path}: not a file of keys; remove it, and give judges and admin the new links")
    return {name: os.environ.get(f"ARENA_{name.upper()}", "").strip() or str(kept[name]) for name in KEYS}


# --------------------------------------------------------------------------------------------------------------------
# The log in SQLite; templates/schema.sql says what it holds, connection.sql has the views that are read here. A vote is
# acknowledged after its commit. One process writes; others may read meanwhile.

# What a vote may say, by its key (U, Q and ? are others). One more also needs a place in the CHECK of schema.sql and a
# button and help in arena.html, where T's help says what is left for it; votes.csv has its words under `preferred`.
# It counts as a tie, unless `mark_votes` and what is computed from its outcomes say otherwise.
CHOICES = {"A": "row A", "B": "row B", "T": "equal", "N": "skipped"}
VOTES_TABLE = "SELECT sql FROM sqlite_master WHERE name = 'votes'"
# A table keeps the constraints that it was made with: older ones allow a trial one vote for ever, or fewer choices.
# A table with columns that the schema does not know is refused, for they would be lost.
REBUILD = """
PRAGMA foreign_keys = OFF; BEGIN IMMEDIATE;
CREATE TABLE old AS SELECT * FROM votes; DROP TABLE votes;
{schema} INSERT INTO votes (id, trial, session, choice, time) SELECT * FROM old; DROP TABLE old;
COMMIT; PRAGMA foreign_keys = ON;
"""


class Refused(Exception):
    """A request that is not granted: (HTTP status that says so, message)."""


class Log:
    """The log of one database file. Threads share it, each with its own connection."""

    def __init__(self, path: str | Path, create: bool = True):
        self.path, self._local = Path(path), threading.local()
        self._mode = "rwc" if create else "rw"  # ro would leave files behind
        self._writer = threading.Lock()  # waiting writers queue here fairly; SQLite's own waiting polls
        try:
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                schema = (TEMPLATES / "schema.sql").read_text()
                self.one("PRAGMA journal_mode = WAL")  # kept in the file
                with self.connection as db:  # rolls back what fails
                    db.executescript(REBUILD.format(schema=schema) if self._outdated(schema) else schema)
            self.one("SELECT COUNT(*) FROM experiments")
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            why = f"cannot be used as the arena's database ({error})"
            raise Fail(f"{path}: {why}; check --database, which `5_arena.py serve` makes") from None

    def _outdated(self, schema: str) -> bool:
        """Whether the table of votes was made by another text than the schema's."""
        with contextlib.closing(sqlite3.connect(":memory:")) as new:
            wanted = new.executescript(schema).execute(VOTES_TABLE).fetchone()
        stored = self.one(VOTES_TABLE)
        return stored is not None and tuple(stored) != wanted

    @property
    def connection(self) -> sqlite3.Connection:
        """This thread's connection, in autocommit mode."""
        if not hasattr(self._local, "connection"):
            uri = f"{self.path.absolute().as_uri()}?mode={self._mode}"
            connection = sqlite3.connect(uri, timeout=10, isolation_level=None, uri=True)
            connection.row_factory = sqlite3.Row
            connection.executescript((TEMPLATES / "connection.sql").read_text())
            self._local.connection = connection
        return self._local.connection

    def all(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """Every row of a query."""
        return self.connection.execute(sql, values).fetchall()

    def one(self, sql: str, *values: Any) -> sqlite3.Row | None:
        """The first row of a query."""
        return self.connection.execute(sql, values).fetchone()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction that holds the write lock from its first statement on; leaving it commits, or rolls back."""
        with self._writer, self.connection as db:
            db.execute("BEGIN IMMEDIATE")
            yield

    def insert(self, table: str, **columns: Any) -> int:
        """Write a row down, within a transaction; lists and dicts become JSON. Returns its id.

        Its time is UTC, ISO 8601, milliseconds. A judge or an experiment that is known already stays as it is.
        """
        columns["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        values = [json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v for v in columns.values()]
        verb = "INSERT OR IGNORE" if table in ("judges", "experiments") else "INSERT"
        sql = f"{verb} INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
        return self.connection.execute(sql, values).lastrowid

    def experiments(self) -> list[dict[str, Any]]:
        """Every experiment of the database, oldest first, facts decoded."""
        rows = map(dict, self.all("SELECT * FROM experiments ORDER BY id"))
        return [row | {"facts": json.loads(row["facts"])} for row in rows]

    def experiment(self, key: str, facts: dict[str, Any]) -> dict[str, Any]:
        """The experiment with this key; a new one is written down with its facts."""
        with self.writing():
            self.insert("experiments", key=key, facts=facts)
        return next(row for row in self.experiments() if row["key"] == key)

    def session(self, experiment: int, judge: str | None) -> int | None:
        """The judge's open session."""
        sql = "SELECT MAX(id) FROM sessions WHERE experiment = ? AND judge = ? AND ended IS NULL"
        return self.one(sql, experiment, judge)[0]

    def start(self, experiment: int, judge: str | None, name: str = "") -> str:
        """Open a session, for a new judge where none is given; returns the judge's id. The first name stays."""
        judge = judge or secrets.token_hex(16)
        with self.writing():
            self.insert("judges", id=judge, name=name)
            if not self.session(experiment, judge):
                self.insert("sessions", experiment=experiment, judge=judge)
        return judge

    def quit(self, experiment: int, judge: str) -> None:
        """End the judge's session, if one is open."""
        sql = "UPDATE sessions SET ended = strftime('%Y-%m-%dT%H:%M:%f+00:00') WHERE id = ?"
        with self.writing():
            self.connection.execute(sql, [self.session(experiment, judge)])

    def find(self, experiment: int, judge: str, token: str) -> sqlite3.Row:
        """The judge's own trial with this token and its standing vote. Raises Refused (404) for any other token."""
        sql = "SELECT * FROM judged WHERE token = ? AND experiment = ? AND judge = ?"
        if (row := self.one(sql, token, experiment, judge)) is None:
            raise Refused(404, "There is no such trial for you.")
        return row

    def vote(self, experiment: int, judge: str, token: str, choice: str) -> dict[str, Any]:
        """Write a vote down, once. The same vote again gets the same answer; another choice is Refused (409)."""
        if choice not in CHOICES:
            raise Refused(400, f"A choice is one of {', '.join(CHOICES)}.")
        with self.writing():
            trial, session = self.find(experiment, judge, token), self.session(experiment, judge)
            if trial["vote"] is None and session is None:
                raise Refused(403, "Your session has ended; start again to go on voting.")
            if trial["choice"] not in (choice, None):
                raise Refused(409, "You have judged this pair already, with another choice.")
            vote = trial["vote"] or self.insert("votes", trial=trial["id"], session=session, choice=choice)
            sql = "SELECT COUNT(*) FROM judged WHERE experiment = ? AND judge = ? AND vote <= ?"
            return {"trial": token, "choice": choice, "number": self.one(sql, experiment, judge, vote)[0]}

    def last_vote(self, experiment: int, judge: str) -> sqlite3.Row | None:
        """The trial of the newest standing vote in the judge's open session: the one that undo takes back."""
        sql = "SELECT * FROM judged WHERE experiment = ? AND judge = ? AND session = ? ORDER BY vote DESC"
        return self.one(sql, experiment, judge, self.session(experiment, judge))

    def undo(self, experiment: int, judge: str, token: str) -> None:
        """Take the session's newest vote back, which opens its trial again; asked twice, it is done once."""
        with self.writing():
            trial, last = self.find(experiment, judge, token), self.last_vote(experiment, judge)
            if trial["vote"] is None and self.one("SELECT 1 FROM votes WHERE trial = ?", trial["id"]):
                return
            if last is None or last["id"] != trial["id"]:
                raise Refused(409, "Only the newest vote of this session can be taken back.")
            self.insert("revocations", vote=last["vote"])

    def own_counts(self, experiment: int, judge: str | None) -> dict[str, int]:
        """How often the judge chose what; for the judge only."""
        sql = "SELECT choice, COUNT(*) FROM judged WHERE experiment = ? AND judge = ? AND vote NOTNULL GROUP BY choice"
        return dict.fromkeys(CHOICES, 0) | dict(map(tuple, self.all(sql, experiment, judge)))

    def decided(self, experiment: int) -> int:
        """Queries with a standing vote for either row, by any judge: what the tests count."""
        return self.one("SELECT COUNT(DISTINCT query) FROM decided WHERE experiment = ?", experiment)[0]

    def votes(self, experiment: int) -> list[dict[str, Any]]:
        """Every vote ever cast in an experiment, oldest first; `revoked` is the time it was taken back, or None.

        Queries passed over for identical rows come first, with neither vote nor choice.
        """
        rows = map(dict, self.all("SELECT * FROM all_votes WHERE experiment = ?", experiment))
        lists = ("left_items", "right_items", "facts")
        return [row | {"time": row["voted"]} | {name: json.loads(row[name]) for name in lists} for row in rows]


# --------------------------------------------------------------------------------------------------------------------
# What is compared: items, two models, queries, and each model's answers

COLUMNS = ("image_id", "split", "image_path", "title", "prompt", "group", "image_digest")  # ATTRIBUTES may be missing


class Items(common.Master):
    """The rows of master.parquet; table: its columns of text, as pyarrow reads them (half the bytes of a DataFrame)."""

    def __init__(self, path: str | Path):
        super().__init__(path, *COLUMNS, "base_embedding")
        self.table = self.text(*COLUMNS, *(name for name in ATTRIBUTES if name in self.types))

    def value(self, column: str, row: int) -> str:
        """One value; "" where it is missing, as in the column of an attribute that is newer than the file."""
        return self.table[column][row].as_py() or "" if column in self.types else ""

    @functools.cached_property
    def row(self) -> dict[str, int]:
        """image_id -> row number."""
        return {id: row for row, id in enumerate(self.table["image_id"].to_pylist())}

    @functools.cached_property
    def digest(self) -> str:
        """Digest of which items there are: it does not change when the file is written anew."""
        columns = [self.table[name].to_pylist() for name in ("image_id", "split", "group", "image_digest")]
        return digest([digest("\n".join(map(str, column))) for column in columns])

    @functools.cached_property
    def groups(self):
        """int [N]: equal for items of one duplicate group."""
        return self.table["group"].combine_chunks().dictionary_encode().indices.to_numpy()


@dataclass(frozen=True)
class Model:
    """One of the two models that are compared, and where its vectors stand."""

    name: str
    fingerprint: str
    items: Items
    kind: str  # "base" or "finetuned": the columns' prefix

    def vectors(self, of: str = "") -> Iterator:
        """Its vectors of all pictures, or of all prompts ("text_"), in blocks: float32 [n, D]."""
        return self.items.vectors(f"{self.kind}_{of}embedding")


def read_models(files: list[Items]) -> list[Model]:
    """[base, challenger]: the two models of one file, or the fine-tuned ones of two files."""
    if len(files) > 2:
        raise Fail("more than two --embeddings: one compares its two models, two compare their fine-tuned ones", USAGE)
    models = []
    for items, kind in ((files[0], "base" if len(files) == 1 else "finetuned"), (files[-1], "finetuned")):
        if items.digest != files[0].digest:
            raise Fail(f"{items.path} and {files[0].path} hold different items; embed the same shards for both models")
        name, fingerprint = items.model(kind)
        name = (items.facts.get("scenario") if kind == "finetuned" else "") or name
        models.append(Model(Path(name).name if name.startswith(common.LOCAL) else name, fingerprint, items, kind))
    base, challenger = models
    if base.fingerprint == challenger.fingerprint:
        raise Fail(f"{files[-1].path}: both models are the same ({base.name}); nothing to compare")
    if base.name == challenger.name:
        models = [replace(model, name=f"{model.name} ({model.fingerprint[:8]})") for model in models]
    return models


@dataclass(frozen=True)
class Query:
    """What a judge is asked about: an item by its picture, or by words where there are any."""

    id: str  # as the log knows it: the item's image_id, or the words of a file of queries
    rows: list[int]  # the item, or all right answers
    category: str
    words: str | None = None


def item_queries(items: Items, by_words: bool) -> list[Query]:
    """One query a duplicate group of the test split: its first item. In the order of the rows."""
    import numpy as np
    import pyarrow.compute as pc

    rows = np.flatnonzero(pc.equal(items.table["split"], "test").fill_null(False))
    if not len(rows):
        raise Fail(f"{items.path}: no row of the test split; there is nothing to ask about")
    _, first = np.unique(items.groups[rows], return_index=True)
    queries = []
    for row in sorted(rows[first].tolist()):
        id, kind, prompt = (items.value(name, row) for name in ("image_id", "object_type", "prompt"))
        queries.append(Query(id, [row], kind or "other", prompt if by_words else None))
    return queries


def file_queries(items: Items, path: str) -> tuple[list[Query], dict[str, Any]]:
    """(what people typed, in the file's order, each of its right answers' commonest object type; facts for the log)."""
    table, left_out = common.read_queries(path, items.row)
    queries = []
    for _, own in table.groupby(table["query"].str.lower(), sort=False):
        words, rows = own["query"].iloc[0], own["id"].map(items.row).tolist()
        kinds = Counter(items.value("object_type", row) for row in rows)
        queries.append(Query(words, rows, kinds.most_common(1)[0][0] or "other", words))
    note(f"{path}: {len(queries)} queries" + "".join(f"; left out: {n} rows ({why})" for why, n in left_out.items()))
    # "trained": queries with a right answer in the training split
    trained = sum(any(items.value("split", row) == "train" for row in query.rows) for query in queries)
    facts = {"name": Path(path).name, "sha256": common.file_digest(path), "queries": len(queries), "trained": trained}
    return queries, facts | {"made_up": bool(table["made_up"].any())}


def choose_queries(queries: list[Query], settings: ArenaConfig) -> dict[str, Query]:
    """id -> query, of at most settings.limit, object types in turn, in the order given."""
    order, turns, types = list(range(len(queries))), {}, Counter()
    random.Random(f"{settings.seed} queries").shuffle(order)
    for i in order:
        types[queries[i].category] += 1
        turns[i] = types[queries[i].category]  # a type's first, second, ... query
    return {queries[i].id: queries[i] for i in sorted(sorted(order, key=turns.get)[: settings.limit])}


class Experiment:
    """Models, queries and each model's answers: all that a draw needs. Nothing in it depends on a vote.

    key: the experiment's identity; votes are only ever counted together under one key.
    lists: int64 [2, Q, K], row numbers of the base's and the challenger's answers, best first; see `find_answers`.
    """

    def __init__(self, embeddings: Sequence[str | Path], settings: ArenaConfig):
        self.settings, self.files, self.file = settings, [Items(path) for path in embeddings], None
        self.items, by_words = self.files[0], settings.query == "text"
        self.models = read_models(self.files)
        if settings.queries:
            queries, self.file = file_queries(self.items, settings.queries)
        else:
            queries = item_queries(self.items, by_words)
        self.queries = choose_queries(queries, settings)
        self.rows = [query.rows[0] for query in self.queries.values()]
        asked = [self.file["sha256"], list(self.queries)] if self.file else [self.rows]
        if by_words and not self.file:
            asked.append([query.words for query in self.queries.values()])
            last = self.files[-1]
            if asked[-1] != [last.value("prompt", row) for row in self.rows]:
                raise Fail(f"{last.path} and {self.items.path} hold different prompts; embed the same shards for both")
        fingerprints = sorted(model.fingerprint for model in self.models)
        self.key = digest([fingerprints, self.items.digest, *asked, settings.query, settings.top_k])
        self.places = {id: number for number, id in enumerate(self.queries)}
        self.types: dict[str, list[str]] = {}
        for query in self.queries.values():
            self.types.setdefault(query.category, []).append(query.id)
        count = round(settings.shared * len(self.queries))
        self.shared = {*random.Random(f"{settings.seed} shared").sample(list(self.queries), count)}
        models = [{"name": model.name, "fingerprint": model.fingerprint} for model in self.models]
        self.facts = {"models": models, "query": settings.query, "top_k": settings.top_k, "queries": len(self.queries)}
        self.facts |= {"items": self.items.rows} | ({"file": self.file} if self.file else {})

    def find_answers(self, cache: Path) -> None:
        """Set `lists`: the nearest items to each query, its own duplicates left out; computed once, kept in `cache`."""
        import numpy as np

        k, groups, found = self.settings.top_k, self.items.groups, []
        made_of = [common.file_digest(part) for items in self.files for part in items.parts]
        target = cache / f"answers-{digest([self.key, self.models[0].fingerprint, made_of])[:16]}.npy"
        if not target.is_file():
            for model in self.models:
                own = None if self.file else (groups[self.rows], groups)
                found.append(common.top_k(self._query_vectors(model), model.vectors(), k, own)[1])
                note(f"{model.name}: found the answers to {len(self.rows)} queries among {len(groups)} items")
            if np.min(found) < 0:
                few = f"fewer than {k} items besides a query's own duplicates"
                raise Fail(f"{few}; lower --top-k or give more rows")
            with common.atomic_file(target) as temporary, open(temporary, "wb") as handle:
                np.save(handle, np.stack(found))
        self.lists = np.load(target)

    def _query_vectors(self, model: Model):
        """float32 [Q, D]: the queries as the model sees them, by their pictures or words."""
        import numpy as np

        if self.file:
            clip, words = model.items.load_model(model.kind), list(self.queries)
            return np.concatenate([common.encode(clip, captions=words[i : i + 64]) for i in range(0, len(words), 64)])
        found, start, rows = [], 0, np.array(self.rows)  # ascending
        for block in model.vectors("text_" if self.settings.query == "text" else ""):
            found.append(block[rows[(rows >= start) & (rows < start + len(block))] - start])
            start += len(block)
        return np.concatenate(found)

    def trial(self, query: Query, left: int) -> dict[str, Any]:
        """The columns of a trial, with model `left` (0 the base, 1 the challenger) as row A."""
        columns, facts, value = {"query": query.id, "category": query.category}, {}, self.items.value
        for side, model in (("left", left), ("right", 1 - left)):
            rows = self.lists[model, self.places[query.id]].tolist()
            columns[f"{side}_model"] = self.models[model].fingerprint
            columns[f"{side}_items"] = [value("image_id", row) for row in rows]
            # By digest, since two items with the same picture look the same to a judge.
            facts[f"{side}_pictures"] = [value("image_digest", row) for row in rows]
            facts[f"{side}_attributes"] = {}
            for name in ATTRIBUTES:  # the share of answers that agree with the query, where that is of one kind
                wanted, *others = {value(name, row) for row in query.rows}
                share = sum(value(name, row) == wanted for row in rows) / len(rows)
                facts[f"{side}_attributes"][name] = share if wanted and not others else None
        a, b = facts["left_pictures"], facts["right_pictures"]
        return columns | {"facts": facts | {"same_set": set(a) == set(b) and a != b}, "identical": int(a == b)}


# --------------------------------------------------------------------------------------------------------------------
# Statistics. A win is the challenger's. Randomness is seeded: the same votes give the same page.

Z = 1.959963984540054  # the normal distribution's quantile at 1 - ALPHA / 2
PRIOR = 10  # a of Beta(a, a): the mixture of the e-value, fixed before any vote; bets mostly on win rates of 0.35-0.65
TYPE_VOTES = 20  # an object type with fewer votes gets no test
LOOKS = 200  # points of a plotted course
# Queries with a decided vote with which the exact binomial test finds a win rate in 4 of 5 studies: the smallest number
# from which on no larger one does worse (exact power saws up and down).
NEEDED = {0.55: 820, 0.60: 210, 0.65: 97}


def ratio(part: float, whole: float) -> float | None:
    """part / whole; None where there is nothing."""
    return part / whole if whole else None


def effective_queries(votes: list[dict]) -> float:
    """How many queries with one vote each these votes are worth where judges of one query always agree (Kish 1965)."""
    sizes = Counter(vote["query"] for vote in votes).values()
    return ratio(sum(sizes) ** 2, sum(n * n for n in sizes)) or 0


def vote_rate(hits: int, votes: int, queries: float) -> dict[str, Any]:
    """Share of votes with Wilson's score interval (Wilson 1927, without continuity correction); 0 to 1 without votes.

    For as many votes as `effective_queries`: judges of one query may simply agree.
    """
    value, low, high = ratio(hits, votes), 0.0, 1.0
    if value is not None:
        center = (value * queries + Z * Z / 2) / (queries + Z * Z)
        half = Z * math.sqrt(value * (1 - value) * queries + Z * Z / 4) / (queries + Z * Z)
        # At 0 and 1 the bound is exact; rounding must not leave it at 1e-17.
        low, high = (center - half if hits else 0.0), (center + half if hits < votes else 1.0)
    return {"value": value, "low": low, "high": high, "n": votes}


def binomial_test(wins: int, n: int) -> float:
    """Exact two-sided p-value of "each of n independent votes is a fair coin"; 1 without votes.

    Valid when n was planned: looked at after every vote, it raises a false alarm in about 36% of 500-vote studies.
    """
    from scipy.stats import binomtest

    return float(binomtest(wins, n).pvalue) if n else 1.0


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
    disagreed. agreement is the raw share of agreeing pairs of judges, each label weighing the same.
    """
    pairable = [Counter(unit) for unit in units if len(unit) >= 2]
    total = sum(pairable, Counter())
    labels = total.total()
    found = {"units": len(pairable), "labels": labels, "agreement": None, "alpha": None}
    if pairable:
        apart = 0.0  # ordered pairs of labels of one unit that disagree, each weighing 1 / (m - 1)
        for unit in pairable:
            apart += (unit.total() ** 2 - sum(count**2 for count in unit.values())) / (unit.total() - 1)
        expected = (labels**2 - sum(count**2 for count in total.values())) / (labels - 1)
        found["agreement"] = 1 - apart / labels
        found["alpha"] = 1 - apart / expected if expected else None
    return found


# --------------------------------------------------------------------------------------------------------------------
# Results: what the votes of one experiment say. One vote a query, its first decided one, feeds the tests that need
# independent votes (binomial, e-value, object types); all votes count for rates, net preference and agreement.

REASONS = ("undone", "identical", "abstained", "repeat")  # why a row of the log does not count
OUTCOMES = {"wins": 1, "losses": -1, "ties": 0}  # of the challenger
EXPORTED = "experiment vote trial judge judge_name place query category choice preferred left_model right_model "
EXPORTED += "left_items right_items same_set identical repeat_of reissue_of drawn time revoked"


def mark_votes(votes: list[dict[str, Any]], base: str, challenger: str) -> None:
    """Give each of `Log.votes` its `outcome`, and the `reason` why it does not count, or None.

    base, challenger: fingerprints. "identical": both rows were, and nobody was asked; "repeat": the judge has answered
    this query before, as older versions planned it.
    """
    answered, scores = set(), {base: -1, challenger: 1}
    for vote in votes:
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
    preference: wins minus losses, query by query (see `common.bootstrap_mean`). For the rest see the functions below.
    """
    mark_votes(votes, base["fingerprint"], challenger["fingerprint"])
    counted = [vote for vote in votes if vote["reason"] is None]
    decided = [vote for vote in counted if vote["outcome"]]
    by_query, counts, n = group(counted, "query"), tally(counted), len(decided)
    first = {query: own[0]["outcome"] for query, own in group(decided, "query").items()}
    scores = [sum(vote["outcome"] for vote in own) / len(own) for own in by_query.values()]
    net = common.bootstrap_mean(scores, limit=1)[:3] if scores else (None,) * 3
    same = group((vote for vote in votes if vote["identical"]), "query").keys() - by_query
    excluded = {reason: sum(vote["reason"] == reason for vote in votes) for reason in REASONS}
    judges = len({vote["judge"] for vote in votes if vote["reason"] in (None, "abstained")})
    chose_a, (types, heterogeneity) = sum(vote["choice"] == "A" for vote in decided), _object_types(counted, first)
    share_a = vote_rate(chose_a, n, n)  # sides are drawn by a coin: without a habit it is one half
    position = {"share_a": share_a["value"], "share_a_low": share_a["low"], "share_a_high": share_a["high"]}
    counts |= {"votes": len(counted), "abstained": excluded["abstained"], "queries": len(by_query)}
    found = {
        "challenger": challenger["name"],
        "base": base["name"],
        "votes": {"rows": len(votes), "counted": len(counted), "excluded": excluded, "judges": judges},
        "counts": counts,
        "win_rate": vote_rate(counts["wins"], n, effective_queries(decided)),
        "tie_rate": vote_rate(counts["ties"], len(counted), effective_queries(counted)),
        "net": dict(zip(("value", "low", "high"), net, strict=True)),
        "identical": {"queries": len(same), "share": ratio(len(same), len(same) + len(by_query))},
        "planned": {"p": binomial_test([*first.values()].count(1), len(first))},
        "anytime": _anytime(list(first.values())),
        "position": position | {"n": n, "chose_a": chose_a, "p": binomial_test(chose_a, n)},
        "agreement": krippendorff_alpha([[str(vote["outcome"]) for vote in own] for own in by_query.values()]),
        "categories": types,
        "heterogeneity": heterogeneity,
        "needed": [{"rate": rate, "needed": n, "missing": max(0, n - len(first))} for rate, n in NEEDED.items()],
        "attributes": _attributes(decided),
    }  # fmt: skip
    return found | {"verdict": _verdict(found)}


def _anytime(first: list[int]) -> dict[str, Any]:
    """The e-value after each query's first decided vote, and the confidence sequence of the win rate.

    "max_log10_e", "direction": so far, and who led then; "p": 1 / max E; "win_low", "win_high": None where no rate
    explains the whole course; "course": lists for a plot.
    """
    import numpy as np

    wins, losses = (np.cumsum([0, *(outcome == value for outcome in first)]) for value in (1, -1))
    log_e, (low, high) = log_e_value(wins, losses), confidence_sequence(wins, losses)
    log10_e, peak = log_e / math.log(10), int(np.argmax(log_e))
    at = np.unique(np.linspace(0, len(first), LOOKS).round().astype(int)).tolist()
    course = {"n": at, "log10_e": log10_e[at].tolist(), "win_rate": [ratio(int(wins[n]), n) for n in at]}
    course |= {"low": np.minimum(low, high)[at].tolist(), "high": high[at].tolist()}
    found = {"log10_e": float(log10_e[-1]), "max_log10_e": float(log10_e[peak]), "p": math.exp(-float(log_e[peak]))}
    found |= {"direction": int(np.sign(wins[peak] - losses[peak])), "threshold": 1 / ALPHA, "queries": len(first)}
    ends = (float(low[-1]), float(high[-1])) if low[-1] <= high[-1] else (None, None)
    return found | {"win_low": ends[0], "win_high": ends[1], "course": course}


def _object_types(counted: list[dict], first: dict[str, int]) -> tuple[list[dict], dict[str, Any]]:
    """(each type's rates; p, and p_holm over all types, of those with at least TYPE_VOTES votes; heterogeneity).

    Do the tested types differ? Pearson's chi-square of first decided votes; p None where nothing could differ.
    """
    from scipy.stats import chi2_contingency

    rows = []
    for name, own in sorted(group(counted, "category").items()):
        queries, counts = group(own, "query"), tally(own)
        decided = [first[query] for query in queries if query in first]
        voted = [vote for vote in own if vote["outcome"]]
        wins, rate = decided.count(1), vote_rate(counts["wins"], len(voted), effective_queries(voted))
        row = {"category": name, "queries": len(queries), "votes": len(own), "p_holm": None} | counts
        row |= {"win_rate": rate["value"], "win_low": rate["low"], "win_high": rate["high"]}
        row |= {"first_wins": wins, "first_losses": decided.count(-1)}
        rows.append(row | {"p": binomial_test(wins, len(decided)) if len(own) >= TYPE_VOTES else None})
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, common.holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    table = [(row["first_wins"], row["first_losses"]) for row in tested if row["first_wins"] + row["first_losses"]]
    known = len(table) > 1 and all(map(any, zip(*table, strict=True)))
    p = float(chi2_contingency(table, correction=False).pvalue) if known else None
    return rows, {"p": p, "categories": len(table)}


def _attributes(decided: list[dict]) -> list[dict]:
    """For each attribute the share of results that agree with the query, in the rows that won and those that lost."""
    rows = []
    for name in sorted(ATTRIBUTES):
        known = []
        for vote in decided:
            sides = ("left", "right") if vote["choice"] == "A" else ("right", "left")
            won, lost = (vote["facts"][f"{side}_attributes"].get(name) for side in sides)
            if None not in (won, lost):
                known.append((won, lost, vote["query"]))
        if known:
            won, lost, queries = zip(*known, strict=True)
            test = common.bootstrap_mean([a - b for a, b in zip(won, lost, strict=True)], queries, limit=1)
            row = {"attribute": name, "votes": len(known), "won": sum(won) / len(won), "lost": sum(lost) / len(lost)}
            rows.append(row | dict(zip(("difference", "low", "high", "p"), test, strict=True)))
    return rows


def _verdict(found: dict[str, Any]) -> dict[str, str]:
    """{"answer": a model's name, "not yet", "no difference shown" or "no votes"; "sentence" for people}."""
    planned, anytime = found["planned"]["p"], found["anytime"]
    best, p = e_value(anytime["max_log10_e"]), p_value(planned)
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


def percent(value: float | None, digits: int = 1) -> str:
    """0.534 -> 53.4%; a dash for what is not known."""
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def p_value(p: float | None) -> str:
    """Two significant digits; never a p of zero."""
    return "–" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def e_value(log10_e: float) -> str:
    """Three significant digits, or a power of ten where those would be too many."""
    return f"{10**log10_e:.3g}" if log10_e < 300 else f"10^{log10_e:.0f}"


def interval(low: float | None, high: float | None) -> str:
    """Both ends in percent."""
    return "unknown" if low is None or high is None else f"{percent(low)} to {percent(high)}"


def add_formats(environment) -> None:
    """How templates write numbers, and that their blocks leave no blank lines."""
    environment.filters |= {"percent": percent, "p_value": p_value, "e_value": e_value, "log10": math.log10}
    environment.globals["interval"] = interval
    environment.trim_blocks = environment.lstrip_blocks = True


def results(log: Log, experiment: dict[str, Any]) -> dict[str, Any]:
    """Everything about one experiment, computed from the log."""
    facts = {"id": experiment["id"], "key": experiment["key"], "started": experiment["time"]} | experiment["facts"]
    return {"experiment": facts} | arena_statistics(log.votes(experiment["id"]), *experiment["facts"]["models"])


def report(found: dict[str, Any]) -> str:
    """The results as text for a terminal, by templates/stats.txt."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(TEMPLATES), keep_trailing_newline=True)
    add_formats(environment)
    return environment.get_template("stats.txt").render(found=found)


def export(log: Log, experiments: Iterable[dict[str, Any]]) -> str:
    """Every vote ever cast, those taken back included, as CSV; `preferred`: a model, or what was said."""
    buffer = io.StringIO()
    writer = common.csv_writer(buffer)
    writer.writerow(EXPORTED.split())
    for experiment in experiments:
        names = {model["fingerprint"]: model["name"] for model in experiment["facts"]["models"]}
        for vote in log.votes(experiment["id"]):
            left, right = names[vote["left_model"]], names[vote["right_model"]]
            vote |= {"left_model": left, "right_model": right, "same_set": int(vote["facts"]["same_set"])}
            preferred = CHOICES | {"A": left, "B": right, "T": "tie", "N": None}
            vote["preferred"] = preferred.get(vote["choice"])  # identical rows had no choice
            for name in ("judge_name", "query") if "file" in experiment["facts"] else ("judge_name",):
                if vote[name].startswith(("=", "+", "-", "@")):  # a stranger's text is no formula
                    vote[name] = "'" + vote[name]
            values = [vote[name] for name in EXPORTED.split()]
            writer.writerow(" ".join(value) if isinstance(value, list) else value for value in values)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------------------
# The draw, and what a browser learns of it. Nothing that is drawn depends on how anybody voted.

SHARED_JUDGES = 3  # a shared query is shown to so many


class Arena:
    """An experiment with its log, its draw and its pictures: what the pages work on."""

    def __init__(self, setup: Setup):
        from PIL import Image

        self.folder = common.images_folder(setup.images, [])
        self.settings, self.keys = setup.settings, setup.keys or read_keys(setup.database)
        self.experiment = Experiment(setup.embeddings, self.settings)
        self.experiment.find_answers(Path(f"{setup.database}.cache"))
        self.log = Log(setup.database)
        self.row = self.log.experiment(self.experiment.key, self.experiment.facts)
        self.number = self.row["id"]
        kept = max(50, 2_000 * 480**2 // self.settings.picture_size**2)
        self.jpeg = functools.lru_cache(kept)(self._jpeg)  # about 60 MB
        self.seats = threading.Semaphore(PICTURE_THREADS)
        self.turns = threading.Semaphore(max(1, (os.cpu_count() or 2) - 1))  # votes need a processor too
        self.placeholder = self.encode(Image.new("RGB", (1, 1), (216, 216, 213)))
        self.computed = functools.lru_cache(1)(lambda state: results(self.log, self.row))
        self.drawing, self.passed = threading.Lock(), set()
        self.shown = Counter(dict.fromkeys(self.experiment.queries, 0))
        self._count(self.log.all("SELECT query, identical FROM trials WHERE experiment = ?", self.number))

    def _count(self, trials: Iterable) -> None:
        """Note which queries were shown how often, and which are passed over because both rows are identical."""
        self.passed |= {trial["query"] for trial in trials if trial["identical"]}
        self.shown.update(trial["query"] for trial in trials if not trial["identical"])

    def draw(self, judge: str) -> Iterator[dict[str, Any]]:
        """Columns of the trials to write down: identical rows passed over, then at most one to show.

        Object types take turns: one with the fewest showings so far comes next, of these the judge's rarest. Within it:
        a shared query that other judges have begun and that three are to see; else the query shown least often, in the
        judge's own seeded order. Which model stands as row A is a fair coin's choice.
        """
        queries, types, shown = self.experiment.queries, self.experiment.types, self.shown
        chance = random.Random(f"{self.settings.seed} {judge}")
        rank = {query: chance.random() for query in queries}
        sql = "SELECT query, place FROM trials WHERE experiment = ? AND judge = ? AND NOT identical"
        history = dict(map(tuple, self.log.all(sql, self.number, judge)))
        own = Counter(queries[query].category for query in history)
        fixed = {"experiment": self.number, "judge": judge, "place": max(history.values(), default=0) + 1}

        def turn(query: str) -> tuple:
            return not (query in self.experiment.shared and 0 < shown[query] < SHARED_JUDGES), shown[query], rank[query]

        for kind in sorted(types, key=lambda kind: (sum(shown[query] for query in types[kind]), own[kind])):
            for query in sorted({*types[kind]} - history.keys() - self.passed, key=turn):
                columns = self.experiment.trial(queries[query], secrets.randbits(1))
                yield columns | fixed | {"token": secrets.token_hex(16)}
                if not columns["identical"]:
                    return

    def current(self, judge: str, after: str | None) -> sqlite3.Row | dict | None:
        """The judge's current trial (the oldest without a vote), or with its token as `after` the one to come.

        What is missing is drawn and committed before it is returned; None where nothing is left to show.
        """
        sql = "SELECT * FROM judged WHERE experiment = ? AND judge = ? AND NOT identical AND vote IS NULL "
        with self.drawing:
            waiting = self.log.all(f"{sql} ORDER BY place, id", self.number, judge)
            if after is not None and (not waiting or waiting.pop(0)["token"] != after):
                raise Refused(409, "That is not the trial to be judged now; load the page again.")
            if waiting:
                return waiting[0]
            rows = list(self.draw(judge))  # before the transaction: votes wait for that
            with self.log.writing():
                for columns in rows:
                    self.log.insert("trials", **columns)
            self._count(rows)
        return rows[-1] if rows and not rows[-1]["identical"] else None

    def trial(self, judge: str, after: str | None = None) -> dict[str, Any]:
        """What the browser learns of the current trial, or of the one after it."""
        row, last = self.current(judge, after), self.log.last_vote(self.number, judge)
        answer = {"trial": row and row["token"], "undo": last and last["token"]}
        answer["votes"] = sum(self.log.own_counts(self.number, judge).values())
        answer["decided"] = self.log.decided(self.number)
        words = row and self.experiment.queries[row["query"]].words
        return answer if words is None else answer | {"words": words}

    def picture(self, judge: str, token: str, place: int) -> bytes:
        """JPEG: place 0 is the query, then row A, then row B. Raises Refused for a token that is not the judge's."""
        row = self.log.find(self.number, judge, token)
        shown = [row["query"], *json.loads(row["left_items"]), *json.loads(row["right_items"])]
        hidden = place == 0 and self.experiment.queries[row["query"]].words is not None  # they are the query then
        if row["vote"] is not None or row["identical"] or hidden or place >= len(shown):
            raise Refused(404, "There is no such picture for you.")
        return self.photo(self.experiment.items.row[shown[place]])

    def photo(self, row: int) -> bytes:
        """An item's photo, if not too many are being read; else Refused: votes must not wait for a slow disk."""
        if not self.seats.acquire(blocking=False):
            raise Refused(503, "Busy; again in a moment.")
        try:
            return self.jpeg(row)
        finally:
            self.seats.release()

    def encode(self, image) -> bytes:
        """An RGB picture of any size as a square JPEG on white, so that no byte tells its origin."""
        buffer = io.BytesIO()
        letterbox(image, self.settings.picture_size).save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    def _jpeg(self, row: int) -> bytes:
        """An item's photo as the browser gets it; grey where there is none."""
        value = self.experiment.items.value
        try:
            path = common.resolve_image(self.folder, value("image_path", row))
            with self.turns:
                return self.encode(load_image(path, self.settings.picture_size))
        except BadImage as error:
            note(f"missing picture: item {value('image_id', row)!r}: {error}; a grey one is shown")
            return self.placeholder

    def results(self) -> dict[str, Any]:
        """The results of all votes so far, computed again when there is another."""
        return self.computed(tuple(self.log.one("SELECT * FROM state")))


def search(models: list[Model], clips: list, words: str = "", picture=None, k: int = 8) -> list[tuple[str, list[dict]]]:
    """(model's name, its k hits, best first) for words, or for an RGB picture. clips: of the models."""
    import numpy as np
    import torch

    found = []
    for model, clip in zip(models, clips, strict=True):
        pixels = picture and torch.from_numpy(np.array(letterbox(picture, clip.size))).permute(2, 0, 1)[None]
        asked = common.encode(clip, pixels, [words] if picture is None else None).numpy()
        (scores,), (rows,) = common.top_k(asked, model.vectors(), k)
        value, pairs = model.items.value, zip(rows[rows >= 0].tolist(), scores, strict=False)
        hits = [
            {"row": row, "score": score, "title": value("title", row), "object_type": value("object_type", row)}
            for row, score in pairs
        ]
        found.append((model.name, hits))
    return found


# --------------------------------------------------------------------------------------------------------------------
# The application


def create_app(setup: Setup):
    """The Flask application: pages for judges, the results page, and the search page where --reveal allows it."""
    from flask import Flask

    folders = {"template_folder": str(TEMPLATES), "static_folder": str(TEMPLATES / "static")}
    app = Flask("arena", root_path=str(TEMPLATES), **folders)
    arena = app.extensions["arena"] = Arena(setup)
    app.config.update(
        SECRET_KEY=arena.keys["cookie_key"],
        SESSION_COOKIE_NAME="judge",
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_REFRESH_EACH_REQUEST=False,
        PERMANENT_SESSION_LIFETIME=90 * 86_400,
        MAX_CONTENT_LENGTH=BODY_LIMIT,
        MAX_FORM_MEMORY_SIZE=BODY_LIMIT,
        TRUSTED_HOSTS=trusted_hosts(arena.settings),
    )
    app.url_map.merge_slashes = False  # it would redirect //x to an absolute path, which leaves a proxy's folder
    add_formats(app.jinja_env)
    protect(app)
    explain_errors(app)
    for add in (add_start_pages, add_voting, add_result_pages):
        add(app, arena)
    if arena.settings.reveal:
        add_search_page(app, arena)
    return app


def trusted_hosts(settings: ArenaConfig) -> list[str]:
    """Names that the Host header may carry."""
    import socket

    names = [*LOOPBACK, settings.host, *(settings.trusted_host or "").split(",")]
    if settings.host not in LOOPBACK:
        names += [socket.gethostname(), socket.getfqdn()]
        with contextlib.suppress(OSError):  # a machine that does not know its own name
            names += socket.gethostbyname_ex(socket.gethostname())[2]
    return [name.strip().lower() for name in names if name.strip()]  # as browsers write them


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
    def root() -> str:
        """From this page to the first one; relative, since a proxy may serve the arena below any path."""
        return "../" * (request.path.count("/") - 1) or "./"

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

    app.after_request(lambda response: response.headers.update(HEADERS) or response)


def explain_errors(app) -> None:
    """Errors in a person's words: JSON for the voting page's script, else a page."""
    from flask import jsonify, render_template, request
    from werkzeug.exceptions import HTTPException, SecurityError

    def explain(error: Exception):
        status, message = 500, str(error)
        if isinstance(error, SecurityError):  # of the Host header; no page can be made then
            return "The server is not known by that name; --trusted-host would make it known.\n", 400
        if isinstance(error, HTTPException):
            status, message = error.code, "There is no such page." if error.code == 404 else error.description
        elif isinstance(error, Refused):
            status, message = error.args
        elif isinstance(error, sqlite3.Error | OSError):  # nothing was committed; the page keeps the vote, tries again
            note(f"database or disk: {error}; requests are answered with 503 until this is mended")
            status = 503
            message = "The arena's disk does not answer just now. Nothing is lost; this can be tried again in a moment."
        else:
            note(message)
        if request.path.split("/")[1] in ("trial", "vote", "undo", "picture"):
            return jsonify(error=message), status
        return render_template("message.html", status=status, message=message), status

    for kind in (HTTPException, Refused, Fail, sqlite3.Error, OSError):
        app.register_error_handler(kind, explain)


def require_blind(arena: Arena) -> None:
    """Raises Refused for a browser that `require_results_access` has let look."""
    from flask import session

    if session.get("looked") == arena.row["key"]:
        raise Refused(403, "You have seen the results; your answers would no longer be blind.")


def add_start_pages(app, arena: Arena) -> None:
    """Before and after voting."""
    from flask import redirect, render_template, request, session

    log, number, settings = arena.log, arena.number, arena.settings

    def known() -> sqlite3.Row | None:
        """The judge of the browser's cookie."""
        return log.one("SELECT * FROM judges WHERE id = ?", session.get("judge"))

    def needs_token() -> bool:
        """Whether a browser has to bring the judges' token: for its first session, unless it is on this machine.

        A proxy on this machine shows by its headers, or by HTTP/1.0, which nginx sends and no browser does.
        """
        forwarded = any(name.startswith(FORWARDED) for name, _ in request.headers)
        forwarded |= request.environ["SERVER_PROTOCOL"] == "HTTP/1.0"
        return not known() and (settings.host not in LOOPBACK or bool(settings.trusted_host) or forwarded)

    @app.get("/")
    def index():
        """The voting page; before it, once, the page that asks for a name."""
        if log.session(number, session.get("judge")):
            return render_template("arena.html", settings=settings, choices=CHOICES)
        asked = {"known": known(), "asked": needs_token(), "token": request.args.get("token", "")}
        return render_template("start.html", settings=settings, **asked)

    @app.post("/start")
    def start():
        if needs_token() and not same(request.form.get("token", "").strip(), arena.keys["judge_token"]):
            raise Refused(403, "That is not the judges' token. Ask for the link with the token in it.")
        require_blind(arena)
        log.start(number, session["judge"], " ".join(request.form.get("name", "").split())[:60])
        session.modified = True  # the cookie's 90 days begin anew
        return redirect("./", 303)

    @app.post("/quit")
    def quit_session():
        log.quit(number, session["judge"])
        return redirect("thanks", 303)

    @app.get("/thanks")
    def thanks():
        judge = session.get("judge")
        shown = {"counts": log.own_counts(number, judge), "finished": not log.session(number, judge)}
        return render_template("thanks.html", settings=settings, choices=CHOICES, **shown)


def add_voting(app, arena: Arena) -> None:
    """What the voting page's script asks for: nothing here knows more of a model than a trial's token."""
    from flask import Response, request, session

    log, number = arena.log, arena.number

    def judge() -> str:
        """The judge of this browser's cookie, whose session is open."""
        if not log.session(number, session.get("judge")):
            raise Refused(403, "Your session has ended, or this browser has none yet; open the first page to start.")
        return session["judge"]

    @app.post("/trial")
    def trial():
        """The trial to judge now, or the one `after` it, which the page fetches ahead."""
        return arena.trial(judge(), request.form.get("after"))

    @app.get("/picture/<token>/<int:place>")
    def picture(token: str, place: int):
        return Response(arena.picture(judge(), token, place), mimetype="image/jpeg")

    @app.post("/vote")
    def vote():
        require_blind(arena)
        return log.vote(number, judge(), request.form.get("trial", ""), request.form.get("choice", ""))

    @app.post("/undo")
    def undo():
        log.undo(number, judge(), request.form.get("trial", ""))
        return arena.trial(judge())


def require_results_access(app, arena: Arena) -> bool:
    """Whether the admin asks. Raises Refused for others, but with --reveal only for judges who have not finished."""
    from flask import request, session

    if same(request.cookies.get("admin", ""), sign(app, "admin", arena.keys["admin_token"])):
        return True
    if not arena.settings.reveal:
        raise Refused(403, "Results are for the admin: open the link that the server printed when it started.")
    if arena.log.session(arena.number, session.get("judge")):
        raise Refused(403, "Results would color your next answers. Quit first; then you may look.")
    session["looked"], session.permanent = arena.row["key"], True
    return False


def add_result_pages(app, arena: Arena) -> None:
    """Results for the admin; with --reveal for everybody who is not in the middle of voting."""
    from flask import Response, redirect, render_template, request

    @app.get("/results")
    def show_results():
        token = request.args.get("token")
        if token is None:
            admin = require_results_access(app, arena)
            shown = {"found": arena.results(), "search": arena.settings.reveal, "admin": admin}
            return render_template("results.html", **shown)
        if not same(token, arena.keys["admin_token"]):
            raise Refused(403, "That is not the admin's token.")
        response = redirect("results", 303)  # the token does not stay in the address bar
        # It ends with the browser. Another admin token makes the old cookies worthless.
        response.set_cookie("admin", sign(app, "admin", token), httponly=True, samesite="Lax")
        return response

    @app.get("/votes.csv")
    def votes_csv():
        if not require_results_access(app, arena):
            raise Refused(403, "The votes one by one, with the judges' names, are for the admin.")
        named = {"Content-Disposition": "attachment; filename=votes.csv"}
        return Response(export(arena.log, [arena.row]), mimetype="text/csv", headers=named)


def add_search_page(app, arena: Arena) -> None:
    """Type words or give a picture, and see both models' answers with their names on them."""
    from flask import Response, render_template, request

    models, count, lock = arena.experiment.models, arena.experiment.items.rows, threading.Lock()

    @functools.lru_cache(1)
    def clips() -> list:
        return [model.items.load_model(model.kind) for model in models]

    def page(words: str = "", picture=None):
        with lock:
            found = search(models, clips(), words, picture) if words or picture else []
        asked = base64.b64encode(arena.encode(picture)).decode() if picture else ""
        shown = {"found": found, "words": words, "asked": asked, "size": arena.settings.picture_size}
        return render_template("search.html", items=f"{count:,}", **shown)

    @app.get("/search")
    def search_words():
        require_results_access(app, arena)
        return page(" ".join(request.args.get("q", "").split())[:200])

    @app.post("/search")
    def search_picture():
        require_results_access(app, arena)
        given = request.files.get("picture")
        try:
            return page(picture=load_image(given.read() if given else b"", arena.settings.picture_size))
        except BadImage as error:
            raise Refused(400, f"That picture cannot be used: {error}.") from None

    @app.get("/item/<int:row>")
    def item(row: int):
        require_results_access(app, arena)
        if row >= count:
            raise Refused(404, "There is no such item.")
        return Response(arena.photo(row), mimetype="image/jpeg")


# --------------------------------------------------------------------------------------------------------------------
# The command line


def serve(setup: Setup) -> int:
    """Serve until interrupted."""
    import socket

    import waitress

    settings = setup.settings
    if ":" in settings.host:
        raise Fail(f"--host {settings.host}: IPv6 addresses are not served; give an IPv4 address or a name", USAGE)
    with common.exclusive(f"{setup.database}.lock") as free:
        if not free:
            raise Fail(f"{setup.database}: another arena serves it; stop that one, or give another --database")
        app = create_app(setup)
        arena = app.extensions["arena"]
        try:
            server = waitress.create_server(
                app, host=settings.host, port=settings.port, threads=THREADS, ident=None,
                max_request_body_size=UPLOAD_LIMIT + 65_536, channel_timeout=60, connection_limit=CONNECTIONS,
                asyncore_use_poll=True, clear_untrusted_proxy_headers=False,  # they tell that a request was forwarded
            )  # fmt: skip
        except OSError as error:
            raise Fail(f"{settings.host}:{settings.port}: {error.strerror}; choose another --host or --port") from None
        name = socket.gethostname() if settings.host == "0.0.0.0" else settings.host
        home = f"http://{name}:{getattr(server, 'effective_port', settings.port)}/"
        local, token = settings.host in LOOPBACK and not settings.trusted_host, quote(arena.keys["judge_token"])
        print(f"{len(arena.experiment.queries)} queries among {arena.experiment.facts['items']} items; "
              f"votes go to {setup.database}")  # fmt: skip
        print(f"Vote at      {home}" if local else f"Vote at      {home}?token={token}")
        print(f"Results at   {home}results?token={quote(arena.keys['admin_token'])}")
        print(f"Judges who come through a proxy need ?token={token}", flush=True)
        server.run()  # returns on Ctrl-C and SIGTERM
        note(f"stopped; {arena.log.decided(arena.number)} queries decided so far")
    return DONE


def print_log(args: argparse.Namespace) -> str:
    """What `stats` or `votes` says of the experiments that compare the models of --embeddings; without it, of all."""
    log = Log(args.database, create=False)
    models = read_models([Items(path) for path in args.embeddings]) if args.embeddings else []
    wanted = {model.fingerprint for model in models}
    try:
        experiments = [
            one for one in log.experiments()
            if not wanted or wanted == {model["fingerprint"] for model in one["facts"]["models"]}
        ]  # fmt: skip
        if not experiments:
            raise Fail(f"{log.path}: holds no votes{' on these models' if wanted else ''} yet; run `5_arena.py serve`")
        if args.command == "votes":
            return export(log, experiments)
        for one in [one for one in experiments if len(one["facts"]["models"]) > 2]:
            note(f"experiment {one['id']} compares more than two models, as is no longer done; see `votes`")
            experiments.remove(one)
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
    two = "master.parquet of stage 4, or its folder of parts; twice to compare the fine-tuned models of two"
    parser.add_argument("--embeddings", action="append", help=two)
    parser.add_argument("--images", help="folder that image_path is relative to")
    parser.add_argument("--database", required=True, help="SQLite file of trials and votes; made if it is not there")
    parser.add_argument("--format", choices=("json",), help="of stats; without it, text")
    common.add_flags(parser, ArenaConfig)
    return parser


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    settings = common.from_flags(ArenaConfig, args)
    if settings.queries and settings.query != "text":
        raise Fail(f"--queries {settings.queries} needs --query text; the number of queries is --limit", USAGE)
    if args.command == "serve":
        if not args.embeddings or not args.images:
            raise Fail("serve needs --embeddings and --images", USAGE)
        return serve(Setup(tuple(args.embeddings), args.images, args.database, settings))
    if args.format and args.command == "votes":
        raise Fail("votes are CSV; --format is for stats", USAGE)
    sys.stdout.write(print_log(args))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
