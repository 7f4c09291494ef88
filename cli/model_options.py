"""The options that name a model, and state what its file leaves open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
from pydantic import Field, model_validator

from ditc.choices import FlowTimes, ProcessPrediction
from ditc.errors import InputError
from ditc.loras import loras_from
from ditc.settings import Option, Settings

if TYPE_CHECKING:
    from ditc.exporter.model_facts import ModelFacts

__all__ = ["ModelOptions", "echo_note", "model_argument"]

READING = "Reading MODEL"

model_argument = click.argument("model", required=False)


class ModelOptions(Settings):
    """The options that say something of a model beside its name; None and False leave it to the file, or to a guess."""

    random_size: Annotated[
        str | None,
        Option("A released size with random weights, like dit-xl-2-256.", flag="--random", metavar="SIZE"),
    ] = None
    vae: Annotated[Path | None, Option("AutoencoderKL folder whose decoder makes the images.")] = None
    lora: Annotated[
        tuple[str, ...],
        Option(
            "LoRA merged into the weights before anything else, WEIGHT 1 if not given; may be given again.",
            metavar="FILE[:WEIGHT]",
            group=READING,
            several=True,
        ),
    ] = ()
    conditions: Annotated[
        Path | None,
        Option(
            "Typical conditions other than a class, an .npz file with an array of each: the compile runs on them.",
            metavar="FILE",
            group=READING,
        ),
    ] = None
    prompts: Annotated[
        Path | None,
        Option(
            "Prompts that the compile runs on, where MODEL has text encoders: one a line, in UTF-8; default is a list "
            "of 120.",
            metavar="FILE",
            group=READING,
        ),
    ] = None
    no_text: Annotated[
        bool, Option("Leave text encoders out of the bundle: it takes embeddings instead of prompts.", group=READING)
    ] = False
    heads: Annotated[
        int | None, Field(ge=1), Option("Attention heads, where the checkpoint's width does not tell.", group=READING)
    ] = None
    classes: Annotated[
        int | None, Option("Classes of a checkpoint; a row more in its label table is for none.", group=READING)
    ] = None
    no_null: Annotated[
        bool, Option("The checkpoint has no class for none: it was trained without; needs --cfg 1.", group=READING)
    ] = False
    prediction: Annotated[
        ProcessPrediction | None, Option("What a checkpoint predicts; noise if not given.", group=READING)
    ] = None
    flow_times: Annotated[
        FlowTimes | None,
        Option("Times that a flow's checkpoint takes at the noise and at the data; 0:1 if not given.", group=READING),
    ] = None
    beta_schedule: Annotated[
        str | None,
        Option(
            "Betas that a checkpoint was trained on; the release's linear ones if not given.",
            metavar="linear|scaled-linear|squared-cosine[:START:END]",
            group=READING,
        ),
    ] = None
    train_steps: Annotated[
        int | None, Option("Steps that a checkpoint was trained on; 1000 if not given.", group=READING)
    ] = None
    text_tokens: Annotated[
        int | None,
        Option("Tokens of a text; default is what the model's pipeline takes. Fewer are cheaper.", group=READING),
    ] = None
    size: Annotated[
        str | None,
        Option(
            "Pixels of the pictures, 512 or 512x768, where the model may make others than its own.",
            metavar="SIDE|HxW",
            group=READING,
        ),
    ] = None

    @model_validator(mode="after")
    def _loras_have_weights(self) -> ModelOptions:
        loras_from(self.lora)
        return self

    def name(self, model: str | None, seed: int) -> str:
        """Return the one model that a command line names. Raises InputError for none or two."""
        if (model is None) == (self.random_size is None):
            raise InputError("name one model: MODEL, or --random SIZE")
        return model or f"random:{self.random_size}:{seed}"

    @property
    def reading(self) -> dict[str, Any]:
        """The keyword arguments of `compile_model` and `tune_model` that say how the model is read."""
        return {
            "num_heads": self.heads,
            "vae": self.vae,
            "loras": self.lora,
            "facts": self.facts,
            "conditions": self.conditions,
            "prompts": self.prompts,
            "text": not self.no_text,
        }

    @property
    def facts(self) -> ModelFacts:
        """The stated facts of the model. Raises InputError for what can't be."""
        from ditc.exporter.model_facts import ModelFacts, beta_schedule_facts, size_fact

        return ModelFacts(
            classes=self.classes,
            null_class=False if self.no_null else None,
            prediction=self.prediction,
            flow_times=self.flow_times,
            train_steps=self.train_steps,
            text_tokens=self.text_tokens,
            size=size_fact(self.size),
            **beta_schedule_facts(self.beta_schedule),
        )


def echo_note(note: str) -> None:
    """Print a line about a model on stderr, before the work begins."""
    click.echo(note, err=True)
