"""Looks for the short names in every kind of process; writes what was found as JSON.

Run as a script by `test_registration.py`, because elastic launch and the spawn methods import
the main module again, and because the processes are shared by several tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import types
from pathlib import Path

NAMES = [
    "escaip",
    "escaip_energy",
    "escaip_direct_forces",
    "escaip_direct_stress",
    "escaip_denoising",
    "escaip_conservative",
]


def known() -> list[str]:
    """Names that fairchem's registry knows, without an import of this package."""
    import torch  # noqa: F401, as every process with fairchem does first; it calls the hook

    if "fairchem.core" not in sys.modules:
        # without what else `import fairchem.core` loads, ten seconds in each process
        core = types.ModuleType("fairchem.core")
        found = importlib.util.find_spec("fairchem.core")
        core.__path__ = list(found.submodule_search_locations)
        sys.modules["fairchem.core"] = core
    from fairchem.core.common.registry import registry

    return [name for name in NAMES if name in registry.mapping["model_name_mapping"]]


def classes() -> dict[str, str]:
    """The classes that fairchem's models are given for these names; seconds of imports."""
    from fairchem.core.common.registry import registry

    found = {name: registry.get_model_class(name) for name in known()}
    return {name: f"{cls.__module__}.{cls.__qualname__}" for name, cls in found.items()}


class Probe:
    """A data set whose only item is what its worker process knows."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[int, list[str]]:
        return os.getpid(), known()


def first_item(items: list) -> dict[str, str]:
    return items[0]


def in_worker(method: str) -> list[str]:
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Probe(), num_workers=1, multiprocessing_context=method, collate_fn=first_item
    )
    pid, answer = next(iter(loader))
    assert pid != os.getpid(), "the item was made in the main process"
    return answer


def in_elastic_ranks() -> dict[str, list[str]]:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
    )
    answers = elastic_launch(config, known)()
    return {f"elastic rank {rank}": answer for rank, answer in answers.items()}


def error_message() -> str:
    from fairchem.core.common.registry import registry

    try:
        registry.get_model_class("escaipp")
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    from submitit import AutoExecutor

    with tempfile.TemporaryDirectory() as folder:
        executor = AutoExecutor(folder=folder, cluster="local")
        executor.update_parameters(timeout_min=5)
        job = executor.submit(known)
        answers = {"plain process": known(), "submitit job": job.result()}
    answers |= in_elastic_ranks()
    answers |= {f"{method} worker": in_worker(method) for method in ("fork", "spawn", "forkserver")}
    answers |= {"classes": classes(), "error message": error_message()}
    # Into a file: libraries print to the standard output.
    Path(sys.argv[1]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
