"""Runs that the tests of this folder record."""

from recorded_runs import recorded

__all__ = ["recorded"]
