"""How good an adapter is on rows of data, its base beside it.

    python launch/evaluate.py --adapter runs/demo/adapter --data data/demo/eval.jsonl --score exact
    torchrun --nproc-per-node 8 launch/evaluate.py --adapter runs/x/adapter --data data/gsm8k.jsonl --score number

Also under `deepspeed`, `srun` and `mpirun`: every rank holds a whole model and takes its share of the rows. Started
again after a kill, it goes on where it was. docs/evaluation.md says what the scores are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

from rich import box
from rich.console import Console
from rich.table import Table

from dsmoelora.adapters.folder_files import read_adapter_config
from dsmoelora.cli import FlagParser, leave, run_guarded
from dsmoelora.config import DataConfig
from dsmoelora.config.recipe_file import data_source
from dsmoelora.config.run import QUANTIZE
from dsmoelora.errors import ConfigError, bad_value
from dsmoelora.logs import setup_logging
from dsmoelora.parallel.ranks import adopt_launcher_environment, env_rank, env_world_size

if TYPE_CHECKING:
    from dsmoelora.evaluate import Asked, Evaluation

SCORES = ("loss", "exact", "number", "choice")
OF_ANSWERS, OF_CHOICES = ("exact", "number"), ("choice",)  # scores that alone have some flags
MAX_LENGTH = 2048  # tokens of a row at most, where nobody says how many and the model has as many positions
ALONE = {"-h", "--help"}
REMEDY = "What was scored is kept: start again with the same command"
ELSEWHERE = "or name another folder with --out"


def main() -> None:
    """Score, print, write (collective)."""
    os.umask(os.umask(0) | 0o002)  # nobody else shall write into the folder, whatever the shell would allow
    if ALONE.intersection(sys.argv):
        parse_options(sys.argv[1:])
    adopt_launcher_environment()
    setup_logging(env_rank())
    # Imports of seconds, which a wrong flag need not wait for.
    from dsmoelora.evaluate import Evaluation, Store, table_of
    from dsmoelora.parallel import comm
    from dsmoelora.parallel.watchdog import watched

    if env_world_size() > 1:
        comm.init()
    options = comm.together(lambda: parse_options(sys.argv[1:]))
    console = Console(quiet=env_rank() > 0, highlight=False, soft_wrap=True)
    if options.tasks:
        run_tasks(options, console)
        return
    asked = comm.together(lambda: read(options))
    for remark in asked.items.remarks:
        console.print(remark, markup=False)
    scored = f"{len(asked.items.items):,} rows, score {asked.score}, ranks: {comm.world_size()}"
    console.print(f"{scored}; results go to {options.out}", markup=False)
    store = Store(options.out)
    comm.together(lambda: store.open(asked.identity()) if comm.rank() == 0 else None)
    with watched(options.out, options.hang_timeout, REMEDY, ELSEWHERE) as heartbeat:
        evaluation = Evaluation(asked, store, heartbeat, console)
        summary = evaluation.run()
        console.print(table_of(summary))
        if options.routing:
            report_routing(options, evaluation, console)
    console.print(f"A line for each row: {options.out / 'results.jsonl'}", markup=False)


def read(options: argparse.Namespace) -> Asked:
    """Rows, tokenizer, and how the model will be loaded; everything that can be wrong before it is."""
    from dsmoelora.evaluate import LOADERS, Asked, Reading
    from dsmoelora.model import find_trained, limits_at, trained_tokenizer

    trained = find_trained(options.adapter, options.base, options.trust_remote_code, options.quantize)
    tokenizer = trained_tokenizer(options.adapter, options.trust_remote_code)
    data: DataConfig = options.sources
    limits = limits_at(trained.base, options.trust_remote_code)
    max_length, remarks = limits.length("data.max_length", options.max_length, data.max_length)
    of_rows = (data.on_bad_row, options.num_samples, options.choices)
    how = Reading(tokenizer, max_length, *of_rows, limits, options.max_new_tokens)
    items = LOADERS[options.score](data.eval, how)
    items = replace(items, remarks=remarks + items.remarks)
    more: dict[str, Any] = {"batch_size": options.batch_size, "max_new_tokens": options.max_new_tokens}
    return Asked(trained, options.score, items, tokenizer, options.stages, **more)


def run_tasks(options: argparse.Namespace, console: Console) -> None:
    """Let lm-evaluation-harness score base and adapter; print, and write `tasks.json` (collective)."""
    from dsmoelora.evaluate.harness import find_tasks, score_tasks
    from dsmoelora.model import find_trained, trained_tokenizer
    from dsmoelora.parallel import comm

    manager = comm.together(lambda: find_tasks(options.tasks, options.tasks_dir))
    tokenizer = comm.together(lambda: trained_tokenizer(options.adapter, options.trust_remote_code))
    how = (options.base, options.trust_remote_code, options.quantize)
    trained, model, found = comm.together(lambda: find_trained(options.adapter, *how)), None, {}
    for stage in options.stages:
        if stage == "adapter" and trained.has_own_base:
            model = None  # two need not be there at once
        model = comm.together(trained.load_base if stage == "base" else partial(trained.load, model)).eval()
        more = (options.batch_size, options.num_samples, options.apply_chat_template)
        found[stage] = score_tasks(model, tokenizer, manager, options.tasks, *more)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("task", "metric", *found):
        table.add_column(header, overflow="fold")
    for scores in zip(*found.values(), strict=True):
        cells = [f"{score.value:.4f} ± {score.error:.4f}" for score in scores]
        table.add_row(scores[0].task, scores[0].metric, *cells)
    console.print(table)

    def write() -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        written = {stage: [vars(score) for score in scores] for stage, scores in found.items()}
        (options.out / "tasks.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")

    comm.together(lambda: write() if comm.rank() == 0 else None)
    console.print(f"Written: {options.out / 'tasks.json'}", markup=False)


def report_routing(options: argparse.Namespace, evaluation: Evaluation, console: Console) -> None:
    """Print and draw which experts read the rows."""
    from dsmoelora.evaluate import remarks_on
    from dsmoelora.parallel import comm

    report = evaluation.routing()
    for remark in remarks_on(report):
        console.print(remark, markup=False)

    def write() -> None:
        from launch.plot import draw_routing

        (options.out / "routing.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
        draw_routing(report).savefig(options.out / "routing.png", dpi=150, bbox_inches="tight")

    comm.together(lambda: write() if comm.rank() == 0 else None)
    console.print(f"Drawn: {options.out / 'routing.png'}", markup=False)


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: a flag is missing, out of range, or has no meaning for the score
    """
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--adapter", type=Path, required=True, help="adapter folder, e.g. runs/demo/adapter")
    add("--data", action="append", help="file, or {path: FILE, format: ...} as in data.eval; may be repeated")
    add("--score", choices=SCORES, help="what is measured on the rows of --data; see docs/evaluation.md")
    add("--tasks", help="in place of both: tasks of lm-evaluation-harness, e.g. arc_easy,gsm8k")
    add("--tasks-dir", type=Path, help="folder with tasks of your own (YAML), for --tasks")
    add("--apply-chat-template", action="store_true", help="put prompts of --tasks into the chat template")
    add("--out", type=Path, help="folder for the results; default: evaluations/<data>-<score> beside the adapter")
    add("--base", help="folder of the base model; default: the one named in adapter_config.json")
    add("--quantize", choices=QUANTIZE, default="none", help="how the base's weights are kept; default: none")
    add("--trust-remote-code", action="store_true", help="run code that comes with the base model")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--base-only", action="store_true", help="score the base alone")
    who.add_argument("--adapter-only", action="store_true", help="score the adapter alone, in half of the time")
    add("--routing", action="store_true", help="report and draw which experts read right and wrong answers")
    add("--num-samples", type=int, default=0, metavar="N", help="rows of each file at most; default: all")
    add("--batch-size", type=int, default=8, help="rows that go through a model at once; default: 8")
    add("--max-new-tokens", type=int, help="length of an answer at most, of exact and number; default: 256")
    add("--choices", choices=("letters", "texts"), help="of choice: what the answers are; default: letters")
    add("--data.max_length", type=int, dest="max_length", metavar="N", help="tokens of a row at most; default: 2048")
    add("--data.on_bad_row", choices=("error", "skip"), default="error", dest="on_bad_row", help="default: error")
    add(
        "--hang-timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="without any progress, after which it ends",
    )
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args(argv)
    options.stages = ("base",) if options.base_only else ("adapter",) if options.adapter_only else ("base", "adapter")
    _check_ranges(options)
    if options.tasks:
        return _with_tasks(options)
    _check_what(options)
    _check_flags_of_scores(options)
    sources = [data_source("--data", text) for text in options.data]
    max_length = MAX_LENGTH if options.max_length is None else options.max_length
    options.sources = DataConfig(eval=sources, max_length=max_length, on_bad_row=options.on_bad_row)
    if options.out is None:
        names = "-".join(Path(source.path).stem for source in options.sources.eval)
        first = f"-{options.num_samples}" if options.num_samples else ""  # a quick look is another evaluation
        options.out = options.adapter.parent / "evaluations" / f"{names}-{options.score}{first}"
    return options


def _check_what(options: argparse.Namespace) -> None:
    if not options.data or not options.score:
        raise ConfigError("Nothing says what to score. Give --data and --score, or --tasks.")
    if options.tasks_dir or options.apply_chat_template:
        flag = "--tasks-dir" if options.tasks_dir else "--apply-chat-template"
        raise ConfigError(f"{flag} belongs to --tasks. Drop it.")


def _with_tasks(options: argparse.Namespace) -> argparse.Namespace:
    """The options, checked for what has no meaning beside `--tasks`."""
    from dsmoelora.evaluate.harness import check_harness

    for name in ("data", "score", "max_new_tokens", "choices", "routing"):
        if getattr(options, name):
            raise ConfigError(f"--{name.replace('_', '-')} belongs to --data and --score, not to --tasks. Drop it.")
    if read_adapter_config(options.adapter).get("router") == "prompt" and not options.base_only:
        raise ConfigError(
            "--tasks asks for likelihoods without saying where a prompt ends, but the router of this adapter (prompt) "
            "chooses experts by the prompt alone. Use --data and --score."
        )
    check_harness()
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not names:
        raise bad_value("--tasks", options.tasks, "names of tasks with commas between", "Example: arc_easy,gsm8k.")
    folder = options.tasks_dir
    if folder is not None and not folder.is_dir():
        raise bad_value("--tasks-dir", str(folder), "a folder with tasks (YAML)", "Check the path.")
    options.tasks = names
    if options.out is None:
        options.out = options.adapter.parent / "evaluations" / "-".join(options.tasks)
    return options


def _check_ranges(options: argparse.Namespace) -> None:
    for name, least in (("num_samples", 0), ("batch_size", 1), ("max_new_tokens", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise bad_value(f"--{name.replace('_', '-')}", value, f"{least} or more", "Leave it out for the default.")
    if not options.hang_timeout > 0:
        raise bad_value("--hang-timeout", options.hang_timeout, "above 0", "Leave it out for the default.")


def _check_flags_of_scores(options: argparse.Namespace) -> None:
    for name, scores, default in (("max_new_tokens", OF_ANSWERS, 256), ("choices", OF_CHOICES, "letters")):
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.score not in scores:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} belongs to --score {' and '.join(scores)}, not {options.score}. Drop it.")
    if options.routing and options.base_only:
        raise ConfigError("--routing looks at the adapter, but --base-only leaves it out. Drop one of the two.")
    if options.routing:
        from launch.plot import check_matplotlib

        check_matplotlib("--routing")


if __name__ == "__main__":
    leave(run_guarded(main))
