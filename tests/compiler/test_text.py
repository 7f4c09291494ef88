"""Prompts on the way of a compile: conditions encoded from them, and text encoders as files of a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditc.compiler import driver, text
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.compiler.text import NO_TEXT, Text, export_text, text_of
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import CheckpointError, InputError
from ditc.exporter import onnx_files
from ditc.exporter.text_activations import watched_activations
from ditc.onnx_ports import read_ports
from ditc.progress import silent
from ditc.prompt_lists import PromptList
from tests.models.captioned import POOLED, TOKENS, WIDTH, Captioned, captioned, t5_encoder
from tests.models.token_mixer import MODELS, seeded


def texts(model: Any, given: Any = None, prompts: Any = None, wanted: bool = True) -> Text:
    return text_of(model, given, prompts, wanted=wanted, progress=silent)


def test_prompts_give_a_row_each_and_the_empty_one_the_null() -> None:
    encoded = texts(captioned(), prompts=["a cat", "two dogs", "a cat"]).encoded
    assert encoded is not None
    assert {name: array.shape for name, array in encoded.arrays.items()} == {
        "text": (3, TOKENS, WIDTH),
        "text_mask": (3, TOKENS),
        "pooled": (3, POOLED),
        "null_text": (1, TOKENS, WIDTH),
        "null_text_mask": (1, TOKENS),
        "null_pooled": (1, POOLED),
    }
    np.testing.assert_allclose(encoded.arrays["text"][0], encoded.arrays["text"][2], atol=1e-6)
    empty = texts(captioned(), prompts=[""]).encoded
    assert empty is not None
    np.testing.assert_allclose(encoded.arrays["null_text"], empty.arrays["text"], atol=1e-6)


def test_as_many_prompts_as_fit_the_bound_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    row_bytes = 4 * TOKENS * WIDTH + 8 * TOKENS + 4 * POOLED
    monkeypatch.setattr(text, "EXAMPLE_BYTES", 5 * row_bytes + 1)
    own = texts(captioned())
    assert own.prompts is not None
    assert len(own.prompts.prompts) == 5
    monkeypatch.setattr(text, "EXAMPLE_BYTES", 1)
    assert texts(captioned()).prompts.prompts == own.prompts.prompts[:1]  # type: ignore[union-attr]


class Asked(Captioned):
    """Says what it is typically asked for."""

    typical: Any = ("a red apple", "a rocket")

    def example_prompts(self) -> Any:
        return self.typical


def test_a_model_that_says_what_it_is_asked_for_is_compiled_on_that() -> None:
    model = seeded(Asked)
    own, others = texts(model).prompts, texts(model, prompts=["a cat"]).prompts
    assert own == PromptList(f"examples of {model.spec.name}", ("a red apple", "a rocket"))
    assert others == PromptList("a list", ("a cat",))


@pytest.mark.parametrize(
    ("typical", "message"),
    [((), "is an empty list"), (("one", 2), "found 2 in it"), (("two\nlines",), "one line, found 'two")],
)
def test_examples_that_are_no_prompts_are_refused(typical: Any, message: str) -> None:
    model = seeded(Asked)
    model.typical = typical
    with pytest.raises(CheckpointError, match=rf"^example_prompts\(\) of {model.spec.name}: .*{message}"):
        texts(model)


class Lazy(Captioned):
    """Loads its encoders when they are asked for, and counts how often."""

    loaded = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "text":
            super().__setattr__(name, value)

    @property
    def text(self) -> Any:
        Lazy.loaded += 1
        return (t5_encoder(),)


def test_encoders_are_loaded_once_and_only_where_they_are_wanted() -> None:
    model = Lazy()
    assert texts(model, wanted=False) is NO_TEXT
    assert Lazy.loaded == 0
    assert [spec.name for spec in texts(model, prompts=["a"]).specs] == ["t5"]
    assert Lazy.loaded == 1


@pytest.mark.parametrize("name", ["prompted", "video"])
def test_a_model_without_encoders_is_asked_for_none(name: str) -> None:
    """One has a layer that is called `text`."""
    assert texts(MODELS[name]()) is NO_TEXT
    with pytest.raises(InputError, match="has no text encoders to leave out"):
        texts(MODELS[name](), wanted=False)


def test_conditions_of_a_users_own_come_before_prompts() -> None:
    own = texts(captioned(), given={"text": np.zeros((1, TOKENS, WIDTH))})
    assert (len(own.encoders), own.encoded) == (2, None)


def test_an_encoder_that_gives_no_numbers_is_refused_by_its_module() -> None:
    model = captioned()
    with torch.no_grad():
        model.text[0].module.model.encoder.block[1].layer[1].DenseReluDense.wo.weight.fill_(1e38)
    with pytest.raises(CheckpointError, match=r"text encoder t5 gives NaN or infinity in model\.encoder"):
        texts(model, prompts=["a cat"])


def test_the_largest_activation_is_that_of_what_modules_read_and_return() -> None:
    encoder = t5_encoder()
    tokens = encoder.tokenization.tokens(["a cat", "two dogs"])
    with torch.no_grad():
        encoder.module.model.encoder.block[1].layer[1].DenseReluDense.wo.weight.mul_(1e7)
    with watched_activations(encoder.module) as largest:
        encoder.tensors(tokens.ids, tokens.mask)
    assert largest.value > 65504
    assert largest.path.startswith("model.encoder.block.1.layer.1")
    seen = largest.value
    encoder.tensors(tokens.ids * 0, tokens.mask)
    assert largest.value == seen  # nothing is watched any more


@pytest.mark.parametrize("threshold", [64, 1024])
def test_an_encoder_is_a_graph_with_its_weights_beside_it(
    threshold: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of more than the 2 GB that a file of ONNX may have; `benchmarks/text_memory.py` exports such."""
    monkeypatch.setattr(onnx_files, "INLINE_BYTES", threshold)
    own = texts(captioned(), prompts=["a cat"])
    export_text(own, OnnxRuntimeBackend(), tmp_path)
    measured = json.loads((tmp_path / "text.json").read_text())
    for encoder in own.encoders:
        graph = tmp_path / f"{encoder.spec.segment}.onnx"
        weights = sum(parameter.numel() * 4 for parameter in encoder.module.parameters())
        assert read_ports(graph).data == {f"{graph.name}.data"}
        assert (tmp_path / f"{graph.name}.data").stat().st_size > (0.9 if threshold < 100 else 0.5) * weights
        assert measured[encoder.name]["parity"] < 1e-4
        assert (tmp_path / encoder.spec.tokenizer).read_bytes() == encoder.json


def test_exports_keep_encoders_for_the_next_compile(
    tmp_path: Path, quick_options: CompileOptions, monkeypatch: pytest.MonkeyPatch, exports: Path
) -> None:
    settings = {"policy": "none", "precision": "fp32", "vc": "none", "steps": 2, "verify_images": 1}
    options = quick_options.model_copy(update=settings)
    first = compile_model(captioned(), tmp_path / "a", options, prompts=["a cat"], exports=tmp_path / "e")

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(driver, "export_text", never)
    monkeypatch.setattr(driver, "export", never)
    changed = options.model_copy(update={"cfg": 3.0})
    second = compile_model(captioned(), tmp_path / "b", changed, prompts=["a cat"], exports=tmp_path / "e")
    files = [name for name in first.manifest.files if name.startswith("text/")]
    assert len(files) == 6
    assert [first.manifest.files[name] for name in files] == [second.manifest.files[name] for name in files]
    monkeypatch.undo()
    without = compile_model(captioned(), tmp_path / "c", options, text=False, exports=tmp_path / "e")
    assert without.manifest.text is None
    assert "text" not in without.manifest.model_dump()


def test_a_bundle_of_a_users_conditions_takes_prompts_and_keeps_none(
    tmp_path: Path, quick_options: CompileOptions, exports: Path
) -> None:
    encoded = texts(captioned(), prompts=["a cat", "two dogs"]).encoded
    assert encoded is not None
    settings = {"policy": "none", "precision": "fp32", "vc": "none", "steps": 2, "verify_images": 1}
    options = quick_options.model_copy(update=settings)
    bundle = compile_model(captioned(), tmp_path / "b", options, conditions=encoded.arrays, exports=exports)
    assert (bundle.has_text, bundle.manifest.prompts, bundle.examples().prompts) == (True, None, ())
    assert bundle.examples().in_turn(0, 2).prompts == ()
    assert len(bundle.examples().arrays["text"]) == 2


def test_conditions_that_prompts_do_not_give_are_stated_given_or_drawn() -> None:
    from ditc.compiler.examples import examples_of

    model = captioned()
    model.text = model.text[:1]  # without the encoder of `pooled`
    encoded = texts(model, prompts=["a cat"]).encoded
    examples, assumed = examples_of(model, None, encoded)
    assert "what pooled, null_pooled typically hold is unknown" in assumed[0]
    assert (len(examples.arrays["pooled"]), examples.prompts) == (16, ("a cat",))
    pooled = {"pooled": np.ones((2, POOLED)), "null_pooled": np.zeros((1, POOLED))}
    examples, assumed = examples_of(model, pooled, encoded)
    assert (assumed, len(examples.arrays["pooled"]), len(examples.arrays["text"])) == ((), 2, 1)


def test_a_model_opened_by_name_gives_its_encoders_memory_back(
    tmp_path: Path, quick_options: CompileOptions, monkeypatch: pytest.MonkeyPatch, exports: Path
) -> None:
    from ditc.exporter import models

    opened: list[Captioned] = []

    def load(*_: Any, **__: Any) -> Captioned:
        opened.append(captioned())
        return opened[-1]

    monkeypatch.setattr(models, "load_model", load)
    settings = {"policy": "none", "precision": "fp32", "vc": "none", "steps": 2, "verify_images": 1}
    options = quick_options.model_copy(update=settings)
    bundle = compile_model("some:model", tmp_path / "b", options, exports=exports)
    assert all(not parameter.numel() for encoder in opened[0].text for parameter in encoder.module.parameters())
    counted = [encoder.parameters for encoder in bundle.manifest.text or ()]
    assert counted == [encoder.spec.parameters for encoder in captioned().text]
