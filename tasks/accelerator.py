"""One training at a time on the accelerator, whichever worker or terminal asks for it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from tasks.prefect_run import PrefectRun

LIMIT: Final = "rlhf-accelerator"
LEASE_SECONDS: Final = 90.0  # how long the place of a process that was killed stays taken
log = logging.getLogger(__name__)


@contextmanager
def accelerator() -> Iterator[None]:
    """Wait for a place under Prefect's global concurrency limit, and have it for the block.

    Outside Prefect, and on a server without that limit, nothing is waited for. A server that goes
    away meanwhile does not end the block.
    """
    if PrefectRun.current() is None or not _is_limited():
        yield
        return
    log.info("waiting for a place under the concurrency limit %s", LIMIT)
    with concurrency(LIMIT, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False):
        yield


def _is_limited() -> bool:
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            return False
    return True
