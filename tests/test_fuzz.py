"""Broken input by the thousand: never a traceback, never a hang, never a lost row.

`make test` runs two dozen cases of each kind, `make fuzz` (FUZZ_EXAMPLES=1500 for each) more than 10,000.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import dataclasses
import importlib
import io
import json
import os
import re
import shutil
import tarfile
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import arena_world
import common
import tiny

clean, prepare, train, embed = map(importlib.import_module, ("1_clean", "2_prepare", "3_train", "4_embed"))
ROOT = Path(__file__).parents[1]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))


def fuzz_with(examples: int) -> settings:
    """Settings of a test with so many cases; the same ones each time."""
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=slow)


fuzz, heavy = fuzz_with(EXAMPLES), fuzz_with(max(10, EXAMPLES // 5))


def damaged(draw, whole: bytes) -> bytes:
    """A valid file after a cut, a few flipped bytes, or a block overwritten with noise."""
    data = bytearray(whole)
    kind = draw(st.sampled_from(["cut", "flip", "noise"]))
    if kind == "cut":
        return bytes(data[: draw(st.integers(0, len(data)))])
    for _ in range(draw(st.integers(1, 8)) if kind == "flip" else 1):
        at = draw(st.integers(0, len(data) - 1))
        noise = draw(st.binary(min_size=1, max_size=1 if kind == "flip" else 64))
        data[at : at + len(noise)] = noise
    return bytes(data)


# CSV -----------------------------------------------------------------------------------------------------------------

CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0")
CELL = st.text(CHARACTERS, max_size=30)


@fuzz
@given(rows=st.lists(st.lists(CELL, min_size=3, max_size=4), max_size=20), delimiter=st.sampled_from(",;\t|"))
def test_no_row_of_a_csv_is_lost(tmp_path, rows, delimiter):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["id", "name", "image_path", "more"])
    writer.writerows(rows)
    path = tmp_path / "c.csv"
    path.write_bytes(text.getvalue().encode())
    read, reasons = clean.read_feeds([path])
    assert len(read) == len(reasons) == len(rows)
    assert read["id"].tolist() == [row[0] for row in rows]
    assert read.loc[reasons == "", "id"].is_unique


@fuzz
@given(data=st.data())
def test_any_bytes_as_csv_are_rows_or_one_line(tmp_path, data):
    head = data.draw(
        st.sampled_from([b"", b"id,name,image_path\n", b"\xff\xfei\0d\0", b"\xef\xbb\xbfid;name;image_path\n"])
    )
    path = tmp_path / "c.csv"
    path.write_bytes(head + data.draw(st.binary(max_size=400)))
    try:
        rows, reasons = clean.read_feeds([path])
        for id, image_path, reason in zip(rows["id"], rows["image_path"], reasons, strict=True):
            assert reason or (id.strip() and image_path.strip())
    except common.Fail as error:
        assert "c.csv" in str(error)


# Images --------------------------------------------------------------------------------------------------------------


def pictures() -> list[bytes]:
    """One small valid file of each format."""
    from PIL import Image

    made = []
    gradient = Image.linear_gradient("L").resize((40, 30))
    kinds = "RGB JPEG, CMYK JPEG, RGBA PNG, P GIF, RGB WEBP, RGB BMP, L TIFF, I;16 PNG"
    for mode, kind in (pair.split() for pair in kinds.split(", ")):
        out = io.BytesIO()
        gradient.convert(mode).save(out, kind)
        made.append(out.getvalue())
    return made


PICTURES = pictures()


@fuzz
@given(data=st.data())
def test_any_bytes_as_picture_are_one_or_a_reason(data):
    whole = data.draw(st.sampled_from(PICTURES))
    content = data.draw(st.one_of(st.just(damaged(data.draw, whole)), st.binary(max_size=200)))
    try:
        image = common.load_image(content, data.draw(st.sampled_from([None, 16])))
        assert image.mode == "RGB" and min(image.size) > 0
    except common.BadImage as error:
        assert error.reason in {"empty file", "not an image", "truncated image", "broken image", "image too large",
                                "image too small", "unsupported image"}  # fmt: skip


@fuzz
@given(name=st.text(max_size=60))
def test_no_image_path_leaves_the_folder(tmp_path, name):
    try:
        assert common.resolve_image(tmp_path.resolve(), name).is_relative_to(tmp_path.resolve())
    except common.BadImage as error:
        assert error.reason in {"missing file", "outside the images folder"}


# Shards --------------------------------------------------------------------------------------------------------------


def small_shard() -> bytes:
    """Two samples of three members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in (
            "000000000.jpg",
            "000000000.json",
            "000000000.txt",
            "000000001.jpg",
            "000000001.json",
            "000000001.txt",
        ):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    return out.getvalue()


SHARD = small_shard()


@fuzz
@given(data=st.data())
def test_any_bytes_as_shard_are_samples_or_one_line(tmp_path, data):
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(damaged(data.draw, SHARD))
    try:
        for members in train.index_shard(path):
            assert all(offset >= 0 and size >= 0 for offset, size in members.values())
    except common.Fail as error:
        assert "shard-000000.tar" in str(error)


@fuzz
@given(
    content=st.one_of(
        st.binary(max_size=100), st.builds(lambda v: json.dumps(v).encode(), st.dictionaries(st.text(), st.integers()))
    )
)
def test_any_bytes_as_manifest_are_one_or_one_line(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    try:
        assert all(shard["name"] for shard in common.load_manifest(tmp_path)["splits"]["train"]["shards"])
    except common.Fail as error:
        assert "manifest" in str(error)


# The arena -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(master.parquet, an arena's database with votes, a judge on its application)."""
    folder = tmp_path_factory.mktemp("arena")
    master, images = arena_world.make_world(folder, count=60, pictures=False)
    app = arena_world.arena.create_app(arena_world.setup(master, images, folder / "a.sqlite", reveal=True))
    judge = arena_world.Judge(app)
    for choice in "ABTNABT":
        judge.vote(choice)
    app.extensions["arena"].log.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return master, folder / "a.sqlite", judge


@fuzz
@given(data=st.data())
def test_a_damaged_parquet_file_or_log_gets_one_line(world, tmp_path, capsys, data):
    master, database = tmp_path / "m.parquet", tmp_path / "b.sqlite"
    master.write_bytes(damaged(data.draw, world[0].read_bytes()))
    try:
        place = arena_world.arena.Arena(arena_world.setup(master, tmp_path, tmp_path / "a.sqlite"))
        place.trial(place.log.start(place.number, None))
    except common.Fail as error:
        assert "\n" not in str(error)
    for file in (database, tmp_path / "b.sqlite-wal", tmp_path / "b.sqlite-shm"):
        file.unlink(missing_ok=True)
    database.write_bytes(damaged(data.draw, world[1].read_bytes()))
    for command in ("stats", "votes"):
        capsys.readouterr()
        code = arena_world.arena.main([command, "--database", str(database)])
        assert code == 0 or capsys.readouterr().err.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------------
# Stage 1: what the API may send back, and what may have become of the files of the workspace

SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(["\ud800", "0" * 5000])
)
JSON = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner,
                    max_size=3), max_leaves=8)  # fmt: skip
DEEP = "[" * 100_000


def changed(draw, value):
    """A JSON value with something in it replaced, added or gone, as a server of another version might send."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        place, parent = value, None
        while isinstance(place, dict | list) and place and (parent is None or draw(st.booleans())):
            parent = place
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            place = place[key]
        if parent is None:
            return draw(JSON)
        if draw(st.booleans()):
            parent[key] = draw(JSON)
        else:
            del parent[key]
    return value


def result_line(key: str, title: str = "Oak chair") -> dict:
    """A line of a batch's output file."""
    fields = dict.fromkeys(clean.FIELDS, "oak") | {"clean_title": title}
    message = {"role": "assistant", "content": json.dumps(fields), "refusal": None}
    body = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 3}}  # fmt: skip
    return {"id": "r", "custom_id": key, "response": {"status_code": 200, "body": body}, "error": None}


def make_shop(folder: Path, count: int = 6) -> None:
    """A small catalogue with photos; every fourth row is broken."""
    with open(folder / "c.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["id", "name", "image_path"])
        for i in range(count):
            (folder / f"{i}.png").write_bytes(PICTURES[2] if i % 4 else b"")
            writer.writerow([f"p{i}", f"chair {i}", f"{i}.png"])


class FakeAPI:
    """A Batch API whose batches are complete at once: `answers` has the output file of each, None where there is none.

    It takes the place of clean.BatchAPIClient; the batches are the account's, whoever asks.
    """

    reached = True

    def __init__(self, *answers: Callable[[list[str]], bytes]):
        self.answers, self.made, self.uploads = iter(answers), [], []

    def __call__(self, settings) -> FakeAPI:
        return self

    def model(self, name: str) -> dict:
        return {"id": name}

    def upload(self, path: Path) -> str:
        self.uploads.append([json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()])
        return f"file-{len(self.uploads) - 1}"

    def create(self, file_id: str, metadata: dict, route: str) -> types.SimpleNamespace:
        answer = next(self.answers, None)
        content = answer(self.uploads[int(file_id.removeprefix("file-"))]) if answer else None
        batch = types.SimpleNamespace(
            id=f"batch_{len(self.made)}", status="completed", created_at=time.time(), expires_at=None, errors=None,
            metadata=metadata, output_file_id=None if content is None else f"output-{len(self.made)}",
            error_file_id=None, request_counts=types.SimpleNamespace(total=0, completed=0, failed=0), content=content,
        )  # fmt: skip
        self.made.append(batch)
        return batch

    def retrieve(self, id: str) -> types.SimpleNamespace:
        found = [batch for batch in self.made if batch.id == id]
        if not found:
            raise clean.NotFound("no such batch")
        return found[0]

    def batches(self) -> list:
        return self.made[::-1]

    def download(self, file_id: str, path: Path) -> None:
        common.atomic_write(path, self.made[int(file_id.removeprefix("output-"))].content)


def clean_command(folder: Path, command: str, *more: str) -> list[str]:
    """Stage 1 over the shop of a folder."""
    places = f"--input {folder}/c.csv --workspace {folder}/w --output {folder}/cleaned.csv"
    return [command, *places.split(), *"--workers 1 --poll-interval 0 --pilot 0 --max-failed 1".split(), *more]


def sound_answers(keys: list[str]) -> bytes:
    return b"".join(json.dumps(result_line(key)).encode() + b"\n" for key in keys)


def use_api(monkeypatch, *answers) -> FakeAPI:
    api = FakeAPI(*answers)
    monkeypatch.setattr(clean, "BatchAPIClient", api)
    monkeypatch.setattr(clean, "SETTLE", 0.0)
    return api


@heavy
@given(data=st.data())
def test_whatever_a_batch_brings_back_every_row_is_cleaned_or_rejected(tmp_path, monkeypatch, data):
    if not (tmp_path / "c.csv").exists():
        make_shop(tmp_path)
    shutil.rmtree(tmp_path / "w", ignore_errors=True)

    def answers(keys: list[str]) -> bytes:
        lines = [result_line(key) for key in keys if data.draw(st.integers(0, 4))]
        lines = [changed(data.draw, line) if data.draw(st.booleans()) else line for line in lines]
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        if lines and data.draw(st.booleans()):
            content = damaged(data.draw, content) + data.draw(st.sampled_from([b"", b"\n", DEEP.encode() + b"\n"]))
        return content

    api, run = use_api(monkeypatch, answers), clean_command(tmp_path, "run", "--max-attempts", "1")
    if ends_well(clean.main, run) != common.DONE:  # a line that says "quota" uses up no attempt, and stops the run
        assert ends_well(clean.main, run) == common.DONE
    cleaned = check_every_row(tmp_path)
    whole, asked = (tmp_path / "cleaned.csv").read_bytes(), len(api.uploads)
    (tmp_path / "w/plan.parquet").unlink()  # what the raw results hold is read back, and not asked for again
    assert ends_well(clean.main, run) == common.DONE
    assert (tmp_path / "cleaned.csv").read_bytes() == whole and len(api.uploads) == asked
    assert check_every_row(tmp_path) == cleaned


def check_every_row(folder: Path) -> list[str]:
    """Hold cleaned and rejected rows against the shop of make_shop; gives the ids of the cleaned."""
    with open(folder / "cleaned.csv", newline="", encoding="utf-8") as handle:
        cleaned = [row["id"] for row in csv.DictReader(handle)]
    rejected = [json.loads(line) for line in open(folder / "cleaned.csv.rejects.jsonl", encoding="utf-8")]
    assert sorted([*cleaned, *(row["id"] for row in rejected)]) == [f"p{i}" for i in range(6)]
    assert all(row["reason"] for row in rejected)
    return cleaned


@fuzz
@given(data=st.data())
def test_any_state_file_is_one_or_one_line(tmp_path, data):
    run = clean_command(tmp_path, "status")
    if not (tmp_path / "c.csv").exists():
        make_shop(tmp_path)
        assert ends_well(clean.main, clean_command(tmp_path, "prepare")) == common.DONE
        shutil.copyfile(tmp_path / "w/state.json", tmp_path / "whole.json")
    content = damaged(data.draw, (tmp_path / "whole.json").read_bytes())
    if data.draw(st.booleans()):
        content = data.draw(st.sampled_from([json.dumps(data.draw(JSON)).encode(), DEEP.encode()]))
    (tmp_path / "w/state.json").write_bytes(content)
    try:
        clean.StateManager(tmp_path / "w")
    except common.Fail as error:
        assert "state.json: damaged" in str(error) and "remove it and run again" in str(error)
        assert ends_well(clean.main, run) == common.FAILED
    else:
        assert ends_well(clean.main, run) == common.DONE


# --------------------------------------------------------------------------------------------------------------------
# Databases

MESSAGES = re.compile(r"^(\S+\.py|-c): ")  # -c: the tests run side by side


def ends_well(main: Callable, arguments: list[str]) -> int:
    """Run a command line in this process; what fails must fail in one line. Gives the exit code."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = main(arguments)
    assert code in (common.DONE, common.FAILED, common.USAGE, common.UNFINISHED)
    errors = [line for line in said.getvalue().splitlines() if MESSAGES.match(line)]
    assert code in (common.DONE, common.UNFINISHED) or len(errors) == 1, said.getvalue()
    return code


@pytest.fixture(scope="module")
def cleaned_shop(tmp_path_factory) -> tuple[Path, FakeAPI, dict[Path, bytes]]:
    """A shop that stage 1 has cleaned, the API that it asked, and what the files of its workspace hold."""
    folder, api = tmp_path_factory.mktemp("cleaned"), FakeAPI(sound_answers)
    make_shop(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clean, "BatchAPIClient", api)
        assert ends_well(clean.main, clean_command(folder, "run")) == common.DONE
    return folder, api, {path: path.read_bytes() for path in (folder / "w").glob("*.*")}


@fuzz
@given(data=st.data())
def test_a_damaged_file_of_the_workspace_is_one_line_and_nothing_is_asked_twice(cleaned_shop, monkeypatch, data):
    folder, api, whole = cleaned_shop
    monkeypatch.setattr(clean, "BatchAPIClient", api)
    monkeypatch.setattr(clean, "SETTLE", 0.0)
    cleaned = folder / "cleaned.csv"
    for path, content in whole.items():
        path.write_bytes(content)
    name = data.draw(st.sampled_from(["plan.parquet", "workspace.json"]))
    path, before = folder / "w" / name, cleaned.read_bytes()
    path.write_bytes(damaged(data.draw, whole[path]))
    ends_well(clean.main, clean_command(folder, data.draw(st.sampled_from(["status", "prepare", "finalize"]))))
    path.unlink(missing_ok=True)
    assert ends_well(clean.main, clean_command(folder, "run")) == common.DONE
    assert cleaned.read_bytes() == before and len(api.made) == 1


@heavy
@given(data=st.data())
def test_a_damaged_part_costs_a_second_call_at_most(tmp_path, data):
    parts, ending = tmp_path / "shards/.work", data.draw(st.sampled_from(["jpegs", "parquet"]))
    places = f"--input {tmp_path}/c.csv --output {tmp_path}/shards --image-size 16 --workers 1 --max-failed 1".split()
    if not parts.exists():
        make_shop(tmp_path)
        assert ends_well(prepare.main, places) == common.DONE
        for part in parts.glob("*.*"):  # what is made again may be of another length
            shutil.copyfile(part, tmp_path / f"whole{part.suffix}")
    before = common.load_manifest(tmp_path / "shards")["splits"]
    (part,) = parts.glob(f"*.{ending}")
    part.write_bytes(damaged(data.draw, (tmp_path / f"whole.{ending}").read_bytes()))
    if ends_well(prepare.main, places) != common.DONE:
        assert ends_well(prepare.main, places) == common.DONE
    manifest = common.load_manifest(tmp_path / "shards")
    counts = manifest["counts"]
    assert counts["input"] == 6 == counts["written"] + counts["rejected"] and manifest["splits"] == before


# --------------------------------------------------------------------------------------------------------------------
# Cleaned rows through stage 2


@heavy
@given(data=st.data())
def test_no_cleaned_row_is_lost_on_its_way_into_shards(tmp_path, data):
    columns = ["id", "name", "image_path", *clean.FIELDS, "more"]
    names = [f"{i}.png" for i in range(4)]
    for name in names:
        whole = data.draw(st.sampled_from(PICTURES))
        (tmp_path / name).write_bytes(damaged(data.draw, whole) if data.draw(st.booleans()) else whole)
    row = st.tuples(CELL, CELL, st.one_of(st.sampled_from([*names, "", "../x.png"]), CELL), *[CELL] * 6)
    rows = data.draw(st.lists(row, max_size=12))
    with open(tmp_path / "cleaned.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(columns)
        writer.writerows([["sound", "chair", "sound.png", *["oak"] * 6], *rows])
    (tmp_path / "sound.png").write_bytes(PICTURES[2])
    output = tmp_path / "shards"
    places = f"--input {tmp_path}/cleaned.csv --output {output} --image-size 16 --workers 1 --max-failed 1"
    assert ends_well(prepare.main, places.split()) == common.DONE
    manifest = common.load_manifest(output)
    counts = manifest["counts"]
    assert counts["input"] == len(rows) + 1 == counts["written"] + counts["rejected"]
    rejects = [json.loads(line) for line in open(output / "rejects.jsonl", encoding="utf-8")]
    records = []
    for split in common.SPLITS:
        for shard in manifest["splits"][split]["shards"]:
            with tarfile.open(output / shard["name"]) as tar:
                records += [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
    assert sorted([r["id"] for r in records] + [r["id"] for r in rejects]) == sorted(["sound", *(r[0] for r in rows)])
    assert all(reject["reason"] for reject in rejects)


# --------------------------------------------------------------------------------------------------------------------
# Shards and models in stages 3 and 4


def repaired(data: bytes) -> bytes:
    """A tar file with the checksum of every header set right, so that damage in a header gets through."""
    data = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory) -> Path:
    """Shards of 12 samples, a CLIP, and a checkpoint."""
    import torch

    folder = tmp_path_factory.mktemp("tiny")
    tiny.make_shards(folder / "shards", train=4, validation=4, test=4)
    tiny.make_clip(folder / "clip")
    state = dataclasses.asdict(train.State(step=3, best={"weights": {"a": torch.ones(9)}}, lines=["{}\n"]))
    content = {"identity": {"seed": 1}, "micro": 8, "state": state, "weights": {"a": torch.ones(9)},
               "optimizer": {"state": {}, "param_groups": []}, "scaler": {}}  # fmt: skip
    torch.save(content, folder / "checkpoint.pt")
    return folder


@fuzz
@given(data=st.data())
def test_every_sample_of_a_damaged_shard_is_read_or_counted(tiny_world, tmp_path, data):
    folder = tmp_path / "shards"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_world / "shards", folder)
    shutil.rmtree(tmp_path / "vectors", ignore_errors=True)
    path = folder / "train/shard-000000.tar"
    path.write_bytes(damaged(data.draw, path.read_bytes()))
    if data.draw(st.booleans()):
        path.write_bytes(repaired(path.read_bytes()))
    config = train.TrainingConfig(workers=1, max_failed=1.0, augment="advanced")
    manifest = common.load_manifest(folder)
    clip = types.SimpleNamespace(size=32, device=train.torch.device("cpu"))
    try:
        split = train.open_splits(str(folder), manifest, tmp_path / "cache", clip, config)[0]
    except common.Fail as error:  # its members cannot be found
        assert "shard-000000.tar" in str(error) and "run 2_prepare.py again" in str(error)
    else:
        images = train.torch.full((len(split), 3, 32, 32), 7, dtype=train.torch.uint8)
        failed, views = split.load(list(range(len(split))), images, "42 0")
        assert len(views) == len(split)
        for i in range(len(split)):
            assert i in failed or not (images[i] == 7).all()
            try:
                group, (caption,) = split.captions(i, [0])
                assert isinstance(group, str) and isinstance(caption, str)
            except common.BadImage as error:
                failed[i] = str(error)
        split.mark_unreadable(failed)
        assert split.counts() == {"samples": 4, "unreadable": len(failed)}
    shards = embed.open_shards(str(folder), common.SPLITS, tmp_path / "vectors", embed.EmbeddingConfig())
    rows = [row for number in range(len(shards.entries)) for row, _ in embed.read_shard(shards, number)]
    assert len(rows) == 12
    lost = [row for row in rows if row["reason"]]  # stage 4 compares every shard with its digest
    if path.read_bytes() == (tiny_world / "shards/train/shard-000000.tar").read_bytes():
        assert not lost
    else:
        assert len(lost) == 4 and all("shard-000000.tar" in row["detail"] for row in lost)


@fuzz
@given(data=st.data())
def test_any_bytes_as_checkpoint_are_one_or_one_line(tiny_world, tmp_path, data):
    whole = (tiny_world / "checkpoint.pt").read_bytes()
    content = damaged(data.draw, whole) if data.draw(st.integers(0, 3)) else data.draw(st.binary(max_size=200))
    (tmp_path / "checkpoint.pt").write_bytes(content)
    try:
        found = train.find_checkpoint(train.TrainingConfig(), tmp_path)
    except common.Fail as error:
        assert "checkpoint.pt: not a readable checkpoint" in str(error) and "--no-resume" in str(error)
    else:  # the damage met what carries no data
        assert found["state"]["step"] == 3 and bool((found["weights"]["a"] == 1).all())
        with contextlib.suppress(common.Fail):
            train.matching_checkpoint(train.TrainingConfig(), tmp_path, {"seed": 1})


@heavy
@given(data=st.data())
def test_any_model_folder_is_a_clip_or_one_line(tiny_world, tmp_path, data):
    folder = tmp_path / "clip"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_world / "clip", folder)
    if data.draw(st.booleans()):
        config = json.loads((folder / "open_clip_config.json").read_text())
        (folder / "open_clip_config.json").write_text(json.dumps(changed(data.draw, config)))
    else:
        path = folder / data.draw(st.sampled_from(["open_clip_config.json", "open_clip_model.safetensors"]))
        content = path.read_bytes()
        path.write_bytes(damaged(data.draw, content[:2000]) + content[2000 : data.draw(st.sampled_from([2500, None]))])
    said = io.StringIO()
    with contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert common.load_clip(f"local-dir:{folder}").fingerprint
        except common.Fail as error:
            assert str(folder) in str(error)


@fuzz
@given(data=st.data())
def test_any_run_is_one_or_one_line(tmp_path, data):
    run = {"scenario": "dual_lora", "model_dir": "model", "inputs": {"base_fingerprint": "f"}, "identity": {}}
    content = json.dumps(changed(data.draw, run)) if data.draw(st.booleans()) else data.draw(st.text(max_size=50))
    (tmp_path / "train.json").write_text(content, errors="replace")
    args = argparse.Namespace(model="local-dir:x", pretrained=None)
    try:
        found = embed.read_run(str(tmp_path), args)
        assert isinstance(found.name, str) and isinstance(found.model, str)
    except common.Fail as error:
        assert "train.json" in str(error)


# --------------------------------------------------------------------------------------------------------------------
# Parquet


@fuzz
@given(data=st.data())
def test_search_in_any_bytes_as_parquet_gives_items_or_one_line(world, tmp_path, monkeypatch, data):
    whole = world[0].read_bytes()
    content = damaged(data.draw, whole)
    if data.draw(st.booleans()):  # damage in the footer, where the shape of everything stands
        content = whole[:-2500] + damaged(data.draw, whole[-2500:])
    path = tmp_path / "master.parquet"
    path.write_bytes(content)
    monkeypatch.setattr(embed, "query_vector", lambda *_: np.ones((1, 16), np.float32))
    args = argparse.Namespace(
        words="x", image=None, embeddings=str(path), using="base", top_k=2, model=None, pretrained=None
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            embed.search(args)
        assert said.getvalue().count("\n") == 2
    except common.Fail as error:
        assert "master.parquet" in str(error) or "vector" in str(error)


# --------------------------------------------------------------------------------------------------------------------
# The arena


PART = st.text(max_size=20) | st.sampled_from(["..", "%2e%2e", "%00", "%ff", "-1", "9" * 30, "arena.css"])
ROUTES = "/ /start /trial /picture/{}/{} /picture/TOKEN/{} /vote /undo /quit /thanks /results /results?token={} "
ROUTES += "/votes.csv /search /item/{} /static/{} /static/{}/{}/{} /{}/{} /?token={}"
METHODS = "GET POST POST HEAD PUT DELETE PATCH OPTIONS TRACE"
HEADERS = "Host Origin Cookie Content-Type Range Accept X-CSRF-Token If-None-Match Content-Length Transfer-Encoding"
HEADER = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30)
HEADER |= st.sampled_from(["http://[", "bytes=5-1", "multipart/form-data; boundary=x", "chunked", "-5", "é"])


def any_body(draw, token: str) -> dict:
    """A request's body, as arguments of Flask's client."""
    fields = st.text(CHARACTERS) | st.sampled_from([token, *"ABTN"])
    kind = draw(st.sampled_from(["json", "vote", "form", "raw", "deep", "picture"]))
    if kind == "json":
        return {"json": draw(JSON)}
    if kind == "vote":
        return {"data": draw(st.dictionaries(st.sampled_from(["trial", "choice", "after"]), fields))}
    if kind == "form":
        return {"data": draw(st.dictionaries(st.sampled_from(["name", "token", "csrf"]), st.text(CHARACTERS)))}
    if kind == "picture":
        content = damaged(draw, draw(st.sampled_from(PICTURES)))
        return {"data": {"picture": (io.BytesIO(content), "x.png")}}
    return {"data": "[" * 4000 if kind == "deep" else draw(st.binary(max_size=300)), "content_type": "application/json"}


@fuzz
@given(data=st.data())
def test_any_request_gets_an_answer_that_is_no_fault(world, data):
    judge = world[2]
    token = judge.trial()["trial"] or "none"
    path = data.draw(st.sampled_from(ROUTES.split())).replace("TOKEN", token)
    while "{}" in path:
        path = path.replace("{}", data.draw(PART | st.integers(-9, 99).map(str)).replace("{}", ""), 1)
    path = re.sub("^/{2,}", "/", path)  # the client would take what follows for a host, and fail on it
    method = data.draw(st.sampled_from(METHODS.split()))
    headers = dict(judge.headers)
    for name in data.draw(st.sets(st.sampled_from(HEADERS.split()), max_size=2)):
        headers[name] = data.draw(HEADER)
    before = votes(judge)
    with contextlib.redirect_stderr(io.StringIO()):
        response = judge.client.open(path, method=method, headers=headers, **any_body(data.draw, token))
    assert response.status_code < 500, response.data  # which may be a picture
    assert b"Traceback" not in response.data and str(ROOT).encode() not in response.data
    assert arena_world.arena.HEADERS.items() <= dict(response.headers).items()
    voted = path == "/vote" and method == "POST" and response.status_code == 200
    assert votes(judge) - before <= voted  # a vote is written down when it is acknowledged, and only then
    if response.status_code == 303:  # it quit, or began
        judge.__init__(judge.client.application)


def votes(judge) -> int:
    log = judge.client.application.extensions["arena"].log
    return log.connection.execute("SELECT COUNT(*) FROM votes").fetchone()[0]


@fuzz
@given(data=st.data())
def test_any_file_of_keys_is_one_or_one_line(tmp_path, data):
    whole = {"cookie_key": "c", "judge_token": "j", "admin_token": "a"}
    content = (
        json.dumps(changed(data.draw, whole)).encode()
        if data.draw(st.booleans())
        else data.draw(st.binary(max_size=90))
    )
    (tmp_path / "a.sqlite.keys.json").write_bytes(content)
    try:
        keys = arena_world.arena.read_keys(tmp_path / "a.sqlite")
        assert set(keys) == set(whole) and all(keys.values())
        assert all(isinstance(value, str) and value.encode() for value in keys.values())
    except common.Fail as error:
        assert "keys.json" in str(error)


# --------------------------------------------------------------------------------------------------------------------
# Input that would like to be code


def test_nothing_in_the_code_can_run_what_it_reads():
    """No pickle, no YAML, no eval, no shell; torch.load takes tensors only."""
    for path in ROOT.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "shelve", "marshal", "yaml", "joblib", "dill", "cloudpickle"} & set(names), path
            if isinstance(node, ast.Call):
                given_ = {word.arg: ast.unparse(word.value) for word in node.keywords}
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "os.system", "os.popen"), f"{path.name}: {called}"
                assert called != "torch.load" or given_.get("weights_only") == "True", path
                assert "shell" not in given_ and given_.get("allow_pickle", "False") == "False", path


def test_a_pickle_as_checkpoint_is_refused_and_not_run(tmp_path):
    import torch

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    for content in (Evil(), {name: Evil() for name in train.CHECKPOINT_PARTS}):
        torch.save(content, tmp_path / "checkpoint.pt")
        with pytest.raises(common.Fail, match=r"checkpoint\.pt: not a readable checkpoint"):
            train.find_checkpoint(train.TrainingConfig(), tmp_path)
    assert not (tmp_path / "run").exists()
