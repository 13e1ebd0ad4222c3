"""Two answers side by side, with the words marked in which they differ."""

import re
from difflib import SequenceMatcher
from typing import NamedTuple

from markupsafe import Markup, escape

from tasks.pages.texts import shown

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


class Marked(NamedTuple):
    """Two texts as HTML: what only the first has is `<del>`, what only the second has `<ins>`."""

    first: Markup
    second: Markup


def marked(first: str, second: str) -> Marked:
    """Compare two texts word by word. Both are cut, made printable and escaped."""
    left, right = _WORDS.findall(shown(first)), _WORDS.findall(shown(second))
    ours, theirs = list[Markup](), list[Markup]()
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        ours.append(_part(left[a:b], "" if kind == "equal" else "del"))
        theirs.append(_part(right[c:d], "" if kind == "equal" else "ins"))
    return Marked(Markup().join(ours), Markup().join(theirs))


def _part(words: list[str], tag: str) -> Markup:
    text = escape("".join(words))
    return Markup("<{0}>{1}</{0}>").format(tag, text) if tag and words else Markup(text)
