"""ONNX Runtime as a backend: zero-copy binding of NumPy buffers, integer kernels behind Q/DQ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from ditc.engines.backend import Buffer, Engine, Port
from ditc.engines.cores import CoreGate, core_gate
from ditc.engines.integer_form import SEVEN_BITS, Arithmetic, Exactness, advise, once_per_process
from ditc.engines.onnxrt_exactness import SLOWER, probed_exactness, session_entries
from ditc.errors import BundleError, DitcError, InputError
from ditc.openable import Links, openable, plain_name
from ditc.program import CONDITION
from ditc.text_spec import TEXT

__all__ = [
    "INTEGER_KERNELS",
    "OnnxRuntimeBackend",
    "OnnxRuntimeBinding",
    "OnnxRuntimeEngine",
    "exact_entries",
    "import_onnxruntime",
    "kernel_census",
    "onnxruntime_exactness",
    "port_of",
    "translated",
]

# MatMulAddFusion turns MatMul + Add back into a float Gemm, which no integer kernel takes: with it
# the INT8 graph of a DiT-XL/2 block runs at float speed, without it several times faster.
DISABLED_OPTIMIZERS = ["MatMulAddFusion"]

# of a session: its threads sleep between runs
SPINNING_STOPS = "session.force_spinning_stop"
# and the file beside an optimized graph that takes its weights
OPTIMIZED_WEIGHTS = "session.optimized_model_external_initializers_file_name"

INTEGER_KERNELS = ("MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeMatMul", "QGemm")

NUMPY_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises InputError where it is missing."""
    try:
        import onnxruntime
    except ImportError as e:
        raise InputError("onnxruntime is not installed; install it with: pip install 'ditc[cpu]'") from e
    return onnxruntime


@contextmanager
def translated(doing: str, advice: str = "compile the bundle again") -> Iterator[None]:
    """Raise ONNX Runtime's own exceptions as one line of ours."""
    try:
        yield
    except DitcError:
        raise
    except Exception as e:
        if type(e).__module__.startswith("onnxruntime") or isinstance(e, RuntimeError):
            first_line = str(e).strip().splitlines()[0]
            raise BundleError(f"ONNX Runtime failed {doing}: {first_line}; {advice}") from e
        raise


class OnnxRuntimeBinding:
    """NumPy buffers bound to a session without a copy.

    ONNX Runtime keeps bare pointers to them, and reads and writes them inside a run only. The binding holds both the
    session and the arrays, so neither can go while a run is under way.
    """

    def __init__(self, engine: OnnxRuntimeEngine) -> None:
        self._engine = engine
        self._binding = engine.session.io_binding()
        self._alive: dict[str, Buffer] = {}

    def bind(self, name: str, buffer: Buffer) -> None:
        if self._alive.get(name) is buffer:
            return
        engine = self._engine
        place = self._binding.bind_input if name in engine.inputs else self._binding.bind_output
        port = engine.inputs.get(name) or engine.outputs[name]
        port.check_buffer(engine.name, buffer)
        place(name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
        self._alive[name] = buffer

    def run(self) -> None:
        engine = self._engine
        with translated(f"running segment {engine.name}"):
            engine.cores.run(engine.threads, lambda: engine.session.run_with_iobinding(self._binding))


class OnnxRuntimeEngine:
    """One inference session; a run takes as many of the `cores` as it has threads."""

    def __init__(self, session: Any, name: str, threads: int, cores: CoreGate) -> None:
        self.session, self.name, self.threads, self.cores = session, name, threads, cores
        self.inputs: Mapping[str, Port] = {port.name: port_of(port) for port in session.get_inputs()}
        self.outputs: Mapping[str, Port] = {port.name: port_of(port) for port in session.get_outputs()}

    def binding(self) -> OnnxRuntimeBinding:
        return OnnxRuntimeBinding(self)

    def __enter__(self) -> OnnxRuntimeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the session to the last binding: another thread's run may be under way."""


@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """The CPU provider. `threads` is the number of threads of one run; 0 for as many as there are `cores`."""

    threads: int = 0
    name: str = "onnxrt"
    cores: CoreGate = field(default_factory=core_gate, repr=False)

    @property
    def threads_of_a_run(self) -> int:
        return self.threads or self.cores.cores

    def _options(self, segment: Path) -> Any:
        """Return the options of a session.

        `condition` runs once per request and holds a third of the weights, a text encoder once per prompt and may hold
        most of them: they stay mapped from the file, nothing of it is packed, folded or kept between requests.
        """
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads_of_a_run
        options.log_severity_level = 3
        # as the graph is written: what later steps reuse is added up branch by branch. The default order leaves the
        # sums to the end, and every branch's output in memory until then
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        # every session has threads of its own, and waits for its next run in a busy loop: those of `full` would take
        # the cores from `reuse`, and the other way round (docs/speed.md)
        options.add_session_config_entry(SPINNING_STOPS, "1")
        if segment.name.split(".")[0] in (CONDITION, TEXT):
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.enable_cpu_mem_arena = False
            options.add_session_config_entry("session.disable_prepacking", "1")
        return options

    def session(self, segment: Path, optimized: Path | None = None, *, profile_prefix: str | None = None) -> Any:
        """The session of a segment; with `optimized`, the graph that it really runs is written there.

        Its integer products are exact on this machine. `profile_prefix` switches the profiler on and begins the name
        of the file it writes. Raises InputError where nothing makes the products exact.
        """
        return self._session(segment, exact_entries(segment), optimized, profile_prefix)

    def _session(
        self,
        segment: Path,
        entries: Mapping[str, str],
        optimized: Path | None = None,
        profile_prefix: str | None = None,
    ) -> Any:
        ort, options = import_onnxruntime(), self._options(segment)
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile_prefix
        with ExitStack() as stack:
            if optimized is not None:
                options.optimized_model_filepath = stack.enter_context(plain_name(optimized))
                options.add_session_config_entry(OPTIMIZED_WEIGHTS, "weights.data")
            name = stack.enter_context(openable(segment, Links.IN_ONE_FOLDER))
            stack.enter_context(translated(f"opening {segment.name}"))
            return ort.InferenceSession(
                name, options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS
            )

    def open(self, segment: Path) -> Engine:
        """The engine of a segment; advises where its integer products take a form that is slower."""
        entries = exact_entries(segment)
        if entries and onnxruntime_exactness().plain >= SEVEN_BITS:
            advise(SLOWER)
        return OnnxRuntimeEngine(self._session(segment, entries), segment.stem, self.threads_of_a_run, self.cores)

    def arithmetic(self, bits: int) -> Arithmetic:
        """Return the arithmetic of segments with weights of `bits` on this machine."""
        return Arithmetic.of(onnxruntime_exactness(), bits)


@once_per_process
def onnxruntime_exactness() -> Exactness:
    """Probe which integer products are exact in ONNX Runtime on this machine: some milliseconds, once."""
    return probed_exactness(OnnxRuntimeBackend(threads=1)._session)


def exact_entries(segment: Path) -> Mapping[str, str]:
    """Return the configuration with which a session's integer products are exact on this machine.

    Raises InputError where nothing makes them exact.
    """
    return session_entries(segment, onnxruntime_exactness)


def kernel_census(backend: OnnxRuntimeBackend, segment: Path, scratch: Path | None = None) -> Counter[str]:
    """Count the operators of the graph that ONNX Runtime really runs, after its own optimisation.

    That is written to a folder in `scratch`, None for the one of temporary files, and goes again. It has the segment's
    weights, and no place in a bundle: who opens that meanwhile would find a file that nobody listed.
    """
    import onnx

    with TemporaryDirectory(prefix="ditc-census-", dir=scratch) as folder:
        optimized = Path(folder) / "optimized.onnx"
        backend.session(segment, optimized)
        graph = onnx.load(str(optimized), load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def port_of(node_arg: Any) -> Port:
    """The port that a session describes."""
    return Port(name=node_arg.name, dtype=NUMPY_TYPES[node_arg.type], shape=tuple(node_arg.shape))
