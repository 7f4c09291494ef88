"""Tokenizers of pipelines to a tokenizer.json that `tokenizers` reads alone, held to those that diffusers would use.

Files of T5 are often a SentencePiece model only. transformers turns it into such a file; that the ids stay what
SentencePiece gives is checked on varied prompts, as is that cutting and filling up are those of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ditc.choices import PaddingSide
from ditc.errors import CheckpointError, InputError, one_line
from ditc.exporter.shipped_prompts import shipped_prompts
from ditc.exporter.text_modules import import_transformers, quiet_transformers
from ditc.text_spec import CLEANINGS, TextSpec
from ditc.tokenization import Tokenization

__all__ = ["CONVERSION_PROMPTS", "TokenizerFile", "check_tokenizer", "tokenizer_of_folder"]

SENTENCEPIECE = "spiece.model"
KINDS = ("T5Tokenizer", "T5TokenizerFast", "CLIPTokenizer", "CLIPTokenizerFast")
# beside the shipped prompts: spaces, marks, scripts and tokens that converters have stumbled over
CONVERSION_PROMPTS = (
    " ",
    "  two  spaces,\ta tab",
    "line\nbreak",
    "don't; it's 3.14% of \u201cquotes\u201d \u2014 and #tags @you",
    "A" * 300,
    "\u00bd \ufb01 \uff21\uff22 e\u0301 \u2126",
    "emoji \U0001f63a\U0001f3fd\u200d\U0001f680",
    "zero\u200bwidth\u00a0space",
)


class TokenizerFile:
    """A tokenizer of transformers from a pipeline's folder, and the same as the bytes of a tokenizer.json."""

    def __init__(self, home: Path, kind: str) -> None:
        self.home, self.kind = home, kind
        self.tokenizer = _opened(home, kind)
        self.json: bytes = self.tokenizer.backend_tokenizer.to_str().encode()

    @property
    def pad_id(self) -> int:
        """The id that fills up a prompt."""
        pad_id = self.tokenizer.pad_token_id
        if pad_id is None:
            raise CheckpointError(f"{self.home} has no token to fill up with; expected a pad_token of its {self.kind}")
        return int(pad_id)

    @property
    def padding_side(self) -> PaddingSide:
        """The side on which a prompt is filled up."""
        return "left" if self.tokenizer.padding_side == "left" else "right"


def tokenizer_of_folder(home: Path, kind: str) -> TokenizerFile:
    """Open a pipeline's tokenizer. Raises CheckpointError where it is missing or of another class."""
    if kind not in KINDS:
        raise CheckpointError(f"unknown class of a tokenizer {kind!r}; choose one of: {', '.join(KINDS)}")
    if not home.is_dir():
        raise CheckpointError(
            f"there is no {home}, where the {kind} of the pipeline should lie; copy it, or compile with --no-text and "
            "give embeddings"
        )
    return TokenizerFile(home, kind)


def check_tokenizer(file: TokenizerFile, spec: TextSpec) -> None:
    """Raise CheckpointError unless `tokenizers` alone gives the ids that transformers gives, and SentencePiece."""
    prompts = (*shipped_prompts(), *CONVERSION_PROMPTS)
    own = Tokenization.of(file.json, spec, str(file.home)).tokens(prompts)
    with quiet_transformers():
        theirs = file.tokenizer(
            [CLEANINGS[spec.cleaning](prompt) for prompt in prompts],
            padding="max_length",
            max_length=spec.length,
            truncation=True,
        )
    _check_same(file, prompts, own.ids, theirs["input_ids"], "transformers")
    _check_same(file, prompts, own.mask, theirs["attention_mask"], "transformers")
    if (file.home / SENTENCEPIECE).is_file() and not (file.home / "tokenizer.json").is_file():
        _check_same(file, prompts, own.ids, _sentencepiece_ids(file, spec, prompts), "SentencePiece")


def _opened(home: Path, kind: str) -> Any:
    """The tokenizer of transformers in the form that `tokenizers` runs, whatever the release calls it."""
    transformers = import_transformers()
    base = kind.removesuffix("Fast")
    loader = getattr(transformers, f"{base}Fast", None) or getattr(transformers, base)
    names = set(loader.vocab_files_names.values())
    if not any((home / name).is_file() for name in names):
        raise CheckpointError(f"{home} holds no {kind}: none of {', '.join(sorted(names))} is there; copy it again")
    with quiet_transformers():
        try:
            return loader.from_pretrained(str(home), local_files_only=True)
        except Exception as e:  # transformers and tokenizers raise many kinds
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise CheckpointError(f"{home} can't be read as a {kind} ({one_line(reason)}); copy it again") from e


def _check_same(file: TokenizerFile, prompts: Sequence[str], own: Any, theirs: Any, whose: str) -> None:
    for prompt, row, expected in zip(prompts, np.asarray(own), np.asarray(theirs), strict=True):
        if not np.array_equal(row, expected):
            place = int(np.flatnonzero(row != expected)[0])
            raise CheckpointError(
                f"{file.home}: as a tokenizer.json it gives other ids than {whose} for {prompt[:40]!r}: {row[place]} "
                f"and {expected[place]} at token {place}; compile with --no-text and give embeddings"
            )


def _sentencepiece_ids(file: TokenizerFile, spec: TextSpec, prompts: Sequence[str]) -> list[list[int]]:
    """Return the ids that T5's own tokenizer gives: pieces, an end, cut in front of it and filled up."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as e:
        raise InputError("a T5 tokenizer needs sentencepiece; install it with: pip install 'ditc[export]'") from e
    pieces = SentencePieceProcessor(model_file=str(file.home / SENTENCEPIECE))
    rows = []
    for prompt in prompts:
        ids = [*pieces.encode(CLEANINGS[spec.cleaning](prompt))[: spec.length - 1], file.tokenizer.eos_token_id]
        rows.append(ids + [spec.pad_id] * (spec.length - len(ids)))
    return rows
