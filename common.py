"""What two or more of the five scripts share, in sections: errors and exits, settings, progress, files, S3, shards,
tables, metadata and prompts, photos, processes, CLIP, master.parquet, search, statistics.

Importing it costs little: numpy, pandas, Pillow, boto3 and torch are imported by the functions that need them.
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
import html
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import types
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

# --------------------------------------------------------------------------------------------------------------------
# Errors and exits

DONE, FAILED, USAGE, UNFINISHED, INTERRUPTED = 0, 1, 2, 75, 130
SYSTEM_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space and run the same command again; nothing is lost"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check the permissions or choose another place"),
    errno.EFBIG: "raise the limit (ulimit -f) and run the same command again",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another place",
    errno.EISDIR: "a folder stands where a file is needed; choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit (ulimit -n) or lower --workers, and run again"),
    errno.EIO: "check the disk and its cable or network, then run the same command again",
    errno.ESTALE: "mount the network disk anew and run the same command again",
}


class Fail(Exception):
    """An error that a person can act on: one line with what failed, the value, and what to do next."""

    def __init__(self, message: str, code: int = FAILED):
        super().__init__(message)
        self.code = code


def entry_point(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap a script's `main(argv=None) -> int`: expected errors become one line on stderr and an exit code.

    Ctrl-C and SIGTERM give 130, a full disk or a forbidden file one line and 1. A traceback is left for our own bugs.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        encodings = {sys.getfilesystemencoding(), (getattr(sys.stdout, "encoding", None) or "utf-8").lower()}
        if argv is None and encodings != {"utf-8"} and os.environ.get("PYTHONUTF8") != "1":
            os.environ |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}  # shops' file names are UTF-8
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return main(argv)
        except Fail as error:
            message, code = " ".join(str(error).split()), error.code
        except KeyboardInterrupt:
            message, code = "interrupted; run the same command again to go on", INTERRUPTED
        except BrokenPipeError:  # `... | head`: the work was cut off, with nobody left to tell
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            return INTERRUPTED
        except Exception as error:
            message, code = _system_error(error), FAILED
            if message is None:
                raise
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
        return code

    return wrapped


def _system_error(error: Exception) -> str | None:
    """One line where the file system or SQLite refused something; None for any other error."""
    number, text = getattr(error, "errno", None), " ".join(str(error).split())
    if match := re.search(r"\(os error (\d+)\)", text):  # safetensors
        number = int(match[1])
    elif number is None and re.search(r"disk is full|requested and \d+ written", text):  # SQLite, NumPy
        number = errno.ENOSPC
    if number in SYSTEM_ERRORS:
        return f"{getattr(error, 'filename', None) or 'writing'}: {os.strerror(number)}; {SYSTEM_ERRORS[number]}"
    known = re.search("readonly|unable to open|disk I/O|malformed|not a database|unsupported file", text)
    if known and type(error).__module__ == "sqlite3":
        return f"SQLite: {text}; check the disk, its permissions and free space, then run the same command again"
    return None


@contextlib.contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Turn what Python and torch (whose OutOfMemoryError is a RuntimeError) raise then into one line with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = re.search("out of memory|not enough memory|can't allocate memory", str(error))
        if isinstance(error, RuntimeError) and not known:
            raise
        raise Fail(f"out of memory; {remedy}") from None


# --------------------------------------------------------------------------------------------------------------------
# Settings: one dataclass a script; flags, sidecars and docs/settings.md are made from it


def setting(default: Any, help: str, choices: tuple | None = None, low: float = -math.inf, high: float = math.inf):
    """A dataclass field whose metadata becomes a command-line flag, of numbers from `low` to `high`."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "bounds": (low, high)})


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Add one flag for each field of a settings dataclass: the name with dashes, its default, help and choices.

    A field of type bool becomes --name / --no-name; `X | None` takes an X and defaults to None; `int | str` takes a
    number or "auto".
    """
    for field in dataclasses.fields(config):
        kind = str(field.type).replace(" ", "").removesuffix("|None")
        help = field.metadata["help"] + ("" if field.default is None else f" (default {field.default})")
        options: dict[str, Any] = {"default": field.default, "help": help.replace("%", "%%")}
        if kind == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            types = {"int": int, "float": float, "str": str, "int|str": _or_auto(int), "float|str": _or_auto(float)}
            options |= {"type": types[kind], "choices": field.metadata["choices"]}
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def _or_auto(kind: type) -> Callable[[str], Any]:
    """What reads a flag's text as a number of this kind, or as "auto"; argparse shows its name."""

    def read(text: str) -> Any:
        return text if text == "auto" else kind(text)

    read.__name__ = "number or auto"
    return read


def from_flags(config: type, args: argparse.Namespace) -> Any:
    """The settings dataclass filled from parsed arguments. Raises Fail for a number out of its bounds."""
    for field in dataclasses.fields(config):
        value, (low, high) = getattr(args, field.name), field.metadata["bounds"]
        if isinstance(value, int | float) and not low <= value <= high:
            bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:.9g}"
            raise Fail(f"--{field.name.replace('_', '-')} {value}: must be {bounds}", USAGE)
    return config(**{field.name: getattr(args, field.name) for field in dataclasses.fields(config)})


# --------------------------------------------------------------------------------------------------------------------
# Progress and memory


def progress(items: Iterable, what: str, total: int | None = None, unit: str = "row") -> Iterator:
    """Yield the items, showing a tqdm bar on a terminal, or a plain line every 15 s in a log; a rate at the end."""
    if sys.stderr and sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, total=total, unit=unit, dynamic_ncols=True)
        return
    start = shown = time.monotonic()
    count, units, of = 0, f"{unit}{'es' if unit.endswith('ch') else 's'}", f"/{total}" if total else ""
    for item in items:
        yield item
        count += 1
        if (now := time.monotonic()) - shown >= 15:
            shown = now
            print(f"{what}: {count}{of} {units}, {count / (now - start):.1f} a second", file=sys.stderr, flush=True)
    seconds = max(time.monotonic() - start, 1e-9)
    print(f"{what}: {count} {units} in {seconds:.1f} s, {count / seconds:.1f} a second", file=sys.stderr, flush=True)


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees for its next array; with another C library nothing is done.

    Else the kernel clears each page again, which takes a tenth of a training step and a third of scaling a photo.
    """
    import ctypes

    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 27)  # M_MMAP_THRESHOLD: only what is larger is given back at once
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def batches(items: Iterable, size: int) -> Iterator[list]:
    """The items in lists of `size`, the last one shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


# --------------------------------------------------------------------------------------------------------------------
# Files: digests, atomic writes, locks, sidecars


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
def atomic_file(path: str | Path) -> Iterator[Path]:
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


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give an empty temporary folder beside `path`; on a clean exit it takes the place of `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a local file so that it is there whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path, what: str = "file") -> Any:
    """Read a local JSON file; Fail with its path where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Fail(f"{path}: no such {what}") from None
    except (ValueError, RecursionError) as error:
        raise Fail(f"{path}: not a readable {what} ({error}); remove it and run again") from None


@contextlib.contextmanager
def exclusive(path: str | Path) -> Iterator[bool]:
    """Hold a lock file while inside; gives False at once where a live process holds it (flock: death frees it)."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
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
# S3: whole objects by boto3's transfer manager

S3_ATTEMPTS = 16  # of one request, with growing, jittered pauses in between: half a minute
S3_FIRST_ATTEMPTS = 4  # of reaching an endpoint that has not answered yet: it is likelier mistyped than down
S3_BUSY = {408, 425, 429, 500, 502, 503, 504}  # HTTP answers that may be another one a moment later
S3_HINTS = {
    403: "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy",
    404: "check bucket and key, or make it first",
}
_s3_answered: set[int] = set()  # processes that an S3 endpoint has answered


def is_s3(path: str | Path) -> bool:
    """Whether the path is an S3 URL."""
    return str(path).startswith("s3://")


def join(base: str | Path, *parts: str) -> str:
    """A path below a local folder or an S3 prefix."""
    return "/".join([str(base).rstrip("/"), *parts]) if is_s3(base) else str(Path(base, *parts))


def _s3_pause(attempts: int, response: tuple | None = None, **_) -> float | None:
    """The retry rule, as botocore asks for it: seconds to wait before the next attempt, or None for no more."""
    if response is not None:
        _s3_answered.add(os.getpid())
        if response[0].status_code not in S3_BUSY:
            return None
    if attempts >= (S3_ATTEMPTS if os.getpid() in _s3_answered else S3_FIRST_ATTEMPTS):
        return None
    return min(5.0, 0.1 * 2 ** (attempts - 1)) * random.random()


@functools.lru_cache(maxsize=1)
def _s3_client(pid: int) -> Any:
    """One boto3 client a process: a forked one must not share its parent's connections."""
    import boto3
    from botocore.config import Config
    from dotenv import load_dotenv

    load_dotenv(".env")  # keys and endpoint, where the environment has none
    once = {"total_max_attempts": 1}  # boto's own retries stop for good once their quota is used up
    config = Config(retries=once, connect_timeout=10, read_timeout=20, max_pool_connections=32)
    client = boto3.session.Session().client("s3", config=config)
    client.meta.events.register_first("needs-retry.s3", _s3_pause)
    # Do not wait for "100 Continue": botocore reads for ever when the connection is cut there.
    client.meta.events.register_last(
        "before-call.s3", lambda params, **_: params["headers"].pop("Expect", None) and None
    )
    return client


def s3_call(path: str, act: Callable[[Any, str, str], Any]) -> Any:
    """act(client, bucket, key); again where an answer was cut. A refusal becomes Fail with the URL and the cause."""
    import boto3.exceptions as transfers
    import botocore.exceptions as failures
    from botocore.parsers import ResponseParserError

    bucket, _, key = path.removeprefix("s3:").lstrip("/").partition("/")
    if not bucket:
        raise Fail(f"{path}: names no bucket; write s3://bucket/prefix", USAGE)
    misused = (failures.NoCredentialsError, failures.PartialCredentialsError, failures.NoRegionError,
               failures.ProfileNotFound, failures.ParamValidationError, ValueError)  # fmt: skip
    for attempt in range(1, S3_ATTEMPTS + 1):
        try:
            return act(_s3_client(os.getpid()), bucket, key)
        except (failures.ClientError, transfers.S3UploadFailedError) as error:
            answer = getattr(error, "response", None) or getattr(error.__context__, "response", {})
            status, code = answer.get("ResponseMetadata", {}).get("HTTPStatusCode"), answer.get("Error", {}).get("Code")
            cause = f"S3 answers {status} {code}; {S3_HINTS.get(status, 'see the AWS_ variables and the bucket')}"
            if status and status not in S3_BUSY and code != "NoSuchUpload":  # that: completed, but its answer was lost
                raise Fail(f"{path}: {cause}") from None
        except misused as error:
            hint = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the other AWS_ variables"
            raise Fail(f"{path}: {' '.join(str(error).split())[:200]}; {hint}") from None
        except (failures.BotoCoreError, transfers.Boto3Error, ResponseParserError, OSError, KeyError) as error:
            if getattr(error, "errno", None) in SYSTEM_ERRORS:  # of this machine's disk
                raise
            cause = f"{type(error).__name__}: {error}"  # KeyError: headers that were cut lack a field
            if os.getpid() not in _s3_answered:
                break
        time.sleep(_s3_pause(attempt) or 0)
    cause = re.sub(r"//[^/@ ]*@", "//", " ".join(cause.split()))  # without the endpoint's password
    raise Fail(f"{path}: cannot be reached ({cause[:160]}); check AWS_ENDPOINT_URL and run again")


def download(path: str, open_target: Callable[[], Any]) -> Any:
    """Copy one S3 object into the stream that open_target() gives, and return it; again where a connection broke."""

    def act(client, bucket: str, key: str) -> Any:
        # Not by the transfer manager, which takes a part whose headers were cut for whole and leaves a hole.
        answer, target = client.get_object(Bucket=bucket, Key=key), open_target()
        for block in answer["Body"].iter_chunks(1 << 20):
            target.write(block)
        if target.tell() != answer["ContentLength"]:
            raise OSError("the answer was cut")
        return target

    return s3_call(path, act)


def download_atomic(path: str, target: str | Path) -> None:
    """Copy one S3 object to a local file, which is there whole or not at all."""
    with atomic_file(target) as temporary:
        download(path, lambda: open(temporary, "wb")).close()


def read_bytes(path: str | Path) -> bytes:
    """The whole content of a file or object. Raises FileNotFoundError for a missing local file, Fail for an object."""
    return download(str(path), io.BytesIO).getvalue() if is_s3(path) else Path(path).read_bytes()


def upload_atomic(source: bytes | Path, path: str | Path) -> None:
    """Store bytes, or a finished local file, so that `path` (local or S3) holds it whole or not at all."""
    if not is_s3(path):
        return atomic_write(path, source if isinstance(source, bytes) else source.read_bytes())

    def act(client, bucket: str, key: str) -> None:
        from boto3.s3.transfer import TransferConfig

        parts = TransferConfig(16 << 20, multipart_chunksize=16 << 20)
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
            client.upload_fileobj(stream, bucket, key, Config=parts)

    s3_call(str(path), act)


def remove(path: str | Path) -> None:
    """Delete a file or object if it is there."""
    if is_s3(path):
        s3_call(str(path), lambda client, bucket, key: client.delete_object(Bucket=bucket, Key=key))
    else:
        Path(path).unlink(missing_ok=True)


def list_files(prefix: str | Path) -> list[tuple[str, int]]:
    """(path relative to prefix, size in bytes) of every file below it, sorted; "" where it is an object itself."""
    if not is_s3(prefix):
        files = (path for path in Path(prefix).rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
        return sorted((path.relative_to(prefix).as_posix(), path.stat().st_size) for path in files)

    def act(client, bucket: str, key: str) -> list[tuple[str, int]]:
        found = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        objects = [(one["Key"], one["Size"]) for page in found if page["Name"] for one in page.get("Contents", [])]
        below = [(name[len(key) :], size) for name, size in objects if not key or name[len(key) :][:1] in ("", "/")]
        return sorted((name.removeprefix("/"), size) for name, size in below)

    return s3_call(str(prefix).rstrip("/"), act)


def exists(path: str | Path) -> bool:
    """Whether a file or object is there."""
    return any(name == "" for name, _ in list_files(path)) if is_s3(path) else Path(path).is_file()


# --------------------------------------------------------------------------------------------------------------------
# Shards: the manifest of stage 2, and local copies of what lies on S3

SPLITS = ("train", "validation", "test")


def load_manifest(shards: str | Path) -> dict[str, Any]:
    """manifest.json of a shard folder; Fail says how to make one."""
    path = join(shards, "manifest.json")
    try:
        manifest = json.loads(read_bytes(path))
        for split in [manifest["splits"]["train"], *manifest["splits"].values()]:
            for shard in split["shards"]:  # name and digest become paths
                sound = re.fullmatch(r"\w+/[\w-]+\.tar [0-9a-f]{64}", f"{shard['name']} {shard['sha256']}")
                if not sound or not all(type(shard[key]) is int and shard[key] >= 0 for key in ("samples", "bytes")):
                    raise ValueError(f"a shard is {str(shard)[:60]}")
    except FileNotFoundError:
        raise Fail(f"{path}: no such manifest; run 2_prepare.py first, or check --shards") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Fail(f"{path}: not a manifest of shards ({error}); run 2_prepare.py again") from None
    return manifest


def local_shards(shards: str | Path, entries: list[dict[str, Any]], cache: Path, cache_gb: float) -> list[Path]:
    """Local paths of these manifest entries; what lies on S3 is copied to `cache` first, once, by its digest.

    Raises Fail for a missing shard, and where the copies would need more than `cache_gb`.
    """
    from concurrent.futures import ThreadPoolExecutor

    def fetch(entry: dict[str, Any]) -> Path:
        path = join(shards, entry["name"])
        target = cache / f"{entry['sha256']}.tar" if is_s3(path) else Path(path)
        if is_s3(path) and not (target.is_file() and target.stat().st_size == entry["bytes"]):
            download_atomic(path, target)
        if not target.is_file():
            raise Fail(f"{path}: missing shard; run 2_prepare.py again, or copy the folder again, whole")
        return target

    size = sum({entry["sha256"]: entry["bytes"] for entry in entries}.values()) / 1e9
    if is_s3(shards) and size > cache_gb:
        raise Fail(f"{shards}: {size:.1f} GB of shards are more than --cache-gb {cache_gb:g}; raise it, or use fewer")
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(fetch, entries))


# --------------------------------------------------------------------------------------------------------------------
# Tables of ours: cleaned.csv, queries, a probe. CSV in UTF-8; what shops export is read by 1_clean.py

REQUIRED_COLUMNS = ("id", "name", "image_path")
FURTHER = "further_photos"  # column: JSON list of a product's photos after the first
SAME_PHOTO = 5  # products that may share a photo; above it shows none of them


def read_table(path: str | Path, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Any:
    """DataFrame of str of a CSV, its index the row number from 1; absent values are "", and blank lines no rows.

    The required columns must stand there once, the optional ones at most, in any case of letters; else Fail.
    """
    import pandas as pd

    csv.field_size_limit(1 << 24)
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            first = handle.readline()
            handle.seek(0)
            headers = {d: next(csv.reader([first], delimiter=d), []) for d in ",;\t|"}
            fits = (d for d, names in headers.items() if {*required} <= {name.strip().lower() for name in names})
            delimiter = next(fits, ",")
            header, *records = [*csv.reader(handle, delimiter=delimiter, strict=True)] or [[]]
    except (FileNotFoundError, IsADirectoryError):
        raise Fail(f"{path}: no such CSV; check the path", USAGE) from None
    except (csv.Error, UnicodeError) as error:
        raise Fail(f"{path}: not a readable CSV ({error}); mend it, or export it again as UTF-8") from None
    header = [name.strip() for name in header]
    other_case = {*required, *optional} - {*header}
    header = [name.lower() if name.lower() in other_case else name for name in header]
    missing = [name for name in required if name not in header]
    if wrong := missing + [name for name in (*required, *optional) if header.count(name) > 1]:
        shown = ", ".join(header)[:200] or "nothing"
        raise Fail(f"{path}: needs one column {' and one '.join(wrong)}; the header has {shown}", USAGE)
    found = {number: record for number, record in enumerate(records, 1) if record}
    for number, record in found.items():
        if len(record) > len(header):
            raise Fail(f"{path}: row {number} has more fields than the header; quote what holds a '{delimiter}'")
        record += [""] * (len(header) - len(record))
    return pd.DataFrame(list(found.values()), columns=header, index=list(found), dtype="str")


def read_catalogue(paths: list[str | Path]) -> tuple[Any, Any]:
    """(rows of cleaned CSVs, index: row number from 1 over all files; reasons, as row_reasons gives them)."""
    import pandas as pd

    tables = [read_table(path, REQUIRED_COLUMNS) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if not table.columns.is_unique:
            name = table.columns[table.columns.duplicated()][0]
            raise Fail(f"{path}: two columns are called {name}; rename one of them", USAGE)
    rows = pd.concat(tables, ignore_index=True).fillna("")
    rows.index += 1
    return rows, row_reasons(rows)


def row_reasons(rows, surplus: Iterable[int] = ()) -> Any:
    """Series of str: "" for a usable row, else why it cannot be used. `surplus`: rows with too many fields.

    Of the rows of one id the first usable one counts, and the others are duplicates; see products.
    """
    import pandas as pd

    reasons = pd.Series("", index=rows.index, dtype="str")
    reasons[rows["image_path"].str.strip() == ""] = "missing image_path"
    reasons[rows.index.isin(surplus)] = "too many fields"
    reasons[rows["id"].str.strip() == ""] = "missing id"
    again = rows.loc[reasons == "", "id"].duplicated()
    reasons[again.index[again]] = "duplicate id"
    return reasons


def products(rows, reasons) -> Iterator[tuple[str, list[tuple[int, str, list[str]]]]]:
    """(id, the rows that may stand for it: number, name, photos). The first whose photo is usable counts."""

    def read(some) -> Iterator[tuple[str, tuple]]:
        columns = (some.index, *(some[name] for name in REQUIRED_COLUMNS), some.get(FURTHER, itertools.repeat("")))
        for number, id, name, photo, more in zip(*columns, strict=False):
            try:
                others = json.loads(more) if more.strip() else []
            except (ValueError, RecursionError):
                others = more
            others = map(str, others) if isinstance(others, list) else [more]
            yield id, (number, name, list(filter(None, map(str.strip, (photo, *others)))))

    again: dict[str, list[tuple]] = {}
    for id, one in read(rows[reasons == "duplicate id"]):
        again.setdefault(id, []).append(one)
    for id, one in read(rows[reasons == ""]):
        yield id, [one, *again.get(id, ())]


def csv_writer(handle: Any) -> Any:
    """A csv.writer whose rows end in a newline alone.

    Told to end them so itself, it would leave a lone carriage return in a value unquoted, which readers take for a row.
    """
    return csv.writer(types.SimpleNamespace(write=lambda row: handle.write(row.removesuffix("\r\n") + "\n")))


def images_folder(images: str | None, inputs: list[str]) -> Path:
    """The folder that image_path is relative to: --images, else the folder of the first CSV. Fails if not there."""
    folder = Path(images) if images else Path(inputs[0]).parent
    if not folder.is_dir():
        raise Fail(f"{folder}: no such images folder; set --images to the folder that image_path is relative to", USAGE)
    folder = folder.resolve()
    if re.search("[\ud800-\udfff]", str(folder)):  # as Python reads what is not UTF-8
        raise Fail(f"{str(folder)!a}: this images folder's name is not UTF-8; rename the folder", USAGE)
    return folder


MADE_UP = "made up"  # in the column source: nobody typed it


def read_queries(path: str | Path, ids: Iterable[str] | None = None) -> tuple[Any, dict[str, int]]:
    """What people type, from a CSV with the columns query and id, and grade or weight where answers differ in worth.

    Returns (rows: DataFrame of query, id, gain: float64 > 0, made_up: bool; {reason: rows that are left out}). A row is
    one right answer to a query; upper and lower case make no other query. ids: of the catalogue (None: not checked).
    Raises Fail for a file without such columns, for a grade that is no number of at least 0, and where no row is left.
    """
    import pandas as pd

    rows = read_table(path, ("query", "id"), ("grade", "weight", "source"))
    rows = rows[(rows != "").any(axis=1)]  # spreadsheets write a line of commas for an empty one
    worth = [name for name in ("grade", "weight") if name in rows]
    if len(worth) > 1:
        raise Fail(f"{path}: has a column grade and a column weight; keep the one that is meant", USAGE)
    gain = pd.to_numeric(rows[worth[0]].str.strip(), errors="coerce") if worth else pd.Series(1.0, index=rows.index)
    if len(wrong := rows.index[~(gain >= 0) | (gain == math.inf)]):
        value = rows.at[wrong[0], worth[0]]
        raise Fail(f"{path}: row {wrong[0]}: {worth[0]} '{value}' is no number of at least 0; mend that row")
    texts, source = rows["query"].str.split().str.join(" "), rows.get("source", "")
    rows = pd.DataFrame({"query": texts, "id": rows["id"], "gain": gain.astype(float), "made_up": source == MADE_UP})
    reasons = pd.Series("", index=rows.index, dtype="str")
    if ids is not None:
        reasons[~rows["id"].isin(list(ids))] = "product not in the catalogue"
    reasons[rows["gain"] == 0] = f"{worth[0] if worth else 'grade'} 0"
    again = rows.assign(query=texts.str.lower())[rows["gain"] > 0].duplicated(["query", "id"])
    reasons[again.index[again]] = "duplicate"
    reasons[rows["id"].str.strip() == ""] = "no id"
    reasons[texts == ""] = "empty query"
    counts = {reason: int(count) for reason, count in reasons[reasons != ""].value_counts().items()}
    if (reasons != "").all():
        found = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "no rows"
        raise Fail(f"{path}: no query with a right answer is left ({found}); its ids must be those of the catalogue")
    return rows[reasons == ""].reset_index(drop=True), counts


# --------------------------------------------------------------------------------------------------------------------
# Metadata and prompts

# A new one: also its line in 1_clean.py's PROMPT and, if prompts are to show it, its place in DETAILS
ATTRIBUTES = ("style", "material", "color", "object_type")
DETAILS = ("color", "style", "material")  # those that prompts put before the title, in this order
SYNONYMS = {  # of attributes, and of single words of titles
    "gray": "grey", "light gray": "light grey", "dark gray": "dark grey", "couch": "sofa", "settee": "sofa",
    "bookshelf": "bookcase", "book shelf": "bookcase", "armoire": "wardrobe", "closet": "wardrobe",
    "night stand": "nightstand", "bedside table": "nightstand", "mid century": "mid-century",
    "mid-century modern": "mid-century", "midcentury": "mid-century", "scandi": "scandinavian",
    "nordic": "scandinavian", "wooden": "wood", "metallic": "metal",
    "multicolour": "multicolor", "multi-color": "multicolor", "colour": "color",
}  # fmt: skip
UNKNOWN = {"", "unknown", "n/a", "na", "none", "null", "nan", "-", "other", "various"}
TEMPLATES = ("{subject}", "a photo of {article} {subject}", "{title}, {details}", "{article} {subject} for the home")


@functools.lru_cache(4096)  # a catalogue has few
def normalise_attribute(value: str) -> str:
    """An attribute in its one spelling: lower case, single spaces, synonyms made one; "" where it says nothing."""
    value = " ".join(value.lower().replace("_", " ").split()).strip(" .,;")
    value = " ".join(SYNONYMS.get(word, word) for word in SYNONYMS.get(value, value).split())
    return "" if value in UNKNOWN else value


def plain_text(text: str) -> str:
    """A title without HTML tags, entities and control characters, in single spaces."""
    for _ in range(2 if "&" in text else 0):  # "&amp;quot;" is an entity twice
        text = re.sub(
            r"&(#\d{1,9}|#[xX][0-9a-fA-F]{1,9}|[a-zA-Z]\w{0,40});", lambda match: html.unescape(match[0]), text
        )
    if "<" in text:  # no longer than 2,000: what never ends would be looked for from each beginning on
        tags = r"<(script|style)\b.{0,2000}?</\1>|</?[a-zA-Z][^<>]*>|<!--.{0,2000}?-->"
        text = re.sub(tags, " ", text, flags=re.S | re.I)
    return " ".join(re.sub(r"[\0-\x1f\x7f-\x9f\u200b\ufeff]", " ", text).split())


def clean_metadata(fields: dict[str, str]) -> dict[str, str]:
    """Title and attributes of a cleaned row; the title falls back to the shop's name."""
    title = plain_text(fields.get("clean_title") or fields.get("name") or "")
    title = " ".join(SYNONYMS.get(word.lower(), word) for word in title.split())
    return {"title": title} | {name: normalise_attribute(fields.get(name) or "") for name in ATTRIBUTES}


def prompts(meta: dict[str, str]) -> list[str]:
    """Every template filled for one item, without repeats; only attributes that the title lacks are added."""
    title = meta["title"].lower()
    words = f" {title} ".replace(",", " ")
    kind = meta["object_type"] if meta["object_type"] and f" {meta['object_type']} " not in words else ""
    title = " ".join(filter(None, (title, kind))) or "product"
    details = [v for v in map(meta.get, DETAILS) if v and f" {v} " not in words]
    subject = " ".join([*details, title])
    names = {"subject": subject, "title": title, "details": " ".join(details)}
    names["article"] = "an" if subject[:1] in "aeiou" else "a"
    return list(dict.fromkeys(t.format(**names) for t in TEMPLATES if details or "{details}" not in t))


def pick_prompt(meta: dict[str, str], id: str, seed: int, epoch: int = 0) -> str:
    """One prompt of an item: stage 2's choice, and in each epoch of stage 3 the next one, so that each has its turn."""
    filled = prompts(meta)
    return filled[(int(digest([seed, "prompt", id])[:8], 16) + epoch) % len(filled)]


# --------------------------------------------------------------------------------------------------------------------
# Photos: one way to find, load and letterbox them, and one pool of processes that does it

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]  # JPEG brings phones' MPO along
MIN_SIDE = 8  # pixels: less is a tracking pixel or a spacer
MAX_PIXELS = 64_000_000  # 192 MB as RGB; a header that announces more is refused before anything is decoded


class BadImage(Exception):
    """A picture that cannot be used; `reason` is a short fixed phrase to count by, `detail` the particulars."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)  # as arguments: so worker processes can send it back
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


# A photo that stage 1 fetched: WORKSPACE.photos/ and the sha256 of its URL
FETCHED = re.compile(r"(?:.*/)?([^/]+\.photos/[0-9a-f]{64})")


def is_url(name: str) -> bool:
    return re.match(r"\s*https?://", name, re.IGNORECASE) is not None


def resolve_image(folder: Path, image_path: str) -> Path:
    """The file that a row names, links followed; `folder` is resolved already. Raises BadImage.

    A photo that was fetched may lie elsewhere: its name cannot be that of another file.
    Where none has this very name: without a leading slash, without ?query and #fragment, with %20 and the like decoded,
    and in another case or composition (NFC, NFD) of letters, if exactly one file can be meant.
    """
    written = image_path.strip().replace("\\", "/")
    if is_url(written):
        raise BadImage("missing file", f"{image_path}: not fetched; 1_clean.py does that")
    if ".photos/" in written and (name := FETCHED.fullmatch(written)):
        for place in (folder / written, folder / name[1], folder.parent / name[1]):
            if FETCHED.fullmatch(real := os.path.realpath(place)) and os.path.isfile(real):
                return Path(real)
    try:
        return _file_below(folder, written)
    except BadImage as error:
        reason = error.reason
    forms = dict.fromkeys((written, written.lstrip("/")))
    forms |= {re.split("[?#]", one)[0]: None for one in forms}
    forms |= {unquote(one): None for one in forms}
    found = {path for one in filter(None, forms) for path in _alike(folder, one)}
    if len(found) == 1:
        return _file_below(folder, found.pop())
    tried = f"; tried too: {', '.join(list(forms)[1:])}" if len(forms) > 1 else ""
    if found:
        tried = f"; {len(found)} files differ in case or accents only"
    raise BadImage(reason, f"{image_path}{tried}")


def _file_below(folder: Path, written: str) -> Path:
    """The file of this very name below the folder, links followed. Raises BadImage."""
    try:
        path = os.path.realpath(os.path.join(folder, written))
    except (ValueError, OSError) as error:  # NUL in the name, too long
        raise BadImage("missing file", str(error)) from None
    if not path.startswith(os.path.join(folder, "")):
        raise BadImage("outside the images folder", written)
    if not os.path.isfile(path):
        raise BadImage("missing file", written)
    return Path(path)


def _same_letters(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@functools.lru_cache(64)
def _listing(folder: str) -> dict[str, list[str]]:
    """The paths in a folder by the letters of their names."""
    paths: dict[str, list[str]] = {}
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(folder)):
            paths.setdefault(_same_letters(name), []).append(os.path.join(folder, name))
    return paths


def _alike(folder: Path, written: str) -> list[str]:
    """Paths of files below the folder whose parts have the letters of `written`."""
    found = [str(folder)] if not written.startswith("/") and ".." not in written.split("/") else []
    for part in filter(None, written.split("/")):
        exact = [path for above in found if os.path.exists(path := os.path.join(above, part))]
        found = exact or [path for above in found for path in _listing(above).get(_same_letters(part), ())]
    return [path for path in found if os.path.isfile(path)]


@functools.lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str):
    """The transform from an embedded profile to sRGB, or None where it is sRGB already or cannot be used."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # a broken profile is no reason to lose the picture
        return None


def _to_rgb(image):
    """A decoded picture as RGB in sRGB, laid on white where it is transparent."""
    import numpy as np
    from PIL import Image, ImageCms

    if image.mode.startswith("I"):  # 16-bit grey
        wide = np.asarray(image).astype(np.int64)
        if image.mode != "I" or wide.max(initial=0) > 255:
            wide >>= 8
        image = Image.fromarray(np.clip(wide, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise BadImage("unsupported image", "floating-point pixels")
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        alpha = image.convert("RGBA").getchannel("A")
        image = image.convert("RGBA").convert("RGB")
    elif image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("RGB")
    if profile and (transform := _to_srgb(profile, image.mode)) is not None:
        image = ImageCms.applyTransform(image, transform)
    image = image if image.mode == "RGB" else image.convert("RGB")  # converting copies
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image


def load_image(source: Path | bytes, side: int | None = None):
    """Decode one picture: upright, on white, sRGB, as a Pillow image of mode RGB.

    With `side`, a large JPEG is decoded at 1/2, 1/4 or 1/8 (never to less than `side` pixels on its shorter side).
    Raises BadImage, and OSError where the system could not read; never decodes more than MAX_PIXELS.
    """
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # our own limit stands below and names the size
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage("image too large", f"{width} x {height} px")
            if min(width, height) < MIN_SIDE:
                raise BadImage("image too small", f"{width} x {height} px")
            if side:
                image.draft(None, (side, side))
            image.load()
            rotated = image.getexif().get(0x0112, 1) != 1
            return _to_rgb(ImageOps.exif_transpose(image) if rotated else image)
    except (BadImage, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        if "HEIF" not in FORMATS:  # taught to Pillow by the first file that may be one: most catalogues have none
            import pillow_heif

            pillow_heif.register_heif_opener()
            FORMATS.append("HEIF")
            return load_image(source, side)
        empty = len(source) == 0 if isinstance(source, bytes) else Path(source).stat().st_size == 0
        raise BadImage("empty file" if empty else "not an image") from None
    except FileNotFoundError:
        raise BadImage("missing file", str(source)) from None
    except (PermissionError, IsADirectoryError) as error:
        raise BadImage("unreadable file", error.strerror) from None
    except Exception as error:  # Pillow's decoders raise many kinds on broken bytes
        if getattr(error, "errno", None):  # the system's fault, not the picture's: the next time it may be read
            raise
        reason = "truncated image" if "truncated" in str(error).lower() else "broken image"
        raise BadImage(reason, str(error)[:200]) from None


def fit(image, side: int):
    """An RGB picture scaled, up or down, so that its longer side has `side` pixels.

    Hamming's filter: as sharp as bicubic when scaling down, in half the time; integer arithmetic, so that every
    processor gives the same pixels.
    """
    from PIL import Image

    size = tuple(max(1, round(length * side / max(image.size))) for length in image.size)
    return image.resize(size, Image.Resampling.HAMMING)


def letterbox(image, side: int):
    """An RGB picture scaled into the middle of a white square of `side` pixels."""
    from PIL import Image

    inner = fit(image, side) if max(image.size) != side else image
    square = Image.new("RGB", (side, side), "white")
    square.paste(inner, ((side - inner.width) // 2, (side - inner.height) // 2))
    return square


def photo_pool(work: Callable[[list], list], blocks: Iterable[list], workers: int) -> Iterator[Any]:
    """The items of work(block) for every block, in order, from `workers` processes; in this one where that is 1.

    `work` must be importable (or a functools.partial of what is). Four blocks a worker are in flight, so that memory
    is flat. Raises Fail where a process dies, as it does when memory runs out.
    """
    if workers <= 1:
        yield from itertools.chain.from_iterable(map(work, blocks))
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # Not fork: a forked child would hold its parent's lock after the parent's death.
    context = multiprocessing.get_context("forkserver")
    pool, waiting = ProcessPoolExecutor(workers, context, start_worker), deque()
    try:
        for block in blocks:
            waiting.append(pool.submit(work, block))
            if len(waiting) >= 4 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except (BrokenProcessPool, MemoryError):
        raise Fail("a process that read photos died; if memory ran out, lower --workers and run again") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def start_worker() -> None:
    """In a worker: keep memory for the next photo, leave Ctrl-C to the parent, and end when that is gone."""
    import multiprocessing
    import threading

    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# --------------------------------------------------------------------------------------------------------------------
# Processes of torchrun


class World:
    """This process among those that torchrun started, or the only one, and its device (None: it needs none)."""

    def __init__(self, device: str | None = "auto"):
        names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        self.rank, self.size, self.local_rank = (int(os.environ.get(name, default)) for name, default in names)
        self.main = self.rank == 0
        if device is None and self.size == 1:  # spared torch, which takes seconds to import
            return
        import torch

        device = device or "cpu"
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(f"cuda:{self.local_rank}" if device == "cuda" else device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise Fail(f"--device {device}: {str(error).splitlines()[0]}; use --device cpu or auto") from None
        if self.size > 1 and not torch.distributed.is_initialized():
            import datetime

            cuda = self.device.type == "cuda"
            if cuda:
                torch.cuda.set_device(self.device)
            limit = datetime.timedelta(hours=12)  # the others wait for one that fills a cache
            with self.all_there():
                torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit)

    def share(self, value: Any) -> list[Any]:
        """What each process gives here, in the order of their ranks; every process waits for all."""
        if self.size == 1:
            return [value]
        import torch

        values = [None] * self.size
        with self.all_there():
            torch.distributed.all_gather_object(values, value)
        return values

    def deal(self, values: list[Any] | None = None) -> Any:
        """This process's own of the values, one a process, that the first one gives; every process waits for it."""
        if self.size == 1:
            return values[0]
        import torch

        own = [None]
        with self.all_there():
            torch.distributed.scatter_object_list(own, values)
        return own[0]

    @contextlib.contextmanager
    def all_there(self) -> Iterator[None]:
        """Around what waits for the other processes: one line where one of them is gone."""
        try:
            yield
        except RuntimeError as error:
            if not re.search("Connection|peer|timed out", str(error), re.IGNORECASE):
                raise
            raise Fail("another process of this run stopped, and says why; start them all again") from None


# --------------------------------------------------------------------------------------------------------------------
# CLIP: loading and encoding an open_clip model

LOCAL, HUB = "local-dir:", "hf-hub:"
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".npz", ".npy")
CARD_TEST = ("<!-- test -->", "<!-- /test -->")  # what stage 4 fills in the model card that stage 3 writes
# Without --pretrained, where a model has several sets of weights. By open_clip's tables this one finds 39.3% of COCO's
# pictures at the first place (text to image), and `openai`, the same network, 30.4%.
PRETRAINED = {"ViT-B-32": "laion2b_s34b_b79k"}
UNUSED = ("bitsandbytes", "wandb")  # that peft and timm import because they are there: 2 of a start's 17 CPU seconds


@contextlib.contextmanager
def without_unused() -> Iterator[None]:
    """Let open_clip and peft work inside as if UNUSED were not installed; whoever uses these imports them outside."""
    hidden = dict.fromkeys({*UNUSED} - sys.modules.keys())
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@dataclasses.dataclass
class Clip:
    """An open_clip model in evaluation mode, with all that is needed to feed it and to save it again."""

    model: Any  # torch.nn.Module
    tokenizer: Any  # list[str] -> int64 [B, context_length]
    size: int  # pixels a side
    mean: tuple[float, ...]
    std: tuple[float, ...]
    context_length: int
    fingerprint: str  # sha256 over configuration and weights
    name: str  # for people: "ViT-B-32/openai", "hf-hub:USER/NAME", or a folder
    config: dict[str, Any]  # open_clip's model_cfg, the QuickGELU flag as loaded
    preprocess: dict[str, Any]  # open_clip's preprocess_cfg
    folder: Path | None = None  # where a local-dir came from

    @property
    def device(self):
        return next(self.model.parameters()).device


def load_clip(model: str, pretrained: str | None = None, device: Any = "cpu") -> Clip:
    """Load an open_clip name with a tag or a weights file, `hf-hub:USER/NAME`, or a folder (`local-dir:DIR`, or DIR).

    A name alone gets its tag of PRETRAINED, or the only one that it has.
    No pickle is ever executed: safetensors, or torch.load with weights_only. Raises Fail saying what to do.
    """
    with without_unused():
        import open_clip
    source, pretrained = model_source(model, pretrained)
    config, weights, flags = model_config(source), None, {}
    if not source.startswith((LOCAL, HUB)):
        weights, flags = _find_weights(source, pretrained)
    folder = Path(source.removeprefix(LOCAL)) if source.startswith(LOCAL) else None
    if folder and not any(path.suffix in (".safetensors", ".bin", ".pth") for path in folder.iterdir()):
        raise Fail(f"{folder}: no weights in it (open_clip_model.safetensors); train or copy the model again")
    name, text = str(folder or source) + (f"/{weights}" if weights else ""), config.get("text_cfg", {})
    size, tower = image_side(name, config), text.get("hf_model_name")
    options = {"weights_only": True, "pretrained_text": False, "require_pretrained": True} | flags
    if folder and tower and (folder / "config.json").is_file():  # the tower's own, wherever the folder is by now
        options["text_cfg"] = text | {"hf_model_name": str(folder), "hf_model_pretrained": False}
    local = folder or (weights and Path(weights).is_file())
    with _explain_loading(name, f"the configuration of its text tower, {tower}," if local and tower else "it"):
        loaded = open_clip.create_model(source, weights, **options)
    with _explain_loading(name, f"its tokenizer, {folder or text.get('hf_tokenizer_name')},"):
        tokenizer = open_clip.get_tokenizer(source)
    if hasattr(loaded, "text_decoder"):
        raise Fail(f"{name}: a CoCa, which writes captions too, is not supported; take a plain CLIP such as ViT-B-32")
    loaded = loaded.float().to(device).eval()  # stored half precision would make training and fingerprints drift
    shown = dict(open_clip.get_model_preprocess_cfg(loaded))
    try:
        mean, std = (tuple(shown[colors][i] for i in range(3)) for colors in ("mean", "std"))
        if not all(map(math.isfinite, mean)) or not all(0 < value < math.inf for value in std):
            raise ValueError
    except (ValueError, TypeError, LookupError):
        problem = f"mean {shown.get('mean')} and std {shown.get('std')} are not three numbers each"
        raise Fail(f"{name}: {problem}; correct preprocess_cfg in its open_clip_config.json") from None
    return Clip(loaded, tokenizer, size, mean, std, int(loaded.context_length),
                fingerprint(loaded, config | flags), name, config | flags, shown, folder)  # fmt: skip


def model_source(model: str, pretrained: str | None = None) -> tuple[str, str | None]:
    """(local-dir:FOLDER, hf-hub:USER/NAME or an open_clip name; its tag or weights file) of the two flags' values."""
    folders = [n.removeprefix(LOCAL) for n in (model, pretrained) if n and (n.startswith(LOCAL) or Path(n).is_dir())]
    source = f"{LOCAL}{folders[0]}" if folders else model
    if not source.startswith((LOCAL, HUB)):
        return source, pretrained
    if pretrained not in (None, model, source, *folders):
        raise Fail(f"--pretrained {pretrained}: {model} brings its own weights; leave --pretrained out")
    return source, None


def model_config(source: str) -> dict[str, Any]:
    """open_clip's model_cfg of a model_source(), read without torch. Fail for an unknown name, folder or repository."""
    import difflib
    import importlib.util

    if source.startswith(HUB):
        from huggingface_hub import hf_hub_download

        with _explain_loading(source, "its open_clip_config.json"):
            path = Path(hf_hub_download(source.removeprefix(HUB), "open_clip_config.json"))
    elif source.startswith(LOCAL):
        path = Path(source.removeprefix(LOCAL), "open_clip_config.json")
        if not path.parent.is_dir():
            raise Fail(f"{path.parent}: no such model folder; check the path after {LOCAL}")
    else:
        (package,) = importlib.util.find_spec("open_clip").submodule_search_locations
        known = {path.stem: path for path in Path(package, "model_configs").glob("*.json")}
        if source not in known:
            near = difflib.get_close_matches(source, known, n=3) or ["ViT-B-32", "ViT-B-16", "ViT-L-14"]
            hub = f"; on the hub: {HUB}{source}" if source.count("/") == 1 else ""
            raise Fail(f"--model {source}: neither a folder nor an open_clip model; nearest: {', '.join(near)}{hub}")
        return read_json(known[source])
    config = read_json(path, "open_clip model configuration")
    config = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(config, dict) or any(
        not isinstance(config.get(f"{x}_cfg", {}), dict) for x in ("vision", "text")
    ):
        raise Fail(f"{path}: no model_cfg in it; this is not an open_clip model")
    return config


def image_side(name: str, config: dict[str, Any]) -> int:
    """Pixels a side that a model takes, by its model_cfg. Fail for one that takes rectangles."""
    size = config.get("vision_cfg", {}).get("image_size", 224)
    sides = size if isinstance(size, list) and size else [size]
    if any(side != sides[0] or not isinstance(side, int) for side in sides):
        raise Fail(f"{name}: takes pictures of {' x '.join(map(str, sides))} px; only square ones are supported")
    return sides[0]


def _find_weights(model: str, pretrained: str | None) -> tuple[str, dict[str, Any]]:
    """(tag or weights file of an open_clip name, what its model_cfg takes from that). Fail where it is not there."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    some = ", ".join(tags[:8]) or "none"
    pretrained = pretrained or PRETRAINED.get(model) or (tags[0] if len(tags) == 1 else None)
    if not pretrained:
        raise Fail(f"--model {model} needs --pretrained: a tag ({some}), a weights file, or {LOCAL}FOLDER")
    if Path(pretrained).is_file():
        if Path(pretrained).suffix not in WEIGHTS:
            raise Fail(f"--pretrained {pretrained}: not a weights file; expected one of {' '.join(WEIGHTS)}")
        return pretrained, {}
    if pretrained not in tags:
        kind = "no such file" if os.sep in pretrained or Path(pretrained).suffix else "no such tag or file"
        raise Fail(f"--pretrained {pretrained}: {kind} for {model}; its tags: {some}")
    # The tag knows whether its weights were trained with QuickGELU; open_clip only warns and computes something else.
    return pretrained, {"quick_gelu": bool(open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu", False))}


@contextlib.contextmanager
def _explain_loading(name: str, part: str) -> Iterator[None]:
    """Turn what open_clip, torch, transformers and the hub raise (many kinds; each means: not loadable) into one line.

    Their log, which names every retry, is silent inside.
    """
    import logging

    logging.disable(logging.ERROR)
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        problem = f"{part} could not be loaded ({type(error).__name__}: {text}); check --model and --pretrained"
        if re.search("(?i)download|connect|offline|hub", text):
            problem = f"{part} could not be downloaded ({text}); check the network, or give a local file or folder"
        elif re.search("weights_only|Unpickl|TorchScript", text):
            problem = "holds more than plain tensors, as OpenAI's files do; take the tag, or convert it to safetensors"
        elif re.search("size mismatch|(Missing|Unexpected) key", text):
            problem = f"the weights belong to another architecture; check --model ({text})"
        raise Fail(f"{name}: {problem}") from None
    finally:
        logging.disable(logging.NOTSET)


def model_place(name: str, embeddings: str | Path) -> tuple[str, str | None]:
    """(model, pretrained) for load_clip, from a model's name in the metadata of master.parquet.

    A folder is relative to where that file lies, so that the data can be moved; else to the working directory.
    """
    if name.startswith(LOCAL):
        beside = Path(embeddings).parent / name.removeprefix(LOCAL)
        return (f"{LOCAL}{beside}" if beside.is_dir() else name), None
    if name.startswith(HUB):
        return name, None
    model, _, pretrained = name.partition("/")
    return model, pretrained or None


def auto_precision(device: str) -> str:
    """What --precision auto means there: bf16 where the hardware computes in it; elsewhere that would be slower."""
    import torch

    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if device == "cpu" and any(getattr(torch.cpu, name, bool)() for name in known) else "fp32"


def fingerprint(model, config: dict[str, Any] | None = None) -> str:
    """sha256 (hex) over a model's configuration, and names, types, shapes and bytes of its weights."""
    import torch

    total = hashlib.sha256(canonical(config or {}))
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def decode_jpeg(data: bytes, size: int):
    """uint8 [3, size, size] of a square JPEG. Raises BadImage where it is damaged."""
    import torch
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_jpeg as decode

    try:  # torchvision's decoder gives Pillow's very pixels in half the time, and lets other threads run
        pixels = decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        raise BadImage(f"damaged JPEG ({str(error).splitlines()[0][:80]})") from None
    if pixels.shape[1:] != (size, size):
        pixels = torch.nn.functional.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]
    return pixels


def normalise_pixels(clip: Clip, pixels):
    """uint8 [B, 3, S, S] -> float [B, 3, S, S] on the model's device, with the model's own mean and std."""
    weight = next(clip.model.parameters())
    mean = weight.new_tensor(clip.mean).view(3, 1, 1) * 255
    std = weight.new_tensor(clip.std).view(3, 1, 1) * 255
    return (pixels.to(weight.device, non_blocking=True).to(weight.dtype) - mean) / std


def text_features(model, tokens):
    """[B, D] of int64 [B, L] on any device: the tower's own result, only up to the longest caption of the batch.

    Exact where attention is causal and one token is pooled: what stands behind that token cannot reach it. Positions
    and mask are sliced; open_clip's force_context_length would interpolate trained positions. Exact, too, for towers of
    Hugging Face, which mask their padding.
    """
    import torch

    tower = getattr(model, "text", model)  # CustomTextCLIP keeps the tower apart, CLIP has its parts at the top
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    mask = getattr(tower, "attn_mask", None)
    device = next(model.parameters()).device
    if (pad := getattr(getattr(tower, "config", None), "pad_token_id", None)) is not None:
        ends = (tokens != pad).any(dim=0) * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        return model.encode_text(tokens[:, : max(1, int(ends.max()))].to(device, non_blocking=True))
    if pool not in ("argmax", "eos") or mask is None or getattr(tower, "cls_emb", None) is not None:
        return model.encode_text(tokens.to(device, non_blocking=True))
    eos = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
    ends = tokens.argmax(dim=-1) if pool == "argmax" else (tokens == eos).int().argmax(dim=-1)
    length = int(ends.max()) + 1  # of tokens on the CPU: no wait for a GPU
    tokens, ends = (part.to(device, non_blocking=True) for part in (tokens[:, :length], ends))
    x = tower.token_embedding(tokens) + tower.positional_embedding[:length]  # (B, L, W)
    x = tower.transformer(x, attn_mask=mask[:length, :length])[torch.arange(len(x), device=device), ends]
    x = tower.ln_final(x)  # (B, W): the norm is of each token by itself
    if tower.text_projection is None:
        return x
    return tower.text_projection(x) if isinstance(tower.text_projection, torch.nn.Module) else x @ tower.text_projection


def encode(clip: Clip, pixels=None, captions=None):
    """float32 [B, D], L2-normalised, of uint8 pixels [B, 3, S, S], or of captions: texts, or tokens int64 [B, L]."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # The fused attention of a CPU is 4 to 10 times slower in bf16 than the plain products.
    half = torch.is_autocast_enabled(clip.device.type) and clip.device.type == "cpu"
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH) if half else contextlib.nullcontext():
        if captions is None:
            x = clip.model.encode_image(normalise_pixels(clip, pixels))
        else:
            tokens = clip.tokenizer(captions) if isinstance(captions, list) else captions
            x = text_features(clip.model, tokens)
        return torch.nn.functional.normalize(x.float(), dim=-1)


# --------------------------------------------------------------------------------------------------------------------
# master.parquet: every item's text and vectors, one file or a folder of parts

PARTS = "_parts.json"  # names the parts of a folder; written last. Arrow passes over names that begin with "_"
VECTOR_ROWS = 1024  # vectors read at once


class Master:
    """What stage 4 wrote, a file or a folder of parts, as one table: text is read whole, vectors block by block.

    Raises Fail where it is missing or damaged, which pyarrow finds only when it comes to it, or lacks a column.
    """

    def __init__(self, path: str | Path, *columns: str):
        import pyarrow.parquet

        self.path = Path(path)
        with self._explain():
            # With its default pre_buffer, pyarrow would keep every column of vectors that was read.
            self.parts = self._find_parts(str(path))
            self.files = [pyarrow.parquet.ParquetFile(part, pre_buffer=False) for part in self.parts]
            schemas = [file.schema_arrow for file in self.files]
            if any(not schema.equals(schemas[0], check_metadata=True) for schema in schemas):
                raise Fail(f"{path}: holds parts of different runs; run 4_embed.py again")
            self.facts = {key.decode(): value.decode() for key, value in (schemas[0].metadata or {}).items()}
        self.types = {field.name: field.type for field in schemas[0]}
        self.rows = sum(file.metadata.num_rows for file in self.files)
        if missing := [name for name in columns if name not in self.types]:
            raise Fail(f"{path}: no column {', '.join(missing)}; make it with 4_embed.py")

    def _find_parts(self, path: str) -> list[Path]:
        if is_s3(path):
            raise Fail(f"{path}: is read from a local disk; copy it there first (aws s3 sync)", USAGE)
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise Fail(f"{path}: no such file; run 4_embed.py first, or check --embeddings", USAGE)
        if not (self.path / PARTS).is_file():
            raise Fail(f"{path}: no {PARTS} in it, so its parts are not finished; run 4_embed.py again")
        return [self.path / name for name in read_json(self.path / PARTS)["parts"]]

    @contextlib.contextmanager
    def _explain(self) -> Iterator[None]:
        """One line for what pyarrow says in several."""
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            if getattr(error, "errno", None) in SYSTEM_ERRORS:
                raise
            why = " ".join(str(error).split())
            raise Fail(f"{self.path}: not a readable Parquet file ({why}); run 4_embed.py again") from None

    def text(self, *columns: str) -> Any:
        """pyarrow's table of some columns."""
        import pyarrow

        with self._explain():
            table = pyarrow.concat_tables(file.read(columns=list(columns)) for file in self.files).combine_chunks()
            table.validate(full=True)  # that every text is UTF-8
            return table

    def vectors(self, column: str) -> Iterator:
        """The column's vectors in blocks, float32 [n, width]."""
        import numpy as np

        width = self.width(column)
        with self._explain():
            for batch in (batch for file in self.files for batch in file.iter_batches(VECTOR_ROWS, columns=[column])):
                block = batch.column(0).flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
                if block.size != batch.num_rows * width or not np.isfinite(block).all():
                    raise Fail(f"{self.path}: {column} has missing or not finite vectors; run 4_embed.py again")
                yield block.reshape(-1, width)

    def width(self, column: str) -> int:
        """The length of the column's vectors."""
        if width := getattr(self.types.get(column), "list_size", 0):
            return width
        raise Fail(f"{self.path}: no column {column} of fixed-size lists; make it with 4_embed.py")

    def model(self, kind: str) -> tuple[str, str]:
        """(name, fingerprint) of the "base" or "finetuned" model."""
        if not self.facts.get(f"{kind}_fingerprint"):
            raise Fail(f"{self.path}: no {kind}_fingerprint in its metadata; make it with 4_embed.py")
        return self.facts.get(f"{kind}_model", kind), self.facts[f"{kind}_fingerprint"]

    def load_model(self, kind: str, place: tuple[str, str | None] | None = None, device: Any = "cpu") -> Clip:
        """That model: where the metadata says, or at another place (model, pretrained). Fail where it is another."""
        name, fingerprint = self.model(kind)
        clip = load_clip(*(place or model_place(name, self.path)), device)
        if clip.fingerprint != fingerprint:
            raise Fail(f"{clip.name}: not the model that made the vectors of {self.path}; run 4_embed.py again")
        return clip


# --------------------------------------------------------------------------------------------------------------------
# Search: exact ranks and nearest neighbours, a block at a time

BLOCK_SCORES = 1 << 22  # scores computed at once: 32 MB in float64, whatever N


def right_ranks(queries, gallery, keys):
    """int64 [N]: rank (from 1) of the best right answer to each query; queries[i] and gallery[i] are item i.

    queries, gallery: float32 [N, D], L2-normalised. keys: int64 [N, K]; item j is a right answer to query i where they
    agree in any column. Scores are added up in float64 and rounded to float32, so that equal vectors tie. Ties and NaN
    count against the model: a collapsed one, which gives all pairs one score, does not look perfect.
    """
    import numpy as np

    keys, wide = np.asarray(keys), np.asarray(gallery, np.float64)
    keys = keys.reshape(len(keys), -1)
    ranks = np.empty(len(keys), np.int64)
    step = max(1, BLOCK_SCORES // max(len(keys), 1))
    for start in range(0, len(keys), step):
        part = slice(start, start + step)
        scores = (np.asarray(queries[part], np.float64) @ wide.T).astype(np.float32)  # (q, N)
        # Column by column, without an array of (q, N, K), this takes a ninth of the time.
        right = functools.reduce(np.logical_or, (column[part, None] == column for column in keys.T))
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        ranks[part] = (~(scores < best) & ~right).sum(axis=1) + 1
    return ranks


def top_k(queries, gallery: Iterable, k: int, exclude: tuple | None = None) -> tuple:
    """The k vectors with the largest dot product for each query, exact; of equal scores the smaller index wins.

    queries: float32 [Q, D]. gallery: float32 [N, D], or an iterable of such blocks in order. exclude: labels
    (integers [Q], integers [N]); a vector is no result of a query that has the same label.
    Returns scores float32 [Q, k], best first, and indices int64 [Q, k]; where fewer than k remain, -inf and -1.
    A product in float32 proposes; what its rounding error (Higham 2002, 3.1) leaves possible is computed again in
    float64, so that equal vectors tie and the order does not depend on processor, threads or blocks.
    """
    import numpy as np

    queries = np.ascontiguousarray(queries, dtype=np.float32)
    best, found = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
    longest, first = np.linalg.norm(queries, axis=1).max(initial=0), 0
    for whole in [gallery] if hasattr(gallery, "shape") else gallery:
        for start in range(0, len(whole), 4096):
            block = np.ascontiguousarray(whole[start : start + 4096], dtype=np.float32)
            if block.shape[1] != queries.shape[1]:
                raise Fail(f"vectors of width {block.shape[1]} cannot be searched with queries of {queries.shape[1]}")
            largest = longest * np.linalg.norm(block, axis=1).max(initial=0)
            if not np.isfinite(largest):
                raise Fail("a vector holds NaN or infinity; make the vectors again")
            error = 2 * (block.shape[1] + 4) * 2.0**-23 * largest
            for q in range(0, len(queries), 512):
                part = slice(q, q + 512)
                scores = queries[part] @ block.T  # (q, n)
                if exclude is not None:
                    labels = np.asarray(exclude[1])[first : first + len(block)]
                    scores[np.asarray(exclude[0])[part, None] == labels] = -np.inf
                _merge_block(scores, error, queries[part], block, first, best[part], found[part])
            first += len(block)
    return best, found


def _merge_block(scores, error: float, queries, block, first: int, best, found) -> None:
    """Merge a block, whose first vector has index `first`, into best and found [q, k], in place.

    scores: float32 [q, n], the products of queries [q, D] and block [n, D]; two of them are off by `error` at most.
    """
    import numpy as np

    k = best.shape[1]
    rows = np.flatnonzero(scores.max(axis=1, initial=-np.inf) >= best[:, -1] - error)
    scores = scores[rows]
    hits = (scores >= best[rows, -1:] - error) & (scores > -np.inf)
    crowded = np.flatnonzero(hits.sum(axis=1) > 4 * k)  # in the first blocks: only its own k best can enter
    if len(crowded) and k < scores.shape[1]:
        kth = np.partition(scores[crowded], -k, axis=1)[:, -k]
        hits[crowded] &= scores[crowded] >= kth[:, None] - error
    row, column = np.nonzero(hits)
    some = np.array_split(np.arange(len(row)), 1 + (len(row) * queries.shape[1] >> 22))  # 4M numbers at once
    pairs = ((queries[rows[row[part]]], block[column[part]]) for part in some)
    exact = np.concatenate([np.einsum("ij,ij->i", *pair, dtype=np.float64) for pair in pairs]).astype(np.float32)
    row = np.concatenate([np.repeat(np.arange(len(rows)), k), row])
    score, index = np.concatenate([best[rows].ravel(), exact]), np.concatenate([found[rows].ravel(), column + first])
    order = np.lexsort((index, -score, row))
    row, score, index = row[order], score[order], index[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)  # rank within the query
    row, place, score, index = (values[place < k] for values in (rows[row], place, score, index))
    best[row, place], found[row, place] = score, index


# --------------------------------------------------------------------------------------------------------------------
# Statistics: is a difference more than chance?

ALPHA = 0.05  # two-sided level of every test; intervals are 95%
DRAWS, SEED = 10_000, 42  # resamples behind each interval: its ends move by less than 2% of its width
BOOTSTRAP_NUMBERS = 400_000  # drawn at once: 3 MB an array stay in the cache, which is twice as fast as 32 MB


def holm(p: Iterable[float]) -> list[float]:
    """Holm's step-down adjusted p-values in the order given (Holm 1979); valid under any dependence.

    Hypothesis i is rejected at level alpha, with family-wise error at most alpha, when its adjusted value is <= alpha.
    """
    import numpy as np

    values = np.asarray(p, dtype=float)
    order = np.argsort(values, kind="stable")
    adjusted = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    return np.minimum(adjusted, 1.0)[np.argsort(order)].tolist()


def bootstrap_mean(values, groups=None, draws: int = DRAWS, seed: int = SEED, limit: float = math.inf) -> tuple:
    """(mean of values in [-limit, limit], low, high: its 95% interval, two-sided p of "the mean is 0").

    values: float [N], finite. groups: [N] labels; values of one label (a duplicate group, the votes on one query) are
    drawn together, so only groups need be independent of each other. None: every value is its own group.
    Symmetric studentised bootstrap: the interval is mean -+ q * s; s is the standard error over groups (a ratio of
    sums: Cochran 1977, 6.4), and q the 95% quantile of |mean* - mean| / s* over resamples (Hall 1988, "On symmetric
    bootstrap confidence intervals": coverage error of order N^-2, where the percentile interval has N^-1). Recall
    differs on few queries, and a resample that holds none of those has s* = 0; so the spread of one more group is added
    to every variance, s and s* alike. p is the share of resamples at least as far out, counted with the one observed:
    never below 1 / (draws + 1). p <= 0.05 exactly when the interval leaves out 0. Where too few groups leave it
    unknown, low and high are None.
    """
    import numpy as np
    import pandas as pd

    values = np.asarray(values, dtype=float)
    groups = np.arange(len(values)) if groups is None else pd.factorize(np.asarray(groups))[0]
    if not len(values) or values.shape != groups.shape or not np.isfinite(values).all():
        raise ValueError(f"need finite, equally long values and groups, got shapes {values.shape} and {groups.shape}")
    sums, sizes = np.bincount(groups, weights=values), np.bincount(groups).astype(float)  # [G]
    count, mean = len(sums), float(sums.sum() / sizes.sum())
    residuals = sums - mean * sizes
    if count < 2 or abs(residuals).max() <= 1e-12 * abs(sums).max():  # no spread: the sign test is what is left
        p = 2.0 ** max(1 - count, -1000) if mean else 1.0
        return (mean, mean, mean, p) if count > 1 and (p <= ALPHA or not mean) else (mean, None, None, p)
    more = (residuals**2).mean() / sizes.sum() ** 2
    error = math.sqrt(count / (count - 1) * (residuals**2).sum() / sizes.sum() ** 2 + more)
    far = np.sort(resampled_distances(residuals, sizes, more, draws, np.random.default_rng(seed)))
    half = error * float(far[-math.floor(ALPHA * (draws + 1))])
    p = (1 + int((far >= abs(mean) / error * (1 - 1e-12)).sum())) / (draws + 1)
    if p > ALPHA:  # rounding must not let the two disagree
        half = max(half, abs(mean))
    return mean, max(-limit, mean - half), min(limit, mean + half), p


def resampled_distances(residuals, sizes, more: float, draws: int, rng) -> Any:
    """|mean* - mean| / s* of `draws` resamples of whole groups, float [draws].

    residuals, sizes: float [G]; more is added to every variance. Groups of equal residual and size are interchangeable:
    with few kinds (recall is 0 or 1) their multinomial counts are drawn instead of the groups, which has the same
    distribution and costs a hundredth.
    """
    import numpy as np

    count = len(sizes)
    kinds, repeats = np.unique(np.stack([residuals, sizes], axis=1), axis=0, return_counts=True)  # [K, 2], [K]
    few = len(kinds) * 10 <= count
    if not few:
        kinds = np.stack([residuals, sizes], axis=1)
    e, n = kinds.T
    terms = np.stack([e, n, e * e, e * n, n * n], axis=1)  # [K, 5]
    far = np.empty(draws)
    step = max(1, BOOTSTRAP_NUMBERS // (2 * len(kinds)))
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        if few:
            times = rng.multinomial(count, repeats / count, size=rows)  # how often each kind was drawn: [rows, K]
        else:
            picks = rng.integers(0, count, size=(rows, count)) + count * np.arange(rows)[:, None]
            times = np.bincount(picks.ravel(), minlength=rows * count).reshape(rows, count)
        totals = times @ terms  # [rows, 5]
        shift = totals[:, 0] / totals[:, 1]  # mean* - mean
        square = totals[:, 2] - 2 * shift * totals[:, 3] + shift**2 * totals[:, 4]
        variance = count / (count - 1) * np.maximum(square, 0) / totals[:, 1] ** 2
        far[start : start + rows] = abs(shift) / np.sqrt(variance + more)
    return far
