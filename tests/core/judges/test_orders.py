"""Both orders of a pair: what a judge with a preference for a position can decide, by hand."""

from rlhf_core.judges.judge import Pair, Verdict, shown
from rlhf_core.judges.orders import BothOrders

PAIRS = [Pair("p", "long answer", "short"), Pair("q", "one", "three words here")]


class Scripted:
    """Answers by a rule, and counts what it is asked."""

    name = "scripted"

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def __call__(self, pairs):
        self.asked += pairs
        return [self.rule(pair) for pair in pairs]


def longer(pair):
    gap = len(pair.a) - len(pair.b)
    return Verdict("tie" if gap == 0 else "a" if gap > 0 else "b", f"{gap:+d}")


def test_a_judge_that_reads_gets_its_verdicts_with_the_reason_of_the_order_that_is_shown():
    assert BothOrders(Scripted(longer))(PAIRS) == [
        Verdict("a", "+6", consistent=True),
        Verdict("b", "-13", consistent=True),
    ]


def test_a_judge_that_prefers_a_position_decides_nothing():
    first = BothOrders(Scripted(lambda pair: Verdict("a", "it came first")))
    for verdict in first(PAIRS):
        assert (verdict.winner, verdict.consistent) == ("tie", False)
        assert verdict.reason == "as shown: a, it came first; exchanged: a, it came first"


def test_a_winner_and_a_tie_are_an_inconsistent_tie_and_two_ties_a_consistent_one():
    def unsure(pair):
        return Verdict("a" if pair.a == "long answer" else "tie")

    said = BothOrders(Scripted(unsure))(PAIRS)
    assert said[0] == Verdict("tie", "as shown: a; exchanged: tie", consistent=False)
    assert said[1] == Verdict("tie", "", consistent=True)


def test_a_pair_with_one_order_unanswered_has_no_verdict():
    def half(pair):
        return Verdict(None, "timed out") if pair.a == "short" else Verdict("a")

    assert BothOrders(Scripted(half))(PAIRS[:1]) == [Verdict(None, "timed out")]


def test_equal_answers_are_a_tie_that_nobody_is_asked_about():
    judge = Scripted(longer)
    assert BothOrders(judge)([Pair("p", "same", "same")]) == [
        Verdict("tie", "the answers are equal", consistent=None)
    ]
    assert judge.asked == []


def test_each_question_is_asked_once_and_the_orders_of_a_pair_stand_side_by_side():
    judge = Scripted(longer)
    again = [*PAIRS, PAIRS[0], Pair("p", "short", "long answer")]
    winners = [verdict.winner for verdict in BothOrders(judge)(again)]
    assert winners == ["a", "b", "a", "b"]
    assert judge.asked == [
        Pair("p", "long answer", "short"),
        Pair("p", "short", "long answer"),
        Pair("q", "one", "three words here"),
        Pair("q", "three words here", "one"),
    ]


def test_a_prompt_is_shown_as_text():
    assert shown("Why?") == "Why?"
    assert shown([{"role": "user", "content": "Why?"}]) == "Why?"
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "Really?"},
    ]
    assert shown(chat) == "System: Be brief.\n\nUser: Why?\n\nAssistant: Because.\n\nUser: Really?"
