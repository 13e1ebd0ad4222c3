"""Conversation trees as OASST has them: one message a row, or a whole tree a row.

A message has its role and text, and for a reply the rank that people gave it among the replies to
the same message, 0 for the best. As a row it also has its id and that of the message that it
replies to; in a tree, its `replies`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_core.data.encoding import Message
from rlhf_core.data.forms.examples import near, of_both
from rlhf_core.data.forms.fields import is_filled
from rlhf_core.data.forms.messages import messages
from rlhf_core.data.forms.rows import BadRowError, SourceRow
from rlhf_core.data.sources import Row
from rlhf_core.data.vote_details import UnlikeError

_DEEPEST = 200  # messages of a dialogue


def node(row: SourceRow) -> list[Row]:
    """One message, for `compare_replies` and `best_replies`."""
    if not row.label("id"):
        raise BadRowError(row.name("id"), "missing", "is missing, and a tree needs it")
    try:
        message = _message(row.get("role"), row.get("text"))
    except UnlikeError as error:
        field = row.name("role" if "has the role" in str(error) else "text")
        raise BadRowError(field, error.category, str(error)) from error
    rank = row.number("rank", row.get("rank")) if is_filled(row.get("rank")) else None
    known = {"message": message, "rank": rank, **_known(row)}
    return [{"parent": row.label("parent"), **known}]


def tree(row: SourceRow) -> list[Row]:
    """The messages of a whole tree, each named after its place: "-2-1" is the first reply to the
    second reply to the root. For `compare_replies` and `best_replies`."""
    nodes: list[Row] = []
    known, root, name = _known(row), row.name("tree"), row.identity()
    waiting: list[tuple[str, str, Any]] = [("", "", row.get("tree"))]
    while waiting:
        place, parent, found = waiting.pop()
        where = f"the reply {place} " if place else ""
        if not isinstance(found, dict):
            raise BadRowError(root, "wrong type", f"{where}is not an object with role and text")
        try:
            message = _message(found.get("role"), found.get("text"))
        except UnlikeError as error:
            raise BadRowError(root, error.category, f"{where}{error}") from error
        rank = found.get("rank")
        level = row.number("tree", rank, f"the rank of {where}") if is_filled(rank) else None
        ids = {"id": name + place, "parent": parent}
        nodes.append({**ids, "message": message, "rank": level, **known})
        replies = found.get("replies") or []
        if not isinstance(replies, list):
            raise BadRowError(root, "wrong type", f"{where}has replies that are not a list")
        waiting += [(f"{place}-{n}", name + place, reply) for n, reply in enumerate(replies, 1)][
            ::-1
        ]
    return nodes


def _message(role: Any, text: Any) -> Message:
    try:
        [message] = messages([{"role": role, "content": text}])
    except UnlikeError as error:
        raise UnlikeError(error.category, str(error).removeprefix("message 1 ")) from error
    return message


def _known(row: SourceRow) -> Row:
    source = row.source() if row.kind == "preferences" else ""
    return {"source": source, "worded": row.worded}


def compare_replies(nodes: list[Row]) -> tuple[list[Row], Mapping[str, int]]:
    """Every two ranked replies of the assistant to one message, if they are `near` in rank; the
    lower rank wins."""
    pairs: list[Row] = []
    left = Counter[str]()
    for context, replies in _replies(nodes, left):
        ranked = sorted((r for r in replies if r["rank"] is not None), key=lambda r: r["rank"])
        if len(ranked) < 2:
            left["no other ranked reply to the message"] += len(replies)
            continue
        left["replies without a rank"] += len(replies) - len(ranked)
        pairs += [
            {
                **{"id": f"{one['id']}+{other['id']}", "ballot": 0, "prompt": context},
                "response_a": one["message"]["content"],
                "response_b": other["message"]["content"],
                "vote": "tie" if one["rank"] == other["rank"] else "a",
                **{"shown_first": "", "annotator": "", "gold": False, "margin": 0.0, "time": ""},
                "source": one["source"],
                **of_both(one, other),
            }
            for one, other in near(ranked)
        ]
    return pairs, +left


def best_replies(nodes: list[Row]) -> tuple[list[Row], Mapping[str, int]]:
    """The reply of the assistant with the lowest rank to each message, or the only reply."""
    best: list[Row] = []
    left = Counter[str]()
    for context, replies in _replies(nodes, left):
        ranked = [reply for reply in replies if reply["rank"] is not None]
        if not ranked and len(replies) > 1:
            left["several replies, none of them ranked"] += len(replies)
            continue
        left["replies that are not the best"] += len(replies) - 1
        reply = min(ranked or replies, key=lambda reply: reply["rank"] or 0.0)
        response = reply["message"]["content"]
        made = {"id": reply["id"], "ballot": 0, "prompt": context, "response": response}
        best.append({**made, **of_both(reply, reply)})
    return best, +left


def _replies(nodes: list[Row], left: Counter[str]) -> Iterator[tuple[list[Message], list[Row]]]:
    """Each dialogue that ends with a user's message, and the assistant's replies to it."""
    by_id = {node["id"]: node for node in nodes}
    replies: dict[str, list[Row]] = defaultdict(list)
    for node in nodes:
        if node["message"]["role"] == "assistant":
            replies[node["parent"]].append(node)
    for node in nodes:
        if node["message"]["role"] == "user" and node["id"] not in replies:
            left["messages without a reply"] += 1
    for parent, found in replies.items():
        context = _path(by_id, parent)
        if context and context[-1]["role"] == "user":
            yield found[0]["worded"](context), found
        else:
            left["replies without a way to the root of their tree"] += len(found)


def _path(by_id: Mapping[str, Row], name: str) -> list[Message]:
    """The messages from the root of a tree to one of its nodes; empty if one is missing, if they go
    round, or if there are too many."""
    found: list[Message] = []
    while name:
        if name not in by_id or len(found) == _DEEPEST:
            return []
        found.append(by_id[name]["message"])
        name = by_id[name]["parent"]
    return found[::-1]
