"""The model of Dawid and Skene: who errs how, and what the right answers are, found together."""

from typing import NamedTuple

import numpy as np

from rlhf_core.agreement.votes import Floats, Ints

_TINY = 1e-300


class DawidSkene(NamedTuple):
    """What the model says of I items, A annotators and C classes."""

    posterior: Floats  # (I, C) chance of each class for each item
    errors: Floats  # (A, C, C) chance that an annotator says l of an item of class j; NaN = unseen
    prevalence: Floats  # (C,) share of items of each class
    log_likelihood: float  # nats

    def skill(self) -> Floats:
        """(A,) The chance that an annotator is right about an item drawn from all.

        Σ_j p_j · π_jj; a class that the annotator never met counts as at random.
        """
        right = np.diagonal(self.errors, axis1=1, axis2=2)
        return np.nan_to_num(right, nan=1 / len(self.prevalence)) @ self.prevalence


def dawid_skene(
    items: Ints,
    annotators: Ints,
    labels: Ints,
    classes: int,
    *,
    smoothing: float = 0.0,
    tolerance: float = 1e-7,
    most_rounds: int = 500,
) -> DawidSkene:
    """Maximum likelihood by EM.

        P(label l by annotator k | class j) = π_kjl,   P(class j) = p_j
        E:  T_ij ∝ p_j · Π_n π_{k(n), j, l(n)}   over the labels n of item i
        M:  p_j = Σ_i T_ij / I,   π_kjl = (Σ_n T_{i(n), j} + s) / (Σ_l … + C·s)

    It begins with T as the shares of the labels of each item, as in the paper. Labels of one
    annotator on one item count each, as independent given the class.

    Args:
        items: (N,) 0 … I - 1; each has a label.
        annotators: (N,) 0 … A - 1.
        labels: (N,) 0 … classes - 1.
        smoothing: s, labels of each kind that are added for each annotator and class; 0 as in the
            paper. With few labels of a person, 0 lets one label prove that somebody never errs.
        tolerance: ends when the log-likelihood of a label grows by less (nats).

    Raises: ValueError when there is no label, or an item has none.

    Reference: Dawid and Skene 1979, https://doi.org/10.2307/2346806.
    """
    if len(items) == 0:
        raise ValueError("dawid_skene needs at least one label.")
    i, a = int(items.max()) + 1, int(annotators.max()) + 1
    votes = np.bincount(items * classes + labels, minlength=i * classes).reshape(i, classes)
    if (votes.sum(1) == 0).any():
        raise ValueError("each item needs a label.")
    posterior = votes / votes.sum(1, keepdims=True)
    said = annotators * classes + labels  # which column of the errors a label reads
    before = -np.inf
    for _ in range(most_rounds):
        prevalence = posterior.mean(0)
        table = np.stack(
            [
                np.bincount(said, posterior[items, j], minlength=a * classes).reshape(a, classes)
                for j in range(classes)
            ],
            axis=1,
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            errors = (table + smoothing) / (table + smoothing).sum(2, keepdims=True)
        logs = np.log(np.maximum(np.nan_to_num(errors, nan=1 / classes), _TINY))
        joint = np.tile(np.log(np.maximum(prevalence, _TINY)), (i, 1))
        for j in range(classes):
            joint[:, j] += np.bincount(items, logs[:, j].reshape(-1)[said], minlength=i)
        top = joint.max(1, keepdims=True)
        evidence = top[:, 0] + np.log(np.exp(joint - top).sum(1))
        posterior = np.exp(joint - evidence[:, None])
        likelihood = float(evidence.sum())
        if likelihood - before < tolerance * len(items):
            break
        before = likelihood
    return DawidSkene(posterior, errors, prevalence, likelihood)
