"""common.py: settings, errors, files, S3 through a proxy that spoils connections, catalogues, photos, CLIP."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import functools
import importlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import open_clip
import psutil
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats as scipy_stats
from torch import nn

import common
import tiny
from faulty_proxy import FaultyProxy

ROOT = Path(__file__).parents[1]
one_thread = pytest.fixture(scope="module", autouse=True)(tiny.one_thread)
SCRIPTS = ["1_clean.py", "2_prepare.py", "3_train.py", "4_embed.py", "5_arena.py"]


def write_csv(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


# Settings ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Example:
    effective_size: int = common.setting(8, "pairs, 50% of them")
    rate: float | None = common.setting(None, "learning rate")
    kind: str = common.setting("a", "kind", ("a", "b"))
    resume: bool = common.setting(True, "go on")


def test_flags_come_from_the_dataclass_and_fill_it():
    parser = argparse.ArgumentParser()
    common.add_flags(parser, Example)
    assert common.from_flags(Example, parser.parse_args([])) == Example()
    args = parser.parse_args("--effective-size 3 --rate 0.5 --kind b --no-resume".split())
    assert common.from_flags(Example, args) == Example(3, 0.5, "b", False)
    assert "50% of them (default 8)" in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args(["--kind", "c"])


@pytest.mark.parametrize(
    "script, config, flag, said",
    [
        ("2_prepare", "PrepConfig", "--image-size=0", "--image-size 0: must be from 8 to 4096"),
        ("2_prepare", "PrepConfig", "--workers=0", "--workers 0: must be from 1 to 1000"),
        ("2_prepare", "PrepConfig", "--max-failed=nan", "--max-failed nan: must be from 0 to 1"),
        ("3_train", "TrainingConfig", "--epochs=-5", "--epochs -5: must be at least 1"),
        ("5_arena", "ArenaConfig", "--port=70000", "--port 70000: must be from 0 to 65535"),
    ],
)
def test_a_number_out_of_its_bounds_is_wrong_use(script, config, flag, said):
    config = getattr(importlib.import_module(script), config)
    parser = argparse.ArgumentParser()
    common.add_flags(parser, config)
    with pytest.raises(common.Fail, match=said) as failure:
        common.from_flags(config, parser.parse_args([flag]))
    assert failure.value.code == common.USAGE
    assert common.from_flags(config, parser.parse_args([])) == config()


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raised, code, said",
    [
        (common.Fail("x.csv: is empty;\n add rows", 2), 2, "x.csv: is empty; add rows"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 1, "/data/x: No space left on device; free some"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), 1, "/data/x: Permission denied; check"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), 1, "/x: File name too long; choose a shorter name"),
        (OSError(errno.EMFILE, "Too many open files", "/x"), 1, "/x: Too many open files; raise the limit (ulimit -n)"),
        (OSError(errno.EIO, "Input/output error", "/x"), 1, "/x: Input/output error; check the disk"),
        (OSError(errno.ESTALE, "Stale file handle", "/x"), 1, "/x: Stale file handle; mount"),
    ],
)
def test_expected_errors_are_one_line_and_a_code(raised, code, said, capsys):
    @common.entry_point
    def main(argv=None):
        raise raised

    assert main([]) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_our_own_bugs_keep_their_traceback():
    @common.entry_point
    def main(argv=None):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main([])


def test_sigterm_is_an_interruption():
    code = (
        "import common, time, sys\n@common.entry_point\ndef main(argv=None):\n print('up', flush=True)\n time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code + "\nsys.exit(main())"], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"up\n"
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == common.INTERRUPTED


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_work_that_a_closed_pipe_cut_off_is_not_done(stream):
    code = "import common, sys\n@common.entry_point\ndef main(argv=None):\n" \
           f" for i in range(99_999):\n  print(i, file=sys.{stream})\n return 0\nsys.exit(main())"  # fmt: skip
    read, write = os.pipe()
    os.close(read)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: write}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, **streams)
    os.close(write)
    assert ended.returncode == common.INTERRUPTED and not ended.stdout and not ended.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_no_torch_and_wrong_use_exits_2(script):
    command = [sys.executable, "-X", "importtime", script, "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    # Imports of seconds, which --help would wait for; `make bench` measures it.
    assert "common" in imported and not {"torch", "open_clip", "openai", "flask", "scipy", "matplotlib"} & imported
    assert "usage:" in shown.stdout and script in shown.stdout
    wrong = subprocess.run([sys.executable, script, "--no-such-flag"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == common.USAGE and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script):
    code = f"""
import runpy, sys
sys.argv = ["{script}", "--help"]
try:
    runpy.run_path("{script}", run_name="__main__")
except SystemExit:
    pass
heavy = {{"torch", "open_clip", "openai", "flask", "pandas", "numpy", "PIL", "matplotlib", "scipy"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


# Files ---------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    common.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), common.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_torn_json_says_what_to_do(tmp_path):
    path = tmp_path / "state.json"
    path.write_text('{"a": ')
    with pytest.raises(common.Fail, match=r"state.json: not a readable state file .*remove it"):
        common.read_json(path, "state file")


def test_the_lock_is_exclusive_and_freed_by_death(tmp_path):
    path = tmp_path / "lock"
    code = "import common, sys\nwith common.exclusive(sys.argv[1]) as held:\n print(held, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdin=-1, stdout=-1)
    assert holder.stdout.readline() == b"True\n"
    with common.exclusive(path) as held:
        assert held is False
    holder.kill()
    holder.wait()
    with common.exclusive(path) as held:
        assert held is True


def test_digests_do_not_depend_on_order():
    assert common.digest({"a": 1, "b": "ü"}) == common.digest({"b": "ü", "a": 1}) != common.digest({"a": 1})
    assert common.digest(b"x") == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"


# Tables --------------------------------------------------------------------------------------------------------------


def test_a_lone_carriage_return_stays_within_its_value(tmp_path):
    rows = [["id", "name", "image_path"], ["1", "one\rtwo", "a"], ["2", "one\r\ntwo\n", "b"], ["3", 'a "b"', "c"]]
    with open(tmp_path / "c.csv", "w", newline="") as handle:
        common.csv_writer(handle).writerows(rows)
    assert (tmp_path / "c.csv").read_bytes().startswith(b'id,name,image_path\n1,"one\rtwo",a\n')
    assert common.read_catalogue([tmp_path / "c.csv"])[0].values.tolist() == rows[1:]


def test_cleaned_csvs_are_one_catalogue_and_unusable_rows_have_a_reason(tmp_path):
    head = "id,name,image_path"
    first = write_csv(tmp_path / "1.csv", f"\ufeff{head},price\n1,a,a.jpg,5\n,,,\n\n2,d\n1,e,e.jpg\n")
    second = write_csv(tmp_path / "2.csv", "ID;image_path;name;size (W,D,H)\r\n3;b.jpg;b;L\r\n1;c.jpg;c;S\r\n")
    rows, reasons = common.read_catalogue([first, second])
    assert rows.columns.tolist() == [*head.split(","), "price", "size (W,D,H)"]
    assert rows.loc[5].to_dict() == {
        "id": "3", "name": "b", "image_path": "b.jpg", "price": "", "size (W,D,H)": "L",
    }  # fmt: skip
    assert list(zip(rows.index, rows["id"], reasons, strict=True)) == [
        (1, "1", ""), (2, "", "missing id"), (3, "2", "missing image_path"), (4, "1", "duplicate id"), (5, "3", ""),
        (6, "1", "duplicate id"),
    ]  # fmt: skip
    assert [(id, [number for number, *_ in some]) for id, some in common.products(rows, reasons)] == [
        ("1", [1, 4, 6]), ("3", [5]),
    ]  # fmt: skip


def test_a_products_photos_are_its_own_and_the_further_ones(tmp_path):
    more = ('[""b.jpg"", ""c.jpg ""]', "", "d.jpg", "[1", '{""a"": 1}')
    text = "id,name,image_path,further_photos\n" + "".join(f'{i},a, a.jpg ,"{one}"\n' for i, one in enumerate(more))
    found = common.products(*common.read_catalogue([write_csv(tmp_path / "c.csv", text)]))
    assert [photos for _, [(_, _, photos)] in found] == [
        ["a.jpg", "b.jpg", "c.jpg"], ["a.jpg"], ["a.jpg", "d.jpg"], ["a.jpg", "[1"], ["a.jpg", '{"a": 1}'],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "needs one column id and one name and one image_path; the header has nothing"),
        ("id,words,image_path\n", "needs one column name; the header has id, words, image_path"),
        ("id,name,image_path,tag,tag\n", "two columns are called tag; rename one of them"),
        ("id,name,image_path,id\n", "needs one column id"),
        (
            "id,name,image_path\n1,a,a.jpg\n2,b, c,b.jpg\n",
            "row 2 has more fields than the header; quote what holds a ','",
        ),
        ('id,name,image_path\n1,"a,a.jpg\n', "not a readable CSV .*mend it, or export it again as UTF-8"),
        ("id,name,image_path\n1,Küche,a.jpg\n", "not a readable CSV .*utf-8.*export it again as UTF-8"),
    ],
)
def test_a_table_that_is_none_of_ours_is_one_line(tmp_path, text, said):
    path = write_csv(tmp_path / "c.csv", text, "cp1252" if "ü" in text else "utf-8")
    with pytest.raises(common.Fail, match=f"c.csv: {said}"):
        common.read_catalogue([path])


def test_a_missing_csv_or_folder_is_wrong_use(tmp_path):
    with pytest.raises(common.Fail, match=r"nowhere.csv: no such CSV") as failure:
        common.read_catalogue([tmp_path / "nowhere.csv"])
    assert failure.value.code == common.USAGE
    with pytest.raises(common.Fail, match="no such images folder"):
        common.images_folder(str(tmp_path / "none"), [])
    (tmp_path / "M\udcf6bel").mkdir()  # in Windows-1252
    with pytest.raises(common.Fail, match=r"M.*udcf6bel': this images folder's name is not UTF-8; rename the folder"):
        common.images_folder(None, [str(tmp_path / "M\udcf6bel/catalogue.csv")])


def test_of_a_querys_equal_rows_one_that_is_right_counts(tmp_path):
    lines = "sofa,1,0\nSofa,1,3\nsofa,1,3\nsofa,2,3\nsofa,2,0\n"
    rows, left_out = common.read_queries(write_csv(tmp_path / "q.csv", f"query,id,grade\n{lines}"))
    assert rows[["query", "id", "gain"]].values.tolist() == [["Sofa", "1", 3], ["sofa", "2", 3]]
    assert left_out == {"grade 0": 2, "duplicate": 1}


# Images: which file a row names --------------------------------------------------------------------------------------


def test_only_files_inside_the_images_folder_are_named(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.jpg").write_bytes(b"x")
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    for name in ("sub/a.jpg", "sub\\a.jpg", " sub/a.jpg ", "sub/../sub/a.jpg", str(folder / "sub" / "a.jpg")):
        assert common.resolve_image(folder, name) == folder / "sub" / "a.jpg"
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "/etc/passwd"):
        with pytest.raises(common.BadImage, match="outside the images folder"):
            common.resolve_image(folder, name)
    for name in ("no.jpg", "sub", "a\0b", "x" * 5000):
        with pytest.raises(common.BadImage, match="missing file"):
            common.resolve_image(folder, name)


def test_paths_are_found_as_feeds_write_them(tmp_path):
    folder = tmp_path / "images"
    (folder / "Stühle").mkdir(parents=True)
    decomposed = unicodedata.normalize("NFD", "Schränkchen weiß.jpg")
    for name in ("Stühle/a b.JPG", decomposed, "photo.jpg", "50%25.jpg", "IMG.jpg", "img.JPG"):
        (folder / name).write_bytes(b"x")
    for written, found in {
        "Schränkchen weiß.jpg": decomposed,
        "/photo.jpg": "photo.jpg",
        "photo.jpg?width=800#top": "photo.jpg",
        unicodedata.normalize("NFD", "/stühle/a%20b.jpg?v=1"): "Stühle/a b.JPG",
        "50%25.jpg": "50%25.jpg",
        "PHOTO.JPG": "photo.jpg",
        "img.JPG": "img.JPG",
    }.items():
        assert common.resolve_image(folder, written) == folder / found
    with pytest.raises(common.BadImage, match=r"missing file .*2 files differ in case or accents only"):
        common.resolve_image(folder, "Img.jpg")
    with pytest.raises(common.BadImage, match=r"/gone.jpg\?w=1; tried too: gone.jpg\?w=1, /gone.jpg, gone.jpg"):
        common.resolve_image(folder, "/gone.jpg?w=1")
    (tmp_path / "secret.jpg").write_bytes(b"x")
    for written in ("/%2e%2e/secret.jpg", "..%2Fsecret.jpg", "/../secret.jpg"):
        with pytest.raises(common.BadImage):
            common.resolve_image(folder, written)


# Prompts -------------------------------------------------------------------------------------------------------------


def test_metadata_is_made_uniform():
    meta = common.clean_metadata(
        {"clean_title": " Gray  Couch", "name": "x", "style": "Mid Century", "material": "N/A", "color": "GRAY"}
    )
    assert meta == {"title": "grey sofa", "style": "mid-century", "material": "", "color": "grey", "object_type": ""}
    assert common.clean_metadata({"clean_title": "", "name": "Stool X"})["title"] == "Stool X"


def test_titles_are_plain_text():
    for written, plain in {
        "Sofa &amp; Chair &#8211; &quot;Oslo&quot;": 'Sofa & Chair – "Oslo"',
        "<b>Sofa</b><br/>Oslo &amp;amp; Co": "Sofa Oslo & Co",
        "&lt;p class='x'&gt;Sofa&lt;/p&gt;": "Sofa",
        "AT&T sofa&parade <3 5 < 6 > 4": "AT&T sofa&parade <3 5 < 6 > 4",
        "So\0fa\x1b[31m \u200bred\ttable": "So fa [31m red table",
        "<script>alert(1)</script>Lamp": "Lamp",
        "&#" + "9" * 5000 + ";": "&#" + "9" * 5000 + ";",
        "<script " * 5000: ("<script " * 5000).strip(),
        "<!--" * 10_000: "<!--" * 10_000,
    }.items():
        assert common.plain_text(written) == plain
    assert common.clean_metadata({"name": "Sofa &amp; <i>Co</i>"})["title"] == "Sofa & Co"


def test_prompts_add_only_what_the_title_does_not_hold():
    meta = {"title": "Oak table", "style": "rustic", "material": "oak", "color": "brown", "object_type": "table"}
    made = common.prompts(meta)
    assert made[0] == "brown rustic oak table" and len(set(made)) == len(made) >= 3
    for prompt in made:
        assert all(prompt.replace(",", "").split().count(word) == 1 for word in ("oak", "table", "rustic", "brown"))
    bare = common.prompts(dict.fromkeys(meta, "") | {"title": "Armchair"})
    assert bare[:2] == ["armchair", "a photo of an armchair"]


def test_each_of_an_items_prompts_has_its_turn():
    meta = {"title": "Oak table", "style": "rustic", "material": "oak", "color": "brown", "object_type": "table"}
    everything = common.prompts(meta)
    first = []
    for i in range(60):
        picked = [common.pick_prompt(meta, f"p{i}", 42, epoch) for epoch in range(len(everything))]
        assert sorted(picked) == sorted(everything)
        first.append(picked[0])
    assert set(first) == set(everything)
    assert first != [common.pick_prompt(meta, f"p{i}", 43) for i in range(60)]


# Shards --------------------------------------------------------------------------------------------------------------


def test_a_missing_or_torn_manifest_says_what_to_do(tmp_path):
    with pytest.raises(common.Fail, match=r"no such manifest; run 2_prepare.py first"):
        common.load_manifest(tmp_path)
    shards = tiny.make_shards(tmp_path / "shards")
    manifest = common.load_manifest(shards)
    for change in ({"name": "../../etc/passwd"}, {"sha256": "0"}, {"bytes": -1}, {"samples": "8"}):
        torn = json.loads(json.dumps(manifest))
        torn["splits"]["test"]["shards"][0] |= change
        (shards / "manifest.json").write_text(json.dumps(torn))
        with pytest.raises(common.Fail, match=r"manifest.json: not a manifest of shards .*run 2_prepare.py again"):
            common.load_manifest(shards)


# Photos --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [(500, 500), (640, 427), (100, 60), (3000, 800), (1, 300), (7, 2), (224, 224)])
def test_a_letterbox_holds_the_whole_photo_in_the_middle_of_white(source):
    image = Image.new("RGB", source, "navy")
    boxed = np.asarray(common.letterbox(image, 224))
    assert boxed.shape == (224, 224, 3)
    inner = common.fit(image, 224)
    assert max(inner.size) == 224 and inner.size[0] == max(1, round(224 * source[0] / max(source)))
    rows, columns = np.flatnonzero((boxed != 255).any((1, 2))), np.flatnonzero((boxed != 255).any((0, 2)))
    assert (len(columns), len(rows)) == inner.size
    assert abs(rows[0] - (223 - rows[-1])) <= 1 and abs(columns[0] - (223 - columns[-1])) <= 1
    assert np.array_equal(np.asarray(common.letterbox(inner, 224)), boxed)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_todays_formats_are_read_whatever_their_suffix(tmp_path, kind):
    if kind == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
    image = Image.new("RGB", (64, 48), (200, 30, 30))
    image.save(tmp_path / "a.jpg", kind, quality=95)
    read = common.load_image(tmp_path / "a.jpg")
    assert read.mode == "RGB" and read.size == (64, 48)
    assert all(abs(a - b) < 8 for a, b in zip(read.getpixel((30, 20)), (200, 30, 30), strict=True))


def test_a_tracking_pixel_is_no_photo():
    for size in ((1, 1), (600, 2)):
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "GIF")
        with pytest.raises(common.BadImage, match=f"image too small .{size[0]} x {size[1]} px"):
            common.load_image(buffer.getvalue())


def test_the_pool_gives_everything_in_order_and_names_a_death():
    blocks = [list(range(start, start + 5)) for start in range(0, 100, 5)]
    for workers in (1, 2):
        assert list(common.photo_pool(sorted, iter(blocks), workers)) == list(range(100))
    with pytest.raises(common.Fail, match="lower --workers"):
        list(common.photo_pool(os._exit, [137], 2))
    with pytest.raises(common.Fail, match="if memory ran out, lower --workers"):
        list(common.photo_pool(bytearray, [1 << 62], 2))


def test_the_pools_processes_end_with_a_killed_parent():
    program = "import common, time\n" \
              "def blocks():\n" \
              "    yield from ([i] for i in range(16))\n" \
              "    print('ready', flush=True); time.sleep(60)\n" \
              "if __name__ == '__main__':\n" \
              "    list(common.photo_pool(sorted, blocks(), 2))\n"  # fmt: skip
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"ready\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    assert children and not psutil.wait_procs(children, timeout=10)[1]


# S3 ------------------------------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 40_000  # 10 MB
LARGE = CONTENT * 2  # is sent in parts


@pytest.fixture(scope="module")
def moto():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3(moto, monkeypatch):
    """Point boto3 at moto with a bucket `shop`; gives the port."""
    for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{moto}")
    common._s3_client.cache_clear()
    common.s3_call("s3://shop", lambda client, bucket, key: client.create_bucket(Bucket=bucket))
    yield moto
    common._s3_client.cache_clear()


@pytest.fixture
def faulty(s3, monkeypatch):
    """The same behind a proxy that spoils connections; gives the proxy."""
    with FaultyProxy(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        common._s3_client.cache_clear()
        yield proxy
        common._s3_client.cache_clear()


def test_what_is_uploaded_is_listed_and_read(s3, tmp_path):
    common.upload_atomic(b"hello", "s3://shop/a/b.txt")
    common.upload_atomic(b"", "s3://shop/empty")
    assert common.read_bytes("s3://shop/empty") == b""
    local = tmp_path / "big"
    local.write_bytes(LARGE)
    common.upload_atomic(local, "s3://shop/a/big.tar")
    assert common.list_files("s3://shop/a") == [("b.txt", 5), ("big.tar", len(LARGE))]
    assert common.list_files("s3://shop/a/") == common.list_files("s3://shop/a")
    assert common.read_bytes("s3://shop/a/big.tar") == LARGE
    assert common.exists("s3://shop/a/b.txt") and not common.exists("s3://shop/a/b")
    common.download_atomic("s3://shop/a/big.tar", tmp_path / "copy/big.tar")
    assert (tmp_path / "copy/big.tar").read_bytes() == LARGE and os.listdir(tmp_path / "copy") == ["big.tar"]


def test_an_interrupted_upload_leaves_no_parts(s3, monkeypatch):
    client = common._s3_client(os.getpid())
    upload_part, calls = client.upload_part, []

    def interrupted(**kwargs):
        if not calls:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(kwargs)
        return upload_part(**kwargs)

    monkeypatch.setattr(client, "upload_part", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    with pytest.raises(KeyboardInterrupt):
        common.upload_atomic(LARGE, "s3://shop/x/broken.tar")
    signal.signal(signal.SIGINT, before)
    assert calls and not common.exists("s3://shop/x/broken.tar")
    assert not client.list_multipart_uploads(Bucket="shop").get("Uploads")


def test_a_lost_answer_to_the_last_request_is_no_failure(s3, monkeypatch):
    """The object was made, the answer was cut: asked again, S3 knows no such upload."""
    from botocore.exceptions import ClientError

    client = common._s3_client(os.getpid())
    complete, calls = client.complete_multipart_upload, []

    def lost(**kwargs):
        complete(**kwargs)
        calls.append(kwargs)
        if len(calls) == 1:
            answer = {"Error": {"Code": "NoSuchUpload"}, "ResponseMetadata": {"HTTPStatusCode": 404}}
            raise ClientError(answer, "CompleteMultipartUpload")

    monkeypatch.setattr(client, "complete_multipart_upload", lost)
    common.upload_atomic(LARGE, "s3://shop/x/lost.tar")
    assert len(calls) == 2 and common.read_bytes("s3://shop/x/lost.tar") == LARGE


def test_cut_stalled_and_refused_connections_lose_nothing(faulty, tmp_path):
    faulty.cut, faulty.refuse, faulty.stall, faulty.stall_seconds = 0.4, 0.15, 0.05, 0.5
    local = tmp_path / "big"
    local.write_bytes(LARGE)
    for i in range(12):
        common._s3_client.cache_clear()  # a new connection each, as from another process
        common.upload_atomic(b"%d" % i, f"s3://shop/f/{i}.txt")
        assert common.read_bytes(f"s3://shop/f/{i}.txt") == b"%d" % i
    common.upload_atomic(local, "s3://shop/f/big.tar")
    assert common.read_bytes("s3://shop/f/big.tar") == LARGE
    common.download_atomic("s3://shop/f/big.tar", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == LARGE
    assert len(common.list_files("s3://shop/f")) == 13
    spoilt = faulty.cuts, faulty.refusals, faulty.stalls
    assert faulty.cuts >= 10 and faulty.refusals >= 3 and faulty.stalls, (
        f"too little was spoilt to prove anything: {spoilt}"
    )


def test_a_dead_endpoint_is_named_within_seconds(monkeypatch, s3):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:secret@127.0.0.1:9")
    monkeypatch.setattr(common, "_s3_answered", set())
    common._s3_client.cache_clear()
    start = time.monotonic()
    message = r"s3://shop/x: cannot be reached .*http://127.0.0.1:9.*AWS_ENDPOINT_URL"
    with pytest.raises(common.Fail, match=message) as failed:
        common.read_bytes("s3://shop/x")
    assert "secret" not in str(failed.value)
    with pytest.raises(common.Fail, match=message):
        common.upload_atomic(LARGE, "s3://shop/x")
    with pytest.raises(common.Fail, match="names no bucket"):
        common.list_files("s3://")
    assert time.monotonic() - start < 10


def test_a_full_local_disk_is_no_unreachable_s3(s3, tmp_path, monkeypatch):
    common.upload_atomic(b"hello", "s3://shop/full")
    opened = []

    def full():
        opened.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as failure:
        common.download("s3://shop/full", full)
    assert failure.value.errno == errno.ENOSPC and len(opened) == 1


def test_missing_and_forbidden_fail_at_once_with_url_and_cause(s3, monkeypatch):
    start = time.monotonic()
    with pytest.raises(common.Fail, match=r"s3://shop/none: S3 answers 404 .*check bucket and key"):
        common.read_bytes("s3://shop/none")
    for content in (b"", LARGE):
        with pytest.raises(common.Fail, match=r"s3://nobucket/x: S3 answers 404 NoSuchBucket"):
            common.upload_atomic(content, "s3://nobucket/x")
    with pytest.raises(common.Fail, match=r"s3://nobucket: S3 answers 404 NoSuchBucket"):
        common.list_files("s3://nobucket")
    with FaultyProxy(s3) as proxy:
        proxy.forbid = True
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        common._s3_client.cache_clear()
        for act in (common.read_bytes, functools.partial(common.upload_atomic, b"")):
            with pytest.raises(common.Fail, match=r"s3://shop/x: S3 answers 403 .*AWS_ACCESS_KEY_ID"):
                act("s3://shop/x")
    assert time.monotonic() - start < 10


def test_other_processes_read_alike(faulty):
    common.upload_atomic(CONTENT, "s3://shop/p")
    faulty.cut, faulty.refuse = 0.4, 0.1
    child = os.fork()  # it must not use its parent's connections
    if child == 0:
        os._exit(common.read_bytes("s3://shop/p") != CONTENT)
    code = "import common; print(common.digest(common.read_bytes('s3://shop/p')))"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == common.digest(CONTENT)
    assert os.waitpid(child, 0)[1] == 0


def test_keys_and_endpoint_may_stand_in_the_env_file(tmp_path, monkeypatch):
    values = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    values["AWS_DEFAULT_REGION"] = "eu-west-1"
    for name in values:
        monkeypatch.setenv(name, "")  # so that what the file sets is taken back behind this test
        monkeypatch.delenv(name)
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    monkeypatch.chdir(tmp_path)
    common._s3_client.cache_clear()
    try:
        assert common._s3_client(0).meta.endpoint_url == "http://127.0.0.1:9"
    finally:
        common._s3_client.cache_clear()


def test_shards_on_s3_are_copied_once_and_only_where_they_fit(s3, tmp_path, monkeypatch):
    local = tiny.make_shards(tmp_path / "shards", shards=3)
    manifest = common.load_manifest(local)
    entries = [*manifest["splits"]["train"]["shards"], *manifest["splits"]["test"]["shards"]]
    assert common.local_shards(local, entries, tmp_path / "cache", 1) == [local / entry["name"] for entry in entries]
    for entry in entries:
        common.upload_atomic(local / entry["name"], f"s3://shop/shards/{entry['name']}")
    copies = common.local_shards("s3://shop/shards", entries, tmp_path / "cache", 1)
    assert [common.file_digest(path) for path in copies] == [entry["sha256"] for entry in entries]
    with pytest.raises(common.Fail, match=r"GB of shards are more than --cache-gb 1e-06; raise it"):
        common.local_shards("s3://shop/shards", entries, tmp_path / "cache", 1e-6)
    with monkeypatch.context() as patched:
        patched.setattr(common, "download_atomic", lambda *_: pytest.fail("copied again"))
        assert common.local_shards("s3://shop/shards", entries, tmp_path / "cache", 1) == copies
    (local / entries[0]["name"]).unlink()
    with pytest.raises(common.Fail, match=r"shard-000000.tar: missing shard; run 2_prepare.py again"):
        common.local_shards(local, entries, tmp_path / "cache", 1)


# CLIP: loading -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def tokens():
    return open_clip.get_tokenizer("ViT-B-32")(["a red chair", "an oak table with four legs", "lamp", "x " * 200])


def pixels(count=4, size=32, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def test_loading_by_folder_prefix_and_as_weights_is_the_same(folder):
    clips = [
        common.load_clip(f"local-dir:{folder}"),
        common.load_clip(str(folder)),
        common.load_clip("ViT-B-32", str(folder)),
    ]
    assert len({clip.fingerprint for clip in clips}) == 1
    assert (clips[0].size, clips[0].mean, clips[0].std) == (32, tiny.MEAN, tiny.STD)
    assert clips[0].context_length == 77 and not clips[0].model.training


def test_fingerprint_sees_weights_and_the_quickgelu_flag(folder, tmp_path):
    base = common.load_clip(str(folder)).fingerprint
    assert common.load_clip(str(tiny.make_clip(tmp_path / "same"))).fingerprint == base
    assert common.load_clip(str(tiny.make_clip(tmp_path / "seed", seed=1))).fingerprint != base
    assert common.load_clip(str(tiny.make_clip(tmp_path / "gelu", quick_gelu=True))).fingerprint != base


@pytest.mark.parametrize(
    ("model", "pretrained", "says"),
    [
        ("ViT-B-23", "openai", "ViT-B-32"),
        ("ViT-B-32", "opnai", "openai"),
        ("ViT-B-16", None, "--pretrained: a tag .openai"),
        ("timm/ViT-B-16-SigLIP2", None, "on the hub: hf-hub:timm/ViT-B-16-SigLIP2"),
        ("hf-hub:timm/ViT-B-16-SigLIP2", "openai", "brings its own weights"),
        ("ViT-B-32", "/nowhere/weights.pt", "no such file"),
        ("local-dir:/nowhere", None, "no such model folder"),
    ],
)
def test_a_wrong_name_tag_or_path_says_what_to_do(model, pretrained, says):
    with pytest.raises(common.Fail, match=says) as caught:
        common.load_clip(model, pretrained)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_or_configuration_says_so(tmp_path):
    with pytest.raises(common.Fail, match=r"open_clip_config\.json"):
        common.load_clip(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    with pytest.raises(common.Fail, match="no weights"):
        common.load_clip(str(tmp_path))


def test_weights_of_another_architecture_and_pickles_are_refused(tmp_path):
    torch.save({"visual.proj": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(common.Fail, match="another architecture"):
        common.load_clip("RN50", str(tmp_path / "other.pt"))

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"x": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(common.Fail):
            common.load_clip("RN50", str(tmp_path / name))
    assert not (tmp_path / "executed").exists()


def test_a_coca_is_refused_in_one_line(monkeypatch, folder):
    monkeypatch.setattr(
        open_clip, "create_model", lambda *_, **__: torch.nn.ModuleDict({"text_decoder": nn.Identity()})
    )
    with pytest.raises(common.Fail, match=r"CoCa.*ViT-B-32"):
        common.load_clip(str(folder))


def test_a_tag_is_found_where_none_is_given_and_openais_turns_quickgelu_on(monkeypatch):
    asked = {}

    def create(name, pretrained=None, **more):
        asked.update(more, pretrained=pretrained)
        raise RuntimeError("Failed to download weights")

    monkeypatch.setattr(open_clip, "create_model", create)
    with pytest.raises(common.Fail, match="local file"):
        common.load_clip("ViT-B-32", "openai")
    assert asked["quick_gelu"] is True
    for model, tag in (
        ("ViT-B-32", "laion2b_s34b_b79k"),
        ("ViT-B-32-SigLIP2-256", "webli"),
        ("ViT-B-16-SigLIP2", "webli"),
        ("PE-Core-B-16", "meta"),
    ):
        with pytest.raises(common.Fail, match=f"^{model}/{tag}: it could not be downloaded"):
            common.load_clip(model)
        assert asked["pretrained"] == tag and asked["quick_gelu"] is False


def test_the_side_of_pictures_is_the_models_and_rectangles_are_refused(tmp_path):
    sides = {"ViT-B-32": 224, "ViT-B-32-SigLIP2-256": 256, "ViT-L-14-336": 336, f"local-dir:{tmp_path / 'small'}": 48}
    tiny.make_clip(tmp_path / "small", vision_cfg={"image_size": 48})
    for model, side in sides.items():
        assert common.image_side(model, common.model_config(model)) == side
    tiny.make_clip(tmp_path / "wide", vision_cfg={"image_size": [32, 64]})
    with pytest.raises(common.Fail, match="takes pictures of 32 x 64 px; only square ones"):
        common.load_clip(str(tmp_path / "wide"))


def test_a_name_on_the_hub_is_loaded_through_its_cache_offline(tmp_path):
    """The real way, with huggingface_hub's cache in place of the hub; it reads its environment when it is imported."""
    repository = tmp_path / "hub/models--shop--clip"
    tiny.make_clip(repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123")
    code = """
import common
for model in ("hf-hub:shop/clip", "hf-hub:shop/other"):
    try:
        clip = common.load_clip(model)
        print(clip.name, clip.size, clip.mean, clip.fingerprint, common.model_place(clip.name, "x"))
    except common.Fail as error:
        print(error)
"""
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    found, missing = done.stdout.splitlines()
    mark = common.load_clip(str(repository / "snapshots" / "0123")).fingerprint
    assert found == f"hf-hub:shop/clip 32 {tiny.MEAN} {mark} ('hf-hub:shop/clip', None)"
    assert missing.startswith("hf-hub:shop/other: its open_clip_config.json could not be downloaded")


def test_what_is_missing_is_named_where_the_weights_are_at_hand(tmp_path, monkeypatch):
    (tmp_path / "weights.safetensors").touch()
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: nn.Module())

    def offline(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    with pytest.raises(common.Fail, match=r"its tokenizer, timm/ViT-B-32-SigLIP2-256, could not be downloaded"):
        common.load_clip("ViT-B-32-SigLIP2-256", str(tmp_path / "weights.safetensors"))
    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(common.Fail, match="the configuration of its text tower, xlm-roberta-base, could not be down"):
        common.load_clip("xlm-roberta-base-ViT-B-32", str(tmp_path / "weights.safetensors"))


def test_openais_torchscript_is_refused_with_the_way_that_works(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(common.Fail, match="OpenAI's files do; take the tag"):
        common.load_clip("ViT-B-32-quickgelu", str(tmp_path / "ViT-B-32.pt"))


# CLIP: encoding and ranks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("custom_text", [False, True])
def test_text_cut_to_its_longest_caption_is_exact(tmp_path, tokens, custom_text):
    clip = common.load_clip(str(tiny.make_clip(tmp_path, custom_text=custom_text)))
    for part in (tokens, tokens[:3], tokens[2:3]):
        whole = clip.model.encode_text(part)
        assert (common.text_features(clip.model, part) - whole).abs().max() <= 2.4e-6 * whole.abs().max().clamp(min=1)
    double = clip.model.double()
    assert (common.text_features(double, tokens[:3]) - double.encode_text(tokens[:3])).abs().max() < 1e-12


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler"])
def test_captions_of_a_hugging_face_tower_are_cut_to_the_longest(tmp_path, pooler):
    clip = common.load_clip(str(tiny.make_hf_clip(tmp_path, hf_pooler_type=pooler)))
    tokens, widths = clip.tokenizer(["a red chair", "an oak table with four legs", "lamp", "lamp " * 90]), []
    tower = clip.model.text.transformer
    tower.register_forward_pre_hook(lambda _, __, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True)
    for part, width in ((tokens, 40), (tokens[:3], 8), (tokens[2:3], 3)):
        found, whole = common.text_features(clip.model, part), clip.model.encode_text(part)
        assert (found - whole).abs().max() <= 1e-6 and widths[-2:] == [width, 40]


def test_encoding_normalises_with_the_models_own_numbers(folder):
    clip = common.load_clip(str(folder))
    images = pixels()
    x = (images.float() / 255 - torch.tensor(tiny.MEAN).view(3, 1, 1)) / torch.tensor(tiny.STD).view(3, 1, 1)
    with torch.no_grad():
        expected = clip.model.encode_image(x, normalize=True)
    assert torch.allclose(common.encode(clip, images), expected, atol=1e-5)
    text = common.encode(clip, captions=["a chair", "a bed"])
    assert torch.allclose(text.norm(dim=-1), torch.ones(2)) and text.dtype == torch.float32


def test_decoding_gives_pillows_pixels_and_refuses_what_is_damaged():
    data = tiny.picture("red", "bed", 3, size=48)
    expected = torch.tensor(list(Image.open(io.BytesIO(data)).tobytes())).view(48, 48, 3).permute(2, 0, 1)
    decoded = common.decode_jpeg(data, 48)
    assert decoded.dtype == torch.uint8 and torch.equal(decoded.int(), expected.int())
    assert common.decode_jpeg(data, 32).shape == (3, 32, 32)
    for bad in (b"", b"<html>", data[: len(data) // 3]):
        with pytest.raises(common.BadImage):
            common.decode_jpeg(bad, 48)


def test_ranks_are_those_of_a_naive_count_and_ties_count_against_the_model():
    torch.manual_seed(0)
    queries, gallery = (F.normalize(torch.randn(60, 8), dim=-1) for _ in range(2))
    keys = torch.stack([torch.arange(60) // 3, torch.randint(0, 20, (60,))], dim=1)
    scores = queries @ gallery.T
    expected = []
    for i in range(60):
        same = [bool((keys[i] == keys[j]).any()) for j in range(60)]
        best = max(scores[i, j].item() for j in range(60) if same[j])
        expected.append(1 + sum(scores[i, j].item() >= best for j in range(60) if not same[j]))
    assert common.right_ranks(queries, gallery, keys).tolist() == expected
    collapsed = torch.ones(60, 8) / 8**0.5
    assert common.right_ranks(collapsed, collapsed, torch.arange(60)).tolist() == [60] * 60
    broken = collapsed.clone()
    broken[::2] = torch.nan
    assert common.right_ranks(broken, gallery, torch.arange(60))[::2].tolist() == [60] * 30


# --------------------------------------------------------------------------------------------------------------------
# Holm's correction and the bootstrap


def test_holm_against_the_definition():
    assert common.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    rng = np.random.default_rng(0)
    for count in range(1, 8):
        p = rng.random(count) ** 2
        ordered = sorted(p)
        naive = [max(min(1, (count - j) * ordered[j]) for j in range(ordered.index(x) + 1)) for x in p]
        assert common.holm(p) == pytest.approx(naive)
    assert common.holm([]) == []


@pytest.mark.parametrize("count", [50, 100, 200])
@pytest.mark.parametrize("kind", ["normal", "skewed", "recall", "reciprocal", "clusters"])
def test_the_bootstrap_interval_covers_the_truth(kind, count):
    rng, hits = np.random.default_rng(count), 0

    def clusters():
        groups = np.repeat(np.arange(count), rng.integers(1, 4, size=count))
        return rng.normal(size=count)[groups] + 0.3 * rng.normal(size=len(groups)), groups

    worse = (1 / np.arange(1, 20)).mean() - (1 / np.arange(1, 15)).mean()
    draw, truth = {
        "normal": (lambda: (rng.normal(size=count), None), 0),
        "skewed": (lambda: (rng.exponential(size=count), None), 1),
        "recall": (lambda: (rng.choice([-1.0, 0, 1], size=count, p=[0.1, 0.7, 0.2]), None), 0.1),
        "reciprocal": (
            lambda: (1 / rng.integers(1, 20, size=count) - 1 / rng.integers(1, 15, size=count), None),
            worse,
        ),
        "clusters": (clusters, 0),
    }[kind]
    for case in range(1000):
        values, groups = draw()
        _, low, high, _ = common.bootstrap_mean(values, groups, draws=499, seed=case)
        hits += low <= truth <= high
    assert 0.93 <= hits / 1000 <= 0.97


def test_p_agrees_with_the_interval_and_with_the_t_test():
    rng = np.random.default_rng(3)
    seen = set()
    for case in range(300):
        values = rng.normal(0.25, 1, size=60) if case % 2 else rng.choice([-1.0, 0, 1], size=60, p=[0.1, 0.65, 0.25])
        mean, low, high, p = common.bootstrap_mean(values, draws=1000, seed=case)
        assert mean == pytest.approx(values.mean())
        outside = low > 0 or high < 0
        seen.add(outside)
        assert (p <= 0.05) == outside
        if case % 2:
            assert p == pytest.approx(scipy_stats.ttest_1samp(values, 0).pvalue, abs=0.07)
    assert seen == {True, False}


def test_the_bootstrap_mirrors_repeats_itself_and_keeps_to_its_bounds():
    values = np.random.default_rng(4).normal(0.4, 1, size=80)
    there, back = common.bootstrap_mean(values), common.bootstrap_mean(-values)
    assert back == pytest.approx((-there[0], -there[2], -there[1], there[3]))
    assert common.bootstrap_mean(values, seed=common.SEED) == there != common.bootstrap_mean(values, seed=1)
    for wins in (5, 8, 11):
        _, low, high, _ = common.bootstrap_mean([1.0] * wins + [-1.0] * (12 - wins), limit=1)
        assert -1 <= low < high <= 1


def test_few_kinds_of_groups_have_the_distribution_of_drawn_groups():
    values = np.random.default_rng(5).choice([-1.0, 0, 1], size=400, p=[0.1, 0.6, 0.3])
    residuals, ones = values - values.mean(), np.ones(400)
    fast = common.resampled_distances(residuals, ones, 0.0, 20_000, np.random.default_rng(0))
    drawn = values[np.random.default_rng(1).integers(0, 400, size=(20_000, 400))]
    naive = abs(drawn.mean(axis=1) - values.mean()) / (drawn.std(axis=1, ddof=1) / 20)
    levels = [0.5, 0.9, 0.95, 0.99]
    assert np.quantile(fast, levels) == pytest.approx(np.quantile(naive, levels), abs=0.05)


def test_groups_of_several_sizes_are_studentised_as_by_hand():
    rng = np.random.default_rng(8)
    sums, sizes = rng.normal(size=12), rng.integers(1, 5, size=12).astype(float)
    mean = sums.sum() / sizes.sum()
    far = common.resampled_distances(sums - mean * sizes, sizes, 0.0, 5, np.random.default_rng(0))
    picks = np.random.default_rng(0).integers(0, 12, size=(5, 12), dtype=np.int32)
    for pick, value in zip(picks, far, strict=True):
        drawn = sums[pick].sum() / sizes[pick].sum()
        error = np.sqrt(12 / 11 * sum((sums[g] - drawn * sizes[g]) ** 2 for g in pick)) / sizes[pick].sum()
        assert value == pytest.approx(abs(drawn - mean) / error)


def test_copies_in_a_group_add_no_certainty():
    values = np.random.default_rng(6).normal(size=50)
    groups = [str(i) for i in range(50) for _ in range(10)]
    assert common.bootstrap_mean(np.repeat(values, 10), groups) == pytest.approx(common.bootstrap_mean(values))


def test_blocks_bound_the_bootstraps_memory_without_changing_the_answer(monkeypatch):
    values = np.random.default_rng(7).normal(size=300)
    whole = common.bootstrap_mean(values)
    monkeypatch.setattr(common, "BOOTSTRAP_NUMBERS", 7_000)
    assert common.bootstrap_mean(values) == pytest.approx(whole)


def test_bootstrap_edges():
    assert common.bootstrap_mean([1.0]) == (1.0, None, None, 1.0)
    assert common.bootstrap_mean([0.0] * 5) == (0.0, 0.0, 0.0, 1.0)
    assert common.bootstrap_mean([1.0] * 10) == (1.0, 1.0, 1.0, 2.0**-9)
    assert common.bootstrap_mean([1.0] * 3) == (1.0, None, None, 0.25)
    assert common.bootstrap_mean([1.0] * 4, ["x"] * 4)[3] == 1.0
    for values, groups in (([], None), ([float("nan")] * 3, None), ([1.0] * 3, ["x", "y"])):
        with pytest.raises(ValueError, match="equally long values and groups"):
            common.bootstrap_mean(values, groups)
