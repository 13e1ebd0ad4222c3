"""Texts of the held-out votes, and prompts of the evaluation, that training has seen, word for word
or nearly.

Votes are split by prompt, so a prompt is on one side only. What the split cannot see is a prompt
that was edited a little, or two answers that are compared with each other under several prompts.
The accuracy on such votes is partly memory.
"""

from collections.abc import Sequence
from itertools import chain, product

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rlhf_core.data.encoding import Prompt
from rlhf_core.data.near import NEAR, jaccard, min_hash, near_index, shingles_of
from rlhf_core.data.prepared import prompt_key
from rlhf_core.evaluation.scorecard import PromptLeaks

SEARCHED = 10_000  # training prompts that are searched for nearly equal ones


class Leaks(BaseModel):
    """How many distinct held-out texts are in the training votes too."""

    model_config = ConfigDict(frozen=True)

    prompts: int  # held-out prompts
    equal_prompts: int
    near_prompts: int  # nearly the same as another one, and not equal
    answers: int  # held-out answers
    equal_answers: int
    near_answers: int
    votes: int  # held-out votes, ties included, whose prompt or pair of answers is in training
    compared: int  # training votes that were searched for nearly equal texts
    of: int  # training votes


def find_leaks(train: pd.DataFrame, held_out: pd.DataFrame, most: int) -> tuple[Leaks, Tensor]:
    """Compare the texts of held-out votes with those of training votes.

    Equal texts, in which runs of white space count as one space, are found among all; nearly equal
    ones, whose sets of three-word sequences have a Jaccard similarity of at least 0.8, among the
    first `most` training votes, by MinHash and then exactly.

    Returns: the counts, and (N,) bool for each held-out vote whether its prompt is one of training,
    or its two answers were compared there.

    Reference: Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900.
    """
    asked, ask = (table["prompt"].map(prompt_key) for table in (train, held_out))
    ours, theirs = (
        [table[name].map(_plain) for name in ("response_a", "response_b")]
        for table in (train, held_out)
    )
    prompts, answers = _repeated([asked], [ask], most), _repeated(ours, theirs, most)
    compared = {frozenset(pair) for pair in zip(*ours, strict=True)}

    def seen(prompt: str, one: str, other: str) -> bool:
        pairs = product(answers[one], answers[other])
        return bool(prompts[prompt]) or any(frozenset(pair) in compared for pair in pairs)

    known = [seen(*texts) for texts in zip(ask, *theirs, strict=True)]
    leaks = Leaks(
        prompts=len(prompts),
        equal_prompts=_equal(prompts),
        near_prompts=_near(prompts),
        answers=len(answers),
        equal_answers=_equal(answers),
        near_answers=_near(answers),
        votes=sum(known),
        compared=min(len(train), most),
        of=len(train),
    )
    return leaks, torch.tensor(known, dtype=torch.bool)


def find_prompt_leaks(
    train: Sequence[Prompt], held_out: Sequence[Prompt], most: int = SEARCHED
) -> PromptLeaks:
    """Compare the prompts of an evaluation with those of training, as `find_leaks` does.

    Args:
        train: of all tables; a prompt may be there many times.
        most: distinct training prompts that are searched for nearly equal ones.
    """
    known = pd.Series(list(dict.fromkeys(map(prompt_key, train))), dtype=object)
    found = _repeated([known], [pd.Series(list(map(prompt_key, held_out)), dtype=object)], most)
    return PromptLeaks(
        prompts=len(found),
        equal=_equal(found),
        near=_near(found),
        compared=min(len(known), most),
        of=len(known),
    )


def _repeated(
    train: Sequence["pd.Series[str]"], held_out: Sequence["pd.Series[str]"], most: int
) -> dict[str, list[str]]:
    """The texts of training that each distinct held-out text equals, or else nearly equals."""
    known = set(chain(*train))
    searched = dict.fromkeys(chain(*(texts.head(most) for texts in train)))
    index = near_index()
    sets = {text: shingles_of(text) for text in searched}
    for text, shingles in sets.items():
        if len(shingles) > 1:
            index.insert(text, min_hash(shingles), check_duplication=False)
    found = {}
    for text in dict.fromkeys(chain(*held_out)):
        found[text] = [text] if text in known else []
        shingles = shingles_of(text)
        if not found[text] and len(shingles) > 1:
            close = index.query(min_hash(shingles))
            found[text] = [t for t in close if jaccard(shingles, sets[t]) >= NEAR]
    return found


def _equal(found: dict[str, list[str]]) -> int:
    return sum(text in others for text, others in found.items())


def _near(found: dict[str, list[str]]) -> int:
    return sum(bool(others) for others in found.values()) - _equal(found)


def _plain(text: str) -> str:
    return " ".join(text.split())
