"""Stage 2: the split, the shards' bytes, restarts, bad pictures, verification."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

import common

ROOT = Path(__file__).parents[1]
prepare = importlib.import_module("2_prepare")
COLUMNS = ["id", "name", "image_path", "price", "clean_title", "style", "material", "color", "object_type"]


def picture(seed: int, side: int = 96) -> Image.Image:
    """A picture of its own: coarse noise in a few colours."""
    cells = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    return Image.fromarray(cells).resize((side, side), Image.BICUBIC)


def write_catalogue(folder: Path, rows: list[dict], name: str = "cleaned.csv") -> Path:
    path = folder / name
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def make_shop(folder: Path, count: int) -> list[dict]:
    """`count` products of four types with pictures that have nothing in common."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(count):
        picture(i).save(folder / f"images/{i}.jpg", quality=90)
        kind = ("chair", "table", "lamp", "sofa")[i % 4]
        row = {"id": f"{i:04d}", "name": f"Shop {kind} {i}", "image_path": f"images/{i}.jpg", "price": "9.99"}
        rows.append(row | {"clean_title": f"Oak {kind}", "style": "Modern", "color": "gray", "object_type": kind})
    return rows


def run(csv_path: Path, output: Path | str, *flags: str) -> int:
    return prepare.main(
        ["--input", str(csv_path), "--output", str(output), "--workers", "1", "--image-size", "64", *flags]
    )


def samples(output: Path) -> dict[str, dict]:
    """{id: record with split, key, jpg, prompt} of everything but mini_train, read with tarfile."""
    found = {}
    for split in common.SPLITS:
        for path in sorted((output / split).glob("*.tar")):
            with tarfile.open(path) as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar}
            for name in members:
                if name.endswith(".json"):
                    key = name.removesuffix(".json")
                    record = json.loads(members[name])
                    jpg, prompt = members[f"{key}.jpg"], members[f"{key}.txt"].decode()
                    assert record["id"] not in found
                    found[record["id"]] = record | {"split": split, "key": key, "jpg": jpg, "prompt": prompt}
    return found


def content(output: Path) -> dict[str, bytes]:
    """Every file whose bytes are promised."""
    paths = [*output.glob("*/*.tar"), output / "manifest.json", output / "items.csv", output / "rejects.jsonl"]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> tuple[Path, list[dict], Path]:
    """(folder, rows, finished shard folder) of 60 products; treat as read-only."""
    folder = tmp_path_factory.mktemp("shop")
    rows = make_shop(folder, 60)
    assert run(write_catalogue(folder, rows), folder / "shards") == common.DONE
    return folder, rows, folder / "shards"


# What is in a shard --------------------------------------------------------------------------------------------------


def test_every_row_is_a_sample_with_all_it_was(shop):
    _, rows, output = shop
    found = samples(output)
    assert set(found) == {row["id"] for row in rows}
    one = found["0004"]
    assert one["title"] == "Oak chair" and one["style"] == "modern" and one["color"] == "grey"
    assert one["row"] == {"name": "Shop chair 4", "price": "9.99"} and one["image_path"] == "images/4.jpg"
    assert one["prompt"] in common.prompts(one) and one["group"] == "0004"
    image = Image.open(io.BytesIO(one["jpg"]))
    assert image.size == (64, 64) and image.format == "JPEG"
    assert sorted(int(record["key"]) for record in found.values()) == list(range(60))
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["counts"] == {"input": 60, "written": 60, "rejected": 0}
    assert (output / "contact_sheet.jpg").stat().st_size > 10_000
    assert manifest["splits"]["mini_train"]["shards"][0]["sha256"] == manifest["splits"]["train"]["shards"][0]["sha256"]


def test_webdataset_and_gnu_tar_read_the_shards(shop):
    import webdataset

    _, _, output = shop
    path = output / "train/shard-000000.tar"
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert len(read) == len(common.index_shard(path))
    assert {"jpg", "json", "txt"} <= set(read[0])
    listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in listed if name.endswith(".jpg")] == [
        f"{sample.key}.jpg" for sample in common.index_shard(path)
    ]


def test_overhead_and_ids_to_the_letter(tmp_path):
    rows = make_shop(tmp_path, 12)
    ids = ["a.b.c", "möbel/7", "007", "日本 椅子", "-x", "A,B", 'q"q', "a\\b", "x" * 200, "=1+1", "null", "1e5"]
    for row, id in zip(rows, ids, strict=True):
        row["id"] = id
    assert run(write_catalogue(tmp_path, rows), tmp_path / "out") == common.DONE
    found = samples(tmp_path / "out")
    assert set(found) == set(ids)
    for path in (tmp_path / "out").glob("t*/*.tar"):
        index = common.index_shard(path)
        payload = sum(sample.members["jpg"][1] for sample in index)
        assert path.stat().st_size - payload <= 3500 * len(index) + 10240


# The split -----------------------------------------------------------------------------------------------------------


def test_the_split_is_even_overall_and_in_every_type():
    draw = random.Random(3)
    groups = [(f"one{i}", f"type{i}", 1, None) for i in range(300)]
    groups += [
        (f"g{i}", draw.choice(["chair", "table", "lamp"]), draw.choice([1, 1, 1, 2, 3]), None) for i in range(2000)
    ]
    chosen = prepare.choose_splits(groups, 42)
    total = sum(size for _, _, size, _ in groups)
    for split, share in prepare.SHARES.items():
        got = sum(size for group, _, size, _ in groups if chosen[group] == split)
        assert abs(got / total - share) < 0.01, split
        for kind in ("chair", "table", "lamp"):
            within = sum(size for _, k, size, _ in groups if k == kind)
            there = sum(size for group, k, size, _ in groups if k == kind and chosen[group] == split)
            assert abs(there - share * within) <= max(3, 0.02 * within)
    assert chosen == prepare.choose_splits(sorted(groups, reverse=True), 42)
    assert chosen != prepare.choose_splits(groups, 43)


def test_copies_stay_on_one_side_and_colour_variants_are_no_copies(tmp_path):
    rows = make_shop(tmp_path, 40)
    images = tmp_path / "images"
    for i in range(0, 10):  # exact, and re-encoded, rescaled, a little cropped
        shutil.copy(images / f"{i}.jpg", images / f"{i + 20}.jpg")
        original = Image.open(images / f"{i + 10}.jpg")
        original.resize((88, 88), Image.LANCZOS).crop((1, 1, 87, 87)).save(images / f"{i + 30}.jpg", quality=70)
    drawing = Image.new("RGB", (96, 96), "white")
    for name, color in ((38, "red"), (39, "blue")):  # a small product on white, in two colours
        drawing.paste(color, (30, 30, 70, 70))
        drawing.save(images / f"{name}.jpg")
    assert run(write_catalogue(tmp_path, rows), tmp_path / "out") == common.DONE
    found = samples(tmp_path / "out")
    for i in range(10):
        assert found[f"{i:04d}"]["group"] == found[f"{i + 20:04d}"]["group"] == f"{i:04d}"
        assert found[f"{i:04d}"]["split"] == found[f"{i + 20:04d}"]["split"]
    for i in range(10, 18):
        assert found[f"{i:04d}"]["group"] == found[f"{i + 20:04d}"]["group"]
    assert found["0038"]["group"] != found["0039"]["group"]
    report = json.loads((tmp_path / "out/split_report.json").read_text())
    assert len(report["duplicate_groups"]) == 18 and report["random_split_leak"] > 0.5


def test_group_by_keeps_variants_together(tmp_path):
    rows = make_shop(tmp_path, 20)
    for row in rows:
        row["price"] = str(int(row["id"]) // 4)
    path = write_catalogue(tmp_path, rows)
    assert run(path, tmp_path / "out", "--group-by", "price") == common.DONE
    found = samples(tmp_path / "out")
    assert all(found[f"{i:04d}"]["group"] == f"{i // 4 * 4:04d}" for i in range(20))


def test_a_grown_catalogue_moves_nobody(shop, tmp_path, capsys):
    folder, rows, old = shop
    before = samples(old)
    grown = tmp_path / "grown"
    shutil.copytree(folder / "images", grown / "images")
    more = make_shop(tmp_path / "more", 90)[60:]
    for row in more:
        shutil.copy(tmp_path / "more" / row["image_path"], grown / row["image_path"])
    path = write_catalogue(grown, more + rows)
    assert run(path, grown / "out", "--keep-split", str(old / "manifest.json")) == common.DONE
    after = samples(grown / "out")
    assert len(after) == 90 and all(after[id]["split"] == record["split"] for id, record in before.items())
    (grown / "out/items.csv").write_text("id,split,group\n")
    assert run(path, grown / "again", "--keep-split", str(grown / "out/manifest.json")) == common.FAILED
    assert "does not belong to that manifest" in capsys.readouterr().err


# The same bytes ------------------------------------------------------------------------------------------------------


def test_workers_row_order_folder_and_machines_change_no_byte(shop, tmp_path):
    folder, rows, output = shop
    other = tmp_path / "elsewhere"
    shutil.copytree(folder / "images", other / "images")
    shuffled = random.Random(1).sample(rows, len(rows))
    path = write_catalogue(other, shuffled)
    assert run(path, other / "out", "--workers", "3") == common.DONE
    assert content(other / "out") == content(output)
    environment = os.environ | {"WORLD_SIZE": "2"}
    command = [sys.executable, "2_prepare.py", "--input", path, "--output", tmp_path / "ranks", "--image-size", "64"]
    ranks = [subprocess.Popen([*command, "--workers", "1"], cwd=ROOT, env=environment | {"RANK": r}) for r in "10"]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    assert content(tmp_path / "ranks") == content(output)
    assert run(path, tmp_path / "parts", "--shard-range", "0:1") == common.DONE
    assert not (tmp_path / "parts/manifest.json").exists()
    assert run(path, tmp_path / "parts") == common.DONE
    assert content(tmp_path / "parts") == content(output)


def test_killed_at_random_it_ends_the_same_and_redoes_no_shard(shop, tmp_path, monkeypatch):
    folder, _, output = shop
    again = tmp_path / "out"
    command = [
        sys.executable,
        "2_prepare.py",
        "--input",
        folder / "cleaned.csv",
        "--output",
        again,
        "--image-size",
        "64",
    ]
    draw, times = random.Random(20), {}
    for _ in range(20):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        child = subprocess.Popen([*command, "--workers", "1"], cwd=ROOT, start_new_session=True, **quiet)
        try:
            child.wait(draw.uniform(0.2, 2.2))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        for path in again.glob("*/*.tar"):
            when = path.stat().st_mtime_ns
            assert times.setdefault(path, when) == when, f"{path} was made again"
            assert path.read_bytes() == (output / path.relative_to(again)).read_bytes()
    assert run(folder / "cleaned.csv", again) == common.DONE
    assert content(again) == content(output)
    assert not list(again.rglob("*.tmp"))


def test_a_change_rebuilds_only_what_it_touches(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_SAMPLES", 10)
    monkeypatch.setattr(prepare, "worker_pool", lambda _: contextlib.nullcontext(_InProcess()))
    rows = make_shop(tmp_path, 50)
    path, output = write_catalogue(tmp_path, rows), tmp_path / "out"
    assert run(path, output) == common.DONE
    assert len(list(output.glob("train/*.tar"))) == 4

    def changed(act) -> set[str]:
        before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in output.glob("t*/*.tar")}
        act()
        assert run(path, output) == common.DONE
        assert prepare.verify(str(output)) == common.DONE
        return {p.name for p in output.glob("t*/*.tar") if before.get(p) != (p.stat().st_mtime_ns, p.read_bytes())}

    assert changed(lambda: None) == set()
    rows[7]["clean_title"] = "Teak chair"
    assert len(changed(lambda: write_catalogue(tmp_path, rows))) == 1
    assert samples(output)["0007"]["title"] == "Teak chair"
    assert len(changed(lambda: picture(7000).save(tmp_path / "images/9.jpg"))) == 1
    assert len(changed(lambda: (output / "train/shard-000001.tar").unlink())) == 1
    del rows[30:]
    changed(lambda: write_catalogue(tmp_path, rows))
    assert set(samples(output)) == {row["id"] for row in rows}


class _InProcess:
    """An executor without processes, so that a patched constant holds."""

    def map(self, function, jobs, **_):
        return map(function, jobs)


# Pictures ------------------------------------------------------------------------------------------------------------


def test_every_bad_picture_ends_right_or_among_the_rejects(tmp_path):
    rows = make_shop(tmp_path, 60)
    images = tmp_path / "images"
    plain = picture(500)
    bad = {0: "empty file", 1: "truncated image", 2: "not an image", 3: "missing file", 4: "outside the images folder",
           5: "image too large"}  # fmt: skip
    (images / "0.jpg").write_bytes(b"")
    out = io.BytesIO()
    picture(501, 400).save(out, "JPEG")
    (images / "1.jpg").write_bytes(out.getvalue()[:4000])
    (images / "2.jpg").write_text("<html>404</html>")
    (images / "3.jpg").unlink()
    rows[4]["image_path"] = "../../etc/passwd"
    Image.new("1", (13_300, 13_300)).save(images / "5.jpg", "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.transpose(Image.ROTATE_90).save(images / "6.jpg", exif=exif, quality=95)
    rgba = plain.convert("RGBA")
    rgba.paste((0, 0, 0, 0), (0, 0, 96, 48))
    rgba.save(images / "7.png")
    rows[7]["image_path"] = "images/7.png"
    plain.convert("CMYK").save(images / "8.jpg", quality=95)
    Image.fromarray(np.full((40, 80), 40_000, np.uint16)).save(images / "9.png")
    rows[9]["image_path"] = "images/9.png"
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    plain.save(images / "10.jpg", quality=95, icc_profile=swapped.tobytes())
    rows.append(dict(rows[20]))
    code = run(write_catalogue(tmp_path, rows), tmp_path / "out", "--max-failed", "0.2")
    assert code == common.DONE
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert {(r["id"], r["reason"]) for r in rejects} == {(f"{i:04d}", why) for i, why in bad.items()} | {
        ("0020", "duplicate id")
    }
    found = samples(tmp_path / "out")
    assert len(found) + len(rejects) == 61

    def shown(i: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(found[f"{i:04d}"]["jpg"])), np.float32)

    expected = np.asarray(common.letterbox(plain, 64), np.float32)
    for i in (6, 8, 10):
        assert np.abs(shown(i) - expected).mean() < 6, i
    assert shown(7)[:28].min() > 240 and np.abs(shown(7)[36:] - expected[36:]).mean() < 6
    grey = shown(9)
    assert grey[:14].min() > 250 and abs(grey[32, 32].mean() - 40_000 / 256) < 4


def test_too_many_rejects_are_a_failure_with_a_whole_output(tmp_path, capsys):
    rows = make_shop(tmp_path, 20)
    for i in range(3):
        (tmp_path / f"images/{i}.jpg").unlink()
    assert run(write_catalogue(tmp_path, rows), tmp_path / "out") == common.FAILED
    said = capsys.readouterr()
    assert "3 of 20 rows were rejected, more than --max-failed 0.05" in said.err
    assert "input 20 = written 17 + rejected 3" in said.out
    assert len(samples(tmp_path / "out")) == 17


def test_a_large_picture_costs_bounded_memory(tmp_path):
    Image.new("1", (13_300, 13_300)).save(tmp_path / "huge.png")
    code = f"""
import resource, common
from PIL import Image
common.load_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    common.load_image(__import__('pathlib').Path({str(tmp_path / "huge.png")!r}))
except common.BadImage as error:
    print(error.reason, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    reason, kilobytes = shown.rsplit(maxsplit=1)
    assert reason == "image too large" and int(kilobytes) < 100_000


@pytest.mark.parametrize("side, least", [(500, 60), (1000, 60), (1600, 44)])
def test_scaling_is_pillows_lanczos(side, least):
    source = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).resize(
        (side, side), Image.BICUBIC
    )
    out = io.BytesIO()
    source.save(out, "JPEG", quality=95)
    ours = np.asarray(common.letterbox(common.load_image(out.getvalue(), 4 * 224), 224), np.float64)
    theirs = np.asarray(Image.open(out).resize((224, 224), Image.LANCZOS), np.float64)
    error = ((ours - theirs) ** 2).mean()
    assert error == 0 or 10 * np.log10(255**2 / error) >= least


# Verification and wrong use ------------------------------------------------------------------------------------------


def test_verify_finds_every_damage(shop, tmp_path, capsys):
    _, _, output = shop
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    shard = copy / "train/shard-000000.tar"
    whole = shard.read_bytes()
    assert prepare.main(["--verify", "--output", str(copy)]) == common.DONE
    flipped = bytearray(whole)
    flipped[5000] ^= 1
    sample = common.index_shard(shard)[3]
    boundary = sample.members["jpg"][0] - 512
    missing = whole[:boundary] + whole[sample.members["json"][0] - 512 :]
    for data, said in [
        (bytes(flipped), "content is not that of the manifest"), (whole[:boundary] + b"\0" * 1024, "bytes"),
        (missing, "bytes"), (None, "missing"),
    ]:  # fmt: skip
        shard.unlink()
        if data is not None:
            shard.write_bytes(data)
        assert prepare.main(["--verify", "--output", str(copy)]) == common.FAILED
        assert f"train/shard-000000.tar: {said}" in capsys.readouterr().out.replace(
            f"{len(data or b'')} bytes", "bytes"
        )
        shard.write_bytes(whole)


def test_wrong_use_is_one_line(tmp_path, capsys):
    rows = make_shop(tmp_path, 4)
    path = write_catalogue(tmp_path, rows)
    for argv, code, said in [
        (["--output", "x"], 2, "--input is needed"),
        (["--input", "no.csv", "--output", "x"], 2, "no.csv: no such CSV"),
        (["--input", str(path), "--images", "/nowhere", "--output", "x"], 2, "no such images folder"),
        (["--input", str(path), "--group-by", "brand", "--output", "x"], 2, "--group-by brand: no such column"),
        (
            ["--input", str(write_catalogue(tmp_path, [], "e.csv")), "--output", str(tmp_path / "o")],
            1,
            "it has no rows",
        ),
        (["--verify", "--output", str(tmp_path)], 1, "no such manifest"),
    ]:
        assert prepare.main(argv) == code
        error = capsys.readouterr().err.splitlines()
        assert said in error[-1] and "Traceback" not in "".join(error)


# S3 ------------------------------------------------------------------------------------------------------------------


def test_shards_on_s3_are_those_on_disk(shop, monkeypatch):
    from moto.server import ThreadedMotoServer

    from faulty_proxy import FaultyProxy

    folder, _, output = shop
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with FaultyProxy(server.get_host_and_port()[1]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        common._s3_client.cache_clear()
        common._s3_client(os.getpid()).create_bucket(Bucket="shop")
        proxy.cut, proxy.refuse, proxy.stall = 0.4, 0.1, 0.05
        assert run(folder / "cleaned.csv", "s3://shop/prefix") == common.DONE
        there = {
            name: common.read_bytes(f"s3://shop/prefix/{name}") for name, _ in common.list_files("s3://shop/prefix")
        }
        here = content(output)
        assert {name: there[name] for name in here} == here
        assert prepare.main(["--verify", "--output", "s3://shop/prefix"]) == common.DONE
    common._s3_client.cache_clear()
    server.stop()
    assert proxy.cuts + proxy.refusals >= 3
    assert Counter(name.rsplit(".", 1)[-1] for name in there)["tmp"] == 0
