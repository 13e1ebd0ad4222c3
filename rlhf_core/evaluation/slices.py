"""The evaluation prompts by the values of the columns that the user keeps beside them, and the win
rates on each part."""

from typing import NamedTuple

import pandas as pd
import torch

from rlhf_core.data.prepared import KEPT, UNKNOWN
from rlhf_core.evaluation.scorecard import Comparison, PromptSlice
from rlhf_core.functional.interval import Interval
from rlhf_core.functional.ranking import at_least_wilson, clustered_share
from rlhf_core.seeding import generator


class SliceRate(NamedTuple):
    """The win rate of a comparison on a part of the prompts."""

    prompts: int  # with a verdict
    win_rate: Interval  # never narrower than Wilson's over these prompts


def prompt_slices(table: pd.DataFrame) -> tuple[PromptSlice, ...]:
    """A slice for each value of each column that `data.prompts.keep` names, in order of appearance.

    A column with a single value is no slice. A prompt without a value has the value (unknown).

    Args:
        table: the prompts that were answered, as prepared; row i is position i of the points.
    """
    if KEPT not in table:
        return ()
    rows = table[KEPT].tolist()
    slices = []
    for column in dict.fromkeys(name for kept in rows for name in kept):
        found: dict[str, list[int]] = {}
        for at, kept in enumerate(rows):
            found.setdefault(kept.get(column) or UNKNOWN, []).append(at)
        if len(found) > 1:
            slices += [
                PromptSlice(column=column, value=value, prompts=tuple(at))
                for value, at in found.items()
            ]
    return tuple(slices)


def slice_rate(match: Comparison, part: PromptSlice, seed: int) -> SliceRate | None:
    """The win rate of a comparison in a slice, every prompt with the same weight.

    None when no prompt of it has a verdict, or the comparison does not have the points of prompts.
    """
    points = [match.points[at] for at in part.prompts if at < len(match.points)]
    known = torch.tensor([point for point in points if point is not None])
    if not len(known):
        return None
    stream = f"evaluation/slice/{part.name}/{match.candidate}/{match.opponent}"
    each = torch.arange(len(known))
    drawn = clustered_share(known, each, generator=generator(seed, stream))
    return SliceRate(len(known), at_least_wilson(drawn, each))
