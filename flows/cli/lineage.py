"""Prints lineage: which versions saw something, or what a version saw."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flows.cli.printing import line, show_table
from rlhf_core.errors import UserError
from tasks.lineage import words
from tasks.lineage.lineage import Lineage, Wanted
from tasks.lineage.names import versions_of
from tasks.record.record import Record

if TYPE_CHECKING:
    from tasks.lineage.records import Answer, Saw
    from tasks.registry.refs import ModelRef
    from tasks.settings import Settings

SHOWN = 20  # annotators in the terminal
TITLES = {
    "trained": "Trained on it",
    "answers": "Trained on answers of a version that was",
    "evaluated": "Evaluated on it",
}
COMPLETE, GAPS = 0, 4  # exit status


def show(wanted: Wanted, model: str, settings: "Settings", *, in_json: bool) -> int:
    """Answer one question about lineage.

    Returns: the exit status, which says whether something could not be looked into.

    Raises: UserError when nothing is asked for, or there is no such model or run.
    """
    asked = bool(wanted.annotator or wanted.source or wanted.licence)
    if not asked and not model:
        raise UserError(
            "say what to look for: --annotator, --source or --licence for the models that saw it, "
            "or --model for what a model saw"
        )
    record = Record.open(settings)
    lineage = Lineage(record)
    if not asked:
        return _show_saw(lineage, versions_of(lineage, record, model), in_json=in_json)
    found = lineage.search(wanted)
    if not model:
        return _show_seen(found, wanted, settings, in_json=in_json)
    refs = versions_of(lineage, record, model)
    only = lineage.only(found, refs)
    others = [] if only.seen or in_json else refs
    return _show_seen(only, wanted, settings, in_json=in_json, others=others if found.seen else [])


def _show_seen(
    found: "Answer",
    wanted: Wanted,
    settings: "Settings",
    *,
    in_json: bool,
    others: "Sequence[ModelRef]" = (),
) -> int:
    """Args:
    others: the versions that were asked about, if none of them saw it and others did."""
    if in_json:
        line(json.dumps(words.as_json(found), ensure_ascii=False, indent=2))
        return GAPS if found.unknown else COMPLETE
    in_store: dict[str, int] = {}
    if wanted.annotator and not found.rows:
        from tasks.lineage.votes import judgments_of  # the database takes a second

        in_store = judgments_of(wanted.annotator, settings)
    if others:
        named = ", ".join(ref.uri for ref in others)
        line(f"None of these versions saw {words.asked(wanted)}: {named}. Others did.")
    else:
        line(words.verdict(found, wanted, in_store))
    for relation, title in TITLES.items():
        rows = words.seen_rows([seen for seen in found.seen if seen.relation == relation])
        if rows:
            line(f"\n{title}:")
            show_table(("Version", "Made (UTC)", "Alias", "Rows", "Way"), rows)
    _show_gaps(found.unknown)
    return GAPS if found.unknown else COMPLETE


def _show_saw(lineage: Lineage, refs: "list[ModelRef]", *, in_json: bool) -> int:
    found = [lineage.saw(ref) for ref in refs]
    if in_json:
        line(json.dumps(words.as_json(found), ensure_ascii=False, indent=2))
    else:
        for one in found:
            _show_one(one)
    return GAPS if any(one.unknown for one in found) else COMPLETE


def _show_one(saw: "Saw") -> None:
    made = saw.at.strftime("%Y-%m-%d %H:%M UTC") if saw.at else "at an unknown time"
    facts = [*saw.aliases, f"made {made}", words.state(saw)]
    line(f"{words.short(saw.ref.uri)}: {', '.join(fact for fact in facts if fact)}")
    show_table(("", "Itself, and through what it was made from"), words.lines_of(saw))
    for material, title in ((saw.trained, "trained on"), (saw.evaluated, "evaluated on")):
        rows = words.name_rows(material, "annotators", SHOWN)
        if rows:
            line(f"Annotators it was {title}:")
            show_table(("Annotator", "Votes", "Demonstrations", "Prompts"), rows)
            if (more := len(material.annotators) - len(rows)) > 0:
                line(f"and {more:,} more, which --json lists.")
    _show_gaps(saw.unknown)
    line("")


def _show_gaps(unknown: tuple[str, ...]) -> None:
    if unknown:
        line("\nNot known, so that there may be more:")
        for sentence in unknown:
            line(f"  {sentence}")
