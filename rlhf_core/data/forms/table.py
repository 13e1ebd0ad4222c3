"""The forms that a row of a source may have, and which of them a source has."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from rlhf_core.data.forms import examples, trees
from rlhf_core.data.forms.fields import find, has, listed, shown, unread_texts
from rlhf_core.data.forms.messages import begins_a_dialogue, unpacked
from rlhf_core.data.forms.published import hint
from rlhf_core.data.forms.rows import Reading, SourceRow
from rlhf_core.data.sources import Row, SourceRows
from rlhf_core.data.vote_details import UnlikeError
from rlhf_core.errors import DataError
from rlhf_core.settings.fields import (
    FIELDS,
    OF_A_VOTE,
    OF_ANY_ROW,
    TableKind,
    is_template,
    names_in,
)

Convert: TypeAlias = Callable[[SourceRow], list[Row]]
Join: TypeAlias = Callable[[list[Row]], tuple[list[Row], Mapping[str, int]]]


@dataclass(frozen=True)
class Form:
    """What a row of a source may look like, and what becomes of it.

    `convert` makes examples of a row. Where examples need several rows, `join` makes them of what
    `convert` returned for all, and counts what is left over.
    """

    needs: frozenset[str]
    reads: frozenset[str]  # beside `needs`
    convert: Convert
    join: Join | None = None
    sided: bool = True  # the answers have sides, of which one was shown first
    scored: bool = False  # scores or ranks decide
    implicit: bool = False  # the prompt is what two texts share

    @classmethod
    def of(cls, needs: str, reads: str, convert: Convert, **more: Any) -> "Form":
        """A form whose fields are given as words."""
        return cls(frozenset(needs.split()), frozenset(reads.split()), convert, **more)


_CAST = "id prompt system annotator gold time source"
_TREE = "id parent role text"
FORMS: Mapping[TableKind, tuple[Form, ...]] = {
    "demonstrations": (
        Form.of("prompt response", "id system", partial(examples.demonstration, field="response")),
        Form.of("messages", "id prompt system", partial(examples.demonstration, field="messages")),
        Form.of(_TREE, "rank", trees.node, join=trees.best_replies),
        Form.of("tree", "id", trees.tree, join=trees.best_replies),
    ),
    "preferences": (
        Form.of("chosen rejected", f"{_CAST} margin", examples.chosen_pair, sided=False),
        *(
            Form.of(
                f"response_a response_b {ballot}",
                f"{_CAST} margin shown_first {'vote' if ballot == 'votes' else ''}",
                partial(examples.voted_pair, field=ballot),
            )
            for ballot in ("votes", "vote", "preference")
        ),
        *(
            Form.of(
                f"response_a response_b {' '.join(scores)}",
                f"{_CAST} margin shown_first",
                partial(examples.scored_pair, fields=scores),
                scored=True,
            )
            for scores in (("score_a", "score_b"), ("score_a",), ("score_b",))
        ),
        *(
            Form.of(
                f"prompt answers {level}",
                f"{_CAST} answer",
                partial(examples.answers_compared, level=level),
                sided=False,
                scored=True,
            )
            for level in ("rank", "score")
        ),
        Form.of(
            "response score",
            _CAST,
            examples.rated,
            join=examples.compare_rated,
            sided=False,
            scored=True,
        ),
        Form.of(_TREE, "rank source", trees.node, join=trees.compare_replies, sided=False),
        Form.of("tree", "id source", trees.tree, join=trees.compare_replies, sided=False),
    ),
    "prompts": (Form.of("prompt", "id system", examples.prompt_alone),),
}
_NEEDED: Mapping[TableKind, str] = {
    "demonstrations": "'prompt' and 'response', or 'messages'",
    "preferences": "'chosen' and 'rejected' (with 'prompt', or as whole dialogues), or 'prompt', "
    "'response_a', 'response_b' and 'votes' (or 'vote')",
    "prompts": "'prompt'",
}
# Fields that may also stand in the objects of a list.
_IN_LISTS: Mapping[str, tuple[str, ...]] = {
    "votes": ("annotator", "vote", *OF_A_VOTE),
    "answers": ("answer", "rank", "score"),
}


def form_of(
    source: SourceRows, kind: TableKind, names: Mapping[str, str], reading: Reading
) -> Form:
    """The form of a source: the first whose fields are there, after those whose fields are mapped.

    Raises: DataError when there is none, or when a mapped field is not there or has no meaning.
    """
    columns = source.columns()
    if not columns:  # no row could be read: the faults report it
        return FORMS[kind][0]
    top = set(columns)
    here = {f for f in FIELDS[kind] if names.get(f, f) in top or _is_deeper(source, names, f)}
    for field, name in names.items():
        missing = [place for place in names_in(name) if not in_source(source, place)]
        if field not in here or missing:
            raise DataError(
                f"{source.source} has no field {shown(missing[0] if missing else name)}, which "
                f"data.{kind}.fields maps to '{field}'; its fields are: {listed(columns)}"
            )
    forms = [form for form in FORMS[kind] if form.needs <= here]
    if not forms:
        remedy = hint(columns, kind) or f"map the right ones in data.{kind}.fields"
        raise DataError(
            f"{source.source} has no {kind}: they need {_NEEDED[kind]}, but its fields are: "
            f"{listed(columns)}; {remedy}"
        )
    form = max(forms, key=lambda form: len(form.needs & names.keys()))
    _require_meaning(source, kind, names, reading, form)
    _require_kept(source, kind, reading, form)
    alone = form.needs == {"chosen", "rejected"} and "prompt" not in here
    if alone and _begin_with_prompts(source, names):
        _require_no_prompt_elsewhere(source, kind, names, form)
        return replace(form, convert=examples.implicit_pair, implicit=True)
    return form


def _require_meaning(
    source: SourceRows, kind: TableKind, names: Mapping[str, str], reading: Reading, form: Form
) -> None:
    if "shown_first" in names and not form.sided:
        raise DataError(
            f"data.{kind}.fields names '{names['shown_first']}' of {source.source} as the answer "
            "that was shown first, but chosen and rejected have no sides; use 'response_a', "
            "'response_b' and 'vote', or remove shown_first from the fields"
        )
    read_by = f"{source.source} is read by {' and '.join(sorted(form.needs))}"
    read = form.needs | form.reads | set(OF_ANY_ROW)
    unused = [field for field in names if field not in read]
    if unused:
        raise DataError(
            f"data.{kind}.fields maps '{unused[0]}', but {read_by}, beside which it has no "
            "meaning; remove one of them from the fields"
        )
    if reading.votes and not form.needs & {"votes", "vote", "preference"}:
        raise DataError(
            f"data.{kind}.votes says what values of votes mean, but {read_by} and has no votes; "
            "remove it, or map 'vote'"
        )
    if reading.score_margin and not form.scored:
        raise DataError(
            f"data.{kind}.score_margin is set, but {read_by} and has no scores; remove it, or map "
            "'margin'"
        )


def _require_kept(source: SourceRows, kind: TableKind, reading: Reading, form: Form) -> None:
    if not reading.keep:
        return
    if form.join:
        raise DataError(
            f"data.{kind}.keep names columns of a vote, but {source.source} has an answer in each "
            "row, so that a vote is made of two rows; remove keep, or write a row for each vote"
        )
    if missing := [place for place in reading.keep if not in_source(source, place)]:
        raise DataError(
            f"{source.source} has no field {shown(missing[0])}, which data.{kind}.keep names; its "
            f"fields are: {listed(source.columns())}"
        )


def _require_no_prompt_elsewhere(
    source: SourceRows, kind: TableKind, names: Mapping[str, str], form: Form
) -> None:
    others = list(unread_texts(source, [names.get(f, f) for f in form.needs | form.reads]))
    if not others:
        return
    remedy = hint(source.columns(), kind) or f"map it in data.{kind}.fields"
    raise DataError(
        f"{source.source} has no field 'prompt', and its chosen and rejected are no dialogues, so "
        f"the prompt may be one of: {listed(others)}; {remedy}, or name in data.{kind}.ignore what "
        "is no prompt"
    )


def in_source(source: SourceRows, place: str) -> bool:
    """Whether any row of a source has a column or a dotted path."""
    return any(has(row, place) for _, row in source.rows)


def is_present(source: SourceRows, names: Mapping[str, str], field: str) -> bool:
    """Whether a source has a column, a path or a template for a field of ours."""
    name = names.get(field, field)
    return in_source(source, name) or (field in names and is_template(name))


def _is_deeper(source: SourceRows, names: Mapping[str, str], field: str) -> bool:
    """Whether a field is at a path or a template, or in the objects of a list of the rows."""
    name = names.get(field, field)
    if field in names and is_present(source, names, field):
        return True
    lists = [beside for beside, inner in _IN_LISTS.items() if field in inner]
    return any(has(entry, name) for beside in lists for _, entry in entries(source, names, beside))


def entries(source: SourceRows, names: Mapping[str, str], field: str) -> Iterator[tuple[int, Row]]:
    """The objects in the lists of a field, each with its row number."""
    place = names.get(field, field)
    if "." not in place and place not in source.columns():
        return
    for number, row in source.rows:
        found = find(row, place)
        for entry in found if isinstance(found, list) else ():
            if isinstance(entry, dict):
                yield number, entry


def _begin_with_prompts(source: SourceRows, names: Mapping[str, str]) -> bool:
    """Whether chosen and rejected are texts that are no dialogues, in all rows."""
    places = [names.get(field, field) for field in ("chosen", "rejected")]
    return not any(_is_dialogue(find(row, place)) for _, row in source.rows for place in places)


def _is_dialogue(value: Any) -> bool:
    try:
        return isinstance(unpacked(value), list) or begins_a_dialogue(value)
    except UnlikeError:
        return True
