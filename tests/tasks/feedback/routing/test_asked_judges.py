"""How sure a judge is, and what its habits make of that."""

import math

import pytest
import torch

from rlhf_core.judges.judge import Pair, Verdict
from rlhf_core.judges.load import ScoreJudge
from rlhf_core.judges.orders import BothOrders
from rlhf_core.labelling.verdicts import JudgeHabits
from tasks.feedback.routing.judging import AskedJudge

PAIR = Pair("prompt", "a" * 300, "b" * 100)


class Scripted:
    """Says what it is told about (first, second) answers, by their first letter."""

    name = "scripted"

    def __init__(self, **said):
        self.said, self.asked = said, []

    def __call__(self, pairs):
        self.asked += pairs
        return [Verdict(self.said[f"{pair.a[0]}{pair.b[0]}"]) for pair in pairs]


@pytest.mark.parametrize(
    ("ab", "ba", "opinion"),
    [
        ("a", "b", (1.0, 1.0)),  # the same answer in both orders
        ("b", "a", (0.0, 0.0)),
        ("a", "a", (1.0, 0.0)),  # whatever is first
        ("tie", "b", (0.5, 1.0)),
        ("a", None, None),
        (None, "a", None),
    ],
)
def test_a_verdict_is_taken_at_its_word(ab, ba, opinion):
    judge = Scripted(ab=ab, ba=ba)
    [heard] = AskedJudge(judge)([PAIR])
    assert judge.asked == [PAIR, Pair("prompt", PAIR.b, PAIR.a)]
    assert (heard.opinion and (heard.opinion.a_first, heard.opinion.b_first)) == opinion
    assert heard.a_first.winner == ab
    # The second verdict is about the same answers, not about their places.
    assert heard.b_first.winner == {"a": "b", "b": "a"}.get(ba, ba)


def test_a_judge_that_is_wrapped_is_asked_once_for_each_order():
    judge = Scripted(ab="a", ba="b")
    assert len(AskedJudge(BothOrders(judge))([PAIR])) == 1
    assert len(judge.asked) == 2


def test_a_model_of_rewards_says_how_sure_it_is():
    judge = ScoreJudge("s", lambda prompts, texts: torch.tensor([len(t) / 100 for t in texts]))
    [heard] = AskedJudge(judge)([PAIR])
    assert heard.opinion.a_first == heard.opinion.b_first
    assert heard.opinion.chance == pytest.approx(1 / (1 + math.exp(-2)))
    assert heard.a_first.winner == heard.b_first.winner == "a"


def test_habits_make_a_verdict_worth_less_or_more():
    fond = JudgeHabits(1.0, 1.0, 1.0, 100.0, 2.0)  # of the left, and of what is long
    [long] = AskedJudge(Scripted(ab="a", ba="b"), fond)([PAIR])
    [short] = AskedJudge(Scripted(ab="b", ba="a"), fond)([PAIR])
    # The longer answer won. From the right it says more, and that is what both are worth.
    assert long.opinion.a_first == long.opinion.b_first
    assert 0.5 < fond.chance_of_left(True, (300, 100)) < long.opinion.chance < 0.75
    assert long.opinion.chance == pytest.approx(1 - fond.chance_of_left(False, (100, 300)))
    # The shorter one won in spite of that.
    assert long.opinion.chance < 1 - short.opinion.chance
    assert not long.opinion.is_sure(0.8)
    [sides] = AskedJudge(Scripted(ab="a", ba="a"), fond)([PAIR])
    assert not sides.opinion.is_sure(0.5)
    assert short.opinion.is_sure(0.8)
    [tie] = AskedJudge(Scripted(ab="tie", ba="tie"), fond)([PAIR])
    assert tie.opinion.chance == 0.5


def test_who_votes_against_the_rewards_answers_nothing_alone():
    contrary = JudgeHabits(-3.0, 0.0, 0.0, 100.0, 3.0)
    for said in ({"ab": "a", "ba": "b"}, {"ab": "b", "ba": "a"}):
        [heard] = AskedJudge(Scripted(**said), contrary)([PAIR])
        assert heard.opinion.chance == 0.5
