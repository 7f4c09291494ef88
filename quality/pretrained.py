"""Networks that others trained, where they are installed: Inception's features (torch-fidelity), and LPIPS.

Nothing is downloaded: where a package or its weights are missing, one line says what to fetch and where to put it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.errors import InputError
from ditc.runtime.executor import Samples
from ditc.runtime.images import to_bytes

__all__ = ["check_inception", "inception_features", "lpips_distance"]

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_RELEASE = "the release v0.2.0 of github.com/toshas/torch-fidelity"
ALEXNET_FILES = "alexnet-owt-*.pth"
BROKEN = (ImportError, RuntimeError, OSError)  # absent, or of another torch than the one that is here
LPIPS_PIXELS = 32  # AlexNet leaves nothing of smaller images


def weights_folder() -> Path:
    """Return the folder where torch keeps weights of other projects."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def check_inception() -> None:
    """Raise InputError without torch-fidelity or Inception's weights."""
    _inception()


def _inception() -> tuple[Any, Path]:
    """Return torch-fidelity's extractor, and where its weights lie."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except BROKEN as e:
        raise InputError(
            f"features 'inception' need torch-fidelity ({e}); install it with: pip install torch-fidelity"
        ) from e
    path = weights_folder() / INCEPTION_FILE
    if not path.is_file():
        raise InputError(f"features 'inception' need {path}; fetch that file from {INCEPTION_RELEASE}")
    return FeatureExtractorInceptionV3, path


def inception_features() -> Callable[[Samples], NDArray[Any]]:
    """Return the extractor of images in [-1, 1], (n, channels, height, width) -> (n, 2048); grey is taken as RGB.

    Raises InputError without torch-fidelity or its weights.
    """
    extractor, path = _inception()
    import torch

    from ditc.exporter.weight_files import read_tensors

    read_tensors(path)  # tensors alone: torch-fidelity itself would run code from the file
    network = extractor("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))

    def features(images: Samples) -> NDArray[Any]:
        with torch.inference_mode():
            (pooled,) = network(torch.from_numpy(to_bytes(in_colour(images))))
        return np.asarray(pooled.numpy())

    return features


def lpips_distance(height: int, width: int) -> Callable[[Samples, Samples], NDArray[np.float64]]:
    """Return LPIPS of pairs of images in [-1, 1], (n,) (Zhang et al. 2018, arXiv 1801.03924, AlexNet, version 0.1).

    Raises InputError with the reason where it can't be measured.
    """
    if min(height, width) < LPIPS_PIXELS:
        raise InputError(f"images of {height} x {width} pixels are too small for it, it needs {LPIPS_PIXELS}")
    try:
        import torch
        from lpips import LPIPS
    except BROKEN as e:
        raise InputError(f"{e}; install it with: pip install lpips") from e
    if not list(weights_folder().glob(ALEXNET_FILES)):
        raise InputError(f"AlexNet's weights are not there; fetch torchvision's {ALEXNET_FILES} to {weights_folder()}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's words on how lpips names its weights
        network = LPIPS(net="alex", verbose=False)

    def distance(ours: Samples, exact: Samples) -> NDArray[np.float64]:
        pair = (torch.from_numpy(np.float32(in_colour(images))) for images in (ours, exact))
        with torch.inference_mode():
            return np.asarray(network(*pair).flatten().double().numpy())

    return distance


def in_colour(images: Samples) -> Samples:
    """Return grey images as RGB."""
    return np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images
