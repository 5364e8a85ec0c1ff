"""What two or more of the five scripts share: settings, errors, files, storage, catalogues, images, prompts, shards.

Importing it costs little: torch, boto3 and Pillow are imported by the functions that need them.
The order is: settings, errors and progress, files, storage, catalogue, images, prompts, shards, search.
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
import random
import re
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
    """Stage 1. Sizes in bytes, times in seconds, prices in US dollars for a million tokens."""

    model: str = setting("gpt-5-nano", "chat model that reads title and photo")
    reasoning_effort: str | None = setting(None, "effort sent with each request; by default what suits the model")
    max_completion_tokens: int = setting(500, "tokens an answer may take, reasoning included; doubled when cut off")
    image_size: int = setting(512, "longest side of the photo as sent; smaller photos are not enlarged")
    jpeg_quality: int = setting(85, "quality of photos that are encoded anew")
    image_detail: str = setting("low", "detail at which the model looks at the photo", ("low", "high", "auto"))
    max_batch_file_size: int = setting(90_000_000, "bytes that a request file stays below; the API takes 200 MB")
    max_requests_per_file: int = setting(49_000, "requests in a file; the API takes 50,000")
    max_concurrent_batches: int = setting(1, "batches in flight at once")
    max_enqueued_tokens: int | None = setting(None, "tokens in flight at once; by default learned from refusals")
    poll_interval: float = setting(600, "seconds between two looks at running batches")
    pilot: int = setting(100, "requests sent first, which must come back sound; 0 sends all at once")
    pilot_sound: float = setting(0.95, "share of the pilot that must be parsed before the rest is sent")
    max_attempts: int = setting(3, "times a row is asked before it is rejected")
    max_failed: float = setting(0.05, "share of rejected rows above which the exit is 1")
    max_cost: float | None = setting(None, "US dollars; nothing is sent that might cost more in all")
    price_input: float | None = setting(None, "price of input tokens, for models that are not in the table")
    price_output: float | None = setting(None, "price of output tokens, for models that are not in the table")
    limit: int | None = setting(None, "rows of the input that count; by default all")
    workers: int | None = setting(None, "processes that read photos; by default one for each core")
    sync: bool = setting(False, "ask /v1/chat/completions row by row, for servers without a Batch API")
    concurrency: int = setting(8, "requests in flight at once with --sync")
    retry_failed: bool = setting(False, "ask again for rows whose attempts are used up")
    timeout: float = setting(600, "seconds after which a call counts as lost")
    settle: float = setting(30, "seconds that a batch with a lost answer has to show up before it is created again")
    backoff: float = setting(1, "seconds of the first wait after a failed call; doubled each time, 600 at most")


@dataclasses.dataclass(frozen=True)
class PrepConfig:
    """Stage 2."""

    image_size: int = setting(224, "pixels a side of the letterboxed JPEGs")
    quality: int = setting(95, "JPEG quality in the shards")
    seed: int = setting(42, "of the split, the order and the prompt templates")
    mini_shards: int = setting(5, "train shards that mini_train holds again")
    max_failed: float = setting(0.05, "share of rows that may be rejected before the exit code is 1")


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
    epochs: int = setting(5, "passes over the train split")
    effective_batch_size: int | None = setting(
        None, "pairs contrasted with each other in one step (unset: an eighth of the train split, 32 to 1024)"
    )
    micro_batch_size: str = setting("auto", "pairs in memory at once, a number, or auto: as many as fit; same result")
    lr: float = setting(1e-4, "peak learning rate of the projections and the temperature")
    lora_lr: float = setting(1e-3, "peak learning rate of LoRA; 5e-6 suits thousands of small steps, not large batches")
    weight_decay: float = setting(0.01, "of AdamW; none on temperature and biases")
    schedule: str = setting("cosine", "of the learning rates, after the warm-up", ("cosine", "onecycle"))
    warmup: float = setting(0.1, "share of the steps in which the rates rise to their peak")
    clip_norm: float = setting(1.0, "largest norm of the gradient")
    lora_r: int = setting(16, "rank of LoRA")
    lora_alpha: int = setting(32, "LoRA's update is scaled by alpha / rank")
    lora_dropout: float = setting(0.05, "dropout before LoRA")
    captions: str = setting("varied", "another prompt each epoch, or the shard's own", ("varied", "fixed"))
    augment: str = setting("none", "none, crop and flip, or rotation and blur too", ("none", "simple", "advanced"))
    views: int = setting(4, "fixed augmented views of a picture where its tower is frozen and runs but once")
    precision: str = setting("auto", "auto: bf16 on a GPU, fp32 elsewhere", ("auto", "fp32", "bf16", "fp16"))
    optimizer: str = setting(
        "adamw", "8 bits save 15 MB for LoRA of a ViT-B-32; 30 times slower on a CPU", ("adamw", "adamw8bit")
    )
    patience: int | None = setting(None, "stop after so many epochs without a better validation MRR")
    grad_checkpointing: bool = setting(False, "compute activations twice to save memory")
    compile: bool = setting(False, "torch.compile the towers; pays on a GPU, after minutes of compiling")
    wise: bool = setting(False, "export the interpolation with the base weights that validates best (WiSE-FT)")
    probe: str | None = setting(None, "CSV with image_path,caption of general pictures: shows what was forgotten")
    max_failed: float = setting(0.05, "share of samples that may be unreadable")
    limit: int | None = setting(None, "use only the first N samples of each split")
    seed: int = setting(42, "of order, captions, augmentation, dropout and LoRA's start")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int = setting(2, "threads that read and decode pictures; they need no /dev/shm")
    cache_gb: float = setting(50.0, "disk for shards fetched from S3; what is over is read by ranges, each epoch")
    checkpoint_minutes: float = setting(10.0, "time between checkpoints within an epoch")
    checkpoint_url: str | None = setting(None, "s3://bucket/prefix that checkpoints are copied to and resumed from")
    wandb: bool = setting(False, "log to Weights & Biases")
    wandb_artifacts: bool = setting(False, "send the best checkpoint there too")
    resume: bool = setting(True, "go on from the newest checkpoint")


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """Stage 4."""

    batch_size: int = setting(128, "pictures encoded at once; lower it when memory runs out")
    precision: str = setting(
        "auto", "auto: bf16 where the processor computes in it, checked against fp32", ("auto", "fp32", "bf16")
    )
    max_failed: float = setting(0.05, "share of pictures that may be unreadable")
    draws: int = setting(10_000, "resamples behind each interval of the report")
    seed: int = setting(42, "of the resamples")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int | None = setting(None, "threads that read and decode pictures; by default one for each core")
    cache_gb: float = setting(50.0, "disk for shards fetched from S3; what is over is read by ranges, a picture each")


@dataclasses.dataclass(frozen=True)
class ArenaConfig:
    """Stage 5."""

    top_k: int = setting(4, "results shown in each row")
    query: str = setting("image", "what is searched with: a picture, or its prompt", ("image", "text"))
    queries: int = setting(2000, "most queries asked about; duplicate groups of the test split, object types in turn")
    votes_needed: int = setting(210, "decided votes aimed at; 820, 210, 97 find a 55, 60, 65% win rate at 80% power")
    shared: float = setting(0.2, "share of the queries that three judges see, for their agreement")
    repeated: float = setting(0.05, "share of a judge's queries that come again with sides exchanged")
    picture_size: int = setting(480, "pixels a side of every picture shown")
    seed: int = setting(42, "seed of the choice of queries and of each judge's order")
    host: str = setting("127.0.0.1", "address to listen at; any but loopback needs the judges' token")
    port: int = setting(8000, "port to listen at; 0 takes a free one")
    trusted_host: str | None = setting(None, "further names, separated by commas, that browsers may call the server by")
    threads: int = setting(32, "requests answered at once; pictures take turns among them")
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
# Progress


def progress(items: Iterable, what: str, total: int | None = None, unit: str = "row", every: float = 15.0) -> Iterator:
    """Yield the items, showing a tqdm bar on a terminal, or a plain line every 15 s in a log; a rate at the end."""
    if sys.stderr and sys.stderr.isatty():
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
# Storage: local paths and s3://bucket/key alike


def is_s3(path: str | Path) -> bool:
    """Whether the path is an S3 URL."""
    return str(path).startswith("s3://")


def join(base: str | Path, *parts: str) -> str:
    """A path below a local folder or an S3 prefix."""
    return "/".join([str(base).rstrip("/"), *parts]) if is_s3(base) else str(Path(base, *parts))


S3_ATTEMPTS = 16  # of one request or one stretch of reading, with growing, jittered pauses in between: half a minute
S3_FIRST_ATTEMPTS = 4  # of reaching an endpoint that never answered yet; it is likelier mistyped than down
S3_PART = 16 << 20  # bytes of one part of a multipart upload; what is smaller goes up in one request
S3_TIMEOUT = 20  # seconds of silence after which a connection counts as lost
S3_SKIP = 256 << 10  # bytes that are read and dropped on a short seek, where a new request would take longer
S3_BUSY = {408, 425, 429, 500, 502, 503, 504}  # HTTP answers that may be another one a moment later
_s3_answered: set[int] = set()  # processes that an S3 endpoint has answered


@functools.lru_cache(maxsize=1)
def _s3_client(pid: int):
    """One boto3 client a process (a forked one must not share its parent's connections)."""
    import boto3
    from botocore.config import Config

    # boto's own retries are off: they stop for good when a quota is used up, and know nothing of broken reads.
    config = Config(
        retries={"total_max_attempts": 1},
        connect_timeout=min(10, S3_TIMEOUT),
        read_timeout=S3_TIMEOUT,
        max_pool_connections=64,
    )
    client = boto3.session.Session().client("s3", config=config)
    client.meta.events.register_last("before-call.s3", _send_unasked)
    return client


def _send_unasked(params: dict, **_) -> None:
    """Do not wait for "100 Continue", which botocore reads for ever when it is cut. Returns None: more would be taken
    for the answer."""
    params["headers"].pop("Expect", None)


def _s3_split(path: str) -> tuple[str, str]:
    """Bucket and key of an S3 URL."""
    bucket, _, key = path.removeprefix("s3:").lstrip("/").partition("/")
    if not bucket:
        raise Fail(f"{path}: names no bucket; write s3://bucket/prefix", USAGE)
    return bucket, key


def s3_pause(attempt: int) -> None:
    """Wait before the next attempt: up to 0.1 s after the first, twice as long each time, 5 s at most."""
    time.sleep(min(5.0, 0.1 * 2**attempt) * random.random())


def _s3(path: str, act: Callable[[Any, str, str], Any]) -> Any:
    """act(client, bucket, key), repeated where the connection broke or S3 was busy.

    What S3 refuses (403, 404 and the like) becomes Fail at once: one line with the URL and the cause.
    """
    import botocore.exceptions as failures
    from botocore.parsers import ResponseParserError

    bucket, key = _s3_split(path)
    for attempt in range(S3_ATTEMPTS):
        try:
            result = act(_s3_client(os.getpid()), bucket, key)
            _s3_answered.add(os.getpid())
            return result
        except failures.ClientError as error:
            _s3_answered.add(os.getpid())
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") not in S3_BUSY:
                raise Fail(f"{path}: {_s3_refusal(error)}") from None
            cause = str(error)
        except (failures.NoCredentialsError, failures.PartialCredentialsError):
            raise Fail(f"{path}: no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
        except (failures.ParamValidationError, failures.NoRegionError, failures.ProfileNotFound, ValueError) as error:
            raise Fail(f"{path}: {' '.join(str(error).split())[:200]}; check the AWS_ variables") from None
        except (failures.BotoCoreError, ResponseParserError, OSError) as error:  # of the connection
            cause = str(error)
            if attempt + 1 >= S3_FIRST_ATTEMPTS and os.getpid() not in _s3_answered:
                break
        s3_pause(attempt)
    where = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    where, cause = (re.sub(r"//[^/@ ]*@", "//", text) for text in (where, " ".join(cause.split())))  # no password
    raise Fail(f"{path}: {where} cannot be reached ({cause[:160]}); check AWS_ENDPOINT_URL and run again")


def _told(answer: dict, *names: str) -> dict:
    """The answer, if it holds all of this: a connection cut within the headers looks like a short, whole answer."""
    if any(name not in answer for name in names):
        raise ConnectionError("the answer was cut")
    return answer


def _s3_refusal(error: Exception) -> str:
    """What S3 answered, and what to do."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    said = error.response.get("Error", {})
    cause = said.get("Code") if said.get("Code") not in (None, str(status)) else said.get("Message", "")
    hints = {
        403: "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy",
        404: "check bucket and key, or make it first",
        412: "the object changed while it was being read; run again",
    }
    return f"S3 answers {status} {cause}; {hints.get(status, 'see the AWS_ variables and the bucket')}"


class S3Reader(io.RawIOBase):
    """A seekable stream of one object. A connection that breaks is opened again where it broke (Range, If-Match)."""

    def __init__(self, path: str, offset: int, length: int | None):
        self.path, self.position, self.body, self.etag = path, offset, None, None
        self.end = None if length is None else offset + length
        self._connect()

    def _connect(self) -> None:
        """Open the body at the position; the first time, learn size and version of the object from the answer."""
        last = "" if self.end is None else self.end - 1
        wanted = {"Range": f"bytes={self.position}-{last}"} | ({"IfMatch": self.etag} if self.etag else {})

        def get(client, bucket, key):
            import botocore.exceptions as failures

            try:
                got = client.get_object(Bucket=bucket, Key=key, **wanted)
                partial = got["ResponseMetadata"]["HTTPStatusCode"] == 206
                return _told(got, "ETag", "ContentRange" if partial or self.position else "ContentLength")
            except failures.ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 416:
                    raise
                return None  # an empty object, or an offset behind the end

        got = _s3(self.path, get)
        if got is None:
            self.end = self.position
            return
        if self.etag is None:
            self.etag = got["ETag"]
            size = int(got["ContentRange"].rpartition("/")[2]) if "ContentRange" in got else got["ContentLength"]
            self.end = size if self.end is None else min(self.end, size)
        self.body = got["Body"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.end}[whence] + offset
        if self.body is not None and 0 < target - self.position <= S3_SKIP and target < self.end:
            skipped = bytearray(target - self.position)
            view = memoryview(skipped)
            while self.position < target and (count := self.readinto(view[: target - self.position])):
                assert count > 0
        if target != self.position:
            self._drop()
            self.position = target
        return self.position

    def tell(self) -> int:
        return self.position

    def _drop(self) -> None:
        if self.body is not None:
            self.body.close()
        self.body = None

    def readinto(self, buffer) -> int:
        if self.position >= self.end:
            return 0
        import botocore.exceptions as failures
        import urllib3.exceptions as broken

        wanted = min(len(buffer), self.end - self.position)
        for attempt in range(S3_ATTEMPTS):
            if self.body is None:
                self._connect()
            try:
                data = self.body.read(wanted)
                cause = "the connection ended early"
            except (failures.BotoCoreError, broken.HTTPError, OSError) as error:
                data, cause = b"", str(error)
            if data:
                buffer[: len(data)] = data
                self.position += len(data)
                return len(data)
            self._drop()
            s3_pause(attempt)
        raise Fail(f"{self.path}: reading broke off {S3_ATTEMPTS} times at byte {self.position} ({cause[:120]})")

    def close(self) -> None:
        self._drop()
        super().close()


def open_read(path: str | Path, offset: int = 0, length: int | None = None) -> io.BufferedIOBase:
    """Open for reading from `offset`; of an S3 object at most `length` bytes are asked for.

    Raises FileNotFoundError for a local file that is missing, Fail with URL and cause for an object.
    """
    if is_s3(path):
        return io.BufferedReader(S3Reader(str(path), offset, length), 1 << 20)
    handle = open(path, "rb")
    handle.seek(offset)
    return handle


def read_bytes(path: str | Path) -> bytes:
    """The whole content of a file or object."""
    with open_read(path) as handle:
        return handle.read()


def put_whole(path: str | Path, data: bytes | Path) -> None:
    """Store bytes, or a finished local file, so that `path` holds it whole or not at all.

    S3 shows an object only when it is complete; parts that a killed upload left behind are removed by the next one.
    """
    if is_s3(path):
        _put_object(str(path), data)
    elif isinstance(data, Path):
        import shutil

        with whole_file(path) as temporary, open(data, "rb") as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    else:
        write_whole(path, data)


def _put_object(path: str, data: bytes | Path) -> None:
    """Upload in one request, or in parts where it is large."""
    size = data.stat().st_size if isinstance(data, Path) else len(data)
    if size <= S3_PART:
        body = data.read_bytes() if isinstance(data, Path) else data
        _s3(path, lambda client, bucket, key: client.put_object(Bucket=bucket, Key=key, Body=body))
        return
    abort_uploads(path)

    def create(client, bucket, key):
        return _told(client.create_multipart_upload(Bucket=bucket, Key=key), "UploadId")["UploadId"]

    def send(client, bucket, key):
        part = {"UploadId": upload, "PartNumber": len(parts) + 1}
        return _told(client.upload_part(Bucket=bucket, Key=key, Body=block, **part), "ETag") | part

    upload = _s3(path, create)
    try:
        parts = []
        with open(data, "rb") if isinstance(data, Path) else io.BytesIO(data) as source:
            while block := source.read(S3_PART):
                sent = _s3(path, send)
                parts.append({"ETag": sent["ETag"], "PartNumber": sent["PartNumber"]})
        _complete_upload(path, upload, parts, size)
    except BaseException:
        with contextlib.suppress(Exception):
            abort_uploads(path)
        raise


def _complete_upload(path: str, upload: str, parts: list[dict], size: int) -> None:
    """Make the object out of its parts. Where the answer was lost and the upload is gone, it had been made."""
    done = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
    try:
        _s3(path, lambda client, bucket, key: client.complete_multipart_upload(Bucket=bucket, Key=key, **done))
    except Fail as error:
        if "NoSuchUpload" not in str(error):
            raise
        read = _s3(path, lambda client, bucket, key: _told(client.head_object(Bucket=bucket, Key=key), "ContentLength"))
        if read["ContentLength"] != size:
            raise


def abort_uploads(path: str) -> int:
    """End unfinished multipart uploads that killed processes left: to this key or, where it ends in "/", below it.

    Returns how many. Nobody sees such parts, but they are paid for. A policy that forbids listing them is no failure.
    """

    def act(client, bucket: str, key: str) -> int:
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=key)
        found = [upload for page in pages for upload in _told(page, "Bucket").get("Uploads", [])]
        stale = [upload for upload in found if upload["Key"] == key or key.endswith("/")]
        for upload in stale:
            client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return len(stale)

    try:
        return _s3(path, act)
    except Fail as error:
        if "S3 answers" in str(error):
            return 0
        raise


def copy_whole(source: str | Path, target: str | Path) -> None:
    """The same content under a second path of the same storage: a hard link where possible, S3's own copy there."""
    if is_s3(source):
        place = dict(zip(("Bucket", "Key"), _s3_split(str(source)), strict=True))
        _s3(str(target), lambda client, bucket, key: client.copy_object(Bucket=bucket, Key=key, CopySource=place))
        return
    with whole_file(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            import shutil

            shutil.copyfile(source, temporary)


def exists(path: str | Path) -> bool:
    """Whether a file or object is there."""
    if not is_s3(path):
        return Path(path).is_file()
    return any(name == "" for name, _ in list_files(path))


def list_files(prefix: str | Path) -> list[tuple[str, int]]:
    """(path relative to prefix, size in bytes) of every file below it, sorted; temporary files left out."""
    if not is_s3(prefix):
        root = Path(prefix)
        files = (path for path in root.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
        return sorted((path.relative_to(root).as_posix(), path.stat().st_size) for path in files)

    def pages(client, bucket: str, key: str) -> list[tuple[str, int]]:
        found = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        return [(entry["Key"], entry["Size"]) for page in found for entry in _told(page, "Name").get("Contents", [])]

    objects = _s3(str(prefix).rstrip("/"), pages)
    key = _s3_split(str(prefix).rstrip("/"))[1]
    below = [
        (name[len(key) :], size) for name, size in objects if name[len(key) : len(key) + 1] in ("", "/") or not key
    ]
    return sorted((name.removeprefix("/"), size) for name, size in below)


def remove(path: str | Path) -> None:
    """Delete a file or object if it is there."""
    if is_s3(path):
        _s3(str(path), lambda client, bucket, key: client.delete_object(Bucket=bucket, Key=key))
    else:
        Path(path).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------------
# Catalogue: CSV files as shops export them

REQUIRED_COLUMNS = ("id", "name", "image_path")


class Row(NamedTuple):
    """One line of a catalogue. `reason` is None, or says why the row cannot be used."""

    number: int  # counted from 1 over all files, header lines left out
    id: str
    fields: dict[str, str]
    reason: str | None


def text_encoding(path: str | Path) -> str:
    """utf-8-sig, utf-16 (by its BOM) or, where the bytes are not UTF-8, cp1252 with Latin-1 for its gaps."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as handle:
        head = handle.read(2)
        if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        handle.seek(0)
        try:
            while block := handle.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "latin-1"
    return "utf-8-sig"


class Catalogue:
    """One or several CSV files read as one stream of rows.

    Finds encoding (UTF-8 with or without BOM, UTF-16, Latin-1) and delimiter (comma, semicolon, tab, bar). Values are
    kept to the letter. A row without id, with an id seen before, without image_path or with too many fields is given
    with its reason; the first of several rows with the same id is the one that counts. Raises Fail for a missing or
    empty file and for a missing column.
    """

    def __init__(self, paths: list[str | Path]):
        csv.field_size_limit(1 << 24)
        self.sources = [(Path(path), *self._dialect(Path(path))) for path in paths]
        self.columns = list(dict.fromkeys(name for *_, header in self.sources for name in header))

    @staticmethod
    def _dialect(path: Path) -> tuple[str, str, list[str]]:
        """Encoding, delimiter and header of one file."""
        try:
            encoding = text_encoding(path)
            with open(path, encoding=encoding, newline="") as handle:
                line = handle.readline(1 << 20)
        except FileNotFoundError:
            raise Fail(f"{path}: no such CSV; check --input", USAGE) from None
        except IsADirectoryError:
            raise Fail(f"{path}: is a folder, not a CSV; check --input", USAGE) from None
        except UnicodeError as error:
            raise Fail(f"{path}: not readable as text ({error}); export it again as UTF-8") from None
        headers = [(d, [name.strip() for name in next(csv.reader([line], delimiter=d), [])]) for d in ",;\t|"]
        delimiter, header = max(headers, key=lambda pair: len(pair[1]))
        if not line.strip():
            raise Fail(f"{path}: is empty; a header with {', '.join(REQUIRED_COLUMNS)} is needed")
        header = [name.lower() if name.lower() in REQUIRED_COLUMNS else name for name in header]
        missing = [name for name in REQUIRED_COLUMNS if name not in header]
        if missing:
            raise Fail(f"{path}: no column {', '.join(missing)}; the header has {', '.join(header)[:200]}", USAGE)
        return encoding, delimiter, header

    def __iter__(self) -> Iterator[Row]:
        seen: dict[str, None] = {}  # as a set, in a third of a set's memory
        number = 0
        for path, encoding, delimiter, header in self.sources:
            with open(path, encoding=encoding, newline="") as handle:
                reader = csv.reader(handle, delimiter=delimiter)
                next(reader)
                while True:
                    try:
                        values = next(reader)
                    except StopIteration:
                        break
                    except (csv.Error, UnicodeError) as error:
                        raise Fail(f"{path}, line {reader.line_num}: {error}; mend that line") from None
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
# Images: one loader for every stage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # JPEG brings phones' MPO along
MAX_PIXELS = 64_000_000  # 192 MB as RGB; a header that announces more is refused before anything is decoded


class BadImage(Exception):
    """A picture that cannot be used; `reason` is a short fixed phrase to count by, `detail` the particulars."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self):  # so that worker processes can send it back
        return BadImage, (self.reason, self.detail)


# For processes that read pictures. They scale on one core each, and keep freed memory for the next picture: to have the
# kernel clear a megabyte anew for each would cost a third of their time.
WORKER_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "100000000",
    "MALLOC_TRIM_THRESHOLD_": "100000000",
}


@functools.lru_cache(4096)  # photos lie many to a folder
def _real_folder(path: str) -> str:
    return os.path.realpath(path)


def resolve_image(folder: Path, image_path: str) -> Path:
    """The file that a row names, links followed; `folder` is resolved already. Raises BadImage."""
    try:
        above, name = os.path.split(os.path.join(folder, image_path.strip().replace("\\", "/")))
        path = Path(_real_folder(above), name)
        if name in ("", ".", "..") or path.is_symlink():
            path = path.resolve()
        inside, there = path.is_relative_to(folder), path.is_file()
    except (ValueError, OSError, RuntimeError) as error:  # NUL in the name, too long, a loop of links
        raise BadImage("missing file", str(error)) from None
    if not inside:
        raise BadImage("outside the images folder", image_path)
    if not there:
        raise BadImage("missing file", image_path)
    return path


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


def _as_rgb(image):
    """A decoded picture as RGB in sRGB, laid on white where it is transparent."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey
        wide = np.asarray(image).astype(np.int64)
        if image.mode != "I" or wide.max(initial=0) > 255:
            wide >>= 8
        image = Image.fromarray(np.clip(wide, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise BadImage("unsupported image", "floating-point pixels")
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    elif image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("RGB")
    transform = _to_srgb(profile, image.mode) if profile else None
    if transform is not None:
        from PIL import ImageCms

        image = ImageCms.applyTransform(image, transform)
    image = image if image.mode == "RGB" else image.convert("RGB")  # converting copies
    if alpha is not None:
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=alpha)
        image = white
    return image


def load_image(source: Path | bytes, side: int | None = None):
    """Decode one picture: upright, on white, sRGB, as a Pillow image of mode RGB.

    With `side`, a large JPEG is decoded at 1/2, 1/4 or 1/8 (never to less than `side` pixels on its shorter side).
    Raises BadImage; never decodes more than MAX_PIXELS.
    """
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # our own limit stands below and names the size
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage("image too large", f"{width} x {height} px")
            if side:
                image.draft(None, (side, side))
            image.load()
            rotated = image.getexif().get(0x0112, 1) != 1
            upright = ImageOps.exif_transpose(image) if rotated else image
            return _as_rgb(upright)
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        empty = len(source) == 0 if isinstance(source, bytes) else Path(source).stat().st_size == 0
        raise BadImage("empty file" if empty else "not an image") from None
    except FileNotFoundError:
        raise BadImage("missing file", str(source)) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on broken bytes
        reason = "truncated image" if "truncated" in str(error).lower() else "broken image"
        raise BadImage(reason, str(error)[:200]) from None


@functools.lru_cache(256)
def _lanczos(source: int, target: int) -> list[tuple[slice, slice, Any]]:
    """Lanczos-3 from `source` samples to `target`, as [(outputs, inputs, float32 weights)] of a few outputs each.

    Weights are multiples of 2^-15 that add up to 1: their products with bytes and the sums of these are exact in
    float32 (below 2^24 units), so that every processor gives the same pixels in whichever order it adds.
    """
    import numpy as np

    wide = max(source / target, 1.0)  # pixels that the filter's unit covers
    center = (np.arange(target) + 0.5) * source / target
    first = np.maximum(0, (center - 3 * wide + 0.5).astype(int))
    last = np.minimum(source, (center + 3 * wide + 0.5).astype(int))
    taps = first[:, None] + np.arange((last - first).max())  # [target, taps]: inputs of each output
    x = (taps + 0.5 - center[:, None]) / wide
    weights = np.where((abs(x) < 3) & (taps < last[:, None]), np.sinc(x) * np.sinc(x / 3), 0)
    weights = np.rint(weights / weights.sum(axis=1, keepdims=True) * 2**15)
    rows = np.arange(target)
    weights[rows, weights.argmax(axis=1)] += 2**15 - weights.sum(axis=1)
    bands = []
    for start in range(0, target, 12):
        band = slice(start, min(start + 12, target))
        inputs = slice(int(first[start]), int(last[band].max()))
        dense = np.zeros((band.stop - start, source + taps.shape[1]), np.float32)
        dense[rows[band, None] - start, taps[band]] = weights[band] / 2**15
        bands.append((band, inputs, np.ascontiguousarray(dense[:, inputs])))
    return bands


def _resize_rows(image, height: int):
    """An RGB picture scaled to `height`, its width kept."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image)
    flat = pixels.reshape(len(pixels), -1)
    values = np.empty((height, flat.shape[1]), np.float32)
    for outputs, inputs, weights in _lanczos(len(flat), height):
        np.matmul(weights, flat[inputs].astype(np.float32), out=values[outputs])
    values += 0.5
    np.clip(values, 0, 255, out=values)
    return Image.fromarray(values.astype(np.uint8).reshape(height, *pixels.shape[1:]))


def resize(image, size: tuple[int, int]):
    """An RGB picture scaled to (width, height) as Pillow's LANCZOS does, in less than half the time.

    The products go to BLAS. Pixels differ by 1, rarely (above 70 dB PSNR).
    """
    from PIL.Image import Transpose

    width, height = size
    return _resize_rows(
        _resize_rows(image.transpose(Transpose.TRANSPOSE), width).transpose(Transpose.TRANSPOSE), height
    )


def fit(image, side: int):
    """An RGB picture scaled, up or down, so that its longer side has `side` pixels."""
    scale = side / max(image.size)
    return resize(image, tuple(max(1, round(length * scale)) for length in image.size))


def on_square(image, side: int):
    """An RGB picture, not larger than that, in the middle of a white square of `side` pixels."""
    from PIL import Image

    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def letterbox(image, side: int):
    """An RGB picture scaled onto a white square of `side` pixels."""
    return on_square(fit(image, side), side)


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


# --------------------------------------------------------------------------------------------------------------------
# Shards: the manifest, and where each member of a tar file lies

SPLITS = ("train", "validation", "test")


class Sample(NamedTuple):
    """One sample of a shard: where its members lie, as {extension: (offset, bytes)}."""

    key: str
    members: dict[str, tuple[int, int]]


def load_manifest(shards: str | Path) -> dict[str, Any]:
    """manifest.json of a shard folder; Fail says how to make one."""
    path = join(shards, "manifest.json")
    try:
        manifest = json.loads(read_bytes(path))
        for split in [manifest["splits"]["train"], *manifest["splits"].values()]:
            for shard in split["shards"]:
                _check_entry(shard)
    except FileNotFoundError:
        raise Fail(f"{path}: no such manifest; run 2_prepare.py first, or check --shards") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Fail(f"{path}: not a manifest of shards ({error}); run 2_prepare.py again") from None
    return manifest


def _check_entry(shard: dict[str, Any]) -> None:
    """Raise ValueError, TypeError or KeyError for what is no shard of a manifest; name and digest become paths."""
    names = re.fullmatch(r"\w+/[\w-]+\.tar", shard["name"]), re.fullmatch("[0-9a-f]{64}", shard["sha256"])
    numbers = (shard["samples"], shard["bytes"])
    if not all(names) or not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        raise ValueError(f"a shard is {str(shard)[:60]}")


def shard_names(manifest: dict[str, Any], split: str) -> list[str]:
    """Names of a split's shards, relative to the shard folder; Fail where the split has no sample."""
    shards = manifest.get("splits", {}).get(split, {}).get("shards", [])
    if not shards:
        raise Fail(f"the {split} split is empty; give more rows, or check the split report of 2_prepare.py")
    return [shard["name"] for shard in shards]


def index_shard(path: str | Path) -> list[Sample]:
    """Samples of a tar file in order, read from its headers. Raises Fail where the tar is cut or damaged."""
    import tarfile

    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with open_read(path) as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise Fail(f"{path}: damaged shard ({error}); run 2_prepare.py again") from None
    return [Sample(key, members) for key, members in samples.items()]


def read_member(handle, member: tuple[int, int]) -> bytes:
    """The bytes of one member from an open shard."""
    handle.seek(member[0])
    return handle.read(member[1])


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
        raise Fail(f"query vector {int(np.flatnonzero(~np.isfinite(lengths))[0])} holds NaN or infinity")
    first = 0
    for block in _blocks(vectors):
        if block.shape[1] != width:
            raise Fail(f"vectors of width {block.shape[1]} cannot be searched with queries of width {width}")
        longest = np.sqrt(np.einsum("ij,ij->i", block, block, dtype=np.float64))
        if not np.isfinite(longest).all():
            bad = first + int(np.flatnonzero(~np.isfinite(longest))[0])
            raise Fail(f"vector {bad} holds NaN or infinity; make the vectors again")
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


def model_place(name: str, embeddings: str | Path) -> tuple[str, str | None]:
    """(model, pretrained) for clip.load_clip, from a model's name in the metadata of master.parquet.

    A folder is relative to where the Parquet file lies, so that the data can be moved; else to the working directory.
    """
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        beside = Path(embeddings).parent / folder
        return f"local-dir:{beside if beside.is_dir() else folder}", None
    model, _, pretrained = name.partition("/")
    return model, pretrained or None
