"""report.html of stage 4: one file with everything in it, from templates/report.html and templates/report.css.

Works out what the template draws: the bars of the differences, the curves of the runs, and the pictures of the queries
that gained and lost most. Nothing is fetched when the page is opened.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retrieval import HEADLINE, LABELS, METRICS, NEAREST, WAYS

TEMPLATES = Path(__file__).parent / "templates"
THUMBNAIL = 128  # pixels a side
POINTS = 200  # of a curve, at most
CHARTED = (HEADLINE, *(f"{way}_{name}" for way in WAYS for name in ("recall@1", "mrr")))
CHARTED = (*CHARTED, f"agreement@{NEAREST}_object_type", f"agreement@{NEAREST}_all")  # where there are several runs


def write_page(path: Path, facts: dict[str, Any], curves: dict[str, Path], moved: dict[str, Any]) -> None:
    """Write the page. facts: report.json; curves: each run's metrics.jsonl; moved: see `moved_queries`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    import common

    names = [run["name"] for run in facts["runs"]]
    shown = [name for name in METRICS if facts["base"]["metrics"][name] is not None]
    charted = shown if len(names) == 1 else [name for name in CHARTED if name in shown]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html").render(
        facts=facts,
        labels=LABELS,
        shown=shown,
        bars=bars([(LABELS[name], [run["metrics"][name] for run in facts["runs"]]) for name in charted]),
        curves=[curve(name, *read_curve(source)) for name, source in curves.items() if source.is_file()],
        moved=moved,
        agreements=[name for name in shown if name.startswith("agreement")],
        headline=HEADLINE,
        nearest=NEAREST,
    )
    common.write_whole(path, page)


# --------------------------------------------------------------------------------------------------------------------
# Charts: where everything goes


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers over an interval, 0 among them where it holds 0."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-9) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) + 0.0 for i in range(first, last + 1)]


def bars(rows: list[tuple[str, list[dict]]]) -> dict[str, Any]:
    """Differences to zero-shot as bars with their intervals, in percent of the width; a bar a run for each metric."""
    facts = [fact for _, runs in rows for fact in runs if "difference" in fact]
    ends = [0.0, *(v for f in facts for v in (f["difference"], f["low"], f["high"]) if v is not None)]
    marks = ticks(min(ends), max(ends)) if max(ends) > min(ends) else [-0.1, 0.0, 0.1]

    def x(value: float) -> float:
        return round(100 * (value - marks[0]) / (marks[-1] - marks[0]), 2)

    def span(start: float, end: float) -> dict[str, float]:
        return {"left": x(min(start, end)), "width": round(x(max(start, end)) - x(min(start, end)), 2)}

    groups = []
    for label, runs in rows:
        drawn = [
            {"run": number, "fact": fact, "bar": span(0.0, fact["difference"])}
            | {"interval": None if fact["low"] is None else span(fact["low"], fact["high"])}
            for number, fact in enumerate(runs)
            if "difference" in fact
        ]
        groups.append({"label": label, "bars": drawn})
    return {"groups": groups, "ticks": [(x(mark), f"{mark:+g}" if mark else "0") for mark in marks]}


def read_curve(path: Path) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(step, loss) of training, and of validation, from metrics.jsonl; a torn last line is left out."""
    found: dict[str, list[tuple[float, float]]] = {"step": [], "validation": []}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            point = (float(line["step"]), float(line["loss"]))
            if all(map(math.isfinite, point)):
                found[line["kind"]].append(point)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
    steps = found["step"]
    return steps[:: max(1, math.ceil(len(steps) / POINTS))], found["validation"]


def curve(name: str, training: list, validation: list, width: int = 300, height: int = 150) -> dict[str, Any]:
    """Polylines of one run's losses, in pixels."""
    points = training + validation
    last = max((step for step, _ in points), default=1) or 1
    marks = ticks(0.0, max((loss for _, loss in points), default=1.0) or 1.0, 3)
    left, top = 40, 8

    def place(step: float, loss: float) -> tuple[float, float]:
        return round(left + step / last * width, 1), round(top + (1 - loss / marks[-1]) * height, 1)

    return {
        "name": name, "training": [place(*point) for point in training], "last": round(last),
        "validation": [place(*point) for point in validation],
        "ticks": [(place(0, mark)[1], f"{mark:g}") for mark in marks],
        "width": left + width + 12, "height": top + height + 34, "left": left, "right": left + width,
        "bottom": top + height,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def thumbnail(data: bytes) -> str:
    """A small JPEG as a data: address; "" for a picture that cannot be read."""
    from imaging import BadImage, load_image

    try:
        image = load_image(data)
    except BadImage:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def moved_queries(
    chosen: Sequence[dict], results: dict[int, tuple], items, picture: Callable[[int], str], titles: list[str]
) -> list[dict]:
    """What the page shows of some queries: their picture, and the first results of both models.

    results: item -> (zero-shot's items, the run's items), best first; items: retrieval.Judged;
    picture: item -> the address of its picture.
    """
    shown = []
    for entry in chosen:
        i = entry["item"]
        right = items.right(slice(i, i + 1))[0]
        rows = [
            [{"picture": picture(j), "title": titles[j], "right": bool(right[j])} for j in found if j >= 0]
            for found in results[i]
        ]
        shown.append(entry | {"picture": picture(i), "zero_shot": rows[0], "run": rows[1]})
    return shown
