"""Objects at a URL, on a real S3 server, and in a folder: whole or not there, created by one of many, errors of one line."""

from __future__ import annotations

import hashlib
import threading

import pytest

from jsublim.core.bucket import Bucket, check_url
from jsublim.errors import JsublimError, UsageError


@pytest.fixture(scope="module", params=["s3", "folder"])
def bucket(request, tmp_path_factory) -> Bucket:
    return Bucket.at(
        request.getfixturevalue("s3")() if request.param == "s3" else str(tmp_path_factory.mktemp("bucket") / "store")
    )


def test_what_is_written_is_read_and_what_is_not_there_is_none(bucket, tmp_path):
    bucket.write("a/x", b"1")
    bucket.write("a/x", b"22")
    (tmp_path / "file").write_bytes(b"333")
    bucket.upload(tmp_path / "file", "a/y")
    bucket.write("a/deeper/z", b"")
    assert bucket.read("a/x") == b"22" and bucket.read("a/none") is None
    bucket.download("a/y", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"333"
    with pytest.raises(FileNotFoundError):
        bucket.download("a/none", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert bucket.sizes("a") == {"x": 2, "y": 3} and bucket.folders("a") == ["deeper"] and bucket.sizes("none") == {}
    assert bucket.digest("a/y") == (3, hashlib.sha256(b"333").hexdigest()) and bucket.digest("a/none") is None
    bucket.set_aside("a/y")
    assert [bucket.read("a/y"), bucket.read("a/y.damaged")] == [None, b"333"]
    bucket.remove("a/x")
    bucket.remove("a/x")
    assert bucket.read("a/x") is None and bucket.read("a/deeper/z") == b""
    bucket.remove("a")
    assert bucket.folders("") == [] and bucket.read("a/deeper/z") is None


def test_one_of_many_creates_an_object(bucket):
    won = []

    def try_to(number: int) -> None:
        if bucket.create("one", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=try_to, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and bucket.read("one") == str(won[0]).encode()


def test_what_fails_is_said_in_one_line_that_names_the_object(bucket):
    with pytest.raises(JsublimError) as error:
        Bucket.at("s3://no-such-bucket/store").write("rows/x", b"")
    assert "s3://no-such-bucket/store" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["ftp://a/b", "s3://", "s3:///", "http://127.0.0.1/x"])
def test_a_url_that_cannot_be_a_store_is_refused(url):
    with pytest.raises(ValueError, match="give"):
        check_url(url)
    with pytest.raises(UsageError, match=r"^store: "):
        Bucket.at(url)
