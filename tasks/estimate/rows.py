"""The rows that a trial gets: drawn at random, and first those that take the most memory."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import copytree
from typing import Any, Final

import pandas as pd

from rlhf_core.data.prepared import read_table, write_table
from rlhf_core.estimate.trial import Trial
from rlhf_core.seeding import generator
from rlhf_core.settings.training import RewardModelConfig, TrainingSection
from rlhf_core.training.order import Batches, chunks

# Which random stream orders the rows of a stage.
ORDERS: Final[Mapping[str, str]] = {
    "sft": "sft/order",
    "reward_model": "reward/order",
    "dpo": "dpo/order",
}
_TEXTS = ("prompt", "response", "response_a", "response_b")


def less_data(
    source: Path, to: Path, plan: Trial, stage: str, config: TrainingSection | None, seed: int
) -> None:
    """Write prepared data with as many rows as a trial needs."""
    copytree(source, to)
    for (kind, split), most in plan.rows.items():
        table = read_table(source, kind, split)
        if len(table) <= most:
            continue
        drawn = table.sample(most, random_state=seed % 2**32)
        if split == "train" and config is not None and _in_this_order(stage, config):
            drawn = _heaviest_first(drawn, table, stage, config, plan, seed)
        write_table(drawn, to, kind, split)


def _in_this_order(stage: str, config: TrainingSection) -> bool:
    """Whether the rows of the table are those of the stage, in the order of its stream."""
    if isinstance(config, RewardModelConfig) and (config.members > 1 or config.votes != "all"):
        return False
    return stage in ORDERS


def _heaviest_first(
    drawn: pd.DataFrame,
    table: pd.DataFrame,
    stage: str,
    config: TrainingSection,
    plan: Trial,
    seed: int,
) -> pd.DataFrame:
    """The drawn rows, with the longest micro-batch of the run as the first of the trial.

    The first step is not timed, and its memory is that of the longest texts that will meet.
    """
    sizes = [_size(row) for row in table.to_dict("records")]
    micro = max(
        _micro_batches(len(table), stage, config, seed),
        key=lambda rows: sum(sizes[row] for row in rows),
    )
    first = next(_micro_batches(len(drawn), stage, _section(plan, config), seed))
    rows = list(drawn.index)
    for place, heavy in zip(first, micro, strict=False):
        rows[place] = table.index[heavy]
    return table.loc[rows]


def _section(plan: Trial, config: TrainingSection) -> TrainingSection:
    return plan.config if isinstance(plan.config, TrainingSection) else config


def _micro_batches(
    rows: int, stage: str, config: TrainingSection, seed: int
) -> Iterator[list[int]]:
    """The micro-batches of the first epoch, in their order."""
    draws = generator(seed, ORDERS[stage])
    for batch in Batches(rows, config.batch_size, 1, draws):
        yield from chunks(batch, config.micro_batch_size)


def _size(row: Mapping[Any, Any]) -> int:
    """Characters of a row's texts, which go with their tokens."""
    return sum(len(str(row[name])) for name in _TEXTS if name in row)
