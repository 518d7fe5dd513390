"""Makes the short names of this package known to fairchem's registry, in every process.

`arm` is the target of a packaging entry point in the group ``torch.backends``: torch calls it
at the end of ``import torch``, when fairchem is at most half imported. So this module uses the
standard library only, waits until fairchem's registry module has been executed, and then hangs
in names that import the real classes on first use. `_rendezvous` and `_launching` are put in their
places by the same means: ranks need them before any other code of this package runs. See
``docs/registration.md``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from escaip_fairchem import _launching, _rendezvous

if TYPE_CHECKING:
    from collections.abc import Callable, ItemsView, ValuesView
    from importlib.machinery import ModuleSpec
    from types import ModuleType

REGISTRY_MODULE = "fairchem.core.common.registry"
SWITCH = "ESCAIP_AUTOLOAD"
SHORT_NAMES = {
    "escaip": "EScAIPBackbone",
    "escaip_energy": "EnergyHead",
    "escaip_direct_forces": "DirectForceHead",
    "escaip_direct_stress": "DirectStressHead",
    "escaip_denoising": "DenoisingHead",
    "escaip_conservative": "ConservativeHead",
}


def arm() -> None:
    """Do what is to be done to modules of fairchem now, or as soon as they exist.

    Never raises: an exception here would make ``import torch`` fail for every program of the
    environment.
    """
    with contextlib.suppress(Exception):
        if os.environ.get(SWITCH, "1") == "0":
            return
        _after_import(REGISTRY_MODULE, "registry", _install)
        _after_import(_rendezvous.DISTRIBUTED_MODULE, _rendezvous.FUNCTION, _rendezvous.install)
        _after_import(_launching.LAUNCH_MODULE, _launching.FUNCTION, _launching.install)


def _after_import(name: str, part: str, install: Callable[[ModuleType], None]) -> None:
    """Call `install` with a module that has, or will have, been executed as far as `part`."""
    module = sys.modules.get(name)
    if hasattr(module, part):
        install(module)
    elif not any(isinstance(it, _ModuleFinder) and it.name == name for it in sys.meta_path):
        sys.meta_path.insert(0, _ModuleFinder(name, install))


class _ClassByName:
    """Stands for a public class of this package until somebody asks for it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def resolve(self) -> type:
        return getattr(importlib.import_module("escaip_fairchem"), self.name)


def _resolved(value: Any) -> Any:
    return value.resolve() if isinstance(value, _ClassByName) else value


class _LazyClasses(dict):
    """A registry table whose reads give real classes, never placeholders."""

    def __getitem__(self, key: str) -> Any:
        return _resolved(super().__getitem__(key))

    def get(self, key: str, default: Any = None) -> Any:
        return _resolved(super().get(key, default))

    def values(self) -> ValuesView:
        return {key: self[key] for key in self}.values()

    def items(self) -> ItemsView:
        return {key: self[key] for key in self}.items()


def _install(module: ModuleType) -> None:
    tables = module.registry.mapping
    current = tables["model_name_mapping"]
    if isinstance(current, _LazyClasses):
        return
    ours = {short: _ClassByName(name) for short, name in SHORT_NAMES.items()}
    # Ours first: fairchem's error message shows the last entry as its example.
    tables["model_name_mapping"] = _LazyClasses({**ours, **current})


class _ModuleFinder:
    """A one-shot import hook that runs a function after a module was executed."""

    def __init__(self, name: str, install: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.install = install

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find the module by the other finders, with the function added to its loading."""
        if fullname != self.name:
            return None
        with contextlib.suppress(Exception):
            sys.meta_path.remove(self)
            spec = _spec_from_other_finders(fullname, path, target)
            if spec is not None:
                _run_after_loading(spec, self.install)
            return spec
        return None


def _spec_from_other_finders(fullname: str, path: Any, target: Any) -> ModuleSpec | None:
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        spec = find_spec(fullname, path, target) if find_spec else None
        if spec is not None:
            return spec
    return None


def _run_after_loading(spec: ModuleSpec, install: Callable[[ModuleType], None]) -> None:
    execute = spec.loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        with contextlib.suppress(Exception):
            install(module)

    # The loader object belongs to this one spec, so nothing else sees the replacement.
    spec.loader.exec_module = exec_module
