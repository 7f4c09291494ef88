"""Text encoders of transformers as modules of a segment: (input_ids, attention_mask) to the tensors that are wanted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditc.errors import CheckpointError, InputError, one_line, unknown_name
from ditc.exporter.config_files import read_json, spelled
from ditc.exporter.weight_files import listed

__all__ = ["ENCODERS", "EncoderModule", "import_transformers", "module_of_folder", "quiet_transformers"]

Outputs = Any  # of transformers: tensors as attributes


@dataclass(frozen=True)
class EncoderClass:
    """A class of transformers: the `model_type`s that its configuration may have, and what can be taken from it."""

    model_types: tuple[str, ...]
    outputs: Mapping[str, Callable[[Outputs], Tensor]]


CLIP_TYPES = ("clip_text_model", "clip")
# class -> what it is; a row more is a further encoder
ENCODERS: Mapping[str, EncoderClass] = {
    "T5EncoderModel": EncoderClass(("t5",), {"last": lambda out: out.last_hidden_state}),
    "CLIPTextModel": EncoderClass(
        CLIP_TYPES,
        {
            "last": lambda out: out.last_hidden_state,
            "penultimate": lambda out: out.hidden_states[-2],
            "pooled": lambda out: out.pooler_output,
        },
    ),
    "CLIPTextModelWithProjection": EncoderClass(
        CLIP_TYPES,
        {
            "last": lambda out: out.last_hidden_state,
            "penultimate": lambda out: out.hidden_states[-2],
            "pooled": lambda out: out.text_embeds,
        },
    ),
}
WEIGHTS = re.compile(r"(?:model|pytorch_model)(?:\.(?P<variant>[a-z]\w*))?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)")


class EncoderModule(nn.Module):
    """An encoder with some of its outputs, in their order; it looks at the mask only where it is `masked`."""

    def __init__(self, model: Any, outputs: Sequence[str], *, masked: bool) -> None:
        super().__init__()
        self.model = model
        self.masked = masked
        known = ENCODERS[type(model).__name__].outputs
        self._taken = tuple(known[name] for name in outputs)
        self._states = "penultimate" in outputs

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        mask = attention_mask if self.masked else None
        out = self.model(input_ids, attention_mask=mask, output_hidden_states=self._states, return_dict=True)
        return tuple(take(out) for take in self._taken)


def import_transformers() -> Any:
    """Return the module transformers. Raises InputError where it is missing."""
    try:
        import transformers
    except ImportError as e:
        raise InputError(
            "reading text encoders needs transformers; install it with: pip install 'ditc[export]', or leave them out "
            "with --no-text"
        ) from e
    return transformers


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the reports and bars of transformers; what of them concerns a user is checked here instead."""
    logging = import_transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def module_of_folder(home: Path, kind: str) -> tuple[Any, tuple[str, ...]]:
    """Return an encoder of transformers in float32 from its folder, and lines about what was assumed.

    Raises CheckpointError where class, configuration or weights are not those of such an encoder.
    """
    if kind not in ENCODERS:
        raise CheckpointError(str(unknown_name("class of a text encoder", kind, ENCODERS)))
    if not home.is_dir():
        raise CheckpointError(
            f"there is no {home}, where the {kind} of the pipeline should lie; copy it, or compile with --no-text and "
            "give embeddings"
        )
    config = read_json(home / "config.json", f"the configuration of a {kind}")
    if config.get("model_type") not in ENCODERS[kind].model_types:
        raise CheckpointError(
            f"{home / 'config.json'}: model_type is {spelled(config.get('model_type'))}, expected "
            f"{' or '.join(ENCODERS[kind].model_types)} of a {kind}"
        )
    variant, about = _variant(home)
    model = _loaded(home, kind, variant)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(f"{home}: {name} contains NaN or infinity; the text encoder is not usable")
    return model, about


def _variant(home: Path) -> tuple[str | None, tuple[str, ...]]:
    """Return the variant of the weights to read, None for plain ones, and the line about it. Raises CheckpointError."""
    variants = {match["variant"] for path in home.iterdir() if (match := WEIGHTS.fullmatch(path.name)) is not None}
    if not variants:
        raise CheckpointError(f"no weights of a text encoder in {home}; expected model.safetensors, or shards of it")
    if None in variants:
        return None, ()
    if len(variants) > 1:
        raise CheckpointError(
            f"{home} holds weights in the variants {', '.join(sorted(variants))} only; keep the files of one of them"
        )
    (variant,) = variants
    return variant, (f"the weights of the variant {variant} are meant, no others are in {home.name}",)


def _loaded(home: Path, kind: str, variant: str | None) -> Any:
    """The model with all of its weights: transformers itself would draw those that are missing."""
    loader = getattr(import_transformers(), kind)
    with quiet_transformers():
        try:
            model, info = loader.from_pretrained(
                str(home), variant=variant, local_files_only=True, output_loading_info=True
            )
        except Exception as e:  # transformers and safetensors raise many kinds
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise CheckpointError(f"{home} can't be read as a {kind} ({one_line(reason)}); copy it again") from e
    if missing := sorted(map(str, info["missing_keys"])):
        raise CheckpointError(
            f"{home} does not fit its config.json: {listed('missing', missing)}expected the weights of a {kind}"
        )
    return model.float().eval()
