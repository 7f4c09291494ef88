"""Rates of devices per second, and the seconds that work takes there."""

from __future__ import annotations

from ditc.footprint import Footprint
from ditc.spec import Record

__all__ = ["DEVICES", "HERE", "MEASURED", "REACHED", "Rates", "Shares", "segment_seconds"]

HERE = "here"


class Shares(Record):
    """The shares of a device's rates that kernels reach: of its operations, and of its bandwidth."""

    products: float
    bandwidth: float


# shares of the published rates that kernels reach: assumptions, but for `here`, whose rates are measured ones
REACHED = Shares(products=0.5, bandwidth=0.7)
MEASURED = Shares(products=1.0, bandwidth=1.0)


class Rates(Record):
    """Rates of a device per second, dense INT8 and float operations, bytes of memory traffic; and its memory."""

    name: str
    int8_operations: float
    float_operations: float
    bandwidth: float
    memory_bytes: float
    source: str
    float_bytes: int = 2  # of an activation between two operators


DENSE = "dense figures (half the sparse ones)"
# name, dense INT8 operations/s (FP16 has half of them on all of these), bytes/s, bytes of memory, where from
PUBLISHED = (
    ("orin-nx", 30e12, 102.4e9, 16e9, "Jetson Orin NX 16 GB: GPU without DLA, 8 SMs at 918 MHz, per SM as AGX Orin"),
    ("agx-orin", 85e12, 204.8e9, 64e9, f"Jetson AGX Orin 64 GB data sheet: GPU without DLA, {DENSE}"),
    ("l4", 242e12, 300e9, 24e9, f"NVIDIA L4 data sheet: {DENSE}"),
    ("h100", 1979e12, 3350e9, 80e9, f"NVIDIA H100 SXM data sheet: {DENSE}"),
    ("h200", 1979e12, 4800e9, 141e9, f"NVIDIA H200 SXM data sheet: {DENSE}"),
)
DEVICES = {
    name: Rates(
        name=name,
        int8_operations=int8,
        float_operations=int8 / 2,
        bandwidth=bandwidth,
        memory_bytes=memory,
        source=source,
    )
    for name, int8, bandwidth, memory, source in PUBLISHED
}


def segment_seconds(work: Footprint, rates: Rates, shares: Shares) -> float:
    """Return the seconds of one call."""
    products = work.int8_operations / rates.int8_operations + work.float_operations / rates.float_operations
    bandwidth = rates.bandwidth * shares.bandwidth
    return max(products / shares.products, work.weight_bytes / bandwidth) + work.moved_bytes / bandwidth
