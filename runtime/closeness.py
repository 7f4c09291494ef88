"""Distances of images and trajectories from the exact ones that they are paired with: same noise, same label.

Every measure of images takes `seen` and `exact`, each (n, channels, *space), and gives one number per image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.checks import Verification
from ditc.spec import Record

__all__ = [
    "StepDrift",
    "cosine",
    "measures_of",
    "psnr_db",
    "relative_error",
    "ssim",
    "ssim_window",
    "step_drift",
    "trajectory_comparison",
]

Images = NDArray[Any]  # (n, channels, height, width), or (n, channels, *space) of latents; of any type of number
PerImage = NDArray[np.float64]  # (n,)

PEAK = 2.0  # the range of values of images in [-1, 1]
SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03  # Wang et al. 2004


def relative_error(seen: NDArray[Any], expected: NDArray[Any]) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float(np.linalg.norm(np.float64(seen) - np.float64(expected)) / np.linalg.norm(np.float64(expected)))


def psnr_db(seen: Images, exact: Images, peak: float = PEAK) -> PerImage:
    """Peak signal-to-noise ratio of each image in dB, (n,); `peak` is the range of values, 2 for [-1, 1]."""
    gap = (np.float64(seen) - np.float64(exact)).reshape(len(seen), -1)
    return np.asarray(10 * np.log10(peak**2 / np.maximum((gap**2).mean(axis=1), 1e-20)))


def cosine(seen: Images, exact: Images) -> PerImage:
    """Cosine of the angle between the two images of each pair, as vectors; (n,)."""
    a, b = (np.float64(images).reshape(len(images), -1) for images in (seen, exact))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.maximum(lengths, 1e-20))


def ssim_window(height: int, width: int) -> int:
    """The side of SSIM's window in pixels: 11, or the largest odd number that fits a smaller image."""
    fits = min(height, width)
    return min(SSIM_WINDOW, fits - 1 + fits % 2)


def ssim(seen: Images, exact: Images, peak: float = PEAK) -> PerImage:
    """Structural similarity of each pair, (n,): 1 for equal images (Wang, Bovik, Sheikh and Simoncelli 2004, eq. 13).

    Means, variances and the covariance are local, under a Gaussian window of deviation 1.5 at every place where it
    fits whole; averaged over places and channels.
    """
    height, width = seen.shape[-2:]
    side = ssim_window(height, width)
    rows, columns = sliding_gaussian(height, side), sliding_gaussian(width, side)

    def local(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(rows @ values @ columns.T)

    a, b = np.float64(seen), np.float64(exact)
    mean_a, mean_b = local(a), local(b)
    var_a, var_b, covariance = local(a * a) - mean_a**2, local(b * b) - mean_b**2, local(a * b) - mean_a * mean_b
    c1, c2 = (SSIM_K1 * peak) ** 2, (SSIM_K2 * peak) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    bottom = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return np.asarray((top / bottom).reshape(len(seen), -1).mean(axis=1))


def sliding_gaussian(size: int, side: int) -> NDArray[np.float64]:
    """A Gaussian window of `side` pixels at every place along `size` pixels, as a matrix (places, size)."""
    weights = np.exp(-(((np.arange(side) - side // 2) / SSIM_SIGMA) ** 2) / 2)
    matrix = np.zeros((size - side + 1, size))
    for place, row in enumerate(matrix):
        row[place : place + side] = weights / weights.sum()
    return matrix


PAIRED: Mapping[str, Callable[[Images, Images], PerImage]] = {"psnr_db": psnr_db, "ssim": ssim, "cosine": cosine}
NEED_A_PLANE = {"ssim"}


def measures_of(shape: Sequence[int]) -> Mapping[str, Callable[[Images, Images], PerImage]]:
    """Return the measures by name that images, or latents, of `shape` have: (channels, *space)."""
    has_plane = len(shape) > 2
    return {name: measure for name, measure in PAIRED.items() if has_plane or name not in NEED_A_PLANE}


class StepDrift(Record):
    """The drift of a trajectory's samples after each step from the exact ones on the same noise.

    `relative_error` is per step. The drifts are per step and channel: `mean_drift` how far the mean has moved, in
    standard deviations of the exact samples; `variance_drift` the ratio of the variances less 1. A channel that is
    constant in the exact samples has drift 0.
    """

    images: int
    relative_error: tuple[float, ...]
    mean_drift: tuple[tuple[float, ...], ...]
    variance_drift: tuple[tuple[float, ...], ...]


def step_drift(seen: Sequence[Images], exact: Sequence[Images]) -> StepDrift:
    """The drift of samples after each step, each (n, channels, *space), from the exact ones."""
    drifts = [_channel_drift(np.float64(x), np.float64(target)) for x, target in zip(seen, exact, strict=True)]
    return StepDrift(
        images=len(exact[0]),
        relative_error=tuple(relative_error(x, target) for x, target in zip(seen, exact, strict=True)),
        mean_drift=tuple(tuple(means.tolist()) for means, _ in drifts),
        variance_drift=tuple(tuple(variances.tolist()) for _, variances in drifts),
    )


def _channel_drift(
    seen: NDArray[np.float64], exact: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    axes = (0, *range(2, exact.ndim))  # every one but the channels
    spread = exact.std(axis=axes)
    varies = spread > 1e-12
    gap = seen.mean(axis=axes) - exact.mean(axis=axes)
    ratio = np.divide(seen.std(axis=axes), spread, out=np.ones_like(spread), where=varies)
    return np.divide(gap, spread, out=np.zeros_like(spread), where=varies), ratio**2 - 1


def trajectory_comparison(seen: Sequence[Images], exact: Sequence[Images]) -> Verification:
    """Hold samples after each step, each (n, channels, *space), against the exact ones."""
    psnr = psnr_db(seen[-1], exact[-1])
    return Verification(
        images=len(exact[-1]),
        psnr_db_mean=float(psnr.mean()),
        psnr_db_min=float(psnr.min()),
        relative_error=tuple(relative_error(x, target) for x, target in zip(seen, exact, strict=True)),
        std_ratio=tuple(float(x.std() / target.std()) for x, target in zip(seen, exact, strict=True)),
    )
