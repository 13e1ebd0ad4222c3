"""Counts the looks at a champion, and gives each its share of the alpha budget.

A look is a tag of whom the candidate was compared with: of the champion's version, or of the
registered model while it has no champion. So the count belongs to that opponent, however often it
is dethroned and comes back.

MLflow has no transactions, and none are needed. Who takes a look writes its own tag first and then
counts those that are there. In the order in which tags were written, the j-th finds at least j, so
its number is at least j and its alpha at most that of the j-th look: processes that meet may both
get a higher number, but never spend too much.
"""

import json

from rlhf_core.evaluation.scorecard import Scorecard
from rlhf_core.promotion.decision import Look
from rlhf_core.promotion.looks import take_look
from tasks.record import tags
from tasks.record.identity import short_digest
from tasks.record.record import Record
from tasks.registry.refs import ModelRef

_BEGUN = "begun"


def look(
    record: Record,
    total: float,
    scorecard: Scorecard,
    candidate: ModelRef,
    champion: ModelRef | None,
) -> Look:
    """The look of a comparison: a new one, or the one that it took before.

    The comparison is known by the files of the candidate and by its scorecard, so that a resumed
    run, or one that reuses the evaluation, spends nothing again.

    Args:
        total: alpha of all looks at the opponent.
    """
    place = champion or candidate.name
    opponent = place if isinstance(place, str) else place.uri
    files = record.store.tags(candidate).get(tags.DIGEST, candidate.uri)
    # Without the judge's costs, which differ when the same answers are judged again from memory.
    compared = scorecard.model_dump(mode="json", exclude={"judge"})
    comparison = short_digest({"files": files, "scorecard": compared})
    known = _alphas(record, place)
    before = known.get(comparison)
    if before is None:
        _write(record, place, comparison, _BEGUN)
        known = _alphas(record, place)
        others = [spent[1] for name, spent in known.items() if spent and name != comparison]
        taken = take_look(len(known), total, others, opponent)
        facts = {"number": taken.number, "alpha": taken.alpha, "candidate": candidate.uri}
        _write(record, place, comparison, json.dumps(facts))
        return taken
    number, alpha = before
    spent = sum(found[1] for found in known.values() if found)
    return Look(number=number, alpha=alpha, total=total, spent=spent, opponent=opponent, again=True)


def _alphas(record: Record, place: ModelRef | str) -> dict[str, tuple[int, float] | None]:
    """Number and alpha of each look, by comparison; None if they were not written yet."""
    store = record.store
    found = store.model_tags(place) if isinstance(place, str) else store.tags(place)
    return {name: _read(value) for name, value in tags.looks(found).items()}


def _read(value: str) -> tuple[int, float] | None:
    if value == _BEGUN:
        return None
    facts = json.loads(value)
    return int(facts["number"]), float(facts["alpha"])


def _write(record: Record, place: ModelRef | str, comparison: str, value: str) -> None:
    name = tags.look_of(comparison)
    if isinstance(place, str):
        record.store.add_model_tag(place, name, value)
    else:
        record.store.add_tags(place, {name: value})
