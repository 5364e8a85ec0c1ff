"""s3:// paths of common.py against moto on loopback, through a proxy that cuts, stalls and refuses."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

import common
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
    common._s3_client.cache_clear()
    client = common._s3_client(os.getpid())
    client.create_bucket(Bucket="shop")
    yield moto
    common._s3_client.cache_clear()


@pytest.fixture
def faulty(s3, monkeypatch):
    """The same behind a proxy that spoils connections; gives the proxy."""
    with FaultyProxy(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        common._s3_client.cache_clear()
        yield proxy


def test_what_is_put_is_listed_read_and_removed(s3, tmp_path):
    common.put_whole("s3://shop/a/b.txt", b"hello")
    local = tmp_path / "big"
    local.write_bytes(CONTENT * 2)
    common.put_whole("s3://shop/a/big.tar", local)
    assert common.list_files("s3://shop/a") == [("b.txt", 5), ("big.tar", len(CONTENT) * 2)]
    assert common.list_files("s3://shop/a/") == common.list_files("s3://shop/a")
    assert common.read_bytes("s3://shop/a/big.tar") == CONTENT * 2
    assert common.exists("s3://shop/a/b.txt") and not common.exists("s3://shop/a/b")
    with common.open_read("s3://shop/a/big.tar", 1000, 50) as handle:
        assert handle.read(50) == CONTENT[1000:1050]
    with common.open_read("s3://shop/a/big.tar") as handle:
        for at in (5_000_000, 17, 9_999_999):
            handle.seek(at)
            assert handle.read(300) == (CONTENT * 2)[at : at + 300]
    common.remove("s3://shop/a/b.txt")
    assert [name for name, _ in common.list_files("s3://shop/a")] == ["big.tar"]


def test_parts_of_a_killed_upload_are_removed_by_the_next(s3, tmp_path):
    client = common._s3_client(os.getpid())
    client.create_multipart_upload(Bucket="shop", Key="x/big.tar")
    assert not common.exists("s3://shop/x/big.tar")
    common.put_whole("s3://shop/x/big.tar", b"whole")
    assert not client.list_multipart_uploads(Bucket="shop").get("Uploads")
    assert common.read_bytes("s3://shop/x/big.tar") == b"whole"


def test_cut_stalled_and_refused_connections_lose_nothing(faulty, tmp_path):
    faulty.cut, faulty.refuse = 0.4, 0.15
    local = tmp_path / "big"
    local.write_bytes(CONTENT * 2)
    common.put_whole("s3://shop/f/big.tar", local)
    assert common.read_bytes("s3://shop/f/big.tar") == CONTENT * 2
    assert faulty.cuts >= 2 and faulty.refusals >= 1, "nothing was spoilt: the test proves nothing"


def test_an_object_that_changes_while_it_is_read_is_noticed(s3):
    common.put_whole("s3://shop/c", CONTENT)
    with common.open_read("s3://shop/c") as handle:
        handle.read(10)
        common.put_whole("s3://shop/c", CONTENT[::-1])
        with pytest.raises(common.Fail, match="412"):
            handle.seek(8_000_000)
            handle.read(10)


def test_missing_and_forbidden_fail_at_once_with_url_and_cause(s3, monkeypatch):
    start = time.monotonic()
    with pytest.raises(common.Fail, match=r"s3://shop/none: S3 answers 404"):
        common.read_bytes("s3://shop/none")
    with pytest.raises(common.Fail, match=r"s3://nobucket/x: S3 answers 404"):
        common.put_whole("s3://nobucket/x", b"")
    with pytest.raises(common.Fail, match=r"s3://nobucket: S3 answers 404 NoSuchBucket"):
        common.list_files("s3://nobucket")
    with FaultyProxy(s3) as proxy:
        proxy.forbid = True
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        common._s3_client.cache_clear()
        with pytest.raises(common.Fail, match=r"s3://shop/x: S3 answers 403 .*AWS_ACCESS_KEY_ID"):
            common.read_bytes("s3://shop/x")
    assert time.monotonic() - start < 10


def _read(path, results):
    results.put(common.digest(common.read_bytes(path)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_alike(s3, method):
    common.put_whole("s3://shop/p", CONTENT)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    processes = [context.Process(target=_read, args=("s3://shop/p", results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [common.digest(CONTENT)] * 2
    for process in processes:
        process.join()
