"""Limits the accelerator to one training at a time, across workers and terminals."""

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
LEASE_SECONDS: Final = 90.0  # how long a killed process keeps its slot
PAUSE_SECONDS: Final = 5.0
log = logging.getLogger(__name__)


@contextmanager
def accelerator() -> Iterator[None]:
    """Hold a slot of Prefect's global concurrency limit for the block.

    Outside Prefect, and on a server without that limit, it takes no slot. It retries while the
    server does not respond; a server that stops later does not end the block.
    """
    if PrefectRun.current() is None or not _retry(_is_limited):
        yield
        return
    log.info("waiting for a slot of the concurrency limit %s", LIMIT)
    slot = _retry(_take_slot)
    try:
        yield
    finally:
        try:
            slot.close()
        except Exception as error:
            log.warning(
                "the slot of %s could not be released (%s); it expires in %.0f s",
                LIMIT,
                type(error).__name__,
                LEASE_SECONDS,
            )


def _take_slot() -> ExitStack:
    """Take a slot; closing the returned stack releases it."""
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


def _retry(call: Callable[[], T]) -> T:
    """Call the Prefect server, and retry while it does not respond."""
    deadline = time.monotonic() + read_settings().outage_seconds
    while True:
        try:
            return call()
        except TransportError as error:
            if time.monotonic() >= deadline:
                raise
            log.warning("Prefect does not respond (%s); retrying", type(error).__name__)
            time.sleep(PAUSE_SECONDS)
