"""How a section of the recipe refuses a value."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dsmoelora.errors import bad_value


def require(ok: bool, key: str, value: Any, allowed: str, remedy: str) -> None:
    """Raise a `ConfigError` unless `ok`."""
    if not ok:
        raise bad_value(key, value, allowed, remedy)


def expanded(key: str, path: str) -> str:
    """The path with `~` and variables of the environment replaced.

    Raises:
        ConfigError: there is no such variable or user, nor a file or folder that is called so
    """
    found = os.path.expandvars(path)
    if os.path.lexists(found):
        return found
    unknown = re.search(r"\$(\w+|\{\w+\})", found)
    if unknown:
        raise bad_value(key, path, "a path", f"The environment has no variable {unknown[0]}. Set it, or write it out.")
    try:
        return str(Path(found).expanduser()) if found.startswith("~") else found
    except RuntimeError:
        name = Path(found).parts[0]
        raise bad_value(key, path, "a path", f"Nobody here has the home {name}. Write the path out.") from None


def require_known(section: str, config: Any) -> None:
    """Raise a `ConfigError` for the first key whose value is none of the words that its type allows."""
    for name, annotation in get_type_hints(type(config)).items():
        if get_origin(annotation) is Literal:
            words, value = get_args(annotation), getattr(config, name)
            allowed = f"one of {', '.join(map(str, words))}"
            require(value in words, f"{section}.{name}", value, allowed, f"The default is {words[0]}.")


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
