"""The drawn sample catalogue and the small CLIP: what every other test and the first run stand on."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common
import sample

SMALL_CLIP = Path(__file__).parent / "small_clip"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    sample.make_catalogue(folder, 90, workers=1)
    return folder


def test_an_item_does_not_depend_on_count_or_workers(drawn, tmp_path):
    sample.make_catalogue(tmp_path, 12, workers=2)
    for item in sample.products(12):
        path = sample.image_path(item)
        assert (tmp_path / path).read_bytes() == (drawn / path).read_bytes()
    few, many = ((folder / "catalogue.csv").read_text().splitlines() for folder in (tmp_path, drawn))
    assert many[: len(few)] == few


def test_further_views_show_the_same_piece_and_change_nothing_else(drawn, tmp_path):
    sample.make_catalogue(tmp_path, 5, workers=1, views=3)
    rows = common.read_catalogue([tmp_path / "catalogue.csv"])[0]
    plain = common.read_catalogue([drawn / "catalogue.csv"])[0].iloc[:5]
    names = rows["image_path"].str.split("|").tolist()
    assert [first for first, *_ in names] == plain["image_path"].tolist() and {len(some) for some in names} == {3}
    assert rows.drop(columns="image_path").equals(plain.drop(columns="image_path"))
    photos = [[(tmp_path / name).read_bytes() for name in some] for some in names]
    assert [first for first, *_ in photos] == [(drawn / name).read_bytes() for name in plain["image_path"]]
    assert len({data for some in photos for data in some}) == 15
    twin = next(item for item in sample.products(1200) if item.twin == "exact")
    assert sample.encode_view(twin, 42, 2) == sample.encode_view(sample.product(twin.design, 42), 42, 2)
    # The thing in the middle keeps its color, whatever the light and the angle.
    centres = [np.median(np.asarray(common.load_image(data))[206:306, 206:306], axis=(0, 1))
               for some in photos for data in some]  # fmt: skip
    centres = np.array(centres).reshape(5, 3, 3)
    same = np.linalg.norm(centres[:, 0] - centres[:, 1], axis=1)
    other = np.linalg.norm(centres[:, 0] - np.roll(centres[:, 1], 1, axis=0), axis=1)
    assert np.median(same) < np.median(other) / 2


def test_an_interrupted_run_goes_on_and_another_seed_starts_anew(tmp_path):
    sample.make_catalogue(tmp_path, 4, workers=1)
    kept, gone = sorted((tmp_path / "images").glob("*.jpg"))[:2]
    whole, when = gone.read_bytes(), kept.stat().st_mtime_ns
    gone.unlink()
    sample.make_catalogue(tmp_path, 4, workers=1)
    assert gone.read_bytes() == whole and kept.stat().st_mtime_ns == when
    sample.make_catalogue(tmp_path, 4, seed=43, workers=1)
    assert gone.read_bytes() != whole


def test_the_feed_holds_every_kind_of_noise_and_few_rejects():
    items = list(sample.products(1200))
    assert {item.object_type for item in items} == set(sample.TYPES)
    assert {item.style for item in items} == set(sample.STYLES)
    assert {item.color for item in items} == set(sample.PALETTE)
    assert min(Counter(item.object_type for item in items).values()) >= 80
    assert {item.damage for item in items} == {"", *sample.DAMAGES}
    assert {item.form for item in items} == {"jpg", *sample.FORMS}
    twins = Counter(item.twin for item in items)
    assert twins["exact"] >= 10 and twins["near"] >= 10
    assert sum(item.design != item.index and not item.twin for item in items) >= 30  # colour variants
    assert sum(bool(item.damage) for item in items) + 3 <= 0.025 * len(items)
    names = [sample.noisy_name(item, 42) for item in items]
    for noise in ("FREE SHIPPING", "Set of", "SKU", "$", "\n", "  ", "couch", "gray"):
        assert any(noise.lower() in name.lower() for name in names), noise
    assert "" in names
    ids = {item.id for item in items}
    assert any("/" in id for id in ids) and any("." in id for id in ids) and any(not id.isascii() for id in ids)
    assert any(id.startswith("00") for id in ids)


def test_the_csv_reads_back_with_its_duplicates(drawn):
    rows, reasons = common.read_catalogue([drawn / "catalogue.csv"])
    assert len(rows) == 91 and reasons.tolist().count("duplicate id") == 1
    assert rows.loc[reasons == "", "id"].tolist() == [item.id for item in sample.products(90)]
    with open(drawn / "catalogue.csv", newline="") as handle:
        assert next(csv.reader(handle)) == ["id", "name", "image_path", "brand", "price"]


def test_every_picture_loads_upright_in_colour_or_says_why_not(drawn):
    reasons = Counter()
    for item in sample.products(90):
        try:
            path = common.resolve_image(drawn, sample.image_path(item))
            image = common.load_image(path)
        except common.BadImage as error:
            reasons[error.reason] += 1
            assert item.damage
            continue
        assert not item.damage and min(image.size) >= 470
        if item.form in ("rotated", "cmyk", "webp"):  # what was stored oddly looks as it was drawn
            plain = np.asarray(sample.draw(item, 42), np.float32)
            assert np.abs(np.asarray(image, np.float32) - plain).mean() < 8, item.form
    assert reasons == {"empty file": 1}


def test_variants_share_a_shape_and_twins_a_picture():
    twin = next(item for item in sample.products(1200) if item.twin == "exact")
    assert sample.encode(twin, 42) == sample.encode(sample.product(twin.design, 42), 42) or (
        sample.product(twin.design, 42).form != "jpg"
    )
    variant = next(item for item in sample.products(1200) if item.design != item.index and not item.twin)
    origin = sample.product(variant.design, 42)
    assert (variant.object_type, variant.style, variant.material) == (origin.object_type, origin.style, origin.material)
    assert variant.color != origin.color or variant.index != origin.index


def test_the_small_clip_is_small_and_sees():
    import torch

    assert sum(path.stat().st_size for path in SMALL_CLIP.iterdir()) <= 12_000_000
    clip = common.load_clip(f"local-dir:{SMALL_CLIP}")
    items = [item for item in sample.products(400, seed=5) if not item.twin][:120]
    images = [sample.draw(item, 5, clip.size) for item in items]
    pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images])
    features = common.encode(clip, pixels)
    for names, truth, least in (
        (sample.TYPES, [item.object_type for item in items], 0.5),  # by chance 1 in 10
        (tuple(sample.PALETTE), [item.color for item in items], 0.4),  # by chance 1 in 12
    ):
        texts = common.encode(
            clip, captions=[f"a photo of a {name}" if least == 0.5 else f"something {name}" for name in names]
        )
        guesses = (features @ texts.T).argmax(1).tolist()
        right = sum(names[guess] == true for guess, true in zip(guesses, truth, strict=True)) / len(truth)
        assert right >= least, f"{right:.2f} of {names[:3]}..."


def test_the_probe_holds_no_furniture():
    pairs = list(sample.probe(24))
    assert len({caption for _, caption in pairs}) > 12
    assert not any(kind in caption for _, caption in pairs for kind in sample.TYPES)
    assert all(isinstance(image, Image.Image) and image.size == (256, 256) for image, _ in pairs)
