"""What the arena's log says: results as data, as text for a terminal, and as the numbers that the page's plots need.

Nothing is kept: every answer is computed anew from the votes, by stats.arena_statistics. Two experiments (other models,
other items, another kind of query) are never counted together.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import common
from arena_log import CHOICES, Log
from common import Fail

EXPORTED = (
    "experiment", "vote", "trial", "judge", "judge_name", "place", "query", "category", "choice", "preferred",
    "left_model", "right_model", "left_items", "right_items", "same_set", "identical", "repeat_of", "reissue_of",
    "drawn", "time", "revoked",
)  # fmt: skip


def statistics_rows(votes: list[dict[str, Any]], models: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The log's votes as stats.arena_statistics takes them; the model that comes first in `models` is a pair's base."""
    names = {model["fingerprint"]: model["name"] for model in models}
    order = [model["fingerprint"] for model in models]
    rows = []
    for vote in votes:
        left, right, facts = vote["left_model"], vote["right_model"], vote["facts"]
        row = {name: vote[name] for name in ("judge", "query", "category", "choice", "time", "trial")}
        row |= {"left": names[left], "right": names[right], "base": names[min(left, right, key=order.index)]}
        row |= {"revoked": bool(vote["revoked"]), "identical": bool(vote["identical"]), "judges": facts["judges"]}
        row["items"] = {names[left]: facts["left_pictures"], names[right]: facts["right_pictures"]}
        row["attributes"] = {names[left]: facts["left_attributes"], names[right]: facts["right_attributes"]}
        rows.append(row)
    return rows


def results(log: Log, experiment: dict[str, Any]) -> dict[str, Any]:
    """Everything about one experiment, recomputed from the log."""
    from stats import arena_statistics

    votes = log.votes(experiment["id"])
    unknown = {str(vote["choice"]) for vote in votes if not vote["identical"]} - set(CHOICES)
    if unknown:
        raise Fail(
            f"{log.path}: unknown choice {', '.join(sorted(unknown))} among the votes; the log was tampered with"
        )
    try:
        computed = arena_statistics(statistics_rows(votes, experiment["facts"]["models"]))
    except ValueError as error:
        raise Fail(f"{log.path}: {error}; the log cannot be counted") from None
    names = {vote["judge"]: vote["judge_name"] for vote in votes}
    for number, row in enumerate(computed["judges"], start=1):
        row["name"] = names[row["judge"]] or f"anonymous {number}"
    facts = {"id": experiment["id"], "key": experiment["key"], "started": experiment["time"]}
    return {"experiment": facts | experiment["facts"]} | computed


def export(log: Log, experiments: Iterable[dict[str, Any]], form: str) -> str:
    """Every vote ever cast, those taken back included, as CSV or JSON; `preferred` is the name of the chosen model."""
    rows = []
    for experiment in experiments:
        names = {model["fingerprint"]: model["name"] for model in experiment["facts"]["models"]}
        for vote in log.votes(experiment["id"]):
            left, right = names[vote["left_model"]], names[vote["right_model"]]
            preferred = {"A": left, "B": right, "T": "tie"}.get(vote["choice"])
            shown = {"left_model": left, "right_model": right, "preferred": preferred}
            shown["same_set"] = int(vote["facts"]["same_set"])
            rows.append({name: (vote | shown)[name] for name in EXPORTED})
    if form == "json":
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    buffer = io.StringIO()
    writer = csv.DictWriter(common.csv_rows(buffer), EXPORTED)
    writer.writeheader()
    for row in rows:
        lists = {name: " ".join(row[name]) for name in ("left_items", "right_items")}
        # A name is a stranger's text; a spreadsheet must not take it for a formula.
        name = row["judge_name"]
        name = f"'{name}" if name.startswith(("=", "+", "-", "@")) else name
        writer.writerow(row | lists | {"judge_name": name})
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------------------
# Text


def percent(value: float | None, digits: int = 1) -> str:
    """0.534 -> 53.4%; a dash for what is not known."""
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def interval(low: float | None, high: float | None, digits: int = 1) -> str:
    return "unknown" if low is None or high is None else f"{percent(low, digits)} to {percent(high, digits)}"


def decimal(value: float | None) -> str:
    """Two digits; a dash for what is not known."""
    return "–" if value is None else f"{value:.2f}"


def p_value(p: float | None) -> str:
    """Two significant digits; never a p of zero."""
    return "–" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def e_value(log10_e: float) -> str:
    """1, 0.26, 11.7, 3.2e+05."""
    return f"{10**log10_e:.3g}" if log10_e < 300 else f"10^{log10_e:.0f}"


def report(found: dict[str, Any]) -> str:
    """The results as text for a terminal."""
    experiment, votes = found["experiment"], found["votes"]
    names = " against ".join(model["name"] for model in experiment["models"])
    lines = [f"Experiment {experiment['id']}: {names}; {experiment['query']} queries, rows of {experiment['top_k']}"]
    left_out = ", ".join(f"{count} {reason}" for reason, count in votes["excluded"].items())
    lines.append(f"  {votes['rows']} rows = {votes['counted']} counted + {left_out}; {votes['judges']} judges")
    for pair in found["pairs"]:
        lines += ["", *_pair_lines(pair)]
    for row in found["ranking"] or []:
        strength = f"{row['strength']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
        lines.append(f"  {row['rank']}. {row['model']}: strength {strength}, {row['votes']} votes")
    return "\n".join(lines) + "\n"


def _pair_lines(pair: dict[str, Any]) -> list[str]:
    counts, rate, net, tests, anytime = (pair[key] for key in ("counts", "win_rate", "net", "planned", "anytime"))
    position, agreement = pair["position"], pair["agreement"]
    now, most = e_value(anytime["log10_e"]), f"{anytime['max_e']:.3g}"
    rows = [
        ("votes", ", ".join(f"{counts[name]} {name}" for name in ("wins", "losses", "ties", "abstained"))),
        ("win rate", f"{percent(rate['value'])} of non-ties (Wilson 95%: {interval(rate['low'], rate['high'])})"),
        ("net preference", f"{percent(net['value'])} (95%: {interval(net['low'], net['high'])}), query by query"),
        ("tie rate", percent(pair["tie_rate"]["value"])),
        ("identical rows", f"{percent(pair['identical']['share'])} of queries, not shown"),
        ("planned end", f"p {p_value(tests['p'])} by query; binomial over votes {p_value(tests['p_binomial'])}"),
        ("looking early", f"E {now} now, {most} at most, p {p_value(anytime['p'])}"),
        ("", f"confidence sequence of the win rate: {interval(anytime['win_low'], anytime['win_high'])}"),
        ("position", f"row A chosen {percent(position['share_a'])}, p {p_value(position['p'])}"),
        ("", f"win rate free of it {percent(position['adjusted'])}, p {p_value(position['adjusted_p'])}"),
        ("agreement", f"alpha {decimal(agreement['alpha'])}, raw {percent(agreement['agreement'])}"),
        ("object types", f"differ with p {p_value(pair['heterogeneity']['p'])}"),
    ]
    held = pair["results"]
    rows.append(("rows share", ", ".join(f"{n} of {held['k']}: {count}" for n, count in held["overlap"].items())))
    differs = ", ".join(f"{rank}: {percent(share, 0)}" for rank, share in enumerate(held["differs"], start=1))
    rows.append(("differ at rank", f"{differs}; {held['same_set']} queries with the same results in another order"))
    for row in pair["attributes"]:
        text = f"{percent(row['won'])} of results agree in rows that won, {percent(row['lost'])} in those that lost"
        rows.append(("  " + row["attribute"], f"{text}, p {p_value(row['p'])}"))
    for row in pair["categories"]:
        if row["p"] is not None:
            text = f"{percent(row['win_rate'])} in {row['votes']} votes, Holm p {p_value(row['p_holm'])}"
            rows.append(("  " + row["category"], text))
    for row in pair["needed"]:
        rows.append((f"to find {percent(row['rate'], 0)}", f"{row['needed']} non-ties, {row['missing']} missing"))
    head = [f"  {pair['challenger']} against {pair['base']}: {pair['verdict']['sentence']}"]
    return head + [f"    {name:16}{text}" for name, text in rows]


# --------------------------------------------------------------------------------------------------------------------
# Plots: coordinates for the SVG of templates/charts.html


def points(xs: Sequence[float], ys: Sequence[float], box: Sequence[float], size: Sequence[float]) -> str:
    """ "x,y x,y ..." of a line; box = (x0, x1, y0, y1) of the data, size = (width, height) of the picture."""
    x0, x1, y0, y1 = box
    places = zip(xs, ys, strict=True)
    scaled = ((size[0] * (x - x0) / ((x1 - x0) or 1), size[1] * (1 - (y - y0) / ((y1 - y0) or 1))) for x, y in places)
    return " ".join(f"{x:.1f},{min(max(y, 0), size[1]):.1f}" for x, y in scaled)


def band(xs: Sequence[float], low: Sequence[float], high: Sequence[float], box, size) -> str:
    """The outline of the area between two lines."""
    return points(xs, low, box, size) + " " + " ".join(reversed(points(xs, high, box, size).split()))


def ticks(top: float, count: int = 6) -> list[int]:
    """Round numbers from 0 to at most `top`."""
    step = max(1, round(top / count))
    magnitude = 10 ** (len(str(step)) - 1)
    step = next(size * magnitude for size in (1, 2, 5, 10) if size * magnitude >= step)
    return list(range(0, int(top) + 1, step))
