"""Files of LoRAs that are refused: by name, in one line, and before a weight is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refusal_of
from torch import Tensor

from ditc.cli.main import run
from ditc.exporter.dit import DiT, DiTConfig
from ditc.exporter.lora_keys import layer_and_part, layer_named
from ditc.exporter.loras import with_loras
from ditc.exporter.models import random_dit
from ditc.loras import Lora
from tests.models.loras import kohya, peft, write

CONFIG = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=64, depth=2, num_heads=4, num_classes=5)
PROJ = "blocks.0.attn.proj"
Tensors = dict[str, Tensor]


def small() -> DiT:
    return random_dit(CONFIG, "small")


def factors(rank: int = 3, inputs: int = 64, outputs: int = 64) -> tuple[Tensor, Tensor]:
    return torch.ones(rank, inputs), torch.ones(outputs, rank)


def proj(**changes: Any) -> Tensors:
    return peft({PROJ: factors(**changes)})


def renamed(old: str, new: str) -> Tensors:
    """A LoRA of one layer with something else in the place of a part of its keys."""
    return {key.replace(old, new): tensor for key, tensor in proj().items()}


def refused(path: Path) -> str:
    """The line with which a file is refused; the model's weights are as they were."""
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    line = refusal_of(lambda: with_loras(model, [Lora(path)]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.spec.loras == ()
    return line


@dataclass(frozen=True)
class Case:
    """Tensors of a file that is refused, and what the line says."""

    tensors: Callable[[], Tensors]
    says: tuple[str, ...]


WHOLE = f"transformer.{PROJ}.lora_A.weight"
MANY = [f"blocks.{number}.attn.proj" for number in range(2, 7)]
CASES: dict[str, Case] = {
    "DoRA": Case(
        lambda: proj() | {f"{PROJ}.lora_magnitude_vector": torch.ones(64)},
        ("holds DoRA", f"keys {PROJ}.lora_magnitude_vector; save it without, or merge that with the tool"),
    ),
    "DoRA of kohya": Case(
        lambda: kohya({PROJ: factors()}, 1.0) | {"lora_unet_blocks_0_attn_proj.dora_scale": torch.ones(64, 1)},
        ("holds DoRA",),
    ),
    "LoHa": Case(
        lambda: {f"lycoris_blocks_0_attn_proj.hada_w{n}_{m}": torch.ones(3, 3) for n in (1, 2) for m in "ab"},
        ("holds LoHa", "hada_w2_a and 1 more; merge it with the tool that made it"),
    ),
    "LoKr": Case(lambda: {f"{PROJ}.lokr_w1": torch.ones(8, 8)}, ("holds LoKr", f"keys {PROJ}.lokr_w1; ")),
    "OFT": Case(lambda: {f"{PROJ}.oft_blocks": torch.ones(4, 8, 8)}, ("holds OFT",)),
    "an embedding table": Case(
        lambda: {f"y_embedder.embedding_table.lora_embedding_{letter}": torch.ones(3, 6) for letter in "AB"},
        ("a LoRA of an embedding table", "lora_embedding_A, y_embedder.embedding_table.lora_embedding_B; "),
    ),
    "a convolution in three factors": Case(
        lambda: {"lora_unet_x_embedder_proj.lora_mid.weight": torch.ones(3, 3, 2, 2)},
        ("a convolution in three factors",),
    ),
    "biases": Case(lambda: proj() | {f"{PROJ}.lora_B.bias": torch.ones(64)}, ("a change of biases",)),
    "whole weights": Case(lambda: {f"{PROJ}.diff": torch.ones(64, 64)}, ("a change of whole weights",)),
    "a text encoder of diffusers": Case(
        lambda: proj() | {"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(3, 8)},
        ("a LoRA of a text encoder", "save it without"),
    ),
    "a text encoder of kohya": Case(
        lambda: proj() | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)},
        ("a LoRA of a text encoder", "lora_te1_text"),
    ),
    "a second text encoder": Case(
        lambda: {"text_encoder_2.shared.lora_A.weight": torch.ones(3, 8)}, ("a LoRA of a text encoder",)
    ),
    "a checkpoint": Case(
        lambda: {"blocks.0.attn.proj.weight": torch.ones(64, 64), "pos_embed": torch.ones(1, 16, 64)},
        ("is no LoRA: keys blocks.0.attn.proj.weight, pos_embed; expected pairs like",),
    ),
    "layers that the model has not": Case(
        lambda: proj() | peft({name: factors() for name in MANY}),
        (
            "does not fit small: unknown transformer.blocks.2.attn.proj.lora_A.weight, ",
            " and 7 more; expected linear layers of it, like blocks.0.attn.qkv",
        ),
    ),
    "a layer norm": Case(lambda: renamed("attn.proj", "norm1"), ("unknown transformer.blocks.0.norm1.lora_A.weight",)),
    "a kohya name of no layer": Case(
        lambda: kohya({"blocks.0.attn.projection": factors()}, 1.0),
        ("unknown lora_unet_blocks_0_attn_projection.alpha, ",),
    ),
    "a layer of the decoder": Case(lambda: renamed(PROJ, "decoder.conv"), ("unknown transformer.decoder.conv",)),
    "a down without its up": Case(
        lambda: {WHOLE: factors()[0]}, (f"is not whole: no B (up) for {WHOLE}; copy the LoRA again",)
    ),
    "an up without its down": Case(
        lambda: {WHOLE.replace("lora_A", "lora_B"): factors()[1]}, ("is not whole: no A (down) for",)
    ),
    "an alpha without either": Case(
        lambda: proj() | {"blocks.1.attn.proj.alpha": torch.tensor(1.0)}, ("no B (up) for blocks.1.attn.proj.alpha",)
    ),
    "the same layer under two names": Case(
        lambda: proj() | peft({PROJ: factors()}, "unet."),
        ("has the same layer twice", WHOLE, f"unet.{PROJ}.lora_A.weight"),
    ),
    "two adapters": Case(
        lambda: renamed(".weight", ".one.weight") | renamed(".weight", ".two.weight"), ("the same layer twice",)
    ),
    "ranks that differ": Case(
        lambda: peft({PROJ: (factors(3)[0], factors(4)[1])}), (f"{WHOLE} has rank 3", "lora_B.weight 4;")
    ),
    "too few inputs": Case(
        lambda: proj(inputs=32),
        (f"other shapes than the model: layers {PROJ} with A (3, 32) and B (64, 3) instead of (3, 64) and (64, 3); ",),
    ),
    "too many outputs": Case(lambda: proj(outputs=192), ("A (3, 64) and B (192, 3) instead of (3, 64) and (64, 3)",)),
    "one of q, k, v as large as all three": Case(
        lambda: peft({"transformer_blocks.1.attn1.to_q": factors(outputs=192)}),
        ("transformer_blocks.1.attn1.to_q with A (3, 64) and B (192, 3) instead of (3, 64) and (64, 3)",),
    ),
    "a linear layer as a convolution": Case(
        lambda: peft({PROJ: (torch.ones(3, 64, 1, 1), torch.ones(64, 3, 1, 1))}), ("instead of (3, 64) and (64, 3)",)
    ),
    "a convolution of another kernel": Case(
        lambda: peft({"x_embedder.proj": (torch.ones(3, 3, 1, 1), torch.ones(64, 3, 1, 1))}),
        ("A (3, 3, 1, 1) and B (64, 3, 1, 1) instead of (3, 3, 2, 2) and (64, 3, 1, 1)",),
    ),
    "a vector": Case(
        lambda: peft({PROJ: (torch.ones(64), torch.ones(64, 1))}), ("has shape (64,), expected a matrix",)
    ),
    "nothing": Case(lambda: proj(rank=0), ("has shape (0, 64), expected a matrix",)),
    "NaN": Case(lambda: peft({PROJ: (factors()[0], factors()[1] * torch.nan)}), ("lora_B.weight contains NaN",)),
    "infinity": Case(lambda: peft({PROJ: (factors()[0] / 0, factors()[1])}), ("lora_A.weight contains NaN or inf",)),
    "numbers that overflow": Case(
        lambda: peft({PROJ: (1e30 * factors()[0], 1e30 * factors()[1])}),
        (f"makes {PROJ} overflow; give it a smaller weight",),
    ),
    "integers": Case(
        lambda: {key: tensor.to(torch.int8) for key, tensor in proj().items()}, ("is int8, expected float16",)
    ),
    "eight bits": Case(
        lambda: {key: tensor.to(torch.float8_e4m3fn) for key, tensor in proj().items()}, ("lora_A.weight is float8",)
    ),
    "an alpha of 0": Case(lambda: kohya({PROJ: factors()}, 0.0), (".alpha is 0, expected a number above 0",)),
    "an alpha that is NaN": Case(lambda: kohya({PROJ: factors()}, torch.nan), (".alpha is nan",)),
    "alphas in a row": Case(
        lambda: proj() | {f"{PROJ}.alpha": torch.ones(3)}, (f"{PROJ}.alpha is of shape (3,), expected a number",)
    ),
    "alpha of some layers": Case(
        lambda: kohya({PROJ: factors()}, 1.0) | peft({"blocks.1.attn.proj": factors()}),
        ("states alpha of some layers alone: none of blocks.1.attn.proj; save it again",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_merged_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "style.safetensors", CASES[name].tensors())
    line = refused(path)
    assert line.startswith(str(path))
    for part in CASES[name].says:
        assert part in line


# configurations that are refused, and what the line says
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": (
        {"lora_alpha": 1, "use_dora": True},
        "use_dora is true, expected nothing; ditc does not merge such a LoRA",
    ),
    "another method": ({"lora_alpha": 1, "peft_type": "LOHA"}, "peft_type is 'LOHA', expected one of: 'LORA'"),
    "trained biases": ({"lora_alpha": 1, "bias": "lora_only"}, "bias is 'lora_only', expected one of: 'none'"),
    "layers of their own": ({"lora_alpha": 1, "modules_to_save": ["head"]}, "modules_to_save is ['head']"),
    "weights the other way round": ({"lora_alpha": 1, "fan_in_fan_out": True}, "fan_in_fan_out is true"),
    "an initialization that changes the model": (
        {"lora_alpha": 1, "init_lora_weights": "pissa"},
        "init_lora_weights is 'pissa', expected one of: true, false, 'gaussian', 'eva', 'orthogonal'",
    ),
    "a key of tomorrow": ({"lora_alpha": 1, "use_spiral": 3}, "use_spiral is 3, expected nothing"),
    "another rank": ({"lora_alpha": 1, "r": 8}, f"says rank 8 of {PROJ}, its tensors have 3"),
    "another rank by a pattern": ({"lora_alpha": 1, "r": 3, "rank_pattern": {"proj": 4}}, f"rank 4 of {PROJ}"),
    "no alpha": ({"r": 3}, "lora_alpha is null, expected a number above 0"),
    "a text": ({"lora_alpha": "16"}, "lora_alpha is '16', expected a number above 0"),
    "a negative alpha": ({"lora_alpha": -1}, "lora_alpha is -1, expected a number above 0"),
    "true": ({"lora_alpha": True}, "lora_alpha is true"),
    "half a rank": ({"lora_alpha": 1, "r": 1.5}, "r is 1.5, expected a whole number from 1"),
    "a flag in words": ({"lora_alpha": 1, "use_rslora": "yes"}, "use_rslora is 'yes', expected true or false"),
    "a pattern that is a list": ({"lora_alpha": 1, "alpha_pattern": [1]}, "alpha_pattern is [1], expected an object"),
    "a pattern of a text": (
        {"lora_alpha": 1, "alpha_pattern": {"proj": "2"}},
        "alpha_pattern of proj is '2', expected a number above 0",
    ),
    "a regular expression": (
        {"lora_alpha": 1, "alpha_pattern": {".*proj": 2}},
        "alpha_pattern has '.*proj', expected names of layers or their ends",
    ),
    "the end of a word": ({"lora_alpha": 1, "alpha_pattern": {"roj": 4}}, "'roj', which is none of its layers"),
    "a whole name that is an end": ({"lora_alpha": 1, "alpha_pattern": {"^proj": 4}}, "'^proj', which is none of its"),
    "a pattern of no layer": (
        {"lora_alpha": 1, "rank_pattern": {"fc1": 4}},
        "rank_pattern has 'fc1', which is none of its layers",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("beside_it", [False, True])
def test_a_configuration_of_something_else_is_refused_by_its_key(name: str, beside_it: bool, tmp_path: Path) -> None:
    config, says = CONFIGS[name]
    path = write(tmp_path / "adapter_model.safetensors", proj(), **({} if beside_it else config))
    if beside_it:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    line = refused(path)
    assert says in line
    assert str(tmp_path / "adapter_config.json" if beside_it else f"the metadata of {path}") in line


def test_of_alpha_in_tensors_and_in_a_configuration_neither_is_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "l.safetensors", proj() | {f"{PROJ}.alpha": torch.tensor(2.0)}, lora_alpha=4)
    assert "both state alpha" in refused(path)


@pytest.mark.parametrize(("text", "says"), [("{", "is no JSON"), ("[1]", "is [1], expected an object")])
def test_metadata_that_is_no_configuration_is_refused(text: str, says: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(proj(), tmp_path / "l.safetensors", {"lora_adapter_metadata": text})
    assert says in refused(tmp_path / "l.safetensors")


def test_a_configuration_of_a_text_encoder_alone_says_nothing_of_the_transformer(tmp_path: Path) -> None:
    config = {"transformer.lora_alpha": 6, "text_encoder.lora_alpha": 60, "text_encoder.use_dora": True}
    path = write(tmp_path / "l.safetensors", proj(), **config)
    merged = with_loras(small(), [Lora(path)])
    difference = merged.blocks[0].attn.proj.weight - small().blocks[0].attn.proj.weight
    torch.testing.assert_close(difference, torch.full((64, 64), 6.0))


def test_of_two_loras_the_first_is_not_merged_where_the_second_is_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good.safetensors", proj())
    for bad in (proj(inputs=32), CASES["NaN"].tensors(), CASES["numbers that overflow"].tensors()):
        model = small()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        path = write(tmp_path / "bad.safetensors", bad)
        refusal_of(lambda path=path, model=model: with_loras(model, [Lora(good), Lora(path)]), "")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["missing", "on the hub", "folder", "empty", "page"])
def test_what_is_no_file_of_weights_is_one_line_and_exit_code_2(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lora"
    says = {
        "missing": "no such LoRA",
        "on the hub": "nothing is downloaded",
        "folder": "is a folder, expected the file of a LoRA; give one in it: adapter_model.safetensors",
        "empty": "is an empty file",
        "page": "a page in HTML",
    }[kind]
    if kind == "folder":
        path.mkdir()
        write(path / "adapter_model.safetensors", proj())
    elif kind in ("empty", "page"):
        path.write_text("<html>" if kind == "page" else "")
    named = "someone/style-lora" if kind == "on the hub" else str(path)
    assert run(["compile", "digits", "--lora", named, "-o", str(tmp_path / "b")]) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("key", "split"),
    [
        ("a.lora_A.weight", ("a", "down")),
        ("a.lora_B.default_0.weight", ("a", "up")),
        ("a.b.lora_linear_layer.up.weight", ("a.b", "up")),
        ("a.processor.to_out_lora.down.weight", ("a.processor.to_out", "down")),
        ("a.lora.alpha", ("a", "alpha")),
        ("a.lora_A.bias", None),
        ("lora_A.weight", None),
    ],
)
def test_a_key_is_split_into_layer_and_part(key: str, split: tuple[str, str] | None) -> None:
    assert layer_and_part(key) == split


def test_a_flattened_name_that_two_layers_may_have_is_none_of_them() -> None:
    assert layer_named("lora_unet_a_b_c", ["a.b_c"]) == "a.b_c"
    assert layer_named("lora_unet_a_b_c", ["a.b_c", "a_b.c"]) is None


def test_a_name_of_the_model_s_own_is_taken_before_wrappers_are_taken_off() -> None:
    assert layer_named("model.proj", ["model.proj", "proj"]) == "model.proj"
    assert layer_named("model.proj", ["proj"]) == "proj"
    assert layer_named("unknown.proj", ["proj"]) is None
