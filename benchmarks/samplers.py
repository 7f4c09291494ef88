"""The pairs that each sampler with memory keeps, and the distance of a run over its columns from its scheduler's own.

Writes samplers.json and samplers.md beside this script: python benchmarks/samplers.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ditc.choices import Spacing, names_of
from ditc.exporter.multistep import multistep_recurrence
from ditc.machine import package_versions
from ditc.scheduler_samplers import SCHEDULER_SAMPLERS
from ditc.spec import DiffusionSpec, SamplerSpec

HERE = Path(__file__).parent
STEPS = 50


def rows() -> list[dict[str, Any]]:
    """A row for each sampler: its scheduler, K, and the largest error of a whole run over all spacings."""
    table = []
    for name, (kind, config) in SCHEDULER_SAMPLERS.items():
        read = [
            multistep_recurrence(DiffusionSpec(), SamplerSpec(name=name, spacing=spacing), STEPS)
            for spacing in names_of(Spacing)
        ]
        options = ", ".join(f"{key}={value}" for key, value in config.items())
        pairs, error = max(each.memory for each in read), max(each.error for each in read)
        table.append({"sampler": name, "scheduler": f"{kind}({options})", "pairs": pairs, "error": error})
    return table


PAGE = f"""# Samplers with memory

Made by `python benchmarks/samplers.py`. When a bundle is compiled with one of these, a scheduler of diffusers is read
off as a recurrence over its last K samples and outputs; to run the bundle takes no diffusers. `--variance`, `--eta` and
`--clip` are refused beside them.

The error is the largest difference at the end of a whole run of a nonlinear function in float32, relative to the
largest value, against the scheduler's own `step()`: {STEPS} steps, linear betas, noise prediction, the worst of the
three spacings. Above 1e-5 a compile refuses the sampler, as it does where the scheduler's tables in float32 are too
rough for the betas (squared cosine ones begin at a sigma of 24000).

| `--sampler` | scheduler | K | error |
|---|---|---|---|
"""


def page(table: list[dict[str, Any]]) -> str:
    """The table as a document."""
    cells = (f"| `{row['sampler']}` | `{row['scheduler']}` | {row['pairs']} | {row['error']:.0e} |" for row in table)
    return PAGE + "\n".join(cells) + "\n"


if __name__ == "__main__":
    table = rows()
    (HERE / "samplers.json").write_text(
        json.dumps({"steps": STEPS, "versions": package_versions(), "rows": table}, indent=1) + "\n"
    )
    (HERE / "samplers.md").write_text(page(table))
