"""What the networks say about responses, against plain transformers on each text alone."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.packing import pack_pairs
from rlhf_core.backbone.responses import (
    lay_out,
    response_logprobs,
    response_scores,
    response_values,
    texts,
)
from rlhf_core.data.encoding import left_pad, right_pad
from rlhf_core.data.pairs import Pair
from rlhf_core.types import PromptBatch, Responses, Rollout

PROMPTS = [[20, 30, 40, 50], [20, 30, 40, 50], [70, 80], [90], [100, 110, 120]]
# Two answers to one prompt begin alike; the last never ends.
SAID = [[21, 31, 0], [21, 51, 61, 71, 0], [0], [0], [81, 91, 101, 111, 121]]
ROWS, WIDTH = len(SAID), max(map(len, SAID))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def batch():
    tokens, mask = right_pad(SAID, 1)
    return left_pad(PROMPTS, 1, 99), Responses(tokens, mask, torch.tensor([True] * 4 + [False]))


def rows_of(values):
    """Per-row values -> (B, R) tensor with 0 where nothing was said."""
    return torch.stack([torch.cat([v, torch.zeros(WIDTH - len(v))]) for v in values])


def logprobs_alone(model, temperature):
    found = []
    for prompt, said in zip(PROMPTS, SAID, strict=True):
        logprobs = (model(torch.tensor([prompt + said])).logits[0] / temperature).log_softmax(-1)
        at = len(prompt) - 1
        found.append(torch.stack([logprobs[at + t, token] for t, token in enumerate(said)]))
    return rows_of(found)


def score_alone(classifier, ids):
    """Of transformers' own classifier, which reads the last token, normalised by hand."""
    return (classifier(torch.tensor([ids])).logits[0, 0] - 0.3) / 0.5


def padded_otherwise(prompts, responses):
    """The same texts with more padding on both sides, and something else in it."""
    more = torch.full((ROWS, 3), 33)
    off = torch.zeros(ROWS, 3, dtype=torch.bool)
    return (
        PromptBatch(
            torch.cat([more, prompts.input_ids.masked_fill(~prompts.mask, 44)], 1),
            torch.cat([off, prompts.mask], 1),
        ),
        Responses(
            torch.cat([responses.tokens.masked_fill(~responses.mask, 0), more], 1),
            torch.cat([responses.mask, off], 1),
            responses.finished,
        ),
    )


def padded_on_the_right(prompts, responses):
    """Prompts with their padding behind them: what counts is the mask."""
    ids, mask = right_pad(PROMPTS, 1)
    return PromptBatch(ids, mask), responses


# --- layout ---


def test_some_of_the_response_tokens_go_to_their_places(batch):
    written, mask = lay_out(*batch), batch[1].mask
    values = torch.arange(1.0, 1 + int(mask.sum())).requires_grad_()
    whole = written.to_rows(values)
    assert whole[mask].tolist() == values.tolist()
    assert (whole[~mask] == 0).all()
    span = slice(2, 5)  # the end of the first row and the start of the second
    part = written.span_mask(span)
    assert part.nonzero().tolist() == [[0, 2], [1, 0], [1, 1]]
    assert torch.equal(written.to_rows(values[span], span), torch.where(part, whole, 0))
    (written.to_rows(values[span], span) * torch.arange(25.0).view(5, 5)).sum().backward()
    assert values.grad[span].tolist() == [2.0, 5.0, 6.0]


def test_texts_are_prompt_and_response_without_padding(batch):
    expected = [prompt + said for prompt, said in zip(PROMPTS, SAID, strict=True)]
    for same in (batch, padded_otherwise(*batch), padded_on_the_right(*batch)):
        assert [text.tolist() for text in texts(*same)] == expected


def test_tokens_are_the_response_tokens_each_predicted_one_place_before_it(batch):
    written = lay_out(*batch)
    assert written.tokens.tolist() == [token for said in SAID for token in said]
    row = written.packed.input_ids[0]
    before = [(p + s)[len(p) - 1 + t] for p, s in zip(PROMPTS, SAID, strict=True)
              for t in range(len(s))]  # fmt: skip
    assert row[written.positions].tolist() == before
    assert len(row) == sum(map(len, PROMPTS + SAID)) - 5  # [20, 30, 40, 50, 21] is there once


def test_spread_puts_values_where_their_tokens_are(batch):
    written = lay_out(*batch)
    values = torch.arange(1.0, len(written.tokens) + 1)
    assert written.to_rows(values).tolist() == [
        [1, 2, 3, 0, 0],
        [4, 5, 6, 7, 8],
        [9, 0, 0, 0, 0],
        [10, 0, 0, 0, 0],
        [11, 12, 13, 14, 15],
    ]


# --- numbers ---


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_logprobs_are_those_of_each_row_alone(causal, plain, batch, temperature):
    found = response_logprobs(Policy(causal[0]), lay_out(*batch), temperature=temperature)
    assert_close(found, logprobs_alone(plain(causal[0]), temperature), **CLOSE)


@torch.no_grad()
def test_value_of_a_token_is_that_of_the_state_in_which_it_was_chosen(scalar, plain, batch):
    # V(s_t) sees the prompt and the tokens before t, and nothing of t.
    classifier = plain(scalar.model)
    alone = [
        torch.stack([score_alone(classifier, prompt + said[:t]) for t in range(len(said))])
        for prompt, said in zip(PROMPTS, SAID, strict=True)
    ]
    assert_close(response_values(scalar, lay_out(*batch)), rows_of(alone), **CLOSE)


@torch.no_grad()
def test_score_is_that_of_the_whole_text_alone(scalar, plain, batch):
    classifier = plain(scalar.model)
    alone = [score_alone(classifier, p + s) for p, s in zip(PROMPTS, SAID, strict=True)]
    assert_close(response_scores(scalar, lay_out(*batch)), torch.stack(alone), **CLOSE)


@torch.no_grad()
def test_score_of_a_text_is_the_same_in_reward_model_evaluation_and_in_ppo(scalar, batch):
    # Invariant (f): there texts come in pairs, here as responses; row 1 beats row 0.
    whole = [prompt + said for prompt, said in zip(PROMPTS, SAID, strict=True)]
    pairs = [
        Pair(whole[i], whole[j], (4, 4), tie=False, margin=0.0, truncated=False)
        for i, j in ((1, 0), (2, 3), (4, 1))
    ]
    evaluated = scalar.scores(pack_pairs(pairs, torch.device("cpu")))
    in_ppo = response_scores(scalar, lay_out(*batch))
    assert_close(evaluated, in_ppo[[1, 0, 2, 3, 4, 1]], **CLOSE)


@pytest.mark.parametrize("pad", [padded_otherwise, padded_on_the_right])
@torch.no_grad()
def test_padding_changes_not_a_bit(causal, scalar, batch, pad):
    # Invariant (c): padding is gone before a network reads anything.
    one, other = lay_out(*batch), lay_out(*pad(*batch))
    policy = Policy(causal[0])
    ours, theirs = (
        (
            response_logprobs(policy, written, temperature=1.0)[:, :WIDTH],
            response_values(scalar, written)[:, :WIDTH],
            response_scores(scalar, written),
        )
        for written in (one, other)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def test_neighbours_do_not_matter(causal, scalar, batch):
    prompts, responses = batch
    whole = lay_out(*batch)
    for rows in ([0], [3], [4, 1], [2, 0, 3]):
        index = torch.tensor(rows)
        some = lay_out(prompts.rows(index), responses.rows(index))
        for measure in (
            lambda w: response_logprobs(Policy(causal[0]), w, temperature=1.0),
            lambda w: response_values(scalar, w),
            lambda w: response_scores(scalar, w),
        ):
            assert_close(measure(some), measure(whole)[index], **CLOSE)


# --- the record ---


@pytest.fixture
def rollout(batch):
    """Numbers that say where they come from."""
    row = torch.arange(ROWS).float()
    place = row.unsqueeze(1) * 10 + torch.arange(WIDTH)
    return Rollout(*batch, place, place + 100, place + 200, row, {"a": row + 5, "b": row + 6})


def flat(rollout):
    named = {name: getattr(rollout, name) for name in ("logprobs", "ref_logprobs", "values")}
    return named | vars(rollout.prompts) | vars(rollout.responses) | {
        "scores": rollout.scores, **rollout.parts
    }  # fmt: skip


def test_rows_take_the_same_rows_of_every_field(rollout):
    index = torch.tensor([3, 1])
    some, whole = flat(rollout.rows(index)), flat(rollout)
    assert set(some) == set(whole)
    assert all(torch.equal(some[name], whole[name][index]) for name in whole)


def test_join_is_the_whole_again_whatever_the_widths(rollout):
    def narrow(part):
        """Without the columns that are padding in every row of the part."""
        said, asked = part.responses.mask.any(0), part.prompts.mask.any(0)
        return Rollout(
            PromptBatch(part.prompts.input_ids[:, asked], part.prompts.mask[:, asked]),
            Responses(
                part.responses.tokens[:, said],
                part.responses.mask[:, said],
                part.responses.finished,
            ),
            *(x[:, said] for x in (part.logprobs, part.ref_logprobs, part.values)),
            part.scores,
            part.parts,
        )

    rows = ([2, 3], [0], [1, 4])
    joined = Rollout.join([narrow(rollout.rows(torch.tensor(some))) for some in rows])
    ours, whole = flat(joined), flat(rollout.rows(torch.tensor([2, 3, 0, 1, 4])))
    asked, said = joined.prompts.mask, joined.responses.mask
    for name, expected in whole.items():
        if name == "input_ids":
            assert torch.equal(ours[name][asked], expected[asked])
        elif expected.ndim == 2 and name != "mask":
            assert torch.equal(ours[name][said], expected[said])
        else:
            assert torch.equal(ours[name], expected)


def test_of_an_unmeasured_rollout_nothing_is_known(batch):
    bare = Rollout.unmeasured(*batch)
    assert (bare.prompts, bare.responses) == batch
    for name in ("logprobs", "ref_logprobs", "values"):
        assert torch.equal(getattr(bare, name), torch.zeros(ROWS, WIDTH))
    assert torch.equal(bare.scores, torch.zeros(ROWS))
    assert bare.parts == {}
