"""The question that a model is asked, and what its reply says."""

import re
from collections.abc import Mapping

from rlhf_core.judges.judge import Pair, Verdict, Winner, shown

_PLACE = re.compile(r"\{(prompt|a|b)\}")
_MARKS = "*_`#>\"'()[]{}.!,:;-– \t"  # around a word: Markdown, quotes, brackets, full stops
_SENTENCES = re.compile(r"(?<=[.!?;])\s+")
_WORD = re.compile(
    r"(?P<introduced>(?:my |the )?(?:final )?(?:answer|verdict|winner|decision|choice|result)"
    r"(?: is)?\W{0,6}|(?:the )?better(?: answer)?(?: is)?\W{0,6})?"
    r"(?:answer\W{0,3})?(?P<word>a|b|tie)",
    re.IGNORECASE,
)
_WINNERS: Mapping[str, Winner] = {"a": "a", "b": "b", "tie": "tie"}


def question(template: str, pair: Pair) -> str:
    """The template with the texts in their places.

    All places are filled at once, so that braces in a text stay what they are.
    """
    texts = {"prompt": shown(pair.prompt), "a": pair.a, "b": pair.b}
    return _PLACE.sub(lambda place: texts[place[1]], template)


def read_reply(reply: str) -> Verdict | None:
    """The verdict of a reply, whose last line must be A, B or TIE; what is before is the reason.

    `**A**`, `Answer: B`, `(a)` and `Tie.` are understood, and so is a last line whose last sentence
    is one like `The answer is A.`. `A or B`, `A is better than B`, `I doubt that the answer is A`
    and anything else that leaves a doubt are not. None: there is no verdict.
    """
    lines = [line.strip() for line in reply.splitlines() if line.strip(_MARKS)]
    if not lines:
        return None
    *before, last = _SENTENCES.split(lines.pop())
    found = _WORD.fullmatch(last.strip(_MARKS))
    if found is None or (before and not found["introduced"]):
        return None
    winner = _WINNERS[found["word"].lower()]
    others = [_WORD.fullmatch(sentence.strip(_MARKS)) for sentence in before]
    if any(other and _WINNERS[other["word"].lower()] != winner for other in others):
        return None
    return Verdict(winner, "\n".join([*lines, " ".join(before)] if before else lines))
