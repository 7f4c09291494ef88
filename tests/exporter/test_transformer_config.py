"""`config.json` of a diffusers folder: every key used, known to change nothing, or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, Transformer2DModel
from diffusers_folders import (
    RELEASED,
    RELEASED_SCHEDULER,
    Settings,
    change_config,
    error_against,
    own_signature,
    refusal,
    released_folder,
    saved,
    share_embedders,
    transformer,
)

from ditc.exporter.diffusers_folder import TRANSFORMER_KEYS, dit_from_diffusers
from ditc.spec import DiffusionSpec, SamplerSpec


def test_the_spec_is_read_off_the_configuration(tmp_path: Path) -> None:
    own = dit_from_diffusers(saved(transformer(patch_size=4), tmp_path / "mine"))
    assert own.spec.name == "mine"
    assert own.spec.latent_shape == (4, 8, 8)
    assert own.spec.branch_shape == (4, 64)
    assert own.spec.null_label == own.spec.num_classes == 10
    assert own.spec.cfg_channels == 4
    assert own.spec.diffusion.learned_sigma
    assert not own.training


@pytest.mark.parametrize("text", ["{", "[1]", "", "7"])
def test_a_damaged_configuration_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


def test_a_model_of_another_class_is_refused(folder: Path) -> None:
    change_config(folder, _class_name="PixArtTransformer2DModel")
    message = refusal(folder)
    assert "PixArtTransformer2DModel" in message
    assert "expected DiTTransformer2DModel" in message


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("activation_fn", "geglu"),
        ("norm_elementwise_affine", True),
        ("out_channels", 5),
        ("sample_size", None),
        ("num_embeds_ada_norm", None),
        ("num_attention_heads", "4"),
    ],
)
def test_a_setting_that_no_dit_has_is_named(setting: str, value: Any, folder: Path) -> None:
    change_config(folder, **{setting: value})
    assert setting in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "key", "settings"),
    [
        ({"num_embeds_ada_norm": 11}, "norm1.emb.class_embedder.embedding_table.weight", "num_embeds_ada_norm"),
        ({"out_channels": 4}, "proj_out_2.", "out_channels, in_channels and patch_size"),
    ],
)
def test_a_setting_that_the_weights_contradict_is_named(
    changes: Settings, key: str, settings: str, folder: Path
) -> None:
    change_config(folder, **changes)
    message = refusal(folder)
    assert key in message
    assert message.endswith(f"from {settings}")


def test_a_released_folder_is_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    folder = released_folder(tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "scheduler").mkdir()
    (tmp_path / "pipeline" / "scheduler" / "scheduler_config.json").write_text(json.dumps(RELEASED_SCHEDULER))
    theirs = Transformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    assert isinstance(theirs, DiTTransformer2DModel)
    own = dit_from_diffusers(tmp_path / "pipeline")
    assert error_against(theirs, own) < 1e-5
    assert own.config == dit_from_diffusers(saved(share_embedders(transformer()), tmp_path / "today")).config
    assert own.spec.diffusion == DiffusionSpec(learned_sigma=True)
    assert own.spec.sampler == SamplerSpec(name="ddim", spacing="leading")
    assert own.spec.assumptions == ()


@torch.no_grad()
def test_keys_of_the_old_class_are_ignored_under_the_new_one_as_diffusers_does(folder: Path) -> None:
    old, new = (TRANSFORMER_KEYS[kind].known for kind in ("Transformer2DModel", "DiTTransformer2DModel"))
    change_config(folder, **dict.fromkeys(old - new, 7))
    theirs = DiTTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    assert error_against(theirs, dit_from_diffusers(folder)) < 1e-5


@pytest.mark.parametrize("kind", [DiTTransformer2DModel, Transformer2DModel])
def test_the_keys_and_their_defaults_are_the_class_s_own(kind: Any) -> None:
    keys, signature = TRANSFORMER_KEYS[kind.__name__], own_signature(kind)
    assert keys.known == signature.keys()
    defaults = {**keys.read, **{key: default for key, (default, _) in keys.fixed.items()}}
    assert defaults == {key: signature[key] for key in defaults}


def without(folder: Path, key: str) -> Path:
    """The folder, its configuration without a key."""
    path = folder / "config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    return folder


@pytest.mark.parametrize("key", sorted(set(RELEASED) - {"_class_name", "_diffusers_version"}))
def test_a_key_that_a_released_folder_leaves_out_is_its_class_s_default(key: str, tmp_path: Path) -> None:
    """Where the class of the file and the one that diffusers makes of it differ, such a file is refused."""
    old, new = own_signature(Transformer2DModel)[key], own_signature(DiTTransformer2DModel)
    agree = key not in new or new[key] == old
    changes = {key: old} if agree and key in new else {}
    folder = without(released_folder(tmp_path / "old", **changes), key)
    if agree:
        theirs = Transformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()
        assert error_against(theirs, dit_from_diffusers(folder)) < 1e-5
    else:
        told_by_weights = {"attention_bias": "to_k.bias", "num_layers": "transformer_blocks.1"}
        assert told_by_weights.get(key, f"{key} is missing") in refusal(folder) or key == "attention_head_dim"


@pytest.mark.parametrize("key", sorted(TRANSFORMER_KEYS["DiTTransformer2DModel"].known))
def test_a_key_that_a_folder_leaves_out_is_its_class_s_default(key: str, tmp_path: Path) -> None:
    default = own_signature(DiTTransformer2DModel)[key]
    narrow = {"num_attention_heads": 1, "attention_head_dim": 8} if key == "num_layers" else {}
    settings = {"norm_eps": 0.1, "attention_bias": False, **narrow, key: default}
    folder = without(saved(transformer(**settings), tmp_path / "tiny"), key)
    theirs = DiTTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    assert theirs.config[key] == default
    assert error_against(theirs, dit_from_diffusers(folder)) < 1e-5


NO_DIT = [
    ("norm_type", "ada_norm_single"),
    ("norm_type", "ada_norm"),
    ("norm_type", "layer_norm"),
    ("norm_type", None),
    ("activation_fn", "geglu"),
    ("norm_elementwise_affine", True),
    ("norm_elementwise_affine", 0),
    ("cross_attention_dim", 768),
    ("num_vector_embeds", 4096),
    ("only_cross_attention", True),
    ("double_self_attention", True),
    ("attention_type", "gated"),
    ("caption_channels", 4096),
    ("interpolation_scale", 2),
    ("patch_size", None),
    ("in_channels", None),
]


@pytest.mark.parametrize(("key", "value"), NO_DIT)
def test_a_transformer_of_the_old_class_that_is_no_dit_is_refused_by_its_key(
    key: str, value: Any, tmp_path: Path
) -> None:
    message = refusal(released_folder(tmp_path / "old", **{key: value}))
    assert f"{key} is " in message


@pytest.mark.parametrize("kind", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_what_is_said_to_change_nothing_changes_nothing(kind: str, tmp_path: Path) -> None:
    folder = released_folder(tmp_path / "old")
    plain = {key: value for key, value in RELEASED.items() if key in TRANSFORMER_KEYS[kind].known}
    (folder / "config.json").write_text(json.dumps(plain | {"_class_name": kind}))
    expected = dit_from_diffusers(folder).config
    for key in TRANSFORMER_KEYS[kind].harmless:
        (folder / "config.json").write_text(json.dumps(plain | {"_class_name": kind, key: 7}))
        assert dit_from_diffusers(folder).config == expected


@pytest.mark.parametrize("kind", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_a_key_that_nobody_knows_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    folder = released_folder(tmp_path / "old")
    plain = {key: value for key, value in RELEASED.items() if key in TRANSFORMER_KEYS[kind].known}
    (folder / "config.json").write_text(json.dumps(plain | {"_class_name": kind, "qk_norm": "rms_norm"}))
    assert f"qk_norm ('rms_norm') is no key of a {kind}" in refusal(folder)


WRONG_TYPES: dict[str, tuple[Any, ...]] = {
    "num_attention_heads": ("4", 4.0, True, None, [4], {}, 0, -1, 10**12),
    "attention_head_dim": ("16", True, None, 0, 10**12),
    "in_channels": ("4", True, None, 0),
    "out_channels": ("8", True, [8], 0, 5),
    "num_layers": ("2", True, None, 0, 60000, 10**12),
    "attention_bias": (1, "true", None, 0),
    "sample_size": ("8", True, None, [8, 8], 0, 7, 10**6),
    "patch_size": ("2", True, None, [2, 2], 0, 3),
    "num_embeds_ada_norm": ("10", True, None, 0),
    "norm_eps": ("1e-5", True, None, [1e-5], -1.0, float("nan"), float("inf")),
}


@pytest.mark.parametrize("key", WRONG_TYPES)
def test_a_value_of_a_wrong_type_is_one_line_that_names_its_key(key: str, folder: Path) -> None:
    for value in WRONG_TYPES[key]:
        change_config(folder, **{key: value})
        message = refusal(folder)
        assert key in message or (key == "patch_size" and "sample_size" in message), (value, message)


def test_a_config_of_another_width_than_the_weights_builds_no_model_of_that_width(folder: Path) -> None:
    change_config(folder, num_attention_heads=60000, attention_head_dim=60000)
    assert "pos_embed.proj.weight has shape (64, 4, 2, 2), expected (3600000000, 4, 2, 2)" in refusal(folder)
