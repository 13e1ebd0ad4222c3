"""Comparisons and their uncertainty: win rates, bootstrap intervals, calibration, best-of-n."""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.functional._contracts import check_shapes
from rlhf_core.functional.interval import Interval

FEW_CLUSTERS, FEW_EITHER_WAY = 50, 5  # below these a bootstrap is too narrow


class Calibration(NamedTuple):
    """Predicted and observed frequencies in equal bins of [0, 1], from low to high."""

    error: float  # expected calibration error, between 0 and 1
    mean_predicted: Tensor  # (bins,) NaN in an empty bin
    observed: Tensor  # (bins,) share of positive outcomes, NaN in an empty bin
    counts: Tensor  # (bins,) int64, predictions in the bin


def win_rate(wins: int, ties: int, losses: int, *, confidence: float = 0.95) -> Interval:
    """Share of comparisons won, where a tie is half a win, with its Wilson score interval.

        p = (wins + ties / 2) / n,  z = Φ⁻¹((1 + confidence) / 2)
        bounds = (p + z² / 2n ± z·√(p·(1 - p) / n + z² / 4n²)) / (1 + z² / n)

    Ties vary less than the wins and losses that the formula assumes, so with ties the interval is
    conservative. The comparisons must be independent: with several per prompt, use
    `clustered_share`.

    Raises:
        ValueError: if a count is negative, there is no comparison, or confidence is not in (0, 1).

    References: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953; Newcombe 1998, method
    3, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E.
    """
    _check_confidence(confidence)
    n = wins + ties + losses
    if min(wins, ties, losses) < 0 or n == 0:
        raise ValueError(
            "win_rate needs counts of at least 0 and one comparison, "
            f"got {wins} wins, {ties} ties, {losses} losses."
        )
    return _wilson((wins + ties / 2) / n, n, confidence)


def _wilson(p: float, n: float, confidence: float) -> Interval:
    """The score interval of a share p of n independent trials; n need not be whole."""
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = p + z2 / (2 * n)
    half_width = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
    low, high = ((centre + side * half_width) / (1 + z2 / n) for side in (-1, 1))
    return Interval(p, max(low, 0.0), min(high, 1.0))


def best_of_n_kl(n: int) -> float:
    """KL between the best of n samples and a single sample, in nats.

        KL = log n - (n - 1) / n

    Exact when no two responses share a score; an upper bound otherwise.

    Raises:
        ValueError: if n is below 1.

    References: Stiennon et al. 2020, appendix G.3, https://arxiv.org/abs/2009.01325; the bound:
    Beirami et al. 2024, https://arxiv.org/abs/2401.01879.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    return math.log(n) - (n - 1) / n


def best_of_n_mean(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """Expected value of the best of n samples, from all N samples of each prompt at once.

        V_n = Σᵢ v₍ᵢ₎·C(i - 1, n - 1) / C(N, n),  v₍₁₎ … v₍ₙ₎ in rising order of their score

    The weight is the share of the n-subsets in which the i-th has the highest score, so this is the
    mean over all of them: unbiased, and with less variance than one draw. Of samples with the same
    score the later one counts as the higher.

    Args:
        scores: (P, N) what is selected by.
        values: (P, N) what is averaged: the scores themselves, or another measure of the samples.
        n: how many samples the best is taken of, 1 to N.

    Returns:
        (P,) double, for each prompt.

    Raises:
        ValueError: if the shapes differ, or n is not between 1 and N.

    References: Nakano et al. 2021, appendix I, https://arxiv.org/abs/2112.09332; Gao et al. 2022,
    https://arxiv.org/abs/2210.10760.
    """
    check_shapes(scores=(scores, "PN"), values=(values, "PN"))
    size = scores.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"n must lie between 1 and the {size} samples of a prompt, got {n}.")
    subsets = math.comb(size, n)
    shares = [math.comb(i, n - 1) / subsets for i in range(size)]
    ranked = values.double().gather(1, scores.argsort(dim=1, stable=True))
    return ranked @ torch.tensor(shares, dtype=torch.float64, device=values.device)


def clustered_bootstrap(
    values: Tensor,
    clusters: Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    generator: torch.Generator,
) -> Interval:
    """Mean with a percentile bootstrap interval that draws whole clusters.

        mean* = Σₖ S_c(k) / Σₖ N_c(k),  c(1) … c(K) drawn with replacement from the K clusters

    S and N are a cluster's sum and size. Values of one cluster (the samples of a prompt, the pairs
    of an annotator) rise and fall together, so they enter or leave together; the ratio of sums
    keeps every value's weight equal when clusters differ in size.

    Args:
        values: (N,) what is averaged.
        clusters: (N,) int64, which cluster a value belongs to; any ids.
        confidence: probability that the interval should cover.
        resamples: number of bootstrap draws.
        generator: random numbers for the draws, on the CPU.

    Returns:
        Mean and bounds in the unit of the values. With a single cluster the interval is a point,
        since it tells nothing about others.

    Raises:
        ValueError: if the shapes differ, there is no value, or confidence is not in (0, 1).

    Reference: Davison and Hinkley 1997, Bootstrap Methods and their Application, section 3.8.
    """
    check_shapes(values=(values, "N"), clusters=(clusters, "N"))
    _check_confidence(confidence)
    if len(values) == 0 or resamples < 1:
        raise ValueError("clustered_bootstrap needs at least one value and one resample.")
    ids, member = torch.unique(clusters.cpu(), return_inverse=True)
    k = len(ids)
    sums = torch.zeros(k, dtype=torch.float64).index_add_(0, member, values.detach().double().cpu())
    sizes = torch.bincount(member, minlength=k).double()
    drawn = torch.randint(k, (resamples, k), generator=generator)
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval((sums.sum() / sizes.sum()).item(), low, high)


def clustered_share(
    values: Tensor,
    clusters: Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    generator: torch.Generator,
) -> Interval:
    """Share of points won, with an interval that holds for few clusters and for extreme shares.

        bounds = the wider of clustered_bootstrap and Wilson's at n,  n = (Σ N)² / Σ N²

    if n < 50 or n·min(p, 1 - p) < 5 or all clusters have one mean, and those of clustered_bootstrap
    otherwise. N is the size of a cluster; n, Kish's effective number, is the number of clusters
    when they are of one size. The bootstrap has no width when all clusters agree, be it on 1 or on
    1/2, and is too narrow for few of them; Wilson's interval counts a whole cluster as one trial.

    Args:
        values: (N,) in [0, 1]: 1 for a win, 0.5 for a tie.
        clusters: (N,) int64, which cluster a value belongs to; any ids.
        confidence: probability that the interval should cover.
        resamples: number of bootstrap draws.
        generator: random numbers for the draws, on the CPU.

    Raises:
        ValueError: if the shapes differ, there is no value, one is outside [0, 1], or confidence is
            not in (0, 1).

    References: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953; Kish 1965, Survey
    Sampling, section 11.7.
    """
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError("the values of a share must lie in [0, 1].")
    drawn = clustered_bootstrap(
        values, clusters, confidence=confidence, resamples=resamples, generator=generator
    )
    sizes = torch.unique(clusters, return_counts=True)[1].double()
    n, p = (sizes.sum() ** 2 / (sizes**2).sum()).item(), drawn.value
    differ = drawn.high - drawn.low > 1e-9  # more than rounding
    if differ and n >= FEW_CLUSTERS and n * min(p, 1 - p) >= FEW_EITHER_WAY:
        return drawn
    return at_least_wilson(drawn, clusters, confidence=confidence)


def at_least_wilson(drawn: Interval, clusters: Tensor, *, confidence: float = 0.95) -> Interval:
    """The wider of an interval of a share and Wilson's at n = (Σ N)² / Σ N², N a cluster's size.

    Args:
        drawn: the interval, in [0, 1].
        clusters: (N,) int64, which cluster each value belongs to.
    """
    sizes = torch.unique(clusters, return_counts=True)[1].double()
    score = _wilson(drawn.value, (sizes.sum() ** 2 / (sizes**2).sum()).item(), confidence)
    return Interval(drawn.value, min(drawn.low, score.low), max(drawn.high, score.high))


def expected_calibration_error(
    probabilities: Tensor, outcomes: Tensor, bins: int = 10
) -> Calibration:
    """Gap between predicted and observed frequency, mean over predictions.

        ECE = Σ_b (N_b / N)·|mean predicted_b - observed_b|

    The bins have equal width on [0, 1]; bin b holds b / bins ≤ p < (b + 1) / bins, the last one 1
    as well.

    Args:
        probabilities: (N,) predicted probability that the outcome is 1.
        outcomes: (N,) bool or 0/1, or 0.5 for a tie.
        bins: how many bins.

    Returns:
        The error and the table of the reliability diagram.

    Raises:
        ValueError: if the shapes differ, there is no prediction, one is outside [0, 1], or there is
            no bin.

    Reference: Guo et al. 2017, equation 3, https://arxiv.org/abs/1706.04599.
    """
    check_shapes(probabilities=(probabilities, "N"), outcomes=(outcomes, "N"))
    if len(probabilities) == 0 or bins < 1:
        raise ValueError("expected_calibration_error needs at least one prediction and one bin.")
    if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
        raise ValueError("probabilities must lie in [0, 1].")
    # Edges in the type of the probabilities, so that 0.7 falls into the same bin in each.
    edges = torch.arange(1, bins, device=probabilities.device).to(probabilities.dtype) / bins
    bin_of = torch.bucketize(probabilities, edges, right=True)
    counts = torch.bincount(bin_of, minlength=bins)
    predicted = torch.bincount(bin_of, probabilities.double(), minlength=bins)
    observed = torch.bincount(bin_of, outcomes.double(), minlength=bins)
    error = (predicted - observed).abs().sum() / len(probabilities)
    return Calibration(error.item(), predicted / counts, observed / counts, counts)


def _check_confidence(confidence: float) -> None:
    """Bounds exist for a probability strictly between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}.")
