"""4_embed.py on tiny shards and tiny models: vectors, their store, master.parquet, metrics, the report and search."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats as scipy_stats

import common
from faulty_proxy import FaultyProxy
from tiny import COLORS, STYLES, TYPES, make_clip, one_thread, picture

stage = importlib.import_module("4_embed")
ROOT = Path(__file__).parents[1]
one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)
COLUMNS = ("base_embedding", "finetuned_embedding", "base_text_embedding", "finetuned_text_embedding")

# --------------------------------------------------------------------------------------------------------------------
# Shards and models


def item(i: int, **changes) -> dict:
    """One product: a picture that no other has, a prompt that some share."""
    color, kind, style = list(COLORS)[i % 4], TYPES[i // 4 % 4], STYLES[i // 16 % 2]
    fields = {
        "id": f"00.{i}/ä", "title": f"{color} {kind}", "style": style, "material": "", "color": color,
        "object_type": kind, "image_path": f"photos/{i}.jpg", "group": f"00.{i}/ä", "source": "", "row": {},
        "jpg": jpeg(i, color, kind), "txt": f"a {style} {color} {kind}" + (f" number {i}" if i % 3 else ""),
    }  # fmt: skip
    return fields | changes


def jpeg(i: int, color: str, kind: str) -> bytes:
    """A picture that differs for each i, by a comment at its end that no decoder sees."""
    return picture(color, kind, i // 16) + b"%d" % i


def write_shards(folder: Path, splits: dict[str, list[dict]], per_shard: int = 10) -> Path:
    """A shard folder as 2_prepare.py writes it."""
    manifest = {"format": 1, "splits": {"train": {"samples": 0, "shards": []}}}
    key = 0
    for split, rows in splits.items():
        entries = []
        for number, start in enumerate(range(0, len(rows), per_shard)):
            path = folder / split / f"shard-{number:06d}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for row in rows[start : start + per_shard]:
                    record = {name: value for name, value in row.items() if name not in ("jpg", "txt")}
                    for kind, data in (("jpg", row["jpg"]), ("json", json.dumps(record).encode()),
                                       ("txt", row["txt"].encode())):  # fmt: skip
                        info = tarfile.TarInfo(f"{key:09d}.{kind}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
                    key += 1
            data = path.read_bytes()
            entries.append({
                "name": f"{split}/{path.name}", "samples": len(rows[start : start + per_shard]), "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            })  # fmt: skip
        manifest["splits"][split] = {"samples": len(rows), "shards": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def items_of(train: int = 40, validation: int = 8, test: int = 24) -> dict[str, list[dict]]:
    rows = [item(i) for i in range(train + validation + test)]
    rows[-1]["group"] = rows[-2]["group"] = rows[-2]["id"]
    return {"train": rows[:train], "validation": rows[train : train + validation], "test": rows[train + validation :]}


def make_run(folder: Path, seed: int, **changes) -> Path:
    """A finished run of 3_train.py."""
    make_clip(folder / "model", seed=seed, **changes)
    (folder / "train.json").write_text(json.dumps({"scenario": folder.name, "model_dir": "model", "inputs": {}}))
    (folder / "curves.png").write_bytes(b"\x89PNG of " + folder.name.encode())
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """shards/, base/, runs/{zero_shot,dual_lora,text_lora}, and master.parquet in out/ in float32."""
    folder = tmp_path_factory.mktemp("embed")
    write_shards(folder / "shards", items_of())
    make_clip(folder / "base")
    make_run(folder / "runs/dual_lora", seed=1)
    make_run(folder / "runs/text_lora", seed=2)
    (folder / "runs/zero_shot").mkdir()
    (folder / "runs/zero_shot/train.json").write_text(json.dumps({"scenario": "zero_shot", "model_dir": None}))
    assert embed(folder, folder / "out") == 0
    return folder


@pytest.fixture
def out(world, request) -> Path:
    """A folder beside the world's own: paths relative to it are the same, so equal work gives equal bytes."""
    return world / re.sub(r"\W", "_", request.node.name)


def arguments(world: Path, out: Path, *more: str, shards: Path | str | None = None) -> list[str]:
    command = f"--shards {shards or world / 'shards'} --model local-dir:{world / 'base'} --output {out}/master.parquet"
    if "--finetuned" not in more:
        command += f" --finetuned {world / 'runs/dual_lora/model'}"
    return [*command.split(), *(() if "--precision" in more else ("--precision", "fp32")), *more]


def embed(world: Path, out: Path, *more: str, shards: Path | str | None = None) -> int:
    return stage.main(arguments(world, out, *more, shards=shards))


def matrix(path: Path, column: str) -> np.ndarray:
    """A vector column as a matrix, without a copy."""
    chunk = pq.read_table(path, columns=[column])[column].combine_chunks()
    return chunk.flatten().to_numpy(zero_copy_only=True).reshape(len(chunk), -1)


def computed(out: Path) -> dict[str, int]:
    return json.loads((out / "master.parquet.json").read_text())["counts"]["computed"]


# --------------------------------------------------------------------------------------------------------------------
# The vectors


def plain(folder: Path, rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """What open_clip itself gives, one picture and one prompt at a time, in float32."""
    import open_clip
    from PIL import Image

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        pictures = [model.eval().encode_image(preprocess(Image.open(io.BytesIO(r["jpg"])))[None]) for r in rows]
        texts = [model.encode_text(tokenizer([row["txt"]])) for row in rows]
    return tuple(torch.nn.functional.normalize(torch.cat(x), dim=-1).numpy() for x in (pictures, texts))


@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.9999), ("bf16", 0.999)])
def test_vectors_are_those_of_plain_open_clip(world, tmp_path, precision, least):
    out = world / "out" if precision == "fp32" else tmp_path
    if precision == "bf16":
        assert embed(world, out, "--precision", "bf16") == 0
    rows = [row for split in items_of().values() for row in split]
    for kind, folder in (("base", world / "base"), ("finetuned", world / "runs/dual_lora/model")):
        for name, theirs in zip((f"{kind}_embedding", f"{kind}_text_embedding"), plain(folder, rows), strict=True):
            ours = matrix(out / "master.parquet", name)
            assert ours.shape == theirs.shape and ours.dtype == np.float32
            assert (ours * theirs).sum(axis=1).min() >= least
            assert abs(np.linalg.norm(ours, axis=1) - 1).max() <= 1e-5
    facts = pq.read_schema(out / "master.parquet").metadata
    assert facts[b"precision"] == f"{precision}/{precision}".encode()


def test_rows_stand_as_in_the_shards_and_the_metadata_names_the_models(world):
    table = pq.read_table(world / "out/master.parquet")
    splits = items_of()
    rows = [(split, row) for split, some in splits.items() for row in some]
    assert table.column_names == [*stage.COLUMNS, *COLUMNS]
    for name in ("image_path", "title", "style", "material", "color", "object_type", "group"):
        assert table[name].to_pylist() == [row[name] for _, row in rows]
    assert table["image_id"].to_pylist() == [row["id"] for _, row in rows]
    assert table["prompt"].to_pylist() == [row["txt"] for _, row in rows]
    assert table["split"].to_pylist() == [split for split, _ in rows]
    assert table["image_digest"].to_pylist() == [hashlib.sha256(row["jpg"]).hexdigest() for _, row in rows]
    assert table["text_digest"].to_pylist() == [hashlib.sha256(row["txt"].encode()).hexdigest() for _, row in rows]
    facts = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}

    for kind, folder in (("base", world / "base"), ("finetuned", world / "runs/dual_lora/model")):
        assert facts[f"{kind}_fingerprint"] == common.load_clip(f"local-dir:{folder}").fingerprint
        place, _ = common.model_place(facts[f"{kind}_model"], world / "out/master.parquet")
        assert Path(place.removeprefix("local-dir:")).resolve() == folder.resolve()
    assert facts["scenario"] == "dual_lora" and str(world) not in facts["finetuned_model"]
    sidecar = json.loads((world / "out/master.parquet.json").read_text())
    assert sidecar["counts"]["input"] == sidecar["counts"]["written"] + sidecar["counts"]["rejected"] == len(rows)


def test_the_file_opens_in_pandas_and_duckdb_and_as_a_matrix_without_a_copy(world):
    import duckdb
    import pandas

    path = world / "out/master.parquet"
    frame = pandas.read_parquet(path)
    whole = matrix(path, "base_embedding")
    assert np.array_equal(np.stack(frame["base_embedding"]), whole)
    assert not whole.flags.owndata and whole.flags.c_contiguous
    query = f"select image_id, list_dot_product(base_embedding, finetuned_embedding) from '{path}' where split = 'test'"
    found = duckdb.sql(query).fetchall()
    both = (whole * matrix(path, "finetuned_embedding")).sum(axis=1)[-24:]
    assert [row[0] for row in found] == [row["id"] for row in items_of()["test"]]
    assert np.allclose([row[1] for row in found], both, atol=1e-6)
    file = pq.ParquetFile(path)
    assert file.num_row_groups == 8 and file.metadata.row_group(0).num_rows == 10  # by shard, so memory stays flat
    assert file.schema_arrow.field("base_embedding").type.list_size == 16


def test_a_vector_does_not_depend_on_its_neighbours(world, out):
    """So what is made after a kill, by two processes or in another order, has the same bits."""
    assert embed(world, out, "--batch-size", "7", "--workers", "1") == 0
    assert (out / "master.parquet").read_bytes() == (world / "out/master.parquet").read_bytes()
    clip = common.load_clip(f"local-dir:{world / 'base'}")
    for precision in ("fp32", "bf16"):
        encoder = stage.Encoder(clip, precision, out, 64)
        pixels = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
        whole, order = encoder.images(pixels), torch.randperm(40)
        assert torch.equal(encoder.images(pixels[order]), whole[order])
        assert torch.equal(torch.cat([encoder.images(pixels[i : i + 3]) for i in range(0, 40, 3)]), whole)
        captions = [row["txt"] for row in items_of()["train"]] + ["a much longer prompt than all the others here"]
        captions.append("word " * 100)  # fills the context
        apart = torch.cat([encoder.texts([caption]) for caption in captions])
        assert torch.equal(encoder.texts(captions), apart)


def test_half_precision_that_is_not_true_is_not_used(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage, "bf16_cosine", lambda *_: 0.9987)
    assert embed(world, tmp_path, "--precision", "bf16") == 0
    assert "cosine of 0.99870 only; float32 is used" in capsys.readouterr().out
    assert np.array_equal(
        matrix(tmp_path / "master.parquet", COLUMNS[0]), matrix(world / "out/master.parquet", COLUMNS[0])
    )


def test_the_first_pictures_are_what_half_precision_is_checked_on(world, tmp_path):
    assert embed(world, tmp_path, "--precision", "bf16") == 0
    notes = [json.loads(path.read_text()) for path in (tmp_path / "vectors").glob("*.json")]
    assert len(notes) == 2 and all(0.999 <= note["cosine"] <= 1.001 for note in notes)
    prints = pq.read_schema(tmp_path / "master.parquet").metadata
    assert {note["fingerprint"].encode() for note in notes} == {prints[f"{k}_fingerprint".encode()]
                                                                for k in ("base", "finetuned")}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# The store: kill and go on, reuse


def kept_vectors(out: Path) -> dict[str, bytes]:
    """Everything that the stores below a folder hold."""
    found = {}
    for path in sorted((out / "vectors").glob("*.sqlite")):
        with contextlib.closing(sqlite3.connect(path)) as database, contextlib.suppress(sqlite3.OperationalError):
            found |= {f"{path.name} {digest}": vector for digest, vector in database.execute("SELECT * FROM vectors")}
    return found


def test_dead_after_every_write_it_ends_with_the_same_bytes(world, out, monkeypatch):
    """Each run dies before its second write: vectors, the report, the sidecar, master.parquet ..."""
    monkeypatch.setattr(stage, "FLUSH_VECTORS", 32)
    replace, flush, writes = os.replace, stage.VectorStore.flush, []

    class Dead(BaseException):
        pass

    def count(name: str) -> None:
        if writes:
            raise Dead
        writes.append(name)

    def dying_replace(source, target):
        if not Path(target).exists():
            count(Path(target).name)
        replace(source, target)

    def dying_flush(self):
        if self.waiting:
            count("vectors")
        flush(self)

    monkeypatch.setattr(os, "replace", dying_replace)
    monkeypatch.setattr(stage.VectorStore, "flush", dying_flush)
    everything, kept, code = [], {}, None
    while code != common.DONE:
        writes.clear()
        with contextlib.suppress(Dead):
            code = embed(world, out, "--batch-size", "32")
        now = kept_vectors(out)
        assert writes and kept.items() <= now.items()
        everything += writes
        kept = now
    prompts = {row["txt"] for some in items_of().values() for row in some}
    assert everything.count("vectors") == 2 * (-(-72 // 32) + -(-len(prompts) // 32))
    assert everything[-5:] == ["queries.parquet", "report.html", "report.json", "master.parquet.json", "master.parquet"]
    for name in ("master.parquet", "report.json", "report.html", "queries.parquet"):
        assert (out / name).read_bytes() == (world / "out" / name).read_bytes()


def test_ctrl_c_keeps_what_was_made(world, out, monkeypatch, capsys):
    """The batches since the last write are written on the way out."""
    images, calls = stage.Encoder.images, []

    def interrupted(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return images(self, pixels)

    monkeypatch.setattr(stage.Encoder, "images", interrupted)
    assert embed(world, out, "--batch-size", "8") == common.INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err and not (out / "master.parquet").exists()
    assert len(kept_vectors(out)) == 5 * 8
    calls.clear()
    monkeypatch.setattr(stage.Encoder, "images", lambda *args: calls.append(len(args[1])) or images(*args))
    assert embed(world, out, "--batch-size", "8") == common.DONE
    assert sum(calls) == 2 * 72 - 5 * 8
    assert (out / "master.parquet").read_bytes() == (world / "out/master.parquet").read_bytes()


def test_killed_while_it_computes_it_goes_on(world, tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "shards", items_of(train=1300), per_shard=200)
    command = [sys.executable, str(ROOT / "4_embed.py"), *arguments(world, tmp_path / "out", shards=shards)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not kept_vectors(tmp_path / "out"):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "out/master.parquet").exists()
    kept = kept_vectors(tmp_path / "out")
    assert kept
    calls = []
    for method in ("images", "texts"):
        monkeypatch.setattr(stage.Encoder, method, watched(getattr(stage.Encoder, method), calls))
    assert embed(world, tmp_path / "out", shards=shards) == 0
    made = len(kept_vectors(tmp_path / "out"))
    assert sum(count for _, count in calls) == made - len(kept), "what was there is not made again"
    assert embed(world, tmp_path / "new", shards=shards) == 0
    assert kept_vectors(tmp_path / "out") == kept_vectors(tmp_path / "new")
    ours, theirs = (tmp_path / name / "master.parquet" for name in ("out", "new"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_nothing_changed_nothing_computed_and_the_file_is_left_alone(world, tmp_path, monkeypatch, capsys):
    assert embed(world, tmp_path) == 0
    path = tmp_path / "master.parquet"
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    monkeypatch.setattr(stage.Encoder, "images", None)  # calling it would raise
    monkeypatch.setattr(stage.Encoder, "texts", None)
    assert embed(world, tmp_path) == 0
    assert "computed: 0 pictures, 0 prompts" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before


def test_another_finetuned_model_computes_its_own_columns_only(world, tmp_path, monkeypatch):
    assert embed(world, tmp_path) == 0
    before = {name: matrix(tmp_path / "master.parquet", name).copy() for name in COLUMNS}
    seen = {"images": [], "texts": []}
    for method, calls in seen.items():
        monkeypatch.setattr(stage.Encoder, method, watched(getattr(stage.Encoder, method), calls))
    assert embed(world, tmp_path, "--finetuned", str(world / "runs/text_lora")) == 0
    prompts = {row["txt"] for some in items_of().values() for row in some}
    for method, count in (("images", 72), ("texts", len(prompts))):
        assert {name for name, _ in seen[method]} == {str(world / "runs/text_lora/model")}
        assert sum(rows for _, rows in seen[method]) == count
    for name in COLUMNS:
        same = np.array_equal(matrix(tmp_path / "master.parquet", name), before[name])
        assert same == name.startswith("base"), name
    assert pq.read_schema(tmp_path / "master.parquet").metadata[b"scenario"] == b"text_lora"


def watched(method, calls: list):
    """An Encoder's method that writes down whose rows it is given, and how many."""

    def call(self, rows):
        calls.append((self.clip.name, len(rows)))
        return method(self, rows)

    return call


def test_each_picture_is_decoded_once_for_both_models(world, tmp_path, monkeypatch):
    decode, decoded = common.decode_jpeg, []
    monkeypatch.setattr(common, "decode_jpeg", lambda data, size: decoded.append(data) or decode(data, size))
    assert embed(world, tmp_path) == 0
    assert len(decoded) == len({*decoded}) == 72


def test_equal_pictures_and_prompts_are_computed_once(world, tmp_path):
    splits = items_of()
    for row in splits["train"][:30]:
        row["jpg"], row["txt"] = splits["test"][0]["jpg"], splits["test"][0]["txt"]
    assert embed(world, tmp_path, "--batch-size", "8", shards=write_shards(tmp_path / "shards", splits)) == 0
    prompts = {row["txt"] for some in splits.values() for row in some}
    assert computed(tmp_path) == {"image": 72 - 30, "text": len(prompts)}
    rows = matrix(tmp_path / "master.parquet", COLUMNS[0])
    assert len(rows) == 72 and (rows[:30] == rows[48]).all()


def test_new_products_compute_their_rows_only(world, tmp_path):
    splits = items_of()
    assert embed(world, tmp_path / "old", shards=write_shards(tmp_path / "shards", splits)) == 0
    assert computed(tmp_path / "old") == {
        "image": 72,
        "text": len({row["txt"] for some in splits.values() for row in some}),
    }
    known = {row["txt"] for some in splits.values() for row in some}
    splits["train"] = [item(i) for i in range(900, 1000)] + splits["train"]  # all others stand elsewhere now
    shards = write_shards(tmp_path / "more", splits, per_shard=7)
    assert embed(world, tmp_path / "old", shards=shards) == 0
    assert computed(tmp_path / "old") == {"image": 100, "text": len({item(i)["txt"] for i in range(900, 1000)} - known)}
    assert embed(world, tmp_path / "new", shards=shards) == 0
    assert (tmp_path / "old/master.parquet").read_bytes() == (tmp_path / "new/master.parquet").read_bytes()


def test_a_damaged_store_is_named_and_made_again(world, out, capsys):
    assert embed(world, out) == 0
    (out / "master.parquet").unlink()
    path = next((out / "vectors").glob("*.sqlite"))
    whole = path.read_bytes()
    for content in (b"no database at all" * 500, whole[:5000] + b"\xff" * 20_000 + whole[25_000:]):
        path.write_bytes(content)
        one_line(capsys, embed(world, out), path.name, "damaged", "remove it and run again")
    path.unlink()
    assert embed(world, out) == 0
    assert (out / "master.parquet").read_bytes() == (world / "out/master.parquet").read_bytes()


def test_two_processes_share_the_work_and_give_the_same_bytes(world, out):
    command = [sys.executable, str(ROOT / "4_embed.py"), *arguments(world, out)]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["OMP_NUM_THREADS"] = "1"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, cwd=ROOT, **pipes)
        for rank in "01"
    ]
    printed = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], printed[0][-3000:]
    assert (out / "master.parquet").read_bytes() == (world / "out/master.parquet").read_bytes()
    assert "encoding: 38 pictures" in printed[0] and "encoding: 34 pictures" in printed[1]  # every other shard
    prompts = {row["txt"] for some in items_of().values() for row in some}
    assert computed(out) == {"image": 72, "text": len(prompts)}
    assert "test split" in printed[0] and "test split" not in printed[1]


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_memory_stays_flat_at_ten_times_the_rows(world, tmp_path, monkeypatch):
    """At most 2 KB a row: its text and digests. Pictures and vectors stream."""
    peaks = []
    monkeypatch.setattr(stage, "FLUSH_VECTORS", 128)
    encoder = stage.Encoder(common.load_clip(f"local-dir:{world / 'base'}"), "fp32", tmp_path, 32)
    config, world_ = stage.EmbeddingConfig(precision="fp32", batch_size=32), common.World("cpu")
    for count in (300, 300, 3000):  # the first time pays for what is imported and kept once
        folder = tmp_path / f"{count}-{len(peaks)}"
        write_shards(folder / "shards", items_of(train=count), per_shard=100)
        tracemalloc.start()
        shards = stage.open_shards(str(folder / "shards"), common.SPLITS, folder, config)
        encoder = stage.Encoder(encoder.clip, "fp32", folder, 32)
        rows, computed_ = stage.make_vectors(shards, [encoder], config, world_)
        stage.write_master(folder / "master.parquet", rows, [encoder, encoder], {})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert computed_["image"] == len(rows) == count + 32 and computed_["text"] > count / 2
    assert peaks[2] <= 1.1 * peaks[1] + 2048 * 2700, peaks


# --------------------------------------------------------------------------------------------------------------------
# Shards on S3


@pytest.fixture
def bucket(world, monkeypatch):
    """The shards in a bucket of moto, behind a proxy that spoils connections; gives the proxy."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    common._s3_client.cache_clear()
    common._s3_client(os.getpid()).create_bucket(Bucket="shop")
    for name, _ in common.list_files(world / "shards"):
        common.upload_atomic(world / "shards" / name, f"s3://shop/shards/{name}")
    with FaultyProxy(port, seed=180) as proxy:  # the first connection is refused, the second cut early
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        common._s3_client.cache_clear()
        yield proxy
    common._s3_client.cache_clear()
    server.stop()


def test_shards_on_s3_give_the_same_bytes(world, out, bucket):
    bucket.cut, bucket.refuse = 0.2, 0.1
    assert embed(world, out, shards="s3://shop/shards") == 0
    assert bucket.cuts and bucket.refusals, "nothing was spoilt: the test proves nothing"
    assert (out / "master.parquet").read_bytes() == (world / "out/master.parquet").read_bytes()
    assert not list(out.rglob("*.tar")), "no copy of a shard stays"


def test_shards_on_s3_that_need_more_disk_than_allowed_are_refused(world, out, bucket, capsys):
    one_line(capsys, embed(world, out, "--cache-gb", "0", shards="s3://shop/shards"), "--cache-gb 0", "raise it")


def test_missing_and_forbidden_shards_on_s3_get_one_line(world, out, bucket, capsys):
    one_line(capsys, embed(world, out, shards="s3://shop/none"), "s3://shop/none/manifest.json", "404")
    common.s3_call(
        "s3://shop/shards/test/shard-000001.tar", lambda s3, bucket, key: s3.delete_object(Bucket=bucket, Key=key)
    )
    one_line(capsys, embed(world, out, shards="s3://shop/shards"), "test/shard-000001.tar", "404")
    bucket.forbid = True
    one_line(capsys, embed(world, out, shards="s3://shop/shards"), "403", "AWS_ACCESS_KEY_ID")


# --------------------------------------------------------------------------------------------------------------------
# Bad input


def one_line(capsys, code: int, *words: str) -> None:
    """The exit code of the last run, and one line on stderr that holds these words."""
    error = [
        line for line in capsys.readouterr().err.splitlines() if re.match(r"\S+: ", line) and " a second" not in line
    ]
    assert code not in (0, None) and len(error) == 1, error
    for word in words:
        assert word in error[0], (word, error[0])


def test_broken_pictures_are_named_and_left_out(world, tmp_path, capsys):
    splits = items_of()
    splits["train"][3]["jpg"] = b"\xff\xd8\xff not a picture"
    shards = write_shards(tmp_path / "shards", splits)
    assert embed(world, tmp_path, shards=shards) == 0
    assert "input 72 = written 71 + rejected 1" in capsys.readouterr().out
    reject = json.loads((tmp_path / "master.parquet.rejects.jsonl").read_text())
    assert reject["id"] == splits["train"][3]["id"] and "damaged JPEG" in reject["reason"]
    ids = pq.read_table(tmp_path / "master.parquet")["image_id"].to_pylist()
    assert len(ids) == 71 and splits["train"][3]["id"] not in ids
    for row in splits["train"][:9]:
        row["jpg"] = b"\xff\xd8\xff not a picture"
    code = embed(world, tmp_path / "many", shards=write_shards(tmp_path / "worse", splits))
    one_line(capsys, code, "9 of 72", "unreadable", "--max-failed")
    assert not (tmp_path / "many/master.parquet").exists()


def test_a_model_that_gives_nan_stops_it(world, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = make_clip(tmp_path / "broken", seed=3)
    state = load_file(folder / "open_clip_model.safetensors")
    state["visual.proj"][0, 0] = float("nan")
    save_file(state, folder / "open_clip_model.safetensors")
    code = embed(world, tmp_path, "--finetuned", str(folder))
    one_line(capsys, code, "broken", "length nan", "shard-000000.tar", "train it again")
    assert not (tmp_path / "master.parquet").exists()


def test_a_model_of_another_width_is_refused(world, tmp_path, capsys):
    make_clip(tmp_path / "wide", seed=3, embed_dim=24)
    code = embed(world, tmp_path, "--finetuned", str(tmp_path / "wide"))
    one_line(capsys, code, "width 24", "of 16", "fine-tuned from")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--finetuned", "nowhere/model"], ["nowhere", "no finished run", "3_train.py"]),
        (["--finetuned", "{world}/shards"], ["no finished run"]),
        (["--finetuned", "{world}/runs/zero_shot/model"], ["is the base model itself"]),
        (["--shards", "{world}/out"], ["no such manifest", "2_prepare.py"]),
        (["--model", "local-dir:{world}/none"], ["no such model folder"]),
        (["--model", "ViT-B-99"], ["neither a folder nor an open_clip model"]),
        (["--device", "cuda:99"], ["--device cuda:99"]),
    ],
)
def test_a_wrong_place_gets_one_line(world, tmp_path, capsys, change, words):
    change = [part.format(world=world) for part in change]
    one_line(capsys, embed(world, tmp_path, *change), *words)


def test_an_empty_test_split_and_damaged_shards_get_one_line(world, tmp_path, capsys):
    shards = write_shards(tmp_path / "shards", items_of() | {"test": []})
    one_line(capsys, embed(world, tmp_path, shards=shards), "test split is empty", "more rows")
    shards = write_shards(tmp_path / "cut", items_of())
    path = shards / "test/shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-5000])
    one_line(capsys, embed(world, tmp_path, shards=shards), "10 of 72", "10 damaged shard", "test/shard-000001.tar",
             "not the bytes that its manifest", "--max-failed")  # fmt: skip
    path.unlink()
    one_line(capsys, embed(world, tmp_path, shards=shards), "test/shard-000001.tar", "missing shard")
    code = stage.main([*report_arguments(world, tmp_path / "report")[:-2], "--run", str(tmp_path / "none")])
    one_line(capsys, code, "no finished run")


def test_a_damaged_shard_is_counted_sample_by_sample_and_made_good_later(world, out, capsys):
    shards = write_shards(out / "shards", items_of())
    path = shards / "train/shard-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert embed(world, out, "--max-failed", "0.2", shards=shards) == 0
    assert "input 72 = written 62 + rejected 10" in capsys.readouterr().out
    rejects = [json.loads(line) for line in (out / "master.parquet.rejects.jsonl").read_text().splitlines()]
    assert [line["row"] for line in rejects] == [*range(10, 20)] and {r["reason"] for r in rejects} == {"damaged shard"}
    path.write_bytes(whole)
    assert embed(world, out, shards=shards) == 0
    assert computed(out)["image"] == 10 and (out / "master.parquet.rejects.jsonl").read_text() == ""
    assert len(pq.read_table(out / "master.parquet")) == 72


@pytest.mark.parametrize("kind", ["json", "txt", "jpg", "record", "archive"])
def test_what_no_stage_2_wrote_is_counted_too(world, tmp_path, kind, monkeypatch):
    """The manifest names these very bytes, but they are not those of samples."""
    shards = write_shards(tmp_path / "shards", items_of())
    path = shards / "train/shard-000000.tar"
    if kind == "archive":
        path.write_bytes(path.read_bytes()[: 40 * 512])
    else:
        with tarfile.open(path) as old:
            members = [(member, old.extractfile(member).read()) for member in old]
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as new:
            for member, data in members:
                if member.name == "000000003.json" and kind == "record":
                    data = b"[1]"
                    member.size = 3
                if member.name != f"000000003.{kind}":
                    new.addfile(member, io.BytesIO(data))
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (shards / "manifest.json").write_text(json.dumps(manifest))
    assert embed(world, tmp_path, "--max-failed", "0.2", shards=shards) == 0
    rejects = [json.loads(line) for line in (tmp_path / "master.parquet.rejects.jsonl").read_text().splitlines()]
    table = pq.read_table(tmp_path / "master.parquet")
    assert len(table) + len(rejects) == 72
    if kind == "archive":
        assert len(rejects) > 1 and {line["reason"] for line in rejects[1:]} == {"damaged shard"}
    else:
        assert [(line["id"], line["reason"]) for line in rejects] == [("000000003", "broken sample")]


def test_a_test_split_without_a_readable_picture_gets_one_line(world, tmp_path, capsys):
    splits = items_of(test=2)
    for row in splits["test"]:
        row["jpg"] = b"not a picture"
    code = embed(world, tmp_path, shards=write_shards(tmp_path / "shards", splits))
    one_line(capsys, code, "no picture of the test split can be read")


def test_a_split_of_the_same_shards_that_changed_is_written_anew(world, tmp_path):
    shards = write_shards(tmp_path / "shards", items_of(train=20, validation=10, test=20))
    assert embed(world, tmp_path, shards=shards) == 0
    manifest = json.loads((shards / "manifest.json").read_text())
    splits = manifest["splits"]
    splits["train"]["shards"] += splits["validation"]["shards"]
    splits["validation"] = {"samples": 0, "shards": []}
    (shards / "manifest.json").write_text(json.dumps(manifest))
    assert embed(world, tmp_path, shards=shards) == 0
    assert pq.read_table(tmp_path / "master.parquet")["split"].to_pylist() == ["train"] * 30 + ["test"] * 20


def test_two_at_once_are_refused(world, tmp_path, capsys):
    with common.exclusive(tmp_path / "vectors/.lock"):
        one_line(capsys, embed(world, tmp_path), "another 4_embed.py is working there")


# --------------------------------------------------------------------------------------------------------------------
# Metrics


def naive_retrieval(queries, gallery, prompt, group) -> dict[str, list[float]]:
    """The definitions, written out: sort all answers, wrong ones first among equals, and count."""
    found: dict[str, list[float]] = {name: [] for name in ("recall@1", "recall@5", "recall@10", "mrr")}
    for i in range(len(queries)):
        answers = []
        for j in range(len(gallery)):
            score = np.float32(sum(float(a) * float(b) for a, b in zip(queries[i], gallery[j], strict=True)))
            answers.append((-score, prompt[i] == prompt[j] or group[i] == group[j]))
        places = [place for place, (_, right) in enumerate(sorted(answers), 1) if right]
        for k in (1, 5, 10):
            found[f"recall@{k}"].append(float(any(place <= k for place in places)))
        found["mrr"].append(1 / min(places))
    return found


def naive_agreement(images, attributes, group, k: int = 4) -> dict[str, list[float]]:
    """Of equal scores the earlier row is the nearer."""
    found: dict[str, list[float]] = {name: [] for name in (*attributes, "all")}
    for i in range(len(images)):
        score = {j: float(np.float32(np.dot(images[i].astype(float), images[j].astype(float))))
                 for j in range(len(images)) if group[j] != group[i]}  # fmt: skip
        near = sorted(score, key=lambda j: (-score[j], j))[:k]
        known = [name for name, values in attributes.items() if values[i]]
        agree = {name: [values[j] == values[i] for j in near] for name, values in attributes.items()}
        for name in attributes:
            found[name].append(np.mean(agree[name]) if near and name in known else np.nan)
        all_agree = [all(agree[name][place] for name in known) for place in range(len(near))]
        found["all"].append(np.mean(all_agree) if near and known else np.nan)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_metrics_against_their_definition(seed, monkeypatch):
    """Small whole numbers as vectors: many ties; prompts, groups and attributes that several items share."""
    monkeypatch.setattr(common, "BLOCK_SCORES", 100)
    rng = np.random.default_rng(seed)
    n, width = int(rng.integers(1, 40)), int(rng.integers(1, 6))
    images, texts = (rng.integers(-2, 3, (n, width)).astype(np.float32) for _ in range(2))
    if seed % 4 == 0:  # lengths that no float holds exactly, and duplicates among them
        images = images / np.maximum(np.linalg.norm(images, axis=1, keepdims=True), 1)
        images[n // 2 :] = images[: n - n // 2]
    prompt, group = (rng.integers(0, max(1, n // 2), n) for _ in range(2))
    names = ("style", "material", "color", "object_type")
    attributes = {name: [("", "a", "b")[v] for v in rng.integers(0, 3, n)] for name in names}
    items = pd.DataFrame({"prompt": prompt, "group": group, **attributes})
    scores = stage.judge(images, texts, items)
    for way, queries, gallery in (("text_to_image", texts, images), ("image_to_text", images, texts)):
        for name, values in naive_retrieval(queries, gallery, prompt, group).items():
            assert np.allclose(scores[f"{way}_{name}"], values, rtol=0, atol=1e-9), (way, name)
    for name, values in naive_agreement(images, attributes, group).items():
        assert np.allclose(scores[f"agreement@4_{name}"], values, rtol=0, atol=1e-9, equal_nan=True), name
    both = [scores[f"{way}_mrr"] for way in ("text_to_image", "image_to_text")]
    assert np.allclose(scores["mrr"], np.mean(both, axis=0), rtol=0, atol=1e-12)


def test_a_model_that_finds_everything_alike_is_not_rewarded():
    columns = {name: [str(i) for i in range(50)] for name in ("prompt", "group")}
    columns |= {name: ["a"] * 3 + ["b"] * 47 for name in common.ATTRIBUTES}
    same = np.ones((50, 4), np.float32) / 2
    scores = stage.judge(same, same, pd.DataFrame(columns))
    assert scores["text_to_image_mrr"].max() == 1 / 50 and scores["text_to_image_recall@10"].max() == 0
    assert scores["agreement@4_all"][0] == 0.5 and (scores["agreement@4_all"][4:] == 0.25).all()  # the first rows win


def test_clusters_are_what_shares_right_answers_in_any_way():
    clusters = stage.clusters_of(np.array([[0, 0], [0, 1], [1, 1], [2, 2], [3, 3], [3, 4]]))
    assert clusters.tolist() == [0, 0, 0, 1, 2, 2]


def test_equal_vectors_get_equal_scores_wherever_they_stand():
    rng = np.random.default_rng(0)
    row = rng.normal(size=(1, 37)).astype(np.float32)
    queries = rng.normal(size=(3, 37)).astype(np.float32)
    scores, found = common.top_k(queries, np.repeat(row, 5003, axis=0), 7)
    assert (scores == scores[:, :1]).all() and found.tolist() == [[*range(7)]] * 3
    ranks = common.right_ranks(np.repeat(queries[:1], 5003, axis=0), np.repeat(row, 5003, axis=0), np.arange(5003))
    assert (ranks == 5003).all()


# --------------------------------------------------------------------------------------------------------------------
# Holm's correction and the paired bootstrap


def test_holm_against_the_definition():
    assert stage.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    rng = np.random.default_rng(0)
    for count in range(1, 8):
        p = rng.random(count) ** 2
        ordered = sorted(p)
        naive = [max(min(1, (count - j) * ordered[j]) for j in range(ordered.index(x) + 1)) for x in p]
        assert stage.holm(p) == pytest.approx(naive)
    assert stage.holm([]) == []
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        stage.holm([0.1, float("nan")])


def covers(draw, truth, cases=1000):
    hits = 0
    for case in range(cases):
        b, groups = draw()
        result = stage.paired_bootstrap(np.zeros(len(b)), b, draws=499, seed=case, groups=groups)
        hits += result["low"] <= truth <= result["high"]
    return hits / cases


@pytest.mark.parametrize("count", [50, 100, 200])
@pytest.mark.parametrize("kind", ["normal", "skewed", "recall", "reciprocal", "clusters"])
def test_the_bootstrap_interval_covers_the_truth(kind, count):
    rng = np.random.default_rng(count)

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
    assert 0.93 <= covers(draw, truth) <= 0.97


def test_p_agrees_with_the_interval_and_with_the_t_test():
    rng = np.random.default_rng(3)
    seen = set()
    for case in range(300):
        b = rng.normal(0.25, 1, size=60) if case % 2 else rng.choice([-1.0, 0, 1], size=60, p=[0.1, 0.65, 0.25])
        result = stage.paired_bootstrap(np.zeros(60), b, draws=1000, seed=case)
        outside = result["low"] > 0 or result["high"] < 0
        seen.add(outside)
        assert (result["p"] <= 0.05) == outside
        if case % 2:
            assert result["p"] == pytest.approx(scipy_stats.ttest_1samp(b, 0).pvalue, abs=0.07)
    assert seen == {True, False}


def test_exchanging_the_models_mirrors_the_difference():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=80), rng.normal(0.4, 1, size=80)
    there, back = stage.paired_bootstrap(a, b), stage.paired_bootstrap(b, a)
    assert there["difference"] == pytest.approx((b - a).mean()) and back["difference"] == -there["difference"]
    ends = (-there["high"], -there["low"], there["p"])
    assert (back["low"], back["high"], back["p"]) == pytest.approx(ends)
    assert stage.paired_bootstrap(a, b, seed=stage.SEED) == there != stage.paired_bootstrap(a, b, seed=1)


def test_few_kinds_of_groups_have_the_distribution_of_drawn_groups():
    values = np.random.default_rng(5).choice([-1.0, 0, 1], size=400, p=[0.1, 0.6, 0.3])
    residuals, ones = values - values.mean(), np.ones(400)
    fast = stage.resampled_distances(residuals, ones, 0.0, 20_000, np.random.default_rng(0))
    drawn = values[np.random.default_rng(1).integers(0, 400, size=(20_000, 400))]
    naive = abs(drawn.mean(axis=1) - values.mean()) / (drawn.std(axis=1, ddof=1) / 20)
    assert np.quantile(fast, [0.5, 0.9, 0.95, 0.99]) == pytest.approx(
        np.quantile(naive, [0.5, 0.9, 0.95, 0.99]), abs=0.05
    )


def test_groups_of_several_sizes_are_studentised_as_by_hand():
    rng = np.random.default_rng(8)
    sums, sizes = rng.normal(size=12), rng.integers(1, 5, size=12).astype(float)
    mean = sums.sum() / sizes.sum()
    far = stage.resampled_distances(sums - mean * sizes, sizes, 0.0, 5, np.random.default_rng(0))
    picks = np.random.default_rng(0).integers(0, 12, size=(5, 12), dtype=np.int32)
    for pick, value in zip(picks, far, strict=True):
        drawn = sums[pick].sum() / sizes[pick].sum()
        error = np.sqrt(12 / 11 * sum((sums[g] - drawn * sizes[g]) ** 2 for g in pick)) / sizes[pick].sum()
        assert value == pytest.approx(abs(drawn - mean) / error)


def test_copies_in_a_group_add_no_certainty():
    rng = np.random.default_rng(6)
    values = rng.normal(size=50)
    once = stage.paired_bootstrap(np.zeros(50), values)
    copied = stage.paired_bootstrap(
        np.zeros(500), np.repeat(values, 10), groups=[str(i) for i in range(50) for _ in range(10)]
    )
    assert copied == pytest.approx(once)


def test_blocks_bound_memory_without_changing_the_answer(monkeypatch):
    values = np.random.default_rng(7).normal(size=300)
    whole = stage.paired_bootstrap(np.zeros(300), values)
    monkeypatch.setattr(stage, "BOOTSTRAP_NUMBERS", 7_000)
    blocks = stage.paired_bootstrap(np.zeros(300), values)
    assert blocks == pytest.approx(whole)


def test_bootstrap_edges():
    def found(*scores, **more):
        return tuple(stage.paired_bootstrap(*scores, **more)[name] for name in ("difference", "low", "high", "p"))

    assert found([1.0], [2.0]) == (1.0, None, None, 1.0)
    assert found([1.0] * 5, [1.0] * 5) == (0.0, 0.0, 0.0, 1.0)
    assert found([0.0] * 10, [1.0] * 10) == (1.0, 1.0, 1.0, 2.0**-9)
    assert found([0.0] * 3, [1.0] * 3) == (1.0, None, None, 0.25)
    assert found([0.0] * 4, [1.0] * 4, groups=["x"] * 4)[3] == 1.0
    for a, b in [([], []), ([1.0], [1.0, 2.0]), ([float("nan")] * 3, [1.0] * 3)]:
        with pytest.raises(ValueError):
            stage.paired_bootstrap(a, b)
    with pytest.raises(ValueError, match="equally long scores and groups"):
        stage.paired_bootstrap([0.0] * 3, [1.0] * 3, groups=["x", "y"])


# --------------------------------------------------------------------------------------------------------------------
# Search in blocks


def naive_top(queries, matrix_, k, exclude=None):
    scores = (queries.astype(float) @ matrix_.astype(float).T).astype(np.float32)
    if exclude is not None:
        scores[np.asarray(exclude[0])[:, None] == np.asarray(exclude[1])[None]] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, order, 1)
    return best, np.where(np.isinf(best), -1, order)


@pytest.mark.parametrize("seed", range(60))
def test_search_against_a_full_sort(seed):
    rng = np.random.default_rng(seed)
    width, count, k = rng.integers(1, 9), rng.integers(1, 30), int(rng.integers(1, 6))
    queries = rng.integers(-2, 3, (count, width)).astype(np.float32)
    gallery = rng.integers(-2, 3, (rng.integers(k, 120), width)).astype(np.float32)
    exclude = (rng.integers(0, 50, count), rng.integers(0, 50, len(gallery))) if seed % 2 else None
    scores, indices = naive_top(queries, gallery, k, exclude)
    step = int(rng.integers(1, 40))
    for source in (gallery, (gallery[start : start + step] for start in range(0, len(gallery), step))):
        found = common.top_k(queries, source, k, exclude)
        assert np.array_equal(found[0], scores) and np.array_equal(found[1], indices)
        assert found[0].dtype == np.float32 and found[1].dtype == np.int64


def test_search_does_not_build_the_full_matrix():
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(1500, 16)).astype(np.float32), rng.normal(size=(60_000, 16)).astype(np.float32)
    gallery[50_000] = gallery[7]
    tracemalloc.start()
    scores, indices = common.top_k(queries, gallery, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6 < 4 * len(queries) * len(gallery)
    some = rng.integers(0, 1500, 50)
    expected = naive_top(queries[some], gallery, 4)
    assert np.array_equal(indices[some], expected[1]) and np.array_equal(scores[some], expected[0])


def test_search_of_too_few_and_of_broken_vectors():
    scores, indices = common.top_k(np.ones((2, 3)), np.ones((2, 3)), 4, ([0, 1], [0, 0]))
    assert indices.tolist() == [[-1] * 4, [0, 1, -1, -1]] and scores[1].tolist() == [3, 3, -np.inf, -np.inf]
    broken = np.ones((5, 3))
    broken[3, 1] = np.nan
    with pytest.raises(common.Fail, match="a vector holds NaN"):
        common.top_k(np.ones((1, 3)), broken, 1)
    with pytest.raises(common.Fail, match="width 3 cannot be searched with queries of 2"):
        common.top_k(np.ones((1, 2)), broken, 1)


# --------------------------------------------------------------------------------------------------------------------
# The report


def report_arguments(world: Path, out: Path, *runs: str) -> list[str]:
    command = f"report --shards {world / 'shards'} --model local-dir:{world / 'base'} --output {out} --precision fp32"
    command += f" --vectors {world / 'out/vectors'}"
    return [*command.split(), *(part for run in runs for part in ("--run", str(world / "runs" / run)))]


def test_the_report_says_what_the_vectors_say(world, tmp_path, capsys):
    assert stage.main(report_arguments(world, tmp_path, "zero_shot", "dual_lora", "text_lora")) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    rows = items_of()["test"]
    assert report["items"] == 24 and [run["name"] for run in report["runs"]] == ["dual_lora", "text_lora"]
    path = world / "out/master.parquet"
    prompt, group = [row["txt"] for row in rows], [row["group"] for row in rows]
    kinds = [row["object_type"] for row in rows]
    for kind, judged in (("base", report["base"]), ("finetuned", report["runs"][0])):
        images, texts = matrix(path, f"{kind}_embedding")[-24:], matrix(path, f"{kind}_text_embedding")[-24:]
        value = {n: f if kind == "base" else f["value"] for n, f in judged["metrics"].items()}
        for way, queries, gallery in (("text_to_image", texts, images), ("image_to_text", images, texts)):
            for name, values in naive_retrieval(queries, gallery, prompt, group).items():
                assert value[f"{way}_{name}"] == pytest.approx(np.mean(values), abs=1e-9)
        agreed = naive_agreement(images, {name: [row[name] for row in rows] for name in common.ATTRIBUTES}, group)
        assert value["agreement@4_material"] is None, "no item has a material"
        for name in ("object_type", "style", "color", "all"):
            assert value[f"agreement@4_{name}"] == pytest.approx(np.mean(agreed[name]), abs=1e-9)
        for name, of_type in judged["by_type"].items():
            of = [i for i, kind_ in enumerate(kinds) if kind_ == name]
            assert of_type["items"] == len(of)
            assert of_type["agreement@4_color"] == pytest.approx(np.mean([agreed["color"][i] for i in of]), abs=1e-9)
    for run in report["runs"]:
        for name, facts in run["metrics"].items():
            if "difference" in facts:
                base = report["base"]["metrics"][name]
                assert facts["difference"] == pytest.approx(facts["value"] - base, abs=1e-9)
                assert facts["p"] <= facts["p_holm"] <= 1
                assert facts["low"] is None or facts["low"] <= facts["difference"] <= facts["high"]
        assert run["verdict"] in printed
    assert "zero-shot" in printed and "dual_lora" in printed and "both ways  MRR" in printed


def test_the_report_uses_vectors_that_are_there(world, tmp_path, monkeypatch):
    monkeypatch.setattr(stage.Encoder, "images", None)
    monkeypatch.setattr(stage.Encoder, "texts", None)
    assert stage.main(report_arguments(world, tmp_path, "dual_lora")) == 0
    together = json.loads((world / "out/report.json").read_text())
    assert json.loads((tmp_path / "report.json").read_text()) == together, "embed and report say the same"


def reports_of_two_folds(world: Path, tmp_path: Path) -> list[Path]:
    """Reports over the world's test split, and over one of 13 other products."""
    others = {"train": [item(0)], "validation": [item(1)], "test": [item(i) for i in range(200, 213)]}
    others["test"][1]["group"] = others["test"][0]["group"]
    shards = write_shards(tmp_path / "shards", others)
    folders = [tmp_path / "first", tmp_path / "second"]
    assert stage.main(report_arguments(world, folders[0], "dual_lora", "text_lora")) == 0
    second = report_arguments(world, folders[1], "dual_lora", "text_lora")
    second[second.index("--shards") + 1] = str(shards)
    second[second.index("--vectors") + 1] = str(tmp_path / "vectors")
    assert stage.main(second) == 0
    return folders


def pooled(folders: list[Path], output: Path) -> list[str]:
    return ["pool", *(part for folder in folders for part in ("--report", str(folder))), "--output", str(output)]


def test_reports_of_folds_are_one_report_over_all_their_queries(world, tmp_path, capsys):
    folders = reports_of_two_folds(world, tmp_path)
    assert stage.main(pooled(folders, tmp_path / "proof")) == 0
    printed = capsys.readouterr().out
    parts = [json.loads((folder / "report.json").read_text()) for folder in folders]
    whole = json.loads((tmp_path / "proof/report.json").read_text())
    assert whole["items"] == 37 and whole["independent"] == sum(part["independent"] for part in parts)
    for i, run in enumerate(whole["runs"]):
        for name, facts in run["metrics"].items():
            of_parts = [part["runs"][i]["metrics"][name] for part in parts]
            counts = [one["queries"] for one in of_parts]
            assert facts["queries"] == sum(counts)
            if facts["queries"]:
                for key in ("value", "difference"):
                    mean = sum(one.get(key, 0) * count for one, count in zip(of_parts, counts, strict=True))
                    assert facts[key] == pytest.approx(mean / sum(counts), abs=1e-9)
        assert run["verdict"] in printed
        gains = [part["runs"][i]["metrics"]["mrr"]["difference"] for part in parts]
        assert [fold[run["name"]] for fold in whole["folds"]] == gains and f"{gains[1]:+.3f}" in printed
    tables = [pq.read_table(folder / "queries.parquet") for folder in folders]
    base, fine = (np.concatenate([t[f"{n}/mrr"].to_numpy() for t in tables]) for n in ("zero_shot", "dual_lora"))
    draws = np.concatenate([tables[0]["draw"].to_numpy(), tables[1]["draw"].to_numpy() + 1000])
    found = stage.paired_bootstrap(base, fine, groups=draws)
    mrr = whole["runs"][0]["metrics"]["mrr"]
    assert (mrr["low"], mrr["high"]) == pytest.approx((found["low"], found["high"]))
    assert "2 folds share" in (tmp_path / "proof/report.html").read_text()


def test_reports_that_are_no_folds_of_one_catalogue_are_refused(world, tmp_path, capsys):
    folders = reports_of_two_folds(world, tmp_path)
    assert stage.main(report_arguments(world, tmp_path / "other", "dual_lora")) == 0
    capsys.readouterr()
    for pair, words in (
        ([folders[0], folders[0]], "tests on 00.48/ä"),
        ([folders[1], tmp_path / "other"], "other runs"),
        ([folders[0], tmp_path / "nowhere"], "nowhere"),
    ):
        one_line(capsys, stage.main(pooled(pair, tmp_path / "proof")), words)
    (folders[1] / "queries.parquet").write_bytes(b"PAR1")
    one_line(capsys, stage.main(pooled(folders, tmp_path / "proof")), "queries.parquet", "make the report again")
    assert not (tmp_path / "proof").exists()


def test_holm_is_over_every_difference_shown():
    rng = np.random.default_rng(0)
    base = {name: rng.random(60) for name in stage.METRICS}
    better = {name: np.minimum(values + rng.random(60) * 0.5, 1) for name, values in base.items()}
    nearly = {name: values + rng.normal(0, 0.1, 60) for name, values in base.items()}
    found = stage.compare(base, [better, nearly], np.arange(60), 2000, 1)
    everything = [facts for metrics in found for facts in metrics.values()]
    assert len(everything) == 2 * len(stage.METRICS)
    least = min(facts["p"] for facts in everything)
    assert min(facts["p_holm"] for facts in everything) == pytest.approx(least * len(everything))
    words = [stage.verdict(name, metrics["mrr"]) for name, metrics in zip("ab", found, strict=True)]
    assert words[0].startswith("a is better than zero-shot: MRR 0.") and "after Holm's correction" in words[0]
    unsure = found[0]["mrr"] | {"p_holm": 0.051}
    assert stage.verdict("a", unsure).endswith("], p = 0.0510 after Holm's correction")
    assert "a looks better, but that is not certain" in stage.verdict("a", unsure)
    assert "no difference to zero-shot is shown" in words[1]
    worse, same = (m["mrr"] for m in stage.compare(better, [base, better], np.arange(60), 2000, 1))
    assert "c is WORSE than zero-shot" in stage.verdict("c", worse)
    assert stage.verdict("d", same) == f"d: no query differs from zero-shot, MRR {same['value']:.3f}"
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, None, None, 1)


def test_most_moved_queries_are_one_a_prompt():
    items = pd.DataFrame({"image_id": [*"abcde"], "title": "t", "prompt": [*"ppqrs"]})
    base, new = ({"text_to_image_rank": np.array(ranks)} for ranks in ([9, 4, 3, 1, 2], [1, 1, 2, 4, 2]))
    for scores in (base, new):
        scores["text_to_image_mrr"] = 1 / scores["text_to_image_rank"]
    moved = stage.most_moved(items, base, new)
    assert [query["item"] for query in moved["gained"]] == [0, 2] and [q["id"] for q in moved["lost"]] == ["d"]
    assert moved["lost"] == [
        {"item": 3, "id": "d", "title": "t", "prompt": "r", "zero_shot_rank": 1, "rank": 4}
    ]  # fmt: skip
    assert stage.most_moved(items, base, base) == {"gained": [], "lost": []}


def test_the_page_stands_alone_and_shows_all_parts(world, tmp_path):
    hostile = "<script>alert('x')</script> & \"so\""
    splits = items_of()
    for row in splits["test"]:
        row["title"], row["txt"] = f"{hostile} {row['title']}", f"{hostile} {row['txt']}"
    assert embed(world, tmp_path, shards=write_shards(tmp_path / "shards", splits)) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page and "@import" not in page
    assert page.count("<h2>") >= 5 and 'class="whisker"' in page
    curves = base64.b64encode((world / "runs/dual_lora/curves.png").read_bytes()).decode()
    assert f'src="data:image/png;base64,{curves}"' in page
    for picture_ in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)[:5]:
        from PIL import Image

        image = Image.open(io.BytesIO(base64.b64decode(picture_)))
        assert image.format == "JPEG" and max(image.size) <= 128
    report = json.loads((tmp_path / "report.json").read_text())
    moved = report["moved"]
    assert moved["gained"] and all(query["rank"] < query["zero_shot_rank"] for query in moved["gained"])
    assert all(query["rank"] > query["zero_shot_rank"] for query in moved["lost"])
    assert page.count("<article>") == len(moved["gained"]) + len(moved["lost"]) <= 20


def test_runs_of_one_name_are_told_apart_and_a_foreign_base_is_named(world, tmp_path, capsys):
    run = make_run(tmp_path / "runs/dual_lora", seed=1)
    (run / "train.json").write_text(
        json.dumps({"scenario": "dual_lora", "model_dir": "model", "inputs": {"base_fingerprint": "another"}})
    )
    command = report_arguments(world, tmp_path)
    assert stage.main([*command, "--run", str(run), "--run", str(run)]) == 0
    assert "NOTE: dual_lora was not trained from" in capsys.readouterr().out
    assert [run["name"] for run in json.loads((tmp_path / "report.json").read_text())["runs"]] == [
        "dual_lora", "dual_lora (2)"
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Search at a terminal


def searched(world: Path, capsys, *more: str) -> list[list[str]]:
    capsys.readouterr()
    assert stage.main(["search", *more, "--embeddings", str(world / "out/master.parquet")]) == 0
    return [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]


def test_search_by_picture_finds_the_picture(world, tmp_path, capsys):
    row = items_of()["test"][5]
    (tmp_path / "photo.jpg").write_bytes(row["jpg"])
    found = searched(world, capsys, "--image", str(tmp_path / "photo.jpg"), "--top-k", "3")
    assert len(found) == 3 and found[0][0] == "1" and float(found[0][1]) == pytest.approx(1, abs=2e-3)
    same = [
        r
        for some in items_of().values()
        for r in some
        if r["jpg"].split(b"\xff\xd9")[0] == row["jpg"].split(b"\xff\xd9")[0]
    ]
    assert found[0][2] in [r["id"] for r in same] and found[0][4] in [r["image_path"] for r in same]


def test_search_by_words_agrees_with_the_vectors(world, capsys):
    path = world / "out/master.parquet"
    rows = [row for some in items_of().values() for row in some]
    for using in ("base", "finetuned"):
        found = searched(world, capsys, rows[50]["txt"], "--using", using, "--top-k", "5")
        query = matrix(path, f"{using}_text_embedding")[50]
        scores = matrix(path, f"{using}_embedding") @ query
        assert found[0][2] == rows[int(np.argmax(scores))]["id"]
        assert [float(line[1]) for line in found] == pytest.approx(np.sort(scores)[::-1][:5], abs=1e-3)


def test_a_base_named_by_its_folder_alone_is_found_again(world, out, capsys):
    assert embed(world, out, "--model", str(world / "base")) == 0
    assert embed(world, out / "tag", "--model", "ViT-tiny", "--pretrained", f"local-dir:{world / 'base'}") == 0
    for path in (out / "master.parquet", out / "tag/master.parquet"):
        assert pq.read_schema(path).metadata[b"base_model"].decode() == f"local-dir:{world / 'base'}"
        assert stage.main(["search", "a chair", "--embeddings", str(path), "--using", "base"]) == 0


def test_too_little_memory_is_one_line(world, out, capsys, monkeypatch):
    def compute(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(stage, "make_vectors", compute)
    assert embed(world, out) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.endswith("out of memory; lower --batch-size")


def test_search_with_words_and_picture_is_between_the_two(world, tmp_path, capsys):
    (tmp_path / "photo.jpg").write_bytes(items_of()["test"][5]["jpg"])
    image = ["--image", str(tmp_path / "photo.jpg"), "--top-k", "1"]
    alone, both = searched(world, capsys, *image), searched(world, capsys, "a red chair", *image)
    assert float(both[0][1]) < float(alone[0][1])


def test_a_closed_pipe_is_no_damaged_file(world, monkeypatch, capsys):
    """search ... | head"""

    def closed(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("builtins.print", closed)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    with open(os.devnull, "w") as nowhere:
        monkeypatch.setattr(sys, "stdout", nowhere)
        assert stage.main(["search", "chair", "--embeddings", str(world / "out/master.parquet")]) == common.DONE
    assert capsys.readouterr().err == ""


def test_bad_searches_get_one_line(world, tmp_path, capsys):
    embeddings = ["--embeddings", str(world / "out/master.parquet")]
    one_line(capsys, stage.main(["search", *embeddings]), "search for what?")
    one_line(capsys, stage.main(["search", "x", "--embeddings", str(tmp_path / "no")]), "no such file")
    one_line(capsys, stage.main(["search", "--image", str(tmp_path / "no.jpg"), *embeddings]), "missing file")
    (tmp_path / "page.jpg").write_text("<html>")
    one_line(capsys, stage.main(["search", "--image", str(tmp_path / "page.jpg"), *embeddings]), "not an image")
    (tmp_path / "x.parquet").write_text("not Parquet")
    one_line(capsys, stage.main(["search", "x", "--embeddings", str(tmp_path / "x.parquet")]), "not a readable Parquet")
    code = stage.main(["search", "x", *embeddings, "--model", f"local-dir:{world / 'runs/text_lora/model'}"])
    one_line(capsys, code, "not the model that made the vectors")


def test_help_is_quick_and_names_the_commands():
    started = time.monotonic()
    printed = subprocess.run(
        [sys.executable, str(ROOT / "4_embed.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert time.monotonic() - started < 2  # half a second on a quiet machine
    assert all(word in printed for word in ("embed", "report", "search", "--finetuned", "--batch-size"))
    code = "import sys, importlib; importlib.import_module('4_embed'); print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert told.stdout.strip() == "False"
