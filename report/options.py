"""The settings of `ditc report`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from ditc.choices import Peer
from ditc.errors import InputError
from ditc.quality.options import EvaluateOptions, WorseGate
from ditc.settings import Option, Settings
from ditc.speed.options import BenchOptions, SlowerGate, peer_names, row_of_names

__all__ = ["ReportOptions"]

GATED_IMAGES = 1000  # of each seed, where --fail-if-worse asks for distributions and nothing says how many
NO_PEER = ("none",)


class ReportOptions(Settings):
    """The settings of `ditc report`.

    `images` are walked step by step beside FP, from `seed`; `requests` full batches are timed after one other.
    `against` of None is the FP program in ONNX Runtime where that can be measured. `evaluate_images` of each of
    `evaluate_seeds` measure distributions as `ditc evaluate` does; None leaves them out unless `fail_if_worse` asks.
    """

    images: Annotated[int, Field(ge=1), Option("Images to hold against FP, step by step; the first 12 are shown.")] = 16
    seed: Annotated[int, Field(ge=0), Option("Seed of the noise.", advice="set --seed 0 or more")] = 1
    requests: Annotated[int, Field(ge=1), Option("Full batches to time, after one other.")] = 10
    against: Annotated[
        tuple[Peer, ...] | None,
        Option(
            "Peers to time in turn with the bundle, may be given again; default FP in ONNX Runtime.",
            metavar="PEER,...|all|none",
            several=True,
        ),
    ] = None
    evaluate_images: Annotated[
        int | None,
        Option(
            "Images of each seed for distributions, as `ditc evaluate`; default 1000 with --fail-if-worse, else none."
        ),
    ] = None
    evaluate_seeds: Annotated[tuple[int, ...], Option("Seeds of those images.")] = (0, 1, 2)
    fail_if_worse: WorseGate = None
    fail_if_slower: SlowerGate = None

    @field_validator("against", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        items = row_of_names(given)
        return None if items is None else () if items == NO_PEER else peer_names(items)

    @model_validator(mode="after")
    def _can_be_measured(self) -> ReportOptions:
        _ = self.bench, self.evaluation  # what they refuse is refused before anything runs
        return self

    @property
    def bench(self) -> BenchOptions:
        """The settings that the bundle is timed with."""
        return BenchOptions(
            requests=self.requests, warmup=1, against=self.against or (), fail_if_slower=self.fail_if_slower
        )

    @property
    def evaluation(self) -> EvaluateOptions | None:
        """The settings that distributions are measured with; None where nothing asks for them."""
        images = self.evaluate_images
        if images is None and self.fail_if_worse is None:
            return None
        try:
            return EvaluateOptions(
                images=GATED_IMAGES if images is None else images,
                seeds=self.evaluate_seeds,
                fail_if_worse=self.fail_if_worse,
            )
        except InputError as e:  # two of its options have other names here
            named = str(e).replace("--images", "--evaluate-images").replace("--seeds", "--evaluate-seeds")
            raise InputError(named) from e
