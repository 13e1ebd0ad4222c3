"""The plots of the reports. Each function takes numbers and returns a figure without showing it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rlhf_core.functional.interval import Interval

if TYPE_CHECKING:  # imported when something is drawn, so that training does not pay for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

BLUE, ORANGE, GREEN, GREY = "#3b6fb6", "#d9822b", "#3a9a5b", "#8a8a8a"
PALE = "#c9c9c9"
ARM_COLORS = {"base": PALE, "sft": GREY, "policy": BLUE, "best_of_n": GREEN, "champion": ORANGE}


def blank(width: float, height: float) -> "Figure":
    """An empty figure, measured in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def loss_curves(train: Points, held_out: Points) -> "Figure":
    """Training loss and held-out loss by step."""
    figure, axes = _single("Supervised fine-tuning", "optimizer step", "loss (nats a token)")
    axes.plot(*_columns(train), color=BLUE, alpha=0.5, linewidth=1, label="training")
    axes.plot(*_columns(held_out), color=ORANGE, marker="o", label="held out")
    axes.legend(frameon=False)
    return figure


def calibration(
    predicted: Sequence[float], observed: Sequence[float], counts: Sequence[int]
) -> "Figure":
    """Reliability diagram: observed against predicted frequency, with dots sized by their bins."""
    figure, axes = _single(
        "Calibration on held-out votes", "predicted P(first is preferred)", "observed share"
    )
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    largest = max(counts)
    sizes = [20 + 180 * count / largest for count in counts]
    axes.scatter(predicted, observed, s=sizes, color=BLUE, alpha=0.8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    return figure


def reliability(dots: Sequence[tuple[float, Interval, int]]) -> "Figure":
    """Reliability curve: for each bin the predicted share, the observed one with its interval, and
    the votes, by which the dots are sized."""
    figure, axes = _single("Reliability on held-out votes", "predicted share", "observed share")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated")
    largest = max(votes for _, _, votes in dots)
    for x, (value, low, high), votes in dots:
        axes.errorbar(x, value, [[value - low], [high - value]], color=BLUE, capsize=3, alpha=0.7)
        axes.scatter(x, value, s=20 + 120 * votes / largest, color=BLUE, alpha=0.8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, loc="upper left")
    return figure


def forest(rows: Sequence[tuple[str, Interval, bool]], whole: Interval) -> "Figure":
    """Accuracy of each slice with its interval, the worst on top, beside that of all votes; what is
    clearly worse is orange."""
    figure = blank(7.4, 1.3 + 0.28 * len(rows))
    axes = figure.add_subplot()
    dress(axes, "Accuracy by slice", "accuracy on held-out votes", "")
    axes.axvspan(whole.low, whole.high, color=GREY, alpha=0.2, linewidth=0)
    axes.axvline(whole.value, color=GREY, linewidth=1, label="all votes")
    axes.axvline(0.5, color="black", linewidth=0.6, linestyle=":", label="chance")
    for place, (_, (value, low, high), worse) in enumerate(rows):
        color, bounds = ORANGE if worse else BLUE, [[value - low], [high - value]]
        axes.errorbar(value, place, None, bounds, fmt="o", color=color, capsize=3, markersize=5)
    names = [name if len(name) <= 40 else f"{name[:39]}…" for name, _, _ in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.legend(
        frameon=False,
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(0, -0.1 - 0.5 / len(rows)),
        ncols=2,
    )
    return figure


def canaries(shares: Mapping[str, Interval]) -> "Figure":
    """How often each known-bad answer beats the real one, with its interval; the worst on top."""
    rows = sorted(shares.items(), key=lambda row: -row[1].value)
    figure = blank(7.4, 1.3 + 0.3 * len(rows))
    axes = figure.add_subplot()
    dress(axes, "Bad answers that beat the real one", "share of held-out prompts", "")
    for place, (_, (value, low, high)) in enumerate(rows):
        color = ORANGE if low >= 0.5 else BLUE if high > 0.5 else GREEN
        axes.barh(place, value, color=color, height=0.6)
        axes.errorbar(value, place, None, [[value - low], [high - value]], color="black", capsize=3)
    axes.axvline(0.5, color="black", linewidth=0.6, linestyle=":")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    return figure


def score_histogram(chosen: Sequence[float], rejected: Sequence[float]) -> "Figure":
    """Distributions of the reward of chosen and of rejected texts."""
    figure, axes = _single("Reward of held-out texts", "reward", "texts")
    axes.hist([chosen, rejected], bins=30, color=[GREEN, ORANGE], label=["chosen", "rejected"])
    axes.legend(frameon=False)
    return figure


def policy_curves(history: Sequence[Mapping[str, float]]) -> "Figure":
    """The curves over iterations that show whether policy training is healthy."""
    panels = {
        "objective/score": "score",
        "objective/kl": "KL to the reference (nats a sequence)",
        "objective/kl_coef": "KL coefficient β",
        "response/length": "response length (tokens)",
        "policy/entropy": "entropy (nats a token)",
        "value/explained_variance": "explained variance of the critic",
        "group/spread": "standard deviation within a group",
    }
    shown = {name: title for name, title in panels.items() if name in history[0]}
    figure = blank(11.0, 5.6)
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, shown.items(), strict=False):
        dress(axes, title, "iteration", "")
        axes.plot(range(1, len(history) + 1), [point[name] for point in history], color=BLUE)
    return figure


def preference_curves(history: Sequence[tuple[int, Mapping[str, float]]]) -> "Figure":
    """The curves over steps that show what DPO learns."""
    panels = {
        "loss": "loss (nats a pair)",
        "accuracy": "accuracy of the implicit reward",
        "margin": "chosen minus rejected (implicit reward)",
        "chosen_reward": "implicit reward of the chosen",
    }
    figure = blank(9.0, 5.6)
    steps = [step for step, _ in history]
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        dress(axes, title, "optimizer step", "")
        axes.plot(steps, [values[name] for _, values in history], color=BLUE)
    return figure


def reward_kl_path(points: Points) -> "Figure":
    """Score against KL, one dot for each iteration."""
    figure, axes = _single("Score against KL", "KL (nats a sequence)", "score (reward model)")
    axes.plot(*_columns(points), color=GREY, linewidth=1, zorder=1)
    dots = axes.scatter(*_columns(points), c=range(1, len(points) + 1), cmap="viridis", zorder=2)
    figure.colorbar(dots, ax=axes, label="iteration")
    return figure


def frontier(points: Mapping[str, Points], reward: str) -> "Figure":
    """Reward against KL of policies trained with different settings: a small dot for each seed, a
    large one for the mean of a setting, and a line through the means on the Pareto frontier.
    """
    figure, axes = _single("Reward against KL", "KL to SFT (nats a sequence)", reward)
    means = {}
    for number, (name, seeds) in enumerate(points.items()):
        xs, ys = _columns(seeds)
        means[name] = (sum(xs) / len(xs), sum(ys) / len(ys))
        color = f"C{number % 10}"
        axes.scatter(xs, ys, s=14, color=color, alpha=0.5)
        axes.scatter(*means[name], s=70, color=color, label=name)
    axes.plot(*_columns(unbeaten(list(means.values()))), color=GREY, linewidth=1, zorder=0)
    if points:
        axes.legend(frameon=False, fontsize=8)
    return figure


def unbeaten(points: Points) -> list[tuple[float, float]]:
    """The Pareto frontier, by KL: points that no other point beats in reward at no more KL."""
    best, kept = float("-inf"), []
    for kl, reward in sorted(points, key=lambda point: (point[0], -point[1])):
        if reward > best:
            best = reward
            kept.append((kl, reward))
    return kept


def arms(names: Sequence[str], rows: Mapping[str, Sequence[Interval | None]]) -> "Figure":
    """One panel for each measure, with a bar and its interval for each arm."""
    figure = blank(3.6 * len(rows), 3.8)
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, (title, intervals) in zip(panels, rows.items(), strict=True):
        dress(axes, title, "", "")
        known = [(name, i) for name, i in zip(names, intervals, strict=True) if i is not None]
        for name, (value, low, high) in known:
            axes.bar(name, value, color=ARM_COLORS[name], width=0.6)
            axes.errorbar(name, value, [[value - low], [high - value]], color="black", capsize=4)
        axes.axhline(0, color="black", linewidth=0.6)
    return figure


def proxy_against_truth(points: Mapping[str, Points]) -> "Figure":
    """True reward of each sample against its reward-model score, to show where the proxy fails."""
    figure, axes = _single("Proxy against truth", "reward model", "true reward")
    for name, samples in points.items():
        axes.scatter(*_columns(samples), s=9, alpha=0.4, color=ARM_COLORS[name], label=name)
    axes.legend(frameon=False)
    return figure


def _single(title: str, x: str, y: str) -> "tuple[Figure, Axes]":
    figure = blank(6.4, 4.0)
    axes = figure.add_subplot()
    dress(axes, title, x, y)
    return figure, axes


def dress(axes: "Axes", title: str, x: str, y: str) -> None:
    """Give a panel its title and labels, and a light frame."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
