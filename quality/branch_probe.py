"""The outputs of single branches at any step: what a segment that computes all of them makes before the gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.exporter.onnx_files import load_graph, save_graph
from ditc.files import writing
from ditc.lowering.backend_forms import lower
from ditc.quantize.segment_outputs import branch_outputs, keep_outputs
from ditc.runtime.conditioning import of_step
from ditc.runtime.executor import Samples
from ditc.tables import Tables, step_inputs

__all__ = ["BranchProbe", "open_branch_probe"]

NO_TABLES: Tables = {}


@dataclass(frozen=True)
class BranchProbe:
    """A `full` segment with nothing but the outputs of its branches, on the CPU. `rows` are one for every step."""

    session: Any
    rows: Mapping[str, Samples]

    def run(self, step: int, x: Samples, conditioning: Tables) -> list[Samples]:
        """Return every branch's output, (rows, *branch_shape), in the order of branches.

        `x` is (rows, channels, *space), all guidance halves; `conditioning` has the tables of all steps.
        """
        every = of_step({**conditioning, **self.rows}, step)
        feeds = {port.name: every[port.name] for port in self.session.get_inputs() if port.name != "x"}
        return list(self.session.run(None, {"x": x, **feeds}))


@contextmanager
def open_branch_probe(segment: Path, branches: tuple[str, ...], tables: Tables = NO_TABLES) -> Iterator[BranchProbe]:
    """Yield the probe of a portable segment, FP or INT8, that computes all `branches`; `tables` are the bundle's.

    The weights are copied to a temporary folder (in TMPDIR) for as long as the block lasts.
    """
    backend, model = OnnxRuntimeBackend(), load_graph(segment)
    outputs = branch_outputs(model)
    keep_outputs(model, [outputs[branch] for branch in branches])
    lower(model, backend.name)
    with TemporaryDirectory(prefix="ditc-branches-") as folder:
        path = Path(folder).resolve() / "full.onnx"  # resolved: ONNX Runtime takes no weights through a link
        with writing(path):
            save_graph(model, path)
        yield BranchProbe(backend.session(path), step_inputs(tables))
