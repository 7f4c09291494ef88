"""Train the built-in text-to-image model on Noto's emoji; it can be stopped and goes on where it was.

    python -m ditc.exporter.train_emoji --work FOLDER --steps 60000 --decay 12000 --out exporter/emoji.safetensors

Flow matching in pixels: x = (1 - sigma) * picture + sigma * noise, the network predicts noise - picture, sigma is
logit-normal (Stable Diffusion 3, arXiv 2403.03206), a tenth of the captions is the empty one. AdamW with a warm-up, a
constant rate and, over the last `decay` steps, a linear way to zero: how long it runs can be decided while it runs, by
starting it again with other numbers. The text encoder is trained with the transformer, from scratch.

FOLDER gets the archive of the pictures, `tokenizer.json`, and every few minutes and on SIGTERM `checkpoint.pt`, from
which the same command goes on with the numbers that it would have had. At the end the average of the weights, rounded
to float16, is the model: `--out` with its tokenizer and a record of the training beside it; emoji.md is its card. A
training that is to go on elsewhere, or after its end, begins with these (`--begin`), at a rate that rises once more.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from ditc.errors import DitcError, InputError
from ditc.exporter.emoji_captions import TONES, tone_words
from ditc.exporter.emoji_data import Emoji, Split, emoji_archive, read_emoji, split_of
from ditc.exporter.emoji_model import build_emoji_model, float16_bytes, load_float16, train_tokenizer
from ditc.exporter.emoji_training import (
    BATCH,
    PEAK_RATE,
    WARMUP,
    Pictures,
    Recipe,
    Training,
    measured_loss,
    pictures_of,
)
from ditc.files import atomic_write

LOG_EVERY, MEASURE_EVERY, KEEP_EVERY, SAVE_SECONDS = 100, 2000, 10_000, 300
RECORD_EVERY = MEASURE_EVERY  # steps whose losses go into the record


class Checkpoints:
    """The folder of a training: its checkpoint, and the average in float16 every so often."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "checkpoint.pt"

    def save(self, training: Training) -> None:
        """Write the checkpoint, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(training.state(), buffer)
        atomic_write(self.path, buffer.getvalue())

    def resume(self, training: Training, begin: Path | None = None) -> None:
        """Take over the checkpoint where there is one, else what an earlier training wrote, if that is to go on."""
        if self.path.is_file():
            training.restore(torch.load(self.path, map_location="cpu", weights_only=True))
        elif begin is not None:
            check_begins(begin, self.folder)
            training.begin_with(load(begin.read_bytes()), json.loads(record_of(begin).read_text()))

    def keep_average(self, training: Training) -> None:
        """Write the averaged weights in float16 beside those of earlier steps."""
        atomic_write(self.folder / f"average-{training.step:07d}.safetensors", float16_bytes(training.averaged()))


class StopSignal:
    """Remembers that the process was asked to end; the step that runs is finished first."""

    def __init__(self) -> None:
        self.raised = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._raise())

    def _raise(self) -> None:
        self.raised = True


def train(training: Training, split: tuple[Pictures, Pictures], checkpoints: Checkpoints, stop: StopSignal) -> None:
    """Train to the last step or until asked to stop, with a line of losses now and then; ends with a checkpoint."""
    train_pictures, held_out = split
    saved = started = time.monotonic()
    losses: list[Tensor] = []
    first = training.step
    while training.step < training.recipe.steps and not stop.raised:
        losses.append(training.advance(train_pictures))
        step = training.step
        if step % LOG_EVERY == 0:
            loss = torch.stack(losses).mean().item()
            pace = (step - first) * training.recipe.batch / (time.monotonic() - started)
            training.log.append({"step": step, "loss": loss})
            losses = []
            _say(f"{step:7d}  loss {loss:.4f}  rate {training.recipe.rate(step - 1):.2e}  {pace:.0f} pictures/s")
        if step % MEASURE_EVERY == 0:
            _measure(training, train_pictures, held_out)
        if step % KEEP_EVERY == 0:
            checkpoints.keep_average(training)
        if time.monotonic() - saved > SAVE_SECONDS:
            checkpoints.save(training)
            saved = time.monotonic()
    checkpoints.save(training)


def _measure(training: Training, train_pictures: Pictures, held_out: Pictures) -> None:
    """Log the losses of the average on the held-out pictures, and on as many of the training's."""
    averaged = training.averaged()
    seen, unseen = (measured_loss(averaged, some) for some in (train_pictures.some(len(held_out.pixels)), held_out))
    training.log.append({"step": training.step, "average_train": seen, "average_held_out": unseen})
    _say(f"{training.step:7d}  average: train {seen:.4f}, held out {unseen:.4f}")


def write_result(training: Training, split: tuple[Pictures, Pictures], tokenizer: Any, path: Path) -> None:
    """Write the averaged weights in float16, the tokenizer, and a record of the training with the losses of these."""
    weights = float16_bytes(training.averaged())
    atomic_write(path, weights)
    atomic_write(tokenizer_beside(path), tokenizer.to_str().encode())
    model = build_emoji_model(training.recipe.transformer, training.recipe.text_encoder).eval()
    load_float16(model, load(weights))
    train_pictures, held_out = split
    record = {
        **asdict(training.recipe),
        "loss_train": measured_loss(model, train_pictures.some(len(held_out.pixels))),
        "loss_held_out": measured_loss(model, held_out),
        "pictures": {"train": len(train_pictures.pixels), "held_out": len(held_out.pixels)},
        "runs": training.runs,
        "log": [entry for entry in training.log if entry["step"] % RECORD_EVERY == 0],
    }
    atomic_write(record_of(path), (json.dumps(record, indent=1) + "\n").encode())


def check_begins(begin: Path, folder: Path) -> None:
    """Raise InputError where weights to begin with lack what lies beside them, or `folder` has another tokenizer."""
    for path in (begin, record_of(begin), tokenizer_beside(begin)):
        if not path.is_file():
            raise InputError(
                f"there is no {path}, which --begin {begin} needs; expected what --out of a training wrote"
            )
    own = folder / "tokenizer.json"
    if own.is_file() and json.loads(own.read_bytes()) != json.loads(tokenizer_beside(begin).read_bytes()):
        raise InputError(f"{own} is another tokenizer than that of {begin}; take another --work")


def tokenizer_beside(weights: Path) -> Path:
    """Return the place of the tokenizer of some weights."""
    return weights.with_name(f"{weights.stem}_tokenizer.json")


def record_of(weights: Path) -> Path:
    """Return the place of the record of the training that wrote some weights."""
    return weights.with_suffix(".training.json")


def _say(line: str) -> None:
    print(line, flush=True)


def tokenizer_of(folder: Path, split: Split, begin: Path | None = None) -> Any:
    """Return the tokenizer in `folder`; at the first start that of the weights to begin with, or one trained now."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file() and begin is not None:
        check_begins(begin, folder)
        atomic_write(path, tokenizer_beside(begin).read_bytes())
    if not path.is_file():
        plain = [caption for one in split.train if not one.tone for caption in one.captions]
        tones = [tone_words(tone) for tone in TONES] * 50
        atomic_write(path, train_tokenizer([*dict.fromkeys(plain), *tones]).to_str(pretty=True).encode())
    return Tokenizer.from_file(str(path))


def computes_bfloat16() -> bool:
    """Say whether this CPU multiplies bfloat16 itself: a step then takes less than half the time."""
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def _some(emoji: tuple[Emoji, ...], count: int | None) -> tuple[Emoji, ...]:
    return emoji if count is None else emoji[:: max(1, len(emoji) // count)][:count]


PRECISIONS: dict[str, Callable[[], bool]] = {
    "auto": computes_bfloat16,
    "bfloat16": lambda: True,
    "float32": lambda: False,
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the built-in text-to-image model on Noto's emoji.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the archive and the checkpoint")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--decay", type=int, default=0, help="over how many of the last steps the rate falls to zero")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rate", type=float, default=PEAK_RATE)
    parser.add_argument("--warmup", type=int, default=WARMUP)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--begin", type=Path, help="weights of --out to go on from, where --work has no checkpoint")
    parser.add_argument("--out", type=Path, help="where the model goes when it is trained")
    parser.add_argument("--pictures", type=int, help="train on so many of the pictures, to see that it learns them")
    return parser.parse_args()


def main() -> None:
    """Train from the checkpoint in the folder, from weights that were trained before, or from the beginning."""
    try:
        run(_options())
    except DitcError as e:
        sys.stderr.write(f"{e}\n")
        raise SystemExit(2) from e


def run(options: argparse.Namespace) -> None:
    """Train as the command line says; what it can't begin with is refused before anything is fetched."""
    checkpoints = Checkpoints(options.work)
    if options.begin is not None and not checkpoints.path.is_file():
        check_begins(options.begin, options.work)
    split = split_of(read_emoji(emoji_archive(options.work)))
    tokenizer = tokenizer_of(options.work, split, options.begin)
    recipe = Recipe(options.steps, options.decay, options.batch, options.rate, options.warmup)
    training = Training(recipe, PRECISIONS[options.precision]())
    checkpoints.resume(training, options.begin)
    about = {
        "from": training.step,
        "precision": "bfloat16" if training.bfloat16 else "float32",
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    training.runs.append(about)
    _say(f"step {training.step} of {recipe.steps}, {json.dumps(about)}")
    pictures = pictures_of(_some(split.train, options.pictures), tokenizer)
    held_out = pictures_of(_some(split.held_out, options.pictures), tokenizer)
    train(training, (pictures, held_out), checkpoints, StopSignal())
    if options.out is not None and training.step >= recipe.steps:
        write_result(training, (pictures, held_out), tokenizer, options.out)


if __name__ == "__main__":
    main()
