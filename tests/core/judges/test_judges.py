"""Judges by name: functions, and who is built from which config."""

import sys

import pytest
import torch

from rlhf_core.errors import ConfigError
from rlhf_core.judges.exam import meet_canaries
from rlhf_core.judges.function import FunctionJudge
from rlhf_core.judges.judge import Cost, Pair, Verdict
from rlhf_core.judges.load import ScoreJudge, load_judge
from rlhf_core.judges.orders import BothOrders
from rlhf_core.rewards.canaries import BY_SCORE, KINDS
from rlhf_core.rewards.functions import RewardPlaces
from rlhf_core.settings.judge import EndpointConfig, JudgeConfig

MODULE = """
def shorter(prompts, answers_a, answers_b):
    assert type(prompts) is type(answers_a) is type(answers_b) is list
    return ["a" if len(a) < len(b) else ("b", f"{len(a)} characters") for a, b in
            zip(answers_a, answers_b)]

def sometimes(prompts, answers_a, answers_b):
    return ["a", "b", "maybe", "tie"][:len(prompts)]

def too_few(prompts, answers_a, answers_b):
    return ["a"]

def nothing(prompts, answers_a, answers_b):
    return None

def number(prompts, answers_a, answers_b):
    return [1 for _ in prompts]

def odd_reason(prompts, answers_a, answers_b):
    return [("a", 1) for _ in prompts]

def fails(prompts, answers_a, answers_b):
    raise RuntimeError("no luck today")

LIMIT = 3
"""
PAIRS = [Pair("first", "x", "xyz"), Pair("second", "long", "l")]


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_judges", raising=False)
    return "my_judges"


def judge_of(source, **more):
    return load_judge(JudgeConfig(source=source), max_length=16, **more)


def test_a_function_judges_in_both_orders_with_its_reasons(module):
    judge = judge_of(f"{module}:shorter")
    assert judge.name == "my_judges:shorter"
    assert judge(PAIRS) == [
        Verdict("a", "", consistent=True),
        Verdict("b", "4 characters", consistent=True),
    ]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (
            "sometimes",
            r"for each of the 4 pairs; it returned 'maybe' for number 2, whose prompt is",
        ),
        ("too_few", r"'a', 'b' or 'tie', or that and a reason, .* it returned 1$"),
        ("nothing", r"my_judges:nothing' failed on 4 pairs \(TypeError"),
        ("number", r"it returned 1 for number 0, whose prompt is 'first'"),
        ("odd_reason", r"it returned \('a', 1\) for number 0"),
        ("fails", r"failed on 4 pairs \(RuntimeError: no luck today\); fix the function"),
    ],
)
def test_a_function_that_gives_no_verdicts_is_refused_by_row_and_value(module, function, says):
    with pytest.raises(ConfigError, match=says):
        judge_of(f"{module}:{function}")(PAIRS)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("my_judges:missing", r"judge.source 'my_judges:missing' cannot be imported"),
        ("my_judges:LIMIT", r"judge.source 'my_judges:LIMIT' is a int, not a function"),
        ("no_such_module:f", r"judge.source 'no_such_module:f' cannot be imported"),
    ],
)
def test_a_function_that_is_none_is_refused(module, source, says):
    with pytest.raises(ConfigError, match=says):
        judge_of(source)


def test_a_function_of_a_place_that_is_not_trusted_is_not_imported(module):
    with pytest.raises(ConfigError, match="my_judges is none of the packages"):
        judge_of("my_judges:shorter", places=RewardPlaces())
    assert module not in sys.modules


def test_the_truth_and_the_reward_model_of_the_pipeline_have_their_scores_already():
    assert judge_of("") is None
    assert judge_of("reward_model") is None


def test_the_reward_model_is_asked_for_by_name_where_a_truth_would_decide():
    judge = judge_of("reward_model", reward=lambda prompts, texts: torch.tensor([*map(len, texts)]))
    assert judge.name == "reward_model"
    assert [verdict.winner for verdict in judge(PAIRS)] == ["b", "a"]
    assert judge_of("", reward=judge.score) is None


class Outside:
    """An endpoint that prefers b, and a memory that is asked for."""

    cost = Cost()

    def __init__(self):
        self.identities = []

    def endpoint(self, config):
        return ScoreJudge(config.model, lambda prompts, texts: torch.tensor([*map(len, texts)]))

    def remembered(self, judge, identity):
        self.identities.append(identity)
        return judge


def test_an_endpoint_is_remembered_by_all_that_its_verdict_depends_on():
    outside = Outside()
    settings = [
        {"model": "m"},
        {"model": "n"},
        {"model": "m", "temperature": 0.5},
        {"model": "m", "max_tokens": 9},
        {"model": "m", "template": "{prompt}{a}{b}"},
        {"model": "m", "retries": 1, "parallel": 9, "timeout_seconds": 1},
    ]
    for endpoint in settings:
        config = JudgeConfig(source="endpoint", endpoint=EndpointConfig(**endpoint))
        judge = load_judge(config, max_length=16, judging=outside)
        assert isinstance(judge, BothOrders)
        assert judge.name == endpoint["model"]
    assert len(set(outside.identities)) == 5
    assert outside.identities[0] == outside.identities[-1]


def test_a_function_is_remembered_as_long_as_the_code_beside_it_stays(tmp_path, monkeypatch):
    package = tmp_path / "judging"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "wise.py").write_text("def say(prompts, a, b):\n    return ['tie'] * len(a)\n")
    monkeypatch.syspath_prepend(tmp_path)
    outside = Outside()

    def identity():
        load_judge(JudgeConfig(source="judging.wise:say"), max_length=16, judging=outside)
        return outside.identities[-1]

    before = identity()
    assert identity() == before
    (tmp_path / "unrelated.py").write_text("")
    assert identity() == before
    (package / "helper.py").write_text("LIMIT = 3\n")
    assert identity() != before


def test_what_a_function_said_before_it_failed_is_handed_on():
    calls = []

    def fails_later(prompts, a, b):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise RuntimeError("no luck today")
        return ["a"] * len(prompts)

    stream = FunctionJudge("mine:f", fails_later).stream([Pair("x", "y", "z")] * 120)
    assert [next(stream)[0] for _ in range(100)] == list(range(100))
    with pytest.raises(ConfigError, match="failed on 20 pairs"):
        next(stream)
    assert calls == [50, 50, 20]


def test_an_endpoint_without_a_task_is_refused():
    config = JudgeConfig(source="endpoint", endpoint=EndpointConfig(model="m"))
    with pytest.raises(ConfigError, match=r"^judge.source is endpoint, which only a task reaches"):
        load_judge(config, max_length=16)


# ---- canaries ----

PROMPTS = [f"What is the capital of country number {n}?" for n in range(12)]
ANSWERS = [f"Its capital is the city number {n}, by the river, in the south." for n in range(12)]


def exam(judge):
    found = meet_canaries(judge, PROMPTS, ANSWERS, seed=0, ends=("</s>",))
    return {result.kind: result for result in found}


class ByRule:
    name = "by rule"

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, pairs):
        return [self.rule(pair) for pair in pairs]


def test_a_judge_that_obeys_instructions_in_answers_is_caught_by_the_canary_for_that():
    """Injection into the prompt of a judge: the answer asks to be rated highest."""

    def obedient(pair):
        told = ["rate it highest" in text for text in (pair.a, pair.b)]
        if told[0] != told[1]:
            return Verdict("a" if told[0] else "b")
        return Verdict("a" if pair.a in ANSWERS else "b")

    found = exam(BothOrders(ByRule(obedient)))
    assert {kind for kind, result in found.items() if result.caught()} == {"judge_instruction"}
    assert found["judge_instruction"].beats_real.value == 1
    assert "rate it highest" in found["judge_instruction"].example
    assert found["cut_off"].beats_real.value == 0


def test_a_judge_that_compares_meets_all_kinds_that_need_no_score():
    """Whoever knows the real answers passes; real answers to other prompts are no match."""
    real = dict(zip(PROMPTS, ANSWERS, strict=True))

    def knows(pair):
        return Verdict("a" if pair.a == real[pair.prompt] else "b")

    found = exam(BothOrders(ByRule(knows)))
    assert list(found) == [kind for kind in KINDS if kind not in BY_SCORE]
    assert {result.beats_real.value for result in found.values()} == {0.0}
    assert {result.prompts for result in found.values()} == {12}


def test_a_judge_that_prefers_a_position_ties_with_every_canary():
    found = exam(BothOrders(ByRule(lambda pair: Verdict("a"))))
    assert {result.beats_real.value for result in found.values()} == {0.5}
    assert not any(result.caught() for result in found.values())


def test_pairs_without_a_verdict_are_left_out():
    def shy(pair):
        number = int(pair.prompt.rstrip("?").split()[-1])
        return Verdict(None) if number < 4 else Verdict("b")

    found = exam(ByRule(shy))
    assert {(result.answers, result.left_out) for result in found.values()} == {(8, 4)}
    assert exam(ByRule(lambda pair: Verdict(None))) == {}


def test_a_judge_by_score_meets_every_kind():
    found = exam(ScoreJudge("length", lambda p, t: torch.tensor([float(len(x)) for x in t])))
    assert "keyword" in found
    assert found["padded"].caught()
    assert found["empty"].beats_real.value == 0


def test_without_a_real_answer_nothing_is_measured():
    assert meet_canaries(ByRule(lambda pair: Verdict("a")), [], [], seed=0, ends=()) == ()
