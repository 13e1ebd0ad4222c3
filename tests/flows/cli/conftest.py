"""What tests of the command share."""

import os

import pytest
from typer.testing import CliRunner

from flows.__main__ import app


@pytest.fixture
def feedback(tmp_path, monkeypatch):
    """Calls `rlhf feedback` with a home of its own."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    os.environ.update({"RLHF_HOME": str(tmp_path / "home"), "COLUMNS": "200"})
    os.environ.pop("RLHF_FEEDBACK_DATABASE", None)

    def call(*arguments):
        return CliRunner().invoke(app, ["feedback", *map(str, arguments)])

    yield call
    os.environ.clear()
    os.environ.update(before)
