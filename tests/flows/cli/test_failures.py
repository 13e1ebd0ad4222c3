"""Which exceptions of other libraries are a user's situation, tried with real ones."""

import asyncio
import errno
import socket
import sqlite3

import httpx
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from mlflow import MlflowClient

from flows.cli.failures import explain, was_interrupted


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


def ask_httpx(url: str):
    httpx.get(url, timeout=0.5)


def ask_async_httpx(url: str):
    async def ask():
        async with httpx.AsyncClient() as client:
            await client.get(url, timeout=0.5)

    asyncio.run(ask())


def ask_mlflow(url: str):  # its exceptions come from requests
    MlflowClient(tracking_uri=url).search_experiments(max_results=1)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


@pytest.mark.parametrize("ask", [ask_httpx, ask_async_httpx, ask_mlflow])
def test_a_server_that_is_not_there(ask, impatient):
    error = caught(lambda: ask(closed_port()))
    assert explain(error).startswith(f"A server cannot be reached ({str(error)[:20]}")


@pytest.mark.parametrize("ask", [ask_httpx, ask_async_httpx, ask_mlflow])
def test_a_server_that_says_nothing(ask, impatient):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = caught(lambda: ask(f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert explain(error).startswith("A server cannot be reached (")


@pytest.mark.parametrize("ask", [ask_httpx, ask_async_httpx, ask_mlflow])
def test_a_server_whose_name_nobody_knows(ask, impatient):
    error = caught(lambda: ask("http://rlhf.invalid"))
    assert explain(error).startswith("A server cannot be reached (")


def test_a_model_hub_that_is_switched_off():
    error = OfflineModeIsEnabled("Cannot reach it")
    assert explain(error).startswith("A server cannot be reached (Cannot reach it)")


def test_a_network_without_a_way_there():
    error = OSError(errno.ENETUNREACH, "Network is unreachable")
    assert explain(error).startswith("A server cannot be reached ([Errno")


def test_every_attempt_of_a_group_counts():
    def attempt():
        try:
            raise ExceptionGroup("attempts", [ValueError("x"), ConnectionRefusedError("here")])
        except ExceptionGroup as group:
            raise OSError("All connection attempts failed") from group

    assert explain(caught(attempt)).startswith("A server cannot be reached (All connection")


def test_the_cause_counts_however_deep_it_lies():
    def wrapped():
        try:
            fill_the_disk()
        except OSError as error:
            raise RuntimeError("could not save") from error

    assert explain(caught(wrapped)).startswith("The disk is full (")


@pytest.mark.parametrize(
    "error",
    [
        *(ZeroDivisionError("x"), KeyError("disk"), FileNotFoundError()),
        *(BrokenPipeError(32, "a pipe"), ExceptionGroup("two", [ValueError("a")])),
    ],
)
def test_a_defect_is_not_explained_away(error):
    assert explain(error) == ""


def test_a_chain_that_bites_its_tail_ends():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert explain(first) == ""


def test_a_full_disk_that_is_told_as_text():
    """By the writers of torch and of safetensors, which are not Python."""
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert explain(RuntimeError(text)).startswith("The disk is full (")


def test_lack_of_memory_is_told_as_that():
    error = caught(lambda: torch.empty(2**60, dtype=torch.uint8))
    assert explain(error).startswith("There is not enough memory (")
    assert "micro_batch_size" in explain(error)
    assert explain(MemoryError()).startswith("There is not enough memory (MemoryError)")


def test_a_name_that_no_file_can_have(tmp_path):
    error = caught(lambda: (tmp_path / ("a" * 300)).write_text(""))
    assert explain(error).startswith("A name is too long for this disk (")
    (tmp_path / "file").touch()
    error = caught(lambda: (tmp_path / "file" / "x").write_text(""))
    assert explain(error).startswith("There is no such file or folder (")


def test_an_error_that_ctrl_c_became():
    def imports():
        try:
            raise KeyboardInterrupt
        except BaseException as error:
            raise ImportError("cannot import") from error

    assert was_interrupted(caught(imports))
    assert not was_interrupted(ImportError("cannot import"))


def test_a_sentence_is_short_and_printable():
    said = explain(ConnectionError("\x1b[31m" + "A" * 100_000))
    assert "\\x1b[31mAAA" in said
    assert len(said) < 600
