"""Machines that lack something: disk, memory, /dev/shm, a terminal, UTF-8, the right to write.

Each stage works there as anywhere, or says why not in one line, and loses nothing: once there is room again, the same
command ends with the same bytes. The disks are real ones: small tmpfs mounts in a mount namespace of this process.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import common
import tiny
from arena_world import KEYS, Judge
from openai_standin import StandIn

ROOT = Path(__file__).parents[1]
STAGES = ("1_clean", "2_prepare", "3_train", "4_embed", "5_arena")
FINAL = ("cleaned.csv*.jsonl", "cleaned.csv", "shards/**/*.tar", "shards/manifest.json", "shards/items.csv",
         "run/adapter/*", "run/model/*", "run/metrics.jsonl", "run/curves.png",
         "embeddings/master.parquet", "embeddings/report.*")  # fmt: skip
MADE_BY = {"cleaned.csv": 0, "shards": 1, "run": 2, "embeddings": 3}


def make_shop(folder: Path, count: int = 48) -> None:
    """A catalogue whose ids, titles and file names are no ASCII."""
    (folder / "fotos/stühle").mkdir(parents=True)
    with open(folder / "catalogue.csv", "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["id", "name", "image_path"])
        for i in range(count):
            color, kind = list(tiny.COLORS)[i % 4], tiny.TYPES[i // 4 % 4]
            name = f"fotos/stühle/ø{i}.jpg"
            (folder / name).write_bytes(tiny.picture(color, kind, i, 64) + b"%d" % i)
            writer.writerow([f"№{i:03d}/é", f"{color} {kind} “Ålesund”", name])
        writer.writerow(["broken", "a broken one", "fotos/ß.jpg"])


def commands(shop: Path, data: Path) -> list[list[str]]:
    """The five command lines that go from `shop` to a served arena, everything made in `data`."""
    clip, shards = f"local-dir:{shop / 'clip'}", data / "shards"
    lines = [
        f"1_clean.py run --input {shop}/catalogue.csv --workspace {data}/batch --output {data}/cleaned.csv "
        "--poll-interval 0 --workers 1",
        f"2_prepare.py --input {data}/cleaned.csv --images {shop} --output {shards} --image-size 32 --workers 1",
        f"3_train.py --shards {shards} --model {clip} --output {data}/run --epochs 1 --effective-batch-size 16 "
        "--workers 1 --wise off",  # so few pairs teach nothing: the arena would get the base model twice
        f"4_embed.py --shards {shards} --model {clip} --finetuned {data}/run/model "
        f"--output {data}/embeddings/master.parquet --workers 1",
        f"5_arena.py serve --embeddings {data}/embeddings/master.parquet --images {shop} "
        f"--database {data}/arena.sqlite --port 0",
    ]
    return [line.split() for line in lines]


def call(command: list[str]) -> int:
    """Run a command in this process; ends with its exit code."""
    return importlib.import_module(command[0].removesuffix(".py")).main(command[1:])


def final(data: Path, stages: range = range(4)) -> dict[str, bytes]:
    """Content of every final file of some stages (by number, from 0)."""
    paths = sorted(path for pattern in FINAL for path in data.glob(pattern) if path.is_file())
    found = {path.relative_to(data).as_posix(): path.read_bytes() for path in paths}
    begin, end = (mark.encode() for mark in common.CARD_TEST)  # what stage 4 writes into the model card of stage 3
    for name in (name for name in found if name.endswith("README.md") and begin in found[name]):
        found[name] = found[name].partition(begin)[0] + found[name].partition(end)[2]
    return {name: content for name, content in found.items() if MADE_BY[name.split("/")[0][:11]] in stages}


one_thread = pytest.fixture(scope="module", autouse=True)(tiny.one_thread)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    make_shop(folder)
    tiny.make_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The stand-in for the Batch API, in the environment."""
    kept = {name: os.environ.pop(name, None) for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY")}
    with StandIn(tmp_path_factory.mktemp("standin")) as server:
        os.environ |= {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "sk-small-0123456789"}
        yield server
    for name, value in kept.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="module")
def whole(shop, server, tmp_path_factory) -> Path:
    """Where all stages ended undisturbed."""
    data = tmp_path_factory.mktemp("whole") / "data"
    for command in commands(shop, data)[:4]:
        assert call(command) == common.DONE
    assert {name.split("/")[0] for name in final(data)} >= {"cleaned.csv", "shards", "run", "embeddings"}
    return data


# --------------------------------------------------------------------------------------------------------------------
# A full disk, a read-only one


class Disk:
    """A tmpfs of a given size, seen by this process and its children only."""

    def __init__(self, place: Path):
        self.place = place

    def mount(self, options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.place], check=True, capture_output=True)

    def change(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.place], check=True, capture_output=True)

    def leave(self, room: int) -> None:
        """Make it so small that only so many bytes are free."""
        now = os.statvfs(self.place)
        used = now.f_blocks - now.f_bfree
        self.change(f"size={(used + max(2, room // now.f_frsize)) * now.f_frsize}")

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", self.place], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path):
    """A Disk that is not mounted yet. Without the right to mount, see the tests by file size and by permission."""
    new_namespace = 0x00020000  # CLONE_NEWNS: ours alone, gone with this process
    private = ["mount", "--make-rprivate", "/"]
    if ctypes.CDLL(None).unshare(new_namespace) or subprocess.run(private, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    disk = Disk(tmp_path / "disk")
    disk.place.mkdir()
    yield disk
    with contextlib.suppress(subprocess.CalledProcessError):
        disk.unmount()


def upstream(whole: Path, data: Path, stage: int) -> None:
    """Copy what the earlier stages made to `data`."""
    data.mkdir(exist_ok=True)
    for name, number in MADE_BY.items():
        if number < stage:
            (shutil.copytree if (whole / name).is_dir() else shutil.copyfile)(whole / name, data / name)


def one_line(capsys) -> str:
    """What a failed call said on stderr, which must be one line and no traceback."""
    said = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("a second")]
    assert len(said) == 1, said
    return said[0]


@pytest.mark.parametrize("stage", range(4), ids=STAGES[:4])
def test_a_full_disk_is_one_line_and_room_ends_it_with_the_same_bytes(shop, whole, server, disk, capsys, stage):
    expected = final(whole, range(stage, stage + 1))
    places = {0: ("batch", "cleaned.csv*"), 1: ("shards",), 2: ("run",), 3: ("embeddings",)}[stage]
    files = [path for place in places for top in whole.glob(place) for path in (top, *top.rglob("*"))]
    needed = sum(path.stat().st_size for path in files if path.is_file())
    failed = 0
    for share in (0.02, 0.4, 0.8):
        disk.mount("size=64m")
        data = disk.place / "data"
        upstream(whole, data, stage)
        disk.leave(int(needed * share))
        command = commands(shop, data)[stage]
        capsys.readouterr()
        code = call(command)
        if code != common.DONE:
            assert code == common.FAILED
            line = one_line(capsys)
            assert "No space left on device" in line or "SQLite: disk I/O error" in line, line
            failed += 1
        there = final(data, range(stage, stage + 1))  # whole, or not at all; a log grows line by line
        assert {name for name, content in there.items() if expected[name] != content} <= {"run/metrics.jsonl"}
        disk.change("size=64m")
        assert call(command) == common.DONE
        assert final(data, range(stage, stage + 1)) == expected
        assert not [path for path in data.rglob("*.tmp") if path.is_file()]
        disk.unmount()
    assert failed >= 2, "the disks were large enough: nothing is proven"


def test_kept_features_on_a_full_disk_are_an_error_and_no_signal(shop, whole, disk, capsys):
    disk.mount("size=64m")
    data = disk.place / "data"
    upstream(whole, data, 2)
    disk.leave(2 * 4096)
    command = [*commands(shop, data)[2], "--scenario", "linear_probe"]
    assert call(command) == common.FAILED
    assert "No space left on device" in one_line(capsys)
    disk.change("size=64m")
    assert call(command) == common.DONE


def test_votes_on_a_full_disk_are_refused_and_none_that_was_acknowledged_is_lost(shop, whole, disk):
    disk.mount("size=64m")
    arena = importlib.import_module("5_arena")
    master = str(whole / "embeddings/master.parquet")
    settings = arena.ArenaConfig(picture_size=64)
    setup = arena.Setup((master,), str(shop), str(disk.place / "arena.sqlite"), settings, KEYS)
    judge = Judge(arena.create_app(setup))
    disk.leave(8 * 4096)
    acknowledged = refused = 0
    while True:
        answer = judge.post("/trial", after=None)
        if answer.status_code == 200:
            if answer.json["trial"] is None:
                break
            answer = judge.post("/vote", trial=answer.json["trial"], choice="A")
            acknowledged += answer.status_code == 200
        if answer.status_code != 200:
            assert answer.status_code == 503 and "Nothing is lost" in answer.json["error"]
            refused += 1
            if refused == 3:
                disk.change("size=64m")
    assert refused >= 3, "the disk was never full"
    log = arena.Log(setup.database)
    assert log.connection.execute("SELECT COUNT(*) FROM votes").fetchone()[0] == acknowledged > 0


@pytest.mark.parametrize("stage", range(5), ids=STAGES)
def test_a_read_only_folder_is_one_line(shop, whole, server, disk, capsys, stage):
    disk.mount("size=64m")
    data = disk.place / "data"
    upstream(whole, data, stage)
    disk.change("ro")
    assert call(commands(shop, data)[stage]) == common.FAILED
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "read-only" in said.lower(), said


def test_without_the_right_to_write_it_is_one_line(shop, tmp_path, monkeypatch, capsys):
    """The same by permission: what a user who may not mount can prove; root is told so by the system's own answer."""
    (tmp_path / "data").mkdir(mode=0o555)
    if os.geteuid() == 0:
        monkeypatch.setattr(Path, "mkdir", _denied)
    assert call(commands(shop, tmp_path / "data")[1]) in (common.FAILED, common.USAGE)
    assert one_line(capsys)


def _denied(self, *_, **__):
    raise PermissionError(13, "Permission denied", str(self))


@pytest.mark.parametrize("stage", range(4), ids=STAGES[:4])
def test_a_file_that_may_not_grow_is_one_line_and_loses_nothing(shop, whole, server, tmp_path, capsys, stage):
    """RLIMIT_FSIZE refuses a write in its middle as a full disk does, and any user may set it."""
    data = tmp_path / "data"
    upstream(whole, data, stage)
    expected = final(whole, range(stage, stage + 1))
    command = commands(shop, data)[stage]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = max(len(content) for content in expected.values()) // 2
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        code = call(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == common.FAILED
    line = one_line(capsys)
    assert (
        "File too large; check the disk and its limits" in line or "No space left" in line or "SQLite: disk I/O" in line
    ), line
    assert call(command) == common.DONE
    assert final(data, range(stage, stage + 1)) == expected


def where(server: subprocess.Popen) -> str:
    """The address that a starting arena prints."""
    for line in server.stdout:
        if found := re.search(rb"Vote at +(http://[\d.:]+/)", line):
            return found[1].decode()
    raise AssertionError("the arena did not start")


# --------------------------------------------------------------------------------------------------------------------
# No UTF-8, no terminal, a strict umask, a small /dev/shm


def test_the_road_under_posix_locale_umask_077_closed_stderr_and_a_small_dev_shm(shop, whole, server, tmp_path):
    """Every stage as cron on a plain machine would run it; the bytes are those of the undisturbed run.

    /dev/shm has 64 KB where this user may mount: what passes there is a handful of semaphores.
    """
    data = tmp_path / "data"
    hidden = {name for name in os.environ if name.startswith(("LC_", "LANG", "PYTHON"))}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    mounting = "mount -t tmpfs -o size=64k tmpfs /dev/shm && "
    may = subprocess.run(["unshare", "-m", "sh", "-c", f"{mounting} true"], capture_output=True).returncode == 0
    script = f'umask 077; {mounting if may else ""} exec "$@" <&- 2>&-'
    for command in commands(shop, data)[:4]:
        wrapped = [*(["unshare", "-m"] if may else []), "sh", "-c", script, "sh", sys.executable, *command]
        ended = subprocess.run(wrapped, cwd=ROOT, env=environment, stdout=subprocess.PIPE, start_new_session=True)
        assert ended.returncode == common.DONE, ended.stdout.decode(errors="replace")
    assert final(data) == final(whole)
    assert "fotos/stühle/ø1.jpg" in (data / "cleaned.csv").read_text(encoding="utf-8")
    open_to_others = [path for path in data.rglob("*") if path.stat().st_mode & 0o077]
    assert not open_to_others
    serve = [sys.executable, *commands(shop, data)[4]]
    server = subprocess.Popen(serve, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    home = where(server)
    assert b"<form" in urllib.request.urlopen(home).read()
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == common.DONE
    exported = [sys.executable, "5_arena.py", "stats", "--database", str(data / "arena.sqlite")]
    said = subprocess.run(exported, cwd=ROOT, env=environment, capture_output=True)
    assert said.returncode == common.DONE and b"Traceback" not in said.stderr, said.stderr


# --------------------------------------------------------------------------------------------------------------------
# Little memory


def peak_of(command: list[str], until: Callable[[subprocess.Popen], None] | None = None) -> tuple[int, int]:
    """(exit code, bytes of memory): the sum of each process's own peak, more than they ever held together."""
    started = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    root, peaks = psutil.Process(started.pid), {}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(until or subprocess.Popen.communicate, started)
        while not waiting.done():
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                for process in (root, *root.children(recursive=True)):
                    told = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
                    peaks[process.pid] = int(told[1]) * 1024 if told else peaks.get(process.pid, 0)
            time.sleep(0.01)
        waiting.result()
    return started.wait(20), sum(peaks.values())


@pytest.fixture(scope="module")
def heavy(tmp_path_factory) -> Path:
    """A shop with pictures as large as any may be (64 million pixels), in the formats that cost most."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("heavy")
    make_shop(folder, 24)
    for i, (mode, kind, options) in enumerate([("RGBA", "PNG", {"compress_level": 1}), ("CMYK", "JPEG", {}),
                                               ("RGB", "JPEG", {"progressive": True})]):  # fmt: skip
        Image.new(mode, (8000, 8000), (90, 40 * i, 60, 200)[: len(mode)]).save(
            folder / f"fotos/stühle/ø{i}.jpg", kind, **options
        )
    return folder


def test_stages_1_2_and_5_do_with_2_gb(heavy, whole, server, tmp_path):
    """Two processes read photos, as on two cores. RLIMIT_AS would not do: threads reserve more than they use."""
    data = tmp_path / "data"
    for command in commands(heavy, data)[:2]:
        command[command.index("--workers") + 1] = "2"
        code, peak = peak_of(command)
        assert code == common.DONE
        assert 100e6 < peak < 2e9, f"{command[0]}: {peak / 1e6:.0f} MB"
    counts = json.loads((data / "shards/manifest.json").read_text())["counts"]
    assert counts == {"input": 24, "written": 24, "rejected": 0}  # the one without a photo ended in stage 1
    upstream(whole, data / "arena", 4)

    def look(started: subprocess.Popen) -> None:
        """Ask for the pictures of all items, six at once, as --reveal allows."""
        home = where(started)
        with ThreadPoolExecutor(6) as pool:
            pictures = pool.map(lambda row: urllib.request.urlopen(f"{home}item/{row}").read(), range(48))
            assert all(jpeg[:2] == b"\xff\xd8" for jpeg in pictures)
        started.send_signal(signal.SIGTERM)

    code, peak = peak_of([*commands(heavy, data / "arena")[4], "--reveal"], look)
    assert code == common.DONE
    assert 100e6 < peak < 2e9, f"5_arena.py: {peak / 1e6:.0f} MB"
