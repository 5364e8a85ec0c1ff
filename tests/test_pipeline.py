"""The whole road through make: what is rebuilt, what is not, and what a kill at any moment leaves behind."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SMALL = ["SAMPLE_COUNT=60", "EPOCHS=2", "TRAIN_FLAGS=--workers 1 --checkpoint-minutes 0"]
STEPS = ("sample", "1_clean", "2_prepare", "3_train", "4_embed")  # what `make all` runs, one after another
# All that the stages hand on, and their sidecars less the facts of the day; logs with times in them are left out.
FINAL = ("cleaned.csv", "cleaned.csv.*", "shards/**/*.tar", "shards/*.*", "runs/*/adapter/*", "runs/*/model/*",
         "runs/*/metrics.jsonl", "runs/*/curves.png", "runs/*/train.json", "embeddings/master.parquet*",
         "embeddings/report.*", "embeddings/queries.parquet")  # fmt: skip
OF_THE_DAY = re.compile(r'"(seconds|resume|batch|image|text)": [^\n]*')


def environment() -> dict[str, str]:
    """The caller's environment without keys, and with output line by line."""
    hidden = ("OPENAI_", "MAKE", "MFLAGS", "AWS_", "WANDB_")
    return {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | {"PYTHONUNBUFFERED": "1"}


def command(data: Path, *arguments: str, python: str = sys.executable) -> list[str]:
    return ["make", f"DATA={data}", f"PYTHON={python}", *SMALL, *arguments]


def make(data: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess:
    """Run make to its end."""
    options = {"cwd": ROOT, "env": environment(), "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command(data, *arguments, python=python), timeout=600, **options)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A python whose training and embedding start in no time, for the tests that start them often."""
    call = [sys.executable, "tests/warm.py", str(tmp_path_factory.mktemp("warm") / "socket")]
    with subprocess.Popen(call, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE) as server:
        assert server.stdout.readline() == "ready\n"
        yield " ".join(call)
        server.kill()


class Road:
    """`make all` under way in a process group of its own."""

    def __init__(self, data: Path, python: str):
        self.start = time.monotonic()
        self.process = subprocess.Popen(
            command(data, "all", python=python), cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.lines: list[tuple[float, str, str]] = []  # second, step, text
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        for text in self.process.stdout:
            started = [name for name in STEPS if sys.executable in text and f"{name}.py" in text]
            step = started[-1] if started else self.step
            self.lines.append((time.monotonic() - self.start, step, text))

    @property
    def step(self) -> str:
        """The step that is running."""
        return self.lines[-1][1] if self.lines else STEPS[0]

    def of(self, step: str) -> list[float]:
        """Seconds at which a step printed its lines, the first being its start."""
        return [second for second, name, _ in self.lines if name == step]

    def end(self) -> int:
        self.process.wait()
        self.reader.join()
        return self.process.returncode

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.end()


def final(data: Path) -> dict[str, bytes | str]:
    """What stands in every final file."""
    found: dict[str, bytes | str] = {}
    for path in sorted({path for pattern in FINAL for path in data.glob(pattern) if path.is_file()}):
        content: bytes | str = path.read_bytes()
        if path.suffix == ".json" and path.name != "manifest.json":
            content = OF_THE_DAY.sub("", content.decode()).replace(str(data), "")
        found[path.relative_to(data).as_posix()] = content
    return found


@dataclasses.dataclass
class Finished:
    """A folder in which `make all` has ended undisturbed, and how it went."""

    data: Path
    road: Road

    def __iter__(self):
        return iter((self.data, "".join(text for *_, text in self.road.lines)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, python) -> Finished:
    road = Road(data := tmp_path_factory.mktemp("road") / "data", python)
    assert road.end() == 0, "".join(text for *_, text in road.lines)
    return Finished(data, road)


def test_the_whole_road_ends_with_a_table_and_the_way_to_vote(finished):
    data, printed = finished
    assert "local stand-in" in printed and "small CLIP" in printed  # a run on the default says so
    assert "zero" in printed and "MRR" in printed and "make arena" in printed
    made = final(data)
    assert {"cleaned.csv", "shards/manifest.json", "embeddings/master.parquet", "embeddings/report.html"} <= set(made)
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
    assert "--restart" in plan and "resume" not in plan  # stage 3 knows best what it can go on with
    plan = make(data, "-n", "all", "SCENARIO=text_lora", "EPOCHS=2").stdout
    assert "--scenario text_lora" in plan and "2_prepare.py" not in plan
    plan = make(data, "-n", "all", "MODEL=ViT-B-32").stdout
    assert plan.count("--model ViT-B-32") == 3 and "2_prepare.py" in plan and "1_clean.py" not in plan
    assert "--pretrained" not in plan and "--image-size" not in plan  # weights and size follow the model
    plan = make(data, "-n", "all", "SEED=7").stdout
    assert "tests/sample.py" in plan and "2_prepare.py" in plan
    assert "Nothing to be done" in make(data, "all").stdout  # to look at a plan changes nothing


def test_the_proof_tests_on_every_product_and_makes_each_fold_once(finished, python):
    data, _ = finished
    ended = make(data, "proof", "FOLDS=3", python=python)
    assert ended.returncode == 0, ended.stdout
    called = re.findall(r"warm\.py \S+ (\d_[a-z]+)\.py ", ended.stdout)
    assert sorted(called) == ["2_prepare"] * 3 + ["3_train"] * 3 + ["4_embed"] * 4
    assert ended.stdout.count("--fold ") == 3
    assert "`make proof`" not in ended.stdout  # a fold's own report does not send one here
    report = json.loads((data / "proof/report.json").read_text())
    assert report["items"] == json.loads((data / "shards/manifest.json").read_text())["counts"]["written"]
    assert [run["name"] for run in report["runs"]] == ["dual_lora"] and len(report["folds"]) == 3
    again = make(data, "proof", "FOLDS=3", python=python).stdout
    assert "2_prepare.py" not in again and "3_train.py" not in again and " report " not in again
    assert "4_embed.py pool" in again
    assert "--epochs 3" in make(data, "-n", "proof", "FOLDS=3", "EPOCHS=3").stdout
    assert "Nothing to be done" in make(data, "all").stdout


def test_a_key_and_a_catalogue_mean_the_real_job(finished, tmp_path):
    (tmp_path / "shop.csv").write_text("id,name,image_path\n")
    plan = make(tmp_path / "data", "-n", "all", "OPENAI_API_KEY=sk-x", f"CATALOGUE={tmp_path}/shop.csv").stdout
    assert "openai_standin" not in plan and "--model ViT-B-32" in plan and "--pretrained" not in plan
    assert "sk-x" not in plan
    assert plan.index("3_train.py --check --scenario dual_lora") < plan.index("1_clean.py run")


def test_a_key_without_a_catalogue_pays_for_no_drawn_products(tmp_path):
    plan = make(tmp_path / "data", "-n", "all", "OPENAI_API_KEY=sk-x").stdout
    assert "openai_standin.py --state" in plan and "--poll-interval 0" in plan and "small_clip" in plan
    assert "--check " not in plan


def test_every_model_is_trained_by_the_same_flags(tmp_path):
    def plan(*variables: str) -> str:
        planned = ["make", "-n", "train", f"DATA={tmp_path}", *variables]
        printed = subprocess.run(planned, cwd=ROOT, env=environment(), text=True, capture_output=True).stdout
        return next(line for line in printed.splitlines() if "3_train.py" in line)

    other, small = plan("MODEL=ViT-B-32"), plan()
    assert small.replace("local-dir:tests/small_clip", "ViT-B-32") == other and "--epochs auto --seed 42" in small


def test_a_failing_recipe_leaves_no_target(tmp_path):
    (tmp_path / "shop.csv").write_text("id,title\n1,a\n")
    ended = make(tmp_path / "data", "all", f"CATALOGUE={tmp_path}/shop.csv")
    assert ended.returncode == 2 and "no column image_path" in ended.stdout and "Traceback" not in ended.stdout
    assert not (tmp_path / "data/cleaned.csv").exists()


def shop_in(folder: Path) -> Path:
    """A shop's own catalogue of three products, of which the last has no photo."""
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (64, 64), color).save(folder / name)
    (folder / "shop.csv").write_text("id,name,image_path\n1,Oak Table,a.png\n2,Red Sofa,b.png\n3,Lamp,none.png\n")
    return folder / "shop.csv"


def test_made_up_answers_never_pass_for_real_ones(tmp_path):
    catalogue, data = f"CATALOGUE={shop_in(tmp_path)}", tmp_path / "data"
    lenient = "CLEAN_FLAGS=--max-failed 0.5"
    ended = make(data, "clean-data", catalogue, lenient)
    assert ended.returncode == 0 and (data / "rehearsal/state.json").exists(), ended.stdout
    assert not (data / "batch").exists()
    assert "Nothing to be done" in make(data, "clean-data", catalogue, lenient).stdout
    assert "1_clean.py run" in make(data, "-n", "clean-data", catalogue, lenient, "COLUMNS=id=Maker's").stdout
    plan = make(data, "-n", "clean-data", catalogue, lenient, "OPENAI_API_KEY=sk-x").stdout
    assert "1_clean.py run" in plan and f"--workspace {data}/batch" in plan
    assert f"--workspace {data}/batch" in make(data, "-n", "clean-data").stdout  # the drawn sample
    made = (data / "cleaned.csv").read_bytes()
    shutil.copytree(data / "rehearsal", data / "batch")  # as if they had been paid for, and then the key was forgotten
    refused = make(data, "clean-data", catalogue, "CLEAN_FLAGS=--max-failed 0.9")
    assert refused.returncode and "set OPENAI_API_KEY" in refused.stdout and (data / "cleaned.csv").read_bytes() == made


def test_pictures_that_the_stages_make_are_no_photos_of_the_shop(tmp_path):
    """However IMAGES and DATA are spelled; and a quote in a variable is a character like any other."""
    variables = [f"CATALOGUE={shop_in(tmp_path)}", f"IMAGES={os.path.relpath(tmp_path, ROOT)}"]
    variables += ["CLEAN_FLAGS=--max-failed 0.5", "TRAIN_FLAGS=--wandb 'off'", "PREPARE_FLAGS=--fold brand's"]
    assert make(tmp_path / "data", "clean-data", *variables).returncode == 0
    (tmp_path / "data/runs").mkdir()
    shutil.copy(tmp_path / "a.png", tmp_path / "data/runs/curves.png")
    assert "Nothing to be done" in make(tmp_path / "data", "clean-data", *variables).stdout
    shutil.copy(tmp_path / "a.png", tmp_path / "c.png")
    assert "1_clean.py run" in make(tmp_path / "data", "-n", "clean-data", *variables).stdout


def test_a_poll_that_fails_leaves_no_cleaned_csv_of_its_own(tmp_path):
    catalogue, cleaned = shop_in(tmp_path), tmp_path / "data/cleaned.csv"
    polls = (make(tmp_path / "data", "poll", f"CATALOGUE={catalogue}") for _ in range(9))
    failed = next(ended for ended in polls if ended.returncode)
    assert "--max-failed" in failed.stdout and not cleaned.exists()
    cleaned.write_text("of an earlier poll")
    (tmp_path / "bad.csv").write_text("id,title\n1,a\n")
    assert make(tmp_path / "data", "poll", f"CATALOGUE={tmp_path}/bad.csv").returncode
    assert cleaned.read_text() == "of an earlier poll"


# --------------------------------------------------------------------------------------------------------------------
# A changed photo


def shards(data: Path) -> dict[str, int]:
    """Each shard and the time at which it was made."""
    return {path.relative_to(data).as_posix(): path.stat().st_mtime_ns for path in data.glob("shards/t*/*.tar")}


def split_of(data: Path, split: str) -> str:
    """The id of an item of a split that has no duplicate."""
    with open(data / "shards/items.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    groups = [row["group"] for row in rows]
    return next(row["id"] for row in rows if row["split"] == split and groups.count(row["group"]) == 1)


def rows_of(data: Path) -> dict[str, dict]:
    """The rows of master.parquet."""
    import pyarrow.parquet

    return {row["image_id"]: row for row in pyarrow.parquet.read_table(data / "embeddings/master.parquet").to_pylist()}


def test_a_changed_photo_is_cleaned_once_and_rebuilds_its_shard(finished, tmp_path):
    data, shop = tmp_path / "data", tmp_path / "shop"
    shutil.copytree(finished.data, data, copy_function=shutil.copy2)
    shutil.move(data / "sample", shop)
    shutil.move(data / "batch", data / "rehearsal")  # where answers of the stand-in lie for a catalogue of one's own
    variables = [f"CATALOGUE={shop}/catalogue.csv"]
    moved = make(data, "prepare", *variables)
    assert moved.returncode == 0 and "prepared: 0 new requests" in moved.stdout, moved.stdout
    made, cleaned, paid = shards(data), (data / "cleaned.csv").read_text(), bought(data)
    assert made == shards(finished.data) and paid == bought(finished.data)  # the same photos in another folder
    assert "Nothing to be done" in make(data, "prepare", *variables).stdout
    wanted = split_of(data, "validation")
    name = next(line["image_path"] for line in csv.DictReader(cleaned.splitlines()) if line["id"] == wanted)
    from PIL import ImageOps

    with Image.open(shop / name) as photo:
        turned = ImageOps.mirror(photo.convert("RGB"))
    turned.save(shop / name, "PNG" if name.endswith(".png") else "JPEG")
    ended = make(data, "prepare", *variables)
    assert ended.returncode == 0 and "prepared: 1 new requests" in ended.stdout, ended.stdout
    assert len(bought(data)) == len(paid) + 1
    assert {name for name, when in shards(data).items() if made[name] != when} <= {"shards/validation/shard-000000.tar"}
    assert (data / "shards/validation/shard-000000.tar").read_bytes() != (
        finished.data / "shards/validation/shard-000000.tar"
    ).read_bytes()
    others = [line for line in (data / "cleaned.csv").read_text().splitlines() if not line.startswith(wanted)]
    assert others == [line for line in cleaned.splitlines() if not line.startswith(wanted)]


def bought(data: Path) -> list[str]:
    """What the stand-in was asked and would have charged, line by line."""
    with sqlite3.connect(data / "standin/ledger.sqlite") as ledger:
        return [key for (key,) in ledger.execute("SELECT key FROM ledger WHERE event = 'paid' ORDER BY key")]


# --------------------------------------------------------------------------------------------------------------------
# Kills


# Files that are whole as soon as they are there, and those that are finished when a later step has begun.
ONCE = ("batch/raw/*.jsonl", "shards/*/*.tar")
BEFORE = {"2_prepare": ["cleaned.csv"], "3_train": ["shards/manifest.json"],
          "4_embed": ["runs/*/train.json", "runs/*/model/open_clip_*"]}  # fmt: skip


def stored_vectors(data: Path) -> dict[tuple[str, str], tuple[int, bytes]]:
    """(model's file, digest) -> (rowid, vector): a row that is written again has another rowid."""
    found = {}
    for path in (data / "embeddings/vectors").glob("*.sqlite"):
        with contextlib.closing(sqlite3.connect(path)) as store:
            for (table,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                rows = store.execute(f"SELECT rowid, digest, vector FROM {table}")
                found |= {(path.name, digest): (rowid, vector) for rowid, digest, vector in rows}
    return found


def sent(data: Path) -> set[str]:
    """Names of the request files that were sent; one that was not is made anew by the next call's settings."""
    path = data / "batch/state.json"
    state = json.loads(path.read_text()) if path.exists() else {"batches": {}}
    return {batch["input_file"] for batch in state["batches"].values()}


class Kept:
    """Watches finished work: what is whole once stays as it is, whatever is killed."""

    def __init__(self, data: Path):
        self.data, self.times, self.vectors, self.steps_done = data, {}, {}, 0

    def look(self, step: str) -> None:
        """Compare with what was there; `step` was running when it was killed."""
        done = [name for later, names in BEFORE.items() if STEPS.index(step) >= STEPS.index(later) for name in names]
        for path, when in self.times.items():
            assert path.stat().st_mtime_ns == when, f"{path} was made again"
        found = [path for pattern in (*ONCE, *done) for path in self.data.glob(pattern)]
        found += [self.data / "batch/requests" / name for name in sent(self.data)]
        self.times |= {path: path.stat().st_mtime_ns for path in found}
        vectors = stored_vectors(self.data)
        assert self.vectors.items() <= vectors.items(), "vectors were made again"
        self.vectors = vectors
        if (self.data / "runs/dual_lora/checkpoint.pt").exists():
            import torch

            reached = torch.load(self.data / "runs/dual_lora/checkpoint.pt", weights_only=True)["state"]["step"]
            assert reached >= self.steps_done, "steps were trained again"
            self.steps_done = reached


def test_killed_fifteen_times_it_ends_with_the_same_bytes_and_redoes_nothing(finished, python, tmp_path):
    """Three kills in each step, one in each third of the time that it took undisturbed (of the last: eighths)."""
    data, chance = tmp_path / "data", random.Random(15)
    calm, hits, kept = finished.road, dict.fromkeys(STEPS, 0), Kept(data)
    for kill in range(15):
        step, part = STEPS[kill // 3], kill % 3
        lines = calm.of(step)
        following = [second for later in STEPS[STEPS.index(step) + 1 :] for second in calm.of(later)]
        lasted = min(following, default=calm.lines[-1][0]) - lines[0]
        # With what an earlier call left, a step may end sooner; then the kill falls into the next. The last has none.
        moment = lasted * (part + chance.random()) / (8 if step == STEPS[-1] else 3)
        ahead = sum(second - lines[0] <= moment for second in lines)  # lines printed by then
        road = Road(data, python)
        while road.process.poll() is None:  # a step that goes on where it was may get there sooner, seen by its lines
            mine, past = road.of(step), STEPS.index(road.step) > STEPS.index(step)
            late = mine and time.monotonic() - road.start - mine[0] >= moment
            if late or past or (len(mine) >= ahead and moment - (lines[ahead - 1] - lines[0]) < 0.05):
                break
            time.sleep(0.005)
        road.kill()
        assert road.process.returncode == -signal.SIGKILL, f"kill {kill} came too late: {road.lines[-3:]}"
        hits[road.step] += 1
        kept.look(road.step)
    assert all(hits.values()), hits
    ended = make(data, "all", python=python)
    assert ended.returncode == 0, ended.stdout
    kept.look("4_embed")
    assert {path.parts[-3] for path in kept.times} >= {"batch", "shards", "runs"} and kept.steps_done > 0
    assert len(set(bought(data))) == len(bought(data)) and bought(data) == bought(finished.data)
    mine, calm_ones = final(data), final(finished.data)
    assert {name for name in calm_ones if mine.get(name) != calm_ones[name]} == set()
    assert not [path for path in data.rglob("*.tmp") if "standin" not in path.parts]
    assert "Nothing to be done" in make(data, "all").stdout


# --------------------------------------------------------------------------------------------------------------------
# A changed row


def test_a_changed_row_rebuilds_its_shard_its_vectors_and_its_row(finished):
    """In place, since another folder is another variable: the last test, for others compare with that folder."""
    data = finished.data
    before, made, model = rows_of(data), shards(data), (data / "runs/dual_lora/model/open_clip_model.safetensors")
    weights, wanted = model.read_bytes(), split_of(data, "test")
    with open(data / "cleaned.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        if row["id"] == wanted:
            row["clean_title"] = "Unheard-of Thing"
    with open(data / "cleaned.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    ended = make(data, "all")
    assert ended.returncode == 0, ended.stdout
    assert "1_clean.py" not in ended.stdout and "2_prepare.py" in ended.stdout
    assert {name for name, when in shards(data).items() if made[name] != when} == {"shards/test/shard-000000.tar"}
    assert model.read_bytes() == weights  # no training sample changed
    assert "computed: 0 pictures, 2 texts" in ended.stdout
    after = rows_of(data)
    assert after[wanted]["title"] == "Unheard-of Thing" != before[wanted]["title"]
    assert {id for id in after if after[id] != before[id]} == {wanted}
    assert "Nothing to be done" in make(data, "all").stdout
