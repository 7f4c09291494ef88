"""Shared pieces: small models, compiled once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ditc.bundle import Bundle
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.exporter.dit import DiT, DiTConfig
from ditc.runtime.pipeline import Pipeline, load

SMALL = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=64, depth=2, num_heads=4, num_classes=5)
QUICK = CompileOptions(
    steps=6, points=24, pool_images=24, vc_images=8, verify_images=4, batch=4, reuse="hold", smooth="none", vc="std"
)


def small_model(**changes: int) -> DiT:
    """A DiT with random weights, the same ones every time: 3 channels, 16 tokens, two blocks, no zero gates.

    `changes` are fields of its configuration that are to be others.
    """
    torch.manual_seed(0)
    model = DiT(replace(SMALL, **changes), name="small").eval()  # type: ignore[arg-type]
    model.cfg_channels = 2
    return model


@pytest.fixture(scope="session")
def make_small_model() -> Callable[..., DiT]:
    return small_model


@pytest.fixture(scope="session")
def quick_options() -> CompileOptions:
    return QUICK


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of exported segments, for tests that compile a model others compile too."""
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, exports: Path) -> dict[str, Bundle]:
    """The small model compiled under several policies and precisions, by name."""
    folder = tmp_path_factory.mktemp("bundles")

    def made(name: str, **changes: object) -> Bundle:
        return compile_model(small_model(), folder / name, QUICK.model_copy(update=changes), exports=exports)

    return {
        "cached": made("cached", policy="fora:2"),
        "per-step": made("per-step", policy="fora:2", scales="per-step", midpoint="bounded", vc="none"),
        "float-ends": made(
            "float-ends",
            policy="fora:2",
            float_steps="1:2",
            reuse="affine",
            smooth="smooth",
            vc="none",
            scales="per-step",
            midpoint="bounded",
        ),
        "fp32-cached": made("fp32-cached", policy="fora:2", precision="fp32", vc="none"),
        "fp32-branches": made("fp32-branches", policy="fora:2", precision="fp32", vc="none", caches="branches"),
        "fp32-taylor": made("fp32-taylor", policy="fora:2", precision="fp32", vc="none", reuse="taylor"),
        "fp32-affine": made("fp32-affine", policy="fora:2", precision="fp32", vc="none", reuse="affine"),
        "fp32-none": made("fp32-none", policy="none", precision="fp32", vc="none"),
        "fp32-fora1": made("fp32-fora1", policy="fora:1", precision="fp32", vc="none"),
    }


@pytest.fixture
def pipes(bundles: dict[str, Bundle]) -> Iterator[dict[str, Pipeline]]:
    """An open pipeline of every bundle."""
    opened = {name: load(bundle.path).__enter__() for name, bundle in bundles.items()}
    yield opened
    for pipe in opened.values():
        pipe.__exit__(None, None, None)


@pytest.fixture(scope="session")
def cached_bundle_path(bundles: dict[str, Bundle]) -> Path:
    return bundles["cached"].path
