"""A vote as chosen and rejected: with its prompt, or as two dialogues in HH-RLHF's text form."""

import re

from rlhf_core.data.forms.messages import turns, unpacked
from rlhf_core.data.sources import Row
from rlhf_core.data.vote_details import UnlikeError
from rlhf_core.settings.fields import GOLD
from tasks.feedback.forms.stored import StoredPair
from tasks.feedback.store.judgments import CastVote
from tasks.feedback.store.records import Answer

_SPEAKERS = {"user": "Human", "assistant": "Assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


def sides(stored: StoredPair, winner: str) -> tuple[Answer, Answer]:
    """The answer that won, and the other."""
    pair = stored.pair
    return (pair.a, pair.b) if winner == "a" else (pair.b, pair.a)


def pair_row(vote: CastVote, stored: StoredPair, winner: str, annotator: str) -> Row:
    """Prompt, chosen, rejected, and what may stand beside them."""
    chosen, rejected = sides(stored, winner)
    return {
        **{"prompt": vote.prompt, "chosen": chosen.text, "rejected": rejected.text},
        **{"annotator": annotator, "margin": max(vote.margin, 0.0)},
        "gold": bool(vote.gold) and annotator != GOLD,
        **{"time": vote.time, "source": vote.source, "licence": stored.pair.licence},
        **{"chosen_model": chosen.model, "rejected_model": rejected.model},
    }


def hh_rlhf(stored: StoredPair, winner: str) -> tuple[Row | None, str]:
    """Both dialogues, or None and what about the pair the form has no place for."""
    prompt = stored.pair.prompt
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if any(message["role"] == "system" for message in said):
        return None, "system"
    dialogues = []
    for answer in sides(stored, winner):
        whole = [*said, {"role": "assistant", "content": answer.text}]
        text = "".join(f"\n\n{_SPEAKERS[one['role']]}: {one['content']}" for one in whole)
        dialogues.append(text)
        if any(_TURN.search("\n\n" + one["content"].strip()) for one in whole):
            return None, "unlike"  # a turn within a turn
        try:
            read = turns(text)
        except UnlikeError:
            return None, "unlike"
        if [one["content"].strip() for one in whole] != [one["content"] for one in read]:
            return None, "unlike"
        if unpacked(text) != text:
            return None, "unlike"
    return {"chosen": dialogues[0], "rejected": dialogues[1]}, ""
