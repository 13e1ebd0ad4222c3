"""The training loop of SFT, reward model and DPO: one optimizer step after another."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from rlhf_core.settings.training import TrainingSection
from rlhf_core.training.learner import Learner
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.session import Session

Accumulate: TypeAlias = Callable[[list[int], Callable[[], None]], dict[str, float]]
"""Adds the gradient of the picked rows and returns metrics; calls the second argument before each
micro-batch."""


def optimizer_steps(
    session: Session,
    learner: Learner,
    batches: Iterable[list[int]],
    accumulate: Accumulate,
    config: TrainingSection,
    ranks: Ranks,
    *,
    total: int,
) -> Iterator[int]:
    """Take a step for each remaining batch; log its metrics, gradient norm and learning rate.

    Yields: the number of the step, from 1, before its safe point, so that whatever the caller does
    with it is in the same checkpoint.
    """
    for picked in batches:
        step, rate = session.step + 1, learner.learning_rate
        check = session.between("batch", ranks.passes(len(picked), config.micro_batch_size))
        values = accumulate(picked, check)
        values |= {"grad_norm": learner.step(), "learning_rate": rate}
        session.metrics(values, step)
        session.progress(step, total, f"loss {values['loss']:.3f}")
        yield step
        session.safe_point()
