"""Put the queue of a project in order, by the newest reward model, and say what that saves.

    queue ─ pairs, votes ─▶ features of the reward model ─▶ estimate ─▶ design or random ─▶ places

The votes so far fit a last layer on the features; what it knows decides the order. The same votes
say what the order has saved so far.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf_core.backbone.context import context_of
from rlhf_core.labelling.arms import Shares, hashed
from rlhf_core.labelling.features import pair_features
from rlhf_core.labelling.order import order_queue
from rlhf_core.labelling.probe import Probe, Space, fit_probe, no_votes, space_of
from rlhf_core.labelling.saved import SETTLED, Savings
from rlhf_core.labelling.savings import FEWEST, Votes, estimate_savings, keeps_design
from rlhf_core.rewards.models import load_reward_model
from rlhf_core.seeding import generator
from tasks.feedback.ordering.outcome import QueueOrder, last_order, remember
from tasks.feedback.ordering.reading import CountedVote, Queued, read_queue
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import HOLD_OUT
from tasks.record.record import Record
from tasks.registry.refs import ModelRef

LONGEST = 2048  # tokens of prompt and answer that are read, where the model reads more
DRAWN = 2000  # pairs that say in which directions pairs differ


def order_project(
    project: FeedbackProject,
    record: Record,
    *,
    by: str = "",
    model: ModelRef | None = None,
    shares: Shares | None = None,
    device: str = "cpu",
) -> QueueOrder:
    """Put the queue of a project in order.

    Args:
        by: who wants it, for the log.
        model: whose features to use; None = the newest reward model of the pipeline of this name.
            Without one the order is random, with control arm and hold-out from the first label.
        shares: of control arm and hold-out.

    Raises: ModelError when the model does not exist or is no reward model.
    """
    began = time.monotonic()
    queue = read_queue(project)
    shares = shares or Shares()
    found = model or newest_reward_model(record, project.name, last_order(project))
    view = None
    if found is not None and (queue.votes or queue.waiting):
        view = _View(queue, record, found, device)
    savings = None if view is None else _savings(queue, view, project.name, shares)
    ordered = sum(bool(queue.pairs[vote.pair].arm) for vote in queue.votes)
    by_design = view is not None and _goes_on(queue, savings)
    waiting = queue.waiting

    def features(some: list[int]) -> Tensor:
        assert view is not None  # asked for by the design only
        return view.features([waiting[i] for i in some])

    places = order_queue(
        queue.as_waiting(),
        features,
        no_votes(1) if view is None else _fit(queue, view),
        salt=project.name,
        shares=shares,
        by_design=by_design,
    )
    placed = project.content.prioritise(
        (queue.pairs[waiting[place.pair]].id, place.arm) for place in places
    )
    return remember(
        project,
        by,
        "" if found is None else found.uri,
        placed,
        ordered,
        by_design,
        savings,
        seconds=round(time.monotonic() - began, 1),
        held_out=sum(place.arm == HOLD_OUT for place in places),
        design_votes=queue.since_design(),
    )


def newest_reward_model(
    record: Record, project: str, last: QueueOrder | None = None
) -> ModelRef | None:
    """The newest version of the reward model that ordered the queue last, or else of that of the
    pipeline of the project's name; None if there is none."""
    names = [f"{project}-reward"]
    if last is not None and last.model:
        names.insert(0, ModelRef.parse(last.model).name)
    for name in names:
        if versions := record.store.versions(name):
            return ModelRef(name=name, version=max(versions))
    return None


def _goes_on(queue: Queued, savings: Savings | None) -> bool:
    """Whether the design goes on, by the votes since it began. Where it has had its votes, and the
    other arms are too small to tell what they saved, nothing is known to be saved."""
    since = queue.since_design()
    untold = savings is None and len(queue.of_arm("design")) >= FEWEST
    return keeps_design(savings, since) and not (untold and since >= SETTLED)


# ---- the model's view ----


class _View:
    """Pairs as the last layer of a reward model sees them."""

    def __init__(self, queue: Queued, record: Record, ref: ModelRef, device: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            directory = record.store.fetch(ref, Path(folder) / "model")
            self._network, self._tokenizer = load_reward_model(directory, device)
        self._queue = queue
        self._seen: dict[int, Tensor] = {}
        # The directions in which pairs differ, by those with votes and those that wait, as they
        # fall; so many of them say it well.
        drawn = sorted(
            {vote.pair for vote in queue.votes}.union(queue.waiting),
            key=lambda i: hashed(queue.pairs[i].digest, "directions"),
        )
        self.space: Space = space_of(self._states(drawn[:DRAWN]))

    def features(self, pairs: Sequence[int]) -> Tensor:
        """(n, k) of pairs by their places."""
        if not pairs:
            return torch.zeros(0, self.space.directions.shape[1], dtype=torch.float64)
        return self.space(self._states(pairs))

    def _states(self, pairs: Sequence[int]) -> Tensor:
        """(n, d) each computed once."""
        if new := [i for i in dict.fromkeys(pairs) if i not in self._seen]:
            states = pair_features(
                self._network,
                self._tokenizer,
                [(self._queue.pairs[i].prompt, *self._queue.pairs[i].answers) for i in new],
                max_length=min(context_of(self._network.model) or LONGEST, LONGEST),
            )
            self._seen |= dict(zip(new, states, strict=True))
        return torch.stack([self._seen[i] for i in pairs])


def _fit(queue: Queued, view: _View) -> Probe:
    votes = [vote for vote in queue.votes if queue.pairs[vote.pair].arm != HOLD_OUT]
    if not votes:
        return no_votes(view.space.directions.shape[1])
    return fit_probe(view.features([v.pair for v in votes]), _outcomes(votes))


def _outcomes(votes: Sequence[CountedVote]) -> Tensor:
    return torch.tensor([vote.outcome for vote in votes], dtype=torch.float64)


def _savings(queue: Queued, view: _View, salt: str, shares: Shares) -> Savings | None:
    arms = queue.arms(salt, shares)

    def votes(some: Sequence[CountedVote]) -> Votes:
        groups = torch.tensor([queue.groups[v.pair] for v in some], dtype=torch.int64)
        return Votes(view.features([v.pair for v in some]), _outcomes(some), groups)

    return estimate_savings(
        votes(queue.of_arm("design")),
        votes(queue.control(arms)),
        votes(queue.tested()),
        votes(queue.before(arms)),
        generator=generator(0, f"labelling/{salt}"),
    )
