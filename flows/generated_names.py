"""Recognises names of flow runs that Prefect generated.

Prefect's server and client generate names like `happy-otter`, and its form suggests names like
`beta3-draconis-void`. Prefect does not record whether a name was generated, so we recognise it by
its words. We read the word lists from Prefect itself: a shorter list of our own would also match
names that people choose (`beta-high`).
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import prefect
from coolname import __file__ as coolname_file
from coolname.loader import load_config

# A word list in the scripts of the Prefect UI, in either of two notations.
_LISTS = re.compile(r"`([^`]+)`\.split\(`\.`\)|\[((?:`[^`$]*`,)+`[^`$]*`)\]")
ANIMAL_LENGTH = 6  # the longest animal that the newer form uses


def is_generated(name: str) -> bool:
    """Whether Prefect generated this name, or it is blank."""
    return not name.strip() or _by_server(name) or _by_form(name) or _by_newer_form(name)


def _by_server(name: str) -> bool:
    first, _, second = name.partition("-")
    adjectives, animals = _server_words()
    return first in adjectives and second in animals


def _by_form(name: str) -> bool:
    """A Greek letter with or without a number, a place, and usually one more word."""
    letters, places, ends = _form_words("alphaRANDOM", "andromedae", "terminus")
    letter, _, place = name.partition("-")
    before, _, end = place.rpartition("-")
    numbered = re.sub(r"[1-9]\d\d?$", "RANDOM", letter)
    return bool({letter, numbered} & letters) and (
        place in places or (before in places and end in ends)
    )


def _by_newer_form(name: str) -> bool:
    """A name like `Rustic-Zebra`."""
    adjectives, animals = _form_words("Unbranded", "Zorse")
    first, _, second = name.partition("-")
    return first in adjectives and second in animals and len(second) <= ANIMAL_LENGTH


@lru_cache(maxsize=1)
def _server_words() -> tuple[frozenset[str], frozenset[str]]:
    config: dict[str, Any] = dict(load_config(Path(coolname_file).with_name("data")))

    def words(name: str) -> frozenset[str]:
        rule = config[name]
        parts = [words(part) for part in rule.get("lists", ())]
        return frozenset(rule.get("words", ())).union(*parts)

    first, second = config["an"]["lists"]  # adjective and noun
    return words(first), words(second)


@lru_cache
def _form_words(*members: str) -> tuple[frozenset[str], ...]:
    """The word lists in the scripts of the UI that contain these members, one list per member.

    A list that is not found is empty, so names made from it are kept.
    """
    found = dict.fromkeys(members, frozenset[str]())
    for pages in (prefect.__ui_static_path__, prefect.__ui_v2_static_path__):
        for script in sorted(Path(pages, "assets").glob("*.js")):
            text = script.read_text(encoding="utf-8")
            for member in members:
                if not found[member] and member in text:
                    found[member] = _list_with(member, text)
    return tuple(found.values())


def _list_with(member: str, text: str) -> frozenset[str]:
    for match in _LISTS.finditer(text):
        words = match[1].split(".") if match[1] else match[2].strip("`").split("`,`")
        if member in words:
            return frozenset(words) - {""}
    return frozenset()
