"""Broken input by the thousand: never a traceback, never a hang, never a lost row.

`make test` runs a few dozen cases of each kind, `make fuzz` (FUZZ_EXAMPLES=1500 for each) more than 10,000.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


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

CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@fuzz
@given(rows=st.lists(st.lists(CELL, min_size=3, max_size=4), max_size=20), delimiter=st.sampled_from(",;\t|"))
def test_no_row_of_a_csv_is_lost(tmp_path, rows, delimiter):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["id", "name", "image_path", "more"])
    writer.writerows(rows)
    path = tmp_path / "c.csv"
    path.write_bytes(text.getvalue().encode())
    read = list(common.Catalogue([path]))
    assert len(read) == len(rows)
    assert [row.id for row in read] == [row[0] for row in rows]
    good = [row.id for row in read if row.reason is None]
    assert len(good) == len(set(good))


@fuzz
@given(data=st.data())
def test_any_bytes_as_csv_are_rows_or_one_line(tmp_path, data):
    head = data.draw(
        st.sampled_from([b"", b"id,name,image_path\n", b"\xff\xfei\0d\0", b"\xef\xbb\xbfid;name;image_path\n"])
    )
    path = tmp_path / "c.csv"
    path.write_bytes(head + data.draw(st.binary(max_size=400)))
    try:
        for row in common.Catalogue([path]):
            assert row.reason or (row.id.strip() and row.fields["image_path"].strip())
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
                                "unsupported image"}  # fmt: skip


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
        for sample in common.index_shard(path):
            assert all(offset >= 0 and size >= 0 for offset, size in sample.members.values())
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
        common.shard_names(common.load_manifest(tmp_path), "train")
    except common.Fail as error:
        assert "manifest" in str(error) or "split" in str(error)


# The arena -----------------------------------------------------------------------------------------------------------

METHODS = st.sampled_from("GET POST PUT HEAD OPTIONS DELETE PATCH".split())
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="?#"), max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.sampled_from("ABTN"),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["trial", "choice", "after"]), inner),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(master.parquet, an arena's database with votes, a judge on its application)."""
    import arena_world

    folder = tmp_path_factory.mktemp("arena")
    master, images = arena_world.make_world(folder, count=60, pictures=False)
    app = arena_world.arena.create_app(arena_world.setup(master, images, folder / "a.sqlite", reveal=True))
    judge = arena_world.Judge(app)
    for choice in "ABTNABT":
        judge.vote(choice)
    app.extensions["arena"].log.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return master, folder / "a.sqlite", judge


@fuzz
@given(
    method=METHODS, page=st.sampled_from("start trial vote undo quit thanks results search item".split()),
    name=NAMES, body=JSON, raw=st.binary(max_size=200), kind=st.sampled_from(["json", "form", "raw", "picture"]),
)  # fmt: skip
def test_any_request_gets_an_answer_that_is_no_fault(world, method, page, name, body, raw, kind):
    given_ = {
        "json": {"json": body},
        "form": {"data": {"name": name, "token": name}},
        "raw": {"data": raw, "content_type": "application/json"},
        "picture": {"data": {"picture": (io.BytesIO(raw), "a.jpg")}},
    }[kind]
    judge = world[2]
    for path in (f"/{page}", f"/{page}/{name}", f"/picture/{name}/1", f"/static/{name}"):
        assert judge.client.open(path, method=method, headers=judge.headers, **given_).status_code < 500
        given_ = {}


@fuzz
@given(data=st.data())
def test_a_damaged_parquet_file_or_log_gets_one_line(world, tmp_path, capsys, data):
    import arena_world

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
