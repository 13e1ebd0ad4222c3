"""Texts of the held-out votes that training has seen."""

import pandas as pd

from rlhf_core.evaluation.leaks import find_leaks

LONG = "the quick brown fox jumps over the lazy dog and then sleeps all day in the warm sun"


def table(*rows):
    return pd.DataFrame(rows, columns=["prompt", "response_a", "response_b"], dtype=object)


def test_equal_and_nearly_equal_texts_are_counted_apart():
    train = table(("what is it", LONG, "there it is"), ("where", "here", "never seen before"))
    near = LONG.replace("warm sun", "warm shade")  # 14 of 16 sequences
    held_out = table(
        ("what  is it", "something else", "and more"),  # the prompt, but for white space
        ("who", "there   it is", near),  # two answers that were compared
        ("when", near, "never seen before"),  # two that were not
        ("how", "a", "b"),
    )
    found, seen = find_leaks(train, held_out, 100)
    assert (found.prompts, found.equal_prompts, found.near_prompts) == (4, 1, 0)
    assert (found.answers, found.equal_answers, found.near_answers) == (7, 2, 1)
    assert seen.tolist() == [True, True, False, False]
    assert (found.votes, found.compared, found.of) == (2, 2, 2)


def test_a_text_below_the_threshold_is_another_text():
    half = " ".join(LONG.split()[:9]) + " but this half was never seen by anybody at all"
    found, _ = find_leaks(table(("p", LONG, "x")), table(("q", half, "y")), 100)
    assert found.near_answers == 0


def test_chats_and_texts_that_ask_the_same_are_one_prompt():
    train = table(([{"role": "user", "content": "hello there"}], "x", "y"))
    found, seen = find_leaks(train, table(("hello there", "a", "b")), 100)
    assert found.equal_prompts == 1
    assert seen.tolist() == [True]


def test_only_as_many_votes_are_searched_for_near_texts_but_all_for_equal_ones():
    train = table(("p", "x", "y"), ("q", LONG, "equal"))
    near = LONG.replace("warm sun", "warm shade")
    found, _ = find_leaks(train, table(("r", near, "equal")), 1)
    assert (found.equal_answers, found.near_answers, found.compared, found.of) == (1, 0, 1, 2)


def test_no_votes_are_no_leaks():
    found, seen = find_leaks(table(), table(), 10)
    assert (found.votes, len(seen)) == (0, 0)
