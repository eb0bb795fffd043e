"""How a section of the recipe refuses a value."""

from __future__ import annotations

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
