"""Prompts, responses and pairs: put in once by their content, and found again."""

import hashlib
import json
from collections.abc import Iterable, Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from rlhf_core.data.prepared import canonical_prompt
from tasks.feedback.store.clock import now
from tasks.feedback.store.database import Database
from tasks.feedback.store.records import AddedPair, Answer, NewPair
from tasks.feedback.store.tables import Batch, BatchPair, GoldAnswer, Pair, Prompt, Response

CHUNK = 500  # pairs in one transaction


def digest(*parts: object) -> str:
    """The SHA-256 of some values, as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Content:
    """The prompts, responses and pairs of a project."""

    def __init__(self, database: Database, project_id: int) -> None:
        self._database = database
        self._project = project_id

    def add(self, pairs: Iterable[NewPair], *, batch: int | None = None) -> list[AddedPair]:
        """Put pairs in, or find them; in the order given.

        A pair is the same if it has the same prompt and the same two texts by the same models, in
        either order. One that is there already is asked about again if more votes are wanted.
        """
        added: list[AddedPair] = []
        chunk: list[NewPair] = []
        for pair in pairs:
            chunk.append(pair)
            if len(chunk) == CHUNK:
                added += self._add(chunk, batch)
                chunk = []
        return added + (self._add(chunk, batch) if chunk else [])

    def _add(self, pairs: Sequence[NewPair], batch: int | None) -> list[AddedPair]:
        with self._database.writing() as session:
            return [self._add_one(session, pair, batch) for pair in pairs]

    def _add_one(self, session: Session, pair: NewPair, batch: int | None) -> AddedPair:
        prompt = self._prompt(session, pair)
        a, b = self._response(session, prompt, pair.a), self._response(session, prompt, pair.b)
        key = digest(*sorted([a.digest, b.digest]), prompt.digest)
        found = session.scalar(select(Pair).filter_by(project_id=self._project, digest=key))
        new = found is None
        if found is None:
            found = Pair(
                project_id=self._project,
                prompt_id=prompt.id,
                response_a_id=a.id,
                response_b_id=b.id,
                digest=key,
                kept=dict(pair.kept),
                state="done",
                priority=pair.priority,
                wanted=0,
                taken=0,
                votes=0,
                created_at=now(),
            )
            session.add(found)
            session.flush()
        swapped = found.response_a_id != a.id
        if pair.wanted > found.wanted:
            found.wanted, found.priority = pair.wanted, min(pair.priority, found.priority)
        found.state = "open" if found.votes < found.wanted else "done"
        if pair.gold is not None and session.get(GoldAnswer, found.id) is None:
            side = {"a": "b", "b": "a"}.get(pair.gold, pair.gold) if swapped else pair.gold
            session.add(GoldAnswer(pair_id=found.id, vote=side, at=now()))
        if batch is not None and session.get(BatchPair, (batch, found.id)) is None:
            session.add(BatchPair(batch_id=batch, pair_id=found.id))
        return AddedPair(found.id, new, swapped)

    def _prompt(self, session: Session, pair: NewPair) -> Prompt:
        key = digest(canonical_prompt(pair.prompt))
        found = session.scalar(select(Prompt).filter_by(project_id=self._project, digest=key))
        if found is None:
            found = Prompt(
                project_id=self._project,
                digest=key,
                content=pair.prompt,
                source=pair.source,
                licence=pair.licence,
            )
            session.add(found)
            session.flush()
        return found

    def _response(self, session: Session, prompt: Prompt, answer: Answer) -> Response:
        key = digest(answer.text, answer.model)
        found = session.scalar(select(Response).filter_by(prompt_id=prompt.id, digest=key))
        if found is None:
            found = Response(
                prompt_id=prompt.id,
                digest=key,
                text=answer.text,
                model=answer.model,
                sampling=dict(answer.sampling),
                source=answer.source,
                licence=answer.licence,
            )
            session.add(found)
            session.flush()
        return found

    def batch(self, name: str, kind: str, details: dict[str, object] | None = None) -> int:
        """The batch of this name, made if there is none."""
        with self._database.writing() as session:
            found = session.scalar(select(Batch).filter_by(project_id=self._project, name=name))
            if found is None:
                found = Batch(
                    project_id=self._project,
                    name=name,
                    kind=kind,
                    details=details or {},
                    created_at=now(),
                )
                session.add(found)
                session.flush()
            return found.id

    def withdraw(self, batch: int) -> None:
        """Ask nobody about the pairs of a batch any more; votes stay."""
        with self._database.writing() as session:
            of_batch = select(BatchPair.pair_id).where(BatchPair.batch_id == batch)
            session.execute(
                update(Pair)
                .where(Pair.id.in_(of_batch), Pair.state == "open")
                .values(state="withdrawn")
            )
