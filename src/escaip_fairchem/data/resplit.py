"""Split a converted data set anew, and say what the sides share."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.data import store
from escaip_fairchem.data.card import CARD_FILE, references_entry
from escaip_fairchem.data.fingerprint import composition_key, equal_structures, fingerprint
from escaip_fairchem.data.frames import free_atoms
from escaip_fairchem.data.groups import converted_folder, dataset_label
from escaip_fairchem.data.plan import make_plan
from escaip_fairchem.data.references import ReferenceFit, RunningRms
from escaip_fairchem.data.sources import frames_of, over_parts, place_of
from escaip_fairchem.data.splits import split_by_group, split_random
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from escaip_fairchem.data.formats.base import Part
    from escaip_fairchem.data.plan import Reading
    from escaip_fairchem.data.references import References

SIDES = ("train", "val", "test")


@dataclass(frozen=True)
class Rule:
    """How frames are shared out.

    Attributes:
        ratios: Parts of train, val and, if there are three, test; they sum to 1.
        by: What goes to one side as a whole: ``formula``, ``geometry`` or an ``info`` key.
        ordered: ``info`` key of time: the last frames of each trajectory are held out.
        within: ``info`` key of the trajectory, for ``ordered``.
        seed: Random seed.
    """

    ratios: tuple[float, ...] = (0.9, 0.1)
    by: str | None = None
    ordered: str | None = None
    within: str = "sid"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        right = len(self.ratios) in (2, 3) and all(0 < part < 1 for part in self.ratios)
        if not right or abs(sum(self.ratios) - 1) > 1e-6:
            given = " ".join(f"{part:g}" for part in self.ratios)
            raise UserError(f"--ratios {given}: give parts of train, val (and test) that sum to 1")
        if self.by and self.ordered:
            raise UserError("--by and --ordered exclude each other; give one of them")

    def describe(self) -> str:
        """Say in a few words how the split is made."""
        parts = "/".join(f"{part:g}" for part in self.ratios)
        if self.ordered:
            return f"{parts}, last {self.ordered} of each {self.within} held out"
        return f"{parts} {f'by whole {self.by}' if self.by else 'at random'}, seed {self.seed}"


@dataclass
class Rows:
    """What is kept of each of F frames, in the order of their rows.

    Attributes:
        group: Value of the grouping key, (F,).
        time: Value of the ordering key, (F,).
        sid: System id, (F,), empty where there is none.
        composition: As text, (F,).
        prints: Fingerprints, (F, P).
        energy: eV, (F,).
        forces: Sum of squares and number of the free force components, (F, 2).
        stress: The same of stress components, (F, 2).
    """

    group: list[str] = field(default_factory=list)
    time: list[float] = field(default_factory=list)
    sid: list[str] = field(default_factory=list)
    composition: list[str] = field(default_factory=list)
    prints: list[np.ndarray] = field(default_factory=list)
    energy: list[float] = field(default_factory=list)
    forces: list[tuple[float, int]] = field(default_factory=list)
    stress: list[tuple[float, int]] = field(default_factory=list)

    def merge(self, other: Rows) -> None:
        """Add the frames of another one."""
        for name, values in vars(other).items():
            getattr(self, name).extend(values)


def resplit(
    data: Path, out: Path, rule: Rule, *, name: str | None = None, workers: int = 1,
    overwrite: bool = False,
) -> list[str]:  # fmt: skip
    """Share the frames of a converted folder out anew, by copying its rows.

    Args:
        data: Folder with ``train`` and ``val`` (and ``test``); left as it is.
        out: Folder to make.
        rule: How frames are shared out.
        name: Name for ``dataset=NAME``; that of ``out`` by default.
        workers: Processes that read.
        overwrite: Whether ``out`` and its group file may be replaced.

    Returns:
        Lines to print, the leakage report among them.

    Raises:
        UserError: ``data`` is no such folder, ``out`` exists, or a key is missing.
    """
    if converted_folder([data]) is None:
        raise UserError(f"{data} has no train and val; give a folder that `escaip convert` made")
    group = store.data_root() / "configs" / "dataset" / f"{name or out.resolve().name}.yaml"
    for path in (out, group):
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; choose another name or pass --overwrite")
    if overwrite:
        store.check_replaceable(out)
    sources = [data / side for side in SIDES if (data / side).is_dir()]
    rows = Rows()
    plans = [make_plan([source]) for source in sources]
    jobs = [(rule, plan.reading, part) for plan in plans for part in plan.parts]
    for part in over_parts(_read, jobs, workers):
        rows.merge(part)
    _, composition = np.unique(rows.composition, return_inverse=True)
    geometry = equal_structures(composition, np.array(rows.prints))
    side = assign(rule, rows, geometry)
    label = dataset_label(data) or group.stem
    comment = f"written by escaip split from {data}, {rule.describe()}"
    with store.new_folder(out, overwrite) as partial_folder:
        for index, which in enumerate(SIDES[: len(rule.ratios)]):
            store.copy_rows(sources, partial_folder / which, np.flatnonzero(side == index))
        references = _write_group(partial_folder, out.resolve(), rows, side == 0, label, comment)
        _write_card(data, partial_folder, rule, rows, side, references)
    store.copy_file(out / store.DATASET_FILE, group)
    counts = ", ".join(f"{(side == k).sum()} {SIDES[k]}" for k in range(len(rule.ratios)))
    train_on = f"train on it with: fairchem -c RECIPE dataset={group.stem}  ({group})"
    return [
        f"{out}: {counts}; {rule.describe()}",
        f"element references of train: {references.describe()}",
        *leakage(rows, geometry, side),
        train_on,
    ]


def assign(rule: Rule, rows: Rows, geometry: np.ndarray) -> np.ndarray:
    """Side of each frame, index in SIDES, (F,)."""
    n = len(rows.energy)
    if rule.ordered:
        return _ordered(rule, np.array(rows.group), np.array(rows.time))
    groups = {"formula": rows.composition, "geometry": geometry.astype(str).tolist()}.get(
        rule.by, rows.group
    )
    side, left = np.zeros(n, dtype=int), np.arange(n)
    remaining = 1.0
    for index in range(len(rule.ratios) - 1, 0, -1):  # test, then val
        fraction = rule.ratios[index] / remaining
        if rule.by:
            mask = split_by_group([groups[k] for k in left], fraction, rule.seed)
        else:
            mask = split_random(len(left), fraction, rule.seed)
        side[left[mask]] = index
        left, remaining = left[~mask], remaining - rule.ratios[index]
    return side


def _ordered(rule: Rule, groups: np.ndarray, time: np.ndarray) -> np.ndarray:
    """The first frames of each trajectory train, the next validate, the last test."""
    side = np.zeros(len(groups), dtype=int)
    bounds = np.cumsum(rule.ratios)
    order = np.lexsort((time, groups))
    starts = np.flatnonzero(np.r_[True, groups[order][1:] != groups[order][:-1]])
    for members in np.split(order, starts[1:]):
        # by the middle of each frame's share of the trajectory, so a single one trains
        place = (np.arange(len(members)) + 0.5) / len(members)
        side[members] = np.searchsorted(bounds[:-1], place, side="right")
    if any((side == index).sum() == 0 for index in range(len(rule.ratios))):
        raise UserError(
            f"trajectories by {rule.within} are too short for these --ratios: a side stays empty"
        )
    return side


def leakage(rows: Rows, geometry: np.ndarray, side: np.ndarray) -> Iterator[str]:
    """What the other sides share with train, one line each."""
    kinds = {"system ids": np.array(rows.sid), "compositions": np.array(rows.composition)}
    kinds["geometries"] = geometry
    for index in range(1, side.max() + 1):
        for kind, values in kinds.items():
            if kind == "system ids" and not values.astype(bool).any():
                continue
            shared = np.isin(values[side == index], values[side == 0])
            yield (
                f"leakage: {shared.sum()} of {len(shared)} {SIDES[index]} frames "
                f"({shared.mean():.1%}) have {kind} of train"
            )


def _read(rule: Rule, reading: Reading, part: Part) -> Rows:
    """Go through a part."""
    rows = Rows()
    key = rule.within if rule.ordered else rule.by
    for frame in frames_of(reading, part):
        atoms, info, results = frame.atoms, frame.atoms.info, frame.atoms.calc.results
        values = {"formula": "", "geometry": "", None: ""}
        for name in {key, rule.ordered} - set(values):
            if name not in info:
                listed = ", ".join(sorted(info)) or "no keys"
                raise UserError(f"{place_of(frame)}: no info key {name!r}; it has {listed}")
        rows.group.append(values[key] if key in values else str(info[key]))
        rows.time.append(_number(info[rule.ordered], place_of(frame)) if rule.ordered else 0.0)
        rows.sid.append(str(info.get("sid", "")))
        rows.composition.append(composition_key(atoms.numbers))
        cell = atoms.cell.array
        rows.prints.append(fingerprint(atoms.numbers, atoms.positions, cell, atoms.pbc))
        rows.energy.append(results["energy"])
        rows.forces.append(_squares(results["forces"][free_atoms(atoms)]))
        stress = atoms.get_stress(voigt=False) if "stress" in results else np.zeros(0)
        rows.stress.append(_squares(stress))
    return rows


def _number(value: object, place: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{place}: --ordered needs numbers, not {value!r}") from None


def _squares(values: np.ndarray) -> tuple[float, int]:
    return float(np.square(values).sum()), values.size


def _rms(squares: Sequence[tuple[float, int]], chosen: np.ndarray) -> float:
    total, number = np.array(squares)[chosen].sum(axis=0)
    return RunningRms(total, int(number)).rms


def _write_group(
    folder: Path, target: Path, rows: Rows, train: np.ndarray, label: str, comment: str
) -> References:
    """Write ``dataset.yaml`` with references and scales of the new training frames."""
    fit = ReferenceFit()
    for index in np.flatnonzero(train):
        pairs = (entry.split(":") for entry in rows.composition[index].split())
        numbers = np.concatenate([np.full(int(n), int(z)) for z, n in pairs])
        fit.add(numbers, rows.energy[index])
    references = fit.solve()
    with_stress = any(n for _, n in rows.stress)
    store.write_dataset_group(
        folder / store.DATASET_FILE,
        label=label,
        train=str(target / "train"),
        val=str(target / "val"),
        references=references,
        force_rms=_rms(rows.forces, train),
        stress_rms=_rms(rows.stress, train) if with_stress else None,
        comment=comment,
    )
    return references


def _write_card(
    data: Path, folder: Path, rule: Rule, rows: Rows, side: np.ndarray, references: References
) -> None:
    """Carry the card of the data over, with the new split and what it changes."""
    path = data / CARD_FILE
    card = json.loads(path.read_text()) if path.is_file() else {}
    card.setdefault("conversion", {})["split"] = f"escaip split {data}: {rule.describe()}"
    card["element_references"] = references_entry(references)
    energy, stress = np.array(rows.energy), np.array([n > 0 for _, n in rows.stress])
    card["sets"] = {
        SIDES[index]: {
            "frames": int((side == index).sum()),
            "frames_with_stress": int(stress[side == index].sum()),
            "energy": [float(energy[side == index].min()), float(energy[side == index].max())],
        }
        for index in range(len(rule.ratios))
    }
    (folder / CARD_FILE).write_text(json.dumps(card, indent=1) + "\n")
