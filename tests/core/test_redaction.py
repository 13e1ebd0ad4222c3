"""What looks like a secret, and what is known to be one, never reaches a reader."""

import io
import logging

import pytest

from rlhf_core import redaction
from rlhf_core.config import FileOrHub, Section
from rlhf_core.errors import ConfigError
from rlhf_core.redaction import mask_error, mask_logs, masked, remember


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setattr(redaction, "_known", set())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://me:pw@host:5000/x,", "at http://me:***@host:5000/x,"),
        ("postgresql+psycopg2://u:p@ss/w@db/x", "postgresql+psycopg2://u:***@db/x"),
        ("http:/me:pw@host/x.yaml: no such file", "http:/me:***@host/x.yaml: no such file"),
        ("redis://:pw@host", "redis://:***@host"),
        ("http://me:1234@host/", "http://me:***@host/"),
        ("https://a-token@host/x", "https://***@host/x"),
        ("{'url': 'http://me:pw@host'}", "{'url': 'http://me:***@host'}"),
        ("http://a:b@c and http://d:e@f", "http://a:***@c and http://d:***@f"),
        ("https://h/x?a=1&token=abc&b=2#c", "https://h/x?a=1&token=***&b=2#c"),
        ("https://h/x?api_key=abc", "https://h/x?api_key=***"),
        (
            "https://s3/o?X-Amz-Credential=AK/d&X-Amz-Signature=ff",
            "https://s3/o?X-Amz-Credential=***&X-Amz-Signature=***",
        ),
        ("https://blob/x?sv=1&sig=abc", "https://blob/x?sv=1&sig=***"),
        ("key AKIAABCDEFGHIJKLMNOP is", "key *** is"),
        ("aws_secret_access_key = ab/cd+e", "aws_secret_access_key = ***"),
        ("AWS_SESSION_TOKEN=abc", "AWS_SESSION_TOKEN=***"),
        ("{'Authorization': 'Basic dTpw'}", "{'Authorization': 'Basic ***'}"),
        ("host=db password=pw user=me", "host=db password=*** user=me"),
        ("hf_abcdefghijklmnopqrstuvwx", "***"),
    ],
)
def test_a_secret_is_hidden_and_the_rest_stays(text, shown):
    assert masked(text) == shown
    assert masked(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "there is no model 'demo'; pass models:/demo-policy@champion",
        "http://127.0.0.1:5000/#/models/demo@champion and http://host:80 a@b",
        "http://[::1]:5000/x@y",
        "sqlite:////home/a@b/mlflow.db",
        "--set sft.max_length=2: sft.max_length must be greater",
        "the pad token: <|pad|>, and max_new_tokens=16, eos_token_id=0",
        "C:/data/x@y.jsonl, line 3: 'key' is missing",
        "runs:/0123/data?workflowType=machine_learning&monkey",
    ],
)
def test_what_is_none_is_not_touched(text):
    assert masked(text) == text


def test_a_known_value_is_hidden_wherever_it_is_and_a_short_one_is_not():
    remember(["correct-horse", "correct-horse-battery", "word"])
    assert masked("a correct-horse-battery, a correct-horse, a word") == "a ***, a ***, a word"


def test_our_errors_hide_secrets_wherever_they_are_shown():
    error = ConfigError("MLflow at http://me:secret@host cannot be used")
    assert str(error) == "MLflow at http://me:***@host cannot be used"
    assert "secret" not in f"{error}"


def test_an_error_of_a_library_hides_them_with_its_causes():
    class TheirError(Exception):
        def __init__(self, message):
            super().__init__(message)
            self.message = message

    def fail():
        try:
            raise OSError("http://me:secret@host refused")
        except OSError as cause:
            raise TheirError("API request to http://me:secret@host/api failed") from cause

    with pytest.raises(TheirError) as raised:
        fail()
    error = raised.value
    mask_error(error)
    assert str(error) == error.message == "API request to http://me:***@host/api failed"
    assert str(error.__cause__) == "http://me:***@host refused"


def test_logs_hide_them_in_message_arguments_and_traceback(monkeypatch):
    before = logging.getLogRecordFactory()
    try:
        mask_logs()
        mask_logs()
        stream = io.StringIO()
        logger = logging.Logger("of-the-test")
        logger.addHandler(logging.StreamHandler(stream))
        logger.warning("%s does not respond, %d", "http://me:secret@host", 3)
        logger.warning("nothing %s", "secret here")
        try:
            raise ValueError("http://me:secret@host")
        except ValueError:
            logger.exception("it failed")
    finally:
        logging.setLogRecordFactory(before)
    first, second, *rest = stream.getvalue().splitlines()
    assert first == "http://me:***@host does not respond, 3"
    assert second == "nothing secret here"
    assert rest[-1] == "ValueError: http://me:***@host"
    assert "me:secret" not in "\n".join(line for line in rest if "raise" not in line)


def test_a_path_of_a_config_holds_none():
    class Data(Section):
        path: FileOrHub = ""

    with pytest.raises(ValueError, match=r"'https://me:\*\*\*@host/x.csv' holds a password"):
        Data(path="https://me:secret@host/x.csv")
    assert Data(path="org/name").path == "org/name"
