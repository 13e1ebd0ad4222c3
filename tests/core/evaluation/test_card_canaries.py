"""The canaries on the page of the report card."""

import torch

from rlhf_core.evaluation.card.page import _canaries, canaries_table
from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.rewards.canaries import make_canaries, measure_canaries


def shown(answers):
    prompts = [f"prompt {n}" for n in range(len(answers))]
    made = make_canaries(prompts, answers, seed=0)
    results = measure_canaries(
        made, prompts, answers, lambda _, texts: torch.tensor([len(t) for t in texts]), seed=0
    )
    return ReportCard.model_construct(canaries=tuple(results), canaries_against="chosen answer")


def test_kinds_that_could_not_be_made_are_named_on_the_page():
    page = "\n".join(_canaries(shown(["Ann", "Bob", "Eve"])))
    assert "a better reward than the chosen answer" in page
    assert "| padded | 1.000" in page
    assert page.endswith("too few prompts): repeated_word, cut_off, list, keyword.")


def test_all_kinds_leave_nothing_to_name():
    page = "\n".join(_canaries(shown([f"some words of {name} to read" for name in "abcdef"])))
    assert "No canary" not in page


def test_the_table_counts_what_was_left_out():
    table = canaries_table(shown(["Ann", "Bob and Tom", "Eve and Kim"])).set_index("canary")
    assert table.loc["cut_off", "left_out"] == 1
    assert table.loc["padded", "left_out"] == 0
