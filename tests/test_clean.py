"""Stage 1 through the unmodified openai client against the stand-in, which injects every failure of the wire."""

from __future__ import annotations

import base64
import collections
import contextlib
import csv
import datetime
import importlib
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai._base_client
import pytest
from PIL import Image, ImageCms, ImageDraw

import common
import killed
from openai_standin import HttpError, StandIn, answer, error_body, tokens_of
from tiny import fork_server

clean = importlib.import_module("1_clean")
ROOT = Path(__file__).parents[1]
SEED = int(os.environ.get("KILL_SEED", 25))  # of the moments at which stage 1 is killed
KEY = "sk-test-0123456789abcdefghijklmnop"
PAINT = {
    "black": (20, 20, 20),
    "red": (200, 20, 20),
    "green": (30, 140, 40),
    "blue": (30, 60, 190),
    "orange": (240, 130, 0),
}
KINDS = ("chair", "sofa", "coffee table", "bed", "lamp", "bookcase", "wardrobe", "desk", "stool", "bench")


def photo(color: str, mark: int = 0, size: int = 96) -> bytes:
    """A colored square on white as a JPEG, different for each mark."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((size // 6, size // 6, size * 5 // 6, size * 5 // 6), PAINT[color])
    for bit in range(12):
        if mark >> bit & 1:
            draw.point((bit * 7 + 3, 2), "black")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


class Shop:
    """A small catalogue, a workspace and the stand-in that answers for it."""

    def __init__(self, folder: Path, server: StandIn, count: int = 12):
        self.folder, self.server = folder, server
        self.catalogue, self.output = folder / "catalogue.csv", folder / "cleaned.csv"
        self.workspace = folder / "batch"
        (folder / "images").mkdir(exist_ok=True)
        self.rows = [self.product(i) for i in range(count)]
        self.write()

    def product(self, i: int) -> dict[str, str]:
        color, kind = list(PAINT)[i % len(PAINT)], KINDS[i % len(KINDS)]
        name = f"p{i}.jpg"
        (self.folder / "images" / name).write_bytes(photo(color, i))
        title = f"ACME Oak {'abcdefghij'[i // 10 % 10]}{'abcdefghij'[i % 10]} {kind.title()} - $19.99 free shipping"
        return {"id": f"{i:03d}", "name": title, "image_path": f"images/{name}", "price": str(i)}

    def write(self) -> None:
        with open(self.catalogue, "w", newline="") as handle:
            writer = csv.DictWriter(handle, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)

    def arguments(self, command: str, *flags: str) -> list[str]:
        fast = ["--poll-interval", "0", "--workers", "1"]
        places = ["--input", str(self.catalogue), "--workspace", str(self.workspace), "--output", str(self.output)]
        return [command, *places, *fast, *flags]

    def call(self, command: str = "run", *flags: str) -> int:
        """The exit code; every call that has a workspace to itself tells of every row."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = clean.main(self.arguments(command, *flags))
        text = printed.getvalue()
        print(text, end="")
        assert balanced(text) or command == "status" or code == common.USAGE or "another call is at work" in text, text
        return code

    def cleaned(self) -> list[dict[str, str]]:
        with open(self.output, newline="") as handle:
            return list(csv.DictReader(handle))

    def rejects(self) -> dict[str, str]:
        path = self.output.with_name("cleaned.csv.rejects.jsonl")
        return {line["id"]: line["reason"] for line in map(json.loads, path.read_text().splitlines())}

    def paid(self) -> collections.Counter:
        return collections.Counter(key for _, key, _ in self.server.ledger("paid"))

    def state(self) -> dict:
        return json.loads((self.workspace / "state.json").read_text())

    def lose(self, *names: str) -> None:
        """Remove files of the workspace."""
        for path in [path for name in names for path in self.workspace.glob(name)]:
            path.unlink()

    def check_answers(self) -> None:
        """Every cleaned row has its own answer: the stand-in's is a function of title and picture."""
        for row in self.cleaned():
            data = (self.folder / row["image_path"]).read_bytes()
            expected = answer(" ".join(row["name"].split()), clean.photo_jpeg(data, 512)[0])
            found = {name: row[name] for name in clean.FIELDS}
            assert found == expected | {
                name: common.normalise_attribute(expected[name]) or "unknown" for name in clean.FIELDS[1:]
            }


@pytest.fixture
def shop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with StandIn(tmp_path / "standin") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setattr(clean, "PATIENCE", 0.0)  # what is missing is given up after some polls alone
        monkeypatch.setattr(clean, "SETTLE", 0.0)
        monkeypatch.setattr(clean, "RETRY_PAUSE", 0.0)
        monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
        for name in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "SSL_CERT_FILE"):
            monkeypatch.delenv(name, raising=False), monkeypatch.delenv(name.lower(), raising=False)
        server.models_of_account["gpt-5-nano"] = "2099-12-31"  # whenever the tests run, auto takes it
        yield Shop(tmp_path, server)


def balanced(text: str) -> bool:
    """Whether the counts line stands there and adds up."""
    found = re.findall(r"^input (\d+) = cleaned (\d+) \+ rejected (\d+) \+ pending (\d+)$", text, re.MULTILINE)
    return bool(found) and all(int(total) == sum(map(int, parts)) for total, *parts in found)


class Clock:
    """Stage 1's clock and pauses: `now` runs ahead by what is added to `ahead`, and nothing sleeps."""

    def __init__(self, monkeypatch):
        self.ahead, self.slept, self.time = 0.0, [], self.now
        monkeypatch.setattr(clean, "time", self)

    def __getattr__(self, name: str):
        return getattr(time, name)

    def now(self) -> float:
        return time.time() + self.ahead

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.ahead += seconds


# -- the plain road


@pytest.mark.parametrize("sync", [(), ("--sync",)])
def test_a_failed_answer_is_asked_again_where_ids_stand_in_several_rows(shop, sync):
    shop.rows = [row for one in shop.rows for row in (one, one | {"price": "0"})]
    shop.write()
    shop.server.set_fault("broken_json@chair:1")
    assert shop.call("run", "--pilot", "0", "--max-failed", "1", *sync) == 0
    assert len(shop.cleaned()) == 12 and set(shop.rejects().values()) == {"duplicate id"}
    assert shop.paid().total() == 12 + sum("Chair" in row["name"] for row in shop.cleaned())


def test_a_retry_leaves_the_attempts_and_token_limits_of_waiting_rows_alone(shop):
    shop.server.set_fault("length@oak")
    flags = ("--pilot", "0", "--max-requests-per-file", "6")
    assert shop.call("poll", *flags) == 75 and shop.call("poll", *flags) == 75  # six were cut off, six are asked
    assert shop.call("prepare", "--retry-failed", *flags) == 0
    (waiting,) = shop.state()["files"]
    lines = map(json.loads, (shop.workspace / "requests" / waiting).read_text().splitlines())
    assert {line["body"]["max_completion_tokens"] for line in lines} == {2 * clean.PLAIN_TOKENS}


def test_a_catalogue_is_cleaned_and_nothing_is_asked_twice(shop, capsys):
    assert shop.call() == 0
    assert "input 12 = cleaned 12 + rejected 0 + pending 0" in capsys.readouterr().out
    rows = shop.cleaned()
    assert [row["id"] for row in rows] == [row["id"] for row in shop.rows]
    assert list(rows[0]) == ["id", "name", "image_path", "price", *clean.FIELDS]
    assert rows[1]["color"] == "red" and rows[1]["object_type"] == "sofa" and rows[1]["material"] == "oak"
    assert "ACME" not in rows[1]["clean_title"] and "$" not in rows[1]["clean_title"]
    shop.check_answers()
    first = shop.output.read_bytes()
    assert shop.call() == 0 and shop.output.read_bytes() == first
    assert set(shop.paid().values()) == {1} and len(shop.server.ledger("batch")) == 1
    state = shop.state()
    batch = next(iter(state["batches"].values()))
    assert {"input_file", "status", "output_file_id", "local_output_path"} <= set(batch)
    assert state["completed_files"] == [batch["input_file"]] and state["state"] == "Finalized"
    assert Path(batch["local_output_path"]).exists()
    sidecar = json.loads((shop.folder / "cleaned.csv.json").read_text())
    assert sidecar["counts"]["cleaned"] == 12 and sidecar["settings"]["model"] == "gpt-5-nano"


def test_increments_ask_for_what_is_new_only(shop):
    shop.call()
    shop.rows += [shop.product(i) for i in range(12, 112)]
    shop.write()
    assert shop.call() == 0 and len(shop.paid()) == 112
    (shop.folder / "images/p3.jpg").write_bytes(photo("green", 4095))
    assert shop.call() == 0 and len(shop.paid()) == 113
    shop.rows[4]["name"] = "Leather Bed"
    shop.write()
    assert shop.call() == 0 and len(shop.paid()) == 114
    batches = len(shop.server.ledger("batch"))
    assert shop.call() == 0 and sum(shop.paid().values()) == 114 and len(shop.server.ledger("batch")) == batches
    rows = shop.cleaned()
    assert rows[3]["color"] == "green" and rows[4]["material"] == "leather"
    shop.check_answers()


def test_a_catalogue_that_changes_under_way(shop, capsys):
    small = ("--max-requests-per-file", "4", "--pilot", "0")
    shop.server.steps = 2
    assert shop.call("poll", *small) == 75  # one of three files is in flight
    shop.rows = [row | {"name": "Glass " + row["name"]} for row in shop.rows[:2]] + shop.rows[2:8]
    shop.write()
    while (code := shop.call("poll", *small)) == 75:
        assert balanced(capsys.readouterr().out)
    assert code == 0 and [row["id"] for row in shop.cleaned()] == [row["id"] for row in shop.rows]
    assert len(shop.paid()) == 10  # 4 that were in flight, 4 more, 2 changed; the 4 dropped ones were never sent
    shop.check_answers()


def test_equal_products_are_asked_once(shop):
    twin = shop.rows[2]
    shop.rows += [twin | {"id": "twin"}]
    shop.write()
    assert shop.call() == 0 and len(shop.cleaned()) == 13 and sum(shop.paid().values()) == 12


def test_workers_make_the_same_requests(shop, tmp_path):
    shop.rows = [shop.product(i) for i in range(40)]
    shop.write()
    assert shop.call("prepare") == 0
    alone = (shop.workspace / "requests/000001.jsonl").read_bytes()
    shop.workspace = tmp_path / "other"
    assert shop.call("prepare", "--workers", "2") == 0
    assert (shop.workspace / "requests/000001.jsonl").read_bytes() == alone


def test_requests_agree_with_the_published_description(shop):
    folder = ROOT.parent / "shared/openai"
    if not folder.exists():
        pytest.skip("the API description is not here")
    shop.server.set_fault("length@chair:2")
    assert shop.call("run", "--max-requests-per-file", "5", "--max-failed", "1", "--pilot", "0") == 0
    files = {path.name: path.read_bytes() for path in (shop.workspace / "requests").glob("*.jsonl")}
    for model in ("gpt-5.4-nano", "gpt-4.1-nano", "o4-mini", "Qwen/Qwen2.5-VL-7B-Instruct"):
        assert shop.call("prepare", "--model", model, "--reasoning-effort", "low", "--image-detail", "high") == 0
        files[f"{len(files)}.jsonl"] = max((shop.workspace / "requests").glob("*.jsonl")).read_bytes()
    kept = shop.folder / "all"
    kept.mkdir()
    for name, data in files.items():
        (kept / name).write_bytes(data)
    assert len(files) >= 8
    ended = subprocess.run(
        [sys.executable, folder / "check_wire.py", "requests", *map(str, kept.iterdir())],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0 and ", 0 faults" in ended.stdout, ended.stdout


def test_the_standin_agrees_with_the_published_description(shop, monkeypatch):
    folder = ROOT.parent / "shared/openai"
    if not folder.exists():
        pytest.skip("the API description is not here")
    import httpx2
    import jsonschema

    spec = json.loads((folder / "openapi_batch.json").read_text())
    seen = collections.Counter()
    schemas = {
        "/models/": "Model", "/files": "ListFilesResponse", "POST/files": "OpenAIFile", "/files/": "OpenAIFile",
        "/batches": "ListBatchesResponse", "POST/batches": "Batch", "/batches/": "Batch",
    }  # fmt: skip

    def hold(name: str, value: object) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": spec["components"]}
        jsonschema.Draft202012Validator(schema).validate(value)
        seen[name] += 1

    true = StandIn.handle

    def watched(self, method, path, *rest):
        status, value = true(self, method, path, *rest)
        path = path.removeprefix("/v1")
        if isinstance(value, dict) and "/content" not in path and method != "DELETE":
            post = "POST" if method == "POST" else ""
            name = schemas.get(post + path) or schemas.get(path[: path.rindex("/") + 1]) or "Batch"
            hold("CreateChatCompletionResponse" if "chat" in path else name, value)
        return status, value

    monkeypatch.setattr(StandIn, "handle", watched)
    shop.server.steps = 4
    shop.server.set_fault("expire:0.5:1")
    assert shop.call() == 0
    lines = [json.loads(line) for path in (shop.workspace / "raw").glob("*.output.jsonl") for line in open(path)]
    for line in lines:
        hold("CreateChatCompletionResponse", line["response"]["body"])
    client = clean.BatchAPIClient(clean.CleaningConfig()).client
    client.files.list(), client.batches.list(), client.files.retrieve(client.files.list().data[0].id)
    hold("ErrorResponse", error_body("m", "c"))
    hold("ErrorResponse", httpx2.get(shop.server.url + "/models/none", headers={"Authorization": "Bearer xyz"}).json())
    assert {"Model", "OpenAIFile", "Batch", "ListBatchesResponse", "ListFilesResponse"} <= set(seen)
    gone = client.files.delete(client.files.list().data[0].id)
    hold("DeleteFileResponse", gone.model_dump())


# -- money: kills, lost answers, torn state


def test_killed_25_times_in_every_phase_and_nothing_is_paid_twice(shop, tmp_path):
    """kill -9 at random lines of every phase, and while the answer to a call that the server has done is on its way."""
    flags = ("--max-requests-per-file", "3", "--max-concurrent-batches", "2", "--pilot", "3", "--max-failed", "1")
    faults = ("refusal@chair:1", "http_400@lamp", "length@bed:2")
    shop.rows = [shop.product(i) for i in range(60)]
    shop.write()
    for fault in faults:
        shop.server.set_fault(fault)

    context, output = fork_server("killed", "openai", "pyarrow.parquet"), tmp_path / "printed"

    def start(phase: str, line: int, *more: str):
        arguments = shop.arguments("run", *flags, *more)
        process = context.Process(
            target=killed.run, args=(phase, line, arguments, {"OPENAI_BASE_URL": shop.server.url}, output)
        )
        process.start()
        return process

    undisturbed = start("prepare", 0, "--workers", "2")
    undisturbed.join(120)
    printed = output.read_text()
    assert undisturbed.exitcode == 0, printed
    lines = json.loads(printed.rpartition("lines ")[2])
    lines["prepare"] //= 2  # once its files are written it is that short
    rejects = shop.output.with_name("cleaned.csv.rejects.jsonl")
    wanted, wanted_rejects, asked = shop.output.read_bytes(), rejects.read_bytes(), shop.paid()
    assert len(shop.cleaned()) == 54 and len(shop.rejects()) == 6 and max(asked.values()) == 3
    shop.output.unlink(), rejects.unlink()
    shop.workspace = tmp_path / "again"

    rng = random.Random(SEED)
    calls = ["POST /v1/files", "POST /v1/batches", "POST /v1/batches", "GET /v1/models", "GET /v1/batches", "/content"]
    between = [*["send"] * 4, *["download"] * 3, *["store"] * 2, *["close"] * 2, *calls]
    rng.shuffle(between)
    plan = [*["prepare"] * 3, *between, *["again"] * 2, *["finalize"] * 3]
    assert len(plan) == 25 and set(lines) <= set(plan)
    with StandIn(tmp_path / "standin2", faults) as server:
        server.models_of_account = shop.server.models_of_account
        shop.server = server
        for number, phase in enumerate(plan):
            at = rng.randint(1, lines[phase]) if phase in lines else -1
            workers = "2" if phase == "prepare" else rng.choice("112")
            child = start(phase if at > 0 else "prepare", at, "--workers", workers)

            def watch(method, path, child=child, call=phase):
                if call in f"{method} {path}":
                    child.kill()

            server.watch = watch if at < 0 else None
            child.join(120)
            assert child.exitcode == -signal.SIGKILL, (number, phase, at, output.read_text())
        server.watch = None
        ended = start("prepare", -1)
        ended.join(120)
        assert ended.exitcode == 0 and balanced(output.read_text()), output.read_text()
        assert shop.output.read_bytes() == wanted and rejects.read_bytes() == wanted_rejects
        assert shop.paid() == asked
        files = [name for _, name, _ in server.ledger("batch")]
        assert len(set(files)) == len(files), "a batch was created twice"


@pytest.mark.parametrize("fault", ["create_lost:2", "create_500:2"])
def test_a_lost_create_answer_buys_nothing_twice(shop, fault, capsys):
    shop.server.set_fault(fault)
    assert shop.call("run", "--max-requests-per-file", "4", "--pilot", "0") == 0
    assert "whose answer was lost" in capsys.readouterr().out
    assert len(shop.server.ledger("batch")) == 3 and set(shop.paid().values()) == {1}


def test_a_lost_batch_that_is_listed_late(shop, monkeypatch):
    monkeypatch.setattr(clean, "SETTLE", 5.0)
    shop.server.set_fault("create_lost:1")
    shop.server.set_fault("list_late:1")
    assert shop.call("poll") == 75
    assert shop.call("poll") == 75  # still within its time: nothing is created again
    assert len(shop.server.ledger("batch")) == 1
    assert shop.call("run") == 0
    assert len(shop.server.ledger("batch")) == 1 and set(shop.paid().values()) == {1}


def test_the_time_to_show_up_starts_after_the_call_however_long_that_took(shop, monkeypatch):
    shop.server.set_fault("create_lost:1")
    shop.server.set_fault("list_late:1")
    monkeypatch.setattr(clean, "SETTLE", 30.0)
    clock = Clock(monkeypatch)
    assert shop.call("poll") == 75
    clock.ahead += 700  # the call was given up by its timeout, and the server went on
    assert shop.call("poll") == 75 and len(shop.server.ledger("batch")) == 1
    clock.ahead += 40
    assert shop.call("run") == 0
    assert len(shop.server.ledger("batch")) == 1 and set(shop.paid().values()) == {1}


@pytest.mark.parametrize("damage", ["torn", "empty", "other"])
def test_a_damaged_state_file_is_one_line(shop, damage, capsys):
    flags = ("--max-requests-per-file", "4", "--pilot", "0", "--max-concurrent-batches", "2")
    shop.server.steps = 2
    assert shop.call("poll", *flags) == 75
    path = shop.workspace / "state.json"
    text = path.read_text()
    path.write_text({"torn": text[: len(text) // 2], "empty": "", "other": "[1]"}[damage])
    capsys.readouterr()
    for command in ("status", "run"):
        assert clean.main(shop.arguments(command, *flags)) == 1
        error = capsys.readouterr().err
        assert "state.json: damaged" in error and "remove it and run again" in error and len(error.splitlines()) == 1
    path.unlink()
    assert shop.call("run", *flags) == 0
    assert len(shop.server.ledger("batch")) == 3 and set(shop.paid().values()) == {1}
    shop.check_answers()


@pytest.mark.parametrize("names", ["state.json", "state.json requests/*", "state.json plan.parquet", "plan.parquet"])
def test_a_deleted_state_file_is_answered_by_the_accounts_batches(shop, names, capsys):
    flags = ("--max-requests-per-file", "4", "--pilot", "0", "--max-concurrent-batches", "2")
    shop.server.steps = 3
    assert shop.call("poll", *flags) == 75 and len(shop.server.ledger("batch")) == 2
    shop.lose(*names.split())
    shop.rows.insert(0, shop.product(12))  # so that other rows stand under the old names of files
    shop.write()
    assert shop.call("poll", *flags) == 75 and len(shop.server.ledger("batch")) == 2, "what is in flight comes first"
    assert ("whose answer was lost" in capsys.readouterr().out) == ("state.json" in names)
    assert shop.call("run", *flags) == 0
    assert len(shop.cleaned()) == 13 and set(shop.paid().values()) == {1}
    shop.check_answers()
    shop.lose(*names.split())
    shop.rows.insert(0, shop.product(13))
    shop.write()
    assert shop.call("run", *flags) == 0 and len(shop.cleaned()) == 14 and set(shop.paid().values()) == {1}
    shop.check_answers()


@pytest.mark.parametrize("names", ["plan.parquet", "state.json plan.parquet", "state.json plan.parquet workspace.json"])
def test_answers_are_read_back_from_the_raw_files(shop, names):
    assert shop.call() == 0
    first = shop.output.read_bytes()
    shop.lose(*names.split())
    assert shop.call() == 0 and shop.output.read_bytes() == first and sum(shop.paid().values()) == 12


def test_a_workspace_of_the_version_before_is_read_back(shop):
    """That one kept less in state.json, and its own name; one of its batches is in flight."""
    flags = ("--max-requests-per-file", "6", "--pilot", "0")
    assert shop.call("run", "--limit", "6", *flags) == 0
    shop.server.steps = 3
    assert shop.call("poll", *flags) == 75
    state, identity = shop.state(), json.loads((shop.workspace / "workspace.json").read_text())
    kept = ("input_file", "status", "output_file_id", "local_output_path", "error_file_id", "created_at", "counts",
            "collected")  # fmt: skip
    batches = {id: {name: batch[name] for name in kept if name in batch} for id, batch in state["batches"].items()}
    old = {"state": "In Progress", "batches": batches, "completed_files": state["completed_files"], "intent": None,
           "uploads": {"000001.jsonl": "file-1"}, "doubt_since": None, "queue_limit": None, "refused_alone": 0,
           "refused_alone_file": None, "next_attempt": 0.0, "failures": 0, "stopped": None, "started": None,
           "settled_before": 0, "refreshed": None, "workspace": identity["id"]}  # fmt: skip
    common.write_json(shop.workspace / "state.json", old)
    shop.lose("plan.parquet", "workspace.json")
    assert shop.call("run", *flags) == 0
    assert len(shop.cleaned()) == 12 and set(shop.paid().values()) == {1} and len(shop.server.ledger("batch")) == 2
    shop.check_answers()


def test_sync_waits_for_a_batch_that_may_be_there(shop, capsys):
    shop.server.set_fault("create_lost:1")
    shop.server.steps = 3
    assert shop.call("poll", "--pilot", "0") == 75
    assert shop.call("run", "--sync") == 1 and "in flight" in capsys.readouterr().err
    while shop.call("poll") == 75:
        pass
    assert len(shop.cleaned()) == 12 and set(shop.paid().values()) == {1}


@pytest.mark.parametrize("route", ["files", "batches"])
def test_a_server_without_a_batch_api_is_told_so(shop, capsys, route):
    shop.server.set_fault(f"no_route:{route}")
    assert shop.call("run", "--pilot", "0") == 1
    *_, error = capsys.readouterr().err.splitlines()
    assert "use `run --sync`" in error and shop.server.url in error and "Traceback" not in error
    assert len([call for call in shop.server.calls if call == "POST /v1/files"]) <= 2
    assert shop.call("run", "--sync") == 0 and set(shop.paid().values()) == {1}


def test_sync_at_another_server_goes_on_and_keeps_the_doubt(shop):
    shop.server.set_fault("create_500:1")
    assert shop.call("poll", "--pilot", "0") == 75 and shop.state()["intent"]
    shop.server.set_fault("no_route:batches")
    assert shop.call("run", "--sync") == 0 and len(shop.cleaned()) == 12
    assert shop.state()["intent"]


def test_requests_that_wait_are_built_anew_when_their_settings_change(shop):
    sent = []
    original = shop.server.complete
    shop.server.complete = lambda body, fault: (sent.append(body), original(body, fault))[1]
    assert shop.call("prepare") == 0
    changed = ("--image-detail", "high", "--max-completion-tokens", "2000")
    shop.server.set_fault("http_400@Sofa")
    assert shop.call("run", "--max-failed", "1", *changed) == 0
    assert len(sent) == 12 and {body["max_completion_tokens"] for body in sent} == {2000}
    details = {body["messages"][1]["content"][1]["image_url"]["detail"] for body in sent}
    assert details == {"high"}
    failed = len(shop.rejects())
    shop.server.faults.clear(), sent.clear()
    assert 0 < failed < 12
    assert shop.call("run", "--retry-failed", "--max-completion-tokens", "3000") == 0
    assert len(sent) == failed and {body["max_completion_tokens"] for body in sent} == {3000}
    assert len(shop.cleaned()) == 12


def test_rows_of_any_length_pass_between_the_processes(shop, monkeypatch):
    monkeypatch.setattr(clean, "BLOCK", 1)
    shop.rows += [shop.product(0) | {"id": f"long{i}", "name": f"Chair {i} " * 100_000} for i in range(9)]
    shop.write()
    assert shop.call("prepare", "--workers", "2") == 0


def test_a_workspace_may_have_any_name(shop):
    shop.workspace = shop.folder / "Shop #1 50%20?"
    assert shop.call("run", "--workers", "2") == 0 and len(shop.cleaned()) == 12


def test_a_poller_that_overlaps_another_ends_at_once_and_says_so(shop):
    """A second poller at every call that the first makes, while that one waits for its answer."""
    command = [sys.executable, str(ROOT / "1_clean.py"), *shop.arguments("poll", "--max-requests-per-file", "4")]
    second = []

    def watch(method, path):
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        second.append((ended.returncode, ended.stdout, ended.stderr))

    shop.server.watch = watch
    assert shop.call("poll", "--max-requests-per-file", "4") == 75
    assert shop.call("poll", "--max-requests-per-file", "4") == 75
    said = f"another call is at work in {shop.workspace}; nothing to do here\n"
    assert second == [(0, said, "")] * 9 == [(0, said, "")] * len(shop.server.calls), shop.server.calls
    shop.server.watch = None
    assert shop.call("run") == 0 and set(shop.paid().values()) == {1} and len(shop.server.ledger("batch")) == 3


def test_two_pollers_at_once(shop, capsys):
    command = [sys.executable, str(ROOT / "1_clean.py"), *shop.arguments("poll", "--max-requests-per-file", "4")]
    for _ in range(2):
        children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"]
        ended = [child.communicate(timeout=60) for child in children]
        codes = [child.returncode for child in children]
        assert set(codes) <= {0, 75}, ended
    while shop.call("poll") == 75:
        pass
    assert len(shop.cleaned()) == 12 and set(shop.paid().values()) == {1}
    files = [name for _, name, _ in shop.server.ledger("batch")]
    assert len(set(files)) == len(files)
    capsys.readouterr()
    with common.exclusive(shop.workspace / "lock") as mine:
        assert mine and shop.call("poll") == 0
        assert shop.call("run") == 75  # whoever asked for the CSV, such as make, must not go on without
    assert capsys.readouterr().out == 2 * f"another call is at work in {shop.workspace}; nothing to do here\n"


# -- the wire's failures, each to its place

THROUGH = {  # fault -> (batches created, most times that one row was paid for)
    "rate_limit:2:0": (3, 1), "server_error:3": (3, 1), "upload_fails:2": (3, 1), "upload_lost:1": (3, 1),
    "expire:0.5:1": (4, 1), "expire:0:1": (4, 1), "vanish:1": (4, 1), "output_missing:2": (3, 1),
    "output_late:3": (3, 1), "download_cut:1": (3, 1), "skip_statuses": (3, 1), "shuffle": (3, 1), "duplicate": (3, 1),
    "empty_ids": (3, 1), "null_ids": (3, 1), "fail_batch:server_trouble:1": (4, 1), "output_late:9": (4, 2),
    "broken_line@chair:1": (4, 2), "absent@chair:1": (4, 2), "miscount": (3, 1),
}  # fmt: skip


@pytest.mark.parametrize("fault", THROUGH)
def test_a_failure_that_passes_loses_no_row(shop, fault, capsys):
    batches, most = THROUGH[fault]
    shop.server.set_fault(fault)
    shop.server.steps = 3
    assert shop.call("run", "--max-requests-per-file", "4", "--pilot", "0") == 0
    printed = capsys.readouterr().out
    assert "input 12 = cleaned 12 + rejected 0 + pending 0" in printed
    assert len(shop.server.ledger("batch")) == batches and max(shop.paid().values()) == most, printed
    shop.check_answers()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("length", "length"), ("empty", "empty answer"), ("refusal", "refusal"), ("content_filter", "content_filter"),
        ("broken_json", "broken JSON"), ("missing_field", "missing field"), ("wrong_type", "wrong type"),
        ("no_choices", "no answer"), ("absent", "no result"), ("http_500", "server error 500"),
    ],
)  # fmt: skip
def test_a_failing_answer_is_asked_three_times_then_rejected_by_name(shop, fault, reason, capsys):
    shop.server.set_fault(f"{fault}@lamp")
    shop.server.set_fault(f"{fault}@desk:2")  # comes right at the third try
    assert shop.call("run", "--pilot", "0", "--max-failed", "0.2") == 0
    assert shop.rejects() == {"004": reason}
    assert len(shop.cleaned()) == 11 and "cleaned 11 + rejected 1 + pending 0" in capsys.readouterr().out
    assert len(shop.server.ledger("batch")) == 3
    report = json.loads((shop.folder / "cleaned.csv.report.json").read_text())
    assert report["rejected"] == {reason: {"rows": 1, "ids": ["004"]}} and report["failed_attempts"] == {reason: 5}
    assert shop.call("run", "--max-failed", "0.2") == 0 and len(shop.server.ledger("batch")) == 3
    assert shop.call("run") == 1 and "1 of 12 rows were rejected, more than --max-failed" in capsys.readouterr().err
    del shop.server.faults[f"{fault}@lamp"]
    assert shop.call("run", "--retry-failed") == 0 and not shop.rejects()


def test_a_cut_off_answer_gets_more_room(shop):
    shop.server.set_fault("length@lamp:2")
    assert shop.call() == 0
    rooms = [
        json.loads(line)["body"]["max_completion_tokens"]
        for path in sorted((shop.workspace / "requests").glob("*.jsonl"))
        for line in open(path)
        if "lamp" in line.lower().partition("title:")[2]
    ]
    assert rooms == [500, 1000, 2000]


def test_requests_that_are_refused_are_not_repeated(shop):
    shop.server.set_fault("http_400@lamp")
    assert shop.call("run", "--max-failed", "0.2") == 0
    assert shop.rejects() == {"004": "request refused: invalid_value"} and len(shop.server.ledger("batch")) == 1


def test_one_bad_line_does_not_take_the_batch_with_it(shop, capsys):
    shop.server.set_fault("bad_line@lamp")
    assert shop.call("run", "--max-failed", "0.2", "--max-requests-per-file", "6") == 0
    assert shop.rejects() == {"004": "request refused: invalid_json_line"}
    assert len(shop.cleaned()) == 11 and set(shop.paid().values()) == {1}


def test_a_batch_that_always_fails_ends_in_rejects(shop, capsys):
    shop.server.set_fault("fail_batch:strange_error:9")
    assert shop.call("run", "--pilot", "0") == 1
    assert set(shop.rejects().values()) == {"batch failed: strange_error"} and len(shop.server.ledger("batch")) == 3
    assert "rejected 12: batch failed: strange_error" in capsys.readouterr().out


def test_ten_files_through_a_queue_of_two(shop, capsys):
    shop.rows = [shop.product(i) for i in range(40)]
    shop.write()
    flags = ("--max-requests-per-file", "4", "--max-concurrent-batches", "10", "--pilot", "0")
    assert shop.call("prepare", *flags) == 0
    sizes = [sum(map(tokens_of, path.open("rb"))) for path in (shop.workspace / "requests").glob("*.jsonl")]
    assert len(sizes) == 10
    shop.server.set_fault(f"token_limit:{2 * max(sizes)}")
    shop.server.steps = 2
    assert shop.call("run", *flags) == 0
    assert len(shop.cleaned()) == 40 and set(shop.paid().values()) == {1}
    assert len(shop.server.ledger("upload")) == 10  # each file once: uploads are used again
    assert json.loads((shop.folder / "cleaned.csv.report.json").read_text())["failed_attempts"] == {}
    refused = len(shop.server.ledger("batch")) - 10
    assert 8 <= refused <= 10, "the limit was not learned"


@pytest.mark.parametrize("limit", ["token_limit:5000", "token_limit:5000:unstated"])
def test_a_file_that_is_too_big_for_the_queue_is_split(shop, limit, monkeypatch):
    monkeypatch.setattr(clean, "MIN_SPLIT", 6)
    shop.server.set_fault(limit)
    assert shop.call("run", "--pilot", "0") == 0
    assert len(shop.cleaned()) == 12 and set(shop.paid().values()) == {1} and len(shop.server.ledger("batch")) > 2


@pytest.mark.parametrize("limit", ["token_limit:90000", "token_limit:90000:unstated"])
def test_a_queue_that_others_fill_is_waited_for_without_splitting_the_file(shop, limit, capsys):
    shop.server.set_fault(limit)
    other = {"id": "batch_other", "status": "in_progress", "_tokens": 89_000, "_unlisted": 0, "_vanished": False}
    shop.server.put("batch", other | {"created_at": 0, "metadata": {}})
    for _ in range(6):
        assert shop.call("poll", "--pilot", "0", "--poll-interval", "1") == 75
    assert "other work of the account" in capsys.readouterr().out
    shop.server.put("batch", other | {"status": "completed"})
    assert shop.call("run", "--pilot", "0") == 0
    # One upload: whatever name a batch gives its file, it is the same bytes.
    assert len(shop.server.ledger("upload")) == 1 and set(shop.paid().values()) == {1}


@pytest.mark.parametrize("fault", ["vanish:1", "output_late:7", "output_missing:7"])
def test_what_is_missing_has_an_hour_to_show_up(shop, fault, monkeypatch):
    monkeypatch.setattr(clean, "PATIENCE", 3600.0)
    clock = Clock(monkeypatch)
    shop.server.set_fault(fault)
    for _ in range(8):  # somebody who calls `make poll` again and again
        assert shop.call("poll") == 75
    assert len(shop.server.ledger("batch")) == 1
    clock.ahead += 3601
    assert shop.call("run") == 0 and len(shop.server.ledger("batch")) == 2 - (fault != "vanish:1")
    assert set(shop.paid().values()) == {1}


@pytest.mark.parametrize("fault", ["quota:1", "quota_batch:1", "quota_lines:1", "quota_everywhere:3"])
def test_without_quota_it_stops_sending_and_collects(shop, fault, capsys):
    flags = ("--max-requests-per-file", "4", "--pilot", "0", "--max-concurrent-batches", "2")
    shop.server.steps = 2
    assert shop.call("dispatch", *flags) == 75
    shop.server.set_fault(fault)
    while (code := shop.call("poll", *flags)) == 75:
        pass
    captured = capsys.readouterr()
    assert code == 1 and "stopped" in captured.err and balanced(captured.out)
    made = len(shop.server.ledger("batch"))
    assert shop.call("poll", *flags) == 1 and len(shop.server.ledger("batch")) == made
    assert shop.call("run", *flags) == 0 and set(shop.paid().values()) == {1}


def test_the_next_call_is_the_retry(shop, monkeypatch):
    shop.server.set_fault("rate_limit:1:3600")  # longer than the client waits
    assert shop.call("poll") == 75 and not shop.server.ledger("batch")
    assert shop.call("poll") == 75 and len(shop.server.ledger("batch")) == 1
    assert shop.call("run") == 0


def test_run_tries_again_before_the_next_poll(shop, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(clean, "RETRY_PAUSE", 60.0)
    shop.server.set_fault("rate_limit:1:3600")
    shop.server.steps = 2
    assert shop.call("run", "--poll-interval", "600") == 0
    assert clock.slept[0] == 60 and set(clock.slept[1:]) == {600}


# -- before money is spent


def test_an_unsound_pilot_stops_the_rest(shop, capsys):
    shop.rows = [shop.product(i) for i in range(30)]
    shop.write()
    shop.server.set_fault("broken_json@desk")
    assert shop.call("run", "--pilot", "10") == 1
    captured = capsys.readouterr()
    assert "pilot" in captured.err and "9 of 10" in captured.err and len(captured.err.splitlines()) == 2
    assert sum(shop.paid().values()) == 10 and balanced(captured.out)
    assert shop.call("poll", "--pilot", "10") == 1 and sum(shop.paid().values()) == 10
    shop.server.faults.clear()
    assert shop.call("run", "--pilot", "10") == 0 and len(shop.cleaned()) == 30
    assert sum(shop.paid().values()) == 31  # the one that failed, once more


def test_an_unsound_pilot_stops_sync_too(shop, capsys):
    shop.rows = [shop.product(i) for i in range(30)]
    shop.write()
    shop.server.set_fault("broken_json@desk")
    flags = ("--sync", "--pilot", "10", "--concurrency", "2")
    assert shop.call("run", *flags) == 1
    *_, error = capsys.readouterr().err.splitlines()
    assert "unsound: 9 of 10 answers could be parsed (1 broken JSON)" in error and sum(shop.paid().values()) == 10
    shop.server.faults.clear()
    assert shop.call("run", *flags) == 0 and sum(shop.paid().values()) == 31


def test_a_pilot_without_an_answer_is_sent_again_before_the_rest(shop):
    shop.server.set_fault("vanish:1")
    flags = ("--pilot", "3", "--max-requests-per-file", "4", "--max-concurrent-batches", "5")
    assert shop.call("run", *flags) == 0
    files = [name for _, name, _ in shop.server.ledger("batch")]
    lost, again, *rest = files
    requests = shop.workspace / "requests"
    assert (requests / lost).read_bytes() == (requests / again).read_bytes() and len(rest) == 3
    assert len(shop.cleaned()) == 12


def test_a_kill_right_after_a_batch_was_stored(shop, monkeypatch):
    flags = ("--pilot", "4", "--max-requests-per-file", "4")
    with monkeypatch.context() as patch:
        patch.setattr(clean.BatchRunner, "close_batch", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        assert shop.call("run", *flags) == 130
    assert shop.call("run", *flags) == 0
    assert len(shop.server.ledger("batch")) == 3 and set(shop.paid().values()) == {1}


def test_cost_is_told_before_and_after_and_limited(shop, capsys):
    assert shop.call("run", "--max-cost", "0.0001") == 1
    captured = capsys.readouterr()
    assert "--max-cost" in captured.err and "1 files, 12 requests" in captured.out and not shop.server.ledger("upload")
    assert shop.call("run", "--max-cost", "0.01") == 0
    report = json.loads((shop.folder / "cleaned.csv.report.json").read_text())
    lines = [json.loads(line) for path in (shop.workspace / "raw").glob("*.output.jsonl") for line in open(path)]
    usage = [line["response"]["body"]["usage"] for line in lines]
    prompt, output = (sum(u[name] for u in usage) for name in ("prompt_tokens", "completion_tokens"))
    assert report["cost"]["prompt_tokens"] == prompt
    assert report["cost"]["usd"] == pytest.approx((prompt * 0.025 + output * 0.2) / 1e6, abs=1e-6)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("unauthorized", "OPENAI_API_KEY"), ("forbidden", "403"), ("no_model", "gpt-5-nano"),
        ("shutdown:2020-01-01", "was shut down on 2020-01-01"),
    ],
)  # fmt: skip
def test_preflight_ends_in_one_line(shop, fault, words, capsys):
    shop.server.set_fault(fault)
    assert shop.call() == 1
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("prepare:")]
    assert len(error) == 1 and words in error[0] and not shop.server.ledger("upload")


def test_a_near_shutdown_is_told(shop, capsys):
    soon = (datetime.date.today() + datetime.timedelta(days=5)).isoformat()
    shop.server.set_fault(f"shutdown:{soon}")
    assert shop.call("run", "--model", "gpt-5-nano") == 0
    assert f"warning: gpt-5-nano shuts down on {soon}, in 5 days" in capsys.readouterr().out


def test_an_unreachable_endpoint_is_one_line(shop, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert shop.call() == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "http://127.0.0.1:9/v1" in error and "refused" in error and "OPENAI_BASE_URL" in error
    monkeypatch.delenv("OPENAI_BASE_URL"), monkeypatch.delenv("OPENAI_API_KEY")
    assert shop.call() == 1 and "OPENAI_API_KEY is not set" in capsys.readouterr().err


def test_a_lost_network_under_way_is_waited_out(shop, monkeypatch, capsys):
    shop.server.steps = 3
    assert shop.call("poll") == 75
    url = os.environ["OPENAI_BASE_URL"]
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert shop.call("poll") == 75 and "refused" in capsys.readouterr().out
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    shop.server.set_fault("web_page:1")  # somebody's proxy
    assert shop.call("poll") == 75 and "not the API's" in capsys.readouterr().out
    assert shop.call("run") == 0


def test_a_web_page_instead_of_the_api_is_one_line(shop, capsys):
    shop.server.set_fault("web_page")
    for flags in ((), ("--sync",)):
        assert shop.call("run", *flags) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert shop.server.url in error and "not the API's" in error and "OPENAI_BASE_URL" in error


def test_a_key_with_spaces_is_refused_and_not_shown(shop, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret word\n")
    assert shop.call() == 1
    captured = capsys.readouterr()
    assert "OPENAI_API_KEY holds spaces" in captured.err and "secret" not in captured.out + captured.err
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    assert shop.call() == 0


def test_request_parameters_follow_the_model():
    def chosen(model: str) -> dict:
        return clean.model_parameters(clean.CleaningConfig(model=model))

    assert chosen("gpt-5-nano") == {"max_completion_tokens": 500, "reasoning_effort": "minimal"}
    assert chosen("gpt-5-nano-2025-08-07")["reasoning_effort"] == "minimal"
    assert {chosen(name)["reasoning_effort"] for name in ("gpt-5.4-nano", *clean.AUTO_MODELS[1:])} == {"none"}
    assert chosen("gpt-4.1-nano") == {"max_completion_tokens": 2000, "temperature": 0}
    assert chosen("gpt-9-mini") == {"max_completion_tokens": 2000}
    assert chosen("Qwen/Qwen2.5-VL-7B-Instruct") == {"max_tokens": 2000, "temperature": 0}


# -- models that come and go


def at(clock: Clock, shop: Shop, date: str) -> None:
    """Set the clock of stage 1 and of the stand-in to noon of a day; gpt-5-nano ends on 2026-12-11."""
    clock.ahead = datetime.datetime.fromisoformat(f"{date}T12:00+00:00").timestamp() - time.time()
    shop.server.clock = clock.now
    shop.server.models_of_account["gpt-5-nano"] = "2026-12-11"


def models(shop: Shop) -> dict[str, int]:
    """Cleaned rows by the model that answered."""
    return json.loads((shop.folder / "cleaned.csv.json").read_text())["models"]


@pytest.mark.parametrize(
    ("date", "fault", "model"),
    [
        ("2026-11-20", "null_ids", "gpt-5-nano"), ("2026-12-02", "null_ids", "gpt-5-nano"),
        ("2026-12-04", "null_ids", "gpt-6-luna"), ("2026-12-11", "null_ids", "gpt-6-luna"),
        ("2027-03-01", "unlisted:gpt-6-luna", "gpt-5.6-luna"), ("2026-11-20", "unlisted:gpt-5-nano", "gpt-6-luna"),
        ("2026-12-09", "unlisted:gpt-6-luna:gpt-5.6-luna", "gpt-5-nano"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("told", [True, False])
def test_auto_takes_the_first_model_that_outlives_the_work(shop, date, fault, model, told, monkeypatch, capsys):
    at(Clock(monkeypatch), shop, date)
    if not told:  # the API's date is optional
        shop.server.models_of_account["gpt-5-nano"] = None
    shop.server.set_fault(fault)
    assert shop.call() == 0 and models(shop) == {model: 12}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model ")]
    reason = {"gpt-6-luna": "gpt-5-nano ", "gpt-5.6-luna": "gpt-6-luna is not there for this key"}.get(model, "")
    assert len(lines) == 1 and lines[0].startswith(f"model {model}: ") and reason in lines[0]
    assert shop.state()["models"] == [model]


def test_a_model_that_the_project_may_not_use_is_as_one_that_is_not_there(shop, monkeypatch, capsys):
    true = StandIn.models

    def models_for_project(self, rest):
        if rest == ["gpt-5-nano"]:
            raise HttpError(403, "Project `proj_x` does not have access to model `gpt-5-nano`", "model_not_found")
        answered = true(self, rest)
        return answered if rest else answered | {"data": answered["data"][1:]}

    monkeypatch.setattr(StandIn, "models", models_for_project)
    assert shop.call() == 0 and models(shop) == {"gpt-6-luna": 12}
    assert shop.call("prepare", "--model", "gpt-5-nano", "--ask-again") == 0
    assert shop.call("run", "--model", "gpt-5-nano") == 1
    assert "gpt-5-nano is not there for this key; set another --model" in capsys.readouterr().err


def test_without_a_key_prepare_chooses_by_the_date_alone(shop, monkeypatch, capsys):
    at(Clock(monkeypatch), shop, "2026-12-20")
    monkeypatch.delenv("OPENAI_API_KEY"), monkeypatch.delenv("OPENAI_BASE_URL")
    assert shop.call("prepare") == 0 and "model gpt-6-luna: gpt-5-nano was shut down" in capsys.readouterr().out
    assert shop.call() == 1 and "OPENAI_API_KEY is not set" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["no_model", "unlisted:gpt-5-nano:gpt-6-luna:gpt-5.6-luna"])
def test_auto_without_a_model_is_one_line(shop, fault, capsys):
    shop.server.set_fault(fault)
    assert shop.call() == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("prepare:")]
    assert "gpt-5-nano is not there for this key" in error and "set --model" in error
    assert not shop.server.ledger("upload")


def old_state(shop: Shop) -> None:
    """Take from a workspace what versions that noted no model did not write."""
    import pandas as pd

    state = {
        name: value for name, value in shop.state().items() if name not in ("models", "gone", "efforts", "ask_again")
    }
    common.write_json(shop.workspace / "state.json", state)
    plan = pd.read_parquet(shop.workspace / "plan.parquet")
    plan[["id", "digest", "reason", "detail", "tokens", "patches"]].to_parquet(shop.workspace / "plan.parquet")


@pytest.mark.parametrize("lost", ["", "requests/*", "state.json", "plan.parquet"])
@pytest.mark.parametrize(("flags", "done"), [((), True), ((), False), (("--model", "gpt-6-luna"), True)])
def test_a_workspace_begun_with_gpt_5_nano_is_finished_after_its_end(shop, lost, flags, done, monkeypatch):
    """Answers that were paid for count, what is in flight is collected, and only the rest goes to the next model."""
    clock = Clock(monkeypatch)
    at(clock, shop, "2026-12-01")
    small = ("--max-requests-per-file", "4", "--pilot", "4")
    shop.server.steps = 2
    for _ in range(3):
        assert shop.call("poll", *small, "--model", "gpt-5-nano") == 75
    assert len(shop.server.ledger("batch")) == 2  # the pilot, and one that is in flight
    old_state(shop)
    if done:  # in time, though nobody looked
        [shop.server.poll(shop.server.ledger("batch")[1][0]) for _ in range(2)]
    at(clock, shop, "2026-12-13")
    shop.lose(lost or "nothing")
    assert shop.call("run", *small, *flags) == 0 and len(shop.cleaned()) == 12
    assert sum(shop.paid().values()) == 12, "a row was paid twice"
    assert models(shop) == {"gpt-5-nano": 8 if done else 4, "gpt-6-luna": 4 if done else 8}
    shop.check_answers()
    shop.rows += [shop.product(12), shop.product(13)]
    shop.write()
    assert shop.call("run", *small) == 0 and sum(shop.paid().values()) == 14
    assert models(shop) == {"gpt-5-nano": 8 if done else 4, "gpt-6-luna": 6 if done else 10}


def test_a_choice_is_kept_until_the_model_ends(shop, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    at(clock, shop, "2026-12-01")
    assert shop.call("run", "--limit", "4") == 0
    at(clock, shop, "2026-12-09")  # a new workspace would take the next
    assert shop.call("run", "--limit", "8") == 0 and models(shop) == {"gpt-5-nano": 8}
    at(clock, shop, "2026-12-11")
    capsys.readouterr()
    assert shop.call("run") == 0 and models(shop) == {"gpt-5-nano": 8, "gpt-6-luna": 4}
    printed = capsys.readouterr().out
    assert printed.count("gpt-5-nano was shut down on 2026-12-11; the rest goes to gpt-6-luna") == 1
    assert set(shop.paid().values()) == {1} and len(shop.paid()) == 12
    calls = len(shop.server.calls)
    assert shop.call() == 0 and len(shop.server.calls) == calls, "nothing is asked where all is answered"


@pytest.mark.parametrize("fault", ["no_batches_of:gpt-5-nano", "no_batches_of:gpt-5-nano:lines", "gone:gpt-5-nano:3"])
@pytest.mark.parametrize("pilot", ["0", "4"])
def test_a_model_that_vanishes_in_the_middle(shop, fault, pilot, capsys):
    flags = ("--max-requests-per-file", "4", "--pilot", pilot, "--max-concurrent-batches", "2")
    shop.server.steps = 2
    assert shop.call("poll", *flags) == 75
    shop.server.set_fault(fault)
    assert shop.call("run", *flags) == 0
    printed = capsys.readouterr().out
    assert printed.count("the rest goes to gpt-6-luna") == 1 and "gpt-5-nano is not there" in printed
    assert len(shop.cleaned()) == 12 and sum(shop.paid().values()) == 12 and models(shop)["gpt-6-luna"] >= 4
    assert "failed_attempts" in (report := json.loads((shop.folder / "cleaned.csv.report.json").read_text()))
    assert set(report["failed_attempts"]) <= {"model_not_found"}
    shop.check_answers()


def test_a_kill_between_leaving_a_model_and_the_next_plan(shop, monkeypatch, capsys):
    flags = ("--max-requests-per-file", "4", "--pilot", "0")
    shop.server.steps = 2
    assert shop.call("poll", *flags) == 75
    shop.server.set_fault("gone:gpt-5-nano")
    for owner, name in ((clean.BatchRunner, "choose_model"), (clean.DataProcessor, "prepare")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            while (code := shop.call("poll", *flags)) == 75:
                pass
            assert code == 130
    assert shop.call("run", *flags) == 0 and sum(shop.paid().values()) == 12 and models(shop) == {"gpt-6-luna": 12}
    assert capsys.readouterr().out.count("model_not_found") >= 1


@pytest.mark.parametrize("fault", ["no_batches_of:gpt-5-nano", "no_batches_of:gpt-5-nano:lines", "gone:gpt-5-nano:1"])
def test_a_named_model_that_vanishes_stops_with_one_line_and_uses_no_attempt(shop, fault, capsys):
    flags = ("--max-requests-per-file", "4", "--pilot", "0", "--model", "gpt-5-nano", "--max-attempts", "1")
    shop.server.set_fault(fault)
    for _ in range(2):
        assert shop.call("run", *flags) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "gpt-5-nano" in error and "--model" in error and "Traceback" not in error
    shop.server.faults.clear()
    assert shop.call("run", *flags) == 0 and set(shop.paid().values()) == {1} and not shop.rejects()


@pytest.mark.parametrize("named", [True, False])
def test_sync_when_a_model_vanishes(shop, named, monkeypatch, capsys):
    true, count = StandIn.chat, itertools.count()

    def chat(self, data):
        if next(count) == 5:
            self.set_fault("unlisted:gpt-5-nano")
        return true(self, data)

    monkeypatch.setattr(StandIn, "chat", chat)
    flags = ("--sync", "--pilot", "0", "--concurrency", "1", *(("--model", "gpt-5-nano") if named else ()))
    assert shop.call("run", *flags) == (1 if named else 0)
    captured = capsys.readouterr()
    if named:
        assert "model_not_found" in captured.err.splitlines()[-1]
        assert shop.call("run", *flags, "--model", "auto") == 0
    assert "the rest goes to gpt-6-luna" in captured.out + capsys.readouterr().out
    assert len(shop.cleaned()) == 12 and sum(shop.paid().values()) == 12 and models(shop)["gpt-6-luna"] == 7


# -- reasoning efforts, prices, estimates


@pytest.mark.parametrize("sync", [(), ("--sync",)])
@pytest.mark.parametrize("model", ["auto", "qwen2.5-vl"])
def test_an_effort_that_is_refused_is_replaced_by_the_lowest_accepted(shop, sync, model, capsys):
    shop.server.set_fault("efforts:high:low:medium")
    assert shop.call("run", "--model", model, *sync) == 0
    printed = capsys.readouterr().out
    assert printed.count("sending low from now on") == 1 and set(shop.paid().values()) == {1}
    assert list(shop.state()["efforts"].values()) == ["low"]
    (body,) = {json.dumps([json.loads(line)["body"].get("reasoning_effort") for line in open(path)][:1])
               for path in sorted((shop.workspace / "requests").glob("*.jsonl"))[-1:]} or {'["low"]'}  # fmt: skip
    assert body == '["low"]'
    shop.rows += [shop.product(i) for i in range(12, 15)]
    shop.write()
    capsys.readouterr()
    assert shop.call("run", "--model", model, *sync) == 0 and "from now on" not in capsys.readouterr().out
    assert not json.loads((shop.folder / "cleaned.csv.report.json").read_text())["rejected"]


@pytest.mark.parametrize("sync", [(), ("--sync",)])
def test_a_given_effort_that_is_refused_stops_and_uses_no_attempt(shop, sync, capsys):
    shop.rows = [shop.product(i) for i in range(30)]
    shop.write()
    shop.server.set_fault("efforts:low:high")
    flags = ("--pilot", "20", "--max-attempts", "1", *sync)
    assert shop.call("run", "--reasoning-effort", "medium", *flags) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "gpt-5-nano refuses --reasoning-effort medium; it accepts low or high" in error
    assert not shop.paid()
    assert shop.call("run", "--reasoning-effort", "low", *flags) == 0 and len(shop.cleaned()) == 30
    assert set(shop.paid().values()) == {1} and not shop.rejects()


def test_a_model_that_reasons_unasked_gets_room_or_is_told_so(shop, capsys):
    shop.server.set_fault("reasons:1500")
    assert shop.call("run", "--model", "qwen2.5-vl") == 0 and len(shop.cleaned()) == 12
    flags = ("--model", "qwen2.5-vl", "--max-completion-tokens", "700", "--pilot", "6", "--ask-again")
    shop.workspace = shop.folder / "other"
    assert shop.call("run", *flags) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "0 of 6" in error and "6 length" in error and "--max-completion-tokens" in error
    assert shop.call("run", *flags) in (0, 1) and shop.call("run", *flags) in (0, 1)
    assert shop.call("run", *flags) == 0 and len(shop.cleaned()) == 12  # each call came further: the room is doubled


def test_the_estimate_is_corrected_by_the_pilot_and_held_against_the_limit(shop, capsys):
    shop.rows = [shop.product(i) for i in range(40)]
    shop.write()
    assert shop.call("run", "--pilot", "10") == 0
    printed = capsys.readouterr().out
    spent = json.loads((shop.folder / "cleaned.csv.report.json").read_text())["cost"]["usd"]
    told = float(re.search(r"after the pilot: \$([\d.]+) by the usage so far to come; the estimate was \$", printed)[1])
    assert told == pytest.approx(spent * 30 / 40, rel=0.05)
    shop.workspace = shop.folder / "other"
    shop.server.set_fault("usage:2.5")
    assert shop.call("run", "--pilot", "10", "--max-cost", "0.0021") == 1
    assert "--max-cost" in capsys.readouterr().err and sum(shop.paid().values()) == 50


@pytest.mark.parametrize("sync", [(), ("--sync", "--concurrency", "2")])
def test_a_pilot_that_used_more_than_twice_the_estimate_stops_once(shop, sync, capsys):
    shop.rows = [shop.product(i) for i in range(40)]
    shop.write()
    shop.server.set_fault("usage:9")
    assert shop.call("run", "--pilot", "8", *sync) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the pilot used more than twice of what was estimated" in error and error.count("$") >= 2
    assert sum(shop.paid().values()) == 8
    assert shop.call("run", "--pilot", "8", *sync) == 0 and sum(shop.paid().values()) == 40


def test_a_model_that_is_not_in_the_table_needs_prices_for_a_limit(shop, capsys):
    flags = ("run", "--model", "qwen2.5-vl", "--max-cost", "1")
    assert shop.call(*flags) == 1 and "--price-input" in capsys.readouterr().err and not shop.paid()
    assert shop.call(*flags, "--price-input", "0.1", "--price-output", "0.4") == 0 and models(shop) == {
        "qwen2.5-vl": 12
    }


# -- money that must not be spent twice, or above the limit


def test_two_batches_with_a_refused_effort_change_it_once(shop, capsys):
    shop.server.set_fault("efforts:low:high")
    flags = ("--pilot", "0", "--max-requests-per-file", "6", "--max-concurrent-batches", "2")
    assert shop.call("run", *flags) == 0 and len(shop.cleaned()) == 12
    assert capsys.readouterr().out.count("sending low from now on") == 1 and set(shop.paid().values()) == {1}


def test_a_kill_between_another_effort_and_the_end_of_its_batch(shop, monkeypatch):
    shop.server.set_fault("efforts:low:high")
    with monkeypatch.context() as patch:
        patch.setattr(clean.BatchRunner, "close_batch", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        assert shop.call() == 130 and shop.state()["efforts"] == {"gpt-5-nano": "low"}
    assert shop.call() == 0 and len(shop.cleaned()) == 12 and set(shop.paid().values()) == {1}


@pytest.mark.parametrize("flags", [("gpt-5-nano", "high"), ("qwen2.5-vl", None)])
def test_the_limit_holds_for_a_model_that_reasons(shop, flags, capsys):
    """12 answers of up to 2,000 tokens."""
    model, effort = flags
    more = ("--price-input", "0.025", "--price-output", "0.2", *(("--reasoning-effort", effort) if effort else ()))
    shop.server.set_fault("reasons:1500")
    assert shop.call("run", "--model", model, *more, "--max-cost", "0.004") == 1
    assert "--max-cost" in capsys.readouterr().err and not shop.paid()
    assert shop.call("run", "--model", model, *more, "--max-cost", "0.02") == 0
    assert 0.003 < json.loads((shop.folder / "cleaned.csv.report.json").read_text())["cost"]["usd"] < 0.02


@pytest.mark.parametrize("sync", [(), ("--sync", "--concurrency", "1")])
def test_the_limit_counts_the_room_that_cut_off_answers_get(shop, sync, capsys):
    """Every answer costs little and is cut off; the second ones may take 1,000 tokens each, the third ones 2,000."""
    shop.server.set_fault("length@acme")
    flags = ("--pilot", "0", "--max-failed", "1", *sync)
    assert shop.call("run", "--max-cost", "0.003" if sync else "0.0015", *flags) == 1
    assert "--max-cost" in capsys.readouterr().err and set(shop.paid().values()) == {1}
    assert shop.call("run", "--max-cost", "0.02", *flags) == 0 and sum(shop.paid().values()) == 36


def test_an_answer_without_a_price_is_not_free(shop, capsys):
    assert shop.call("run", "--model", "qwen2.5-vl", "--limit", "6") == 0
    assert "cost by usage: unknown" in capsys.readouterr().out
    report = json.loads((shop.folder / "cleaned.csv.report.json").read_text())
    assert report["cost"]["usd"] is None and report["cost"]["prompt_tokens"] > 0
    assert json.loads((shop.folder / "cleaned.csv.json").read_text())["cost"]["usd"] is None
    flags = ("run", "--model", "gpt-5-nano", "--max-cost", "1")
    assert shop.call(*flags) == 1 and sum(shop.paid().values()) == 6
    captured = capsys.readouterr()
    assert "--price-input" in captured.err and "qwen2.5-vl" in captured.err
    assert shop.call("status") == 0 and "cost so far unknown" in capsys.readouterr().out
    assert shop.call(*flags, "--price-input", "0.1", "--price-output", "0.4") == 0 and len(shop.cleaned()) == 12


@pytest.mark.parametrize("lost", ["", "state.json", "state.json plan.parquet"])
def test_batches_found_again_count_against_the_limit(shop, lost, capsys):
    shop.server.steps = 50
    flags = ("--pilot", "0", "--max-requests-per-file", "6", "--max-concurrent-batches")
    assert shop.call("dispatch", *flags, "1") == 75
    shop.lose(*lost.split())
    assert shop.call("dispatch", *flags, "2", "--max-cost", "0.0004") == 1  # enough for one file
    assert "--max-cost" in capsys.readouterr().err and len(shop.server.ledger("batch")) == 1


@pytest.mark.parametrize("command", ["poll", "dispatch"])
def test_sync_is_for_run_alone(shop, command, capsys):
    assert shop.call(command, "--sync") == 2 and not shop.server.calls
    error = capsys.readouterr().err
    assert "use `run --sync`" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(("line", "reason"), [
    (99, "batch failed: invalid_line"), ("x", "batch failed: invalid_line"), ([1], "batch failed: invalid_line"),
    ("2", "request refused: invalid_line"),
])  # fmt: skip
def test_a_batch_that_names_no_line_of_its_file_is_not_sent_without_end(shop, line, reason, monkeypatch):
    def refuse(batch, lines):
        data = [{"code": "invalid_line", "message": "bad", "line": line, "param": None}]
        batch |= {"status": "failed", "errors": {"object": "list", "data": data}, "_tokens": 0}
        return True

    monkeypatch.setattr(shop.server, "refuse", refuse)
    for _ in range(30):
        if (code := shop.call("poll", "--pilot", "0", "--limit", "2")) != 75:
            break
    assert code == 1 and reason in shop.rejects().values() and len(shop.server.ledger("batch")) <= 4


def test_without_credit_sync_stops_and_rejects_nothing(shop, monkeypatch, capsys):
    true, count = StandIn.chat, itertools.count()

    def chat(self, data):
        return true(self, data) if next(count) < 4 else (402, {"error": {"message": "Insufficient credits"}})

    monkeypatch.setattr(StandIn, "chat", chat)
    flags = ("run", "--sync", "--pilot", "4", "--concurrency", "1")
    assert shop.call(*flags) == 1 and "may spend no more (insufficient_quota" in capsys.readouterr().err
    monkeypatch.setattr(StandIn, "chat", true)
    assert shop.call(*flags) == 0 and len(shop.cleaned()) == 12 and sum(shop.paid().values()) == 12


def test_a_refusal_of_sync_says_its_status(shop, monkeypatch):
    monkeypatch.setattr(StandIn, "chat", lambda self, data: (422, {"error": {"message": "no pictures"}}))
    assert shop.call("run", "--sync", "--pilot", "0", "--limit", "2") == 1
    assert shop.rejects() == {"000": "request refused: 422", "001": "request refused: 422"}


@pytest.mark.parametrize("pilot", ["0", "4"])
@pytest.mark.parametrize("fault", ["http_500", "http_429"])
def test_sync_stops_where_the_server_answers_nothing(shop, fault, pilot, monkeypatch, capsys):
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.001)
    shop.server.set_fault(f"{fault}@acme")
    flags = ("run", "--sync", "--pilot", pilot, "--concurrency", "2")
    assert shop.call(*flags) == 1 and not shop.output.exists()
    assert sum("chat" in call for call in shop.server.calls) <= clean.FEW_SILENT * (1 + clean.SYNC_RETRIES)
    error = capsys.readouterr().err.splitlines()[-1]
    assert fault[-3:] in error and "run again" in error
    shop.server.faults.clear()
    assert shop.call(*flags) == 0 and len(shop.cleaned()) == 12


def test_a_row_that_sync_never_gets_is_rejected_in_one_run(shop, monkeypatch):
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.001)
    shop.server.set_fault("http_500@lamp")
    assert shop.call("run", "--sync", "--pilot", "4", "--max-failed", "0.2") == 0
    assert shop.rejects() == {"004": "server error"} and len(shop.cleaned()) == 11


@pytest.mark.parametrize("concurrency", ["1", "3", "50"])
def test_the_pilot_of_sync_pays_no_more_than_it_says(shop, concurrency):
    shop.server.set_fault("broken_json@acme")
    assert shop.call("run", "--sync", "--pilot", "5", "--concurrency", concurrency) == 1
    assert sum(shop.paid().values()) == 5


def test_an_error_file_that_shows_up_late_is_read(shop, monkeypatch):
    true, seen = StandIn.public, []

    def public(self, value):
        value = true(self, value)
        if value.get("status") == "completed" and not seen:
            seen.append(value)
            value = value | {"error_file_id": None}
        return value

    monkeypatch.setattr(StandIn, "public", public)
    shop.server.set_fault("http_500@lamp")
    assert shop.call("run", "--pilot", "0", "--max-attempts", "1", "--max-failed", "0.2") == 0
    assert seen and shop.rejects() == {"004": "server error 500"}


def test_failures_in_the_output_file_are_not_waited_for(shop, monkeypatch):
    """Some servers write one file, and count its failures."""
    true = StandIn.finish

    def finish(self, batch, share, end):
        true(self, batch, share, end)
        data = b"".join(self.content(batch[name]) for name in ("output_file_id", "error_file_id") if batch[name])
        batch |= {"output_file_id": self.store("all.jsonl", "batch_output", data)["id"], "error_file_id": None}

    monkeypatch.setattr(StandIn, "finish", finish)
    monkeypatch.setattr(clean, "PATIENCE", 3600.0)
    shop.server.set_fault("http_500@lamp")
    flags = ("--pilot", "0", "--max-attempts", "1", "--max-failed", "0.2")
    assert shop.call("poll", *flags) == 75 and shop.call("poll", *flags) == 0
    assert shop.rejects() == {"004": "server error 500"}


# -- answers of another model


def test_another_model_is_asked_again_only_on_demand_and_tells_the_cost_first(shop, capsys):
    assert shop.call("run", "--limit", "10") == 0
    assert shop.call("run", "--model", "gpt-6-luna") == 0 and models(shop) == {"gpt-5-nano": 10, "gpt-6-luna": 2}
    first = shop.output.read_bytes()
    shop.server.set_fault("empty@Lamp")  # one row has no answer of the other model
    capsys.readouterr()
    batches = len(shop.server.ledger("batch"))
    assert shop.call("prepare", "--model", "gpt-6-luna", "--ask-again") == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"10 of the rows to ask have an answer of another model: \$[\d.]+ .*for asking gpt-6-luna", printed
    )
    assert len(shop.server.ledger("batch")) == batches and sum(shop.paid().values()) == 12
    assert shop.call("run", "--model", "gpt-6-luna", "--ask-again", "--max-cost", "0.0001") == 1
    assert sum(shop.paid().values()) == 12
    while shop.call("poll", "--model", "gpt-6-luna", "--pilot", "0") == 75:  # without the flag it goes on
        pass
    assert models(shop) == {"gpt-5-nano": 1, "gpt-6-luna": 11}, "a sound answer is never lost"
    assert shop.output.read_bytes() == first and not shop.rejects()
    paid = shop.paid()
    assert shop.call("run", "--model", "gpt-6-luna") == 0 and shop.paid() == paid
    assert shop.call() == 0 and shop.paid() == paid and models(shop) == {"gpt-5-nano": 1, "gpt-6-luna": 11}


def test_models_named_in_turn_in_the_middle_of_the_work_buy_no_row_twice(shop):
    flags = ("--max-requests-per-file", "3", "--pilot", "0", "--max-concurrent-batches", "3")
    shop.server.steps = 3
    names = ("gpt-5-nano", "gpt-6-luna", "qwen2.5-vl")
    codes = [shop.call("poll", *flags, "--model", names[i % 3]) for i in range(12)]
    assert codes[-1] == 0 and len(shop.paid()) == sum(shop.paid().values()) == 12
    shop.check_answers()


def test_a_row_that_another_model_refused_stays_rejected_until_it_is_asked_again(shop, capsys):
    shop.server.set_fault("refusal@Lamp")
    assert shop.call("run", "--max-failed", "0.2") == 0 and "run --retry-failed" in capsys.readouterr().out
    assert shop.call("run", "--max-failed", "0.2", "--model", "gpt-6-luna") == 0 and shop.rejects() == {
        "004": "refusal"
    }
    shop.server.faults.clear()
    assert shop.call("run", "--model", "gpt-6-luna", "--retry-failed") == 0
    assert models(shop) == {"gpt-5-nano": 11, "gpt-6-luna": 1}


# -- what real accounts and servers bring


def test_rows_that_are_asked_again_are_built_from_todays_settings(shop, capsys):
    sent = []
    original = shop.server.complete
    shop.server.complete = lambda body, fault: (sent.append(body), original(body, fault))[1]
    shop.server.set_fault("reasons:300")
    flags = ("--pilot", "0", "--max-attempts", "1", "--reasoning-effort", "low")
    assert shop.call("run", *flags, "--max-completion-tokens", "200") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "12 of 12 rows were rejected" in error and "`run --retry-failed`" in error
    sent.clear()
    assert shop.call("run", *flags, "--max-completion-tokens", "900", "--retry-failed") == 0
    assert {body["max_completion_tokens"] for body in sent} == {900} and len(shop.cleaned()) == 12


@pytest.mark.parametrize("flag", ["--max-batch-file-size", "--max-requests-per-file"])
def test_a_file_that_is_too_large_follows_todays_settings(shop, flag, capsys):
    assert shop.call("prepare", "--pilot", "0") == 0
    size = (shop.workspace / "requests/000001.jsonl").stat().st_size
    shop.server.set_fault(f"upload_limit:{size // 2}")
    assert shop.call("run", "--pilot", "0") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "000001.jsonl" in error and "413" in error and "--max-batch-file-size" in error
    less = {"--max-batch-file-size": str(size // 2), "--max-requests-per-file": "4"}[flag]
    assert shop.call("run", "--pilot", "0", flag, less) == 0
    assert set(shop.paid().values()) == {1} and len(shop.server.ledger("batch")) >= 3


def test_server_errors_say_nothing_about_the_pilot(shop, capsys):
    """14 of the pilot's 50 rows meet a busy server."""
    shop.rows = [shop.product(i) for i in range(80)]
    shop.write()
    for fault in ("http_429@Desk:1", "http_500@Lamp:2", "http_500@Bed"):
        shop.server.set_fault(fault)
    assert shop.call("run", "--pilot", "50", "--max-failed", "0.2") == 0
    assert "unsound" not in capsys.readouterr().out and set(shop.rejects().values()) == {"server error 500"}
    assert len(shop.cleaned()) == 72


def test_each_call_after_an_unsound_pilot_gets_further(shop, capsys):
    """A tenth of all rows never brings a sound answer: the next pilots are judged with what the first have by now."""
    shop.rows = [shop.product(i) for i in range(60)]
    shop.write()
    shop.server.set_fault("missing_field@Desk"), shop.server.set_fault("wrong_type@Bed:1")
    flags, settled = ("--pilot", "10", "--max-failed", "0.2"), []
    for _ in range(30):
        code = shop.call("run", *flags)
        settled.append(re.findall(r"cleaned (\d+) \+ rejected (\d+)", capsys.readouterr().out)[-1])
        if code == 0:
            break
    assert code == 0 and len(shop.cleaned()) == 54
    progress = [sum(map(int, pair)) for pair in settled]
    assert progress == sorted(progress) and len(settled) < 12, settled


@pytest.mark.parametrize("fault", ["fence", "think", "reasoning", "parts"])
@pytest.mark.parametrize("sync", [True, False])
def test_the_object_is_found_wherever_a_server_puts_it(shop, fault, sync):
    shop.server.set_fault(f"{fault}@chair"), shop.server.set_fault(f"{fault}@oak")
    assert shop.call("run", *(["--sync"] if sync else [])) == 0
    assert len(shop.cleaned()) == 12 and set(shop.paid().values()) == {1}
    shop.check_answers()


FIELDS_TEXT = json.dumps(dict.fromkeys(clean.FIELDS, "oak"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (FIELDS_TEXT, ""), (f"```json\n{FIELDS_TEXT}\n```", ""), (f"{{}} and {{x}} {FIELDS_TEXT} {{}}", ""),
        (json.dumps(FIELDS_TEXT), ""), (f"[{FIELDS_TEXT}]", ""),
        (f'{{"product": {FIELDS_TEXT}}}', ""), ('{"color": "red"}', "missing field"),
        (FIELDS_TEXT.replace('"oak"', '"oak\n"', 1), ""),
        (f"<think>{{</think>{FIELDS_TEXT}", ""), ("no object", "broken JSON"), (FIELDS_TEXT[:-3], "broken JSON"),
        ("```json\n{}\n```", "missing field"), ("{" * 100_000, "broken JSON"), ('{"a":' * 100_000, "broken JSON"),
        ("7", "broken JSON"), (FIELDS_TEXT.replace("oak", "o\\u0000e9k", 1), "control character"),
        (FIELDS_TEXT.replace("oak", "o\\u009fk", 1), "control character"), ("\0{", "broken JSON"),
        (FIELDS_TEXT.replace("oak", "o\\u000bk", 1), ""),
    ],
)  # fmt: skip
def test_reading_the_fields_of_an_answer(content, reason):
    choice = {"finish_reason": "stop", "message": {"content": content}}
    outcome = clean.read_answer({"choices": [choice]})
    assert outcome.reason == reason and (outcome.kind == "ok") == (not reason)
    assert not re.search(r"[\0-\x1f\x7f-\x9f]", outcome.detail + "".join((outcome.fields or {}).values()))


def test_a_control_character_reaches_no_output_and_is_asked_again(shop):
    shop.server.set_fault("control@Chair:1"), shop.server.set_fault("control@Desk")
    assert shop.call("run", "--pilot", "0", "--max-failed", "0.2") == 0
    assert shop.rejects() == {"007": "control character"} and len(shop.cleaned()) == 11
    for path in shop.folder.glob("cleaned.csv*"):
        assert not re.search(rb"[\0-\x08\x0e-\x1f]|\\u00[01]", path.read_bytes().replace(rb"\\x00", b"")), path


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ALL_PROXY", "socks5://user:secret@127.0.0.1:9", "socksio"),
        ("HTTPS_PROXY", "ftp://127.0.0.1:9", "unset it"),
        ("http_proxy", "http://user:secret@127.0.0.1:9", "refused"),
        ("SSL_CERT_FILE", "/nowhere/ca.pem", "No such file"),
        ("SSL_CERT_FILE", __file__, "NO_CERTIFICATE"),
    ],
)
def test_surroundings_that_are_wrong_are_one_line_with_the_variable(shop, name, value, words, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://api.example/v1")
    assert shop.call() == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{name}={value.replace('user:secret@', '')}" in error and words in error and "secret" not in error


@pytest.mark.parametrize("model", ["auto", "gpt-5-nano"])
def test_an_address_without_v1_is_told_so(shop, model, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", shop.server.url.removesuffix("/v1"))
    for flags in ((), ("--sync",)):
        assert shop.call("run", "--model", model, *flags) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"OPENAI_BASE_URL {shop.server.url.removesuffix('/v1')}" in error and f"to {shop.server.url}" in error


def test_a_short_key_hides_no_ordinary_words(monkeypatch):
    for key in ("e", "none", "model"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert clean.short_text("the model accepts none, low") == "the model accepts none, low"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert KEY not in clean.short_text(f"refused: {KEY}.")


# -- without the Batch API


def test_sync_asks_the_same_one_by_one(shop, capsys):
    shop.server.set_fault("refusal@desk:1")
    shop.server.set_fault("wrong_type@lamp")
    shop.server.set_fault("server_error:3")
    assert shop.call("run", "--sync", "--max-failed", "0.2", "--pilot", "0") == 0
    assert shop.rejects() == {"004": "wrong type"} and len(shop.cleaned()) == 11
    assert not shop.server.ledger("batch") and sum(shop.paid().values()) == 12 + 1 + 2
    shop.check_answers()
    assert shop.call("run", "--sync", "--max-failed", "0.2") == 0 and sum(shop.paid().values()) == 15
    assert "input 12 = cleaned 11 + rejected 1 + pending 0" in capsys.readouterr().out


def test_sync_and_batch_share_the_store(shop):
    assert shop.call("run", "--sync", "--limit", "5") == 0 and len(shop.cleaned()) == 5
    report = shop.folder / "cleaned.csv.report.json"
    paid = json.loads(report.read_text())["cost"]
    assert shop.call("run") == 0 and sum(shop.paid().values()) == 12
    cost = json.loads(report.read_text())["cost"]  # the first five at twice the price of a batch
    twice, once = ([c[n] * price for n, price in (("prompt_tokens", 0.025), ("output_tokens", 0.2))]
                   for c in (paid, {n: cost[n] - paid[n] for n in cost}))  # fmt: skip
    assert cost["usd"] == pytest.approx((2 * sum(twice) + sum(once)) / 1e6, abs=2e-6)


def test_sync_counts_only_what_is_to_come_against_the_limit(shop, capsys):
    shop.rows = [shop.product(i) for i in range(80)]
    shop.write()
    shop.call("prepare")
    assert shop.call("run", "--sync", "--pilot", "0", "--max-cost", "0.003") == 1
    assert "--max-cost" in capsys.readouterr().err and not shop.paid()
    high = 0.008  # a little above the estimate for all 80 rows
    assert shop.call("run", "--sync", "--pilot", "0", "--max-cost", str(high)) == 0 and len(shop.cleaned()) == 80
    shop.call("status")
    assert "to come $0.0000 by the usage so far" in capsys.readouterr().out


def test_sync_keeps_what_was_answered_when_the_key_is_refused_under_way(shop, monkeypatch):
    true, count = StandIn.chat, itertools.count()

    def chat_then_refuse(self, data):
        if next(count) == 3:
            self.set_fault("unauthorized")
        return true(self, data)

    monkeypatch.setattr(StandIn, "chat", chat_then_refuse)
    assert shop.call("run", "--sync", "--pilot", "0", "--concurrency", "2") == 1
    answered = len(shop.paid())
    assert answered >= 4
    shop.server.faults.clear()
    assert shop.call("run", "--sync", "--pilot", "0") == 0 and sum(shop.paid().values()) == 12


def test_sync_killed_asks_again_only_what_was_in_flight(shop):
    command = [sys.executable, str(ROOT / "1_clean.py"), *shop.arguments("run", "--sync", "--pilot", "0")]
    for at in (2, 5):
        seen = itertools.count(1)
        child = subprocess.Popen([*command, "--concurrency", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shop.server.watch = lambda method, path, seen=seen, child=child, at=at: next(seen) >= at and child.kill()
        assert child.wait(timeout=60) == -signal.SIGKILL
    shop.server.watch = None
    assert shop.call("run", "--sync", "--pilot", "0") == 0 and len(shop.cleaned()) == 12
    assert sum(shop.paid().values()) <= 12 + 2 * 2
    shop.check_answers()


# -- pictures and rows


def test_bad_rows_are_rejected_with_their_reason_and_not_sent(shop, capsys):
    images = shop.folder / "images"
    (images / "empty.jpg").write_bytes(b"")
    (images / "page.jpg").write_bytes(b"<html>not found</html>")
    (images / "cut.jpg").write_bytes(photo("red", 7, 400)[:900])
    bad = [("", "p0.jpg", "missing id"), ("000", "p0.jpg", "duplicate id"), ("a", "gone.jpg", "missing file"),
           ("b", "empty.jpg", "empty file"), ("c", "page.jpg", "not an image"), ("d", "cut.jpg", "truncated image"),
           ("e", "../../x.jpg", "outside the images folder"), ("f", "", "missing image_path")]  # fmt: skip
    for id, name, _ in bad:
        path = f"images/{name}" if name else ""
        shop.rows.insert(3, {"id": id, "name": "Chair", "image_path": path, "price": ""})
    shop.write()
    assert shop.call("run", "--max-failed", "0.5") == 0
    lines = [json.loads(line) for line in (shop.folder / "cleaned.csv.rejects.jsonl").read_text().splitlines()]
    assert sorted((line["id"], line["reason"]) for line in lines if line["id"] != "000") == sorted(
        (id, reason) for id, _, reason in bad if id != "000"
    )
    assert "input 20 = cleaned 12 + rejected 8 + pending 0" in capsys.readouterr().out
    assert sum(shop.paid().values()) == 12


def test_any_id_keeps_its_own_answer(shop):
    ids = ["a.b.c", "a/b", "Öl–中", "007", "7", " spaced ", "x" * 300, "=1+1", "a,b", 'q"q', "new\nline", "🪑"]
    shop.rows = [row | {"id": id} for row, id in zip(shop.rows, ids, strict=True)]
    shop.write()
    shop.server.set_fault("shuffle"), shop.server.set_fault("duplicate")
    assert shop.call() == 0
    assert [row["id"] for row in shop.cleaned()] == ids
    shop.check_answers()


def formats() -> dict[str, bytes]:
    """One picture in several shapes, 300 x 200 with its left half red."""
    image = Image.new("RGB", (300, 200), "white")
    image.paste((220, 20, 20), (0, 0, 150, 200))
    made = {}
    for name, options in {
        "plain": {}, "progressive": {"progressive": True}, "rotated": {"exif": turned()}, "heavy": {"quality": 100},
    }.items():  # fmt: skip
        buffer = io.BytesIO()
        picture = Image.effect_noise((300, 200), 90).convert("RGB") if name == "heavy" else image
        picture.save(buffer, "JPEG", **options)
        made[name] = buffer.getvalue()
    for name, mode in (("grey", "L"), ("cmyk", "CMYK")):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, "JPEG")
        made[name] = buffer.getvalue()
    return made


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("name", formats())
def test_a_photo_is_sent_as_it_is_only_where_that_is_right(name):
    data = formats()[name]
    ready = clean.ready_jpeg(data, 512)
    assert bool(ready) == (name in ("plain", "progressive"))
    jpeg, width, height = clean.photo_jpeg(data, 512)
    shown, true = Image.open(io.BytesIO(jpeg)), common.load_image(data)
    assert shown.size == true.size == (width, height) and shown.format == "JPEG"
    difference = sum(
        abs(a - b)
        for a, b in zip(shown.convert("RGB").resize((8, 8)).tobytes(), true.resize((8, 8)).tobytes(), strict=False)
    )
    assert difference / 192 < 4
    for cut in (10, 200, len(data) // 2, len(data) - 1):
        assert clean.ready_jpeg(data[:cut], 512) is None
    assert clean.ready_jpeg(data, 200) is None and max(clean.photo_jpeg(data, 100)[1:]) == 100


def test_metadata_is_not_sent():
    exif, image = Image.Exif(), Image.new("RGB", (300, 200), "green")
    exif[0x010E] = "taken at home"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for named in ({"exif": exif}, {"comment": b"private"}, {"icc_profile": profile}, {"xmp": b"<x>taken at home</x>"}):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", **named)
        assert clean.ready_jpeg(buffer.getvalue(), 512) is None
        jpeg, *_ = clean.photo_jpeg(buffer.getvalue(), 512)
        assert b"taken at home" not in jpeg and b"private" not in jpeg and profile not in jpeg
        shown = Image.open(io.BytesIO(jpeg))
        assert {name for name, _ in shown.applist} <= {"APP0"} and shown.getpixel((9, 9)) == (0, 128, 1)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"a"', '{"clean_title": 1}', "x" * 99])
def test_no_answer_body_raises(content):
    bodies = [None, [], {}, {"choices": None}, {"choices": [{}]}, {"choices": [{"message": 3}]}]
    bodies += [{"choices": [{"finish_reason": "stop", "message": {"content": content}}], "usage": "x"}]
    for body in bodies:
        outcome = clean.read_answer(body)
        assert outcome.kind == "again" and outcome.reason
        assert clean.read_result({"response": {"status_code": 200, "body": body}}).reason == outcome.reason
    assert clean.read_result({}).reason == "no result" and clean.read_result({"response": 3, "error": "x"}).reason


# -- secrets, status, scale


def test_neither_key_nor_image_reaches_log_state_or_error(shop, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_LOG", "debug")
    images = [base64.b64encode((shop.folder / row["image_path"]).read_bytes())[200:260] for row in shop.rows]
    shop.server.set_fault("echo")
    for fault in ("server_error:2", "rate_limit:2:0", "http_400@lamp"):
        shop.server.set_fault(fault)
    shop.call("run", "--sync", "--max-failed", "1")
    shop.call("run", "--max-failed", "1")
    for fault in ("unauthorized", "forbidden"):
        shop.server.set_fault(fault)
        shop.rows[0]["name"] += fault
        shop.write()
        shop.call(), shop.call("run", "--sync"), shop.call("status")
        del shop.server.faults[fault]
    captured = capsys.readouterr()
    held = [captured.out.encode(), captured.err.encode()]
    held += [path.read_bytes() for path in shop.workspace.iterdir() if path.is_file()]
    held += [path.read_bytes() for path in shop.folder.glob("cleaned.csv*")]
    for text in held:
        assert KEY.encode() not in text and not any(image in text for image in images)


def test_status_is_a_table(shop, capsys):
    assert shop.call("status") == 1 and "nothing prepared" in capsys.readouterr().err
    shop.server.steps = 3
    flags = ("--max-requests-per-file", "4", "--pilot", "0")
    shop.call("poll", *flags), shop.call("poll", *flags)
    capsys.readouterr()
    assert shop.call("status", *flags) == 0
    printed = capsys.readouterr().out
    assert "In Progress; input 12 = cleaned 0 + rejected 0 + pending 12" in printed
    assert printed.count("waiting") == 2 and "in_progress" in printed and "$" in printed
    shop.call("run", *flags), capsys.readouterr()
    assert shop.call("status") == 0 and "Finalized; input 12 = cleaned 12" in capsys.readouterr().out


def test_status_does_not_wait_for_a_running_call(shop, capsys):
    shop.server.steps = 3
    shop.call("poll")
    with common.exclusive(shop.workspace / "lock") as mine:
        assert mine and shop.call("status") == 0 and "pending 12" in capsys.readouterr().out


def test_polling_on_after_the_end_leaves_the_output_alone(shop, capsys):
    assert shop.call() == 0
    times = {path: path.stat().st_mtime_ns for path in shop.folder.glob("cleaned.csv*")}
    calls = len(shop.server.calls)
    assert shop.call("poll") == 0 and "nothing to do here" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in times} == times and len(shop.server.calls) == calls
    shop.output.unlink()
    assert shop.call("poll") == 0 and shop.output.exists()
    (shop.folder / "images/p3.jpg").write_bytes(photo("green", 4095))
    assert shop.call("prepare") == 0 and shop.state()["state"] == "Prepared"
    while shop.call("poll") == 75:
        pass
    assert shop.cleaned()[3]["color"] == "green"


def test_a_catalogue_edited_while_run_waits(shop, capsys):
    def edit(method, path):
        if path.endswith("/content"):
            shop.rows = shop.rows[:-1]
            shop.write()

    shop.server.watch = edit
    assert shop.call() == 1 and "changed while the command ran; run it again" in capsys.readouterr().err
    shop.server.watch = None
    assert shop.call() == 0 and len(shop.cleaned()) == 11 and set(shop.paid().values()) == {1}


def test_a_catalogue_edited_while_photos_are_looked_at_is_noticed(shop, monkeypatch, capsys):
    true = common.photo_pool

    def pool_after_an_edit(*arguments):
        shop.rows.append(shop.product(12))
        shop.write()
        return true(*arguments)

    for command in ("run", "prepare"):
        shop.rows, shop.workspace = shop.rows[:12], shop.folder / command
        shop.write()
        with monkeypatch.context() as patch:
            patch.setattr(common, "photo_pool", pool_after_an_edit)
            assert shop.call(command) == (command == "run")
        assert command == "prepare" or "changed while the command ran; run it again" in capsys.readouterr().err
        while (code := shop.call("poll")) == 75:
            pass
        assert code == 0 and len(shop.cleaned()) == 13


def test_the_shops_own_attributes_are_kept(shop, capsys):
    shop.rows = [row | {"color": "Arctic", "material": "oak", "shop_color": "x"} for row in shop.rows]
    shop.write()
    assert shop.call() == 0
    printed = capsys.readouterr().out
    assert "color, material kept as shop_color, shop_material" in printed
    row = shop.cleaned()[1]
    assert (row["shop_color"], row["shop_color_2"], row["shop_material"]) == ("Arctic", "x", "oak")
    assert row["color"] == "red" and row["style"]
    shop.check_answers()
    shop.catalogue, first = shop.output, row
    shop.output = shop.folder / "again.csv"
    shop.workspace = shop.folder / "other"
    assert shop.call() == 0 and shop.cleaned()[1] == first  # an earlier output: its attributes are replaced
    assert "kept as" not in capsys.readouterr().out
    shop.output.write_text(shop.output.read_text().replace(",object_type", ",kind", 1))
    shop.catalogue, shop.output = shop.output, shop.folder / "newer.csv"
    assert shop.call() == 0 and shop.cleaned()[1]["color"] == first["color"]  # of a version with fewer attributes
    assert "kept as" not in capsys.readouterr().out


def test_request_files_that_somebody_removed_are_built_anew(shop, capsys):
    shop.server.steps = 2
    shop.server.set_fault("length@chair:1")
    flags = ("--max-requests-per-file", "6", "--pilot", "0", "--max-concurrent-batches", "1")
    assert shop.call("poll", *flags) == 75
    for path in (shop.workspace / "requests").glob("*.jsonl"):
        path.unlink()
    codes = [shop.call("poll", *flags) for _ in range(8)]
    assert codes[-1] == 0 and len(shop.cleaned()) == 12
    assert sum(shop.paid().values()) == 14  # two answers were cut off
    shop.check_answers()


def test_request_files_stay_below_their_limits(shop):
    shop.rows = [shop.product(i) for i in range(40)]
    shop.write()
    assert shop.call("prepare") == 0
    whole = (shop.workspace / "requests/000001.jsonl").read_bytes()
    shop.workspace = shop.folder / "other"
    limit = 3 * max(map(len, whole.splitlines(keepends=True))) + 2
    assert shop.call("prepare", "--pilot", "0", "--max-batch-file-size", str(limit)) == 0
    parts = [path.read_bytes() for path in sorted((shop.workspace / "requests").glob("*.jsonl"))]
    assert len(parts) == 14 and max(map(len, parts)) < limit and b"".join(parts) == whole
    config = clean.CleaningConfig()
    assert (config.max_batch_file_size, config.max_requests_per_file) == (90_000_000, 49_000)


def test_finalize_waits_for_the_last_row(shop, capsys):
    shop.server.steps = 2
    assert shop.call("dispatch") == 75 and shop.call("finalize") == 75 and not shop.output.exists()
    while shop.call("poll") == 75:
        pass
    assert shop.call("finalize") == 0 and len(shop.cleaned()) == 12


def test_memory_is_at_most_2_kb_a_row(tmp_path):
    """Peak memory of `prepare`, parent and workers, and of `finalize`: 20,000 rows against 2,000."""
    (tmp_path / "p.jpg").write_bytes(photo("red", 1, 32))

    def peak(*command: object) -> list[int]:
        child = subprocess.Popen([sys.executable, ROOT / "1_clean.py", *map(str, command)], stdout=subprocess.DEVNULL)
        highest: dict[int, int] = {}
        while child.poll() is None:
            for pid in [child.pid, *descendants(child.pid)]:
                with contextlib.suppress(OSError, StopIteration):
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                    highest[pid] = int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
            time.sleep(0.05)
        assert child.returncode == 0
        parent = highest.pop(child.pid)
        return [parent, *sorted(highest.values())[-2:]]

    def peaks(count: int) -> list[int]:
        catalogue, workspace = tmp_path / f"{count}.csv", tmp_path / f"batch{count}"
        catalogue.write_text("id,name,image_path\n" + "".join(f"{i},Chair {i},p.jpg\n" for i in range(count)))
        places = ["--input", catalogue, "--workspace", workspace, "--output", tmp_path / f"{count}.cleaned.csv"]
        found = peak("prepare", *places, "--workers", "2")
        fields = dict.fromkeys(clean.FIELDS, "oak")
        (workspace / "raw").mkdir()
        with open(workspace / "raw/batch_1.output.jsonl", "w") as raw:
            for path in (workspace / "requests").glob("*.jsonl"):
                for number, line in enumerate(open(path)):
                    content = json.dumps(fields | {"clean_title": f"Oak chair {number}"})
                    message = {"role": "assistant", "content": content, "refusal": None}
                    body = {"model": "gpt-5-nano", "choices": [{"finish_reason": "stop", "message": message}],
                            "usage": {"prompt_tokens": 600, "completion_tokens": 40}}  # fmt: skip
                    answer = {
                        "custom_id": json.loads(line)["custom_id"],
                        "response": {"status_code": 200, "body": body},
                    }
                    raw.write(json.dumps(answer) + "\n")
        return found + peak("finalize", *places)

    small, large = peaks(2_000), peaks(20_000)
    assert len(small) == len(large) == 4
    assert all((b - a) * 1024 <= 2048 * 18_000 for a, b in zip(small, large, strict=True)), (small, large)


def descendants(pid: int) -> list[int]:
    """Processes below a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


@pytest.mark.parametrize("flag", ["--concurrency 0", "--limit -1", "--max-requests-per-file 60000", "--max-cost nan"])
def test_a_setting_out_of_bounds_is_one_line(shop, flag, capsys):
    assert shop.call("run", *flag.split()) == 2
    error = capsys.readouterr().err
    assert flag in error and "must be " in error and len(error.splitlines()) == 1 and not shop.server.calls


def test_bad_use_is_one_line(shop, capsys):
    shop.catalogue.write_text("id,title\n1,a\n")
    assert shop.call() == 2 and "no column image_path" in capsys.readouterr().err
    shop.catalogue.write_text("id,name,image_path\n")
    assert shop.call() == 1 and "no rows" in capsys.readouterr().err
    shop.catalogue.unlink()
    assert shop.call() == 2 and "no such CSV" in capsys.readouterr().err
    shop.write()
    kept = shop.catalogue.read_bytes()
    shop.output = shop.folder / "images" / ".." / shop.catalogue.name
    assert shop.call() == 2 and "--output" in capsys.readouterr().err and shop.catalogue.read_bytes() == kept


def test_a_workspace_may_be_the_folder_itself(shop, monkeypatch):
    (shop.folder / "here").mkdir()
    monkeypatch.chdir(shop.folder / "here")
    shop.workspace = Path(".")
    assert shop.call() == 0 and len(shop.cleaned()) == 12 and (shop.folder / "here/state.json").exists()


@pytest.mark.parametrize("command", [("prepare",), ("run", "--sync")])
def test_without_quota_before_the_first_step_the_quota_is_named(shop, command, capsys):
    shop.server.set_fault("quota_everywhere")
    assert shop.call(*command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the account may spend no more (insufficient_quota: " in error and "OPENAI_BASE_URL" not in error


def test_a_doubtful_create_is_not_called_nothing_sent(shop, monkeypatch, capsys):
    shop.server.set_fault("create_lost:1"), shop.server.set_fault("list_late:1")
    assert shop.call("dispatch") == 75
    monkeypatch.setattr(clean, "SETTLE", 30.0)
    Clock(monkeypatch)
    capsys.readouterr()
    assert shop.call("run", "--sync") == 1
    captured = capsys.readouterr()
    assert "may have been created" in captured.out and "OPENAI_BASE_URL" not in captured.out
    assert "in flight" in captured.err.splitlines()[-1] and not shop.paid()


def test_a_list_of_models_without_models_is_one_line(shop, monkeypatch, capsys):
    monkeypatch.setattr(StandIn, "models", lambda self, rest: {"object": "list", "data": None})
    true = StandIn.handle

    def no_single_model(self, method, path, *rest):
        if "/models/" in path:
            raise HttpError(404, "no such route")
        return true(self, method, path, *rest)

    monkeypatch.setattr(StandIn, "handle", no_single_model)
    assert shop.call("run", "--model", "m") == 1
    assert "an answer that is not the API's" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("lost", ["", "state.json"])
def test_a_batch_without_its_date_does_no_harm(shop, lost, monkeypatch, capsys):
    true = StandIn.public

    def undated(self, value):
        value = true(self, value)
        return value | {"created_at": None, "expires_at": None} if value.get("object") == "batch" else value

    monkeypatch.setattr(StandIn, "public", undated)
    shop.server.steps = 3
    assert shop.call("poll") == 75
    shop.lose(*lost.split())
    assert shop.call("poll") == (1 if lost else 75)
    assert not lost or "the list of batches brought an answer that is not the API's" in capsys.readouterr().err
    monkeypatch.setattr(StandIn, "public", true)
    assert shop.call("run") == 0 and set(shop.paid().values()) == {1}


def test_a_request_file_is_read_once_for_all_batches_in_flight(shop, monkeypatch):
    true, read = common.file_digest, collections.Counter()
    shop.rows = [shop.product(i) for i in range(20)]
    shop.write()

    def counted(path):
        read[Path(path).name] += 1
        return true(path)

    monkeypatch.setattr(common, "file_digest", counted)
    shop.server.steps = 5
    flags = ("--pilot", "0", "--max-requests-per-file", "1", "--max-concurrent-batches", "20")
    assert shop.call("dispatch", *flags) == 75 and len(shop.server.ledger("batch")) == 20
    assert max(n for name, n in read.items() if name.endswith(".jsonl")) == 1


def test_the_standin_labels_the_sample_well(tmp_path):
    """Models are tuned on these labels, so they must be near the truth about the drawn pictures."""
    import sample

    hits = collections.Counter()
    for item in itertools.islice((item for item in sample.products(60) if not item.damage and not item.twin), 40):
        buffer = io.BytesIO()
        sample.draw(item, 42, 160).save(buffer, "JPEG")
        fields = answer(sample.noisy_name(item, 42).strip(), buffer.getvalue())
        hits.update(name for name in clean.FIELDS[1:] if fields[name] == getattr(item, name))
        assert fields["clean_title"] and not re.search(r"[$]|SKU|SHIPPING|Set of|\bcm\b", fields["clean_title"], re.I)
    assert hits["object_type"] == 40 and hits["color"] >= 32 and hits["style"] >= 30 and hits["material"] >= 30, hits


def test_the_wrapper_starts_the_standin_and_hands_on_the_exit_code(shop):
    command = [sys.executable, str(ROOT / "tests/openai_standin.py"), "--state", str(shop.folder / "other")]
    command += ["--fault", "http_400@lamp", "--", sys.executable, str(ROOT / "1_clean.py"), *shop.arguments("run")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "rejected 1: request refused" in ended.stdout
    assert len(shop.cleaned()) == 11 and not shop.server.calls
