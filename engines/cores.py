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
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["CoreGate", "available_cores", "core_gate"]


class CoreGate:
    """Cores that are taken and given back; who asked first is served first."""

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self._free = cores
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, wanted: int) -> Iterator[None]:
        """Hold `wanted` cores inside the block, or all of them where that is more than there are."""
        count = min(wanted, self.cores)
        self._take(count)
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()

    def _take(self, count: int) -> None:
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is turn and self._free >= count)
                self._free -= count
            finally:  # an interrupted wait must not hold up those behind it
                self._waiting.remove(turn)
                self._changed.notify_all()


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
    """Threads of one core count once: a second one gains nothing in a matrix product."""
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
    found = []
    for folder in (group, *group.parents):
        if not folder.is_relative_to(home):
            break
        found += _numbers(folder / "cpu.max")
    return min(found, default=None)


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
