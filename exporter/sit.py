"""Flow-matching models with DiT's block and the original key names: SiT (arXiv 2401.08740), and others with its block.

In the original a sample is x_t = t data + (1 - t) noise, the network is given t itself, and predicts dx/dt, data minus
noise; of twice as many channels the second half is not used. Here a flow is noise minus data over timesteps that count
from `train_steps` at the noise to 0, so times are mapped and the last layer changes its sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ditc.choices import FlowTimes
from ditc.exporter.dit import DiT, DiTConfig
from ditc.exporter.flow_check import ends_of
from ditc.exporter.loras import WeightRows
from ditc.exporter.weight_files import load_weights
from ditc.spec import DiffusionSpec, SamplerSpec

__all__ = ["FLOW_SAMPLER", "SIT_TIMES", "SiT", "sit_from_weights"]

SIT_TIMES: FlowTimes = "0:1"  # those of the original: noise at 0, data at 1
FLOW_SAMPLER = SamplerSpec(name="euler", spacing="trailing")  # equal strides from noise to data
LAST = ("final_layer.linear.weight", "final_layer.linear.bias")


class SiT(DiT):
    """A DiT that predicts noise minus data, from weights that predict dx/dt over `times` (see `velocity_weights`)."""

    family = "sit"

    def __init__(self, config: DiTConfig, name: str = "sit", times: FlowTimes = SIT_TIMES) -> None:
        process = DiffusionSpec(prediction="flow", learned_sigma=False)
        super().__init__(replace(config, learn_sigma=False), name, process)
        self.flow_times = ends_of(times)
        self.sampler = FLOW_SAMPLER

    def modulation(self, t: Tensor, y: Tensor) -> Tensor:
        """Every adaLN layer: timesteps and labels that broadcast to shape s -> (*s, rows, dim)."""
        noise_at, data_at = self.flow_times
        return super().modulation(data_at + t * ((noise_at - data_at) / self.diffusion.train_steps), y)

    def lora_layers(self) -> dict[str, tuple[WeightRows, ...]]:
        """The layers that a LoRA may be for: all but the last one, whose weights are not as the file has them."""
        layers = super().lora_layers().items()
        return {name: rows for name, rows in layers if not any(each.parameter in LAST for each in rows)}


def sit_from_weights(config: DiTConfig, path: Path, tensors: Mapping[str, Tensor], times: FlowTimes) -> SiT:
    """Return a SiT with the tensors of a file, of which `config` says the shapes. Raises CheckpointError."""
    model = SiT(config, path.stem, times)
    load_weights(model, velocity_weights(tensors, config, times), path)
    return model


def velocity_weights(tensors: Mapping[str, Tensor], config: DiTConfig, times: FlowTimes) -> dict[str, Tensor]:
    """Return weights whose last layer gives noise minus data, in as many channels as a sample has.

    `config` is that of the weights: with `learn_sigma` the layer has as many channels again, which are left out. Its
    rows are (patch, patch, channel).
    """
    noise_at, data_at = ends_of(times)
    patches, channels = config.patch_size**2, config.out_channels
    own = dict(tensors)
    for key in LAST:
        if key in own and own[key].ndim and len(own[key]) == patches * channels:  # another shape is refused when loaded
            used = own[key].reshape(patches, channels, -1)[:, : config.in_channels].reshape(-1, *own[key].shape[1:])
            own[key] = used if noise_at > data_at else -used
    return own
