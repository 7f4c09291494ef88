"""The way back to diffusers' class: the same numbers from the same weights, or a refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ditc.errors import InputError
from ditc.exporter.diffusers_copy import diffusers_from_dit
from ditc.exporter.dit import DiTConfig
from ditc.exporter.models import random_dit
from ditc.exporter.protocol import relative_error

Settings = dict[str, Any]

OWN = DiTConfig(input_size=8, in_channels=4, hidden_size=64, depth=2, num_heads=4, num_classes=10)


@pytest.mark.parametrize(
    "changes",
    [{}, {"freq_shift": 1, "norm2_eps": 1e-5}, {"learn_sigma": False, "qkv_bias": False}, {"embedder_per_block": True}],
)
def test_a_dit_as_diffusers_class_computes_the_same_and_shares_its_weights(changes: Settings) -> None:
    own = random_dit(replace(OWN, **changes), "own")
    if own.config.embedder_per_block:  # diffusers takes the first block's for the final layer too
        own.t_embedder, own.y_embedder = own.blocks[0].t_embedder, own.blocks[0].y_embedder
    model = diffusers_from_dit(own)
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([999, 500, 7, 0]), torch.tensor([0, 3, 9, 10])
    with torch.no_grad():
        assert relative_error(own(x, t.float(), y), model(x, timestep=t, class_labels=y).sample) < 1e-4
    assert model.transformer_blocks[1].ff.net[2].weight.data_ptr() == own.blocks[1].mlp.fc2.weight.data_ptr()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_ratio": 2.0}, "MLP ratio is 2, expected 4"),
        ({"embedder_per_block": True}, "embedder of its own"),
        ({"null_class": False}, "it has no null class"),
    ],
)
def test_a_dit_that_diffusers_class_can_not_be_is_refused(changes: Settings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        diffusers_from_dit(random_dit(replace(OWN, **changes), "own"))
