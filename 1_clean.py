"""Stage 1: titles and attributes for every product, from its title and photo, over the OpenAI Batch API.

Reads CSV files with id,name,image_path and the photos. Writes the CSV with clean_title, style, material, color and
object_type added, and beside it .rejects.jsonl, .report.json and .json (settings, counts, cost). What was paid for is
kept in the workspace under the digest of model, prompt, title and photo, and never asked again. Any command may be
killed and repeated. `poll` is one step, for cron; it exits 75 until all is in. `run` polls until done.

    python 1_clean.py run --input data/catalogue.csv --images data/photos --workspace data/batch \\
        --output data/cleaned.csv --max-cost 5
    python tests/openai_standin.py --state data/standin -- python 1_clean.py run --input data/sample/catalogue.csv \\
        --workspace data/batch --output data/cleaned.csv --poll-interval 0       (no key, no cost)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
from batch_api import BatchAPIClient, Later, Missing, NoBatchAPI, Quota, Refused
from chat import QUOTA, Outcome, queue_tokens, read_answer, scrub
from cleaning import DataProcessor, say
from common import CleaningConfig, Fail

ENDED = ("completed", "failed", "expired", "cancelled")
MAX_BACKOFF = 600.0
OVERDUE = 3600.0  # seconds past its expiry after which a batch counts as hanging
POLLS, PATIENCE = 5, 3600.0  # polls, and seconds, that a missing batch or output has before its lines are asked again
LOST = "lost store: "  # before the name of a request file that was in the store before the present one
MIN_SPLIT = 100  # requests down to which a file is halved for a full queue whose limit nobody states


# --------------------------------------------------------------------------------------------------------------------
# StateManager: state.json, what is known about batches


class StateManager:
    """state.json, written whole after every change. A torn one is set aside and rebuilt from the list of batches."""

    def __init__(self, workspace: Path, processor: DataProcessor):
        self.path = workspace / "state.json"
        self.workspace = processor.meta("workspace") or processor.meta("workspace", uuid.uuid4().hex)
        self.since = float(processor.meta("since") or processor.meta("since", str(time.time() - 86400)))
        used = bool(processor.meta("used"))
        try:
            self.data = self.checked(json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            self.data = self.fresh(processor, doubt=used)
        except (ValueError, RecursionError):
            os.replace(self.path, self.path.with_suffix(".torn.json"))
            say(f"{self.path} was unreadable and is set aside; looking through the account's batches instead")
            self.data = self.fresh(processor, doubt=used)
        if self.data.setdefault("workspace", self.workspace) != self.workspace:
            self.outlive_store(processor)

    def outlive_store(self, processor: DataProcessor) -> None:
        """The store was lost and is made anew, with other files under the old names: keep what is in flight apart."""
        for batch in self.data["batches"].values():
            batch["input_file"] = LOST + batch["input_file"].removeprefix(LOST)
        doubt = self.data["doubt_since"] or (time.time() if self.data["intent"] else None)
        self.set(uploads={}, completed_files=[], intent=None, doubt_since=doubt)
        processor.meta("used", "1")
        self.workspace = processor.meta("workspace", self.data["workspace"])  # last: killed before, all is done again

    @staticmethod
    def checked(data: Any) -> dict[str, Any]:
        """The state if it is one, every value of the kind that the code relies on; else ValueError."""
        numbers = ("next_attempt", "failures", "refused_alone", "settled_before")
        maybe = ("doubt_since", "queue_limit", "started", "refreshed")
        kinds = {"state": str, "batches": dict, "completed_files": list, "uploads": dict, "intent": dict | None}
        kinds |= {"stopped": str | None, "refused_alone_file": str | None}
        kinds |= dict.fromkeys(numbers, int | float) | dict.fromkeys(maybe, int | float | None)
        batch_kinds = {"input_file": str, "status": str, "counts": dict | None, "created_at": int | float | None}

        def fits(value: Any, kinds: dict[str, Any]) -> bool:
            return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())

        if not fits(data, kinds) or not kinds.keys() <= data.keys():
            raise ValueError("not a state file")
        if not all(fits(batch, batch_kinds) for batch in data["batches"].values()):
            raise ValueError("not a batch")
        if data["intent"] and not isinstance(data["intent"].get("file"), str):
            raise ValueError("not an intent")
        return data

    @staticmethod
    def fresh(processor: DataProcessor, doubt: bool) -> dict[str, Any]:
        batches = {
            batch: {
                "input_file": name,
                "status": status,
                "output_file_id": None,
                "local_output_path": None,
                "collected": True,
            }
            for batch, name, status in processor.query("SELECT batch, file, status FROM collected")
        }
        return {
            "state": "Initial", "batches": batches,
            "completed_files": [name for (name,) in processor.query("SELECT name FROM files WHERE done ORDER BY name")],
            "uploads": {}, "intent": None, "doubt_since": time.time() if doubt else None, "queue_limit": None,
            "refused_alone": 0, "refused_alone_file": None,
            "next_attempt": 0.0, "failures": 0, "stopped": None, "started": None, "settled_before": 0,
            "refreshed": None,
        }  # fmt: skip

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def set(self, **values: Any) -> None:
        self.data.update(values)
        common.write_json(self.path, self.data)

    def live(self) -> dict[str, dict]:
        """Batches whose results are still to come or to be taken in."""
        return {id: batch for id, batch in self.data["batches"].items() if not batch.get("collected")}

    def sent(self) -> set[str]:
        """Names of the files that are, or may be, in flight."""
        names = {batch["input_file"] for batch in self.live().values()}
        return names | ({self.data["intent"]["file"]} if self.data["intent"] else set())


# --------------------------------------------------------------------------------------------------------------------
# The machine: one idempotent step at a time


class Machine:
    """Refresh, collect, group anew, dispatch what fits."""

    def __init__(self, processor: DataProcessor, state: StateManager, settings: CleaningConfig):
        self.processor, self.state, self.settings = processor, state, settings
        self.checked = False
        self._client: BatchAPIClient | None = None

    @property
    def client(self) -> BatchAPIClient:
        self._client = self._client or BatchAPIClient(self.settings)
        return self._client

    # -- one step
    def step(self, submit: bool = True) -> bool:
        """Do what can be done now; gives whether every row is settled. What time may heal waits for the next call."""
        wait = self.state["next_attempt"] - time.time()
        if wait > 0:
            say(f"the server asked for patience: nothing is tried for another {wait:.0f} s")
            return False
        try:
            self.clear_doubt()
            for id in list(self.state.live()):
                self.refresh(id)
            self.regroup()
            if submit:
                self.dispatch()
        except Later as later:
            if later.unreachable and not self.client.reached and not self.state.live() and not self.state["intent"]:
                raise Fail(f"{later}; check OPENAI_BASE_URL and the network, then run again") from None
            self.postpone(later)
            return False
        except Quota as quota:
            self.stop(f"the account may spend no more ({quota})")
            return False
        if self.state["failures"] or self.state["next_attempt"]:
            self.state.set(failures=0, next_attempt=0.0)
        return self.settled()

    def settled(self) -> bool:
        return self.processor.counts()["pending"] == 0

    def postpone(self, later: Later) -> None:
        """Note when to try again: what the server asked for, else doubled and jittered. It holds between calls."""
        failures = self.state["failures"] + 1
        delay = min(MAX_BACKOFF, self.settings.backoff * 2 ** min(failures - 1, 20)) * random.uniform(0.5, 1)
        if later.seconds is not None:
            delay = max(later.seconds, delay if later.seconds == 0 else 0) + random.uniform(0, self.settings.backoff)
        self.state.set(failures=failures, next_attempt=time.time() + delay)
        say(f"{later}; next try in {delay:.0f} s")

    # -- doubt: did a create reach the server?
    def clear_doubt(self) -> None:
        """Look for batches whose answer was lost; time counts from the first look, for a create may be slow."""
        if not self.state["intent"] and not self.state["doubt_since"]:
            return
        state_lost = not self.state["intent"]
        self.look_through()
        if self.state["intent"] or state_lost:
            since = self.state["doubt_since"] or time.time()
            self.state.set(doubt_since=since)
            wait = since + self.settings.settle - time.time()
            if wait > 0:
                raise Later("a batch may have been created without an answer; giving it time to show up", wait)
        self.state.set(intent=None, doubt_since=None)

    def look_through(self) -> None:
        """Adopt batches of this workspace that the state does not know."""
        batches = dict(self.state["batches"])
        intent = self.state["intent"]
        for batch in self.client.batches(self.state.since):
            metadata = batch.metadata or {}
            if metadata.get("workspace") != self.state.workspace or batch.id in batches:
                continue
            name = metadata.get("file", "")
            say(f"found {batch.id} for {name}, whose answer was lost")
            same = self.processor.one("SELECT sha256 FROM files WHERE name = ?", name) == metadata.get("sha256")
            batches[batch.id] = describe(batch, name if same else LOST + name)
            if intent and metadata.get("intent") == intent.get("id"):
                intent = None
        self.state.set(batches=batches, intent=intent)

    # -- looking at a batch
    def refresh(self, id: str) -> None:
        known = self.state["batches"][id]
        try:
            batch = self.client.retrieve(id)
        except Missing:
            if not self.may_come(known, "missing"):
                self.take_in(id, "vanished", [], Outcome("again", reason="batch vanished"))
            return
        known |= describe(batch, known["input_file"]) | {"missing": None}
        self.state.set(refreshed=time.time())
        if batch.status == "failed":
            self.failed(id, batch)
        elif batch.status in ENDED:
            self.collect(id, batch)
        elif (batch.expires_at or batch.created_at + 86400) + OVERDUE < time.time():
            self.overdue(id, batch)

    def may_come(self, known: dict, what: str) -> bool:
        """Note a poll at which a batch or its output was not there; gives whether to wait longer."""
        polls, since = known.get(what) or (0, time.time())
        known[what] = (polls + 1, since)
        self.state.set(refreshed=time.time())
        return polls + 1 < POLLS or time.time() - since < PATIENCE

    def overdue(self, id: str, batch: Any) -> None:
        """Cancel a batch that hangs past its expiry; give it up when that does not help, or is refused."""
        known = self.state["batches"][id]
        if not known.get("cancelled_at"):
            say(f"{id} hangs in {batch.status} past its expiry; cancelling it to get what is done")
            known["cancelled_at"] = time.time()
            self.state.set()
        elif known["cancelled_at"] + OVERDUE < time.time():
            self.take_in(id, "given up", [], Outcome("again", reason="batch hung"))
            return
        if batch.status != "cancelling":
            with contextlib.suppress(Missing, Refused, Later):
                self.client.cancel(id)

    def collect(self, id: str, batch: Any) -> None:
        """Download what the batch made and take it in; wait some polls for outputs that are not there yet."""
        known = self.state["batches"][id]
        counts, paths, late = known["counts"], [], []
        for kind, file_id in (("output", batch.output_file_id), ("error", batch.error_file_id)):
            path = self.processor.raw / f"{id}.{kind}.jsonl"
            expected = counts.get("completed" if kind == "output" else "failed", 0)
            if file_id and not path.exists():
                with contextlib.suppress(Missing):
                    self.client.download(file_id, path)
            held = 0
            if path.exists():
                known[f"local_{kind}_path"], held = str(path), count_lines(path)
                paths.append(path)
            if (file_id and not path.exists()) or (kind == "output" and held < expected):
                late.append(path)
        if late and self.may_come(known, "late"):
            for path in late:
                path.unlink(missing_ok=True)
            return
        unanswered = {"expired": "batch_expired", "cancelled": "batch_cancelled"}.get(batch.status, "no result")
        self.take_in(id, batch.status, paths, Outcome("again", reason=unanswered))

    def take_in(self, id: str, status: str, paths: list[Path], rest: Outcome) -> None:
        known = self.state["batches"][id]
        name = known["input_file"]
        summary = self.processor.collect(id, name, status, paths, rest)
        if summary["quota stop"]:
            self.stop("the account's quota is used up")
        parsed, total = summary["ok"], self.processor.requests_of(name)
        failures = ", ".join(f"{n} {why}" for why, n in summary.items() if n and why not in ("ok", "quota stop"))
        say(f"{name}: {status}, {parsed} of {total} parsed" + (f"; {failures}" if failures else ""))
        self.done(id, status)
        if self.processor.is_pilot(name):
            self.judge(parsed, total, summary)

    def done(self, id: str, status: str, file_done: bool = True) -> None:
        known = self.state["batches"][id]
        known |= {"status": status, "collected": True}
        files = self.state["completed_files"]
        if file_done and known["input_file"] not in files:
            files = [*files, known["input_file"]]
        self.state.set(completed_files=files)

    def judge(self, parsed: int, total: int, summary: dict[str, int]) -> None:
        """The pilot: is what comes back sound enough to send the rest?"""
        unsent = ("batch_expired", "batch_cancelled", "batch vanished", "batch hung", *QUOTA)
        answered = total - sum(summary.get(reason, 0) for reason in unsent)
        if parsed and parsed >= self.settings.pilot_sound * answered:
            self.processor.meta("sound", self.processor.sound_key())
        elif answered and self.processor.unsent(self.state.sent()):
            self.stop(f"the pilot came back unsound: {parsed} of {answered} answers could be parsed")

    def proven(self) -> bool:
        """Whether a pilot with this model and prompt came back sound."""
        return self.processor.meta("sound") == self.processor.sound_key()

    def stop(self, why: str) -> None:
        """Send no more until a person says so, by `dispatch` or `run`; what is in flight is still collected."""
        say(f"{why}; sending nothing more, collecting what is in flight")
        self.state.set(stopped=why)

    def failed(self, id: str, batch: Any) -> None:
        """A batch that failed as a whole: queue full, quota, bad lines, or something else."""
        name = self.state["batches"][id]["input_file"]
        errors = batch.errors.data if batch.errors and batch.errors.data else []
        codes = {error.code: scrub(error.message) for error in errors}
        lines = [error for error in errors if error.line]
        if "token_limit_exceeded" in codes:
            self.queue_full(id, name, codes["token_limit_exceeded"])
        elif quota := [code for code in codes if code in QUOTA]:
            self.processor.note_batch(id, name, quota[0], {})
            self.done(id, "failed", file_done=False)
            self.stop(f"the account may spend no more ({quota[0]})")
        elif lines:
            bad = {e.line: (scrub(e.code or "invalid", 100), scrub(e.message)) for e in lines}
            self.processor.refuse_lines(id, name, bad)
            self.done(id, "failed")
            say(f"{name}: failed for {len(lines)} bad lines; the others are sent again")
        else:
            code, detail = next(iter(codes.items()), ("no reason given", ""))
            self.take_in(id, "failed", [], Outcome("again", reason=f"batch failed: {code}", detail=detail))

    def queue_full(self, id: str, name: str, message: str) -> None:
        """Learn how many tokens may be in flight; the file goes back, its upload is used again, no attempt is lost."""
        self.processor.note_batch(id, name, "token_limit_exceeded", {})
        self.done(id, "failed", file_done=False)
        others = [batch["input_file"] for batch in self.state.live().values() if batch["status"] not in ENDED]
        ahead = self.processor.estimate(others)[1]
        own = self.processor.estimate([name])[1]
        found = re.search(r"[Ll]imit:? ([\d,]+)", message)
        stated = int(found[1].replace(",", "")) if found else None
        limit = min(filter(None, (stated, ahead, self.state["queue_limit"])), default=None)
        self.state.set(queue_limit=limit)
        say(f"{name}: the queue is full ({message}); at most {limit or own} tokens in flight from now on")
        if others:
            return
        # Alone and yet refused: too big for the queue, or others of the account fill it. Wait once, then halve it; but
        # what takes less than half of the limit is not too big: smaller files would be refused as well.
        alone = self.state["refused_alone"] + 1 if self.state["refused_alone_file"] == name else 1
        self.state.set(refused_alone=alone, refused_alone_file=name)
        requests = self.processor.requests_of(name)
        too_big = requests > 1 and own > stated / 2 if stated else requests > MIN_SPLIT
        if too_big and (alone > 1 or (stated and own > stated)):
            self.processor.put_back(name)
            self.processor.regroup(max(1, min(int((stated or own) * 0.9), own // 2)))
            return
        raise Later("the queue is full with other work of the account", max(self.settings.poll_interval, 1.0))

    def regroup(self) -> None:
        """When all is in: rows that are to be asked again go into new request files."""
        if self.state.live() or self.state["stopped"] or self.processor.unsent(set()):
            return
        unproven = self.settings.pilot > 0 and not self.proven()
        if count := self.processor.regroup(pilot=unproven):
            say(f"{count} requests are sent again")

    # -- sending
    def dispatch(self) -> None:
        while not self.state["stopped"] and (file := self.next_file()):
            name, sha256, *_ = file
            self.preflight()
            self.budget()
            self.send(name, sha256)

    def next_file(self) -> tuple | None:
        """The file to send now, or None: all sent, queue full, or the pilot not back yet."""
        live = self.state.live()
        if any(batch["input_file"].startswith(LOST) for batch in live.values()):
            return None  # these may bring what would be asked again
        while files := self.processor.unsent(self.state.sent()):
            name, _, requests, tokens, patches, pilot = files[0]
            if self.processor.needed(name) < requests:
                self.processor.put_back(name)  # rows went, changed or got their answer since it was written
                self.regroup()
                continue
            if len(live) >= self.settings.max_concurrent_batches:
                return None
            piloting = [b for b in live.values() if self.processor.is_pilot(b["input_file"])]
            if self.settings.pilot and not self.proven() and not pilot:
                if piloting:
                    return None
                if self.processor.one("SELECT 1 FROM files WHERE pilot"):  # which brought no answer to judge by
                    if self.processor.regroup(pilot=True):
                        continue
                    self.stop("the pilot brought no usable answer; --pilot 0 would do without")
                    return None
            limit = self.settings.max_enqueued_tokens or self.state["queue_limit"]
            ahead = self.processor.estimate(batch["input_file"] for batch in live.values())[1]
            if limit and live and ahead + queue_tokens(tokens, patches) > limit:
                return None
            return files[0]
        return None

    def preflight(self) -> None:
        """Once a call, before anything is spent: is the model there, and will it be while the work may take?"""
        if self.checked:
            return
        model = self.client.model()
        shutdown = str(model.get("shutdown_date") or "")
        name = self.settings.model
        if re.fullmatch(r"\d{4}-\d\d-\d\d.*", shutdown):
            import datetime

            end = datetime.datetime.fromisoformat(shutdown[:10]).replace(tzinfo=datetime.UTC).timestamp()
            days = (end - time.time()) / 86400
            needed = math.ceil(len(self.processor.unsent(set())) / self.settings.max_concurrent_batches) + 1
            if days <= 0:
                raise Fail(f"{name} was shut down on {shutdown}; choose another --model")
            if days < max(needed, 30):
                may = "; the run may take longer than that" if days < needed else ""
                say(f"warning: {name} shuts down on {shutdown}, in {days:.0f} days{may}; consider another --model")
        self.checked = True
        if not self.settings.sync:
            requests, tokens, low, high = self.processor.estimate(
                f[0] for f in self.processor.unsent(self.state.sent())
            )
            files = len(self.processor.unsent(self.state.sent()))
            price = f"${low:.4f} to ${high:.4f}" if self.processor.prices() else "unknown price"
            say(f"to send: {files} files, {requests} requests, about {tokens} input tokens, {price} with {name}")

    def budget(self) -> None:
        """Fail before a cent is spent that --max-cost does not cover."""
        if self.settings.max_cost is None:
            return
        if not self.processor.prices():
            raise Fail(f"--max-cost needs a price for {self.settings.model}; give --price-input and --price-output")
        flying = [batch["input_file"] for batch in self.state.live().values()]
        files = [*flying, *(file[0] for file in self.processor.unsent(self.state.sent()))]
        to_come = self.processor.estimate(None if self.settings.sync else files)
        spent, (_, _, low, high) = self.processor.spent(), to_come
        if spent + high > self.settings.max_cost:
            raise Fail(
                f"${spent:.4f} spent and ${low:.4f} to ${high:.4f} to come may exceed --max-cost"
                f" ${self.settings.max_cost:g}; nothing more was sent; raise --max-cost or set --limit"
            )

    def send(self, name: str, sha256: str) -> None:
        """Upload and create. The intent is on disk before the create, so that a lost answer can be found again."""
        uploads = self.state["uploads"]
        if name not in uploads:
            uploads[name] = self.client.upload(self.processor.requests / name)
            self.processor.meta("used", "1")
            if not self.state["started"]:
                counts = self.processor.counts()
                self.state.set(started=time.time(), settled_before=counts["cleaned"] + counts["rejected"])
            self.state.set(state="In Progress")
        intent = {"id": uuid.uuid4().hex, "file": name}
        self.state.set(intent=intent)
        metadata = {"workspace": self.state.workspace, "file": name, "sha256": sha256, "intent": intent["id"]}
        try:
            batch = self.client.create(uploads[name], metadata)
        except Missing:  # the upload expired or was deleted, or nobody knows of batches there
            del uploads[name]
            again = self.state.data.get("lost_upload") == name
            self.state.set(intent=None, lost_upload=name)
            if again:
                raise self.client.no_batches("batches") from None
            raise Later(f"the upload of {name} is gone; uploading it again") from None
        except (Fail, Quota) as error:
            if isinstance(error, Refused):
                del uploads[name]  # it may be what was refused
            self.state.set(intent=None)
            raise
        except Later as later:
            if not later.doubtful:
                self.state.set(intent=None)
            raise
        known = self.state["batches"] | {batch.id: describe(batch, name)}
        self.state.set(intent=None, lost_upload=None, batches=known)
        say(f"{name}: sent as {batch.id}")

    # -- without the Batch API
    def sync(self) -> None:
        """Ask row by row, at most `concurrency` at a time; every answer is stored as it comes."""
        from concurrent.futures import ThreadPoolExecutor

        try:
            self.clear_doubt()
        except NoBatchAPI:
            pass  # another server than the one that may hold the batch: the doubt stays
        except (Later, Quota) as error:
            raise Fail(f"{error}; nothing was sent; run again later") from None
        if self.state.live():
            raise Fail("batches of this workspace are in flight; collect them with `poll` before using --sync")
        try:
            self.patiently(self.preflight)
        except (Later, Quota) as error:
            raise Fail(f"{error}; nothing was sent; run again when the server is well") from None
        total, parsed, answered = self.processor.counts()["pending"], 0, 0
        shown, storing = time.monotonic(), threading.Lock()

        def answer(item: tuple[str, bytes]) -> Outcome:
            """Ask, and store before the thread asks anything else: a kill loses only what is in flight."""
            outcome, text = self.ask(item[1])
            with storing:
                raw.write(json.dumps({"custom_id": item[0]} | text).encode() + b"\n")
                raw.flush()
                with self.processor.transaction():
                    self.processor.store(item[0], outcome, "sync")
            return outcome

        with (
            open(self.processor.raw / "sync.jsonl", "ab") as raw,
            ThreadPoolExecutor(self.settings.concurrency) as pool,
        ):
            while block := self.processor.next_lines(4 * self.settings.concurrency):
                self.budget()
                outcomes = list(pool.map(answer, block.items()))
                if quota := [outcome.reason for outcome in outcomes if outcome.kind == "quota"]:
                    raise Fail(f"the account may spend no more ({quota[0]}); what was answered is kept")
                answered += len(outcomes)
                parsed += sum(outcome.kind == "ok" for outcome in outcomes)
                if time.monotonic() - shown > 15:
                    shown = time.monotonic()
                    say(f"{parsed} of about {total} rows answered")
                pilot = self.settings.pilot
                if pilot and pilot <= answered < total and not self.proven():
                    if parsed < self.settings.pilot_sound * answered:
                        raise Fail(f"the pilot came back unsound: {parsed} of {answered} answers could be parsed")
                    self.processor.meta("sound", self.processor.sound_key())

    def ask(self, line: bytes) -> tuple[Outcome, dict]:
        """One request with its retries; the outcome and what is kept of the answer."""
        body = json.loads(line)["body"]
        try:
            answer = self.patiently(lambda: self.client.chat(body))
            return read_answer(answer), {"response": {"status_code": 200, "body": answer}}
        except Quota as quota:
            return Outcome("quota", reason=str(quota)), {"error": {"code": str(quota)}}
        except Refused as refused:
            return Outcome("final", reason="request refused", detail=str(refused)), {"error": {"code": "refused"}}
        except Later as later:
            return Outcome("again", reason="server error", detail=str(later)), {"error": {"code": "server error"}}

    def patiently(self, call: Callable[[], Any], tries: int = 6) -> Any:
        """Repeat what time may heal; Later after the last try, Fail where there is no server at all."""
        for attempt in range(tries):
            try:
                return call()
            except Later as later:
                if later.unreachable and (attempt == tries - 1 or not self.client.reached):
                    raise Fail(f"{later}; check OPENAI_BASE_URL and the network, then run again") from None
                if attempt == tries - 1:
                    raise
                delay = min(MAX_BACKOFF, self.settings.backoff * 2**attempt) * random.uniform(0.5, 1)
                time.sleep(max(delay, later.seconds or 0.0))
        raise AssertionError("not reached")


def describe(batch: Any, name: str) -> dict[str, Any]:
    """What state.json keeps of a batch."""
    counts = batch.request_counts
    counts = {k: getattr(counts, k) for k in ("total", "completed", "failed")} if counts else {}
    return {
        "input_file": name, "status": batch.status, "output_file_id": batch.output_file_id or None,
        "local_output_path": None, "error_file_id": batch.error_file_id or None, "created_at": batch.created_at,
        "counts": counts,
    }  # fmt: skip


def count_lines(path: Path) -> int:
    with open(path, "rb") as handle:
        return sum(1 for line in handle if line.strip())


# --------------------------------------------------------------------------------------------------------------------
# Commands


def counts_line(counts: dict[str, int]) -> str:
    parts = " + ".join(f"{name} {counts[name]}" for name in ("cleaned", "rejected", "pending"))
    return f"input {counts['input']} = {parts}"


def show_status(processor: DataProcessor, state: StateManager, settings: CleaningConfig) -> None:
    """The table of `status`, from what the last call saw."""
    counts = processor.counts()
    say(f"{state['state']}; {counts_line(counts)}")
    rows = [("file", "batch", "requests", "status", "done", "failed", "hours")]
    for id, batch in state["batches"].items():
        requests = processor.requests_of(batch["input_file"])
        seen = batch.get("counts") or {}
        hours = f"{(time.time() - batch['created_at']) / 3600:.1f}" if batch.get("created_at") else ""
        status = batch["status"] if batch.get("collected") else f"{batch['status']} ..."
        rows.append(
            (batch["input_file"], id, requests, status, seen.get("completed", ""), seen.get("failed", ""), hours)
        )
    unsent = [(name, needed) for name, *_ in processor.unsent(state.sent()) if (needed := processor.needed(name))]
    rows += [(name, "", needed, "waiting", "", "", "") for name, needed in unsent]
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows if len(rows) > 1 else []:
        say("  ".join(str(value).ljust(width) for value, width in zip(row, widths, strict=True)).rstrip())
    _, _, low, high = processor.estimate(None)
    if processor.prices():
        say(f"cost so far ${processor.spent():.4f}, to come ${low:.4f} to ${high:.4f}")
    if state["stopped"]:
        say(f"stopped: {state['stopped']}; `dispatch` or `run` goes on")
    start = state["started"]
    if counts["pending"] and start:
        settled = counts["cleaned"] + counts["rejected"] - state["settled_before"]
        rate = settled / max(time.time() - start, 1)
        rounds = math.ceil(len(unsent) / settings.max_concurrent_batches) + bool(state.live())
        latest = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + rounds * 86400))
        likely = "unknown until the first rows are in"
        if rate > 0:
            end = time.localtime(time.time() + counts["pending"] / rate)
            likely = time.strftime("%Y-%m-%d %H:%M at the rate so far", end)
        say(f"expected end {likely}, {latest} at the latest")


def loop(machine: Machine, settings: CleaningConfig) -> None:
    """Step until every row is settled; Fail where only a person can help."""
    while not machine.step():
        if machine.state["stopped"] and not machine.state.live():
            raise stopped(machine)
        again = machine.state["next_attempt"]  # of a call that failed
        wait = again - time.time() if again else settings.poll_interval
        if settings.poll_interval >= 1:
            say(counts_line(machine.processor.counts()))
        time.sleep(max(0.0, wait) if wait > 0 else 0.01)


def stopped(machine: Machine) -> Fail:
    return Fail(f"stopped: {machine.state['stopped']}; mend the cause, then `run` or `dispatch` goes on")


def work(args: argparse.Namespace, settings: CleaningConfig) -> int:
    """Everything but status, with the workspace to itself."""
    started = time.time()
    processor = DataProcessor(args, settings)
    state = StateManager(processor.workspace, processor)
    machine = Machine(processor, state, settings)
    try:
        if args.command in ("prepare", "run") or not processor.planned():
            fresh = processor.prepare(state.sent())
            state.set(state="Prepared" if not state.live() else "In Progress")
            say(f"prepared: {fresh} new requests in {processor.requests}")
        if args.command == "prepare":
            return common.DONE
        if args.command in ("dispatch", "run") and state["stopped"]:
            state.set(stopped=None)
        if args.command == "run" and settings.sync:
            machine.sync()
        elif args.command == "run" and not machine.settled():
            loop(machine, settings)
        elif args.command in ("dispatch", "poll") and not machine.settled():
            machine.step()
            if state["stopped"] and not state.live():
                raise stopped(machine)
        if not machine.settled():
            return common.UNFINISHED
        if args.command == "dispatch":
            return common.DONE
        if args.command == "poll" and processor.is_written():
            say(f"{args.output} is written; nothing to do here")
            return common.DONE
        state.set(state="Completed", started=None)
        wrong = processor.finalize(started)
        state.set(state="Failed" if wrong else "Finalized")
        if wrong:
            raise Fail(wrong)
        return common.DONE
    finally:
        with contextlib.suppress(sqlite3.Error):
            say(counts_line(processor.counts()))
        processor.db.close()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {
        "prepare": "write request files", "dispatch": "send what fits", "poll": "one step of everything, for cron",
        "finalize": "write the cleaned CSV", "run": "poll until done", "status": "show where it stands",
    }  # fmt: skip
    parser.add_argument(
        "command", choices=commands, help="; ".join(f"{name}: {text}" for name, text in commands.items())
    )
    parser.add_argument("--input", nargs="+", required=True, help="CSV files with id,name,image_path")
    parser.add_argument("--images", help="folder that image_path is relative to (default: the first CSV's)")
    parser.add_argument("--workspace", default="data/batch", help="requests, raw results, state (default %(default)s)")
    parser.add_argument("--output", default="data/cleaned.csv", help="the cleaned CSV (default %(default)s)")
    common.add_flags(parser, CleaningConfig)
    return parser


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    settings = common.from_flags(CleaningConfig, args)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):  # make exports them empty where they are not set
        if not os.environ.get(name):
            os.environ.pop(name, None)
    from dotenv import load_dotenv

    load_dotenv(".env")
    if args.command == "status":
        if not (Path(args.workspace) / "results.sqlite").exists():
            raise Fail(f"{args.workspace}: nothing prepared there yet; start with `prepare` or `run`")
        processor = DataProcessor(args, settings)
        show_status(processor, StateManager(processor.workspace, processor), settings)
        return common.DONE
    common.Catalogue(args.input), common.images_folder(args.images, args.input)  # bad use is told at once
    with common.exclusive(Path(args.workspace) / "lock") as mine:
        if not mine:
            say(f"another call is at work in {args.workspace}; nothing to do here")
            return common.DONE if args.command == "poll" else common.UNFINISHED  # whoever asked for a result has none
        return work(args, settings)


if __name__ == "__main__":
    sys.exit(main())
