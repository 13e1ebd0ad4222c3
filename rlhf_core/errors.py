"""Errors that a user can cause and fix.

    UserError            one sentence: what is wrong, where, and how to fix it
    ├── ConfigError      a setting that contradicts another or the data
    ├── DataError        a file, row or field
    ├── ModelError       a model or tokenizer that cannot be found or used
    ├── NumericsError    a loss, gradient or reward that is no longer finite
    └── CheckpointError  a saved state that is damaged or belongs to another run

The command prints only their message; anything else is a defect and keeps its traceback. Secrets
in a message, such as the password of an address that it repeats, are masked.
"""

from rlhf_core.redaction import masked


class UserError(Exception):
    """One or two sentences: what is wrong, where, and how to fix it."""

    def __str__(self) -> str:
        return masked(super().__str__())


class ConfigError(UserError):
    """A setting that contradicts another setting or the data."""


class DataError(UserError):
    """A file, row or field that cannot be used."""


class ModelError(UserError):
    """A model or tokenizer that cannot be found, read or used."""


class NumericsError(UserError):
    """A tensor that must be finite and is not."""


class CheckpointError(UserError):
    """A saved state of a training run that is damaged or belongs to another run."""
