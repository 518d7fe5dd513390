"""Figures of a finished run: its learning curve, and its predictions against the labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.errors import UserError
from escaip_fairchem.train.callbacks import FILE_NAME, read_metrics
from escaip_fairchem.train.parity import Parity, evaluate, newest_checkpoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CURVES = {
    "loss": ["train_loss", "val_loss"],
    "energy MAE, eV": ["energy_mae"],
    "force MAE, eV/A": ["forces_mae"],
}


def plot_run(run_dir: str | Path) -> list[Path]:
    """Draw the learning curve and the parity plots of a run and print its errors.

    Args:
        run_dir: Folder of the run, the one with metrics.csv.

    Returns:
        The figures written: learning_curve.png and parity.png, in the folder of the run.

    Raises:
        UserError: If the folder is not that of a run, or the run has no checkpoint.
    """
    from omegaconf import OmegaConf

    run_dir = Path(run_dir)
    config_path = run_dir / "canonical_config.yaml"
    rows = read_metrics(run_dir / FILE_NAME)
    if not rows or not config_path.exists():
        raise UserError(
            f"no {FILE_NAME} and canonical_config.yaml in {run_dir}; give the folder of a run, "
            "job.run_dir/job.timestamp_id"
        )
    parity = evaluate(OmegaConf.load(config_path), newest_checkpoint(run_dir))
    print(parity.table())
    return [
        _draw_learning_curve(rows, parity, run_dir / "learning_curve.png"),
        _draw_parity(parity, run_dir / "parity.png"),
    ]


def _figure(columns: int) -> tuple[Any, Any]:
    # Without pyplot: no window system is touched and no global state is changed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _draw_learning_curve(rows: list[dict[str, Any]], parity: Parity, path: Path) -> Path:
    figure, panels = _figure(len(_CURVES))
    baselines = {name: values[1] for name, values in parity.errors().items()}
    for axes, (title, endings) in zip(panels, _CURVES.items(), strict=True):
        columns = dict.fromkeys(name for row in rows for name in row)
        for column in columns:
            if column in endings or (
                column.endswith(tuple(f"_{ending}" for ending in endings))
                and "per_atom" not in column
            ):
                points = [(row["step"], row[column]) for row in rows if column in row]
                axes.plot(*zip(*points, strict=True), marker=".", label=column)
        if title in baselines:
            axes.axhline(baselines[title], color="gray", linestyle="--", label="baseline")
        axes.set(xlabel="step", title=title, yscale="log" if title == "loss" else "linear")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    return path


def _draw_parity(parity: Parity, path: Path) -> Path:
    figure, (energy, forces) = _figure(2)
    # The references' part is known without a model, and would hide everything else.
    offset = parity.energy_baseline
    label = (parity.energy - offset) / parity.n_atoms
    model = (parity.energy_model - offset) / parity.n_atoms
    _scatter(energy, label, model, "energy above element references, eV/atom")
    _scatter(forces, parity.forces.ravel(), parity.forces_model.ravel(), "force, eV/A")
    figure.savefig(path, dpi=150)
    return path


def _scatter(axes: Axes, label: np.ndarray, model: np.ndarray, title: str) -> None:
    """Predictions against labels; the trivial model is the line at zero."""
    both = np.concatenate([label, model])
    limits = [both.min(), both.max()]
    axes.plot(limits, limits, color="black", linewidth=0.8)
    axes.axhline(0, color="gray", linestyle="--", label="baseline")
    axes.plot(label, model, ".", markersize=3, alpha=0.5, label="model")
    axes.set(xlabel="label", ylabel="prediction", title=title)
    axes.legend(fontsize="small")
