"""Turn parsed sources into the three tables that are written as the prepared files.

Each table is cleaned, split by prompt and, if the user gave no source, derived from the others.
This module knows nothing about files and settings.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import pandas as pd

from rlhf_core.data.formats import ParsedSource
from rlhf_core.data.origins.counts import CHOSEN_ANSWERS, NOWHERE, ORIGIN, OTHER_PROMPTS
from rlhf_core.data.pairs import with_winners
from rlhf_core.data.prepared import KEPT, SPLITS, Split, falls_to_eval, prompt_key
from rlhf_core.data.validation import LENGTHS, drop_useless
from rlhf_core.settings.fields import TABLE_KINDS, TableKind

ORDER = "order"  # a column of the tables while they are prepared: where a row is among all
PART = 2**48  # by which the numbers of the second source of a table are higher
LISTED = 20  # bad rows of a table that the report names
_BEHIND = 2**60  # by which those of demonstrations are, among the prompts


@dataclass(frozen=True)
class CleanTable:
    """One cleaned table: the prepared columns, `split`, the `key` of each prompt, ORIGIN, ORDER."""

    frame: pd.DataFrame
    source: str
    rows: int  # of the source
    dropped: Counter[str]
    bad_rows: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def side(self, split: Split) -> pd.DataFrame:
        """The rows of one side of the split."""
        return self.frame[self.frame["split"] == split]


@dataclass(frozen=True)
class ParsedFacts:
    """What is known of the sources of one table as a whole."""

    source: str
    rows: int
    dropped: Counter[str]  # bad rows and those that were skipped, by reason
    bad_rows: tuple[str, ...] = ()  # the first ones
    unread: tuple[str, ...] = ()


CleanTables: TypeAlias = dict[TableKind, CleanTable]


def assemble(kind: TableKind, parts: Mapping[str, ParsedSource]) -> CleanTable:
    """Join the sources of one table and drop the rows that teach nothing.

    `parts` maps a split to its source: "train", "eval", or "" when the prompts decide.
    """
    frames = [
        _with_origins(table, number).assign(split=split)
        for number, (split, table) in enumerate(parts.items())
    ]
    kept, dropped = drop_useless(pd.concat(frames, ignore_index=True), kind)
    facts = facts_of(parts.values())
    return CleanTable(
        frame=kept.assign(key=kept["prompt"].map(prompt_key).astype(object)),
        source=facts.source,
        rows=facts.rows,
        dropped=dropped + facts.dropped,
        bad_rows=facts.bad_rows,
        unread=facts.unread,
    )


def facts_of(sources: Collection[ParsedSource]) -> ParsedFacts:
    """What is known of the sources of one table beside their rows."""
    faults = [fault for source in sources for fault in source.faults]
    dropped = Counter(fault.category for fault in faults)
    for source in sources:
        dropped.update(source.skipped)
    return ParsedFacts(
        source=" and ".join(source.source for source in sources),
        rows=sum(source.rows for source in sources),
        dropped=dropped,
        bad_rows=tuple(map(str, faults[:LISTED])),
        unread=tuple(note for source in sources for note in source.unread),
    )


def _with_origins(table: ParsedSource, part: int) -> pd.DataFrame:
    frame = table.frame
    if ORIGIN not in frame:
        origins: list[object] = [*table.origins] or [NOWHERE] * len(frame)
        frame = frame.assign(**{ORIGIN: pd.Series(origins, frame.index, dtype=object)})
    if ORDER not in frame:
        frame = frame.assign(**{ORDER: range(part * PART, part * PART + len(frame))})
    return frame


def split_by_prompt(tables: CleanTables, fraction: float, seed: int) -> CleanTables:
    """Assign every row to train or eval, all rows of a prompt to the same.

    The user's own evaluation data decide for their prompts in the other tables too. A prompt that
    the user put on both sides stays there, and `shared_prompts` finds it.
    """
    side: dict[str, str] = {}
    for split in SPLITS:  # evaluation last, so it wins where sources disagree
        for table in tables.values():
            side |= dict.fromkeys(table.side(split)["key"], split)
    undecided = {key for table in tables.values() for key in table.frame["key"]} - side.keys()
    side |= {k: "eval" if falls_to_eval(k, seed, fraction) else "train" for k in undecided}
    return {
        kind: replace(table, frame=_assign_split(table.frame, side))
        for kind, table in tables.items()
    }


def _assign_split(frame: pd.DataFrame, side: Mapping[str, str]) -> pd.DataFrame:
    return frame.assign(split=frame["split"].where(frame["split"] != "", frame["key"].map(side)))


def fill(tables: CleanTables) -> CleanTables:
    """Derive the tables that the user did not provide.

    Demonstrations are the answers that won a vote (no ties); prompts are the distinct prompts of
    the other two tables.
    """
    preferences = tables["preferences"].frame
    filled = dict(tables)
    if "demonstrations" not in filled:
        voted = with_winners(preferences)
        decided = voted[~voted["tie"]]
        answers = decided.assign(response=decided["chosen"])
        filled["demonstrations"] = _derived(answers, CHOSEN_ANSWERS, "response")
    if "prompts" not in filled:
        answers = filled["demonstrations"].frame
        behind = answers.assign(**{ORDER: answers[ORDER] + _BEHIND})
        both = pd.concat([preferences, behind])
        filled["prompts"] = _derived(both, OTHER_PROMPTS)
    return {kind: filled[kind] for kind in TABLE_KINDS}


def _derived(frame: pd.DataFrame, source: str, *distinct: str) -> CleanTable:
    # What is kept beside a vote belongs to the vote.
    kept = frame.drop_duplicates(["split", "key", *distinct]).drop(
        columns=[KEPT, LENGTHS], errors="ignore"
    )
    return CleanTable(kept, source, len(kept), Counter())


def shared_prompts(tables: CleanTables) -> list[str]:
    """The keys of all prompts that are on both sides of the split, across all tables."""
    train, evaluation = (
        {key for table in tables.values() for key in table.side(split)["key"]} for split in SPLITS
    )
    return sorted(train & evaluation)
