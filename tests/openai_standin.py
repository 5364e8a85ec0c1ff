"""A local stand-in for the OpenAI Files, Batch, Models and Chat endpoints, for runs without a key and for tests.

    python tests/openai_standin.py --state data/standin -- python 1_clean.py run --input ... --output ...
    python tests/openai_standin.py --state data/standin --fault expire:0.5:1       (serves until Ctrl-C)

It answers from the request alone: object type, style and material from words of the title, the color from the picture.
Everything it holds, and a ledger of every upload, batch and paid request, lies in the state folder and survives it.
A fault is NAME[:ARGUMENT...], or NAME@WORD[:TIMES] for answers to titles that hold a word; FAULTS lists them.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = {
    "unauthorized": "every call gets 401",
    "forbidden": "every call gets 403",
    "echo": "errors repeat the key and the request's first bytes, as careless servers do",
    "no_route": "files|batches those calls get 404, as from servers without a Batch API",
    "no_model": "the models endpoint gets 404",
    "shutdown": "DATE[:MODEL...] the shutdown_date of these models, or of all",
    "unlisted": "MODEL... the account does not have them",
    "gone": "MODEL[:POLLS] from that number of polls on the model is not there",
    "no_batches_of": "MODEL[:lines] its batches, or their lines, fail with model_not_found",
    "efforts": "VALUE... the only values of reasoning_effort, which a refusal lists; without one the first is needed",
    "reasons": "TOKENS that an answer takes first, unless the effort is none or minimal",
    "usage": "FACTOR tokens in and out are so many times as many",
    "upload_limit": "BYTES a larger upload gets 413",
    "rate_limit": "TIMES[:SECONDS] 429 with Retry-After",
    "server_error": "TIMES 500 on any call",
    "upload_fails": "TIMES 500 on upload",
    "upload_lost": "TIMES the file is kept, the answer is lost",
    "create_lost": "TIMES the batch is made, the answer is lost",
    "create_500": "TIMES the batch is made, the answer is 500",
    "list_late": "TIMES a new batch is missing from the list",
    "quota": "TIMES 429 insufficient_quota on create",
    "quota_everywhere": "TIMES 429 insufficient_quota on any call",
    "quota_batch": "TIMES the batch fails with billing_hard_limit_reached",
    "quota_lines": "TIMES half of a batch's lines get 429 insufficient_quota",
    "token_limit": "TOKENS[:unstated] a batch that would exceed so many enqueued tokens fails",
    "fail_batch": "CODE:TIMES the batch fails without naming a line",
    "expire": "SHARE:TIMES the batch expires with that share of its results",
    "vanish": "TIMES a batch is 404 from its first poll on; the number counts batches",
    "output_missing": "TIMES a completed batch has no output_file_id for so many polls",
    "output_late": "TIMES the output's content gets 404",
    "download_cut": "TIMES the output's content is cut",
    "miscount": "the counts tell of one result more than there is, and the output's last line has no end",
    "web_page": "TIMES a call is answered by a web page, with status 200",
    "skip_statuses": "a batch goes from validating to completed at once",
    "shuffle": "results come in another order",
    "duplicate": "every result comes twice, and one for an unknown id",
    "null_ids": "what a batch does not have is null, not left out",
    "empty_ids": "file ids that are not there are empty strings",
}
ANSWER_FAULTS = ("length", "empty", "refusal", "content_filter", "broken_json", "missing_field", "wrong_type",
                 "http_400", "http_429", "http_500", "absent", "no_choices", "broken_line", "bad_line", "fence",
                 "think", "reasoning", "parts", "control")  # fmt: skip
MODELS = {"gpt-5-nano": "2026-12-11", "gpt-5-mini": "2026-12-11", "gpt-5.4-nano": "2027-04-01", "gpt-6-luna": None,
          "gpt-5.6-luna": None, "qwen2.5-vl": None}  # fmt: skip
OFF = ("none", "minimal")
OLD_EFFORTS, EFFORTS = ("minimal", "low", "medium", "high"), ("none", "low", "medium", "high", "xhigh", "max")
LIVE = ("validating", "in_progress", "finalizing", "cancelling")


# --------------------------------------------------------------------------------------------------------------------
# What it answers: words of the title, pixels of the picture

TYPES = (
    "chaise longue", "armchair", "easy chair", "office chair", "dining chair", "rocking chair", "chair", "sofa bed",
    "loveseat", "sectional", "sofa", "coffee table", "side table", "dining table", "console table", "table lamp",
    "floor lamp", "work lamp", "pendant lamp", "wall lamp", "lamp", "desk", "table", "bunk bed", "bed", "bookcase",
    "wardrobe", "bar stool", "stool", "bench", "nightstand", "dresser", "chest", "cabinet", "shelf", "sideboard",
    "mirror", "rug", "cushion", "ottoman", "pouf",
)  # fmt: skip
SAME_TYPE = {
    "couch": "sofa", "settee": "sofa", "bookshelf": "bookcase", "bookshelves": "bookcase", "armoire": "wardrobe",
    "closet": "wardrobe", "footstool": "stool", "barstool": "bar stool", "workstation": "desk", "shelving": "shelf",
}  # fmt: skip
KINDS = (*TYPES, *SAME_TYPE)
STYLES = {
    "modern": "modern", "contemporary": "modern", "industrial": "industrial", "rustic": "rustic",
    "farmhouse": "rustic", "scandinavian": "scandinavian", "nordic": "scandinavian", "scandi": "scandinavian",
    "mid-century": "mid-century", "mid century": "mid-century", "midcentury": "mid-century", "retro": "mid-century",
    "traditional": "traditional", "classic": "classic", "vintage": "vintage", "minimalist": "minimalist",
    "art deco": "art deco", "bohemian": "bohemian", "boho": "bohemian", "coastal": "coastal", "victorian": "victorian",
    "children's": "children's", "outdoor": "outdoor",
}  # fmt: skip
MATERIALS = {
    "stainless steel": "metal", "steel": "metal", "metal": "metal", "iron": "metal", "chrome": "metal",
    "aluminium": "metal", "aluminum": "metal", "brass": "metal", "nickel": "metal", "copper": "metal",
    "leather": "leather", "faux leather": "leather", "velvet": "velvet", "linen": "fabric", "fabric": "fabric",
    "cotton": "fabric", "upholstered": "fabric", "wool": "fabric", "boucle": "fabric", "rattan": "rattan",
    "wicker": "rattan", "bamboo": "bamboo", "marble": "marble", "glass": "glass", "plastic": "plastic",
    "ceramic": "ceramic", "porcelain": "ceramic", "stoneware": "ceramic", "oak": "oak", "walnut": "walnut",
    "pine": "pine", "birch": "wood", "beech": "wood", "teak": "wood", "ash": "wood", "acacia": "wood",
    "mahogany": "wood", "wooden": "wood", "wood": "wood", "paper": "paper", "concrete": "concrete",
}  # fmt: skip
COLORS = ("black", "white", "grey", "gray", "brown", "beige", "red", "orange", "yellow", "green", "blue", "purple",
          "pink", "turquoise", "multicolour", "cream", "ivory", "navy", "teal", "silver", "gold")  # fmt: skip
PLAIN_COLORS = {name: name for name in COLORS} | {
    "gray": "grey", "cream": "white", "ivory": "white", "navy": "blue", "teal": "green", "silver": "grey",
    "turquoise": "blue",
}  # fmt: skip
BRAND = re.compile(r"^(by\s+)?((?!LED\b|TV\b)[A-Z][A-Z.,&'\u00c0-\u00de]+\s+)+(?=\S)")  # "GRUNDTAL Shelf, White"
NOISE = re.compile(
    r"""\bset\ of\ (\d+|two|three|four|six)\b | \b\d+[-\s]?(pack|pcs|pieces?)\b | \bpack\ of\ \d+\b
    | [$€£]\s?\d[\d.,]* | \d[\d.,]*\s?(usd|eur|gbp|[$€£]) | \b\d+%\s?off\b | \b(now\ )?only\b
    | \bfree\s(shipping|delivery)\b
    | \bships?\ (in|within)\ [\w\ -]*?(hours?|days?|h)\b | \b(fast|next\ day)\ delivery\b
    | \b(sale|new|best\ ?seller|clearance|limited\ offer|hot\ deal|deal|must\ have|top\ rated|in\ stock)\b!*
    | \b(sku|item|art|ref|model|mpn|no)\b[.:#\s]*[a-z0-9-]*\d[a-z0-9-]* | \#\S+
    | \b\d+([.,]\d+)?\s?(x\s?\d+([.,]\d+)?\s?)+(cm|mm|m|in|inch(es)?)?\b
    | \b\d+([.,]\d+)?\s?(cm|mm|in|inch(es)?|l|cl|")(?!\w)
    | \b(?=[a-z]*\d)(?=\d*[a-z])[a-z0-9]+(-[a-z0-9]+)+\b | \b(?=\w*\d)(?=\w*[A-Z])[A-Z0-9]{5,}\b | \b\d{4,}\b""",
    re.VERBOSE | re.IGNORECASE,
)


def find(words: dict[str, str] | tuple[str, ...], text: str) -> str | None:
    """The table's word that stands in the text; of several the last in the text, then the longest (English heads)."""
    text = f" {re.sub(r'[^a-z0-9. -]+', ' ', text.lower())} "
    best = None
    for word in words:
        for match in re.finditer(rf"(?<![\w-]){re.escape(word)}(s|es)?(?![\w-])", text):
            if best is None or (match.end(), len(word)) > best[:2]:
                best = (match.end(), len(word), word)
    return best[2] if best else None


def tidy_title(title: str, color: str = "") -> str:
    """The title without brand, SKU, price, shipping, count and size, and with the color that the picture shows."""
    text = " ".join(NOISE.sub(" ", f" {title} ").split())
    loud = text.isupper()
    text = text.lower() if loud else text
    bare = BRAND.sub("", text)
    words = bare.split()
    while bare == text and len(words) > 1 and (loud or words[0][:1].isupper()) and not known(words[0]):
        if not find(KINDS, " ".join(words[1:])):
            break
        words, bare, text = words[1:], " ".join(words[1:]), " ".join(words[1:])
    text = re.sub(r"\s*[|(\[{][^|)\]}]*[|)\]}]?\s*$", "", bare) or bare
    parts = [part.strip(" -–—.!*|/:;#&+()[]") for part in re.split(r"\s*[,|]\s*|\s+[-–—]\s+", text)]
    parts = [part for part in parts if re.search(r"[A-Za-z]{2}", part)]
    text = " ".join(", ".join(dict.fromkeys(parts)).split()) or title.strip() or "unknown"
    named = [word for word in re.findall(r"[a-z]+", text.lower()) if word in PLAIN_COLORS]
    if color and len(named) == 1 and PLAIN_COLORS[named[0]] != color:
        word = rf"\b((light|dark)\s)?{named[0]}\b"
        text = re.sub(word, lambda m: color.title() if m[0][0].isupper() else color, text, flags=re.IGNORECASE)
    return text


def known(word: str) -> bool:
    """Whether a word describes furniture, rather than being a name."""
    return find((*COLORS, *STYLES, *MATERIALS, *KINDS), word) is not None


def kind_of(title: str) -> str:
    """The object type: the noun that the phrase before the first comma ends with, or one of TYPES from anywhere."""
    phrase = re.split(r"\s(?:with|for|and|of|in|on)\s", tidy_title(title).split(",")[0].lower())[0].strip()
    kind = find(KINDS, phrase)
    if not kind or (BRAND.match(title) and not title.isupper() and not re.search(rf"{kind}(s|es)?$", phrase)):
        words = [w for w in re.findall(r"[a-z][a-z'/-]+", phrase) if w not in COLORS and w not in STYLES]
        kind = " ".join(words[-2:]) or find(KINDS, title) or "unknown"
    return SAME_TYPE.get(kind, kind)


def name_colors(rgb):
    """uint8 [N, 3] -> index into CHART of each pixel, by hue, saturation and value."""
    import numpy as np

    rgb = rgb.astype(np.float32) / 255
    high, low = rgb.max(1), rgb.min(1)
    chroma = high - low
    saturation = chroma / np.maximum(high, 1e-6)
    r, g, b = rgb.T
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(high == r, (g - b) / safe % 6, np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4)) * 60
    names = np.select(
        [
            (high < 0.2) | ((high < 0.3) & (saturation < 0.25)),
            (saturation < 0.14) & (high > 0.66),
            (saturation < 0.16) | (chroma < 0.06),
            (hue < 50) & (hue >= 15) & (high > 0.45) & (saturation < 0.42),
            (hue < 48) & ((high < 0.5) | (saturation < 0.66)) & (hue >= 12),
            (hue < 12) | (hue >= 345),
            hue < 42,
            hue < 68,
            hue < 170,
            hue < 255,
            hue < 295,
        ],
        [0, 1, 2, 4, 3, 5, 6, 7, 8, 9, 10],
        11,
    )
    return np.where((names == 5) & (high > 0.75) & (saturation < 0.45), 11, names)


CHART = ("black", "white", "grey", "brown", "beige", "red", "orange", "yellow", "green", "blue", "purple", "pink")


def picture_colors(data: bytes):
    """float [12], share of each color of CHART in the thing that is shown; ValueError if unreadable.

    The background of a line of pixels is what stands at its two ends; pixels near the middle count more, and what is
    like the background counts a little where it is enclosed by the thing.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (128, 128))
            pixels = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BOX))
    except Exception as error:
        raise ValueError("unreadable image") from error
    background = np.median(np.concatenate([pixels[:, :3], pixels[:, -3:]], axis=1), axis=1)
    thing = np.abs(pixels - background[:, None]).max(2) > 30
    inside = np.ones_like(thing)
    for axis in (0, 1):
        after = np.maximum.accumulate(thing, axis)
        before = np.flip(np.maximum.accumulate(np.flip(thing, axis), axis), axis)
        inside &= after & before
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    weight = np.exp(-1.5 * (x**2 + y**2)) * (thing + 0.25 * (inside & ~thing))
    if weight.sum() < 10:  # nothing stands out: the thing has the background's color
        weight = np.exp(-3 * (x**2 + y**2))
    votes = np.bincount(name_colors(pixels.reshape(-1, 3)), weights=weight.ravel(), minlength=len(CHART))
    return votes / votes.sum()


def picture_color(data: bytes, title: str) -> str:
    """The color of the thing: the title's where the picture has a fair share of it, else the picture's strongest."""
    shares = picture_colors(data)
    named = find(PLAIN_COLORS, title)
    if named and PLAIN_COLORS[named] in CHART and shares[CHART.index(PLAIN_COLORS[named])] > 0.15:
        return PLAIN_COLORS[named]
    return CHART[int(shares.argmax())]


def answer(title: str, picture: bytes | None) -> dict[str, str]:
    """The fields that this server knows of, for one product."""
    material, style = find(MATERIALS, title), find(STYLES, title)
    color = picture_color(picture, title) if picture else (find(COLORS, title) or "unknown")
    return {
        "clean_title": tidy_title(title, color),
        "style": STYLES[style] if style else "unknown",
        "material": MATERIALS[material] if material else "unknown",
        "color": color,
        "object_type": kind_of(title),
    }


def read_request(body: dict) -> tuple[str, bytes | None]:
    """Title and picture of a chat completion request; ValueError where there is none."""
    title, picture = "", None
    for message in body["messages"]:
        content = message["content"]
        for part in content if isinstance(content, list) else []:
            if part["type"] == "text":
                title = part["text"].partition("Title:")[2].strip()
            elif part["type"] == "image_url":
                picture = base64.b64decode(part["image_url"]["url"].partition("base64,")[2], validate=True)
    return title, picture


def tokens_of(line: bytes | str) -> int:
    """Prompt tokens of a request, as this server counts them."""
    return 600 + len(line) // 400


# --------------------------------------------------------------------------------------------------------------------
# The server


class HttpError(Exception):
    """An error answer."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


class Dropped(Exception):
    """The connection is closed without an answer."""


class StandIn:
    """The service: state in a folder, faults by name, `with StandIn(folder) as server: server.url`.

    `steps` is the number of polls a batch takes to complete.
    """

    def __init__(self, state: str | Path, faults: tuple[str, ...] | list[str] = (), steps: int = 1):
        self.folder, self.steps = Path(state), steps
        (self.folder / "files").mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.db = sqlite3.connect(self.folder / "ledger.sqlite", check_same_thread=False, isolation_level=None)
        self.db.executescript(
            """PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;
            CREATE TABLE IF NOT EXISTS objects (id TEXT PRIMARY KEY, kind TEXT, number INTEGER, value TEXT);
            CREATE TABLE IF NOT EXISTS ledger
                (number INTEGER PRIMARY KEY, event TEXT, batch TEXT, key TEXT, value TEXT);
            CREATE INDEX IF NOT EXISTS by_event ON ledger (event, key);"""
        )
        self.faults: dict[str, list[str]] = {}
        for fault in faults:
            self.set_fault(fault)
        self.calls: list[str] = []  # "METHOD path" of everything asked, for tests
        self.models_of_account = dict(MODELS)  # name -> shutdown_date
        self.clock, self.polls = time.time, 0
        self.watch: Callable[[str, str], None] | None = None  # called when a call is done but not answered yet
        self.server: ThreadingHTTPServer | None = None

    def set_fault(self, text: str) -> None:
        name, *arguments = text.split(":")
        if name.split("@")[0] not in {*FAULTS, *ANSWER_FAULTS}:
            raise SystemExit(f"unknown fault {name}; there are {', '.join([*FAULTS, *ANSWER_FAULTS])}")
        self.faults[name] = arguments

    def spend(self, name: str, position: int = 0, default: int = 1) -> bool:
        """Whether a fault that happens so many times happens now; without a number it does every time."""
        with self.lock:
            arguments = self.faults.get(name)
            if arguments is None:
                return False
            if len(arguments) <= position:
                return True
            left = int(arguments[position] or default)
            if left > 0:
                arguments[position] = str(left - 1)
            return left > 0

    # -- storage
    def put(self, kind: str, value: dict) -> dict:
        with self.lock:
            number = self.db.execute("SELECT COALESCE(MAX(number), 0) + 1 FROM objects").fetchone()[0]
            self.db.execute(
                "INSERT INTO objects VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET value = excluded.value",
                (value["id"], kind, number, json.dumps(value)),
            )
        return value

    def get(self, kind: str, id: str) -> dict:
        row = self.db.execute("SELECT value FROM objects WHERE kind = ? AND id = ?", (kind, id)).fetchone()
        if row is None:
            raise HttpError(404, f"No such {kind}: {id}", "not_found")
        return json.loads(row[0])

    def all(self, kind: str) -> list[dict]:
        """Newest first, as the API lists."""
        rows = self.db.execute("SELECT value FROM objects WHERE kind = ? ORDER BY number DESC", (kind,)).fetchall()
        return [json.loads(row[0]) for row in rows]

    def note(self, event: str, batch: str, rows: list[tuple[str, str]]) -> None:
        with self.lock:
            self.db.execute("BEGIN")
            self.db.executemany(
                "INSERT INTO ledger (event, batch, key, value) VALUES (?, ?, ?, ?)",
                [(event, batch, key, value) for key, value in rows],
            )
            self.db.execute("COMMIT")

    def ledger(self, event: str) -> list[tuple[str, str, str]]:
        """(batch, key, value) of every event: upload, batch, paid."""
        return self.db.execute(
            "SELECT batch, key, value FROM ledger WHERE event = ? ORDER BY number", (event,)
        ).fetchall()

    def new_id(self, prefix: str) -> str:
        return prefix + os.urandom(12).hex()

    # -- endpoints
    def handle(self, method: str, path: str, query: dict, headers: Any, body: bytes) -> tuple[int, Any]:
        """(status, JSON value or bytes) for one call."""
        self.calls.append(f"{method} {path}")
        key = headers.get("Authorization", "")
        echo = f" [{key} {body[:4000]!r}]" if "echo" in self.faults else ""
        if "unauthorized" in self.faults or not key.startswith("Bearer ") or len(key) < 9:
            raise HttpError(401, "Incorrect API key provided" + echo, "invalid_api_key")
        if "forbidden" in self.faults:
            raise HttpError(403, "Country, region, or territory not supported" + echo, "unsupported_country_region")
        if self.spend("rate_limit"):
            seconds = [*self.faults["rate_limit"], "1"][1]
            raise HttpError(429, "Rate limit reached" + echo, "rate_limit_exceeded", {"Retry-After": seconds})
        if self.spend("server_error"):
            raise HttpError(500, "The server had an error" + echo, "server_error")
        if self.spend("quota_everywhere"):
            raise HttpError(429, "You exceeded your current quota" + echo, "insufficient_quota")
        if self.spend("web_page"):
            return 200, b"<html>Back soon</html>"
        parts = path.strip("/").split("/")[1:] if path.startswith("/v1/") else [""]
        if parts[0] in self.faults.get("no_route", ()):
            raise HttpError(404, f"Invalid URL ({method} {path})")
        match (method, parts):
            case ("GET", ["models", *rest]):
                return 200, self.models(rest)
            case ("POST", ["files"]):
                return 200, self.upload(headers, body)
            case ("GET", ["files"]):
                return 200, self.page("file", query)
            case ("GET", ["files", id]):
                return 200, self.get("file", id)
            case ("GET", ["files", id, "content"]):
                return 200, self.content(id)
            case ("DELETE", ["files", id]):
                self.get("file", id)
                self.db.execute("DELETE FROM objects WHERE id = ?", (id,))
                return 200, {"id": id, "object": "file", "deleted": True}
            case ("POST", ["batches"]):
                return 200, self.create(json.loads(body))
            case ("GET", ["batches"]):
                return 200, self.page("batch", query)
            case ("GET", ["batches", id]):
                return 200, self.poll(id)
            case ("POST", ["batches", id, "cancel"]):
                return 200, self.cancel(id)
            case ("POST", ["chat", "completions"]):
                return self.chat(body)
        raise HttpError(404, f"Invalid URL ({method} {path})")

    def models(self, rest: list[str]) -> dict:
        def model(id: str) -> dict:
            date = self.shutdown(id)
            return {"id": id, "object": "model", "created": 1754000000, "owned_by": "stand-in", "shutdown_date": date}

        if not rest:
            return {"object": "list", "data": [model(id) for id in self.models_of_account if self.has_model(id)]}
        if not self.has_model(rest[0]):
            raise HttpError(
                404, f"The model '{rest[0]}' does not exist or you do not have access to it.", "model_not_found"
            )
        return model(rest[0])

    def shutdown(self, model: str) -> str | None:
        date, *named = self.faults.get("shutdown", [None])
        return date if date and (not named or model in named) else self.models_of_account[model]

    def has_model(self, model: str) -> bool:
        gone, *polls = self.faults.get("gone", [""])
        left = gone == model and self.polls >= int(polls[0] if polls else 0)
        unlisted = left or "no_model" in self.faults or model in self.faults.get("unlisted", ())
        return model in self.models_of_account and not unlisted

    def upload(self, headers: Any, body: bytes) -> dict:
        boundary = b"--" + headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
        fields = {}
        for part in body.split(boundary)[1:-1]:
            head, _, data = part.partition(b"\r\n\r\n")
            name = re.search(rb'name="([^"]*)"', head)[1].decode()
            filename = re.search(rb'filename="([^"]*)"', head)
            fields[name] = (filename and filename[1].decode(), data.removesuffix(b"\r\n"))
        if self.spend("upload_fails"):
            raise HttpError(500, "The server had an error", "server_error")
        name, data = fields["file"]
        if fields["purpose"][1] != b"batch" or not name.endswith(".jsonl"):
            raise HttpError(400, "Invalid file format for Batch API. Must be .jsonl", "invalid_file_format")
        if len(data) > int(self.faults.get("upload_limit", [200 * 1024 * 1024])[0]):
            raise HttpError(413, "File too large", "file_too_large")
        made = self.store(name, "batch", data)
        self.note("upload", "", [(made["id"], hashlib.sha256(data).hexdigest())])
        if self.spend("upload_lost"):
            raise Dropped
        return made

    def store(self, name: str, purpose: str, data: bytes) -> dict:
        now = int(self.clock())
        value = {
            "id": self.new_id("file-"), "object": "file", "bytes": len(data), "created_at": now,
            "expires_at": now + 30 * 86400, "filename": name, "purpose": purpose, "status": "processed",
        }  # fmt: skip
        (self.folder / "files" / value["id"]).write_bytes(data)
        return self.put("file", value)

    def content(self, id: str) -> bytes:
        if self.get("file", id)["purpose"] == "batch_output":
            if self.spend("output_late"):
                raise HttpError(404, f"No such File object: {id}", "not_found")
            if self.spend("download_cut"):
                raise Dropped(id)
        return (self.folder / "files" / id).read_bytes()

    def page(self, kind: str, query: dict) -> dict:
        items = [self.public(value) for value in self.all(kind) if kind == "file" or not self.hidden(value)]
        ids = [value["id"] for value in items]
        start = ids.index(query["after"]) + 1 if query.get("after") in ids else 0
        limit = int(query.get("limit", 20))
        data = items[start : start + limit]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": "", "last_id": ""}
        return {"object": "list", "data": data, "has_more": len(items) > start + limit} | ends

    def hidden(self, batch: dict) -> bool:
        """Whether the list does not show this batch yet, or no more."""
        if batch["_unlisted"] > 0:
            batch["_unlisted"] -= 1
            self.put("batch", batch)
            return True
        return batch["_vanished"]

    def public(self, value: dict) -> dict:
        nulls = "null_ids" in self.faults
        return {name: item for name, item in value.items() if not name.startswith("_") and (nulls or item is not None)}

    # -- batches
    def create(self, body: dict) -> dict:
        if self.spend("quota"):
            raise HttpError(429, "You exceeded your current quota, please check your plan", "insufficient_quota")
        if body.get("completion_window") != "24h" or body.get("endpoint") != "/v1/chat/completions":
            raise HttpError(400, "Invalid completion_window or endpoint", "invalid_request")
        metadata = body.get("metadata") or {}
        if len(metadata) > 16 or any(len(k) > 64 or len(v) > 512 for k, v in metadata.items()):
            raise HttpError(400, "Invalid metadata", "invalid_metadata")
        self.get("file", body["input_file_id"])
        now = int(self.clock())
        with self.lock:
            unlisted = int(self.faults["list_late"][0]) if "list_late" in self.faults else 0
            batch = {
                "id": self.new_id("batch_"), "object": "batch", "endpoint": body["endpoint"], "status": "validating",
                "input_file_id": body["input_file_id"], "completion_window": "24h", "created_at": now,
                "expires_at": now + 86400, "request_counts": {"total": 0, "completed": 0, "failed": 0},
                "output_file_id": None, "error_file_id": None, "errors": None, "metadata": metadata,
                "_steps": self.steps, "_tokens": 0, "_unlisted": unlisted, "_vanished": self.spend("vanish"),
            }  # fmt: skip
            self.put("batch", batch)
            self.note("batch", batch["id"], [(metadata.get("file", ""), metadata.get("intent", ""))])
        if self.spend("create_lost"):
            raise Dropped
        if self.spend("create_500"):
            raise HttpError(500, "The server had an error", "server_error")
        return self.public(batch)

    def cancel(self, id: str) -> dict:
        with self.lock:
            batch = self.get("batch", id)
            if batch["status"] in ("validating", "in_progress", "finalizing"):
                batch |= {"status": "cancelling", "cancelling_at": int(self.clock()), "_steps": 1}
                self.put("batch", batch)
        return self.public(batch)

    def poll(self, id: str) -> dict:
        """The batch, one step further."""
        with self.lock:
            self.polls += 1
            batch = self.get("batch", id)
            if batch["_vanished"]:
                raise HttpError(404, f"No batch found with id '{id}'.", "not_found")
            if batch["status"] in LIVE:
                self.step(batch)
                self.put("batch", batch)
            if batch.get("_hide_output", 0) > 0:
                batch["_hide_output"] -= 1
                self.put("batch", batch)
                batch = batch | {"output_file_id": "" if "empty_ids" in self.faults else None}
        return self.public(batch)

    def step(self, batch: dict) -> None:
        now = int(self.clock())
        if batch["status"] == "validating":
            lines = (self.folder / "files" / batch["input_file_id"]).read_bytes().splitlines()
            if self.refuse(batch, lines):
                batch["failed_at"] = now
                return
            batch["request_counts"]["total"] = len(lines)
            batch |= {"in_progress_at": now, "status": "in_progress"}
        batch["_steps"] -= 1
        if batch["_steps"] <= 0:
            share, end = 1.0, "completed"
            if batch["status"] == "cancelling":
                share, end = 0.5, "cancelled"
            elif self.spend("expire", 1):
                share, end = float(self.faults["expire"][0]), "expired"
            self.finish(batch, share, end)
            batch |= {"status": end, f"{end}_at": now}
        elif batch["_steps"] == 1 and "skip_statuses" not in self.faults:
            batch |= {"status": "finalizing", "finalizing_at": now}

    def refuse(self, batch: dict, lines: list[bytes]) -> bool:
        """Fail the batch at validation where it is due: (code, message, line) in errors.data."""
        tokens = sum(map(tokens_of, lines))
        taken = sum(other["_tokens"] for other in self.all("batch") if other["status"] in LIVE)
        errors: list[tuple[str, str, int | None]] = []
        if "token_limit" in self.faults and taken + tokens > (limit := int(self.faults["token_limit"][0])):
            message = "Enqueued token limit reached for gpt-5-nano in organization org-x."
            if "unstated" not in self.faults["token_limit"]:
                message += f" Limit: {limit:,} enqueued tokens."
            errors.append(("token_limit_exceeded", message, None))
        elif self.faults.get("no_batches_of") == [json.loads(lines[0])["body"]["model"]]:
            errors.append(("model_not_found", "The model does not exist or you do not have access to it.", None))
        elif self.spend("quota_batch"):
            errors.append(("billing_hard_limit_reached", "Billing hard limit has been reached.", None))
        elif self.spend("fail_batch", 1):
            errors.append((self.faults["fail_batch"][0], "The batch failed.", None))
        elif len(lines) > 50_000:
            errors.append(("too_many_requests", "The batch has more than 50,000 requests.", None))
        else:
            for number, line in enumerate(lines, 1):
                try:
                    request = json.loads(line)
                    bad = self.fault_for(request["body"], request["custom_id"], spend=False) == "bad_line"
                except (ValueError, KeyError, TypeError):
                    bad = True
                if bad:
                    errors.append(("invalid_json_line", "This line is not a valid request.", number))
        if errors:
            data = [{"code": c, "message": m, "line": n, "param": None} for c, m, n in errors[:10]]
            batch |= {"status": "failed", "errors": {"object": "list", "data": data}}
        batch["_tokens"] = 0 if errors else tokens
        return bool(errors)

    def finish(self, batch: dict, share: float, end: str) -> None:
        """Answer the lines and write output and error file."""
        lines = (self.folder / "files" / batch["input_file_id"]).read_bytes().splitlines()
        done = round(len(lines) * share)
        output, errors, paid = [], [], []
        quota = self.spend("quota_lines")
        for number, line in enumerate(lines):
            request, fault = json.loads(line), None
            id, body = request["custom_id"], request["body"]
            result = {"id": self.new_id("batch_req_"), "custom_id": id, "response": None, "error": None}
            if number >= done:
                error = {"code": f"batch_{end}", "message": f"This request could not be executed: the batch {end}."}
                errors.append(json.dumps(result | {"error": error}))
                continue
            if quota and number % 2:
                status, answered = 429, error_body("You exceeded your current quota", "insufficient_quota")
            elif self.faults.get("no_batches_of") == [body["model"], "lines"]:
                status, answered = 404, error_body("The model does not exist.", "model_not_found")
            else:
                status, answered = self.complete(body, fault := self.fault_for(body, id))
            if answered == "absent":
                paid.append((id, hashlib.sha256(line).hexdigest()))
                continue
            text = json.dumps(result | {"response": {"status_code": status, "request_id": "req", "body": answered}})
            if status == 200:
                paid.append((id, hashlib.sha256(line).hexdigest()))
                output.append(text[: len(text) // 2] if fault == "broken_line" else text)
            else:
                errors.append(text)
        self.note("paid", batch["id"], paid)
        failed = 0 if end == "expired" else len(errors)
        batch["request_counts"] |= {"completed": len(output) + ("miscount" in self.faults), "failed": failed}
        if "duplicate" in self.faults and output:
            output += [*output, json.dumps(json.loads(output[0]) | {"custom_id": "nobody"})]
        if "shuffle" in self.faults:
            random.Random(7).shuffle(output)
        none = "" if "empty_ids" in self.faults else None
        for field, texts in (("output_file_id", output), ("error_file_id", errors)):
            data = "".join(text + "\n" for text in texts).encode()
            data = data.rstrip(b"\n") if "miscount" in self.faults else data
            batch[field] = self.store(f"{batch['id']}_{field}.jsonl", "batch_output", data)["id"] if texts else none
        batch["_hide_output"] = int(self.faults["output_missing"][0]) if self.faults.get("output_missing") else 0

    # -- answers
    def fault_for(self, body: dict, id: str, spend: bool = True) -> str | None:
        """The answer fault that a request's title calls for; with TIMES it goes away after so many tries of an id."""
        named = [name for name in self.faults if "@" in name]
        if not named:
            return None
        title = read_request(body)[0].lower()
        for name in named:
            fault, word = name.split("@")
            if word.lower() not in title:
                continue
            if self.faults[name]:
                tries = self.db.execute(
                    "SELECT COUNT(*) FROM ledger WHERE event = ? AND key = ?", (name, id)
                ).fetchone()[0]
                if tries >= int(self.faults[name][0]):
                    continue
                if spend:
                    self.note(name, "", [(id, "")])
            return fault
        return None

    def complete(self, body: dict, fault: str | None) -> tuple[int, Any]:
        """(HTTP status, body) of one chat completion."""
        if fault == "absent":
            return 200, "absent"
        if fault and fault.startswith("http_"):
            status = int(fault[5:])
            return status, error_body("The request failed.", "invalid_value" if status == 400 else "server_error")
        effort, model = body.get("reasoning_effort"), body["model"]
        if not self.has_model(model) or (self.shutdown(model) or "9") <= time.strftime(
            "%Y-%m-%d", time.gmtime(self.clock())
        ):
            return 404, error_body(f"The model '{model}' does not exist", "model_not_found")
        known = OLD_EFFORTS if re.fullmatch(r"gpt-5(-mini|-nano)?(-\d.*)?", model) else EFFORTS
        accepted = self.faults.get("efforts", known if model.startswith("gpt-") else [effort])
        if effort not in accepted and (effort or "efforts" in self.faults):
            listed = ", ".join(f"'{value}'" for value in accepted)
            said = f"'reasoning_effort' does not support '{effort}' with this model. Supported values are: {listed}."
            return 400, error_body(f"Unsupported value: {said}", "unsupported_value")
        try:
            title, picture = read_request(body)
            schema = body.get("response_format", {}).get("json_schema", {}).get("schema", {})
            fields = dict.fromkeys(schema.get("properties", {}), "unknown") | answer(title, picture)
        except (ValueError, KeyError, TypeError):
            return 400, error_body("You uploaded an unsupported image.", "invalid_image_format")
        content, finish, refusal = json.dumps(fields), "stop", None
        if fault == "length":
            content, finish = content[:20], "length"
        elif fault == "empty":
            content = ""
        elif fault == "refusal":
            content, refusal = None, "I can't help with that."
        elif fault == "content_filter":
            content, finish = None, "content_filter"
        elif fault == "broken_json":
            content = content[:-9]
        elif fault == "missing_field":
            content = json.dumps({name: value for name, value in fields.items() if name != "color"})
        elif fault == "wrong_type":
            content = json.dumps(fields | {"material": ["wood", 3]})
        elif fault == "control":
            content = json.dumps(fields | {"clean_title": "Caf\0e9 chair"})
        elif fault == "fence":
            content = f"Here is the JSON:\n```json\n{json.dumps(fields, indent=1)}\n```\n"
        elif fault == "think":
            content = f'<think>A {{title}}? Or {{"style": "x"}}.</think>\n\n{content}'
        prompt, output = tokens_of(json.dumps(body)), len(content or "") // 4 + 10
        thought = int(self.faults["reasons"][0]) if "reasons" in self.faults and effort not in OFF else 0
        if thought and thought + output > (limit := body.get("max_completion_tokens") or body["max_tokens"]):
            content, finish, thought, output = "", "length", limit, 0
        prompt, output = (int(n * float(self.faults.get("usage", [1])[0])) for n in (prompt, output + thought))
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": refusal}
        if fault == "reasoning":
            message |= {"content": None, "reasoning_content": content}
        elif fault == "parts":
            message["content"] = [{"type": "text", "text": content}]
        choice = {"index": 0, "finish_reason": finish, "logprobs": None, "message": message}
        usage = {
            "prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": thought},
        }  # fmt: skip
        return 200, {
            "id": "chatcmpl-" + hashlib.sha256(json.dumps(body).encode()).hexdigest()[:24], "object": "chat.completion",
            "created": int(self.clock()), "model": model, "usage": usage,
            "choices": [] if fault == "no_choices" else [choice],
        }  # fmt: skip

    def chat(self, data: bytes) -> tuple[int, Any]:
        body = json.loads(data)
        id = hashlib.sha256(data).hexdigest()
        status, answered = self.complete(body, self.fault_for(body, id))
        if answered == "absent":
            raise Dropped
        if status == 200:
            self.note("paid", "sync", [(id, id)])
        return status, answered

    # -- serving
    def __enter__(self) -> StandIn:
        standin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def respond(self) -> None:
                path, _, query = self.path.partition("?")
                pairs = dict(pair.partition("=")[::2] for pair in query.split("&") if pair)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                headers, status = {}, 200
                try:
                    status, value = standin.handle(self.command, path, pairs, self.headers, body)
                except HttpError as error:
                    status, value, headers = error.status, error_body(error.message, error.code), error.headers
                except Dropped as dropped:
                    if dropped.args:  # half of a file
                        data = (standin.folder / "files" / dropped.args[0]).read_bytes()
                        self.send_response(200)
                        self.send_header("Content-Length", str(len(data)))
                        self.end_headers()
                        self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                    return
                if standin.watch:
                    standin.watch(self.command, path)
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if data[:1] == b"<" else "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, item in headers.items():
                    self.send_header(name, item)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = respond

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError, TimeoutError):  # clients die; that is part of the job
                    super().handle()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
        with self.lock:
            self.db.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"


def error_body(message: str, code: str | None) -> dict:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", required=True, help="folder of files, batches and ledger")
    parser.add_argument("--fault", action="append", default=[], help="NAME[:ARGUMENT...]; may be given several times")
    parser.add_argument("--steps", type=int, default=1, help="polls that a batch takes to complete (default 1)")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    args, command = build_parser().parse_args(argv[:split]), argv[split + 1 :]
    with StandIn(args.state, args.fault, args.steps) as server:
        if command:
            environment = os.environ | {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "stand-in"}
            child = subprocess.Popen(command, env=environment)
            for number in (signal.SIGINT, signal.SIGTERM):  # the child hears of it, ends, and its exit code is ours
                signal.signal(number, lambda number, frame: child.send_signal(number))
            code = child.wait()
            return code if code >= 0 else 128 - code
        print(server.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
