"""Stage 4 on tiny shards and tiny models: vectors, the store, master.parquet, metrics, the report and search."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import clip
import common
import retrieval
import storage
import vectors
from faulty_proxy import FaultyProxy
from tiny import COLORS, STYLES, TYPES, make_clip, picture

stage = importlib.import_module("4_embed")
ROOT = Path(__file__).parents[1]
FAST = ["--draws", "100"]
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
    lines = [{"kind": "step", "step": i, "loss": 3 - i / 10} for i in range(9)]
    lines += [{"kind": "validation", "step": i, "epoch": i, "loss": 3.0} for i in (0, 8)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
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
    return [*command.split(), *FAST, *(() if "--precision" in more else ("--precision", "fp32")), *more]


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
    import torch
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
        assert facts[f"{kind}_fingerprint"] == clip.load_clip(f"local-dir:{folder}").fingerprint
        place, _ = clip.model_place(facts[f"{kind}_model"], world / "out/master.parquet")
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
    import torch

    clip = importlib.import_module("clip").load_clip(f"local-dir:{world / 'base'}")
    for precision in ("fp32", "bf16"):
        encoder = vectors.Encoder(clip, precision, out)
        pixels = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
        whole, order = encoder.images(pixels, 64), torch.randperm(40)
        assert torch.equal(encoder.images(pixels[order], 64), whole[order])
        assert torch.equal(torch.cat([encoder.images(pixels[i : i + 3], 64) for i in range(0, 40, 3)]), whole)
        captions = [row["txt"] for row in items_of()["train"]] + ["a much longer prompt than all the others here"]
        apart = np.concatenate([encoder.texts([caption], 64) for caption in captions])
        assert np.array_equal(encoder.texts(captions, 64), apart)


def test_half_precision_that_is_not_true_is_not_used(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vectors, "half_cosine", lambda *_: 0.9987)
    assert embed(world, tmp_path, "--precision", "bf16") == 0
    assert "cosine of 0.99870 only; float32 is used" in capsys.readouterr().out
    assert np.array_equal(
        matrix(tmp_path / "master.parquet", COLUMNS[0]), matrix(world / "out/master.parquet", COLUMNS[0])
    )


def test_the_first_pictures_are_what_half_precision_is_checked_on(world, tmp_path):
    assert embed(world, tmp_path, "--precision", "bf16") == 0
    notes = [json.loads(path.read_text()) for path in (tmp_path / "vectors").glob("*/model.json")]
    assert len(notes) == 2 and all(0.999 <= note["cosine"] <= 1.001 for note in notes)


# --------------------------------------------------------------------------------------------------------------------
# The store: kill and go on, reuse


def test_dead_after_every_file_it_ends_with_the_same_bytes(world, out, monkeypatch):
    """Each run dies as its second new file is about to appear: an index, a part, master.parquet, the report ..."""
    monkeypatch.setattr(vectors, "PART", 32)
    replace, appeared = os.replace, []

    class Dead(BaseException):
        pass

    def dying(source, target):
        if not Path(target).exists():
            if appeared:
                raise Dead
            appeared.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    everything, kept, code = [], {}, None
    while code != common.DONE:
        appeared.clear()
        with contextlib.suppress(Dead):
            code = embed(world, out)
        assert appeared and all(path.stat().st_mtime_ns == when for path, when in kept.items()), "made again"
        everything += appeared
        made = [*out.rglob("*.npy"), *out.glob("master.parquet")]
        kept = {path: path.stat().st_mtime_ns for path in made}
    prompts = {row["txt"] for some in items_of().values() for row in some}
    parts = 2 * (-(-72 // 32) + -(-len(prompts) // 32))
    assert sum(name.endswith(".npy") for name in everything) == parts
    assert everything[-4:] == ["report.html", "report.json", "master.parquet.json", "master.parquet"]
    for name in ("master.parquet", "report.json", "report.html", "queries.parquet"):
        assert (out / name).read_bytes() == (world / "out" / name).read_bytes()


def test_ctrl_c_keeps_what_was_made(world, out, monkeypatch, capsys):
    """The batches since the last part are written on the way out."""
    images, calls = vectors.Encoder.images, []

    def interrupted(self, pixels, batch_size):
        calls.append(len(pixels))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return images(self, pixels, batch_size)

    monkeypatch.setattr(vectors.Encoder, "images", interrupted)
    assert embed(world, out, "--batch-size", "8") == common.INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err and not (out / "master.parquet").exists()
    assert len(list(out.rglob("*.npy"))) == 2
    calls.clear()
    monkeypatch.setattr(vectors.Encoder, "images", lambda *args: calls.append(len(args[1])) or images(*args))
    assert embed(world, out, "--batch-size", "8") == common.DONE
    assert sum(calls) == 2 * 72 - 5 * 8
    assert (out / "master.parquet").read_bytes() == (world / "out/master.parquet").read_bytes()


def test_killed_while_it_computes_it_goes_on(world, tmp_path):
    shards = write_shards(tmp_path / "shards", items_of(train=3000), per_shard=500)
    command = [sys.executable, str(ROOT / "4_embed.py"), *arguments(world, tmp_path / "out", shards=shards)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not list((tmp_path / "out/vectors").glob("*/image/*.npy")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "out/master.parquet").exists()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert kept
    assert embed(world, tmp_path / "out", shards=shards) == 0
    assert kept == {path: path.stat().st_mtime_ns for path in kept}, "what was there is not made again"
    assert embed(world, tmp_path / "new", shards=shards) == 0
    ours, theirs = (tmp_path / name / "master.parquet" for name in ("out", "new"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_nothing_changed_nothing_computed_and_the_file_is_left_alone(world, tmp_path, monkeypatch, capsys):
    assert embed(world, tmp_path) == 0
    path = tmp_path / "master.parquet"
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    monkeypatch.setattr(vectors.Encoder, "images", None)  # calling it would raise
    monkeypatch.setattr(vectors.Encoder, "texts", None)
    assert embed(world, tmp_path) == 0
    assert "computed: 0 pictures, 0 prompts" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before


def test_another_finetuned_model_computes_its_own_columns_only(world, tmp_path, monkeypatch):
    assert embed(world, tmp_path) == 0
    before = {name: matrix(tmp_path / "master.parquet", name).copy() for name in COLUMNS}
    seen = {"images": [], "texts": []}
    for method, calls in seen.items():
        monkeypatch.setattr(vectors.Encoder, method, watched(getattr(vectors.Encoder, method), calls))
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

    def call(self, rows, batch_size):
        calls.append((self.clip.name, len(rows)))
        return method(self, rows, batch_size)

    return call


def test_each_picture_is_read_and_decoded_once_for_both_models(world, tmp_path, monkeypatch):

    decode, decoded, read, rows_read = clip.decode_jpeg, [], vectors.Items.jpegs, []
    monkeypatch.setattr(clip, "decode_jpeg", lambda data, size: decoded.append(data) or decode(data, size))
    monkeypatch.setattr(vectors.Items, "jpegs", lambda self, rows: rows_read.extend(rows) or read(self, rows))
    shown = []
    monkeypatch.setattr(stage, "make_report", lambda *_: shown.append(len(rows_read)))
    assert embed(world, tmp_path) == 0
    assert len(decoded) == len({*decoded}) == 72 and sorted(rows_read) == [*range(72)] and shown == [72]


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


def test_a_damaged_part_is_computed_again(world, out, capsys):
    assert embed(world, out) == 0
    part = next((out / "vectors").glob("*/image/*.npy"))
    part.write_bytes(part.read_bytes()[:-5])
    assert embed(world, out) == 0
    assert f"{part}: damaged" in capsys.readouterr().out
    (out / "master.parquet").unlink()
    assert embed(world, out) == 0
    assert (out / "master.parquet").read_bytes() == (world / "out/master.parquet").read_bytes()


def test_two_processes_share_the_work_and_give_the_same_bytes(world, out):
    code = "import sys, importlib, vectors; vectors.PART = 8; sys.exit(importlib.import_module('4_embed').main())"
    command = [sys.executable, "-c", code, *arguments(world, out)]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["PYTHONPATH"] = str(ROOT)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, cwd=ROOT, **pipes)
        for rank in "01"
    ]
    printed = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], printed[0][-3000:]
    assert (out / "master.parquet").read_bytes() == (world / "out/master.parquet").read_bytes()
    assert "encoding: 40 pictures" in printed[0] and "encoding: 32 pictures" in printed[1]
    assert "test split" in printed[0] and "test split" not in printed[1]


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_memory_stays_flat_at_ten_times_the_rows(world, tmp_path, monkeypatch):
    """A row keeps 84 bytes of digests and offsets, a vector 44; sorting these takes as much again for a moment."""
    peaks, known = [], []
    monkeypatch.setattr(vectors, "PART", 128)
    for count in (300, 300, 3000):  # the first time pays for what is imported and kept once
        folder = tmp_path / f"{count}-{len(peaks)}"
        shards = write_shards(folder / "shards", items_of(train=count), per_shard=100)
        config, ranks = common.EmbeddingConfig(precision="fp32", batch_size=32), vectors.Ranks()
        clip = importlib.import_module("clip").load_clip(f"local-dir:{world / 'base'}")
        tracemalloc.start()
        items = vectors.Items(str(shards), folder, storage.SPLITS, ranks)
        encoder = vectors.open_encoder(clip, items, config, ranks)
        vectors.compute(items, [encoder], config, ranks)
        stage.write_master(folder / "master.parquet", items, {"base": encoder, "finetuned": encoder}, [], {})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        known.append(len(encoder.image.digests) + len(encoder.text.digests))
    assert known[2] - known[1] > 4000, "rows must differ in picture and, most of them, in prompt"
    assert peaks[2] <= 1.1 * peaks[1] + 84 * 2700 + 100 * (known[2] - known[1]), peaks


def test_memory_of_judging_stays_flat_at_ten_times_the_rows(monkeypatch):
    """A row keeps its metrics, 8 bytes each; vectors are read as they are needed."""
    monkeypatch.setattr(retrieval, "SCORES", 1 << 13)
    monkeypatch.setattr(retrieval, "SEARCH_VECTORS", 64)

    class Far:
        def __init__(self, count: int, seed: int):
            self.count, self.seed = count, seed

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, rows):
            picked = np.arange(self.count)[rows]
            return np.sin(np.outer(picked * 7 + self.seed, np.arange(1, 65))).astype(np.float32)

    peaks = []
    for count in (100, 1000):
        label = np.arange(count)
        judged = retrieval.Judged(label, label, dict.fromkeys(common.ATTRIBUTES, label % 3))
        tracemalloc.start()
        scores = retrieval.judge(Far(count, 1), Far(count, 2), judged)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert scores["mrr"].shape == (count,)
    assert peaks[1] <= 1.1 * peaks[0] + 250 * 900, peaks


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
    storage._s3_client.cache_clear()
    storage._s3_client(os.getpid()).create_bucket(Bucket="shop")
    for name, _ in storage.list_files(world / "shards"):
        storage.put_whole(f"s3://shop/shards/{name}", world / "shards" / name)
    with FaultyProxy(port, seed=180) as proxy:  # the first connection is refused, the second cut early
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        storage._s3_client.cache_clear()
        yield proxy
    storage._s3_client.cache_clear()
    server.stop()


@pytest.mark.parametrize("room", ["1", "0"])
def test_shards_on_s3_give_the_same_bytes_from_copies_or_by_ranges(world, out, bucket, room):
    bucket.cut, bucket.refuse = 0.2, 0.1
    assert embed(world, out, "--cache-gb", room, shards="s3://shop/shards") == 0
    assert bucket.cuts and bucket.refusals, "nothing was spoilt: the test proves nothing"
    assert (out / "master.parquet").read_bytes() == (world / "out/master.parquet").read_bytes()
    assert not list(out.rglob("*.tar")), "no copy of a shard stays"


def test_missing_and_forbidden_shards_on_s3_get_one_line(world, out, bucket, capsys):
    one_line(capsys, embed(world, out, shards="s3://shop/none"), "s3://shop/none/manifest.json", "404")
    storage.remove("s3://shop/shards/test/shard-000001.tar")
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
    whole = path.read_bytes()
    path.write_bytes(whole[:-5000])
    one_line(capsys, embed(world, tmp_path, shards=shards), "test/shard-000001.tar", "not the bytes its manifest")
    path.unlink()
    one_line(capsys, embed(world, tmp_path, shards=shards), "test/shard-000001.tar", "missing shard")
    code = stage.main([*report_arguments(world, tmp_path / "report")[:-2], "--run", str(tmp_path / "none")])
    one_line(capsys, code, "no finished run")


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
    found: dict[str, list[float]] = {name: [] for name in ("recall@1", "recall@5", "recall@10", "mrr", "map")}
    for i in range(len(queries)):
        answers = []
        for j in range(len(gallery)):
            score = np.float32(sum(float(a) * float(b) for a, b in zip(queries[i], gallery[j], strict=True)))
            answers.append((-score, prompt[i] == prompt[j] or group[i] == group[j]))
        places = [place for place, (_, right) in enumerate(sorted(answers), 1) if right]
        for k in (1, 5, 10):
            found[f"recall@{k}"].append(float(any(place <= k for place in places)))
        found["mrr"].append(1 / min(places))
        found["map"].append(sum((m + 1) / place for m, place in enumerate(places)) / len(places))
    return found


def naive_agreement(images, attributes, group, k: int = 4) -> dict[str, list[float]]:
    """The mean over random orders of ties would converge to this: every tied candidate gets its share of a place."""
    from fractions import Fraction

    found: dict[str, list[float]] = {name: [] for name in (*attributes, "all")}
    for i in range(len(images)):
        others = [j for j in range(len(images)) if group[j] != group[i]]
        score = {j: float(np.float32(np.dot(images[i].astype(float), images[j].astype(float)))) for j in others}
        best = sorted(score.values(), reverse=True)[:k]
        weight = {}
        for j in others:
            places, tied = best.count(score[j]), sum(s == score[j] for s in score.values())
            weight[j] = Fraction(places, tied)
        known = [name for name, values in attributes.items() if values[i]]
        for name, values in attributes.items():
            hits = sum(w for j, w in weight.items() if values[j] == values[i])
            found[name].append(float(hits / len(best)) if best and values[i] else float("nan"))
        hits = sum(w for j, w in weight.items() if all(attributes[n][j] == attributes[n][i] for n in known))
        found["all"].append(float(hits / len(best)) if best and known else float("nan"))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_metrics_against_their_definition(seed, monkeypatch):
    """Small whole numbers as vectors: many ties; prompts, groups and attributes that several items share."""
    monkeypatch.setattr(retrieval, "BLOCK", 7)
    rng = np.random.default_rng(seed)
    n, width = int(rng.integers(1, 40)), int(rng.integers(1, 6))
    images, texts = (rng.integers(-2, 3, (n, width)).astype(np.float32) for _ in range(2))
    if seed % 4 == 0:  # lengths that no float holds exactly, and duplicates among them
        images = images / np.maximum(np.linalg.norm(images, axis=1, keepdims=True), 1)
        images[n // 2 :] = images[: n - n // 2]
    prompt, group = (rng.integers(0, max(1, n // 2), n) for _ in range(2))
    names = ("style", "material", "color", "object_type")
    attributes = {name: [("", "a", "b")[v] for v in rng.integers(0, 3, n)] for name in names}
    judged = retrieval.Judged.of({"prompt": prompt, "group": group, **attributes})
    scores = retrieval.judge(images, texts, judged)
    for way, queries, gallery in (("text_to_image", texts, images), ("image_to_text", images, texts)):
        for name, values in naive_retrieval(queries, gallery, prompt, group).items():
            assert np.allclose(scores[f"{way}_{name}"], values, rtol=0, atol=1e-9), (way, name)
    for name, values in naive_agreement(images, attributes, group).items():
        assert np.allclose(scores[f"agreement@4_{name}"], values, rtol=0, atol=1e-9, equal_nan=True), name
    both = [scores[f"{way}_mrr"] for way in ("text_to_image", "image_to_text")]
    assert np.allclose(scores["mrr"], np.mean(both, axis=0), rtol=0, atol=1e-12)


def test_a_model_that_finds_everything_alike_is_not_rewarded():
    columns = {name: [str(i) for i in range(50)] for name in ("prompt", "group")}
    columns |= {name: ["a"] * 25 + ["b"] * 25 for name in common.ATTRIBUTES}
    judged = retrieval.Judged.of(columns)
    same = np.ones((50, 4), np.float32) / 2
    scores = retrieval.judge(same, same, judged)
    assert scores["text_to_image_mrr"].max() == 1 / 50 and scores["text_to_image_recall@10"].max() == 0
    assert np.allclose(scores["agreement@4_all"], 24 / 49)


def test_clusters_are_what_shares_right_answers_in_any_way():
    judged = retrieval.Judged(np.array([0, 0, 1, 2, 3, 3]), np.array([0, 1, 1, 2, 3, 4]), {})
    clusters = judged.clusters()
    assert len(clusters) == 6
    assert len({*clusters[:3]}) == 1 and clusters[4] == clusters[5] and len({*clusters.tolist()}) == 3


def test_products_are_the_same_for_equal_vectors_wherever_they_stand():
    rng = np.random.default_rng(0)
    row = rng.normal(size=(1, 37)).astype(np.float32)
    gallery = np.repeat(row, 5003, axis=0)
    assert len(np.unique(retrieval.products(rng.normal(size=(3, 37)).astype(np.float32), gallery)[1])) == 1


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
def test_search_against_a_full_sort(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(retrieval, "SEARCH_QUERIES", int(rng.integers(1, 20)))
    monkeypatch.setattr(retrieval, "SEARCH_VECTORS", int(rng.integers(1, 40)))
    width, count, k = rng.integers(1, 9), rng.integers(1, 30), int(rng.integers(1, 6))
    queries = rng.integers(-2, 3, (count, width)).astype(np.float32)
    gallery = rng.integers(-2, 3, (rng.integers(k, 120), width)).astype(np.float32)
    exclude = (rng.integers(0, 50, count), rng.integers(0, 50, len(gallery))) if seed % 2 else None
    scores, indices = naive_top(queries, gallery, k, exclude)
    for source in (gallery, iter([gallery[:3], gallery[3:]])):
        found = retrieval.top_k(queries, source, k, exclude)
        assert np.array_equal(found[0], scores) and np.array_equal(found[1], indices)
        assert found[0].dtype == np.float32 and found[1].dtype == np.int64


def test_search_does_not_build_the_full_matrix():
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(1500, 16)).astype(np.float32), rng.normal(size=(60_000, 16)).astype(np.float32)
    gallery[50_000] = gallery[7]
    tracemalloc.start()
    scores, indices = retrieval.top_k(queries, gallery, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6 < 4 * len(queries) * len(gallery)
    some = rng.integers(0, 1500, 50)
    expected = naive_top(queries[some], gallery, 4)
    assert np.array_equal(indices[some], expected[1]) and np.array_equal(scores[some], expected[0])


def test_search_of_too_few_and_of_broken_vectors():
    scores, indices = retrieval.top_k(np.ones((2, 3)), np.ones((2, 3)), 4, ([0, 1], [0, 0]))
    assert indices.tolist() == [[-1] * 4, [0, 1, -1, -1]] and scores[1].tolist() == [3, 3, -np.inf, -np.inf]
    broken = np.ones((5, 3))
    broken[3, 1] = np.nan
    with pytest.raises(common.Fail, match="vector 3 holds NaN"):
        retrieval.top_k(np.ones((1, 3)), broken, 1)
    with pytest.raises(common.Fail, match="width 3 cannot be searched with queries of width 2"):
        retrieval.top_k(np.ones((1, 2)), broken, 1)


# --------------------------------------------------------------------------------------------------------------------
# The report


def report_arguments(world: Path, out: Path, *runs: str) -> list[str]:
    command = f"report --shards {world / 'shards'} --model local-dir:{world / 'base'} --output {out} --precision fp32"
    command += f" --vectors {world / 'out/vectors'}"
    return [*command.split(), *FAST, *(part for run in runs for part in ("--run", str(world / "runs" / run)))]


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
    monkeypatch.setattr(vectors.Encoder, "images", None)
    monkeypatch.setattr(vectors.Encoder, "texts", None)
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
    return ["pool", *(part for folder in folders for part in ("--report", str(folder))), "--output", str(output), *FAST]


def test_reports_of_folds_are_one_report_over_all_their_queries(world, tmp_path, capsys):
    from stats import paired_bootstrap

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
    found = paired_bootstrap(base, fine, 100, 42, draws)
    mrr = whole["runs"][0]["metrics"]["mrr"]
    assert (mrr["low"], mrr["high"]) == pytest.approx((found.low, found.high))
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
    base = {name: rng.random(60) for name in retrieval.METRICS}
    better = {name: np.minimum(values + rng.random(60) * 0.5, 1) for name, values in base.items()}
    nearly = {name: values + rng.normal(0, 0.1, 60) for name, values in base.items()}
    found = retrieval.compare(base, [better, nearly], np.arange(60), 2000, 1)
    everything = [facts for metrics in found for facts in metrics.values()]
    assert len(everything) == 2 * len(retrieval.METRICS)
    least = min(facts["p"] for facts in everything)
    assert min(facts["p_holm"] for facts in everything) == pytest.approx(least * len(everything))
    words = [retrieval.verdict(name, metrics["mrr"]) for name, metrics in zip("ab", found, strict=True)]
    assert words[0].startswith("a is better than zero-shot: MRR 0.") and "after Holm's correction" in words[0]
    unsure = found[0]["mrr"] | {"p_holm": 0.051}
    assert retrieval.verdict("a", unsure).endswith("], p = 0.0510 after Holm's correction")
    assert "a looks better, but that is not certain" in retrieval.verdict("a", unsure)
    assert "no difference to zero-shot is shown" in words[1]
    worse, same = (m["mrr"] for m in retrieval.compare(better, [base, better], np.arange(60), 2000, 1))
    assert "c is WORSE than zero-shot" in retrieval.verdict("c", worse)
    assert retrieval.verdict("d", same) == f"d: no query differs from zero-shot, MRR {same['value']:.3f}"
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, None, None, 1)


def test_most_moved_queries_are_one_a_prompt():
    judged = retrieval.Judged(np.array([0, 0, 1, 2, 3]), np.arange(5), {})
    base = {"text_to_image_rank": np.array([9, 4, 3, 1, 2.0])}
    new = {"text_to_image_rank": np.array([1, 1, 2, 4, 2.0])}
    for scores in (base, new):
        scores["text_to_image_mrr"] = 1 / scores["text_to_image_rank"]
    assert retrieval.moved(base, new, judged) == ([0, 2], [3])
    assert retrieval.moved(base, base, judged) == ([], [])


def test_the_page_stands_alone_and_shows_all_parts(world, tmp_path):
    hostile = "<script>alert('x')</script> & \"so\""
    splits = items_of()
    for row in splits["test"]:
        row["title"], row["txt"] = f"{hostile} {row['title']}", f"{hostile} {row['txt']}"
    assert embed(world, tmp_path, shards=write_shards(tmp_path / "shards", splits)) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page and "@import" not in page
    assert page.count("<h2>") >= 5 and "<polyline" in page and 'class="whisker"' in page
    for picture_ in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)[:5]:
        from PIL import Image

        image = Image.open(io.BytesIO(importlib.import_module("base64").b64decode(picture_)))
        assert image.format == "JPEG" and max(image.size) <= 128
    report = json.loads((tmp_path / "report.json").read_text())
    moved = report["moved"]
    assert moved["gained"] and all(query["rank"] < query["zero_shot_rank"] for query in moved["gained"])
    assert all(query["rank"] > query["zero_shot_rank"] for query in moved["lost"])
    assert page.count("<article>") == len(moved["gained"]) + len(moved["lost"]) <= 20


def test_a_torn_log_does_not_spoil_the_report(world, tmp_path):
    run = make_run(tmp_path / "runs/dual_lora", seed=1)
    with open(run / "metrics.jsonl", "a") as handle:
        handle.write('{"kind": "step", "st\n{"kind": "step", "step": 3, "loss": NaN}\n{"kind": "epoch", "step": 1}\n')
    (run / "train.json").write_text(
        json.dumps({"scenario": "dual_lora", "model_dir": "model", "inputs": {"base_fingerprint": "another"}})
    )
    command = report_arguments(world, tmp_path)
    assert stage.main([*command, "--run", str(run), "--run", str(run)]) == 0
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

    monkeypatch.setattr(vectors, "compute", compute)
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
