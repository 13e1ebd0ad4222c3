"""The judge who is people: pairs go into the queue, and the verdicts are what most of them say."""

import logging
from collections.abc import Sequence

from rlhf_core.data.prepared import canonical_prompt
from rlhf_core.errors import VerdictsPendingError
from rlhf_core.judges.judge import Pair, Verdict
from rlhf_core.settings.judge import PEOPLE, PeopleConfig
from tasks.feedback.asking import batches
from tasks.feedback.asking.votes import opened, patiently
from tasks.feedback.store.content import EXCHANGED, digest
from tasks.feedback.store.records import Answer, NewPair
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import JUDGE
from tasks.settings import Settings

log = logging.getLogger(__name__)
EQUAL = Verdict("tie", "the answers are equal")


class PeopleJudge:
    """Asks the annotators of a project.

    Each time it is asked about pairs that it knows nothing of is a round, which is a batch of the
    store. The rounds of a stage are the same whenever it is called again with the same answers, so
    they are found by number.

    Args:
        stage: begins the names of the batches; the same for the same stage with the same inputs.
        source: written to the answers, for people who look into the store.
    """

    name = PEOPLE

    def __init__(
        self, config: PeopleConfig, settings: Settings, *, project: str, stage: str, source: str
    ) -> None:
        self._config, self._settings = config, settings
        self._project = config.project or project
        self._stage, self._source = stage, source
        self._rounds = 0
        self._said: dict[str, Verdict] = {}

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each pair.

        Raises: VerdictsPendingError until enough people have answered; StoreError.
        """
        self.ahead(pairs)
        return [EQUAL if pair.a == pair.b else self._said[_key(pair)] for pair in pairs]

    def ahead(self, pairs: Sequence[Pair]) -> None:
        """Ask about pairs, the first ones first."""
        unknown = {_key(p): p for p in pairs if p.a != p.b and _key(p) not in self._said}
        if unknown:
            self._rounds += 1
            self._said |= patiently(lambda: self._round(unknown), self._settings)

    def _round(self, asked: dict[str, Pair]) -> dict[str, Verdict]:
        name = f"{self._stage}-{self._rounds}"
        with opened(self._settings, make=True) as store:
            project = store.project(self._project, make=True)
            batch = project.content.batch(name, JUDGE, {"people": {}, "source": self._source})
            known = batches.details(project.database, batch)
            if (kept := known.get("verdicts")) is not None and asked.keys() <= kept.keys():
                return {key: Verdict(**kept[key]) for key in asked}
            people = {"people": self._config.model_dump(mode="json")}
            batches.keep(project, batch, people)
            ids = self._queue(project, batch, asked)
            stand = batches.stand(project, batch)
            if not stand.complete:
                raise VerdictsPendingError(
                    stand.waiting, stand.pairs, name, project.name, self._settings.label_public_url
                )
            said = batches.said_on(project, [id_ for id_, _ in ids.values()], self._config)
            verdicts = {
                key: _verdict(said[id_], swapped=swapped) for key, (id_, swapped) in ids.items()
            }
            batches.keep(project, batch, {"verdicts": {k: _plain(v) for k, v in verdicts.items()}})
            project.content.withdraw(batch)
            log.info(
                "people answered %s of %s pairs of the batch %s of the project %s",
                *(f"{stand.answered:,}", f"{stand.pairs:,}", name, project.name),
            )
            return verdicts

    def _queue(
        self, project: FeedbackProject, batch: int, asked: dict[str, Pair]
    ) -> dict[str, tuple[int, bool]]:
        """Number of each pair in the store, and whether its answers are the other way round."""
        new = [
            NewPair(
                pair.prompt,
                Answer(pair.a, source=self._source),
                Answer(pair.b, source=self._source),
                source=self._source,
                wanted=self._config.votes_per_pair,
                priority=self._config.priority,
            )
            for pair in asked.values()
        ]
        added = project.content.add(new, batch=batch)
        return {key: (a.id, a.swapped) for key, a in zip(asked, added, strict=True)}


def _verdict(said: batches.Said, *, swapped: bool) -> Verdict:
    winner = said.winner
    if winner is not None and swapped:
        winner = EXCHANGED.get(winner, winner)  # type: ignore[assignment]
    return Verdict(winner, said.notes, agreed=said.agreed)


def _plain(verdict: Verdict) -> dict[str, object]:
    return {"winner": verdict.winner, "reason": verdict.reason, "agreed": verdict.agreed}


def _key(pair: Pair) -> str:
    return digest(type(pair.prompt).__name__, canonical_prompt(pair.prompt), pair.a, pair.b)
