"""The whole road through make: what is rebuilt, what is not, and what a kill at any moment leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["SAMPLE_COUNT=80", "EPOCHS=2", "TRAIN_FLAGS=--workers 1"]
# What the stages hand on. Sidecars hold seconds, logs hold dates: they are not among the bytes that must agree.
FINAL = ["cleaned.csv", "shards/**/*.tar", "shards/manifest.json", "runs/*/model/*", "embeddings/master.parquet"]


def make(data: Path, *arguments: str, wait: bool = True) -> subprocess.CompletedProcess | subprocess.Popen:
    """Run make in a process group of its own, with nothing of the caller's keys."""
    hidden = ("OPENAI_", "MAKE", "MFLAGS", "AWS_", "WANDB_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    command = ["make", f"DATA={data}", f"PYTHON={sys.executable}", *SMALL, *arguments]
    options = {"cwd": ROOT, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    if wait:
        return subprocess.run(command, timeout=600, **options)
    return subprocess.Popen(command, start_new_session=True, **options)


def digests(data: Path) -> dict[str, str]:
    """sha256 of every final file."""
    paths = sorted(path for pattern in FINAL for path in data.glob(pattern) if path.is_file())
    return {path.relative_to(data).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A folder in which `make all` has ended, and what it printed."""
    data = tmp_path_factory.mktemp("road") / "data"
    ended = make(data, "all")
    assert ended.returncode == 0, ended.stdout
    return data, ended.stdout


def test_the_whole_road_ends_with_a_table_and_the_way_to_vote(finished):
    data, printed = finished
    assert "local stand-in" in printed and "small CLIP" in printed  # a run on the default says so
    assert "zero" in printed and "MRR" in printed and "make arena" in printed
    made = digests(data)
    assert {"cleaned.csv", "shards/manifest.json", "embeddings/master.parquet"} <= set(made)
    manifest = json.loads((data / "shards/manifest.json").read_text())
    counts = manifest["counts"]
    assert counts["written"] + counts["rejected"] == counts["input"]
    assert sum(manifest["splits"][split]["samples"] for split in ("train", "validation", "test")) == counts["written"]
    import pyarrow.parquet

    assert pyarrow.parquet.read_metadata(data / "embeddings/master.parquet").num_rows == counts["written"]
    assert json.loads((data / "runs/dual_lora/train.json").read_text())["scenario"] == "dual_lora"


def test_nothing_touched_nothing_done(finished):
    data, _ = finished
    assert "Nothing to be done" in make(data, "all").stdout


def test_a_changed_variable_rebuilds_what_depends_on_it(finished):
    data, _ = finished
    plan = make(data, "-n", "all", "EPOCHS=3").stdout
    assert "3_train.py" in plan and "4_embed.py" in plan
    assert "1_clean.py" not in plan and "2_prepare.py" not in plan
    plan = make(data, "-n", "all", "SCENARIO=text_lora", "EPOCHS=2").stdout
    assert "--scenario text_lora" in plan and "2_prepare.py" not in plan
    plan = make(data, "-n", "all", "MODEL=ViT-B-32").stdout
    assert "--model ViT-B-32" in plan and "--pretrained openai" in plan and "2_prepare.py" not in plan
    plan = make(data, "-n", "all", "SEED=7").stdout
    assert "tests/sample.py" in plan and "2_prepare.py" in plan


def test_a_key_and_a_catalogue_mean_the_real_job(finished, tmp_path):
    (tmp_path / "shop.csv").write_text("id,name,image_path\n")
    plan = make(tmp_path / "data", "-n", "all", "OPENAI_API_KEY=sk-x", f"CATALOGUE={tmp_path}/shop.csv").stdout
    assert "openai_standin" not in plan and "--model ViT-B-32" in plan and "--pretrained openai" in plan
    assert "sk-x" not in plan


def test_a_failing_recipe_leaves_no_target(tmp_path):
    (tmp_path / "shop.csv").write_text("id,title\n1,a\n")
    ended = make(tmp_path / "data", "all", f"CATALOGUE={tmp_path}/shop.csv")
    assert ended.returncode == 2 and "no column name, image_path" in ended.stdout and "Traceback" not in ended.stdout
    assert not (tmp_path / "data/cleaned.csv").exists()


def test_killed_fifteen_times_it_ends_with_the_same_bytes(finished, tmp_path):
    undisturbed, _ = finished
    data = tmp_path / "data"
    moments = random.Random(15)
    markers: dict[Path, int] = {}  # finished outputs and the time at which they were
    for _ in range(15):
        started = make(data, "all", wait=False)
        try:
            started.communicate(timeout=moments.uniform(0.3, 7.0))
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.communicate()
        for marker, when in markers.items():
            assert marker.stat().st_mtime_ns == when, f"{marker} was made again"
        done = [data / "cleaned.csv", data / "runs/dual_lora/train.json", *data.glob("shards/*/*.tar")]
        # A shard that is there is whole; make's own targets are finished once make has gone on to the next.
        newer = {data / "cleaned.csv": data / "shards", data / "runs/dual_lora/train.json": data / "embeddings"}
        markers |= {p: p.stat().st_mtime_ns for p in done if p.exists() and newer.get(p, p).exists()}
        if started.returncode == 0:
            break
    ended = make(data, "all")
    assert ended.returncode == 0, ended.stdout
    assert markers, "no kill came after finished work: the test proves nothing"
    assert digests(data) == digests(undisturbed)
