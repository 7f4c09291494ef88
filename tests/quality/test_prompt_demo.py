"""The built-in text-to-image model as a bundle: prompts drawn as torch draws them, and images judged by kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ditc.bundle import Bundle
from ditc.compiler.options import CompileOptions
from ditc.exporter.emoji import builtin_emoji
from ditc.exporter.emoji_rows import typical_captions
from ditc.progress import silent
from ditc.quality import prompt_demo
from ditc.quality.evaluating import evaluate_bundle
from ditc.quality.options import EvaluateOptions
from ditc.quality.prompt_demo import DEMO_DEFAULTS, DEMO_PROMPTS, run_prompt_demo, torch_request
from ditc.requests import Request
from ditc.runtime.executor import seeded_request
from ditc.runtime.pipeline import load
from ditc.speed.eager import eager_images
from ditc.tables import sampler_columns
from tests.conftest import EMOJI_EXACT

STEPS, GUIDANCE = EMOJI_EXACT.steps, EMOJI_EXACT.cfg


@pytest.fixture(scope="module")
def exact(compiled_once: Callable[..., Bundle], emoji_files: Path) -> Bundle:
    """The model uncached in FP32."""
    return compiled_once("emoji", EMOJI_EXACT)


def test_a_bundle_draws_prompts_as_torch_draws_them(exact: Bundle) -> None:
    prompts = DEMO_PROMPTS[:4]
    model = builtin_emoji()
    drawn = seeded_request(model.spec, torch_request(model, prompts), 3, 0, STEPS)
    expected = eager_images(model, sampler_columns(exact.tables()), *drawn, GUIDANCE)
    with load(exact.path) as pipe:
        images = pipe.images(prompt=list(prompts), seed=3)
    np.testing.assert_allclose(images, expected.clip(-1, 1), atol=1e-3)
    assert np.abs(images[0] - images[1]).max() > 0.01  # a prompt matters


def test_it_was_compiled_with_captions_of_its_own(exact: Bundle) -> None:
    assert exact.manifest.prompts is not None
    assert exact.manifest.prompts.source == "examples of emoji"
    assert exact.examples().prompts == typical_captions()


def test_it_is_judged_against_the_real_emoji_and_by_the_kinds_of_its_captions(exact: Bundle) -> None:
    evaluation = evaluate_bundle(exact.path, EvaluateOptions(images=6, seeds=(0, 1), rounds=2, step_images=1))
    assert not hasattr(evaluation.distribution, "skipped")
    assert (evaluation.distribution.features.name, evaluation.distribution.real.n) == ("emoji", 3781)
    assert evaluation.distribution.bundle.class_consistency is not None
    assert evaluation.distribution.difference.frechet_distance.value == 0


def test_the_demo_has_settings_of_its_own_and_leaves_what_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: Bundle
) -> None:
    asked = []

    def compiled(model: str, out: Path, options: CompileOptions, **_: object) -> Bundle:
        asked.append((model, out, {name: getattr(options, name) for name in DEMO_DEFAULTS}))
        return exact

    monkeypatch.setattr(prompt_demo, "compile_model", compiled)
    monkeypatch.setattr(prompt_demo, "ROUNDS", 1)
    options = CompileOptions(steps=STEPS, policy="none", precision="fp32")
    demo = run_prompt_demo(tmp_path, options, silent)
    assert asked == [("emoji", tmp_path / "bundle", {"steps": STEPS, "cfg": 2.0, "points": 256})]
    assert demo.psnr_db > 60
    assert demo.seconds_per_image.ratio == pytest.approx(demo.seconds_per_image.torch / demo.seconds_per_image.compiled)
    assert (tmp_path / "grid.png").is_file()
    assert demo.prompts == DEMO_PROMPTS
    assert 23e6 < demo.torch_bytes < 24.5e6


def test_every_prompt_of_the_demo_is_a_caption() -> None:
    from ditc.quality.emoji_pictures import kinds_of_captions

    assert kinds_of_captions(DEMO_PROMPTS) is not None


@pytest.mark.usefixtures("emoji_files")
def test_the_request_of_torch_has_the_empty_prompt_as_null() -> None:
    model = builtin_emoji()
    request: Request = torch_request(model, ("a cat", ""))
    np.testing.assert_array_equal(request.arrays["text"][1], request.arrays["null_text"][0])
    np.testing.assert_array_equal(request.arrays["null_text_mask"].sum(axis=1), [1, 1])
