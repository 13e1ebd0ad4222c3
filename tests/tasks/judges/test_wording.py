"""Which replies are a verdict."""

import pytest

from rlhf_core.judges.judge import Pair, Verdict
from rlhf_core.settings.judge import TEMPLATE
from tasks.judges.wording import question, read_reply


@pytest.mark.parametrize(
    ("reply", "winner"),
    [
        ("A", "a"),
        ("B", "b"),
        ("TIE", "tie"),
        ("b", "b"),
        ("Tie.", "tie"),
        ("**A**", "a"),
        ("`B`", "b"),
        ("[[A]]", "a"),
        ("(b)", "b"),
        ('"TIE"', "tie"),
        ("Answer: B", "b"),
        ("Answer B", "b"),
        ("**Answer:** B.", "b"),
        ("Final answer: **A**", "a"),
        ("The winner is A.", "a"),
        ("My verdict: tie", "tie"),
        ("Better: B", "b"),
        ("# A", "a"),
        ("- A", "a"),
        ("It is right.\n\nA\n", "a"),
        ("It is right.\nB\n\n   \n***", "b"),
        ("It is too wordy. The answer is A.", "a"),
        ("Both are right; the verdict is: **TIE**", "tie"),
        ("<think>Is it B?\nYes.</think>\nA", "a"),
    ],
)
def test_a_last_line_of_one_word_is_a_verdict(reply, winner):
    assert read_reply(reply).winner == winner


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "   \n",
        "***",
        "A or B",
        "A, B or TIE",
        "A/B",
        "A is better than B",
        "Answer A is good, but answer B is better.",
        "A\nbecause it is right",
        "not A",
        "Neither",
        "C",
        "AB",
        "A B",
        "A tie",
        "It is too wordy. A",
        "I doubt that the answer is A.",
        "If it must be short, the answer is A.",
        "The answer is A. No, the answer is B.",
        "The answer is B. The answer is A.",
        "Answer: the better one is neither.",
        "Both A and B",
        "Answer A: B",
        "B?A",
    ],
)
def test_anything_that_leaves_a_doubt_is_none(reply):
    assert read_reply(reply) is None


def test_what_stands_before_is_the_reason():
    assert read_reply("  A names the city.\nB does not. \n\n**A**") == Verdict(
        "a", "A names the city.\nB does not."
    )
    assert read_reply("First.\nIt is wordy. The answer is B.") == Verdict(
        "b", "First.\nIt is wordy."
    )


def test_a_question_has_each_text_in_its_place_once():
    asked = question(TEMPLATE, Pair([{"role": "user", "content": "{a}"}], "{b}", "{prompt}"))
    parts = asked.split("\n\n")
    assert parts[1:4] == ["[Request]\n{a}", "[Answer A]\n{b}", "[Answer B]\n{prompt}"]
    assert question("{b}{a}{a}{prompt}{c}", Pair("P", "A", "B")) == "BAAP{c}"
