"""A digest says whether files are the same, and is the SHA-256 that other tools compute."""

import hashlib
import subprocess

import pytest

from rlhf_core import digests
from rlhf_core.digests import content_digest, tree_digest


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.jsonl").write_bytes(b"two\n")
    (tmp_path / "a.jsonl").write_bytes(b"one\n")
    (tmp_path / "deep" / "c.txt").write_bytes(b"")
    return tmp_path


def test_the_digest_of_a_file_is_that_of_sha256sum(tree):
    printed = subprocess.run(
        ["sha256sum", tree / "a.jsonl"], capture_output=True, text=True, check=True
    ).stdout
    assert content_digest([tree / "a.jsonl"]) == printed.split()[0]


def test_of_several_files_the_bytes_count_and_the_order(tree):
    a, b = tree / "a.jsonl", tree / "b.jsonl"
    assert content_digest([a, b]) == hashlib.sha256(b"one\ntwo\n").hexdigest()
    assert content_digest([a, b]) != content_digest([b, a])


def test_a_file_of_many_blocks_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "BLOCK", 3)
    (tmp_path / "x").write_bytes(b"0123456789")
    assert content_digest([tmp_path / "x"]) == hashlib.sha256(b"0123456789").hexdigest()


def test_of_a_tree_names_sizes_and_bytes_count(tree):
    tables = b"a.jsonl 4\none\nb.jsonl 4\ntwo\n"
    assert tree_digest(tree, "*.jsonl") == hashlib.sha256(tables).hexdigest()
    assert tree_digest(tree) == hashlib.sha256(tables + b"deep/c.txt 0\n").hexdigest()


def test_another_name_is_another_tree(tree):
    before = tree_digest(tree)
    (tree / "deep" / "c.txt").rename(tree / "deep" / "d.txt")
    assert tree_digest(tree) != before
