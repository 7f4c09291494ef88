"""Integer products that are exact on this machine, and the form in which they run.

On x86 without integer dot products (VNNI) libraries add two products u8 x s8 in 16 bits, where 2 * 255 * 127 does not
fit: it saturates, and nothing says so. 2 * 255 * 63 fits, so weights of 7 bits are exact everywhere. What a library
really does is not guessed from the names of features: small products that would saturate are run and held to the exact
numbers (`integer_probes`), once per process.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from enum import Enum
from functools import cache, wraps
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, runtime_checkable

from ditc.cpu_features import integer_features
from ditc.errors import AdviceWarning, BundleError
from ditc.precision import INT8, PRECISIONS, WEIGHT_BITS_KEY
from ditc.spec import Record

__all__ = [
    "SEVEN_BITS",
    "Arithmetic",
    "Exactness",
    "IntegerForm",
    "SaysArithmetic",
    "SaysType",
    "advise",
    "arithmetic_of",
    "find_exactness",
    "once_per_process",
    "weight_bits",
]

SATURATES = "without VNNI this CPU adds two products in 16 bits"

P = ParamSpec("P")
T = TypeVar("T")

SEVEN_BITS = 7  # of weights: two products with them fit in 16 bits
# key and value as protobuf writes an entry of the metadata: field 2, one byte long
_WEIGHT_BITS = re.compile(re.escape(WEIGHT_BITS_KEY.encode()) + rb"\x12\x01(\d)")
_ROUNDS_ACTIVATIONS = b"QuantizeLinear"


class IntegerForm(Enum):
    """The form of integer products: as the library multiplies them by itself, or with its switch for exact ones."""

    PLAIN = "plain"
    SWITCHED = "switched"


class Exactness(NamedTuple):
    """Up to how many bits of weights products are exact: plain ones, and with a library's switch; 0 is none at all."""

    plain: int
    switched: int = 0

    def form(self, bits: int) -> IntegerForm | None:
        """The fastest form that is exact for weights of `bits`; None where none is."""
        if bits <= self.plain:
            return IntegerForm.PLAIN
        return IntegerForm.SWITCHED if bits <= self.switched else None

    def described(self, bits: int) -> str:
        """The form for weights of `bits` in words."""
        form = self.form(bits)
        if self.plain >= INT8.weights:
            features = ", ".join(integer_features())
            return f"exact as it is ({features})" if features else "exact as it is"
        if form is IntegerForm.PLAIN:
            return f"exact as it is: {SATURATES}, where those of {bits}-bit weights fit"
        seven = "; --precision w7a8 is exact as it is" if self.plain >= SEVEN_BITS else ""
        if form is IntegerForm.SWITCHED:
            return f"exact with unsigned weights, which is slower: {SATURATES}{seven}"
        return f"refused, since it would not be exact: {SATURATES}{seven}"


def find_exactness(is_exact: Callable[[int, IntegerForm], bool], forms: tuple[IntegerForm, ...]) -> Exactness:
    """The exactness of a library that has these forms; `is_exact` runs the probes of a number of bits in one of them.

    Where plain products with eight bits are exact, nothing else is run.
    """

    def most_bits(form: IntegerForm) -> int:
        return next((bits for bits in (INT8.weights, SEVEN_BITS) if form in forms and is_exact(bits, form)), 0)

    plain = most_bits(IntegerForm.PLAIN)
    return Exactness(plain, 0 if plain == INT8.weights else most_bits(IntegerForm.SWITCHED))


def weight_bits(segment: Path) -> int | None:
    """Bits that the integer weights of an ONNX file may have, eight where it doesn't say; None without integers.

    The runtime has no onnx. Names stand in such a file as they are, and whatever multiplies integers rounds an
    activation first. Raises BundleError for a file that can't be read.
    """
    try:
        text = segment.read_bytes()
    except OSError as e:
        raise BundleError(f"can't read {segment}: {e.strerror or e}; copy the bundle again") from e
    if _ROUNDS_ACTIVATIONS not in text:
        return None
    match = _WEIGHT_BITS.search(text)
    return INT8.weights if match is None else int(match[1])


class Arithmetic(Record):
    """The arithmetic of a backend on this machine.

    `integers` is the form of integer products, None where none is exact and a segment with them is refused; `rest` the
    type around them.
    """

    integers: str | None
    rest: str
    text: str

    @staticmethod
    def of(exactness: Exactness, bits: int, rest: str = "f32", remark: str = "") -> Arithmetic:
        """That of weights of `bits`; a `remark` follows in the text."""
        form = exactness.form(bits)
        text = exactness.described(bits) + (f"; {remark}" if remark else "")
        return Arithmetic(integers=None if form is None else form.value, rest=rest, text=text)


@runtime_checkable
class SaysArithmetic(Protocol):
    """A backend that knows what it computes in."""

    def arithmetic(self, bits: int) -> Arithmetic:
        """Return the arithmetic of segments with weights of `bits` here; probes this machine the first time."""
        ...


def arithmetic_of(backend: object, precision: str) -> Arithmetic | None:
    """Return a backend's arithmetic for a bundle of some precision; None for one without integers, and on a GPU."""
    bits = PRECISIONS.get(precision)
    return backend.arithmetic(bits.weights) if bits is not None and isinstance(backend, SaysArithmetic) else None


@runtime_checkable
class SaysType(Protocol):
    """An engine that may compute in another type than float32."""

    @property
    def rest(self) -> str:
        """The type around its integers, once it has run: "f32" or "bf16"."""
        ...


def once_per_process(make: Callable[P, T]) -> Callable[P, T]:
    """Keep what a function returns for each of its arguments. Threads that ask at the same time wait for one call.

    A fork keeps it too, with a lock of its own: the thread that held this one may not be there.
    """
    lock, results = Lock(), dict[Any, T]()

    def unlocked() -> None:
        nonlocal lock
        lock = Lock()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=unlocked)

    @wraps(make)
    def called(*arguments: P.args, **named: P.kwargs) -> T:
        key = arguments, tuple(named.items())
        with lock:
            if key not in results:
                results[key] = make(*arguments, **named)
            return results[key]

    return called


@cache
def advise(text: str) -> None:
    """Warn of something that works, but not as well as it could here: each text once per process."""
    warnings.warn(text, AdviceWarning, stacklevel=3)
