"""Building request files against the plain loop in one process, and fetching photos against curl's parallel mode."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import csv
import importlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

import common
from bench import Case

clean = importlib.import_module("1_clean")


def photo(side: int, seed: int) -> bytes:
    """A JPEG with smooth areas, edges and a little grain, about as heavy as a shop's photo."""
    rng = random.Random(seed)
    small = Image.frombytes("RGB", (8, 8), rng.randbytes(192)).resize((side, side), Image.Resampling.BICUBIC)
    grain = Image.effect_noise((side, side), 24).convert("RGB")
    image = Image.blend(small, grain, 0.12)
    for _ in range(24):
        x, y = rng.randrange(side), rng.randrange(side)
        box = (x, y, x + rng.randrange(side // 3), y + rng.randrange(side // 3))
        image.paste(tuple(rng.randbytes(3)), box)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def shop(folder: Path, side: int, count: int) -> Path:
    (folder / "images").mkdir(parents=True)
    kept = [photo(side, seed) for seed in range(12)]
    with open(folder / "catalogue.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(common.REQUIRED_COLUMNS)
        for number in range(count):
            (folder / f"images/{number}.jpg").write_bytes(kept[number % len(kept)])
            writer.writerow([number, f"ACME chair {number}", f"images/{number}.jpg"])
    return folder


def plain(folder: Path) -> float:
    """Seconds a photo for what one would write first: open, thumbnail, white, JPEG, base64, json.dumps, one process."""
    start = time.perf_counter()
    fixed = json.loads(clean.request_line(clean.CleaningConfig(), "", "", b"", 1))
    count = 0
    with open(folder / "catalogue.csv", newline="") as rows, open(folder / "plain.jsonl", "w") as out:
        for row in csv.DictReader(rows):
            count += 1
            with Image.open(folder / row["image_path"]) as image:
                image.thumbnail((512, 512), Image.Resampling.LANCZOS)
                white = Image.new("RGB", image.size, "white")
                white.paste(image)
            buffer = io.BytesIO()
            white.save(buffer, "JPEG", quality=85)
            content = fixed["body"]["messages"][1]["content"]
            content[0]["text"] = "Title: " + row["name"]
            content[1]["image_url"]["url"] = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
            out.write(json.dumps(fixed | {"custom_id": row["id"]}) + "\n")
    return (time.perf_counter() - start) / count


def ours(folder: Path, count: int, workers: int = 2) -> float:
    """Seconds a photo for `prepare`: also checks, digests, rejects, the plan, and files that survive a kill."""
    workspace = folder / "batch"
    shutil.rmtree(workspace, ignore_errors=True)
    arguments = ["prepare", "--input", str(folder / "catalogue.csv"), "--workspace", str(workspace)]
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        assert clean.main([*arguments, "--workers", str(workers), "--pilot", "0"]) == 0
    return (time.perf_counter() - start) / count


def bound(folder: Path, count: int) -> str:
    """Where the time of one photo goes, part by part, in one process."""
    seconds_of = {"read and digest": 0.0, "photo to JPEG": 0.0}
    paths = [folder / f"images/{number}.jpg" for number in range(count)]
    for path in paths:
        start = time.perf_counter()
        data = path.read_bytes()
        common.digest(data)
        middle = time.perf_counter()
        clean.photo_jpeg(data, 512)
        seconds_of["read and digest"] += middle - start
        seconds_of["photo to JPEG"] += time.perf_counter() - middle
    whole = ours(folder, count, 1) * 1e3
    parts = {name: seconds / count * 1e3 for name, seconds in seconds_of.items()}
    parts["the rest"] = whole - sum(parts.values())
    most = max(parts, key=parts.get)
    listed = ", ".join(f"{name} {ms:.2f}" for name, ms in parts.items())
    return f"{most}: {parts[most] / whole:.0%} of {whole:.2f} ms a photo in one process ({listed})"


FETCHED = 5000  # photos at URLs


class PhotoServer(asyncio.Protocol):
    """Answers GET /NUMBER.jpg over kept connections with one of some photos from memory."""

    answers: tuple[bytes, ...] = ()

    def __init__(self):
        self.rest = b""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        *requests, self.rest = (self.rest + data).split(b"\r\n\r\n")
        for request in requests:
            number = int(re.search(rb"/(\d+)\.jpg", request)[1])
            self.transport.write(self.answers[number % len(self.answers)])


def serve_photos(pipe) -> None:
    """In a process of its own: say the port, and serve until the end."""
    photos = [photo(300, seed) for seed in range(12)]
    PhotoServer.answers = tuple(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(one) + one for one in photos)

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(PhotoServer, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


def new_folder(workdir: Path) -> tempfile.TemporaryDirectory:
    """In memory where there is such a place: a disk that has just deleted files makes new ones slowly."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else workdir)


def fetch(url: str, workdir: Path) -> tuple[float, float]:
    """(seconds, of the processor) a photo for what a run does before anything is sent: checks, files, one sync."""
    urls = [f"{url}/{number}.jpg" for number in range(FETCHED)]
    with new_folder(workdir) as folder, open(os.devnull, "w") as nowhere:
        start, busy = time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            assert clean.PhotoFetcher(Path(folder), allow_private=True).fetch(urls) == {}
        return (time.perf_counter() - start) / FETCHED, (time.process_time() - busy) / FETCHED


def curl(url: str, workdir: Path) -> float:
    """Seconds a photo for curl, with as many connections as it opens unasked."""
    command = ["curl", "--silent", "--fail", "--parallel", f"{url}/[0-{FETCHED - 1}].jpg", "--output", "#1.jpg"]
    with new_folder(workdir) as folder:
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, stderr=subprocess.DEVNULL)  # its meter is not silent
        seconds = time.perf_counter() - start
        assert len(os.listdir(folder)) == FETCHED
    return seconds / FETCHED


def fetching(workdir: Path) -> list[Case]:
    """The case of photos at URLs, against a server in a process of its own; none where curl is missing."""
    name = f"fetching {FETCHED:,} photos from one host"
    if not shutil.which("curl"):
        print(f"1 {name}: not measured, for curl is not installed", flush=True)
        return []
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    context.Process(target=serve_photos, args=(theirs,), daemon=True).start()
    url = f"http://127.0.0.1:{mine.recv()}"

    def where() -> str:
        wall, busy = fetch(url, workdir)
        lanes = f"{1 / wall:,.0f} photos a second over {clean.HOST_LANES} connections (curl: 50)"
        return f"Python: {busy / wall:.0%} of a processor; {lanes}"

    case = Case(
        name=name,
        ours=lambda: fetch(url, workdir)[0],
        theirs=lambda: curl(url, workdir),
        target=0.5,
        unit="photo",
        bound=where,
    )
    return [case]


def cases(workdir: Path) -> list[Case]:
    made = fetching(workdir)
    for side, count, target in ((500, 2400, 5.0), (1600, 360, 5.0)):
        folder = shop(workdir / str(side), side, count)
        made.append(
            Case(
                name=f"building requests from {side} px photos, 2 workers",
                ours=lambda folder=folder, count=count: ours(folder, count),
                theirs=lambda folder=folder: plain(folder),
                target=target,
                unit="photo",
                bound=lambda folder=folder, count=count: bound(folder, count),
            )
        )
    return made


if __name__ == "__main__":
    sys.exit("run `python tests/bench.py --stage 1`")
