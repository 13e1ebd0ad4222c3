"""What a training reads of prepared tables, encoded once for all processes of a machine.

A table of a million pairs is several gigabytes as Python objects, and its tokens are more, in each
process. Here both stay in files: tokens are mapped, and a text is read when it is shown.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rlhf_core.data.encoding import Prompt, encode_all_answers, encode_all_prompts
from rlhf_core.data.mapped.folder import opened_once
from rlhf_core.data.mapped.rows import Field, PreparedRows
from rlhf_core.data.mapped.texts import Texts, TextWriter
from rlhf_core.data.pairs import (
    BATCH,
    Pair,
    all_the_same,
    encode_votes,
    in_half,
    none_in_half,
    pair_of,
    vote_texts,
)
from rlhf_core.data.prepared import Split, training_text
from rlhf_core.errors import DataError
from rlhf_core.metrics import SilentLogger, StageLogger
from rlhf_core.settings.fields import TableKind
from rlhf_core.settings.training import Votes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM = 1  # of the files
_EXAMPLE = np.dtype([("untrained", "i4"), ("cut", "?")])
_PROMPT = np.dtype([("hash", "S16")])
_PAIR = np.dtype(
    [
        *(("row", "i8"), ("prompt", "u8"), ("margin", "f8"), ("tie", "?"), ("cut", "?")),
        *(("annotator", "i4"), ("gold", "?"), ("vote", "i1"), ("shown_first", "i1")),
        *(("chosen_length", "i4"), ("rejected_length", "i4")),
    ]
)
_VOTES, _SIDES = ("a", "b", "tie"), ("", "a", "b")
T = TypeVar("T")


class Example(NamedTuple):
    """A training text: its tokens, and how many at the start are not targets, at least 1."""

    ids: list[int]
    untrained: int

    @property
    def targets(self) -> int:
        """The number of tokens in the loss."""
        return len(self.ids) - self.untrained


@dataclass(frozen=True)
class Place:
    """Where the tokens of prepared data are kept, and who is told how far they are.

    Args:
        folder: None = until the process ends.
    """

    data: Path
    tokenizer: "PreTrainedTokenizerBase"
    folder: Path | None = None
    logger: StageLogger = field(default_factory=SilentLogger)

    def texts(
        self,
        rows: PreparedRows,
        facts: np.dtype,
        write: Callable[[TextWriter], None],
        **settings: Any,
    ) -> Texts:
        """The texts of a table, written if they are not there."""

        def make(folder: Path) -> None:
            with TextWriter(folder, facts) as writer:
                write(writer)

        folder = None
        if self.folder is not None:
            made_of = {"form": FORM, "rows": rows.digest(), "facts": str(facts), **settings}
            made_of["tokenizer"] = _fingerprint(self.tokenizer)
            key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
            folder = self.folder / f"{rows.path.stem}-{key[:16]}"
        return opened_once(folder, make, lambda path: Texts(path, facts))

    def batches(self, what: str, rows: Sequence[T]) -> Iterator[list[T]]:
        """Rows, `BATCH` at a time, with word of how many are done."""
        waiting, total = iter(rows), len(rows)
        for start in range(0, total, BATCH):
            self.logger.phase(what, start, total)
            yield list(islice(waiting, BATCH))


# --- demonstrations ---


class Examples(Sequence[Example]):
    """The demonstrations of one side."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return Example(self._texts[place], int(self._texts.facts["untrained"][place]))

    @cached_property
    def targets(self) -> int:
        """Tokens in the loss, of all of them."""
        return int(self._texts.lengths().sum() - self._texts.facts["untrained"].sum(dtype="i8"))

    @cached_property
    def cut(self) -> int:
        """How many were cut."""
        return int(self._texts.facts["cut"].sum())


def examples_of(place: Place, split: Split, max_length: int, *, with_prompt: bool) -> Examples:
    """The demonstrations of one side, at most `max_length` tokens each.

    Args:
        with_prompt: whether the tokens of the prompt are targets, too.

    Raises: DataError when there are none; OSError when the tokens cannot be written.
    """
    rows = PreparedRows(place.data, "demonstrations", split)
    if not len(rows):
        raise DataError(
            "the demonstrations have no rows for training or for evaluation; add rows, or change "
            "data.eval_fraction"
        )

    def write(writer: TextWriter) -> None:
        for part in place.batches("encoding the demonstrations", rows):
            asked = [(row["prompt"], [row["response"]]) for row in part]
            found = encode_all_answers(asked, place.tokenizer, max_length)
            # The first token of a text is predicted from nothing, so it is never trained on.
            facts = [(1 if with_prompt else max(len(f.prompt), 1), f.cut) for f in found]
            writer.write((f.prompt + f.responses[0] for f in found), facts)

    settings = {"max_length": max_length, "with_prompt": with_prompt}
    return Examples(place.texts(rows, _EXAMPLE, write, **settings))


# --- prompts ---


class Prompts(NamedTuple):
    """The prompts of a table, each read when somebody asks for it, and their tokens."""

    prompts: Sequence[Prompt]
    tokens: Sequence[list[int]]


def prompts_of(place: Place, kind: TableKind, split: Split, max_length: int) -> Prompts:
    """The prompts of one side of a table, at most `max_length` tokens each."""
    rows = PreparedRows(place.data, kind, split)
    prompts = Field(rows, "prompt")

    def write(writer: TextWriter) -> None:
        for part in place.batches("encoding the prompts", prompts):
            _write_prompts(writer, encode_all_prompts(part, place.tokenizer, max_length))

    return Prompts(prompts, place.texts(rows, _PROMPT, write, max_length=max_length))


def distinct_prompts(
    prompts: Iterable[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    folder: Path | None,
) -> Sequence[list[int]]:
    """The different lists of tokens of some prompts, in the order of their first.

    Args:
        folder: of these prompts, tokens and length; None = until the process ends.
    """

    def make(path: Path) -> None:
        waiting = iter(prompts)
        with TextWriter(path, _PROMPT) as writer:
            while part := list(islice(waiting, BATCH)):
                _write_prompts(writer, encode_all_prompts(part, tokenizer, max_length))

    texts = opened_once(folder, make, lambda path: Texts(path, _PROMPT))
    first = np.sort(np.unique(texts.facts["hash"], return_index=True)[1])
    return Some(texts, first)


class Some(Sequence[list[int]]):
    """Some of many texts."""

    def __init__(self, texts: Texts, places: np.ndarray) -> None:
        self._texts, self._places = texts, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        return self._texts[int(self._places[place])]


def _write_prompts(writer: TextWriter, found: list[list[int]]) -> None:
    writer.write(found, [(_hash(np.asarray(ids, np.int32).tobytes()),) for ids in found])


def _hash(value: bytes) -> bytes:
    # In hexadecimal digits, since numpy takes a zero byte at the end for no byte.
    return hashlib.blake2b(value, digest_size=8).hexdigest().encode()


# --- preferences ---


class StoredPairs(Sequence[Pair]):
    """The votes of one side, without those that teach nothing."""

    def __init__(self, texts: Texts, rows: PreparedRows, chosen: int) -> None:
        self._texts, self._rows, self._facts = texts, rows, texts.facts
        self.same = chosen - len(self)  # votes left out, since both texts are the same tokens

    def __len__(self) -> int:
        return len(self._facts)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        prompt, chosen, rejected = (self._texts[3 * place + i] for i in range(3))
        tie, margin, cut = (self._facts[name][place].item() for name in ("tie", "margin", "cut"))
        return pair_of(prompt, [chosen, rejected], tie=tie, margin=margin, cut=cut)

    @cached_property
    def truncated(self) -> int:
        """Votes with a text that was cut."""
        return int(self._facts["cut"].sum())

    @cached_property
    def ties(self) -> Tensor:
        """(N,) whether nobody won."""
        return torch.from_numpy(self._facts["tie"].copy())

    @cached_property
    def gaps(self) -> Tensor:
        """(N,) tokens of chosen minus rejected."""
        lengths = self._texts.lengths().reshape(-1, 3)
        return torch.from_numpy(lengths[:, 1] - lengths[:, 2])

    @cached_property
    def prompts(self) -> Tensor:
        """(N,) number of the prompt that each vote is about."""
        return torch.from_numpy(pd.factorize(self._facts["prompt"])[0]).long()

    def votes(self) -> pd.DataFrame:
        """What is known of each vote beside its texts, of which it has the lengths (characters)."""
        facts = self._facts

        def named(name: str, values: Sequence[str]) -> pd.Series:
            return pd.Series(np.array(values, dtype=object)[facts[name]]).astype("category")

        return pd.DataFrame(
            {
                "annotator": named("annotator", self._texts.names.get("annotator", [])),
                "gold": facts["gold"],
                "vote": named("vote", _VOTES),
                "shown_first": named("shown_first", _SIDES),
                "tie": facts["tie"],
                "chosen_length": facts["chosen_length"],
                "rejected_length": facts["rejected_length"],
            }
        )

    def shown(self, most: int) -> pd.DataFrame:
        """The first votes as text: prompt, chosen, rejected."""
        found = map(vote_texts, self._rows.pick(self._facts["row"][:most].tolist()))
        names = ["prompt", "chosen", "rejected"]
        return pd.DataFrame([vote[:3] for vote in found], columns=names, dtype=object)


def pairs_of(
    place: Place, split: Split, max_length: int, setting: str, *, which: Votes = "all"
) -> StoredPairs:
    """The votes of one side, encoded as `rlhf_core.data.pairs.encode_pairs` does.

    Args:
        setting: the name of the one with `max_length`.
        which: all, or those on one half of the prompts, as `select_votes` has it.

    Raises: DataError when no vote is left; OSError when the tokens cannot be written.
    """
    rows = PreparedRows(place.data, "preferences", split)
    if not len(rows):
        raise DataError(
            "the preferences have no rows for training or for evaluation; add rows, or change "
            "data.eval_fraction"
        )
    halves: list[int] = []  # votes of the half, if this process has written them

    def write(writer: TextWriter) -> None:
        halves.append(0)
        batches = place.batches("encoding the preferences", rows)
        numbered = enumerate(chain.from_iterable(batches))
        chosen = ((n, row) for n, row in numbered if in_half(row["prompt"], which))
        while part := list(islice(chosen, BATCH)):
            halves[0] += len(part)
            votes = [vote_texts(row) for _, row in part]
            texts: list[list[int]] = []
            facts: list[tuple[Any, ...]] = []
            for at, vote, found in encode_votes(votes, place.tokenizer, max_length):
                texts += [found.prompt, *found.responses]
                facts.append((part[at][0], *_facts_of(part[at][1], vote, found.cut, writer)))
            writer.write(texts, facts)
        if not halves[0]:
            raise DataError(none_in_half(len(rows), which))
        writer.number("votes", str(halves[0]))

    settings = {"max_length": max_length, "which": which}
    texts = place.texts(rows, _PAIR, write, **settings)
    chosen = int(texts.names["votes"][0])
    if not len(texts):
        raise DataError(all_the_same(chosen, max_length, setting))
    return StoredPairs(texts, rows, chosen)


def _facts_of(row: dict[str, Any], vote: Any, cut: bool, writer: TextWriter) -> tuple[Any, ...]:
    prompt = str(vote.prompt).encode("utf-8", "surrogatepass")  # as `prompt_numbers`
    return (
        int.from_bytes(hashlib.blake2b(prompt, digest_size=8).digest(), "little"),
        vote.lead,
        vote.tie,
        cut,
        writer.number("annotator", row["annotator"]),
        row["gold"],
        _VOTES.index(row["vote"]),
        _SIDES.index(row["shown_first"]),
        len(vote.chosen),
        len(vote.rejected),
    )


def training_dialogues(rows: PreparedRows) -> Iterator[str]:
    """As `training_texts`, of a table that stays in its file."""
    return (training_text(row["prompt"], row["response"]) for row in rows)


def has_chats(rows: PreparedRows) -> bool:
    """Whether a prompt is made of messages."""
    return any(not isinstance(row["prompt"], str) for row in rows)


def _fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What the tokens of a text depend on."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = sorted(tokenizer.get_vocab().items()) if inner is None else inner.to_str()
    parts = (type(tokenizer).__name__, vocabulary, tokenizer.chat_template)
    special = sorted(map(str, tokenizer.special_tokens_map.items()))
    return hashlib.sha256(repr((*parts, special)).encode("utf-8", "surrogatepass")).hexdigest()
