"""The settings of `ditc bench` and `ditc estimate`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from ditc.choices import Device, Peer, names_of
from ditc.errors import InputError, unknown_name
from ditc.loras import loras_from
from ditc.settings import Option, Settings

__all__ = ["ALL", "GATES", "BenchOptions", "EstimateOptions", "SlowerGate", "peer_names", "row_of_names"]

ALL = "all"
PEERS = "Peers"
GATES = "Gates"
SlowerGate = Annotated[
    float | None,
    Field(gt=0, allow_inf_nan=False),
    Option(
        "Fail (exit code 1) where a peer's whole run takes less than RATIO times the bundle's.",
        metavar="RATIO",
        group=GATES,
        advice="1 asks for no slower",
    ),
]


def row_of_names(given: Any) -> Any:
    """Return a lone text as a row of one, another row as a tuple; what is no row as it is, for its field to refuse."""
    if isinstance(given, str):
        return (given,)
    return tuple(given) if isinstance(given, Iterable) else given


def peer_names(given: Any) -> Any:
    """Return the peers that were asked for, each once, in the order of their table; an item may be a comma list.

    What is no row of texts is returned as it is, for its field to refuse. Raises InputError for one that there is not.
    """
    items = row_of_names(given)
    if not isinstance(items, tuple) or not all(isinstance(item, str) for item in items):
        return items
    names = {part.strip() for item in items for part in item.split(",")}
    known = names_of(Peer)
    if unknown := sorted(names - {ALL, *known}):
        raise unknown_name("peer", unknown[0], (ALL, *known))
    return tuple(name for name in known if name in names or ALL in names)


class BenchOptions(Settings):
    """The measurements: `requests` full batches after `warmup` others, as many turns of each peer in `against`.

    `model` is the torch model that a user names, as `compile` takes it; without one, what the manifest tells. A median
    request above `max_seconds`, or a peer whose whole run takes less than `fail_if_slower` times the bundle's, is a
    failure.
    """

    requests: Annotated[int, Field(ge=1), Option("Full batches to measure.")] = 10
    warmup: Annotated[int, Field(ge=0), Option("Full batches before those.")] = 2
    trace: Annotated[Path | None, Option("Folder for layers_*.json and profile_*.json.")] = None
    roofline: Annotated[bool, Option("Measure this machine's ceilings, and hold every segment to them.")] = False
    against: Annotated[
        tuple[Peer, ...],
        Option(
            "Peers to measure in turn with the bundle; may be given again.",
            metavar="PEER,...|all",
            group=PEERS,
            several=True,
        ),
    ] = ()
    model: Annotated[
        str | None,
        Option(
            "The model it was compiled from, for peers in torch; those built in and random sizes are known.",
            group=PEERS,
        ),
    ] = None
    heads: Annotated[
        int | None, Field(ge=1), Option("Attention heads of --model, where its width does not tell.", group=PEERS)
    ] = None
    lora: Annotated[
        tuple[str, ...],
        Option(
            "LoRA that it was compiled with, for peers in torch; may be given again.",
            metavar="FILE[:WEIGHT]",
            group=PEERS,
            several=True,
        ),
    ] = ()
    fail_if_slower: SlowerGate = None
    max_seconds: Annotated[
        float | None, Field(gt=0), Option("Fail (exit code 1) where the median request takes longer.", group=GATES)
    ] = None

    _names = field_validator("against", mode="before")(peer_names)
    _loras = field_validator("lora", mode="before")(row_of_names)

    @model_validator(mode="after")
    def _about_something(self) -> BenchOptions:
        loras = loras_from(self.lora) or None
        for option, given in (("--fail-if-slower", self.fail_if_slower), ("--model", self.model), ("--lora", loras)):
            if given is not None and not self.against:
                raise InputError(f"{option} is about peers; name some with --against")
        if self.heads is not None and self.model is None:
            raise InputError("--heads is about the checkpoint of --model; name that too")
        return self


class EstimateOptions(Settings):
    """The place where a bundle would run: a device with published rates, or "here", whose rates are measured."""

    device: Annotated[Device, Option("Where the bundle would run.")] = "here"
