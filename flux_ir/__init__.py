"""flux_ir: an instrument for looking inside FLUX.1.

Everything public is imported from here, and only when it is first used: `import flux_ir` itself takes no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux_ir.activations.tokens import open_source
    from flux_ir.api.collect import collect, convert_collection
    from flux_ir.api.export import export
    from flux_ir.recording.intervention import Intervention
    from flux_ir.recording.recorder import MemorySink, Recorder
    from flux_ir.sae.splice import spliced
    from flux_ir.sites import Site

__version__ = "0.1.0"

_MODULES = {
    "collect": "flux_ir.api.collect",
    "convert_collection": "flux_ir.api.collect",
    "export": "flux_ir.api.export",
    "Intervention": "flux_ir.recording.intervention",
    "MemorySink": "flux_ir.recording.recorder",
    "open_source": "flux_ir.activations.tokens",
    "Recorder": "flux_ir.recording.recorder",
    "Site": "flux_ir.sites",
    "spliced": "flux_ir.sae.splice",
}

__all__ = [
    "Intervention",
    "MemorySink",
    "Recorder",
    "Site",
    "collect",
    "convert_collection",
    "export",
    "open_source",
    "spliced",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'flux_ir' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
