"""The command line of a run: recipe file, overrides and flags, turned into one checked `Command`.

The recipe's keys, types and help come from the dataclasses of `config` by way of jsonargparse; what goes wrong
there is said again in the one form of `errors.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.text import Text

from dsmoelora import __version__
from dsmoelora.config import Recipe
from dsmoelora.config.checks import expanded
from dsmoelora.config.recipe_file import (
    DERIVED,
    check_derived,
    check_list,
    check_recipe_file,
    did_you_mean,
    in_words,
    key_types,
    list_item,
    read_text,
    recipe_yaml,
    section_class,
)
from dsmoelora.errors import ConfigError, LostRankError, UserError, bad_value
from dsmoelora.parallel.ranks import env_rank

logger = logging.getLogger(__name__)

# What `--deepspeed` falls back to; everything else of a DeepSpeed file is filled from the recipe.
DEFAULT_DEEPSPEED: dict[str, Any] = {"zero_optimization": {"stage": 3}}

# How long ranks that have nothing to say outlive an error, for the speaker may be a busy moment behind them.
SILENT_RANKS_STAY_S = 5.0

_FLAG_TYPES = {"preview": int, "world_size": int, "local_rank": int}


@dataclass(frozen=True)
class Command:
    """What a command line asks for.

    Args:
        recipe: file and overrides in one
        deepspeed: content of the DeepSpeed file, as the user wrote it
        resume: `none`, `auto`, or a checkpoint folder
        dry_run: check everything, print the plan, train nothing
        preview: print that many tokenised samples, train nothing
        world_size: ranks to plan for in a dry run; None for those that are there
        verbose: show the log messages of all libraries
    """

    recipe: Recipe
    deepspeed: dict[str, Any]
    resume: str = "none"
    dry_run: bool = False
    preview: int = 0
    world_size: int | None = None
    verbose: bool = False


def parse_command(argv: list[str]) -> Command:
    """Read the command line of `launch/train.py`. `--help` and `--print_...` print on rank 0 and exit.

    Raises:
        ConfigError: recipe, DeepSpeed file or flag is missing, malformed, unknown or of the wrong type
    """
    parser = _build_parser()
    _check_flags(parser, argv)
    for file in _recipe_files(argv):
        check_recipe_file(file)
    quiet = contextlib.redirect_stdout(io.StringIO()) if env_rank() else contextlib.nullcontext()
    with quiet:
        parsed = _parse(parser, _recipe_first(argv))
        _ask_folders(parser, _recipe_first(argv), parsed)
        recipe = _instantiate(parser, parsed)
        if parsed.print_config or parsed.print_folder:
            sys.stdout.write(recipe_yaml(recipe) if parsed.print_config else f"{recipe.run.folder}\n")
            raise SystemExit(0)
    if parsed.world_size is not None and not parsed.dry_run:
        raise ConfigError("--world-size plans a dry run; a real run has the ranks of its launcher. Add --dry-run.")
    deepspeed = expanded("--deepspeed", parsed.deepspeed or "")
    return Command(
        recipe=recipe,
        deepspeed=read_deepspeed_file(deepspeed) if deepspeed else DEFAULT_DEEPSPEED,
        resume=expanded("--resume", parsed.resume),
        dry_run=parsed.dry_run,
        preview=_non_negative("--preview", parsed.preview),
        world_size=parsed.world_size,
        verbose=parsed.verbose,
    )


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """The content of a DeepSpeed JSON file.

    Raises:
        ConfigError: it is missing or no JSON object
    """
    text = read_text("--deepspeed", Path(path))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"--deepspeed {path}, line {error.lineno}, column {error.colno}: {error.msg}. Mend the JSON there."
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"--deepspeed {path} holds {content!r}, but it must be a JSON object. See ds_configs/.")
    return content


def run_guarded(body: Callable[[], None]) -> int:
    """Run a program and return its exit code; a `UserError` is said once, without a traceback.

    Rank 0 says it, or where a rank is gone the lowest of those that remain. The others leave after it: launchers end
    all processes as soon as one has failed, and might end the speaker before it has spoken. Any other error is a fault
    of the program, and every rank that meets one prints its traceback.
    """
    try:
        body()
    except UserError as error:
        speaks = error.is_speaker if isinstance(error, LostRankError) else env_rank() == 0
        if speaks:
            sys.stdout.flush()
            Console(stderr=True, soft_wrap=True).print(Text("error: ", style="bold red") + Text(str(error)))
        else:
            time.sleep(SILENT_RANKS_STAY_S)
        return 1
    except KeyboardInterrupt:  # a run that trains takes it for a request to stop, see parallel/stopping.py
        if env_rank() == 0:
            Console(stderr=True).print("Interrupted.")
        return 130
    except SystemExit:
        raise
    except BaseException:
        # Now, for the interpreter would print it after the shutdown below, which may end the process.
        sys.stdout.flush()
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    finally:
        # Only a program that came as far as the process group has loaded DeepSpeed, and has something to leave.
        comm = sys.modules.get("dsmoelora.parallel.comm")
        if comm is not None:
            comm.shutdown()
    return 0


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    A failure ends it at once: threads that libraries have started may still run while the interpreter shuts down, and
    where one of them brings it down, a launcher reports a signal instead of the code.
    """
    if code == 0:
        sys.exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class FlagParser(argparse.ArgumentParser):
    """The command line of a program that has flags alone: what is wrong with it is said like everything else."""

    def parse_args(  # type: ignore[override]  # argparse tells a namespace of its own and another apart
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse does it, but an unknown flag is named before a missing one, of which it may be a misspelling.

        Raises:
            ConfigError: the command line is wrong
        """
        words = sys.argv[1:] if args is None else list(args)
        for word in words[: words.index("--")] if "--" in words else words:
            flag = word.partition("=")[0]
            if flag.startswith("--") and " " not in word and flag not in self._option_string_actions:
                self.error(f"unrecognized arguments: {flag}")
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """End the program, on all ranks with one message.

        Raises:
            ConfigError: always
        """
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown is not None:
            near = did_you_mean(unknown[1], set(self._option_string_actions))
            raise ConfigError(f"{unknown[1]} is no known flag.{near} `--help` lists all.")
        raise ConfigError(f"{message.removeprefix('argument ')}. `--help` lists all flags.")


# --- the parser -----------------------------------------------------------------------------------------------------


def _build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="launch/train.py",
        description="Instruction-tune a causal language model with routed low-rank experts under DeepSpeed ZeRO-3.",
        exit_on_error=False,
        print_config=None,  # jsonargparse's own would print flags among the recipe's keys
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="recipe (YAML); every key can be overridden: --optim.lr 1e-4")
    parser.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed JSON file; default: plain ZeRO-3")
    parser.add_argument(
        "--resume", default="none", metavar="auto|none|FOLDER", help="go on from the newest whole checkpoint, or this"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, train nothing")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks to plan for in a dry run")
    parser.add_argument("--preview", type=int, default=0, metavar="N", help="print N tokenised samples, train nothing")
    parser.add_argument("--print_config", action="store_true", help="print the whole recipe and exit")
    parser.add_argument("--print_folder", action="store_true", help="print the folder of the run and exit")
    parser.add_argument("--version", action="version", version=f"dsmoelora {__version__}", help="print it and exit")
    parser.add_argument("--verbose", action="store_true", help="show the log messages of all libraries")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    for section in dataclasses.fields(Recipe):
        skip = {key.split(".")[1] for key in DERIVED if key.startswith(section.name + ".")}
        parser.add_class_arguments(section_class(section.name), section.name, skip=skip)
    return parser


def _parse(parser: ArgumentParser, argv: list[str]) -> Namespace:
    try:
        return parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise _explain(str(error)) from None


def _ask_folders(parser: ArgumentParser, argv: list[str], parsed: Namespace) -> None:
    """Fill in what the folders of `adapter.experts_from` decide and the user has not said.

    Raises:
        UserError: a folder is missing, damaged, or cannot be started from
    """
    paths = [expanded("adapter.experts_from", path) for path in parsed.adapter.experts_from]
    if not paths:
        return
    from dsmoelora.adapters.given import settings_of  # imports torch, which takes seconds

    said = parser.parse_args(argv, defaults=False).adapter
    for name, value in settings_of(paths, vars(said)).items():
        setattr(parsed.adapter, name, value)


def _instantiate(parser: ArgumentParser, parsed: Namespace) -> Recipe:
    built = parser.instantiate(parsed)
    return Recipe(**{section.name: getattr(built, section.name) for section in dataclasses.fields(Recipe)})


def _explain(message: str) -> ConfigError:
    """jsonargparse's message in our form."""
    wrong_type = re.search(r'Parser key "([\w.]+)":\s+(?:.*?)(?:Got|Given) value: (.*)', message, flags=re.DOTALL)
    if wrong_type is not None:
        key, value = wrong_type[1], wrong_type[2].strip().splitlines()[0]
        annotation = (key_types() | _FLAG_TYPES).get(key)
        if annotation is not None:
            shown = yaml.safe_load(value) if re.fullmatch(r"[\w.+-]+", value) else value
            name = key if "." in key else "--" + key.replace("_", "-")
            return bad_value(name, shown, in_words(annotation), "Correct it in the recipe or on the command line.")
    flat = " ".join(re.sub(r'Parser key "([\w.]+)":', r"\1:", message).split())
    return ConfigError(f"{flat.rstrip('.')}. `--help` lists all keys and flags.")


def _check_flags(parser: ArgumentParser, argv: list[str]) -> None:
    """Every `--flag` must be known; an unknown one is named with its nearest neighbour."""
    known = {option for action in parser._actions for option in action.option_strings}
    for word in argv:
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in known:
            check_derived(flag.removeprefix("--"))
            raise ConfigError(f"{flag} is no known flag or key.{did_you_mean(flag, known)} `--help` lists all.")


def _recipe_files(argv: list[str]) -> Iterator[Path]:
    """The values of `--config` in their order."""
    for place, word in enumerate(argv):
        if word == "--config" and place + 1 < len(argv):
            yield Path(expanded("--config", argv[place + 1]))
        elif word.startswith("--config="):
            yield Path(expanded("--config", word.removeprefix("--config=")))


def _recipe_first(argv: list[str]) -> list[str]:
    """The arguments with recipe files in front: an override counts wherever it stands."""
    files = [word for file in _recipe_files(argv) for word in (*_emptied_by(file), "--config", str(file))]
    rest = [
        word
        for place, word in enumerate(argv)
        if not word.startswith("--config=") and word != "--config" and (place == 0 or argv[place - 1] != "--config")
    ]
    return files + _whole_lists(rest) + (["--config"] if argv[-1:] == ["--config"] else [])


def _lists_of_mappings() -> list[str]:
    """The keys whose lists must be emptied before they are set anew.

    jsonargparse would fill the mappings of a list with what the list before it says: a new path would keep the old
    one's weight.
    """
    return [key for key, annotation in key_types().items() if dataclasses.is_dataclass(list_item(annotation))]


def _emptied_by(file: Path) -> Iterator[str]:
    """Arguments that empty the lists of mappings which a recipe file sets, for the files before it."""
    tree = yaml.safe_load(read_text("--config", file))
    for key in _lists_of_mappings():
        section, name = key.split(".")
        if name in tree.get(section, {}):
            yield f"--{key}=[]"


def _whole_lists(argv: list[str]) -> list[str]:
    """The arguments with an emptying one before each that sets a list of mappings."""
    lists = {f"--{key}" for key in _lists_of_mappings()}
    words: list[str] = []
    for word, after in zip_longest(argv, argv[1:], fillvalue=""):
        flag, equals, value = word.partition("=")
        if flag in lists:
            check_list(flag, value if equals else after)
            words.append(f"{flag}=[]")
        words.append(word)
    return words


def _non_negative(flag: str, value: int) -> int:
    if value < 0:
        raise bad_value(flag, value, "0 or more", "Example: --preview 3.")
    return value
