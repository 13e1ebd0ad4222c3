"""What may be shown to everybody: nobody with under five votes, no group of under five people.

What is left out must not follow by subtraction from the totals either, so whatever is hidden is
hidden together with enough others.
"""

from typing import Final

import numpy as np

from rlhf_core.agreement.measures import cells
from rlhf_core.agreement.votes import Flags, Ints

FEWEST_VOTES: Final = 5
FEWEST_PEOPLE: Final = 5


def pooled(votes: Ints, there: Flags) -> Ints:
    """The annotators whose figures are shown only together, by their numbers.

    Those with under five votes; and if that is one person, or all of them have under five votes
    together, those with the fewest votes beside them, until it is neither.

    Shapes: (A,) votes of each annotator, and whether they did anything at all: some only skip.

    Reference: Hundepool et al. 2012, Statistical Disclosure Control, section 5.4 (secondary
    suppression).
    """
    cast = np.flatnonzero(there)
    order = cast[np.argsort(votes[cast], kind="stable")]
    count = int((votes[cast] < FEWEST_VOTES).sum())
    if count == 0:
        return order[:0]
    while count < len(order) and (count < 2 or votes[order[:count]].sum() < FEWEST_VOTES):
        count += 1
    return np.sort(order[:count])


def hidden_groups(groups: Ints, people: Ints, count: int) -> Ints:
    """The groups that are shown to nobody but an admin, by their numbers.

    Those with under five people or under five votes; and if that is one group, or all of them have
    so few together, the smallest beside them, until it is neither.

    Args:
        groups: (N,) the group of each vote, 0 … count - 1.
        people: (N,) who voted; all anonymous votes as one person, since they may be.
        count: of groups.
    """
    votes = np.bincount(groups, minlength=count)
    persons = np.bincount(cells(groups, people)[0], minlength=count)
    order = np.lexsort([votes, persons])
    order = order[votes[order] > 0]
    small = (persons[order] < FEWEST_PEOPLE) | (votes[order] < FEWEST_VOTES)
    order = np.concatenate([order[small], order[~small]])
    hidden = int(small.sum())
    if hidden == 0:
        return order[:0]
    while hidden < len(order):
        together = np.isin(groups, order[:hidden])
        enough = len(np.unique(people[together])) >= FEWEST_PEOPLE
        if hidden >= 2 and enough and together.sum() >= FEWEST_VOTES:
            break
        hidden += 1
    return np.sort(order[:hidden])
