"""common.py: settings, errors, whole files, catalogues, prompts, shard indexes."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

import common
import imaging
import storage

ROOT = Path(__file__).parents[1]
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


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raised, code, said",
    [
        (common.Fail("x.csv: is empty;\n add rows", 2), 2, "x.csv: is empty; add rows"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 1, "/data/x: No space left on device; free some"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), 1, "/data/x: Permission denied; check"),
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_wrong_use_exits_2(script):
    start = time.perf_counter()
    shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    # The aim is half a second on a quiet machine and `make bench` measures it; importing torch would take seconds.
    assert time.perf_counter() - start < 2.5
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
heavy = {{"torch", "open_clip", "openai", "flask", "pandas", "matplotlib", "scipy", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


# Whole files ---------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    common.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), common.whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_torn_json_says_what_to_do(tmp_path):
    path = tmp_path / "state.json"
    path.write_text('{"a": ')
    with pytest.raises(common.Fail, match=r"state.json: not a readable state file .*remove it"):
        common.read_json(path, "state file")


def _hold(path, ready, leave):
    with common.exclusive(path) as held:
        ready.send(held)
        leave.recv()


def test_the_lock_is_exclusive_and_freed_by_death(tmp_path):
    path = tmp_path / "lock"
    ours, theirs = multiprocessing.Pipe()
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(path, theirs, theirs))
    holder.start()
    assert ours.recv() is True
    with common.exclusive(path) as held:
        assert held is False
    holder.kill()
    holder.join()
    with common.exclusive(path) as held:
        assert held is True


def test_digests_do_not_depend_on_order():
    assert common.digest({"a": 1, "b": "ü"}) == common.digest({"b": "ü", "a": 1}) != common.digest({"a": 1})
    assert common.digest(b"x") == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"


# Catalogue -----------------------------------------------------------------------------------------------------------

TABLE = [["id", "name", "image_path", "note"], ["007.1/é", 'Chair "X"', "a.jpg", "two\nlines"], ["8", "", "b.jpg", ""]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_any_encoding_and_delimiter_gives_the_same_rows(tmp_path, encoding, delimiter):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(TABLE)
    catalogue = common.Catalogue([write_csv(tmp_path / "c.csv", text.getvalue(), encoding)])
    assert catalogue.columns == TABLE[0]
    assert [list(row.fields.values()) for row in catalogue] == TABLE[1:]
    assert [row.reason for row in catalogue] == [None, None]


def test_bytes_that_are_not_utf8_are_read_as_windows_does(tmp_path):
    path = tmp_path / "c.csv"
    text = "id,name,image_path\r\n1,Sofa – 3’ “Oslo” €,Tisch – weiß.jpg\r\n"
    path.write_bytes(text.encode("cp1252") + b"2,gap \x81,b.jpg\r\n")
    first, second = common.Catalogue([path])
    assert first.fields == {"id": "1", "name": "Sofa – 3’ “Oslo” €", "image_path": "Tisch – weiß.jpg"}
    assert second.fields["name"] == "gap \x81"


def test_a_quote_that_is_never_closed_loses_no_row_without_a_word(tmp_path):
    good = "id,name,image_path,note\n" + "".join(f'{i},a,a.jpg,"two\nlines"\n' for i in range(20))
    assert len(list(common.Catalogue([write_csv(tmp_path / "good.csv", good + '20,"a ""b""",a.jpg,"end"')]))) == 21
    stray = '20,"Sofa 72"W,a.jpg,"open\n21,b,b.jpg,c\n'
    for tail in (
        '"',
        stray,
        '20,a,a.jpg,"open',
        '20,a,a.jpg,"open\n' + "".join(f"{i},a,a.jpg,x\n" for i in range(21, 300)),
    ):
        catalogue = common.Catalogue([write_csv(tmp_path / "open.csv", good + tail)])
        with pytest.raises(common.Fail, match=r"open.csv, line 42: the quotes"):
            list(catalogue)


def test_columns_of_one_name_are_kept_apart(tmp_path):
    text = "ID,name,image_path,Name,tag,tag\n1,Oslo sofa,1.jpg,SKU-77,red,blue\n"
    (row,) = common.Catalogue([write_csv(tmp_path / "c.csv", text)])
    assert row.fields == {
        "id": "1", "name": "Oslo sofa", "image_path": "1.jpg", "Name": "SKU-77", "tag": "red", "tag_2": "blue",
    }  # fmt: skip
    for header in ("id,name,name,image_path", "ID,Id,name,image_path"):
        with pytest.raises(common.Fail, match=r"two columns are called (name|id); rename") as failure:
            common.Catalogue([write_csv(tmp_path / "c.csv", f"{header}\n")])
        assert failure.value.code == common.USAGE
    more = "id,name,image_path,image_path_2,tag,tag,tag_2\n1,a,a.jpg,b.jpg,x,y,z\n"
    (row,) = common.Catalogue([write_csv(tmp_path / "c.csv", more)])
    assert list(row.fields) == ["id", "name", "image_path", "image_path_2", "tag", "tag_3", "tag_2"]
    wide = 'id,name,image_path,"Size (W;D;H;L;X)"\n1,a,a.jpg,5\n'
    assert common.Catalogue([write_csv(tmp_path / "c.csv", wide)]).columns[3] == "Size (W;D;H;L;X)"


def test_a_lone_carriage_return_stays_within_its_value(tmp_path):
    rows = [["id", "note"], ["1", "one\rtwo"], ["2", "one\r\ntwo\n"], ["3", 'a "b"']]
    with open(tmp_path / "c.csv", "w", newline="") as handle:
        csv.writer(common.csv_rows(handle)).writerows(rows)
    assert (tmp_path / "c.csv").read_bytes().startswith(b'id,note\n1,"one\rtwo"\n')
    with open(tmp_path / "c.csv", newline="") as handle:
        assert list(csv.reader(handle)) == rows


def test_every_unusable_row_is_given_with_its_reason(tmp_path):
    text = "id,name,image_path\n1,a,a.jpg\n,b,b.jpg\n1,c,c.jpg\n\n2,d,\n3,e,e.jpg,surplus\n4\n0001,f,f.jpg\n"
    rows = list(common.Catalogue([write_csv(tmp_path / "c.csv", text)]))
    assert [(row.number, row.id, row.reason) for row in rows] == [
        (1, "1", None), (2, "", "missing id"), (3, "1", "duplicate id"), (4, "2", "missing image_path"),
        (5, "3", "too many fields"), (6, "4", "missing image_path"), (7, "0001", None),
    ]  # fmt: skip
    assert common.reject(rows[2], "duplicate id")["name"] == "c"


def test_several_files_are_one_catalogue(tmp_path):
    first = write_csv(tmp_path / "1.csv", "id,name,image_path,price\n1,a,a.jpg,5\n")
    second = write_csv(tmp_path / "2.csv", "ID;image_path;name;size\n2;b.jpg;b;L\n1;c.jpg;c;S\n")
    catalogue = common.Catalogue([first, second])
    assert catalogue.columns == ["id", "name", "image_path", "price", "size"]
    rows = list(catalogue)
    assert rows[1].fields == {"id": "2", "name": "b", "image_path": "b.jpg", "price": "", "size": "L"}
    assert [row.reason for row in rows] == [None, None, "duplicate id"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "c.csv: is empty"),
        ("id,title,image_path\n", "no column name; the header has id, title, image_path"),
        ("just words\n", "no column id, name, image_path"),
    ],
)
def test_a_wrong_csv_says_what_is_wrong(tmp_path, text, said):
    with pytest.raises(common.Fail, match=said):
        common.Catalogue([write_csv(tmp_path / "c.csv", text)])


def test_a_missing_csv_or_folder_is_wrong_use(tmp_path):
    with pytest.raises(common.Fail, match=r"nowhere.csv: no such CSV") as failure:
        common.Catalogue([tmp_path / "nowhere.csv"])
    assert failure.value.code == common.USAGE
    with pytest.raises(common.Fail, match="no such images folder"):
        common.images_folder(str(tmp_path / "none"), [])


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, flag, said",
    [
        (common.PrepConfig, "--image-size=0", "--image-size 0: must be from 1 to 4096"),
        (common.PrepConfig, "--mini-shards=-1", "--mini-shards -1: must be at least 0"),
        (common.TrainingConfig, "--limit=-5", "--limit -5: must be at least 1"),
        (common.TrainingConfig, "--max-failed=nan", "--max-failed nan: must be from 0 to 1"),
        (common.EmbeddingConfig, "--draws=99", "--draws 99: must be at least 100"),
        (common.ArenaConfig, "--port=70000", "--port 70000: must be from 0 to 65535"),
    ],
)
def test_a_number_out_of_its_bounds_is_wrong_use(config, flag, said):
    parser = argparse.ArgumentParser()
    common.add_flags(parser, config)
    with pytest.raises(common.Fail, match=said) as failure:
        common.from_flags(config, parser.parse_args([flag]))
    assert failure.value.code == common.USAGE
    assert common.from_flags(config, parser.parse_args([])) == config()


# Images: which file a row names --------------------------------------------------------------------------------------


def test_only_files_inside_the_images_folder_are_named(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.jpg").write_bytes(b"x")
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    for name in ("sub/a.jpg", "sub\\a.jpg", " sub/a.jpg ", "sub/../sub/a.jpg", str(folder / "sub" / "a.jpg")):
        assert imaging.resolve_image(folder, name) == folder / "sub" / "a.jpg"
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "/etc/passwd"):
        with pytest.raises(imaging.BadImage, match="outside the images folder"):
            imaging.resolve_image(folder, name)
    for name in ("no.jpg", "sub", "a\0b", "x" * 5000):
        with pytest.raises(imaging.BadImage, match="missing file"):
            imaging.resolve_image(folder, name)


# Prompts -------------------------------------------------------------------------------------------------------------


def test_metadata_is_made_uniform():
    meta = common.clean_metadata(
        {"clean_title": " Gray  Couch", "name": "x", "style": "Mid Century", "material": "N/A", "color": "GRAY"}
    )
    assert meta == {"title": "grey sofa", "style": "mid-century", "material": "", "color": "grey", "object_type": ""}
    assert common.clean_metadata({"clean_title": "", "name": "Stool X"})["title"] == "Stool X"


def test_prompts_add_only_what_the_title_does_not_hold():
    meta = {"title": "Oak table", "style": "rustic", "material": "oak", "color": "brown", "object_type": "table"}
    made = common.prompts(meta)
    assert made[0] == "brown rustic oak table" and len(set(made)) == len(made) >= 3
    for prompt in made:
        assert all(prompt.replace(",", "").split().count(word) == 1 for word in ("oak", "table", "rustic", "brown"))
    bare = common.prompts(dict.fromkeys(meta, "") | {"title": "Armchair"})
    assert bare[:2] == ["armchair", "a photo of an armchair"]


# Shards --------------------------------------------------------------------------------------------------------------


def test_an_index_finds_every_member(tmp_path):
    path = tmp_path / "shard-000000.tar"
    with tarfile.open(path, "w") as tar:
        for key in ("000000000", "000000001"):
            for extension in ("jpg", "json", "txt"):
                content = f"{key}.{extension}".encode() * 300
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    samples = storage.index_shard(path)
    assert [sample.key for sample in samples] == ["000000000", "000000001"]
    with storage.open_read(path) as handle:
        assert storage.read_member(handle, samples[1].members["json"]) == b"000000001.json" * 300
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(common.Fail, match=r"shard-000000.tar: damaged shard"):
        storage.index_shard(path)


def test_an_empty_split_and_a_missing_manifest_say_what_to_do(tmp_path):
    with pytest.raises(common.Fail, match="the test split is empty"):
        storage.shard_names({"splits": {"test": {"samples": 0, "shards": []}}}, "test")
    with pytest.raises(common.Fail, match=r"no such manifest; run 2_prepare.py first"):
        storage.load_manifest(tmp_path)


@pytest.mark.parametrize("source", [(500, 500), (640, 427), (100, 60), (3000, 800), (1, 300), (7, 2), (224, 224)])
def test_resize_is_pillows_lanczos(source):
    """Over 60 dB even for noise, shrinking and enlarging; white stays white; sides of one pixel work."""
    import numpy as np
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (source[1], source[0], 3), np.uint8))
    for size in ((224, 224), (224, 149), (33, 1), (1, 40), source):
        ours = np.asarray(imaging.resize(image, size), np.float64)
        theirs = np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.float64)
        assert ours.shape == theirs.shape
        if 1 not in size:
            assert abs(ours - theirs).max() <= 2, size
            assert ((ours - theirs) ** 2).mean() <= 255**2 / 10**6, size
    assert np.asarray(imaging.letterbox(Image.new("RGB", source, "white"), 64)).min() == 255


@pytest.mark.parametrize(("source", "target"), [(500, 224), (13, 224), (1600, 33), (224, 225), (5000, 224), (2, 224)])
def test_scaling_weights_are_exact_in_float32(source, target):
    """All sums of weight x byte are whole multiples of 2^-15 below 2^24 of these, whatever the order of adding."""
    import numpy as np

    for _, _, weights in imaging._lanczos(source, target):
        units = weights.astype(np.float64) * 2**15
        assert (units == np.rint(units)).all() and (units.sum(axis=0) == 2**15).all()
        assert (abs(units).sum(axis=0) * 255 + 2**14 < 2**24).all()
