"""README.md and docs/ against the code: commands, targets, flags and settings are what it says."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

import readme
from readme import CONFIGS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]


def test_every_table_is_there_and_settings_and_sections_are_those_of_the_code():
    for name, (page, _) in readme.TABLES.items():
        assert readme.block(name).search((ROOT / page).read_text()), f"{page} has no place for the table of {name}"
    for name, made in (("settings", readme.settings()), ("sections", readme.sections())):
        assert readme.block(name).search(TEXT)[1] == made, "run: python tests/readme.py"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_every_make_target_in_the_pages_exists_and_every_target_is_there():
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^|&& )make ([a-z-]+)", TEXT, re.MULTILINE))
    assert named <= targets, named - targets
    assert targets - {"help"} <= named | set(re.findall(r"`([a-z-]+)`", TEXT)), "undocumented target"


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """Every flag of a parser and of its subcommands."""
    found = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(flags, action.choices.values()))
    return found


@pytest.mark.parametrize("script", CONFIGS)
def test_every_flag_in_the_pages_is_one_of_the_script(script):
    known = flags(importlib.import_module(script.removesuffix(".py")).build_parser())
    used = [line for line in COMMANDS if script in line]
    assert used, f"no page shows a command of {script}"
    for line in used:
        words = shlex.split(line.partition(script)[2], comments=True)
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / path).exists(), path


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14", "3.15"])
def test_every_package_is_pinned_once_for_each_python(version):
    """numpy, scipy, contourpy and PyYAML have other wheels for 3.15 than for the versions before."""
    from packaging.requirements import Requirement

    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    here = [one for one in wanted if one.marker is None or one.marker.evaluate({"python_version": version})]
    assert sorted({one.name for one in wanted}) == sorted(one.name for one in here)
    assert all(re.fullmatch(r"==[\w.]+", str(one.specifier)) for one in here)
    pins = {one.name: str(one.specifier) for one in here}
    assert (pins["numpy"], pins["scipy"]) == (("==2.5.5", "==1.18.1") if version == "3.15" else ("==2.4.6", "==1.17.1"))
