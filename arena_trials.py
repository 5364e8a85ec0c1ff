"""What the arena compares, and what a judge is shown next: items, answers of each model, drawing.

Items       the columns of master.parquet; vectors stay on disk, memory-mapped
Experiment  models, queries and each model's answers, found once and kept beside the database
Draw        chooses a judge's next trial; no choice depends on how anybody voted
"""

from __future__ import annotations

import functools
import random
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arena_log import Log
from common import ATTRIBUTES, USAGE, ArenaConfig, Fail, digest, file_digest, whole_file
from retrieval import top_k

COLUMNS = ("image_id", "split", "image_path", "title", "prompt", *ATTRIBUTES, "group", "image_digest")
CHUNK = 16_384  # vectors held in memory at once
SHARED_JUDGES = 3  # a shared query is shown to so many
REPEAT_AFTER = 8  # a planned repeat waits for so many later trials, and for its type's turn ...
REPEAT_LATEST = 60  # ... but no longer than so many, where types are many


def note(message: str) -> None:
    """One line for the person at the terminal."""
    print(message, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Items and vectors


class Items:
    """The columns of master.parquet that are not vectors, and the vectors as memory-mapped files.

    A vector column is copied once, in blocks, to a .npy file that is named by the Parquet file's digest.
    """

    def __init__(self, path: str | Path, cache: Path):
        import pyarrow as pa
        import pyarrow.parquet

        self.path, self.cache = Path(path), cache
        try:
            self.file = pyarrow.parquet.ParquetFile(self.path)
            missing = [name for name in (*COLUMNS, "base_embedding") if name not in self.file.schema_arrow.names]
            if missing:
                raise Fail(f"{path}: no column {', '.join(missing)}; make it with 4_embed.py")
            self.table = self.file.read(columns=list(COLUMNS)).combine_chunks()
            self.table.validate(full=True)  # that every text is UTF-8
            self.facts = {k.decode(): v.decode() for k, v in (self.file.schema_arrow.metadata or {}).items()}
        except FileNotFoundError:
            raise Fail(f"{path}: no such file; run 4_embed.py first, or check --embeddings", USAGE) from None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> Fail:
        why = " ".join(str(error).split())  # pyarrow's messages may have several lines
        return Fail(f"{self.path}: not a readable Parquet file ({why}); run 4_embed.py again")

    def __len__(self) -> int:
        return self.table.num_rows

    def text(self, column: str, row: int) -> str:
        """One value; "" where it is missing."""
        return self.table.column(column)[int(row)].as_py() or ""

    @functools.cached_property
    def digest(self) -> str:
        """Digest of which items there are: it does not change when the file is written anew."""
        columns = ("image_id", "split", "group", "image_digest")
        return digest([digest("\n".join(str(v) for v in self.table.column(name).to_pylist())) for name in columns])

    @functools.cached_property
    def folder(self) -> Path:
        return self.cache / file_digest(self.path)[:16]

    @functools.cached_property
    def labels(self):
        """int64 [N]: equal for items of one duplicate group, and for items whose pictures are the same bytes."""
        import numpy as np

        columns = [self.table.column(name).combine_chunks().dictionary_encode() for name in ("group", "image_digest")]
        codes = [column.indices.to_numpy() for column in columns]
        labels = codes[0].astype(np.int64)
        while True:  # the smallest label spreads until nothing moves: once, unless a picture stands in two groups
            before = labels
            for code in codes:
                smallest = np.full(code.max() + 1, len(labels))
                np.minimum.at(smallest, code, labels)
                labels = smallest[code]
            if (labels == before).all():
                return labels

    def vectors(self, column: str):
        """float32 [N, D], memory-mapped."""
        import numpy as np

        target = self.folder / f"{column}.npy"
        if not target.is_file():
            self._unpack(column, target)
        return np.load(target, mmap_mode="r")

    def chunks(self, column: str) -> Iterator:
        """The same in copies of float32 [n, D]; each has a mapping of its own, so that memory holds one chunk only."""
        import numpy as np

        for start in range(0, len(self), CHUNK):
            yield np.array(self.vectors(column)[start : start + CHUNK])

    def _batches(self, column: str) -> Iterator:
        import pyarrow as pa

        try:
            yield from self.file.iter_batches(CHUNK, columns=[column])
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def _unpack(self, column: str, target: Path) -> None:
        import numpy as np

        try:
            width = self.file.schema_arrow.field(column).type.list_size
        except (KeyError, AttributeError):
            raise Fail(f"{self.path}: no column {column} of fixed-size lists; make it with 4_embed.py") from None
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(self), width)}
        with whole_file(target) as temporary, open(temporary, "wb") as handle:
            np.lib.format.write_array_header_1_0(handle, header)
            for batch in self._batches(column):
                block = batch.column(0).flatten().to_numpy(zero_copy_only=False).astype("<f4", copy=False)
                if block.size != batch.num_rows * width or not np.isfinite(block).all():
                    raise Fail(f"{self.path}: {column} has missing or not finite vectors; run 4_embed.py again")
                block.tofile(handle)


@dataclass(frozen=True)
class Model:
    """One of the models that are compared, and where its vectors stand."""

    name: str
    fingerprint: str
    items: Items
    kind: str  # "base" or "finetuned": the columns' prefix


def read_models(files: list[Items]) -> list[Model]:
    """The base first, then each fine-tuned model; one that stands in several files counts once."""
    models: dict[str, Model] = {}
    for items in files:
        if items.digest != files[0].digest:
            raise Fail(f"{items.path} and {files[0].path} hold different items; embed the same shards for all models")
        for kind in ("base", "finetuned"):
            print_ = items.facts.get(f"{kind}_fingerprint")
            if not print_:
                raise Fail(f"{items.path}: no {kind}_fingerprint in its metadata; make it with 4_embed.py")
            name = items.facts.get("scenario") if kind == "finetuned" else None
            name = name or items.facts.get(f"{kind}_model") or kind
            name = Path(name).name if name.startswith("local-dir:") else name
            if name in [model.name for model in models.values() if model.fingerprint != print_]:
                name = f"{name} ({print_[:8]})"
            models.setdefault(print_, Model(name, print_, items, kind))
    if len(models) < 2:
        raise Fail(
            f"{files[0].path}: both models are the same ({files[0].facts.get('base_model')}); nothing to compare"
        )
    return list(models.values())


def choose_queries(items: Items, settings: ArenaConfig) -> list[int]:
    """Row numbers: one query a duplicate group of the test split; at most settings.queries, object types in turn."""
    import numpy as np

    rows = np.flatnonzero(np.asarray(items.table.column("split").to_pylist()) == "test")
    if not len(rows):
        raise Fail(f"{items.path}: no row of the test split; there is nothing to ask about")
    _, first = np.unique(items.labels[rows], return_index=True)
    rows = rows[np.sort(first)].tolist()
    random.Random(f"{settings.seed} queries").shuffle(rows)
    seen: Counter[str] = Counter()
    turns = {}
    for row in rows:
        category = items.text("object_type", row)
        turns[row] = seen[category]
        seen[category] += 1
    return sorted(sorted(rows, key=turns.get)[: settings.queries])


def experiment_key(files: list[Items], settings: ArenaConfig) -> str:
    """The experiment's identity: votes are only ever counted together under one key."""
    prints = sorted(model.fingerprint for model in read_models(files))
    return digest([prints, files[0].digest, choose_queries(files[0], settings), settings.query, settings.top_k])


class Experiment:
    """Models, queries and each model's answers: all that a draw needs. Nothing in it depends on a vote.

    lists: int64 [M, Q, K], row numbers of each model's answers, best first.
    """

    def __init__(self, files: list[Items], settings: ArenaConfig):
        self.settings, self.items = settings, files[0]
        self.models, self.key = read_models(files), experiment_key(files, settings)
        self.queries = choose_queries(self.items, settings)
        self.categories = [self.items.text("object_type", row) or "other" for row in self.queries]
        self.types: dict[str, list[int]] = {}
        for number, category in enumerate(self.categories):
            self.types.setdefault(category, []).append(number)
        self.pairs = [(i, j) for j in range(len(self.models)) for i in range(j)]
        chance = random.Random(f"{settings.seed} shared")
        self.shared = set(chance.sample(range(len(self.queries)), round(settings.shared * len(self.queries))))
        self.lists = self._find_answers()
        self.rows = {self.items.text("image_id", row): row for row in {*self.queries, *self.lists.ravel().tolist()}}
        self.numbers = {self.items.text("image_id", row): number for number, row in enumerate(self.queries)}

    def _find_answers(self):
        """Every model's answers to every query, computed once and kept beside the database."""
        import numpy as np

        k, kind = self.settings.top_k, self.settings.query
        if k < 1:
            raise Fail(f"--top-k {k}: must be at least 1", USAGE)
        labels = self.items.labels
        answers = []
        for model in self.models:
            name = digest([model.fingerprint, self.items.digest, self.queries, k, kind])[:16]
            target = model.items.folder / f"answers-{name}.npy"
            if not target.is_file():
                start = time.monotonic()
                gallery = model.items.chunks(f"{model.kind}_embedding")
                column = f"{model.kind}_{'text_' if kind == 'text' else ''}embedding"
                asked = np.asarray(model.items.vectors(column)[self.queries])
                _, found = top_k(asked, gallery, k, (labels[self.queries], labels))
                if (found < 0).any():
                    raise Fail(
                        f"fewer than {k} items besides a query's own duplicates; lower --top-k or give more rows"
                    )
                with whole_file(target) as temporary, open(temporary, "wb") as handle:
                    np.save(handle, found)
                seconds = time.monotonic() - start
                note(f"{model.name}: answers to {len(self.queries)} queries among {len(self.items)}, {seconds:.1f} s")
            answers.append(np.load(target))
        return np.stack(answers)

    @property
    def facts(self) -> dict[str, Any]:
        """What is written down of the experiment in the log."""
        models = [{"name": model.name, "fingerprint": model.fingerprint} for model in self.models]
        facts = {"models": models, "query": self.settings.query, "top_k": self.settings.top_k}
        return facts | {"queries": len(self.queries), "items": len(self.items), "categories": len(self.types)}

    def row(self, image_id: str) -> int:
        """Row number of an item; those of today's answers are at hand, others (of an older trial) are looked for."""
        import pyarrow.compute

        if image_id not in self.rows:
            self.rows[image_id] = pyarrow.compute.index(self.items.table.column("image_id"), image_id).as_py()
        return self.rows[image_id]

    def trial(self, number: int, left: int, right: int) -> dict[str, Any]:
        """The columns of a trial: query `number`, one model as row A and the other as row B."""
        columns = {"query": self.items.text("image_id", self.queries[number]), "category": self.categories[number]}
        facts: dict[str, Any] = {"judges": SHARED_JUDGES if number in self.shared else 1}
        for side, model in (("left", left), ("right", right)):
            rows = self.lists[model, number].tolist()
            columns[f"{side}_model"] = self.models[model].fingerprint
            columns[f"{side}_items"] = [self.items.text("image_id", row) for row in rows]
            # By digest, since two items with the same picture look the same to a judge.
            facts[f"{side}_pictures"] = [self.items.text("image_digest", row) for row in rows]
            facts[f"{side}_attributes"] = {name: self._agreement(name, number, rows) for name in ATTRIBUTES}
        a, b = facts["left_pictures"], facts["right_pictures"]
        return columns | {"facts": facts | {"same_set": set(a) == set(b) and a != b}, "identical": int(a == b)}

    def _agreement(self, attribute: str, number: int, rows: list[int]) -> float | None:
        """Share of the answers that agree with the query in an attribute; None where the query's is unknown."""
        wanted = self.items.text(attribute, self.queries[number])
        return sum(self.items.text(attribute, row) == wanted for row in rows) / len(rows) if wanted else None


# --------------------------------------------------------------------------------------------------------------------
# Drawing


class Draw:
    """Chooses what a judge is shown next. No choice depends on how anybody voted.

    Object types take turns: one with the fewest showings so far comes next. Within it: a planned repeat that is due
    (5% of a judge's queries, sides exchanged); then a query that other judges have begun and that three are to see
    (20% of them); then the query shown least often, in the order of the judge's own seeded permutation. With more than
    two models the pair shown least often is drawn. Which model stands as row A is a fair coin's choice.
    Counts live in memory; they are those of the log's committed trials, since one process writes.
    """

    def __init__(self, experiment: Experiment, log: Log, number: int):
        self.experiment, self.log, self.number = experiment, log, number
        models = experiment.models
        self.prints = {(i, j): frozenset((models[i].fingerprint, models[j].fingerprint)) for i, j in experiment.pairs}
        self.order = functools.lru_cache(256)(self._order)
        self.stale = True  # set again after a commit that failed: the counts hold what the log does not

    def _recount(self) -> None:
        """Count anew from the log."""
        self.by_type: Counter[str] = Counter()
        self.by_query: Counter[int] = Counter()
        self.by_pair: Counter[frozenset] = Counter()
        self.identical: set[tuple[int, frozenset]] = set()
        for row in self.log.draws(self.number):
            self._count(row["query"], row["category"], row["left_model"], row["right_model"], row)
        self.stale = False

    def _count(self, query: str, category: str, left: str, right: str, row) -> None:
        """Take one drawn trial into the counts."""
        number, pair = self.experiment.numbers.get(query), frozenset((left, right))
        if row["identical"]:
            self.identical.add((number, pair))
            return
        self.by_type[category] += 1
        if not row["repeat_of"]:
            self.by_query[number] += 1
            self.by_pair[pair] += 1

    def _order(self, judge: str) -> tuple[list[int], set[int]]:
        """The judge's permutation, as each query's rank, and the queries that the judge is to see twice."""
        experiment = self.experiment
        chance = random.Random(f"{experiment.settings.seed} {judge}")
        count = len(experiment.queries)
        ranks = chance.sample(range(count), count)
        return ranks, set(chance.sample(range(count), round(experiment.settings.repeated * count)))

    def __call__(self, judge: str, history: list) -> list[dict[str, Any]]:
        """Columns of the trials to write down: identical pairs passed over, then at most one to show.

        Called with the log's write lock held.
        """
        if self.stale:
            self._recount()
        drawn: list[dict[str, Any]] = []
        while not drawn or drawn[-1]["identical"]:
            columns = self._next(judge, history)
            if columns is None:
                break
            drawn.append({"repeat_of": None} | columns)
            row = drawn[-1]
            self._count(row["query"], row["category"], row["left_model"], row["right_model"], row)
        return drawn

    def _next(self, judge: str, history: list) -> dict[str, Any] | None:
        experiment, (ranks, twice) = self.experiment, self.order(judge)
        again = self._due(history, twice)
        if again and history[-1]["place"] - again[0]["place"] >= REPEAT_LATEST:
            return self._repeat(again[0])
        seen = {experiment.numbers.get(row["query"]) for row in history}
        own = Counter(row["category"] for row in history)

        def turn(category: str) -> tuple:
            return self.by_type[category], own[category], ranks[experiment.types[category][0]]

        def urgency(query: int) -> tuple:
            begun = query in experiment.shared and 0 < self.by_query[query] < SHARED_JUDGES
            return not begun, self.by_query[query], ranks[query]

        for category in sorted(experiment.types, key=turn):
            for row in again:
                if row["category"] == category:
                    return self._repeat(row)
            fresh = [query for query in experiment.types[category] if query not in seen and self._pairs(query)]
            if fresh:
                query = min(fresh, key=urgency)
                rare = min(self.by_pair[self.prints[pair]] for pair in self._pairs(query))
                sides = secrets.choice([p for p in self._pairs(query) if self.by_pair[self.prints[p]] == rare])
                return experiment.trial(query, *(sides if secrets.randbits(1) else sides[::-1]))
        return None

    def _pairs(self, query: int) -> list[tuple[int, int]]:
        """The pairs of models that are not known to answer a query identically."""
        return [pair for pair in self.experiment.pairs if (query, self.prints[pair]) not in self.identical]

    def _due(self, history: list, twice: set[int]) -> list:
        """The judge's trials that may be repeated now, oldest first."""
        repeated = {row["repeat_of"] for row in history}
        return [
            row
            for row in history
            if self.experiment.numbers.get(row["query"]) in twice
            and row["voted"]
            and row["id"] not in repeated
            and not row["repeat_of"]
            and history[-1]["place"] - row["place"] >= REPEAT_AFTER
        ]

    def _repeat(self, row) -> dict[str, Any]:
        """The same lists again, sides exchanged."""
        prints = [model.fingerprint for model in self.experiment.models]
        sides = prints.index(row["right_model"]), prints.index(row["left_model"])
        return self.experiment.trial(self.experiment.numbers[row["query"]], *sides) | {"repeat_of": row["id"]}
