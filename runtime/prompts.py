"""Prompts to the conditions of a request: the text encoders of a bundle, run once for each distinct prompt.

They run on the processor, in ONNX Runtime and float32, whatever the target is: those of T5 overflow in FP16, and a
prompt is read once for all steps of its images. A prompt goes through its encoder alone, so that what it gives hangs on
no other, and the last ones stay in memory.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import Bundle
from ditc.engines.backend import Engine
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import AdviceWarning, BundleError, InputError
from ditc.prompt_lists import checked_prompts
from ditc.requests import Request, check_conditions, given_names
from ditc.runtime.fingerprint import Difference, relative_l2
from ditc.spec import Condition
from ditc.text_spec import ATTENTION_MASK, INPUT_IDS, TEXT, TextSpec, text_conditions
from ditc.tokenization import Tokenization

__all__ = ["NO_NEGATIVE", "PromptEncoders", "prompted_request"]

NO_NEGATIVE = ""  # guidance leads away from the empty prompt unless a request says otherwise, as in diffusers
LONGEST = 60  # characters of what is cut off, in a message
RUN_BY = ("tokenizers", "onnxruntime")
TOLERANCE = 1e-3  # of what an encoder gives elsewhere, relative, in the L2 norm: float32 differs by some 1e-6
KEPT_BYTES = 64 << 20  # of what prompts gave, the last ones

Given = Mapping[str, NDArray[Any]]  # of one prompt: each condition's array, without an axis for images


@dataclass(frozen=True)
class _Encoded:
    """The conditions that a prompt gives, and a line for each encoder that reads less than all of it."""

    given: Given
    advice: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for array in self.given.values())


@dataclass(frozen=True)
class _Encoder:
    """An open text encoder: its tokenizer, its engine, and the conditions that the engine gives."""

    tokenization: Tokenization
    engine: Engine
    conditions: tuple[Condition, ...]

    def encoded(self, prompt: str) -> tuple[Given, str]:
        """Return what a prompt gives, and the words of it that were cut off."""
        tokens, binding = self.tokenization.tokens([prompt]), self.engine.binding()
        for name, array in ((INPUT_IDS, tokens.ids), (ATTENTION_MASK, tokens.mask)):
            if name in self.engine.inputs:
                binding.bind(name, array)
        given: dict[str, NDArray[Any]] = {each.name: np.empty((1, *each.shape), each.dtype) for each in self.conditions}
        for name, array in given.items():
            binding.bind(name, array)
        binding.run()
        mask = self.tokenization.spec.mask
        given |= {} if mask is None else {mask: tokens.mask}
        return {name: array[0] for name, array in given.items()}, tokens.cut[0]


class PromptEncoders:
    """The text encoders of an open bundle; any number of threads may use them.

    Tokenizers and engines are opened at the first prompt: who gives embeddings needs none of them.
    """

    def __init__(self, bundle: Bundle, backend: OnnxRuntimeBackend) -> None:
        self.bundle, self._backend = bundle, backend
        self._stack = ExitStack()
        self._opening, self._keeping = threading.Lock(), threading.Lock()
        self._encoders: tuple[_Encoder, ...] | None = None
        self._kept: OrderedDict[str, _Encoded] = OrderedDict()

    def check_takes_prompts(self) -> None:
        """Raise InputError where the bundle has no text encoders, saying what it takes instead."""
        bundle, spec = self.bundle, self.bundle.manifest.model
        if bundle.has_text:
            return
        if bundle.manifest.text is not None:
            raise InputError(f"{bundle.path} is here without its folder {TEXT}/; copy it too, or give embeddings")
        names = " and ".join(map(repr, given_names(spec))) or "nothing"
        raise InputError(f"{spec.name} takes no prompts, it is asked for with {names}; leave prompts out")

    def arrays(self, prompts: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return the conditions of prompts, (n, *shape) by name; advises of one that is cut.

        Raises InputError where the bundle takes no prompts, or what reads them is not installed.
        """
        self.check_takes_prompts()
        encoded = {prompt: self._encoded(prompt) for prompt in dict.fromkeys(prompts)}
        for line in dict.fromkeys(line for each in encoded.values() for line in each.advice):
            warnings.warn(line, AdviceWarning, stacklevel=2)
        names = text_conditions(self.bundle.manifest.text or ())
        return {name: np.stack([encoded[prompt].given[name] for prompt in prompts]) for name in names}

    def differences(self) -> list[Difference]:
        """Return the distance of what each encoder gives for one prompt from what it gave at the compile.

        None where the bundle keeps no prompt, or nothing here runs encoders.
        """
        examples = self.bundle.examples()
        runnable = self.bundle.has_text and all(map(find_spec, RUN_BY))
        if not examples.prompts or not runnable:
            return []
        here = self._encoded(examples.prompts[0]).given
        return [
            Difference(encoder.segment, name, relative_l2(here[name], examples.arrays[name][0]), TOLERANCE)
            for encoder in self.bundle.manifest.text or ()
            for name in encoder.gives
        ]

    def close(self) -> None:
        """Let go of the encoders."""
        with self._opening:
            self._stack.close()
            self._encoders = None

    def _encoded(self, prompt: str) -> _Encoded:
        """A prompt's conditions, from memory or through every encoder."""
        with self._keeping:
            if (earlier := self._kept.get(prompt)) is not None:
                self._kept.move_to_end(prompt)
                return earlier
        given: dict[str, NDArray[Any]] = {}
        advice = []
        for encoder in self._opened():
            own, cut = encoder.encoded(prompt)
            given |= own
            spec = encoder.tokenization.spec
            if cut:
                shown = cut if len(cut) <= LONGEST else f"{cut[:LONGEST]}..."
                advice.append(f"{spec.name} reads {spec.length} tokens of a prompt: {shown!r} is cut off; shorten it")
        encoded = _Encoded(given, tuple(advice))
        with self._keeping:
            self._kept[prompt] = encoded
            while len(self._kept) > 1 and sum(each.size_bytes for each in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return encoded

    def _opened(self) -> tuple[_Encoder, ...]:
        with self._opening:
            if self._encoders is None:
                self._encoders = tuple(map(self._open, self.bundle.manifest.text or ()))
            return self._encoders

    def _open(self, spec: TextSpec) -> _Encoder:
        path = self.bundle.text_path(spec.tokenizer)
        tokenization = Tokenization.of(path.read_bytes(), spec, str(path))
        if tokenization.highest_id >= spec.vocabulary:
            raise BundleError(f"{path} gives ids that its encoder has no embedding of; compile the bundle again")
        engine = self._stack.enter_context(self._backend.open(self.bundle.text_path(f"{spec.segment}.onnx")))
        conditions = {each.name: each for each in self.bundle.manifest.model.conditions}
        return _Encoder(tokenization, engine, tuple(conditions[name] for name in spec.gives))


def prompted_request(
    encoders: PromptEncoders,
    labels: Sequence[int] | None,
    conditions: Mapping[str, Any] | None,
    count: int | None,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
) -> Request:
    """Return the request of some images whose conditions come from prompts, as far as `conditions` don't give them.

    A text is for all images, a list has one for each. Raises InputError as `Request.of`, and for texts that a bundle
    doesn't take, that would do nothing, or that are no texts.
    """
    encoders.check_takes_prompts()
    spec, guidance = encoders.bundle.manifest.model, encoders.bundle.manifest.guidance
    names = text_conditions(encoders.bundle.manifest.text or ())
    nulls = {each.null_name: each.name for each in spec.conditions if each.name in names and each.null_name is not None}
    check_conditions(conditions)
    given = dict(conditions or {})
    if negative_prompt is not None and (not nulls or guidance == 1):
        why = f"guidance is {guidance:g}" if nulls else f"{spec.name} takes no text in its unconditional half"
        raise InputError(f"{why}, so a negative prompt changes nothing; leave it out")
    _check_given_once(given, names if prompt is not None else (), "prompt")
    _check_given_once(given, nulls if negative_prompt is not None else (), "negative_prompt")
    if count is None:
        count = _count_of(labels, given, prompt, negative_prompt)
    prompts, negatives = tuple[str, ...](), tuple[str, ...]()
    if prompt is not None:
        prompts = _for_each("prompt", prompt, count)
        given |= encoders.arrays(prompts)
    if guidance == 1:  # nobody reads them
        given = {null: given[name] for null, name in nulls.items() if name in given} | given
    elif not nulls.keys() & given.keys():
        negatives = _for_each("negative_prompt", NO_NEGATIVE if negative_prompt is None else negative_prompt, count)
        encoded = encoders.arrays(negatives)
        given |= {null: encoded[name] for null, name in nulls.items()}
    return replace(Request.of(spec, labels, given, count), prompts=prompts, negatives=negatives)


def _check_given_once(given: Mapping[str, Any], names: Iterable[str], text: str) -> None:
    if both := sorted(given.keys() & set(names)):
        raise InputError(f"{both[0]!r} comes from {text}, and was given as a condition too; leave out one of the two")


def _count_of(labels: Any, given: Mapping[str, Any], prompt: Any, negative_prompt: Any) -> int:
    """Return the number of images that a request is for, where nobody says it: as many as there are of anything."""
    several = (labels, *given.values(), *(text for text in (prompt, negative_prompt) if not isinstance(text, str)))
    return next((len(each) for each in several if hasattr(each, "__len__")), 1)


def _for_each(name: str, given: Any, count: int) -> tuple[str, ...]:
    """Return a text for each image: one is for all. Raises InputError for what is no text, and for a list too short."""
    texts = checked_prompts(name, given)
    if isinstance(given, str):
        return tuple(texts) * count
    if len(texts) != count:
        raise InputError(f"{name} needs a text for each image: there are {count}, found {len(texts)}")
    return tuple(texts)
