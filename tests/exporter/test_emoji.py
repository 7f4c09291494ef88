"""The built-in text-to-image model: what its files hold is what it computes, by its own code and by ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ditc.cli.main import run
from ditc.errors import InputError
from ditc.exporter import emoji
from ditc.exporter.emoji import Emoji, builtin_emoji
from ditc.exporter.emoji_folder import emoji_from_tensors
from ditc.exporter.emoji_kinds import KINDS
from ditc.exporter.emoji_model import EmojiModel, text_ids
from ditc.exporter.emoji_rows import emoji_rows, typical_captions
from ditc.exporter.models import load_model
from ditc.exporter.protocol import check_decomposition
from ditc.exporter.text_encoders import text_of_model

PROMPTS = ("a red apple", "Waving hand, dark skin tone!", "")


@pytest.fixture(scope="module")
def model(emoji_files: Path) -> Emoji:
    return builtin_emoji()


@pytest.fixture(scope="module")
def trained(emoji_files: Path) -> EmojiModel:
    """The same as what trains it builds it."""
    return emoji_from_tensors(load_file(emoji_files / emoji.WEIGHTS))


@torch.no_grad()
def test_from_prompts_to_flow_it_is_the_model_that_was_trained(
    model: Emoji, trained: EmojiModel, emoji_files: Path
) -> None:
    from tokenizers import Tokenizer

    x, sigma = torch.randn(len(PROMPTS), 3, 32, 32), torch.tensor([0.1, 0.5, 1.0])
    tokenizer = Tokenizer.from_file(str(emoji_files / emoji.TOKENIZER))
    expected = trained(x, sigma, text_ids(tokenizer, PROMPTS))
    (encoder,) = text_of_model(model)
    tokens = encoder.tokenization.tokens(PROMPTS)
    (states,) = encoder.tensors(tokens.ids, tokens.mask)
    flow = model(x, 1000 * sigma, states, torch.from_numpy(tokens.mask))
    torch.testing.assert_close(flow, expected, atol=1e-5, rtol=0)
    assert float(expected.std()) > 0.05


def test_its_seams_hold(model: Emoji) -> None:
    check_decomposition(model)


def test_it_is_a_flow_of_pixels_asked_for_with_a_text(model: Emoji) -> None:
    spec = model.spec
    assert (spec.family, spec.latent_shape, spec.num_classes) == ("pixart", (3, 32, 32), None)
    assert (spec.diffusion.prediction, spec.sampler.name) == ("flow", "euler")
    assert [(each.name, each.shape, each.null) for each in spec.conditions] == [
        ("text", (20, 128), "given"),
        ("text_mask", (20,), "given"),
    ]
    assert spec.assumptions == spec.doubts == ()


def test_typical_captions_are_varied_from_the_first_on() -> None:
    captions, rows = typical_captions(), {row.caption: row for row in emoji_rows()}
    assert len(captions) == len({*captions}) > 450
    assert len({rows[caption].kind for caption in captions[:32]}) >= 10
    assert {rows[caption].kind for caption in captions} == {*KINDS}
    assert {rows[caption].side for caption in captions[:64]} == {"train", "held out"}
    shares = [sum(row.kind == kind for row in rows.values()) / len(rows) for kind in KINDS]
    own = [sum(rows[caption].kind == kind for caption in captions) / len(captions) for kind in KINDS]
    assert own == pytest.approx(shares, abs=0.012)


@pytest.mark.parametrize("absent", [emoji.WEIGHTS, emoji.TOKENIZER])
def test_a_package_without_its_files_says_so(
    absent: str, emoji_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in emoji_files.iterdir():
        if file.name != absent:
            (tmp_path / file.name).symlink_to(file)
    monkeypatch.setattr(emoji, "FOLDER", tmp_path)
    for command in (f"compile emoji -o {tmp_path / 'b'}", f"demo emoji -o {tmp_path / 'd'}"):
        assert run(command.split()) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.endswith(f"has no {absent} yet; in a clone `make train-emoji` makes both")


@pytest.mark.usefixtures("emoji_files")
def test_options_that_it_states_itself_are_refused() -> None:
    with pytest.raises(InputError, match="emoji states its heads, classes and process itself; leave out --heads"):
        load_model("emoji", num_heads=6)
