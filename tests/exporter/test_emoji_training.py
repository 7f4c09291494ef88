"""The text-to-image model and its training: a training that was stopped goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from ditc.errors import InputError
from ditc.exporter.emoji_model import (
    MAX_TOKENS,
    TEXT_ENCODER,
    TRANSFORMER,
    TextIds,
    build_emoji_model,
    float16_bytes,
    initialize_weights,
    load_float16,
    text_ids,
    train_tokenizer,
)
from ditc.exporter.emoji_training import (
    Batch,
    Pictures,
    Recipe,
    Training,
    draw_batch,
    flow_loss,
    measured_loss,
)
from ditc.exporter.train_emoji import Checkpoints, StopSignal, computes_bfloat16, train, write_result

TINY = {**TRANSFORMER, "num_layers": 1, "num_attention_heads": 1, "cross_attention_dim": 32}
TINY_TEXT = {**TEXT_ENCODER, "num_layers": 1, "vocab_size": 64}
EMPTY = TextIds(*(torch.tensor([[1] + [0] * (MAX_TOKENS - 1)]) for _ in range(2)))


def recipe(steps: int = 8, decay: int = 3, **changes: Any) -> Recipe:
    return Recipe(steps, decay, batch=4, warmup=3, transformer=TINY, text_encoder=TINY_TEXT, **changes)


def pictures(count: int = 6) -> Pictures:
    """Random pictures, of which each has two captions."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (2 * count, MAX_TOKENS), generator=generator)
    return Pictures(
        pixels=torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1,
        text=TextIds(ids, torch.ones_like(ids)),
        first=2 * torch.arange(count),
        count=torch.full((count,), 2),
        weights=torch.ones(count),
        empty=EMPTY,
    )


def run(training: Training, steps: int) -> Tensor:
    return torch.stack([training.advance(pictures()) for _ in range(steps)])


PRECISIONS = [False] + [True] * computes_bfloat16()


@pytest.mark.parametrize("bfloat16", PRECISIONS)
def test_a_training_that_was_stopped_goes_on_bit_for_bit(bfloat16: bool, tmp_path: Path) -> None:
    whole = Training(recipe(), bfloat16)
    losses = run(whole, 8)
    first = Training(recipe(), bfloat16)
    run(first, 4)
    Checkpoints(tmp_path).save(first)
    torch.manual_seed(99)  # nothing is left of the process
    second = Training(recipe(), bfloat16)
    Checkpoints(tmp_path).resume(second)
    assert second.step == 4
    assert torch.equal(run(second, 4), losses[4:])
    for stopped, unstopped in zip(second.state()["model"].values(), whole.state()["model"].values(), strict=True):
        assert torch.equal(stopped, unstopped)
    for stopped, unstopped in zip(second.average, whole.average, strict=True):
        assert torch.equal(stopped, unstopped)


def test_a_request_to_end_is_heard_after_the_step_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    class Interrupted(Training):
        def advance(self, pictures: Pictures) -> Tensor:
            if self.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().advance(pictures)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        train(Interrupted(recipe(), False), (pictures(), pictures()), Checkpoints(tmp_path), StopSignal())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    resumed = Training(recipe(), bfloat16=False)
    Checkpoints(tmp_path).resume(resumed)
    assert resumed.step == 3


def test_a_training_goes_on_to_another_length_but_not_with_another_recipe(tmp_path: Path) -> None:
    training = Training(recipe(), bfloat16=False)
    run(training, 2)
    Checkpoints(tmp_path).save(training)
    longer = Training(recipe(steps=20, decay=5), bfloat16=False)
    Checkpoints(tmp_path).resume(longer)
    assert longer.step == 2
    with pytest.raises(InputError, match="another recipe; take another --work"):
        Checkpoints(tmp_path).resume(Training(recipe(peak_rate=1.0), bfloat16=False))


def test_a_training_goes_on_from_the_weights_that_another_ended_with(tmp_path: Path) -> None:
    path = tmp_path / "emoji.safetensors"
    first = Training(recipe(steps=4, decay=0), bfloat16=False)
    first.runs.append({"from": 0})
    run(first, 4)
    write_result(first, (pictures(), pictures(3)), train_tokenizer(CAPTIONS, size=60), path)
    second = Training(recipe(), bfloat16=False)
    Checkpoints(tmp_path).resume(second, path)
    assert (second.step, second.began, second.runs) == (4, 4, [{"from": 0}])
    for p, average, given in zip(second.model.parameters(), second.average, first.average, strict=True):
        assert torch.equal(p, given.half().float())
        assert torch.equal(average, p)
    run(second, 2)
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(recipe().peak_rate * 2 / 3)  # of its own warm-up
    Checkpoints(tmp_path).save(second)
    third = Training(recipe(), bfloat16=False)
    Checkpoints(tmp_path).resume(third, path)  # the checkpoint comes first
    assert (third.step, third.began) == (6, 4)
    assert torch.equal(run(third, 2), run(second, 2))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(InputError, match="is another tokenizer than that of"):
        Checkpoints(tmp_path).resume(Training(recipe(), bfloat16=False), path)
    with pytest.raises(InputError, match="weights to begin with are of another recipe"):
        Checkpoints(tmp_path / "new").resume(Training(recipe(peak_rate=1.0), bfloat16=False), path)


def test_the_rate_rises_stays_and_falls_over_the_last_steps() -> None:
    rates = [recipe(steps=10, decay=4, peak_rate=1.0).rate(step) for step in range(10)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert recipe(steps=10, decay=0, peak_rate=1.0).rate(9) == 1
    assert recipe(steps=10, decay=2, peak_rate=1.0).rate(5, began=5) == pytest.approx(1 / 3)
    with pytest.raises(InputError, match="from 0 to the 10 steps, found 11"):
        recipe(steps=10, decay=11)


def test_the_average_follows_the_weights() -> None:
    training = Training(recipe(), bfloat16=False)
    before = [p.clone() for p in training.average]
    training.advance(pictures())
    decay = 2 / 11  # early averages are short
    for old, new, p in zip(before, training.average, training.model.parameters(), strict=True):
        torch.testing.assert_close(new, decay * old + (1 - decay) * p)


def test_the_flow_leads_from_the_picture_to_the_noise() -> None:
    class Exact(torch.nn.Module):
        """A network that knows the picture: what it is shown is (1 - sigma) * picture + sigma * noise."""

        def forward(self, x: Tensor, sigma: Tensor, text: TextIds) -> Tensor:
            s = sigma[:, None, None, None]
            return (x - (1 - s) * pixels) / s - pixels

    pixels, noise = torch.rand(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    batch = Batch(pixels, noise, torch.rand(4) * 0.9 + 0.1, EMPTY)
    assert flow_loss(Exact(), batch).item() < 1e-9  # type: ignore[arg-type]


def test_a_tenth_of_the_captions_is_empty_and_half_of_the_others_the_main_one() -> None:
    batch = draw_batch(pictures(), 20_000, torch.Generator().manual_seed(0))
    empty = (batch.text.ids == EMPTY.ids).all(dim=1)
    assert empty.float().mean().item() == pytest.approx(0.1, abs=0.01)
    main = (batch.text.ids[:, None] == pictures().main_text().ids).all(dim=2).any(dim=1)
    assert main.float().mean().item() == pytest.approx(0.9 * 0.75, abs=0.02)  # the other half is of two
    assert torch.equal(batch.text.mask.sum(dim=1) == 1, empty)
    assert 0.49 < batch.sigma.median().item() < 0.51
    assert 0 < batch.sigma.min() < batch.sigma.max() < 1


def test_captions_stay_with_their_pictures() -> None:
    batch = draw_batch(pictures(), 500, torch.Generator().manual_seed(0))
    which = (batch.pixels[:, None] == pictures().pixels).all(dim=(2, 3, 4)).int().argmax(dim=1)
    for row, ids in zip(which, batch.text.ids, strict=True):
        allowed = torch.cat([pictures().text.ids[2 * row : 2 * row + 2], EMPTY.ids])
        assert (ids == allowed).all(dim=1).any()


def test_the_model_fits_its_place() -> None:
    model = build_emoji_model()
    text = sum(p.numel() for p in model.text_encoder.parameters())
    assert text < 1_200_000
    assert len(float16_bytes(model)) < 11_900_000
    assert TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"] == 192
    assert (TRANSFORMER["sample_size"] // TRANSFORMER["patch_size"]) ** 2 == 64


def test_a_fresh_model_predicts_nothing_and_weights_come_back_from_float16() -> None:
    model = build_emoji_model(TINY, TINY_TEXT)
    initialize_weights(model)
    batch = draw_batch(pictures(), 4, torch.Generator().manual_seed(0))
    assert not model(batch.pixels, batch.sigma, batch.text).any()
    other = build_emoji_model(TINY, TINY_TEXT)
    load_float16(other, load(float16_bytes(model)))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.half().float(), q)


def test_padding_changes_nothing() -> None:
    model = build_emoji_model(TINY, TINY_TEXT).eval()
    x, sigma = torch.randn(1, 3, 32, 32), torch.tensor([0.5])
    ids, mask = torch.tensor([[5, 9, 1]]), torch.ones(1, 3, dtype=torch.int64)
    padded = TextIds(*(torch.nn.functional.pad(each, (0, 17)) for each in (ids, mask)))
    with torch.no_grad():
        torch.testing.assert_close(model(x, sigma, TextIds(ids, mask)), model(x, sigma, padded), atol=1e-5, rtol=0)


CAPTIONS = ["a red apple", "green apple", "waving hand, dark skin tone", "flag of aland islands", "red heart"]


def test_the_tokenizer_takes_what_people_type() -> None:
    tokenizer = train_tokenizer(CAPTIONS, size=120)
    assert train_tokenizer(CAPTIONS, size=120).to_str() == tokenizer.to_str()
    plain, typed = (
        text_ids(tokenizer, ["flag of aland islands"]),
        text_ids(tokenizer, ["  Flag of \u00c5land-Islands! "]),
    )
    assert torch.equal(plain.ids, typed.ids)
    empty = text_ids(tokenizer, [""])
    assert empty.ids[0].tolist() == [1] + [0] * (MAX_TOKENS - 1)
    assert empty.mask.sum() == 1
    long = text_ids(tokenizer, ["red " * 50])
    assert long.ids.shape == (1, MAX_TOKENS)
    assert long.ids[0, -1] == 1  # what is cut still ends
    assert [tokenizer.id_to_token(number) for number in range(3)] == ["<pad>", "</s>", "<unk>"]
    assert 2 in text_ids(tokenizer, ["\u82f9\u679c"]).ids  # a script it doesn't know is not the empty prompt


def test_the_result_is_the_average_with_its_tokenizer_and_record(tmp_path: Path) -> None:
    training = Training(recipe(), bfloat16=False)
    run(training, 8)
    split, path = (pictures(), pictures(3)), tmp_path / "emoji.safetensors"
    write_result(training, split, train_tokenizer(CAPTIONS, size=60), path)
    record = json.loads((tmp_path / "emoji.training.json").read_text())
    model = build_emoji_model(TINY, TINY_TEXT)
    load_float16(model, load(path.read_bytes()))
    for p, average in zip(model.parameters(), training.average, strict=True):
        assert torch.equal(p, average.half().float())
    assert record["loss_held_out"] == pytest.approx(measured_loss(model, pictures(3)))
    assert (record["steps"], record["decay"], record["pictures"]) == (8, 3, {"train": 6, "held_out": 3})
    assert (tmp_path / "emoji_tokenizer.json").is_file()


@pytest.mark.parametrize("absent", ["emoji.safetensors", "emoji.training.json", "emoji_tokenizer.json"])
def test_weights_to_begin_with_need_what_lies_beside_them(absent: str, tmp_path: Path) -> None:
    for name in ("emoji.safetensors", "emoji.training.json", "emoji_tokenizer.json"):
        if name != absent:
            (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=f"there is no .*{absent}, which --begin"):
        Checkpoints(tmp_path / "new").resume(Training(recipe(), bfloat16=False), tmp_path / "emoji.safetensors")


def test_the_command_says_what_it_takes() -> None:
    command = [sys.executable, "-m", "ditc.exporter.train_emoji", "--help"]
    assert "--work" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_nothing_is_fetched_for_weights_that_a_training_can_not_begin_with(tmp_path: Path) -> None:
    begin = ["--begin", str(tmp_path / "none.safetensors"), "--work", str(tmp_path / "work"), "--steps", "2"]
    command = [sys.executable, "-m", "ditc.exporter.train_emoji", *begin]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"there is no {tmp_path / 'none.safetensors'}, which --begin")
    assert not (tmp_path / "work").exists()
