"""Over-optimisation: what a policy gains over SFT, against how far it has moved from it.

    d = √KL(π ‖ π_sft),  KL of whole answers in nats, from samples at the temperature of training

The proxy is the reward model that the policy was trained on, or that best-of-n selects by; the
held-out reward model has learnt from other votes; the truth is known in a simulation. Gao et al.
2022, https://arxiv.org/abs/2210.10760, found that the gain of a better judge than the proxy follows

    R(d) = d·(α - β·log d)   for a policy that was trained,  with its peak at d* = exp(α/β - 1)
    R(d) = d·(α - β·d)       for best-of-n,                  with its peak at d* = α / 2β

Both are linear in α and β, so the fit is a least-squares solution and needs no starting values.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import scipy  # imports its parts at their first use
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rlhf_core.functional.interval import Interval
from rlhf_core.functional.ranking import (
    best_of_n_kl,
    best_of_n_mean,
    clustered_bootstrap,
)

Measure: TypeAlias = Literal["proxy", "held_out", "truth"]
Kind: TypeAlias = Literal["on_policy", "best_of_n"]

MEASURES: Mapping[Measure, str] = {
    "proxy": "reward model (proxy)",
    "held_out": "held-out reward model",
    "truth": "true reward",
}
KINDS: Mapping[Kind, str] = {"on_policy": "trained policy", "best_of_n": "best of n"}
_FARTHEST_PEAK = 1000.0  # nats; a peak beyond is none
_NEAR = 0.6  # √nats around a KL of which the gain is asked
_LEAST_DISTANCE = 0.1  # √nats; what is nearer to SFT shows no curve


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")


class Point(_Frozen):
    """A policy, or best-of-n, at some distance from SFT."""

    number: int  # the iteration, or n
    kl: Interval  # nats a sequence
    gains: dict[Measure, Interval]  # over SFT

    @property
    def distance(self) -> float:
        """√KL; an estimate below 0, which is chance, counts as 0."""
        return math.sqrt(max(self.kl.value, 0.0))


class Path(_Frozen):
    """The points of one run, or of best-of-n from one pool of samples, in their order."""

    name: str
    kind: Kind
    points: tuple[Point, ...]
    chosen: int | None = None  # number of the point that is used in the end

    def series(self, measure: Measure) -> list[tuple[float, float]]:
        """Distance and gain of the points that have the measure."""
        return [(p.distance, p.gains[measure].value) for p in self.points if measure in p.gains]


class Unfitted(_Frozen):
    """Why there is no fit."""

    measure: Measure
    kind: Kind
    reason: str

    def sentence(self) -> str:
        """The reason, with what was to be fitted."""
        return f"{KINDS[self.kind]}, {MEASURES[self.measure]}: no fit, since {self.reason}."


class Fit(_Frozen):
    """One of Gao's forms on one measure of all runs of a kind. Intervals are 95 %."""

    measure: Measure
    kind: Kind
    alpha: Interval
    beta: Interval
    r2: float  # share of the variance of the gains about their mean
    paths: int
    farthest: float  # largest distance among the points, √nats
    peak_kl: Interval | None  # nats; None when no peak is predicted

    @property
    def peak(self) -> float | None:
        """d*, √nats."""
        return None if self.peak_kl is None else math.sqrt(self.peak_kl.value)

    def gain(self, distance: float) -> float:
        """R(d)."""
        return float(_terms(self.kind, np.array([distance]))[0] @ self._parameters)

    def sentence(self) -> str:
        """Parameters, quality and peak, and what not to read into them."""
        form = "d(α - β log d)" if self.kind == "on_policy" else "d(α - βd)"
        return (
            f"{KINDS[self.kind]}, {MEASURES[self.measure]}: {form} with α {_text(self.alpha)}, "
            f"β {_text(self.beta)}, R² {self.r2:.2f}; {self._about_peak()} "
            f"({self._about_intervals()})."
        )

    @property
    def _parameters(self) -> np.ndarray:
        return np.array([self.alpha.value, self.beta.value])

    def _about_peak(self) -> str:
        if self.peak_kl is None:
            if self.beta.value > 0 >= self.alpha.value:
                return "it falls from the start, so no peak is predicted"
            return f"no peak is predicted up to {_FARTHEST_PEAK:g} nats"
        peak, farthest = self.peak_kl, self.farthest**2
        text = f"predicted peak at d* {math.sqrt(peak.value):.2f}, KL {_text(peak)} nats"
        if self.beta.low <= 0:
            text += ", but β may be 0, so there may be none"
        if peak.value > farthest:
            text += f", which is beyond the farthest point ({farthest:.1f} nats): an extrapolation"
        return text

    def _about_intervals(self) -> str:
        if self.paths > 1:
            return f"jackknife over {self.paths} runs"
        return "intervals from the residuals of one run, which are too narrow"


def gain_over(values: Tensor, prompt: Tensor, base: Tensor, seed: int) -> Interval:
    """Mean gain of answers over SFT's on the same prompts, bootstrapped over prompts.

    Args:
        values: (N,) a measure of the answers.
        prompt: (N,) int64, the prompt of each.
        base: (P,) SFT's mean on each prompt.
    """
    draws = torch.Generator().manual_seed(seed)
    return clustered_bootstrap(values.double() - base[prompt].double(), prompt, generator=draws)


def best_of_n_path(
    name: str, scores: Tensor, measures: Mapping[Measure, Tensor], seed: int
) -> Path:
    """Best-of-n for n = 1, 2, 3, 4, 6, 8, 12 … N from one pool: N samples of SFT to each prompt.

    The KL is the exact one of samples whose scores differ, and has no error; a gain is bootstrapped
    over prompts.

    Shapes: (P, N) scores that select, and each measure of the same samples.
    """
    size = scores.shape[1]
    steps = (n for k in range(size.bit_length()) for n in (2**k, 3 * 2**k))
    numbers = sorted({*(n for n in steps if n <= size), size})
    prompt = torch.arange(len(scores))
    base = {measure: values.double().mean(1) for measure, values in measures.items()}
    points = [
        Point(
            number=n,
            kl=Interval(*[best_of_n_kl(n)] * 3),
            gains={
                measure: gain_over(best_of_n_mean(scores, values, n), prompt, base[measure], seed)
                for measure, values in measures.items()
            },
        )
        for n in numbers
    ]
    return Path(name=name, kind="best_of_n", points=tuple(points))


def gain_at(path: Path, measure: Measure, kl: float) -> float | None:
    """The gain of a path at a KL: a straight line in √KL through the points around it, by least
    squares, which averages their noise.

    The points are those within 0.6 √nats and the nearest one on each side. None when the path does
    not reach the KL.
    """
    at = math.sqrt(kl)
    points = path.series(measure)
    below, above = [p for p in points if p[0] <= at], [p for p in points if p[0] > at]
    if not below or not above:
        return None
    near = {max(below), min(above)} | {p for p in points if abs(p[0] - at) <= _NEAR}
    distance, gains = np.array(sorted(near)).T
    return float(np.polynomial.polynomial.polyfit(distance - at, gains, 1)[0])


def fit_gains(paths: Sequence[Path], measure: Measure) -> Fit | Unfitted:
    """Fit Gao's form for the kind of these paths, which are all of one kind, to all their points.

    With several paths the intervals are those of a jackknife that leaves out a whole path at a time
    (Student's t, paths - 1 degrees of freedom), since the points of a path are not independent:
    MacKinnon, Nielsen and Webb 2023, https://doi.org/10.1016/j.jeconom.2022.04.001. With one path
    they are those of ordinary least squares, and too narrow. The interval of the peak is that of
    log KL* by the delta method. Errors of the distance are not taken into account.
    """
    kind = paths[0].kind
    found = [path.series(measure) for path in paths]
    found = [series for series in found if any(d > _LEAST_DISTANCE for d, _ in series)]
    points = np.array([point for series in found for point in series])
    if len(points) == 0 or len({d for d, _ in points if d > _LEAST_DISTANCE}) < 3:
        reason = (
            f"it needs three different points with a KL above {_LEAST_DISTANCE**2:g} nats. "
            "Train for longer, or lower kl_coef"
        )
        return Unfitted(measure=measure, kind=kind, reason=reason)
    parameters = _solve(kind, points)
    if len(found) > 1:
        left = [np.array([p for s in found if s is not out for p in s]) for out in found]
        if min(len({d for d, _ in some if d > _LEAST_DISTANCE}) for some in left) < 2:
            reason = "without one of the runs too few points are left"
            return Unfitted(measure=measure, kind=kind, reason=reason)
        others = np.array([_solve(kind, some) for some in left]) - parameters
        covariance, df = (len(found) - 1) / len(found) * others.T @ others, len(found) - 1
    else:
        covariance, df = _covariance(kind, points, parameters), len(points) - 2
    reach = scipy.stats.t.ppf(0.975, df)
    alpha, beta = (
        Interval(p, p - reach * e, p + reach * e)
        for p, e in zip(parameters.tolist(), np.sqrt(np.diag(covariance)).tolist(), strict=True)
    )
    gains = points[:, 1]
    misses = gains - _terms(kind, points[:, 0]) @ parameters
    spread = ((gains - gains.mean()) ** 2).sum()
    return Fit(
        measure=measure,
        kind=kind,
        alpha=alpha,
        beta=beta,
        r2=float(1 - (misses**2).sum() / spread) if spread > 0 else 1.0,
        paths=len(found),
        farthest=float(points[:, 0].max()),
        peak_kl=_peak(kind, parameters, covariance, reach),
    )


def _terms(kind: Kind, distance: np.ndarray) -> np.ndarray:
    """(N, 2) what α and β are multiplied by."""
    if kind == "best_of_n":
        return np.stack([distance, -(distance**2)], 1)
    logs = np.log(np.where(distance > 0, distance, 1.0))  # d log d goes to 0
    return np.stack([distance, -distance * logs], 1)


def _solve(kind: Kind, points: np.ndarray) -> np.ndarray:
    """α and β by least squares."""
    return np.asarray(scipy.linalg.lstsq(_terms(kind, points[:, 0]), points[:, 1])[0])


def _covariance(kind: Kind, points: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """The covariance of α and β, from the residuals."""
    terms = _terms(kind, points[:, 0])
    misses = points[:, 1] - terms @ parameters
    variance = (misses**2).sum() / (len(points) - 2)
    return np.asarray(variance * scipy.linalg.pinvh(terms.T @ terms))


def _peak(
    kind: Kind, parameters: np.ndarray, covariance: np.ndarray, reach: float
) -> Interval | None:
    """KL*, with the interval of its logarithm."""
    alpha, beta = parameters.tolist()
    if beta <= 0 or (kind == "best_of_n" and alpha <= 0):
        return None
    if kind == "best_of_n":
        log_kl, slope = 2 * math.log(alpha / (2 * beta)), np.array([2 / alpha, -2 / beta])
    else:
        log_kl = 2 * (alpha / beta - 1)
        slope = np.array([2 / beta, -2 * alpha / beta**2])
    if log_kl > math.log(_FARTHEST_PEAK):
        return None
    error = reach * math.sqrt(max(float(slope @ covariance @ slope), 0.0))
    high = math.exp(log_kl + error) if log_kl + error < math.log(_FARTHEST_PEAK) else math.inf
    return Interval(math.exp(log_kl), math.exp(log_kl - error), high)


def _text(interval: Interval) -> str:
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
