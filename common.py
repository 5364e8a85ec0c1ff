"""What the five scripts share: settings, errors and exits, progress, whole files, catalogues, prompts.

Importing it costs little. Beside it stand storage.py (folders and S3 alike, shards) and imaging.py (photos).
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import csv
import dataclasses
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# --------------------------------------------------------------------------------------------------------------------
# Settings: one dataclass a stage; the flags, the sidecars and the README's table are made from these.


def setting(
    default: Any, help: str, choices: tuple | None = None, low: float = -math.inf, high: float = math.inf
) -> Any:
    """A dataclass field whose metadata becomes a command-line flag, of numbers from `low` to `high`."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "bounds": (low, high)})


@dataclasses.dataclass(frozen=True)
class CleaningConfig:
    """Stage 1. Sizes in bytes, times in seconds, prices in US dollars for a million tokens."""

    model: str = setting("gpt-5-nano", "chat model that reads title and photo")
    reasoning_effort: str | None = setting(None, "effort sent with each request; by default what suits the model")
    max_completion_tokens: int = setting(
        500, "tokens an answer may take, reasoning included; doubled when cut off", low=1
    )
    image_size: int = setting(
        512, "longest side of the photo as sent; smaller photos are not enlarged", low=1, high=10_000
    )
    jpeg_quality: int = setting(85, "quality of photos that are encoded anew", low=1, high=100)
    image_detail: str = setting("low", "detail at which the model looks at the photo", ("low", "high", "auto"))
    max_batch_file_size: int = setting(
        90_000_000, "bytes that a request file stays below; the API takes 200 MB", low=1, high=200 << 20
    )
    max_requests_per_file: int = setting(49_000, "requests in a file; the API takes 50,000", low=1, high=50_000)
    max_concurrent_batches: int = setting(1, "batches in flight at once", low=1, high=10_000)
    max_enqueued_tokens: int | None = setting(None, "tokens in flight at once; by default learned from refusals", low=1)
    poll_interval: float = setting(600, "seconds between two looks at running batches", low=0, high=86_400)
    pilot: int = setting(
        100, "requests sent first, which must come back sound; 0 sends all at once", low=0, high=50_000
    )
    pilot_sound: float = setting(0.95, "share of the pilot that must be parsed before the rest is sent", low=0, high=1)
    max_attempts: int = setting(3, "times a row is asked before it is rejected", low=1, high=100)
    max_failed: float = setting(0.05, "share of rejected rows above which the exit is 1", low=0, high=1)
    max_cost: float | None = setting(None, "US dollars; nothing is sent that might cost more in all", low=0)
    price_input: float | None = setting(None, "price of input tokens, for models that are not in the table", low=0)
    price_output: float | None = setting(None, "price of output tokens, for models that are not in the table", low=0)
    limit: int | None = setting(None, "rows of the input that count; by default all", low=1)
    workers: int | None = setting(None, "processes that read photos; by default one for each core", low=1, high=1000)
    sync: bool = setting(False, "ask /v1/chat/completions row by row, for servers without a Batch API")
    concurrency: int = setting(8, "requests in flight at once with --sync", low=1, high=1000)
    retry_failed: bool = setting(False, "ask again for rows whose attempts are used up")
    timeout: float = setting(600, "seconds after which a call counts as lost", low=1, high=86_400)
    settle: float = setting(
        30, "seconds that a batch with a lost answer has to show up before it is created again", low=0, high=86_400
    )
    backoff: float = setting(
        1, "seconds of the first wait after a failed call; doubled each time, 600 at most", low=0, high=600
    )


@dataclasses.dataclass(frozen=True)
class PrepConfig:
    """Stage 2."""

    image_size: int = setting(224, "pixels a side of the letterboxed JPEGs", low=1, high=4096)
    quality: int = setting(95, "JPEG quality in the shards", low=1, high=100)
    seed: int = setting(42, "of the split, the order and the prompt templates")
    mini_shards: int = setting(5, "train shards that mini_train holds again", low=0)
    fold: str = setting("", "K/N: of N equal parts of the catalogue test on part K (from 0), validate on the next")
    max_failed: float = setting(0.05, "share of rows that may be rejected before the exit code is 1", low=0, high=1)
    limit: int | None = setting(None, "use the first N rows only", low=1)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Stage 3."""

    scenario: str = setting(
        "dual_lora",
        "what is trained: nothing, the projections, or these and LoRA in both towers or in one",
        ("zero_shot", "linear_probe", "dual_lora", "vision_lora", "text_lora"),
    )
    model: str = setting("ViT-B-32", "open_clip name, or local-dir:FOLDER")
    pretrained: str | None = setting(
        None, "open_clip tag (openai), local-dir:FOLDER, or weights file (OpenAI's own: --model ViT-B-32-quickgelu)"
    )
    epochs: int = setting(5, "passes over the train split", low=1)
    effective_batch_size: int | None = setting(
        None, "pairs contrasted with each other in one step (unset: an eighth of the train split, 32 to 1024)", low=1
    )
    micro_batch_size: str = setting("auto", "pairs in memory at once, a number, or auto: as many as fit; same batch")
    lr: float = setting(1e-4, "peak learning rate of the projections and the temperature", low=0)
    lora_lr: float = setting(
        1e-3, "peak learning rate of LoRA; 5e-6 suits thousands of small steps, not large batches", low=0
    )
    weight_decay: float = setting(0.01, "of AdamW; none on temperature and biases", low=0)
    schedule: str = setting("cosine", "of the learning rates, after the warm-up", ("cosine", "onecycle"))
    warmup: float = setting(0.1, "share of the steps in which the rates rise to their peak", low=0, high=1)
    clip_norm: float = setting(1.0, "largest norm of the gradient", low=0)
    lora_r: int = setting(16, "rank of LoRA", low=1)
    lora_alpha: int = setting(32, "LoRA's update is scaled by alpha / rank")
    lora_dropout: float = setting(0.05, "dropout before LoRA", low=0, high=0.9)
    captions: str = setting("varied", "another prompt each epoch, or the shard's own", ("varied", "fixed"))
    augment: str = setting("none", "none, crop and flip, or rotation and blur too", ("none", "simple", "advanced"))
    views: int = setting(4, "fixed augmented views of a picture where its tower is frozen and runs but once", low=1)
    precision: str = setting(
        "auto", "auto: bf16 where the processor computes in it, else fp32", ("auto", "fp32", "bf16", "fp16")
    )
    optimizer: str = setting(
        "adamw", "8 bits save 15 MB for LoRA of a ViT-B-32; 30 times slower on a CPU", ("adamw", "adamw8bit")
    )
    patience: int | None = setting(None, "stop after so many epochs without a better validation MRR", low=1)
    grad_checkpointing: bool = setting(False, "compute activations twice to save memory")
    compile: bool = setting(False, "torch.compile the towers; pays on a GPU, after minutes of compiling")
    wise: bool = setting(False, "export the interpolation with the base weights that validates best (WiSE-FT)")
    probe: str | None = setting(None, "CSV with image_path,caption of general pictures: shows what was forgotten")
    max_failed: float = setting(0.05, "share of samples that may be unreadable", low=0, high=1)
    limit: int | None = setting(None, "use only the first N samples of each split", low=1)
    seed: int = setting(42, "of order, captions, augmentation, dropout and LoRA's start")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int = setting(2, "threads that read and decode pictures; they need no /dev/shm", low=1)
    cache_gb: float = setting(
        50.0, "disk for shards fetched from S3; what is over is read by ranges, each epoch", low=0
    )
    checkpoint_minutes: float = setting(10.0, "time between checkpoints within an epoch", low=0)
    checkpoint_url: str | None = setting(None, "s3://bucket/prefix that checkpoints are copied to and resumed from")
    wandb: bool = setting(False, "log to Weights & Biases")
    wandb_artifacts: bool = setting(False, "send the best checkpoint there too")
    resume: bool = setting(True, "go on from the newest checkpoint")


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """Stage 4."""

    batch_size: int = setting(128, "pictures encoded at once; lower it when memory runs out", low=1)
    precision: str = setting(
        "auto", "auto: bf16 where the processor computes in it, checked against fp32", ("auto", "fp32", "bf16")
    )
    max_failed: float = setting(0.05, "share of pictures that may be unreadable", low=0, high=1)
    draws: int = setting(10_000, "resamples behind each interval of the report", low=100)
    seed: int = setting(42, "of the resamples")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int | None = setting(None, "threads that read and decode pictures; by default one for each core", low=1)
    cache_gb: float = setting(
        50.0, "disk for shards fetched from S3; what is over is read by ranges, a picture each", low=0
    )


@dataclasses.dataclass(frozen=True)
class ArenaConfig:
    """Stage 5."""

    top_k: int = setting(4, "results shown in each row", low=1)
    query: str = setting("image", "what is searched with: a picture, or its prompt", ("image", "text"))
    queries: int = setting(
        2000, "most queries asked about; duplicate groups of the test split, object types in turn", low=1
    )
    votes_needed: int = setting(
        210, "decided votes aimed at; 820, 210, 97 find a 55, 60, 65% win rate at 80% power", low=1
    )
    shared: float = setting(0.2, "share of the queries that three judges see, for their agreement", low=0, high=1)
    repeated: float = setting(0.05, "share of a judge's queries that come again with sides exchanged", low=0, high=1)
    picture_size: int = setting(480, "pixels a side of every picture shown", low=1, high=4096)
    seed: int = setting(42, "seed of the choice of queries and of each judge's order")
    host: str = setting("127.0.0.1", "address to listen at; any but loopback needs the judges' token")
    port: int = setting(8000, "port to listen at; 0 takes a free one", low=0, high=65_535)
    trusted_host: str | None = setting(None, "further names, separated by commas, that browsers may call the server by")
    threads: int = setting(32, "requests answered at once; pictures take turns among them", low=1)
    reveal: bool = setting(False, "show results and search to everybody who is not in the middle of voting")


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
    """The settings dataclass filled from parsed arguments. Raises Fail for a number out of its bounds."""
    for field in dataclasses.fields(config):
        value, (low, high) = getattr(args, field.name), field.metadata["bounds"]
        if isinstance(value, int | float) and not low <= value <= high:
            bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:.9g}"
            raise Fail(f"--{field.name.replace('_', '-')} {value}: must be {bounds}", USAGE)
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
        if argv is None:
            _speak_utf8()
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
        except Exception as error:
            message, code = _refusal(error), FAILED
            if message is None:
                raise
        print(f"{name}: {message}", file=sys.stderr, flush=True)
        return code

    return wrapped


def _speak_utf8() -> None:
    """Start the script anew where the locale is not UTF-8: shops name files, and we print, in every script."""
    foreign = sys.getfilesystemencoding() != "utf-8" or (sys.stdout and sys.stdout.encoding.lower() != "utf-8")
    if foreign and os.environ.get("PYTHONUTF8") != "1":
        os.environ |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _refusal(error: Exception) -> str | None:
    """One line where the file system refused something; None for any other error."""
    number, text = getattr(error, "errno", None), " ".join(str(error).split())
    if told := re.search(r"\(os error (\d+)\)", text):  # as safetensors says it
        number = int(told[1])
    elif number is None and re.search(r"disk is full|requested and \d+ written", text):  # as SQLite and NumPy do
        number = errno.ENOSPC
    hints = {
        errno.ENOSPC: "free some space and run the same command again; nothing finished is lost",
        errno.EDQUOT: "the quota is used up; free some space and run the same command again",
        errno.EFBIG: "raise the limit (ulimit -f) and run the same command again",
        errno.EROFS: "the file system is read-only; choose another place",
        errno.EACCES: "check the permissions or choose another place",
        errno.EPERM: "check the permissions or choose another place",
        errno.ENOTDIR: "a file stands where a folder is needed; choose another place",
        errno.EISDIR: "a folder stands where a file is needed; choose another place",
    }
    if number in hints:
        return f"{getattr(error, 'filename', None) or 'writing'}: {os.strerror(number)}; {hints[number]}"
    told = re.search("readonly|unable to open|disk I/O|malformed|not a database|unsupported file", text)
    if told and type(error).__module__ == "sqlite3":
        return f"SQLite: {text}; check the disk, its permissions and free space, then run the same command again"
    return None


# --------------------------------------------------------------------------------------------------------------------
# Progress and memory


@contextlib.contextmanager
def memory_running_out(remedy: str) -> Iterator[None]:
    """Turn what Python and torch (whose OutOfMemoryError is a RuntimeError) raise then into one line with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        spoken = re.search("out of memory|not enough memory|can't allocate memory", str(error))
        if isinstance(error, RuntimeError) and not spoken:
            raise
        raise Fail(f"out of memory; {remedy}") from None


def progress(items: Iterable, what: str, total: int | None = None, unit: str = "row", every: float = 15.0) -> Iterator:
    """Yield the items, showing a tqdm bar on a terminal, or a plain line every 15 s in a log; a rate at the end."""
    if sys.stderr and sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, total=total, unit=unit, dynamic_ncols=True)
        return
    start = shown = time.monotonic()
    count, units = 0, f"{unit}{'es' if unit.endswith('ch') else 's'}"
    for item in items:
        yield item
        count += 1
        now = time.monotonic()
        if now - shown >= every:
            shown = now
            of = f"/{total}" if total else ""
            print(f"{what}: {count}{of} {units}, {count / (now - start):.1f} a second", file=sys.stderr, flush=True)
    seconds = max(time.monotonic() - start, 1e-9)
    line = f"{what}: {count} {units} in {seconds:.1f} s, {count / seconds:.1f} a second"
    print(line, file=sys.stderr, flush=True)


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees for its next array; with another C library nothing is done.

    Else the kernel clears each page anew, which takes a tenth of a training step and a third of scaling a photo.
    """
    import ctypes

    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 27)  # M_MMAP_THRESHOLD: only what is larger is given back at once
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


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


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Give an empty temporary folder beside `path`; on a clean exit it takes the place of `path`."""
    import shutil

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
    except (ValueError, RecursionError) as error:
        raise Fail(f"{path}: not a readable {what} ({error}); remove it and run again") from None


@contextlib.contextmanager
def exclusive(path: str | Path) -> Iterator[bool]:
    """Hold a lock file while inside; gives False at once where a live process holds it (flock: death frees it)."""
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
# Catalogue: CSV files as shops export them

REQUIRED_COLUMNS = ("id", "name", "image_path")


class Row(NamedTuple):
    """One line of a catalogue. `reason` is None, or says why the row cannot be used."""

    number: int  # counted from 1 over all files, header lines left out
    id: str
    fields: dict[str, str]
    reason: str | None


codecs.register_error("cp1252-gaps", lambda error: (error.object[error.start : error.end].decode("latin-1"), error.end))


def text_encoding(path: str | Path) -> dict[str, str]:
    """How open() reads it: utf-8-sig, utf-16 (by its BOM) or, where the bytes are not UTF-8, as Windows does: cp1252,
    with Latin-1 for its gaps."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as handle:
        head = handle.read(2)
        if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return {"encoding": "utf-16"}
        handle.seek(0)
        try:
            while block := handle.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return {"encoding": "cp1252", "errors": "cp1252-gaps"}
    return {"encoding": "utf-8-sig"}


class Catalogue:
    """One or several CSV files read as one stream of rows.

    Finds encoding (UTF-8 with or without BOM, UTF-16, Windows-1252) and delimiter (comma, semicolon, tab, bar). Values
    are kept to the letter; of columns with the same name the second is called name_2. A row without id, with an id seen
    before, without image_path or with too many fields is given with its reason; the first of several rows with the same
    id is the one that counts. Raises Fail for a missing or empty file, for a column that is missing or there twice, and
    for a file that ends within quotes: what the open quote swallowed would be lost without a word.
    """

    def __init__(self, paths: list[str | Path]):
        csv.field_size_limit(1 << 24)
        self.sources = [(Path(path), *self._dialect(Path(path))) for path in paths]
        self.columns = list(dict.fromkeys(name for *_, header in self.sources for name in header))

    @staticmethod
    def _dialect(path: Path) -> tuple[dict[str, str], str, list[str]]:
        """Encoding (as open() takes it), delimiter and header of one file."""
        try:
            encoding = text_encoding(path)
            with open(path, newline="", **encoding) as handle:
                line = handle.readline(1 << 20)
        except FileNotFoundError:
            raise Fail(f"{path}: no such CSV; check --input", USAGE) from None
        except IsADirectoryError:
            raise Fail(f"{path}: is a folder, not a CSV; check --input", USAGE) from None
        except UnicodeError as error:
            raise Fail(f"{path}: not readable as text ({error}); export it again as UTF-8") from None
        headers = [(d, _header(next(csv.reader([line], delimiter=d), []))) for d in ",;\t|"]
        delimiter, header = max(headers, key=lambda pair: (set(REQUIRED_COLUMNS) <= set(pair[1]), len(pair[1])))
        if not line.strip():
            raise Fail(f"{path}: is empty; a header with {', '.join(REQUIRED_COLUMNS)} is needed")
        missing = [name for name in REQUIRED_COLUMNS if name not in header]
        if missing:
            raise Fail(f"{path}: no column {', '.join(missing)}; the header has {', '.join(header)[:200]}", USAGE)
        if twice := [name for name in REQUIRED_COLUMNS if header.count(name) > 1]:
            raise Fail(f"{path}: two columns are called {twice[0]}; rename the one that is not meant", USAGE)
        return encoding, delimiter, _numbered(header)

    def __iter__(self) -> Iterator[Row]:
        seen: dict[str, None] = {}  # as a set, in a third of a set's memory
        number = 0
        for path, encoding, delimiter, header in self.sources:
            records = _records(path, encoding, delimiter)
            next(records)
            for values in records:
                if not values:  # a blank line is no row
                    continue
                number += 1
                fields = dict.fromkeys(self.columns, "") | dict(zip(header, values, strict=False))
                yield Row(number, fields["id"], fields, self._reason(fields, len(values) - len(header), seen))
                seen[fields["id"]] = None

    @staticmethod
    def _reason(fields: dict[str, str], surplus: int, seen: dict[str, None]) -> str | None:
        if not fields["id"].strip():
            return "missing id"
        if surplus > 0:
            return "too many fields"
        if fields["id"] in seen:
            return "duplicate id"
        return None if fields["image_path"].strip() else "missing image_path"


def _header(names: list[str]) -> list[str]:
    """Names of columns; the required ones may come in any case, unless one is there to the letter."""
    names = [name.strip() for name in names]
    for wanted in REQUIRED_COLUMNS:
        if wanted not in names:
            names = [wanted if name.lower() == wanted else name for name in names]
    return names


def _numbered(names: list[str]) -> list[str]:
    """Each name once: a second "tag" is "tag_2", or whatever number is free."""
    header: list[str] = []
    for name in names:
        if name in header:
            free = (f"{name}_{number}" for number in itertools.count(2))
            name = next(other for other in free if other not in header and other not in names)
        header.append(name)
    return header


def _records(path: Path, encoding: dict[str, str], delimiter: str) -> Iterator[list[str]]:
    """The values of each row, the header's first. Raises Fail for what cannot be read, and at an end within quotes."""
    ended = False
    with open(path, newline="", **encoding) as handle:

        def lines() -> Iterator[str]:
            nonlocal ended
            yield from handle
            ended = True
            yield "end"  # a row of its own, unless open quotes swallow it

        reader = csv.reader(lines(), delimiter=delimiter)
        while not ended:
            begun = reader.line_num + 1
            try:
                values = next(reader)
            except (csv.Error, UnicodeError) as error:
                raise Fail(f"{path}, line {reader.line_num}: {error}; mend that line") from None
            if not ended:
                yield values
            elif reader.line_num > begun:
                raise Fail(f"{path}, line {begun}: the quotes opened there are never closed; mend that line")


def csv_rows(handle: Any) -> Any:
    """What a csv.writer writes to, so that rows end in a newline alone.

    Told to end them so itself, it would leave a lone carriage return in a value unquoted, which readers take for a new
    row.
    """
    return types.SimpleNamespace(write=lambda row: handle.write(row.removesuffix("\r\n") + "\n"))


def images_folder(images: str | None, inputs: list[str]) -> Path:
    """The folder that image_path is relative to: --images, else the folder of the first CSV. Fails if not there."""
    folder = Path(images) if images else Path(inputs[0]).parent
    if not folder.is_dir():
        raise Fail(f"{folder}: no such images folder; set --images to the folder that image_path is relative to", USAGE)
    return folder.resolve()


def reject(row: Row, reason: str, detail: str = "") -> dict[str, Any]:
    """One line of a rejects file."""
    fields = {"image_path": row.fields.get("image_path", ""), "name": row.fields.get("name", "")}
    return {"id": row.id, "row": row.number, "reason": reason, "detail": detail} | fields


# --------------------------------------------------------------------------------------------------------------------
# Metadata and prompts

ATTRIBUTES = ("style", "material", "color", "object_type")
SYNONYMS = {
    "gray": "grey", "light gray": "light grey", "dark gray": "dark grey", "couch": "sofa", "settee": "sofa",
    "bookshelf": "bookcase", "book shelf": "bookcase", "armoire": "wardrobe", "closet": "wardrobe",
    "night stand": "nightstand", "bedside table": "nightstand", "mid century": "mid-century",
    "mid-century modern": "mid-century", "midcentury": "mid-century", "scandi": "scandinavian",
    "nordic": "scandinavian", "wooden": "wood", "metallic": "metal",
    "multicolour": "multicolor", "multi-color": "multicolor", "colour": "color",
}  # fmt: skip
UNKNOWN = {"", "unknown", "n/a", "na", "none", "null", "nan", "-", "other", "various"}


@functools.lru_cache(4096)  # a catalogue has few
def uniform(value: str) -> str:
    """An attribute in its one spelling: lower case, single spaces, synonyms made one; "" where it says nothing."""
    value = " ".join(value.lower().replace("_", " ").split()).strip(" .,;")
    value = " ".join(SYNONYMS.get(word, word) for word in SYNONYMS.get(value, value).split())
    return "" if value in UNKNOWN else value


def clean_metadata(fields: dict[str, str]) -> dict[str, str]:
    """Title and the four attributes of a cleaned row; the title falls back to the shop's name."""
    title = " ".join((fields.get("clean_title") or fields.get("name") or "").split())
    title = " ".join(SYNONYMS.get(word.lower(), word) for word in title.split())
    return {"title": title} | {name: uniform(fields.get(name) or "") for name in ATTRIBUTES}


TEMPLATES = ("{subject}", "a photo of {article} {subject}", "{title}, {details}", "{article} {subject} for the home")


def prompts(meta: dict[str, str]) -> list[str]:
    """Every template filled for one item, without repeats; stage 2 picks one by id, stage 3 another each epoch.

    Only attributes that the title does not already hold are added, so no word stands twice.
    """
    title = meta["title"].lower()
    words = f" {title} ".replace(",", " ")
    kind = meta["object_type"] if meta["object_type"] and f" {meta['object_type']} " not in words else ""
    title = " ".join(filter(None, (title, kind))) or "product"
    details = [v for v in (meta[name] for name in ("color", "style", "material")) if v and f" {v} " not in words]
    subject = " ".join([*details, title])
    article = "an" if subject[:1] in "aeiou" else "a"
    filled = [
        template.format(subject=subject, title=title, details=" ".join(details), article=article)
        for template in TEMPLATES
        if details or "{details}" not in template
    ]
    return list(dict.fromkeys(filled))
