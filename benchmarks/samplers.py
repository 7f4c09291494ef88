"""The schedulers of diffusers that are read off: the pairs that each keeps, and the distance of a run from its own.

Each is run on the host, and in the `update` graph as devices have it. Writes samplers.json and samplers.md beside this
script: python benchmarks/samplers.py
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ditc.choices import Sigmas, Spacing, names_of
from ditc.engines.onnxrt import import_onnxruntime
from ditc.errors import InputError
from ditc.exporter.multistep import multistep_table, scheduler_maker, scheduler_of
from ditc.exporter.onnx_files import save_graph
from ditc.exporter.recurrence import Advance, error_of_a_run
from ditc.lowering.tensorrt_rules import violations_of
from ditc.lowering.update_graph import update_model
from ditc.machine import package_versions
from ditc.runtime.device_buffers import update_rows
from ditc.runtime.samplers import update
from ditc.scheduler_samplers import SCHEDULER_SAMPLERS
from ditc.spec import DiffusionSpec, ModelSpec, SamplerSpec, SchedulerSpec
from ditc.tables import history_columns, memory_of, sampler_tables
from ditc.update_form import UpdateForm

HERE = Path(__file__).parent
STEPS = 50
IMAGES = 2  # those of `error_of_a_run`

# of a folder's own scheduler, beside those that have a name: class, and what of its configuration is not its default
OWN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 2}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"disable_corrector": [0]}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("SASolverScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
)
# the same over a flow, each without a shift and with one of 3
OWN_OF_FLOWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}),
    ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun", "euler_at_final": True}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 2}),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0}),
    ("UniPCMultistepScheduler", {"shift_terminal": 0.1}),
    ("SASolverScheduler", {}),
)
REFUSED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("DPMSolverSDEScheduler", {}),
    ("PNDMScheduler", {}),
    ("FlowMatchHeunDiscreteScheduler", {}),
)

Variant = tuple[str, DiffusionSpec, list[SamplerSpec]]  # its name, the process, samplers of which the worst is told


def variants() -> Iterator[Variant]:
    """Each scheduler by name over three spacings, with other noise levels and over a flow; and other ones by class."""
    betas, flow = DiffusionSpec(), DiffusionSpec(prediction="flow")
    for name in SCHEDULER_SAMPLERS:
        yield f"`{name}`", betas, [sampler_spec(name=name, spacing=spacing) for spacing in names_of(Spacing)]
        for sigmas in names_of(Sigmas):
            yield f"`{name}`, `--sigmas {sigmas}`", betas, [sampler_spec(name=name, sigmas=sigmas)]
        shifted = [SamplerSpec(name=name, shift=shift) for shift in (None, 3.0)]
        yield f"`{name}`, a flow", flow, [*shifted, SamplerSpec(name=name, spacing="trailing")]
    for kind, config in OWN:
        scheduler = SchedulerSpec(kind=kind, config=config)
        spacing = "leading" if kind == "PNDMScheduler" else "linspace"
        yield "", betas, [sampler_spec(name="scheduler", scheduler=scheduler, spacing=spacing)]
    for kind, config in OWN_OF_FLOWS:
        own = SchedulerSpec(kind=kind, config=config)
        yield "a flow", flow, [SamplerSpec(name="scheduler", scheduler=own, shift=shift) for shift in (None, 3.0)]


def sampler_spec(**settings: Any) -> SamplerSpec:
    return SamplerSpec(**settings)


def rows() -> list[dict[str, Any]]:
    """A row for each variant that can be taken."""
    table = []
    for name, diffusion, samplers in variants():
        try:
            measured = [measure(diffusion, sampler) for sampler in samplers]
        except InputError as e:
            print(f"left out: {name}: {e}")
            continue
        worst = {key: max(each[key] for each in measured) for key in measured[0]}
        table.append({"sampler": name, "scheduler": scheduler_of(samplers[0], diffusion.prediction).told, **worst})
    return table


def measure(diffusion: DiffusionSpec, sampler: SamplerSpec) -> dict[str, Any]:
    """K, whether it adds noise, errors of a whole run on the host and in the graph, and rules that the graph breaks."""
    columns = multistep_table(diffusion, sampler, STEPS)
    make, memory = scheduler_maker(diffusion, sampler, STEPS), memory_of(columns)
    spec = model_spec(diffusion)
    model = update_model(spec, UpdateForm.of(columns, spec, 1.0), IMAGES)
    return {
        "pairs": memory,
        "adds_noise": bool((columns["sigma"] > 0).any()),
        "host_error": error_of_a_run(make, host(columns), memory),
        "graph_error": error_of_a_run(make, in_graph(columns, model), memory),
        "broken_rules": len(list(violations_of(model))),
    }


def model_spec(diffusion: DiffusionSpec) -> ModelSpec:
    process = diffusion.model_copy(update={"learned_sigma": False})
    return ModelSpec(
        name="samplers",
        family="dit",
        in_channels=4,
        space=(4, 4),
        num_classes=1,
        cfg_channels=4,
        branches=("a",),
        branch_shape=(1, 1),
        parameters=0,
        diffusion=process,
    )


def host(columns: dict[str, Any]) -> Advance:
    def advance(i: int, x: Any, out: Any, z: Any, pairs: Any) -> Any:
        return update({name: float(column[i]) for name, column in columns.items()}, x, out, None, z, pairs)

    return advance


def in_graph(columns: dict[str, Any], model: Any) -> Advance:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "update.onnx"
        save_graph(model, path)
        session = import_onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    coefficients = update_rows(sampler_tables(columns), 4)
    inputs = [port.name for port in session.get_inputs()]

    def advance(i: int, x: Any, out: Any, z: Any, pairs: Any) -> Any:
        feeds = {"x": x, "out": out, "row": coefficients[i], "z": z}
        for back, names in enumerate(history_columns(memory_of(columns))):
            earlier = pairs[back] if back < len(pairs) else (np.zeros_like(x), np.zeros_like(x))
            feeds |= dict(zip(names, earlier, strict=True))
        return session.run(["next"], {name: feeds[name] for name in inputs})[0]

    return advance


def refusals() -> list[dict[str, str]]:
    """The reason why each class that can't be taken is refused."""
    told = []
    for kind, config in REFUSED:
        sampler = SamplerSpec(name="scheduler", scheduler=SchedulerSpec(kind=kind, config=config))
        diffusion = DiffusionSpec(prediction="flow" if kind.startswith("FlowMatch") else "epsilon")
        try:
            multistep_table(diffusion, sampler, STEPS)
        except InputError as e:
            told.append({"scheduler": kind, "reason": str(e).split(": ", 1)[1].split(";")[0]})
    return told


PAGE = f"""# Schedulers that are read off

Made by `python benchmarks/samplers.py`. When a bundle is compiled with one of these, a scheduler of diffusers is read
off as a recurrence over its last K samples and outputs, and fresh noise where it adds any; to run the bundle takes no
diffusers. `--variance`, `--eta` and `--clip` are refused beside them. A name is a row of `core/scheduler_samplers.py`;
a diffusers folder's own scheduler needs none.

The error is the largest difference at the end of a whole run of a nonlinear function in float32, relative to the
largest value, against the scheduler's own `step()` on the same noise: {STEPS} steps, linear betas, noise prediction,
the worst of the three spacings; of a flow the worst of no shift, 3, and `--spacing trailing`. `host` is NumPy, as on a
processor; `update` is the graph of devices in ONNX Runtime, {{broken}} TensorRT. For TensorRT that
graph is float32 in the strongly typed form too, and takes the network's prediction in float32. Above 1e-5 on the host a
compile refuses the sampler, as it does one that is inexact even with exact predictions.

| `--sampler` | scheduler | K | noise | host | `update` |
|---|---|---|---|---|---|
"""

REASONS = """
Refused, each with the reason; `--sampler` samples the same betas or flow with another one:

| scheduler | reason |
|---|---|
"""


def page(table: list[dict[str, Any]], refused: list[dict[str, str]]) -> str:
    """The tables as a document."""
    broken = sum(row["broken_rules"] for row in table)
    lines = (
        f"| {row['sampler']} | `{row['scheduler']}` | {row['pairs']} | {'yes' if row['adds_noise'] else ''} | "
        f"{row['host_error']:.0e} | {row['graph_error']:.0e} |"
        for row in table
    )
    reasons = (f"| `{row['scheduler']}` | {row['reason']} |" for row in refused)
    rules = "which breaks no rule of" if not broken else f"which breaks {broken} rules of"
    return PAGE.format(broken=rules) + "\n".join(lines) + "\n" + REASONS + "\n".join(reasons) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    table, refused = rows(), refusals()
    (HERE / "samplers.json").write_text(
        json.dumps({"steps": STEPS, "versions": package_versions(), "rows": table, "refused": refused}, indent=1) + "\n"
    )
    (HERE / "samplers.md").write_text(page(table, refused))
