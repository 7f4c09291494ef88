"""The built-in text-to-image model: its transformer, its text encoder and its tokenizer, as diffusers' and
transformers' own classes. What trains it and what loads it both build it here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "MAX_TOKENS",
    "EmojiModel",
    "TextIds",
    "build_emoji_model",
    "float16_bytes",
    "initialize_weights",
    "load_float16",
    "text_ids",
    "train_tokenizer",
]

MAX_TOKENS = 20
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"  # 0, 1 and 2, as T5's
TEXT_WIDTH = 128

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 8,
    "cross_attention_dim": 192,
    "sample_size": 32,
    "patch_size": 4,
    "caption_channels": TEXT_WIDTH,
    "use_additional_conditions": False,
}
TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 2048,
    "d_model": TEXT_WIDTH,
    "d_kv": 32,
    "num_heads": 4,
    "d_ff": 256,
    "num_layers": 3,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
TRAIN_STEPS = 1000  # timesteps are sigma * 1000, as FlowMatchEulerDiscreteScheduler hands them on


@dataclass(frozen=True)
class TextIds:
    """Tokens of captions, (n, 20), and the mask of those that are no padding, both int64."""

    ids: Tensor
    mask: Tensor

    def rows(self, index: Tensor) -> TextIds:
        """Return some of the captions."""
        return TextIds(self.ids[index], self.mask[index])


class EmojiModel(nn.Module):
    """Predict the flow, noise - picture, from a noisy picture, its sigma and the tokens of its caption."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder

    def forward(self, x: Tensor, sigma: Tensor, text: TextIds) -> Tensor:
        """Return the flow, (n, 3, 32, 32), at `x` of the same shape with `sigma` (n,) in [0, 1]."""
        states = self.text_encoder(input_ids=text.ids, attention_mask=text.mask).last_hidden_state
        flow: Tensor = self.transformer(
            x,
            encoder_hidden_states=states,
            timestep=sigma * TRAIN_STEPS,
            encoder_attention_mask=text.mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return flow


def build_emoji_model(transformer: dict[str, Any] = TRANSFORMER, text: dict[str, Any] = TEXT_ENCODER) -> EmojiModel:
    """Build the two networks with random weights; attention is plain matrix products, whose gradient is the fastest."""
    from diffusers import PixArtTransformer2DModel
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import T5Config, T5EncoderModel

    pixart: Any = PixArtTransformer2DModel  # typed here and there
    network = pixart(**transformer)
    network.set_attn_processor(AttnProcessor())
    return EmojiModel(network, T5EncoderModel(T5Config(**text)))


def float16_bytes(model: EmojiModel) -> bytes:
    """Return the weights as a safetensors file in float16; a tensor that two layers share is there once."""
    from safetensors.torch import save

    return bytes(save({name: p.detach().half().contiguous() for name, p in model.named_parameters()}))


def load_float16(model: EmojiModel, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of such a file, all of them, into a model that computes in float32."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys(), sorted(parameters.keys() ^ tensors.keys())
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[name])


def initialize_weights(model: EmojiModel) -> None:
    """Initialize the transformer as PixArt's authors do: Xavier, the text's way in and the last layer at zero.

    The text encoder keeps the initialization of its own class.
    """
    network: Any = model.transformer
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patch = network.pos_embed.proj.weight
    nn.init.xavier_uniform_(patch.data.view(patch.shape[0], -1))
    nn.init.zeros_(network.pos_embed.proj.bias)
    embedder = network.adaln_single.emb.timestep_embedder
    for layer in (embedder.linear_1, embedder.linear_2, network.adaln_single.linear):
        nn.init.normal_(layer.weight, std=0.02)
    for layer in (network.caption_projection.linear_1, network.caption_projection.linear_2):
        nn.init.normal_(layer.weight, std=0.02)
    for block in network.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
    nn.init.zeros_(network.proj_out.weight)


def train_tokenizer(captions: Sequence[str], size: int = TEXT_ENCODER["vocab_size"]) -> Any:
    """Train a tokenizer of at most `size` pieces on captions: lower case, no accents, no punctuation, T5's markers.

    It is a tokenizers.Tokenizer that pads and cuts to 20 tokens.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("['\u2019]"), ""),
            normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, EOS, UNKNOWN],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(pad_id=0, pad_token=PAD, length=MAX_TOKENS)
    return tokenizer


def text_ids(tokenizer: Any, captions: Sequence[str]) -> TextIds:
    """Return the tokens of captions, (n, 20), with their mask; the empty caption is the end marker alone."""
    encodings = tokenizer.encode_batch(list(captions))
    return TextIds(
        torch.tensor([encoding.ids for encoding in encodings]),
        torch.tensor([encoding.attention_mask for encoding in encodings]),
    )
