"""Published data sets by their columns, each with the settings that read it.

A file of such a set that is read without its settings is refused, and the error names them.
docs/data.md lists the same settings.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rlhf_core.settings.fields import TableKind


class Published(NamedTuple):
    """A data set, or an export of a tool."""

    name: str
    kind: TableKind
    columns: frozenset[str]  # by which it is known
    settings: str  # beside `path`, in YAML


def _of(name: str, kind: TableKind, columns: str, settings: str) -> Published:
    return Published(name, kind, frozenset(columns.split()), settings)


PUBLISHED: tuple[Published, ...] = (
    _of(
        "Alpaca",
        "demonstrations",
        "instruction input output",
        'fields: {prompt: "{instruction}\\n{input}", response: output}',
    ),
    _of("ShareGPT", "demonstrations", "conversations", "fields: {messages: conversations}"),
    _of(
        "TRL prompt-completion",
        "demonstrations",
        "prompt completion",
        "fields: {response: completion}",
    ),
    _of(
        "OASST",
        "demonstrations",
        "message_id parent_id text role",
        "fields: {id: message_id, parent: parent_id}",
    ),
    *(
        _of(
            "OASST trees",
            kind,
            "message_tree_id prompt",
            "fields: {id: message_tree_id, tree: prompt}",
        )
        for kind in ("demonstrations", "preferences")
    ),
    _of(
        "HelpSteer 2",
        "preferences",
        "prompt response helpfulness",
        "fields: {score: helpfulness}",
    ),
    _of(
        "HelpSteer 3",
        "preferences",
        "context response1 response2 overall_preference",
        "fields: {prompt: context, response_a: response1, response_b: response2, "
        "score_b: overall_preference}",
    ),
    _of(
        "SHP",
        "preferences",
        "history human_ref_A human_ref_B labels",
        "fields: {prompt: history, response_a: human_ref_A, response_b: human_ref_B, "
        "vote: labels}, votes: {a: 1, b: 0}",
    ),
    _of(
        "KTO",
        "preferences",
        "prompt completion label",
        "fields: {response: completion, score: label}",
    ),
    _of(
        "Chatbot Arena",
        "preferences",
        "conversation_a conversation_b winner",
        "fields: {response_a: conversation_a, response_b: conversation_b, vote: winner}",
    ),
    _of(
        "OASST",
        "preferences",
        "message_id parent_id text role",
        "fields: {id: message_id, parent: parent_id}",
    ),
    _of(
        "UltraFeedback with all completions",
        "preferences",
        "instruction completions",
        "fields: {prompt: instruction, answers: completions, answer: response, "
        "score: overall_score}",
    ),
    _of(
        "Orca pairs",
        "preferences",
        "question chosen rejected",
        "fields: {prompt: question}",
    ),
    _of(
        "PKU-SafeRLHF",
        "preferences",
        "prompt response_0 response_1 better_response_id",
        "fields: {response_a: response_0, response_b: response_1, vote: better_response_id}, "
        "votes: {a: 0, b: 1}",
    ),
    _of(
        "OpenAI's summaries",
        "preferences",
        "info summaries choice",
        "fields: {prompt: info.post, response_a: summaries.0.text, response_b: summaries.1.text, "
        "vote: choice}, votes: {a: 0, b: 1}",
    ),
    _of(
        "WebGPT",
        "preferences",
        "question answer_0 answer_1 score_0 score_1",
        "fields: {prompt: question.full_text, response_a: answer_0, response_b: answer_1, "
        "score_a: score_0, score_b: score_1}",
    ),
    _of(
        "Label Studio",
        "preferences",
        "data annotations",
        "fields: {prompt: data.prompt, response_a: data.answer1, response_b: data.answer2, "
        "votes: annotations, vote: result.0.value.selected, annotator: completed_by}, "
        "votes: {a: left, b: right}",
    ),
    _of(
        "Argilla",
        "preferences",
        "fields responses",
        "fields: {prompt: fields.instruction, response_a: fields.response1, "
        "response_b: fields.response2, votes: responses.preference, vote: value, "
        "annotator: user_id}",
    ),
)


def hint(columns: Sequence[str], kind: TableKind) -> str:
    """The settings that read a set with these columns, as another table if not as this one; empty
    if none is known."""
    known = [p for p in PUBLISHED if p.columns <= set(columns)]
    if not known:
        return ""
    found = max(known, key=lambda p: (p.kind == kind, len(p.columns)))
    return (
        f"they look like those of {found.name}, which data.{found.kind} reads by {{path: ..., "
        f"{found.settings}}}"
    )
