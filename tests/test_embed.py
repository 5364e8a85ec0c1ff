"""4_embed.py on tiny shards and tiny models: vectors, their store, master.parquet, metrics, the report and search."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib
import io
import json
import os
import pickle
import re
import signal
import sqlite3
import sys
import tarfile
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import common
from faulty_proxy import FaultyProxy
from tiny import COLORS, STYLES, TYPES, fork_server, make_clip, one_thread, picture

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


def wide_and_tall_photos(folder: Path) -> Path:
    """A cleaned catalogue of photos of many shapes, whose things reach to all four sides; returns its CSV."""
    from PIL import Image, ImageDraw, ImageFilter

    lines = ["id,name,image_path,clean_title,style,material,color,object_type"]
    for i, size in enumerate([(300, 900), (900, 300), (500, 400), (240, 700), (640, 200), (400, 400)] * 4):
        color, kind, draw_color = list(COLORS)[i % 4], TYPES[i // 6], list(COLORS.values())[i % 4]
        image = Image.new("RGB", size, (225, 215 - 5 * i, 205))
        draw, (w, h) = ImageDraw.Draw(image), size
        draw.rectangle((0, h * 0.1, w * 0.9, h * 0.3 + i), fill=draw_color)
        draw.ellipse((w * 0.1, h * 0.5, w, h), fill=draw_color[::-1])
        image.filter(ImageFilter.GaussianBlur(2)).save(folder / f"{i}.jpg", quality=95)
        lines.append(f"{i},{color} {kind} {i},{i}.jpg,{color} {kind} {i},modern,wood,{color},{kind}")
    (folder / "cleaned.csv").write_text("\n".join(lines))
    return folder / "cleaned.csv"


def test_plain_open_clips_own_preprocess_gives_the_vectors_of_wide_and_tall_photos(tmp_path):
    import open_clip
    from PIL import Image

    small, train = ROOT / "tests/small_clip", importlib.import_module("3_train")
    prepare = ["--input", str(wide_and_tall_photos(tmp_path)), "--output", str(tmp_path / "shards"), "--workers", "1"]
    assert importlib.import_module("2_prepare").main([*prepare, "--model", f"local-dir:{small}"]) == 0
    clip = common.load_clip(str(small))
    with torch.no_grad():
        clip.model.visual.proj.mul_(torch.linspace(0.5, 2, clip.model.visual.proj.shape[1]))
    train.save_clip(clip, tmp_path / "model")
    flags = ["--shards", str(tmp_path / "shards"), "--model", f"local-dir:{small}", "--precision", "fp32"]
    output = tmp_path / "master.parquet"
    assert stage.main([*flags, "--finetuned", str(tmp_path / "model"), "--output", str(output)]) == 0
    rows, found = pq.read_table(output), []
    photos = [Image.open(tmp_path / path) for path in rows["image_path"].to_pylist()]
    for options in ({}, {"image_resize_mode": "shortest"}):
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}", **options)
        with torch.no_grad():
            theirs = model.eval().encode_image(torch.stack(list(map(preprocess, photos))), normalize=True)
        found.append((matrix(output, "finetuned_embedding") * theirs.numpy()).sum(axis=1))
    own, cropped = found
    oblong = np.array([max(photo.size) > min(photo.size) for photo in photos])
    assert len(rows) == 24 and own.min() > 0.99 and own.mean() > 0.997  # the rest is JPEG, and the filter that scales
    assert cropped[oblong].mean() < 0.9
    assert "centre_crop" in json.loads((tmp_path / "report.json").read_text())["base"]


def test_a_centre_crop_is_found_in_a_letterboxed_picture_only_where_the_photo_is_not_square():
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 200, (96, 240, 3), dtype=np.uint8)
    for photo, side in (
        (noise, 96),
        (noise.transpose(1, 0, 2), 96),
        (noise[:, :96], None),  # square
        (np.pad(noise[:, :96], ((40, 40), (40, 40), (0, 0)), constant_values=255), None),  # a product on white
        (np.full((96, 240, 3), 255, np.uint8), None),
    ):
        square = np.array(common.letterbox(Image.fromarray(photo), 240 if side else max(photo.shape)))
        crop = stage.centre_crop(torch.from_numpy(square).permute(2, 0, 1))
        assert (crop.tolist() == square.transpose(2, 0, 1).tolist()) == (side is None)
        if side:
            middle = Image.fromarray(photo[:, 72:168] if photo.shape[0] == 96 else photo[72:168])
            expected = np.array(middle.resize((240, 240), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
            assert abs(crop.int().numpy() - expected).mean() < 1


def test_the_report_says_where_a_centre_crop_serves_the_base_better(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage, "centre_crop", lambda pixels: pixels.flip(1))
    judged = []

    def judge(images, texts, items):
        judged.append(images)
        return {"mrr": np.full(len(items), 0.3 if len(judged) % 2 else 0.5)}

    shards = stage.open_shards(str(world / "shards"), ("test",), tmp_path, stage.EmbeddingConfig())
    encoder = stage.Encoder(common.load_clip(str(world / "base")), "fp32", tmp_path, 16)
    rows, _ = stage.make_vectors(shards, [encoder], stage.EmbeddingConfig(), common.World("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "judge", judge)
        crop = stage.judge_centre_crop(shards, rows, encoder)
    assert crop["photos"] == len(rows) and crop["difference"] == pytest.approx(0.2) and crop["value"] == 0.5
    tested = rows.reset_index(drop=True)
    flipped = [common.encode(encoder.clip, stage.centre_crop(common.decode_jpeg(row["jpg"], 32))[None])[0]
               for row in items_of()["test"]]  # fmt: skip
    assert len(tested) == len(flipped) and abs(judged[1] - torch.stack(flipped).numpy()).max() < 1e-5
    models = [(stage.Run("zero_shot", "x"), encoder), (stage.Run("other", "y", folder=tmp_path), encoder)]
    unsure = crop | {"low": -0.02}
    for facts, says in ((crop, True), (unsure, False), (crop | {"difference": -0.1, "low": -0.2}, False), ({}, False)):
        stage.make_report(shards, rows, models, tmp_path, facts)
        assert ("serves the base better: MRR 0.500, +0.200" in capsys.readouterr().out) == says
        assert ("serves the base better" in (tmp_path / "report.html").read_text()) == says


def test_the_model_card_gets_the_numbers_of_the_test_split(world, out):
    folder = make_run(out / "runs" / "carded", seed=1)
    card = folder / "model" / "README.md"
    card.write_text(f"before\n{common.CARD_TEST[0]}\nnothing yet\n{common.CARD_TEST[1]}\nafter\n")
    for _ in range(2):
        assert embed(world, out, "--finetuned", str(folder)) == 0
        report = json.loads((out / "report.json").read_text())
        facts = report["runs"][0]["metrics"]["mrr"]
        text = card.read_text()
        assert text.startswith(f"before\n{common.CARD_TEST[0]}\nOn the test split, {report['items']} products")
        assert text.endswith(f"{common.CARD_TEST[1]}\nafter\n") and "nothing yet" not in text
        interval = f"{facts['difference']:+.3f} | {stage.shown_interval(facts)} | {facts['p_holm']:.4f} |"
        assert f"| both ways  MRR | {report['base']['metrics']['mrr']:.3f} | {facts['value']:.3f} | {interval}" in text


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
    crops = 1  # the base's vectors of the test split's pictures as a centre crop would show them
    assert everything.count("vectors") == 2 * (-(-72 // 32) + -(-len(prompts) // 32)) + crops
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
    assert sum(calls) == 2 * 72 - 5 * 8 + 24  # those of the test split as a centre crop shows them
    assert (out / "master.parquet").read_bytes() == (world / "out/master.parquet").read_bytes()


@pytest.fixture(scope="module")
def forks():
    """Processes of their own, forked in no time by a server that has imported what takes them longest."""
    return fork_server("test_embed", "open_clip")


def apart(command: list[str], environment: dict[str, str], printed: Path) -> None:
    """The real command line, for a process of its own, which prints into a file."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(printed, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = stage.main(command)
    sys.exit(code)


def killed(command: list[str], out: Path) -> None:
    """The real command line until kill -9: at the first pictures after the first vectors are kept."""
    images = stage.Encoder.images

    def dying(self, pixels):
        if kept_vectors(out):
            os.kill(os.getpid(), signal.SIGKILL)
        return images(self, pixels)

    stage.Encoder.images, stage.FLUSH_VECTORS = dying, 64
    apart(command, {}, out.with_name("printed"))


def test_killed_while_it_computes_it_goes_on(world, tmp_path, monkeypatch, forks):
    shards = write_shards(tmp_path / "shards", items_of(train=300), per_shard=50)
    process = forks.Process(target=killed, args=(arguments(world, tmp_path / "out", shards=shards), tmp_path / "out"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
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
    assert "computed: 0 pictures, 0 texts" in capsys.readouterr().out
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
    assert len(decoded) == 72 + 24 and len({*decoded}) == 72  # those of the test split are looked at for their frame
    decoded.clear()
    assert embed(world, tmp_path, "--finetuned", str(world / "runs/text_lora")) == 0
    assert len(decoded) == 72  # but once only


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
        one_line(capsys, embed(world, out), str(path.parent), "damaged", "remove its *.sqlite and run again")
    path.unlink()
    assert embed(world, out) == 0
    assert (out / "master.parquet").read_bytes() == (world / "out/master.parquet").read_bytes()


def test_two_processes_share_the_work_and_give_the_same_rows(world, out, tmp_path, forks):
    command = parts_arguments(world, out / "master")
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        forks.Process(target=apart, args=(command, group | {"RANK": rank, "LOCAL_RANK": rank}, tmp_path / rank))
        for rank in "01"
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
    printed = [(tmp_path / rank).read_text() for rank in "01"]
    assert [process.exitcode for process in ranks] == [0, 0], printed[0][-3000:]
    assert pq.read_table(out / "master").equals(pq.read_table(world / "out/master.parquet"))
    assert names(out / "master") == part_names(2)
    assert "encoding: 40 pictures" in printed[0] and "encoding: 32 pictures" in printed[1]  # its own shards
    prompts = {row["txt"] for some in items_of().values() for row in some}
    made = json.loads((out / "master.json").read_text())["counts"]["computed"]
    assert made == {"image": 72, "text": len(prompts)}
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
# Parts: a folder that several processes write


class Processes:
    """Runs 4_embed.py several times at once, as threads that know of each other only what World.share says.

    Each has a machine of its own: another folder for its copies of what lies on S3.
    """

    def __init__(self, size: int, folder: Path, monkeypatch):
        barrier, values, own = threading.Barrier(size, timeout=600), [None] * size, threading.local()

        class World(common.World):
            def __init__(self, device: str):
                super().__init__("cpu")
                self.rank, self.size, self.main = own.rank, size, own.rank == 0

            def share(self, value):
                values[self.rank] = pickle.dumps(value)
                barrier.wait()
                shared = list(map(pickle.loads, values))
                barrier.wait()
                return shared

        def local_copy(place):
            machine = folder / f"machine-{getattr(own, 'rank', 0)}"
            return machine / common.digest(place)[:16] if common.is_s3(place) else Path(place)

        def run(rank: int, command: list[str]) -> int:
            own.rank = rank
            try:
                code = stage.main(command)
            except threading.BrokenBarrierError:
                code = common.FAILED
            if code:
                barrier.abort()
            return code

        monkeypatch.setattr(stage, "World", World)
        monkeypatch.setattr(stage, "local_copy", local_copy)
        self.size, self.run = size, run

    def __call__(self, command: list[str]) -> list[int]:
        """The exit codes."""
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(self.run, range(self.size), [command] * self.size))


def parts_arguments(world: Path, output: str | Path, *more: str, shards: str | None = None) -> list[str]:
    command = arguments(world, world, *more, shards=shards)
    command[command.index("--output") + 1] = f"{output}/"
    return command


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def part_names(size: int) -> list[str]:
    return [common.PARTS, *(f"part-{rank:05d}-of-{size:05d}.parquet" for rank in range(size))]


def test_a_folder_of_parts_holds_the_rows_of_the_one_file(world, out, monkeypatch, capsys):
    whole, folder = pq.read_table(world / "out/master.parquet"), out / "master"
    with monkeypatch.context() as patch:  # two processes, of which the first dies before its last write
        patch.setattr(stage, "finish_output", lambda *_: (_ for _ in ()).throw(common.Fail("killed")))
        assert Processes(2, out, patch)(parts_arguments(world, folder)) == [1, 1]
        assert names(folder) == part_names(2)[1:]
    capsys.readouterr()
    one_line(capsys, stage.main(["search", "x", "--embeddings", str(folder)]), "not finished", "4_embed.py again")
    written = (folder / "part-00001-of-00002.parquet").stat().st_mtime_ns
    for size in (2, 4, 4):
        with monkeypatch.context() as patch:
            assert Processes(size, out, patch)(parts_arguments(world, folder)) == [0] * size
        if size == 2:
            assert (folder / "part-00001-of-00002.parquet").stat().st_mtime_ns == written, "it is not written again"
            (folder / "part-00001-of-00002.parquet").unlink()  # a copy that lacks a part
            capsys.readouterr()
            one_line(capsys, stage.main(["search", "x", "--embeddings", str(folder)]), "00001-of-00002", "again")
            continue
        assert names(folder) == part_names(4), "no part of another number of processes stays"
        assert pq.read_table(folder).equals(whole) and pd.read_parquet(folder).shape == (72, len(stage.COLUMNS) + 4)
        assert pq.read_schema(folder / part_names(4)[1]).metadata == whole.schema.metadata
        last = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
        assert max(last) == last[0], "the list of the parts is written last"
    assert (out / "report.json").read_bytes() == (world / "out/report.json").read_bytes()
    counts = json.loads((out / "master.json").read_text())["counts"]
    assert (counts["input"], counts["written"], counts["rejected"]) == (72, 72, 0)
    for damaged in ('{"parts": []}', "[1]"):
        (folder / common.PARTS).write_text(damaged)
        assert stage.main(parts_arguments(world, folder)) == 0
        assert names(folder) == part_names(1) and pq.read_table(folder).equals(whole)
    with monkeypatch.context() as patch:
        assert Processes(2, out, patch)(arguments(world, out)) == [0, 0]  # one file by several processes
    assert (out / "master.parquet").read_bytes() == (world / "out/master.parquet").read_bytes()


def test_search_export_and_queries_read_a_folder_as_they_read_the_file(world, out, monkeypatch, capsys):
    assert stage.main(parts_arguments(world, out / "master", "--vectors", str(world / "out/vectors"))) == 0
    found = []
    for place in (world / "out/master.parquet", out / "master"):
        capsys.readouterr()
        assert stage.main(["search", "red chair", "--embeddings", str(place)]) == 0
        found.append([capsys.readouterr().out])
        for command, name in (("export", "vectors.parquet"), ("queries", "queries.csv")):
            path = out / place.stem / name
            path.parent.mkdir(exist_ok=True)
            assert stage.main([command, "--embeddings", str(place), "--output", str(path)]) == 0
            found[-1].append(path.read_bytes())
            path.unlink()
    assert found[0] == found[1]
    other = pq.read_table(out / "master/part-00000-of-00001.parquet").replace_schema_metadata({"base_model": "other"})
    pq.write_table(other, out / "master/other.parquet")
    (out / "master" / common.PARTS).write_text('{"parts": ["part-00000-of-00001.parquet", "other.parquet"]}')
    one_line(capsys, stage.main(["search", "x", "--embeddings", str(out / "master")]), "parts of different runs")
    one_line(capsys, stage.main(["search", "x", "--embeddings", "s3://shop/master"]), "local disk", "copy it")


def test_each_process_has_a_stretch_of_the_shards(world, tmp_path):
    shards = stage.open_shards(str(world / "shards"), common.SPLITS, tmp_path, stage.EmbeddingConfig())
    for size in range(1, 20):
        worlds = [SimpleNamespace(rank=rank, size=size) for rank in range(size)]
        assert [number for one in worlds for number in shards.own(one)] == [*range(len(shards.entries))], size
    encoder = stage.Encoder(common.load_clip(f"local-dir:{world / 'base'}"), "fp32", world / "out/vectors", 16)
    nothing = pd.DataFrame(columns=[*stage.COLUMNS, "shard", "reason"])
    stage.write_master(tmp_path / "empty.parquet", nothing, [encoder, encoder], {})  # more processes than shards
    assert pq.read_table(tmp_path / "empty.parquet").schema.field("base_embedding").type.list_size == 16


@pytest.mark.parametrize("output", ["s3://shop", "s3://shop/", "s3://"])
def test_an_output_on_s3_needs_a_folder(world, capsys, output):
    one_line(capsys, stage.main(parts_arguments(world, output)), "names no folder", "s3://bucket/master/")
    code = stage.main([*report_arguments(world, Path("x"), "dual_lora"), "--output", output])
    one_line(capsys, code, "writes to a local disk")


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


def test_machines_find_each_others_vectors_on_s3_and_write_the_same_rows(world, tmp_path, bucket, monkeypatch, capsys):
    """No machine has a disk in common with another: all that they share lies on S3."""
    bucket.cut, bucket.refuse = 0.1, 0.05
    command = parts_arguments(world, "s3://shop/out/master", shards="s3://shop/shards")
    monkeypatch.setattr(stage, "FLUSH_VECTORS", 16)
    images, calls = stage.Encoder.images, []

    def interrupted(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 4:
            raise common.Fail("killed")
        return images(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(stage.Encoder, "images", interrupted)
        assert 1 in Processes(2, tmp_path / "first", patch)([*command, "--batch-size", "16"])
    found = [f"s3://shop/out/vectors/{name}" for name, _ in common.list_files("s3://shop/out/vectors")]
    kept = sum(len(pd.read_parquet(io.BytesIO(common.read_bytes(path)))) for path in found)
    assert kept and not common.exists(f"s3://shop/out/master/{common.PARTS}")
    for size, machines in ((2, "second"), (4, "third")):
        made = []
        with monkeypatch.context() as patch:
            patch.setattr(stage.Encoder, "images", watched(images, made))
            assert Processes(size, tmp_path / machines, patch)(command) == [0] * size
        assert sum(count for _, count in made) == (2 * 72 - kept + 24 if size == 2 else 0), "never made twice"
        if size == 2:
            common.remove(f"s3://shop/out/master/{common.PARTS}")  # what an end before the last write leaves
        copy = tmp_path / f"copy-{size}"
        for name, _ in common.list_files("s3://shop/out"):
            common.download_atomic(f"s3://shop/out/{name}", copy / name)
        assert names(copy / "master") == part_names(size)[1 if size == 2 else 0 :]
        assert pq.read_table(copy / "master").equals(pq.read_table(world / "out/master.parquet"))
        assert json.loads((copy / "report.json").read_text()) == json.loads((world / "out/report.json").read_text())
        assert {"master", "master.json", "queries.parquet", "report.html", "report.json", "vectors"} == {*names(copy)}
    assert common.Master(copy / "master").rows == 72
    assert not list(tmp_path.glob("[st]*/**/*.tar")), "no copy of a shard stays"
    name = common.list_files("s3://shop/out/vectors")[0][0]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        common.remove(f"s3://shop/out/vectors/{name}")  # what S3 lost is made again, though this machine has a copy
        assert Processes(1, tmp_path / "third", patch)(command) == [0]
    assert "computed: 0 pictures, 0 texts" not in capsys.readouterr().out


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


def test_broken_photos_are_counted_among_photos_where_a_product_has_several(tmp_path):
    rows = pd.DataFrame({"photos": [4] * 100 + [1] * 6, "reason": [""] * 100 + ["broken image"] * 6})
    rows = rows.assign(**dict.fromkeys(("image_id", "detail", "image_path", "title"), "x"))
    stage.write_rejects(stage.Output(str(tmp_path), "m.parquet", False), "rejects.jsonl", rows, 0.02)
    with pytest.raises(common.Fail, match="6 of 406 pictures"):
        stage.write_rejects(stage.Output(str(tmp_path), "m.parquet", False), "rejects.jsonl", rows, 0.01)
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 6


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
    one_line(capsys, code, "width 24", "of width 16", "fine-tuned from")


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
    mrr = whole["runs"][0]["metrics"]["mrr"]
    assert (mrr["low"], mrr["high"]) == pytest.approx(common.bootstrap_mean(fine - base, draws)[1:3])
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
    older = pq.read_table(folders[1] / "queries.parquet").drop_columns(["zero_shot/mrr"])
    pq.write_table(older, folders[1] / "queries.parquet")  # of a version without that metric
    one_line(capsys, stage.main(pooled(folders, tmp_path / "proof")), "zero_shot/mrr", "make the report again")
    (folders[1] / "queries.parquet").write_bytes(b"PAR1")
    one_line(capsys, stage.main(pooled(folders, tmp_path / "proof")), "not a readable report", "make the report again")
    assert not (tmp_path / "proof").exists()


def test_holm_is_over_every_difference_shown():
    rng = np.random.default_rng(0)
    base = {name: rng.random(60) for name in stage.METRICS}
    better = {name: np.minimum(values + rng.random(60) * 0.5, 1) for name, values in base.items()}
    nearly = {name: values + rng.normal(0, 0.1, 60) for name, values in base.items()}
    found = stage.compare(base, [better, nearly], np.arange(60))
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
    worse, same = (m["mrr"] for m in stage.compare(better, [base, better], np.arange(60)))
    assert "c is WORSE than zero-shot" in stage.verdict("c", worse)
    assert stage.verdict("d", same) == f"d: no query differs from zero-shot, MRR {same['value']:.3f}"
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, None, None, 1)


def test_an_attribute_that_few_queries_know_is_shown_but_counts_in_no_correction(capsys):
    rng = np.random.default_rng(0)
    base = {name: rng.random(60) for name in stage.METRICS}
    few, enough = ("agreement@4_style", 19), ("agreement@4_color", 20)
    for name, count in (few, enough):
        base[name][count:] = np.nan
    run = {name: values + rng.random(60) * 0.5 for name, values in base.items()}
    found = stage.compare(base, [run], np.arange(60))[0]
    assert "p" not in found[few[0]] and found[few[0]]["queries"] == 19 and found[few[0]]["low"] is not None
    assert found[enough[0]]["queries"] == 20 and min(facts["p_holm"] for facts in found.values() if "p" in facts) == (
        pytest.approx(min(facts["p"] for facts in found.values() if "p" in facts) * (len(stage.METRICS) - 1))
    )
    about = [{"name": name, "fingerprint": "", "precision": ""} for name in ("zero_shot", "run")]
    facts = stage.compare_models(about, [base, run], ["chair"] * 60, np.arange(60))
    stage.print_comparison(facts | {"base": facts["base"] | {"centre_crop": {}}}, Path(), suggest_proof=False)
    line = next(line for line in capsys.readouterr().out.splitlines() if "style" in line)
    assert line.endswith("few") and f"{found[few[0]]['value']:.3f}" in line and "*" not in line


def test_most_moved_queries_are_one_a_prompt():
    ranks = {"zero_shot_rank": [9, 4, 3, 1, 2], "rank": [1, 1, 2, 4, 2]}
    queries = pd.DataFrame({"item": range(5), "id": [*"abcde"], "title": "t", "prompt": [*"ppqrs"]} | ranks)
    moved = stage.most_moved(queries)
    assert [query["item"] for query in moved["gained"]] == [0, 2]
    assert moved["lost"] == [
        {"item": 3, "id": "d", "title": "t", "prompt": "r", "zero_shot_rank": 1, "rank": 4}
    ]  # fmt: skip
    assert stage.most_moved(queries.assign(rank=queries["zero_shot_rank"])) == {"gained": [], "lost": []}


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


def test_runs_of_one_scenario_are_told_apart_by_their_folders_and_a_foreign_base_is_named(world, tmp_path, capsys):
    facts = {"scenario": "dual_lora", "model_dir": "model", "inputs": {"base_fingerprint": "another"}}
    runs = [make_run(tmp_path / name, seed=1) for name in ("dual_lora", "higher_rate", "old/higher_rate")]
    for run in runs:
        (run / "train.json").write_text(json.dumps(facts))
    command = report_arguments(world, tmp_path / "report", "text_lora")
    command += [part for run in (runs[0], *runs) for part in ("--run", str(run))]
    assert stage.main(command) == 0
    assert "NOTE: dual_lora was not trained from" in capsys.readouterr().out
    names = [run["name"] for run in json.loads((tmp_path / "report/report.json").read_text())["runs"]]
    assert names == ["text_lora", *(f"dual_lora ({place})" for place in ("dual_lora", *runs[1:]))]
    assert stage.main([*report_arguments(world, tmp_path / "few"), "--run", str(runs[0]), "--run", str(runs[1])]) == 0
    report = json.loads((tmp_path / "few/report.json").read_text())
    assert [run["name"] for run in report["runs"]] == ["dual_lora (dual_lora)", "dual_lora (higher_rate)"]


# --------------------------------------------------------------------------------------------------------------------
# What shoppers type


def naive_measure(scores: np.ndarray, gains: list[dict[int, float]]) -> dict[str, list[float]]:
    """The definitions, written out; scores [Q, N], gains: {item: gain} of each query's right answers."""
    found: dict[str, list[float]] = {name: [] for name in stage.QUERY_METRICS}
    for row, gain in zip(scores, gains, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], gain.get(j, 0)))
        places = [place for place, j in enumerate(order, 1) if j in gain]
        for k in (1, 5, 10):
            found[f"recall@{k}"].append(float(places[0] <= k))
        found["mrr"].append(1 / places[0])
        best = sorted(gain.values(), reverse=True)[:10]
        ideal = sum(value / np.log2(place + 1) for place, value in enumerate(best, 1))
        reached = sum(gain[j] / np.log2(place + 1) for place, j in enumerate(order[:10], 1) if j in gain)
        found["ndcg@10"].append(reached / ideal)
    return found


def asked_of(gains: list[dict[int, float]], texts: list[str] | None = None) -> stage.Asked:
    pairs = [(query, item, gain) for query, some in enumerate(gains) for item, gain in some.items()]
    query, item, gain = (np.array(values) for values in zip(*pairs, strict=True))
    return stage.Asked(texts or ["?"] * len(gains), query, item, gain.astype(float))


def same_measures(found: dict, expected: dict) -> None:
    for name, values in expected.items():
        assert np.allclose(found[name], values, rtol=0, atol=1e-9), name
    assert np.array_equal(found["rank"], np.round(1 / np.array(expected["mrr"])))


@pytest.mark.parametrize("seed", range(30))
def test_measures_of_queries_against_their_definition(seed, monkeypatch):
    """Small whole numbers as vectors: many ties, among right answers of several grades, too."""
    monkeypatch.setattr(stage, "GALLERY", 7)
    rng = np.random.default_rng(seed)
    count, width, asked = int(rng.integers(1, 60)), int(rng.integers(1, 5)), int(rng.integers(1, 20))
    queries, gallery = (rng.integers(-2, 3, (n, width)).astype(np.float32) for n in (asked, count))
    gains = []
    for _ in range(asked):
        right = rng.choice(count, int(rng.integers(1, min(count, 15) + 1)), replace=False)
        gains.append({int(j): float(rng.choice([0.5, 1, 1, 2, 3])) for j in right})
    found = stage.judge_vectors(asked_of(gains), queries, lambda rows: gallery[rows], count)
    same_measures(found, naive_measure(queries @ gallery.T, gains))


def naive_bm25(query: str, titles: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Lucene's BM25, as Kamphuis et al. 2020 write it."""
    words = [re.findall(r"\w\w+", title.lower()) for title in titles]
    mean = np.mean([len(some) for some in words])
    scores = [0.0] * len(titles)
    for word in set(re.findall(r"\w\w+", query.lower())):
        df = sum(word in some for some in words)
        for j, some in enumerate(words):
            tf = some.count(word)
            idf = np.log(1 + (len(titles) - df + 0.5) / (df + 0.5))
            scores[j] += idf * tf / (tf + k1 * (1 - b + b * len(some) / mean))
    return scores


def test_words_in_titles_are_ranked_by_bm25(monkeypatch):
    monkeypatch.setattr(common, "BLOCK_SCORES", 100)
    rng = np.random.default_rng(0)
    words = ["grey", "sofa", "oak", "table", "blue", "lamp", "für", "kinder"]
    titles = [" ".join(rng.choice(words, int(rng.integers(1, 6)))) for _ in range(40)] + ["", "?"]
    texts = [" ".join(rng.choice(words, 2, replace=False)).title() for _ in range(30)] + ["nobody", "!"]
    gains = [{int(j): 1.0 for j in rng.choice(42, 3, replace=False)} for _ in texts]
    scores = np.array([naive_bm25(text, titles) for text in texts]).astype(np.float32)
    same_measures(stage.judge_words(asked_of(gains, texts), titles), naive_measure(np.round(scores, 5), gains))
    nothing = stage.judge_words(asked_of([{0: 1.0}], ["grey"]), ["", "?"])
    assert nothing["rank"].tolist() == [2], "without a word in common nothing is found"


def test_many_queries_over_a_large_catalogue_need_no_full_matrix():
    rng = np.random.default_rng(0)
    queries, gallery = (rng.normal(size=(n, 8)).astype(np.float32) for n in (2000, 30_000))
    gains = [{int(j): 1.0} for j in rng.integers(0, len(gallery), len(queries))]
    titles = [f"sofa {number % 500} red" for number in range(len(gallery))]
    asked = asked_of(gains, [f"red {number % 700}" for number in range(len(queries))])
    for judge in (lambda: stage.judge_vectors(asked, queries, lambda rows: gallery[rows], len(gallery)),
                  lambda: stage.judge_words(asked, titles)):  # fmt: skip
        tracemalloc.start()
        found = judge()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100e6 < 4 * len(queries) * len(gallery) and len(found["mrr"]) == 2000


LINES = [("Red Chair", 60, 3), ("red chair", 48, 1), ("red  chair ", 60, 2), ("blue lamp", 55, 1), ("blue lamp", 3, 1),
         ("table", 5, 2), ("table", 6, 1), ("", 50, 1), ("bed", 999, 1), ("rustic bed", 57, 1), ("rustic bed", 70, 0),
         ("green bed", 49, 2), ("green bed", 41, 1), *((f"{COLORS_} thing", 40 + n, 1 + n % 3)
         for n, COLORS_ in enumerate(list(COLORS) * 2))]  # fmt: skip


def write_queries(path: Path, lines=LINES, header: str = "Query;ID;Grade") -> Path:
    rows = [f'"{query}";"00.{i}/ä";{grade}' for query, i, grade in lines]
    rows = rows if header.count(";") == 2 else [row.rpartition(";")[0] for row in rows]
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
    return path


def test_the_report_judges_what_people_type_over_the_whole_catalogue(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stage, "CHOOSING", 3)
    path = write_queries(tmp_path / "queries.csv")
    command = [*report_arguments(world, tmp_path / "report", "dual_lora"), "--queries", str(path)]
    assert stage.main(command) == 0
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "report/report.json").read_text())
    facts, rows = report["queries"], [row for some in items_of().values() for row in some]
    assert facts["left_out"] == {"empty query": 1, "product not in the catalogue": 1, "duplicate": 1, "grade 0": 1}
    assert facts["rows"] == len(LINES) == facts["right_answers"] + 4 and facts["made_up"] == 0
    gains = {"Red Chair": {60: 3, 48: 1}, "rustic bed": {57: 1}, "green bed": {49: 2, 41: 1}}
    seen, mixed = {"table": {5: 2, 6: 1}}, {"blue lamp": {55: 1, 3: 1}}
    chooses = {"green bed": {49: 2, 41: 1}}
    for color in COLORS:
        gains[f"{color} thing"] = chooses[f"{color} thing"] = {}
    for query, i, grade in LINES[-8:]:
        gains[query][i] = grade
    assert facts["queries"] == len(gains) + 2 and facts["judged"]["queries"] == len(gains)
    vectors = {}
    for kind, folder in (("base", world / "base"), ("finetuned", world / "runs/dual_lora/model")):
        clip = common.load_clip(f"local-dir:{folder}")
        pictures = matrix(world / "out/master.parquet", f"{kind}_embedding")
        titles = common.encode(clip, captions=[row["title"] for row in rows]).numpy()

        def scores(asked, gallery, clip=clip):
            return (common.encode(clip, captions=list(asked)).numpy().astype(float) @ gallery.T).astype(np.float32)

        vectors[kind] = (scores, pictures, titles)
        for part, asked in (("judged", gains), ("all", seen), ("some", mixed)):
            expected = naive_measure(scores(asked, pictures), list(asked.values()))
            for name, values in expected.items():
                run = facts["judged"]["runs"][0]["metrics"][name]
                value = facts["judged"]["base"]["metrics"][name] if kind == "base" else run["value"]
                if part != "judged":
                    beside = next(one for one in facts["beside"] if one["in_training"] == part)
                    value = beside["means"]["zero_shot" if kind == "base" else "dual_lora"][name]
                assert value == pytest.approx(np.mean(values), abs=1e-6), (kind, part, name)
    assert facts["judged"]["runs"][0]["verdict"] in printed
    assert all(facts["p"] <= facts["p_holm"] for facts in facts["judged"]["runs"][0]["metrics"].values())

    scores, pictures, titles = vectors["finetuned"]
    means = []
    for weight in stage.WEIGHTS:
        both = weight * pictures + (1 - weight) * titles
        both /= np.linalg.norm(both, axis=1, keepdims=True)
        means.append(np.mean(naive_measure(scores(chooses, both), list(chooses.values()))["ndcg@10"]))
    assert facts["ways"]["chosen_on"] == len(chooses)
    assert means[stage.WEIGHTS.index(facts["ways"]["weight"])] == pytest.approx(max(means), abs=1e-6)
    left = {query: some for query, some in gains.items() if query not in chooses}
    weight, ways = facts["ways"]["weight"], facts["ways"]
    assert ways["queries"] == len(left) == 2, "what chose the weight does not judge the mixture"
    both = weight * pictures + (1 - weight) * titles
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    words = np.array([naive_bm25(query, [row["title"] for row in rows]) for query in left])
    expected = [np.round(words, 5), *(scores(left, gallery) for gallery in (titles, pictures, both))]
    values = [ways["base"]["metrics"], *({n: f["value"] for n, f in run["metrics"].items()} for run in ways["runs"])]
    for one, theirs in zip(values, expected, strict=True):
        for name, numbers in naive_measure(theirs, list(left.values())).items():
            assert one[name] == pytest.approx(np.mean(numbers), abs=1e-6)


def test_queries_of_one_product_are_drawn_together_and_embed_says_what_report_says(world, tmp_path):
    words = [f"{word} {kind}" for kind in TYPES for word in "abcdef"]
    lines = [(query, 48 + number % 12, 1) for number, query in enumerate(words)]
    path = write_queries(tmp_path / "queries.csv", lines, "query;id")
    assert embed(world, tmp_path / "out", "--queries", str(path), "--vectors", str(world / "out/vectors")) == 0
    command = [*report_arguments(world, tmp_path / "report", "dual_lora"), "--queries", str(path)]
    assert stage.main(command) == 0
    facts, again = (json.loads((tmp_path / name / "report.json").read_text())["queries"] for name in ("out", "report"))
    assert facts == again and facts["judged"]["queries"] == 24 and facts["judged"]["independent"] == 12
    ways = facts["ways"]
    assert (ways["run"], ways["weight"], ways["chosen_on"], ways["queries"]) == ("dual_lora", 0.5, 0, 24)
    worst = [query["rank"] for query in facts["moved"]["worst"]]
    assert worst == sorted(worst, reverse=True) and len(worst) == 10 and facts["moved"]["gained"]
    assert (tmp_path / "out/master.parquet").is_file() and facts["left_out"] == {}


def test_queries_that_were_all_trained_on_judge_nothing(world, tmp_path, capsys):
    path = write_queries(tmp_path / "queries.csv", [("red chair", 1, 1), ("blue bed", 2, 1)], "query;id")
    assert stage.main([*report_arguments(world, tmp_path, "dual_lora"), "--queries", str(path)]) == 0
    facts = json.loads((tmp_path / "report.json").read_text())["queries"]
    assert facts["judged"] is None and facts["ways"] is None and facts["beside"][0]["queries"] == 2
    assert "none can judge" in capsys.readouterr().out and "none can judge" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no such CSV"]),
        ("", ["needs one column query", "nothing"]),
        ("words,id\na,00.1/ä\n", ["needs one column query", "words, id"]),
        ("query,id,id\na,1,2\n", ["one column id"]),
        ("query,id,grade\na,00.1/ä,good\n", ["row 1", "grade 'good'", "no number"]),
        ("query,id,weight\na,00.1/ä,1\nb,00.1/ä,-1\n", ["row 2", "weight '-1'"]),
        ("query,id,grade\na,00.1/ä,\n", ["row 1", "grade ''"]),
        ("query,id,grade,weight\na,00.1/ä,1,1\n", ["grade and a column weight"]),
        ("query,id\na, b,00.1/ä\n", ["row 1", "more fields", "quote"]),
        ('query,id\n"a,00.1/ä\n', ["not a readable CSV"]),
        ("query,id\na,1\nb,2\n", ["no query with a right answer", "2 product not in the catalogue"]),
        ("query,id\n\n", ["no rows"]),
    ],
)
def test_a_broken_file_of_queries_gets_one_line(world, tmp_path, capsys, content, words):
    path = tmp_path / "queries.csv"
    if content is not None:
        path.write_text(content)
    one_line(capsys, embed(world, tmp_path, "--queries", str(path)), "queries.csv", *words)
    assert not (tmp_path / "report.json").exists()


def test_queries_are_made_up_for_a_person_to_correct(world, tmp_path, capsys):
    output, master = tmp_path / "queries.csv", str(world / "out/master.parquet")
    command = ["queries", "--embeddings", master, "--output", str(output), "--count", "8"]
    assert stage.main(command) == 0 and "MADE UP" in capsys.readouterr().out
    rows, items = pd.read_csv(output, dtype=str), {row["id"]: row for some in items_of().values() for row in some}
    assert list(rows.columns) == ["query", "id", "source"] and set(rows["source"]) == {"made up"}
    split = {row["id"]: name for name, some in items_of().items() for row in some}
    for query, ids in rows.groupby("query")["id"]:
        assert query == query.lower() and len(query.split()) <= 5
        assert not {"a", "an", "photo", "of", "for", "home"} & set(query.split())
        names = {common.SYNONYMS.get(word, word) for word in query.split()}
        fit = [id for id, row in items.items() if names <= {row["color"], row["style"], row["object_type"]}]
        assert sorted(ids) == sorted(fit), "all products that fit are right answers"
    assert len({*rows["query"]}) <= 8 and {"train"} < {split[id] for id in rows["id"]}
    one_line(capsys, stage.main(command), "is there already", "corrections")
    again = [*command[:-3], str(tmp_path / "again.csv"), "--count", "8"]
    assert stage.main(again) == 0 and (tmp_path / "again.csv").read_bytes() == output.read_bytes()
    capsys.readouterr()
    assert stage.main([*report_arguments(world, tmp_path, "dual_lora"), "--queries", str(output)]) == 0
    assert f"{rows['query'].nunique()} of the queries are made up" in capsys.readouterr().out
    assert "nobody typed them" in (tmp_path / "report.html").read_text()
    one_line(capsys, stage.main(["queries", "--embeddings", "none", "--output", str(tmp_path / "x")]), "no such file")


def test_the_samples_queries_use_other_words_than_its_prompts(tmp_path):
    import sample

    rows, left_out = common.read_queries(sample.write_queries(tmp_path, 300), [p.id for p in sample.products(300)])
    assert left_out == {"product not in the catalogue": 1, "empty query": 1} and rows["gain"].min() >= 1
    truth = {item.id: item for item in sample.products(300)}
    back = {other: word for word, other in sample.SYNONYMS.items()}
    for query, id in zip(rows["query"], rows["id"], strict=True):
        names = {back.get(word, word) for word in query.split()}
        assert names <= {truth[id].color, truth[id].material, truth[id].style, truth[id].object_type}
    words = {word for query in rows["query"] for word in query.split()}
    assert {"couch", "gray", "bookshelf"} <= words and not {"sofa", "grey", "bookcase", "wardrobe", "photo"} & words
    assert rows["query"].nunique() > 200


# --------------------------------------------------------------------------------------------------------------------
# A slim file to serve from


def test_export_writes_ids_and_fine_tuned_vectors_alone(world, tmp_path, capsys):
    import duckdb

    path, master = tmp_path / "vectors.parquet", world / "out/master.parquet"
    command = ["export", "--embeddings", str(master), "--output", str(path)]
    whole, ids = matrix(master, "finetuned_embedding"), [row["id"] for some in items_of().values() for row in some]
    for dtype in (np.float32, np.float16):
        assert stage.main([*command, "--dtype", np.dtype(dtype).name]) == 0
        table = pq.read_table(path)
        assert table.column_names == ["id", "vector"] and table["id"].to_pylist() == ids
        vectors = matrix(path, "vector")
        assert vectors.dtype == dtype and np.array_equal(vectors, whole.astype(dtype))
    assert table.schema.metadata[b"fingerprint"] == pq.read_schema(master).metadata[b"finetuned_fingerprint"]
    assert table.schema.metadata[b"vector"] == b"picture"
    assert "72 items, float16 [16] of picture" in capsys.readouterr().out
    found = duckdb.sql(f"select id, list_dot_product(vector::float[], vector::float[]) from '{path}'").fetchall()
    assert [id for id, _ in found] == ids and all(abs(length - 1) < 2e-3 for _, length in found)


def test_export_writes_the_mixture_that_the_report_judged(world, tmp_path, capsys):
    path, master = tmp_path / "vectors.parquet", world / "out/master.parquet"
    command = ["export", "--embeddings", str(master), "--output", str(path), "--dtype", "float32"]
    assert stage.main([*command, "--mixture", "0.7"]) == 0
    clip = common.load_clip(f"local-dir:{world / 'runs/dual_lora/model'}")
    titles = common.encode(clip, captions=[row["title"] for some in items_of().values() for row in some]).numpy()
    both = 0.7 * matrix(master, "finetuned_embedding") + 0.3 * titles
    assert np.allclose(matrix(path, "vector"), both / np.linalg.norm(both, axis=1, keepdims=True), atol=1e-6)
    assert pq.read_schema(path).metadata[b"vector"] == b"0.7 picture + 0.3 title"
    one_line(capsys, stage.main([*command, "--mixture", "1.5"]), "--mixture 1.5", "from 0 to 1")
    one_line(capsys, stage.main([*command[:2], str(tmp_path / "none"), *command[3:]]), "no such file")
    code = stage.main([*command, "--mixture", "0.7", "--model", f"local-dir:{world / 'base'}"])
    one_line(capsys, code, "not the model that made the vectors")


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
        assert stage.main(["search", "chair", "--embeddings", str(world / "out/master.parquet")]) == common.INTERRUPTED
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


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        stage.main(["--help"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("embed", "report", "search", "--finetuned", "--batch-size"))
