"""The report as numbers with names, and as tables."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields

import pandas as pd

from rlhf_core.agreement.measures import Measure
from rlhf_core.agreement.quality import Habits, Machine, Quality


def numbers(quality: Quality) -> dict[str, float]:
    """The figures over all votes by name; the bounds of an interval end in _low and _high."""
    found: dict[str, float] = {
        name: float(getattr(quality, name))
        for name in ("votes", "skips", "pairs", "prompts", "annotators", "twice")
    }
    found["flags"] = float(len(quality.flags))
    measures = {
        "alpha": quality.alpha,
        "alpha_without_ties": quality.alpha_without_ties,
        "same": quality.same,
        "left_when_balanced": quality.left_when_balanced,
        **vars(quality.habits),
    }
    measures["skip_rate"] = measures.pop("skips")  # beside their number
    for name, measure in measures.items():
        found |= _bounds(name, measure)
    for machine in quality.machines:
        found |= _of_machine(machine)
    found |= {"seconds": quality.seconds} if quality.seconds is not None else {}
    return found | ({"sure": quality.sure} if quality.sure is not None else {})


def tables(quality: Quality) -> dict[str, pd.DataFrame]:
    """A row for each annotator, each two annotators, each piece of time, group, flag and reason."""
    people = [
        {"annotator": p.name, "people": p.people, "votes": p.votes, "repeats": p.repeats}
        | _habits(p.habits)
        | _columns("left_when_balanced", p.left_when_balanced)
        | {"seconds": p.seconds, "skill": p.skill}
        for p in quality.people
    ]
    kappas = [
        {"first": k.first, "second": k.second, "shared": k.shared, "same": k.same}
        | _columns("kappa", k.kappa)
        for k in quality.kappas
    ]
    blocks = [
        {"block": b.name, "votes": b.votes, "people": b.people, "seconds": b.seconds}
        | _habits(b.habits)
        for b in quality.blocks
    ]
    groups = [
        {"column": g.column, "value": g.value, "votes": g.votes, "people": g.people}
        | _columns("alpha", g.alpha)
        | _habits(g.habits)
        for g in quality.groups
    ]
    flags = [
        {"annotator": f.annotator, "habit": f.habit, "p": f.p, "sentence": f.sentence}
        | _columns("share", f.measure)
        for f in quality.flags
    ]
    trends = [
        {"habit": t.habit, "p": t.p, "level": t.level, "clear": t.clear}
        | _columns("change", t.change)
        for t in quality.trends
    ]
    reasons = [{"reason": r.text, "skips": r.skips, "people": r.people} for r in quality.reasons]
    machines = [
        {"judge": m.name, "votes": m.votes, "pairs": m.pairs, "alone": m.alone}
        | {"to_audit": m.to_audit}
        | _columns("audit_error", m.error)
        | _columns("same_in_both_orders", m.same_in_both)
        | _columns("left", m.left)
        | _columns("longer", m.longer)
        | _columns("agreement_with_people", m.with_people)
        for m in quality.machines
    ]
    every = {
        "annotators": people,
        "judges": machines,
        "kappas": kappas,
        "blocks": blocks,
        "groups": groups,
        "flags": flags,
        "trends": trends,
        "skips": reasons,
    }
    return {name: pd.DataFrame(rows) for name, rows in every.items() if rows}


def _of_machine(machine: Machine) -> dict[str, float]:
    """The figures of a judge; MLflow takes no colon in a name."""
    name = re.sub(r"[^\w.\-]+", "-", machine.name.partition(":")[2] or machine.name)
    found = {"alone": float(machine.alone), "to_audit": float(machine.to_audit)}
    found["audited"] = float(0 if machine.error is None else machine.error.of)
    measures = {
        "audit_error": machine.error,
        "same_in_both_orders": machine.same_in_both,
        "left": machine.left,
        "longer": machine.longer,
        "agreement_with_people": machine.with_people,
    }
    for what, measure in measures.items():
        found |= _bounds(what, measure)
    return {f"judge/{name}/{key}": value for key, value in found.items()}


def _habits(habits: Habits) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for field in fields(habits):
        found |= _columns(field.name, getattr(habits, field.name))
    return found


def _columns(name: str, measure: Measure | None) -> dict[str, float | None]:
    parts = (None, None, None) if measure is None else (measure.value, measure.low, measure.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), parts, strict=True)) | {
        f"{name}_of": 0 if measure is None else measure.of
    }


def _bounds(name: str, measure: Measure | None) -> Mapping[str, float]:
    found: Iterator[tuple[str, float | None]] = iter(())
    if measure is not None:
        values = (measure.value, measure.low, measure.high)
        found = zip((name, f"{name}_low", f"{name}_high"), values, strict=True)
    return {key: value for key, value in found if value is not None}
