"""Stage 4: the vectors of every item under the base and the fine-tuned model, and the proof of which finds better.

Reads   --shards: a folder or s3://bucket/prefix from 2_prepare.py; the base model; --finetuned: a run of 3_train.py
Writes  --output: master.parquet, one row an item; beside it report.json, report.html, queries.parquet (the scores of
        each query), and vectors/, where each vector is kept by picture and model: what is there is not computed again

    python 4_embed.py --shards data/shards --model ViT-B-32 --pretrained openai \\
        --finetuned data/runs/dual_lora/model --output data/embeddings/master.parquet
    torchrun --nproc-per-node 8 4_embed.py ...              the same, on eight GPUs
    python 4_embed.py report --shards data/shards --model local-dir:tests/small_clip \\
        --run data/runs/zero_shot --run data/runs/dual_lora --output data/report       any number of runs
    python 4_embed.py pool --report data/folds/5/0/report-dual_lora --report data/folds/5/1/... --output data/proof
    python 4_embed.py search "grey fabric sofa" [--image photo.jpg]                    seconds on a CPU
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import imaging
import storage
from common import DONE, USAGE, EmbeddingConfig, Fail

DESCRIBED = ("image_id", "split", "image_path", "title", "prompt", *common.ATTRIBUTES)
COLUMNS = (*DESCRIBED, "group", "image_digest", "text_digest")  # the vectors follow
REPEATED = ("split", *common.ATTRIBUTES)  # columns of few values
ROWS = 1024  # in a row group, at most
COMMANDS = ("embed", "report", "pool", "search")

# --------------------------------------------------------------------------------------------------------------------
# Runs of stage 3


@dataclasses.dataclass
class Run:
    """One model to be judged: a run of 3_train.py, a folder with a model alone, or the base."""

    name: str
    model: str  # as load_clip takes it
    pretrained: str | None
    folder: Path | None  # where metrics.jsonl is
    base_fingerprint: str | None = None  # of the model it was trained from


def read_run(folder: str, args: argparse.Namespace) -> Run:
    """A run by its folder or by the model folder in it. Raises Fail where there is none."""
    path = Path(folder.removeprefix("local-dir:"))
    place = path if (path / "train.json").is_file() else path.parent
    if not (place / "train.json").is_file():
        if (path / "open_clip_config.json").is_file():
            return Run(path.name, f"local-dir:{path}", None, None)
        raise Fail(f"{path}: no finished run there (no train.json); train it with 3_train.py, or check the path")
    facts = common.read_json(place / "train.json", "run")
    try:
        name, model = facts.get("scenario"), facts.get("model_dir")
        base = facts.get("inputs", {}).get("base_fingerprint")
        if not all(isinstance(text, str | None) for text in (name, base, model)):
            raise TypeError("names are no text")
    except (AttributeError, TypeError) as error:
        raise Fail(f"{place}/train.json: not written by 3_train.py ({error!r}); train that run again") from None
    if model is None:
        return Run(name or place.name, args.model, args.pretrained, place, base)
    return Run(name or place.name, f"local-dir:{place / model}", None, place, base)


def load(run: Run, base: Any, device: str) -> Any:
    """The run's CLIP; says so where it comes from another base than the one it is compared with."""
    from clip import load_clip

    clip = load_clip(run.model, run.pretrained, device)
    if base and run.base_fingerprint and run.base_fingerprint != base.fingerprint:
        print(f"NOTE: {run.name} was not trained from {base.name}, with which it is compared here", flush=True)
    return clip


# --------------------------------------------------------------------------------------------------------------------
# master.parquet


def without_vector(items, encoders) -> list[int]:
    """Rows whose picture could not be encoded."""
    import numpy as np

    return [int(row) for row in np.flatnonzero(~np.all([e.image.has(items.image) for e in encoders], axis=0))]


def why_unreadable(items, row: int) -> imaging.BadImage:
    """What is wrong with a row's picture."""
    from clip import decode_jpeg

    data = items.jpegs([row])[0]
    if isinstance(data, imaging.BadImage):
        return data
    try:
        decode_jpeg(data, 32)
    except imaging.BadImage as error:
        return error
    return imaging.BadImage("not encoded", "readable now; run again")


def write_rejects(path: str, items, bad: list[int], max_failed: float) -> None:
    """Name the rows that are left out; Fail where they are too many."""
    import numpy as np

    lines = []
    columns = items.fields(np.array(bad, dtype=int), ("id", "image_path", "title"))
    for row, name, image_path, title in zip(bad, *columns.values(), strict=True):
        error = why_unreadable(items, row)
        line = {"id": name, "row": row, "reason": error.reason, "detail": error.detail}
        lines.append(json.dumps(line | {"image_path": image_path, "name": title}) + "\n")
    if lines or Path(path).is_file():
        common.write_whole(path, "".join(lines))
    if len(bad) > max_failed * len(items):
        raise Fail(
            f"{len(bad)} of {len(items)} pictures are unreadable, named in {path}; make the shards again, "
            "or raise --max-failed"
        )


def holds(output: Path, facts: dict[str, str]) -> bool:
    """Whether master.parquet is there, whole, with these facts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        there = pq.read_schema(output).metadata or {}
    except (OSError, pa.ArrowInvalid):  # not there, or damaged
        return False
    return all(there.get(k.encode()) == v.encode() for k, v in facts.items())


def write_master(output: Path, items, encoders: dict[str, Any], bad: list[int], facts: dict[str, str]) -> None:
    """Write master.parquet, row group by row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = {kind: _width(encoder, items) for kind, encoder in encoders.items()}
    vectors = [(f"{kind}_{text}embedding", kind, text) for text in ("", "text_") for kind in ("base", "finetuned")]
    fields = [pa.field(name, pa.string()) for name in COLUMNS]
    fields += [pa.field(name, pa.list_(pa.float32(), width[kind])) for name, kind, _ in vectors]
    schema = pa.schema(fields, metadata=facts)
    dropped = set(bad)
    with (
        common.whole_file(output) as temporary,
        pq.ParquetWriter(
            temporary,
            schema,
            compression={f"{n}.list.element" if n not in COLUMNS else n: "zstd" if n in COLUMNS else "none"
                         for n in schema.names},
            use_dictionary=list(REPEATED),
            write_statistics=list(COLUMNS),
        ) as writer,
    ):  # fmt: skip
        for rows, columns in common.progress(_row_groups(items, dropped), "writing", None, "row group"):
            for name, kind, text in vectors:
                store = getattr(encoders[kind], "text" if text else "image")
                matrix = store.get((items.text if text else items.image)[rows])
                columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), width[kind])
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROWS)


def _width(encoder, items) -> int:
    return encoder.text.get(items.text[:1]).shape[1]


def _row_groups(items, dropped: set[int]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(rows, their columns without vectors), shard by shard."""
    import numpy as np

    first = 0
    for number, (split, _) in enumerate(items.entries):
        table = items.table(number)
        table = table.append_column("split", [[split] * table.num_rows])
        for start in range(0, table.num_rows, ROWS):
            piece = table.slice(start, ROWS)
            rows = np.arange(first + start, first + start + piece.num_rows)
            kept = np.array([row not in dropped for row in rows])
            if kept.any():
                piece = piece.filter(kept)
                columns = {name: piece["id" if name == "image_id" else name].combine_chunks() for name in COLUMNS}
                yield rows[kept], columns
        first += table.num_rows


# --------------------------------------------------------------------------------------------------------------------
# The two commands that compute


def open_items(args: argparse.Namespace, config: EmbeddingConfig, folder: Path, splits: tuple[str, ...], ranks):
    """The rows of the shards, indexed."""
    from vectors import Items

    items = Items(args.shards, folder, splits, ranks, config.cache_gb * 1e9)
    if not any(split == "test" for split, _ in items.entries):
        raise Fail(f"{args.shards}: the test split is empty, nothing can be compared; give 2_prepare.py more rows")
    return items


@contextlib.contextmanager
def alone(folder: Path, ranks) -> Iterator[None]:
    """Keep a second command out of the folder of vectors."""
    if ranks.rank:
        yield
        return
    with common.exclusive(folder / ".lock") as free:
        if not free:
            raise Fail(f"{folder}: another 4_embed.py is working there; wait until it has ended")
        yield


def embed(args: argparse.Namespace, config: EmbeddingConfig) -> int:
    """Vectors of all items under both models, master.parquet, and the report of the two."""
    from vectors import Ranks, compute, device_of, open_encoder

    start = time.monotonic()
    ranks = Ranks()
    output = Path(args.output)
    run = read_run(args.finetuned, args)
    if run.model == args.model:
        raise Fail(f"{args.finetuned}: that run is the base model itself; choose a --finetuned that was trained")
    folder = Path(args.vectors) if args.vectors else output.parent / "vectors"
    with alone(folder, ranks):
        device = device_of(config.device, ranks)
        base = Run("zero_shot", args.model, args.pretrained, None)
        clips = [load(base, None, device)]
        clips.append(load(run, clips[0], device))
        check_widths(*clips)
        items = open_items(args, config, folder, storage.SPLITS, ranks)
        if note := storage.scaled_up(items.manifest, clips[0]):
            ranks.say(note)
        encoders = [open_encoder(clip, items, config, ranks) for clip in clips]
        made = compute(items, encoders, config, ranks)
        if ranks.rank:
            return DONE
        bad = without_vector(items, encoders)
        write_rejects(f"{output}.rejects.jsonl", items, bad, config.max_failed)
        facts = master_facts(items, encoders, run, args, output)
        counts = {"input": len(items), "written": len(items) - len(bad), "rejected": len(bad), "computed": made}
        make_report(items, bad, list(zip((base, run), encoders, strict=True)), config, output.parent)
        there = holds(output, facts)
        if not there or not Path(f"{output}.json").is_file():
            common.write_sidecar(
                f"{output}.json", config, counts, {"shards": args.shards} | facts, time.monotonic() - start,
                versions=common.versions("torch", "open_clip_torch", "pyarrow", "numpy"),
            )  # fmt: skip
        if not there:  # last: where it is, all is
            write_master(output, items, dict(zip(("base", "finetuned"), encoders, strict=True)), bad, facts)
        items.forget_copies()
        print(f"{output}: input {len(items)} = written {counts['written']} + rejected {len(bad)}", flush=True)
        print("computed: {image} pictures, {text} prompts; the rest was there".format(**made), flush=True)
    return DONE


def check_widths(base, finetuned) -> None:
    """Fail where the two models do not share one space's width."""
    import torch

    widths = []
    for clip in (base, finetuned):
        with torch.no_grad():
            widths.append(clip.model.encode_text(clip.tokenizer(["a"]).to(clip.device)).shape[1])
    if widths[0] != widths[1]:
        raise Fail(
            f"{finetuned.name}: makes vectors of width {widths[1]}, the base {base.name} of {widths[0]}; "
            "give the --model that it was fine-tuned from"
        )


def master_facts(items, encoders, run: Run, args: argparse.Namespace, output: Path) -> dict[str, str]:
    """master.parquet's metadata. No path of this machine is among it, so that the same work gives the same bytes."""
    folder = os.path.relpath(Path(run.model.removeprefix("local-dir:")).resolve(), output.parent.resolve())
    local = encoders[0].clip.folder
    base = f"local-dir:{local}" if local else f"{args.model}/{args.pretrained}"
    shards = [(split, entry["sha256"]) for split, entry in items.entries]
    made_from = [shards, [encoder.key for encoder in encoders], COLUMNS]
    return {
        "base_model": base,
        "finetuned_model": f"local-dir:{folder}",
        "base_fingerprint": encoders[0].clip.fingerprint,
        "finetuned_fingerprint": encoders[1].clip.fingerprint,
        "scenario": run.name,
        "precision": "/".join(encoder.precision for encoder in encoders),
        "inputs": common.digest(made_from),
    }


def report(args: argparse.Namespace, config: EmbeddingConfig) -> int:
    """Compare any number of runs with the base on the test split; models are loaded one after another."""
    from vectors import Ranks, compute, device_of, open_encoder

    ranks = Ranks()
    output = Path(args.output)
    folder = Path(args.vectors) if args.vectors else output.parent / "embeddings" / "vectors"
    runs = [read_run(path, args) for path in args.run]
    with alone(folder, ranks):
        device = device_of(config.device, ranks)
        items = open_items(args, config, folder, ("test",), ranks)
        models: list[tuple[Run, Any]] = []
        base = Run("zero_shot", args.model, args.pretrained, None)
        for run in (base, *(run for run in runs if run.model != args.model)):
            clip = load(run, models[0][1].clip if models else None, device)
            if not models and (note := storage.scaled_up(items.manifest, clip)):
                ranks.say(note)
            encoder = open_encoder(clip, items, config, ranks)
            compute(items, [encoder], config, ranks)
            clip.model = None  # one model in memory at a time
            models.append((run, encoder))
        if ranks.rank:
            return DONE
        bad = without_vector(items, [encoder for _, encoder in models])
        output.mkdir(parents=True, exist_ok=True)
        write_rejects(str(output / "rejects.jsonl"), items, bad, config.max_failed)
        make_report(items, bad, models, config, output)
        items.forget_copies()
    return DONE


# --------------------------------------------------------------------------------------------------------------------
# The report


def judged_rows(items, bad: list[int]):
    """int64 [N]: the rows of the test split that have vectors."""
    import numpy as np

    tested = np.array([split == "test" for split, _ in items.entries])[items.shard]
    tested[bad] = False
    if not tested.any():
        raise Fail(f"{items.shards}: no picture of the test split can be read; make the shards again")
    return np.flatnonzero(tested)


def make_report(items, bad, models: list[tuple[Run, Any]], config: EmbeddingConfig, folder: Path) -> None:
    """Judge every run against the first, the base; write report.json and report.html, print what they say.

    models: runs with their encoders. Their vectors are read from the store a block at a time.
    """
    import retrieval
    from report_page import write_page
    from stats import ALPHA
    from vectors import Vectors

    rows = judged_rows(items, bad)
    columns = items.fields(rows, ("id", "title", "prompt", "group", *common.ATTRIBUTES))
    judged = retrieval.Judged.of(columns)
    clusters = judged.clusters()
    vectors = [
        (Vectors(encoder.image, items.image[rows]), Vectors(encoder.text, items.text[rows])) for _, encoder in models
    ]
    scores = [retrieval.judge(*pair, judged) for pair in vectors]
    names = ["zero_shot", *retrieval.unique_names(run.name for run, _ in models[1:])]
    about = [
        {"name": name, "fingerprint": encoder.clip.fingerprint, "precision": encoder.precision}
        for name, (_, encoder) in zip(names, models, strict=True)
    ]
    save_queries(folder / "queries.parquet", columns, clusters, names, scores)
    facts = compare_models(about, scores, columns["object_type"], clusters, config)
    facts["shards"] = common.digest([entry["sha256"] for split, entry in items.entries if split == "test"])
    headlines = [run["metrics"][retrieval.HEADLINE] for run in facts["runs"]]
    page: dict[str, Any] = {}
    if headlines:
        best = 1 + max(range(len(headlines)), key=lambda i: headlines[i]["value"])
        gained, lost = retrieval.moved(scores[0], scores[best], judged)
        facts["moved"] = {
            "run": names[best],
            "gained": [moved_query(i, columns, scores[0], scores[best]) for i in gained],
            "lost": [moved_query(i, columns, scores[0], scores[best]) for i in lost],
        }
        page = show_moved(facts["moved"], items, rows, judged, (vectors[0], vectors[best]), columns["title"])
    curves = {name: run.folder / "metrics.jsonl" for name, (run, _) in zip(names, models, strict=True) if run.folder}
    write_page(folder / "report.html", facts, curves, page)
    common.write_json(folder / "report.json", facts)
    print_comparison(facts, folder)
    widest = max((one["high"] - one["low"] for one in headlines if one.get("low") is not None), default=0)
    shown = any(one.get("p_holm", 1) <= ALPHA for one in headlines)
    if widest and not shown and not items.manifest.get("fold"):
        print(
            f"{len(judged)} test items show only differences beyond about {widest / 2:.2f}; `make proof` tests on every"
            " product, fold by fold",
            flush=True,
        )


def compare_models(about: list[dict], scores: list[dict], types, clusters, config: EmbeddingConfig) -> dict[str, Any]:
    """What report.json says of models, the base first, by the scores of the same N queries.

    about: name, fingerprint and precision of each; scores: {metric: float64 [N]}; types: object type, N texts.
    """
    import retrieval

    compared = retrieval.compare(scores[0], scores[1:], clusters, config.draws, config.seed)
    told = [one | {"by_type": retrieval.by_type(score, types)} for one, score in zip(about, scores, strict=True)]
    return {
        "split": "test",
        "items": len(types),
        "independent": int(clusters.max()) + 1,
        "settings": {"draws": config.draws, "seed": config.seed, "nearest": retrieval.NEAREST},
        "headline": retrieval.HEADLINE,
        "base": told[0] | {"metrics": {name: retrieval.mean(scores[0][name]) for name in retrieval.METRICS}},
        "runs": [
            run | {"metrics": metrics, "verdict": retrieval.verdict(run["name"], metrics[retrieval.HEADLINE])}
            for run, metrics in zip(told[1:], compared, strict=True)
        ],
    }


def print_comparison(facts: dict[str, Any], folder: Path) -> None:
    """The table and the verdicts of report.json."""
    import retrieval

    print(f"\ntest split: {facts['items']} items, {facts['independent']} of them independent of each other\n")
    runs = facts["runs"]
    print(retrieval.table([run["name"] for run in runs], facts["base"]["metrics"], [run["metrics"] for run in runs]))
    print("", *(run["verdict"] for run in runs), f"report: {folder / 'report.html'}", sep="\n", flush=True)


def save_queries(path: Path, columns: dict[str, list[str]], clusters, names: list[str], scores: list[dict]) -> None:
    """queries.parquet: id, object_type, the draw that a query belongs to, and its scores as columns RUN/METRIC."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    import retrieval

    data = {"id": columns["id"], "object_type": columns["object_type"], "draw": clusters}
    for name, score in zip(names, scores, strict=True):
        data |= {f"{name}/{metric}": score[metric] for metric in retrieval.METRICS}
    with common.whole_file(path) as temporary:
        pq.write_table(pa.table(data), temporary)


def pool(args: argparse.Namespace, config: EmbeddingConfig) -> int:
    """One report of those of several folds: each product was asked for once, by models that never saw it."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    import retrieval
    from report_page import write_page

    reports = [common.read_json(Path(folder, "report.json"), "report") for folder in args.report]
    names = [run["name"] for run in reports[0]["runs"]]
    tables, seen = [], {}
    for folder, report in zip(args.report, reports, strict=True):
        if [run["name"] for run in report["runs"]] != names or (
            report["base"]["fingerprint"] != reports[0]["base"]["fingerprint"]
        ):
            raise Fail(
                f"{folder}: compares other runs or another base than {args.report[0]}; pool folds of one catalogue"
            )
        try:
            tables.append(pq.read_table(Path(folder, "queries.parquet")))
            ids = tables[-1]["id"].to_pylist()
        except (OSError, KeyError, pa.ArrowException) as error:
            raise Fail(f"{folder}: its queries.parquet cannot be read ({error}); make the report again") from None
        twice = next((id for id in ids if id in seen), None)
        if twice is not None:
            raise Fail(f"{folder}: tests on {twice}, as {seen[twice]} does; pool folds, made with 2_prepare.py --fold")
        seen |= dict.fromkeys(ids, folder)
    draws = [table["draw"].to_numpy() for table in tables]
    starts = np.cumsum([0, *(draw.max() + 1 for draw in draws)])
    clusters = np.concatenate([draw + start for draw, start in zip(draws, starts, strict=False)])
    whole = pa.concat_tables(tables)
    scores = [
        {metric: whole[f"{name}/{metric}"].to_numpy() for metric in retrieval.METRICS} for name in ("zero_shot", *names)
    ]
    about = [{key: reports[0]["base"][key] for key in ("name", "fingerprint", "precision")}]
    for i, name in enumerate(names):
        made = [report["runs"][i] for report in reports]
        fingerprint = common.digest([run["fingerprint"] for run in made])
        about.append({"name": name, "fingerprint": fingerprint, "precision": made[0]["precision"]})
    facts = compare_models(about, scores, whole["object_type"].to_pylist(), clusters, config)
    facts["folds"] = [
        {"items": report["items"]}
        | {run["name"]: run["metrics"][retrieval.HEADLINE]["difference"] for run in report["runs"]}
        for report in reports
    ]
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_page(folder / "report.html", facts, {}, {})
    common.write_json(folder / "report.json", facts)
    for name in names:
        print(f"{name}: MRR gained in each of {len(reports)} folds: ", end="")
        print(", ".join(f"{fold[name]:+.3f}" for fold in facts["folds"]))
    print_comparison(facts, folder)
    return DONE


def moved_query(i: int, columns: dict[str, list[str]], before: dict, after: dict) -> dict[str, Any]:
    """One query whose answer moved, for report.json."""
    ranks = {"zero_shot_rank": int(before["text_to_image_rank"][i]), "rank": int(after["text_to_image_rank"][i])}
    return {"item": i} | {name: columns[name][i] for name in ("id", "title", "prompt")} | ranks


def show_moved(moved: dict[str, Any], items, rows, judged, vectors: tuple, titles: list[str]) -> dict[str, Any]:
    """The queries that moved with the pictures that both models find, for report.html."""
    import functools

    import retrieval
    from report_page import moved_queries, thumbnail

    @functools.cache
    def picture(i: int) -> str:
        data = items.jpegs([int(rows[i])])[0]
        return "" if isinstance(data, imaging.BadImage) else thumbnail(data)

    asked = [query["item"] for kind in ("gained", "lost") for query in moved[kind]]
    found = [
        retrieval.top_k(texts[asked], images.blocks(), retrieval.NEAREST)[1].tolist()
        for images, texts in vectors
        if asked
    ]
    results = {i: pair for i, *pair in zip(asked, *found, strict=True)}
    shown = {kind: moved_queries(moved[kind], results, judged, picture, titles) for kind in ("gained", "lost")}
    return {"run": moved["run"]} | shown


# --------------------------------------------------------------------------------------------------------------------
# Search


def search(args: argparse.Namespace) -> int:
    """Print the items nearest to words, to a picture, or to both together."""
    import pyarrow as pa

    if not args.words and not args.image:
        raise Fail("search for what? give words, or --image FILE", USAGE)
    try:
        lines = nearest(args)
    except FileNotFoundError:
        raise Fail(f"{args.embeddings}: no such file; run 4_embed.py first, or check --embeddings", USAGE) from None
    except (pa.ArrowException, OSError, ValueError) as error:  # pyarrow tells of damage when it comes to it
        raise Fail(f"{args.embeddings}: not a readable Parquet file ({error}); run 4_embed.py again") from None
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:  # outside: a closed pipe says nothing about the file
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return DONE


def nearest(args: argparse.Namespace) -> list[tuple[str, ...]]:
    """(place, score, id, title, path) of each item that is found, best first."""
    import numpy as np
    import pyarrow.parquet as pq

    import retrieval

    file = pq.ParquetFile(args.embeddings)
    facts = {k.decode(): v.decode() for k, v in (file.schema_arrow.metadata or {}).items()}
    column = f"{args.using}_embedding"
    types = {field.name: field.type for field in file.schema_arrow}
    width = getattr(types.get(column), "list_size", None)
    known = {f"{args.using}_model", f"{args.using}_fingerprint"} <= facts.keys()
    if width is None or not known or not {"image_id", "title", "image_path"} <= types.keys():
        raise Fail(f"{args.embeddings}: no {column} with its model in it; make it with 4_embed.py")
    query = query_vector(args, facts)
    if query.shape[1] != width:
        raise Fail(f"{args.embeddings}: vectors of width {width}, the query's has {query.shape[1]}")
    chunks = (
        batch.column(0).flatten().to_numpy().reshape(-1, width)
        for batch in file.iter_batches(retrieval.SEARCH_VECTORS, columns=[column])
    )
    scores, rows = retrieval.top_k(query, chunks, args.top_k)
    found = [(score, row) for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True) if row >= 0]
    starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
    lines = []
    for place, (score, row) in enumerate(found, 1):
        group = int(np.searchsorted(starts, row, side="right")) - 1
        item = file.read_row_group(group, columns=["image_id", "title", "image_path"])
        item = item.slice(row - starts[group], 1).to_pylist()[0]
        lines.append((str(place), f"{score:.3f}", *(str(item[n] or "") for n in ("image_id", "title", "image_path"))))
    return lines


def query_vector(args: argparse.Namespace, facts: dict[str, str]):
    """float32 [1, D] of words, of a picture, or of both: the middle between the two."""
    import torch
    import torch.nn.functional as F
    from PIL import ImageOps

    from clip import encode_image, encode_text, load_clip, model_place
    from imaging import BadImage, load_image

    named = (args.model, args.pretrained) if args.model else model_place(facts[f"{args.using}_model"], args.embeddings)
    parts = []
    try:
        picture = load_image(Path(args.image)) if args.image else None
    except BadImage as error:
        raise Fail(f"{args.image}: {error}", USAGE) from None
    clip = load_clip(*named)
    if clip.fingerprint != facts[f"{args.using}_fingerprint"]:
        raise Fail(
            f"{clip.name}: not the model that made the vectors of {args.embeddings}; run 4_embed.py again, "
            "or say where that model is with --model"
        )
    if args.words:
        parts.append(encode_text(clip, [args.words]))
    if picture is not None:
        import numpy as np

        square = ImageOps.pad(picture, (clip.size, clip.size), color="white")
        parts.append(encode_image(clip, torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]))
    return F.normalize(torch.stack(parts).mean(dim=0), dim=-1).numpy()


# --------------------------------------------------------------------------------------------------------------------
# The command line


def build_parser() -> argparse.ArgumentParser:
    """The command line; `embed` is meant where no command is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{embed,report,pool,search}")
    shards = argparse.ArgumentParser(add_help=False)
    shards.add_argument("--shards", required=True, help="folder or s3://bucket/prefix made by 2_prepare.py")
    shards.add_argument("--model", required=True, help="base model: open_clip name, or local-dir:FOLDER")
    shards.add_argument("--pretrained", help="open_clip tag (openai), weights file, or local-dir:FOLDER")
    shards.add_argument("--vectors", help="folder in which vectors are kept (default: that of master.parquet)")
    common.add_flags(shards, EmbeddingConfig)

    one = commands.add_parser("embed", parents=[shards], help="vectors of all items under two models, and the report")
    one.add_argument("--finetuned", required=True, help="run of 3_train.py, or the model folder in it")
    one.add_argument("--output", required=True, help="such as data/embeddings/master.parquet")
    many = commands.add_parser("report", parents=[shards], help="compare any number of runs on the test split")
    many.add_argument("--run", action="append", required=True, help="folder of a run; may be given several times")
    many.add_argument("--output", required=True, help="folder of report.json and report.html")
    several = commands.add_parser("pool", help="one report of several, whose test splits are folds of one catalogue")
    several.add_argument("--report", action="append", required=True, help="folder of a report; give each fold's")
    several.add_argument("--output", required=True, help="folder of report.json and report.html")
    several.add_argument("--draws", type=int, default=EmbeddingConfig.draws, help="resamples (default %(default)s)")
    several.add_argument(
        "--seed", type=int, default=EmbeddingConfig.seed, help="of the resamples (default %(default)s)"
    )
    find = commands.add_parser("search", help="the items nearest to words or to a picture")
    find.add_argument("words", nargs="?", help='such as "grey fabric sofa"')
    find.add_argument("--image", help="a picture to search with; with words: for what lies between the two")
    find.add_argument("--embeddings", default="data/embeddings/master.parquet", help="made by 4_embed.py")
    find.add_argument("--using", choices=("finetuned", "base"), default="finetuned", help="which model searches")
    find.add_argument("--top-k", type=int, default=10, help="results shown (default 10)")
    find.add_argument("--model", help="where that model is (default: where master.parquet says)")
    find.add_argument("--pretrained", help="its tag or weights file")
    parser.epilog = f"Without a command, embed is meant:\n\n{one.format_help()}"
    return parser


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in (*COMMANDS, "-h", "--help"):
        argv = ["embed", *argv]
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command == "search":
        if args.top_k < 1:
            parser.error(f"--top-k {args.top_k}: must be at least 1")
        return search(args)
    given = argparse.Namespace(**dataclasses.asdict(EmbeddingConfig()) | vars(args))  # pool has but two of the flags
    config = common.from_flags(EmbeddingConfig, given)
    common.keep_freed_memory()
    with common.memory_running_out("lower --batch-size"):
        return {"embed": embed, "report": report, "pool": pool}[args.command](args, config)


if __name__ == "__main__":
    sys.exit(main())
