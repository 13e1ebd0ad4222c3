"""The champion: the version of `<project>-policy` in use. This module promotes and rolls back.

The champion is an alias. Each change is recorded in tags of the versions: when a version was
promoted and which one it replaced; or when, to which version and by whom it was rolled back.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

from rlhf_core.errors import ModelError
from tasks.prefect import events
from tasks.record import tags
from tasks.record.record import Record
from tasks.registry.refs import ModelRef

CHAMPION = "champion"


def policy_of(project: str) -> str:
    """The registered model whose versions are a project's policies."""
    return f"{project}-policy"


def project_of(policy: ModelRef) -> str:
    """The project of a policy."""
    return policy.name.removesuffix("-policy")


def champion_of(record: Record, policy: str) -> ModelRef | None:
    """The champion, if there is one."""
    return record.store.get_alias(policy, CHAMPION)


def predecessor(record: Record, ref: ModelRef) -> ModelRef | None:
    """The version that `ref` replaced as champion, if any."""
    return tags.version_of(record.store.tags(ref).get(tags.REPLACED, tags.NOBODY))


def crown(
    record: Record,
    new: ModelRef,
    old: ModelRef | None,
    *,
    by: str,
    how: Literal["promotion", "rollback"] = "promotion",
) -> None:
    """Make a version the champion, and record the previous one as its predecessor.

    Raises: ModelError for a version that learnt from somebody who was erased.
    """
    _refuse_erased(record, new)
    record.store.add_tags(new, {tags.PROMOTED_AT: now(), tags.REPLACED: tags.name_of(old)})
    _move(record, new, old, how=how, by=by)


def take_back(record: Record, champion: ModelRef, target: ModelRef, *, by: str) -> None:
    """Make `target` the champion; `champion` is not promoted again without a person.

    Raises: ModelError for a target that learnt from somebody who was erased.
    """
    _refuse_erased(record, target)
    back: Mapping[str, str] = {
        tags.ROLLED_BACK_AT: now(),
        tags.ROLLED_BACK_TO: target.uri,
        tags.ROLLED_BACK_BY: by,
    }
    record.store.add_tags(champion, back)
    if tags.REPLACED in record.store.tags(
        target
    ):  # it was the champion before: keep its predecessor
        _move(record, target, champion, how="rollback", by=by)
    else:
        crown(record, target, champion, how="rollback", by=by)


def _refuse_erased(record: Record, ref: ModelRef) -> None:
    if tags.ERASED in record.store.tags(ref):
        raise ModelError(
            f"{ref.uri} learnt from votes of a person who was erased since, so it does not become "
            "the champion; train again on the votes that are left"
        )


def _move(
    record: Record,
    new: ModelRef,
    old: ModelRef | None,
    *,
    by: str,
    how: Literal["promotion", "rollback"],
) -> None:
    # Tags first, alias last: a crash in between leaves the champion unchanged.
    if tags.ROLLED_BACK_AT in record.store.tags(new):
        record.store.remove_tag(new, tags.ROLLED_BACK_AT)
    record.store.set_alias(new, CHAMPION)
    events.champion_changed(project_of(new), old, new, how=how, by=by)


def now() -> str:
    """The current time in the format of the tags."""
    return datetime.now(UTC).isoformat(timespec="seconds")
