"""Duplicates, contradictions and token counts, each on rows small enough to count by eye."""

import pandas as pd
import pytest

from rlhf_core.backbone.base_model import load_tokenizer
from rlhf_core.data.encoding import encode_prompt, encode_response
from rlhf_core.data.validation import (
    TableSummary,
    Validation,
    contradictory_pairs,
    count_tokens,
    count_truncated,
    drop_useless,
    summarise_lengths,
)
from rlhf_core.settings.model import FreshModelConfig, ModelConfig

COLUMNS = ["prompt", "response_a", "response_b", "vote", "annotator", "ballot", "split"]
COLUMNS += ["shown_first", "gold"]
CHAT = [{"role": "user", "content": "p"}]


def pairs(*rows):
    """Rows of prompt, first and second answer, and what differs from an anonymous vote for the
    first."""
    usual = {"vote": "a", "annotator": "", "ballot": 0, "split": ""}
    usual |= {"shown_first": "", "gold": False}
    names = ("prompt", "response_a", "response_b")
    records = [
        dict(zip(names, row[:3], strict=True)) | usual | (row[3:] or ({},))[0] for row in rows
    ]
    return pd.DataFrame(records, columns=COLUMNS).astype(object)


FIRST = ("p", "A", "B")


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (("p", "A", "B"), "duplicate"),
        (("p", "A", "B", {"annotator": "w1"}), None),
        (("p", "A", "B", {"ballot": 1}), None),
        (("p", "A", "B", {"vote": "tie"}), None),
        (("p", "B", "A", {"vote": "b"}), "duplicate"),  # A won again, on the other side
        (("p", "A", "B", {"vote": "b"}), None),
        (("p", "A", "B", {"split": "eval"}), None),
        (("p", "B", "A"), None),
        (("q", "A", "B"), None),
        ((CHAT, "A", "B"), None),
        (("p", "A", " A\n"), "identical answers"),
    ],
)
def test_what_makes_a_preference_useless(second, reason):
    kept, dropped = drop_useless(pairs(FIRST, second), "preferences")
    assert dropped == ({reason: 1} if reason else {})
    assert kept.index.tolist() == ([0] if reason else [0, 1])


def test_a_tie_is_the_same_whichever_answer_is_first():
    tie = {"vote": "tie", "annotator": "w1"}
    _, dropped = drop_useless(pairs(("p", "A", "B", tie), ("p", "B", "A", tie)), "preferences")
    assert dropped == {"duplicate": 1}


@pytest.mark.parametrize("name", ["w1", "judge:m"])
def test_a_machine_is_asked_in_both_orders(name):
    one, other = ({"annotator": name, "shown_first": side} for side in "ab")
    kept, dropped = drop_useless(pairs((*FIRST, one), (*FIRST, other)), "preferences")
    assert len(kept) == (2 if name == "judge:m" else 1)
    # The same order again, with its answers exchanged.
    turned = ("p", "B", "A", {"annotator": name, "shown_first": "b", "vote": "b"})
    _, dropped = drop_useless(pairs((*FIRST, one), turned), "preferences")
    assert dropped == {"duplicate": 1}


def test_repeated_messages_are_duplicates():
    _, dropped = drop_useless(pairs((CHAT, "A", "B"), (list(CHAT), "A", "B")), "preferences")
    assert dropped == {"duplicate": 1}


def test_identical_answers_are_counted_once():
    same = ("p", "A", "A")
    _, dropped = drop_useless(pairs(same, same, FIRST), "preferences")
    assert dropped == {"identical answers": 2}


def test_duplicates_of_demonstrations_and_prompts():
    frame = pd.DataFrame({"prompt": ["p", "p", "p"], "response": ["r", "R", "r"], "split": ""})
    kept, dropped = drop_useless(frame, "demonstrations")
    assert (kept.index.tolist(), dropped) == ([0, 1], {"duplicate": 1})
    kept, dropped = drop_useless(frame, "prompts")
    assert (kept.index.tolist(), dropped) == ([0], {"duplicate": 2})


def test_a_pair_is_contradictory_when_both_answers_have_won():
    frame = pairs(
        ("p", "A", "B", {"annotator": "w1"}),
        ("p", "B", "A", {"annotator": "w2"}),  # p, A-B: both won
        ("p", "A", "B", {"annotator": "w3", "vote": "b"}),  # the same pair: still one
        ("q", "A", "B"),
        ("q", "B", "A", {"vote": "b"}),  # A won on either side
        ("p", "A", "C"),
        ("p", "C", "A", {"vote": "tie"}),  # a tie contradicts nobody
        ("q", "C", "A"),  # another prompt
        (CHAT, "X", "Y"),
        (CHAT, "Y", "X"),  # a second contradictory pair
    )
    assert contradictory_pairs(frame) == 2
    assert contradictory_pairs(frame.iloc[:1]) == 0
    assert contradictory_pairs(frame.iloc[:0]) == 0


TEXTS = ["Why is the sky blue?", "Because of the air.", "p", "A longer answer, with words."]


@pytest.fixture(scope="module", params=["plain", "with BOS"])
def tokenizer(request):
    made = load_tokenizer(ModelConfig(fresh=FreshModelConfig(vocab_size=300)), TEXTS)
    if request.param == "plain":
        return made
    from tokenizers.processors import TemplateProcessing

    # As Llama's: the begin-of-sequence token is put before every text by the tokenizer itself.
    made.add_special_tokens({"bos_token": "<s>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


def test_tokens_are_counted_as_the_stages_encode(tokenizer):
    chat = [{"role": "user", "content": TEXTS[0]}]
    begun = "<s>already begun"
    frames = {
        "demonstrations": pd.DataFrame(
            {"prompt": [TEXTS[0], chat, begun], "response": [TEXTS[1], TEXTS[3], TEXTS[1]]}
        ),
        "preferences": pd.DataFrame({"prompt": [chat], "chosen": [TEXTS[3]], "rejected": ["p"]}),
        "prompts": pd.DataFrame({"prompt": ["p"]}, index=[7]),
    }
    counts = count_tokens(frames, tokenizer)
    for kind, frame in frames.items():
        expected = pd.DataFrame(
            {
                name: [
                    len(
                        encode_prompt(text, tokenizer)
                        if name == "prompt"
                        else encode_response(text, tokenizer, chat=not isinstance(prompt, str))
                    )
                    for prompt, text in zip(frame["prompt"], frame[name], strict=True)
                ]
                for name in frame
            },
            index=frame.index,
        )
        pd.testing.assert_frame_equal(counts[kind], expected)


def test_more_texts_than_one_batch_are_counted_in_order(tokenizer):
    words = [("x" * (1 + n % 7)) + str(n) for n in range(2500)]
    counts = count_tokens({"prompts": pd.DataFrame({"prompt": words})}, tokenizer)
    for n in (0, 999, 1000, 2001, 2499):
        assert counts["prompts"]["prompt"][n] == len(encode_prompt(words[n], tokenizer))


def test_lengths_are_summarised():
    # 0 … 100: mean and median 50, 95th percentile 95, longest 100
    [found] = summarise_lengths({"prompts": pd.DataFrame({"prompt": range(101)})})
    assert found.model_dump() == {
        **{"table": "prompts", "text": "prompt", "count": 101},
        **{"mean": 50.0, "p50": 50.0, "p95": 95.0, "max": 100},
    }


def test_a_text_is_cut_when_it_is_longer_than_its_limit():
    counts = {
        "demonstrations": pd.DataFrame({"prompt": [4, 4, 4], "response": [5, 6, 7]}),  # 9, 10, 11
        "preferences": pd.DataFrame(
            {"prompt": [2, 2, 2], "chosen": [6, 7, 1], "rejected": [1, 6, 7]}  # 8, 9, 9 at most
        ),
        "prompts": pd.DataFrame({"prompt": [3, 4, 5, 6]}),
    }
    assert count_truncated(counts, prompt=4, sft=10, response=5, reward=8) == {
        "prompts over 4 tokens": 2,
        "demonstrations over 10 tokens": 1,
        "responses over 5 tokens": 2,
        "preferences over 8 tokens": 2,
    }


def test_the_report_reads_as_tables_and_comes_back_from_json():
    summary = {"source": "f", "rows": 4, "examples": 5, "train": 2, "eval": 1, "eval_prompts": 1}
    report = Validation(
        tables={"prompts": TableSummary(**summary, dropped={"duplicate": 2})},
        bad_rows=["f, line 1: bad"],
        unread=["f, line 1, field 'gold': no"],
        ties=0,
        known_sides=0,
        timed=0,
        gold=0,
        contradictory_pairs=0,
        shared_prompts=0,
        lengths=summarise_lengths({"prompts": pd.DataFrame({"prompt": [1, 3]})}),
        truncated={"prompts over 2 tokens": 1},
        vocabulary=300,
    )
    assert report.rows_table().to_numpy().tolist() == [
        ["prompts", "f", "train", 2],
        ["prompts", "f", "eval", 1],
        ["prompts", "f", "dropped: duplicate", 2],
    ]
    assert report.lengths_table().to_numpy().tolist() == [
        ["prompts", "prompt", 2, 2.0, 2.0, 2.9, 3]
    ]
    assert report.truncated_table().to_numpy().tolist() == [["prompts over 2 tokens", 1]]
    assert Validation.model_validate_json(report.model_dump_json()) == report
