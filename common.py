"""What two or more of the five scripts share: settings, errors, whole files, storage, catalogues, images, prompts, shards.

Importing it costs little: torch, boto3 and Pillow are imported by the functions that need them.
Readers go top to bottom: settings -> errors and progress -> files -> storage -> catalogue -> images -> prompts -> shards.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# --------------------------------------------------------------------------------------------------------------------
# Settings: one dataclass a stage; the flags, the sidecars and the README's table are made from these.


def setting(default: Any, help: str, choices: tuple | None = None) -> Any:
    """A dataclass field whose metadata becomes a command-line flag."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass(frozen=True)
class CleaningConfig:
    """Stage 1."""

    model: str = setting("gpt-5-nano", "chat model that reads title and photo")


@dataclasses.dataclass(frozen=True)
class PrepConfig:
    """Stage 2."""

    seed: int = setting(42, "seed of the split and of the prompt templates")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Stage 3."""

    epochs: int = setting(5, "passes over the train split")


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """Stage 4."""

    batch_size: int = setting(128, "pictures encoded at once; lower it when memory runs out")


@dataclasses.dataclass(frozen=True)
class ArenaConfig:
    """Stage 5."""

    top_k: int = setting(4, "results shown in each row")


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Add one flag for each field of a settings dataclass: the name with dashes, its default, help and choices.

    A field of type bool becomes --name / --no-name; `X | None` takes an X and defaults to None.
    """
    types = {"int": int, "float": float, "str": str}
    for field in dataclasses.fields(config):
        flag = "--" + field.name.replace("_", "-")
        kind = str(field.type).replace(" ", "").removesuffix("|None")
        default = "" if field.default is None else f" (default {field.default})"
        help = (field.metadata["help"] + default).replace("%", "%%")
        if kind == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=help)
        else:
            choices = field.metadata["choices"]
            parser.add_argument(flag, type=types[kind], default=field.default, choices=choices, help=help)


def from_flags(config: type, args: argparse.Namespace) -> Any:
    """The settings dataclass filled from parsed arguments."""
    return config(**{field.name: getattr(args, field.name) for field in dataclasses.fields(config)})


# --------------------------------------------------------------------------------------------------------------------
# Errors and exits

DONE, FAILED, USAGE, UNFINISHED, INTERRUPTED = 0, 1, 2, 75, 130


class Fail(Exception):
    """An error that a person can act on: one line with what failed, the value, and what to do next."""

    def __init__(self, message: str, code: int = FAILED):
        super().__init__(message)
        self.code = code


def entry_point(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap a script's `main(argv=None) -> int`: expected errors become one line on stderr and an exit code.

    Ctrl-C and SIGTERM give 130, a full disk or a forbidden file one line and 1. A traceback is left for our own bugs.
    """

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        name = Path(sys.argv[0]).name
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            signal.signal(signal.SIGTERM, interrupt)
        try:
            return main(argv)
        except Fail as error:
            message, code = " ".join(str(error).split()), error.code
        except KeyboardInterrupt:
            message, code = "interrupted; run the same command again to go on", INTERRUPTED
        except BrokenPipeError:  # `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        except OSError as error:
            hints = {
                errno.ENOSPC: "free some space and run the same command again; nothing finished is lost",
                errno.EDQUOT: "the quota is used up; free some space and run the same command again",
                errno.EROFS: "the file system is read-only; choose another place",
                errno.EACCES: "check the permissions or choose another place",
                errno.EPERM: "check the permissions or choose another place",
            }
            if error.errno not in hints:
                raise
            message = f"{error.filename or 'writing'}: {error.strerror}; {hints[error.errno]}"
            code = FAILED
        print(f"{name}: {message}", file=sys.stderr, flush=True)
        return code

    return wrapped


# --------------------------------------------------------------------------------------------------------------------
# Progress


def progress(items: Iterable, what: str, total: int | None = None, unit: str = "row", every: float = 15.0) -> Iterator:
    """Yield the items, showing a tqdm bar on a terminal, or a plain line every 15 s in a log; a rate at the end."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, total=total, unit=unit, dynamic_ncols=True)
        return
    start = shown = time.monotonic()
    count = 0
    for item in items:
        yield item
        count += 1
        now = time.monotonic()
        if now - shown >= every:
            shown = now
            of = f"/{total}" if total else ""
            print(f"{what}: {count}{of} {unit}s, {count / (now - start):.1f} a second", file=sys.stderr, flush=True)
    seconds = max(time.monotonic() - start, 1e-9)
    line = f"{what}: {count} {unit}s in {seconds:.1f} s, {count / seconds:.1f} a second"
    print(line, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Digests and whole files


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, UTF-8: the same value gives the same bytes everywhere."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """sha256 (hex) of bytes, or of any other value's canonical JSON."""
    return hashlib.sha256(value if isinstance(value, bytes) else canonical(value)).hexdigest()


def file_digest(path: str | Path) -> str:
    """sha256 (hex) of a local file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on a clean exit it is flushed to disk and renamed, else removed.

    One name a target: what a killed process left behind is overwritten by the next one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, data: bytes | str) -> None:
    """Write a local file so that it is there whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON, whole."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path, what: str = "file") -> Any:
    """Read a local JSON file; Fail with its path where it is missing or torn."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Fail(f"{path}: no such {what}") from None
    except ValueError as error:
        raise Fail(f"{path}: not a readable {what} ({error}); remove it and run again") from None


@contextlib.contextmanager
def exclusive(path: str | Path) -> Iterator[bool]:
    """Hold a lock file while inside; gives False at once where another live process holds it (flock: death frees it)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, for sidecars and manifests."""
    from importlib.metadata import version

    return {"python": ".".join(map(str, sys.version_info[:3]))} | {package: version(package) for package in packages}


def write_sidecar(path: str | Path, settings: Any, counts: dict, inputs: dict, seconds: float, **more: Any) -> None:
    """Write what made an output: settings (dataclass or dict), versions, counts, input digests, seconds."""
    settings = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else settings
    facts = {"settings": settings, "counts": counts, "inputs": inputs, "seconds": round(seconds, 2)}
    write_json(path, facts | more)


# --------------------------------------------------------------------------------------------------------------------
# Storage: local paths and s3://bucket/key alike


def is_s3(path: str | Path) -> bool:
    """Whether the path is an S3 URL."""
    return str(path).startswith("s3://")


def join(base: str | Path, *parts: str) -> str:
    """A path below a local folder or an S3 prefix."""
    return "/".join([str(base).rstrip("/"), *parts]) if is_s3(base) else str(Path(base, *parts))


def open_read(path: str | Path, offset: int = 0, length: int | None = None) -> io.BufferedIOBase:
    """Open for reading from `offset`, at most `length` bytes (local: to the end of the file)."""
    handle = open(path, "rb")
    handle.seek(offset)
    return handle


def read_bytes(path: str | Path) -> bytes:
    """The whole content of a file or object."""
    with open_read(path) as handle:
        return handle.read()


def put_whole(path: str | Path, data: bytes | Path) -> None:
    """Store bytes, or a finished local file, so that `path` holds it whole or not at all."""
    if isinstance(data, Path):
        with whole_file(path) as temporary, open(data, "rb") as source, open(temporary, "wb") as target:
            import shutil

            shutil.copyfileobj(source, target, 1 << 20)
    else:
        write_whole(path, data)


def exists(path: str | Path) -> bool:
    """Whether a file or object is there."""
    return Path(path).is_file()


def list_files(prefix: str | Path) -> list[tuple[str, int]]:
    """(path relative to prefix, size in bytes) of every file below it, sorted; temporary files left out."""
    root = Path(prefix)
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
    return sorted((path.relative_to(root).as_posix(), path.stat().st_size) for path in files)


def remove(path: str | Path) -> None:
    """Delete a file or object if it is there."""
    Path(path).unlink(missing_ok=True)
