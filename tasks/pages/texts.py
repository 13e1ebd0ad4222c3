"""Texts of others on a page: short, printable and without secrets. Escaping is the template's."""

from rlhf_core.errors import printable
from rlhf_core.redaction import masked

LONGEST = 2_000  # characters of an answer
LONGEST_SETTING = 300  # of a setting


def shown(text: object, most: int = LONGEST) -> str:
    """A text as a page shows it, cut with a note behind `most` characters.

    Control characters, and marks that reverse the order of writing, become escapes like `\\x1b`.
    """
    whole = str(text)
    # A secret that is cut in two would not be found, so a little more than is shown is searched.
    part = masked(whole[: 2 * most]) if len(whole) > 2 * most else masked(whole)
    if len(part) <= most:
        return printable(part)
    left_out = len(whole) - most
    return f"{printable(part[:most])} … ({left_out:,} more characters are left out)"


def duration(seconds: float | None) -> str:
    """`4 s`, `12 min`, `3 h 5 min`; `unknown` for None."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if rest else f"{minutes} min"


def percent(value: float) -> str:
    """A share as `92.3 %`, and as `92 %` where nothing is lost; the space does not break."""
    return f"{100 * value:.1f}".removesuffix(".0") + "\u00a0%"


def number(value: float) -> str:
    """A count in full, and another number with three digits behind its first."""
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.4g}"
