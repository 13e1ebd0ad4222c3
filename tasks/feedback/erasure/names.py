"""A pseudonym as it may be written anywhere, told from longer names and from common words.

A name is not meant by a longer one: more letters, digits and underscores make it another, and so
does whatever makes it the pseudonym of somebody else. Whether a bare word means the person depends
on the word. One that this program writes itself, that stands in the texts which people compare, or
that is a number tells nothing, so it counts only where annotators are named.
"""

import ast
import html
import json
import re
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import tasks

SHORTEST = 3  # characters of a name that is looked for in running text
FILLER = "x"
# Fields and columns in which whoever is named has done something.
WHO = frozenset(
    {
        *("annotator", "annotators", "annotator_id", "annotator_1", "annotator_2", "pseudonym"),
        *("worker", "who", "by", "actor", "subject", "reviewer", "user", "person", "people"),
        *("one", "other", "rater", "labeler", "created_by", "completed_by", "source_id"),
    }
)
# Fields and columns with what people compare, in our tables and in those of labelling tools.
TEXTS = frozenset(
    {
        *("prompt", "prompts", "response", "responses", "response_a", "response_b", "chosen"),
        *("rejected", "text", "content", "answer", "answers", "messages", "demonstrations"),
        *("answer_a", "answer_b", "left", "right", "instruction", "completion", "vocab"),
    }
)
_BEFORE, _AFTER = r"(?<![\w])", r"(?![\w])"
# Of a name that could be a piece of an id such as 6e1f-beef-42: nothing may be joined to it.
_ALONE_BEFORE, _ALONE_AFTER = r"(?<![\w])(?<![\w]-)", r"(?![\w])(?!-[\w])"


class Name:
    """A pseudonym that is searched for."""

    def __init__(self, text: str, *, telling: bool, others: Iterable[str] = ()) -> None:
        """
        Args:
            telling: wherever it stands, it is the person.
            others: longer names, which have it in them and are those of other people.
        """
        self.text = text
        self.telling = telling
        self._others = sorted({name for name in others if name != text and text in name})

    @classmethod
    def of(
        cls,
        text: str,
        texts: Iterable[str] = (),
        names: Iterable[str] = (),
        others: Iterable[str] = (),
    ) -> "Name":
        """The name, which is telling unless it stands elsewhere for something else.

        Args:
            texts: that people compare.
            names: of projects, models and the like.
        """
        others = list(others)
        name = cls(text, telling=True, others=others)
        common = (
            len(text) < SHORTEST
            or re.fullmatch(r"[\d\W]+", text)
            or any(map(name.stands_in, names))
            or text.lower() in _our_words()
            or any(map(name.stands_in, texts))
        )
        return cls(text, telling=not common, others=others)

    def spelled(self) -> dict[str, Any]:
        """What `Name` makes it from again, as JSON can hold it."""
        return {"text": self.text, "telling": self.telling, "others": self._others}

    @cached_property
    def written(self) -> list[str]:
        """The ways in which files write it."""
        return _ways(self.text)

    @cached_property
    def _in_text(self) -> re.Pattern[str]:
        could_be_id = re.fullmatch(r"[0-9A-Fa-f]+", self.text)
        ends = (_ALONE_BEFORE, _ALONE_AFTER) if could_be_id else (_BEFORE, _AFTER)
        mine = "|".join(map(re.escape, self.written))
        # The names of others come first, so that what is in them is not taken for this one.
        theirs = [way for name in self._others for way in _ways(name)]
        longer = "|".join(map(re.escape, sorted(theirs, key=len, reverse=True)))
        before = f"{_BEFORE}(?:{longer}){_AFTER}|" if theirs else ""
        return re.compile(f"{before}{ends[0]}(?P<mine>{mine}){ends[1]}")

    def _found(self, text: str) -> bool:
        return any(match["mine"] is not None for match in self._in_text.finditer(text))

    def stands_in(self, text: str) -> bool:
        """Whether it stands in a text by itself."""
        return self._found(text)

    def is_meant(self, value: str) -> bool:
        """Whether a value that may be a name is it, or names it in between."""
        return value == self.text or (self.telling and self._found(value))

    def may_be_in(self, content: bytes) -> bool:
        """Whether its bytes are anywhere, even within a longer name."""
        return any(way.encode(errors="surrogatepass") in content for way in self.written)

    def stands_in_bytes(self, content: bytes) -> bool:
        """Whether it stands in what a file has, of whatever kind, by itself."""
        return self.may_be_in(content) and self._found(_decoded(content))

    def overwritten(self, content: bytes) -> bytes:
        """The same with as many x in its place, so that every other byte stays where it was."""

        def blank(match: re.Match[str]) -> str:
            if match["mine"] is None:
                return match[0]
            return FILLER * len(match[0].encode(errors="surrogateescape"))

        return self._in_text.sub(blank, _decoded(content)).encode(errors="surrogateescape")

    def replaced(self, text: str, instead: str) -> str:
        """A text with something else in its place."""
        return self._in_text.sub(lambda m: m[0] if m["mine"] is None else instead, text)


def _ways(text: str) -> list[str]:
    plain = [text, html.escape(text), quote(text), quote(text, safe="")]
    as_json = [json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]]
    twice = [json.dumps(way)[1:-1] for way in as_json]  # JSON within JSON
    return sorted({*plain, *as_json, *twice}, key=len, reverse=True)


def _decoded(content: bytes) -> str:
    return content.decode(errors="surrogateescape")


@lru_cache(maxsize=1)
def _our_words() -> frozenset[str]:
    """What this program calls things: its identifiers, and its strings of a single word."""
    root = Path(tasks.__file__).parents[1]
    found: set[str] = set()
    for folder in ("rlhf_core", "tasks", "flows"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
                elif isinstance(node, ast.Name):
                    found.add(node.id)
                elif isinstance(node, ast.Attribute):
                    found.add(node.attr)
                elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                    found.add(node.name)
    return frozenset(found)
