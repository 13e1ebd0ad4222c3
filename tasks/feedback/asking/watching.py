"""The thread that resumes or starts runs whose people have answered, in a server beside Prefect."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.feedback.store.store import Store
from tasks.settings import Settings

EVERY_SECONDS = 5.0
log = logging.getLogger(__name__)


@contextmanager
def watching(store: Store, settings: Settings, every: float = EVERY_SECONDS) -> Iterator[None]:
    """Resume and start runs in the background for the block, if there is a Prefect to ask."""
    if not settings.prefect_api_url:
        yield
        return
    stop = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(store, settings, stop, every), name="waiting-runs", daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join(timeout=10)


def _watch(store: Store, settings: Settings, stop: threading.Event, every: float) -> None:
    from tasks.feedback.asking import batches  # torch takes seconds, and nobody waits for it here

    while not stop.is_set():
        try:
            if batches.waiting(store.database) or batches.followed(store.database):
                break
        except Exception as error:
            log.warning("the preference store cannot be looked at (%s)", error)
        stop.wait(every)
    if stop.is_set():
        return
    from tasks.feedback.asking.waiting import watch  # Prefect's client takes seconds

    watch(store, settings, stop, every)
