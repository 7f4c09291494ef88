"""The cores that this process may use, and who computes on them just now.

A container has fewer cores than its machine: the affinity mask and the control group's quota say how many. Every run of
an engine takes as many as it has threads and gives them back, so that however many requests, threads and open pipelines
there are, no more threads compute at once than there are cores.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

__all__ = ["CoreGate", "available_cores", "core_gate"]

T = TypeVar("T")

MOST_ASLEEP = 0.05  # seconds until who waits looks again, should whoever was to wake it have been interrupted


class _Turn:
    """Someone in line. `running` is locked for as long as the block that holds the cores, or waits for them, runs."""

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self.running = threading.Lock()
        self._asleep = threading.Lock()
        self._asleep.acquire()
        self._process = os.getpid()

    @property
    def is_over(self) -> bool:
        """Has its block ended? In a fork nobody is left to end one that ran in another thread."""
        return not self.running.locked() or self._process != os.getpid()

    def sleep(self) -> None:
        """Wait to be woken."""
        self._asleep.acquire(timeout=MOST_ASLEEP)

    def wake(self) -> None:
        with suppress(RuntimeError):  # it is awake already, and looks once more
            self._asleep.release()


class CoreGate:
    """Cores that are taken and given back; who asked first is served first.

    Ctrl-C may come between any two steps of the interpreter, and a fork at any time. So nothing is counted up and down:
    what is held is read off those in line whose blocks still run, and a plain lock begins and ends a block in one step.
    """

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self._line: dict[_Turn, None] = {}  # who has cores or waits for them, in order; each access is one whole step

    @property
    def in_line(self) -> int:
        """The number of those who have cores or wait for them."""
        return len(self._line)

    def run(self, wanted: int, work: Callable[[], T]) -> T:
        """Do `work` with `wanted` cores, or all of them where that is more than there are, and return its result."""
        turn = _Turn(min(wanted, self.cores))
        with turn.running:
            try:
                self._line[turn] = None
                while turn not in self._with_cores():
                    turn.sleep()
                return work()
            finally:
                self._line.pop(turn, None)
                for other in self._with_cores():
                    other.wake()

    def _with_cores(self) -> list[_Turn]:
        """Those in line for whom there are cores beside those of everyone before them; who has ended leaves it."""
        served, in_use = [], 0
        for turn in list(self._line):
            if turn.is_over:
                self._line.pop(turn, None)
                continue
            in_use += turn.cores
            if in_use > self.cores:
                break
            served.append(turn)
        return served


@functools.cache
def core_gate() -> CoreGate:
    """The one gate of this process: its cores are shared by all pipelines, whoever opened them."""
    return CoreGate(available_cores())


def available_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may run on, no more than its control groups' quota; at least 1."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    quotas = [quota for quota in (_quota(root), _old_quota(root)) if quota is not None]
    return max(1, min([_physical(allowed, root), *(math.ceil(quota) for quota in quotas)]))


def _physical(allowed: set[int], root: Path) -> int:
    """Count cores, not their threads: a second one gains nothing in a matrix product."""
    cores = set()
    for cpu in allowed:
        try:
            cores.add((root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def _quota(root: Path) -> float | None:
    """Cores of control groups of version 2: the least on the way from this process's group up to the root's."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        own = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
    except (OSError, StopIteration):
        return None
    home, group = root / "sys/fs/cgroup", root / "sys/fs/cgroup" / own
    quotas = []
    for folder in (group, *group.parents):
        if not folder.is_relative_to(home):
            break
        quotas += _numbers(folder / "cpu.max")
    return min(quotas, default=None)


def _numbers(file: Path) -> list[float]:
    try:
        most, period = file.read_text().split()
    except (OSError, ValueError):
        return []
    return [] if most == "max" else [int(most) / int(period)]


def _old_quota(root: Path) -> float | None:
    """Cores of control groups of version 1, as a container sees its own group."""
    folder = root / "sys/fs/cgroup/cpu"
    try:
        most, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return None
    return most / period if most > 0 else None
