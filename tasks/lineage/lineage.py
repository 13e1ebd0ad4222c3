"""Lineage both ways: which versions saw an annotator, a source or a licence; what a version saw.

    record = Record.open()
    seen_by(record, annotator="annotator-07")    # versions, with the way from the votes to them
    saw(record, ModelRef(name="demo-policy", version=3)).trained.annotators

A version saw what it read, and what the versions saw that it was made from. What a stage reads for
training and what it only measures itself with are told apart.
"""

import difflib
import json
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TypeAlias

from rlhf_core.data.origins.counts import Count, Origins
from rlhf_core.errors import DataError, ModelError
from tasks.lineage.data import DataSet, DataSets, data_of
from tasks.lineage.graph import Graph, StageRun, Version
from tasks.lineage.records import (
    Ancestor,
    Answer,
    Known,
    Material,
    Reading,
    Relation,
    Saw,
    Seen,
    Step,
)
from tasks.record.record import Record
from tasks.registry.refs import ModelRef, is_version

# What a stage reads of the prepared data, to learn from it and to measure itself.
LEARNS: Mapping[str, tuple[str, ...]] = {
    "sft": ("demonstrations",),
    "reward_model": ("preferences",),
    "held_out": ("preferences",),
    "dpo": ("preferences",),
    **dict.fromkeys(("ppo", "rloo", "grpo"), ("prompts",)),
}
# Of a stage that examines versions: the tables, and the roles that it examines.
EXAMINES: Mapping[str, tuple[tuple[tuple[str, str], ...], tuple[str, ...]]] = {
    "report_card": ((("preferences", "eval"), ("prompts", "eval")), ("reward",)),
    "evaluation": (
        (("prompts", "eval"), ("demonstrations", "eval")),
        ("policy", "sft", "champion"),
    ),
    "tournament": ((("prompts", "train"),), ("policy", "milestone.", "sft")),
}
WORDS = {"preferences": "votes", "demonstrations": "demonstrations", "prompts": "prompts"}
PEOPLE = "people"  # as a judge
ROLES = (
    "votes",
    "demonstrations",
    "prompts",
    "verdicts",
)  # what is told first, if there are several
NEAR = 5  # names that are shown in place of one that nothing has


_Direct: TypeAlias = tuple[Version, Relation, Step, int]


@dataclass(frozen=True)
class Wanted:
    """What is looked for; every filter that is set has to match, within the same rows."""

    annotator: str = ""
    source: str = ""
    licence: str = ""
    project: str = ""  # of the preference store; data from files match any

    def matches(self, count: Count, origins: Origins) -> bool:
        """Whether rows are of this annotator, from this source and under this licence."""
        if self.annotator and count.annotator != self.annotator:
            return False
        if self.source:
            table = origins.tables.get(count.table)
            names = (*count.sources, *([table.source] if table else []))
            if not any(same_source(self.source, name) for name in names):
                return False
        return not self.licence or any(same_name(self.licence, n) for n in count.licences)

    def fits(self, data: DataSet) -> bool:
        """Whether the votes of the data may be those of the project."""
        return not self.project or data.feedback_project in ("", self.project)


def same_name(one: str, other: str) -> bool:
    """Whether two names are the same but for capitals and for how their words are joined."""
    return _plain(one) == _plain(other)


def same_source(wanted: str, name: str) -> bool:
    """Whether a source is meant: by its name, by its path or the last part of it, or by the id of
    a data set without its split."""
    without_split = re.sub(r" \([^()]*\)$", "", name)
    names = {name, without_split, PurePath(without_split).name}
    return any(same_name(wanted, known) for known in names)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "-", name.strip()).casefold()


def seen_by(
    record: Record, *, annotator: str = "", source: str = "", licence: str = "", project: str = ""
) -> list[Seen]:
    """Every version that saw an annotator, a source or a licence, itself or through an input; the
    oldest first.

    A version is in it once for what it was trained on, by the shortest way from votes, else from
    demonstrations, else from prompts, and once for what it was evaluated on. Deleted versions of
    which anything is left are in it.

    Args:
        project: of the preference store; votes of its other projects do not count, those from
            files do, since nothing says whose they are.
    """
    wanted = Wanted(annotator, source, licence, project)
    return list(Lineage(record).search(wanted).seen)


def saw(record: Record, ref: ModelRef) -> Saw:
    """What a version saw.

    Raises: ModelError when nothing is known of such a version.
    """
    return Lineage(record).saw(ref)


class Lineage:
    """The lineage of everything in MLflow, read once."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._graph = Graph(record)
        self._data = DataSets(self._graph)

    # ---- who saw it ----

    def search(self, wanted: Wanted) -> Answer:
        """Which versions saw what is wanted."""
        found: dict[tuple[str, Relation], Seen] = {}
        direct: list[_Direct] = []
        matching: dict[str, int] = {}
        for reading in self._readings():
            data = self._data.at(reading.data)
            if data.origins is None or not wanted.fits(data):
                continue
            rows = sum(c.rows for c in self._rows(reading, data) if wanted.matches(c, data.origins))
            if rows:
                step = Step(WORDS[reading.table], data.uri)
                version = self._graph.versions[reading.version]
                direct.append((version, reading.relation, step, rows))
        for data in self._data.all():
            if data.origins is not None and wanted.fits(data):
                hits = [c for c in data.counts() if wanted.matches(c, data.origins)]
                matching[data.digest] = sum(c.rows for c in hits)
        verdicts, gaps = self._verdicts(wanted)
        for role in ROLES:
            of_role = [hit for hit in (*direct, *verdicts) if hit[2].role == role]
            for key, seen in self._reached(of_role).items():
                known = found.get(key)
                also = () if known is None else (*known.also, role)
                found[key] = seen if known is None else replace(known, also=also)
        self._descend_by_answers(found)
        return Answer(
            tuple(sorted(found.values(), key=_by_time)),
            (*self._unknown(wanted), *gaps),
            len(matching),
            sum(rows > 0 for rows in matching.values()),
            sum(matching.values()),
            self._names(wanted) if not any(matching.values()) else (),
        )

    def only(self, answer: Answer, refs: Sequence[ModelRef]) -> Answer:
        """An answer about some versions alone."""
        kept = tuple(seen for seen in answer.seen if seen.ref in refs)
        return replace(answer, seen=kept)

    def made_by(self, run_id: str) -> list[ModelRef]:
        """The versions that a pipeline run, or a stage, made; the last stage's first."""
        runs = [run for run in self._graph.runs.values() if run_id in (run.run_id, run.pipeline)]
        made = [
            uri
            for run in sorted(runs, key=lambda run: run.at, reverse=True)
            for uri in run.versions.values()
        ]
        return [ModelRef.parse(uri) for uri in dict.fromkeys(made)]

    def _reached(self, direct: Sequence[_Direct]) -> dict[tuple[str, Relation], Seen]:
        """The versions that read something themselves, and those that were made from a version
        that was trained on it."""
        found: dict[tuple[str, Relation], Seen] = {}
        for version, relation, step, rows in sorted(direct, key=_most_first):
            if (version.uri, relation) not in found:
                found[version.uri, relation] = self._seen(version, relation, (step,), rows)
        children = self._graph.children()
        waiting = deque(seen for seen in found.values() if seen.relation == "trained")
        while waiting:
            parent = waiting.popleft()
            for role, child in children.get(parent.ref.uri, ()):
                if (child.uri, "trained") not in found:
                    path = (*parent.path, Step(role, parent.ref.uri))
                    seen = self._seen(child, "trained", path, parent.rows)
                    found[child.uri, "trained"] = seen
                    waiting.append(seen)
        return found

    def _descend_by_answers(self, found: dict[tuple[str, Relation], Seen]) -> None:
        """Add the versions that learned from answers of those that were trained on it, and what was
        made from these."""
        children, readers = self._graph.children(), self._readers_of_answers()
        waiting = deque(seen for seen in found.values() if seen.relation == "trained")
        while waiting:
            parent = waiting.popleft()
            uri = parent.ref.uri
            made = children.get(uri, []) if parent.relation == "answers" else []
            read = [("answers", self._graph.versions[reader]) for reader in readers.get(uri, ())]
            for role, child in (*made, *read):
                key: tuple[str, Relation] = (child.uri, "answers")
                if key not in found and (child.uri, "trained") not in found:
                    path = (*parent.path, Step(role, uri))
                    found[key] = self._seen(child, "answers", path, parent.rows)
                    waiting.append(found[key])

    def _readers_of_answers(self) -> dict[str, dict[str, None]]:
        """Of each version that wrote answers, the versions that learned from them."""
        found: dict[str, dict[str, None]] = {}
        for reading in self._readings():
            if reading.relation == "trained":
                for count in self._rows(reading, self._data.at(reading.data)):
                    for writer in count.models:
                        found.setdefault(writer, {})[reading.version] = None
        return found

    def _verdicts(self, wanted: Wanted) -> tuple[list[_Direct], list[str]]:
        """The versions that an annotator judged in an evaluation or a tournament, and what could
        not be looked into."""
        asked = [r for r in self._graph.runs.values() if r.params.get("judge.source") == PEOPLE]
        if not wanted.annotator or wanted.source or wanted.licence or not asked:
            return [], []
        from tasks.feedback.store.database import StoreError  # the database takes a second
        from tasks.lineage.votes import verdicts_of

        try:
            given = verdicts_of(wanted.annotator, self._record.settings)
        except (StoreError, DataError) as error:
            return [], [f"verdicts of people: {error}"]
        found: list[_Direct] = []
        for run in asked:
            for project, batch, number in given:
                of_run = batch.startswith(f"{run.stage}-{run.key}-")
                if of_run and wanted.project in ("", project):
                    step = Step("verdicts", f"feedback:/{project}")
                    for uri in sorted(self._examined(run)):
                        found.append((self._graph.versions[uri], "evaluated", step, number))
        return found, []

    def _seen(
        self, version: Version, relation: Relation, path: tuple[Step, ...], rows: int
    ) -> Seen:
        return Seen(**vars(_known(version)), relation=relation, path=path, rows=rows)

    def _names(self, wanted: Wanted) -> tuple[str, ...]:
        """Names like the one that nothing has, if a single kind was asked for."""
        asked = [(k, v) for k, v in vars(wanted).items() if v and k != "project"]
        if len(asked) != 1:
            return ()
        [(kind, name)] = asked
        known: Counter[str] = Counter()
        for data in self._data.all():
            for count in data.counts():
                names = (count.annotator,) if kind == "annotator" else getattr(count, f"{kind}s")
                known.update({n: count.rows for n in names if n})
        close = difflib.get_close_matches(name, list(known), n=NEAR, cutoff=0.5)
        return tuple(close or [name for name, _ in known.most_common(NEAR)])

    def _unknown(self, wanted: Wanted) -> Iterator[str]:
        """What could not be looked into, in sentences."""
        for data in self._data.all():
            if data.unknown:
                yield f"{data.uri}: {data.unknown}"
            elif data.origins is not None and wanted.licence and not data.origins.licences_known:
                yield f"{data.uri}: it was prepared by an earlier version, which kept no licences"
        lost = {r.data for r in self._readings() if self._data.at(r.data).run is None}
        for uri in sorted(lost):
            yield f"{uri}: {self._data.at(uri).unknown}"

    # ---- what it saw ----

    def saw(self, ref: ModelRef) -> Saw:
        """What a version saw.

        Raises: ModelError when nothing is known of such a version.
        """
        version = self._graph.versions.get(ref.uri)
        if version is None:
            self._record.store.require(ref)
            raise ModelError(f"there is no {ref.uri}; check the name and the number")
        line = self._line(version)
        own = {uri for uri, _ in line}
        readings = [r for r in self._readings() if r.version in own]
        trained = [r for r in readings if r.relation == "trained"]
        evaluated = [r for r in readings if r.relation == "evaluated" and r.version == ref.uri]
        data = dict.fromkeys(r.data for r in (*trained, *evaluated))
        sets = [self._data.at(uri) for uri in data]
        runs = [run for uri, _ in line if (run := self._graph.versions[uri].run) is not None]
        return Saw(
            **vars(_known(version)),
            trained=self._material(trained),
            evaluated=self._material(evaluated),
            readings=(*trained, *evaluated),
            ancestors=tuple(
                Ancestor(_known(self._graph.versions[uri]), path) for uri, path in line[1:]
            ),
            data=tuple(dict.fromkeys(found.uri for found in sets)),
            snapshots=tuple(dict.fromkeys(found.snapshot for found in sets if found.snapshot)),
            base_models=tuple(dict.fromkeys(base for run in runs for base in _base(run))),
            rewards=tuple(dict.fromkeys(name for run in runs for name in _rewards(run))),
            judges=tuple(dict.fromkeys(self._judges(ref.uri))),
            unknown=tuple(self._gaps(line, sets)),
        )

    def _line(self, version: Version) -> list[tuple[str, tuple[Step, ...]]]:
        """A version and those that it was made from, each with the shortest way to the version."""
        found: dict[str, tuple[Step, ...]] = {version.uri: ()}
        waiting = deque([version])
        while waiting:
            child = waiting.popleft()
            for role, uri in self._graph.parents(child).items():
                if uri not in found:
                    found[uri] = (Step(role, uri), *found[child.uri])
                    waiting.append(self._graph.versions[uri])
        return list(found.items())

    def _material(self, readings: Sequence[Reading]) -> Material:
        tables: Counter[str] = Counter()
        kinds = ("annotators", "sources", "licences", "models")
        by: dict[str, dict[str, Counter[str]]] = {kind: defaultdict(Counter) for kind in kinds}
        for reading, data in self._once(readings):
            for count in self._rows(reading, data):
                word = WORDS[count.table]
                if count.annotator:
                    by["annotators"][count.annotator][word] += count.rows
                for kind in kinds[1:]:
                    for name in getattr(count, kind):
                        by[kind][name][word] += count.rows
            if data.origins is not None:
                tables[WORDS[reading.table]] += self._total(reading, data)
        named = {kind: {n: dict(c) for n, c in names.items()} for kind, names in by.items()}
        return Material(dict(tables), **named)

    def _once(self, readings: Sequence[Reading]) -> Iterator[tuple[Reading, DataSet]]:
        """The readings without those of rows that another one has as well."""
        known: set[tuple[str, str, str, str]] = set()
        whole = sorted(readings, key=lambda reading: reading.half != "")
        for reading in whole:
            data = self._data.at(reading.data)
            of = data.digest or data.uri
            place = (of, reading.table, reading.split)
            if known & {(*place, reading.half), (*place, "")}:
                continue
            known.add((*place, reading.half))
            yield reading, data

    def _total(self, reading: Reading, data: DataSet) -> int:
        """The rows of a table that a reading read."""
        assert data.origins is not None
        table = data.origins.tables.get(reading.table)  # type: ignore[call-overload]
        if reading.half or table is None:
            return sum(count.rows for count in self._rows(reading, data))
        return int(table.train if reading.split == "train" else table.eval)

    def _judges(self, uri: str) -> Iterator[str]:
        for run in self._graph.runs.values():
            if run.stage in EXAMINES and (
                uri in run.models.values() or uri in run.versions.values()
            ):
                judge = run.params.get("judge.source", "")
                yield from [judge] if judge else []

    def _gaps(
        self, line: Sequence[tuple[str, tuple[Step, ...]]], sets: Sequence[DataSet]
    ) -> Iterator[str]:
        for found in sets:
            if found.unknown:
                yield f"{found.uri}: {found.unknown}"
            elif found.origins is not None and not found.origins.licences_known:
                yield f"{found.uri}: it was prepared by an earlier version, which kept no licences"
        for uri, _ in line:
            version = self._graph.versions[uri]
            if version.run is None and not version.data_digest:
                yield f"{uri}: no run says what it was made from"

    # ---- what stages read ----

    def _readings(self) -> list[Reading]:
        if not hasattr(self, "_all_readings"):
            self._all_readings = [*self._of_trainings(), *self._of_examinations()]
        return self._all_readings

    def _of_trainings(self) -> Iterator[Reading]:
        for version in self._graph.versions.values():
            if version.copy_of:
                continue  # its original has read what there was to read
            run = version.run
            stage = run.stage if run is not None else STAGE_OF_KIND.get(version.kind, "")
            uri, digest = data_of(run, version.data_digest)
            if stage not in LEARNS or not (uri or digest):
                continue
            half = _half(run, stage)
            data = self._data.at(uri, digest).uri
            for table in LEARNS[stage]:
                trained = half if table == "preferences" else ""
                yield Reading(version.uri, "trained", stage, data, table, "train", trained)
                yield Reading(version.uri, "evaluated", stage, data, table, "eval", "")

    def _of_examinations(self) -> Iterator[Reading]:
        for run in self._graph.runs.values():
            if run.stage not in EXAMINES or not run.data:
                continue
            tables, _ = EXAMINES[run.stage]
            data = self._data.at(run.data, run.data_digest).uri
            for uri in sorted(self._examined(run)):
                for table, split in tables:
                    yield Reading(uri, "evaluated", run.stage, data, table, split, "")

    def _examined(self, run: StageRun) -> set[str]:
        """The versions that a stage examined, or made a copy of."""
        _, roles = EXAMINES[run.stage]
        examined = {uri for role, uri in run.models.items() if any(_is(role, r) for r in roles)}
        return (examined | set(run.versions.values())) & self._graph.versions.keys()

    def _rows(self, reading: Reading, data: DataSet) -> Iterator[Count]:
        """The counts of the rows that a reading read."""
        for count in data.counts():
            if (count.table, count.split) == (reading.table, reading.split) and (
                not reading.half or count.half == reading.half
            ):
                yield count


# The stage that makes versions of a kind, where its run is gone; a policy may be by any algorithm.
STAGE_OF_KIND = {
    "sft": "sft",
    "reward": "reward_model",
    "held_out": "held_out",
    "policy": "ppo",
    "critic": "ppo",
    "milestone": "ppo",
}


def _half(run: StageRun | None, stage: str) -> str:
    usual = "second_half" if stage == "held_out" else "all"
    half = run.params.get(f"{stage}.votes", usual) if run is not None else usual
    return "" if half == "all" else half


def _is(role: str, wanted: str) -> bool:
    return role.startswith(wanted) if wanted.endswith(".") else role == wanted


def _known(version: Version) -> Known:
    run = version.run
    where = "" if not version.run_id else "gone" if run is None else "active"
    return Known(
        ref=version.ref,
        kind=version.kind,
        state=version.state,  # type: ignore[arg-type]
        at=version.at,
        aliases=version.aliases,
        run_id=version.run_id,
        run="trash" if run is not None and run.trashed else where,
    )


def _base(run: StageRun) -> Iterator[str]:
    if run.stage == "sft":
        yield run.params.get("model.source", "") or "a fresh model"


def _rewards(run: StageRun) -> Iterator[str]:
    try:
        terms = json.loads(run.params.get(f"{run.stage}.rewards", "[]"))
    except ValueError:  # a parameter that was too long for MLflow
        return
    for term in terms if isinstance(terms, list) else ():
        source = term.get("source", "") if isinstance(term, dict) else ""
        if source and not is_version(source) and source != "reward_model":
            yield source


def _most_first(hit: _Direct) -> int:
    return -hit[3]


def _by_time(seen: Seen) -> tuple[float, str, str]:
    return (seen.at.timestamp() if seen.at else 0.0, seen.ref.uri, seen.relation)
