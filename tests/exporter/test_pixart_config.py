"""`config.json` of a PixArt: every key used, known to change nothing, or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel, Transformer2DModel
from diffusers_folders import change_config, own_signature, saved
from refusals import refusal_of
from safetensors.torch import load_file, save_file

from ditc.errors import InputError
from ditc.exporter.model_facts import ModelFacts
from ditc.exporter.models import load_model
from ditc.exporter.pixart_folder import PIXART_KEYS, pixart_from_diffusers
from ditc.exporter.protocol import example_inputs, relative_error
from ditc.spec import SamplerSpec
from tests.models.pixart import CONFIGS, SHARED, transformer

# the configuration beside the released PixArt-XL-2-1024-MS has exactly these keys; its numbers are smaller here
RELEASED: dict[str, Any] = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.22.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "double_self_attention": False,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "upcast_attention": False,
    "use_linear_projection": False,
    **SHARED,
    **CONFIGS["alpha"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(transformer("sigma"), tmp_path / "tiny")


def released(folder: Path, **changes: Any) -> Path:
    saved(transformer("alpha"), folder)
    (folder / "config.json").write_text(json.dumps(RELEASED | changes))
    return folder


def refusal(folder: Path) -> str:
    return refusal_of(lambda: pixart_from_diffusers(folder), folder)


@torch.no_grad()
def error_against(theirs: Any, folder: Path) -> float:
    """Relative error of our forward pass against diffusers' on the same inputs."""
    own = pixart_from_diffusers(folder, ModelFacts(text_tokens=5))
    x, t, text, mask = example_inputs(own.spec, 3)
    out = theirs(
        x, encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask, added_cond_kwargs=own.size_conditions(3)
    )
    return relative_error(own(x, t, text, mask), out.sample[:, : x.shape[1]])


@pytest.mark.parametrize("kind", [PixArtTransformer2DModel, Transformer2DModel])
def test_the_keys_and_their_defaults_are_the_class_s_own(kind: Any) -> None:
    keys, signature = PIXART_KEYS[kind.__name__], own_signature(kind)
    assert keys.known == signature.keys()
    defaults = {**keys.read, **{key: default for key, (default, _) in keys.fixed.items()}}
    assert defaults == {key: signature[key] for key in defaults}


def test_a_released_folder_is_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    folder = released(tmp_path / "old")
    theirs = Transformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    assert isinstance(theirs, PixArtTransformer2DModel)
    assert theirs.use_additional_conditions
    assert error_against(theirs, folder) < 1e-6
    assert load_model(str(folder)).spec.family == "pixart"


CHANGES: dict[str, dict[str, Any]] = {
    "no attention bias": {"attention_bias": False},
    "another epsilon": {"norm_eps": 0.1},
    "no second half of channels": {"out_channels": 4},
    "channels left to the default": {"out_channels": None},
    "positions not stretched": {"interpolation_scale": None},
    "size and ratio": {"use_additional_conditions": True},
    "one block": {"num_layers": 1},
    "wide texts": {"caption_channels": 80},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_is_read_computes_what_diffusers_computes(name: str, tmp_path: Path) -> None:
    theirs = transformer("sigma", **CHANGES[name])
    assert error_against(theirs, saved(theirs, tmp_path / "tiny")) < 1e-6


@pytest.mark.parametrize("key", sorted(PIXART_KEYS["PixArtTransformer2DModel"].known))
def test_a_key_that_a_folder_leaves_out_is_its_class_s_default_or_refused(key: str, tmp_path: Path) -> None:
    """Refused is one that the weights contradict, or that a PixArt can't do without."""
    folder = saved(transformer("sigma"), tmp_path / "tiny")
    path = folder / "config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    told_by_weights = {
        "attention_head_dim": "cross_attention_dim",
        "num_attention_heads": "cross_attention_dim",
        "cross_attention_dim": "cross_attention_dim",
        "num_layers": "missing transformer_blocks.",
        "caption_channels": "caption_channels",
    }
    if key in told_by_weights:
        assert told_by_weights[key] in refusal(folder)
        return
    theirs = PixArtTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    assert error_against(theirs, folder) < 1e-6


NO_PIXART = [
    ("norm_type", "ada_norm_zero"),
    ("norm_type", None),
    ("activation_fn", "geglu"),
    ("norm_elementwise_affine", True),
    ("attention_type", "gated"),
    ("cross_attention_dim", 768),
    ("cross_attention_dim", None),
    ("caption_channels", None),
    ("interpolation_scale", 0),
    ("use_additional_conditions", 1),
    ("out_channels", 5),
    ("sample_size", 7),
    ("sample_size", [8, 8]),
    ("attention_bias", "yes"),
    ("num_layers", 10**9),
    ("norm_eps", float("nan")),
]


@pytest.mark.parametrize(("key", "value"), NO_PIXART)
def test_a_setting_that_no_pixart_has_is_named(key: str, value: Any, folder: Path) -> None:
    change_config(folder, **{key: value})
    assert f"{key} is " in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_vector_embeds", 9), ("only_cross_attention", True), ("double_self_attention", True), ("norm_type", "x")],
)
def test_a_transformer_of_the_old_class_that_is_no_pixart_is_refused_by_its_key(
    key: str, value: Any, tmp_path: Path
) -> None:
    assert f"{key} is " in refusal(released(tmp_path / "old", **{key: value}))


def test_an_epsilon_that_the_old_class_and_today_s_make_otherwise_has_to_be_stated(tmp_path: Path) -> None:
    folder = released(tmp_path / "old")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in RELEASED.items() if k != "norm_eps"}))
    assert "norm_eps is missing" in refusal(folder)


def test_a_width_without_thirds_has_no_size_and_ratio(tmp_path: Path) -> None:
    folder = saved(transformer("sigma", attention_head_dim=8, cross_attention_dim=32), tmp_path / "tiny")
    change_config(folder, use_additional_conditions=True)
    assert "attention_head_dim is 8, expected a width that 12 divides, found 32" in refusal(folder)


@pytest.mark.parametrize("kind", list(PIXART_KEYS))
def test_what_is_said_to_change_nothing_changes_nothing(kind: str, tmp_path: Path) -> None:
    folder = released(tmp_path / "old")
    plain = {key: value for key, value in RELEASED.items() if key in PIXART_KEYS[kind].known} | {"_class_name": kind}
    (folder / "config.json").write_text(json.dumps(plain))
    expected = dict(pixart_from_diffusers(folder).config)
    for key in PIXART_KEYS[kind].harmless:
        (folder / "config.json").write_text(json.dumps(plain | {key: 7}))
        assert dict(pixart_from_diffusers(folder).config) == expected


@pytest.mark.parametrize("kind", list(PIXART_KEYS))
def test_a_key_that_nobody_knows_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    folder = released(tmp_path / "old", _class_name=kind, qk_norm="rms_norm")
    assert f"qk_norm ('rms_norm') is no key of a {kind}" in refusal(folder)


def change_weights(folder: Path, drop: str | None = None, **added: torch.Tensor) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    save_file(tensors | added, path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"drop": "caption_projection.linear_1.bias"}, "missing caption_projection.linear_1.bias"),
        ({"drop": "pos_embed.proj.weight"}, "missing pos_embed.proj.weight"),
        ({"y_embedding": torch.ones(3)}, "unexpected y_embedding"),
        ({"proj_out.bias": torch.ones(3)}, "proj_out.bias has shape (3,), expected (32,)"),
        ({"proj_out.bias": torch.full((32,), torch.nan)}, "proj_out.bias contains NaN"),
        ({"pos_embed.proj.weight": torch.ones(8, 4, 2, 2)}, "pos_embed.proj.weight has shape (8, 4, 2, 2)"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, Any], told: str, folder: Path) -> None:
    change_weights(folder, **change)
    assert told in refusal(folder)


def test_weights_of_half_precision_are_computed_with_in_full(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    assert {p.dtype for p in pixart_from_diffusers(folder).parameters()} == {torch.float32}
    theirs = PixArtTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).float().eval()
    assert error_against(theirs, folder) < 1e-6


def test_what_a_bare_folder_does_not_state_is_assumed_aloud(folder: Path) -> None:
    spec = pixart_from_diffusers(folder).spec
    assert spec.sampler == SamplerSpec(name="dpm++2m")
    process, texts = spec.assumptions
    assert process.startswith("a process as usual: noise prediction")
    assert texts == "texts of 300 tokens, as PixArtSigmaPipeline has them (--text-tokens)"


@pytest.mark.parametrize("facts", [ModelFacts(classes=5), ModelFacts(null_class=False)])
def test_facts_about_classes_are_refused(facts: ModelFacts, folder: Path) -> None:
    message = refusal_of(lambda: pixart_from_diffusers(folder, facts), folder, InputError)
    assert "is asked for with a text; leave out --" in message


def test_a_folder_of_no_family_names_those_that_there_are(folder: Path) -> None:
    change_config(folder, _class_name="SanaTransformer2DModel")
    message = refusal_of(lambda: load_model(str(folder)), folder)
    assert (
        "describes SanaTransformer2DModel, expected one of DiTTransformer2DModel, PixArtTransformer2DModel" in message
    )
