"""The batch scripts on a real Slurm: runs to the end, preempted, with a lost node, with a killed rank."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dsmoelora.run.files import read_metrics
from tests.launched import ROOT, last_step, make_workshop
from tests.slurm.jobs import ENDED, Job, kill_rank, slurm, wait_for_end

CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
COMPARED = ("step", "loss", "grad_norm", "lr", "eval/loss")
# A step takes a third of a second where two cores carry four ranks: time enough to disturb a run in the middle.
SETTINGS = ("--train.max_steps", "40", "--train.eval_every", "15", "--train.save_every", "5")
SETTINGS += ("--train.num_samples", "0", "--adapter.target_modules", "[q_proj, v_proj]")
SHORT = ("--train.max_steps", "10")  # for runs that are left alone
Submit = Callable[..., Job]


def nodes() -> list[str]:
    if shutil.which("sinfo") is None:
        return []
    try:
        return sorted(set(slurm("sinfo", "-h", "-N", "-o", "%N").splitlines()))  # a line for each partition
    except (AssertionError, subprocess.TimeoutExpired):
        return []


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(len(nodes()) < 2, reason="sinfo shows no Slurm cluster of two nodes or more"),
]


@pytest.fixture(scope="module")
def workshop() -> Path:
    """Model, data and recipe below the project, which all nodes see; a temporary folder may be each node's own."""
    folder = ROOT / ".cache" / "slurm-tests"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return make_workshop(folder)


@pytest.fixture(scope="module")
def submit(workshop: Path) -> Iterator[Submit]:
    """`submit(script, name, *argv, **more)` starts a run; what is left at the end is cancelled."""
    jobs: list[Job] = []

    def start(script: str, name: str, *argv: str, **more: Any) -> Job:
        run = (script, workshop / "recipe.yaml", workshop / "runs" / name)
        jobs.append(Job(*run, *SETTINGS, *argv, **more))
        return jobs[-1]

    yield start
    for job in jobs:
        job.cancel()


@pytest.fixture(scope="module")
def undisturbed(submit: Submit) -> Path:
    """The run folder of a run that nothing happened to, on a rank of each of two nodes."""
    return submit("train.sbatch", "undisturbed").finish().folder


@pytest.fixture(scope="module")
def two_on_a_node(submit: Submit) -> Path:
    """The run folder of the same with two ranks on each node."""
    return submit("train.sbatch", "two-on-a-node", *SHORT, ranks_per_node=2).finish().folder


def assert_same_run(folder: Path, expected: Path) -> None:
    """Losses of all steps and the adapter are equal to the last bit."""
    for row, wanted in zip(*(read_metrics(each / "metrics.jsonl") for each in (folder, expected)), strict=True):
        assert [row.get(name) for name in COMPARED] == [wanted.get(name) for name in COMPARED]
    found, wanted = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (folder, expected))
    assert found.keys() == wanted.keys()
    assert all(bool((found[name] == wanted[name]).all()) for name in wanted)


def assert_same_losses(folder: Path, expected: Path) -> None:
    """Of all steps, up to the rounding of sums in another order."""
    rows, wanted = (read_metrics(each / "metrics.jsonl") for each in (folder, expected))
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    assert [row["loss"] for row in rows[1:]] == pytest.approx([row["loss"] for row in wanted[1:]], rel=1e-4)


def test_srun_trains_on_two_nodes(undisturbed: Path, two_on_a_node: Path) -> None:
    for folder, num_ranks, num_steps in ((undisturbed, 2, 40), (two_on_a_node, 4, 10)):
        assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(num_steps + 1))
        assert len(list((folder / "heartbeat").glob("rank-*"))) == num_ranks


@pytest.mark.parametrize("script", ["train_torchrun.sbatch", "train_deepspeed.sbatch"])
def test_other_launchers_train_the_same(script: str, submit: Submit, two_on_a_node: Path) -> None:
    job = submit(script, script.partition(".")[0], *SHORT, ranks_per_node=2)
    assert_same_run(job.finish().folder, two_on_a_node)


def test_a_preempted_job_is_requeued_and_ends_the_same(submit: Submit, undisturbed: Path) -> None:
    if "urgent" not in slurm("sinfo", "-h", "-o", "%R"):
        pytest.skip("the cluster has no partition `urgent` that preempts the default one")
    job = submit("train.sbatch", "preempted")
    job.wait_for_step(5)
    urgent = ("--partition", "urgent", "--exclusive", "--nodes", str(len(nodes())), "--output", "/dev/null")
    slurm("sbatch", *urgent, "--wrap", "sleep 2")
    job.finish()
    said = job.said()
    assert job.field("Restarts") == "1", said
    assert "asked to stop" in said and "Going on from" in said
    (seconds,) = re.findall(r"Stopped ([\d.]+) s after the request: step \d+ of 40 lies in", said)
    assert float(seconds) < 20
    assert_same_run(job.folder, undisturbed)


def test_a_stopped_run_goes_on_with_another_number_of_nodes(submit: Submit, undisturbed: Path) -> None:
    job = submit("train.sbatch", "fewer-nodes")
    job.wait_for_step(7)
    job.cancel()
    job.wait_until(lambda: job.field("JobState") in ENDED, "its end", 100, may_end=True)
    assert job.field("JobState") == "CANCELLED" and not (job.folder / "DONE").exists(), job.said()
    stopped_at = last_step(job.folder)
    said = submit("train.sbatch", "fewer-nodes", num_nodes=1).finish().said()
    assert f"Going on from {job.folder}/checkpoint-{stopped_at}\n" in said, said
    assert_same_losses(job.folder, undisturbed)


def test_mpirun_in_a_job_trains_the_same(workshop: Path, undisturbed: Path) -> None:
    if shutil.which("mpirun") is None or find_spec("mpi4py") is None:
        pytest.skip("mpirun (Open MPI) or mpi4py is not installed")
    train = ["--config", str(workshop / "recipe.yaml"), "--run.name", "mpirun", *SETTINGS]
    mpirun = shlex.join(["mpirun", "-n", "2", sys.executable, "launch/train.py", *train])
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    log = ROOT / "logs" / "mpirun.out"
    log.parent.mkdir(exist_ok=True)
    options = ["--parsable", "--nodes", "2", "--ntasks-per-node", "1", "--time", "10", "--output", str(log)]
    wait_for_end(slurm("sbatch", *options, "--wrap", mpirun, **as_root).split(";")[0])
    folder = workshop / "runs" / "mpirun"
    assert (folder / "DONE").exists(), log.read_text()
    assert_same_run(folder, undisturbed)


def test_a_killed_rank_ends_the_job_and_it_is_requeued_when_asked(submit: Submit, undisturbed: Path) -> None:
    job = submit("train.sbatch", "killed", REQUEUE_ON_FAILURE="1")
    job.wait_for_step(7)
    kill_rank(job, 1)
    job.finish()
    said = job.said()
    # A loaded controller sends the signal that ended the first attempt once more, a minute later, and asks the next one
    # to stop by it: that one leaves with 0, and is brought back too.
    killed, *stopped = re.findall(r"ended with exit code (\d+)", said)
    assert int(killed) and set(stopped) == {"0"} and "Going on from" in said, said
    assert_same_run(job.folder, undisturbed)


def test_a_run_survives_the_loss_of_a_node(submit: Submit, undisturbed: Path) -> None:
    """Its experts are partitioned, which changes nothing but the order of sums."""
    if subprocess.run([CLUSTER, "env"], capture_output=True).returncode or len(nodes()) < 3:
        pytest.skip("only nodes of tests/slurm/cluster.sh may be killed, and one must be left over")
    job = submit("train.sbatch", "lost-node", "--parallel.ep_size", "2")
    job.wait_for_step(7)
    lost = job.field("NodeList").replace("[", "").replace("]", "").replace("n", "").replace("-", ",").split(",")[-1]
    subprocess.run([CLUSTER, "kill", f"n{lost}"], check=True, timeout=60)
    job.finish()
    assert int(job.field("Restarts")) >= 1 and "Going on from" in job.said(), job.said()
    subprocess.run([CLUSTER, "start", f"n{lost}"], check=True, timeout=60)
    assert_same_losses(job.folder, undisturbed)


@pytest.fixture(scope="module")
def demo(workshop: Path) -> list[str]:
    """Settings that point the demo recipe to its model and data, made below the workshop, and make it short."""
    folders = {"--model-dir": workshop / "demo-model", "--data-dir": workshop / "demo-data"}
    argv = [str(word) for option in folders.items() for word in option]
    subprocess.run([sys.executable, "launch/prepare_demo.py", *argv], cwd=ROOT, check=True, timeout=300)
    held_out = workshop / "demo-data" / "eval.jsonl"
    held_out.write_text("".join(held_out.read_text().splitlines(keepends=True)[:4]))
    settings = {
        "model.path": workshop / "demo-model",
        "data.train": f"[{{path: {workshop}/demo-data/train.jsonl}}]",
        "data.eval": f"[{{path: {held_out}}}]",
        "data.packing": "false",
        "train.batch_size": 4,
        "train.micro_batch_size": 1,
        "train.max_steps": 2,
        "train.eval_every": 2,
        "train.num_samples": 0,
    }
    return [str(word) for key, value in settings.items() for word in (f"--{key}", value)]


def test_the_demo_trains_and_stops_in_time_wherever_its_experts_lie(demo: list[str], workshop: Path) -> None:
    losses, held_out = {}, {}
    for ep_size in (1, 2):
        folder = workshop / "runs" / f"demo-ep{ep_size}"
        argv = [*demo, "--parallel.ep_size", str(ep_size), "--deepspeed", str(ROOT / "ds_configs" / "zero3_small.json")]
        job = Job("train.sbatch", ROOT / "launch/recipes/demo.yaml", folder, *argv)
        try:
            if ep_size == 2:
                job.wait_for_step(1, timeout_s=300)
                slurm("scancel", "--signal=USR1", "--batch", job.id)
            said = job.finish().said()
        finally:
            job.cancel()
        rows = read_metrics(folder / "metrics.jsonl")
        if ep_size == 2:
            (seconds,) = re.findall(r"Stopped ([\d.]+) s after the request", said)
            assert float(seconds) < 20
        losses[ep_size], held_out[ep_size] = [row["loss"] for row in rows[1:]], rows[-1]["eval/loss"]
    assert losses[2][0] == pytest.approx(losses[1][0], rel=2e-3)  # no weight has moved yet
    assert losses[2] == pytest.approx(losses[1], rel=3e-2)  # where a score rounds otherwise, another expert is chosen
    assert held_out[2] == pytest.approx(held_out[1], rel=1e-2)
