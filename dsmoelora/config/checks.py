"""How a section of the recipe refuses a value."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from dsmoelora.errors import bad_value


def require(ok: bool, key: str, value: Any, allowed: str, remedy: str) -> None:
    """Raise a `ConfigError` unless `ok`."""
    if not ok:
        raise bad_value(key, value, allowed, remedy)


def require_positive(section: str, config: Any, *names: str) -> None:
    """Raise a `ConfigError` for the first of these keys that is below 1."""
    for name in names:
        value = getattr(config, name)
        require(value >= 1, f"{section}.{name}", value, "1 or more", f"Set {section}.{name} to a positive number.")


def require_unset(section: str, config: Any, where: str, *names: str) -> None:
    """Raise a `ConfigError` for the first of these keys that is not at its default: nothing would read it.

    Args:
        section: of the recipe
        config: its values
        where: why nothing does, in the form `where ...` or `with ...`
        names: keys of the section
    """
    defaults = {field.name: field.default for field in fields(config)}
    for name in names:
        value, default = getattr(config, name), defaults[name]
        require(
            value == default, f"{section}.{name}", value, f"left at {default} {where}: nothing reads it", "Drop it."
        )
