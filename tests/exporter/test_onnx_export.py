"""Segments as ONNX: they compute what torch computes, and say where every node came from."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import CheckError, CheckpointError
from ditc.exporter.dit import DiT, DiTConfig
from ditc.exporter.onnx_export import CLEANUP, export_segment, parity_error
from ditc.exporter.onnx_files import data_path
from ditc.exporter.segments import Segment, segments_of
from ditc.exporter.vae import Decoder
from ditc.passes import program_from_schedule
from ditc.policies import schedule_for
from ditc.program import BRANCH_KEY, CONDITION, DECODE, PATH_KEY, Program
from ditc.quantize.linears import linears_of
from ditc.schedule import CacheSchedule
from ditc.spec import ModelSpec

Exported = Mapping[str, tuple[Segment, Path]]
Run = Callable[[dict[str, Any]], dict[str, Any]]

OWN_FILE = Path(__file__).parents[1] / "models" / "separate_qkv.py"
TIGHT = 1e-5
ALL, NONE = (True,) * 4, (False,) * 4
ROWS = CacheSchedule(compute=(ALL, NONE, (True, False, False, True), (False, True, False, False)))


def tiny_dit() -> DiT:
    torch.manual_seed(0)
    model = DiT(DiTConfig(input_size=8, hidden_size=64, depth=2, num_heads=4, num_classes=10), name="tiny").eval()
    model.decoder = Decoder(
        AutoencoderKL(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=8,
        ),
        scale=0.18215,
    ).eval()
    return model


def own_model() -> Any:
    spec = importlib.util.spec_from_file_location("separate_qkv_to_export", OWN_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build().eval()


def program_of(spec: ModelSpec, schedule: CacheSchedule, *, decode: bool = False) -> Program:
    return program_from_schedule(schedule, list(range(schedule.steps, 0, -1)), spec.branches, decode=decode)


def exported(model: Any, segments: Iterable[Segment], folder: Path) -> Exported:
    files = {}
    for segment in segments:
        path = folder / f"{segment.name}.onnx"
        export_segment(segment, path, model.spec.branches)
        files[segment.name] = segment, path
    return files


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The tiny DiT with its decoder under fora:3, and the segments that partial rows add."""
    model = tiny_dit()
    fora = segments_of(model, program_of(model.spec, schedule_for("fora:3", model.spec, 6), decode=True))
    rows = (part for part in segments_of(model, program_of(model.spec, ROWS)) if part.name.startswith("row-"))
    return exported(model, chain(fora, rows), tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The user's own model under a schedule with full, empty and partial rows."""
    model = own_model()
    return exported(model, segments_of(model, program_of(model.spec, ROWS)), tmp_path_factory.mktemp("own"))


@pytest.fixture(params=["dit", "own"])
def files(request: pytest.FixtureRequest) -> Exported:
    """The segments of one model, then of the other."""
    return request.getfixturevalue(request.param)


def runner(path: Path) -> Run:
    session = OnnxRuntimeBackend().session(path)
    names = [port.name for port in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


def resized(segment: Segment, sizes: Mapping[str, int]) -> Segment:
    """The segment with fresh example inputs; `sizes` says how large each open dimension is."""
    generator = torch.Generator().manual_seed(5)

    def fresh(name: str, example: Tensor) -> Tensor:
        shape = list(example.shape)
        for axis, dim in segment.open_dims[name].items():
            shape[axis] = sizes[dim]
        if example.dtype == torch.int64:
            return torch.randint(0, 5, shape, generator=generator)
        noise = torch.randn(shape, generator=generator)
        return noise.abs() * 300 if name == "t" else noise

    return replace(segment, inputs={name: fresh(name, example) for name, example in segment.inputs.items()})


def nodes(path: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(path, load_external_data=False).graph.node)


def metadata(node: onnx.NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def branch_linears(segment: Segment) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a model, save conditioning, patches and output."""
    outside = re.compile("embedder|adaLN|final_layer|decoder|^patches|^pixels|^time|^modulation")
    for path, layer in segment.module.model.named_modules():
        if isinstance(layer, nn.Linear) and not outside.search(path):
            yield path, layer


def computed_branches(segment: Segment) -> set[str]:
    if segment.name in (CONDITION, DECODE):
        return set()
    return set(compress(segment.module.model.spec.branches, segment.module.plan.compute))


def test_a_schedule_takes_a_segment_per_distinct_row(dit: Exported, own: Exported) -> None:
    assert [name.partition("-")[0] for name in dit] == ["condition", "full", "reuse", "decode", "row", "row"]
    assert [name.partition("-")[0] for name in own] == ["condition", "full", "reuse", "row", "row"]


def test_a_segment_is_named_and_typed_as_declared(files: Exported) -> None:
    for segment, path in files.values():
        session = OnnxRuntimeBackend().session(path)
        assert [port.name for port in session.get_inputs()] == list(segment.inputs)
        assert [port.name for port in session.get_outputs()] == list(segment.outputs)
        for port in session.get_inputs():
            shape = list(segment.inputs[port.name].shape)
            for axis, name in segment.open_dims[port.name].items():
                shape[axis] = name
            assert port.shape == shape


def test_every_segment_computes_what_torch_computes(files: Exported) -> None:
    for segment, path in files.values():
        assert parity_error(segment, runner(path)) < TIGHT


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_every_segment_takes_other_batch_sizes(batch: int, files: Exported) -> None:
    for segment, path in files.values():
        assert parity_error(resized(segment, {"batch": batch, "steps": 4}), runner(path)) < TIGHT


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_condition_takes_other_numbers_of_steps(steps: int, files: Exported) -> None:
    segment, path = files[CONDITION]
    assert parity_error(resized(segment, {"batch": 2, "steps": steps}), runner(path)) < TIGHT


def test_reuse_equals_full_when_the_inputs_of_the_two_steps_are_equal(files: Exported) -> None:
    segment, path = files["full"]
    feeds = {name: value.numpy() for name, value in segment.inputs.items()}
    full = runner(path)(feeds)
    for name in (name for name in files if name.startswith(("reuse", "row-"))):
        reading, path = files[name]
        reused = runner(path)({port: (feeds | full)[port] for port in reading.inputs})
        for output, value in reused.items():
            assert np.linalg.norm(value - full[output]) <= 1e-6 * np.linalg.norm(full[output])


def test_reuse_depends_on_every_cache(dit: Exported) -> None:
    segment, path = dit["reuse"]
    feeds = {name: value.numpy() for name, value in segment.inputs.items()}
    out = runner(path)(feeds)["out"]
    for name in (name for name in feeds if name.startswith("cache.")):
        changed = runner(path)({**feeds, name: feeds[name] + 1})["out"]
        assert np.abs(changed - out).max() > 1e-4


def test_the_opset_is_20_or_later_and_of_standard_operators_only(files: Exported) -> None:
    for _, path in files.values():
        model = onnx.load(path, load_external_data=False)
        assert [entry.domain for entry in model.opset_import] == [""]
        assert model.opset_import[0].version >= 20
        assert not model.functions
        onnx.checker.check_model(str(path))


def test_no_path_and_no_stack_trace_of_this_machine_is_in_a_file(files: Exported) -> None:
    traces = "/tmp", "/home", "site-packages", ".py", "File ", "torch.", str(Path.cwd())
    for _, path in files.values():
        content = path.read_bytes()
        assert not [trace for trace in traces if trace.encode() in content]


def test_nodes_are_named_after_the_torch_module(dit: Exported) -> None:
    names = [node.name for node in nodes(dit["full"][1])]
    assert {"blocks.0.attn.qkv/MatMul", "blocks.1.mlp.act/Gelu", "final_layer.linear/MatMul"} <= set(names)
    assert "blocks.1.adaLN_modulation.1/MatMul" in [node.name for node in nodes(dit["condition"][1])]


def test_nodes_of_a_users_model_are_named_after_its_modules(own: Exported) -> None:
    names = {node.name for node in nodes(own["full"][1])}
    assert {"layers.0.attention.to_q/MatMul", "layers.1.feedforward.down/MatMul", "patches/MatMul"} <= names


def test_node_names_are_unique(files: Exported) -> None:
    for _, path in files.values():
        names = [node.name for node in nodes(path)]
        assert len(set(names)) == len(names)


def test_nodes_of_the_decoder_are_named_after_its_modules(dit: Exported) -> None:
    model = onnx.load(dit["decode"][1], load_external_data=False)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert all(metadata(node)[PATH_KEY].endswith(("conv", "conv1", "conv2", "_in", "_out")) for node in convolutions)
    weights = {entry.name for entry in model.graph.initializer}
    assert any(name.endswith("attentions.0.to_q.weight") for name in weights)
    assert ".weight" not in weights


def test_every_linear_layer_of_a_branch_is_a_matmul_with_its_weight(files: Exported) -> None:
    segment, path = files["full"]
    linears = {linear.path: linear for linear in linears_of(ir.load(path))}
    expected = dict(branch_linears(segment))
    assert linears.keys() == expected.keys()
    for name, layer in expected.items():
        assert linears[name].weight.name == f"{name}.weight"
        assert np.array_equal(linears[name].weight_array(), layer.weight.detach().numpy().T)


def test_linear_layers_outside_the_branches_keep_their_names(dit: Exported) -> None:
    weights = {entry.name for entry in onnx.load(dit["condition"][1], load_external_data=False).graph.initializer}
    assert {"t_embedder.mlp.0.weight", "blocks.0.adaLN_modulation.1.weight"} <= weights
    assert "y_embedder.embedding_table.weight" in weights


def test_no_weight_is_transposed_at_run_time(files: Exported) -> None:
    for _, path in files.values():
        graph = onnx.load(path, load_external_data=False).graph
        constants = {entry.name for entry in graph.initializer}
        assert not [node.name for node in graph.node if node.op_type == "Transpose" and node.input[0] in constants]
        assert not [node.name for node in graph.node if node.op_type == "Gemm"]


def test_a_weight_that_the_exporter_left_to_transpose_is_stored_as_matmul_wants_it() -> None:
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 3] x) => (float[batch, 2] out)
        <float[2, 3] weight = {1, 2, 3, 4, 5, 6}> {
            transposed = Transpose <perm = [1, 0]> (weight)
            out = MatMul (x, transposed)
        }
        """
    )
    model.graph[-1].metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'model.mlp', 'model.mlp.fc1']"
    for transform in CLEANUP:
        transform(model, ())
    (matmul,) = model.graph
    weight = matmul.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    assert (matmul.name, weight.name) == ("mlp.fc1/MatMul", "mlp.fc1.weight")
    assert weight.const_value.numpy().tolist() == [[1, 4], [2, 5], [3, 6]]
    assert list(model.graph.initializers) == ["mlp.fc1.weight"]


def test_a_matmul_knows_its_branch(dit: Exported) -> None:
    for segment, path in dit.values():
        weighted = [node for node in nodes(path) if node.op_type == "MatMul" and node.input[1].endswith(".weight")]
        for node in weighted:
            branch = metadata(node).get(BRANCH_KEY)
            inside = node.name.startswith("blocks.") and segment.name != CONDITION
            assert branch == (".".join(node.name.split(".")[:3]) if inside else None)


def test_a_segment_holds_the_layers_of_the_branches_it_computes_and_no_others(files: Exported) -> None:
    for segment, path in files.values():
        branches = {metadata(node).get(BRANCH_KEY) for node in nodes(path)} - {None}
        assert branches == computed_branches(segment)


def test_layer_normalization_stays_one_operator(dit: Exported) -> None:
    for name, count in {"full": 5, "reuse": 1}.items():
        kinds = [node.op_type for node in nodes(dit[name][1])]
        assert kinds.count("LayerNormalization") == count
        assert not {"ReduceMean", "Sqrt", "Pow"} & set(kinds)


def test_larger_tensors_lie_in_the_data_file(files: Exported) -> None:
    for _, path in files.values():
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            size_bytes = int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            outside = tensor.data_location == onnx.TensorProto.EXTERNAL
            assert outside == (size_bytes > 1024)
            if outside:
                assert {e.key: e.value for e in tensor.external_data}["location"] == data_path(path).name


def test_a_model_moves_with_its_data_file(dit: Exported, tmp_path: Path) -> None:
    segment, path = dit["full"]
    for file in (path, data_path(path)):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert parity_error(segment, runner(tmp_path / path.name)) < TIGHT


def test_exporting_twice_gives_identical_bytes(dit: Exported, tmp_path: Path) -> None:
    model = tiny_dit()
    program = program_of(model.spec, schedule_for("fora:3", model.spec, 6))
    segment = next(segment for segment in segments_of(model, program) if segment.name == "full")
    export_segment(segment, tmp_path / "full.onnx", model.spec.branches)
    first = dit["full"][1]
    assert (tmp_path / "full.onnx").read_bytes() == first.read_bytes()
    assert data_path(tmp_path / "full.onnx").read_bytes() == data_path(first).read_bytes()


def test_an_output_that_differs_from_torch_is_a_failed_check(dit: Exported) -> None:
    segment, path = dit["full"]
    correct = runner(path)
    with pytest.raises(CheckError, match=r"segment full: output cache\.blocks\.1\.mlp differs from torch by 0\.00"):
        parity_error(segment, lambda feeds: spoiled(correct(feeds), "cache.blocks.1.mlp", 1.001))
    assert parity_error(segment, lambda feeds: spoiled(correct(feeds), "out", 1 + 1e-5)) == pytest.approx(1e-5, rel=0.2)


def spoiled(outputs: dict[str, Any], name: str, factor: float) -> dict[str, Any]:
    return {**outputs, name: outputs[name] * np.float32(factor)}


def test_an_output_of_nan_is_a_failed_check(dit: Exported) -> None:
    segment, path = dit["reuse"]
    correct = runner(path)
    with pytest.raises(CheckError, match="output out differs from torch by nan"):
        parity_error(segment, lambda feeds: spoiled(correct(feeds), "out", float("nan")))


def broken_segment(forward: Callable[[Tensor, Tensor], Tensor]) -> Segment:
    """A conditioning whose module computes `forward`."""
    module = nn.Module()
    module.forward = forward  # type: ignore[method-assign]
    inputs = {"t": torch.ones(3), "y": torch.ones(4, dtype=torch.int64)}
    return Segment(CONDITION, module, inputs, ("table",), {"t": {0: "steps"}, "y": {0: "batch"}})


def test_a_model_that_branches_on_its_data_is_refused(tmp_path: Path) -> None:
    segment = broken_segment(lambda t, y: t * 2 if t.sum() > 0 else t)
    with pytest.raises(CheckpointError, match="segment condition can't be traced") as caught:
        export_segment(segment, tmp_path / "condition.onnx", ())
    assert "\n" not in str(caught.value)


def test_a_model_that_works_at_one_batch_size_only_is_refused(tmp_path: Path) -> None:
    segment = broken_segment(lambda t, y: t.reshape(3, 1) * y.reshape(1, 4))
    with pytest.raises(CheckpointError, match="condition"):
        export_segment(segment, tmp_path / "condition.onnx", ())
