"""A small world for the arena's tests and measurements: items, vectors, drawn pictures, and people who vote."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import numpy as np

arena = importlib.import_module("5_arena")

KINDS = ("chair", "table", "lamp", "bed", "sofa", "desk", "stool", "bench", "shelf", "wardrobe")
KEYS = {"cookie_key": "c" * 32, "judge_token": "judges-token", "admin_token": "admins-token"}


def draw_picture(path: Path, number: int, size: tuple[int, int] = (96, 72)) -> bytes:
    """A JPEG that differs for each number; carries EXIF with its number, which must not reach a browser."""
    from PIL import Image, ImageDraw

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number * 53 % 256))
    ImageDraw.Draw(image).text((4, 4), str(number), fill="white")
    exif = Image.Exif()
    exif[0x010E] = f"secret-{number}"
    image.save(path, "JPEG", quality=80, exif=exif)
    return path.read_bytes()


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write_master(
    path: Path, vectors: dict[str, np.ndarray], rows: int = 0, facts: dict | None = None, **columns
) -> Path:
    """A master.parquet: every fourth item in the test split, types in turn, each item its own duplicate group."""
    import pyarrow as pa
    import pyarrow.parquet

    n = len(vectors["base_embedding"])
    ids = [f"id-{i}" for i in range(n)]
    table = {
        "image_id": ids, "split": [("test", "train", "validation", "train")[i % 4] for i in range(n)],
        "image_path": [f"p/{i}.jpg" for i in range(n)], "title": [f"title {i}" for i in range(n)],
        "prompt": [f"prompt {i}" for i in range(n)], "style": [("modern", "rustic")[i % 2] for i in range(n)],
        "material": [("wood", "metal", "")[i % 3] for i in range(n)], "color": ["red"] * n,
        "object_type": [KINDS[i // 4 % len(KINDS)] for i in range(n)], "group": ids,
        "image_digest": [hashlib.sha256(b"%d" % i).hexdigest() for i in range(n)],
        "text_digest": [""] * n,
    } | columns  # fmt: skip
    for name, matrix in vectors.items():
        flat = pa.array(np.ascontiguousarray(matrix, np.float32).ravel())
        table[name] = pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])
    facts = {
        "base_model": "secret-base-model", "finetuned_model": "secret-finetuned-model",
        "base_fingerprint": "b" * 64, "finetuned_fingerprint": "f" * 64, "scenario": "dual_lora",
    } | (facts or {})  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pa.table(table).replace_schema_metadata(facts)
    pyarrow.parquet.write_table(made, path, row_group_size=1000)
    return path


def random_vectors(count: int, width: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = ("base_embedding", "finetuned_embedding", "base_text_embedding", "finetuned_text_embedding")
    return {name: unit(rng.normal(size=(count, width))) for name in names}


def make_world(
    folder: Path, count: int = 160, pictures: bool = True, seed: int = 0, facts: dict | None = None, **columns
):
    """(master.parquet, images folder)."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    if pictures:
        for number in range(count):
            draw_picture(images / f"p/{number}.jpg", number)
    vectors = random_vectors(count, seed=seed)
    return write_master(folder / "master.parquet", vectors, facts=facts, **columns), images


def setup(master: Path | list[Path], images: Path, database: Path, **settings):
    """An arena.Setup with known tokens."""
    masters = [master] if isinstance(master, Path) else master
    made = arena.ArenaConfig(**({"picture_size": 64} | settings))
    return arena.Setup(tuple(map(str, masters)), str(images), str(database), made, KEYS)


def csrf_of(page: str) -> str:
    """The token that a page's forms send along."""
    return re.search(r'name="csrf" value="([0-9a-f]{64})"', page)[1]


class Judge:
    """A person with a browser: keeps the cookie, sends the CSRF token, as the page's script does."""

    def __init__(self, app, name: str = "", host: str = "127.0.0.1:8000"):
        self.client = app.test_client()
        self.host = host
        self.headers = {"Host": host, "X-CSRF-Token": csrf_of(self.get("/").text)}
        response = self.client.post("/start", data={"name": name, "token": KEYS["judge_token"]}, headers=self.headers)
        assert response.status_code == 303, response.text
        with self.client.session_transaction(base_url=f"http://{host}") as session:
            self.id = session["judge"]

    def post(self, path: str, **body):
        form = {name: value for name, value in body.items() if value is not None}
        return self.client.post(path, data=form, headers=self.headers)

    def get(self, path: str):
        return self.client.get(path, headers={"Host": self.host})

    def trial(self, after: str | None = None) -> dict:
        response = self.post("/trial", after=after)
        assert response.status_code == 200, response.text
        return response.json

    def vote(self, choice: str, token: str | None = None) -> dict:
        response = self.post("/vote", trial=token or self.trial()["trial"], choice=choice)
        assert response.status_code == 200, response.text
        return response.json


def shown(log, token: str) -> dict:
    """What the log says of a trial, lists decoded."""
    row = dict(log.connection.execute("SELECT * FROM trials WHERE token = ?", (token,)).fetchone())
    return row | {name: json.loads(row[name]) for name in ("left_items", "right_items", "facts")}
