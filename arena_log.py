"""The arena's log in SQLite: judges, trials as they were shown, votes, and votes taken back.

Everything that is said about the models is computed from this log. Trials, votes and revocations are only ever
inserted (triggers refuse the rest); a vote is acknowledged after its commit, and a commit is on the disk
(WAL with synchronous FULL). One process writes; any number may read while it does.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import Fail

CHOICES = ("A", "B", "T", "N")  # row A, row B, tie, abstained
BUSY_MS = 10_000
PRAGMAS = ("journal_mode = WAL", "synchronous = FULL", f"busy_timeout = {BUSY_MS}", "foreign_keys = ON")

SCHEMA = """
CREATE TABLE IF NOT EXISTS experiments (
  id INTEGER PRIMARY KEY,
  key TEXT NOT NULL UNIQUE,          -- digest of models, items, kind of query and length of the rows
  facts TEXT NOT NULL,               -- JSON: names, fingerprints, numbers of queries and of identical pairs
  time TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS judges (id TEXT PRIMARY KEY, name TEXT NOT NULL, time TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sessions (
  id INTEGER PRIMARY KEY,
  experiment INTEGER NOT NULL REFERENCES experiments,
  judge TEXT NOT NULL REFERENCES judges,
  time TEXT NOT NULL,
  ended TEXT                         -- a vote can be taken back until its session ends
);
CREATE TABLE IF NOT EXISTS trials (
  id INTEGER PRIMARY KEY,
  token TEXT NOT NULL UNIQUE,        -- 128 random bits; all that a browser ever learns of a trial
  experiment INTEGER NOT NULL REFERENCES experiments,
  judge TEXT NOT NULL REFERENCES judges,
  place INTEGER NOT NULL,            -- 1, 2, 3 ... for each judge; a trial issued again keeps its place
  query TEXT NOT NULL,               -- image_id
  category TEXT NOT NULL,            -- object type of the query
  left_model TEXT NOT NULL,          -- fingerprint of the model behind row A
  right_model TEXT NOT NULL,
  left_items TEXT NOT NULL,          -- JSON list of image_id, best first
  right_items TEXT NOT NULL,
  facts TEXT NOT NULL,               -- JSON: picture digests of both rows, attributes shared with the query
  identical INTEGER NOT NULL DEFAULT 0,        -- 1: both rows were the same, so that nothing was shown or asked
  repeat_of INTEGER REFERENCES trials,         -- planned repeat of that trial, sides exchanged
  reissue_of INTEGER UNIQUE REFERENCES trials, -- the same trial again after its vote was taken back
  time TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS trials_of_judge ON trials (experiment, judge, place);
CREATE TABLE IF NOT EXISTS votes (
  id INTEGER PRIMARY KEY,
  trial INTEGER NOT NULL UNIQUE REFERENCES trials,
  session INTEGER NOT NULL REFERENCES sessions,
  choice TEXT NOT NULL CHECK (choice IN ('A', 'B', 'T', 'N')),
  time TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS votes_of_session ON votes (session);
CREATE TABLE IF NOT EXISTS revocations (
  id INTEGER PRIMARY KEY,
  vote INTEGER NOT NULL UNIQUE REFERENCES votes,
  time TEXT NOT NULL
);
""" + "".join(
    f"CREATE TRIGGER IF NOT EXISTS {table}_{verb.lower()} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, '{table} are insert-only'); END;\n"
    for table in ("trials", "votes", "revocations")
    for verb in ("UPDATE", "DELETE")
)

VOTES = """
SELECT v.id AS vote, v.choice, v.time, v.session, t.id AS trial, t.token, t.experiment, t.judge, j.name AS judge_name,
       t.place, t.query, t.category, t.left_model, t.right_model, t.left_items, t.right_items, t.facts, t.repeat_of,
       t.reissue_of, t.identical, t.time AS drawn, r.time AS revoked
FROM trials t JOIN judges j ON j.id = t.judge LEFT JOIN votes v ON v.trial = t.id
     LEFT JOIN revocations r ON r.vote = v.id
"""
STANDING = "NOT EXISTS (SELECT 1 FROM revocations r WHERE r.vote = v.id)"


class Refused(Exception):
    """A request that the log does not grant; `status` is the HTTP status that says so."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def now() -> str:
    """UTC, ISO 8601, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def new_judge() -> str:
    """A judge's id: 128 random bits."""
    return secrets.token_hex(16)


class Log:
    """The log of one database file. Threads share it; each has its own connection."""

    def __init__(self, path: str | Path, create: bool = True):
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise Fail(f"{path}: no such database; run `5_arena.py serve` first, or check --database")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._local = threading.local()
        self._counted: dict[int, tuple[int, int, int]] = {}  # see `decided`
        self._counting = threading.Lock()
        self._writer = threading.Lock()  # waiting writers queue here fairly; SQLite's own waiting polls
        try:
            with self._writer:
                self.connection.executescript(SCHEMA)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise Fail(f"{path}: cannot be used as the arena's database ({error}); check --database") from None

    @property
    def connection(self) -> sqlite3.Connection:
        """This thread's connection, in autocommit mode, with every PRAGMA set."""
        if not hasattr(self._local, "connection"):
            connection = sqlite3.connect(self.path, timeout=BUSY_MS / 1000, isolation_level=None)
            connection.row_factory = sqlite3.Row
            for pragma in PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
            self._local.connection = connection
        return self._local.connection

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

    @contextlib.contextmanager
    def sound(self) -> Iterator[None]:
        """Around what takes the log's content for whole: where it is not, one line says so."""
        try:
            yield
        except (sqlite3.DatabaseError, LookupError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise Fail(f"{self.path}: damaged, or not written by this program ({why}); go back to a copy") from None

    # ---------------------------------------------------------------------------------------------------------------
    # Experiments, judges, sessions

    def experiment(self, key: str, facts: dict[str, Any]) -> int:
        """The number of the experiment with this key; a new one is written down with its facts."""
        with self.writing() as db:
            found = db.execute("SELECT id FROM experiments WHERE key = ?", (key,)).fetchone()
            if found:
                return found["id"]
            values = (key, json.dumps(facts, ensure_ascii=False), now())
            return db.execute("INSERT INTO experiments (key, facts, time) VALUES (?, ?, ?)", values).lastrowid

    def experiments(self) -> list[dict[str, Any]]:
        """Every experiment of the database, oldest first, facts decoded."""
        rows = self.connection.execute("SELECT * FROM experiments ORDER BY id").fetchall()
        return [dict(row) | {"facts": json.loads(row["facts"])} for row in rows]

    def judge(self, judge: str | None) -> sqlite3.Row | None:
        """A judge by id."""
        return self.connection.execute("SELECT * FROM judges WHERE id = ?", (judge,)).fetchone() if judge else None

    def start(self, experiment: int, judge: str | None, name: str = "") -> str:
        """Open a session, for a new judge where none is given; returns the judge's id. The first name stays."""
        judge = judge or new_judge()
        with self.writing() as db:
            db.execute("INSERT OR IGNORE INTO judges (id, name, time) VALUES (?, ?, ?)", (judge, name, now()))
            if not self.session(experiment, judge):
                values = (experiment, judge, now())
                db.execute("INSERT INTO sessions (experiment, judge, time) VALUES (?, ?, ?)", values)
        return judge

    def session(self, experiment: int, judge: str) -> int | None:
        """The judge's open session."""
        row = self.connection.execute(
            "SELECT id FROM sessions WHERE experiment = ? AND judge = ? AND ended IS NULL", (experiment, judge)
        ).fetchone()
        return row["id"] if row else None

    def quit(self, experiment: int, judge: str) -> None:
        """End the judge's session, if one is open."""
        with self.writing() as db:
            db.execute(
                "UPDATE sessions SET ended = ? WHERE experiment = ? AND judge = ? AND ended IS NULL",
                (now(), experiment, judge),
            )

    # ---------------------------------------------------------------------------------------------------------------
    # Trials

    def open_trials(self, experiment: int, judge: str) -> list[sqlite3.Row]:
        """The judge's trials that wait for a vote, in the order of their places."""
        return self.connection.execute(
            "SELECT * FROM trials t WHERE experiment = ? AND judge = ? AND NOT identical "
            "AND NOT EXISTS (SELECT 1 FROM votes v WHERE v.trial = t.id) ORDER BY place, id",
            (experiment, judge),
        ).fetchall()

    def history(self, experiment: int, judge: str) -> list[sqlite3.Row]:
        """The judge's trials without reissues, in order; `voted` says whether a vote stands at that place."""
        return self.connection.execute(
            "SELECT id, place, query, category, left_model, right_model, repeat_of, "
            "EXISTS (SELECT 1 FROM trials s JOIN votes v ON v.trial = s.id WHERE s.experiment = "
            f"t.experiment AND s.judge = t.judge AND s.place = t.place AND {STANDING}) AS voted "
            "FROM trials t WHERE experiment = ? AND judge = ? AND reissue_of IS NULL AND NOT identical ORDER BY place",
            (experiment, judge),
        ).fetchall()

    def trial(self, experiment: int, judge: str, after: str | None, draw: Callable) -> sqlite3.Row | None:
        """The judge's current trial (the oldest without a vote), or with its token as `after` the one to come.

        What is missing is drawn by `draw(history) -> list of columns` and committed before it is returned: first the
        queries passed over because both rows are identical, then the trial to show; without that nothing is left and
        None is returned. Only one trial ahead is given.
        """
        waiting = self.open_trials(experiment, judge)
        if after is None and waiting:
            return waiting[0]
        with self.writing() as db:
            waiting = self.open_trials(experiment, judge)
            if after is not None:
                if not waiting or waiting[0]["token"] != after:
                    raise Refused(409, "That is not the trial to be judged now; load the page again.")
                waiting = waiting[1:]
            if waiting:
                return waiting[0]
            history = self.history(experiment, judge)
            place = history[-1]["place"] + 1 if history else 1
            rows = [
                self._insert(db, columns | {"experiment": experiment, "judge": judge, "place": place})
                for columns in draw(history)
            ]
        return rows[-1] if rows and not rows[-1]["identical"] else None

    def _insert(self, db: sqlite3.Connection, columns: dict[str, Any]) -> sqlite3.Row:
        columns = columns | {"token": secrets.token_hex(16), "time": now()}
        marks = ", ".join("?" * len(columns))
        values = [json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v for v in columns.values()]
        number = db.execute(f"INSERT INTO trials ({', '.join(columns)}) VALUES ({marks})", values).lastrowid
        return db.execute("SELECT * FROM trials WHERE id = ?", (number,)).fetchone()

    def find(self, experiment: int, judge: str, token: str) -> sqlite3.Row:
        """The judge's own trial with this token. Raises Refused (404) for any other token."""
        row = self.connection.execute(
            "SELECT t.*, v.id AS vote, v.choice, v.session AS vote_session FROM trials t LEFT JOIN votes v "
            "ON v.trial = t.id WHERE t.token = ? AND t.experiment = ? AND t.judge = ?",
            (token, experiment, judge),
        ).fetchone()
        if row is None:
            raise Refused(404, "There is no such trial for you.")
        return row

    # ---------------------------------------------------------------------------------------------------------------
    # Votes

    def vote(self, experiment: int, judge: str, token: str, choice: str) -> dict[str, Any]:
        """Write a vote down, once. The same vote again gets the same answer; another choice is Refused (409)."""
        if choice not in CHOICES:
            raise Refused(400, f"A choice is one of {', '.join(CHOICES)}.")
        with self.writing() as db:
            trial = self.find(experiment, judge, token)
            if trial["vote"] is None:
                session = self.session(experiment, judge)
                if session is None:
                    raise Refused(403, "Your session has ended; start again to go on voting.")
                values = (trial["id"], session, choice, now())
                db.execute("INSERT INTO votes (trial, session, choice, time) VALUES (?, ?, ?, ?)", values)
            elif trial["choice"] != choice:
                raise Refused(409, "You have judged this pair already, with another choice.")
            elif not db.execute(f"SELECT 1 FROM votes v WHERE v.id = ? AND {STANDING}", (trial["vote"],)).fetchone():
                raise Refused(409, "That vote was taken back; the pair comes again.")
            number = db.execute(
                "SELECT COUNT(*) FROM votes v JOIN trials t ON t.id = v.trial WHERE t.experiment = ? AND t.judge = ? "
                f"AND v.id <= (SELECT id FROM votes WHERE trial = ?) AND {STANDING}",
                (experiment, judge, trial["id"]),
            ).fetchone()[0]
        return {"trial": token, "choice": choice, "number": number}

    def last_vote(self, experiment: int, judge: str) -> sqlite3.Row | None:
        """The newest vote of the judge's open session that was not taken back: the one that undo takes back."""
        return self.connection.execute(
            "SELECT v.*, t.token FROM votes v JOIN trials t ON t.id = v.trial "
            f"WHERE v.session = ? AND {STANDING} ORDER BY v.id DESC LIMIT 1",
            (self.session(experiment, judge),),
        ).fetchone()

    def undo(self, experiment: int, judge: str, token: str) -> sqlite3.Row:
        """Take the newest vote back and issue its trial again: a new token, the same sides. Returns the new trial.

        Asked again, it answers with the same new trial. Any vote but the session's newest is Refused (409).
        """
        with self.writing() as db:
            trial = self.find(experiment, judge, token)
            again = db.execute("SELECT * FROM trials WHERE reissue_of = ?", (trial["id"],)).fetchone()
            if again:
                return again
            last = self.last_vote(experiment, judge)
            if last is None or last["trial"] != trial["id"]:
                raise Refused(409, "Only the newest vote of this session can be taken back.")
            db.execute("INSERT INTO revocations (vote, time) VALUES (?, ?)", (last["id"], now()))
            kept = ("experiment", "judge", "place", "query", "category", "left_model", "right_model", "left_items")
            kept += ("right_items", "facts", "repeat_of")
            return self._insert(db, {name: trial[name] for name in kept} | {"reissue_of": trial["id"]})

    def own_counts(self, experiment: int, judge: str) -> dict[str, int]:
        """How often the judge chose what; for the judge only."""
        rows = self.connection.execute(
            "SELECT choice, COUNT(*) AS n FROM votes v JOIN trials t ON t.id = v.trial "
            f"WHERE t.experiment = ? AND t.judge = ? AND {STANDING} GROUP BY choice",
            (experiment, judge),
        )
        return dict.fromkeys(CHOICES, 0) | {row["choice"]: row["n"] for row in rows}

    def decided(self, experiment: int) -> int:
        """Votes for either row, by all judges, planned repeats left out: what the question is still short of.

        Asked with every trial, it counts only what has come since: the newest vote and revocation counted are kept.
        """
        db = self.connection
        came, went = (  # CROSS JOIN: SQLite is to begin with the few new rows
            f"SELECT COUNT(*) FROM {new} CROSS JOIN trials t ON t.id = v.trial WHERE {name}.id > ? AND {name}.id <= ? "
            "AND t.experiment = ? AND v.choice IN ('A', 'B') AND t.repeat_of IS NULL"
            for name, new in (("v", "votes v"), ("r", "revocations r CROSS JOIN votes v ON v.id = r.vote"))
        )
        with self._counting:
            vote, revocation, count = self._counted.get(experiment, (0, 0, 0))
            _, last_vote, last_revocation = self.state()
            count += db.execute(came, (vote, last_vote or 0, experiment)).fetchone()[0]
            count -= db.execute(went, (revocation, last_revocation or 0, experiment)).fetchone()[0]
            self._counted[experiment] = last_vote or 0, last_revocation or 0, count
        return count

    def votes(self, experiment: int) -> list[dict[str, Any]]:
        """Every vote ever cast in an experiment, oldest first; `revoked` is the time it was taken back, or None.

        Queries passed over for identical rows come first, with neither vote nor choice.
        """
        rows = self.connection.execute(
            VOTES + "WHERE t.experiment = ? AND (v.id OR t.identical) ORDER BY v.id", (experiment,)
        )
        lists = ("left_items", "right_items", "facts")
        return [dict(row) | {name: json.loads(row[name]) for name in lists} for row in rows]

    def state(self) -> tuple:
        """Changes with every line of the log."""
        newest = "SELECT (SELECT MAX(id) FROM trials), (SELECT MAX(id) FROM votes), (SELECT MAX(id) FROM revocations)"
        return tuple(self.connection.execute(newest).fetchone())

    def draws(self, experiment: int) -> Iterator[sqlite3.Row]:
        """query, category, left_model, right_model, identical, repeat_of of every trial drawn, reissues left out."""
        return self.connection.execute(
            "SELECT query, category, left_model, right_model, identical, repeat_of FROM trials "
            "WHERE experiment = ? AND reissue_of IS NULL",
            (experiment,),
        )
