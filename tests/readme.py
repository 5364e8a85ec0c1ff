"""The tables of README.md and docs/: made from the code and from what was measured, never typed.

    python tests/readme.py        rewrites each table whose source is there, and says which

A table stands between <!-- name --> and <!-- /name -->. `settings` comes from the scripts' dataclasses, `sections`
from their banners, `results` from data/report/report.json (make ablation), `bench` from bench.jsonl (make bench), `gpu`
from bench_gpu.jsonl (make bench-gpu), `growth` from growth.jsonl and docs/growth.svg with it (make growth), `memory`
from memory.md (make memory), `sweep` from data/sweep/sweep.json (make sweep).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import bench
import bench_gpu
import common
import growth

ROOT = Path(__file__).parents[1]
CONFIGS = {
    "1_clean.py": "CleaningConfig",
    "2_prepare.py": "PrepConfig",
    "3_train.py": "TrainingConfig",
    "4_embed.py": "EmbeddingConfig",
    "5_arena.py": "ArenaConfig",
}
SHOWN = {  # metrics of the results table
    "mrr": "MRR",
    "text_to_image_recall@1": "text->image recall@1",
    "image_to_text_recall@1": "image->text recall@1",
    "agreement@4_object_type": "type agreement@4",
}


def settings() -> str:
    """Every setting of every script."""
    rows = ["| script | flag | default | what it is |", "|---|---|---|---|"]
    for script, config in CONFIGS.items():
        for field in dataclasses.fields(getattr(importlib.import_module(script.removesuffix(".py")), config)):
            default = "" if field.default is None or field.default == "" else f"`{field.default}`"
            flag = "--" + field.name.replace("_", "-")
            rows.append(f"| `{script}` | `{flag}` | {default} | {field.metadata['help'].replace('|', '/')} |")
    return "\n".join(rows)


def sections() -> str:
    """The sections of every script, by their banners."""
    rows = ["| file | sections |", "|---|---|"]
    for script in ("common.py", *CONFIGS):
        banners = re.findall(r"^# -{50,}\n# (.+)$", (ROOT / script).read_text(encoding="utf-8"), re.MULTILINE)
        rows.append(f"| `{script}` | {'; '.join(re.split('[:.,;] ', banner)[0].rstrip('.') for banner in banners)} |")
    return "\n".join(rows)


def results(path: Path = ROOT / "data/report/report.json") -> str:
    """Every run of the report against zero-shot."""
    report = common.read_json(path)
    rows = [f"| run | {' | '.join(SHOWN.values())} | MRR gained [95% interval] | p |", "|---|" + "---|" * 6]
    base = " | ".join(f"{report['base']['metrics'][name]:.3f}" for name in SHOWN)
    rows.append(f"| `zero_shot` | {base} | | |")
    for run in report["runs"]:
        values = " | ".join(f"{run['metrics'][name]['value']:.3f}" for name in SHOWN)
        gain = run["metrics"]["mrr"]
        if run["name"] != "zero_shot":
            p = "< 0.001" if gain["p_holm"] < 0.001 else f"{gain['p_holm']:.3f}"
            gained = f"{gain['difference']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
            rows.append(f"| `{run['name']}` | {values} | {gained} | {p} |")
    told = [f"{report['items']} products of the test split; p after Holm's correction over every difference reported."]
    if judged := (report.get("queries") or {}).get("judged"):
        gains = [(run["name"], run["metrics"]["ndcg@10"]) for run in judged["runs"]]
        found = ";\n".join(
            f"`{name}` {gain['value']:.3f} ({gain['difference']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}])"
            for name, gain in gains
        )
        told += [f"What shoppers type, {judged['queries']} queries whose right answers nobody trained on, nDCG@10:"]
        told += [f"zero-shot {judged['base']['metrics']['ndcg@10']:.3f}; {found}."]
    return "\n".join([*rows, "", *told])


def swept(path: Path = ROOT / "data/sweep/sweep.json") -> str:
    """Every setting tried, each at the best found of those above it."""
    found = common.read_json(path)
    tried: dict[str, list[str]] = {}
    for facts in found["tries"]:
        name, mark = facts["axis"], "**" if facts["won"] else ""
        tried.setdefault(name, []).append(f"{mark}{facts['mrr']:.3f}{mark} at {facts[name]:g}")
    rows = ["| setting | validation MRR |", "|---|---|"]
    rows += [f"| `--{name.replace('_', '-')}` | {', '.join(values)} |" for name, values in tried.items()]
    own = "|".join(name.replace("_", "-") for name in tried)  # a flag that is a setting of the table is its own try's
    flags = re.sub(rf"--({own}) \S+ ?", "", " ".join(found["flags"])).strip()
    flags = f" with `{flags}`" if flags else ""
    told = f"`--epochs {found['epochs']}`{flags}; zero-shot has {found['tries'][0]['zero_shot_mrr']:.3f}."
    return "\n".join([*rows, "", told])


def measured_growth() -> str:
    """The growth table; draws docs/growth.svg beside it."""
    found = growth.newest()
    common.atomic_write(ROOT / "docs/growth.svg", growth.plot(found))
    return growth.markdown(found)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "results": ("README.md", results),
    "settings": ("docs/settings.md", settings),
    "sections": ("docs/architecture.md", sections),
    "bench": ("docs/performance.md", lambda: bench.markdown(bench.RESULTS)),
    "gpu": ("docs/performance.md", lambda: bench_gpu.markdown(bench_gpu.RESULTS)),
    "growth": ("docs/performance.md", measured_growth),
    "growth-500": ("docs/performance.md", lambda: growth.markdown(growth.newest(500))),
    "memory": ("docs/performance.md", lambda: (ROOT / "memory.md").read_text(encoding="utf-8").rstrip()),
    "sweep": ("docs/recipes.md", swept),
}


def block(name: str) -> re.Pattern:
    """What matches a table in a page: the marks and, as the only group, what stands between them."""
    return re.compile(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", re.DOTALL)


def build_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    build_parser().parse_args(argv)
    for name, (page, make) in TABLES.items():
        try:
            table = make()
        except (FileNotFoundError, common.Fail) as error:
            print(f"{name}: left as it is ({error})")
            continue
        text = (ROOT / page).read_text(encoding="utf-8")
        text = block(name).sub(lambda _, name=name, table=table: f"<!-- {name} -->\n{table}\n<!-- /{name} -->", text)
        common.atomic_write(ROOT / page, text)
        print(f"{name}: written to {page}")
    return common.DONE


if __name__ == "__main__":
    sys.exit(main())
