"""Answers with what they got: ratings, scores and rankings that are sums of votes.

The share that an answer won of its votes, ties counted by half, becomes the number of the form:

    ultrafeedback    overall_score = 1 + 9 * share
    helpsteer        helpfulness = 4 * share
    nectar           rank: 1 for the highest share, equal shares share a rank
    shp              score_A, score_B = votes for each answer; labels = 1 if A won

Votes come back as one for each pair that differs, so a form that sums says what it lost.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import pyarrow as pa

from rlhf_core.data.encoding import Prompt
from rlhf_core.data.sources import Row
from tasks.feedback.forms.stored import StoredPair
from tasks.feedback.forms.tools.naming import as_text, is_question
from tasks.feedback.store.records import Answer

_S, _F, _I = pa.string(), pa.float64(), pa.int64()
_RATED = pa.struct([("model", _S), ("response", _S), ("overall_score", _F)])
_RANKED = pa.struct([("answer", _S), ("model", _S), ("rank", _F)])
SCHEMAS: Mapping[str, pa.Schema] = {
    "ultrafeedback": pa.schema(
        [
            *(("source", _S), ("instruction", _S), ("models", pa.list_(_S))),
            ("completions", pa.list_(_RATED)),
        ]
    ),
    "helpsteer": pa.schema([("prompt", _S), ("response", _S), ("helpfulness", _F), ("model", _S)]),
    "nectar": pa.schema([("prompt", _S), ("answers", pa.list_(_RANKED)), ("source", pa.list_(_S))]),
    "shp": pa.schema(
        [
            *(("post_id", _S), ("history", _S), ("human_ref_A", _S), ("human_ref_B", _S)),
            *(("score_A", _I), ("score_B", _I), ("labels", _I), ("score_ratio", _F)),
        ]
    ),
}


def rows(
    form: str,
    pairs: Iterable[StoredPair],
    tally: Mapping[int, Sequence[int]],
    lost: Counter[str],
) -> Iterator[Row]:
    """The rows of a form.

    Args:
        pairs: those of a prompt together.
        tally: number of a pair -> votes for a, b, neither (tie) and neither (both bad).
        lost: counts what the form has no place for.
    """
    for _, group in groupby(pairs, key=lambda pair: pair.prompt_id):
        of_prompt = list(group)
        voted = [pair for pair in of_prompt if pair.id in tally]
        lost["unvoted"] += len(of_prompt) - len(voted)
        if not voted:
            continue
        lost["kept"] += sum(bool(pair.pair.kept) for pair in voted)
        lost["licence"] += bool(voted[0].pair.licence)
        lost["dialogue"] += form != "nectar" and not is_question(voted[0].prompt)
        if form == "shp":
            yield from _scores(voted, tally, lost)
            continue
        answers = _shares(voted, tally)
        lost["sampling"] += sum(bool(answer.sampling) for answer, _ in answers)
        lost["source"] += form == "helpsteer" and bool(voted[0].pair.source)
        yield from _FORMS[form](voted[0].pair.prompt, voted[0].pair.source, answers)


def _shares(
    pairs: Sequence[StoredPair], tally: Mapping[int, Sequence[int]]
) -> list[tuple[Answer, float]]:
    """Each answer to a prompt, and the share that it won of its votes."""
    answers: dict[int, Answer] = {}
    won: Counter[int] = Counter()
    cast: Counter[int] = Counter()
    for pair in pairs:
        answers |= {pair.a_id: pair.pair.a, pair.b_id: pair.pair.b}
        a, b, *neither = tally[pair.id]
        for answer, wins in ((pair.a_id, a), (pair.b_id, b)):
            won[answer] += 2 * wins + sum(neither)
            cast[answer] += 2 * (a + b + sum(neither))
    return [(answer, won[id_] / cast[id_]) for id_, answer in answers.items()]


def _ultrafeedback(
    prompt: Prompt, source: str, answers: Sequence[tuple[Answer, float]]
) -> Iterator[Row]:
    completions = [
        {"model": one.model, "response": one.text, "overall_score": round(1 + 9 * share, 4)}
        for one, share in answers
    ]
    models = [one.model for one, _ in answers]
    yield {"source": source, "instruction": as_text(prompt)} | {
        "models": models,
        "completions": completions,
    }


def _helpsteer(
    prompt: Prompt, source: str, answers: Sequence[tuple[Answer, float]]
) -> Iterator[Row]:
    for one, share in answers:
        level = round(4 * share, 4)
        yield {"prompt": as_text(prompt), "response": one.text, "helpfulness": level} | {
            "model": one.model
        }


def _nectar(prompt: Prompt, source: str, answers: Sequence[tuple[Answer, float]]) -> Iterator[Row]:
    levels = sorted({share for _, share in answers}, reverse=True)
    ranked = [
        {"answer": one.text, "model": one.model, "rank": float(levels.index(share) + 1)}
        for one, share in sorted(answers, key=lambda rated: -rated[1])
    ]
    yield {"prompt": _asked(prompt), "answers": ranked, "source": [source]}


def _asked(prompt: Prompt) -> str:
    """A prompt as Nectar has it: a dialogue with an open answer."""
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    speakers = {"user": "Human", "assistant": "Assistant"}
    turns = (f"\n\n{speakers.get(one['role'], 'Human')}: {one['content']}" for one in said)
    return "".join(turns) + "\n\nAssistant: "


def _scores(
    pairs: Sequence[StoredPair], tally: Mapping[int, Sequence[int]], lost: Counter[str]
) -> Iterator[Row]:
    for pair in pairs:
        a, b, *neither = tally[pair.id]
        lost["tie"] += neither[0]
        if a == b:
            lost["undecided"] += 1
            continue
        lost["model"] += bool(pair.pair.a.model or pair.pair.b.model)
        lost["sampling"] += bool(pair.pair.a.sampling or pair.pair.b.sampling)
        high, low = max(a, b), min(a, b)
        yield {
            **{"post_id": str(pair.prompt_id), "history": as_text(pair.pair.prompt)},
            **{"human_ref_A": pair.pair.a.text, "human_ref_B": pair.pair.b.text},
            **{"score_A": a, "score_B": b, "labels": int(a > b)},
            "score_ratio": high / max(low, 1),
        }


_FORMS = {"ultrafeedback": _ultrafeedback, "helpsteer": _helpsteer, "nectar": _nectar}
