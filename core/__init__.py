"""ditc: a deployment compiler for diffusion transformers.

The names below load their module when first used, so that `import ditc` stays light and the runtime never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "CompileOptions",
    "DitcError",
    "Lora",
    "ModelFacts",
    "Pipeline",
    "StepEvent",
    "__version__",
    "compile_model",
    "load",
]

# The public faces live to the right of this folder; by name only, since core imports none of them.
_FACES = {
    "CompileOptions": "ditc.compiler.options",
    "compile_model": "ditc.compiler.driver",
    "DitcError": "ditc.errors",
    "Lora": "ditc.loras",
    "ModelFacts": "ditc.exporter.model_facts",
    "Pipeline": "ditc.runtime.pipeline",
    "StepEvent": "ditc.runtime.executor",
    "load": "ditc.runtime.pipeline",
}

if TYPE_CHECKING:
    from ditc.errors import DitcError
    from ditc.loras import Lora

    CompileOptions: Any
    compile_model: Any
    ModelFacts: Any
    Pipeline: Any
    StepEvent: Any
    load: Any


def __getattr__(name: str) -> Any:
    if name in _FACES:
        return getattr(import_module(_FACES[name]), name)
    raise AttributeError(f"module 'ditc' has no attribute {name!r}")
