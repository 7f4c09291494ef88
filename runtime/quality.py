"""How far one set of images is from another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["frechet_distance", "psnr_db", "relative_error", "trajectory_comparison"]

Array = NDArray[Any]


def relative_error(found: Array, expected: Array) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float(np.linalg.norm(np.float64(found) - np.float64(expected)) / np.linalg.norm(np.float64(expected)))


def psnr_db(found: Array, expected: Array, peak: float = 2.0) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each image in dB, (n,); `peak` is the range of values, 2 for [-1, 1]."""
    gap = (np.float64(found) - np.float64(expected)).reshape(len(found), -1)
    return np.asarray(10 * np.log10(peak**2 / np.maximum((gap**2).mean(axis=1), 1e-20)))


def frechet_distance(a: Array, b: Array) -> float:
    """Frechet distance between Gaussians fitted to two sets of feature vectors, each (n, features).

    |mu_a - mu_b|^2 + tr(Ca + Cb - 2 (Ca Cb)^(1/2)); the trace of the root comes from the eigenvalues of
    Ca^(1/2) Cb Ca^(1/2), which is symmetric.
    """
    a64, b64 = np.float64(a), np.float64(b)
    cov_a, cov_b = np.cov(a64, rowvar=False), np.cov(b64, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0)).sum()
    means = ((a64.mean(axis=0) - b64.mean(axis=0)) ** 2).sum()
    return float(means + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def trajectory_comparison(found: Sequence[Array], exact: Sequence[Array]) -> dict[str, Any]:
    """Samples after each step against the exact ones: relative error, ratio of deviations; PSNR of the last."""
    psnr = psnr_db(found[-1], exact[-1])
    return {
        "images": len(exact[-1]),
        "psnr_db_mean": float(psnr.mean()),
        "psnr_db_min": float(psnr.min()),
        "relative_error": [relative_error(f, e) for f, e in zip(found, exact, strict=True)],
        "std_ratio": [float(f.std() / e.std()) for f, e in zip(found, exact, strict=True)],
    }
