"""Back-ups that were made, and until when they keep what was erased since.

`rlhf backup` notes each back-up in `RLHF_HOME/backups.jsonl`. Nothing here deletes or opens one: a
back-up that is changed is damaged, and one that lies elsewhere is out of reach.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from tasks.backup import LEDGER
from tasks.settings import Settings


class Kept(NamedTuple):
    """A back-up that was made before an erasure."""

    folder: str
    at: datetime
    expires: datetime | None  # as RLHF_BACKUP_DAYS says; None: nobody has said
    there: bool  # as far as this machine can see

    def sentence(self) -> str:
        """What it still holds, and for how long."""
        until = (
            f"it expires on {self.expires:%Y-%m-%d}"
            if self.expires
            else "no day of expiry is set (RLHF_BACKUP_DAYS)"
        )
        there = "" if self.there else ", where this machine does not find it any more"
        return f"{self.folder}, made on {self.at:%Y-%m-%d %H:%M} UTC{there}: {until}"


def kept(settings: Settings, before: datetime) -> list[Kept]:
    """The back-ups that were made before a moment, the oldest first."""
    days = settings.backup_days
    return [
        Kept(folder, at, at + timedelta(days=days) if days else None, Path(folder).exists())
        for folder, at in _noted(settings)
        if at <= before
    ]


def folders(settings: Settings) -> list[str]:
    """Where back-ups went."""
    return [folder for folder, _ in _noted(settings)]


def _noted(settings: Settings) -> Iterator[tuple[str, datetime]]:
    try:
        lines = (settings.home / LEDGER).read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            entry = json.loads(line)
            yield str(entry["folder"]), datetime.fromisoformat(entry["at"]).astimezone(UTC)
        except (ValueError, LookupError, TypeError):
            continue  # a line that was cut off by a full disk
