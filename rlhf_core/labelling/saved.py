"""What the design saved: the record, which loads without torch."""

from dataclasses import dataclass

from rlhf_core.functional.interval import Interval

SETTLED = 500  # votes after which an estimate that is not above zero stops the design


@dataclass(frozen=True)
class Savings:
    """What the design saved so far."""

    saved: Interval  # share of the random arm's labels; below 0 the design costs labels
    random_votes: int  # votes of the random arm that the design is compared with
    design_votes: int
    tested: int  # prompts of the hold-out and of the random arm on which losses were taken
    sizes: tuple[int, ...]  # votes
    random_loss: tuple[float, ...]  # nats a vote, at these sizes
    design_loss: tuple[float, ...]

    @property
    def labels(self) -> Interval:
        """Labels that the random order would have needed beyond those of the design, for what the
        design has reached: n·s / (1 - s)."""
        return Interval(*(self.design_votes * s / (1 - s) for s in self.saved))
