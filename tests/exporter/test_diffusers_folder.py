"""The weights of diffusers folders: the same numbers as diffusers computes, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers_folders import Settings, change_config, error_against, refusal, saved, share_embedders, transformer
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditc.exporter.diffusers_folder import dit_from_diffusers
from ditc.exporter.dit import sincos_positions

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


def change_weights(folder: Path, drop: str | None = None, **added: Tensor) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    save_file(tensors | added, path)


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
    first_files = {path.name: path.read_bytes() for path in folder.glob("diffusion_pytorch_model*")}
    saved(other, folder, max_shard_size="100KB", **second)
    for name, content in first_files.items():
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


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    change_weights(folder, **{"transformer_blocks.1.attn1.to_k.weight": torch.full((64, 64), float("nan"))})
    assert "NaN" in refusal(folder)


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
    content = json.loads(index.read_text())
    content["weight_map"]["proj_out_2.bias"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
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


def test_an_empty_transformer_folder_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    assert f"{tmp_path / 'transformer'} holds nothing" in refusal(tmp_path)


def test_a_folder_without_a_transformer_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("unet", "vae", "scheduler"):
        (tmp_path / name).mkdir()
    assert "holds scheduler/, unet/, vae/" in refusal(tmp_path)
