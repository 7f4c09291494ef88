"""The cores of the process: how many there are, and who computes on them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ditc.engines.cores import CoreGate, available_cores, core_gate


@pytest.mark.parametrize(("cores", "wanted", "most"), [(4, 1, 4), (4, 2, 2), (4, 3, 1), (4, 9, 1), (1, 2, 1)])
def test_no_more_threads_compute_at_once_than_there_are_cores(cores: int, wanted: int, most: int) -> None:
    gate, running, seen, counting = CoreGate(cores), 0, [], threading.Lock()

    def work(_: int) -> None:
        nonlocal running
        with gate.taken(wanted):
            with counting:
                running += 1
                seen.append(running)
            time.sleep(0.002)
            with counting:
                running -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    assert max(seen) <= most
    assert len(seen) == 40


def test_who_asked_first_is_served_first_however_much_it_wants() -> None:
    """A run with many threads is not held up for ever by runs with few."""
    gate, order = CoreGate(2), []
    with gate.taken(1):
        threads = []
        for name, wanted in (("many", 2), ("few", 1)):
            thread = threading.Thread(target=lambda n=name, w=wanted: note(gate, w, n, order))
            thread.start()
            threads.append(thread)
            while len(gate._waiting) < len(threads):
                time.sleep(0.001)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == ["many", "few"]


def note(gate: CoreGate, wanted: int, name: str, order: list[str]) -> None:
    with gate.taken(wanted):
        order.append(name)


def test_a_failed_run_gives_its_cores_back() -> None:
    gate = CoreGate(2)
    with pytest.raises(RuntimeError), gate.taken(2):
        raise RuntimeError
    with gate.taken(2):
        pass


def test_an_interrupted_wait_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = CoreGate(1)

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with gate.taken(1), monkeypatch.context() as patch:
        patch.setattr(gate._changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt), gate.taken(1):
            pass
    with gate.taken(1):
        pass


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
