"""The ``_target_`` of the recipes' data sets: fairchem's own, with the paths checked first."""

from __future__ import annotations

import difflib
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fairchem.core.datasets.ase_datasets import AseDBDataset
from fairchem.core.datasets.mt_concat_dataset import ConcatDataset, create_concat_dataset
from omegaconf import OmegaConf

from escaip_fairchem.data.energies import with_exact_energy
from escaip_fairchem.data.sample import DOMAINS
from escaip_fairchem.data.store import data_root
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ase import Atoms

DATABASE_SUFFIXES = (".aselmdb", ".db")
LEGACY_SUFFIX = ".lmdb"  # of fairchem 1
# What makes the folders that the recipes' own groups name, from the published files.
PUBLISHED = {
    "oc20_2m": "s2ef_train_2M {out} --val s2ef_val_id --label oc20 --name oc20_2m_fitted",
    "oc20_all_md": "s2ef_train_all s2ef_md {out} --val s2ef_val_id --label oc20 "
    "--name oc20_all_md_fitted",
    "oc20_total": "s2ef_train_all s2ef_md s2ef_rattled {out} --val s2ef_val_id "
    "--set energy=total --label oc20",
    "oc22_total": "s2ef-total/train {out} --val s2ef-total/val_id --label oc22",
    "oc20_val_ood_ads": "s2ef_val_ood_ads {out} --unlabelled",
    "oc20_val_ood_cat": "s2ef_val_ood_cat {out} --unlabelled",
    "oc20_val_ood_both": "s2ef_val_ood_both {out} --unlabelled",
    "oc22_val_ood": "s2ef-total/val_ood {out} --unlabelled",
    "spice_test": "test_large_neut_all.xyz {out} --unlabelled",
    "mptrj": "MPtrj_2022.9_full.json {out} --split-by sid --val-fraction 0.05",
    "spice": "train_large_neut_no_bad_clean.xyz {out} --val-fraction 0.05",
    "md22": "md22_DHA.npz {out} --val-fraction 0.05",
}
STRESS_PROBES = 100  # structures looked at to tell whether a data set has stress
# Of fairchem's ``create_dataset``, those that make sense for one split of one data set.
OPTIONS = ("first_n", "max_atoms", "metadata_path", "no_shuffle", "sample_n", "seed", "subset_to")


class SpawnSafeAseDBDataset(AseDBDataset):
    """``AseDBDataset`` that can be sent to data-loader workers started by spawn.

    Ranks of a local multi-GPU job are spawned, so their workers are too, and an open LMDB
    cannot be pickled: the worker opens the files again.

    Where stress is loaded, a structure without one gets infinities, which fairchem's losses and
    metrics leave out. Energies are given in float64 too, under ``energies.EXACT_ENERGY``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.a2g = partial(with_exact_energy, self.a2g)

    @cached_property
    def _metadata(self) -> dict[str, np.ndarray]:
        """As fairchem reads it; of several folders, only what all of them hold."""
        try:
            return super()._metadata
        except KeyError:
            folders = [path.parent if path.is_file() else path for path in self.paths]
            parts = [dict(np.load(folder / "metadata.npz")) for folder in folders]
            common = set.intersection(*map(set, parts))
            return {name: np.concatenate([part[name] for part in parts]) for name in common}

    def get_atoms(self, idx: int) -> Atoms:
        """Read structure ``idx`` with its labels."""
        atoms = super().get_atoms(idx)
        if self.config["a2g_args"]["r_stress"]:
            atoms.calc.results.setdefault("stress", np.full(6, np.inf))
        return atoms

    def __getstate__(self) -> dict[str, Any]:
        """Replace the open databases by their file names."""
        return {**self.__dict__, "dbs": [str(db.filename) for db in self.dbs]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the databases again."""
        arguments = state["config"].get("connect_args", {})
        self.__dict__.update(state)
        self.dbs = [self.connect_db(name, arguments) for name in state["dbs"]]


ASE_FORMAT = f"{__name__}.{SpawnSafeAseDBDataset.__name__}"


def create_dataset(
    name: str,
    split: str,
    src: str | Sequence[str],
    *,
    stress: bool = False,
    fraction: float = 1.0,
    **options: Any,
) -> ConcatDataset:
    """Open one split for fairchem's data loader.

    Energy, forces and stress are given under exactly these names, which are the task names of
    the recipes; stress has shape (1, 9), in eV/A^3. Charge and spin come from ``info``.

    Args:
        name: fairchem's label of the data set, as in the tasks' ``datasets``.
        split: Name of the split, such as ``train``.
        src: Folder or file in ASE-LMDB format, or LMDB of fairchem 1, or several. A relative path
            is looked for in the data root (``$ESCAIP_DATA``), then in the working directory.
        stress: Whether to load stress; infinite where a structure has none.
        fraction: Part of the structures to take, drawn at random by the option ``seed`` (0), not
            by the seed of the training; a smaller part is contained in a larger one.
        **options: ``first_n``, ``max_atoms``, ``metadata_path``, ``no_shuffle``, ``sample_n``,
            ``seed`` or ``subset_to`` of fairchem's ``create_dataset``.

    Returns:
        A data set of one part, ``{name}.{split}``.

    Raises:
        UserError: If a path holds no data, an option is unknown, the fraction is not above 0 and
            at most 1, or nothing has stress.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"train_fraction is {fraction}; give a number above 0 and at most 1")
    paths = find_sources(name, split, src)
    _require_known(options)
    transforms: dict[str, Any] = {"common_transform": {"dataset_name": name}}
    if stress:
        transforms["stress_reshape_transform"] = {"dataset_name": name}
    config = {
        "splits": {split: {"src": paths}},
        "format": _format_of(f"data set {name}, split {split}", paths),
        "a2g_args": {
            "r_energy": True,
            "r_forces": True,
            "r_stress": stress,
            "r_data_keys": ["charge", "spin"],
        },
        "key_mapping": {key: key for key in ("energy", "forces", "stress")},
        "transforms": transforms,
        **options,
    }
    sampling = {"type": "explicit", "ratios": {f"{name}.{split}": 1.0}}
    dataset = create_concat_dataset(OmegaConf.create({name: config}), {"sampling": sampling})
    if fraction < 1:
        config["sample_n"] = max(1, round(fraction * len(dataset)))
        dataset = create_concat_dataset(OmegaConf.create({name: config}), {"sampling": sampling})
    if stress:
        _require_stress(dataset, f"data set {name}, split {split}")
    return dataset


def find_sources(name: str, split: str, src: str | Sequence[str]) -> list[str]:
    """Where the data of a split are.

    Args:
        name: Label of the data set.
        split: Name of the split.
        src: As `create_dataset` takes it.

    Raises:
        UserError: If a path holds no data.
    """
    paths = [src] if isinstance(src, str) else src
    return [str(_find_data(name, split, Path(path))) for path in paths]


def _require_stress(dataset: ConcatDataset, what: str) -> None:
    """Raise if none of some structures, evenly spaced, has a stress."""
    chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), STRESS_PROBES)).astype(int)
    if not any(dataset[int(index)].stress.isfinite().all() for index in chosen):
        raise UserError(
            f"{what}: no stress in {len(chosen)} structures; train without it (training=direct), "
            "or convert frames that have it (escaip convert --stress-key KEY)"
        )


def _format_of(what: str, paths: Sequence[str]) -> str:
    """Name the class that reads the files."""
    legacy = [_has_suffix(Path(path), (LEGACY_SUFFIX,)) for path in paths]
    if any(legacy) and not all(legacy):
        raise UserError(
            f"{what}: {paths[legacy.index(True)]} is LMDB of fairchem 1, other paths are not; "
            "convert it (escaip convert), or make it a split of its own"
        )
    return "escaip_fairchem.LegacyLmdbDataset" if any(legacy) else ASE_FORMAT


def _has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file, or one of a folder's, has one of the suffixes."""
    return any(file.suffix in suffixes for file in (path.iterdir() if path.is_dir() else [path]))


def _find_data(name: str, split: str, path: Path) -> Path:
    """Resolve ``path`` to a database file or a folder that holds one, or raise."""
    candidates = [data_root() / path, path]  # the first is ``path`` itself if that is absolute
    for candidate in candidates:
        if candidate.is_file():
            return candidate
        if candidate.is_dir() and _has_suffix(candidate, (*DATABASE_SUFFIXES, LEGACY_SUFFIX)):
            return candidate
    looked_for = candidates[0].resolve()
    state = "holds no .aselmdb file" if looked_for.is_dir() else "does not exist"
    folder = path.parent if path.name in ("train", "val", "test") else None
    command = f"escaip convert IN {candidates[0].parent if folder else 'OUT'}"
    if folder and folder.name == "sample" and folder.parent.name in DOMAINS:
        command = f"escaip sample-data {folder.parent.name}"
    elif folder and str(folder) in PUBLISHED:
        command = f"escaip convert {PUBLISHED[str(folder)].format(out=data_root() / folder)}"
    elif folder and folder.name != name:
        command += f" --label {name}"
    raise UserError(
        f"data set {name}, split {split}: {looked_for} {state}; make it with `{command}` "
        "(ESCAIP_DATA is the data root, ./data by default; docs/data.md)"
    )


def _require_known(options: dict[str, Any]) -> None:
    """Raise on an unknown option, naming the nearest one."""
    for key in options:
        if key not in OPTIONS:
            near = difflib.get_close_matches(key, (*OPTIONS, "stress"), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(OPTIONS)}, stress"
            raise UserError(f"unknown data set option {key!r}; {hint}")
