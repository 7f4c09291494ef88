"""Prompts to tokens by `tokenizers` alone, and prompts as people give them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ditc.errors import BundleError, InputError
from ditc.exporter.shipped_prompts import shipped_prompts
from ditc.prompt_lists import checked_prompts, lines_of, read_prompts, written_prompts
from ditc.text_spec import TextSpec
from ditc.tokenization import Tokenization
from tests.models.captioned import CLIP_IDS, T5_IDS, clip_tokenizer, t5_tokenizer

T5 = TextSpec(name="t5", kind="T5", parameters=0, vocabulary=T5_IDS, length=12, pad_id=0, gives=("text",))
CLIP = TextSpec(name="clip", kind="CLIP", parameters=0, vocabulary=CLIP_IDS, length=10, pad_id=1, gives=("pooled",))
KINDS = {"t5": (T5, t5_tokenizer(), "<pad>"), "clip": (CLIP, clip_tokenizer(), "<end>")}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_masks_are_those_of_transformers(kind: str, side: Any) -> None:
    spec, json, pad = KINDS[kind]
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_buffer(json), pad_token=pad, padding_side=side
    )
    prompts = list(shipped_prompts())
    theirs = tokenizer(prompts, padding="max_length", max_length=spec.length, truncation=True)
    own = Tokenization.of(json, spec.model_copy(update={"padding_side": side}), kind).tokens(prompts)
    assert np.array_equal(own.ids, theirs["input_ids"])
    assert np.array_equal(own.mask, theirs["attention_mask"])
    assert {bool(cut) for cut in own.cut} == {True, False}


def test_a_long_prompt_is_cut_in_front_of_its_end_and_tells_of_it() -> None:
    tokenization = Tokenization.of(t5_tokenizer(), T5, "t5")
    long, short = "a red fox asleep in fresh snow under a tree", "a fox"
    tokens = tokenization.tokens([long, short])
    assert tokens.ids[0, -1] == 1
    assert tokens.mask[0].all()
    assert tokens.cut[1] == ""
    assert long.endswith(tokens.cut[0])
    begin = long[: -len(tokens.cut[0])].strip()
    assert np.array_equal(tokenization.tokens([begin]).ids[0], tokens.ids[0])


def test_the_empty_prompt_is_its_special_tokens() -> None:
    tokens = Tokenization.of(clip_tokenizer(), CLIP, "clip").tokens([""])
    assert tokens.ids.tolist() == [[0, *[1] * 9]]
    assert tokens.mask.tolist() == [[1, 1, *[0] * 8]]


def test_threads_may_share_a_tokenizer() -> None:
    tokenization, prompts = Tokenization.of(t5_tokenizer(), T5, "t5"), shipped_prompts()
    alone = [tokenization.tokens([prompt]).ids for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: tokenization.tokens([prompt]).ids, prompts))
    assert all(map(np.array_equal, alone, together))


def test_a_file_that_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(BundleError, match=r"text/tokenizer\.t5\.json is no tokenizer"):
        Tokenization.of(b'{"version": "1.0"}', T5, "text/tokenizer.t5.json")


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"pad_id": 260}, "pad_id is 260"), ({"gives": ()}, "at least 1 item"), ({"name": "t 5"}, "match pattern")],
)
def test_an_encoder_that_can_not_be_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        TextSpec(**{**T5.model_dump(), **changes})


def test_the_shipped_prompts_are_many_and_varied() -> None:
    prompts = shipped_prompts()
    lengths = [len(prompt.split()) for prompt in prompts]
    assert len(prompts) == len(set(prompts)) == 120
    assert "" in prompts
    assert max(lengths) >= 60
    assert any(not prompt.isascii() for prompt in prompts)


def test_prompts_are_read_as_they_were_written(tmp_path: Path) -> None:
    prompts = ("a cat", "", " お茶 ", "with\u2028a separator", "")
    assert lines_of(written_prompts(prompts)) == prompts
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\ntwo".encode())
    assert read_prompts(tmp_path / "p.txt") == ("one", "two")
    with pytest.raises(InputError, match="a prompt to compile with is one line"):
        written_prompts(["a\nb"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no prompts: it is empty"),
        (b"\xff\xfe", "holds no prompts: .* expected text in UTF-8"),
        (None, "No"),
    ],
)
def test_a_file_without_prompts_is_one_line(content: bytes | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=told):
        read_prompts(path)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (3, "must be a text or a list of texts, found int"),
        (b"a", "must be a text or a list of texts, found bytes"),
        (["a", 3], "found 3 in it"),
        ([], "is an empty list"),
        (["\ud800"], "text that UTF-8 can write"),
    ],
)
def test_what_is_no_prompt_is_one_line(given: Any, told: str) -> None:
    with pytest.raises(InputError, match=rf"prompt .*{told}"):
        checked_prompts("prompt", given)
