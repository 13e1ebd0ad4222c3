"""Check the data before anything is trained on them: checks, counts and the report.

This module knows prepared columns and tokenizers, but not files.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from rlhf_core.data.chat_tokens import Fitted, written_controls
from rlhf_core.data.encoding import encode_all_prompts, encode_all_responses, encode_answers
from rlhf_core.data.pairs import with_winners
from rlhf_core.data.prepared import COLUMNS, canonical_prompt, known_answers, votes_of_machines
from rlhf_core.metrics import Between, uncounted
from rlhf_core.settings.fields import TableKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS: Mapping[TableKind, tuple[str, ...]] = {
    "demonstrations": ("response",),
    "preferences": ("chosen", "rejected"),
    "prompts": (),
}
LENGTHS = "lengths"  # a column of tables while they are prepared: tokens of prompt and answers
_BATCH = 1000  # texts tokenised between two words of progress


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class TableSummary(_Facts):
    """The outcome for one table: examples = train + eval + dropped."""

    source: str = Field(description="Where the rows come from")
    rows: int = Field(description="Rows of the source")
    examples: int = Field(description="Rows, with one for each vote on a pair")
    train: int = Field(description="Examples kept for training")
    eval: int = Field(description="Examples kept for evaluation")
    eval_prompts: int = Field(description="Distinct prompts of the evaluation examples")
    dropped: Mapping[str, int] = Field(description="Examples left out, by reason")


class LengthSummary(_Facts):
    """The lengths of one kind of text, in tokens."""

    table: str
    text: str
    count: int
    mean: float
    p50: float
    p95: float
    max: int


class Validation(_Facts):
    """The validation report, written to `validation.json`."""

    tables: Mapping[str, TableSummary]
    bad_rows: Sequence[str] = Field(description="The first bad rows: file, line, field, reason")
    unread: Sequence[str] = Field(description="Notes on columns: not read, or read unasked")
    ties: int = Field(description="Preferences without a winner")
    known_sides: int = Field(description="Votes for which the answer shown first is known")
    timed: int = Field(description="Votes for which the time is known")
    gold: int = Field(description="Votes on pairs whose right answer is known")
    known_answers: int = Field(
        0, description="Preferences that are known right answers, and nobody's votes"
    )
    machine_votes: int = Field(0, description="Preferences that are votes of judges, not people's")
    contradictory_pairs: int = Field(
        description="Pairs in which each answer won against the other, by votes of people"
    )
    shared_prompts: int = Field(description="Prompts on both sides of the split")
    lengths: Sequence[LengthSummary]
    truncated: Mapping[str, int] = Field(description="Texts that the stages will cut, by limit")
    lost: Mapping[str, int] = Field(
        {}, description="Tokens of answers that the stages will cut off, by limit"
    )
    same_after_cut: int = Field(
        0, description="Preferences whose answers are the same tokens then; they are left out"
    )
    written_controls: int = Field(
        0, description="Texts that write out a control token of the model; it is read as text"
    )
    template_date: str = Field(
        "", description="What the chat template takes for today; empty = it does not ask"
    )
    vocabulary: int = Field(description="Vocabulary size of the model's tokenizer")
    shards: int = Field(1, description="Parts of the prompts that were prepared one after another")

    def rows_table(self) -> pd.DataFrame:
        """One row for each table and outcome: train, eval, or the reason for being dropped."""
        records = [
            (name, table.source, outcome, examples)
            for name, table in self.tables.items()
            for outcome, examples in _outcomes(table).items()
        ]
        return pd.DataFrame(records, columns=["table", "source", "outcome", "examples"])

    def lengths_table(self) -> pd.DataFrame:
        """One row for each kind of text: its lengths in tokens."""
        names = list(LengthSummary.model_fields)
        return pd.DataFrame([length.model_dump() for length in self.lengths], columns=names)

    def truncated_table(self) -> pd.DataFrame:
        """One row for each limit: how many texts are longer."""
        return pd.DataFrame(list(self.truncated.items()), columns=["limit", "texts"])


def _outcomes(table: TableSummary) -> dict[str, int]:
    dropped = {f"dropped: {reason}": count for reason, count in table.dropped.items()}
    return {"train": table.train, "eval": table.eval, **dropped}


def drop_useless(frame: pd.DataFrame, kind: TableKind) -> tuple[pd.DataFrame, Counter[str]]:
    """Drop duplicates and pairs of identical answers; return the rest and the counts.

    A duplicate repeats prompt and answers, and for a preference also the winner and the annotator.
    Anonymous votes on one row (`ballot`) are votes of different people. A judge that is a machine
    is asked in both orders, and its votes in each are two. Rows on different sides of
    a split (`split`) are not compared: that would hide a prompt on both sides.
    """
    keys = pd.DataFrame({"split": frame["split"], "prompt": frame["prompt"].map(canonical_prompt)})
    useless = pd.Series(False, index=frame.index)
    if kind == "preferences":
        useless |= frame["response_a"].map(str.strip) == frame["response_b"].map(str.strip)
        keys = keys.assign(**_matches(frame), annotator=frame["annotator"], ballot=frame["ballot"])
        keys["order"] = _first_text(frame).where(votes_of_machines(frame), "")
    elif kind == "demonstrations":
        keys["response"] = frame["response"]
    repeated = keys.duplicated() & ~useless
    counts = Counter({"identical answers": int(useless.sum()), "duplicate": int(repeated.sum())})
    return frame[~useless & ~repeated], +counts


def _first_text(frame: pd.DataFrame) -> "pd.Series[str]":
    """The answer of each vote that was shown first; "" where that is unknown."""
    first = frame["response_a"].where(frame["shown_first"] == "a", frame["response_b"])
    return first.where(frame["shown_first"] != "", "")


def contradictory_pairs(preferences: pd.DataFrame) -> int:
    """Count the pairs of answers to one prompt in which each won against the other.

    A known answer contradicts nobody: those who voted otherwise were wrong.
    """
    decided = preferences[(preferences["vote"] != "tie") & ~known_answers(preferences)]
    matches = decided.assign(prompt=decided["prompt"].map(canonical_prompt), **_matches(decided))
    winners = matches.groupby(["prompt", "first", "second"])["winner"].nunique()
    return int((winners > 1).sum())


def _matches(frame: pd.DataFrame) -> dict[str, list[str]]:
    """Each pair in a canonical order, and its winner ("" for a tie)."""
    pairs = list(zip(frame["response_a"], frame["response_b"], strict=True))
    voted = with_winners(frame)
    winners = voted["chosen"].mask(voted["tie"], "").tolist()
    return {
        "first": [min(pair) for pair in pairs],
        "second": [max(pair) for pair in pairs],
        "winner": winners,
    }


def count_tokens(
    tables: Mapping[TableKind, pd.DataFrame],
    tokenizer: "PreTrainedTokenizerBase",
    between: Between = uncounted,
) -> dict[TableKind, pd.DataFrame]:
    """Token counts of `prompt` and of the answers, by row, as the stages encode them: a rendered
    prompt with its begin-of-sequence token, an answer with the token that ends it.
    """
    prompts = {canonical_prompt(p): p for frame in tables.values() for p in frame["prompt"]}
    answers = dict.fromkeys(
        (text, not isinstance(prompt, str))
        for kind, frame in tables.items()
        for name in ANSWERS[kind]
        for prompt, text in zip(frame["prompt"], frame[name], strict=True)
    )
    of_prompt, of_answer = _known_lengths(tables)
    names = [name for name in prompts if name not in of_prompt]
    keys = [key for key in answers if key not in of_answer]
    steps = [range(0, len(texts), _BATCH) for texts in (names, keys)]
    tell = between("tokenising", sum(map(len, steps)))
    for start in steps[0]:
        tell()
        part = names[start : start + _BATCH]
        found = encode_all_prompts([prompts[name] for name in part], tokenizer)
        of_prompt |= zip(part, map(len, found), strict=True)
    for start in steps[1]:
        tell()
        some = keys[start : start + _BATCH]
        of_answer |= zip(some, map(len, encode_all_responses(some, tokenizer)), strict=True)
    return {
        kind: pd.DataFrame(
            {"prompt": [of_prompt[canonical_prompt(prompt)] for prompt in frame["prompt"]]}
            | {
                name: [
                    of_answer[text, not isinstance(prompt, str)]
                    for prompt, text in zip(frame["prompt"], frame[name], strict=True)
                ]
                for name in ANSWERS[kind]
            },
            index=frame.index,
        )
        for kind, frame in tables.items()
    }


def _known_lengths(
    tables: Mapping[TableKind, pd.DataFrame],
) -> tuple[dict[str, int], dict[tuple[str, bool], int]]:
    """The token counts that rows have in LENGTHS, of prompts and of answers in a chat or not."""
    of_prompt: dict[str, int] = {}
    of_answer: dict[tuple[str, bool], int] = {}
    for kind, frame in tables.items():
        if LENGTHS not in frame:
            continue
        columns = [frame[name] for name in (LENGTHS, "prompt", *answer_columns(kind))]
        for lengths, prompt, *texts in zip(*columns, strict=True):
            of_prompt[canonical_prompt(prompt)] = lengths[0]
            chat = not isinstance(prompt, str)
            of_answer |= zip(((text, chat) for text in texts), lengths[1:], strict=True)
    return of_prompt, of_answer


def answer_columns(kind: TableKind) -> list[str]:
    """The prepared columns with answers."""
    return [name for name in COLUMNS[kind] if name.startswith("response")]


def measure_cut(
    tables: Mapping[TableKind, pd.DataFrame],
    counts: Mapping[TableKind, pd.DataFrame],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sft: int,
    reward: int,
) -> tuple[dict[str, int], pd.Series]:
    """The tokens of answers that the stages will cut off, by limit; and by preference, whether its
    answers are the same tokens then, so that it teaches nothing."""
    lost, same = {}, pd.Series(False, index=tables["preferences"].index)
    limits: tuple[tuple[TableKind, int], ...] = (("demonstrations", sft), ("preferences", reward))
    for kind, limit in limits:
        lost[f"{kind} over {limit} tokens"] = 0
        columns = list(ANSWERS[kind])
        lengths = counts[kind][columns]
        long = counts[kind]["prompt"] + lengths.max(axis=1) > limit
        # Answers of one length may be the same tokens without a cut, too.
        look = long | ((lengths.nunique(axis=1) == 1) & (len(columns) > 1))
        cut: dict[tuple[str, ...], Fitted] = {}  # a pair has several votes
        long_rows = tables[kind][look]
        texts = [long_rows[name].tolist() for name in ("prompt", *columns)]
        for row, prompt, *answers in zip(long_rows.index, *texts, strict=True):
            key = (canonical_prompt(prompt), *answers)
            if key not in cut:
                cut[key] = encode_answers(prompt, answers, tokenizer, limit)
            lost[f"{kind} over {limit} tokens"] += cut[key].lost
            if kind == "preferences":
                same[row] = cut[key].responses[0] == cut[key].responses[1]
    return lost, same


def with_written_controls(
    tables: Mapping[TableKind, pd.DataFrame], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[str]:
    """Distinct prompts and answers that have a control token of the model written out; each begins
    with what it is."""
    find = written_controls(tokenizer)
    prompts = {canonical_prompt(p): p for frame in tables.values() for p in frame["prompt"]}
    columns = [frame[name] for kind, frame in tables.items() for name in ANSWERS[kind]]
    answers = dict.fromkeys(text for column in columns for text in column)
    yield from (f"prompt {name}" for name, prompt in prompts.items() if find(prompt))
    yield from (f"answer {text}" for text in answers if find(text))


def summarise_lengths(counts: Mapping[TableKind, pd.DataFrame]) -> list[LengthSummary]:
    """Mean, median, 95th percentile and longest of each kind of text."""
    return [
        LengthSummary(
            table=kind,
            text=str(text),
            count=len(lengths),
            mean=float(lengths.mean()),
            p50=float(lengths.quantile(0.5)),
            p95=float(lengths.quantile(0.95)),
            max=int(lengths.max()),
        )
        for kind, frame in counts.items()
        for text, lengths in frame.items()
    ]


def count_truncated(
    counts: Mapping[TableKind, pd.DataFrame], *, prompt: int, sft: int, reward: int, response: int
) -> dict[str, int]:
    """Count the texts that are longer than each limit of the later stages (tokens)."""
    demonstrations, pairs = counts["demonstrations"], counts["preferences"]
    imitated = demonstrations["prompt"] + demonstrations["response"]
    compared = pairs["prompt"] + pairs[["chosen", "rejected"]].max(axis=1)
    texts = {
        f"prompts over {prompt} tokens": counts["prompts"]["prompt"] > prompt,
        f"demonstrations over {sft} tokens": imitated > sft,
        f"responses over {response} tokens": demonstrations["response"] > response,
        f"preferences over {reward} tokens": compared > reward,
    }
    return {name: int(cut.sum()) for name, cut in texts.items()}
