"""Train routers for a model, which `--policy l2c:FILE` reads (Learning-to-Cache, arXiv 2406.01733); weights are frozen.

    python -m ditc.compiler.train_routers digits --steps 50 --out routers.pt [--iterations 400] [--penalty 1e-4]

At every second step, m, branch i gives w f(h) + (1 - w) f_s with f_s its output one step earlier, gates those of m, and

    loss = mean (prediction - exact prediction)^2 + penalty * sum_i w_i        w = sigmoid(logit), logit in [-5, 5]

An iteration runs a batch of new images through the whole FP trajectory, guidance and all, and moves the router of each
such step once; a model of prompts is asked for those that a compile takes. So no data set is needed, and any sampler
serves; the paper noises pictures of ImageNet instead. Its penalty, 1e-6 there, is worth what the model's own errors
are: the first line says how large those are.

Held at a time are the branches' outputs at one step and the stream in front of each branch: gradients compute branches
anew, one at a time. After every iteration FILE.progress is written, from which the same command goes on, with the
numbers that it would have had.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ditc.compiler.examples import conditions_of
from ditc.compiler.exporting import model_digest
from ditc.compiler.options import CompileOptions
from ditc.compiler.plan import Plan
from ditc.compiler.planning import make_plan
from ditc.compiler.torch_engines import watching_engines
from ditc.compiler.trajectories import purposed_request
from ditc.errors import DitcError, InputError
from ditc.exporter.protocol import TrajectoryModel
from ditc.exporter.router_files import write_routers
from ditc.exporter.seams import first_streams, seams_of
from ditc.exporter.segments import own_names
from ditc.exporter.weight_files import read_mapping
from ditc.files import atomic_write, digest_of
from ditc.routers import Routers, computed_rows, reuses
from ditc.runtime.host_executor import HostExecutor
from ditc.streams import IMAGE

__all__ = ["Recipe", "RouterTraining", "blended", "train"]

ROUTER_NOISE = 7_000_003  # apart from the seeds of images
LARGEST_LOGIT = 5.0
THETAS = (0.1, 0.5, 0.9)  # at which the end says what computes


@dataclass(frozen=True)
class Recipe:
    """All that decides the numbers beside the model; rate and penalty are per router and step."""

    steps: int = 50
    cfg: float = 1.5
    sampler: str | None = None
    batch: int = 8
    rate: float = 1e-2
    penalty: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("rate", 0), ("penalty", 0)):
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise InputError(f"--{name} takes a number of {least} or more, found {value:g}")


def blended(
    model: TrajectoryModel, inputs: Mapping[str, Tensor], earlier: Mapping[str, Tensor], logits: Tensor
) -> Tensor:
    """Return the prediction (rows, channels, *space) with each branch between its own output and that of `earlier`.

    `inputs` are those of a segment that computes everything, `logits` (branches,). Branches are computed again when
    gradients are asked for, so that autograd holds one of them at a time.
    """
    parts = model.unpack(own_names({name: table for name, table in inputs.items() if name != "x"}))
    h, weights = first_streams(model, inputs["x"], parts), torch.sigmoid(logits)
    for seam, weight in zip(seams_of(model), weights, strict=True):
        outs: Any = checkpoint(seam.compute, dict(h), parts, use_reentrant=False)
        named = model.spec.wiring.outputs(seam.name).items()
        for (name, output), out in zip(named, outs, strict=True):
            mixed = weight * out + (1 - weight) * earlier[f"cache.{name}"]
            h[output.stream] = seam.merge(h[output.stream], mixed, parts, output)
    return model.head(h[IMAGE], parts)


@dataclass
class RouterTraining:
    """Routers on their way: logits of every step that may reuse, the optimizer, and what each iteration lost."""

    model: Any
    recipe: Recipe
    plan: Plan = field(init=False)
    log: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        recipe = self.recipe
        options = CompileOptions(policy="none", precision="fp32", steps=recipe.steps, cfg=recipe.cfg, seed=recipe.seed)
        _, examples = conditions_of(self.model)
        options = options.model_copy(update={"sampler": recipe.sampler})
        self.plan = make_plan(self.model, options, examples=examples)
        branches = len(self.plan.spec.branches)
        if not branches:
            raise InputError(f"{self.plan.spec.name} has no branches, so there is nothing to route")
        generator = torch.Generator().manual_seed(recipe.seed)
        self.logits = {
            step: torch.randn(branches, generator=generator).requires_grad_() for step in reuses(recipe.steps)
        }
        self.optimizer = torch.optim.AdamW(self.logits.values(), lr=recipe.rate, weight_decay=0.0)
        self.model.requires_grad_(requires_grad=False)

    @property
    def iteration(self) -> int:
        """Iterations that are done."""
        return len(self.log)

    def advance(self) -> dict[str, float]:
        """Run a batch of images, move every router once, and return means over the routers of this iteration."""
        size, earlier, losses = self.recipe.batch, dict[str, Tensor](), list[dict[str, float]]()
        calls = iter(range(self.recipe.steps))

        def show(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
            step = next(calls)
            if step in self.logits:
                losses.append(self._moved(step, inputs, outputs["out"], earlier))
            earlier.update(outputs)

        engines: Any = watching_engines(self.model, self.plan.program, show)
        runner = HostExecutor(self.plan.spec, self.plan.program, self.plan.tables, engines, self.recipe.cfg)
        first = self.iteration * size
        for _ in runner.run(*purposed_request(self.plan, range(first, first + size), ROUTER_NOISE)):
            pass
        self.log.append({name: sum(loss[name] for loss in losses) / len(losses) for name in losses[0]})
        return self.log[-1]

    @torch.enable_grad()  # the engines run without
    def _moved(
        self, step: int, inputs: Mapping[str, Tensor], exact: Tensor, earlier: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Move the router of a step, and return its loss, error and mean score before that."""
        logits, channels = self.logits[step], self.plan.spec.in_channels  # the learned variance is not compared
        gap = blended(self.model, inputs, earlier, logits)[:, :channels] - exact[:, :channels]
        error, scores = gap.square().mean(), torch.sigmoid(logits)
        loss: Any = error + self.recipe.penalty * scores.sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()  # what has no gradient, the other steps' routers, stays
        with torch.no_grad():
            logits.clamp_(-LARGEST_LOGIT, LARGEST_LOGIT)
        return {"loss": loss.item(), "error": error.item(), "score": scores.mean().item()}

    def routers(self) -> Routers:
        """Return the routers in the order of the released form; those of steps that always compute are zeros."""
        rows = [self.logits.get(step) for step in range(self.recipe.steps)]
        branches = self.plan.spec.branches
        zeros = (0.0,) * len(branches)
        return Routers(tuple(zeros if row is None else tuple(row.tolist()) for row in reversed(rows)), branches)

    def key(self) -> str:
        """Return a digest of all that a training which goes on must agree with."""
        return digest_of([model_digest(self.model), asdict(self.recipe), self.plan.examples.digests])

    def save(self, path: Path) -> None:
        """Write down where the training is, whole or not at all."""
        buffer, logits = BytesIO(), {step: row.detach() for step, row in self.logits.items()}
        state = {"key": self.key(), "logits": logits, "optimizer": self.optimizer.state_dict(), "log": self.log}
        torch.save(state, buffer)
        atomic_write(path, buffer.getvalue())

    def resume(self, path: Path) -> None:
        """Take over what was written down, where something was. Raises InputError for that of another training."""
        if not path.is_file():
            return
        state = read_mapping(path)
        if state.get("key") != self.key():
            raise InputError(f"{path} is of another model or recipe; remove it, or choose another --out")
        with torch.no_grad():
            for step, row in self.logits.items():
                row.copy_(state["logits"][step])
        self.optimizer.load_state_dict(state["optimizer"])
        self.log = state["log"]


def train(training: RouterTraining, iterations: int, out: Path, say: Callable[[str], None]) -> Routers:
    """Train until so many iterations are done, and write the routers; says how it goes, and how long it will take.

    Raises InputError for less than one iteration, whose routers nobody trained, and for the progress of another
    training.
    """
    if iterations < 1:
        raise InputError(f"--iterations takes 1 or more, found {iterations}")
    for note in training.plan.spec.notes:
        say(note)
    progress = out.with_name(f"{out.name}.progress")
    training.resume(progress)
    started, first = time.monotonic(), training.iteration
    while training.iteration < iterations:
        now = training.advance()
        training.save(progress)
        done, seconds = training.iteration, time.monotonic() - started
        if done == first + 1 or done % max(1, iterations // 20) == 0 or done == iterations:
            left = seconds / (done - first) * (iterations - done)
            say(
                f"{done:6d} of {iterations}  loss {now['loss']:.3e}  error {now['error']:.3e}  score {now['score']:.3f}"
                f"  {seconds:.0f} s, about {left:.0f} s left"
            )
    routers = training.routers()
    write_routers(out, routers)
    for theta in THETAS:
        rows = computed_rows(routers, theta)
        share, partial = sum(map(sum, rows)) / sum(map(len, rows)), len({row for row in rows if not all(row)})
        say(f"theta {theta:g}: {share:.1%} of branches compute, {partial} different rows that reuse")
    return routers


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train routers of Learning-to-Cache for a model.")
    parser.add_argument("model", help="as ditc compile takes it")
    parser.add_argument("--out", type=Path, required=True, help="file of the routers")
    parser.add_argument("--iterations", type=int, default=400, help="batches of images; each moves every router once")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name}", type=str if default is None else type(default), default=default)
    return parser.parse_args()


def main() -> None:
    """Train from where the progress beside the output ends, or from the beginning."""
    from ditc.exporter.models import load_model

    options = vars(_options())
    name, out, iterations = (options.pop(key) for key in ("model", "out", "iterations"))
    try:
        train(RouterTraining(load_model(name), Recipe(**options)), iterations, out, _say)
    except DitcError as e:
        sys.stderr.write(f"{e}\n")
        raise SystemExit(2) from e


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
