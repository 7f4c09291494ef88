"""PixArt by its seams: the numbers of diffusers' own transformer and of its pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ditc
from ditc.bundle import Bundle
from ditc.compiler.options import CompileOptions
from ditc.exporter.models import load_model
from ditc.exporter.pixart import PixArt
from ditc.exporter.protocol import branches_add, check_decomposition, relative_error
from ditc.runtime.closeness import relative_error as numbers_error
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
    step = {name: table[0] for name, table in own.condition(t, given["text"], given["text_mask"]).items()}
    parts = own.unpack(step | own.request_tables(given["text"], given["text_mask"]))
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

    def bundle_of(kind: str, **changes: Any) -> Bundle:
        settings = {"policy": "none", "precision": "fp32", "vc": "none", "cfg": CFG, "steps": STEPS} | changes
        given = {name: array.numpy() for name, array in pixart.texts(4, seed=9).items()}
        facts = ditc.ModelFacts(text_tokens=pixart.TOKENS)
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
