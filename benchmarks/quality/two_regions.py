"""Quantizers of two regions (MRQ of TQ-DiT, arXiv 2502.04056) for what GELU and softmax give, beside those of one.

    python benchmarks/quality/two_regions.py

A study of accuracy alone: two regions are two integer products where one range is one, and the attention of a bundle
stays in floating point. Each product on the reference model, plain: GELU's output times fc2's weight, softmax's times
the values. Only the left side is quantized; ranges are the least squared error over a first half of noisy real digits,
the error is that of the product over the second half, as a share of its size, of each block.

    GELU     [-2^(k-1) s1, 0) in steps s1, [0, 2^(k-1) s2) in steps s2, both searched
    softmax  [0, 2^(k-1) s1) in steps s1, searched, and from there to 1 in steps of 1 / 2^(k-1)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ditc.diffusion import alphas_cumprod
from ditc.exporter.models import builtin_digits
from ditc.exporter.train_digits import digits_split
from ditc.files import atomic_write
from ditc.machine import machine
from ditc.precision import levels_of
from ditc.quantize.midpoints import LOWER_BOUNDS, centred_scales, range_of
from ditc.quantize.ranges import Histogram

HERE = Path(__file__).parent
BITS, PICTURES, TIMES, SEED, CANDIDATES = (8, 6, 4), 32, 4, 0, 100

Array = NDArray[np.float32]
Integers = NDArray[np.int32]
# the integers of each region, with its step; what they stand for is the sum
Regions = list[tuple[Integers, float]]
Form = Callable[[Array, int], Callable[[Array], Regions]]  # chooses the steps from values, and cuts others by them
Pairs = list[tuple[Array, Array]]  # both sides of a product, of each block


def dequantized(regions: Regions) -> NDArray[np.float64]:
    """Return what the integers of some regions stand for."""
    return np.asarray(sum(integers * step for integers, step in regions))


def product(regions: Regions, weight: NDArray[Any]) -> NDArray[np.float64]:
    """Return the product with a weight as integers would make it: one of each region, times its step."""
    return np.asarray(sum((integers @ weight) * step for integers, step in regions))


def gelu_regions(x: Array, below: float, above: float, bits: int) -> Regions:
    """Cut at zero: steps of size `below` under it, of size `above` over it."""
    half = 2 ** (bits - 1)
    low = np.clip(np.round(np.minimum(x, 0) / below), -half, 0).astype(np.int32)
    high = np.clip(np.round(np.maximum(x, 0) / above), 0, half - 1).astype(np.int32)
    return [(low, below), (high, above)]


def softmax_regions(x: Array, fine: float, bits: int) -> Regions:
    """Cut at 2^(bits - 1) fine steps; behind it are steps of 1 / 2^(bits - 1)."""
    half = 2 ** (bits - 1)
    is_fine = x < half * fine
    low = np.clip(np.round(np.where(is_fine, x, 0) / fine), 0, half - 1).astype(np.int32)
    high = np.clip(np.round(np.where(is_fine, 0, x) * half), 0, half).astype(np.int32)
    return [(low, fine), (high, 1 / half)]


def searched_gelu(x: Array, bits: int) -> Callable[[Array], Regions]:
    """Choose each region's step by itself: one doesn't know of the other."""
    half = 2 ** (bits - 1)
    below = _least(x[x < 0], lambda v, step: gelu_regions(v, step, 1.0, bits), -float(x.min()) / half)
    above = _least(x[x >= 0], lambda v, step: gelu_regions(v, 1.0, step, bits), float(x.max()) / (half - 1))
    return lambda v: gelu_regions(v, below, above, bits)


def searched_softmax(x: Array, bits: int) -> Callable[[Array], Regions]:
    """Choose the size of the fine steps, those of the first region ending anywhere up to 1."""
    fine = _least(x, lambda v, step: softmax_regions(v, step, bits), 1 / 2 ** (bits - 1), smallest=1e-4)
    return lambda v: softmax_regions(v, fine, bits)


def _least(x: Array, cut: Callable[[Array, float], Regions], largest: float, smallest: float = 1e-2) -> float:
    """Return the step with the least squared error, of those down to a share of the largest, evenly by ratio."""
    steps = largest * np.geomspace(1, smallest, CANDIDATES)
    errors = [float(np.square(x - dequantized(cut(x, float(step)))).sum()) for step in steps]
    return float(steps[int(np.argmin(errors))])


def searched_range(x: Array, bits: int, low: float | None) -> Callable[[Array], Regions]:
    """Choose one range as a compile does: about zero, or from `low` on."""
    levels = levels_of(bits)
    histogram = Histogram.empty().add(x if low is None else x - np.float32(low))
    ends = range_of(histogram, "mse", low, levels)
    (midpoint,), (step,) = centred_scales(np.array([ends.low]), np.array([ends.high]), levels)

    def cut(v: Array) -> Regions:
        integers = np.clip(np.round(v / step) - midpoint, -levels, levels) + midpoint
        return [(integers.astype(np.int32), float(step))]

    return cut


FORMS: Mapping[str, Mapping[str, Form]] = {
    "gelu": {
        "about zero": lambda x, bits: searched_range(x, bits, None),
        "bounded": lambda x, bits: searched_range(x, bits, LOWER_BOUNDS["Gelu"]),
        "two regions": searched_gelu,
    },
    "softmax": {
        "about zero": lambda x, bits: searched_range(x, bits, None),
        "bounded": lambda x, bits: searched_range(x, bits, 0.0),
        "two regions": searched_softmax,
    },
}


@contextmanager
def watched(model: Any) -> Iterator[dict[str, Pairs]]:
    """Collect (left, right) of each block's two products."""
    seen: dict[str, Pairs] = {"gelu": [], "softmax": []}

    def mlp(layer: Any, args: Any) -> None:
        seen["gelu"].append((args[0].numpy(), layer.weight.numpy().T))

    def softmax(attention: Any, _layer: Any, _args: Any, out: torch.Tensor) -> None:
        heads = (len(out), attention.tokens, attention.num_heads, attention.head_dim)
        q, k, v = (part.reshape(heads).transpose(1, 2) for part in out.chunk(3, dim=-1))
        scores = (q * attention.head_dim**-0.5) @ k.transpose(-2, -1)
        seen["softmax"].append((scores.softmax(dim=-1).numpy(), v.numpy()))

    with ExitStack() as stack:
        for block in model.blocks:
            stack.callback(block.mlp.fc2.register_forward_pre_hook(mlp).remove)
            stack.callback(block.attn.qkv.register_forward_hook(partial(softmax, block.attn)).remove)
        yield seen


@torch.no_grad()
def products(model: Any) -> dict[str, Pairs]:
    """Return (left, right) of the products at noisy digits, those of all times and pictures at once."""
    pictures, labels, _, _ = digits_split()
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.randperm(len(pictures), generator=generator)[:PICTURES].repeat_interleave(TIMES)
    t = torch.linspace(0, model.diffusion.train_steps - 1, TIMES).long().repeat(PICTURES)
    signal = torch.from_numpy(alphas_cumprod(model.diffusion)).float()[t][:, None, None, None]
    x0 = pictures[chosen]
    noise = torch.randn(x0.shape, generator=generator)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with watched(model) as seen:
        model(signal.sqrt() * x0 + (1 - signal).sqrt() * noise, t.float(), labels[chosen])
    return seen


def errors(pairs: Pairs, form: Form, bits: int) -> list[float]:
    """Return the error of each block's product over the second half of the rows, ranges searched on the first."""
    shares = []
    for left, right in pairs:
        middle = len(left) // 2
        cut = form(left[:middle], bits)
        own = (right if right.ndim == 2 else right[middle:]).astype(np.float64)
        exact = left[middle:] @ own
        shares.append(float(np.linalg.norm(product(cut(left[middle:]), own) - exact) / np.linalg.norm(exact)))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description="Two-region quantizers beside those of one range.")
    parser.add_argument("--out", type=Path, default=HERE / "two_regions.json")
    options = parser.parse_args()
    seen, rows = products(builtin_digits().eval()), []
    for where, forms in FORMS.items():
        for bits in BITS:
            row = {name: errors(seen[where], form, bits) for name, form in forms.items()}
            rows.append({"output": where, "bits": bits, "relative_error_by_block": row})
            told = {name: f"{np.mean(each):.2e} ({min(each):.2e} to {max(each):.2e})" for name, each in row.items()}
            print(where, bits, told, flush=True)
    about = {"machine": machine().model_dump(), "pictures": PICTURES, "times": TIMES, "seed": SEED}
    atomic_write(options.out, (json.dumps({**about, "rows": rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
