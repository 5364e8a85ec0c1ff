"""README.md against the code: commands, targets, flags and settings are what it says."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
CONFIGS = {
    "1_clean.py": common.CleaningConfig,
    "2_prepare.py": common.PrepConfig,
    "3_train.py": common.TrainingConfig,
    "4_embed.py": common.EmbeddingConfig,
    "5_arena.py": common.ArenaConfig,
}


def settings_table() -> str:
    """The README's settings, made from the dataclasses."""
    rows = ["| script | flag | default | what it is |", "|---|---|---|---|"]
    for script, config in CONFIGS.items():
        for field in dataclasses.fields(config):
            default = "" if field.default is None or field.default == "" else f"`{field.default}`"
            flag = "--" + field.name.replace("_", "-")
            rows.append(f"| `{script}` | `{flag}` | {default} | {field.metadata['help'].replace('|', '/')} |")
    return "\n".join(rows)


def test_the_settings_table_is_made_from_the_code():
    between = re.search(r"<!-- settings -->\n(.*?)\n<!-- /settings -->", README, re.DOTALL)
    assert between and between[1].strip() == settings_table(), "paste the output of: python tests/test_readme.py"


def test_every_make_target_in_the_readme_exists_and_every_target_is_there():
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^|&& )make ([a-z-]+)", README, re.MULTILINE))
    assert named <= targets, named - targets
    assert targets - {"help"} <= named | set(re.findall(r"`([a-z-]+)`", README)), "undocumented target"


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """Every flag of a parser and of its subcommands."""
    found = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(flags, action.choices.values()))
    return found


@pytest.mark.parametrize("script", CONFIGS)
def test_every_flag_in_the_readme_is_one_of_the_script(script):
    known = flags(importlib.import_module(script.removesuffix(".py")).build_parser())
    used = [line for line in COMMANDS if script in line]
    assert used, f"the README shows no command of {script}"
    for line in used:
        words = shlex.split(line.partition(script)[2], comments=True)
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, line


def test_every_file_the_readme_names_is_there():
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / path).exists(), path


if __name__ == "__main__":
    print(settings_table())
