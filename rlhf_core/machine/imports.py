"""Imports of many modules at once, without looking for garbage in between."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Put off garbage collection while modules are imported, and spare them ever after.

    An import makes hundreds of thousands of objects that stay for good. Looking through them again
    and again is a fifth of the time of importing torch, transformers and MLflow; here they are
    looked at neither then nor in later collections. Within another such block it does nothing.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
