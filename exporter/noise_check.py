"""One look at what a model predicts: weights and their keys can't tell noise from velocity.

At the largest timestep the sample is noise and little else, so a predictor of noise returns nearly what it is given.
One of v returns nearly the negated clean sample there, one of samples the clean sample: neither resembles the noise.
What a flow-matching model gives for a timestep far outside of its [0, 1] resembles nothing.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["doubts_about", "noise_resemblance"]

ALIKE = 0.5  # cosine: a trained predictor of noise has nearly 1, unrelated outputs have 0 +- 0.03
NUMBERS = 1024  # in all rows of the one forward pass, at least


@torch.no_grad()
def noise_resemblance(model: Any) -> float:
    """The cosine between noise and what the model makes of it at the largest timestep; NaN where that is not finite."""
    spec = model.spec
    rows = -(-NUMBERS // (spec.in_channels * spec.height * spec.width))
    noise = torch.randn(rows, *spec.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((rows,), float(spec.diffusion.train_steps - 1))
    out = model(noise, t, torch.arange(rows) % spec.num_classes)[:, : spec.in_channels]
    return float(torch.nn.functional.cosine_similarity(out.flatten(), noise.flatten(), dim=0))


def doubts_about(model: Any, corrected_by: str) -> tuple[str, ...]:
    """A line where the model does not do what its spec says that it predicts; `corrected_by` is where that is said."""
    prediction, found = model.spec.diffusion.prediction, noise_resemblance(model)
    if prediction == "epsilon":
        if found > ALIKE:
            return ()
        return (
            f"given noise at the largest timestep the model returns nothing like it (cosine {found:.2f}, a predictor "
            f"of noise has nearly 1): it may predict something else ({corrected_by}), or be made for flow matching, "
            "which ditc does not know",
        )
    if abs(found) <= ALIKE:
        return ()
    return (
        f"given noise at the largest timestep the model returns much like it (cosine {found:.2f}): it seems to predict "
        f"noise, not {'v' if prediction == 'v' else 'the clean sample'} ({corrected_by})",
    )
