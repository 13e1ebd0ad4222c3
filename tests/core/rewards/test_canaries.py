"""Canaries: texts written out by hand, shares counted by hand, and flaws planted to be caught."""

import importlib
import itertools
import random
import re
import sys
from pathlib import Path
from zlib import crc32

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from rlhf_core.data.encoding import encode_answers
from rlhf_core.errors import NumericsError
from rlhf_core.functional.ranking import win_rate
from rlhf_core.rewards.canaries import (
    ENDS,
    FLATTERY,
    INSTRUCTION,
    KINDS,
    LANGUAGES,
    REFUSAL,
    CanaryResult,
    end_marks,
    make_canaries,
    measure_canaries,
    not_measured,
)
from rlhf_core.simulation import true_reward

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
PROMPTS = ["red apple pie", "red apple tart", "blue bird nest", "blue bird song", "one tall tree"]
ANSWERS = [
    " an apple is baked in the oven, and it is sweet",
    " take dough, and put it on",
    " birds build nests of twigs",
    " they sing in spring",
    " it stands",
]


def texts_of(canaries, row=0):
    return {canary.kind: canary.text for canary in canaries if canary.row == row}


def length(prompts, texts):
    return torch.tensor([float(len(text)) for text in texts])


def of(results, kind):
    (found,) = (result for result in results if result.kind == kind)
    return found


@pytest.fixture
def world(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("canaries")
    sys.modules.pop("canaries", None)


# --- the texts -----------------------------------------------------------------------------------


def test_each_text_by_hand():
    answer = " It is a very good pie, and it is warm."
    found = texts_of(make_canaries(["Pie?", "Tree?"], [answer, " An oak."], seed=0))
    foreign = found.pop("other_language")
    assert foreign[1:] in set(LANGUAGES.values()) - {LANGUAGES["LATIN"]}
    assert found == {
        "empty": "",
        "repeated_word": " is" * 10,
        "echo": " Pie?",
        "padded": answer * 3,
        "cut_off": " It is a very good",
        "list": " - It is a very\n- good",
        "flattery": f" {FLATTERY} It is a very good",
        "refusal": f" {REFUSAL}",
        "off_topic": " An oak.",
        "judge_instruction": f" It is a very good\n\n{INSTRUCTION}",
        "end_of_text": " It is a very good" + "".join(ENDS),
    }
    assert {*found, "other_language", "constant", "keyword"} == set(KINDS)


def test_of_a_chat_the_last_question_is_echoed():
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
        {"role": "user", "content": "And why?"},
    ]
    assert texts_of(make_canaries([chat], ["Because."], seed=0))["echo"] == "And why?"
    unasked = [{"role": "assistant", "content": "Me."}]
    assert texts_of(make_canaries([unasked], ["Because."], seed=0))["echo"] == "Me."


@pytest.mark.parametrize(
    ("prompt", "answer", "without"),
    [
        ("a", "I can't tell you that, sorry.", {"refusal"}),
        ("a", "1. one two\n2. three four", {"list"}),
        ("a", "Ann", {"repeated_word", "cut_off", "list"}),
        ("a", "", {"empty", "repeated_word", "padded", "cut_off", "list"}),
        ("say it", "say it", {"echo"}),
        ("a", "no no no no", {"repeated_word"}),
    ],
)
def test_what_would_be_the_real_answer_or_no_worse_is_left_out(prompt, answer, without):
    made = {
        c.kind for c in make_canaries([prompt, "z"], [answer, "and so on"], seed=0) if not c.row
    }
    assert set(KINDS) - made == without | {"constant", "keyword"}


def test_without_spaces_the_parts_are_characters_and_the_language_is_another():
    answer = "今天天气很好，我们一起去公园里散步和吃饭吧"
    found = texts_of(make_canaries(["天气？"], [answer], seed=0))
    assert found["cut_off"] == answer[:10]
    assert found["list"] == f"- {answer[:4]}\n- {answer[4:8]}\n- {answer[8:10]}"
    assert found["repeated_word"] == "天" * 21
    assert found["other_language"] in set(LANGUAGES.values()) - {LANGUAGES["CJK"]}


@pytest.mark.parametrize("script", LANGUAGES)
def test_the_other_language_has_neither_the_script_of_the_answer_nor_of_the_prompt(script):
    prompts = [LANGUAGES["LATIN"] + str(n) for n in range(30)]
    made = make_canaries(prompts, [LANGUAGES[script]] * 30, seed=0)
    used = {c.text for c in made if c.kind == "other_language"}
    assert used == {t for name, t in LANGUAGES.items() if name not in (script, "LATIN")}


def test_off_topic_answers_are_used_once_each_and_belong_to_the_least_alike_prompts():
    made = make_canaries(PROMPTS, ANSWERS, seed=0)
    partner = [ANSWERS.index(c.text) for c in made if c.kind == "off_topic"]
    words = [set(prompt.split()) for prompt in PROMPTS]

    def alike(order):
        return sum(len(a & words[n]) / len(a | words[n]) for a, n in zip(words, order, strict=True))

    every = itertools.permutations(range(5))
    derangements = [order for order in every if all(n != i for i, n in enumerate(order))]
    assert tuple(partner) in derangements
    assert alike(partner) == pytest.approx(min(map(alike, derangements)))


def test_answers_to_one_prompt_are_none_to_another():
    made = make_canaries(["the same", "the  same"], [" one", " two"], seed=0)
    assert "off_topic" not in {canary.kind for canary in made}


def test_prompts_of_more_than_one_block_get_answers_to_others():
    prompts = [f"number {n}" for n in range(1100)]
    made = make_canaries(prompts, [f"it is {n}" for n in range(1100)], seed=0)
    others = [(c.row, int(c.text.split()[-1])) for c in made if c.kind == "off_topic"]
    assert all(row != other for row, other in others)
    assert sorted(other for _, other in others) == list(range(1100))


def test_neither_the_order_of_the_rows_nor_a_row_said_twice_changes_a_text():
    order = [3, 0, 4, 2, 1]

    def found(prompts, answers, seed=0):
        made = make_canaries(prompts, answers, seed=seed)
        return {(prompts[c.row], answers[c.row], c.kind, c.text) for c in made}

    plain = found(PROMPTS, ANSWERS)
    assert found([PROMPTS[i] for i in order], [ANSWERS[i] for i in order]) == plain
    assert found(PROMPTS * 2, ANSWERS * 2) == plain
    assert found(PROMPTS, ANSWERS, seed=1) != plain


def test_another_number_of_answers_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        make_canaries(["a", "b"], ["c"], seed=0)


def test_the_page_explains_each_kind():
    page = (BENCHMARKS.parent / "docs" / "canaries.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page.partition("## Reading")[0], re.M) == list(KINDS)


# --- the ends of texts ---------------------------------------------------------------------------


def test_a_pasted_end_of_text_ends_nothing(gpt2):
    _, tokenizer = gpt2
    marks = end_marks(tokenizer)
    assert tokenizer.eos_token in marks
    assert {*ENDS} <= {*marks}
    made = make_canaries(["the room", "a film"], [" is good", " is bad"], seed=0, ends=marks)
    for canary in (c for c in made if c.kind == "end_of_text"):
        ids = encode_answers("the room", [canary.text], tokenizer, 400).responses[0]
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1


def test_a_mark_that_a_tokenizer_cannot_keep_as_text_is_not_pasted():
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0)], 0, False))
    backend.normalizer = normalizers.NFKC()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
    )
    assert end_marks(tokenizer) == tuple(mark for mark in ENDS if mark != "</s>")
    assert "end_of_text" not in texts_of(make_canaries(["a"], ["b c"], seed=0, ends=()))


# --- the shares ----------------------------------------------------------------------------------


def test_shares_by_hand():
    # Two answers to one prompt and one to another; a text is worth its number of characters.
    prompts, answers = ["p", "p", "q"], ["12345678 1", "1", "123 56 89"]
    made = make_canaries(prompts, answers, seed=0)
    results = measure_canaries(made, prompts, answers, length, seed=0)
    empty, echo, padded = (of(results, kind) for kind in ("empty", "echo", "padded"))
    assert empty.beats_real.value == 0
    assert echo.beats_real.value == pytest.approx(0.5 / 3)  # "p" is as long as "1"
    assert (padded.beats_real.value, padded.prompts, padded.answers) == (1, 2, 3)
    assert padded.example == "12345678 1 12345678 1 12345678 1"  # ahead by the most
    assert not padded.caught()  # all that two prompts can show is that it wins more than a third
    assert padded.beats_real.low == pytest.approx(win_rate(2, 0, 0).low, abs=0.05)
    cut_off = of(results, "cut_off")
    assert (cut_off.answers, cut_off.left_out) == (2, 1)


def test_more_prompts_that_agree_make_it_certain():
    prompts = [f"prompt {n}" for n in range(20)]
    answers = [f" an answer of some words {n}" for n in range(20)]
    made = make_canaries(prompts, answers, seed=0)
    padded = of(measure_canaries(made, prompts, answers, length, seed=0), "padded")
    assert padded.beats_real == win_rate(20, 0, 0)
    assert padded.caught()
    assert padded.caught(0.8)
    assert not padded.caught(0.9)


def test_each_prompt_and_text_is_scored_once():
    asked = []

    def score(prompts, texts):
        asked.extend(zip(map(str, prompts), texts, strict=True))
        return length(prompts, texts)

    made = make_canaries(PROMPTS * 2, ANSWERS * 2, seed=0)
    measure_canaries(made, PROMPTS * 2, ANSWERS * 2, score, seed=0)
    assert len(asked) == len(set(asked))


def test_results_do_not_depend_on_the_order_of_the_rows(world):
    prompts, answers = world.real_answers(0, 24)
    order = random.Random(0).sample(range(24), 24)

    def measured(prompts, answers):
        made = make_canaries(prompts, answers, seed=0)
        return measure_canaries(
            made, prompts, answers, lambda p, t: torch.tensor(true_reward(p, t)), seed=0
        )

    plain = measured(prompts, answers)
    assert [result.kind for result in plain] == list(KINDS)
    assert measured([prompts[i] for i in order], [answers[i] for i in order]) == plain


def test_kinds_that_cannot_be_made_are_named():
    results = measure_canaries(
        make_canaries(["p"], ["Ann"], seed=0, ends=()), ["p"], ["Ann"], length, seed=0
    )
    assert not_measured(results) == [
        *("constant", "repeated_word", "cut_off", "list", "off_topic", "end_of_text", "keyword")
    ]


def test_a_score_that_is_not_finite_is_an_error():
    made = make_canaries(PROMPTS, ANSWERS, seed=0)

    def broken(prompts, texts):
        return torch.tensor([float("nan") if "oven" in text else 1.0 for text in texts])

    with pytest.raises(NumericsError, match=r"score of '.*oven.*' is nan"):
        measure_canaries(made, PROMPTS, ANSWERS, broken, seed=0)


def test_a_score_that_does_not_read_the_prompt_likes_answers_to_others_as_much(world):
    prompts, answers = world.real_answers(0, 200)

    def blind(prompts, texts):
        return torch.tensor([float(crc32(text.encode())) for text in texts])

    made = make_canaries(prompts, answers, seed=0)
    results = measure_canaries(made, prompts, answers, blind, seed=0)
    for kind in ("off_topic", "constant"):
        value, low, high = of(results, kind).beats_real
        assert low < 0.5 < high
        assert value == pytest.approx(0.5, abs=0.12)


def test_a_keyword_is_found_on_other_prompts_than_it_is_measured_on(world):
    prompts, answers = world.real_answers(0, 60)
    asked = {}

    def score(prompts, texts):
        for prompt, text in zip(prompts, texts, strict=True):
            asked.setdefault(prompt, []).append(text)
        return torch.tensor([float("camera" in text) for text in texts])

    result = of(measure_canaries([], prompts, answers, score, seed=0), "keyword")
    assert result.example.split()[-1].strip(".") == "camera"
    searched = {p for p, texts in asked.items() if any(t.endswith("very") for t in texts)}
    measured = {p for p, texts in asked.items() if any(t == result.example for t in texts)}
    assert measured
    assert not measured & searched
    assert result.prompts + result.left_out == 60


# --- planted flaws -------------------------------------------------------------------------------


def caught(results: list[CanaryResult]) -> set[str]:
    return {result.kind for result in results if result.caught()}


@pytest.mark.parametrize("seed", range(2))
def test_flaws_in_a_reward_are_caught_and_the_truth_passes_whole(world, seed):
    for name, flaw in world.FLAWS.items():

        def score(prompts, texts, flaw=flaw):
            truth = true_reward(prompts, texts)
            return torch.tensor(
                [t + 2 * flaw.strength(x) for t, x in zip(truth, texts, strict=True)]
            )

        found = caught(world.measure(score, seed))
        assert (not found) if name == "clean" else {*flaw.caught_by} <= found, name


@pytest.mark.integration
@pytest.mark.parametrize("name", ["clean", "keyword", "list"])
def test_flaws_in_the_votes_are_caught_in_what_learns_from_them(world, name, tmp_path):
    flaw = world.FLAWS[name]
    score = world.train(flaw, 4000 if name == "clean" else 2000, 0, tmp_path)
    found = caught(world.measure(score, 0))
    assert (not found) if name == "clean" else {*flaw.caught_by} <= found
