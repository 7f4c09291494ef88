"""Checkpoints of the original release: what loads, and what is refused in one clear line."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refusal_of
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ditc.exporter.dit import DiT, DiTConfig, sincos_positions
from ditc.exporter.original_checkpoint import dit_from_checkpoint
from ditc.exporter.weight_files import load_weights

Tensors = dict[str, Tensor]

DIM, HEADS, CLASSES, SIDE, PATCH, CHANNELS = 384, 6, 3, 4, 2, 4
LINEARS = {
    "t_embedder.mlp.0": (DIM, 256),
    "t_embedder.mlp.2": (DIM, DIM),
    "final_layer.adaLN_modulation.1": (2 * DIM, DIM),
    "blocks.0.attn.qkv": (3 * DIM, DIM),
    "blocks.0.attn.proj": (DIM, DIM),
    "blocks.0.mlp.fc1": (4 * DIM, DIM),
    "blocks.0.mlp.fc2": (DIM, 4 * DIM),
    "blocks.0.adaLN_modulation.1": (6 * DIM, DIM),
}


def released(*, learn_sigma: bool = True, seed: int = 0) -> Tensors:
    """Random weights of a one-block DiT under the names of facebookresearch/DiT."""
    generator = torch.Generator().manual_seed(seed)
    outputs = PATCH**2 * CHANNELS * (2 if learn_sigma else 1)
    shapes = {"x_embedder.proj.weight": (DIM, CHANNELS, PATCH, PATCH), "x_embedder.proj.bias": (DIM,)}
    shapes["y_embedder.embedding_table.weight"] = (CLASSES + 1, DIM)
    for name, (rows, columns) in {**LINEARS, "final_layer.linear": (outputs, DIM)}.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    tensors = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {"pos_embed": sincos_positions(DIM, SIDE)}


def as_the_release_computes(w: Tensors, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """models.py of facebookresearch/DiT as one function, for one block."""

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def modulated(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(value, (DIM,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def attention(value: Tensor) -> Tensor:
        q, k, v = linear("blocks.0.attn.qkv", value).view(-1, SIDE**2, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return linear("blocks.0.attn.proj", mixed.transpose(1, 2).flatten(2))

    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH).flatten(2).mT + w["pos_embed"]
    angles = t[:, None] * torch.exp(-np.log(10000) * torch.arange(128) / 128)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear("blocks.0.adaLN_modulation.1", c).chunk(6, dim=1)
    h = h + gate_a[:, None] * attention(modulated(h, shift_a, scale_a))
    inner = F.gelu(linear("blocks.0.mlp.fc1", modulated(h, shift_m, scale_m)), approximate="tanh")
    h = h + gate_m[:, None] * linear("blocks.0.mlp.fc2", inner)
    h = linear("final_layer.linear", modulated(h, *linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)))
    patches = h.view(len(x), SIDE, SIDE, PATCH, PATCH, -1)
    return torch.einsum("nhwpqc->nchpwq", patches).reshape(len(x), -1, SIDE * PATCH, SIDE * PATCH)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, CHANNELS, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([999.0, 321.0, 0.0]), torch.tensor([0, 2, 3])


def save_plain(tensors: Tensors, path: Path) -> Path:
    torch.save(tensors, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def save_training_state(tensors: Tensors, path: Path) -> Path:
    other = released(seed=9)
    torch.save({"model": other, "ema": tensors, "opt": {"step": 3}, "args": None}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def save_safetensors(tensors: Tensors, path: Path) -> Path:
    save_file(tensors, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def refusal(path: Path, num_heads: int | None = None) -> str:
    """The one line that a user reads when this checkpoint is refused."""
    return refusal_of(lambda: dit_from_checkpoint(path, num_heads=num_heads), path.name)


@torch.no_grad()
@pytest.mark.parametrize("save", [save_plain, save_training_state, save_safetensors])
def test_a_checkpoint_computes_what_the_release_computes(save: Callable[[Tensors, Path], Path], tmp_path: Path) -> None:
    tensors = released()
    model = dit_from_checkpoint(save(tensors, tmp_path / "tiny"))
    expected = as_the_release_computes(tensors, *inputs())
    torch.testing.assert_close(model(*inputs()), expected, rtol=1e-4, atol=1e-5)


def test_the_configuration_is_read_off_the_shapes(tmp_path: Path) -> None:
    model = dit_from_checkpoint(save_plain(released(), tmp_path / "tiny"))
    assert model.config == DiTConfig(
        input_size=8, patch_size=2, in_channels=4, hidden_size=384, depth=1, num_heads=6, num_classes=3
    )
    assert model.name == "tiny"
    assert not model.training


def test_guidance_and_variance_are_the_releases(tmp_path: Path) -> None:
    spec = dit_from_checkpoint(save_plain(released(), tmp_path / "tiny")).spec
    assert spec.cfg_channels == 3
    assert spec.sampler.variance == "learned"
    assert spec.diffusion.learned_sigma


@torch.no_grad()
def test_a_checkpoint_without_learned_variance_loads(tmp_path: Path) -> None:
    tensors = released(learn_sigma=False)
    model = dit_from_checkpoint(save_plain(tensors, tmp_path / "tiny"))
    assert model(*inputs()).shape == (3, 4, 8, 8)
    assert not model.spec.diffusion.learned_sigma
    assert model.spec.sampler.variance == "fixed-small"
    torch.testing.assert_close(model(*inputs()), as_the_release_computes(tensors, *inputs()), rtol=1e-4, atol=1e-5)


def test_half_precision_weights_are_computed_with_in_float32(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in released().items()}
    model = dit_from_checkpoint(save_safetensors(half, tmp_path / "tiny"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.t_embedder.mlp[0].weight, half["t_embedder.mlp.0.weight"].float())


def test_positions_that_weights_leave_out_are_computed() -> None:
    tensors = released()
    expected = tensors.pop("pos_embed")
    model = DiT(DiTConfig(input_size=8, hidden_size=DIM, depth=1, num_heads=HEADS, num_classes=CLASSES))
    load_weights(model, tensors, "tiny")
    assert torch.equal(model.pos_embed, expected)


def test_positions_that_weights_hold_are_taken() -> None:
    tensors = released() | {"pos_embed": torch.ones(1, 16, DIM)}
    model = DiT(DiTConfig(input_size=8, hidden_size=DIM, depth=1, num_heads=HEADS, num_classes=CLASSES))
    load_weights(model, tensors, "tiny")
    assert torch.equal(model.pos_embed, tensors["pos_embed"])


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert "no such checkpoint" in refusal(tmp_path / "absent.pt")


@pytest.mark.parametrize("save", [save_plain, save_safetensors])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(save: Callable[[Tensors, Path], Path], share: float, tmp_path: Path) -> None:
    path = save(released(), tmp_path / "cut")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    message = refusal(path)
    assert "not a whole" in message
    assert "copy the checkpoint again" in message


@pytest.mark.parametrize("content", [b".", b"hello", b"\x00" * 64, bytes(range(256))])
def test_a_file_of_other_bytes_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    path.write_bytes(content)
    assert str(path) in refusal(path)


def test_a_git_lfs_pointer_is_not_taken_for_a_pickle_with_code(tmp_path: Path) -> None:
    path = tmp_path / "pointer.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2700611775\n")
    message = refusal(path)
    assert "Git LFS pointer" in message
    assert "more than weights" not in message


def test_a_pickled_object_is_refused(tmp_path: Path) -> None:
    torch.save(DiTConfig(), tmp_path / "object.pt")
    assert "runs no code from a checkpoint" in refusal(tmp_path / "object.pt")


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    assert "save the state dict alone" in refusal(tmp_path / "module.pt")


@pytest.mark.parametrize("wrapped", [True, False])
def test_code_in_a_pickle_does_not_run(wrapped: bool, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    path = tmp_path / "payload.pt"
    path.write_bytes(payload)
    if wrapped:
        torch.save({"pos_embed": torch.zeros(1)}, path)
        replace_pickle(path, payload)
    assert "runs no code from a checkpoint" in refusal(path)
    assert not marker.exists()


def replace_pickle(path: Path, payload: bytes) -> None:
    """Put another pickle into the zip archive that torch.save wrote."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, payload if name.endswith("data.pkl") else content)


def test_a_plain_pickle_is_refused_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "arrays.pt"
    path.write_bytes(pickle.dumps({"x_embedder.proj.weight": np.zeros(3)}, protocol=4))
    assert str(path) in refusal(path)


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), 7])
def test_a_file_without_a_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert "expected a state dict" in refusal(tmp_path / "other.pt")


def test_a_state_dict_without_tensors_is_refused(tmp_path: Path) -> None:
    assert "no tensors" in refusal(save_plain({}, tmp_path / "empty"))


@pytest.mark.parametrize("key", sorted(released().keys() - {"blocks.0.attn.qkv.bias"}))
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    tensors = released()
    del tensors[key]
    message = refusal(save_plain(tensors, tmp_path / "tiny"))
    assert key in message
    assert "missing" in message


def test_an_unexpected_key_is_named(tmp_path: Path) -> None:
    tensors = released() | {"blocks.0.cross_attn.to_q.weight": torch.zeros(2)}
    assert "unexpected blocks.0.cross_attn.to_q.weight" in refusal(save_plain(tensors, tmp_path / "tiny"))


def test_of_many_missing_keys_a_few_are_named(tmp_path: Path) -> None:
    tensors = released()
    tensors["blocks.5.mlp.fc2.bias"] = tensors["blocks.0.mlp.fc2.bias"]
    message = refusal(save_plain(tensors, tmp_path / "tiny"))
    assert "missing blocks.1." in message
    assert "more" in message
    assert len(message) < 500


@pytest.mark.parametrize("key", ["blocks.0.mlp.fc2.bias", "blocks.0.adaLN_modulation.1.weight", "pos_embed"])
def test_a_wrong_shape_is_named(key: str, tmp_path: Path) -> None:
    tensors = released()
    tensors[key] = tensors[key][..., :-1].contiguous()
    message = refusal(save_plain(tensors, tmp_path / "tiny"))
    assert key in message
    assert str(tuple(tensors[key].shape)) in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    tensors = released()
    tensors["blocks.0.attn.proj.weight"][3, 5] = value
    message = refusal(save_plain(tensors, tmp_path / "tiny"))
    assert "blocks.0.attn.proj.weight contains NaN or infinity" in message


def narrow_checkpoint(folder: Path) -> Path:
    config = DiTConfig(input_size=8, hidden_size=48, depth=1, num_heads=3, num_classes=3)
    return save_plain(DiT(config).state_dict(), folder / "narrow")


def test_a_width_of_no_released_model_asks_for_the_head_count(tmp_path: Path) -> None:
    message = refusal(narrow_checkpoint(tmp_path))
    assert "48 wide" in message
    assert "--heads" in message


def test_a_given_head_count_is_used(tmp_path: Path) -> None:
    assert dit_from_checkpoint(narrow_checkpoint(tmp_path), num_heads=3).config.num_heads == 3
    assert dit_from_checkpoint(save_plain(released(), tmp_path / "tiny"), num_heads=4).config.num_heads == 4


@pytest.mark.parametrize("heads", [5, -6])
def test_a_head_count_that_does_not_divide_the_width_is_refused(heads: int, tmp_path: Path) -> None:
    assert "heads" in refusal(save_plain(released(), tmp_path / "tiny"), num_heads=heads)
