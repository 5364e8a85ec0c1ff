"""Stage 1 with `kill -9` at the N-th line that the project's own code runs in a phase; 0 lets it live.

A run that lives prints `lines {"prepare": 512, ...}`: how many lines the first call of each phase took.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

clean = importlib.import_module("1_clean")
PHASES = {
    "prepare": (clean.BatchRunner, "make_plan"),
    "send": (clean.BatchRunner, "send"),  # upload, intent, create
    "download": (clean.BatchRunner, "collect"),
    "store": (clean.BatchRunner, "store"),
    "close": (clean.BatchRunner, "close_batch"),
    "again": (clean.BatchRunner, "plan_again"),
    "finalize": (clean, "write_outputs"),
}


def watch(phase: str, last: int, lines: collections.Counter) -> None:
    """Count the lines of a phase and die at the last."""
    owner, name = PHASES[phase]
    true, calls = getattr(owner, name), collections.Counter()

    def trace(frame, event, arg):
        if not frame.f_code.co_filename.startswith(str(ROOT)) or ".venv" in frame.f_code.co_filename:
            return None
        lines[phase] += event == "line" and calls[phase] == 1
        calls["all"] += event == "line"
        if calls["all"] == last > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced(*arguments, **named):
        calls[phase] += 1
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            return true(*arguments, **named)
        finally:
            sys.settrace(before)

    setattr(owner, name, traced)


def run(phase: str, last: int, arguments: list[str], environment: dict[str, str], output: Path) -> None:
    """The command line in a process of its own, which prints into `output`."""
    os.environ.update(environment)
    clean.SETTLE = 0.0
    clean.PILOT_SOUND = 0.3  # the test has many rows that are refused
    clean.BLOCK = 2  # so that a killed `prepare` leaves a request file half written
    with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        counted = collections.Counter()
        for name in PHASES if last == 0 else [phase]:
            watch(name, last, counted)
        code = clean.main(arguments)
        print("lines", json.dumps(counted))
    sys.exit(code)
