"""What can be said about a recipe before its values are read: keys, shapes, and types in plain words.

jsonargparse checks values against the dataclasses of `config`; unknown keys, keys given twice and malformed files
are found here, with line numbers and suggestions.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from dsmoelora.config import DataSource, Recipe
from dsmoelora.errors import ConfigError, bad_value, listing

# Derived from another key: setting it in a recipe would be overruled in silence, so it is no key at all.
DERIVED = {"adapter.seed": "run.seed"}

_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}


def recipe_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML that `--config` reads back to an equal recipe."""
    tree = json.loads(json.dumps(dataclasses.asdict(recipe)))  # tuples become lists
    for key in DERIVED:
        section, name = key.split(".")
        del tree[section][name]
    return yaml.safe_dump(tree, sort_keys=False)


def check_recipe_file(path: Path) -> None:
    """The file is there, is YAML, and has only keys of the recipe, none of them twice.

    Raises:
        ConfigError: naming file, line and remedy
    """
    text = read_text("--config", path)
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: {error.problem}. Mend the YAML there.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML text: {' '.join(str(error).split())}. Is it the right file?") from None
    if not isinstance(tree, yaml.MappingNode):
        sections = ", ".join(section.name for section in dataclasses.fields(Recipe))
        raise ConfigError(f"{path} is no recipe: it must be a YAML mapping with the sections {sections}.")
    _check_node(path, tree, Recipe, "")


def _check_node(path: Path, node: yaml.Node, annotation: Any, key: str) -> None:
    """Walk a recipe's tree beside the dataclasses."""
    item = list_item(annotation)
    if item is not None and isinstance(node, yaml.SequenceNode):
        for place, child in enumerate(node.value):
            _check_node(path, child, item, f"{key}[{place}]")
        return
    if not dataclasses.is_dataclass(annotation):
        if "[" in key:  # of values inside a list jsonargparse would say only that the list is wrong
            _check_value(path, node, annotation, key)
        return
    if not isinstance(node, yaml.MappingNode):
        allowed = ", ".join(field.name for field in dataclasses.fields(annotation))
        raise ConfigError(f"{_at(path, node)}: {key} must be a mapping with keys out of: {allowed}.")
    hints = typing.get_type_hints(annotation)
    seen: set[str] = set()
    for name_node, child in node.value:
        name = str(name_node.value)
        full = f"{key}.{name}" if key else name
        check_derived(full)
        if name not in hints:
            raise ConfigError(
                f"{_at(path, name_node)}: unknown key {full}.{did_you_mean(name, set(hints))} "
                f"Allowed {'in ' + key if key else 'at the top'}: {listing(hints, limit=30)}."
            )
        if name in seen:
            raise ConfigError(f"{_at(path, name_node)}: {full} is set twice. Keep one of the two.")
        seen.add(name)
        _check_node(path, child, hints[name], full)


def check_list(flag: str, text: str) -> None:
    """The same for a list of mappings that is given on the command line.

    Raises:
        ConfigError: naming flag, entry and remedy
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return  # jsonargparse says it better
    if isinstance(node, yaml.SequenceNode):
        _check_node(Path(flag), node, key_types()[flag.removeprefix("--")], flag.removeprefix("--"))


def data_source(flag: str, text: str) -> DataSource:
    """A set of rows as a flag names it: a path, or a mapping in YAML with the keys of `data.eval`.

    Raises:
        ConfigError: naming flag, key and remedy
    """
    if not text.lstrip().startswith("{"):
        return DataSource(path=text)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        allowed = "a path, or a mapping with the keys of data.eval"
        raise bad_value(flag, text, allowed, "Example: {path: data/eval.jsonl, format: alpaca}.") from None
    _check_node(Path(flag), node, DataSource, "data.eval[0]")
    return DataSource(**yaml.safe_load(text))


def _check_value(path: Path, node: yaml.Node, annotation: Any, key: str) -> None:
    value = yaml.safe_load(yaml.serialize(node))
    if not _fits(value, annotation):
        raise ConfigError(f"{_at(path, node)}: {key} is {value!r}, but it must be {in_words(annotation)}. Correct it.")


def _fits(value: Any, annotation: Any) -> bool:
    if _is_union(annotation):
        return any(_fits(value, option) for option in typing.get_args(annotation))
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return value in typing.get_args(annotation)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)
    if annotation is float and isinstance(value, str):  # `1e-3` is text in YAML 1.1
        return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", value, flags=re.IGNORECASE) is not None
    kinds = (int, float) if annotation is float else (type(None) if annotation is None else annotation,)
    return isinstance(value, kinds) and not (isinstance(value, bool) and annotation is not bool)


def check_derived(key: str) -> None:
    """Refuse a key that follows another one."""
    if key in DERIVED:
        raise ConfigError(f"{key} cannot be set: it follows {DERIVED[key]}. Set {DERIVED[key]} instead.")


def _at(path: Path, node: yaml.Node) -> str:
    return f"{path}, line {node.start_mark.line + 1}"


def read_text(flag: str, path: Path) -> str:
    """The text of a file that the user named with `flag`, or a ConfigError that suggests a like-named neighbour."""
    if not path.exists():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else " Check the path."
        raise ConfigError(f"{flag} {path}: there is no such file.{hint}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path} cannot be read as text: {error}. Check path and permissions.") from None


def did_you_mean(name: str, known: set[str]) -> str:
    """` Did you mean x?` with the nearest of the known names, or nothing."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def section_class(name: str) -> type:
    """`optim` -> OptimConfig."""
    return typing.get_type_hints(Recipe)[name]


def key_types() -> dict[str, Any]:
    """`optim.lr` -> float, for all keys of the recipe."""
    return {
        f"{section.name}.{name}": annotation
        for section in dataclasses.fields(Recipe)
        for name, annotation in typing.get_type_hints(section_class(section.name)).items()
    }


def list_item(annotation: Any) -> Any:
    """`list[X]` -> X, also out of a union; None for anything else."""
    for option in typing.get_args(annotation) if _is_union(annotation) else (annotation,):
        if typing.get_origin(option) is list:
            return typing.get_args(option)[0]
    return None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def in_words(annotation: Any) -> str:
    """`float | None` -> `a number or null`."""
    arguments = typing.get_args(annotation)
    if _is_union(annotation):
        return " or ".join(in_words(argument) for argument in arguments)
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(argument) for argument in arguments)
    if origin is list:
        return f"a list ({in_words(arguments[0])} each)"
    if origin is dict:
        return "{name: text, ...}"
    if origin is tuple:
        return f"a list of {len(arguments)} ({in_words(arguments[0])} each)"
    if dataclasses.is_dataclass(annotation):
        return "{" + ", ".join(f"{field.name}: ..." for field in dataclasses.fields(annotation)) + "}"
    return _WORDS.get(annotation, str(annotation))
