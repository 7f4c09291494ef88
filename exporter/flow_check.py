"""Looks at a model that is said to predict a flow: at its velocity, noise minus clean sample, for noise alone.

- At the noisy end that is nearly the noise. Where time runs the other way it may be as well: noise that is taken for
  data is given back, with the sign that the other direction has.
- In the middle of its times both directions see the same, so the sign tells them apart: a flow takes white noise for
  noise, being trained on samples that are less than white, and points along it.
- Times of 0 to 1 and of 0 to 1000 are told apart by how far the answer has changed at 1.
- A predictor of noise gives back what it is given, at every level; a flow can't at all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ditc.choices import FlowTimes, names_of

__all__ = ["Ends", "FlowLook", "doubts_of_flow", "ends_of"]

Ends = tuple[float, float]  # the times of noise and of data, as the network is given them
Answer = Callable[[float, float], tuple[Tensor, Tensor]]  # (timestep, size of the noise) -> (noise, what is predicted)

# small models of each time, over pixels and over latents (benchmarks/flow_times.json), had
ALIKE = 0.5  # cosine at the noisy end: 0.83 to 0.98
AGAINST = -0.1  # cosine in the middle: 0.32 to 0.50 where time runs as said, -0.50 to -0.32 the other way
REACH = 0.2  # change at time 1, of that at 1000: 0.84 to 1.09 where 1 is the longest, else 0.004 to 0.03
# and predictors of noise
MIDDLE = 0.8  # cosine in the middle: 0.95 to 1
LEVELS = (1.0, 0.75, 0.5, 0.25)
SHARES = (0.75, 1.35)  # share of the noise in what is predicted: 0.98 to 1.25 at each level; of a flow never at all
LONG = 1000.0  # the largest time of those that are no shares


def ends_of(times: str) -> Ends:
    """Return times by name, one of FlowTimes, as numbers: those of noise and of data."""
    noise, data = (float(end) for end in times.split(":"))
    return noise, data


@dataclass(frozen=True)
class FlowLook:
    """A model of a flow, to be looked at as if it had other times than its `own`.

    `answer` is the network over timesteps of `train_steps` at the noisy end and 0 at the clean one.
    """

    answer: Answer
    own: Ends
    train_steps: int

    @property
    def longest(self) -> float:
        """The largest time that its own are held against."""
        return max(*self.own) if max(*self.own) > 1 else LONG

    def velocity(self, times: Ends, level: float) -> tuple[Tensor, Tensor]:
        """(noise, velocity) at a noise level of these times: noise of the size that it has there, alone."""
        (noise_at, data_at), (own_noise_at, own_data_at) = times, self.own
        time = data_at + level * (noise_at - data_at)
        timestep = self.train_steps * (time - own_data_at) / (own_noise_at - own_data_at)
        noise, out = self.answer(timestep, level)
        return noise, out if (noise_at > data_at) == (own_noise_at > own_data_at) else -out

    def cosine(self, times: Ends, level: float) -> float:
        """Return the cosine between noise and velocity at a level of these times."""
        noise, out = self.velocity(times, level)
        return float(cosine_similarity(noise.flatten(), out.flatten(), dim=0))

    def reach(self) -> float:
        """Return how far what it gives for noise has changed at time 1, of the change at the longest."""
        start, one, last = (self._at(time) for time in (0.0, 1.0, self.longest))
        return float((one - start).norm() / (last - start).norm())

    def _at(self, time: float) -> Tensor:
        own_noise_at, own_data_at = self.own
        return self.answer(self.train_steps * (time - own_data_at) / (own_noise_at - own_data_at), 1.0)[1]

    def share(self, level: float) -> float:
        """Return the share of the noise in its velocity at a level of its own times."""
        noise, out = self.velocity(self.own, level)
        return float((noise * out).sum() / noise.square().sum())

    def speaks_against(self, times: Ends, reach: float) -> str:
        """Say what speaks against these times; nothing where nothing does."""
        end, middle = self.cosine(times, 1.0), self.cosine(times, 0.5)
        if not middle > AGAINST:
            return f"in the middle of its times the model points against the noise it is given (cosine {middle:.2f})"
        if not end > ALIKE:
            return f"given noise at the noisy end the model returns nothing like it (cosine {end:.2f}, expected near 1)"
        if max(*times) <= 1 and reach < REACH:
            return f"the model changes from time 0 to 1 by only {reach:.1%} of what it changes to {LONG:g}"
        if max(*times) > 1 and reach > REACH:
            return f"the model changes from time 0 to 1 by {reach:.0%} of what it changes to {self.longest:g}"
        return ""


@torch.no_grad()
def doubts_of_flow(look: FlowLook, corrected_by: str) -> tuple[str, ...]:
    """A line where a model does not do what a flow of its times does; `corrected_by` is where those are said."""
    reach = look.reach()
    if reason := look.speaks_against(look.own, reach):
        others = [name for name in names_of(FlowTimes) if ends_of(name) != look.own]
        fitting = [name for name in others if not look.speaks_against(ends_of(name), reach)]
        hint = f", but one of {' or '.join(fitting)}" if fitting else ""
        noise_at, data_at = look.own
        return (f"{reason}: it seems to be no flow with times {noise_at:g}:{data_at:g}{hint} ({corrected_by})",)
    gives_back = all(SHARES[0] < look.share(level) < SHARES[1] for level in LEVELS)
    if gives_back and look.cosine(look.own, 0.5) > MIDDLE:
        said = "at every noise level the model returns the noise that it is given"
        return (f"{said}: it seems to predict noise, no flow ({corrected_by})",)
    return ()
