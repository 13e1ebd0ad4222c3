"""Texts of the held-out votes, and prompts of the evaluation, that training has seen, word for word
or nearly.

Votes are split by prompt, so a prompt is on one side only. What the split cannot see is a prompt
that was edited a little, or two answers that are compared with each other under several prompts.
The accuracy on such votes is partly memory.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, product
from typing import Any

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rlhf_core.data.encoding import Prompt
from rlhf_core.data.mapped.rows import PreparedRows
from rlhf_core.data.near import NEAR, jaccard, min_hash, near_index, shingles_of
from rlhf_core.data.prepared import prompt_key
from rlhf_core.evaluation.scorecard import PromptLeaks

_ANSWERS = ("response_a", "response_b")
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


def find_leaks(
    train: pd.DataFrame | PreparedRows, held_out: pd.DataFrame, most: int
) -> tuple[Leaks, Tensor]:
    """Compare the texts of held-out votes with those of training votes.

    Equal texts, in which runs of white space count as one space, are found among all; nearly equal
    ones, whose sets of three-word sequences have a Jaccard similarity of at least 0.8, among the
    first `most` training votes, by MinHash and then exactly. The training votes are read and not
    kept: memory is that of the held-out votes and of the first `most`.

    Returns: the counts, and (N,) bool for each held-out vote whether its prompt is one of training,
    or its two answers were compared there.

    Reference: Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900.
    """
    ask = [prompt_key(prompt) for prompt in held_out["prompt"]]
    theirs = [[_plain(text) for text in held_out[name]] for name in _ANSWERS]
    prompts = _repeated(([key] for key, *_ in _texts(train)), [ask], most)
    answers = _repeated((pair for _, *pair in _texts(train)), theirs, most)
    found = set(chain.from_iterable(answers.values()))
    compared = {frozenset(pair) for _, *pair in _texts(train) if found.issuperset(pair)}

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


def _texts(train: pd.DataFrame | PreparedRows) -> Iterator[tuple[str, str, str]]:
    """The prompt and the two answers of each vote."""
    rows: Iterable[Any] = train
    if isinstance(train, pd.DataFrame):
        names = ("prompt", *_ANSWERS)
        columns = zip(*(train[name] for name in names), strict=True)
        rows = (dict(zip(names, row, strict=True)) for row in columns)
    for row in rows:
        a, b = (_plain(row[name]) for name in _ANSWERS)
        yield prompt_key(row["prompt"]), a, b


def find_prompt_leaks(
    train: Iterable[Prompt], held_out: Sequence[Prompt], most: int = SEARCHED
) -> PromptLeaks:
    """Compare the prompts of an evaluation with those of training, as `find_leaks` does.

    Args:
        train: of all tables; a prompt may be there many times.
        most: distinct training prompts that are searched for nearly equal ones.
    """
    known = _Distinct(map(prompt_key, train))
    found = _repeated(([key] for key in known), [list(map(prompt_key, held_out))], most)
    return PromptLeaks(
        prompts=len(found),
        equal=_equal(found),
        near=_near(found),
        compared=min(known.count, most),
        of=known.count,
    )


class _Distinct(Iterator[str]):
    """Each text once, of which only a hash is kept."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = iter(texts)
        self._seen: set[bytes] = set()

    @property
    def count(self) -> int:
        """How many there were."""
        return len(self._seen)

    def __next__(self) -> str:
        for text in self._texts:
            key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if key not in self._seen:
                self._seen.add(key)
                return text
        raise StopIteration


def _repeated(
    train: Iterable[Sequence[str]], held_out: Sequence[Sequence[str]], most: int
) -> dict[str, list[str]]:
    """The texts of training that each distinct held-out text equals, or else nearly equals.

    Args:
        train: texts of each row; the first `most` rows are searched for nearly equal ones.
        held_out: columns of texts.
    """
    wanted = set(chain(*held_out))
    known: set[str] = set()
    columns: list[list[str]] = []
    for number, texts in enumerate(train):
        known.update(wanted.intersection(texts))
        if number < most:
            columns.append(list(texts))
    searched = dict.fromkeys(chain(*zip(*columns, strict=True)))
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
