"""The judging half of stage 4: how well vectors find products, and whether one model finds them better than another.

Definitions, for the N items of one split. All scores are dot products of L2-normalised vectors, added up in float64 and
rounded to float32, so that equal vectors tie.
- text -> image: the prompt of item i searches all N pictures; image -> text the reverse. Item j is a right answer to i
  where they share prompt or duplicate group: people could not tell such answers apart, so each of them is right.
- The m-th best right answer of a query has rank m + (wrong answers that score at least as high): ties count against the
  model. recall@k is 1 where the best right answer has rank <= k; reciprocal rank is 1 / that rank; average precision is
  the mean over right answers of m / rank. MRR and MAP are the means of these over queries.
- image -> image agreement@4: the share of the 4 nearest pictures that have the query's attribute; the query and its
  duplicate group are no results. Where a tie straddles the 4th place, its expectation over all orders of the tie. Only
  queries whose attribute is known are judged. "all": results that agree in every attribute known of the query.
- mrr, the headline: the mean of both reciprocal ranks of an item.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

import common
from stats import ALPHA, holm, paired_bootstrap

BLOCK = 256  # queries judged at once, at most
SCORES = 1 << 23  # and scores: they take 32 MB, whatever N
NEAREST = 4  # results of a picture that are judged, as many as the arena shows
CUTS = (1, 5, 10)
WAYS = ("text_to_image", "image_to_text")
HEADLINE = "mrr"
METRICS = (
    *(f"{way}_{name}" for way in WAYS for name in (*(f"recall@{k}" for k in CUTS), "mrr", "map")),
    *(f"agreement@{NEAREST}_{name}" for name in ("object_type", "style", "material", "color", "all")),
    HEADLINE,
)
LABELS = {
    **{f"{way}_recall@{k}": f"{way.replace('_to_', ' → ')}  recall@{k}" for way in WAYS for k in CUTS},
    **{f"{way}_{name}": f"{way.replace('_to_', ' → ')}  {name.upper()}" for way in WAYS for name in ("mrr", "map")},
    **{name: f"image → image  {name.replace('_', ' ', 1).replace('_', ' ')}" for name in METRICS if "@4_" in name},
    HEADLINE: "both ways  MRR",
}

# --------------------------------------------------------------------------------------------------------------------
# The items that are judged


@dataclasses.dataclass
class Judged:
    """What is known of N items: integers that are equal where the thing is the same, -1 for an unknown attribute."""

    prompt: np.ndarray  # int64 [N]
    group: np.ndarray  # int64 [N]
    attributes: dict[str, np.ndarray]  # object_type, style, material, color: int64 [N]

    @classmethod
    def of(cls, columns: dict[str, Sequence[str]]) -> Judged:
        """From columns `prompt`, `group` and the attributes, as text."""
        attributes = {name: numbered(columns[name], unknown="") for name in common.ATTRIBUTES}
        return cls(numbered(columns["prompt"]), numbered(columns["group"]), attributes)

    def __len__(self) -> int:
        return len(self.prompt)

    def right(self, rows: slice) -> np.ndarray:
        """bool [rows, N]: which items are right answers."""
        return (self.prompt[rows, None] == self.prompt) | (self.group[rows, None] == self.group)

    def clusters(self) -> np.ndarray:
        """int64 [N]: items that share right answers, directly or through others, are one draw of the bootstrap."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        ones, items = np.ones(2 * len(self), np.int8), np.tile(np.arange(len(self)), 2)
        labels = np.concatenate([self.prompt, self.group + self.prompt.max(initial=0) + 1]) + len(self)
        size = int(labels.max(initial=0)) + 1
        return connected_components(coo_matrix((ones, (items, labels)), (size, size)), directed=False)[1][: len(self)]


def numbered(values: Sequence[str], unknown: str | None = None) -> np.ndarray:
    """int64 [N]: equal numbers for equal texts, -1 for the unknown one."""
    numbers: dict[str, int] = {}
    return np.array([-1 if v == unknown else numbers.setdefault(v, len(numbers)) for v in values], dtype=np.int64)


# --------------------------------------------------------------------------------------------------------------------
# Scores of each query


# Vectors are float32 [N, D]: an array, or what gives one when it is sliced (vectors.Vectors), so that N is not held.


def blocks(count: int) -> Iterator[slice]:
    """The queries 0 to `count` in pieces that are judged at once."""
    step = max(1, min(BLOCK, SCORES // max(count, 1)))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def products(queries: np.ndarray, gallery) -> np.ndarray:
    """float32 [q, N]: dot products in float64, rounded once; the gallery is widened a block at a time."""
    scores = np.empty((len(queries), len(gallery)), np.float32)
    wide = queries.astype(np.float64)
    for start in range(0, len(gallery), SEARCH_VECTORS):
        part = slice(start, start + SEARCH_VECTORS)
        scores[:, part] = wide @ gallery[part].astype(np.float64).T
    return scores


def retrieval_scores(queries, gallery, items: Judged) -> dict[str, np.ndarray]:
    """{recall@k, mrr, map, rank: float64 [N]} of each query; queries[i] and gallery[i] are item i."""
    rank, precision = np.empty(len(items)), np.empty(len(items))
    for rows in blocks(len(items)):
        for i, scores, right in zip(
            range(rows.start, rows.stop), products(queries[rows], gallery), items.right(rows), strict=True
        ):
            good, wrong = np.sort(scores[right])[::-1], np.sort(scores[~right])
            m = np.arange(1, len(good) + 1)
            ranks = m + len(wrong) - np.searchsorted(wrong, good)
            rank[i], precision[i] = ranks[0], (m / ranks).mean()
    return {f"recall@{k}": (rank <= k).astype(float) for k in CUTS} | {"mrr": 1 / rank, "map": precision, "rank": rank}


def agreement_scores(images, items: Judged, k: int = NEAREST) -> dict[str, np.ndarray]:
    """{object_type, style, material, color, all: float64 [N]}; NaN where a query cannot be judged."""
    found = {name: np.full(len(items), np.nan) for name in (*items.attributes, "all")}
    for rows in blocks(len(items)):
        scores = products(images[rows], images)
        scores[items.group[rows, None] == items.group] = -np.inf
        for row, of_row in zip(range(rows.start, rows.stop), scores, strict=True):
            weights, near = _nearest(of_row, k)
            if not len(near):
                continue
            every = np.ones(len(near), bool)
            known = False
            for name, values in items.attributes.items():
                if values[row] >= 0:
                    same = values[near] == values[row]
                    found[name][row] = weights @ same
                    every &= same
                    known = True
            if known:
                found["all"][row] = weights @ every
    return found


def _nearest(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (sum 1) and indices of the k best: those tied at the last place share what is left of it."""
    k = min(k, int((scores > -np.inf).sum()))
    if not k:
        return np.empty(0), np.empty(0, np.int64)
    last = np.partition(scores, len(scores) - k)[len(scores) - k]
    above, tied = np.flatnonzero(scores > last), np.flatnonzero(scores == last)
    weights = np.concatenate([np.ones(len(above)), np.full(len(tied), (k - len(above)) / len(tied))]) / k
    return weights, np.concatenate([above, tied])


def judge(images, texts, items: Judged) -> dict[str, np.ndarray]:
    """{metric: float64 [N]} for every metric of METRICS, and the ranks; images, texts: float32 [N, D], normalised."""
    scores: dict[str, np.ndarray] = {}
    for way, queries, gallery in ((WAYS[0], texts, images), (WAYS[1], images, texts)):
        scores |= {f"{way}_{name}": values for name, values in retrieval_scores(queries, gallery, items).items()}
    scores |= {f"agreement@{NEAREST}_{name}": values for name, values in agreement_scores(images, items).items()}
    scores[HEADLINE] = (scores["text_to_image_mrr"] + scores["image_to_text_mrr"]) / 2
    return scores


# --------------------------------------------------------------------------------------------------------------------
# One model against another


def mean(values: np.ndarray) -> float | None:
    """Mean over the queries that could be judged."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def compare(base: dict, others: list[dict], clusters: np.ndarray, draws: int, seed: int) -> list[dict[str, dict]]:
    """For each other model, {metric: value, difference to base, 95% interval, p, Holm's p}.

    The interval and p are those of stats.paired_bootstrap over clusters; Holm's correction is over every difference
    that the report shows, all models and metrics together.
    """
    compared = []
    for scores in others:
        metrics: dict[str, dict] = {}
        for name in METRICS:
            judged = np.isfinite(base[name]) & np.isfinite(scores[name])
            facts: dict[str, Any] = {"value": mean(scores[name]), "queries": int(judged.sum())}
            if judged.any():
                found = paired_bootstrap(base[name][judged], scores[name][judged], draws, seed, clusters[judged])
                facts |= {"difference": found.mean, "low": found.low, "high": found.high, "p": found.p}
                if found.low == found.high == 0:  # no query differs: 0 wide would be too sure of those not asked
                    facts |= {"low": None, "high": None}
            metrics[name] = facts
        compared.append(metrics)
    tested = [facts for metrics in compared for facts in metrics.values() if "p" in facts]
    for facts, p in zip(tested, holm([facts["p"] for facts in tested]), strict=True):
        facts["p_holm"] = p
    return compared


def by_type(scores: dict[str, np.ndarray], types: Sequence[str]) -> dict[str, dict]:
    """{object type: {items, metric: mean}}, the most frequent type first."""
    types = np.asarray([kind or "unknown" for kind in types], dtype=object)
    names, counts = np.unique(types, return_counts=True)
    order = sorted(range(len(names)), key=lambda i: (-counts[i], names[i]))
    return {
        names[i]: {"items": int(counts[i])} | {name: mean(scores[name][types == names[i]]) for name in METRICS}
        for i in order
    }


def verdict(name: str, facts: dict) -> str:
    """In words: is this run better than the base, corrected for every difference that was tested?"""
    if "p" not in facts:
        return f"{name}: nothing could be judged"
    change = f"MRR {facts['value']:.3f}, {facts['difference']:+.3f} against zero-shot"
    if facts["difference"] == 0 and facts["low"] is None:
        return f"{name}: no query differs from zero-shot, MRR {facts['value']:.3f}"
    if facts["low"] is None:
        return f"{name}: {change}; too few independent queries for an interval"
    interval = f"{change}, 95% interval [{facts['low']:+.3f}, {facts['high']:+.3f}]"
    p = f"p = {facts['p_holm']:.4f} after Holm's correction"
    way = "better" if facts["difference"] > 0 else "WORSE"
    if facts["p_holm"] <= ALPHA:
        return f"{name} is {way} than zero-shot: {interval}, {p}"
    if facts["p"] <= ALPHA:
        return f"{name} looks {way.lower()}, but that is not certain: {interval}, {p}"
    return f"{name}: no difference to zero-shot is shown: {interval}"


def moved(base: dict, scores: dict, items: Judged, count: int = 10) -> tuple[list[int], list[int]]:
    """Items whose prompt now finds its picture much earlier, and much later: by reciprocal rank, then by rank.

    One item a prompt: with the same words the same is found.
    """
    way = WAYS[0]
    change = scores[f"{way}_mrr"] - base[f"{way}_mrr"]
    steps = base[f"{way}_rank"] - scores[f"{way}_rank"]
    order = np.lexsort((np.arange(len(change)), -steps, -change))
    found: list[list[int]] = []
    for sign, candidates in ((1, order), (-1, np.lexsort((np.arange(len(change)), steps, change)))):
        first = {int(items.prompt[i]): int(i) for i in candidates[::-1] if sign * change[i] > 0}
        found.append([int(i) for i in candidates if first.get(int(items.prompt[i])) == i][:count])
    return found[0], found[1]


# --------------------------------------------------------------------------------------------------------------------
# On a terminal


def table(names: Sequence[str], base: dict[str, float | None], runs: list[dict[str, dict]]) -> str:
    """One run: a line a metric with difference, interval and p. Several: a column a run, * where Holm's p <= 0.05."""
    width = max(map(len, LABELS.values())) + 2
    show = [name for name in METRICS if base[name] is not None]
    if len(runs) == 1:
        title = names[0] if len(names[0]) > 9 else "fine-tuned"
        lines = [f"{'':<{width}}{'zero-shot':>10}{title:>12}{'difference':>12}   95% interval       p (Holm)"]
        for name in show:
            facts = runs[0][name]
            line = f"{LABELS[name]:<{width}}{base[name]:>10.3f}{facts['value']:>12.3f}{facts['difference']:>+12.3f}   "
            known = facts["low"] is not None
            interval = f"[{facts['low']:+.3f}, {facts['high']:+.3f}]" if known else "unknown"
            interval = "no query differs" if not known and facts["difference"] == 0 else interval
            lines.append(f"{line}{interval:<18} {facts['p_holm']:.4f}{_star(facts)}")
    else:
        widths = [max(9, len(name) + 2) for name in names]
        heads = "".join(f"{name:>{w}} " for name, w in zip(names, widths, strict=True))
        lines = [f"{'':<{width}}{'zero-shot':>10} {heads}".rstrip()]
        for name in show:
            cells = (f"{run[name]['value']:>{w}.3f}{_star(run[name])}" for run, w in zip(runs, widths, strict=True))
            lines.append(f"{LABELS[name]:<{width}}{base[name]:>10.3f} {''.join(cells)}".rstrip())
    lines.append(
        "* differs from zero-shot: p <= 0.05 after Holm's correction over every difference shown" if runs else ""
    )
    return "\n".join(lines).rstrip()


def _star(facts: dict) -> str:
    return "*" if facts.get("p_holm", 1) <= ALPHA else " "


def unique_names(names: Iterable[str]) -> list[str]:
    """Names made distinct by a number where one comes twice."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


# --------------------------------------------------------------------------------------------------------------------
# Search: the exact nearest neighbours, a block at a time

SEARCH_QUERIES, SEARCH_VECTORS = 1024, 4096  # a block of scores takes 16 MB, whatever the catalogue's size


def top_k(queries, vectors, k: int, exclude: tuple | None = None) -> tuple:
    """The k vectors with the largest dot product for each query; exact, and the same on every machine.

    queries: float32 [Q, D]. vectors: float32 [N, D], also memory-mapped, or an iterable of such chunks in order.
    exclude: labels (integers [Q], integers [N]); a vector is no result of a query that has the same label.
    Returns scores float32 [Q, k], best first, and indices int64 [Q, k]; where fewer than k remain, -inf and -1.
    A fast product in float32 proposes; what its rounding error lets come into question is computed again in float64 and
    rounded to float32 once, so equal vectors get equal scores, and of equal scores the smaller index wins.
    """
    import numpy as np

    queries = np.ascontiguousarray(queries, dtype=np.float32)
    count, width = queries.shape
    best = np.full((count, k), -np.inf, np.float32)
    found = np.full((count, k), -1, np.int64)
    lengths = np.sqrt(np.einsum("ij,ij->i", queries, queries, dtype=np.float64))
    if not np.isfinite(lengths).all():
        raise common.Fail(f"query vector {int(np.flatnonzero(~np.isfinite(lengths))[0])} holds NaN or infinity")
    first = 0
    for block in _blocks(vectors):
        if block.shape[1] != width:
            raise common.Fail(f"vectors of width {block.shape[1]} cannot be searched with queries of width {width}")
        longest = np.sqrt(np.einsum("ij,ij->i", block, block, dtype=np.float64))
        if not np.isfinite(longest).all():
            bad = first + int(np.flatnonzero(~np.isfinite(longest))[0])
            raise common.Fail(f"vector {bad} holds NaN or infinity; make the vectors again")
        for start in range(0, count, SEARCH_QUERIES):
            part = slice(start, start + SEARCH_QUERIES)
            error = (width + 4) * 2.0**-23 * lengths[part] * longest.max(initial=0) + 1e-30  # [q], of a float32 product
            same = None
            if exclude is not None:
                same = (np.asarray(exclude[0])[part], np.asarray(exclude[1])[first : first + len(block)])
            _search_block(queries[part], block, first, error, same, best[part], found[part])
        first += len(block)
    return best, found


def _blocks(vectors):
    """float32 [n, D] pieces of an array or of an iterable of arrays."""
    import numpy as np

    for chunk in [vectors] if hasattr(vectors, "shape") else vectors:
        for start in range(0, len(chunk), SEARCH_VECTORS):
            yield np.ascontiguousarray(chunk[start : start + SEARCH_VECTORS], dtype=np.float32)


def _search_block(queries, block, first: int, error, same, best, found) -> None:
    """Merge one block of vectors, whose first has index `first`, into best and found, in place."""
    import numpy as np

    k = best.shape[1]
    scores = queries @ block.T  # (q, n)
    floor = best[:, -1] - 2 * error  # what lies below cannot enter: neither it nor the k-th best is off by more
    hits = scores >= floor[:, None]
    if hits.sum() > 8 * k * len(queries):  # the first blocks: what is not among the block's own k best cannot enter
        if same is not None:
            scores[same[0][:, None] == same[1][None, :]] = -np.inf
        if k < len(block):
            kth = np.partition(scores, len(block) - k, axis=1)[:, len(block) - k]
            floor = np.maximum(floor, kth - 2 * error)
        hits = (scores >= floor[:, None]) & (scores > -np.inf)
    rows, columns = np.nonzero(hits)
    if same is not None:
        kept = same[0][rows] != same[1][columns]
        rows, columns = rows[kept], columns[kept]
    if not len(rows):
        return
    exact = np.empty(len(rows), np.float32)
    step = max(1, (1 << 22) // queries.shape[1])  # pairs in float64 at once
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        exact[some] = np.einsum("ij,ij->i", queries[rows[some]], block[columns[some]], dtype=np.float64)
    touched = np.unique(rows)
    row = np.concatenate([np.repeat(touched, k), rows])
    score = np.concatenate([best[touched].ravel(), exact])
    index = np.concatenate([found[touched].ravel(), columns + first])
    order = np.lexsort((index, -score, row))
    row, score, index = row[order], score[order], index[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)  # rank within the query
    kept = place < k
    best[row[kept], place[kept]], found[row[kept], place[kept]] = score[kept], index[kept]
