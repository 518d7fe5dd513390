"""Whether what a recipe assumes holds for a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from escaip_fairchem.data.survey import Facts

MANY_CUT = 0.5  # part of the pairs within the cutoff that a dense structure may lose
SCALE_RATIO = 3.0  # between a scale of the recipe and that of the data


@dataclass(frozen=True)
class Limits:
    """What a recipe assumes of its data.

    Attributes:
        cutoff: A.
        max_neighbors: Neighbours that an atom keeps.
        use_pbc: Whether periodic images are seen.
        max_num_elements: Atomic numbers are below it.
        max_atoms: Atoms in a batch; None without a batch sampler of atoms.
        stress: Whether stress is learnt.
        references: eV, index = atomic number, (R,).
        force_rms: Force scale, eV/A.
        energy_rms: Energy scale, eV.
    """

    cutoff: float
    max_neighbors: int
    use_pbc: bool
    max_num_elements: int
    max_atoms: int | None
    stress: bool
    references: np.ndarray
    force_rms: float
    energy_rms: float


def read_limits(recipe: Path, overrides: Sequence[str]) -> Limits:
    """Compose a recipe as the `fairchem` command does, and read what it assumes.

    Args:
        recipe: The recipe.
        overrides: As on fairchem's command line, such as ``dataset=mine``.

    Raises:
        UserError: No such recipe, or it cannot be composed.
    """
    return limits_of(compose_recipe(recipe, overrides))


def compose_recipe(recipe: Path, overrides: Sequence[str]) -> Any:
    """What the `fairchem` command would run, with every interpolation resolved.

    Args:
        recipe: The recipe.
        overrides: As on fairchem's command line, such as ``dataset=mine``.

    Raises:
        UserError: No such recipe, or it cannot be composed.
    """
    from fairchem.core._cli import get_hydra_config_from_yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not recipe.is_file():
        raise UserError(
            f"no recipe at {recipe}; name a .yml file such as configs/oc20/escaip_2m.yml"
        )
    try:
        return get_hydra_config_from_yaml(str(recipe), list(overrides))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        text = " ".join(str(error).split()).partition(" Config search path:")[0]
        raise UserError(f"{recipe} cannot be composed: {text}") from error


def limits_of(config: Any) -> Limits:
    """What a composed recipe assumes of its data.

    Args:
        config: From `compose_recipe`.

    Raises:
        UserError: The backbone's settings are not those of a model of this package.
    """
    from escaip_fairchem.config import EScAIPConfig

    runner = config.runner
    backbone = {k: v for k, v in runner.train_eval_unit.model.backbone.items() if k != "model"}
    model = EScAIPConfig.from_kwargs(**_plain(backbone))
    tasks = {task["property"]: task for task in _plain(list(runner.train_eval_unit.tasks))}
    loader = _plain(runner.train_dataloader)
    return Limits(
        cutoff=model.cutoff,
        max_neighbors=model.max_neighbors,
        use_pbc=model.use_pbc,
        max_num_elements=model.max_num_elements,
        max_atoms=loader["batch_sampler_fn"].get("max_atoms"),
        stress="stress" in tasks,
        references=np.array(
            tasks["energy"]["element_references"]["element_references"]["_args_"][0]
        ),
        force_rms=float(tasks["forces"]["normalizer"]["rmsd"]),
        energy_rms=float(tasks["energy"]["normalizer"]["rmsd"]),
    )


def judge(
    facts: Facts,
    limits: Limits,
    cut: float,
    residual_rms: float,
    natoms: np.ndarray | None = None,
) -> Iterator[str]:
    """One line for each thing that a recipe assumes: ``ok``, ``note`` or ``WRONG``.

    Args:
        facts: Facts of the set, or of a sample of it.
        limits: What the recipe assumes.
        cut: Part of the pairs within the cutoff that ``max_neighbors`` leaves out.
        residual_rms: Rms of the energies above the recipe's references, eV; NaN without labels.
        natoms: Atoms of every structure of the set, where the facts are those of a sample.
    """
    yield _size(facts.natoms if natoms is None else natoms, limits)
    yield from _elements(facts, limits, sampled=natoms is not None)
    with_stress = sum(facts.stress)
    if limits.stress:
        state = "ok   " if with_stress else "WRONG"
        remedy = "" if with_stress else "; train without it: training=direct"
        yield f"{state} stress is learnt, {with_stress} of {len(facts)} structures have it{remedy}"
    elif with_stress:
        yield f"note  {with_stress} structures have a stress that the recipe does not learn"
    periodic = sum("T" in axes for axes in facts.periodic)
    if periodic and not limits.use_pbc:
        yield (
            f"WRONG {periodic} structures are periodic, but the recipe sees no images "
            "(use_pbc: false); take a preset for periodic structures"
        )
    lonely = int(facts.neighbors[0])
    words = f"atoms without a neighbour within {limits.cutoff:g} A"
    yield f"note  {lonely} {words}" if lonely else f"ok    no {words}"
    state = "note " if cut > MANY_CUT else "ok   "
    yield f"{state} max_neighbors {limits.max_neighbors} leaves out {cut:.1%} of the pairs"
    yield from _scales(facts, limits, residual_rms)


def _size(natoms: np.ndarray, limits: Limits) -> str:
    largest = int(natoms.max())
    if limits.max_atoms is None:
        return "note  the recipe's batches are not limited by atoms"
    too_large = int((natoms > limits.max_atoms).sum())
    words = f"max_atoms {limits.max_atoms}, largest structure {largest} atoms"
    if too_large:
        return (
            f"WRONG {words}: {too_large} structures are never trained on; set max_atoms={largest}"
        )
    return f"ok    {words}, {limits.max_atoms / natoms.mean():.1f} structures in a batch"


def _elements(facts: Facts, limits: Limits, *, sampled: bool) -> Iterator[str]:
    from ase.data import chemical_symbols

    def symbols(numbers: np.ndarray) -> str:
        return ", ".join(chemical_symbols[z] for z in numbers)

    counts = np.array(facts.counts)
    present = np.flatnonzero(counts.any(axis=0))
    beyond = present[present >= limits.max_num_elements]
    if len(beyond):
        need = f"set +backbone.max_num_elements={present.max() + 1}"
        yield f"WRONG {symbols(beyond)}: above max_num_elements {limits.max_num_elements}; {need}"
    table = np.zeros(counts.shape[1])
    table[: len(limits.references)] = limits.references[: len(table)]
    missing = present[table[present] == 0]
    if not table.any():
        yield "note  no element references: right for adsorption and formation energies only"
    elif len(missing):
        yield f"WRONG no element reference of {symbols(missing)}; fit them: escaip references DATA"
    else:
        yield f"ok    element references of all {len(present)} elements"
    val = np.array(facts.part) == "val"
    untrained = present[~counts[~val][:, present].any(axis=0)] if val.any() else []
    if len(untrained) and sampled:
        yield f"note  {symbols(untrained)}: in the sample of val, not in that of train"
    elif len(untrained):
        yield f"WRONG {symbols(untrained)}: only in val, never trained; split again (escaip split)"


def _scales(facts: Facts, limits: Limits, residual_rms: float) -> Iterator[str]:
    if not np.isfinite(residual_rms):
        return
    pairs = {
        "normalizer.rmsd, eV/A": (limits.force_rms, facts.force_rms),
        "energy scale, eV": (limits.energy_rms, residual_rms),
    }
    for name, (assumed, found) in pairs.items():
        ratio = max(assumed, found) / max(min(assumed, found), 1e-12)
        state = "ok   " if ratio < SCALE_RATIO else "note "
        yield f"{state} {name}: {assumed:.4g} in the recipe, {found:.4g} in the data"


def _plain(value: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create(value), resolve=True)
