"""What a tournament of checkpoints found, and which of them is chosen."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from rlhf_core.functional.interval import Interval

SFT, LAST = "sft", "policy"  # the names of two entrants; the others are called milestone.N


class Entrant(BaseModel):
    """A policy in a tournament."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    name: str  # sft, policy or milestone.N: its role among the inputs of the stage
    iteration: int | None  # of its training; 0 for SFT; None if it is not written down
    strength: Interval  # Bradley-Terry, in log-odds against SFT
    wins: int
    ties: int
    losses: int
    reward: float  # mean normalised score of the pipeline's reward model
    true_reward: float | None  # if the truth is known
    kl: float | None  # mean to SFT, nats a sequence; None if the tokenizers differ
    length: float  # mean, tokens

    @property
    def title(self) -> str:
        """What people call it."""
        if self.name == SFT:
            return "SFT"
        named = "the last" if self.iteration is None else f"iteration {self.iteration}"
        return f"{named} (last)" if self.name == LAST and self.iteration is not None else named


class TournamentResult(BaseModel):
    """A tournament of checkpoints and SFT."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    judge: str
    entrants: tuple[Entrant, ...]  # SFT first, then by iteration; the last policy is the last
    strongest: str  # the name of the policy with the highest strength
    chosen: str  # and of the one that goes on: the first within one standard error of it
    over_last: Interval | None  # strength of the chosen one minus that of the last; None if it is
    over_sft: Interval  # of the strongest one minus that of SFT
    verdicts: int  # asked for
    unanswered: int  # of these; they count for nobody
    budget: int
    prompts: int  # training prompts
    samples_per_prompt: int

    def entrant(self, name: str) -> Entrant:
        """The entrant of that name."""
        return next(entrant for entrant in self.entrants if entrant.name == name)

    @property
    def replaces_last(self) -> bool:
        """Whether an earlier policy goes on instead of the last one."""
        return self.chosen != LAST

    @property
    def beats_sft(self) -> bool:
        """Whether the strongest is shown to be stronger than SFT; else the last one goes on."""
        return self.over_sft.low > 0

    def sentence(self) -> str:
        """What was chosen and why."""
        chosen, best = self.entrant(self.chosen), self.entrant(self.strongest)
        policies = len(self.entrants) - 1
        judged = f"by {self.judge}, {self.verdicts:,} verdicts"
        if policies == 1:
            said = "The last policy goes on, since no milestone was there to compare it with"
        elif not self.beats_sft:
            said = "The last policy goes on: no checkpoint is shown to be stronger than SFT"
        elif self.over_last is None:
            said = f"The last policy goes on: it is the strongest of {policies} checkpoints"
        else:
            value, low, high = self.over_last
            why = (
                f"it is the strongest of {policies} checkpoints"
                if best == chosen
                else f"of {policies} checkpoints it is the first within one standard error of the "
                f"strongest, {best.title}"
            )
            said = (
                f"The policy of {chosen.title} goes on instead of the last: {why}, and its "
                f"strength less that of the last is {value:.2f} [{low:.2f}, {high:.2f}]"
            )
        return f"{said} ({judged})."


def evenly_spaced(numbers: Sequence[int], wanted: int) -> list[int]:
    """`wanted` of the numbers, as evenly spaced in their order as can be; all if there are fewer.

    The last policy is none of them and comes after them, so the gaps are counted up to it.
    """
    if wanted >= len(numbers):
        return list(numbers)
    places = [round((i + 1) * (len(numbers) + 1) / (wanted + 1)) - 1 for i in range(wanted)]
    return [numbers[place] for place in places]


def every(iterations: int, checkpoints: int) -> int:
    """After how many iterations a policy is kept, so that there are `checkpoints` with the last."""
    return max(1, iterations // checkpoints)
