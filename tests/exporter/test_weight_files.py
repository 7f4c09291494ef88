"""Types of tensors at the door: floating ones are taken, every other that torch or safetensors has is one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refusal_of
from torch import Tensor

from ditc.exporter.dit import DiT, DiTConfig
from ditc.exporter.models import load_model
from ditc.exporter.original_checkpoint import dit_from_checkpoint

TAKEN = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
EVERY = sorted({kind for name in dir(torch) if isinstance(kind := getattr(torch, name), torch.dtype)}, key=str)
# name in a safetensors file -> bits
SAFETENSORS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "NEW_TYPE": 8}
SAFETENSORS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
SAFETENSORS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16) | dict.fromkeys(("I32", "U32", "F32"), 32)
SAFETENSORS |= dict.fromkeys(("C64", "F64", "I64", "U64"), 64)
KEY = "blocks.0.mlp.fc2.bias"


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(DiT(DiTConfig(input_size=4, hidden_size=384, depth=1, num_heads=6, num_classes=2)).state_dict())


def refusal(path: Path) -> str:
    return refusal_of(lambda: dit_from_checkpoint(path), path)


def tensor_of(kind: torch.dtype) -> Tensor | None:
    """A tensor of any type; None for one of which torch makes none."""
    makers = (
        lambda: torch.zeros(8, dtype=torch.uint8).view(kind),
        lambda: torch.zeros(8, dtype=kind),
        lambda: torch.quantize_per_tensor(torch.zeros(8), 0.1, 0, kind),
    )
    for make in makers:
        try:
            return make()
        except Exception:  # each has types that it can't make, with errors of many kinds
            continue
    return None


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's words on its quantized types
@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind not in TAKEN], ids=str)
def test_a_tensor_of_any_other_type_is_named_with_it(kind: torch.dtype, tmp_path: Path) -> None:
    tensor = tensor_of(kind)
    try:
        torch.save(state() | {KEY: tensor}, tmp_path / "w.pt")
    except Exception:  # torch itself can't save those: there is no such file
        assert str(kind).startswith(("torch.int", "torch.uint"))
        return
    assert f"{KEY} is {str(kind).removeprefix('torch.')}, expected float16, bfloat16, float32" in refusal(
        tmp_path / "w.pt"
    )


@pytest.mark.parametrize("kind", sorted(TAKEN, key=str), ids=str)
def test_every_floating_type_is_computed_with_in_float32(kind: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(kind) for name, tensor in state().items()}
    torch.save(tensors, tmp_path / "w.pt")
    model = dit_from_checkpoint(tmp_path / "w.pt")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.blocks[0].mlp.fc2.bias, tensors[KEY].float())


def safetensors_file(path: Path, tensors: dict[str, Tensor], key: str, kind: str) -> Path:
    """A safetensors file written by hand, one tensor of any type, known to this machine's libraries or not."""
    header: dict[str, Any] = {}
    content = b""
    for name, tensor in tensors.items():
        data = bytes(tensor.numel() * SAFETENSORS[kind] // 8) if name == key else tensor.numpy().tobytes()
        header[name] = {
            "dtype": kind if name == key else "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(content), len(content) + len(data)],
        }
        content += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return path


@pytest.mark.parametrize("kind", sorted(SAFETENSORS))
def test_of_safetensors_floating_types_are_read_and_the_others_named(kind: str, tmp_path: Path) -> None:
    path = safetensors_file(tmp_path / "w.safetensors", state(), KEY, kind)
    if kind in ("F16", "BF16", "F32", "F64"):
        assert not dit_from_checkpoint(path).blocks[0].mlp.fc2.bias.any()
    else:
        assert f"{KEY} is " in refusal(path)
        assert "expected float16, bfloat16, float32 or float64" in refusal(path)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(384).to_sparse(), "is sparse_coo, expected a plain tensor"),
        (torch.zeros(384, device="meta"), "is without values (meta), expected a plain tensor"),
        (torch.full((384,), 1e300, dtype=torch.float64), "contains NaN or infinity"),
    ],
)
def test_a_tensor_without_plain_values_is_named(tensor: Tensor, said: str, tmp_path: Path) -> None:
    torch.save(state() | {KEY: tensor}, tmp_path / "w.pt")
    assert f"{KEY} {said}" in refusal(tmp_path / "w.pt")


def test_parameters_are_read_as_tensors_are(tmp_path: Path) -> None:
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in state().items()}, tmp_path / "w.pt")
    assert load_model(str(tmp_path / "w.pt")).spec.name == "w"
