"""The pictures of the README, made anew from what `make all` left in data/: needs chromium and chromedriver.

    python tests/pictures.py --data data --output docs

arena.png, results.png   the voting page, and the results page after simulated votes, on the drawn sample catalogue
report.png, contact_sheet.jpg   the retrieval report, and 48 samples of the shards
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from PIL import Image

import arena_world as world
import common
from arena_world import KEYS
from test_arena_browser import Browser, Served

WIDTH = 1200  # pixels of every picture
VOTERS, VOTES = 6, 240


def save(image: Image.Image, path: Path) -> None:
    """As a PNG of few colors: a fifth of the bytes, and no different to the eye at this size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert("RGB").quantize(200, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(f"{path}: {image.width} x {image.height}, {path.stat().st_size / 1000:.0f} kB")


def screen(browser: Browser) -> Image.Image:
    return Image.open(io.BytesIO(browser.driver.get_screenshot_as_png()))


def serve(data: Path, database: Path) -> Served:
    """An arena on the vectors and photos that `make all` made, with a log of its own."""
    return Served(world.setup(data / "embeddings/master.parquet", data / "sample", database, picture_size=480))


def answer(row: dict, chance: random.Random) -> str:
    """A voter's choice: four times in five the row that agrees with the query in more attributes."""
    rows = []
    for side, label in (("left", "A"), ("right", "B")):
        rows.append((row[f"{side}_model"], sum(filter(None, row["facts"][f"{side}_attributes"].values())), label))
    (_, one, first), (_, other, second) = sorted(rows)  # by model: on which side it stands is a coin's choice
    if chance.random() < 0.2 or one == other:
        return chance.choice([first, second, "T", "T"])
    return first if one > other else second


def simulate(served: Served, seed: int = 1) -> None:
    place, chance = served.place, random.Random(seed)
    place.log.connection.execute("PRAGMA synchronous = OFF")
    voters = [place.log.start(place.number, f"{number:032x}", f"Voter {number}") for number in range(1, VOTERS + 1)]
    for number in range(VOTES):
        voter = voters[number % VOTERS]
        token = place.trial(voter)["trial"]
        if token is None:
            continue
        place.log.vote(place.number, voter, token, answer(world.shown(place.log, token), chance))


def arena_picture(browser: Browser, served: Served) -> Image.Image:
    """The voting page, after some votes, at a trial whose rows share at most two results."""
    place, chance = served.place, random.Random(1)
    browser.home = served.home
    browser.look(WIDTH, 720)
    browser.fresh()
    signer = served.app.session_interface.get_signing_serializer(served.app)
    browser.driver.add_cookie({"name": "judge", "value": signer.dumps({"judge": "0" * 32, "_permanent": True})})
    row = world.shown(place.log, browser.start())
    while row["place"] < 12 or len({*row["left_items"], *row["right_items"]}) < 6:
        place.log.vote(place.number, row["judge"], row["token"], answer(row, chance))
        row = world.shown(place.log, place.trial(row["judge"])["trial"])
    browser.driver.refresh()
    browser.ready()
    return screen(browser)


def results_picture(browser: Browser, served: Served) -> Image.Image:
    browser.look(WIDTH, 1330)
    browser.driver.get(f"{served.home}/results?token={KEYS['admin_token']}")
    browser.until("document.querySelector('svg.chart') !== null")
    return screen(browser)


def report_picture(browser: Browser, page: Path) -> Image.Image:
    browser.look(WIDTH, 1000)
    browser.driver.get(page.resolve().as_uri())
    return screen(browser)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that `make all` filled (default data)")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the pictures (default docs)")
    return parser


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    browser = Browser("")
    try:
        with tempfile.TemporaryDirectory() as folder:
            served = serve(args.data, Path(folder, "arena.sqlite"))
            save(arena_picture(browser, served), args.output / "arena.png")
            served = serve(args.data, Path(folder, "results.sqlite"))
            simulate(served)
            save(results_picture(browser, served), args.output / "results.png")
        save(report_picture(browser, args.data / "embeddings/report.html"), args.output / "report.png")
        sheet = Image.open(args.data / "shards/contact_sheet.jpg")
        sheet.resize((WIDTH, WIDTH * sheet.height // sheet.width)).save(args.output / "contact_sheet.jpg", quality=82)
    finally:
        browser.driver.quit()
    return common.DONE


if __name__ == "__main__":
    sys.exit(main())
