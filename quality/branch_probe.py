"""The outputs of single branches at any step: what a segment that computes all of them makes before the gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.exporter.onnx_files import load_graph, save_graph
from ditc.files import writing
from ditc.lowering.backend_forms import lower
from ditc.quantize.segment_outputs import branch_values, keep_outputs
from ditc.runtime.conditioning import of_step
from ditc.runtime.executor import Samples
from ditc.streams import BranchStreams, Wiring
from ditc.tables import Tables, step_inputs

__all__ = ["BranchProbe", "open_branch_probe"]

NO_TABLES: Tables = {}


@dataclass(frozen=True)
class BranchProbe:
    """A `full` segment with nothing but the outputs of its branches, on the CPU. `rows` are one for every step.

    `counts` are how many outputs each branch has.
    """

    session: Any
    rows: Mapping[str, Samples]
    counts: Sequence[int]

    def run(self, step: int, x: Samples, conditioning: Tables) -> list[Samples]:
        """Return every branch's output, (rows, *branch_shape), in the order of branches.

        Several outputs of a branch are side by side, (rows, numbers). `x` is (rows, channels, *space), all guidance
        halves; `conditioning` has the tables of all steps.
        """
        every = of_step({**conditioning, **self.rows}, step)
        feeds = {port.name: every[port.name] for port in self.session.get_inputs() if port.name != "x"}
        values = iter(self.session.run(None, {"x": x, **feeds}))
        return [_side_by_side(list(islice(values, count))) for count in self.counts]


def _side_by_side(outputs: Sequence[Samples]) -> Samples:
    """Return the outputs of one branch as one array, the only one as it is."""
    return outputs[0] if len(outputs) == 1 else np.concatenate([out.reshape(len(out), -1) for out in outputs], axis=1)


@contextmanager
def open_branch_probe(
    segment: Path,
    branches: tuple[str, ...],
    tables: Tables = NO_TABLES,
    streams: Mapping[str, BranchStreams] | None = None,
) -> Iterator[BranchProbe]:
    """Yield the probe of a portable segment, FP or INT8, that computes all `branches`; `tables` are the bundle's.

    `streams` are those of the model's spec. The weights are copied to a temporary folder (in TMPDIR) for as long as the
    block lasts.
    """
    backend, model = OnnxRuntimeBackend(), load_graph(segment)
    values, wiring = branch_values(model), Wiring(branches, streams or {})
    counts = [len(wiring.outputs(branch)) for branch in branches]
    pairs = zip(branches, counts, strict=True)
    keep_outputs(model, [value for branch, count in pairs for value in values[branch][-count:]])
    lower(model, backend.name)
    with TemporaryDirectory(prefix="ditc-branches-") as folder:
        path = Path(folder).resolve() / "full.onnx"  # resolved: ONNX Runtime takes no weights through a link
        with writing(path):
            save_graph(model, path)
        yield BranchProbe(backend.session(path), step_inputs(tables), counts)
