"""The plot of the monitor: each measure over the iterations, its limit, and where it tripped."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_core import figures
from rlhf_core.onpolicy.monitor.config import MonitorConfig
from rlhf_core.onpolicy.monitor.rules import RULES

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
    found = {
        rule: [
            (number, metrics[rule.metric])
            for number, metrics in enumerate(history, 1)
            if rule.metric in metrics
        ]
        for rule in RULES
    }
    shown = {rule: points for rule, points in found.items() if points}
    rows = math.ceil(len(shown) / 4) or 1
    figure = figures.blank(14.0, 2.8 * rows)
    panels = list(figure.subplots(rows, 4, squeeze=False).flat)
    for axes, (rule, points) in zip(panels, shown.items(), strict=False):
        figures.dress(axes, _UNITS[rule.measure], "iteration", "")
        axes.plot(*zip(*points, strict=True), color=figures.BLUE)
        limit = rule.limit(config)
        for level in (limit, 1 / limit) if limit and rule.direction == "either" else (limit,):
            if limit:
                axes.axhline(level, color=figures.GREY, linestyle="--", linewidth=1)
        trips = [(a["step"], a["value"]) for a in alarms if a["measure"] == rule.measure]
        if trips:
            axes.scatter(*zip(*trips, strict=True), color=figures.ORANGE, zorder=3)
    for axes in panels[len(shown) :]:
        axes.axis("off")
    return figure
