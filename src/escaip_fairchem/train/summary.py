"""What a run was and how far it came: a table at its end, and summary.json in its folder."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common import distutils

import escaip_fairchem
from escaip_fairchem.train.baselines import baseline_metrics, evenly_spaced
from escaip_fairchem.train.callbacks import column_names
from escaip_fairchem.train.metrics import FILE_NAME, last_and_best, read_metrics
from escaip_fairchem.train.speed import SpeedCallback, steps_per_epoch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchtnt.framework import State

    from escaip_fairchem.train.unit import TrainEvalUnit

SUMMARY_NAME = "summary.json"
BASELINE_STRUCTURES = 1000  # validation structures whose labels are read for the baselines


class SummaryCallback(SpeedCallback):
    """Writes summary.json and prints it as a table. Put it last: it names the final checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self._checkpoints: Path | None = None

    def set_runner_callbacks(self, _save: Callable, _load: Callable, checkpoint_dir: str) -> None:
        """Learn where the run lives; the runner calls this before training.

        Args:
            checkpoint_dir: Folder of the checkpoints, inside the folder of the run.
        """
        self._checkpoints = Path(checkpoint_dir)

    def on_train_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Write and print."""
        super().on_train_end(state, unit)
        device = next(unit.model.parameters()).device
        atoms = distutils.all_reduce(self.atoms, average=False, device=device)
        if not distutils.is_master():
            return
        path = self._checkpoints.parent / SUMMARY_NAME
        if not self.steps and path.exists():  # a finished run, started again: there is its summary
            print(summary_table(json.loads(path.read_text())), flush=True)
            return
        rows = read_metrics(self._checkpoints.parent / FILE_NAME)
        steps = unit.train_progress.num_steps_completed
        rate = 1 / self.seconds if self.seconds else 0.0
        summary = {
            "run": str(self._checkpoints.parent),
            "checkpoint": self._checkpoint(),
            "steps": steps,
            "epochs": round(steps / steps_per_epoch(state, unit), 3),
            "wall_time_s": rows[-1]["wall_time_s"] if rows else None,
            "steps_per_s": round(self.steps * rate, 4),
            "atoms_per_s": round(atoms * rate, 1),
            "parameters": unit.num_params,
            "metrics": last_and_best(rows, self._baselines(state, unit)),
            "ranks": distutils.get_world_size(),
            **_machine(device),
            **versions(),
        }
        path.write_text(json.dumps(summary, indent=1) + "\n")
        print(summary_table(summary), flush=True)

    def _checkpoint(self) -> str | None:
        path = self._checkpoints / "final" / "inference_ckpt.pt"
        return str(path) if path.exists() else None

    def _baselines(self, state: State, unit: TrainEvalUnit) -> dict[str, float]:
        dataset = state.eval_state.dataloader.dataset
        chosen = evenly_spaced(dataset, BASELINE_STRUCTURES)
        structures = (dataset[index] for index in chosen)
        return column_names(baseline_metrics(structures, unit.tasks))


def versions() -> dict[str, str]:
    """Versions of what computed the run, and the commit of this package if it is a checkout."""
    found = {
        "escaip_fairchem": escaip_fairchem.__version__,
        "fairchem_core": metadata.version("fairchem-core"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    package = Path(escaip_fairchem.__file__)
    # an installed copy may lie in a folder that some other repository ignores
    tracked = _git(package.parent, "ls-files", "--error-unmatch", package.name)
    if tracked:
        changed = _git(package.parent, "status", "--porcelain", "--untracked-files=no", ".")
        commit = _git(package.parent, "rev-parse", "HEAD")
        found["git_commit"] = commit + ("+changes" if changed else "")
    return {"versions": found}


def _git(folder: Path, *arguments: str) -> str:
    """Output of git, empty if it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _machine(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        threads = torch.get_num_threads()
        return {"device": f"{device.type}, {threads} thread{'s'[: threads > 1]} a rank"}
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    return {
        "device": torch.cuda.get_device_name(device),
        "peak_memory_GiB": round(peak, 3),
    }


def summary_table(summary: dict[str, Any]) -> str:
    """Text of a summary.

    Args:
        summary: Content of summary.json.

    Returns:
        A few lines about the run, then one line a metric: last value, best value and its step,
        value of the trivial model where there is one, unit.
    """
    time = summary["wall_time_s"]
    lines = [
        f"validation after {summary['steps']} steps ({summary['epochs']:g} epochs"
        + (f", {time:,.0f} s" if time is not None else "")
        + f", {summary['atoms_per_s']:,.0f} atoms/s)",
        f"  {'metric':<32}{'last':>12}{'best':>12}{'at step':>9}{'baseline':>12}",
    ]
    for name, values in summary["metrics"].items():
        last, best, baseline = (
            f"{values[key]:12.5f}" if values.get(key) is not None else f"{empty:>12}"
            for key, empty in (("last", "nan"), ("best", ""), ("baseline", ""))
        )
        step = "" if values["best_step"] is None else values["best_step"]
        lines.append(f"  {name:<32}{last}{best}{step:>9}{baseline}  {values['unit']}".rstrip())
    lines.append("  baseline: element references for the energy, zero for forces and stress")
    machine = summary["device"] + (f" x {summary['ranks']}" if summary["ranks"] > 1 else "")
    if "peak_memory_GiB" in summary:
        machine += f", peak memory {summary['peak_memory_GiB']:.2f} GiB"
    lines.append(f"{summary['parameters']:,} parameters, on {machine}")
    lines.append(f"run: {summary['run']} (metrics.csv, summary.json)")
    if summary["checkpoint"]:
        lines.append(f"checkpoint: {summary['checkpoint']}")
    return "\n".join(lines)
