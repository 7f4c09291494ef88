"""The memory of one program on a device: every buffer that its engine calls are bound to, allocated once.

Two sample buffers take turns, and one more for each step that the sampler looks back; so step i always reads and writes
the same addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import Manifest
from ditc.engines.backend import DeviceEngine, Port
from ditc.engines.device import ALIGNMENT, Device, DeviceTensor
from ditc.program import AHEAD, CONDITION, DECODE, UPDATE, Program
from ditc.runtime.compensation import TableCompensation
from ditc.runtime.conditioning import is_of_request, most_ahead, rows_at, steps_ahead, with_later_rows
from ditc.runtime.executor import slot_shapes, slot_type
from ditc.tables import Tables, memory_of, sampler_columns, step_inputs
from ditc.update_form import row_columns

__all__ = ["DeviceBuffers", "update_rows"]


def update_rows(tables: Tables, channels: int) -> NDArray[np.float32]:
    """The `row` input of `update` for every step, (steps, width): `row_columns`, then K and mu per channel.

    `tables` are a bundle's: the sampler's columns, and the compensation where there is one.
    """
    given = sampler_columns(tables)
    steps = len(given["t"])
    names = row_columns(memory_of(given))
    columns = {name: given.get(name, np.zeros(steps)) for name in names}
    columns["noise"] = (columns["sigma"] > 0).astype(np.float64)
    k, mu = np.ones((steps, channels)), np.zeros((steps, channels))
    compensation = TableCompensation.from_tables(tables)
    if compensation is not None:
        k = compensation.k
        mu = np.where(k == 1, 0.0, compensation.mu)
    rows = np.concatenate([np.stack([columns[name] for name in names], axis=1), k, mu], axis=1)
    return rows.astype(np.float32)


class DeviceBuffers:
    """Buffers for a bundle's batch of images; the network's have a row for each image and guidance half.

    `conditions` are those of all rows, by name. What a step takes a row of lies here for all steps: `t`, `update_rows`,
    `step_rows` by step and port, and fresh noise `z`, by step, for those at which the sampler adds any. `tables` are
    what the conditioning returns, and `table_parts` what of them each step binds, by port; a part in `copied_parts` is
    bound as a copy, made when the tables are there. `latent` and `image` are a decoder's, where there is one. `memory`
    is how many steps the sampler looks back.
    """

    def __init__(self, manifest: Manifest, tables: Tables, engines: Mapping[str, DeviceEngine], device: Device) -> None:
        self._device = device
        spec, program, batch = manifest.model, manifest.program, manifest.batch
        rows, steps = batch * manifest.halves, len(program.steps)
        self.memory = memory_of(sampler_columns(tables))
        self._x = tuple(device.empty((rows, *spec.latent_shape), "float32") for _ in range(2 + self.memory))
        self._predictions: tuple[DeviceTensor, ...] = ()
        if self.memory:  # this step's and those that it looks back at
            self._predictions = tuple(
                device.empty((batch, *spec.latent_shape), "float32") for _ in range(1 + self.memory)
            )
            self._nothing = tuple(self._uploaded(np.zeros((n, *spec.latent_shape), np.float32)) for n in (rows, batch))
        self.start_x = device.empty((rows, *spec.latent_shape), "float32")
        self.final = self.x_at(steps).rows(0, batch)
        self.out = device.empty((rows, *spec.prediction_shape), "float32")
        self.conditions = {
            each.name: device.empty((*([steps] if each.fresh else []), rows, *each.shape), each.dtype)
            for each in spec.network_inputs
        }
        self.t = self._uploaded(sampler_columns(tables)["t"].astype(np.float32))
        self.update_rows = [self._uploaded(row) for row in update_rows(tables, spec.in_channels)]
        self.step_rows = self._step_rows(program, engines, step_inputs(tables))
        noisy = np.flatnonzero(sampler_columns(tables)["sigma"] > 0) if "z" in engines[UPDATE].inputs else ()
        self.z = {int(step): device.empty((batch, *spec.latent_shape), "float32") for step in noisy}
        if self.z:
            self._no_noise = self._uploaded(np.zeros((batch, *spec.latent_shape), np.float32))
        self.copied_parts: list[tuple[DeviceTensor, DeviceTensor]] = []  # (part of a table, its copy)
        self._place_tables(program, engines)
        dtype = slot_type(program, engines)
        self.slots = [device.empty((rows, *shape), dtype) for shape in slot_shapes(program, spec)]
        if DECODE in engines:
            self.latent = device.empty((batch, *spec.latent_shape), "float32")
            port = engines[DECODE].outputs["image"]
            self.image = device.empty(port.fixed_shape, port.dtype)

    def x_at(self, index: int) -> DeviceTensor:
        """Return the samples in front of step `index`, and behind the one before it."""
        return self._x[index % len(self._x)]

    def prediction_at(self, index: int) -> DeviceTensor:
        """Return the prediction after guidance of step `index`, where the sampler looks back at any."""
        return self._predictions[index % len(self._predictions)]

    def noise_at(self, index: int) -> DeviceTensor:
        """Return the fresh noise of step `index`, zeros for one that adds none."""
        return self.z.get(index, self._no_noise)

    def pair_at(self, index: int) -> tuple[DeviceTensor, DeviceTensor]:
        """Return (samples, prediction) of step `index`, zeros for one before the first."""
        if index < 0:
            return self._nothing[0], self._nothing[1]
        return self.x_at(index), self.prediction_at(index)

    def contents(self) -> list[NDArray[Any]]:
        """Return copies of all that a step leaves and a later one needs."""
        return [self._device.download(tensor) for tensor in self._carried()]

    def restore(self, contents: Sequence[NDArray[Any]]) -> None:
        """Put back what `contents` returned."""
        for tensor, array in zip(self._carried(), contents, strict=True):
            self._device.upload(array, tensor)

    def _carried(self) -> list[DeviceTensor]:
        copies = (copy for _, copy in self.copied_parts)
        return [*self._x, *self._predictions, *self.tables.values(), *copies, *self.z.values(), *self.slots]

    def _uploaded(self, array: NDArray[Any]) -> DeviceTensor:
        tensor = self._device.empty(array.shape, str(array.dtype))
        self._device.upload(array, tensor)
        return tensor

    def _step_rows(
        self, program: Program, engines: Mapping[str, DeviceEngine], tables: Mapping[str, NDArray[np.float32]]
    ) -> list[dict[str, DeviceTensor]]:
        """Upload what each step's segment takes of the bundle's tables, by port."""
        padded = with_later_rows(tables, most_ahead(engines))
        steps = []
        for step in program.steps:
            rows = rows_at(padded, step.index, engines[step.segment].inputs)
            steps.append({port: self._uploaded(np.ascontiguousarray(row)) for port, row in rows.items()})
        return steps

    def _place_tables(self, program: Program, engines: Mapping[str, DeviceEngine]) -> None:
        """Allocate what `condition` returns, with zeros for steps past the last, and the parts that each step binds."""
        past = most_ahead(engines)
        self.tables: dict[str, DeviceTensor] = {}
        for port in engines[CONDITION].outputs.values():
            steps, *shape = port.fixed_shape
            if is_of_request(port.name):
                self.tables[port.name] = self._device.empty(port.fixed_shape, port.dtype)
                continue
            self.tables[port.name] = self._uploaded(np.zeros((steps + past, *shape), port.dtype))
        self.table_parts = [self._parts(step.index, engines[step.segment].inputs) for step in program.steps]

    def _parts(self, step: int, inputs: Mapping[str, Port]) -> dict[str, DeviceTensor]:
        """The rows of the tables that a segment with these inputs takes at a step: its own, and later steps'."""
        parts = {}
        for name, table in self.tables.items():
            if name in inputs:
                parts[name] = table if is_of_request(name) else self._aligned(table.row(step))
            if (later := inputs.get(f"{AHEAD}.{name}")) is not None:
                parts[later.name] = self._aligned(table.rows(step + 1, steps_ahead(later)))
        return parts

    def _aligned(self, part: DeviceTensor) -> DeviceTensor:
        """A part of a table; where its address would be odd, a tensor of its own that it is copied to."""
        if part.pointer % ALIGNMENT == 0:
            return part
        own = self._device.empty(part.shape, part.dtype)
        self.copied_parts.append((part, own))
        return own
