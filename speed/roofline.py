"""A bundle's segments against this machine's ceilings, measured in the same run.

    limit = max(INT8 operations / INT8 rate + float operations / float rate,  bytes / bandwidth)

The two kinds of products share the cores, so their times add. `bytes` are those that nothing can save, weights, inputs
and outputs, each once; they stream while the products run, so the longer of the two decides. `unfused` is what it takes
where every other operator reads and writes memory by itself, one after another, as `ditc estimate` counts; fused or in
a cache those bytes cost less, which is why they are no limit. Element-wise arithmetic is counted nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from ditc.bundle import Bundle
from ditc.footprint import Footprint
from ditc.program import CONDITION, DECODE
from ditc.spec import Record
from ditc.speed.peer_task import bench_request
from ditc.speed.rates import MEASURED, Rates, segment_seconds

__all__ = ["Roofline", "SegmentLimit", "SegmentRoof", "footprints_here", "limit_of", "roofline"]


class SegmentLimit(Record):
    """The work of one call of a segment; seconds that no implementation goes below, and without any fusion.

    `bound_by` names what decides `limit`: a kind of products, or memory.
    """

    int8_operations: int
    float_operations: int
    least_bytes: int
    limit: float
    unfused: float
    bound_by: str


class SegmentRoof(SegmentLimit):
    """A limit beside the `measured` seconds of a call, and how much of the limit those reach."""

    measured: float
    share_of_limit: float


class Roofline(Record):
    """The machine's ceilings, and every measured segment held to them."""

    rates: Rates
    segments: dict[str, SegmentRoof]


def roofline(bundle: Bundle, seconds: Mapping[str, float], rates: Rates) -> Roofline:
    """Return the limit of every measured segment (name -> seconds of one call), and how much of it is reached."""
    works = footprints_here(bundle)
    limits = {name: limit_of(works[name], _sizes(bundle, name), rates) for name in seconds}
    segments = {
        name: SegmentRoof(**dict(limit), measured=seconds[name], share_of_limit=limit.limit / seconds[name])
        for name, limit in limits.items()
    }
    return Roofline(rates=rates, segments=segments)


def limit_of(work: Footprint, sizes: Mapping[str, int], rates: Rates) -> SegmentLimit:
    """Return the work of one call, the seconds that no implementation goes below, and what bounds it."""
    ports = (*work.inputs.values(), *work.outputs.values())
    least_bytes = work.weight_bytes + sum(port.size_bytes(sizes) for port in ports)
    times = {
        "INT8 products": work.int8_operations / rates.int8_operations,
        "float products": work.float_operations / rates.float_operations,
        "memory": least_bytes / rates.bandwidth,
    }
    products = times["INT8 products"] + times["float products"]
    longest = max(("INT8 products", "float products"), key=times.__getitem__)
    return SegmentLimit(
        int8_operations=work.int8_operations,
        float_operations=work.float_operations,
        least_bytes=least_bytes,
        limit=max(products, times["memory"]),
        unfused=segment_seconds(work, rates, MEASURED),
        bound_by="memory" if times["memory"] > products else longest,
    )


def footprints_here(bundle: Bundle) -> dict[str, Footprint]:
    """Count the work of every segment in the types that a CPU computes in; the manifest has the form for GPUs."""
    from ditc.exporter.onnx_files import load_graph
    from ditc.lowering.segment_footprint import footprint_of

    names = bundle.manifest.program.calls
    return {name: footprint_of(load_graph(bundle.segment_path(name)), _sizes(bundle, name)) for name in names}


def _sizes(bundle: Bundle, name: str) -> dict[str, int]:
    """Return a segment's rows here: an image each, two with guidance; of the conditioning each label once."""
    manifest = bundle.manifest
    rows = {
        CONDITION: _distinct_rows(bundle),
        DECODE: manifest.batch,
    }.get(name, manifest.batch * manifest.halves)
    return {"batch": rows, "steps": len(manifest.program.steps)}


def _distinct_rows(bundle: Bundle) -> int:
    """Return how many different rows of conditions a request has, the nulls of guidance among them."""
    arrays = bench_request(bundle).arrays.values()
    rows = {tuple(array[place].tobytes() for array in arrays) for place in range(bundle.manifest.batch)}
    return len(rows) + bundle.manifest.halves - 1
