"""Diffusers folders: the same numbers as diffusers computes, and clear refusals."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditc.errors import CheckpointError
from ditc.exporter.diffusers_folder import TRANSFORMER_KEYS, dit_from_diffusers
from ditc.exporter.dit import DiT, sincos_positions
from ditc.exporter.facts import ModelFacts
from ditc.exporter.protocol import relative_error
from ditc.spec import DiffusionSpec, SamplerSpec

Settings = dict[str, Any]

TINY: Settings = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "norm_num_groups": 8,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}
VARIANTS: dict[str, Settings] = {
    "learned sigma": {},
    "no learned sigma": {"out_channels": 4},
    "sigma left to the default": {"out_channels": None},
    "patch 4": {"patch_size": 4, "sample_size": 16},
    "no attention bias": {"attention_bias": False},
    "another epsilon": {"norm_eps": 0.1},
    "narrow heads": {"num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6},
    "one block": {"num_layers": 1},
}


def transformer(**changes: Any) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(**TINY | changes).eval()


def share_embedders(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Every block a copy of the first one's embedders, as conversions of the original release have it."""
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


@torch.no_grad()
def error_against(model: DiTTransformer2DModel, own: DiT) -> float:
    """Relative error of our forward pass: every row has a timestep and a label of its own."""
    config = model.config
    x = torch.randn(4, config.in_channels, config.sample_size, config.sample_size)
    t, y = torch.tensor([999, 500, 7, 0]), torch.tensor([0, 3, 9, 10])
    return relative_error(own(x, t.float(), y), model(x, timestep=t, class_labels=y).sample)


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(transformer(), tmp_path / "tiny")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, drop: str | None = None, **added: Tensor) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    save_file(kept | added, path)


def refusal(folder: Path) -> str:
    """The one line that a user reads when this folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        dit_from_diffusers(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_computes_what_diffusers_computes(name: str, tmp_path: Path) -> None:
    model = transformer(**VARIANTS[name])
    own = dit_from_diffusers(saved(model, tmp_path / "tiny"))
    assert error_against(model, own) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_with_equal_embedders_computes_what_diffusers_computes(name: str, tmp_path: Path) -> None:
    model = share_embedders(transformer(**VARIANTS[name]))
    own = dit_from_diffusers(saved(model, tmp_path / "tiny"))
    assert not own.config.embedder_per_block
    assert error_against(model, own) < 1e-5


def test_embedders_that_differ_are_kept_per_block(folder: Path) -> None:
    model = dit_from_diffusers(folder)
    assert model.config.embedder_per_block
    assert not torch.equal(model.blocks[0].t_embedder.mlp[0].weight, model.blocks[1].t_embedder.mlp[0].weight)


def test_q_k_and_v_of_a_diffusers_block_are_joined(folder: Path) -> None:
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    expected = torch.cat([tensors[f"transformer_blocks.1.attn1.to_{part}.weight"] for part in "qkv"])
    assert torch.equal(dit_from_diffusers(folder).blocks[1].attn.qkv.weight, expected)


def test_the_spec_is_read_off_the_configuration(tmp_path: Path) -> None:
    own = dit_from_diffusers(saved(transformer(patch_size=4), tmp_path / "mine"))
    assert own.spec.name == "mine"
    assert own.spec.latent_shape == (4, 8, 8)
    assert own.spec.branch_shape == (4, 64)
    assert own.spec.null_label == own.spec.num_classes == 10
    assert own.spec.cfg_channels == 4
    assert own.spec.diffusion.learned_sigma
    assert not own.training


@pytest.mark.parametrize(
    "options", [{"max_shard_size": "100KB"}, {"max_shard_size": "100KB", "safe_serialization": False}]
)
def test_sharded_weights_are_read(options: Settings, tmp_path: Path) -> None:
    model = transformer()
    folder = saved(model, tmp_path / "tiny", **options)
    assert len(list(folder.glob("*-of-*"))) > 2
    assert error_against(model, dit_from_diffusers(folder)) < 1e-5


def test_bin_weights_are_read(tmp_path: Path) -> None:
    model = transformer()
    folder = saved(model, tmp_path / "tiny", safe_serialization=False)
    assert (folder / "diffusion_pytorch_model.bin").is_file()
    assert error_against(model, dit_from_diffusers(folder)) < 1e-5


def test_half_precision_weights_are_computed_with_in_float32(tmp_path: Path) -> None:
    own = dit_from_diffusers(saved(transformer().half(), tmp_path / "tiny"))
    assert {parameter.dtype for parameter in own.parameters()} == {torch.float32}


def test_positions_are_computed_where_the_weights_leave_them_out(folder: Path) -> None:
    assert torch.equal(dit_from_diffusers(folder).pos_embed, sincos_positions(64, 4))


def test_positions_in_the_weights_are_taken(folder: Path) -> None:
    positions = torch.randn(1, 16, 64)
    change_weights(folder, **{"pos_embed.pos_embed": positions})
    assert torch.equal(dit_from_diffusers(folder).pos_embed, positions)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path)


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


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert "no weights" in refusal(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = saved(transformer(), tmp_path / "tiny", max_shard_size="100KB")
    shard = sorted(folder.glob("*-00002-of-*"))[0]
    shard.unlink()
    assert f"index.json names {shard.name}, which is not there; copy the folder again" in refusal(folder)


def saved_twice(folder: Path, **second: Any) -> tuple[DiTTransformer2DModel, DiTTransformer2DModel]:
    """Two models saved into one folder, the first whole, the second in shards beside it."""
    first, other = transformer(), transformer(norm_eps=0.1)
    with torch.no_grad():
        other.proj_out_2.bias += 1
    saved(first, folder, **second)
    kept = {path.name: path.read_bytes() for path in folder.glob("diffusion_pytorch_model*")}
    saved(other, folder, max_shard_size="100KB", **second)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    saved(first, folder.with_name("first"), **second)
    return first, other


@pytest.mark.parametrize("second", [{}, {"variant": "fp16"}, {"safe_serialization": False}])
def test_of_an_index_and_a_single_file_the_index_is_meant_as_diffusers_has_it(second: Settings, tmp_path: Path) -> None:
    _, other = saved_twice(tmp_path / "tiny", **second)
    safe = {"use_safetensors": second.get("safe_serialization", True), "variant": second.get("variant")}
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "tiny", low_cpu_mem_usage=False, **safe).eval()
    assert torch.equal(theirs.proj_out_2.bias, other.proj_out_2.bias)
    own = dit_from_diffusers(tmp_path / "tiny")
    assert error_against(theirs, own) < 1e-5
    assert any("as diffusers has it, not diffusion_pytorch_model." in line for line in own.spec.assumptions)


def test_an_index_whose_shards_are_gone_is_not_meant_and_that_is_said(tmp_path: Path) -> None:
    first, _ = saved_twice(tmp_path / "tiny")
    gone = sorted((tmp_path / "tiny").glob("*-of-*"))[0]
    gone.unlink()
    own = dit_from_diffusers(tmp_path / "tiny")
    assert torch.equal(own.final_layer.linear.bias, first.proj_out_2.bias)
    assert any(f"index.json {gone.name} is missing" in line for line in own.spec.assumptions)


def test_a_state_dict_deeper_in_a_file_of_a_folder_is_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"state_dict": transformer().state_dict()}, folder / "diffusion_pytorch_model.bin")
    assert "holds no tensors right in it, it holds state_dict; save the state dict in there alone" in refusal(folder)


def test_an_index_without_a_weight_map_is_refused(tmp_path: Path) -> None:
    folder = saved(transformer(), tmp_path / "tiny", max_shard_size="100KB")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text('{"metadata": {}}')
    assert "index.json" in refusal(folder)


MISSING = [
    "pos_embed.proj.weight",
    "proj_out_2.bias",
    "transformer_blocks.1.ff.net.2.weight",
    "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight",
    "transformer_blocks.0.attn1.to_q.weight",
    "transformer_blocks.0.attn1.to_k.weight",
    "transformer_blocks.0.attn1.to_v.bias",
]


@pytest.mark.parametrize("key", MISSING)
def test_a_missing_key_is_named_as_the_folder_names_it(key: str, folder: Path) -> None:
    change_weights(folder, drop=key)
    assert f"missing {key}" in refusal(folder)


@pytest.mark.parametrize("key", ["cross.weight", "transformer_blocks.0.attn2.to_q.weight", "scale"])
def test_an_unexpected_key_is_named_as_the_folder_names_it(key: str, folder: Path) -> None:
    change_weights(folder, **{key: torch.zeros(3)})
    assert f"unexpected {key}" in refusal(folder)


@pytest.mark.parametrize(("layers", "word"), [(1, "unexpected"), (3, "missing")])
def test_a_depth_that_the_weights_do_not_have_is_refused(layers: int, word: str, folder: Path) -> None:
    change_config(folder, num_layers=layers)
    assert word in refusal(folder)


SHAPED = sorted(transformer().state_dict().keys())


@pytest.mark.parametrize("key", SHAPED)
def test_a_wrong_shape_is_named_as_the_folder_names_it(key: str, folder: Path) -> None:
    change_weights(folder, **{key: torch.zeros(7, 5)})
    assert f"does not fit its config.json: {key} has shape (7, 5), expected (" in refusal(folder)


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


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    change_weights(folder, **{"transformer_blocks.1.attn1.to_k.weight": torch.full((64, 64), float("nan"))})
    assert "NaN" in refusal(folder)


# the configurations beside the released DiT-XL/2 have exactly these keys, written by a diffusers of 2022
RELEASED: Settings = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 16,
    "cross_attention_dim": None,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 4,
    "num_embeds_ada_norm": 10,
    "num_layers": 2,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 8,
    "upcast_attention": False,
    "use_linear_projection": False,
}
RELEASED_SCHEDULER: Settings = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.12.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "trained_betas": None,
}


def released_folder(folder: Path, **changes: Any) -> Path:
    """A transformer folder as the release has it, weights in a .bin file; `changes` are other settings.

    The weights are those of a DiT with such settings, as far as there is one.
    """
    own = own_signature(DiTTransformer2DModel).keys() & changes.keys() & {"num_attention_heads", "out_channels"}
    model = transformer(**{key: changes[key] for key in own})
    saved(share_embedders(model), folder, safe_serialization=False)
    (folder / "config.json").write_text(json.dumps(RELEASED | changes))
    return folder


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


def released_pipeline(folder: Path) -> Path:
    """A pipeline with files of 2022 in every part."""
    released_folder(folder / "transformer")
    for part, file, content in (
        ("vae", "config.json", None),
        ("scheduler", "scheduler_config.json", RELEASED_SCHEDULER),
    ):
        (folder / part).mkdir()
        if content is not None:
            (folder / part / file).write_text(json.dumps(content))
    saved(autoencoder(), folder / "vae")
    write_index(folder, transformer="Transformer2DModel", scheduler="DDIMScheduler", vae="AutoencoderKL")
    return folder


def write_index(folder: Path, **classes: Any) -> None:
    entries = {part: ["diffusers", kind] if isinstance(kind, str) else kind for part, kind in classes.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **entries}))


def test_a_released_pipeline_that_today_s_diffusers_saves_again_is_the_same_model(tmp_path: Path) -> None:
    """What diffusers loads from an old file keeps the old keys in the new one, under the new class."""
    folder, again = released_pipeline(tmp_path / "old"), tmp_path / "again"
    DiTPipeline.from_pretrained(folder, low_cpu_mem_usage=False).save_pretrained(again)
    resaved = json.loads((again / "transformer" / "config.json").read_text())
    assert resaved["_class_name"] == "DiTTransformer2DModel"
    assert resaved.keys() >= {"cross_attention_dim", "num_vector_embeds", "use_linear_projection"}
    old, new = dit_from_diffusers(folder), dit_from_diffusers(again)
    assert old.spec.model_copy(update={"name": ""}) == new.spec.model_copy(update={"name": ""})
    assert old.config == new.config
    weights = {name: value for name, value in new.named_parameters() if not name.startswith("decoder.")}
    assert all(torch.equal(old.get_parameter(name), value) for name, value in weights.items())


@torch.no_grad()
def test_keys_of_the_old_class_are_ignored_under_the_new_one_as_diffusers_does(folder: Path) -> None:
    old, new = (TRANSFORMER_KEYS[kind].known for kind in ("Transformer2DModel", "DiTTransformer2DModel"))
    change_config(folder, **dict.fromkeys(old - new, 7))
    theirs = DiTTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    assert error_against(theirs, dit_from_diffusers(folder)) < 1e-5


@pytest.mark.parametrize(
    ("part", "kind", "said"),
    [
        ("transformer", "SanaTransformer2DModel", "names SanaTransformer2DModel as the transformer, expected DiT"),
        ("vae", "AutoencoderDC", "names AutoencoderDC as the vae, expected AutoencoderKL"),
        ("scheduler", "EDMEulerScheduler", "is of EDMEulerScheduler: "),
        ("scheduler", "MyScheduler", "is of MyScheduler: no scheduler that ditc knows"),
        ("scheduler", 7, "scheduler is 7, expected a library and a class"),
        ("vae", ["diffusers"], "vae is ['diffusers'], expected a library and a class"),
    ],
)
def test_a_class_that_only_the_index_names_is_looked_at(part: str, kind: Any, said: str, tmp_path: Path) -> None:
    folder = released_pipeline(tmp_path / "old")
    write_index(folder, **{part: kind})
    assert said in refusal(folder)


def test_the_scheduler_is_of_the_class_that_the_index_names_as_diffusers_has_it(tmp_path: Path) -> None:
    folder = released_pipeline(tmp_path / "old")
    write_index(folder, transformer="DiTTransformer2DModel", scheduler="DDPMScheduler", vae="AutoencoderKL")
    theirs = DiTPipeline.from_pretrained(folder, low_cpu_mem_usage=False).scheduler
    assert type(theirs).__name__ == "DDPMScheduler"
    spec = dit_from_diffusers(folder).spec
    assert spec.sampler.name == "ddpm"
    assert spec.sampler.variance.replace("-", "_") == theirs.config.variance_type
    assert spec.assumptions == (
        "the scheduler is of DDPMScheduler, as model_index.json has it, not of DDIMScheduler (scheduler_config.json)",
    )


@pytest.mark.parametrize("content", [{}, {"scheduler": [None, None]}, {"scheduler": None}])
def test_an_index_that_says_nothing_of_a_part_changes_nothing(content: Settings, tmp_path: Path) -> None:
    folder = released_pipeline(tmp_path / "old")
    (folder / "model_index.json").write_text(json.dumps(content))
    assert dit_from_diffusers(folder).spec.assumptions == ()


def own_signature(kind: Any) -> Settings:
    parameters = inspect.signature(kind.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


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


WEIGHTS = "diffusion_pytorch_model.safetensors"


def as_variant(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.bin"])
def test_the_only_variant_of_the_weights_is_read_and_said(name: str, folder: Path) -> None:
    expected = dit_from_diffusers(folder)
    as_variant(folder, name)  # what is in it is told by its bytes
    own = dit_from_diffusers(folder)
    assert torch.equal(own.blocks[0].attn.qkv.weight, expected.blocks[0].attn.qkv.weight)
    variant = name.split(".")[1]
    assert f"the weights of the variant {variant} are meant, no others are in tiny" in own.spec.assumptions


def test_a_variant_beside_the_plain_weights_is_left_alone(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"broken")
    assert not [line for line in dit_from_diffusers(folder).spec.assumptions if "variant" in line]


def test_of_several_variants_none_is_taken(folder: Path) -> None:
    as_variant(folder, "diffusion_pytorch_model.fp16.safetensors")
    (folder / "diffusion_pytorch_model.bf16.safetensors").write_bytes(b"other")
    assert "in the variants bf16, fp16 only" in refusal(folder)


def test_a_sharded_variant_is_read(tmp_path: Path) -> None:
    model = transformer()
    folder = saved(model, tmp_path / "tiny", max_shard_size="100KB", variant="fp16")
    assert not (folder / "diffusion_pytorch_model.safetensors.index.json").exists()
    own = dit_from_diffusers(folder)
    assert error_against(model, own) < 1e-5
    assert any("variant fp16" in line for line in own.spec.assumptions)


def test_a_shard_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = saved(transformer(), tmp_path / "tiny", max_shard_size="100KB")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["proj_out_2.bias"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(found))
    assert "'../elsewhere.safetensors', which lies outside the folder" in refusal(folder)


def test_weights_under_another_name_are_named(folder: Path) -> None:
    as_variant(folder, "model.safetensors")
    assert "it holds config.json, model.safetensors; expected diffusion_pytorch_model.safetensors" in refusal(folder)


def test_one_prefix_of_all_keys_is_taken_off_and_said(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    own = dit_from_diffusers(folder)
    assert torch.equal(own.final_layer.linear.bias, tensors["proj_out_2.bias"])
    assert any("'module._orig_mod.'" in line for line in own.spec.assumptions)


def test_quantized_weights_are_refused_by_tensor_and_type(folder: Path) -> None:
    change_weights(folder, **{"proj_out_2.bias": torch.zeros(32, dtype=torch.float8_e4m3fn)})
    assert "proj_out_2.bias is float8_e4m3fn, expected float16" in refusal(folder)


def test_a_cache_of_the_hub_is_pointed_into(folder: Path) -> None:
    cache = folder.parent / "models--me--tiny"
    (cache / "snapshots").mkdir(parents=True)
    folder.rename(cache / "snapshots" / "0123abc")
    with pytest.raises(CheckpointError) as caught:
        dit_from_diffusers(cache)
    assert f"give the folder in it: {cache / 'snapshots' / '0123abc'}" in str(caught.value)


def test_of_several_snapshots_the_main_revision_s_is_named(folder: Path) -> None:
    cache = folder.parent / "models--me--tiny"
    for name in ("0123abc", "9999fff"):
        (cache / "snapshots" / name).mkdir(parents=True)
    (cache / "refs").mkdir()
    for current in ("0123abc", "9999fff"):
        (cache / "refs" / "main").write_text(current)
        assert f"give the folder in it: {cache / 'snapshots' / current}" in refusal(cache)


def test_a_snapshot_in_a_cache_of_the_hub_has_its_repository_s_name(folder: Path) -> None:
    snapshot = folder.parent / "models--me--DiT-Tiny" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    assert dit_from_diffusers(snapshot).spec.name == "DiT-Tiny"


def test_an_empty_transformer_folder_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    assert f"{tmp_path / 'transformer'} holds nothing" in refusal(tmp_path)


def test_a_folder_without_a_transformer_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("unet", "vae", "scheduler"):
        (tmp_path / name).mkdir()
    assert "holds scheduler/, unet/, vae/" in refusal(tmp_path)


def pipeline(folder: Path, **settings: Any) -> Path:
    transformer().save_pretrained(folder / "transformer")
    DDIMScheduler(**settings).save_pretrained(folder / "scheduler")
    return folder


def test_the_scheduler_beside_the_transformer_is_read(tmp_path: Path) -> None:
    spec = dit_from_diffusers(pipeline(tmp_path / "mine", prediction_type="v_prediction", clip_sample_range=2.5)).spec
    assert spec.diffusion == DiffusionSpec(prediction="v")
    assert spec.sampler == SamplerSpec(spacing="leading", clip=2.5)
    assert spec.assumptions == ()


def test_a_scheduler_folder_without_its_file_is_not_passed_over(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "mine")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert "no such file" in refusal(folder)


def test_without_a_scheduler_the_process_of_the_release_is_assumed_and_said(tmp_path: Path) -> None:
    spec = dit_from_diffusers(saved(transformer(out_channels=4), tmp_path / "tiny")).spec
    assert spec.diffusion == DiffusionSpec(learned_sigma=False)
    assert spec.sampler.clip is None
    (line,) = spec.assumptions
    assert line == (
        "a process as usual: noise prediction (--prediction), linear betas from 0.0001 to 0.02 (--beta-schedule), "
        "1000 training steps (--train-steps)"
    )


def test_a_bare_transformer_of_a_pipeline_points_to_the_scheduler(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "mine")
    (line,) = dit_from_diffusers(folder / "transformer").spec.assumptions
    assert line.endswith(f"{folder} has a scheduler that states it")


def test_facts_about_the_process_are_used_where_there_is_no_scheduler(folder: Path) -> None:
    facts = ModelFacts(prediction="v", beta_schedule="scaled-linear", beta_range=(0.001, 0.01), train_steps=400)
    spec = dit_from_diffusers(folder, facts).spec
    assert spec.diffusion == DiffusionSpec(
        prediction="v", beta_schedule="scaled-linear", beta_start=0.001, beta_end=0.01, train_steps=400
    )
    assert spec.assumptions == ()


def autoencoder(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    settings: Settings = {"block_out_channels": (32,), "latent_channels": 4, "norm_num_groups": 8, "sample_size": 8}
    return AutoencoderKL(**settings | changes).eval()


@torch.no_grad()
@pytest.mark.parametrize("shift", [None, 0.2])
def test_the_decoder_is_the_vae_s_on_latents_of_its_own_scale(shift: float | None, tmp_path: Path) -> None:
    vae = autoencoder(scaling_factor=0.5, shift_factor=shift)
    transformer().save_pretrained(tmp_path / "transformer")
    vae.save_pretrained(tmp_path / "vae")
    model = dit_from_diffusers(tmp_path)
    latent = torch.randn(2, 4, 8, 8)
    assert (model.spec.latent_scale, model.spec.latent_shift) == (0.5, shift or 0)
    assert model.decoder is not None
    torch.testing.assert_close(model.decoder(latent), vae.decode(latent / 0.5 + (shift or 0)).sample)


def test_the_decoder_is_not_counted_among_the_parameters(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path / "transformer")
    alone = dit_from_diffusers(tmp_path).spec.parameters
    autoencoder().save_pretrained(tmp_path / "vae")
    assert dit_from_diffusers(tmp_path).spec.parameters == alone


def test_without_a_vae_there_is_no_decoder(folder: Path) -> None:
    model = dit_from_diffusers(folder)
    assert model.decoder is None
    assert model.spec.latent_scale is None


@pytest.mark.parametrize("channels", [3, 16])
def test_a_vae_of_other_latents_is_refused_by_both_numbers(channels: int, tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path / "transformer")
    autoencoder(latent_channels=channels).save_pretrained(tmp_path / "vae")
    message = refusal(tmp_path)
    assert f"decodes {channels} channels, {tmp_path.name} makes 4" in message


def test_a_vae_of_another_class_is_refused(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path / "transformer")
    autoencoder().save_pretrained(tmp_path / "vae")
    change_config(tmp_path / "vae", _class_name="AutoencoderTiny")
    assert "AutoencoderTiny, expected AutoencoderKL" in refusal(tmp_path)
