"""The simulated GPU, and the fault that it plays: JSON in the environment variable DITC_SIMULATION.

{"gpu": "Simulated GPU", "compute_capability": [8, 7], "memory_bytes": 8000000000, "fault": "kill", "segment": "full"}

Faults of a build: parse, null, out-of-memory, kill, crash, hang, noise (libraries print what they like).
Faults of a run: refuse, stale-graph, not-enqueued.
`segment` says in which segment's build the fault is played; without it, in every one.
"""

from __future__ import annotations

import json
import os
from typing import Any

DEFAULTS = {"gpu": "Simulated GPU", "compute_capability": [8, 7], "memory_bytes": 8_000_000_000, "fault": None}


def setting(name: str) -> Any:
    return (DEFAULTS | json.loads(os.environ.get("DITC_SIMULATION", "{}"))).get(name)


def plays(fault: str, segment: str | None = None) -> bool:
    """Is this fault to be played here?"""
    where = setting("segment")
    return setting("fault") == fault and (where is None or segment is None or where == segment)
