"""Argilla: records of both generations in, records and settings of the present one out.

A record has fields (prompt, answers) and what each user said to each question: a label, a rating,
or a ranking, with a status (submitted, discarded, draft). It is written in four ways:

    responses: {question: [{value, user_id}]}            2.x, `records.to_json`
    question.responses, question.responses.users, ...    2.x, flat, as on the hub
    responses: [{user_id, status, values: {question: {value}}}]   1.x, and the server's API
    question: [{user_id, value, status}], question-suggestion     1.x, as on the hub
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from rlhf_core.data.forms.fields import is_filled
from rlhf_core.data.sources import Row, SourceRows
from rlhf_core.errors import DataError
from tasks.feedback.forms.options import ImportOptions
from tasks.feedback.forms.stored import StoredPair
from tasks.feedback.forms.tools.naming import Adapted, answers_in, as_text, person, places

_DRAFTS, _SILENT = "drafts of responses", "responses without an answer to the question"
_VOTES = ("preference", "choice", "vote", "winner", "better", "comparison", "ranking")
_BESIDE = ("id", "external_id", "metadata", "status", "_server_id", "vectors", "score")
NOTE = "note"
LABELS = {"a": "First", "b": "Second", "tie": "Tie", "both_bad": "Both are bad"}


class _Said(NamedTuple):
    """What a user said about a record."""

    user: str
    status: str
    values: dict[str, Any]


def adapted(source: SourceRows, options: ImportOptions) -> Adapted:
    """An export as rows with a list of votes, or of ranked or rated answers.

    Raises: DataError when it does not tell what is compared, or which question the vote is.
    """
    keys: dict[str, None] = {}
    values: dict[str, list[Any]] = defaultdict(list)
    for _, row in source.rows:
        keys |= dict.fromkeys(_fields(row))
        for said in _responses(row):
            for question, value in said.values.items():
                values[question].append(value)
    answers = answers_in(keys)
    question, ratings = options.fields.get("vote", ""), {}
    if not question:
        ratings = _ratings(answers, values)
    if not question and not ratings:
        question = _question(source, values)
    left_out = Counter[str]()
    for _, row in source.rows:
        for said in _responses(row):
            left_out[_DRAFTS] += said.status == "draft"
            silent = question not in said.values if question else not said.values
            left_out[_SILENT] += said.status not in ("draft", "discarded") and silent
    ranked = any(_ranks(value) for value in values[question])
    if ratings or (ranked and len(answers) > 2):
        level = "score" if ratings else "rank"
        wanted = {"prompt": "", **dict(options.fields)}
        both = ["response_a", "response_b"]
        names = wanted
        if not wanted["prompt"]:
            names = places(source, _mapped(options, both), list(keys), "fields.", answers)
        names = {field: name for field, name in names.items() if field not in (*both, "vote")}
        change = _levels(answers, question, ratings, level)
    else:
        names = places(source, options, list(keys), "fields.", answers)
        names.pop("vote", None)
        two = [names[side].removeprefix("fields.") for side in ("response_a", "response_b")]
        change = _votes(two, question)
    names.setdefault("pair", "metadata.pair")
    return Adapted(source.mapped(change), names, +left_out)


def _mapped(options: ImportOptions, fields: list[str]) -> ImportOptions:
    """Options in which some fields need not be looked for."""
    return ImportOptions(fields={**options.fields, **dict.fromkeys(fields, "fields")})


def _fields(row: Row) -> Row:
    """The texts of a record."""
    if isinstance(row.get("fields"), dict):
        return dict(row["fields"])
    questions = {name.removesuffix("-suggestion") for name in row if name.endswith("-suggestion")}
    return {
        name: value
        for name, value in row.items()
        if name not in questions
        and name not in _BESIDE
        and "-suggestion" not in name
        and ".responses" not in name
        and ".suggestion" not in name
    }


def _responses(row: Row) -> list[_Said]:
    """What each user said, from any of the four ways."""
    found: dict[tuple[str, str, int], dict[str, Any]] = defaultdict(dict)

    def of(place: int, user: Any, status: Any) -> dict[str, Any]:
        """What a user has said so far; one without a name is the one at this place."""
        name = "" if user in ("None", "nan") else person(user)
        state = str(status) if is_filled(status) else "submitted"
        return found[name, state, 0 if name else place]

    responses = row.get("responses")
    if isinstance(responses, dict):
        for question, answers in responses.items():
            for place, one in enumerate(_objects(answers)):
                of(place, one.get("user_id"), one.get("status"))[question] = one.get("value")
    elif isinstance(responses, list):
        for place, one in enumerate(_objects(responses)):
            said = of(place, one.get("user_id"), one.get("status"))
            values = one.get("values")
            for question, value in values.items() if isinstance(values, dict) else ():
                said[question] = value.get("value") if isinstance(value, dict) else value
    for name in row:
        if name.endswith(".responses") and isinstance(row[name], list):
            users, states = (row.get(f"{name}.{what}") or () for what in ("users", "status"))
            for place, value in enumerate(row[name]):
                user = users[place] if place < len(users) else None
                state = states[place] if place < len(states) else None
                of(place, user, state)[name.removesuffix(".responses")] = value
        elif f"{name}-suggestion" in row:
            for place, one in enumerate(_objects(row[name])):
                of(place, one.get("user_id"), one.get("status"))[name] = one.get("value")
    return [_Said(user, state, values) for (user, state, _), values in found.items()]


def _objects(value: Any) -> list[Row]:
    """A list of objects, also as the hub has it: an object of lists."""
    if isinstance(value, dict):
        lists = {name: part for name, part in value.items() if isinstance(part, list)}
        length = min(map(len, lists.values()), default=0)
        return [{name: part[n] for name, part in lists.items()} for n in range(length)]
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _question(source: SourceRows, values: dict[str, list[Any]]) -> str:
    """The question about the better answer: the only one, or the only one that is called so."""
    if not values:
        return _VOTES[0]
    asked = [name for name in values if name in _VOTES]
    ranked = [name for name, given in values.items() if any(map(_ranks, given))]
    for some in (asked, ranked, list(values)):
        if len(some) == 1:
            return some[0]
    raise DataError(
        f"{source.source} has several questions ({', '.join(sorted(values))}); name the one about "
        "the better answer as --fields vote=NAME"
    )


def _ratings(answers: list[str], values: dict[str, list[Any]]) -> dict[str, str]:
    """The question that rates each answer, if there is one for each."""
    found = {}
    for answer in answers:
        rated = [name for name in values if answer in name and name != answer]
        if len(rated) != 1:
            return {}
        found[answer] = rated[0]
    return found


def _ranks(value: Any) -> dict[str, float]:
    """The rank of each field of a ranking; empty if a value is none."""
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return {name: float(place) for place, name in enumerate(value, 1)}
    return {
        one["value"]: float(one["rank"])
        for one in _objects(value)
        if isinstance(one.get("value"), str) and isinstance(one.get("rank"), int | float)
    }


def _votes(two: list[str], question: str) -> Any:
    def change(number: int, row: Row) -> Iterator[tuple[int, Row]]:
        votes, record = [], _record(row)
        # of a file of ours it is known which answer comes first
        shown = {"shown_first": "a"} if is_filled(record["metadata"].get("pair")) else {}
        for said in _responses(row):
            vote = said.values.get(question)
            ranks = _ranks(vote)
            if said.status == "discarded":
                vote = "skip"
            elif ranks and set(two) <= ranks.keys():
                lead = ranks[two[1]] - ranks[two[0]]
                vote = "a" if lead > 0 else "b" if lead < 0 else "tie"
            if said.status == "draft" or not is_filled(vote):
                continue
            note = said.values.get(NOTE) if question != NOTE else ""
            votes.append({"annotator": said.user, "vote": _ours(vote), "note": note, **shown})
        yield number, {**record, "votes": votes}

    return change


def _levels(answers: list[str], question: str, ratings: dict[str, str], level: str) -> Any:
    def change(number: int, row: Row) -> Iterator[tuple[int, Row]]:
        record, texts = _record(row), _fields(row)
        for said in _responses(row):
            if said.status in ("draft", "discarded"):
                continue
            given = (
                {name: said.values.get(asked) for name, asked in ratings.items()}
                if ratings
                else _ranks(said.values.get(question))
            )
            listed = [
                {"answer": texts.get(name), level: given[name], "field": name}
                for name in answers
                if is_filled(given.get(name)) and is_filled(texts.get(name))
            ]
            yield number, {**record, "answers": listed, "annotator": said.user}

    return change


def _record(row: Row) -> Row:
    metadata = row.get("metadata")
    own = {"fields": _fields(row), "metadata": metadata if isinstance(metadata, dict) else {}}
    return {"id": row.get("id") or row.get("external_id"), **own}


def _ours(vote: Any) -> Any:
    """A label of our own settings as data have it."""
    return {"First": "a", "Second": "b", "Both are bad": "both_bad"}.get(str(vote), vote)


def record(stored: StoredPair) -> Row:
    """A pair as a record. Its sides are drawn by its number, and nothing tells who wrote what."""
    first = random.Random(f"side {stored.id}").choice("ab")
    texts = {"a": stored.pair.a.text, "b": stored.pair.b.text}
    fields = {
        "prompt": as_text(stored.pair.prompt),
        "response1": texts[first],
        "response2": texts["b" if first == "a" else "a"],
    }
    return {
        **{"id": f"pair-{stored.id}", "fields": fields, "metadata": {"pair": str(stored.id)}},
        **{"suggestions": {}, "responses": {}, "vectors": {}},
    }


def settings(question: str, guidelines: str) -> Row:
    """The settings of a data set for such records, as `rg.Settings.from_json` reads them."""
    fields = [
        {
            "name": name,
            "title": title,
            "required": True,
            "settings": {"type": "text", "use_markdown": True},
        }
        for name, title in (
            ("prompt", "Prompt"),
            ("response1", "First answer"),
            ("response2", "Second answer"),
        )
    ]
    options = [{"value": text, "text": text, "description": None} for text in LABELS.values()]
    label = {"type": "label_selection", "options": options, "visible_options": None}
    return {
        "guidelines": guidelines or None,
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
        "fields": fields,
        "questions": [
            {
                "name": "preference",
                "title": question,
                "description": None,
                "required": True,
                "settings": label,
            },
            {
                "name": NOTE,
                "title": "Note",
                "description": None,
                "required": False,
                "settings": {"type": "text", "use_markdown": False},
            },
        ],
        "metadata": [],
        "vectors": [],
    }
