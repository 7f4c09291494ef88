"""`ditc demo emoji`: compile the built-in text-to-image model, and draw prompts with it and with plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import JsonValue

from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.engines.integer_form import Arithmetic, arithmetic_of
from ditc.progress import Progress
from ditc.quality.demo import SEED, BatchSeconds, side_by_side
from ditc.requests import Request
from ditc.runtime.closeness import psnr_db
from ditc.runtime.executor import Samples, seeded_request
from ditc.runtime.images import grid, save_png
from ditc.runtime.pipeline import load
from ditc.spec import Record
from ditc.speed.eager import eager_images
from ditc.tables import sampler_columns

if TYPE_CHECKING:
    from ditc.exporter.emoji import Emoji

__all__ = ["DEMO_DEFAULTS", "DEMO_PROMPTS", "PromptDemo", "run_prompt_demo"]

# what the demo has instead of a compile's defaults: the model's own steps and guidance, and fewer points in less time
DEMO_DEFAULTS: dict[str, Any] = {"steps": 25, "cfg": 2.0, "points": 256}
DEMO_PROMPTS = (
    *("grinning face", "cat face", "waving hand, dark skin tone", "police officer", "red heart", "red apple"),
    *("deciduous tree", "rocket", "full moon", "flag of japan", "green book", "sunflower"),
)
ROUNDS = 3


class PromptDemo(Record):
    """Prompts drawn by a bundle and by plain torch on the same noise, with both times, sizes and the PSNR in dB.

    `seconds_per_image` is of all prompts as one batch, encoded before; `arithmetic` is how the bundle's integers ran,
    if it has any; `grid` and `bundle` are paths.
    """

    grid: str
    bundle: str
    prompts: tuple[str, ...]
    seconds_per_image: BatchSeconds
    arithmetic: Arithmetic | None
    psnr_db: float
    torch_bytes: int
    bundle_bytes: int
    settings: dict[str, JsonValue]


def run_prompt_demo(out: Path, options: CompileOptions, progress: Progress) -> PromptDemo:
    """Compile "emoji" into `out`/bundle and draw `out`/grid.png: plain torch above, the bundle below, in two rows each.

    Settings that were not given are DEMO_DEFAULTS. Speed: both sides in turn, median of `ROUNDS`.
    """
    from ditc.exporter.emoji import EMOJI, builtin_emoji

    unset = {name: value for name, value in DEMO_DEFAULTS.items() if name not in options.model_fields_set}
    options = options.model_copy(update=unset)
    bundle = compile_model(EMOJI, out / "bundle", options, progress=progress, force=True)
    model = builtin_emoji()
    with load(bundle.path) as pipe:
        columns, arithmetic = sampler_columns(bundle.tables()), arithmetic_of(pipe.backend, bundle.manifest.precision)

        encoded = torch_request(model, DEMO_PROMPTS), pipe.request(prompt=DEMO_PROMPTS)  # each by its own side

        def plain() -> Samples:
            drawn = seeded_request(model.spec, encoded[0], SEED, 0, options.steps)
            return eager_images(model, columns, *drawn, options.cfg)

        def compiled() -> Samples:
            return list(pipe.generate(encoded[1], seed=SEED))[-1].x

        progress("time", 0, 1)
        seconds = side_by_side(plain, compiled, len(DEMO_PROMPTS), ROUNDS)
        progress("time", 1, 1)
        exact, ours = plain(), compiled()
    picture, half = out / "grid.png", len(DEMO_PROMPTS) // 2
    save_png(grid([exact[:half], ours[:half], exact[half:], ours[half:]], scale=3, gap=4), picture)
    parameters = (p for part in (model, *(encoder.module for encoder in model.text)) for p in part.parameters())
    return PromptDemo(
        grid=str(picture),
        bundle=str(out / "bundle"),
        prompts=DEMO_PROMPTS,
        seconds_per_image=seconds,
        arithmetic=arithmetic,
        psnr_db=float(psnr_db(ours, exact).mean()),
        torch_bytes=sum(p.numel() * p.element_size() for p in parameters),
        bundle_bytes=bundle.manifest.size_bytes(reference=False),
        settings=bundle.manifest.settings,
    )


def torch_request(model: Emoji, prompts: tuple[str, ...]) -> Request:
    """Return the request of prompts as the model's text encoder encodes them in torch; its null is the empty one."""
    (encoder,) = model.text
    tokens = encoder.tokenization.tokens([*prompts, ""])
    (states,) = encoder.tensors(tokens.ids, tokens.mask)
    rows = {"text": states.numpy(), "text_mask": tokens.mask}
    nulls = {f"null_{name}": np.repeat(array[-1:], len(prompts), axis=0) for name, array in rows.items()}
    return Request.of(model.spec, None, {**{name: array[:-1] for name, array in rows.items()}, **nulls})
