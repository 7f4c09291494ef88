"""Streams between the branches of a model, and the outputs of branches that a cache keeps.

Blocks pass on the image's tokens, and for joint attention others beside them, a text's. The head reads IMAGE alone, so
another stream matters only as far as a branch that computes reads it further on. A step that computes nothing needs no
other stream; one that computes some branches may.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field, PositiveInt

from ditc.records import PartialRecord, Record

__all__ = ["IMAGE", "BranchStreams", "Output", "Wiring"]

IMAGE = "image"  # the stream that the head reads
NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"  # it becomes part of a port's


class Output(PartialRecord):
    """One output of a branch, before its gate, and the stream that it is merged into.

    `shape` is that of the tensor without the batch axis; None stands for the model's `branch_shape`.
    """

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"shape"})

    name: str = Field(pattern=NAME)
    shape: tuple[PositiveInt, ...] | None = Field(default=None, min_length=1)
    stream: str = Field(default=IMAGE, pattern=NAME)


class BranchStreams(Record):
    """The streams that a branch reads, and its outputs in the order in which it returns them."""

    reads: tuple[str, ...] = Field(default=(IMAGE,), min_length=1)
    outputs: tuple[Output, ...] = Field(default=(Output(name=IMAGE),), min_length=1)


IMAGE_ALONE = BranchStreams()  # of a branch that is not listed


@dataclass(frozen=True)
class Wiring:
    """The branches of a model in the order they run, and the streams of those that don't go from image to image.

    A cached value is an output of a branch. It has the branch's name; where there are several, BRANCH.OUTPUT.
    """

    branches: tuple[str, ...]
    listed: Mapping[str, BranchStreams]

    def of(self, branch: str) -> BranchStreams:
        """Return the streams of a branch."""
        return self.listed.get(branch, IMAGE_ALONE)

    def outputs(self, branch: str) -> dict[str, Output]:
        """Return the outputs of a branch by the name of the cached value."""
        outputs = self.of(branch).outputs
        return {branch if len(outputs) == 1 else f"{branch}.{output.name}": output for output in outputs}

    @property
    def values(self) -> dict[str, Output]:
        """The outputs of all branches by the name of the cached value, in the order in which they are computed."""
        return {value: output for branch in self.branches for value, output in self.outputs(branch).items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of cached values without the batch axis, of those that have another one than `branch_shape`."""
        return {value: output.shape for value, output in self.values.items() if output.shape is not None}

    @property
    def streams(self) -> tuple[str, ...]:
        """The names of all streams, IMAGE first."""
        every = [self.of(branch) for branch in self.branches]
        written = (output.stream for each in every for output in each.outputs)
        return tuple(dict.fromkeys([IMAGE, *(name for each in every for name in each.reads), *written]))

    def computed_by(self, compute: Sequence[bool]) -> tuple[str, ...]:
        """Return the values that a pass computes, whose mask has an entry for each branch."""
        pairs = zip(self.branches, compute, strict=True)
        return tuple(value for branch, computes in pairs if computes for value in self.outputs(branch))

    def read_by(self, compute: Sequence[bool], writes: Collection[str]) -> tuple[str, ...]:
        """Return the values that a pass takes from a cache: of the branches that it skips what decides anything.

        That is an output to a stream that the head reads, or further on a branch that computes and itself decides
        something: the prediction, or one of the values that the pass `writes`.
        """
        wanted, values = {IMAGE}, list[str]()
        for branch, computes in reversed(list(zip(self.branches, compute, strict=True))):
            outputs = self.outputs(branch)
            if not computes:
                values = [value for value, output in outputs.items() if output.stream in wanted] + values
            elif any(output.stream in wanted or value in writes for value, output in outputs.items()):
                wanted |= set(self.of(branch).reads)
        return tuple(values)

    def contradictions(self) -> Iterator[str]:
        """A sentence for each contradiction in the streams; the first one is all that is sure."""
        if not self.listed:
            return
        for branch in (branch for branch in self.listed if branch not in self.branches):
            yield f"streams names {branch!r}, which is none of the branches"
        for branch, each in self.listed.items():
            names = [output.name for output in each.outputs]
            for kind, texts in (("an output", names), ("a stream that it reads", each.reads)):
                if len(set(texts)) < len(texts):
                    yield f"branch {branch!r} names {kind} twice: {', '.join(texts)}"
        values = [value for branch in self.branches for value in self.outputs(branch)]
        for value in (value for value in dict.fromkeys(values) if values.count(value) > 1):
            yield f"two outputs are cached as {value!r}"
        yield from self._outputs_for_nobody()

    def _outputs_for_nobody(self) -> Iterator[str]:
        """An output has to reach the head: by itself, or through a branch further on that reads its stream."""
        wanted = {IMAGE}
        for branch in reversed(self.branches):
            for output in self.of(branch).outputs:
                if output.stream not in wanted:
                    yield (
                        f"output {output.name!r} of branch {branch!r} goes to the stream {output.stream!r}, which no "
                        "later branch reads; leave that output out"
                    )
            wanted |= set(self.of(branch).reads)
        if not any(output.stream == IMAGE for output in self.values.values()):
            yield f"no branch adds to the stream {IMAGE!r}, which is what the head reads"
