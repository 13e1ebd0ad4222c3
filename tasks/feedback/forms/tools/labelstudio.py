"""Label Studio: its exports JSON and JSON_MIN in, tasks and a labelling configuration out.

A task has the texts in `data` and the work of each annotator in `annotations`: `completed_by`,
`lead_time` (seconds), `was_cancelled` (skipped), `ground_truth`, and a `result` of one value for
each control tag: `selected` of Pairwise, `choices` of Choices, `text` of TextArea. JSON_MIN has an
annotation a row, with the values under the names of their tags.
"""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rlhf_core.data.forms.fields import is_filled
from rlhf_core.data.sources import Row, SourceRows
from rlhf_core.data.vote_details import BOTH_BAD
from rlhf_core.errors import DataError
from rlhf_core.settings.fields import word
from tasks.feedback.forms.options import ImportOptions
from tasks.feedback.forms.stored import StoredPair
from tasks.feedback.forms.tools.naming import Adapted, answers_in, as_text, person, places

_DRAWN, _NO_CHOICE, _RANKED = (
    "drafts of annotations",
    "annotations without a choice",
    "rankings (of a Ranker tag)",
)
_PREDICTED = "predictions of models"
_NEITHER = {"tie", *BOTH_BAD, "both are bad", "both bad"}
_VOTES = ("preference", "choice", "vote", "winner", "better", "comparison")
CHOICES = {"tie": "Tie", "both_bad": "Both are bad"}
CONFIG = """<View>
  <Text name="prompt" value="$prompt"/>
  <Pairwise name="comparison" toName="answer1,answer2"/>
  <View style="display: flex; gap: 1em">
    <View style="flex: 1"><Text name="answer1" value="$answer1"/></View>
    <View style="flex: 1"><Text name="answer2" value="$answer2"/></View>
  </View>
  <Choices name="neither" toName="prompt" choice="single-radio" showInline="true">
    <Choice value="Tie"/>
    <Choice value="Both are bad"/>
  </Choices>
  <TextArea name="note" toName="prompt" placeholder="Note" maxSubmissions="1"/>
</View>
"""


def adapted(source: SourceRows, options: ImportOptions) -> Adapted:
    """An export as rows with a list of votes.

    Raises: DataError when it does not tell what is compared, or which question the vote is.
    """
    full = any(isinstance(row.get("data"), dict) for _, row in source.rows)
    prefix = "data." if full else ""
    keys, compared, questions = _survey(source, full)
    answers = compared if len(compared) == 2 and set(compared) <= set(keys) else answers_in(keys)
    names = places(source, options, keys, prefix, answers)
    question = names.pop("vote", "")
    if not question and not compared and len(questions) > 1:
        known = [name for name in questions if name in _VOTES]
        if len(known) != 1:
            raise DataError(
                f"{source.source} has several questions ({', '.join(sorted(questions))}); name "
                "the one about the better answer as --fields vote=NAME"
            )
        question = known[0]
    names.setdefault("pair", f"{prefix}pair")
    read = _Annotations(question, options)
    left_out = Counter[str]()
    for _, row in source.rows:
        read.votes(row, full, left_out)

    def change(number: int, row: Row) -> Iterator[tuple[int, Row]]:
        kept = {"id": row.get("id"), "data": row.get("data")} if full else dict(row)
        ours = {**kept, "votes": read.votes(row, full, Counter())}
        yield number, ours

    return Adapted(source.mapped(change), names, left_out, sides=True)


def _survey(source: SourceRows, full: bool) -> tuple[list[str], list[str], set[str]]:
    """The keys of the texts, the names of what Pairwise compares, and those of Choices."""
    keys: dict[str, None] = {}
    compared: list[str] = []
    questions: set[str] = set()
    for _, row in source.rows:
        data = row.get("data") if full else row
        keys |= dict.fromkeys(data if isinstance(data, dict) else ())
        for annotation in _annotations(row) if full else ():
            for found in _results(annotation):
                kind, names = found.get("type"), found.get("to_name")
                if kind == "pairwise":
                    compared = compared or str(names).split(",")
                elif kind == "choices":
                    questions.add(str(found.get("from_name")))
        if not full:
            for name, value in row.items():
                if _selected(value):
                    compared = compared or [name]
                elif name in _VOTES and isinstance(value, str):
                    questions.add(name)
    return list(keys), compared, questions


def _annotations(row: Row) -> list[Row]:
    found = row.get("annotations", row.get("completions"))
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _results(annotation: Row) -> list[Row]:
    found = annotation.get("result")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _selected(value: Any) -> str:
    """The side of a Pairwise in JSON_MIN; empty if the value is none."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return str(value[0].get("selected") or "")
    return ""


class _Annotations:
    """Reads the votes of a task or of a row."""

    def __init__(self, question: str, options: ImportOptions) -> None:
        self._question = question
        self._neither = _NEITHER | {
            word(value)
            for ours, values in options.votes.items()
            if ours not in ("a", "b")
            for value in values
        }

    def votes(self, row: Row, full: bool, left_out: Counter[str]) -> list[Row]:
        """The votes, each as an object of a list `votes`."""
        if not full:
            values = [
                {"from_name": name, **_value(value)}
                for name, value in row.items()
                if _selected(value) or isinstance(value, str)
                if name in (self._question, *_VOTES, "neither", "note") or _selected(value)
            ]
            whole = {**row, "result": values, "completed_by": row.get("annotator")}
            return self._one(whole, left_out)
        left_out[_PREDICTED] += len(row.get("predictions") or ())
        left_out[_DRAWN] += len(row.get("drafts") or ())
        found = [vote for one in _annotations(row) for vote in self._one(one, left_out)]
        for reason in [reason for reason, count in left_out.items() if not count]:
            del left_out[reason]
        return found

    def _one(self, annotation: Row, left_out: Counter[str]) -> list[Row]:
        results = _results(annotation)
        cancelled = annotation.get("was_cancelled") or annotation.get("skipped")
        said = "skip" if cancelled else self._said(results, left_out)
        if not said:
            left_out[_NO_CHOICE] += 1
            return []
        notes = [
            text
            for result in results
            if result.get("type") == "textarea" or result.get("from_name") == "note"
            for text in _texts(result)
        ]
        return [
            {
                "annotator": person(annotation.get("completed_by")),
                "vote": said,
                "seconds": annotation.get("lead_time"),
                "time": annotation.get("created_at"),
                "note": "\n".join(notes),
                "ground_truth": annotation.get("ground_truth") is True,
                **({"shown_first": "a"} if said in ("left", "right") else {}),
            }
        ]

    def _said(self, results: list[Row], left_out: Counter[str]) -> str:
        side, choices = "", []
        for result in results:
            value = result.get("value")
            value = value if isinstance(value, dict) else {}
            if "selected" in value:
                side = str(value["selected"] or "")
            elif "ranker" in value:
                left_out[_RANKED] += 1
            elif isinstance(value.get("choices"), list) and value["choices"]:
                choices.append((result.get("from_name"), str(value["choices"][0])))
        neither = [choice for _, choice in choices if word(choice) in self._neither]
        if neither:
            return f"{side} and {neither[0]}" if side else _ours(neither[0])
        if side:
            return side
        mine = [choice for name, choice in choices if self._question in ("", name)]
        return mine[0] if mine else ""


def _value(value: Any) -> Row:
    if side := _selected(value):
        return {"value": {"selected": side}}
    return {"value": {"choices": [value], "text": [value]}}


def _texts(result: Row) -> list[str]:
    value = result.get("value")
    found = value.get("text") if isinstance(value, dict) else None
    found = [found] if isinstance(found, str) else found
    return [text for text in found or () if isinstance(text, str) and is_filled(text)]


def _ours(choice: str) -> str:
    """A choice of our own configuration as data have it."""
    return "both_bad" if word(choice) in ("both are bad", "both bad") else choice


def task(stored: StoredPair) -> Row:
    """A pair as a task. Its sides are drawn by its number, and nothing tells who wrote what."""
    first = random.Random(f"side {stored.id}").choice("ab")
    texts = {"a": stored.pair.a.text, "b": stored.pair.b.text}
    return {
        "data": {
            "prompt": as_text(stored.pair.prompt),
            "answer1": texts[first],
            "answer2": texts["b" if first == "a" else "a"],
            "pair": str(stored.id),
        }
    }
