"""Catalogues as shops have them: exports, several photos, placeholders, photos at URLs; and exports through it all."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

import common
import openai_standin
import sample
from test_clean import Shop, clean, photo
from test_clean import shop as stage_1_shop
from test_embed import make_run
from test_pipeline import environment
from test_prepare import picture
from tiny import make_clip, shorten_end

prepare, embedding = importlib.import_module("2_prepare"), importlib.import_module("4_embed")
ROOT, FEEDS = Path(__file__).parents[1], Path(__file__).parent / "feeds"
shop = stage_1_shop  # a fixture


class Photos(BaseHTTPRequestHandler):
    """A photo for every path; some paths misbehave."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, name = self.server, self.path.split("?")[0].strip("/")
        with server.lock:
            server.asked[self.path] += 1
            server.headers[self.path] = dict(self.headers)
        data = server.files.get(name) or photo("red", sum(name.encode()), 64)
        tag = f'"{common.digest(data)[:8]}"'
        if name.startswith("busy") and server.asked[self.path] < 3:
            return self.answer(429 if "429" in name else 503, b"", {"Retry-After": server.wait})
        if self.headers.get("If-None-Match") == tag:
            return self.answer(304, None, {"ETag": tag})
        if name.startswith("status"):
            return self.answer(int(name[6:9]), b"")
        if name.startswith("page"):
            return self.answer(200, b"<!DOCTYPE html><p>No photo here")
        if name.startswith("moved"):
            return self.answer(302, b"", {"Location": server.target})
        if name.startswith("loop"):
            return self.answer(302, b"", {"Location": self.path})
        if name.startswith("cut"):
            self.answer(200, data[:100], {"Content-Length": str(len(data))})
            self.close_connection = True
            return None
        if name.startswith("none"):
            return self.answer(200, b"")
        if name.startswith("unasked304"):
            return self.answer(304, None)
        if name.startswith("lower"):  # and with a header that looks like a status
            self.wfile.write(b"http/1.1 200 OK\r\nHTTP/: 1\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            return None
        if name.startswith("gone"):
            self.answer(404, b"half", {"Content-Length": "100"})
            self.close_connection = True
            return None
        if name.startswith("closed"):
            self.close_connection = True
            return None
        if name.startswith("full"):
            return self.answer(200, data, {"Content-Length": str(2 << 30)})
        if name.startswith("slow"):
            server.stopped.wait(5)
        if name.startswith("huge"):
            return self.stream(data)
        return self.answer(200, data, {"ETag": tag + "ü" * ("odd" in name)} if "plain" not in name else {})

    def answer(self, status: int, data: bytes | None, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data or b""))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data or b"")
        with self.server.lock:
            self.server.sent[self.path] += bool(data) and status == 200

    def stream(self, data: bytes) -> None:
        """A photo that has no end."""
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        with pytest.raises(OSError):
            self.wfile.write(data)
            while True:
                self.wfile.write(b"\0" * (1 << 20))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def photos(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setattr(clean, "FETCH_PAUSE", 0.0)
    # With the usual queue of 5, connections that come at once would wait a second for the kernel's next attempt.
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 128)
    server = ThreadingHTTPServer(("0.0.0.0", 0), Photos)
    server.handle_error = lambda *_: None  # a killed client is none of ours
    server.daemon_threads, server.block_on_close = True, False
    server.asked, server.sent, server.headers, server.files = Counter(), Counter(), {}, {}
    server.lock, server.stopped, server.wait, server.target = threading.Lock(), threading.Event(), "0", ""
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()


def give(shop: Shop, text: str, name: str = "catalogue.csv") -> None:
    """Make this the shop's catalogue."""
    shop.catalogue = shop.folder / name
    shop.catalogue.write_text(text, encoding="utf-8")


def run_2(shop: Shop, *flags: str) -> dict[str, list[dict]]:
    """Stage 2 on the cleaned CSV; gives {id: samples}, each with its split and photo."""
    output = shop.folder / "shards"
    places = ["--input", str(shop.output), "--images", str(shop.folder), "--output", str(output)]
    assert prepare.main([*places, "--image-size", "32", "--workers", "1", "--max-failed", "1", *flags]) == common.DONE
    found: dict[str, list[dict]] = {}
    for path in sorted(output.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for name in files if path.parent.name != "mini_train" else ():
            if name.endswith(".json"):
                sample = json.loads(files[name]) | {"split": path.parent.name, "jpg": files[name[:-4] + "jpg"]}
                found.setdefault(sample["id"], []).append(sample)
    return found


# --------------------------------------------------------------------------------------------------------------------
# Encodings, delimiters, quotes and columns


def write_csv(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


TABLE = [["id", "name", "image_path", "note"], ["007.1/é", 'Chair "X"', "a.jpg", "two\nlines"], ["8", "", "b.jpg", ""]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_any_encoding_and_delimiter_gives_the_same_rows(tmp_path, encoding, delimiter):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(TABLE)
    rows, reasons = clean.read_feeds([write_csv(tmp_path / "c.csv", text.getvalue(), encoding)])
    assert rows.columns.tolist() == TABLE[0] and rows.values.tolist() == TABLE[1:]
    assert reasons.tolist() == ["", ""] and rows.index.tolist() == [1, 2]


def records(*paths: Path) -> list[dict[str, str]]:
    """Rows of a catalogue as dictionaries."""
    return clean.read_feeds(list(paths))[0].to_dict("records")


def test_bytes_that_are_not_utf8_are_read_as_windows_does(tmp_path):
    path = tmp_path / "c.csv"
    text = "id,name,image_path\r\n1,Sofa – 3’ “Oslo” €,Tisch – weiß.jpg\r\n"
    path.write_bytes(text.encode("cp1252") + b"2,gap \x81,b.jpg\r\n")  # a byte that Windows-1252 leaves undefined
    first, second = records(path)
    assert first == {"id": "1", "name": "Sofa – 3’ “Oslo” €", "image_path": "Tisch – weiß.jpg"}
    assert second["name"] == "gap \ufffd"


def test_a_quote_that_is_never_closed_loses_no_row_without_a_word(tmp_path):
    good = "id,name,image_path,note\n" + "".join(f'{i},a,a.jpg,"two\nlines"\n' for i in range(20))
    assert len(records(write_csv(tmp_path / "good.csv", good + '20,"a ""b""",a.jpg,"end"'))) == 21
    stray = '20,"Sofa 72"W,a.jpg,"open\n21,b,b.jpg,c\n'
    for tail in (
        '"',
        stray,
        '20,a,a.jpg,"open',
        '20,a,a.jpg,"open\n' + "".join(f"{i},a,a.jpg,x\n" for i in range(21, 300)),
    ):
        path = write_csv(tmp_path / "open.csv", good + tail)
        with pytest.raises(common.Fail, match=r"open.csv, line 42: the quotes"):
            records(path)


def test_columns_of_one_name_are_kept_apart(tmp_path):
    text = "ID,name,image_path,Name,tag,tag\n1,Oslo sofa,1.jpg,SKU-77,red,blue\n"
    (row,) = records(write_csv(tmp_path / "c.csv", text))
    assert row == {
        "id": "1", "name": "Oslo sofa", "image_path": "1.jpg", "Name": "SKU-77", "tag": "red", "tag_2": "blue",
    }  # fmt: skip
    for header in ("id,name,name,image_path", "ID,Id,name,image_path"):
        with pytest.raises(common.Fail, match=r"(name|id) may be (name, name|ID, Id); .*rename") as failure:
            records(write_csv(tmp_path / "c.csv", f"{header}\n"))
        assert failure.value.code == common.USAGE
    more = "id,name,image_path,image_path_2,tag,tag,tag_2\n1,a,a.jpg,b.jpg,x,y,z\n"
    (row,) = records(write_csv(tmp_path / "c.csv", more))
    assert list(row) == ["id", "name", "image_path", "image_path_2", "tag", "tag_3", "tag_2"]
    wide = 'id,name,image_path,"Size (W;D;H;L;X)"\n1,a,a.jpg,5\n'
    assert list(records(write_csv(tmp_path / "c.csv", wide))[0])[3] == "Size (W;D;H;L;X)"


def test_every_unusable_row_is_given_with_its_reason(tmp_path):
    text = "id,name,image_path\n1,a,a.jpg\n,b,b.jpg\n1,c,c.jpg\n\n2,d,\n3,e,e.jpg,surplus\n4\n0001,f,f.jpg\n"
    rows, reasons = clean.read_feeds([write_csv(tmp_path / "c.csv", text)])
    assert list(zip(rows.index, rows["id"], reasons, strict=True)) == [
        (1, "1", ""), (2, "", "missing id"), (3, "1", "duplicate id"), (4, "2", "missing image_path"),
        (5, "3", "too many fields"), (6, "4", "missing image_path"), (7, "0001", ""),
    ]  # fmt: skip
    assert rows.loc[3, "name"] == "c"


def test_several_files_are_one_catalogue(tmp_path):
    first = write_csv(tmp_path / "1.csv", "id,name,image_path,price\n1,a,a.jpg,5\n")
    second = write_csv(tmp_path / "2.csv", "ID;image_path;name;size\n2;b.jpg;b;L\n1;c.jpg;c;S\n")
    rows, reasons = clean.read_feeds([first, second])
    assert rows.columns.tolist() == ["id", "name", "image_path", "price", "size"]
    assert rows.loc[2].to_dict() == {"id": "2", "name": "b", "image_path": "b.jpg", "price": "", "size": "L"}
    assert rows.loc[1, "size"] == "" and reasons.tolist() == ["", "", "duplicate id"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "c.csv: is empty"),
        ("id,words,image_path\n", "no column name; the header has id, words, image_path; say which is which with --c"),
        ("just words\n", "no column id, name, image_path"),
    ],
)
def test_a_wrong_csv_says_what_is_wrong(tmp_path, text, said):
    with pytest.raises(common.Fail, match=said):
        records(write_csv(tmp_path / "c.csv", text))


def test_a_header_may_hold_line_breaks(tmp_path):
    text = 'id,name,image_path,"Price\n(EUR)",stock\n1,A chair,a.jpg,3,4\n2,B,b.jpg,5,6\n'
    assert [list(row.values()) for row in records(write_csv(tmp_path / "c.csv", text))] == [
        ["1", "A chair", "a.jpg", "3", "4"], ["2", "B", "b.jpg", "5", "6"],
    ]  # fmt: skip


def test_a_stray_quote_in_the_header_swallows_no_row(tmp_path):
    rows = '1,A,a.jpg,"3"\n2,B,b.jpg,"4"\n3,C,c.jpg,5\n'
    for text in (f'id,name,image_path,"price\n{rows}', f'id,name,image_path,"price\n{rows}'.replace('"3"', "3")):
        with pytest.raises(common.Fail, match="line 1: the quotes opened there swallow"):
            records(write_csv(tmp_path / "c.csv", text))


def test_two_stray_quotes_swallow_no_row(tmp_path):
    head, rows = ("id\tname\timage_path\n", [f"{i}\tItem {i}\timg/{i}.jpg\n" for i in range(5)])
    stray = [row.replace("Item", '"Item') if place in (1, 3) else row for place, row in enumerate(rows)]
    closed = [rows[0], '1\t"Item\timg/1.jpg\n', '2\tItem 72"\timg/2.jpg\n', *rows[3:]]  # an end that looks right
    bare = [row.replace(".jpg", "") for row in stray]
    for lines in (stray, closed, bare):
        with pytest.raises(common.Fail, match=r"c.csv, line 3: the quotes opened there swallow [23] lines"):
            records(write_csv(tmp_path / "c.csv", head + "".join(lines)))
    real = 'id,name,image_path,text\n1,"Item\none",1.jpg,"a, b, c\nd, e.jpg, f, g" \n2,Item,2.jpg,\n'
    assert [row["id"] for row in records(write_csv(tmp_path / "c.csv", real))] == ["1", "2"]


def test_single_lines_that_are_not_utf8_leave_the_others_alone(tmp_path, capsys):
    names = ["Küchenstuhl – weiß", "Bänk", "Tür € “Oslo”", "plain"]
    lines = ["id,name,image_path\n", *(f"{i},{name},ß{i}.jpg\n" for i, name in enumerate(names))]
    path = tmp_path / "c.csv"
    path.write_bytes(b"".join(line.encode("cp1252" if n in (2, 3) else "utf-8") for n, line in enumerate(lines)))
    read = [(row["name"], row["image_path"]) for row in records(path)]
    assert read == [(name, f"ß{i}.jpg") for i, name in enumerate(names)]
    assert "warning: " in (said := capsys.readouterr().out) and "2 lines are not UTF-8" in said and "1252: 3, 4" in said
    path.write_bytes(lines[0].encode() + "0,Küche ".encode() + "süß".encode("cp1252") + b",a.jpg\n")  # both in one line
    assert records(path)[0]["name"] == "Küche süß"
    path.write_bytes("".join(lines).encode("cp1252"))
    capsys.readouterr()
    assert [row["name"] for row in records(path)] == names and "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "head, said",
    [
        (b"PK\3\4\x14\0\6\0", "is a spreadsheet or zip archive; export it as CSV"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "is an old Excel file"),
        (b"\x1f\x8b\x08\0", "is gzip"),
        ("id,name,image_path\n".encode("utf-16-le"), "is no text, or UTF-16 without its mark; export it as"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><rss>", "is no text"),
        (b"id,\x07name,image_path\n", "is no text"),
    ],
)
def test_what_is_no_table_is_named_and_not_printed(tmp_path, head, said):
    (tmp_path / "c.csv").write_bytes(head + b"\0\x81\xff" * 50)
    with pytest.raises(common.Fail, match=said) as failure:
        records(tmp_path / "c.csv")
    assert str(failure.value).isprintable() and failure.value.code == common.USAGE


@pytest.mark.parametrize(
    "header, columns, said",
    [
        ("Handle,Title,Vendor,Image Src,Image Position", "", "Shopify; id = Handle, name = Title, image_path = "),
        ("Title,URL handle,SKU,Product image URL", "", "Shopify; id = URL handle, name = Title"),
        ("ID,Type,SKU,Name,Images,Parent", "", "WooCommerce; id = SKU, name = Name, image_path = Images"),
        ("ID,Type,Name,Images", "", "WooCommerce; id = ID"),
        ("id\ttitle\timage_link\tadditional_image_link", "", "Google Merchant; id = id, name = title"),
        ("id\ttitle\timage link", "", "Google Merchant"),
        ("sku;product_name;image_url", "", "by their names; id = sku, name = product_name, image_path = image_url"),
        ("No;Words;File;id", 'id=No,name="Words",image_path=File', "by --columns; id = No, name = Words"),
        ("id;name;Bild 1", "image_path=Bild 1", "by --columns; id = id, name = name, image_path = Bild 1"),
        ("ID;Name;Image_Path;title;sku", "", ""),
    ],
)
def test_columns_are_found_and_told(tmp_path, header, columns, said, capsys):
    rows, _ = clean.read_feeds([write_csv(tmp_path / "c.csv", f"{header}\n")], columns)
    assert set(common.REQUIRED_COLUMNS) <= set(rows.columns)
    printed = capsys.readouterr().out
    assert said in printed if said else not printed


@pytest.mark.parametrize(
    "header, columns, said",
    [
        ("sku,product_id,title,image", "", "id may be sku, product_id; say which is which with --columns"),
        ("id,name,photo,picture", "", "image_path may be photo, picture"),
        ("id,name,image_path", "id=SKU", "no column id; the header has id, name, image_path"),
        ("id,name,image_path", "price=x", "--columns price=x: write id=COLUMN"),
    ],
)
def test_no_column_is_guessed(tmp_path, header, columns, said):
    with pytest.raises(common.Fail, match=said) as failure:
        clean.read_feeds([write_csv(tmp_path / "c.csv", f"{header}\n")], columns)
    assert failure.value.code == common.USAGE


def test_the_rows_of_an_exports_product_become_one_with_all_its_photos(tmp_path, capsys):
    text = """Handle,Title,Image Src,Image Position,Variant SKU,Variant Image
    oslo,Oslo sofa,https://x/2.jpg,2,S1,
    oslo,,https://x/1.jpg,1,S2,https://x/red.jpg
    oslo,,,,S3,
    lamp,Lamp,https://x/3.jpg,1,L,
    oslo,Another sofa,https://x/9.jpg,1,S9,
    """
    rows, reasons = clean.read_feeds([write_csv(tmp_path / "c.csv", text.replace("    ", ""))])
    assert rows["id"].tolist() == ["oslo", "lamp", "oslo"] and reasons.tolist() == ["", "", "duplicate id"]
    assert rows["image_path"].tolist() == ["https://x/1.jpg", "https://x/3.jpg", "https://x/9.jpg"]
    assert json.loads(rows.at[1, common.FURTHER]) == ["https://x/red.jpg", "https://x/2.jpg"]
    assert rows.at[1, "Variant SKU"] == "S1" and rows.at[4, common.FURTHER] == ""
    assert "5 rows are 3 products" in capsys.readouterr().out
    text = "Handle,Title,Image Src\noslo,Oslo sofa,1.jpg,surplus\noslo,,2.jpg\noslo,,3.jpg\n,,4.jpg\nlamp,,5.jpg\n"
    rows, reasons = clean.read_feeds([write_csv(tmp_path / "c.csv", text)])
    assert [(n, rows.at[n, "image_path"], rows.at[n, common.FURTHER], reasons[n]) for n in rows.index] == [
        (1, "1.jpg", "", "too many fields"), (2, "2.jpg", '["3.jpg"]', ""), (4, "4.jpg", "", "missing id"),
        (5, "5.jpg", "", ""),
    ]  # fmt: skip


def test_variations_of_woocommerce_belong_to_their_parent(tmp_path):
    text = """ID,Type,SKU,Name,Images,Parent
    1,variable,OSLO,Oslo sofa,"https://x/a.jpg, https://x/b.jpg",
    2,variation,OSLO-R,Oslo sofa - red,https://x/c.jpg,OSLO
    3,variable,,Lamp,https://x/d.jpg,
    4,variation,L-1,Lamp - big,https://x/e.jpg,id:3
    5,simple,3,Stool,https://x/f.jpg,
    6,variation,,Lost,https://x/g.jpg,GONE
    """
    rows, reasons = clean.read_feeds([write_csv(tmp_path / "c.csv", text.replace("    ", ""))])
    assert rows["id"].tolist() == ["OSLO", "id:3", "3", "6"] and not reasons.any()  # 3 is another product's SKU
    (_, [(_, _, cells)]), *_ = common.products(rows, reasons)
    assert clean.photo_names(tmp_path, cells) == ["https://x/a.jpg", "https://x/b.jpg", "https://x/c.jpg"]


def test_a_cell_may_hold_several_photos(tmp_path):
    for name in ("a.jpg", "b, c.jpg", "d.jpg"):
        (tmp_path / name).write_bytes(b"x")
    assert clean.photo_names(tmp_path, ["a.jpg; d.jpg", "a.jpg|e.jpg"]) == ["a.jpg", "d.jpg", "e.jpg"]
    assert clean.photo_names(tmp_path, ["b, c.jpg", ""]) == ["b, c.jpg"]
    urls = "https://x/a,b.jpg?w=1,2, https://x/c.jpg,HTTP://y/d.jpg"
    assert clean.photo_names(tmp_path, [urls]) == ["https://x/a,b.jpg?w=1,2", "https://x/c.jpg", "HTTP://y/d.jpg"]
    path = write_csv(tmp_path / "c.csv", 'id,name,image_path,additional_image_link\n1,a,a.jpg,"d.jpg,a.jpg"\n')
    rows, reasons = clean.read_feeds([path])
    ((_, [(_, _, cells)]),) = common.products(rows, reasons)
    assert clean.photo_names(tmp_path, cells) == ["a.jpg", "d.jpg"]


def test_of_rows_with_one_id_the_first_usable_is_first(tmp_path):
    text = "id,name,image_path\nA,a,\nA,a,1.jpg\nA,b,2.jpg\nB,b,3.jpg,surplus\nB,b,4.jpg\n"
    rows, reasons = clean.read_feeds([write_csv(tmp_path / "c.csv", text)])
    assert reasons.tolist() == ["missing image_path", "", "duplicate id", "too many fields", ""]
    assert [(id, [number for number, *_ in some]) for id, some in common.products(rows, reasons)] == [
        ("A", [2, 3]), ("B", [5]),
    ]  # fmt: skip


def test_a_missing_feed_is_wrong_use(tmp_path):
    with pytest.raises(common.Fail, match=r"nowhere.csv: no such CSV; check --input") as failure:
        records(tmp_path / "nowhere.csv")
    assert failure.value.code == common.USAGE


# --------------------------------------------------------------------------------------------------------------------
# Exports


@pytest.mark.parametrize(
    "name, flags, ids, views",
    [
        ("shopify.csv", [], ["oslo-sofa", "bergen-lamp"], 4),
        ("woocommerce.csv", [], ["OSLO", "102"], 3),
        ("google.tsv", [], ["oslo-sofa", "bergen-lamp"], 3),
        ("plain.csv", [], ["oslo-sofa", "bergen-lamp"], 2),
        ("odd.csv", ["--columns", 'id=Art. Nr,name="Artikel",image_path=Bild 1'], ["oslo-sofa", "bergen-lamp"], 1),
    ],
)
def test_an_export_goes_through_with_every_product_once(shop, photos, name, flags, ids, views):
    give(shop, (FEEDS / name).read_text(encoding="utf-8").replace("https://photos.example", photos.url), name)
    assert shop.call("run", "--allow-private", *flags) == 0
    rows = shop.cleaned()
    assert [row["id"] for row in rows] == ids and not shop.rejects()
    assert [row["name"] for row in rows] == ["Oslo Sofa &amp; Cushions", "Bergen Lamp"]
    assert rows[0]["clean_title"] == "Sofa & Cushions"  # what was sent had no entity
    assert len(set(photos.asked.values())) == 1 and len(photos.asked) == views + 1
    samples = run_2(shop, "--photos", "4")
    assert {id: len(some) for id, some in samples.items()} == {ids[0]: views, ids[1]: 1}
    first = shop.folder / rows[0]["image_path"]
    assert first.read_bytes() == photo("red", sum(b"sofa-1.jpg"), 64)
    assert next(one for one in samples[ids[0]] if not one.get("view"))["image_path"] == rows[0]["image_path"]


def drawn_feed(name: str, url: str, products: dict[str, tuple[str, list[str]]]) -> str:
    """An export under the header of FEEDS / name. products: id -> (title, names of photos)."""
    lines = (FEEDS / name).read_text(encoding="utf-8").splitlines()
    delimiter = max(",;\t", key=lines[0].count)
    text, header = io.StringIO(), next(csv.reader(lines, delimiter=delimiter))
    feed = csv.DictWriter(text, header, restval="", delimiter=delimiter, lineterminator="\n")
    feed.writeheader()
    for number, (id, (title, photos)) in enumerate(products.items()):
        first, *more = (f"{url}/{photo}" for photo in photos)
        if name == "shopify.csv":
            fixed = {"Handle": id, "Option1 Name": "Color", "Variant Price": "49.00", "Variant Taxable": "TRUE"}
            row = {"Title": title, "Body (HTML)": f"<p>{title},\nnew</p>", "Vendor": "Nordhus", "Published": "TRUE"}
            row |= {"Option1 Value": "Red", "Variant SKU": f"{id}-R", "Status": "active"}
            feed.writerow(fixed | row | {"Image Src": f"{first}?v=1", "Image Position": 1})
            for place, photo in enumerate(more, 2):  # a variant's row and an image's in one, as Shopify writes them
                variant = {"Option1 Value": "Blue", "Variant SKU": f"{id}-{place}"}
                feed.writerow(fixed | variant | {"Image Src": f"{photo}?v=1", "Image Position": place})
        elif name == "woocommerce.csv":
            known = {"SKU": id} if number % 3 else {"ID": id}
            row = {"ID": 1000 + number, "Type": "simple", "Name": title, "Published": 1, "Regular price": "49.00"}
            feed.writerow(row | known | {"Description": f"<p>{title}</p>", "Images": ", ".join([first, *more])})
        elif name == "google.tsv":
            row = {"id": id, "title": title, "link": f"https://shop.example/{id}", "image_link": first}
            row |= {"additional_image_link": ",".join(more), "availability": "in_stock", "price": "49.00 EUR"}
            feed.writerow(row | {"description": f'{title}, 72" wide', "brand": "Nordhus", "condition": "new"})
        elif name == "plain.csv":
            photos = "|".join([first, *more])
            feed.writerow({"product_id": id, "title": title, "image_url": photos, "price": "49,00"})
        else:
            feed.writerow({"Nummer": number, "Artikel": title, "Art. Nr": id, "Bild 1": first, "Bestand": 3})
    return text.getvalue()


@pytest.fixture(scope="module")
def drawn() -> tuple[dict[str, tuple[str, list[str]]], dict[str, bytes]]:
    """40 drawn products, {id: (title, names of photos)}, most with two photos; {name: JPEG} of all photos."""
    products, files = {}, {}
    for item in sample.products(40):
        image = sample.draw(item, 42, 64)
        names = [f"{item.index}-{view}.jpg" for view in range(2 if item.index % 3 else 1)]
        for name, view in zip(names, (image, ImageOps.mirror(image)), strict=False):
            buffer = io.BytesIO()
            view.save(buffer, "JPEG", quality=90)
            files[name] = buffer.getvalue() + b"%d" % item.index  # twins are drawn alike
        title = " ".join(sample.noisy_name(item, 42).split())
        products[str(500 + item.index)] = (title.replace(",", " &amp; Cushions,", 1), names)
    return products, files


def check_products(folder: Path, products: dict[str, tuple[str, list[str]]], files: dict[str, bytes]) -> None:
    """Every product is in master.parquet once, with its first photo and its own title as the stand-in cleans it."""
    rows = {row["image_id"]: row for row in pq.read_table(folder / "data/embeddings/master.parquet").to_pylist()}
    assert sorted(rows) == sorted(products)
    with open(folder / "data/cleaned.csv", encoding="utf-8", newline="") as handle:
        cleaned = {row["id"]: row["name"] for row in csv.DictReader(handle)}
    assert cleaned == {id: title for id, (title, _) in products.items()}
    for id, (title, names) in products.items():
        data = (folder / rows[id]["image_path"]).read_bytes()
        assert data == files[names[0]]
        sent = clean.photo_jpeg(data, clean.CleaningConfig.image_size)[0]
        answer = openai_standin.answer(common.plain_text(title), sent)
        assert rows[id]["title"] == common.clean_metadata(answer)["title"]


def run_here(plan: str) -> list[str]:
    """Run the stages' commands of a `make -n` in this process, which loads torch once; gives the stages' names."""
    called = re.findall(r"(\d_[a-z]+)\.py (.*)", plan.replace("\\\n", " "))
    for stage, flags in called:
        assert importlib.import_module(stage).main([one for one in shlex.split(flags) if one != "$resume"]) == 0
    return [stage for stage, _ in called]


@pytest.mark.parametrize("name", ["shopify.csv", "woocommerce.csv", "google.tsv", "plain.csv", "odd.csv"])
def test_an_export_goes_through_make_all_with_every_product_once(shop, photos, drawn, tmp_path, monkeypatch, name):
    """With no variable but CATALOGUE, and COLUMNS for odd names, but for a test's place, speed and photo server.

    The commands that make would call run in this process, which has loaded torch already.
    """
    shorten_end(monkeypatch, importlib.import_module("3_train"))
    products, photos.files = drawn
    give(shop, drawn_feed(name, photos.url, products), name)
    call = ["make", "--dry-run", "all", f"CATALOGUE={shop.catalogue}", f"DATA={tmp_path / 'data'}"]
    call += [f"PYTHON={sys.executable}", f"MODEL=local-dir:{make_clip(tmp_path / 'clip')}", "EPOCHS=1"]
    call += ["CLEAN_FLAGS=--allow-private", "TRAIN_FLAGS=--workers 1"]
    call += [f"OPENAI_BASE_URL={shop.server.url}", "POLL_INTERVAL=0"]
    call += ["COLUMNS=id=Art. Nr,name=Artikel,image_path=Bild 1"] if name == "odd.csv" else []
    planned = subprocess.run(call, cwd=ROOT, env=environment(), text=True, capture_output=True, check=True).stdout
    assert run_here(planned) == ["3_train", "1_clean", "2_prepare", "3_train", "4_embed"]  # first --check
    check_products(tmp_path, products, photos.files)


def test_an_export_of_before_is_read_the_same(shop):
    """Our own three columns give the bytes that they always gave."""
    assert shop.call() == 0
    head = shop.output.read_text().splitlines()[0]
    assert head == ",".join(["id", "name", "image_path", "price", *clean.FIELDS])


# --------------------------------------------------------------------------------------------------------------------
# The first usable row, and several photos


def test_of_rows_with_one_id_the_first_usable_counts_in_both_stages(shop, capsys):
    (shop.folder / "images/page.jpg").write_bytes(b"<html>")
    (shop.folder / "images/dot.gif").write_bytes(tiny_gif())
    text = """id,name,image_path,note
    A,Sofa grey,,1
    A,Sofa grey,images/p1.jpg,2
    B,Chair oak,images/gone.jpg,3
    B,Chair oak,images/page.jpg,4
    B,Chair of oak,images/p2.jpg,5
    B,Chair oak,images/p3.jpg,6
    C,Lamp,images/p4.jpg,7
    C,Lamp,images/p5.jpg,8
    D,Desk,images/dot.gif,9
    """
    give(shop, text.replace("    ", ""))
    assert shop.call("run", "--max-failed", "0.12") == 0  # of nine rows one product is lost
    rows = shop.cleaned()
    assert [(row["id"], row["image_path"], row["note"]) for row in rows] == [
        ("A", "images/p1.jpg", "2"), ("B", "images/p2.jpg", "5"), ("C", "images/p4.jpg", "7"),
    ]  # fmt: skip
    assert json.loads(rows[2]["further_photos"]) == ["images/p5.jpg"] and not rows[0]["further_photos"]
    lines = [json.loads(line) for line in (shop.folder / "cleaned.csv.rejects.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in lines] == [
        (1, "missing image_path"), (3, "missing file"), (4, "not an image"), (6, "duplicate id"), (8, "duplicate id"),
        (9, "image too small"),
    ]  # fmt: skip
    shop.output.write_text(shop.catalogue.read_text())  # stage 2 by itself, on the same rows
    samples = run_2(shop)
    assert {id: [(one["image_path"], one["row"]["note"]) for one in some] for id, some in samples.items()} == {
        "A": [("images/p1.jpg", "2")], "B": [("images/p2.jpg", "5")], "C": [("images/p4.jpg", "7")],
    }  # fmt: skip
    assert "input 9 = written 3 + rejected 6" in capsys.readouterr().out


def tiny_gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (1, 1)).save(buffer, "GIF")
    return buffer.getvalue()


def test_the_views_of_a_product_are_samples_of_one_group_in_one_split(shop):
    shop.rows = [shop.product(i) for i in range(24)]
    for i, row in enumerate(shop.rows):
        names = [row["image_path"], *(f"images/v{i}-{view}.jpg" for view in range(3))]
        for view, name in enumerate(names):
            picture(3 * i + view if view < 3 else 999).save(shop.folder / name)  # the last is the same for all
        row["image_path"] = f"{names[0]}; {names[1]};{names[2]};images/none.jpg;{names[3]}"
    shop.write()
    assert shop.call() == 0
    assert json.loads(shop.cleaned()[0]["further_photos"])[0] == "images/v0-0.jpg"
    alone = run_2(shop)
    samples = run_2(shop, "--photos", "9")
    assert {len(some) for some in samples.values()} == {3}  # what many products share shows none of them
    for id, some in samples.items():
        assert len({one["group"] for one in some}) == len({one["split"] for one in some}) == 1
        assert [one["view"] for one in sorted(some, key=lambda one: one["view"])] == [0, 1, 2]
        assert {one["split"] for one in some} == {alone[id][0]["split"]} and "view" not in alone[id][0]
        assert len({one["jpg"] for one in some}) == 3 and len({one["title"] for one in some}) == 1
    counts = common.load_manifest(shop.folder / "shards")["counts"]
    assert counts == {"input": 24, "written": 24, "rejected": 0}
    check_vectors(shop.folder, samples)
    check_photo_search(shop.folder, samples)
    assert {len(some) for some in run_2(shop, "--photos", "2").values()} == {2}


def check_vectors(folder: Path, samples: dict[str, list[dict]]) -> None:
    """Stage 4 on these shards, twice: a row a product, whose vector is the normalised mean of its photos'."""
    places = ["--shards", folder / "shards", "--model", f"local-dir:{make_clip(folder / 'base')}"]
    places += ["--finetuned", make_run(folder / "run", seed=1), "--output", folder / "out/master.parquet"]
    flags = ["--device", "cpu", "--precision", "fp32", "--workers", "1"]
    for _ in range(2):
        assert embedding.main([*map(str, places), *flags]) == 0
        found = pq.read_table(folder / "out/master.parquet").to_pylist()
        assert sorted(row["image_id"] for row in found) == sorted(samples)
    clip = common.load_clip(f"local-dir:{folder / 'base'}")
    for row in found:
        views = sorted(samples[row["image_id"]], key=lambda one: one["view"])
        pixels = torch.stack([common.decode_jpeg(one["jpg"], clip.size) for one in views])
        mean = common.encode(clip, pixels=pixels).double().mean(dim=0)
        assert np.allclose(row["base_embedding"], mean / mean.norm(), atol=1e-5)
        assert (row["split"], row["image_path"]) == (views[0]["split"], views[0]["image_path"])


def check_photo_search(folder: Path, samples: dict[str, list[dict]]) -> None:
    """What the report of these shards says of further photos, against the pictures' own vectors."""
    report = json.loads((folder / "out/report.json").read_text())
    found, tested = report["photos"], [some[0]["split"] == "test" for some in samples.values()]
    assert (found["queries"], found["products"], found["most"]) == (sum(tested), 24, 2)
    clip = common.load_clip(f"local-dir:{folder / 'base'}")
    ordered = [sorted(some, key=lambda one: one["view"]) for some in samples.values()]
    pixels = torch.stack([common.decode_jpeg(one["jpg"], clip.size) for some in ordered for one in some])
    vectors = common.encode(clip, pixels=pixels).double().reshape(24, 3, -1)
    hits = []
    for searched in (vectors[:, 0], torch.nn.functional.normalize(vectors[:, :2].mean(dim=1), dim=1)):
        scores = vectors[:, 2] @ searched.T
        hits.append(((scores > scores.diagonal()[:, None]).sum(dim=1) < 10)[tested].double().mean().item())
    base = found["models"][0]
    assert [model["name"] for model in found["models"]] == ["zero_shot", "run"]
    assert (base["one_photo"], base["value"]) == pytest.approx(hits)
    assert "photo → product recall@10" in (folder / "out/report.html").read_text()


class GivenVectors:
    """An encoder whose store holds these vectors, by digest."""

    def __init__(self, vectors: dict[str, np.ndarray]):
        self.store, self.vectors = self, vectors

    def get(self, digests: list[str]) -> np.ndarray:
        return np.stack([self.vectors[digest] for digest in digests]).astype(np.float32)


def test_what_further_photos_bring_has_the_right_values():
    along = {"a1": 30, "a2": 20, "a3": 20, "b1": 21, "b2": 21, "b3": 21, "c1": 31, "c2": 31, "c3": 22, "d1": 23,
             "d2": 23, "e1": 31, "e2": 24, "e3": 24, "f2": 25, "f3": 25, "g1": 26, "g2": 26,
             "g3": 26} | {f"{i}": i for i in range(20)}  # fmt: skip
    vectors = {name: np.eye(32)[axis] for name, axis in along.items()}
    views = [[f"{i}"] for i in range(20)]  # products with one photo, each along an axis of its own
    views += [["a1", "a2", "a3"], ["b1", "b2", "b3"], ["c1", "c2", "c3"]]  # the second photo helps a; b needs none
    views += [["d1", "d2"], ["e1", "e2", "e3"], ["e3", "f2", "f3"]]  # d has too few; e's last is another's first
    views += [["g1", "g2", "g3"]]
    items = pd.DataFrame({"views": views, "group": [str(i) for i in range(len(views))], "split": "test"})
    items.loc[26, "split"] = "train"  # g is searched, but asks nothing
    found = embedding.judge_photos(items, ["zero_shot"], [GivenVectors(vectors)])
    assert (found["queries"], found["products"], found["most"]) == (4, 27, 2)  # a, b, c and f
    (model,) = found["models"]
    mean, low, high, p = common.bootstrap_mean([1, 0, 0, 1], limit=1)  # of f, too, the second shows what the first hid
    assert model == {"name": "zero_shot", "one_photo": 0.25, "value": 0.75, "difference": mean, "low": low,
                     "high": high, "p": p}  # fmt: skip
    items.loc[[22, 25], "group"] = "same"  # c finds its duplicate's photos
    vectors["f2"] = vectors["c3"]
    (model,) = embedding.judge_photos(items, ["zero_shot"], [GivenVectors(vectors)])["models"]
    assert (model["one_photo"], model["value"]) == (0.25, 0.75)  # a, b and c; f no more
    assert embedding.judge_photos(items.iloc[:20], ["zero_shot"], [GivenVectors(vectors)]) == {}


# --------------------------------------------------------------------------------------------------------------------
# Placeholders


KINDS = ("sofa", "lamp", "bed", "oak table", "rug", "mirror", "desk")


@pytest.mark.parametrize(
    "titles, placeholder",
    [
        ([f"ACME {'Nora Emil Oslo'.split()[i % 3]} {KINDS[i % 7]} - free shipping" for i in range(40)], True),
        ([f"ACME Oslo sofa {c} - free shipping" for c in "red blue green grey black white beige pink".split()], False),
        ([f"Oslo sofa with {w} legs in dark {w} velvet" for w in "oak ash beech walnut brass steel".split()], False),
        ([f"{KINDS[i]} Oslo" for i in range(5)], False),  # a set photographed together
        ([f"Chair {i}" for i in range(100)], False),
        (
            [f"Lamp {n}" for n in ("Nora of oak", "Emil, brass", "Oslo big", "Ida in blue", "Viggo red", "Liv steel")],
            True,
        ),
    ],
)
def test_a_placeholder_is_told_from_variants_that_share_a_photo(titles, placeholder):
    others = [f"ACME {name} {kind} - free shipping" for name in ("Ida", "Liv", "Oslo") for kind in KINDS]
    photos = ["same"] * len(titles) + [f"own {i}" for i in range(len(others))]
    shared = clean.shared_photos(photos, titles + others)
    count, found = shared.get("same", (1, False))
    assert found is placeholder and set(shared) <= {"same"} and count == len({t.strip("0123456789") for t in titles})


def test_a_placeholder_is_rejected_before_anything_is_paid(shop, capsys):
    shop.rows = [shop.product(i) for i in range(40)]
    soon = photo("blue", 4000)
    for i, row in enumerate(shop.rows):
        if i % 4 == 0:
            (shop.folder / row["image_path"]).write_bytes(soon)
    for i, color in enumerate("red blue green grey black white beige".split()):  # variants of one product
        shop.rows.append(shop.rows[1] | {"id": f"v{i}", "name": f"Oslo corner sofa {color}"})
    shop.write()
    assert shop.call("prepare") == 0
    assert shop.server.ledger("upload") == [] and shop.server.ledger("paid") == []
    printed = capsys.readouterr().out
    assert "images/p0.jpg: one photo for 10 products with 10 different titles, rejected" in printed
    assert "images/p1.jpg: one photo for 8 products with 8 different titles\n" in printed
    assert shop.call("run", "--max-failed", "0.5") == 0
    assert Counter(shop.rejects().values()) == {"placeholder photo": 10} and len(shop.cleaned()) == 37
    assert sum(shop.paid().values()) == 37
    shop.check_answers()
    assert shop.call("run") == common.FAILED  # more than --max-failed


def steps(function: Callable, *arguments) -> int:
    """How many bytecodes of 1_clean.py a call runs: the same on every machine."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != clean.__file__:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("same", [6, 0.5])
def test_looking_for_placeholders_takes_time_by_the_number_of_products(same):
    """Pairs of variants share a photo, and six products, or half of all, show a placeholder."""

    def world(count: int) -> tuple[list[str], list[str]]:
        alike = same if same > 1 else int(same * count)
        names = ["".join("abcdefghij"[int(digit)] for digit in f"{i:04d}") for i in range(2 * count)]
        photos = ["same"] * alike + [f"pair {i // 2}" for i in range(count - alike)]
        return photos, [f"{names[i]} chair {names[-i]}" for i in range(count)]

    assert steps(clean.shared_photos, *world(400)) < 3 * steps(clean.shared_photos, *world(200))


def test_a_cell_of_spaces_is_read_at_once():
    """Cubic in the number of spaces, it would take hours."""
    assert clean.cell_urls(f"https://x.de/a.jpg{' ' * 20_000}b") == [f"https://x.de/a.jpg{' ' * 20_000}b"]
    assert clean.cell_urls("https://x.de/a,b.jpg ,\thttp://y.de/c.jpg|HTTPS://z.de/d ; ") == [
        "https://x.de/a,b.jpg", "http://y.de/c.jpg", "HTTPS://z.de/d",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Photos at URLs


def fetch(folder: Path, urls: list[str], allow_private: bool = True) -> dict[str, str]:
    time.sleep(0.02)  # two ticks of the clock that files get their times from, by which rounds are told apart
    return clean.PhotoFetcher(folder, allow_private).fetch(urls)


def kept(folder: Path, url: str) -> bytes:
    return (folder / common.digest(url.encode())).read_bytes()


def test_a_server_that_misbehaves_loses_nothing_else(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(clean, "MAX_FETCHED", 4 << 20)
    monkeypatch.setattr(clean, "FETCH_TIMEOUT", 2)
    photos.target = "/good0.jpg"
    names = ["busy429.jpg", "busy503.jpg", "status404", "status500", "page", "loop", "cut", "slow", "huge", "moved.jpg"]
    names += ["full", "none", "closed", "unasked304", "gone", "lower.jpg", "good|<1>.jpg#ö ö"]
    names += [f"good{i}.jpg" for i in range(20)] + ["a b/ü.jpg?x=1&y=ü"]
    urls = [f"{photos.url}/{name}" for name in names] + ["http://no-such-host.invalid/b.jpg", "http://[bad/a.jpg"]
    failures = {url.rpartition("/")[2]: reason for url, reason in fetch(tmp_path, urls).items()}
    assert failures == {
        "status404": "status 404", "status500": "status 500", "page": "not an image", "loop": "too many redirects",
        "cut": "answer cut", "slow": "too slow", "huge": "too large", "full": "too large", "none": "empty answer",
        "unasked304": "status 304", "gone": "status 404",
        "closed": "connection broken (libcurl's code 52)", "a.jpg": "not a URL", "b.jpg": "unknown host",
    }  # fmt: skip
    assert kept(tmp_path, f"{photos.url}/moved.jpg") == photo("red", sum(b"good0.jpg"), 64)
    assert photos.asked["/status404"] == 1 and photos.asked["/status500"] == photos.asked["/cut"] == 4
    assert not list(tmp_path.glob(".*.tmp")) and len(list(tmp_path.glob("?" * 64))) == 26
    assert photos.asked["/gone"] == 1 and photos.asked["/good%7C%3C1%3E.jpg"] == 1
    before = Counter(photos.asked)
    assert not fetch(tmp_path, [url for url in urls if "good" in url])
    assert all(photos.asked[f"/good{i}.jpg"] - before[f"/good{i}.jpg"] == 1 for i in range(1, 20))
    assert all(photos.sent[f"/good{i}.jpg"] == 1 for i in range(1, 20))  # 304
    assert photos.headers["/good5.jpg"]["If-None-Match"]


def test_connections_to_a_host_are_few_and_kept(photos, tmp_path, monkeypatch):
    accept, accepted = photos.get_request, []
    monkeypatch.setattr(photos, "get_request", lambda: (accepted.append(1), accept())[1])
    photos.target = "/c0.jpg"
    urls = [f"{photos.url}/c{i}.jpg" for i in range(60)] + [f"{photos.url}/moved{i}.jpg" for i in range(6)]
    assert not fetch(tmp_path, urls) and len(accepted) <= clean.HOST_LANES
    assert not fetch(tmp_path, urls) and photos.sent["/c1.jpg"] == 1 and len(accepted) <= 2 * clean.HOST_LANES


def test_many_hosts_that_lead_to_one_wait_for_its_few_connections(photos, tmp_path, monkeypatch):
    under_way, most, lock = Counter(), Counter(), threading.Lock()
    answer = Photos.answer

    def slowly(self, status, data, headers=None):
        with lock:
            under_way[status] += 1
            most[status] = max(most[status], under_way[status])
        time.sleep(0.3 if status == 200 else 0)
        answer(self, status, data, headers)
        with lock:
            under_way[status] -= 1

    monkeypatch.setattr(Photos, "answer", slowly)
    monkeypatch.setattr(clean, "FETCH_TIMEOUT", 2)  # less than all of them take together, much more than one
    photos.target = f"http://localhost:{photos.server_port}/shared.jpg"
    urls = [f"http://127.0.0.{1 + i % 8}:{photos.server_port}/moved{i}.jpg" for i in range(96)]
    assert not fetch(tmp_path, urls) and photos.asked["/shared.jpg"] == 96 and most[200] <= clean.HOST_LANES


def test_a_changed_photo_is_fetched_anew_and_one_without_etag_is_left_alone(photos, tmp_path):
    urls = [f"{photos.url}/a.jpg", f"{photos.url}/plain.jpg"]
    assert not fetch(tmp_path, [*urls, f"{photos.url}/odd.jpg"])
    assert not fetch(tmp_path, [f"{photos.url}/odd.jpg"])  # its ETag is not ASCII
    photos.files = {"a.jpg": photo("blue"), "plain.jpg": photo("blue")}
    assert not fetch(tmp_path, urls)
    assert kept(tmp_path, urls[0]) == photo("blue") and photos.asked == {"/a.jpg": 2, "/plain.jpg": 1, "/odd.jpg": 2}


def test_a_server_is_left_alone_as_long_as_it_asks(photos, tmp_path, monkeypatch):
    photos.wait = "3600"
    assert fetch(tmp_path, [f"{photos.url}/busy429.jpg"]).popitem()[1] == "status 429" and photos.asked.total() == 1
    photos.wait = "Fri, 31 Dec 2099 23:59:59 GMT"
    assert fetch(tmp_path, [f"{photos.url}/busy429.jpg"]) and photos.asked.total() == 2
    photos.wait = "soon"  # no wish that anybody could understand
    assert not fetch(tmp_path, [f"{photos.url}/busy429.jpg"]) and photos.asked.total() == 3
    photos.wait = "1"
    start = time.monotonic()
    assert not fetch(tmp_path, [f"{photos.url}/busy.jpg"]) and time.monotonic() - start >= 2


def test_what_waits_for_a_server_is_not_asked_when_it_wishes_for_rest(photos, tmp_path):
    photos.wait = "3600"
    failures = fetch(tmp_path, [f"{photos.url}/busy{i}429.jpg" for i in range(40)] + [f"{photos.url}/a.jpg"])
    assert len(failures) == 40 and photos.asked.total() == 41  # each once: it asks for more than is waited for
    photos.wait = "1"
    assert not fetch(tmp_path, [f"{photos.url}/busy{i}429.jpg" for i in range(40)])


def test_what_is_no_picture_is_left_at_its_first_bytes(photos, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(Photos, "do_GET", lambda self: (sent.append(1), self.stream(b"<html>" * 1000)))
    assert set(fetch(tmp_path, [f"{photos.url}/page.jpg"]).values()) == {"not an image"} and len(sent) == 1


@pytest.mark.parametrize(
    "address, public",
    [
        ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("192.168.0.1", False), ("172.16.0.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("0.0.0.0", False), ("::1", False), ("fe80::1%eth0", False), ("fd00::1", False), ("::ffff:127.0.0.1", False),
        ("2002:7f00:1::", False), ("64:ff9b::7f00:1", False), ("224.0.0.1", False), ("255.255.255.255", False),
    ],
)  # fmt: skip
def test_addresses_of_the_machine_and_of_private_networks_are_known(address, public):
    assert clean.is_public(address) is public


def test_private_addresses_are_refused_by_name_by_address_and_after_redirects(photos, tmp_path, monkeypatch):
    port = photos.server_port
    urls = [f"http://{host}:{port}/a.jpg" for host in ("127.0.0.1", "localhost", "2130706433", "[::1]", "0")]
    assert set(fetch(tmp_path, urls, allow_private=False).values()) == {"private address (--allow-private)"}
    assert not photos.asked
    # A public address whose server sends the client to a private one: the first hop alone may pass.
    monkeypatch.setattr(clean, "is_public", lambda address: address == "127.0.0.1")
    photos.target = f"http://127.0.0.2:{port}/secret.jpg"
    reasons = fetch(tmp_path, [f"{photos.url}/moved.jpg"], allow_private=False)
    assert [*reasons.values()] == ["private address (--allow-private)"] and list(photos.asked) == ["/moved.jpg"]
    photos.target = "file:///etc/passwd"
    assert [*fetch(tmp_path, [f"{photos.url}/moved2.jpg"]).values()] == ["not http or https"]


def test_photos_that_are_not_fetched_are_rejected_by_reason(shop, photos, capsys):
    shop.rows[3]["image_path"] = f"{photos.url}/status404"
    shop.rows[4]["image_path"] = f"{photos.url}/page.jpg, {photos.url}/good.jpg"
    shop.write()
    assert shop.call("run", "--allow-private", "--max-failed", "0.1") == 0
    assert shop.rejects() == {"003": "photo not fetched: status 404"}
    row = next(row for row in shop.cleaned() if row["id"] == "004")
    assert row["image_path"].startswith("batch.photos/") and "further_photos" not in row
    printed = capsys.readouterr().out
    assert "photos at URLs: 1 fetched" in printed and "1: not an image (such as http" in printed
    assert len(run_2(shop)) == 11
    assert shop.call("run", "--max-failed", "0.1") == 0  # fetched ones stay, though this call may not go there
    assert sum(shop.paid().values()) == 11
    assert shop.rejects() == {"003": "photo not fetched: private address (--allow-private)"}


def test_killed_25_times_while_fetching_it_fetches_nothing_twice(photos, tmp_path):
    urls = [f"{photos.url}/k{i}.jpg" for i in range(400)]
    code = "import importlib, json, sys; clean = importlib.import_module('1_clean'); from pathlib import Path\n"
    code += "print(clean.PhotoFetcher(Path(sys.argv[1]), True).fetch(json.loads(sys.argv[2])))"
    chance, kills = random.Random(7), 0
    command = [sys.executable, "-c", code, str(tmp_path / "p"), json.dumps(urls)]
    while kills < 25:
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = photos.sent.total() + chance.randrange(12)
        while child.poll() is None and photos.sent.total() < target:
            time.sleep(0.001)
        kills += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.splitlines()[-1] == b"{}"
    assert all(kept(tmp_path / "p", url) == photo("red", sum(url.rpartition("/")[2].encode()), 64) for url in urls)
    again = photos.sent.total() - len(urls)  # only what was on the wire at a kill
    assert 0 <= again <= 25 * clean.HOST_LANES
    names = {path.name for path in (tmp_path / "p").glob("?" * 64)}
    assert names == {common.digest(url.encode()) for url in urls}


def test_titles_that_were_sent_as_they_were_are_not_bought_again(shop, monkeypatch):
    shop.rows[0]["name"] += " &amp; <b>more</b>"
    shop.write()
    with monkeypatch.context() as version_before:
        version_before.setattr(common, "plain_text", lambda text: " ".join(text.split()))
        assert shop.call() == 0
    shop.lose("plan.parquet")
    assert shop.call() == 0
    assert sum(shop.paid().values()) == len(shop.rows)


def test_make_hands_columns_on_and_no_terminals_width(tmp_path):
    (tmp_path / "shop.csv").write_text("x\n")

    def plan(**variables: str) -> str:
        places = [f"DATA={tmp_path}/data", f"CATALOGUE={tmp_path}/shop.csv", f"PYTHON={sys.executable}"]
        environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | variables
        command = ["make", "-n", "clean-data", *places]
        return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True).stdout

    assert "--columns" not in plan() and "--columns" not in plan(COLUMNS="80")
    line = next(line for line in plan(COLUMNS="id=SKU,name=Product's title").splitlines() if "1_clean.py" in line)
    words = shlex.split(line)
    assert words[words.index("--columns") + 1] == "id=SKU,name=Product's title"


def test_of_two_runs_at_once_one_fetches(shop, photos, capsys):
    shop.rows[0]["image_path"] = f"{photos.url}/a.jpg"
    shop.write()
    with common.exclusive(shop.workspace / "lock"):
        assert shop.call("run", "--allow-private") == common.UNFINISHED
    assert not photos.asked and "another call is at work" in capsys.readouterr().out
