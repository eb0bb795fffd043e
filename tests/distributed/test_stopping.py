"""One rank is asked to stop, and all ranks hear of it at the same place."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from dsmoelora.config import Recipe
from dsmoelora.data.chat import Prompt
from tests.conftest import PoolFactory
from tests.engine_ranks import Job, batches_of, build_engine, train_on_rank
from tests.plain_training import METHODS, make_base, make_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_recipe(make_base(tmp_path_factory.mktemp("base")), **METHODS["adamw-short"])


def polls_until_stopped(signalled: int, at: int) -> tuple[int, bool]:
    """Polls that returned, and whether this rank was asked itself."""
    from dsmoelora.parallel import comm
    from dsmoelora.parallel.stopping import Stopped, StopRequest

    stop, count = StopRequest(), 0
    with stop.listening(), pytest.raises(Stopped):
        for _ in range(20):
            if comm.rank() == signalled and count == at:
                os.kill(os.getpid(), signal.SIGUSR1)
            stop.poll()
            count += 1
    return count, stop.asked


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_poll(worker_pool: PoolFactory, signalled: int) -> None:
    # the poll after the signal asks, the one after that knows
    assert worker_pool(2).run(polls_until_stopped, signalled, 3) == [(4, signalled == 0), (4, signalled == 1)]


def wait_for_the_other(folder: str) -> tuple[float, bool]:
    """Rank 0 works for the others, as when it tokenises, and rank 1 is asked while it waits."""
    from dsmoelora.parallel import comm
    from dsmoelora.parallel.stopping import Stopped, StopRequest

    stop, begin = StopRequest(Path(folder)), time.monotonic()

    def work() -> None:
        if comm.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    with stop.listening():
        with pytest.raises(Stopped):
            stop.together(work)
        stop.leave("nothing was trained.")
        comm.barrier()
    return time.monotonic() - begin, (Path(folder) / "STOP").exists()


def test_long_work_of_one_rank_ends_when_another_is_asked(worker_pool: PoolFactory, tmp_path: Path) -> None:
    for seconds, file_is_left in worker_pool(2).run(wait_for_the_other, str(tmp_path / "run")):
        assert seconds < 10
        assert not file_is_left


def stop_between_micro_batches(job: Job, root: str) -> int:
    """Two whole steps, then one that is cut short after its first micro-batch; saves, and gives its step."""
    from dsmoelora.parallel import comm
    from dsmoelora.parallel.stopping import Stopped, StopRequest

    engine = build_engine(job)
    for step in range(2):
        engine.train_step(batches_of(job, step))
    engine.stop = StopRequest()
    with engine.stop.listening():
        if comm.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Stopped):
            engine.train_step(batches_of(job, 2))
    engine.save(Path(root), {"next": 2}, keep=1)
    return engine.step


def test_a_step_that_is_cut_short_leaves_no_trace(worker_pool: PoolFactory, recipe: Recipe, tmp_path: Path) -> None:
    """From its checkpoint, a run goes on to the numbers of an undisturbed one."""
    job = Job(recipe, accumulation=4)
    assert worker_pool(2).run(stop_between_micro_batches, job, str(tmp_path)) == [2, 2]
    resumed = Job(recipe, accumulation=4, first_step=2, load_from=tmp_path / "checkpoint-2")
    shares, straight = (worker_pool(2).run(train_on_rank, each) for each in (resumed, job))
    assert [share.losses for share in shares] == [share.losses[2:] for share in straight]
    for share, undisturbed in zip(shares, straight, strict=True):
        assert share.numbers.keys() == undisturbed.numbers.keys()
        for kind, pieces in share.numbers.items():
            for name, runs in pieces.items():
                wanted = undisturbed.numbers[kind][name]
                assert all((a[2] == b[2]).all() for a, b in zip(runs, wanted, strict=True)), (kind, name)


def evaluate_and_generate(job: Job) -> list[int]:
    """Forwards that a request lets by in an evaluation of many micro-batches and in an answer of many tokens."""
    from dsmoelora.parallel import comm
    from dsmoelora.parallel.stopping import Stopped, StopRequest

    engine, counts = build_engine(job), []
    for work in (
        lambda: engine.evaluate(batches_of(job, 0) * 5),
        lambda: engine.generate([Prompt([{"role": "user", "content": "ab"}])], 30),
    ):
        engine.stop = StopRequest()
        forwards: list[int] = []
        hook = engine.model.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        with engine.stop.listening():
            if comm.rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            with pytest.raises(Stopped):
                work()
        hook.remove()
        counts.append(len(forwards))
    return counts


def test_evaluation_and_answers_are_cut_short(worker_pool: PoolFactory, recipe: Recipe) -> None:
    assert worker_pool(2).run(evaluate_and_generate, Job(recipe, accumulation=4)) == [[1, 1], [1, 1]]
