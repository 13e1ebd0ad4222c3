"""The forms of votes, ratings and rankings that are known, and which of them a file has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import yaml

from rlhf_core.data.forms.fields import listed
from rlhf_core.data.forms.published import PUBLISHED
from rlhf_core.data.sources import Row, SourceRows
from rlhf_core.errors import DataError
from rlhf_core.settings.fields import word

MARK = "rlhf-votes-1"  # the value of `format` in each row of our own form
_SAMPLE = 50  # rows that are looked at to tell a form


@dataclass(frozen=True)
class Form:
    """A form: how it is known, and which settings read it."""

    name: str  # as --form has it
    title: str
    columns: frozenset[str] = frozenset()  # that a file of it has
    fields: Mapping[str, str] = field(default_factory=dict)  # ours -> the file's
    votes: Mapping[str, str] = field(default_factory=dict)  # value, as `word` has it -> ours
    also: Mapping[str, str] = field(default_factory=dict)  # fields that not every file of it has
    writes: bool = False


_NAMES = {
    "HelpSteer 2": "helpsteer",
    "HelpSteer 3": "helpsteer3",
    "SHP": "shp",
    "KTO": "kto",
    "Chatbot Arena": "chatbot-arena",
    "OASST": "oasst",
    "OASST trees": "oasst-trees",
    "UltraFeedback with all completions": "ultrafeedback",
    "Orca pairs": "orca",
    "PKU-SafeRLHF": "pku-saferlhf",
    "OpenAI's summaries": "summaries",
    "WebGPT": "webgpt",
}
# Who voted and who answered, where `data.preferences` does not ask.
_MORE: Mapping[str, Mapping[str, str]] = {
    "chatbot-arena": {"annotator": "judge"},
    "summaries": {
        "annotator": "worker",
        "model_a": "summaries.0.policy",
        "model_b": "summaries.1.policy",
    },
}
_WRITTEN = {"ultrafeedback", "helpsteer", "shp"}


def _published() -> dict[str, Form]:
    found = {}
    for known in PUBLISHED:
        if known.kind != "preferences" or known.name not in _NAMES:
            continue
        name = _NAMES[known.name]
        settings: dict[str, Any] = yaml.safe_load("{" + known.settings + "}")
        votes = {word(value): ours for ours, value in settings.get("votes", {}).items()}
        found[name] = Form(
            *(name, known.name, known.columns, settings["fields"], votes),
            also=_MORE.get(name, {}),
            writes=name in _WRITTEN,
        )
    return found


FORMS: Mapping[str, Form] = {
    "votes": Form("votes", "raw votes", frozenset({"format"}), writes=True),
    "rows": Form("rows", "rows that data.preferences reads"),
    "pairs": Form(
        "pairs", "prompt, chosen, rejected", frozenset({"chosen", "rejected"}), writes=True
    ),
    "hh-rlhf": Form("hh-rlhf", "HH-RLHF", frozenset({"chosen", "rejected"}), writes=True),
    "compared-lists": Form(
        "compared-lists",
        "lists of answers with a vote for each pair",
        frozenset({"responses", "pair_order", "preferences"}),
    ),
    "nectar": Form("nectar", "Nectar", frozenset({"prompt", "answers"}), writes=True),
    **_published(),
    "label-studio": Form("label-studio", "Label Studio", writes=True),
    "argilla": Form("argilla", "Argilla", writes=True),
}
READ = tuple(FORMS)
WRITTEN = tuple(name for name, form in FORMS.items() if form.writes)


def form_named(name: str, names: Sequence[str]) -> Form:
    """The form of a name.

    Raises: DataError when it is none of `names`.
    """
    if name not in names:
        raise DataError(f"there is no form '{name}'; there are: {', '.join(names)}")
    return FORMS[name]


def form_of_file(source: SourceRows, wanted: str, mapped: Mapping[str, str]) -> Form:
    """The form of a file: the wanted one, or with `auto` the one that its columns show.

    Files with columns of ours, and those whose fields are mapped, are `rows`.

    Raises: DataError when it lacks a column of the wanted form.
    """
    rows = [row for _, row in islice(iter(source.rows), _SAMPLE)]
    columns = {name for row in rows for name in row}
    if wanted != "auto":
        form = form_named(wanted, ("auto", *READ))
        missing = sorted(form.columns - columns) if rows and not mapped else []
        if missing:
            raise DataError(
                f"{source.source} is no {form.title} file: it has no field "
                f"{', '.join(missing)}; its fields are: {listed(sorted(columns))}"
            )
        return form
    for name, test in (
        ("votes", is_ours),
        ("label-studio", is_label_studio),
        ("argilla", is_argilla),
    ):
        if rows and all(map(test, rows)):
            return FORMS[name]
    if FORMS["compared-lists"].columns <= columns:
        return FORMS["compared-lists"]
    if mapped:
        return FORMS["rows"]
    known = [form for form in _published().values() if form.columns <= columns]
    if known:
        return max(known, key=lambda form: len(form.columns))
    if {"chosen", "rejected"} <= columns:
        return FORMS["pairs" if "prompt" in columns else "hh-rlhf"]
    return FORMS["nectar" if {"prompt", "answers"} <= columns else "rows"]


def is_ours(row: Row) -> bool:
    """A row that an export has written."""
    return row.get("format") == MARK


def is_label_studio(row: Row) -> bool:
    """A task with its annotations, or an annotation of the small export."""
    if isinstance(row.get("data"), dict):
        return "annotations" in row or "completions" in row or set(row) <= {"id", "data", "meta"}
    return {"annotation_id", "annotator", "lead_time"} <= set(row)


def is_argilla(row: Row) -> bool:
    """A record, as the SDK or the hub has it."""
    if isinstance(row.get("fields"), dict):
        return "responses" in row or "suggestions" in row
    if any(name.endswith(".responses.users") for name in row):
        return True
    return any(f"{name}-suggestion" in row for name in row)
