"""Which exceptions of other libraries are a user's situation, tried with real ones."""

import socket
import sqlite3

import httpx
import pytest
import requests

from flows.cli.failures import explain


def caught(action) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def fill_the_disk():
    with open("/dev/full", "w") as file:  # noqa: PTH123
        file.write("x")


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_full_disk():
    assert explain(caught(fill_the_disk)).startswith("The disk is full (")


def test_a_full_database(tmp_path):
    database = sqlite3.connect(tmp_path / "full.db")
    database.execute("pragma max_page_count = 2")
    error = caught(lambda: database.execute("create table t as select randomblob(100000)"))
    database.close()
    assert explain(error).startswith("The disk is full (")


def test_a_database_in_a_folder_that_does_not_exist(tmp_path):
    error = caught(lambda: sqlite3.connect(tmp_path / "no" / "such.db"))
    assert explain(error).startswith("A file cannot be written or read (unable to open")


def test_a_file_without_permission():
    error = PermissionError(13, "Permission denied", "/there")
    assert explain(error).startswith("A file cannot be written or read (")
    assert "/there" in explain(error)


@pytest.mark.parametrize("get", [requests.get, httpx.get])
def test_a_server_that_is_not_there(get):
    error = caught(lambda: get(closed_port(), timeout=5))
    assert explain(error).startswith("A server cannot be reached (")


def test_the_cause_counts_however_deep_it_lies():
    def wrapped():
        try:
            fill_the_disk()
        except OSError as error:
            raise RuntimeError("could not save") from error

    assert explain(caught(wrapped)).startswith("The disk is full (")


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), KeyError("disk"), FileNotFoundError()])
def test_a_defect_is_not_explained_away(error):
    assert explain(error) == ""


def test_a_chain_that_bites_its_tail_ends():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert explain(first) == ""
