"""Linear layers are found, and quantized, however a model writes or shares them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.exporter.dit import DiT


class Flattening(nn.Module):
    """An MLP layer that sees tokens as rows, as some code bases have it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, x.shape[-1])).reshape(-1, *x.shape[1:])  # type: ignore[no-any-return]


def test_linear_layers_on_flattened_tokens_are_quantized_too(
    tmp_path: Path, make_small_model: Callable[[], DiT], quick_options: CompileOptions
) -> None:
    model = make_small_model()
    for block in model.blocks:
        block.mlp = Flattening(block.mlp)
    bundle = compile_model(model, tmp_path / "b", quick_options)
    assert bundle.manifest.checks["kernels"] == {"full": {"linears": 8, "integer": 8}}


def test_a_layer_shared_by_two_blocks_is_quantized_in_both(
    tmp_path: Path, make_small_model: Callable[[], DiT], quick_options: CompileOptions
) -> None:
    model = make_small_model()
    model.blocks[1].mlp = model.blocks[0].mlp
    bundle = compile_model(model, tmp_path / "b", quick_options)
    assert bundle.manifest.checks["kernels"] == {"full": {"linears": 8, "integer": 8}}
