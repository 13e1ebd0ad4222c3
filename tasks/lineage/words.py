"""Lineage in words and rows, for the terminal, the model card and JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any

from pydantic import BaseModel

from rlhf_core.errors import plural, printable
from tasks.lineage.lineage import Wanted
from tasks.lineage.records import Answer, Known, Material, Saw, Seen, Step
from tasks.registry.refs import Ref

ARROW = " → "
NAMED = 5  # names in a sentence


def short(uri: str) -> str:
    """`demo-policy 3` for a version, `data 1a2b3c4d` for data of a run."""
    kind, _, rest = uri.partition(":/")
    if kind == "models":
        return " ".join(rest.lstrip("/").rsplit("/", 1))
    if kind == "runs":
        return f"data {rest.lstrip('/')[:8]}"
    return uri


def way(path: Sequence[Step]) -> str:
    """The steps from the data to a version, as `votes → reward demo-reward 1`."""
    first, *rest = path
    return ARROW.join([first.role, *(f"{short(step.uri)} ({step.role})" for step in rest)])


def state(version: Known) -> str:
    """What a reader has to know of where a version is; empty if all is there."""
    where = "" if version.state == "registered" else version.state
    run = {"trash": "its run is in MLflow's trash", "gone": "its run is gone"}
    return ", ".join(word for word in (where, run.get(version.run, "")) if word)


def asked(wanted: Wanted) -> str:
    """What was asked for, in words."""
    parts = [
        f"the {kind} {printable(name)!r}"
        for kind in ("annotator", "source", "licence")
        if (name := getattr(wanted, kind))
    ]
    of = f" (feedback project {wanted.project})" if wanted.project else ""
    return " and ".join(parts) + of


def verdict(answer: Answer, wanted: Wanted, in_store: Mapping[str, int] = {}) -> str:
    """One sentence on what was found; it tells nothing found from nothing known.

    Args:
        in_store: judgments of the annotator in the preference store, by project.
    """
    what = asked(wanted)
    trained = sum(seen.relation == "trained" for seen in answer.seen)
    by_answers = sum(seen.relation == "answers" for seen in answer.seen)
    learned = {seen.ref for seen in answer.seen if seen.relation != "evaluated"}
    only = len({seen.ref for seen in answer.seen} - learned)
    if answer.seen:
        found = f"{plural(trained, 'version was', 'versions were')} trained on {what}"
        found += f", {by_answers:,} more on answers of these" if by_answers else ""
        found += f", {only:,} more only evaluated" if only else ""
        rows = plural(answer.rows, "row")
        return f"{found}: {rows} in {plural(answer.matching, 'data set')} of {answer.data_sets:,}."
    if answer.rows:
        return (
            f"{plural(answer.rows, 'row')} in {plural(answer.matching, 'data set')} have {what}, "
            "but no version was trained or evaluated on them."
        )
    sets = plural(answer.data_sets, "data set")
    start = f"No version saw {what}: none of {sets} has such rows."
    if answer.unknown:
        gaps = plural(len(answer.unknown), "thing")
        start = f"No version is known to have seen {what}, but {gaps} could not be looked into."
    elif not answer.data_sets:
        start = f"No version saw {what}: there are no prepared data."
    if in_store:
        votes = ", ".join(f"{number:,} in {name}" for name, number in in_store.items())
        start += f" The preference store has judgments by them ({votes}), in no data so far."
    elif answer.names:
        names = ", ".join(printable(name) for name in answer.names[:NAMED])
        start += f" There are, for example: {names}."
    return start


def seen_rows(found: Sequence[Seen]) -> list[tuple[str, str, str, int, str]]:
    """Version, time, aliases, matching rows and way of each."""
    return [
        (
            short(seen.ref.uri) + (f" ({note})" if (note := state(seen)) else ""),
            seen.at.strftime("%Y-%m-%d %H:%M") if seen.at else "unknown",
            ", ".join(seen.aliases),
            seen.rows,
            way(seen.path) + (f"; also {', '.join(seen.also)}" if seen.also else ""),
        )
        for seen in found
    ]


def name_rows(material: Material, kind: str, most: int = 0) -> list[tuple[str, int, int, int]]:
    """Each annotator, source, licence or model with its votes, demonstrations and prompts; the
    most rows first."""
    named: Mapping[str, Mapping[str, int]] = getattr(material, kind)
    ordered = sorted(named.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    return [
        (name, found.get("votes", 0), found.get("demonstrations", 0), found.get("prompts", 0))
        for name, found in (ordered[:most] if most else ordered)
    ]


def lines_of(saw: Saw) -> Iterator[tuple[str, str]]:
    """What a version saw, as rows of a small table."""
    for title, material in (("Trained on", saw.trained), ("Evaluated on", saw.evaluated)):
        if any(material.tables.values()):
            rows = ", ".join(
                plural(material.tables[word], word.removesuffix("s"))
                for word in ("votes", "demonstrations", "prompts")
                if material.tables.get(word)
            )
            people = len(material.annotators)
            yield title, rows + (f"; by {plural(people, 'annotator')}" if people else "")
    yield "Sources", _listed(saw.trained, "sources")
    yield "Licences", _listed(saw.trained, "licences")
    if saw.trained.models:
        yield "Answers by", _listed(saw.trained, "models")
    if saw.snapshots:
        yield "Snapshots", ", ".join(uri[: uri.rindex("/") + 17] for uri in saw.snapshots)
    if saw.base_models:
        yield "Base model", ", ".join(saw.base_models)
    if saw.ancestors:
        yield (
            "Made from",
            ", ".join(
                short(found.version.ref.uri)
                + (f" ({note})" if (note := state(found.version)) else "")
                for found in saw.ancestors
            ),
        )
    if saw.rewards:
        yield "Rewards", ", ".join(saw.rewards)
    if saw.judges:
        yield "Judges", ", ".join(saw.judges)


def _listed(material: Material, kind: str) -> str:
    rows = name_rows(material, kind)
    named = [f"{printable(name)} ({sum(counts):,})" for name, *counts in rows[:NAMED]]
    more = [f"{len(rows) - NAMED:,} more"] if len(rows) > NAMED else []
    return ", ".join(named + more) or "unknown"


def as_json(value: Any) -> Any:
    """An answer as JSON values: versions as addresses, times in ISO 8601."""
    if isinstance(value, Ref):
        return value.uri
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: as_json(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return value
