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
    one, second, two = encode_pairs(VOTES, tokenizer, 40)
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
        (found,) = encode_pairs(table, gpt2[1], cut)
        (whole,) = encode_pairs(table, gpt2[1], 40)
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


def test_chosen_and_rejected_lie_in_turn_and_share_their_prompt():
    packed = pack_pairs([pair([5, 6, 7], [5, 6, 8]), pair([9, 4], [9, 3, 2])], torch.device("cpu"))
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 2]]
    assert packed.input_ids[0, packed.last()].view(-1, 2).tolist() == [[7, 8], [4, 2]]


def test_a_tie_is_as_likely_either_way():
    votes = [pair([1], [2]), pair([1], [2], tie=True)]
    found = smoothing(votes, 0.125, torch.device("cpu"))
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
