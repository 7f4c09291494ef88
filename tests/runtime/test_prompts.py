"""Laws of bundles that take prompts, and what is said where one is asked for in another way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ditc
from ditc.bundle import Bundle, open_bundle, seal_bundle
from ditc.cli.main import run
from ditc.compiler.options import CompileOptions
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import AdviceWarning, BundleError, InputError
from ditc.exporter.shipped_prompts import shipped_prompts
from ditc.manifest import Manifest
from ditc.requests import Request
from ditc.runtime import prompts as prompts_module
from ditc.runtime.closeness import relative_error
from ditc.runtime.executor import seeded_request
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.reference_run import GuidedRun
from ditc.speed.eager import eager_forward
from ditc.tables import sampler_columns
from tests.models.captioned import TOKENS, WIDTH, captioned
from tests.models.token_mixer import MODELS
from tests.runtime.test_executors import IN_HOST_MEMORY, PlayedDevice

PROMPTS = ["A cat ", "two dogs", "", "a cat"]
SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"policy": "fora:2", "vc": "std"},
    "none": {"policy": "none", "precision": "fp32", "vc": "none"},
    "unguided": {"policy": "none", "precision": "fp32", "vc": "none", "cfg": 1.0},
}


@pytest.fixture(scope="session")
def compiled(compiled_once: Callable[..., Bundle], quick_options: CompileOptions) -> Callable[[str], Bundle]:
    return lambda settings: compiled_once(captioned(), quick_options.model_copy(update=SETTINGS[settings]))


@pytest.fixture
def pipe(compiled: Callable[[str], Bundle]) -> Iterator[Pipeline]:
    with ditc.load(compiled("int8").path) as pipe:
        yield pipe


def encoded_by_torch(prompts: list[str], null: bool = False) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for encoder in captioned().text:
        tokens = encoder.tokenization.tokens(prompts)
        arrays |= zip(encoder.gives, (t.numpy() for t in encoder.tensors(tokens.ids, tokens.mask)), strict=True)
        arrays |= {} if encoder.mask is None else {encoder.mask: tokens.mask}
    return {f"null_{name}" if null else name: array for name, array in arrays.items()}


def test_prompts_give_what_torch_gives_with_its_own_encoders(compiled: Callable[[str], Bundle]) -> None:
    """Tokens, encoders, guidance and every step as in a loop around the torch modules."""
    bundle = compiled("none")
    guided = GuidedRun.of(bundle)
    arrays = encoded_by_torch(PROMPTS) | encoded_by_torch(["ugly"] * 4, null=True)
    request, noise, fresh = seeded_request(guided.spec, Request(4, arrays), 3, 0, 6)
    rows = guided.guidance.row_conditions(request)
    forward = eager_forward(captioned(), sampler_columns(bundle.tables())["t"], rows, torch.float32)
    with ditc.load(bundle.path, check=True) as pipe:
        own = pipe.latents(prompt=PROMPTS, negative_prompt="ugly", seed=3)
    assert relative_error(own, guided.last(forward, noise, fresh)) < 1e-4


def test_examples_are_encoded_from_prompts_that_the_bundle_keeps(compiled: Callable[[str], Bundle]) -> None:
    bundle = compiled("int8")
    assert bundle.examples().prompts == shipped_prompts()
    assert bundle.manifest.prompts is not None
    assert (bundle.manifest.prompts.source, bundle.manifest.prompts.count) == ("the shipped list", 120)
    request = bundle.examples().in_turn(118, 4)
    assert request.prompts == (*shipped_prompts()[118:], *shipped_prompts()[:2])
    expected = encoded_by_torch(list(request.prompts)) | encoded_by_torch([""] * 4, null=True)
    for name, array in expected.items():
        np.testing.assert_allclose(request.arrays[name], array, atol=1e-5)
    assert len(bundle.examples().arrays["null_text"]) == 1
    with ditc.load(bundle.path) as pipe:
        own = pipe.encoders.arrays(request.prompts)
    assert relative_error(own["text"], request.arrays["text"]) < 1e-5
    assert np.array_equal(own["text_mask"], request.arrays["text_mask"])


def test_a_prompt_gives_what_it_gives_alone(compiled: Callable[[str], Bundle]) -> None:
    """Its encoders bit for bit, whatever else is asked for before it or at the same time."""
    path = compiled("none").path
    with ditc.load(path) as pipe, ditc.load(path) as fresh, ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda prompt: fresh.encoders.arrays([prompt])["text"], PROMPTS * 2))
        assert np.array_equal(np.concatenate(results), pipe.encoders.arrays(PROMPTS * 2)["text"])
        together = pipe.latents(prompt=PROMPTS, seeds=[1, 2, 3, 1])
        alone = [pipe.latents(prompt=prompt, seeds=[seed]) for prompt, seed in zip(PROMPTS, [1, 2, 3, 1], strict=True)]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=0, atol=1e-5 * np.abs(together).max())


def test_prompts_are_cleaned_and_the_empty_negative_is_the_default(pipe: Pipeline) -> None:
    arrays = pipe.encoders.arrays(PROMPTS)
    assert np.array_equal(arrays["text"][0], arrays["text"][3])  # of T5 alone; CLIP's own tokenizer lowers
    plain = pipe.latents(prompt="a cat", seed=1)
    assert np.array_equal(plain, pipe.latents(prompt="a cat", negative_prompt="", seed=1))
    assert np.array_equal(plain, pipe.latents(prompt=["a cat"], negative_prompt=[""], seed=1))
    assert relative_error(pipe.latents(prompt="a cat", negative_prompt="ugly", seed=1), plain) > 1e-3


def test_one_prompt_is_for_as_many_images_as_anything_says(pipe: Pipeline) -> None:
    assert len(pipe.latents(prompt="a cat")) == 1
    assert len(pipe.latents(prompt="a cat", count=3)) == 3
    assert len(pipe.latents(prompt="a cat", seeds=[1, 2])) == 2
    assert len(pipe.latents(prompt="a cat", negative_prompt=["x", "y"])) == 2
    assert len(pipe.latents(prompt="a cat", noise=np.zeros((2, 3, 4, 4), np.float32))) == 2
    *_, event = pipe.generate(prompt=("a", "b"), seed=2)
    assert np.array_equal(event.x, pipe.latents(prompt=("a", "b"), seed=2))
    assert pipe.request(prompt="a", count=2).prompts == ("a", "a")


def test_an_encoder_runs_once_for_each_distinct_prompt(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    run_one = prompts_module._Encoder.encoded
    monkeypatch.setattr(
        prompts_module._Encoder, "encoded", lambda self, prompt: (encoded.append(prompt), run_one(self, prompt))[1]
    )
    pipe.latents(prompt=["a", "b", "a"], seed=0)
    pipe.latents(prompt=["b", "c"], seed=0)
    assert sorted(encoded) == sorted(["a", "b", "", "c"] * 2)  # two encoders
    size = sum(array[0].nbytes for array in pipe.encoders.arrays(["a"]).values())
    monkeypatch.setattr(prompts_module, "KEPT_BYTES", 2 * size)
    for prompt in ("d", "e", "d", "f"):
        pipe.encoders.arrays([prompt])
    assert list(pipe.encoders._kept) == ["d", "f"]  # the last ones that were asked for


def test_embeddings_may_be_given_in_place_of_prompts_and_open_no_encoder(compiled: Callable[[str], Bundle]) -> None:
    arrays = encoded_by_torch(["a cat"]) | encoded_by_torch([""], null=True)
    positive = {name: array for name, array in arrays.items() if not name.startswith("null_")}
    with ditc.load(compiled("none").path) as pipe:
        own = pipe.latents(conditions=arrays, seed=1)
        assert pipe.encoders._encoders is None
        assert relative_error(own, pipe.latents(prompt="a cat", seed=1)) < 1e-4
        mixed = pipe.latents(conditions=positive, negative_prompt="ugly", seed=1)
        assert relative_error(mixed, pipe.latents(prompt="a cat", negative_prompt="ugly", seed=1)) < 1e-4


def test_a_long_prompt_is_cut_aloud(pipe: Pipeline) -> None:
    long = "a red fox asleep in fresh snow under an old tree by the river"
    with pytest.warns(AdviceWarning, match=r"t5 reads 12 tokens of a prompt: '.*river' is cut off; shorten it"):
        pipe.request(prompt=long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.request(prompt="a fox")


def test_a_device_gives_what_the_processor_gives(compiled: Callable[[str], Bundle]) -> None:
    images = []
    for backend in (OnnxRuntimeBackend(), PlayedDevice(IN_HOST_MEMORY)):
        with Pipeline(compiled("none"), backend=backend) as pipe:
            images.append(pipe.images(prompt=PROMPTS, seed=5))
    assert relative_error(*images) < 1e-5


ONE = np.zeros((1, TOKENS, WIDTH), np.float32)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "was asked for no prompt; give prompt=, or embeddings as conditions="),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": 3}, "prompt must be a text or a list of texts, found int"),
        ({"prompt": ["a", None]}, "prompt must be a text or a list of texts, found None in it"),
        ({"prompt": "a", "negative_prompt": 3}, "negative_prompt must be a text or a list of texts, found int"),
        ({"prompt": ["a", "b"], "count": 3}, "prompt needs a text for each image: there are 3, found 2"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "negative_prompt needs a text for each image"),
        ({"prompt": "a", "conditions": {"text": ONE}}, "'text' comes from prompt, and was given as a condition too"),
        (
            {"prompt": "a", "negative_prompt": "b", "conditions": {"null_text": ONE}},
            "'null_text' comes from negative_prompt, and was given as a condition too",
        ),
        ({"negative_prompt": "a"}, "needs 'text' and 'text_mask' and 'pooled' of every image"),
        ({"prompt": "a", "labels": [1]}, "has no classes, found the labels"),
        ({"prompt": "a", "conditions": [1]}, "conditions must be arrays by name, found list"),
        ({"conditions": {"text": ONE[:, 1:]}}, r"condition 'text' must be float32 of shape \(n, 12, 16\), found"),
        ({"conditions": {"text": ONE.astype(bool)}}, "condition 'text' must be float32 of shape"),
        ({"conditions": {"text_mask": np.full((1, TOKENS), 2)}}, "condition 'text_mask' holds 2 to 2, expected 0 to 1"),
        ({"labels": Request(1, {}), "prompt": "a"}, "a whole request says its conditions and its count itself"),
        ({"prompt": "a", "seeds": [1], "count": 2}, "seed"),
    ],
)
def test_a_request_that_does_not_fit_is_one_line(given: dict[str, Any], told: str, pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=told) as refused:
        pipe.latents(**given)
    assert "\n" not in str(refused.value)


def test_a_negative_prompt_without_guidance_is_refused(compiled: Callable[[str], Bundle]) -> None:
    with ditc.load(compiled("unguided").path) as pipe:
        with pytest.raises(InputError, match="guidance is 1, so a negative prompt changes nothing"):
            pipe.latents(prompt="a", negative_prompt="b")
        assert len(pipe.latents(prompt=["a", "b"])) == 2
        assert set(pipe.encoders._kept) == {"a", "b"}


def test_a_model_of_classes_or_arrays_takes_no_prompts(
    bundles: dict[str, Bundle], compiled_once: Callable[..., Bundle], quick_options: CompileOptions
) -> None:
    options = quick_options.model_copy(update={"policy": "fora:2", "precision": "fp32", "vc": "none", "cfg": 1.5})
    arrays = compiled_once(MODELS["prompted"](), options)
    for bundle, names in ((bundles["cached"], "'y'"), (arrays, "'text' and 'null_text'")):
        with ditc.load(bundle.path) as pipe, pytest.raises(InputError, match=f"takes no prompts.* {names}; leave"):
            pipe.latents(prompt="a cat")


def test_prompts_without_the_library_say_what_to_install(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        InputError, match=r"prompts need the package tokenizers; install it with: pip install 'ditc\[te"
    ):
        pipe.latents(prompt="a cat")


def test_prompts_are_read_without_torch_and_transformers(compiled: Callable[[str], Bundle]) -> None:
    absent = ("torch", "onnx", "onnx_ir", "transformers", "sentencepiece", "diffusers", "sklearn")
    code = f"import sys\nfor name in {absent!r}: sys.modules[name] = None\nimport ditc\n"
    code += f"with ditc.load({str(compiled('int8').path)!r}, check=True) as pipe: print(pipe.images(prompt='a').shape)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "(1, 3, 4, 4)"), done.stderr


def test_a_deployment_may_leave_the_encoders_out(compiled: Callable[[str], Bundle], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compiled("int8").path, tmp_path / "b"))
    shutil.rmtree(folder / "text")
    arrays = encoded_by_torch(["a cat"]) | encoded_by_torch([""], null=True)
    with ditc.load(folder, check=True) as pipe:
        assert len(pipe.latents(conditions=arrays)) == 1
        with pytest.raises(InputError, match="is here without its folder text/; copy it too, or give embeddings"):
            pipe.latents(prompt="a cat")


def resealed(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    seal_bundle(folder, Manifest.model_validate(manifest | changes))


def encoder_with(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    first, *others = json.loads((folder / "manifest.json").read_text())["text"]
    return [first | changes, *others]


CONTRADICTIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shape": (lambda folder: resealed(folder, text=encoder_with(folder, length=13)), "is the attention mask of text"),
    "ports": (
        lambda folder: resealed(folder, text=encoder_with(folder, length=13, mask=None)),
        r"text/text\.t5\.onnx: it takes 'input_ids' of shape \(batch, 12\)",
    ),
    "name": (lambda folder: resealed(folder, text=encoder_with(folder, name="other")), "text.other.onnx"),
    "condition": (lambda folder: resealed(folder, text=encoder_with(folder, gives=["words"])), "gives 'words'"),
    "prompts": (
        lambda folder: ((folder / "prompts.txt").write_text("one\n"), resealed(folder)),
        r"prompts\.txt holds 1 prompts, the manifest says 120",
    ),
    "origin": (lambda folder: resealed(folder, prompts=None), r"lists 'prompts\.txt', and it says of no prompts"),
    "none": (lambda folder: resealed(folder, text=None), "compiled with prompts, and has no text encoder"),
    "tokenizer": (
        lambda folder: ((folder / "text" / "tokenizer.t5.json").unlink(), resealed(folder)),
        r"needs text/tokenizer\.t5\.json",
    ),
    "foreign": (
        lambda folder: (shutil.copy(folder / "text" / "text.t5.onnx", folder / "text" / "more.onnx"), resealed(folder)),
        r"lists 'text/more\.onnx', which no program calls",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_bundle_that_contradicts_itself_is_refused(
    name: str, compiled: Callable[[str], Bundle], tmp_path: Path
) -> None:
    change, told = CONTRADICTIONS[name]
    folder = Path(shutil.copytree(compiled("int8").path, tmp_path / "b"))
    change(folder)
    with pytest.raises(BundleError, match=told):
        open_bundle(folder)


@pytest.mark.parametrize("file", ["tokenizer.t5.json", "text.t5.onnx.data"])
def test_a_changed_byte_of_an_encoder_is_refused(file: str, compiled: Callable[[str], Bundle], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compiled("int8").path, tmp_path / "b"))
    content = bytearray((folder / "text" / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "text" / file).write_bytes(content)
    with pytest.raises(BundleError, match=f"damaged: text/{file} does not match"):
        open_bundle(folder)


def test_an_encoder_that_gives_something_else_here_is_noticed(
    compiled: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(compiled("int8").path)
    assert run(["doctor", path]) == 0
    assert "segment text.t5" in capsys.readouterr().out
    run_one = prompts_module._Encoder.encoded

    def other(self: Any, prompt: str) -> Any:
        given, cut = run_one(self, prompt)
        return {name: array * 1.01 for name, array in given.items()}, cut

    monkeypatch.setattr(prompts_module._Encoder, "encoded", other)
    with ditc.load(path) as pipe:
        assert [each.segment for each in pipe.differences() if not each.is_rounding] == ["text.t5", "text.clip"]


def test_pictures_say_their_prompts(
    compiled: Callable[[str], Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = str(compiled("int8").path), tmp_path / "o"
    asked = ["--prompt", "お茶", "--prompt", "", "--negative", "ugly", "-n", "2", "--seed", "4", "-o", str(out)]
    assert run(["run", path, *asked]) == 0
    texts = [Image.open(out / f"{name}.png").text for name in ("0001", "0002", "grid")]  # type: ignore[attr-defined]
    assert [text.get("ditc.prompt") for text in texts] == ["お茶", "", None]
    assert json.loads(texts[2]["ditc.prompts"]) == ["お茶", "お茶", "", ""]
    assert {text["ditc.negative"] for text in texts} == {"ugly"}
    (tmp_path / "p.txt").write_text("a cat\ntwo dogs\n")
    assert run(["run", path, "--prompts", str(tmp_path / "p.txt"), "-o", str(out / "file")]) == 0
    assert run(["run", path, "-n", "2", "-o", str(out / "own")]) == 0
    names = ("file/0001", "own/0001")
    own = [Image.open(out / f"{name}.png").text["ditc.prompt"] for name in names]  # type: ignore[attr-defined]
    assert own == ["two dogs", shipped_prompts()[1]]
    with ditc.load(path) as pipe:
        pixels = np.asarray(Image.open(out / "file" / "0000.png"))
        image = pipe.images(prompt=["a cat", "two dogs"], seed=0)[0]
    assert np.array_equal(pixels, np.moveaxis(np.round((image + 1) * 127.5).astype(np.uint8), 0, -1))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "say what to make: --prompt TEXT, --conditions FILE with"),
        (["--labels", "1"], "has no classes, found the labels [1]"),
        (["--prompt", "a", "--prompts", "p.txt"], "--prompt and --prompts both name prompts"),
        (["--prompts", "nowhere.txt"], "can't read prompts from nowhere.txt"),
        (["--negative", "ugly"], "needs 'text' and 'text_mask' and 'pooled' of every image"),
    ],
)
def test_a_command_line_that_does_not_fit_is_one_line(
    arguments: list[str],
    told: str,
    compiled: Callable[[str], Bundle],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["run", str(compiled("int8").path), *arguments, "-o", str(tmp_path / "o")]) == 2
    message = capsys.readouterr().err
    assert told in message
    assert message.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_prompt_for_a_model_of_classes_is_one_line(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(bundles["cached"].path)
    assert run(["run", path, "--labels", "1", "--prompt", "a cat", "-o", str(tmp_path / "o")]) == 2
    assert "takes no prompts, it is asked for with 'y'; leave prompts out" in capsys.readouterr().err
