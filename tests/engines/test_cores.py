"""The cores of the process: how many there are, and who computes on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ditc.engines import cores
from ditc.engines.cores import CoreGate, available_cores, core_gate


@pytest.mark.parametrize(("there", "wanted", "most"), [(4, 1, 4), (4, 2, 2), (4, 3, 1), (4, 9, 1), (1, 2, 1)])
def test_no_more_threads_compute_at_once_than_there_are_cores(there: int, wanted: int, most: int) -> None:
    gate, running, seen, counting = CoreGate(there), 0, [], threading.Lock()

    def work() -> None:
        nonlocal running
        with counting:
            running += 1
            seen.append(running)
        time.sleep(0.002)
        with counting:
            running -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: gate.run(wanted, work), range(40)))
    assert max(seen) <= most
    assert len(seen) == 40


def test_who_asked_first_is_served_first_however_much_it_wants() -> None:
    """A run with many threads is not held up for ever by runs with few."""
    gate, order, threads = CoreGate(2), list[str](), list[threading.Thread]()

    def line_up() -> None:
        for name, wanted in (("many", 2), ("few", 1)):
            threads.append(threading.Thread(target=gate.run, args=(wanted, lambda n=name: order.append(n))))
            threads[-1].start()
            while gate.in_line < 1 + len(threads):
                time.sleep(0.001)
        assert order == []

    gate.run(1, line_up)
    for thread in threads:
        thread.join()
    assert order == ["many", "few"]


def test_who_waits_is_woken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "MOST_ASLEEP", 60)
    gate, waiting = CoreGate(1), threading.Event()
    thread = threading.Thread(target=gate.run, args=(1, waiting.set))

    def while_one_waits() -> None:
        thread.start()
        while gate.in_line < 2:
            time.sleep(0.001)
        time.sleep(0.01)

    gate.run(1, while_one_waits)
    assert waiting.wait(10)
    thread.join()


def fail(kind: type[BaseException]) -> None:
    raise kind


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_failed_run_gives_its_cores_back(kind: type[BaseException]) -> None:
    gate = CoreGate(2)
    with pytest.raises(kind):
        gate.run(2, lambda: fail(kind))
    assert gate.run(2, lambda: "has them") == "has them"


def test_an_interrupted_wait_holds_up_nobody() -> None:
    gate = CoreGate(1)

    def interrupt_who_waits() -> None:
        while gate.in_line < 2:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    def interrupted() -> None:
        ctrl_c = threading.Thread(target=interrupt_who_waits)
        ctrl_c.start()
        with pytest.raises(KeyboardInterrupt):
            gate.run(1, lambda: None)
        ctrl_c.join()

    gate.run(1, interrupted)
    assert gate.run(1, lambda: "has it") == "has it"


INTERRUPTED = """
import faulthandler, gc, random, signal, threading, time
from ditc.engines.cores import CoreGate

gate, ended, interrupts, pauses = CoreGate(2), threading.Event(), [], random.Random(0)
gc.disable()  # an interrupt inside a collection is lost
faulthandler.dump_traceback_later(30, exit=True)

def interrupt(*_):
    raise KeyboardInterrupt

def other():
    while not ended.is_set():
        gate.run(1, lambda: time.sleep(1e-5))

signal.signal(signal.SIGALRM, interrupt)
rival = threading.Thread(target=other)
rival.start()
until = time.monotonic() + 1
while time.monotonic() < until:
    try:
        signal.setitimer(signal.ITIMER_REAL, pauses.uniform(1e-5, 5e-4))
        while True:
            gate.run(2, lambda: None)
    except KeyboardInterrupt as e:
        interrupts.append(e)  # with all frames, as a shell keeps the last one
ended.set()
rival.join()
last = threading.Thread(target=gate.run, args=(2, lambda: None))
last.start()
last.join()
print(len(interrupts))
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timer signals")
def test_no_interrupt_costs_cores_wherever_it_comes() -> None:
    """Ctrl-C between any two steps, while another thread wants cores too."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


FORKED = """
import os, signal, threading
from ditc.engines import cores
from ditc.engines.cores import core_gate
from ditc.engines.integer_form import once_per_process

begun, ended = [threading.Event(), threading.Event()], threading.Event()

@once_per_process
def answer(name):
    if name == "slow":
        begun[0].set()
        ended.wait()
    return name

def computing():
    begun[1].set()
    ended.wait()

gate = core_gate()
threads = [threading.Thread(target=answer, args=("slow",)), threading.Thread(target=gate.run, args=(99, computing))]
for thread in threads:
    thread.start()
for event in begun:
    event.wait()
child = os.fork()
if child == 0:
    signal.alarm(10)
    gate.run(99, lambda: None)
    os._exit(0 if answer("quick") == "quick" else 1)
status = os.waitpid(child, 0)[1]
ended.set()
os._exit(status != 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_waits_for_no_thread_that_it_does_not_have() -> None:
    assert subprocess.run([sys.executable, "-c", FORKED], check=False, timeout=60).returncode == 0


def machine(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def siblings(pairs: Mapping[int, str]) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in pairs.items()}


FOUR = {0: "0\n", 1: "1\n", 2: "2\n", 3: "3\n"}


@pytest.mark.parametrize(
    ("allowed", "files", "expected"),
    [
        ({0, 1, 2, 3}, siblings(FOUR), 4),
        ({0, 3}, siblings(FOUR), 2),
        ({0, 1, 2, 3}, siblings({0: "0,2\n", 1: "1,3\n", 2: "0,2\n", 3: "1,3\n"}), 2),
        ({0, 2}, siblings({0: "0,2\n", 2: "0,2\n"}), 1),
        ({0, 1, 2, 3}, {}, 4),
        ({0, 1, 2, 3}, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({0, 1, 2, 3}, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({0, 1, 2, 3}, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({0, 1, 2, 3}, {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"}, 1),
        ({0, 1, 2, 3}, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        (
            {0, 1, 2, 3},
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        (
            {0, 1, 2, 3},
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            4,
        ),
    ],
)
def test_cores_are_those_of_mask_and_quota(
    allowed: set[int], files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed, raising=False)
    assert available_cores(machine(tmp_path, files)) == expected


def test_all_pipelines_of_a_process_share_one_gate() -> None:
    assert core_gate() is core_gate()
    assert core_gate().cores == available_cores()
