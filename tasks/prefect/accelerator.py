"""One training at a time on the accelerator, whichever worker or terminal asks for it."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, TypeVar

from httpx import TransportError
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from tasks.prefect.ui import PrefectRun
from tasks.settings import read_settings

T = TypeVar("T")

LIMIT: Final = "rlhf-accelerator"
LEASE_SECONDS: Final = 90.0  # how long the place of a process that was killed stays taken
PAUSE_SECONDS: Final = 5.0
log = logging.getLogger(__name__)


@contextmanager
def accelerator() -> Iterator[None]:
    """Wait for a place under Prefect's global concurrency limit, and have it for the block.

    Outside Prefect, and on a server without that limit, nothing is waited for. A server that is
    away is waited for; one that goes away meanwhile does not end the block.
    """
    if PrefectRun.current() is None or not _patiently(_is_limited):
        yield
        return
    log.info("waiting for a place under the concurrency limit %s", LIMIT)
    place = _patiently(_take_place)
    try:
        yield
    finally:
        try:
            place.close()
        except Exception as error:
            log.warning(
                "the place under %s could not be given back (%s); it is free in %.0f s",
                LIMIT,
                type(error).__name__,
                LEASE_SECONDS,
            )


def _take_place() -> ExitStack:
    """A place, as what gives it back."""
    with ExitStack() as stack:
        stack.enter_context(
            concurrency(LIMIT, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False)
        )
        return stack.pop_all()


def _is_limited() -> bool:
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            return False
    return True


def _patiently(ask: Callable[[], T]) -> T:
    """What a call of the Prefect server returns, once the server is there."""
    deadline = time.monotonic() + read_settings().outage_seconds
    while True:
        try:
            return ask()
        except TransportError as error:
            if time.monotonic() >= deadline:
                raise
            log.warning("Prefect does not answer (%s); trying again", type(error).__name__)
            time.sleep(PAUSE_SECONDS)
