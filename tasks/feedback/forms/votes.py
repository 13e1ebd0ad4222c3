"""Our own form: a vote a row with everything that the store knows, so that nothing is lost.

    format                     rlhf-votes-1
    id                         the number of the pair
    prompt                     text, or messages (in Parquet as JSON, and `prompt_type` says so)
    response_a, response_b     texts
    vote                       a, b, tie, both_bad or skip
    shown_first, annotator, margin, seconds, time, note, reason, kind, source
    gold, gold_answer          whether the right answer is known, and which it is
    ballot                     0, or which of the votes it is that are alike in all this
    model_a, sampling_a, source_a, licence_a, and the same of b
    prompt_source, prompt_licence
    kept                       columns that were kept, by name

Where votes are on a pair whose right answer is known, a row of the annotator `gold` is that answer,
and nobody's vote.

`data.preferences` reads the same rows. Here they are read to the letter: a text that looks like a
dialogue stays a text.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from rlhf_core.data.encoding import Prompt
from rlhf_core.data.forms.messages import messages
from rlhf_core.data.forms.rows import BadRowError
from rlhf_core.data.sources import Fault, Row, SourceRows
from rlhf_core.data.vote_details import UnlikeError, quote
from rlhf_core.data.vote_details import gold as is_gold
from rlhf_core.settings.fields import GOLD
from tasks.feedback.forms import checks
from tasks.feedback.forms.checks import MOST, Pseudonyms
from tasks.feedback.forms.known import MARK
from tasks.feedback.forms.options import OURS, Entry, ImportOptions
from tasks.feedback.forms.stored import StoredPair
from tasks.feedback.store.judgments import KINDS, CastVote
from tasks.feedback.store.records import Answer, Ballot, NewPair

_TEXTS = (
    *("format", "id", "prompt", "prompt_type", "response_a", "response_b", "vote", "shown_first"),
    *("annotator", "gold_answer", "time", "note", "reason", "kind", "source"),
    *("model_a", "model_b", "sampling_a", "sampling_b", "source_a", "source_b"),
    *("licence_a", "licence_b", "prompt_source", "prompt_licence", "kept"),
)
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _TEXTS),
        *(("margin", pa.float64()), ("seconds", pa.float64())),
        *(("gold", pa.bool_()), ("ballot", pa.int64())),
    ]
)


def row(vote: CastVote, stored: StoredPair, annotator: str, ballot: int) -> Row:
    """A vote as a row of JSON lines."""
    pair = stored.pair
    return {
        **{"format": MARK, "id": str(vote.pair), "prompt": vote.prompt},
        **{"response_a": vote.response_a, "response_b": vote.response_b},
        **{"vote": vote.vote, "shown_first": vote.first or "", "annotator": annotator},
        **{"gold": bool(vote.gold) and annotator != GOLD, "gold_answer": vote.gold or ""},
        "margin": vote.margin,
        **{"seconds": vote.seconds, "time": vote.time, "note": vote.note, "reason": vote.reason},
        **{"kind": vote.kind, "source": vote.source, "ballot": ballot},
        **{"model_a": pair.a.model, "model_b": pair.b.model},
        **{"sampling_a": dict(pair.a.sampling), "sampling_b": dict(pair.b.sampling)},
        **{"source_a": pair.a.source, "source_b": pair.b.source},
        **{"licence_a": pair.a.licence, "licence_b": pair.b.licence},
        **{"prompt_source": pair.source, "prompt_licence": pair.licence, "kept": dict(pair.kept)},
    }


def flat(row: Row) -> Row:
    """A row for Parquet, where a column has one type."""
    text = isinstance(row["prompt"], str)
    return {
        **row,
        "prompt": row["prompt"] if text else json.dumps(row["prompt"], ensure_ascii=False),
        "prompt_type": "text" if text else "messages",
        **{name: json.dumps(row[name]) for name in ("sampling_a", "sampling_b", "kept")},
    }


class VoteRows:
    """The votes of a file in our form; `faults` are its bad rows, once all were read."""

    def __init__(self, source: SourceRows, options: ImportOptions, people: Pseudonyms) -> None:
        self.source, self._options, self._people = source, options, people
        self.faults: list[Fault] = list(source.unreadable)
        self.left_out = Counter[str]()
        self.notes: list[str] = []
        self.unread: dict[str, int] = {}
        self._known = {*SCHEMA.names, *options.ignore}

    def __iter__(self) -> Iterator[Entry]:
        self.faults = list(self.source.unreadable)
        unread = Counter[str]()
        for number, values in self.source.rows:
            unread.update(values.keys() - self._known)
            try:
                yield self._entry(number, values)
            except BadRowError as bad:
                where = (self.source.source, self.source.unit, number, bad.field)
                self.faults.append(Fault(*where, bad.category, bad.reason))
        self.unread = dict(unread)
        self.faults.sort(key=lambda fault: fault.number)

    def _entry(self, number: int, values: Row) -> Entry:
        def said(field: str, most: int = 0) -> str:
            return checks.text(values.get(field), field, most)

        def one_of(field: str, allowed: tuple[str, ...]) -> Any:
            found = said(field)
            if found not in allowed:
                listed = ", ".join(name or "nothing" for name in allowed)
                raise BadRowError(field, "unknown vote", f"is {quote(found)}, not {listed}")
            return found

        def answer(side: str) -> Answer:
            field = f"response_{side}"
            if not isinstance(values.get(field), str):
                raise BadRowError(field, "wrong type", "is not text")
            checks.text(values[field], field)
            return Answer(
                values[field],
                said(f"model_{side}", MOST["model"]),
                checks.mapping(values.get(f"sampling_{side}"), f"sampling_{side}"),
                said(f"source_{side}", MOST["source"]),
                said(f"licence_{side}", MOST["licence"]) or self._options.licence,
            )

        one_of("format", (MARK,))
        gold = one_of("gold_answer", ("", "a", "b", "tie"))
        marked = is_gold(values.get("gold"))
        right: Any = checks.right_answer(said("annotator"), marked, said("vote"), "vote")
        if right and gold and right != gold:
            raise BadRowError(
                "gold_answer", "unknown vote", f"is '{gold}', but the vote is {right}"
            )
        pair = NewPair(
            _prompt(values),
            answer("a"),
            answer("b"),
            said("prompt_source", MOST["source"]),
            said("prompt_licence", MOST["licence"]) or self._options.licence,
            checks.kept(values.get("kept"), "kept"),
            right or gold or None,
        )
        if right:
            return Entry(number, pair, [])
        ballot = Ballot(
            one_of("vote", OURS),
            self._people.name(values.get("annotator") or "", "annotator"),
            one_of("shown_first", ("", "a", "b")),
            _number(values.get("margin")),
            checks.seconds(values.get("seconds"), "seconds"),
            said("time", MOST["time"]),
            said("note"),
            said("reason"),
            said("source", MOST["source"]) or self._options.source,
            one_of("kind", KINDS),
            _whole(values.get("ballot")),
        )
        return Entry(number, pair, [ballot])


def _prompt(values: Row) -> Prompt:
    value = values.get("prompt")
    try:
        if values.get("prompt_type") == "messages" and isinstance(value, str):
            value = json.loads(value)
        if isinstance(value, list):
            found: Prompt = messages(value)
        elif isinstance(value, str):
            found = value
            checks.text(value, "prompt")
        else:
            raise UnlikeError("wrong type", "is neither text nor messages")
    except (UnlikeError, ValueError, RecursionError) as error:
        category = getattr(error, "category", "bad messages")
        raise BadRowError("prompt", category, str(error)) from error
    checks.plain(found, "prompt")
    return found


def _number(value: Any) -> float:
    try:
        found = 0.0 if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found) or isinstance(value, bool):
        raise BadRowError("margin", "bad margin", f"is {quote(value)}, not a finite number")
    return found


def _whole(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadRowError("ballot", "wrong type", f"is {quote(value)}, not a whole number")
    return value
