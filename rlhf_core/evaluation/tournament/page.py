"""A tournament of checkpoints for people: its page, its tables and its plot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from rlhf_core.evaluation.tournament.result import Entrant, TournamentResult
from rlhf_core.evaluation.tournament.schedule import pairs_of
from rlhf_core.evaluation.tournament.strengths import Result
from rlhf_core.figures import BLUE, GREEN, GREY, blank, dress
from rlhf_core.functional.interval import Interval

if TYPE_CHECKING:  # imported when something is drawn
    from matplotlib.figure import Figure


def page(result: TournamentResult) -> str:
    """The tournament as Markdown."""
    answers = result.samples_per_prompt
    each = "1 answer" if answers == 1 else f"{answers} answers"
    unanswered = f" {result.unanswered:,} were not answered, and count for nobody."
    return "\n".join(
        [
            "# Tournament of checkpoints",
            "",
            f"**{result.sentence()}**",
            "",
            "| policy | strength (log-odds against SFT) | wins | ties | losses | "
            "KL to SFT (nats) | length (tokens) | reward model | true reward |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_row(entrant, entrant.name == result.chosen) for entrant in result.entrants),
            "",
            f"SFT and the checkpoints gave {each} to each of {result.prompts} training prompts; "
            f"{result.verdicts:,} of at most {result.budget:,} verdicts were asked for."
            + unanswered
            * bool(result.unanswered),
            "",
            "A strength is that of Bradley and Terry's model, a tie half a win: the logarithm of "
            "the odds of winning against SFT, which a checkpoint shows against all others too. The "
            "intervals are 95 % bootstraps over prompts. The choice is by these training prompts; "
            "how good the chosen policy is, the evaluation says on held-out ones.",
            "",
        ]
    )


def strengths_table(result: TournamentResult) -> pd.DataFrame:
    """A row for each entrant."""
    rows = []
    for entrant in result.entrants:
        facts = entrant.model_dump(exclude={"strength"})
        bounds = dict(
            zip(("strength", "strength_low", "strength_high"), entrant.strength, strict=True)
        )
        rows.append({**facts, **bounds, "chosen": entrant.name == result.chosen})
    return pd.DataFrame(rows)


def pairs_table(results: Sequence[Result], names: Sequence[str]) -> pd.DataFrame:
    """A row for each pair: how often each of the two won."""
    rows = []
    for pair in pairs_of(len(names)):
        winners = [winner for match, winner in results if (match.first, match.second) == pair]
        counts = {kind: winners.count(kind) for kind in ("a", "tie", "b")}
        rows.append(
            {
                "first": names[pair[0]],
                "second": names[pair[1]],
                "first_wins": counts["a"],
                "ties": counts["tie"],
                "second_wins": counts["b"],
                "unanswered": winners.count(None),
            }
        )
    return pd.DataFrame(rows)


def draw(result: TournamentResult) -> "Figure":
    """Strength by iteration with its interval, and SFT as a line; the chosen one is green."""
    figure = blank(6.4, 4.0)
    axes = figure.add_subplot()
    dress(axes, f"Checkpoints, by {result.judge}", "iteration", "strength (log-odds against SFT)")
    axes.axhline(0, color=GREY, linewidth=1, linestyle="--", label="SFT")
    policies = result.entrants[1:]
    known = [entrant.iteration for entrant in policies if entrant.iteration is not None]
    places = [
        max(known, default=0) + 1 if entrant.iteration is None else entrant.iteration
        for entrant in policies
    ]
    axes.plot(places, [e.strength.value for e in policies], color=BLUE, linewidth=1, alpha=0.5)
    for place, entrant in zip(places, policies, strict=True):
        value, low, high = entrant.strength
        chosen = entrant.name == result.chosen
        axes.errorbar(
            place,
            value,
            [[value - low], [high - value]],
            fmt="o",
            color=GREEN if chosen else BLUE,
            markersize=8 if chosen else 5,
            capsize=3,
            label="chosen" if chosen else None,
        )
    axes.set_xticks(places)
    axes.legend(frameon=False)
    return figure


def _row(entrant: Entrant, chosen: bool) -> str:
    title = f"**{entrant.title}, chosen**" if chosen else entrant.title
    cells = [
        title,
        "0" if entrant.iteration == 0 else _interval(entrant.strength),
        f"{entrant.wins:,}",
        f"{entrant.ties:,}",
        f"{entrant.losses:,}",
        "" if entrant.kl is None else f"{entrant.kl:.2f}",
        f"{entrant.length:.1f}",
        f"{entrant.reward:.2f}",
        "" if entrant.true_reward is None else f"{entrant.true_reward:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _interval(interval: Interval) -> str:
    value, low, high = interval
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
