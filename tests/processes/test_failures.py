"""How a generation ends when something goes wrong: quickly, and in words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.popen_forkserver import Popen
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from nitsum.engine import launch
from nitsum.engine.process_executor import ProcessExecutor
from nitsum.errors import ConfigError, MissingDependency, WorkerDied
from nitsum.messages import Move, Step, Work
from nitsum.request import SamplingParams
from nitsum.shape import ModelShape
from tests.processes.driver import (
    ALONE_0,
    ALONE_1,
    BOTH,
    Driver,
    make_config,
    make_executor,
    tokens_of,
)

pytestmark = pytest.mark.processes

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """Every test here ends its generation; the next one starts another."""
    driver = Driver(make_config(tmp_path_factory.mktemp("tiny"), timeout_s=1.0))
    yield driver
    driver.executor.close()


def pids(executor: ProcessExecutor) -> list[int]:
    workers = executor._workers
    assert workers is not None
    return [process.pid or 0 for process in workers._generation.processes]


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists() and _stat(pid)[0] != "Z"


def parent_of(pid: int) -> int:
    return int(_stat(pid)[1])


def _stat(pid: int) -> list[str]:
    """What the kernel says of a process, after its name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def poll_until_dead(executor: ProcessExecutor, timeout_s: float) -> str:
    """What `WorkerDied` says, raised within `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            executor.poll(0.2)
        except WorkerDied as died:
            return str(died)
    pytest.fail("nobody noticed")


def test_a_killed_worker_ends_the_generation_and_the_next_one_is_sound(driver: Driver):
    driver.executor.start()
    before = tokens_of(driver.generate(BOTH, 4, GREEDY))
    old = pids(driver.executor)
    os.kill(old[1], signal.SIGKILL)
    message = poll_until_dead(driver.executor, 10)
    assert "nitsum-rank1 was ended by SIGKILL (out of memory?)" in message
    assert not any(is_alive(pid) for pid in old)
    with pytest.raises(WorkerDied, match="start"):
        driver.executor.poll(0)
    driver.executor.start()
    assert driver.executor.num_sent(0) == 0
    assert tokens_of(driver.generate(BOTH, 4, GREEDY)) == before


def test_ranks_of_all_generations_share_one_import_of_torch(driver: Driver):
    """They come from one process, which outlives them."""
    parents: set[int] = set()
    for _ in range(2):
        driver.executor.start()
        parents |= {parent_of(pid) for pid in pids(driver.executor)}
        driver.executor.close()
    (parent,) = parents
    assert parent != os.getpid()
    assert "forkserver" in Path(f"/proc/{parent}/cmdline").read_text()
    assert "torch" in Path(f"/proc/{parent}/maps").read_text()


def test_the_process_that_ranks_are_forked_from_may_end(driver: Driver):
    """Its end is that of the generation, and the next one has another."""
    driver.executor.start()
    before = tokens_of(driver.generate(BOTH, 4, GREEDY))
    old = pids(driver.executor)
    os.kill(parent_of(old[0]), signal.SIGKILL)
    poll_until_dead(driver.executor, 10)
    deadline_s = time.monotonic() + 10
    while any(is_alive(pid) for pid in old):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    driver.executor.start()
    assert tokens_of(driver.generate(BOTH, 4, GREEDY)) == before


def test_ranks_that_cannot_be_started_may_be_started_again(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
):
    """As when the process to fork from ends at that moment: the engine tries once more."""

    def fail(_self: Popen, _process: BaseProcess) -> None:
        raise EOFError("unexpected EOF")

    with monkeypatch.context() as patch:
        patch.setattr(Popen, "_launch", fail)
        with pytest.raises(WorkerDied, match="could not be started"):
            driver.executor.start()
    assert len(driver.executor.start()) == 2


def test_gpu_ranks_import_torch_themselves():
    """Each sets its environment before."""
    assert launch.worker_context("cuda").get_start_method() == "spawn"


def test_a_rank_that_stops_answering_is_named_by_its_peer(driver: Driver):
    driver.executor.start()
    os.kill(pids(driver.executor)[1], signal.SIGSTOP)
    driver.prefill(BOTH, *driver.place(), GREEDY)
    message = poll_until_dead(driver.executor, 10)
    assert "rank 0: waited 1 s in TP2@0-1 for rank(s) 1." in message


def test_a_rank_that_nobody_waits_for_is_missed_too(driver: Driver):
    driver.executor.start()
    driver.generate(ALONE_1, 2, GREEDY)
    os.kill(pids(driver.executor)[1], signal.SIGSTOP)
    time.sleep(1.5)  # being idle is not being stuck
    assert driver.executor.poll(0.2) == []
    driver.prefill(ALONE_1, *driver.place(), GREEDY)
    assert "rank 1 completed nothing for 1 s" in poll_until_dead(driver.executor, 10)


def test_a_move_that_waits_for_a_message_never_sent_says_so(driver: Driver):
    driver.executor.start()
    driver.executor.send([0], Move(1, [], [], [(1, 5)]))
    message = poll_until_dead(driver.executor, 10)
    assert "rank 0: waited 1 s for rank 1 to complete message 5; it is at 0." in message


def test_a_mistake_in_a_step_comes_back_with_its_place(driver: Driver):
    driver.executor.start()
    driver.executor.send([0], Step(1, 1, ALONE_0, [], [], [Work(10**6, 0, 1, True)]))
    message = poll_until_dead(driver.executor, 10)
    assert "rank 0: IndexError" in message
    assert "slots.py" in message


def test_a_checkpoint_without_weights_is_told_by_the_worker(tmp_path: Path):
    executor = make_executor(make_config(tmp_path, load_format="auto"))
    with pytest.raises(WorkerDied, match=r"rank \d: .*safetensors"):
        executor.start()


_OWNER = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from tests.processes.driver import make_config, make_executor
if __name__ == "__main__":
    executor = make_executor(make_config(Path(sys.argv[1])))
    executor.start()
    print(*[process.pid for process in executor._workers._generation.processes], flush=True)
    sys.stdin.read()
"""


def test_workers_die_with_their_parent(tmp_path: Path):
    script = tmp_path / "owner.py"
    script.write_text(_OWNER.format(path=sys.path))
    command = [sys.executable, str(script), str(tmp_path)]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as owner:
        assert owner.stdout is not None
        workers = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(workers) == 2
        owner.kill()
    deadline_s = time.monotonic() + 10
    while any(is_alive(pid) for pid in workers) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in workers)
    assert list(tmp_path.glob("nitsum-*")) == [], "their sockets were left behind"


# --- what is refused before any process starts --------------------------------------------------


def test_an_arena_without_room_for_a_block(tmp_path: Path):
    config = make_config(tmp_path, kv_bytes=1000)
    with pytest.raises(ConfigError, match="Raise kv_bytes"):
        make_executor(config).start()


def test_without_torch_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nitsum.errors.find_spec", lambda _name: None)
    with pytest.raises(MissingDependency, match=r"nitsum\[cpu\]"):
        make_executor(make_config(tmp_path)).start()


def test_threads_are_divided_between_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "_num_cores", lambda: 7)
    assert launch.num_threads(make_config(tmp_path, num_threads=0)) == 3
    assert launch.num_threads(make_config(tmp_path, num_threads=5)) == 5


def test_the_context_length_of_the_checkpoint_is_the_default(tmp_path: Path):
    config = make_config(tmp_path)
    shape = ModelShape.from_folder(tmp_path)
    assert launch.max_model_len(config, shape) == 256
    assert launch.max_model_len(make_config(tmp_path, max_model_len=100), shape) == 100
