"""The exceptions that a user may meet.

Every message says which key or file is meant, the value found, what is allowed, and the remedy. Anything else
that escapes the program is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave us cannot work; the message is complete and wants no traceback."""


class ConfigError(UserError):
    """A recipe key, a command-line flag or a DeepSpeed file is wrong."""


class DataError(UserError):
    """A data file is missing, malformed or empty."""


class ModelError(UserError):
    """A model folder, its tokenizer or its layers do not fit the recipe."""


class CheckpointError(UserError):
    """A checkpoint or adapter folder is missing, damaged, or belongs to something else."""


class HopelessError(UserError):
    """A run cannot succeed as it is: it would only repeat what it did."""


class LostRankError(UserError):
    """A rank is gone, so the others cannot go on.

    Attributes:
        is_speaker: whether this rank is the one that says it; rank 0 may be the one that is gone
    """

    def __init__(self, message: str, is_speaker: bool) -> None:
        super().__init__(message)
        self.is_speaker = is_speaker


def bad_value(key: str, value: object, allowed: str, remedy: str) -> ConfigError:
    """The one form of a configuration message: key, value, what is allowed, remedy."""
    return ConfigError(f"{key} is {value!r}, but it must be {allowed}. {remedy}")


def listing(names: Iterable[str], limit: int = 12) -> str:
    """`a, b, c ... (+4 more)` for messages that show what was found."""
    names = list(names)
    more = f" ... (+{len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
