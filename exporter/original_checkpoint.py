"""Checkpoints with the key names of the original DiT release, such as DiT-XL-2-256x256.pt."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from ditc.choices import BetaSchedule
from ditc.errors import CheckpointError, InputError
from ditc.exporter.dit import DIT_SIZES, DiT, DiTConfig
from ditc.exporter.model_facts import ModelFacts, check_of_dit, given_options
from ditc.exporter.sit import SIT_TIMES, sit_from_weights
from ditc.exporter.state_dicts import read_checkpoint
from ditc.exporter.training_args import TrainingArgs, training_args
from ditc.exporter.weight_files import StateDict, load_weights
from ditc.spec import DiffusionSpec, SamplerSpec

__all__ = ["dit_from_checkpoint", "process_from_facts"]

ANCHOR = "x_embedder.proj.weight"  # a key that every such checkpoint has
VAE_STRIDES = (1, 4, 8, 16, 32)  # pixels for one latent, 8 in the release; 1 where pixels are the latents
RELEASED_STEPS = 1000
RELEASED_BETAS = (1e-4, 2e-2)  # of 1,000 steps; fewer steps have larger ones
LATENT_DIFFUSION_BETAS = (8.5e-4, 1.2e-2)

Assumed = tuple[str, ...]
ABOUT_TIMES = (
    "a flow as SiT has it: the model is given t from 0 at the noise to 1 at the data, and returns dx/dt (--flow-times)"
)


def dit_from_checkpoint(path: Path, *, num_heads: int | None = None, facts: ModelFacts | None = None) -> DiT:
    """A DiT from a checkpoint file, or a SiT where it predicts a flow; the configuration is read off the shapes.

    What shapes don't tell is stated by `num_heads` and `facts`, or by the training script's arguments where the file
    has them, or assumed as in the release; then `spec.assumptions` has a line about it. As in the original release,
    guidance applies to the first three latent channels; to all in files of REPA's training. Raises CheckpointError
    naming what doesn't fit.
    """
    facts = facts or ModelFacts()
    check_of_dit(facts, path)
    checkpoint = read_checkpoint(path, ANCHOR)
    shapes, told = shapes_of(checkpoint.tensors, path), training_args(checkpoint.args, path, facts)
    _check_told(told, shapes, path)
    heads, about_heads = _heads(shapes, num_heads, told, path)
    classes, null_class, about_classes = _classes(shapes.label_rows, facts, told, path)
    config = DiTConfig(
        input_size=shapes.input_size,
        patch_size=shapes.patch_size,
        in_channels=shapes.channels,
        hidden_size=shapes.hidden,
        depth=shapes.depth,
        num_heads=heads,
        mlp_ratio=shapes.mlp_width / shapes.hidden,
        num_classes=classes,
        null_class=null_class,
        learn_sigma=shapes.learn_sigma,
        qkv_bias=shapes.qkv_bias,
    )
    model, about_process = _with_process(config, path, checkpoint.tensors, facts, told)
    model.assumptions = (*checkpoint.assumptions, *about_heads, *about_classes, *about_process, *_about_args(told))
    # three are the release's choice "for exact reproducibility"; REPA's samplers guide all
    model.cfg_channels = config.in_channels if checkpoint.is_aligned else min(3, config.in_channels)
    return model.eval()


def _with_process(
    config: DiTConfig, path: Path, tensors: StateDict, facts: ModelFacts, told: TrainingArgs
) -> tuple[DiT, Assumed]:
    """(the model of the process that is stated or told, with its weights; what was assumed of that process)."""
    diffusion, about = process_from_facts(facts, told, learned_sigma=config.learn_sigma)
    if diffusion.prediction == "flow":
        times = facts.flow_times or told.flow_times
        return sit_from_weights(config, path, tensors, times or SIT_TIMES), about if times else (*about, ABOUT_TIMES)
    model = DiT(config, name=path.stem, diffusion=diffusion)
    load_weights(model, tensors, path)
    model.sampler = SamplerSpec(variance="learned" if config.learn_sigma else "fixed-small")
    return model, about


@dataclass(frozen=True)
class Shapes:
    """Sizes that a checkpoint's shapes spell out."""

    hidden: int
    channels: int
    patch_size: int
    input_size: int
    depth: int
    mlp_width: int
    label_rows: int
    learn_sigma: bool
    qkv_bias: bool


def shapes_of(tensors: dict[str, Tensor], source: Path) -> Shapes:
    """Read the shapes. Raises CheckpointError naming the key that doesn't fit."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != rank or 0 in tensors[name].shape:
            problem = "is missing" if name not in tensors else f"has shape {tuple(tensors[name].shape)}"
            raise CheckpointError(f"{source} is not an original DiT checkpoint: {name} {problem}")
        return tuple(tensors[name].shape)

    hidden, channels, patch, _ = shape(ANCHOR, 4)
    depth = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d{1,9})\.", name))), default=-1)
    if not 0 < depth <= len(tensors):  # a stray number is not built, though it might fit no memory
        problem = f"blocks up to number {depth - 1} in {len(tensors)} keys" if depth else "no blocks.0.attn.qkv.weight"
        raise CheckpointError(f"{source} is not an original DiT checkpoint: it has {problem}")
    outputs = shape("final_layer.linear.weight", 2)[0] // patch**2
    if outputs not in (channels, 2 * channels):
        raise CheckpointError(f"{source}: final_layer gives {outputs} channels, expected {channels} or {2 * channels}")
    return Shapes(
        hidden=hidden,
        channels=channels,
        patch_size=patch,
        input_size=math.isqrt(shape("pos_embed", 3)[1]) * patch,
        depth=depth,
        mlp_width=shape("blocks.0.mlp.fc1.weight", 2)[0],
        label_rows=shape("y_embedder.embedding_table.weight", 2)[0],
        learn_sigma=outputs == 2 * channels,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
    )


def _check_told(told: TrainingArgs, shapes: Shapes, source: Path) -> None:
    """Raise CheckpointError where the training script's arguments tell of a model of other shapes."""
    hidden, depth, _ = DIT_SIZES[told.size] if told.size else (None, None, None)
    pixels = [shapes.input_size * stride for stride in VAE_STRIDES]
    for name, said, fits, of_weights in (
        ("width", hidden, hidden == shapes.hidden, shapes.hidden),
        ("blocks", depth, depth == shapes.depth, shapes.depth),
        ("patch size", told.patch, told.patch == shapes.patch_size, shapes.patch_size),
        (
            "image_size",
            told.image_size,
            told.image_size in pixels,
            f"{', '.join(map(str, pixels[:-1]))} or {pixels[-1]} pixels",
        ),
        ("learn_sigma", told.learn_sigma, told.learn_sigma == shapes.learn_sigma, shapes.learn_sigma),
    ):
        if said is not None and not fits:
            raise CheckpointError(
                f"{source}: its training script's arguments say {name} {said}, its weights {of_weights}; if the "
                "arguments are another model's, save the state dict alone"
            )


def _about_args(told: TrainingArgs) -> Assumed:
    """The line about the training script's arguments that were not understood, if any were."""
    if not told.unread:
        return ()
    more = f" and {len(told.unread) - 3} more" if len(told.unread) > 3 else ""
    return (
        f"the training script's arguments also say {', '.join(told.unread[:3])}{more}, which ditc does not read (state "
        "what it means: --classes, --no-null, --prediction, --beta-schedule, --train-steps)",
    )


def _heads(shapes: Shapes, given: int | None, told: TrainingArgs, source: Path) -> tuple[int, Assumed]:
    """(attention heads, what was assumed)."""
    hidden = shapes.hidden
    if given is not None:
        if given < 1 or hidden % given:
            raise CheckpointError(f"{source} is {hidden} wide, which {given} heads don't divide; correct --heads")
        return given, ()
    if told.size:
        return DIT_SIZES[told.size][2], ()
    heads = {width: count for width, _, count in DIT_SIZES.values()}
    if hidden not in heads:
        raise CheckpointError(f"{source} is {hidden} wide, which no released DiT is; give its head count with --heads")
    return heads[hidden], (f"{heads[hidden]} attention heads, as the released DiT of width {hidden} has (--heads)",)


def _classes(rows: int, facts: ModelFacts, told: TrainingArgs, source: Path) -> tuple[int, bool, Assumed]:
    """(classes, is the last row of the label table for none?, what was assumed)."""
    classes, null_class, who = facts.classes, facts.null_class, "the options"
    if classes is None and null_class is None:
        who = "its training script's arguments"
        classes = told.classes
        null_class = None if told.label_dropout is None else told.label_dropout > 0
    if classes is None and null_class is None:
        if rows < 2:
            raise CheckpointError(
                f"{source}: its label table has one row, expected a class and one for none; where the model was "
                "trained without dropping labels say so with --no-null"
            )
        about = f"{_counted(rows - 1)} and a null class, from {rows} label rows (--classes, --no-null)"
        return rows - 1, True, (about,)
    if classes is not None and null_class is None and rows in (classes, classes + 1):
        null_class = rows == classes + 1
    class_count = rows - bool(null_class)
    if null_class is None or class_count < 1 or classes not in (None, class_count):
        said = f"{'classes' if classes is None else _counted(classes)}{NULL_WORDS[null_class]}"
        raise CheckpointError(
            f"{source}: its label table has {rows} row{'s' * (rows != 1)}, {who} say {said}; correct --classes or "
            "--no-null"
        )
    return class_count, null_class, ()


def _counted(classes: int) -> str:
    return f"{classes} class{'es' * (classes != 1)}"


NULL_WORDS = {None: ", with a null class or without", True: " and a null class", False: " and no null class"}


def process_from_facts(facts: ModelFacts, told: TrainingArgs, *, learned_sigma: bool) -> tuple[DiffusionSpec, Assumed]:
    """The diffusion process as stated, else as the training script tells, else the release's; and what was assumed.

    Raises InputError for betas that can't be, and for facts of another kind of process than the model's.
    """
    prediction = facts.prediction or told.prediction
    if prediction == "flow":
        _check_no_betas(facts)
        return DiffusionSpec(prediction="flow", learned_sigma=learned_sigma), ()
    if facts.flow_times is not None:
        raise InputError(f"--flow-times {facts.flow_times} is of a model that predicts a flow; add --prediction flow")
    schedule = facts.beta_schedule or told.beta_schedule
    steps = facts.train_steps or told.train_steps
    stated_range = facts.beta_range or told.beta_range
    first, last = stated_range or _usual_betas(schedule or "linear", steps or RELEASED_STEPS)
    assumed = [] if prediction else ["noise prediction (--prediction)"]
    if schedule != "squared-cosine" and not (stated_range and schedule):
        assumed.append(f"{schedule or 'linear'} betas from {first:g} to {last:g} (--beta-schedule)")
    if not steps:
        assumed.append(f"{RELEASED_STEPS} training steps (--train-steps)")
    try:
        diffusion = DiffusionSpec(
            train_steps=steps or RELEASED_STEPS,
            beta_schedule=schedule or "linear",
            beta_start=first,
            beta_end=last,
            prediction=prediction or "epsilon",
            learned_sigma=learned_sigma,
        )
    except ValidationError as e:
        raise InputError(
            f"betas from {first:g} to {last:g} over {steps} training steps can't be; give them with --beta-schedule "
            "NAME:START:END"
        ) from e
    return diffusion, (f"a process as usual: {', '.join(assumed)}",) if assumed else ()


def _check_no_betas(facts: ModelFacts) -> None:
    useless = [option for option in given_options(facts) if option in ("--beta-schedule", "--train-steps")]
    if useless:
        raise InputError(
            f"a flow has neither betas nor training steps; leave out {' and '.join(useless)} (its times are those of "
            "--flow-times)"
        )


def _usual_betas(schedule: BetaSchedule, steps: int) -> tuple[float, float]:
    """The ends that a schedule has in the code it comes from; the release's linear one depends on the step count."""
    if schedule == "scaled-linear":
        return LATENT_DIFFUSION_BETAS
    first, last = RELEASED_BETAS
    scale = RELEASED_STEPS / steps if schedule == "linear" else 1.0
    return scale * first, scale * last
