"""One loop, three engines: outcomes in order, what is tried again, sudden death, an interrupt."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from jobs import Work

from persona_pruner import executors
from persona_pruner.errors import InputError

HERE = str(Path(__file__).parent)
TASKS = ["double 1", "refuse", "second", "fail", *(f"double {n}" for n in range(2, 8))]


@pytest.fixture(scope="module")
def local_ray():
    """A real Ray of two processors, which the executor joins."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    changes = {
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": HERE, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        limits = {"object_store_memory": 80 << 20, "include_dashboard": False}
        ray.init("local", num_cpus=2, log_to_driver=False, logging_level="error", **limits)
        yield ray
        ray.shutdown()


@pytest.fixture(params=executors.ENGINES)
def engine(request):
    if request.param == "ray":
        request.getfixturevalue("local_ray")
    return request.param


class Watch(executors.Watch):
    def __init__(self):
        self.begun, self.heard, self.over = [], [], {}

    def started(self, index, attempt):
        self.begun.append((index, attempt))

    def said(self, index, text):
        self.heard.append((index, text))

    def ended(self, index, outcome):
        self.over[index] = outcome


def test_outcomes(engine, tmp_path):
    watch, log = Watch(), tmp_path / "log"
    found = executors.run(engine, Work(str(log)), TASKS, workers=2, retries=1, watch=watch)
    assert [outcome.value for outcome in found] == [2, None, "second", None, *range(4, 16, 2)]
    assert [outcome.attempts for outcome in found] == [1, 1, 2, 2, *[1] * 6]
    assert found[1].error == "this cannot be met" and found[3].error == "ValueError: a fault"
    assert sorted(log.read_text().splitlines()) == sorted([*TASKS, "second", "fail"])
    assert watch.over == dict(enumerate(found)) and sorted(watch.begun) == sorted(
        [*((n, 1) for n in range(len(TASKS))), (2, 2), (3, 2)]
    )
    assert set(watch.heard) <= {(n, f"at {task}") for n, task in enumerate(TASKS)} and watch.heard


@pytest.mark.parametrize("name", ["process", "ray"])
def test_a_worker_that_dies(name, tmp_path, request):
    if name == "ray":
        request.getfixturevalue("local_ray")
    found = executors.run(name, Work(str(tmp_path / "log")), ["die", "double 4"], workers=2)
    assert [outcome.value for outcome in found] == ["die", 8] and found[0].attempts == 2
    assert executors.run(name, Work(str(tmp_path / "other")), ["die"], workers=1, retries=0)[0].error


@pytest.mark.parametrize("name", ["process", "ray"])
def test_an_interrupt_lets_workers_clean_up(name, tmp_path, request):
    if name == "ray":
        request.getfixturevalue("local_ray")

    class Interrupting(Watch):
        def said(self, index, text):
            if text == "asleep":
                self.began = time.monotonic()
                raise KeyboardInterrupt

    before, watch = threading.active_count(), Interrupting()
    with pytest.raises(KeyboardInterrupt):
        executors.run(name, Work(str(tmp_path / "log")), ["sleep 1"], workers=1, watch=watch)
    assert (tmp_path / "cleaned").exists() and time.monotonic() - watch.began < 50
    if name == "process":
        assert threading.active_count() == before


STARTER = """
import sys
from jobs import Work
from persona_pruner import executors

class Telling(executors.Watch):
    def said(self, index, text):
        print(text, flush=True)

if __name__ == "__main__":
    executors.run("process", Work(sys.argv[1]), ["sleep 1"], watch=Telling())
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_started_them(how, tmp_path):
    (tmp_path / "starter.py").write_text(STARTER)
    command = [sys.executable, "-P", str(tmp_path / "starter.py"), str(tmp_path / "log")]
    paths = os.pathsep.join([HERE, *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True
    ) as starter:
        try:
            assert "asleep\n" in iter(starter.stdout.readline, "")
        finally:
            starter.send_signal(how)
    end = time.monotonic() + 50
    while not (tmp_path / "cleaned").exists():
        assert time.monotonic() < end, "the worker goes on"
        time.sleep(0.05)


def test_nothing_to_do_and_what_is_refused(tmp_path):
    work = Work(str(tmp_path / "log"))
    assert executors.run("process", work, [], workers=3) == []
    with pytest.raises(InputError, match="engine 'slurm' is not one of serial, process, ray"):
        executors.run("slurm", work, ["double 1"])
    with pytest.raises(InputError, match="workers must be at least 1"):
        executors.run("process", work, ["double 1"], workers=0)


def test_ray_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match="needs the extra `ray`"):
        executors.run("ray", Work(str(tmp_path / "log")), ["double 1"])
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
