"""Parts beside a transformer in a pipeline of diffusers: the index, the scheduler, the VAE, caches of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline
from diffusers_folders import (
    RELEASED_SCHEDULER,
    Settings,
    change_config,
    pipeline,
    refusal,
    released_folder,
    saved,
    transformer,
)

from ditc.errors import CheckpointError
from ditc.exporter.diffusers_folder import dit_from_diffusers
from ditc.exporter.model_facts import ModelFacts
from ditc.spec import DiffusionSpec, SamplerSpec


def released_pipeline(folder: Path) -> Path:
    """A pipeline with files of 2022 in every part."""
    released_folder(folder / "transformer")
    for part, file, content in (
        ("vae", "config.json", None),
        ("scheduler", "scheduler_config.json", RELEASED_SCHEDULER),
    ):
        (folder / part).mkdir()
        if content is not None:
            (folder / part / file).write_text(json.dumps(content))
    saved(autoencoder(), folder / "vae")
    write_index(folder, transformer="Transformer2DModel", scheduler="DDIMScheduler", vae="AutoencoderKL")
    return folder


def write_index(folder: Path, **classes: Any) -> None:
    entries = {part: ["diffusers", kind] if isinstance(kind, str) else kind for part, kind in classes.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **entries}))


def test_a_released_pipeline_that_today_s_diffusers_saves_again_is_the_same_model(tmp_path: Path) -> None:
    """The new file keeps the keys of the old one, under the new class."""
    folder, again = released_pipeline(tmp_path / "old"), tmp_path / "again"
    DiTPipeline.from_pretrained(folder, low_cpu_mem_usage=False).save_pretrained(again)
    resaved = json.loads((again / "transformer" / "config.json").read_text())
    assert resaved["_class_name"] == "DiTTransformer2DModel"
    assert resaved.keys() >= {"cross_attention_dim", "num_vector_embeds", "use_linear_projection"}
    old, new = dit_from_diffusers(folder), dit_from_diffusers(again)
    assert old.spec.model_copy(update={"name": ""}) == new.spec.model_copy(update={"name": ""})
    assert old.config == new.config
    weights = {name: value for name, value in new.named_parameters() if not name.startswith("decoder.")}
    assert all(torch.equal(old.get_parameter(name), value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("part", "kind", "said"),
    [
        ("transformer", "SanaTransformer2DModel", "names SanaTransformer2DModel as the transformer, expected DiT"),
        ("vae", "AutoencoderDC", "names AutoencoderDC as the vae, expected AutoencoderKL"),
        ("scheduler", "EDMEulerScheduler", "is of EDMEulerScheduler: "),
        ("scheduler", "MyScheduler", "is of MyScheduler: no scheduler that ditc knows"),
        ("scheduler", 7, "scheduler is 7, expected a library and a class"),
        ("vae", ["diffusers"], "vae is ['diffusers'], expected a library and a class"),
    ],
)
def test_a_class_that_only_the_index_names_is_looked_at(part: str, kind: Any, said: str, tmp_path: Path) -> None:
    folder = released_pipeline(tmp_path / "old")
    write_index(folder, **{part: kind})
    assert said in refusal(folder)


def test_the_scheduler_is_of_the_class_that_the_index_names_as_diffusers_has_it(tmp_path: Path) -> None:
    folder = released_pipeline(tmp_path / "old")
    write_index(folder, transformer="DiTTransformer2DModel", scheduler="DDPMScheduler", vae="AutoencoderKL")
    theirs = DiTPipeline.from_pretrained(folder, low_cpu_mem_usage=False).scheduler
    assert type(theirs).__name__ == "DDPMScheduler"
    spec = dit_from_diffusers(folder).spec
    assert spec.sampler.name == "ddpm"
    assert spec.sampler.variance.replace("-", "_") == theirs.config.variance_type
    assert spec.assumptions == (
        "the scheduler is of DDPMScheduler, as model_index.json has it, not of DDIMScheduler (scheduler_config.json)",
    )


@pytest.mark.parametrize("content", [{}, {"scheduler": [None, None]}, {"scheduler": None}])
def test_an_index_that_says_nothing_of_a_part_changes_nothing(content: Settings, tmp_path: Path) -> None:
    folder = released_pipeline(tmp_path / "old")
    (folder / "model_index.json").write_text(json.dumps(content))
    assert dit_from_diffusers(folder).spec.assumptions == ()


def test_a_cache_of_the_hub_is_pointed_into(folder: Path) -> None:
    cache = folder.parent / "models--me--tiny"
    (cache / "snapshots").mkdir(parents=True)
    folder.rename(cache / "snapshots" / "0123abc")
    with pytest.raises(CheckpointError) as caught:
        dit_from_diffusers(cache)
    assert f"give the folder in it: {cache / 'snapshots' / '0123abc'}" in str(caught.value)


def test_of_several_snapshots_the_main_revision_s_is_named(folder: Path) -> None:
    cache = folder.parent / "models--me--tiny"
    for name in ("0123abc", "9999fff"):
        (cache / "snapshots" / name).mkdir(parents=True)
    (cache / "refs").mkdir()
    for current in ("0123abc", "9999fff"):
        (cache / "refs" / "main").write_text(current)
        assert f"give the folder in it: {cache / 'snapshots' / current}" in refusal(cache)


def test_a_snapshot_in_a_cache_of_the_hub_has_its_repository_s_name(folder: Path) -> None:
    snapshot = folder.parent / "models--me--DiT-Tiny" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    assert dit_from_diffusers(snapshot).spec.name == "DiT-Tiny"


def test_the_scheduler_beside_the_transformer_is_read(tmp_path: Path) -> None:
    spec = dit_from_diffusers(pipeline(tmp_path / "mine", prediction_type="v_prediction", clip_sample_range=2.5)).spec
    assert spec.diffusion == DiffusionSpec(prediction="v")
    assert spec.sampler == SamplerSpec(spacing="leading", clip=2.5)
    assert spec.assumptions == ()


def test_a_scheduler_folder_without_its_file_is_not_passed_over(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "mine")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert "no such file" in refusal(folder)


def test_without_a_scheduler_the_process_of_the_release_is_assumed_and_said(tmp_path: Path) -> None:
    spec = dit_from_diffusers(saved(transformer(out_channels=4), tmp_path / "tiny")).spec
    assert spec.diffusion == DiffusionSpec(learned_sigma=False)
    assert spec.sampler.clip is None
    (line,) = spec.assumptions
    assert line == (
        "a process as usual: noise prediction (--prediction), linear betas from 0.0001 to 0.02 (--beta-schedule), "
        "1000 training steps (--train-steps)"
    )


def test_a_bare_transformer_of_a_pipeline_points_to_the_scheduler(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "mine")
    (line,) = dit_from_diffusers(folder / "transformer").spec.assumptions
    assert line.endswith(f"{folder} has a scheduler that states it")


def test_facts_about_the_process_are_used_where_there_is_no_scheduler(folder: Path) -> None:
    facts = ModelFacts(prediction="v", beta_schedule="scaled-linear", beta_range=(0.001, 0.01), train_steps=400)
    spec = dit_from_diffusers(folder, facts).spec
    assert spec.diffusion == DiffusionSpec(
        prediction="v", beta_schedule="scaled-linear", beta_start=0.001, beta_end=0.01, train_steps=400
    )
    assert spec.assumptions == ()


def autoencoder(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    settings: Settings = {"block_out_channels": (32,), "latent_channels": 4, "norm_num_groups": 8, "sample_size": 8}
    return AutoencoderKL(**settings | changes).eval()


@torch.no_grad()
@pytest.mark.parametrize("shift", [None, 0.2])
def test_the_decoder_is_the_vae_s_on_latents_of_its_own_scale(shift: float | None, tmp_path: Path) -> None:
    vae = autoencoder(scaling_factor=0.5, shift_factor=shift)
    transformer().save_pretrained(tmp_path / "transformer")
    vae.save_pretrained(tmp_path / "vae")
    model = dit_from_diffusers(tmp_path)
    latent = torch.randn(2, 4, 8, 8)
    assert (model.spec.latent_scale, model.spec.latent_shift) == (0.5, shift or 0)
    assert model.decoder is not None
    torch.testing.assert_close(model.decoder(latent), vae.decode(latent / 0.5 + (shift or 0)).sample)


def test_the_decoder_is_not_counted_among_the_parameters(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path / "transformer")
    alone = dit_from_diffusers(tmp_path).spec.parameters
    autoencoder().save_pretrained(tmp_path / "vae")
    assert dit_from_diffusers(tmp_path).spec.parameters == alone


def test_without_a_vae_there_is_no_decoder(folder: Path) -> None:
    model = dit_from_diffusers(folder)
    assert model.decoder is None
    assert model.spec.latent_scale is None


@pytest.mark.parametrize("channels", [3, 16])
def test_a_vae_of_other_latents_is_refused_by_both_numbers(channels: int, tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path / "transformer")
    autoencoder(latent_channels=channels).save_pretrained(tmp_path / "vae")
    message = refusal(tmp_path)
    assert f"decodes {channels} channels, {tmp_path.name} makes 4" in message


def test_a_vae_of_another_class_is_refused(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path / "transformer")
    autoencoder().save_pretrained(tmp_path / "vae")
    change_config(tmp_path / "vae", _class_name="AutoencoderTiny")
    assert "AutoencoderTiny, expected AutoencoderKL" in refusal(tmp_path)
