"""The plot of the monitor: each measure over the iterations, its limit, and where it tripped."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_core import figures
from rlhf_core.onpolicy.monitor.rules import PREFIX, RULES, Rule
from rlhf_core.settings.monitor import MonitorConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNITS = {
    "kl": "KL (nats a sequence)",
    "kl_acceleration": "acceleration of the KL (nats / iteration²)",
    "negative_kl": "KL below 0 (standard errors)",
    "gap": "reward ahead of held-out (SFT std)",
    "agreement_drop": "drop of the rank correlation",
    "spread": "spread of the members (× SFT)",
    "length": "length (× SFT)",
    "repetition": "repeated trigrams (minus SFT)",
    "distinct": "distinct bigrams (× SFT)",
    "entropy": "entropy a token (× SFT)",
    "finished": "responses that end (× SFT)",
    "distance": "distance of hidden states (× SFT)",
}


def monitor_figure(
    config: MonitorConfig,
    history: Sequence[Mapping[str, float]],
    alarms: Sequence[Mapping[str, Any]],
) -> "Figure":
    """A panel for each measure that was taken, limits dashed, alarms as dots."""
    rules: dict[str, list[Rule]] = {}  # by what they compare
    for rule in RULES:
        rules.setdefault(rule.metric, []).append(rule)
    found = {
        metric: [(n, values[metric]) for n, values in enumerate(history, 1) if metric in values]
        for metric in rules
    }
    shown = {metric: points for metric, points in found.items() if points}
    rows = math.ceil(len(shown) / 4) or 1
    figure = figures.blank(14.0, 2.8 * rows)
    panels = list(figure.subplots(rows, 4, squeeze=False).flat)
    for axes, (metric, points) in zip(panels, shown.items(), strict=False):
        figures.dress(axes, _UNITS[metric.removeprefix(PREFIX)], "iteration", "")
        axes.plot(*zip(*points, strict=True), color=figures.BLUE)
        axes.set_xlim(0, len(history) + 1)
        for rule in rules[metric]:
            if limit := rule.limit(config):
                axes.axhline(limit, color=figures.GREY, linestyle="--", linewidth=1)
            trips = [(a["step"], a["value"]) for a in alarms if a["measure"] == rule.measure]
            if trips:
                axes.scatter(*zip(*trips, strict=True), color=figures.ORANGE, zorder=3)
    for axes in panels[len(shown) :]:
        axes.axis("off")
    return figure
