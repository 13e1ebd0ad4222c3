"""What came of each round, as MLflow and the preference store have it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rlhf_core.figures import BLUE, GREY, ORANGE, blank, dress
from rlhf_core.functional.interval import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tasks.settings import Settings

Bounds = tuple[float, float, float]  # value, and the ends of its 95 % interval


@dataclass(frozen=True)
class Round:
    """A run of `retrain`, and what it was trained on."""

    number: int  # 0: the first policy
    who: str  # has voted since the round before
    votes: int  # in the snapshot that was trained on
    state: str  # of the flow run
    seconds: float
    outcome: str = ""  # promoted, refused, or what the flow says
    candidate: str = ""
    champion: str = ""  # whom it was compared with
    sft: Bounds | None = None  # true rewards
    policy: Bounds | None = None
    reigning: Bounds | None = None  # of whom it was compared with, on the same prompts
    win_rate: Bounds | None = None  # over that one
    kl: float | None = None
    failed: tuple[str, ...] = ()  # the rules that it does not meet
    report: str = ""  # the address of its page

    @property
    def title(self) -> str:
        """What it is called in the table."""
        return "first policy" if not self.number else f"round {self.number}"


def look(
    flow_run: str,
    settings: "Settings",
    *,
    project: str,
    number: int,
    who: str,
    state: str,
    seconds: float,
) -> Round:
    """What came of a flow run that has ended."""
    from tasks.pages.facts import gather
    from tasks.record.record import Record

    record = Record.open(settings)
    experiment = record.client.get_experiment_by_name(project)
    run = record.runs.called_by(experiment.experiment_id, flow_run) if experiment else None
    if run is None:
        return Round(number, who, 0, state, seconds, outcome=state)
    facts = gather(record, run, None)
    card = facts.scorecard
    votes = sum(int(facts.number(f"preferences_{split}") or 0) for split in ("train", "eval"))
    found = Round(number, who, votes, state, seconds, outcome=state, report=facts.page_url)
    if card is None:
        return found
    arms = {arm.name: arm for arm in card.arms}
    match = card.comparison("policy", "champion")
    decision = facts.decision
    kl = arms["policy"].kl
    return Round(
        number=number,
        who=who,
        votes=votes,
        state=state,
        seconds=seconds,
        outcome="promoted" if facts.promoted else "refused",
        candidate=facts.models["policy"].uri if "policy" in facts.models else "",
        champion=facts.compared_with.uri if facts.compared_with else "",
        sft=_bounds(arms["sft"].true_reward),
        policy=_bounds(arms["policy"].true_reward),
        reigning=_bounds(arms["champion"].true_reward) if "champion" in arms else None,
        win_rate=_bounds(match.win_rate) if match is not None else None,
        kl=None if kl is None else kl.value,
        failed=tuple(rule.sentence for rule in decision.rules if rule.passed is False)
        if decision is not None
        else (),
        report=facts.page_url,
    )


def _bounds(interval: Interval | None) -> Bounds | None:
    return None if interval is None else tuple(interval)


def write(rounds: Sequence[Round], path: Path, **about: Any) -> None:
    """Keep the rounds of a show as JSON, with what else is to be said about it."""
    content = {**about, "rounds": [asdict(found) for found in rounds]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def read(path: Path) -> tuple[list[Round], dict[str, Any]]:
    """The rounds of a file of `write`, and what else it says."""
    content = json.loads(path.read_text())
    found = [
        Round(**{name: _tuple(value) for name, value in row.items()})
        for row in content.pop("rounds")
    ]
    return found, content


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def table(rounds: Iterable[Round]) -> Table:
    """The rounds for a terminal."""
    drawn = Table(title="True reward by round (hidden from training), 95 % intervals")
    for name in ("", "Votes", "Who voted", "True reward", "Over the champion", "Gate", "Time"):
        drawn.add_column(name, justify="right" if name in ("Votes", "Time") else "left")
    for found in rounds:
        drawn.add_row(
            found.title,
            f"{found.votes:,}",
            found.who,
            _written(found.policy),
            _written(found.win_rate),
            found.outcome,
            f"{found.seconds:.0f} s",
        )
    return drawn


def _written(bounds: Bounds | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.2f} [{bounds[1]:.2f}, {bounds[2]:.2f}]"


def markdown(shows: Sequence[tuple[str, Sequence[Round]]]) -> str:
    """The rounds of several shows as a table of the docs."""
    rows = [
        "| show | | votes | who voted | true reward | win rate over the champion | gate |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, rounds in shows:
        if rounds and rounds[0].sft is not None:
            rows.append(f"| {title} | SFT | 0 | | {_written(rounds[0].sft)} | | |")
        rows += [
            f"| {title} | {found.title} | {found.votes:,} | {found.who} | "
            f"{_written(found.policy)} | {_written(found.win_rate)} | {found.outcome} |"
            for found in rounds
        ]
    return "\n".join(rows)


def plot(shows: Sequence[tuple[str, Sequence[Round]]]) -> "Figure":
    """True reward by round, one panel a show: candidates with intervals, and who reigns."""
    figure = blank(max(6.4, 3.4 * len(shows)), 3.8)
    panels = figure.subplots(1, len(shows), squeeze=False, sharey=True)[0]
    for axes, (title, rounds) in zip(panels, shows, strict=True):
        known = [found for found in rounds if found.policy is not None]
        if not known:
            continue
        dress(axes, title, "votes in training and evaluation", "true reward")
        sft = known[0].sft
        assert sft is not None
        _point(axes, 0, sft, GREY, "o")
        reigns = [sft[0]]
        for place, found in enumerate(known, start=1):
            assert found.policy is not None
            promoted = found.outcome == "promoted"
            _point(
                axes, place, found.policy, BLUE if promoted else ORANGE, "o" if promoted else "X"
            )
            reigns.append(found.policy[0] if promoted else reigns[-1])
        axes.step(range(len(reigns)), reigns, where="post", color=BLUE, linewidth=1, alpha=0.5)
        ticks = ["SFT", *(f"{found.title}\n{found.votes:,}" for found in known)]
        axes.set_xticks(range(len(ticks)), ticks, fontsize=7)
    _legend(panels[0])
    return figure


def _point(axes: Any, place: int, bounds: Bounds, color: str, marker: str) -> None:
    value, low, high = bounds
    axes.errorbar(
        place, value, [[value - low], [high - value]],
        fmt=marker, color=color, capsize=3, markersize=7,
    )  # fmt: skip


def _legend(axes: Any) -> None:
    for color, marker, text in (
        (BLUE, "o", "promoted"),
        (ORANGE, "X", "refused"),
        (GREY, "o", "SFT, trained on no votes"),
    ):
        axes.plot([], [], marker, color=color, label=text)
    axes.plot([], [], color=BLUE, alpha=0.5, linewidth=1, label="who reigns")
    axes.legend(frameon=False, fontsize=7, loc="lower right")
