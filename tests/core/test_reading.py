"""What is no regular file, or unpacks to too much, is not read."""

import gzip
import os
from pathlib import Path

import pytest

from rlhf_core.reading import (
    MIB,
    UNPACKED_ANYWAY,
    UnreadableError,
    exists,
    expanded,
    opened,
    read_whole,
)


def reason(path, most=MIB):
    with pytest.raises(UnreadableError) as caught:
        read_whole(Path(path), most)
    return str(caught.value)


def test_only_a_regular_file_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    assert reason("/dev/zero") == "is a device, not a file"
    assert reason(tmp_path) == "is a folder"
    assert reason(tmp_path / "pipe") == "is a pipe, not a file"
    assert reason(tmp_path / "loop").startswith("cannot be read (Too many levels of symbolic")
    assert reason(tmp_path / ("a" * 300)) == "cannot be read (File name too long)"
    with pytest.raises(FileNotFoundError):
        read_whole(tmp_path / "none", MIB)
    assert not exists(tmp_path / ("a" * 300))


def test_no_more_is_read_than_was_asked_for(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    assert read_whole(path, 1000) == bytes(1000)
    assert reason(path, 999) == "has more than 0 KiB, which is too much to read"
    os.truncate(path, 10**12)  # sparse: a terabyte that takes no space
    assert reason(path) == "has more than 1 MiB, which is too much to read"


def test_an_archive_that_unpacks_to_far_more_than_it_is(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(bytes(UNPACKED_ANYWAY)))
    assert read_whole(path, 1024 * MIB) == bytes(UNPACKED_ANYWAY)
    path.write_bytes(gzip.compress(bytes(UNPACKED_ANYWAY + 1)))
    assert reason(path, 1024 * MIB).startswith("unpacks to more than 64 MiB, 200 times its size")
    with opened(path) as file:
        assert len(file.readline(1000)) == 1000
    path.write_bytes(b"not packed")
    assert reason(path).startswith("cannot be read (Not a gzipped file")


def test_a_home_that_there_is_not(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/data") == Path("/home/me/data")
    with pytest.raises(UnreadableError, match="there is no user 'nosuch'"):
        expanded("~nosuch/data")
    with pytest.raises(UnreadableError, match="null character"):
        expanded("a\0b")
