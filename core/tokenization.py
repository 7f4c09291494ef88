"""Prompts to tokens, by the `tokenizers` library alone and from one JSON file: the same here and at the compile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.errors import BundleError, InputError
from ditc.text_spec import CLEANINGS, TextSpec

__all__ = ["Tokenization", "Tokens"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The ids and the attention mask of some prompts, int64 (n, length), and of each the words that were cut off."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    cut: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Tokenization:
    """An open tokenizer, which cuts as many tokens as its encoder reads; any number of threads may use it."""

    spec: TextSpec
    tokenizer: Any

    @staticmethod
    def of(json: bytes, spec: TextSpec, where: str) -> Tokenization:
        """Open a tokenizer.json, given as its bytes; `where` says in messages whose it is.

        Raises BundleError where it is none, and InputError where the library is not installed.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError as e:
            raise InputError(
                "prompts need the package tokenizers; install it with: pip install 'ditc[text]', or give embeddings "
                "instead"
            ) from e
        try:
            tokenizer = Tokenizer.from_buffer(json)
            tokenizer.no_padding()
            tokenizer.enable_truncation(max_length=spec.length)
        except Exception as e:  # the library raises plain exceptions
            raise BundleError(f"{where} is no tokenizer that this release of tokenizers reads ({e})") from e
        return Tokenization(spec, tokenizer)

    @property
    def highest_id(self) -> int:
        """The largest id that it may give."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=0)

    def tokens(self, prompts: Sequence[str]) -> Tokens:
        """Return the tokens of prompts, cleaned, with special tokens, cut or filled up to the encoder's length."""
        spec, clean = self.spec, CLEANINGS[self.spec.cleaning]
        ids = np.full((len(prompts), spec.length), spec.pad_id, np.int64)
        mask = np.zeros_like(ids)
        cut = []
        for row, prompt in enumerate(map(clean, prompts)):
            encoding = self.tokenizer.encode(prompt)
            count = len(encoding.ids)
            places = slice(0, count) if spec.padding_side == "right" else slice(spec.length - count, spec.length)
            ids[row, places], mask[row, places] = encoding.ids, encoding.attention_mask
            end = max((end for _, end in encoding.offsets), default=0)
            cut.append(prompt[end:].strip() if encoding.overflowing else "")
        return Tokens(ids, mask, tuple(cut))
