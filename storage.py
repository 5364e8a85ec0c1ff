"""Local folders and s3://bucket/key alike, and the shards in them: the manifest, and where each member of a tar lies.

Everything is stored whole or not at all; reads and uploads go on after cut, stalled and refused connections, and what
S3 refuses for good fails at once with URL and cause. boto3 is imported by the first call that needs it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from common import USAGE, Fail, whole_file, write_whole

# --------------------------------------------------------------------------------------------------------------------
# Storage


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
    from dotenv import load_dotenv

    load_dotenv(".env")  # keys and endpoint, where the environment has none

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


def scaled_up(manifest: dict[str, Any], clip: Any) -> str:
    """One line where a model takes larger pictures than the shards hold, else ""."""
    side = manifest.get("settings", {}).get("image_size") or clip.size
    if side >= clip.size:
        return ""
    return (
        f"note: {clip.name} takes pictures of {clip.size} px, the shards hold {side} px, which are scaled up;"
        f" 2_prepare.py --image-size {clip.size} (make: IMAGE_SIZE={clip.size}) would show it more"
    )


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
