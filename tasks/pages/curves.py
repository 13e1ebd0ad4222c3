"""The curves of each stage of a run, with what they mean in words."""

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

from rlhf_core.figures import BLUE, ORANGE, blank, dress
from tasks.pages.drawing import Drawing, drawing
from tasks.pages.facts import StageFacts
from tasks.pages.reading import Reader
from tasks.pages.texts import number

Points = Sequence[tuple[float, float]]
MOST_POINTS = 300  # of a line


class Panel(NamedTuple):
    """A chart: its title, its unit, what it means, and its lines by label."""

    title: str
    unit: str
    says: str
    lines: Mapping[str, str]  # label -> metric


_ERROR = "Lower is better: how surprised the model is by the next word of the demonstrations."
_VOTES = "Lower is better: how far the model is from the votes of people."
_RIGHT = "Share of the pairs on which the model agrees with the vote; guessing has 0.5."

_SUPERVISED = (
    Panel("Loss", "nats a token", _ERROR, {"training": "loss", "held out": "held_out/loss"}),
)
_PAIRWISE = (
    Panel("Loss", "nats a pair", _VOTES, {"training": "loss"}),
    Panel("Accuracy", "share of a batch", _RIGHT, {"training": "accuracy"}),
)
_ON_POLICY = (
    Panel(
        "Reward",
        "reward",
        "The reward that the policy is trained for, on its own answers. It rises if training "
        "works, and rises too if the policy fools the reward model.",
        {"reward": "objective/score", "after shaping": "objective/shaped_score"},
    ),
    Panel(
        "Distance from SFT (KL)",
        "nats a sequence",
        "How far the answers have moved from those of the SFT model.",
        {"roll-outs": "objective/kl", "held-out prompts": "monitor/kl"},
    ),
    Panel(
        "Length of the answers",
        "tokens",
        "A policy that only grows longer may please the reward model and nobody else.",
        {"length": "response/length"},
    ),
    Panel(
        "Gain on held-out prompts",
        "SFT standard deviations",
        "What the policy gained over SFT by the reward that it is trained on and by a reward model "
        "that it never saw. If only the first rises, the policy fools its reward model.",
        {"reward trained on": "monitor/proxy_gain", "held-out reward": "monitor/held_out_gain"},
    ),
)
_PREFERENCE = (
    Panel("Loss", "nats a pair", _VOTES, {"training": "loss"}),
    Panel("Accuracy", "share of a batch", _RIGHT, {"training": "accuracy"}),
    Panel(
        "Margin",
        "reward",
        "By how much the policy prefers the chosen text to the rejected one.",
        {"margin": "margin"},
    ),
)
PANELS: Mapping[str, tuple[Panel, ...]] = {
    "sft": _SUPERVISED,
    "reward_model": _PAIRWISE,
    "held_out": _PAIRWISE,
    "ppo": _ON_POLICY,
    "rloo": _ON_POLICY,
    "grpo": _ON_POLICY,
    "dpo": _PREFERENCE,
}


def curves(stage: StageFacts, reader: Reader) -> list[Drawing]:
    """The charts of a stage; those without points are left out."""
    found = []
    for place, panel in enumerate(PANELS.get(stage.name, ())):
        histories = {
            label: reader.history(stage.computed, metric) for label, metric in panel.lines.items()
        }
        known = {label: points for label, points in histories.items() if points}
        if known:
            key = f"{stage.name}-{place}".replace("_", "-")
            found.append(draw_lines(key, panel, known))
    return found


def draw_lines(key: str, panel: Panel, lines: Mapping[str, Points]) -> Drawing:
    """Lines over the steps, each thinned to `MOST_POINTS`, with their course in words."""
    figure = blank(4.6, 2.7)
    axes = figure.add_subplot()
    dress(axes, "", "step", panel.unit)
    for (label, points), color in zip(lines.items(), (BLUE, ORANGE), strict=False):
        xs, ys = zip(*thinned(points), strict=True)
        few = "o" if len(xs) <= 40 else ""
        axes.plot(xs, ys, color=color, marker=few, markersize=3, linewidth=1.6, label=label)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9)
    return drawing(figure, key, panel.title, panel.says, [course(*line) for line in lines.items()])


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most so many points: of each stretch its lowest and its highest, so that peaks stay."""
    if len(points) <= most:
        return points
    stretches = most // 2
    bounds = [round(i * len(points) / stretches) for i in range(stretches + 1)]
    parts = (points[a:b] for a, b in pairwise(bounds) if b > a)
    kept = ({min(p, key=lambda x: x[1]), max(p, key=lambda x: x[1])} for p in parts)
    return sorted(chain.from_iterable(kept))


def course(label: str, points: Points) -> str:
    """A line in words, e.g. `Reward: from 0.1 at step 1 to 1.6 at step 30.`"""
    (first, start), (last, end) = points[0], points[-1]
    if first == last:
        return f"{label}: {number(end)} at step {number(last)}."
    low, high = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
    return (
        f"{label}: from {number(start)} at step {number(first)} to {number(end)} at step "
        f"{number(last)}; lowest {number(low[1])}, highest {number(high[1])}."
    )
