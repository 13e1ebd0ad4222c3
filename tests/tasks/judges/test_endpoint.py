"""A judge behind a real HTTP server: what it is asked, what goes wrong, what is said of it."""

import logging
import socket
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from model_server import KEY, completion, longer, serving

from rlhf_core.errors import ConfigError, UserError
from rlhf_core.judges.judge import Cost, Pair, Verdict
from rlhf_core.judges.orders import BothOrders
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.judge import TEMPLATE, EndpointConfig
from tasks.judges.endpoint import IN_A_ROW, EndpointJudge
from tasks.judges.meter import Meter

PAIRS = [Pair(f"prompt {n}", "x" * (n % 5), "y" * (n % 3)) for n in range(1, 13)]


class Case:
    """A judge at a server, with everything that is counted about it."""

    def __init__(self, server, key=KEY, **settings):
        self.meter, self.logger = Meter(), MemoryLogger()
        config = EndpointConfig(**{"model": "m", "timeout_seconds": 5} | settings)
        self.judge = EndpointJudge(
            config, server, key, logger=self.logger, meter=self.meter, pause=0.02
        )


def by_length(pair):
    return "tie" if len(pair.a) == len(pair.b) else "a" if len(pair.a) > len(pair.b) else "b"


def test_each_pair_gets_its_verdict_with_the_reason_and_all_is_counted():
    with serving() as server:
        case = Case(server.address, parallel=3)
        said = case.judge(PAIRS)
    assert [verdict.winner for verdict in said] == [by_length(pair) for pair in PAIRS]
    assert said[0] == Verdict("tie", "1 against 1 characters.")
    cost = case.meter.cost
    assert (cost.requests, cost.tokens) == (12, 1200)
    assert cost.seconds > 0
    assert case.logger.phases[0] == ("asking m", 0, 12)
    assert case.logger.phases[-1] == ("asking m", 12, 12)


def test_the_request_is_the_template_with_the_settings():
    with serving() as server:
        Case(server.address, temperature=0.3, max_tokens=77).judge(PAIRS[:1])
    [request] = server.requests
    assert request["messages"] == [
        {
            "role": "user",
            "content": TEMPLATE.replace("{prompt}", "prompt 1")
            .replace("{a}", "x")
            .replace("{b}", "y"),
        }
    ]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0.3, 77)


def test_requests_run_at_the_same_time_up_to_the_limit():
    with serving(trouble=lambda number, question: 0.2) as server:
        Case(server.address, parallel=4).judge(PAIRS)
    assert server.most_at_once == 4


def rate_limited(number, question):
    if number < 2:
        return 429, {"error": {"message": "Rate limit reached"}}
    return None


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"error": {"message": "Rate limit reached", "code": "rate_limit_exceeded"}}),
        (500, {"error": {"message": "oops"}}),
        (503, b"upstream is gone"),
        (408, {}),
        (200, b"<html>no json</html>"),
        (200, {"choices": []}),
        (200, {"choices": "none"}),
        (200, b"[1, 2]"),
        (200, completion("I cannot decide between A and B.")),
        (200, completion(None)),
        (200, completion([{"type": "text", "text": "A"}])),
        (200, completion("A", finish_reason="length")),
    ],
    ids=str,
)
def test_what_may_pass_is_repeated_until_there_is_a_verdict(trouble):
    with serving(trouble=lambda number, _: trouble if number < 3 else None) as server:
        case = Case(server.address, retries=3, parallel=1)
        said = case.judge(PAIRS[:2])
    assert [verdict.winner for verdict in said] == [by_length(pair) for pair in PAIRS[:2]]
    assert len(server.requests) == case.meter.cost.requests == 5


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ((429, {"error": {"message": "Rate limit reached"}}), "429"),
        ((200, completion("Both are good.")), "the last line of the reply is not A, B or TIE"),
        (
            (200, completion("A", finish_reason="length")),
            "cut off at judge.endpoint.max_tokens 256",
        ),
        ((200, b"<html>"), "Expecting value"),
    ],
    ids=str,
)
def test_after_the_last_retry_a_question_is_unanswered_and_no_tie(trouble, says, caplog):
    def only_the_first(number, question):
        return trouble if "prompt 1\n" in question else None

    with serving(trouble=only_the_first) as server:
        case = Case(server.address, retries=2)
        said = case.judge(PAIRS[:4])
    assert said[0].winner is None
    assert says in said[0].reason
    assert [verdict.winner for verdict in said[1:]] == [by_length(pair) for pair in PAIRS[1:4]]
    assert len(server.requests) == 3 + 3
    assert "left 1 of 4 questions unanswered" in caplog.text


def test_a_refused_question_is_not_repeated():
    """As one that is too long for the model: the next may do."""

    def too_long(number, question):
        said = {"error": {"message": "This model's maximum context length is 100 tokens"}}
        return (400, said) if "prompt 2\n" in question else None

    with serving(trouble=too_long) as server:
        said = Case(server.address).judge(PAIRS[:3])
    assert len(server.requests) == 3
    assert [verdict.winner is None for verdict in said] == [False, True, False]
    assert "maximum context length" in said[1].reason


def test_a_slow_reply_is_given_up_in_time_and_asked_for_again():
    with serving(trouble=lambda number, _: 1.5 if number == 0 else None) as server:
        case = Case(server.address, timeout_seconds=0.3, parallel=1)
        assert case.judge(PAIRS[:1])[0].winner == "tie"
    assert len(server.requests) == 2


def test_a_server_is_waited_for_as_long_as_it_asks_by_all_requests():
    def full(number, question):
        return (429, {}, {"Retry-After": "1"}) if number == 0 else None

    with serving(trouble=full) as server:
        Case(server.address, parallel=1).judge(PAIRS[:3])
    assert server.times[1] - server.times[0] >= 0.95
    assert server.times[3] - server.times[1] < 0.9


def test_a_server_that_asks_for_too_long_is_not_waited_for():
    later = format_datetime(datetime.now(UTC) + timedelta(hours=2), usegmt=True)
    with serving(trouble=lambda *_: (429, {}, {"Retry-After": later})) as server:
        [said] = Case(server.address).judge(PAIRS[:1])
    assert len(server.requests) == 1
    assert "it asks to wait 7" in said.reason


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"key": "sk-another-key-that-is-wrong"}, "does not accept the key; set RLHF_JUDGE_KEY"),
        ({"model": "n"}, "knows no model n, or the address is wrong; check judge.endpoint.model"),
    ],
)
def test_a_wrong_key_or_model_stops_at_once(settings, says):
    with serving() as server:
        case = Case(server.address, parallel=2, **settings)
        with pytest.raises(ConfigError, match=says):
            case.judge(PAIRS)
    assert len(server.requests) <= 4


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ((403, {"error": {"message": "no"}}), "does not allow this; check what the key"),
        (
            (429, {"error": {"message": "Pay.", "code": "insufficient_quota"}}),
            "has no quota left for this key",
        ),
        (
            (307, {}, {"Location": "http://127.0.0.1:1/v1"}),
            "redirects to http://127.0.0.1:1/v1; set",
        ),
    ],
    ids=str,
)
def test_what_no_question_can_pass_stops_at_once(trouble, says):
    with serving(trouble=lambda *_: trouble) as server, pytest.raises(ConfigError, match=says):
        Case(server.address, parallel=1).judge(PAIRS)
    assert len(server.requests) == 1


def test_the_key_is_in_no_message_log_or_traceback(caplog):
    from rlhf_core import redaction

    caplog.set_level(logging.DEBUG)
    wrong = "sk-another-key-that-is-wrong"
    redaction.remember([wrong])  # as whoever reads the settings does
    redaction.mask_logs()
    with serving() as server:
        case = Case(server.address, key=wrong)
        with pytest.raises(ConfigError) as caught:
            case.judge(PAIRS[:1])
    assert wrong not in str(caught.value)
    assert "***" in str(caught.value)  # the server had repeated it
    assert wrong not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None  # nothing of the library, which has the request
    assert wrong not in caplog.text


def test_a_judge_that_never_answers_is_given_up(caplog):
    many = [Pair(f"prompt {n}", "a", "bb") for n in range(200)]
    with serving(lambda *_: "I would rather not say.") as server:
        case = Case(server.address, retries=0, parallel=2)
        with pytest.raises(
            UserError, match=rf"no verdict on {IN_A_ROW} questions in a row .*rather"
        ):
            case.judge(many)
    assert IN_A_ROW <= len(server.requests) <= IN_A_ROW + 4


def test_a_server_that_is_not_there_is_named_with_its_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    case = Case(address, retries=1)
    with pytest.raises(ConfigError, match=rf"at {address} does not answer \(Connection error"):
        case.judge.try_out()
    [said] = case.judge(PAIRS[:1])
    assert said.winner is None
    assert "Connection refused" in said.reason


def test_the_trial_finds_a_wrong_model_and_only_warns_of_an_odd_reply(caplog):
    with serving() as server:
        Case(server.address).judge.try_out()
        assert caplog.text == ""
        with pytest.raises(ConfigError, match="knows no model"):
            Case(server.address, model="n").judge.try_out()
    with serving(lambda *_: "Hm.") as server:
        Case(server.address).judge.try_out()
    assert len(server.requests) == 1
    assert (
        "replied to an easy question, but the last line of the reply is not A, B or TIE"
        in caplog.text
    )
    bad = {"error": {"message": "temperature must be 1"}}
    with (
        serving(trouble=lambda *_: (400, bad)) as server,
        pytest.raises(ConfigError, match="temperature must be 1"),
    ):
        Case(server.address).judge.try_out()


def test_a_server_that_wants_the_newer_name_of_the_limit_gets_it():
    said = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."

    def modern(number, question):
        old = "max_tokens" in server.requests[number]
        return (400, {"error": {"message": said, "code": "unsupported_parameter"}}) if old else None

    with serving(trouble=modern) as server:
        said = Case(server.address, parallel=2, retries=0, max_tokens=9).judge(PAIRS[:5])
    assert all(verdict.winner for verdict in said)
    assert server.requests[-1]["max_completion_tokens"] == 9
    assert len(server.requests) <= 5 + 2


def test_a_judge_that_prefers_a_position_is_found_out():
    def prefers_first(prompt, a, b):
        return "A"

    with serving(prefers_first) as server:
        said = BothOrders(Case(server.address).judge)([Pair("p", "x", "y"), Pair("q", "z", "z")])
    assert [(v.winner, v.consistent) for v in said] == [("tie", False), ("tie", None)]
    assert len(server.requests) == 2


def test_a_text_with_the_places_of_the_template_stays_as_it_is():
    seen = []
    with serving(lambda *shown: seen.append(shown) or longer(*shown)) as server:
        Case(server.address).judge([Pair("Say {a} and {b}", "{b} {prompt}", "{}")])
    assert seen == [("Say {a} and {b}", "{b} {prompt}", "{}")]


def test_an_interrupted_judge_asks_no_more():
    slow = threading.Event()

    def trouble(number, question):
        slow.set()
        return 0.2

    with serving(trouble=trouble) as server:
        stream = Case(server.address, parallel=2).judge.stream(PAIRS)
        next(stream)
        stream.close()  # as an exception in the thread of the stage does
        time.sleep(0.6)
        assert len(server.requests) <= 4


def test_without_pairs_nobody_is_asked():
    with serving() as server:
        case = Case(server.address)
        assert case.judge([]) == []
    assert case.meter.cost == Cost()
