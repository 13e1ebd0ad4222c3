"""Alpha, kappa and percent agreement against numbers by hand, published ones, and evalica's."""

import evalica
import numpy as np
import pandas as pd
import pytest

from rlhf_core.agreement.alpha import alpha_of, coincidences, krippendorff, same_of
from rlhf_core.agreement.kappa import cohen, kappas
from rlhf_core.agreement.votes import CLASSES

CODES = {name: code for code, name in enumerate(CLASSES)}
# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, part C (and Content Analysis,
# section 12.3.2): four observers, twelve units, values missing; nominal alpha .743.
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


def counted(votes, classes):
    """(U, C) of a list of votes for each unit."""
    return np.array([[list(unit).count(c) for c in classes] for unit in votes])


def by_evalica(votes):
    """evalica's alpha: places stand for observers, whose names do not matter."""
    frame = pd.DataFrame([pd.Series(list(unit), dtype=object) for unit in votes]).T
    return evalica.alpha(frame).alpha


def test_alpha_of_the_published_example():
    counts = counted(zip(*PUBLISHED, strict=True), [1, 2, 3, 4, 5])
    assert float(alpha_of(coincidences(counts).sum(0))) == pytest.approx(0.743, abs=5e-4)


def test_alpha_by_hand():
    # Units aa, ab, bb: o_aa = 2, o_bb = 2, o_ab = o_ba = 1, so n = 6 and both margins are 3.
    # D_o = 2 of 6; D_e = (36 - 18) / 5 of 6, and alpha = 1 - 2 / 3.6.
    counts = np.array([[2, 0], [1, 1], [0, 2]])
    assert float(alpha_of(coincidences(counts).sum(0))) == pytest.approx(1 - 2 / 3.6)
    assert float(same_of(coincidences(counts).sum(0))) == pytest.approx(4 / 6)


def test_alpha_is_evalicas_on_random_votes():
    random = np.random.default_rng(1)
    for _ in range(20):
        units = [
            random.choice(list("abt"), random.integers(1, 6), p=[0.5, 0.3, 0.2]) for _ in "u" * 40
        ]
        ours = float(alpha_of(coincidences(counted(units, "abt")).sum(0)))
        assert ours == pytest.approx(by_evalica(units), abs=1e-12)


def test_alpha_is_undefined_where_all_say_one_thing_and_where_nobody_votes_twice():
    assert krippendorff(np.array([[3, 0], [2, 0]]), np.arange(2)) is None
    assert krippendorff(np.array([[1, 0], [0, 1]]), np.arange(2)) is None


def test_perfect_agreement_is_one_without_an_interval():
    counts = np.array([[3, 0], [0, 3]] * 20)
    found = krippendorff(counts, np.arange(40))
    assert (found.value, found.low, found.high) == (1.0, None, None)


def test_the_interval_of_alpha_holds_where_that_of_kalpha_does_not():
    """Ten pairs a prompt, five votes a pair; a prompt is easy or hard for all."""
    random = np.random.default_rng(2)

    def draw(prompts):
        right = random.choice([0.55, 0.95], prompts).repeat(10)
        truth = random.integers(0, 2, prompts * 10)
        said = np.where(
            random.random((len(right), 5)) < right[:, None], truth[:, None], 1 - truth[:, None]
        )
        return np.stack([(said == 0).sum(1), (said == 1).sum(1)], 1), np.arange(prompts).repeat(10)

    # P(two agree) is r² + (1 - r)², and classes are balanced, so alpha = 2·P - 1 in the limit.
    true = np.mean([2 * (r * r + (1 - r) ** 2) - 1 for r in (0.55, 0.95)])
    held = kalpha = 0
    for seed in range(40):
        counts, prompts = draw(40)
        found = krippendorff(counts, prompts, resamples=300, seed=seed)
        held += found.low <= true <= found.high
        units = pd.DataFrame([["a"] * a + ["b"] * b for a, b in counts]).T
        theirs = evalica.alpha_bootstrap(units, n_resamples=300, random_state=seed)
        kalpha += theirs.low <= true <= theirs.high
    assert held >= 34  # of 40; 95 % are 38, and 33 or fewer have a chance below 0.01
    assert kalpha < 27


def test_kappa_of_the_published_example():
    # Cohen 1960, table 1: 200 patients, three diagnoses; p_o = .70, p_e = .41, kappa = .492
    # (printed in proportions: .44 .07 .09 / .05 .20 .05 / .01 .03 .06).
    table = np.array([[88, 14, 18], [10, 40, 10], [2, 6, 12]])
    x, y = (axis.reshape(-1).repeat(table.reshape(-1)) for axis in np.indices((3, 3)))
    found = cohen(x, y, np.arange(200))
    assert found.value == pytest.approx(0.492, abs=5e-4)
    assert found.of == 200


def test_the_error_of_kappa_is_that_of_fleiss_cohen_and_everitt():
    """By their formula, written out as they print it (1969, equation 13)."""
    table = np.array([[53, 5, 2], [11, 14, 5], [1, 6, 3]])
    x, y = (axis.reshape(-1).repeat(table.reshape(-1)) for axis in np.indices((3, 3)))
    n, p = table.sum(), table / table.sum()
    row, column = p.sum(1), p.sum(0)
    po, pe = np.trace(p), (row * column).sum()
    kappa = (po - pe) / (1 - pe)
    first = sum(p[i, i] * (1 - (row[i] + column[i]) * (1 - kappa)) ** 2 for i in range(3))
    second = (1 - kappa) ** 2 * sum(
        p[i, j] * (column[i] + row[j]) ** 2 for i in range(3) for j in range(3) if i != j
    )
    variance = (first + second - (kappa - pe * (1 - kappa)) ** 2) / (n * (1 - pe) ** 2)
    found = cohen(x, y, np.arange(n))
    # every pair is a prompt: n / (n - 1) of it, and Student's 1.984 for 1.96
    t = 1.9842169515086827
    assert found.high - found.value == pytest.approx(t * np.sqrt(variance * n / (n - 1)), rel=1e-6)


def test_one_who_says_one_thing_has_no_kappa():
    assert cohen(np.zeros(50, int), np.zeros(50, int), np.arange(50)) is None
    found = cohen(np.zeros(50, int), np.arange(50) % 2, np.arange(50))
    assert found.value == pytest.approx(0)


# ---- published data ----


def codes_of(rows):
    return counted(([vote[1] for vote in row["votes"]] for row in rows), CLASSES)


def test_alpha_of_the_argument_votes(published):
    rows = published("argument-pairs-5annotators-dev.jsonl")
    counts = codes_of(rows)
    prompts = np.unique([row["prompt"] for row in rows], return_inverse=True)[1]
    assert krippendorff(counts, prompts).value == pytest.approx(0.270, abs=5e-4)
    assert krippendorff(counts[:, :2], prompts).value == pytest.approx(0.432, abs=5e-4)
    units = [[vote[1] for vote in row["votes"]] for row in rows[:500]]
    ours = krippendorff(counts[:500], prompts[:500]).value
    assert ours == pytest.approx(by_evalica(units), abs=1e-12)


def test_kappas_of_pandalm(published):
    """Cohen's kappa of each two of the three annotators, over 999 pairs and three classes."""
    rows = published("pandalm-pairs-3annotators.jsonl")
    said = np.array([[CODES[dict(row["votes"])[f"ann{i}"]] for row in rows] for i in (1, 2, 3)])
    prompts = np.unique([row["prompt"] for row in rows], return_inverse=True)[1]
    found = [cohen(said[i], said[j], prompts).value for i, j in ((0, 1), (0, 2), (1, 2))]
    assert [round(value, 2) for value in found] == [0.85, 0.88, 0.86]


def test_kappas_are_those_of_each_two_alone(simulated):
    votes = simulated(dict.fromkeys("abcd"), pairs=120, each=3, prompts=30)
    found = kappas(votes, least=10)
    assert len(found) == 6
    rows = votes.independent()
    for duo in found:
        mine, theirs = (
            {votes.pair[r]: votes.classes[r] for r in rows if votes.annotator[r] == who}
            for who in (duo.first, duo.second)
        )
        both = sorted(mine.keys() & theirs.keys())
        x, y = (np.array([said[pair] for pair in both]) for said in (mine, theirs))
        assert duo.shared == len(both)
        assert duo.same == pytest.approx((x == y).mean())
        alone = cohen(x, y, votes.prompt[both])
        assert duo.kappa.value == pytest.approx(alone.value)
        assert duo.kappa.low == pytest.approx(alone.low)
