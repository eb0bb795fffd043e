"""Submit a run to Slurm, or see how the runs are: `python launch/submit.py --config recipe.yaml --nodes 4`.

Checks the recipe, fills in the options of `sbatch` and submits one of the scripts in slurm/. What it does not know goes
on to launch/train.py. `--dry-run` prints the command instead; `--status` lists runs with state, step, loss, time left.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsmoelora.cli import Command, FlagParser, parse_command, run_guarded
from dsmoelora.config.checks import require
from dsmoelora.errors import ConfigError
from dsmoelora.run.files import DONE_FILE, FAILED_FILE, METRICS_FILE, RECIPE_FILE, read_metrics
from dsmoelora.signs_of_life.heartbeat import read_sign

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"srun": "train.sbatch", "torchrun": "train_torchrun.sbatch", "deepspeed": "train_deepspeed.sbatch"}
# Options of sbatch that are handed on as they are.
PASSED = ("partition", "account", "qos", "time", "cpus-per-task", "constraint", "dependency")
_SLURM_TIMEOUT_S = 60.0  # its commands wait for ever when its controller is down


def main() -> None:
    """Submit, or list."""
    options, train_argv = parse_options(sys.argv[1:])
    console = Console(highlight=False)
    if options.status:
        console.print(table(find_runs(Path(options.run_dir), queued_jobs())))
        return
    command, variables = sbatch_command(options, train_argv)
    if options.dry_run:
        words = [f"{name}={value}" for name, value in variables.items()]
        print(shlex.join([*words, *command]))
        return
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not on this machine's PATH. Submit from a login node, or look with --dry-run.")
    Path("logs").mkdir(exist_ok=True)  # Slurm opens the log file and makes no folder for it
    done = ask_slurm(command, variables)
    if done.returncode:
        raise ConfigError(f"sbatch refused: {done.stderr.strip()} The command was: {shlex.join(command)}")
    console.print(done.stdout.strip())


def parse_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and what is left for launch/train.py."""
    parser = FlagParser(prog="launch/submit.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--status", action="store_true", help="list the runs below --run-dir and exit")
    parser.add_argument("--run-dir", default="runs", metavar="FOLDER", help="what --status lists (default: runs)")
    parser.add_argument("--dry-run", action="store_true", help="print the command, submit nothing")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8, help="ranks of a node (default: 8)")
    parser.add_argument("--launcher", choices=SCRIPTS, default="srun")
    parser.add_argument("--lead-time", type=int, default=300, metavar="SECONDS", help="for the save before time is up")
    parser.add_argument("--requeue-on-failure", action="store_true", help="also when a rank failed or was killed")
    parser.add_argument("--max-requeues", type=int, default=20, metavar="N")
    for name in PASSED:
        parser.add_argument(f"--{name}", help="as of sbatch")
    return parser.parse_known_args(argv)


def sbatch_command(options: argparse.Namespace, train_argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words of the command, and the variables that it needs.

    Raises:
        UserError: this is not the project's folder, or the run could not begin on that many ranks
    """
    if Path.cwd() != ROOT:  # the job begins where it is submitted, and so must every path of the command
        raise ConfigError(f"The job's files are named from {ROOT}. Submit there: cd {shlex.quote(str(ROOT))}")
    parsed = parse_command(train_argv)
    recipe = parsed.recipe
    for flag in ("--nodes", "--gpus-per-node"):
        number = getattr(options, flag.removeprefix("--").replace("-", "_"))
        require(number >= 1, flag, number, "1 or more", "The job needs a rank.")
    check(parsed, options.nodes * options.gpus_per_node)
    tasks = options.gpus_per_node if options.launcher == "srun" else 1
    command = ["sbatch", "--job-name", recipe.run.name, "--nodes", str(options.nodes)]
    command += ["--ntasks-per-node", str(tasks), "--gpus-per-node", str(options.gpus_per_node)]
    command += [f"--signal=B:USR1@{options.lead_time}"]
    for name in PASSED:
        value = getattr(options, name.replace("-", "_"))
        command += [] if value is None else [f"--{name}", value]
    variables = {"MAX_REQUEUES": str(options.max_requeues)}
    variables |= {"REQUEUE_ON_FAILURE": "1"} if options.requeue_on_failure else {}
    return [*command, f"slurm/{SCRIPTS[options.launcher]}", *train_argv], variables


def check(command: Command, world_size: int) -> None:
    """Refuse what launch/train.py would refuse when the job begins.

    Raises:
        UserError: something cannot work
    """
    from dsmoelora.model.folder import check_trainable  # imports torch, which takes seconds
    from dsmoelora.plan import make_plan

    recipe = command.recipe
    if recipe.model.dtype == "auto":  # the accelerator is on another machine
        recipe = replace(recipe, model=replace(recipe.model, dtype="bf16"))
    make_plan(recipe, command.deepspeed, world_size, "auto" if command.resume == "none" else command.resume)
    check_trainable(recipe.model)


@dataclass(frozen=True)
class Run:
    """A line of `--status`.

    Args:
        name: of its folder
        state: done, running, stopped, or what Slurm says
        steps: `taken/all`
        loss: of the last step
        left: estimated time to the last step
        job_left: time that Slurm leaves the job
    """

    name: str
    state: str
    steps: str
    loss: str
    left: str
    job_left: str


def find_runs(root: Path, jobs: dict[str, tuple[str, str]]) -> list[Run]:
    """All runs below a folder, the last written first, and queued jobs that have no folder yet.

    Args:
        root: e.g. `runs`
        jobs: (state, time left) by job name, which is the run's name for jobs of this program
    """
    folders = [file.parent for file in root.glob(f"*/{RECIPE_FILE}")]
    folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    names = {folder.name for folder in folders}
    waiting = [Run(name, state, "-", "-", "-", left) for name, (state, left) in jobs.items() if name not in names]
    return waiting + [_look(folder, jobs) for folder in folders]


def _look(folder: Path, jobs: dict[str, tuple[str, str]]) -> Run:
    recipe = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    all_steps = int(recipe["train"]["max_steps"])
    metrics = folder / METRICS_FILE
    rows = read_metrics(metrics) if metrics.exists() else []
    step = int(rows[-1]["step"]) if rows else 0
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    state, job_left = jobs.get(folder.name, ("stopped", "-"))
    sign = read_sign(folder, 0)
    if (folder / DONE_FILE).exists():
        state, job_left = "done", "-"
    elif sign is not None and sign.is_fresh():
        state = f"running ({sign.phase})"
    elif (folder / FAILED_FILE).exists():
        state = "failed"
    left = _estimate(folder, step, all_steps) if state.startswith("running") else "-"
    return Run(folder.name, state, f"{step}/{all_steps}", f"{losses[-1]:.4f}" if losses else "-", left, job_left)


def _estimate(folder: Path, step: int, all_steps: int) -> str:
    """Time to the last step at the pace since the newest checkpoint."""
    steps = [int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")]
    if not steps or step <= max(steps):
        return "-"
    since = (folder / METRICS_FILE).stat().st_mtime - (folder / f"checkpoint-{max(steps)}").stat().st_mtime
    seconds = round(since / (step - max(steps)) * (all_steps - step))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def queued_jobs() -> dict[str, tuple[str, str]]:
    """State and time left of the user's jobs, by name; none where there is no Slurm."""
    if shutil.which("squeue") is None:
        return {}
    done = ask_slurm(["squeue", "--me", "--noheader", "--format=%j|%T|%L"])
    parts = [line.rsplit("|", 2) for line in done.stdout.splitlines()]
    return {name: (state.lower(), left) for name, state, left in parts}


def ask_slurm(command: list[str], variables: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm, with these variables beside those of the environment.

    Raises:
        ConfigError: no answer comes
    """
    env = os.environ | (variables or {})
    try:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=_SLURM_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{command[0]} gives no answer: Slurm's controller is down or out of reach. Try later."
        ) from None


def table(runs: list[Run]) -> Table:
    """The list for a terminal."""
    shown = Table(box=box.SIMPLE_HEAD)
    for header in ("run", "state", "step", "loss", "time left", "job's time left"):
        shown.add_column(header)
    for run in runs:
        shown.add_row(*(Text(text) for text in (run.name, run.state, run.steps, run.loss, run.left, run.job_left)))
    return shown


if __name__ == "__main__":
    sys.exit(run_guarded(main))
