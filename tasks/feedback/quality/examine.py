"""What the annotators of a project agree on, read from the store."""

from collections.abc import Iterator

from rlhf_core.agreement.assess import assess
from rlhf_core.agreement.quality import Quality
from rlhf_core.errors import DataError
from tasks.feedback.quality.reading import as_votes
from tasks.feedback.store.judgments import CastVote
from tasks.feedback.store.store import FeedbackProject


def examine(project: FeedbackProject, snapshot: str | None = None) -> Quality:
    """The report on the votes of a project, as an admin may see it; `.redacted()` is for others.

    Args:
        snapshot: digest of one, its beginning, or `latest`; None = the votes as they are now.

    Raises: DataError when there is no such snapshot, or no vote.
    """
    found = None if snapshot is None else project.snapshots.find(snapshot)
    digest = "" if found is None else found.digest
    votes = as_votes(_stream(project, digest))
    if not len(votes):
        raise DataError(
            f"the feedback project '{project.name}' has no votes yet; import some with "
            f"`rlhf feedback import {project.name} FILE`, or collect them with `rlhf label`"
        )
    return assess(votes, project=project.name, snapshot=digest)


def _stream(project: FeedbackProject, digest: str) -> Iterator[CastVote]:
    """The votes; beside those of a snapshot the skips up to its last vote, which are no members."""
    if not digest:
        yield from project.judgments.stream(skips=True)
        return
    last = 0
    for vote in project.snapshots.votes(digest):
        last = max(last, vote.judgment)
        yield vote
    yield from project.judgments.skips(until=last)
