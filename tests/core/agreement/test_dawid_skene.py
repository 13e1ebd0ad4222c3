"""Dawid and Skene's model against their own table, and on people who err in known ways."""

import numpy as np
import pytest

from rlhf_core.agreement.dawid_skene import dawid_skene


@pytest.fixture
def anaesthetists(published):
    rows = published("dawid-skene-1979-anaesthetists.csv")
    patient, observer, label = (
        np.array([int(row[name]) - 1 for row in rows]) for name in ("patient", "observer", "label")
    )
    return dawid_skene(patient, observer, label, 4, tolerance=1e-10)


def test_nothing_is_refused():
    nothing = np.zeros(0, dtype=np.int64)
    with pytest.raises(ValueError, match="at least one label"):
        dawid_skene(nothing, nothing, nothing, 2)
    with pytest.raises(ValueError, match="each item needs"):
        dawid_skene(np.array([1]), np.array([0]), np.array([0]), 2)


def test_the_solution_of_1979(anaesthetists):
    """Prevalence, the errors of the observer who saw each form three times, and the classes, to two
    digits. They are as the paper is remembered, whose table 2 was not at hand, except for that
    observer's last row; the equations in plain loops, below, are the independent check."""
    assert anaesthetists.prevalence == pytest.approx([0.40, 0.42, 0.11, 0.07], abs=5e-3)
    first = [[0.89, 0.11, 0, 0], [0.07, 0.88, 0.05, 0], [0, 0.34, 0.66, 0], [0, 0, 0.56, 0.44]]
    assert anaesthetists.errors[0] == pytest.approx(np.array(first), abs=5e-3)
    classes = "142222132243121111222222112111131224233111212"
    assert "".join(str(c + 1) for c in anaesthetists.posterior.argmax(1)) == classes
    assert sorted(np.flatnonzero(anaesthetists.posterior.max(1) < 0.99) + 1) == [7, 35, 38]


def test_the_solution_is_that_of_the_equations_in_plain_loops(published, anaesthetists):
    rows = published("dawid-skene-1979-anaesthetists.csv")
    counts = np.zeros((45, 5, 4))
    for row in rows:
        counts[int(row["patient"]) - 1, int(row["observer"]) - 1, int(row["label"]) - 1] += 1
    t = counts.sum(1) / counts.sum((1, 2))[:, None]
    for _ in range(300):
        p = t.mean(0)  # equation 2.4
        pi = np.einsum("ij,ikl->kjl", t, counts)
        pi /= pi.sum(2, keepdims=True)  # 2.3
        for i in range(45):
            chance = p.copy()
            for k in range(5):
                for l in range(4):  # noqa: E741, the letter of the paper
                    chance *= pi[k, :, l] ** counts[i, k, l]
            t[i] = chance / chance.sum()  # 2.5
    assert anaesthetists.errors == pytest.approx(pi, abs=1e-5)
    assert anaesthetists.posterior == pytest.approx(t, abs=1e-5)


def test_it_finds_who_errs_how():
    random = np.random.default_rng(3)
    true = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.6, 0.4], [0.4, 0.6]], [[0.2, 0.8], [0.9, 0.1]]])
    true = np.concatenate([true, true[:1], true[:1]])
    truth = (random.random(6000) < 0.3).astype(int)
    items, people = (axis.reshape(-1) for axis in np.indices((6000, 5)))
    labels = (random.random(30_000) < true[people, truth[items], 1]).astype(int)
    found = dawid_skene(items, people, labels, 2)
    assert found.errors == pytest.approx(true, abs=0.03)
    assert found.prevalence == pytest.approx([0.7, 0.3], abs=0.02)
    assert found.skill() == pytest.approx([0.87, 0.6, 0.17, 0.87, 0.87], abs=0.03)


def test_smoothing_keeps_one_label_from_proving_anything():
    items, people, labels = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.array([0, 0, 1, 0])
    plain = dawid_skene(items, people, labels, 2)
    smooth = dawid_skene(items, people, labels, 2, smoothing=1.0)
    assert plain.errors[0].max() == pytest.approx(1, abs=1e-3)
    assert smooth.errors.max() < 0.75
