"""LoRAs in the weights: what a merged model computes is what the layers give with the LoRA running beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers_folders import error_against, saved, share_embedders, transformer
from refusals import refusal_of
from torch import Tensor, nn

from ditc.errors import CheckpointError, InputError
from ditc.exporter.diffusers_folder import dit_from_diffusers
from ditc.exporter.dit import DiT, DiTConfig
from ditc.exporter.loras import module_layers, with_loras
from ditc.exporter.model_facts import ModelFacts
from ditc.exporter.models import load_model, random_dit
from ditc.exporter.protocol import relative_error
from ditc.exporter.sit import SiT
from ditc.loras import Lora, MergedLora
from ditc.spec import ModelSpec
from tests.models import pixart as pixarts
from tests.models.loras import RANK, Pairs, beside, kohya, old_diffusers, pairs_for, peft, write

CONFIG = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=64, depth=2, num_heads=4, num_classes=5)
QKV, K = "blocks.0.attn.qkv", "transformer_blocks.0.attn1.to_k"
ATTENTION = [f"transformer_blocks.{block}.attn1.{layer}" for block in (0, 1) for layer in ("to_q", "to_v", "to_out.0")]


def small() -> DiT:
    return random_dit(CONFIG, "small")


def pair_for_k(seed: int = 0, rank: int = RANK) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, 64, generator=generator), torch.randn(64, rank, generator=generator)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@torch.no_grad()
def error_beside(merged: DiT, unmerged: nn.Module) -> float:
    """Relative error of a merged model's forward pass against one that runs the LoRA beside its layers."""
    spec = merged.spec
    x = torch.randn(4, *spec.latent_shape, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([999.0, 500.0, 7.0, 0.0]), torch.tensor([0, 1, 2, 4])
    return relative_error(merged(x, t, y), unmerged(x, t, y))


# every way to write the same LoRA with alpha 6, as tensors and, where it stands there, a configuration
FORMS: dict[str, Callable[[Pairs], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "diffusers": lambda pairs: (peft(pairs), {"transformer.r": RANK, "transformer.lora_alpha": 6}),
    "an adapter of diffusers": lambda pairs: (peft(pairs, ""), {"r": RANK, "lora_alpha": 6, "peft_type": "LORA"}),
    "PEFT": lambda pairs: (peft(pairs, "base_model.model."), {"r": RANK, "lora_alpha": 6}),
    "PEFT of a pipeline's transformer": lambda pairs: (
        peft(pairs, "base_model.model.transformer."),
        {"r": RANK, "lora_alpha": 6},
    ),
    "an adapter with its name": lambda pairs: (
        {key.replace(".weight", ".default.weight"): tensor for key, tensor in peft(pairs).items()},
        {"lora_alpha": 6},
    ),
    "kohya": lambda pairs: (kohya(pairs, 6.0), {}),
    "kohya's names of others": lambda pairs: (kohya(pairs, 6.0, "lora_transformer_"), {}),
    "up and down behind dots": lambda pairs: (
        {
            key: tensor
            for name, (down, up) in pairs.items()
            for key, tensor in (
                (f"diffusion_model.{name}.lora_down.weight", down),
                (f"diffusion_model.{name}.lora_up.weight", up),
                (f"diffusion_model.{name}.alpha", torch.tensor(6)),
            )
        },
        {},
    ),
    "old diffusers": lambda pairs: (
        {
            **old_diffusers(pairs),
            **{
                f"{key.removesuffix('.down.weight')}.alpha": torch.tensor([6.0])
                for key in old_diffusers(pairs)
                if key.endswith(".down.weight")
            },
        },
        {},
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [1.0, -0.7])
def test_every_form_of_a_lora_adds_weight_alpha_over_rank_b_a(form: str, weight: float, tmp_path: Path) -> None:
    theirs = transformer()
    pairs = pairs_for(theirs, ATTENTION)
    tensors, config = FORMS[form](pairs)
    before = weights_of(dit_from_diffusers(saved(theirs, tmp_path / "tiny")))
    merged = with_loras(
        dit_from_diffusers(tmp_path / "tiny"), [Lora(write(tmp_path / "l.safetensors", tensors, **config), weight)]
    )
    with beside(theirs, pairs, weight * 6 / RANK):
        assert error_against(theirs, merged) < 1e-5
    assert changed(merged, before) == {f"blocks.{b}.attn.{name}.weight" for b in (0, 1) for name in ("qkv", "proj")}
    assert merged.spec.loras[0].layers == 6


def linears_of(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


@pytest.mark.parametrize("kind", ["own embedders", "one embedder"])
def test_a_folder_takes_a_lora_on_every_layer_that_diffusers_has(kind: str, tmp_path: Path) -> None:
    """Embedders of single blocks and the convolution too: where blocks share an embedder, each gets its own."""
    theirs = transformer() if kind == "own embedders" else share_embedders(transformer())
    pairs = pairs_for(theirs, linears_of(theirs))
    model = dit_from_diffusers(saved(theirs, tmp_path / "tiny"))
    assert model.config.embedder_per_block == (kind == "own embedders")
    merged = with_loras(model, [Lora(write(tmp_path / "l.safetensors", peft(pairs)))])
    assert merged.config.embedder_per_block
    with beside(theirs, pairs):
        assert error_against(theirs, merged) < 1e-5
    assert merged.spec.loras[0].layers == len(pairs)


def test_a_file_takes_a_lora_on_every_layer_that_the_release_has(tmp_path: Path) -> None:
    plain = small()
    pairs = pairs_for(plain, linears_of(plain))
    merged = with_loras(small(), [Lora(write(tmp_path / "l.safetensors", peft(pairs, "base_model.model.")))])
    assert not merged.config.embedder_per_block
    before = weights_of(plain)
    for name, (down, up) in pairs.items():
        expected = plain.get_parameter(f"{name}.weight") + (up.flatten(1) @ down.flatten(1)).reshape(
            plain.get_parameter(f"{name}.weight").shape
        )
        torch.testing.assert_close(merged.get_parameter(f"{name}.weight"), expected)
    assert changed(merged, before) == {f"{name}.weight" for name in pairs}


def test_a_lora_on_one_of_q_k_v_goes_into_its_third_of_the_rows(tmp_path: Path) -> None:
    down, up = pair_for_k()
    before = small().get_submodule(QKV).weight
    after = with_loras(small(), [Lora(write(tmp_path / "l.safetensors", peft({K: (down, up)})))])
    difference = after.get_submodule(QKV).weight - before
    torch.testing.assert_close(difference[64:128], up @ down, rtol=1e-4, atol=1e-5)
    assert not difference[:64].any()
    assert not difference[128:].any()


def test_one_embedder_of_the_release_is_every_block_s_where_each_has_its_own(tmp_path: Path) -> None:
    """Two LoRAs of unlike names at once: what one changes for all, the other parts."""
    plain = small()
    name, in_block = "t_embedder.mlp.0", "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1"
    (pair,), (other,) = (pairs_for(plain, [name], seed=seed).values() for seed in (0, 1))
    files = [
        write(tmp_path / f"{number}.safetensors", tensors)
        for number, tensors in enumerate((peft({name: pair}), peft({in_block: other})))
    ]
    merged = with_loras(small(), [Lora(file) for file in files])
    shared = plain.get_parameter(f"{name}.weight") + pair[1] @ pair[0]
    for copy in ("", "blocks.0."):
        torch.testing.assert_close(merged.get_parameter(f"{copy}{name}.weight"), shared)
    torch.testing.assert_close(merged.get_parameter(f"blocks.1.{name}.weight"), shared + other[1] @ other[0])
    reverse = with_loras(small(), [Lora(file) for file in reversed(files)])
    assert changed(reverse, weights_of(merged)) == set()


def test_parted_weights_compute_the_same() -> None:
    parted = small()
    parted.part_weights()
    assert error_beside(parted, small()) == 0


def test_several_loras_add_up_in_whatever_order(tmp_path: Path) -> None:
    loras = [
        Lora(write(tmp_path / f"{seed}.safetensors", peft({K: pair_for_k(seed)})), weight)
        for seed, weight in ((0, 0.3), (1, -0.8), (2, 1.7))
    ]
    forward, backward = with_loras(small(), loras), with_loras(small(), loras[::-1])
    assert changed(forward, weights_of(backward)) == set()
    expected = sum(lora.weight * up @ down for lora, (down, up) in zip(loras, map(pair_for_k, range(3)), strict=True))
    difference = forward.get_submodule(QKV).weight[64:128] - small().get_submodule(QKV).weight[64:128]
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-5)
    assert [lora.file for lora in forward.spec.loras] == ["0.safetensors", "1.safetensors", "2.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_other_types_are_merged_in_full_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    down, up = (factor.to(dtype) for factor in pair_for_k())
    merged = with_loras(small(), [Lora(write(tmp_path / "l.safetensors", peft({K: (down, up)})))])
    exact = small().get_submodule(QKV).weight[64:128].double() + up.double() @ down.double()
    assert torch.equal(merged.get_submodule(QKV).weight[64:128], exact.float())


def test_a_file_of_torch_is_read_as_well(tmp_path: Path) -> None:
    torch.save(peft({K: pair_for_k()}), tmp_path / "l.bin")
    in_torch = with_loras(small(), [Lora(tmp_path / "l.bin")])
    other = with_loras(small(), [Lora(write(tmp_path / "l.safetensors", peft({K: pair_for_k()})))])
    assert changed(in_torch, weights_of(other)) == set()


class Wrapped(nn.Module):
    """A family that wraps a module of diffusers, as far as LoRAs see it."""

    def __init__(self, transformer: nn.Module, *, told: bool = True) -> None:
        super().__init__()
        self.transformer = transformer
        self.loras: tuple[MergedLora, ...] = ()
        self.told = told

    @property
    def spec(self) -> ModelSpec:
        return small().spec.model_copy(update={"name": "wrapped", "loras": self.loras if self.told else ()})

    def lora_layers(self) -> Any:
        return module_layers(self.transformer, "transformer.")


def pixart() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        norm_num_groups=4,
        sample_size=8,
        caption_channels=24,
    ).eval()


@pytest.mark.parametrize("form", ["diffusers", "PEFT", "kohya", "old diffusers"])
def test_a_family_that_wraps_a_module_takes_loras_by_that_module_s_names(form: str, tmp_path: Path) -> None:
    """The layers that PixArt's training script names: attention, feed-forward, embedders, patches, modulation."""
    plain = pixart()
    pairs = pairs_for(plain, linears_of(plain))
    tensors, config = FORMS[form](pairs)
    merged = with_loras(Wrapped(pixart()), [Lora(write(tmp_path / "l.safetensors", tensors, **config), 0.5)])
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator),
        "timestep": torch.tensor([7, 900]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    with torch.no_grad(), beside(plain, pairs, 0.5 * 6 / RANK):
        assert relative_error(merged.transformer(**inputs).sample, plain(**inputs).sample) < 1e-5
        error = relative_error(pixart()(**inputs).sample, plain(**inputs).sample)
    assert error > 0.01


def test_a_model_whose_spec_does_not_pass_loras_on_is_refused(tmp_path: Path) -> None:
    model = Wrapped(pixart(), told=False)
    before = weights_of(model)
    name = "transformer_blocks.0.attn2.to_k"
    lora = Lora(write(tmp_path / "l.safetensors", peft(pairs_for(model.transformer, [name]))))
    message = refusal_of(lambda: with_loras(model, [lora]), "wrapped", InputError)
    assert "does not pass on `loras`" in message
    assert changed(model, before) == set()


def test_a_model_that_says_nothing_of_layers_is_refused(tmp_path: Path) -> None:
    class Silent:
        spec = small().spec

    lora = Lora(write(tmp_path / "l.safetensors", peft({K: pair_for_k()})))
    message = refusal_of(lambda: with_loras(Silent(), [lora]), "small", InputError)
    assert "lora_layers()" in message
    assert message.endswith("leave out --lora")


@pytest.mark.parametrize("kind", ["built in", "random", "user's own", "file", "folder"])
def test_every_kind_of_model_takes_a_lora(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora_of_mine.py").write_text(
        "from ditc.exporter.dit import DiTConfig\nfrom ditc.exporter.models import random_dit\n\n\n"
        "def build():\n    return random_dit(DiTConfig(input_size=8, hidden_size=64, depth=1, num_heads=4), 'own')\n"
    )
    torch.save(random_dit(DiTConfig(input_size=8, hidden_size=384, depth=1), "file").state_dict(), "mine.pt")
    saved(transformer(), tmp_path / "tiny")
    names = {"built in": "digits", "random": "random:dit-s-8-256", "user's own": "lora_of_mine:build"}
    name = names.get(kind, "mine.pt" if kind == "file" else "tiny")
    before = load_model(name)
    pairs = pairs_for(before, ["blocks.0.attn.proj"])
    after = load_model(name, loras=[Lora(write(tmp_path / "l.safetensors", peft(pairs)), 2.0)])
    assert changed(after, weights_of(before)) == {"blocks.0.attn.proj.weight"}
    assert [(lora.file, lora.weight, lora.layers) for lora in after.spec.loras] == [("l.safetensors", 2.0, 1)]


def test_the_look_at_what_a_model_predicts_is_at_the_merged_one(tmp_path: Path) -> None:
    """A LoRA that turns the built-in model's prediction around, in a file of its weights."""
    digits = load_model("digits")
    torch.save(digits.state_dict(), tmp_path / "mine.pt")
    last = digits.final_layer.linear.weight.detach()  # of few outputs, so a LoRA of that rank can be anything
    pair = last, -2 * torch.eye(len(last))
    lora = Lora(write(tmp_path / "l.safetensors", peft({"final_layer.linear": pair})))
    assert load_model(str(tmp_path / "mine.pt"), num_heads=4).spec.doubts == ()
    doubts = load_model(str(tmp_path / "mine.pt"), num_heads=4, loras=[lora]).spec.doubts
    assert any("a predictor of noise has nearly 1" in line for line in doubts)


def test_a_doubt_about_a_lora_stands_beside_those_about_the_model(tmp_path: Path) -> None:
    torch.save(random_dit(DiTConfig(input_size=8, hidden_size=384, depth=1), "file").state_dict(), tmp_path / "mine.pt")
    saved(transformer(), tmp_path / "tiny")
    for name in ("mine.pt", "tiny"):
        before = load_model(str(tmp_path / name))
        (down, up), *_ = pairs_for(before, ["blocks.0.attn.proj"]).values()
        file = write(tmp_path / "l.safetensors", peft({"blocks.0.attn.proj": (down, 0 * up)}))
        doubts = load_model(str(tmp_path / name), loras=[Lora(file)]).spec.doubts
        assert doubts[0].startswith("LoRA l.safetensors changes nothing")
        assert doubts[1:] == before.spec.doubts
        assert len(doubts) > 1


def test_a_decoder_is_no_layer_of_the_model(tmp_path: Path) -> None:
    model = small()
    model.decoder = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Linear(4, 4))
    assert set(model.lora_layers()) == set(small().lora_layers())
    assert {"decoder.0", "decoder.1"} <= module_layers(model).keys()


def test_a_spec_of_a_model_without_loras_has_no_key_of_them() -> None:
    assert "loras" not in small().spec.model_dump(mode="json")


def test_a_lora_that_changes_nothing_is_a_doubt(tmp_path: Path) -> None:
    down, up = pair_for_k()
    merged = with_loras(small(), [Lora(write(tmp_path / "new.safetensors", peft({K: (down, 0 * up)})))])
    assert merged.spec.doubts == (
        "LoRA new.safetensors changes nothing: one factor of every layer is zero, as before any training",
    )


def test_changes_larger_than_the_weights_are_a_doubt(tmp_path: Path) -> None:
    file = write(tmp_path / "l.safetensors", peft({"blocks.0.attn.proj": pair_for_k()}))
    (line,) = with_loras(small(), [Lora(file, 3)]).spec.doubts
    down, up = pair_for_k()
    size = (3 * up @ down).norm() / small().blocks[0].attn.proj.weight.detach().norm()
    assert f"by {size:.1f} times their own size" in line
    assert with_loras(small(), [Lora(file, 0.01)]).spec.doubts == ()


def test_an_alpha_that_nothing_states_is_the_rank_and_said(tmp_path: Path) -> None:
    down, up = pair_for_k(rank=4)
    file = write(tmp_path / "l.safetensors", peft({K: (down, up)}))
    merged = with_loras(small(), [Lora(file)])
    exact = small().get_submodule(QKV).weight[64:128].double() + up.double() @ down.double()
    assert torch.equal(merged.get_submodule(QKV).weight[64:128], exact.float())
    assert merged.spec.assumptions == ("LoRA l.safetensors states no alpha: it is the rank, and B A is added as it is",)


# (configuration, what multiplies B A of q, of proj, both of rank 4)
SCALES: dict[str, tuple[dict[str, Any], float, float]] = {
    "alpha over rank": ({"lora_alpha": 2, "r": 4}, 0.5, 0.5),
    "no rank said": ({"lora_alpha": 2}, 0.5, 0.5),
    "rank stabilized": ({"lora_alpha": 2, "r": 4, "use_rslora": True}, 1.0, 1.0),
    "a pattern of alphas": ({"lora_alpha": 2, "r": 4, "alpha_pattern": {"to_k": 12}}, 3.0, 0.5),
    "a pattern of whole names": ({"lora_alpha": 2, "r": 4, "alpha_pattern": {f"^{K}": 12}}, 3.0, 0.5),
    "a pattern of ranks": ({"lora_alpha": 2, "r": 8, "rank_pattern": {"attn1.to_k": 4, "proj": 4}}, 0.5, 0.5),
    "the first pattern that fits": ({"lora_alpha": 2, "alpha_pattern": {"proj": 8, "attn.proj": 4}}, 0.5, 2.0),
    "what changes nothing": (
        {"lora_alpha": 2, "target_modules": ["to_k"], "init_lora_weights": "gaussian", "bias": "none", "new": None},
        0.5,
        0.5,
    ),
}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("beside_it", [False, True])
def test_the_configuration_of_peft_says_the_scale(name: str, beside_it: bool, tmp_path: Path) -> None:
    config, of_k, of_proj = SCALES[name]
    (down, up), other = pair_for_k(0, 4), pair_for_k(1, 4)
    tensors = peft({K: (down, up), "blocks.1.attn.proj": other})
    if beside_it:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        file = write(tmp_path / "adapter_model.safetensors", tensors)
    else:
        file = write(tmp_path / "l.safetensors", tensors, **config)
    before, merged = small(), with_loras(small(), [Lora(file)])
    for weight, scale, pair in (
        (f"{QKV}.weight", of_k, (down, up)),
        ("blocks.1.attn.proj.weight", of_proj, other),
    ):
        rows = slice(64, 128) if "qkv" in weight else slice(None)
        difference = merged.get_parameter(weight)[rows] - before.get_parameter(weight)[rows]
        torch.testing.assert_close(difference, scale * pair[1] @ pair[0], rtol=1e-3, atol=1e-5)
    assert merged.spec.assumptions == ()


def test_a_configuration_beside_a_file_of_another_name_is_taken_and_said(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2 * RANK}))
    merged = with_loras(small(), [Lora(write(tmp_path / "l.safetensors", peft({K: pair_for_k()})))])
    assert merged.spec.assumptions == ("LoRA l.safetensors has the alpha of the adapter_config.json beside it",)
    kohyas = with_loras(small(), [Lora(write(tmp_path / "k.safetensors", kohya({K: pair_for_k()}, 2.0 * RANK)))])
    assert kohyas.spec.assumptions == ()  # another tool's file, whose alpha is in it
    assert changed(merged, weights_of(kohyas)) == set()


@torch.no_grad()
def test_a_pixart_of_a_folder_takes_loras_by_the_names_of_diffusers(tmp_path: Path) -> None:
    theirs, given = pixarts.transformer("sigma"), pixarts.texts(2)
    layers = (
        "transformer_blocks.0.attn1.to_q",
        "transformer_blocks.1.attn2.to_k",
        "transformer_blocks.1.ff.net.0.proj",
    )
    pairs = pairs_for(theirs, [*layers, "caption_projection.linear_1", "adaln_single.linear", "pos_embed.proj"])
    file, folder = write(tmp_path / "style.safetensors", peft(pairs)), pixarts.saved("sigma", tmp_path / "sigma")
    own = load_model(str(folder), facts=ModelFacts(text_tokens=pixarts.TOKENS), loras=(Lora(file, 0.5),))
    x, t = torch.randn(2, *own.spec.latent_shape, generator=torch.Generator().manual_seed(1)), torch.tensor([999.0, 7])
    with beside(theirs, pairs, 0.5) as unmerged:
        out = unmerged(x, encoder_hidden_states=given["text"], timestep=t, encoder_attention_mask=given["text_mask"])
    assert relative_error(own(x, t, given["text"], given["text_mask"]), out.sample[:, :4]) < 1e-6
    assert [lora.layers for lora in own.spec.loras] == [len(pairs)]


def test_a_flow_s_last_layer_takes_no_lora_since_its_weights_are_not_those_of_the_file(tmp_path: Path) -> None:
    model = SiT(CONFIG)
    file = write(tmp_path / "last.safetensors", peft(pairs_for(model, ["final_layer.linear"]), ""))
    with pytest.raises(CheckpointError, match=r"final_layer\.linear"):
        with_loras(model, (Lora(file),))
    assert {"final_layer.linear", "proj_out_2"}.isdisjoint(model.lora_layers())
    assert "blocks.0.attn.qkv" in model.lora_layers()
