"""LoRAs as they are named: a file, perhaps with a weight; what is neither is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

import ditc
from ditc.errors import InputError
from ditc.loras import Lora, MergedLora, lora_from_text, loras_from


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("style.safetensors", Lora(Path("style.safetensors"))),
        ("style.safetensors:0.8", Lora(Path("style.safetensors"), 0.8)),
        ("a:b/style.pt:-2", Lora(Path("a:b/style.pt"), -2.0)),
        ("style.safetensors:1e-1", Lora(Path("style.safetensors"), 0.1)),
    ],
)
def test_a_text_names_a_file_and_perhaps_a_weight(text: str, lora: Lora) -> None:
    assert lora_from_text(text) == lora


def test_a_file_whose_name_has_a_colon_is_taken_as_it_is(tmp_path: Path) -> None:
    odd = tmp_path / "step:1000"
    assert lora_from_text(str(odd)) == Lora(tmp_path / "step", 1000.0)
    odd.touch()
    assert lora_from_text(str(odd)) == Lora(odd)
    assert lora_from_text(f"{odd}:0.5") == Lora(odd, 0.5)


def test_python_names_them_as_texts_paths_or_with_their_weights() -> None:
    named = loras_from(["a.pt:0.5", Path("b:2"), ditc.Lora(Path("c.pt"), 3)])
    assert named == (Lora(Path("a.pt"), 0.5), Lora(Path("b:2")), Lora(Path("c.pt"), 3))
    assert loras_from("a.pt:0.5") == named[:1]
    assert loras_from(()) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.pt:strong", "--lora must be FILE or FILE:WEIGHT, found 'a.pt:strong': 'strong' is no number"),
        ("a.pt:", "'' is no number"),
        ("a.pt:nan", "--lora a.pt:nan: that weight is not finite"),
        ("a.pt:inf", "that weight is not finite"),
        ("a.pt:0", "--lora a.pt:0: that weight would change nothing; leave it out"),
    ],
)
def test_a_weight_that_is_no_number_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        lora_from_text(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("weight", ["0.5", None, True])
def test_from_python_too(weight: object) -> None:
    with pytest.raises(InputError, match="the weight of a LoRA must be a number"):
        Lora(Path("a.pt"), weight)  # type: ignore[arg-type]


def test_other_things_are_no_loras() -> None:
    with pytest.raises(InputError, match=r"a LoRA is FILE, FILE:WEIGHT or ditc.Lora\(path, weight\), found 3"):
        loras_from([3])  # type: ignore[list-item]


def test_the_line_about_a_merged_one_names_file_bytes_weight_and_layers() -> None:
    merged = MergedLora(file="a.pt", sha256="0123456789abcdef" * 4, weight=0.8, layers=1)
    assert merged.told == "LoRA a.pt (SHA-256 0123456789abcdef), weight 0.8, into 1 layer"
    assert merged.model_copy(update={"layers": 12}).told.endswith("into 12 layers")
