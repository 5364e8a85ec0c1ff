"""How fast the arena is: start, answers, pictures, and a page and a vote while twenty people judge.

python tests/bench.py --stage 5
python tests/bench_arena.py --million     1,000,000 items of 512: seconds and memory (needs 9 GB of disk)
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import numpy as np

import arena_world as world
import common
from arena_world import KINDS, arena, draw_picture

ITEMS, WIDTH = 55_000, 512
JUDGES, THINK, VOTES = 20, 2.0, 5  # people, mean seconds between two votes of one, votes of each
ROOT = Path(__file__).parents[1]


def write_large(path: Path, count: int, columns: tuple[str, ...], step: int = 20_000) -> Path:
    """A master.parquet of any size, written block by block; items of a type lie together, as real ones do."""
    import pyarrow as pa
    import pyarrow.parquet

    rng = np.random.default_rng(5)
    centers = rng.normal(size=(500, WIDTH)).astype(np.float32)
    writer = None
    for start in range(0, count, step):
        rows = range(start, min(start + step, count))
        ids = [f"id-{i}" for i in rows]
        table = {
            "image_id": ids, "split": [("test" if i % 10 == 0 else "train") for i in rows],
            "image_path": [f"p/{i % 200}.jpg" for i in rows], "title": ids, "prompt": ids,
            "style": ["modern"] * len(ids), "material": ["wood"] * len(ids), "color": ["red"] * len(ids),
            "object_type": [KINDS[i // 10 % len(KINDS)] for i in rows], "group": ids,
            "image_digest": [f"{i:064x}" for i in rows], "text_digest": [""] * len(ids),
        }  # fmt: skip
        for name in columns:
            block = centers[rng.integers(0, 500, len(ids))] + rng.normal(size=(len(ids), WIDTH)).astype(np.float32)
            table[name] = pa.FixedSizeListArray.from_arrays(pa.array(world.unit(block).ravel()), WIDTH)
        facts = {"base_fingerprint": "b" * 64, "finetuned_fingerprint": "f" * 64, "scenario": "dual_lora"}
        made = pa.table(table).replace_schema_metadata(facts)
        writer = writer or pyarrow.parquet.ParquetWriter(path, made.schema)
        writer.write_table(made, row_group_size=1024)  # as 4_embed.py does
    writer.close()
    return path


def start_cold(master: Path, images: Path, folder: Path) -> float:
    """Seconds until an application is ready that has neither vectors nor answers on disk yet."""
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        started = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            arena.create_app(world.setup(master, images, Path(fresh) / "a.sqlite"))
        return time.perf_counter() - started


def plain_answers(vectors: np.ndarray, queries: list[int], k: int = 4) -> np.ndarray:
    """What one would write first: all scores at once, sorted."""
    return np.argsort(-(vectors[queries] @ vectors.T), axis=1)[:, 1 : k + 1]


class Person:
    """A judge with a keep-alive connection: page, trial, nine pictures, a vote; times of page, trial and vote."""

    def __init__(self, home: str, seed: int):
        self.host = urllib.parse.urlsplit(home).netloc
        self.connection = http.client.HTTPConnection(self.host, timeout=30)
        self.chance, self.cookie, self.csrf = random.Random(seed), "", ""
        self.seconds: dict[str, list[float]] = {"page": [], "trial": [], "vote": []}
        page, headers = self.ask("GET", "/")
        self.cookie, self.csrf = headers["Set-Cookie"].split(";")[0], world.csrf_of(page.decode())
        self.ask("POST", "/start", b"name=x")

    def ask(self, method: str, path: str, body: bytes | None = None, what: str = ""):
        kind = "application/x-www-form-urlencoded"
        headers = {"X-CSRF-Token": self.csrf, "Content-Type": kind, "Cookie": self.cookie}
        started = time.perf_counter()
        self.connection.request(method, path, body, headers)
        response = self.connection.getresponse()
        data = response.read()
        if what:
            self.seconds[what].append(time.perf_counter() - started)
        assert response.status in (200, 303), (response.status, data[:200])
        return data, response.headers

    def judge(self, votes: int) -> None:
        for _ in range(votes):
            time.sleep(self.chance.uniform(0, 2 * THINK))
            self.ask("GET", "/", what="page")
            token = json.loads(self.ask("POST", "/trial", b"", what="trial")[0])["trial"]
            for place in range(9):
                self.ask("GET", f"/picture/{token}/{place}")
            self.ask("POST", "/vote", f"trial={token}&choice={self.chance.choice('ABTN')}".encode(), what="vote")


def under_load(master: Path, images: Path, database: Path) -> dict[str, float]:
    """99th percentiles of page, trial and vote, in seconds, with JUDGES people at once."""
    command = [sys.executable, str(ROOT / "5_arena.py"), "serve", "--embeddings", str(master), "--images", str(images)]
    command += ["--database", str(database), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        home = next(line.split()[-1].rstrip("/") for line in server.stdout if line.startswith("Vote at"))
        people = [Person(home, seed) for seed in range(JUDGES)]
        threads = [threading.Thread(target=person.judge, args=(VOTES,)) for person in people]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)
    names = people[0].seconds
    return {name: float(np.quantile([s for person in people for s in person.seconds[name]], 0.99)) for name in names}


def cases(workdir: Path) -> list:
    """The lines of the table; the limits of page, vote and start stand in for a rival."""
    from bench import Case

    images = workdir / "images"
    for number in range(200):
        draw_picture(images / f"p/{number}.jpg", number, size=(1200, 900))
    columns = ("base_embedding", "finetuned_embedding", "base_text_embedding", "finetuned_text_embedding")
    master = write_large(workdir / "master.parquet", ITEMS, columns)
    with contextlib.redirect_stderr(io.StringIO()):
        place = arena.Arena(world.setup(master, images, workdir / "warm.sqlite", picture_size=480))
    items = place.experiment.items
    vectors = np.concatenate(list(items.vectors("base_embedding")))
    queries, groups = place.experiment.rows, items.groups
    last: dict[str, float] = {}

    def answers() -> float:
        started = time.perf_counter()
        common.top_k(vectors[queries], vectors, 4, (groups[queries], groups))
        return (time.perf_counter() - started) / len(queries)

    def plain() -> float:
        started = time.perf_counter()
        for first in range(0, 200, 100):
            plain_answers(vectors, queries[first : first + 100])
        return (time.perf_counter() - started) / 200

    def load() -> float:
        with tempfile.TemporaryDirectory(dir=workdir) as fresh:
            last.update(under_load(master, images, Path(fresh) / "a.sqlite"))
        return max(last["page"], last["vote"])

    def product() -> str:
        block = np.ascontiguousarray(vectors[:16_384])
        started = time.perf_counter()
        vectors[queries] @ block.T
        seconds = (time.perf_counter() - started) * len(vectors) / len(block) / len(queries)
        return f"the product of the vectors alone takes {seconds * 1e3:.2f} ms a query"

    def load_bound() -> str:
        parts = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in last.items())
        return f"99th percentiles with {JUDGES} people: {parts}; the rest is pictures on the same processor"

    return [
        Case(f"start with {ITEMS:,} items, nothing kept yet (limit 10 s)",
             lambda: start_cold(master, images, workdir), lambda: 10.0, 1.0, "start", product),
        Case(f"p99 of page and vote, {JUDGES} judges (limit 50 ms)", load, lambda: 0.050, 1.0, "request", load_bound),
        Case(f"4 nearest of {ITEMS:,} outside the own group", answers, plain, 2.0, "query", product),
    ]  # fmt: skip


def million() -> None:
    """Start and serve with a million items; prints seconds and the largest resident set."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        draw_picture(images / "p/0.jpg", 0)
        master = Path(folder) / "master.parquet"
        here = f"import bench_arena as b; b.write_large(b.Path({str(master)!r}), 1_000_000, {COLUMNS!r})"
        subprocess.run([sys.executable, "-c", here], check=True, cwd=ROOT / "tests")  # its memory is not ours
        for what in ("nothing kept", "answers kept"):
            started = time.perf_counter()
            app = arena.create_app(world.setup(master, images, Path(folder) / "a.sqlite"))
            seconds = time.perf_counter() - started
            judge = world.Judge(app)
            started = time.perf_counter()
            judge.vote("A")
            vote = time.perf_counter() - started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            mark = "met" if peak < 8 else "MISSED"
            print(f"{what}: start {seconds:.1f} s, draw and vote {vote * 1e3:.0f} ms, "
                  f"largest resident set {peak:.2f} GiB, limit 8 {mark}", flush=True)  # fmt: skip


COLUMNS = ("base_embedding", "finetuned_embedding")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", action="store_true", required=True, help="run the large case")
    parser.parse_args()
    million()
