"""The three tables on their way from parsed sources to the prepared files.

Each is cleaned, split by prompt and, where the user brought none, filled from the others. Knows
nothing about files and settings.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import pandas as pd

from rlhf_core.data.formats import Table
from rlhf_core.data.pairs import with_winners
from rlhf_core.data.prepared import KINDS, SPLITS, Kind, Split, falls_to_eval, prompt_key
from rlhf_core.data.validation import drop_useless

_LISTED = 20  # bad rows of a table that the report names


@dataclass(frozen=True)
class Assembled:
    """One table on its way: prepared columns, `split`, and `key` to recognise a prompt by."""

    frame: pd.DataFrame
    source: str
    rows: int  # of the source
    dropped: Counter[str]
    bad_rows: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def side(self, split: Split) -> pd.DataFrame:
        """The rows of one side."""
        return self.frame[self.frame["split"] == split]


Tables: TypeAlias = dict[Kind, Assembled]


def assemble(kind: Kind, parts: Mapping[str, Table]) -> Assembled:
    """The sources of one table together, without what teaches nothing.

    `parts` names the side of each source: "train", "eval", or "" where its prompts decide.
    """
    frames = [table.frame.assign(split=split) for split, table in parts.items()]
    kept, dropped = drop_useless(pd.concat(frames, ignore_index=True), kind)
    faults = [fault for table in parts.values() for fault in table.faults]
    dropped.update(fault.category for fault in faults)
    for table in parts.values():
        dropped.update(table.skipped)
    return Assembled(
        frame=kept.assign(key=kept["prompt"].map(prompt_key)),
        source=" and ".join(table.source for table in parts.values()),
        rows=sum(table.rows for table in parts.values()),
        dropped=dropped,
        bad_rows=tuple(map(str, faults[:_LISTED])),
        unread=tuple(note for table in parts.values() for note in table.unread),
    )


def split_by_prompt(tables: Tables, fraction: float, seed: int) -> Tables:
    """Every row on one side, all rows of a prompt on the same.

    Where the user brought evaluation data, they decide for their prompts in the other tables too;
    a prompt that they themselves put on both sides stays there, for `shared_prompts` to find.
    """
    side: dict[str, str] = {}
    for split in SPLITS:  # evaluation last: where sources disagree, the other tables follow it
        for table in tables.values():
            side |= dict.fromkeys(table.side(split)["key"], split)
    undecided = {key for table in tables.values() for key in table.frame["key"]} - side.keys()
    side |= {k: "eval" if falls_to_eval(k, seed, fraction) else "train" for k in undecided}
    return {
        kind: replace(table, frame=_placed(table.frame, side)) for kind, table in tables.items()
    }


def _placed(frame: pd.DataFrame, side: Mapping[str, str]) -> pd.DataFrame:
    return frame.assign(split=frame["split"].where(frame["split"] != "", frame["key"].map(side)))


def fill(tables: Tables) -> Tables:
    """Tables that the user did not bring: the answers that won (in no tie) as demonstrations, and
    the distinct prompts of the other two tables as prompts."""
    preferences = tables["preferences"].frame
    filled = dict(tables)
    if "demonstrations" not in filled:
        voted = with_winners(preferences)
        decided = voted[~voted["tie"]]
        answers = decided.assign(response=decided["chosen"])
        filled["demonstrations"] = _derived(
            answers, "answers chosen in the preferences", "response"
        )
    if "prompts" not in filled:
        both = pd.concat([preferences, filled["demonstrations"].frame])
        filled["prompts"] = _derived(both, "prompts of the other tables")
    return {kind: filled[kind] for kind in KINDS}


def _derived(frame: pd.DataFrame, source: str, *distinct: str) -> Assembled:
    kept = frame.drop_duplicates(["split", "key", *distinct])
    return Assembled(kept, source, len(kept), Counter())


def shared_prompts(tables: Tables) -> list[str]:
    """The keys of all prompts that stand on both sides, in whichever tables."""
    train, evaluation = (
        {key for table in tables.values() for key in table.side(split)["key"]} for split in SPLITS
    )
    return sorted(train & evaluation)
