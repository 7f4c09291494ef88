"""Files of routers: the released form is read, and what is none is refused in one line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ditc.errors import CheckpointError
from ditc.exporter.router_files import read_routers, write_routers
from ditc.routers import Routers

ROUTERS = Routers(((0.5, -1.0), (2.0, 3.0), (-5.0, 5.0)))


def released(**beside: Any) -> dict[str, Any]:
    """Return what a training script leaves: the state dict of a list of modules, and what else it saved."""
    routers = {f"{number}.prob": torch.nn.Parameter(torch.tensor(row)) for number, row in enumerate(ROUTERS.logits)}
    return {"routers": routers, **beside}


def test_the_released_form_is_read_with_what_lies_beside_it(tmp_path: Path) -> None:
    torch.save(released(opt={"state": {}}, args=argparse.Namespace(lr=1e-3)), tmp_path / "r.pt")
    assert read_routers(tmp_path / "r.pt") == ROUTERS


def test_twelve_routers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    many = Routers(tuple((float(number),) for number in range(12)))
    save_file({f"{number}.prob": torch.tensor([float(number)]) for number in range(12)}, tmp_path / "r.safetensors")
    assert read_routers(tmp_path / "r.safetensors") == many


@pytest.mark.parametrize("branches", [None, ("blocks.0.attn", "blocks.0.mlp")])
def test_what_is_written_is_read(tmp_path: Path, branches: tuple[str, ...] | None) -> None:
    write_routers(tmp_path / "r.pt", Routers(ROUTERS.logits, branches))
    assert read_routers(tmp_path / "r.pt") == Routers(ROUTERS.logits, branches)


ROW = torch.zeros(2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"routers": {}}, "holds no routers"),
        ({"routers": 3}, "holds no routers"),
        ({"model": {"x": ROW}}, "holds no routers, but model"),
        ({"routers": {"0.prob": ROW, "bias": ROW}}, "holds no routers, but bias"),
        ({"routers": {"0.prob": ROW, "2.prob": ROW}}, "none of step 1"),
        ({"routers": {"0.prob": ROW, "0.bias": ROW}}, "holds no routers, but 2 tensors"),
        ({"routers": {"0.prob": ROW, "1.prob": torch.zeros(3)}}, "routers of 2 and of 3 branches"),
        ({"routers": {"0.prob": torch.zeros(2, 2)}}, r"router 0 is torch.float32 \(2, 2\)"),
        ({"routers": {"0.prob": torch.zeros(0)}}, "router 0 is"),
        ({"routers": {"0.prob": torch.zeros(2, dtype=torch.int64)}}, r"router 0 is torch.int64"),
        ({"routers": {"0.prob": 1.0}}, "router 0 is float"),
        ({"routers": {"0.prob": torch.tensor([1.0, float("nan")])}}, "router 0 contains NaN"),
        ({"routers": {"0.prob": ROW}, "branches": "ab"}, "branches are str"),
        ({"routers": {"0.prob": ROW}, "branches": [1]}, "branches are list"),
    ],
)
def test_a_file_of_something_else_is_one_line(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "r.pt")
    with pytest.raises(CheckpointError, match=said) as refused:
        read_routers(tmp_path / "r.pt")
    assert "\n" not in str(refused.value)
    assert "r.pt" in str(refused.value)


@pytest.mark.parametrize(("name", "data"), [("absent.pt", None), ("text.pt", b"hello"), ("empty.pt", b"")])
def test_a_file_that_is_none_is_one_line(tmp_path: Path, name: str, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        read_routers(tmp_path / name)
