"""Votes as tokens, and what a tie counts."""

import pandas as pd
import pytest
import torch

from rlhf_core.backbone.packing import pack_pairs
from rlhf_core.data.encoding import encode_prompt, encode_response
from rlhf_core.data.pairs import (
    Pair,
    encode_pairs,
    half_for_ties,
    prompt_numbers,
    require_decided,
    smoothing,
    with_winners,
)
from rlhf_core.errors import DataError

VOTES = pd.DataFrame(
    [
        {"prompt": "the room", "response_a": " is good", "response_b": " is bad", "vote": "a"},
        {"prompt": "the bed", "response_a": " is bad", "response_b": " is good", "vote": "b"},
        {"prompt": "", "response_a": " nice", "response_b": " poor and cold", "vote": "tie"},
    ]
).assign(margin=[0.5, 0.6, 0.7])


def pair(chosen, rejected, *, tie=False):
    return Pair(chosen, rejected, (1, 1), tie=tie, margin=0.0, truncated=False)


def test_both_texts_of_a_vote_are_prompt_response_and_end(gpt2):
    tokenizer = gpt2[1]
    one, second, two = encode_pairs(VOTES, tokenizer, 40).pairs
    prompt = encode_prompt("the room", tokenizer)
    assert one.chosen == prompt + encode_response(" is good", tokenizer)
    assert one.rejected == prompt + encode_response(" is bad", tokenizer)
    assert one[2:] == ((len(prompt), len(prompt)), False, 0.5, False)
    bed = encode_prompt("the bed", tokenizer)
    assert second.chosen == bed + encode_response(" is good", tokenizer)  # the second won
    assert second.rejected == bed + encode_response(" is bad", tokenizer)
    assert second[2:] == ((len(bed), len(bed)), False, 0.6, False)
    # An empty prompt: the first token of a text is predicted from nothing, so it starts at 1. And
    # nobody won a tie by a margin.
    assert two[2:] == ((1, 1), True, 0.0, False)
    assert two.chosen[-1] == two.rejected[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("cut", [4, 6, 8])
def test_a_pair_is_truncated_when_either_text_is(gpt2, cut):
    votes = pd.DataFrame(
        [{"prompt": "the", "response_a": " is", "response_b": " is very good and fine"}]
    ).assign(margin=0.0)
    for table in (votes.assign(vote="a"), votes.assign(vote="b")):
        (found,) = encode_pairs(table, gpt2[1], cut).pairs
        (whole,) = encode_pairs(table, gpt2[1], 40).pairs
        assert found.truncated == (max(len(whole.chosen), len(whole.rejected)) > cut)
        assert max(len(found.chosen), len(found.rejected)) <= cut
    assert not whole.truncated


def test_the_winner_of_a_vote_is_the_side_that_it_names():
    votes = pd.DataFrame({"response_a": "A", "response_b": "B", "vote": ["a", "b", "tie"]})
    found = with_winners(votes)
    assert found[["chosen", "rejected", "tie"]].to_numpy().tolist() == [
        ["A", "B", False],
        ["B", "A", False],
        ["A", "B", True],
    ]
    pd.testing.assert_frame_equal(found[["response_a", "response_b", "vote"]], votes)
    assert with_winners(votes.head(0)).empty


def test_no_votes(gpt2):
    with pytest.raises(DataError, match="the preferences have no rows"):
        encode_pairs(VOTES.head(0), gpt2[1], 40)


def test_votes_on_the_same_tokens_are_left_out_and_counted(gpt2):
    tokenizer = gpt2[1]
    same_start = {"response_a": " is good and fine", "response_b": " is good and cold"}
    table = pd.DataFrame(
        [
            {"prompt": "the", **same_start, "vote": "a"},
            {"prompt": "the", "response_a": " is", "response_b": " was", "vote": "tie"},
            {"prompt": "the", **same_start, "vote": "tie"},
        ],
        index=[5, 6, 7],
    ).assign(margin=0.0)
    assert encode_pairs(table, tokenizer, 40).same == 0
    cut = len(encode_prompt("the", tokenizer)) + len(encode_response(" is good and", tokenizer)) - 1
    found = encode_pairs(table, tokenizer, cut)
    assert (len(found.pairs), found.table.index.tolist(), found.same) == (1, [6], 2)
    with pytest.raises(DataError, match=f"each of the 2 .* cut to {cut} tokens.*raise dpo.max"):
        encode_pairs(table.iloc[[0, 2]], tokenizer, cut, "dpo.max_length")


def test_both_texts_of_a_vote_keep_the_same_prompt(gpt2):
    # Of 12 places the long answer takes half; the short one alone would have left the prompt more.
    tokenizer = gpt2[1]
    votes = {"prompt": "abcdefghijklmnop", "response_a": "x", "response_b": "uvwxyzuvwxyz"}
    for vote in ("a", "b"):
        table = pd.DataFrame([{**votes, "vote": vote, "margin": 0.0}])
        (found,) = encode_pairs(table, tokenizer, 12).pairs
        start = found.starts[0]
        assert found.starts == (start, start)
        assert found.chosen[:start] == found.rejected[:start]
        whole = encode_prompt(votes["prompt"], tokenizer)
        assert found.chosen[:start] == whole[-start:]
        assert max(len(found.chosen), len(found.rejected)) == 12


def test_chosen_and_rejected_lie_in_turn_and_share_their_prompt():
    packed = pack_pairs([pair([5, 6, 7], [5, 6, 8]), pair([9, 4], [9, 3, 2])], torch.device("cpu"))
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 2]]
    assert packed.input_ids[0, packed.last()].view(-1, 2).tolist() == [[7, 8], [4, 2]]


def test_a_tie_is_as_likely_either_way():
    votes = [pair([1], [2]), pair([1], [2], tie=True)]
    found = smoothing(torch.tensor([vote.tie for vote in votes]), 0.125)
    assert found.tolist() == [0.125, 0.5]


def test_half_a_point_for_a_gap_of_0():
    gap = torch.tensor([2.0, -1e-30, 0.0, -0.0])
    assert half_for_ties(gap).tolist() == [1.0, 0.0, 0.5, 0.5]
    assert half_for_ties(torch.tensor([3, -2, 0])).tolist() == [1.0, 0.0, 0.5]


def test_votes_about_one_prompt_have_one_number():
    chat = [{"role": "user", "content": "the room"}]
    prompts = ["the room", "a bed", chat, "the room", [dict(chat[0])]]
    numbers = prompt_numbers(pd.DataFrame({"prompt": pd.Series(prompts, dtype=object)}))
    assert numbers.tolist() == [0, 1, 2, 0, 2]


def test_ties_alone_cannot_be_measured():
    require_decided(torch.tensor([False, True]))
    with pytest.raises(DataError, match="all ties"):
        require_decided(torch.tensor([False, False]))
