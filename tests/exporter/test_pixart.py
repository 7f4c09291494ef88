"""PixArt by its seams: the numbers of diffusers' own transformer and of its pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

import ditc
from ditc.bundle import Bundle
from ditc.cli.main import run
from ditc.compiler.options import CompileOptions
from ditc.engines.backend import runnable_path
from ditc.engines.onnxrt import OnnxRuntimeBackend, kernel_census
from ditc.exporter.models import load_model
from ditc.exporter.onnx_files import load_graph
from ditc.exporter.pixart import PixArt
from ditc.exporter.protocol import branches_add, check_decomposition, relative_error, step_tables
from ditc.quantize.linears import linears_of
from ditc.runtime.closeness import relative_error as numbers_error
from ditc.speed.peer_task import ModelChoice, peer_task_of
from tests.models import pixart

# diffusers' schedulers make NumPy warn
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

KINDS = list(pixart.CONFIGS)
STEPS, CFG = 6, 4.5


@pytest.fixture(scope="session")
def folders(run_folder: Path) -> Callable[[str], Path]:
    """A diffusers folder of each kind."""

    def folder_of(kind: str) -> Path:
        folder = run_folder / "pixarts" / kind
        if not (folder / "model_index.json").is_file():
            pixart.saved(kind, folder)
        return folder

    return folder_of


@torch.no_grad()
def theirs(model: Any, x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
    """diffusers' transformer on the positive texts, with size and ratio as its pipeline makes them for this latent."""
    sizes = None
    if model.use_additional_conditions:
        rows = len(x)
        sizes = {
            "resolution": torch.tensor([list(map(float, x.shape[-2:]))]).repeat(rows, 1),
            "aspect_ratio": torch.tensor([[x.shape[-2] / x.shape[-1]]]).repeat(rows, 1),
        }
    out = model(
        x,
        encoder_hidden_states=given["text"],
        timestep=t,
        added_cond_kwargs=sizes,
        encoder_attention_mask=given["text_mask"],
    ).sample
    return out[:, : x.shape[1]]


def from_folder(kind: str, folder: Path) -> PixArt:
    own = load_model(str(folder), facts=ditc.ModelFacts(text_tokens=pixart.TOKENS))
    assert isinstance(own, PixArt)
    return own


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_seams_compute_what_diffusers_computes(kind: str, folders: Callable[[str], Path]) -> None:
    own = from_folder(kind, folders(kind))
    check_decomposition(own, 1e-6)
    assert branches_add(own)
    given, x = pixart.texts(4), torch.randn(4, *own.spec.latent_shape, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([999.0, 500.0, 7.0, 0.0])
    expected = theirs(pixart.transformer(kind), x, t, given)
    assert relative_error(own(x, t, given["text"], given["text_mask"]), expected) < 1e-6


@torch.no_grad()
def test_a_text_of_nothing_but_padding_is_what_diffusers_makes_of_it() -> None:
    own, given = pixart.model("sigma"), pixart.texts(3)
    given["text_mask"] = torch.tensor([[0] * 7, [1] * 7, [0] * 7])
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([800.0])
    expected = theirs(pixart.transformer("sigma"), x, t.expand(3), given)
    parts = own.unpack(step_tables(own, t, [given["text"], given["text_mask"]]))
    h = own.embed(x)
    for branch in own.branches:
        h = branch.merge(h, branch.compute(h, parts), parts)
    assert relative_error(own.head(h, parts), expected) < 1e-4  # scores near -10000 have few bits left


def test_the_spec_is_what_the_folder_says(folders: Callable[[str], Path]) -> None:
    spec = from_folder("sigma", folders("sigma")).spec
    assert (spec.family, spec.latent_shape, spec.branch_shape) == ("pixart", (4, 8, 8), (16, 48))
    assert spec.branches[:3] == tuple(f"transformer_blocks.0.{name}" for name in ("attn1", "attn2", "ff"))
    assert [(each.name, each.shape, each.null) for each in spec.conditions] == [
        ("text", (7, 32), "given"),
        ("text_mask", (7,), "given"),
    ]
    assert (spec.out_channels, spec.cfg_channels, spec.num_classes) == (4, 4, None)
    assert spec.sampler.told == "DPMSolverMultistepScheduler"
    assert (spec.latent_scale, spec.latent_shift) == (0.13025, 0.0)
    assert spec.assumptions == ()
    assert spec.parameters == sum(p.numel() for p in pixart.transformer("sigma").parameters())


@pytest.mark.parametrize(("kind", "tokens"), [("alpha", 120), ("sigma", 300)])
def test_texts_are_as_long_as_the_pipelines_have_them(kind: str, tokens: int, folders: Callable[[str], Path]) -> None:
    assert load_model(str(folders(kind))).spec.conditions[0].shape == (tokens, pixart.CAPTION)


def test_a_folder_of_pixels_makes_pictures_itself(folders: Callable[[str], Path]) -> None:
    own = from_folder("pixels", folders("pixels"))
    assert own.decoder is None
    assert own.spec.is_picture
    assert own.pixels_of_a_place == 1


@pytest.fixture(scope="session")
def compiled(
    compiled_once: Callable[..., Bundle], quick_options: CompileOptions, folders: Callable[[str], Path]
) -> Callable[..., Bundle]:
    """A folder's bundle in FP32, and the same conditions of typical images for all."""

    def bundle_of(kind: str, size: tuple[int, int] | None = None, **changes: Any) -> Bundle:
        settings = {"policy": "none", "precision": "fp32", "vc": "none", "cfg": CFG, "steps": STEPS} | changes
        given = {name: array.numpy() for name, array in pixart.texts(4, seed=9).items()}
        facts = ditc.ModelFacts(text_tokens=pixart.TOKENS, size=size)
        options = quick_options.model_copy(update=settings)
        return compiled_once(str(folders(kind)), options, conditions=given, facts=facts)

    return bundle_of


def pictures(kind: str, noise: Tensor, given: dict[str, Tensor], pipe: Any = None) -> np.ndarray:
    """diffusers' pipeline on the same noise and texts, its pictures in [-1, 1], or latents of a model of pixels."""
    pipe = pipe or pixart.pipeline(kind)
    out = pipe(
        prompt=None,
        negative_prompt=None,
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        height=noise.shape[-2] * pipe.vae_scale_factor,
        width=noise.shape[-1] * pipe.vae_scale_factor,
        latents=noise.clone(),
        prompt_embeds=given["text"],
        prompt_attention_mask=given["text_mask"],
        negative_prompt_embeds=given["null_text"],
        negative_prompt_attention_mask=given["null_text_mask"],
        output_type="latent" if pipe.vae is None else "pt",
        use_resolution_binning=False,
    ).images
    return np.asarray(out if pipe.vae is None else 2 * out - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_makes_the_pictures_of_diffusers_pipeline(kind: str, compiled: Callable[..., Bundle]) -> None:
    bundle, given = compiled(kind), pixart.texts(3)
    noise = torch.randn(3, *bundle.manifest.model.latent_shape, generator=torch.Generator().manual_seed(4))
    expected = pictures(kind, noise, given)
    with ditc.load(bundle.path) as pipe:
        ours = pipe.images(conditions={name: each.numpy() for name, each in given.items()}, latents=noise.numpy())
    assert max(bundle.manifest.measured().parity.values()) < 1e-4
    assert numbers_error(ours, np.clip(expected, -1, 1)) < 1e-3


@pytest.mark.parametrize(("kind", "size"), [("sigma", (24, 40)), ("alpha", (160, 96)), ("pixels", (16, 24))])
def test_a_size_of_ones_own_makes_the_pictures_of_diffusers_pipeline_at_that_size(
    kind: str, size: tuple[int, int], compiled: Callable[..., Bundle]
) -> None:
    """Positions stretch as diffusers has them; what alpha is told of size and ratio is that of these pictures."""
    bundle, given = compiled(kind, size), pixart.texts(3)
    spec = bundle.manifest.model
    assert spec.space != compiled(kind).manifest.model.space
    noise = torch.randn(3, *spec.latent_shape, generator=torch.Generator().manual_seed(4))
    expected = pictures(kind, noise, given)
    assert expected.shape[2:] == size
    with ditc.load(bundle.path) as pipe:
        ours = pipe.images(conditions={name: each.numpy() for name, each in given.items()}, latents=noise.numpy())
    assert numbers_error(ours, np.clip(expected, -1, 1)) < 1e-3


def test_the_size_that_a_model_is_told_changes_what_it_makes() -> None:
    own, t = pixart.model("alpha"), torch.tensor([500.0])
    before = own.timestep_tables(t)["modulation"]
    own.take_size(1024, 512)  # a picture 8 times as wide where no decoder tells
    assert (own.spec.space, own.size_conditions(1)["aspect_ratio"].item()) == ((128, 64), 2.0)
    assert not torch.equal(own.timestep_tables(t)["modulation"], before)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["compile", *arguments, "-o", "/nowhere/at/all"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_a_size_that_can_not_be_is_one_line(
    folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = str(folders("sigma"))
    told = "--size 22x40: sigma makes pictures whose sides are multiples of 4 pixels, up to 2048; take 24x40"
    assert told in refused(capsys, own, "--size", "22x40")
    assert "take 2048x4" in refused(capsys, own, "--size", "9000x1")
    assert "--size needs pixels, as 512 for a square" in refused(capsys, own, "--size", "big")
    assert "--size must be a whole number from 1 to 65536, found 0" in refused(capsys, own, "--size", "0")
    assert "digits states its heads, classes and process itself; leave out --size" in refused(
        capsys, "digits", "--size", "16"
    )
    DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, norm_num_groups=4, sample_size=8
    ).save_pretrained(tmp_path / "dit")
    assert "is of a DiT, which was trained at one size" in refused(capsys, str(tmp_path / "dit"), "--size", "128")


class Held:
    """Holds the outputs of some layers of diffusers' transformer at the steps that reuse them, by forward hooks."""

    def __init__(self, model: Any, computes: Callable[[int, str], bool]) -> None:
        self.step, self.outputs = -1, dict[str, Tensor]()
        model.register_forward_pre_hook(lambda *_: self.begin())
        for number, block in enumerate(model.transformer_blocks):
            for name in ("attn1", "attn2", "ff"):
                path = f"transformer_blocks.{number}.{name}"
                block.get_submodule(name).register_forward_hook(partial(self.hold, path, computes))

    def begin(self) -> None:
        self.step += 1

    def hold(self, path: str, computes: Callable[[int, str], bool], layer: Any, given: Any, out: Tensor) -> Tensor:
        if computes(self.step, path):
            self.outputs[path] = out
        return self.outputs[path]


def held_and_ours(kind: str, bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """(latents of diffusers' pipeline with the outputs of branches held as the bundle's program says, the bundle's)."""
    program, given = bundle.manifest.program, pixart.texts(3)
    masks = [dict(zip(program.branches, program.segment(step.segment).compute, strict=True)) for step in program.steps]
    pipe = pixart.pipeline(kind)
    held = Held(pipe.transformer, lambda step, path: masks[step][path])
    noise = torch.randn(3, *bundle.manifest.model.latent_shape, generator=torch.Generator().manual_seed(4))
    pipe.vae = None  # latents are compared
    pipe.vae_scale_factor = 1
    expected = pictures(kind, noise, given, pipe)
    assert held.step == STEPS - 1
    with ditc.load(bundle.path) as ours:
        arrays = {name: each.numpy() for name, each in given.items()}
        return expected, ours.latents(conditions=arrays, latents=noise.numpy())


@pytest.mark.parametrize("caches", ["sums", "branches"])
@pytest.mark.parametrize("kind", ["sigma", "pixels"])
def test_a_reuse_is_diffusers_with_the_outputs_of_all_branches_held(
    kind: str, caches: str, compiled: Callable[..., Bundle]
) -> None:
    """Gates are those of the step that reuses; cross-attention has none."""
    bundle = compiled(kind, policy="fora:2", reuse="hold", caches=caches)
    expected, ours = held_and_ours(kind, bundle)
    assert numbers_error(ours, expected) < 1e-4


def test_each_kind_of_branch_can_be_held_by_itself(compiled: Callable[..., Bundle], tmp_path: Path) -> None:
    """Attention to the text at one step in three, self-attention at one in two, the MLP at two in three."""
    periods = {
        "attn1": lambda step: step % 2 == 0,
        "attn2": lambda step: step % 3 == 0,
        "ff": lambda step: step % 3 < 2,
    }
    branches = pixart.model("sigma").spec.branches
    rows = [[step == 0 or periods[name.rpartition(".")[2]](step) for name in branches] for step in range(STEPS)]
    (tmp_path / "rows.json").write_text(json.dumps({"compute": rows}))
    bundle = compiled("sigma", policy=str(tmp_path / "rows.json"))
    expected, ours = held_and_ours("sigma", bundle)
    assert numbers_error(ours, expected) < 1e-4


LINEARS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj")
LINEARS += ("ff.net.2",)


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "fora:2", "smooth": "smooth"},
        {"precision": "w7a8", "policy": "fora:2"},
        {"scales": "per-step", "midpoint": "bounded", "smooth": "smooth"},
        {"scales": "dynamic"},
    ],
    ids=["static", "w7a8", "per-step", "dynamic"],
)
def test_every_linear_layer_of_a_computing_step_is_integer(
    settings: dict[str, Any], compiled: Callable[..., Bundle]
) -> None:
    """Those that read the text alone run once for a request, and stay float."""
    bundle = compiled("sigma", **{"precision": "w8a8", "smooth": "none"} | settings)
    full = load_graph(bundle.segment_path("full"))
    expected = [f"transformer_blocks.{i}.{name}" for i in range(2) for name in LINEARS]
    assert sorted(linear.path for linear in linears_of(load_graph(bundle.reference_path("full")))) == sorted(expected)
    kernels = bundle.manifest.checks["kernels"]["full"]  # counted in the graph that ONNX Runtime runs
    assert kernels == {"linears": len(expected), "integer": len(expected)}
    assert not any(bundle.manifest.checks["tensorrt"].values())  # no rule of TensorRT's is broken
    census = kernel_census(OnnxRuntimeBackend(), runnable_path(bundle.segment_path("full"), "onnxrt"))
    assert census["MultiHeadAttention"] == 4  # to itself and to the text, in two blocks
    assert census["Softmax"] == census["FusedMatMul"] == census["DequantizeLinear"] == 0
    assert census["Transpose"] <= 2  # patches in and out
    read = {value.name for value in full.graph.inputs}
    assert read >= {"step.modulation", "request.text_bias", "request.text_keys.1", "request.text_values.1"}
    assert "t" not in {value.name for value in load_graph(bundle.segment_path("condition")).graph.inputs}


def test_int8_pictures_are_close_to_those_in_floating_point(compiled: Callable[..., Bundle]) -> None:
    given, images = {name: each.numpy() for name, each in pixart.texts(3).items()}, []
    for settings in ({}, {"precision": "w8a8", "policy": "none", "smooth": "smooth", "scales": "per-step"}):
        with ditc.load(compiled("sigma", **settings).path, check=True) as pipe:
            images.append(pipe.latents(conditions=given, seed=5))
    assert 0 < numbers_error(images[1], images[0]) < 0.1


def test_factors_fold_into_the_tables_of_timesteps(compiled: Callable[..., Bundle]) -> None:
    """And into the values of the text; what reads the residual stream itself, or GELU's output, has no such place."""
    bundle = compiled("sigma", precision="w8a8", policy="fora:2", smooth="smooth")
    plain = compiled("sigma", precision="w8a8", policy="fora:2", smooth="none")
    smoothing = bundle.manifest.checks["smooth"]
    assert max(smoothing["parity"].values()) < 1e-6
    assert smoothing["left"] == [
        f"transformer_blocks.{i}.{name}" for i in range(2) for name in ("attn2.to_q", "ff.net.2")
    ]
    smoothed, before = (each.tables()["step.modulation"] for each in (bundle, plain))
    changed = (smoothed != before).any(axis=(0, 2))
    assert changed.tolist() == [True, True, False] * 4 + [False, False]  # shifts and scales, no gate, not the head
    ratio = smoothed[:, 1] / before[:, 1]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), rtol=1e-5)  # of a channel at every step


def test_scales_per_step_divide_the_tables_of_timesteps_in_the_typed_form(compiled: Callable[..., Bundle]) -> None:
    bundle = compiled("sigma", precision="w8a8", scales="per-step", midpoint="bounded", smooth="smooth")
    typed = load_graph(bundle.segment_path("full").with_name("full.trt.onnx"))
    divided = [str(node.name) for node in typed.graph if node.op_type == "Div" and "over_magnitude" in str(node.name)]
    assert divided == ["step.modulation/over_magnitude/Div"]
    on_tokens = [
        node for node in typed.graph if node.op_type == "Div" and list(node.outputs[0].shape or ())[-2:] == [16, 48]
    ]
    assert len(on_tokens) == 2 * 3  # attention's mixtures, and what cross-attention's queries read


COMMANDS = [
    "inspect",
    "verify --images 2",
    pytest.param("evaluate --images 4 --seeds 0", marks=pytest.mark.slow),  # resamples pixels
    "doctor",
    "bisect --points 2",
    "report -o P.html",
]


@pytest.mark.parametrize(
    "command", [*COMMANDS, "bench --requests 1 --warmup 0", "export-polygraphy -o P --points 1", "estimate"]
)
def test_every_command_takes_such_a_bundle(
    command: str, compiled: Callable[..., Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = compiled("sigma", precision="w8a8", policy="fora:2", smooth="smooth")
    name, *rest = command.replace(" P", f" {tmp_path / 'out'}").split()
    assert run([name, str(bundle.path), *rest]) == 0, capsys.readouterr().err
    if name == "inspect":
        assert "text (7, 32), null given; text_mask (7) of 2 classes, null given" in capsys.readouterr().out


def test_peers_are_the_folder_s_model_at_the_bundle_s_size(
    compiled: Callable[..., Bundle], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Texts of a number of tokens that the folder doesn't state, and another height and width."""
    task = peer_task_of(compiled("sigma", (24, 40)), ModelChoice(str(folders("sigma"))), tmp_path)
    assert task.model.spec.space == (12, 20)
    assert task.model.spec.conditions[0].shape == (pixart.TOKENS, pixart.CAPTION)
