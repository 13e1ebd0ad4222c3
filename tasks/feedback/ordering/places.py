"""What the column `priority` of a pair says: a wish of a user, or a place in the order.

    below 0             a user wants it that much sooner
    0                   nobody has said anything, and there is no order
    1 to ARRIVED        its place in the last order of the queue
    ARRIVED to LATER    it came in since, and waits behind those until the next order
    LATER + n           a user wants it n later

So a wish is never taken for a place, all that is wanted sooner comes before the order, and all that
is wanted later behind it. A pair with a wish is in no arm: neither the design nor chance chose when
it is asked about.
"""

from sqlalchemy import ColumnElement, and_, or_

from tasks.feedback.store.tables import Pair

ARRIVED = 2**32
LATER = 2**40


def kept(wish: int) -> int:
    """A wish as the column has it; lower is sooner, 0 is none."""
    return wish if wish <= 0 else LATER + wish


def wish_of(priority: int, arm: str) -> int:
    """The wish in the column; 0 if it is a place, or nothing was said."""
    if priority < 0:
        return priority
    if priority >= LATER:
        return priority - LATER
    # Only orders give arms: without one it is a wish from before the two were kept apart.
    return 0 if arm else priority


def has_come(priority: int) -> bool:
    """Whether it came in since the last order."""
    return ARRIVED <= priority < LATER


def without_wish() -> ColumnElement[bool]:
    """Pairs that nobody has said anything about, so an order may place them."""
    placed = and_(Pair.arm != "", Pair.priority > 0, Pair.priority < LATER)
    return or_(Pair.priority == 0, placed)
