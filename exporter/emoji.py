"""The built-in text-to-image model: a small PixArt that draws Noto's emoji from prompts (card: exporter/emoji.md)."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

from ditc.errors import InputError
from ditc.exporter.emoji_folder import emoji_from_tensors
from ditc.exporter.emoji_model import MAX_TOKENS, TEXT_ENCODER
from ditc.exporter.emoji_rows import typical_captions
from ditc.exporter.pixart import PixArt
from ditc.exporter.sit import FLOW_SAMPLER
from ditc.exporter.text_encoders import TextEncoder
from ditc.exporter.text_modules import EncoderModule, import_transformers
from ditc.spec import DiffusionSpec

__all__ = ["EMOJI", "Emoji", "builtin_emoji"]

EMOJI = "emoji"
FOLDER: Any = files("ditc.exporter")  # of its two files
WEIGHTS, TOKENIZER = "emoji.safetensors", "emoji_tokenizer.json"


class Emoji(PixArt):
    """The model with its text encoder, and captions of its training for who names no prompts."""

    def __init__(self, transformer: Any, encoder: TextEncoder) -> None:
        super().__init__(
            transformer,
            name=EMOJI,
            text_tokens=MAX_TOKENS,
            diffusion=DiffusionSpec(prediction="flow", learned_sigma=False),
        )
        self.sampler = FLOW_SAMPLER
        self._text = (encoder,)  # a tuple, so that its weights are not the transformer's

    @property
    def text(self) -> tuple[TextEncoder, ...]:
        """The text encoder that was trained with the transformer."""
        return self._text

    def example_prompts(self) -> tuple[str, ...]:
        """Return captions of the pictures, of all kinds."""
        return typical_captions()


def builtin_emoji() -> Emoji:
    """Open the model from the files of the package. Raises InputError where they are not there, or what reads them."""
    if absent := [name for name in (WEIGHTS, TOKENIZER) if not (FOLDER / name).is_file()]:
        raise InputError(
            f"{EMOJI} is still being trained, and the package has no {' and no '.join(absent)} yet; in a clone "
            "`make train-emoji` makes both"
        )
    import_transformers()
    try:
        from diffusers.models.attention_processor import AttnProcessor2_0
    except ImportError as e:
        raise InputError(f"{EMOJI} needs diffusers; install it with: pip install 'ditc[export]'") from e
    from safetensors.torch import load_file

    with as_file(FOLDER / WEIGHTS) as path:
        model = emoji_from_tensors(load_file(path))
    network: Any = model.transformer
    processor: Any = AttnProcessor2_0  # as diffusers runs it; training takes plain products
    network.set_attn_processor(processor())
    encoder = TextEncoder(
        name="t5",
        module=EncoderModule(model.text_encoder, ("last",), masked=True),
        tokenizer=(FOLDER / TOKENIZER).read_bytes(),
        length=MAX_TOKENS,
        vocabulary=TEXT_ENCODER["vocab_size"],
        gives=("text",),
        mask="text_mask",
        kind=type(model.text_encoder).__name__,
    )
    return Emoji(network, encoder).eval()
