"""Figures of a finished run: learning curve, parity with the labels, errors by element."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.describe import find_checkpoint
from escaip_fairchem.errors import UserError
from escaip_fairchem.train.by_element import by_element, write_by_element
from escaip_fairchem.train.callbacks import FILE_NAME, read_metrics
from escaip_fairchem.train.parity import Parity, evaluate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from escaip_fairchem.train.by_element import ElementErrors

# Titles of the panels (where there is a parity error of the same title, it has a baseline), and
# what the columns of metrics.csv in them end in.
_CURVES = {
    "loss": ("train_loss", "val_loss"),
    "energy MAE, eV": ("energy_mae",),
    "force MAE, eV/A": ("forces_mae",),
    "stress MAE, eV/A^3": ("stress_mae",),
    "force cosine, EFwT": ("cosine_similarity", "efwt"),
}
_GRAY = {"color": "0.6", "linestyle": "--", "linewidth": 1}


def plot_run(run_dir: str | Path) -> list[Path]:
    """Draw a run, and print the errors of its newest checkpoint on its validation set.

    Args:
        run_dir: Folder of the run, the one with metrics.csv.

    Returns:
        The files written, in the folder of the run: learning_curve.png, parity.png,
        errors_by_element.png and errors_by_element.csv.

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
    parity = evaluate(OmegaConf.load(config_path), find_checkpoint(run_dir))
    print(parity.table())
    elements = by_element(parity)
    return [
        draw_learning_curve(rows, parity, run_dir / "learning_curve.png"),
        draw_parity(parity, run_dir / "parity.png"),
        draw_by_element(elements, run_dir / "errors_by_element.png"),
        write_by_element(elements, run_dir / "errors_by_element.csv"),
    ]


def draw_learning_curve(rows: list[dict[str, Any]], parity: Parity, path: Path) -> Path:
    """Losses and metrics against steps, with the errors of the trivial models.

    Args:
        rows: Rows of metrics.csv.
        parity: Whose baselines are drawn.
        path: The figure.
    """
    columns = dict.fromkeys(name for row in rows for name in row)
    curves = {
        title: [name for name in columns if name.endswith(endings) and "per_atom" not in name]
        for title, endings in _CURVES.items()
    }
    curves = {title: names for title, names in curves.items() if names}
    baselines = {name: values[1] for name, values in parity.errors().items()}
    figure, panels = _figure(len(curves))
    for axes, (title, names) in zip(panels, curves.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            marker = "." if len(points) <= 100 else ""
            axes.plot(*zip(*points, strict=True), marker=marker, label=name)
        if title in baselines:
            axes.axhline(baselines[title], label="baseline", **_GRAY)
        axes.set(xlabel="step", title=title)
        if title == "loss":
            axes.set_yscale("log")
        elif title in baselines:
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    return path


def draw_parity(parity: Parity, path: Path) -> Path:
    """Predictions against labels, one panel a property.

    Args:
        parity: Labels and predictions.
        path: The figure.
    """
    # The references' part is known without a model, and would hide everything else.
    offset = parity.energy_baseline
    panels = {
        "energy above references, eV/atom": (
            (parity.energy - offset) / parity.n_atoms,
            (parity.energy_model - offset) / parity.n_atoms,
        ),
        "force, eV/A": (parity.forces.ravel(), parity.forces_model.ravel()),
    }
    known = np.isfinite(parity.stress).all(axis=1)
    if known.any():
        panels["stress, eV/A^3"] = parity.stress[known].ravel(), parity.stress_model[known].ravel()
    figure, axes = _figure(len(panels))
    for axis, (title, (label, model)) in zip(axes, panels.items(), strict=True):
        _scatter(axis, label, model, title)
    figure.savefig(path, dpi=150)
    return path


def draw_by_element(rows: list[ElementErrors], path: Path) -> Path:
    """Force and energy errors of each element beside those of the trivial models.

    Args:
        rows: One entry an element.
        path: The figure.
    """
    width = max(6.0, 1.5 + 0.22 * len(rows))
    figure, (force, energy) = _figure(1, rows=2, size=(width, 3.0))
    places = np.arange(len(rows))
    panels = [
        (
            force, "force_mae_eV_per_A", "force_zero_eV_per_A", "zero forces", "free_atoms",
            {"title": "force MAE, eV/A", "xlabel": "element, its free atoms"},
        ),
        (
            energy, "energy_mae_eV_per_atom", "energy_reference_eV_per_atom",
            "element references", "structures",
            {"title": "energy MAE, eV/atom", "xlabel": "element, structures that contain it"},
        ),
    ]  # fmt: skip
    for axes, model, baseline, trivial, count, words in panels:
        values, trivials = (
            [getattr(row, name) or 0.0 for row in rows] for name in (model, baseline)
        )
        axes.bar(places, values, width=0.7, label="model")
        axes.plot(places, trivials, "_", color="black", markersize=9, label=trivial)
        labels = [f"{row.element}\n{getattr(row, count)}" for row in rows]
        axes.set_xticks(places, labels, fontsize="small")
        axes.set(xlim=(-0.7, len(rows) - 0.3), ylim=(0, 1.15 * axes.get_ylim()[1]), **words)
        axes.legend(fontsize="small", ncols=2, loc="upper right")
    figure.savefig(path, dpi=150)
    return path


def draw_groups(
    panels: dict[str, tuple[str, dict[str, tuple[float, float, int]]]], path: Path
) -> Path:
    """Errors of groups of atoms or structures beside those of the trivial models.

    Args:
        panels: By title: the label of the groups, and by their names the error of the model, that
            of the trivial model, and how many were counted.
        path: The figure.
    """
    figure, axes = _figure(len(panels), size=(5.2, 3.8))
    for axis, (title, (xlabel, groups)) in zip(axes, panels.items(), strict=True):
        places = np.arange(len(groups))
        values, trivials, counts = zip(*groups.values(), strict=True)
        axis.bar(places, values, width=0.7, label="model")
        axis.plot(places, trivials, "_", color="black", markersize=14, label="baseline")
        labels = [f"{name}\n({count:,})" for name, count in zip(groups, counts, strict=True)]
        axis.set_xticks(places, labels, fontsize="x-small", rotation=45, ha="right")
        axis.set(xlabel=f"{xlabel} (number)", title=title)
        if max(values) > 30 * min(values) > 0:
            axis.set_yscale("log")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    return path


def _figure(columns: int, rows: int = 1, size: tuple[float, float] = (4.2, 3.8)) -> tuple[Any, Any]:
    # Without pyplot: no window system is touched and no global state is changed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _scatter(axes: Axes, label: np.ndarray, model: np.ndarray, title: str) -> None:
    """Predictions against labels; the trivial model is the line at zero."""
    both = np.concatenate([label, model])
    limits = [both.min(), both.max()]
    axes.plot(limits, limits, color="black", linewidth=0.8)
    axes.axhline(0, label="baseline", **_GRAY)
    axes.plot(label, model, ".", markersize=3, alpha=0.5, label="model")
    axes.locator_params(nbins=5)
    axes.set(xlabel="label", ylabel="prediction", title=title)
    axes.legend(fontsize="small")
