"""The over-optimisation chart: gains over SFT against √KL, with Gao's forms through the points."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from rlhf_core.evaluation.overoptimisation import (
    KINDS,
    MEASURES,
    Fit,
    Kind,
    Measure,
    Path,
    Unfitted,
    fit_gains,
)
from rlhf_core.figures import BLUE, GREEN, ORANGE, blank

if TYPE_CHECKING:  # imported when something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_COLORS: Mapping[Measure, str] = {"proxy": BLUE, "held_out": ORANGE, "truth": GREEN}
_MARKERS: Mapping[Kind, str] = {"on_policy": "o", "best_of_n": "s"}
_DASHES: Mapping[Kind, Literal["-", "--"]] = {"on_policy": "-", "best_of_n": "--"}


class Chart(BaseModel):
    """What is drawn in one panel: runs, each as a path, and the budget that they were given."""

    model_config = ConfigDict(frozen=True)

    title: str
    paths: tuple[Path, ...]
    kl_budget: float = 0.0  # nats; 0 = none

    def of(self, kind: Kind) -> list[Path]:
        """The paths of a kind."""
        return [path for path in self.paths if path.kind == kind]

    def measured(self) -> list[tuple[Kind, Measure]]:
        """What there are points of."""
        return [
            (kind, measure)
            for kind in KINDS
            for measure in MEASURES
            if any(path.series(measure) for path in self.of(kind))
        ]

    def fits(self) -> list[Fit | Unfitted]:
        """Each kind and measure with Gao's form, or why not."""
        return [fit_gains(self.of(kind), measure) for kind, measure in self.measured()]

    def rows(self) -> list[dict[str, float | str | bool]]:
        """The points as rows of a table."""
        rows = []
        for path in self.paths:
            for point in path.points:
                row: dict[str, float | str | bool] = {
                    "panel": self.title,
                    "path": path.name,
                    "kind": path.kind,
                    "number": point.number,
                    "chosen": point.number == path.chosen,
                }
                for name, interval in [("kl", point.kl), *point.gains.items()]:
                    bounds = zip(("", "_low", "_high"), interval, strict=True)
                    row |= {f"{name}{end}": value for end, value in bounds}
                rows.append(row)
        return rows


def draw(charts: Sequence[Chart]) -> "Figure":
    """A panel for each chart, on the same axes.

    Every run is drawn: thin lines with error bars in both directions; a ring marks its chosen
    checkpoint. Bold lines are the fits, dotted beyond the points, with a star at the predicted
    peak. Dashed lines and squares are best-of-n.
    """
    figure = blank(5.6 * len(charts) + 1.2, 4.8)
    panels = figure.subplots(1, len(charts), squeeze=False, sharey=True)[0]
    for axes, chart in zip(panels, charts, strict=True):
        _panel(axes, chart)
    panels[0].set_ylabel("gain over SFT")
    handles = _legend(charts)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 3 * len(charts)),
        frameon=False,
        fontsize=9,
    )
    return figure


def _panel(axes: "Axes", chart: Chart) -> None:
    axes.set_title(chart.title, loc="left", fontsize=11)
    axes.set_xlabel("√KL to SFT (√nats a sequence)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.axhline(0, color="black", linewidth=0.6)
    for path in chart.paths:
        for measure in MEASURES:
            _path(axes, path, measure)
    for fit in chart.fits():
        if isinstance(fit, Fit):
            _fit(axes, fit)
    if chart.kl_budget:
        axes.axvline(chart.kl_budget**0.5, color="black", linewidth=1, linestyle=":")
        axes.annotate(
            f" KL budget {chart.kl_budget:g}",
            (chart.kl_budget**0.5, 1),
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=8,
        )


def _path(axes: "Axes", path: Path, measure: Measure) -> None:
    points = [point for point in path.points if measure in point.gains]
    if not points:
        return
    x, y = [p.distance for p in points], [p.gains[measure].value for p in points]
    kl_bounds = np.sqrt(np.clip([[p.kl.low, p.kl.high] for p in points], 0, None)).T
    y_bounds = np.array([p.gains[measure][1:] for p in points]).T
    axes.errorbar(
        x,
        y,
        xerr=np.abs(kl_bounds - x),
        yerr=np.abs(y_bounds - y),
        color=_COLORS[measure],
        marker=_MARKERS[path.kind],
        markersize=3,
        linestyle=_DASHES[path.kind],
        linewidth=0.7,
        elinewidth=0.5,
        alpha=0.4,
    )
    for point in points:
        if point.number == path.chosen:
            place = (point.distance, point.gains[measure].value)
            axes.scatter(*place, s=70, facecolors="none", edgecolors=_COLORS[measure], zorder=4)


def _fit(axes: "Axes", fit: Fit) -> None:
    right = max(fit.farthest, axes.get_xlim()[1])
    peak = fit.peak if fit.peak is not None and fit.peak <= right else fit.farthest
    end = right if fit.kind == "on_policy" else max(fit.farthest, peak)
    within, beyond = np.linspace(0, fit.farthest, 100), np.linspace(fit.farthest, end, 20)
    color, style = _COLORS[fit.measure], _DASHES[fit.kind]
    axes.plot(within, [fit.gain(d) for d in within], color=color, linewidth=2.2, linestyle=style)
    axes.plot(beyond, [fit.gain(d) for d in beyond], color=color, linewidth=1, linestyle=":")
    if fit.peak is not None and fit.peak <= right:
        axes.scatter(fit.peak, fit.gain(fit.peak), marker="*", s=150, color=color, zorder=5)


def _legend(charts: Sequence[Chart]) -> "list[Line2D]":
    from matplotlib.lines import Line2D

    measured = {pair for chart in charts for pair in chart.measured()}
    colors = [
        Line2D([], [], color=_COLORS[m], linewidth=2.2, label=label)
        for m, label in MEASURES.items()
        if any(m == measure for _, measure in measured)
    ]
    lines = [
        Line2D(
            [], [], color="grey", marker=_MARKERS[k], markersize=4, linestyle=_DASHES[k], label=t
        )
        for k, t in KINDS.items()
        if any(k == kind for kind, _ in measured)
    ]
    marks = [
        Line2D([], [], color="grey", linestyle="", marker=marker, markersize=size, label=label)
        for marker, size, label in (("o", 9, "chosen checkpoint"), ("*", 11, "predicted peak"))
    ]
    marks[0].set_markerfacecolor("none")
    return [*colors, *lines, *marks]
