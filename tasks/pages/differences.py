"""Two answers side by side, with the words marked in which they differ."""

import re
from collections import Counter
from difflib import SequenceMatcher
from typing import NamedTuple

from markupsafe import Markup, escape

from tasks.pages.texts import shown

_WORDS = re.compile(r"\s*(?:\w+|[^\w\s])|\s+$")
_MOST_REPEATS = 20_000  # pairs of equal words, above which the search would take seconds


class Marked(NamedTuple):
    """Two texts as HTML: what only the first has is `<del>`, what only the second has `<ins>`."""

    first: Markup
    second: Markup


def marked(first: str, second: str) -> Marked:
    """Compare two texts word by word. Both are cut, made printable and escaped."""
    left, right = _WORDS.findall(shown(first)), _WORDS.findall(shown(second))
    ours, theirs = list[Markup](), list[Markup]()
    keys = [word.strip() for word in left], [word.strip() for word in right]
    counts = Counter(keys[0]), Counter(keys[1])
    repeats = sum(count * counts[1][word] for word, count in counts[0].items())
    # Of texts that repeat themselves endlessly, the frequent words are not matched.
    matcher = SequenceMatcher(None, *keys, autojunk=repeats > _MOST_REPEATS)
    for kind, a, b, c, d in matcher.get_opcodes():
        ours.append(_part(left[a:b], "" if kind == "equal" else "del"))
        theirs.append(_part(right[c:d], "" if kind == "equal" else "ins"))
    return Marked(Markup().join(ours), Markup().join(theirs))


def _part(words: list[str], tag: str) -> Markup:
    text = escape("".join(words))
    return Markup("<{0}>{1}</{0}>").format(tag, text) if tag and words else Markup(text)
