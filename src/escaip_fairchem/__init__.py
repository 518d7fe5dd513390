"""EScAIP, an attention-based interatomic potential, as a plugin for fairchem-core.

Importing this package costs nothing: public names are loaded on first use, because
the registration hook runs inside ``import torch`` (see ``docs/registration.md``).
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "EScAIP": "model",
    "EScAIPBackbone": "backbone",
    "EScAIPConfig": "config",
    "EnergyHead": "heads",
    "DirectForceHead": "heads",
    "DirectStressHead": "heads",
    "DenoisingHead": "heads",
    "ConservativeHead": "heads",
    "LegacyLmdbDataset": "data.legacy_dataset",
    "calculator": "inference",
    "hessian_vector_product": "curvature",
    "UserError": "errors",
}

__all__ = [*_PUBLIC, "__version__"]  # noqa: PLE0604 (they are strings)


def __getattr__(name: str):
    """Import a public name on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names that ``dir(escaip_fairchem)`` shows."""
    return sorted(__all__)
