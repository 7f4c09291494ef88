"""Facts that weights don't tell: stated by options, kept by the training script, or assumed and said."""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refusal_of

from ditc.errors import CheckpointError, InputError
from ditc.exporter.dit import DIT_SIZES, DiT, DiTConfig
from ditc.exporter.model_facts import FACT_OPTIONS, ModelFacts, beta_schedule_facts, given_options, size_fact
from ditc.exporter.original_checkpoint import dit_from_checkpoint
from ditc.spec import DiffusionSpec

WIDTH = 384  # of the released DiT-S, with 6 heads
CONFIG = DiTConfig(input_size=4, hidden_size=WIDTH, depth=1, num_heads=6, num_classes=4)
COMPLETE = ModelFacts(
    classes=4, null_class=True, prediction="epsilon", beta_schedule="linear", beta_range=(1e-4, 2e-2), train_steps=1000
)


def checkpoint(folder: Path, rows: int = 5, args: Any = None, **config: Any) -> Path:
    """A file with a label table of `rows`; with `args` as a training script keeps them."""
    torch.manual_seed(0)
    tensors = dict(DiT(replace(CONFIG, num_classes=rows, null_class=False, **config)).state_dict())
    torch.save(tensors if args is None else {"ema": tensors, "args": args}, folder / "mine.pt")
    return folder / "mine.pt"


def refusal(path: Path, facts: ModelFacts | None = None) -> str:
    return refusal_of(lambda: dit_from_checkpoint(path, facts=facts), error=InputError)


def test_every_assumption_is_a_line_that_names_its_option(tmp_path: Path) -> None:
    model = dit_from_checkpoint(checkpoint(tmp_path))
    assert model.spec.assumptions == (
        "6 attention heads, as the released DiT of width 384 has (--heads)",
        "4 classes and a null class, from 5 label rows (--classes, --no-null)",
        "a process as usual: noise prediction (--prediction), linear betas from 0.0001 to 0.02 (--beta-schedule), "
        "1000 training steps (--train-steps)",
    )
    assert model.spec.diffusion == DiffusionSpec()
    assert (model.spec.num_classes, model.spec.null_label) == (4, 4)


def test_what_is_stated_is_not_assumed(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    stated, assumed = dit_from_checkpoint(path, num_heads=6, facts=COMPLETE), dit_from_checkpoint(path)
    assert stated.spec.assumptions == ()
    assert stated.spec == assumed.spec.model_copy(update={"assumptions": ()})


@pytest.mark.parametrize(
    ("rows", "classes", "null", "expected"),
    [
        (5, None, None, (4, 4)),
        (5, None, True, (4, 4)),
        (5, None, False, (5, None)),
        (5, 4, None, (4, 4)),
        (5, 4, True, (4, 4)),
        (5, 4, False, "4 classes and no null class"),
        (5, 5, None, (5, None)),
        (5, 5, False, (5, None)),
        (5, 5, True, "5 classes and a null class"),
        (5, 3, None, "3 classes, with a null class or without"),
        (5, 6, None, "6 classes, with a null class or without"),
        (1, None, None, "say so with --no-null"),
        (1, None, False, (1, None)),
        (1, 1, None, (1, None)),
        (1, 1, False, (1, None)),
        (1, None, True, "its label table has 1 row, the options say classes and a null class"),
        (1, 1, True, "1 class and a null class"),
        (2, None, None, (1, 1)),
    ],
)
def test_the_label_table_is_read_as_stated_or_refused(
    rows: int, classes: int | None, null: bool | None, expected: tuple[int, int | None] | str, tmp_path: Path
) -> None:
    path, facts = checkpoint(tmp_path, rows), ModelFacts(classes=classes, null_class=null)
    if isinstance(expected, str):
        assert expected in refusal(path, facts)
        return
    spec = dit_from_checkpoint(path, facts=facts).spec
    assert (spec.num_classes, spec.null_label) == expected
    assert any("label rows" in line for line in spec.assumptions) == (classes is None and null is None)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (ModelFacts(), DiffusionSpec()),
        (ModelFacts(prediction="v"), DiffusionSpec(prediction="v")),
        (ModelFacts(prediction="sample"), DiffusionSpec(prediction="sample")),
        (ModelFacts(train_steps=500), DiffusionSpec(train_steps=500, beta_start=2e-4, beta_end=4e-2)),
        (
            ModelFacts(beta_schedule="linear", beta_range=(0.001, 0.01)),
            DiffusionSpec(beta_start=0.001, beta_end=0.01),
        ),
        (
            ModelFacts(beta_schedule="scaled-linear"),
            DiffusionSpec(beta_schedule="scaled-linear", beta_start=8.5e-4, beta_end=1.2e-2),
        ),
        (ModelFacts(beta_schedule="squared-cosine"), DiffusionSpec(beta_schedule="squared-cosine")),
    ],
)
def test_the_process_is_as_stated_and_else_the_release_s(
    facts: ModelFacts, expected: DiffusionSpec, tmp_path: Path
) -> None:
    assert dit_from_checkpoint(checkpoint(tmp_path), facts=facts).spec.diffusion == expected


def test_betas_that_the_release_would_stretch_too_far_are_refused(tmp_path: Path) -> None:
    assert "betas from 0.01 to 2 over 10 training steps" in refusal(checkpoint(tmp_path), ModelFacts(train_steps=10))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"prediction": "noise"}, "unknown prediction 'noise'; choose one of: epsilon, flow, sample, v"),
        ({"beta_schedule": "cosine"}, "unknown beta schedule 'cosine'"),
        ({"classes": 0}, "--classes must be a whole number from 1 to 65536, found 0"),
        ({"classes": 2.5}, "--classes must be a whole number"),
        ({"train_steps": 1}, "--train-steps must be a whole number from 2 to 65536, found 1"),
        ({"train_steps": 10**9}, "--train-steps must be a whole number from 2 to 65536, found 1000000000"),
        ({"text_tokens": 0}, "--text-tokens must be a whole number from 1 to 65536, found 0"),
        ({"size": (0, 512)}, "--size must be a whole number from 1 to 65536, found 0"),
        ({"size": 512}, "size must be (height, width) in pixels, found 512"),
        ({"beta_range": (0.1, 0.2)}, "belong to a schedule"),
        ({"beta_schedule": "squared-cosine", "beta_range": (0.1, 0.2)}, "belong to a schedule"),
        ({"beta_schedule": "linear", "beta_range": (0.2, 0.1)}, "0 < START <= END < 1, found 0.2 and 0.1"),
        ({"beta_schedule": "linear", "beta_range": (0.0, 0.1)}, "0 < START"),
        ({"beta_schedule": "linear", "beta_range": (0.1, 1.0)}, "END < 1"),
        ({"beta_schedule": "linear", "beta_range": (float("nan"), 0.1)}, "found nan and 0.1"),
    ],
)
def test_facts_that_can_not_be_are_refused_when_they_are_made(facts: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelFacts(**facts)
    assert said in str(caught.value)


@pytest.mark.parametrize(("text", "size"), [(None, None), ("512", (512, 512)), ("512x768", (512, 768))])
def test_a_size_is_a_side_or_height_and_width(text: str | None, size: tuple[int, int] | None) -> None:
    assert size_fact(text) == size


@pytest.mark.parametrize("text", ["", "512x", "x512", "512X768", "512x768x3", "5.5", "-512", "512 x 768", "a"])
def test_another_form_of_a_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--size needs pixels, as 512 for a square or 512x768"):
        size_fact(text)


def test_a_beta_schedule_is_a_name_and_perhaps_its_ends() -> None:
    assert beta_schedule_facts(None) == {}
    assert beta_schedule_facts("linear") == {"beta_schedule": "linear"}
    assert beta_schedule_facts("linear:1e-4:0.02") == {"beta_schedule": "linear", "beta_range": (1e-4, 0.02)}
    for wrong in ("linear:0.1", "linear:a:b", "linear:1:2:3", "linear:"):
        with pytest.raises(InputError, match="NAME or NAME:START:END"):
            beta_schedule_facts(wrong)


def test_given_facts_are_named_by_their_options() -> None:
    assert given_options(ModelFacts()) == []
    unusual = {"flow_times": "0:1", "text_tokens": 9, "size": (8, 8)}
    assert given_options(COMPLETE) == [
        each for each in FACT_OPTIONS if each not in ("--flow-times", "--text-tokens", "--size")
    ]
    assert given_options(replace(COMPLETE, **unusual)) == list(FACT_OPTIONS)
    assert given_options(ModelFacts(null_class=False)) == ["--no-null"]


ARGS = {"model": "DiT-S/2", "image_size": 32, "num_classes": 4, "data_path": "/data", "vae": "ema", "epochs": 1400}


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """DiT-S has one block here, to be quick."""
    monkeypatch.setitem(DIT_SIZES, "s", (WIDTH, 1, 6))


def s_2(folder: Path, rows: int = 5, **args: Any) -> Path:
    """A checkpoint with the training script's arguments."""
    return checkpoint(folder, rows, argparse.Namespace(**ARGS | args))


@pytest.mark.usefixtures("shallow")
def test_the_training_script_s_arguments_are_read_in_place_of_assumptions(tmp_path: Path) -> None:
    (line,) = dit_from_checkpoint(s_2(tmp_path)).spec.assumptions
    assert line.startswith("a process as usual")
    spec = dit_from_checkpoint(s_2(tmp_path, num_classes=5)).spec
    assert (spec.num_classes, spec.null_label) == (5, None)


@pytest.mark.usefixtures("shallow")
def test_arguments_about_the_process_are_read(tmp_path: Path) -> None:
    path = s_2(tmp_path, noise_schedule="squaredcos_cap_v2", diffusion_steps=400, predict_xstart=True)
    spec = dit_from_checkpoint(path).spec
    assert spec.diffusion == DiffusionSpec(
        prediction="sample", beta_schedule="squared-cosine", train_steps=400, beta_start=1e-4
    )
    assert spec.assumptions == ()


@pytest.mark.parametrize(
    ("args", "expected", "said"),
    [
        ({"noise_schedule": "cosine"}, DiffusionSpec(beta_schedule="squared-cosine"), ""),
        ({"prediction": "v_prediction", "predict_xstart": False}, DiffusionSpec(prediction="v"), "linear betas"),
        (
            {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01},
            DiffusionSpec(beta_schedule="scaled-linear", beta_start=0.001, beta_end=0.01),
            "",
        ),
        (
            {"beta_start": 0.001, "beta_end": 0.01},
            DiffusionSpec(beta_start=0.001, beta_end=0.01),
            "linear betas from 0.001 to 0.01 (--beta-schedule)",
        ),
        ({"num_train_timesteps": 400}, DiffusionSpec(train_steps=400, beta_start=2.5e-4, beta_end=0.05), "linear"),
    ],
)
@pytest.mark.usefixtures("shallow")
def test_other_scripts_arguments_about_the_process_are_read(
    args: dict[str, Any], expected: DiffusionSpec, said: str, tmp_path: Path
) -> None:
    spec = dit_from_checkpoint(s_2(tmp_path, **args)).spec
    assert spec.diffusion == expected
    assert ("betas" in str(spec.assumptions)) == bool(said)
    assert said in str(spec.assumptions)


@pytest.mark.usefixtures("shallow")
def test_arguments_that_are_not_understood_are_named_in_one_line(tmp_path: Path) -> None:
    odd = {"diffusion_kind": "odd", "sigma_data": 0.5, "timestep_shift": 3.0, "noise_kind": "b"}
    (*_, line) = dit_from_checkpoint(s_2(tmp_path, **odd)).spec.assumptions
    assert line == (
        "the training script's arguments also say diffusion_kind 'odd', sigma_data 0.5, timestep_shift 3.0 and 1 more, "
        "which ditc does not read (state what it means: --classes, --no-null, --prediction, --beta-schedule, "
        "--train-steps)"
    )


@pytest.mark.parametrize("stride", [1, 4, 8, 16, 32])
@pytest.mark.usefixtures("shallow")
def test_the_image_size_fits_latents_of_any_usual_vae(stride: int, tmp_path: Path) -> None:
    assert dit_from_checkpoint(s_2(tmp_path, image_size=4 * stride)).spec.latent_shape == (4, 4, 4)


@pytest.mark.parametrize(("dropout", "null"), [(0.1, 4), (0.0, None), (0, None)])
@pytest.mark.usefixtures("shallow")
def test_label_dropout_tells_whether_there_is_a_null_class(dropout: float, null: int | None, tmp_path: Path) -> None:
    rows = 5 if null else 4
    spec = dit_from_checkpoint(s_2(tmp_path, rows, class_dropout_prob=dropout)).spec
    assert (spec.num_classes, spec.null_label) == (4, null)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"model": "DiT-B/2"}, "arguments say width 768, its weights 384"),
        ({"model": "DiT-S/4"}, "arguments say patch size 4, its weights 2"),
        ({"image_size": 256}, "arguments say image_size 256, its weights 4, 16, 32, 64 or 128 pixels"),
        ({"num_classes": 1000}, "its label table has 5 rows, its training script's arguments say 1000 classes"),
        ({"class_dropout_prob": 0.0}, "say 4 classes and no null class"),
        ({"learn_sigma": False}, "arguments say learn_sigma False, its weights True"),
    ],
)
@pytest.mark.usefixtures("shallow")
def test_arguments_that_contradict_the_shapes_are_refused(args: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(s_2(tmp_path, **args))


@pytest.mark.parametrize(
    "args",
    [
        {"prediction": "score"},
        {"path_type": "VP"},
        {"model": "SiT-S/2", "prediction": "noise"},
    ],
)
@pytest.mark.usefixtures("shallow")
def test_arguments_of_a_flow_that_is_not_known_are_refused_by_name(args: dict[str, Any], tmp_path: Path) -> None:
    message = refusal(s_2(tmp_path, **args))
    assert "was trained for flow matching" in message
    assert all(f"{name} {value}" in message for name, value in args.items())


@pytest.mark.usefixtures("shallow")
def test_options_go_before_arguments(tmp_path: Path) -> None:
    spec = dit_from_checkpoint(s_2(tmp_path, num_classes=9), facts=ModelFacts(classes=4, prediction="v")).spec
    assert (spec.num_classes, spec.diffusion.prediction) == (4, "v")


@torch.no_grad()
@pytest.mark.parametrize(("null", "learn_sigma"), list(product((True, False), repeat=2)))
def test_a_model_without_a_null_class_computes_the_same_for_its_classes(
    null: bool, learn_sigma: bool, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, learn_sigma=learn_sigma)
    x, t, y = torch.randn(3, 4, 4, 4), torch.tensor([9.0, 500.0, 999.0]), torch.tensor([0, 2, 3])
    with_null = dit_from_checkpoint(path, facts=ModelFacts(null_class=True))
    other = dit_from_checkpoint(path, facts=ModelFacts(null_class=null))
    assert torch.equal(with_null(x, t, y), other(x, t, y))


@pytest.mark.usefixtures("shallow")
def test_an_argument_s_file_is_in_every_refusal(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        dit_from_checkpoint(s_2(tmp_path, model="DiT-B/2"))
    assert "mine.pt" in str(caught.value)
