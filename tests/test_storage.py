"""s3:// paths of common.py against moto on loopback, through a proxy that cuts, stalls and refuses."""

from __future__ import annotations

import multiprocessing
import os
import time
import types

import pytest

import common
import storage
from faulty_proxy import FaultyProxy

CONTENT = bytes(range(256)) * 40_000  # 10 MB: several reads of the buffer


@pytest.fixture(scope="module")
def moto():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3(moto, monkeypatch):
    """Point boto3 at moto with a fresh bucket; gives the port."""
    for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{moto}")
    storage._s3_client.cache_clear()
    client = storage._s3_client(os.getpid())
    client.create_bucket(Bucket="shop")
    yield moto
    storage._s3_client.cache_clear()


@pytest.fixture
def faulty(s3, monkeypatch):
    """The same behind a proxy that spoils connections; gives the proxy."""
    monkeypatch.setattr(storage, "S3_TIMEOUT", 1)
    with FaultyProxy(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        storage._s3_client.cache_clear()
        yield proxy
        storage._s3_client.cache_clear()


def test_what_is_put_is_listed_read_and_removed(s3, tmp_path):
    storage.put_whole("s3://shop/a/b.txt", b"hello")
    storage.put_whole("s3://shop/empty", b"")
    assert storage.read_bytes("s3://shop/empty") == b""
    local = tmp_path / "big"
    local.write_bytes(CONTENT * 2)
    storage.put_whole("s3://shop/a/big.tar", local)
    assert storage.list_files("s3://shop/a") == [("b.txt", 5), ("big.tar", len(CONTENT) * 2)]
    assert storage.list_files("s3://shop/a/") == storage.list_files("s3://shop/a")
    assert storage.read_bytes("s3://shop/a/big.tar") == CONTENT * 2
    assert storage.exists("s3://shop/a/b.txt") and not storage.exists("s3://shop/a/b")
    with storage.open_read("s3://shop/a/big.tar", 1000, 50) as handle:
        assert handle.read(50) == CONTENT[1000:1050]
    with storage.open_read("s3://shop/a/big.tar") as handle:
        for at in (5_000_000, 17, 9_999_999):
            handle.seek(at)
            assert handle.read(300) == (CONTENT * 2)[at : at + 300]
    storage.copy_whole("s3://shop/a/big.tar", "s3://shop/c/copy.tar")
    assert storage.read_bytes("s3://shop/c/copy.tar") == CONTENT * 2
    storage.remove("s3://shop/a/b.txt")
    assert [name for name, _ in storage.list_files("s3://shop/a")] == ["big.tar"]


def test_parts_of_a_killed_upload_are_removed(s3, tmp_path, monkeypatch):
    client = storage._s3_client(os.getpid())
    for key in ("x/big.tar", "x/big.tar.other", "x/z.tar"):
        client.create_multipart_upload(Bucket="shop", Key=key)
    assert not storage.exists("s3://shop/x/big.tar")
    monkeypatch.setattr(storage, "S3_PART", 5 << 20)
    storage.put_whole("s3://shop/x/big.tar", CONTENT)
    left = [upload["Key"] for upload in client.list_multipart_uploads(Bucket="shop")["Uploads"]]
    assert left == ["x/big.tar.other", "x/z.tar"], "an upload to another key may be alive"
    assert storage.read_bytes("s3://shop/x/big.tar") == CONTENT
    assert storage.abort_uploads("s3://shop/x/z") == 0
    assert storage.abort_uploads("s3://shop/x/") == 2
    assert not client.list_multipart_uploads(Bucket="shop").get("Uploads")


def test_a_failed_upload_leaves_no_parts(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "S3_PART", 5 << 20)
    client = storage._s3_client(os.getpid())
    monkeypatch.setattr(client, "complete_multipart_upload", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        storage.put_whole("s3://shop/x/broken.tar", CONTENT)
    assert not storage.exists("s3://shop/x/broken.tar")
    assert not client.list_multipart_uploads(Bucket="shop").get("Uploads")


def test_a_lost_answer_to_the_last_request_is_no_failure(s3, monkeypatch):
    """The object was made, the answer was cut: asked again, S3 knows no such upload."""
    from botocore.exceptions import ClientError

    monkeypatch.setattr(storage, "S3_PART", 5 << 20)
    client = storage._s3_client(os.getpid())
    complete = client.complete_multipart_upload
    calls = []

    def lost(**kwargs):
        if calls:
            said = {"Error": {"Code": "NoSuchUpload"}, "ResponseMetadata": {"HTTPStatusCode": 404}}
            raise ClientError(said, "CompleteMultipartUpload")
        calls.append(complete(**kwargs))
        raise ConnectionResetError("cut")

    monkeypatch.setattr(client, "complete_multipart_upload", lost)
    storage.put_whole("s3://shop/x/lost.tar", CONTENT)
    assert len(calls) == 1 and storage.read_bytes("s3://shop/x/lost.tar") == CONTENT


def test_cut_stalled_and_refused_connections_lose_nothing(faulty, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "S3_PART", 5 << 20)
    faulty.cut, faulty.refuse, faulty.stall, faulty.stall_seconds = 0.4, 0.15, 0.03, 60
    local = tmp_path / "big"
    local.write_bytes(CONTENT)
    for i in range(20):
        storage._s3_client.cache_clear()  # a new connection each, as from another process
        storage.put_whole(f"s3://shop/f/{i}.txt", b"%d" % i)
        assert storage.read_bytes(f"s3://shop/f/{i}.txt") == b"%d" % i
    storage.put_whole("s3://shop/f/big.tar", local)
    assert storage.read_bytes("s3://shop/f/big.tar") == CONTENT
    with storage.open_read("s3://shop/f/big.tar") as handle:
        for at in range(0, len(CONTENT), 1_300_000):
            handle.seek(at)
            assert handle.read(2000) == CONTENT[at : at + 2000]
    assert len(storage.list_files("s3://shop/f")) == 21
    spoilt = faulty.cuts, faulty.refusals, faulty.stalls
    assert faulty.cuts >= 10 and faulty.refusals >= 3 and faulty.stalls, (
        f"too little was spoilt to prove anything: {spoilt}"
    )


def test_a_dead_endpoint_is_named_within_seconds(monkeypatch, s3):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:secret@127.0.0.1:9")
    monkeypatch.setattr(storage, "_s3_answered", set())
    storage._s3_client.cache_clear()
    start = time.monotonic()
    told = r"s3://shop/x: http://127.0.0.1:9 cannot be reached .*AWS_ENDPOINT_URL"
    with pytest.raises(common.Fail, match=told) as failed:
        storage.read_bytes("s3://shop/x")
    assert "secret" not in str(failed.value)
    with pytest.raises(common.Fail, match="names no bucket"):
        storage.list_files("s3://")
    assert time.monotonic() - start < 10


def test_an_index_of_a_shard_takes_few_requests(s3, tmp_path):
    """Headers lie kilobytes apart: reading over what lies between is faster than asking anew for each."""
    import io
    import tarfile

    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(300):
            member = tarfile.TarInfo(f"{i:09d}.jpg")
            member.size = 12_000
            tar.addfile(member, io.BytesIO(bytes(12_000)))
    storage.put_whole("s3://shop/s.tar", tmp_path / "s.tar")
    with FaultyProxy(s3) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.port}"
        storage._s3_client.cache_clear()
        assert len(storage.index_shard("s3://shop/s.tar")) == 300
        assert proxy.connections <= 2


def test_an_object_that_changes_while_it_is_read_is_noticed(s3):
    storage.put_whole("s3://shop/c", CONTENT)
    with storage.open_read("s3://shop/c") as handle:
        handle.read(10)
        storage.put_whole("s3://shop/c", CONTENT[::-1])
        with pytest.raises(common.Fail, match="412"):
            handle.seek(8_000_000)
            handle.read(10)


def test_missing_and_forbidden_fail_at_once_with_url_and_cause(s3, monkeypatch):
    start = time.monotonic()
    with pytest.raises(common.Fail, match=r"s3://shop/none: S3 answers 404 NoSuchKey"):
        storage.read_bytes("s3://shop/none")
    with pytest.raises(common.Fail, match=r"s3://nobucket/x: S3 answers 404"):
        storage.put_whole("s3://nobucket/x", b"")
    with pytest.raises(common.Fail, match=r"s3://nobucket: S3 answers 404 NoSuchBucket"):
        storage.list_files("s3://nobucket")
    with FaultyProxy(s3) as proxy:
        proxy.forbid = True
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        storage._s3_client.cache_clear()
        with pytest.raises(common.Fail, match=r"s3://shop/x: S3 answers 403 .*AWS_ACCESS_KEY_ID"):
            storage.read_bytes("s3://shop/x")
    assert time.monotonic() - start < 10


def _read(path, results):
    results.put(common.digest(storage.read_bytes(path)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_alike(faulty, method):
    storage.put_whole("s3://shop/p", CONTENT)
    faulty.cut, faulty.refuse = 0.4, 0.1
    context = multiprocessing.get_context(method)
    results = context.Queue()
    processes = [context.Process(target=_read, args=("s3://shop/p", results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [common.digest(CONTENT)] * 2
    for process in processes:
        process.join()


def test_keys_and_endpoint_may_stand_in_the_env_file(tmp_path, monkeypatch):
    values = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    values["AWS_DEFAULT_REGION"] = "eu-west-1"
    for name in values:
        monkeypatch.setenv(name, "")  # so that what the file sets is taken back behind this test
        monkeypatch.delenv(name)
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    monkeypatch.chdir(tmp_path)
    storage._s3_client.cache_clear()
    try:
        assert storage._s3_client(0).meta.endpoint_url == "http://127.0.0.1:9"
    finally:
        storage._s3_client.cache_clear()


@pytest.mark.parametrize("settings, told", [({"image_size": 224}, True), ({"image_size": 336}, False), ({}, False)])
def test_pictures_smaller_than_the_model_takes_are_told(settings, told):
    note = storage.scaled_up({"settings": settings}, types.SimpleNamespace(name="ViT-L-14-336", size=336))
    assert ("IMAGE_SIZE=336" in note) == told == bool(note)
