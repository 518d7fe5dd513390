"""Adsorption energies: adsorbate on slab, less the slab, less the gas reference."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from escaip_fairchem.errors import UserError
from escaip_fairchem.files import write_csv
from escaip_fairchem.simulate.model import warn
from escaip_fairchem.simulate.relax import RelaxOptions, relax_structures
from escaip_fairchem.simulate.structures import read_one

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ase import Atoms

    from escaip_fairchem.simulate.model import Model
    from escaip_fairchem.simulate.relax import Relaxed

#: OC20's tag of the adsorbate.
ADSORBATE = 2


@dataclass(frozen=True)
class Gas:
    """A term of the gas reference.

    Attributes:
        name: For the table.
        atoms: The molecule.
        number: How many, may be a fraction or negative.
    """

    name: str
    atoms: Atoms
    number: float

    @classmethod
    def read(cls, term: str) -> Gas:
        """Read ``FILE`` or ``FILE*NUMBER``.

        Raises:
            UserError: No such file, or no number.
        """
        file, star, number = term.rpartition("*")
        if not star:
            file, number = term, "1"
        try:
            count = float(number)
        except ValueError:
            raise UserError(f"--gas {term}: {number!r} is no number; give FILE*0.5") from None
        name, atoms = read_one(file)
        return cls(name, atoms, count)


@dataclass(frozen=True)
class Adsorption:
    """The adsorption energy of one structure, with its terms, eV.

    Attributes:
        name: Of the structure.
        adsorption: E_ads.
        adslab: Energy of adsorbate and slab; that of a model of adsorption energies is E_ads.
        slab: Of the slab.
        gas: Of the gas reference.
        converged: Whether all that this is made of is relaxed.
    """

    name: str
    adsorption: float
    adslab: float
    slab: float | None
    gas: float | None
    converged: bool


def adsorption(
    model: Model,
    adslabs: Sequence[tuple[str, Atoms]],
    slab: Atoms | None,
    gas: Sequence[Gas],
    out: Path,
    options: RelaxOptions,
    *,
    relax: str = "all",
    energies: str | None = None,
) -> list[Adsorption]:
    """Adsorption energies, with ``adsorption.csv`` and what `relax_structures` writes.

    Args:
        model: What evaluates the structures.
        adslabs: Names and structures of adsorbates on one slab.
        slab: It alone; by default the first structure without its atoms of tag 2.
        gas: Terms of the gas reference, of the composition of the adsorbate.
        out: Folder of the results.
        options: How structures are relaxed.
        relax: ``all`` of them, ``adslab`` only, or ``none``.
        energies: What the model predicts, ``total`` or ``adsorption`` energies; by default what
            its references say: a model with element references predicts total energies.

    Returns:
        Terms of each.

    Raises:
        UserError: Terms that do not belong together, or not to what the model predicts.
    """
    kind = energies or ("total" if model.references else "adsorption")
    if kind == "adsorption":
        _refuse_terms(model, slab, gas, energies)
        slabs, molecules = [], []
    else:
        if model.references:
            _refuse_unknown(model, [*(atoms for _, atoms in adslabs), *(g.atoms for g in gas)])
        slabs = [("slab", _checked_slab(adslabs, slab))]
        _check_gas(adslabs, slabs[0][1], gas)
        molecules = [(f"gas {each.name}", each.atoms) for each in gas]
    _warn_of_free_slabs([*adslabs, *slabs])
    still = RelaxOptions(**{**asdict(options), "steps": 0})
    first = options if relax != "none" else still
    second = options if relax == "all" else still
    relaxed, _ = relax_structures(model, adslabs, out / "adslabs", first)
    others: list[Relaxed] = []
    if kind == "total":
        others, _ = relax_structures(model, [*slabs, *molecules], out / "references", second)
    for record in [*relaxed, *others]:
        if record.error:
            raise UserError(f"{record.name}: {record.error}; there is no adsorption energy")
    results = _results(relaxed, others, gas, relax)
    write_csv(out / "adsorption.csv", map(asdict, results))
    return results


def table(results: Sequence[Adsorption], gas: Sequence[Gas]) -> str:
    """Terms as lines, the most stable first."""
    width = max(12, *(len(result.name) + 2 for result in results))
    total = results[0].slab is not None
    if total:
        terms = " ".join(f"{each.number:+g} E({each.name})" for each in gas)
        lines = [f"E_ads = E(adslab) - E(slab) - [{terms}], eV"]
    else:
        lines = ["E_ads = E(adslab): the model predicts adsorption energies, eV"]
    heads = ("E(adslab)", "E(slab)", "E(gas)") if total else ()
    lines.append(f"{'structure':<{width}}{'E_ads':>12}" + "".join(f"{h:>15}" for h in heads))
    for result in sorted(results, key=lambda result: result.adsorption):
        terms = (result.adslab, result.slab, result.gas) if total else ()
        lines.append(
            f"{result.name:<{width}}{result.adsorption:>12.4f}"
            + "".join(f"{term:>15.4f}" for term in terms)
            + ("" if result.converged else "  not converged")
        )
    return "\n".join(lines)


def _results(
    relaxed: Sequence[Relaxed], others: Sequence[Relaxed], gas: Sequence[Gas], relax: str
) -> list[Adsorption]:
    found = []
    for record in relaxed:
        slab = others[0].energy if others else None
        of_gas = None
        if others:
            of_gas = sum(g.number * o.energy for g, o in zip(gas, others[1:], strict=True))
        used = {"all": [record, *others], "adslab": [record], "none": []}[relax]
        found.append(
            Adsorption(
                name=record.name,
                adsorption=record.energy - (slab or 0.0) - (of_gas or 0.0),
                adslab=record.energy,
                slab=slab,
                gas=of_gas,
                converged=all(each.converged for each in used),
            )
        )
    return found


def _refuse_terms(
    model: Model, slab: Atoms | None, gas: Sequence[Gas], energies: str | None
) -> None:
    if slab is not None or gas:
        why = "" if energies else " (it has no element references)"
        raise UserError(
            f"{model.name} predicts adsorption energies{why}, already less slab and gas: leave "
            "out --slab and --gas; if its labels were total energies, add --energies total"
        )


def _refuse_unknown(model: Model, structures: Sequence[Atoms]) -> None:
    for atoms in structures:
        for number, symbol in dict(zip(atoms.numbers.tolist(), atoms.symbols, strict=True)).items():
            if number not in model.references:
                raise UserError(
                    f"{model.name} has no reference energy for {symbol}: it was not trained on it"
                )


def _checked_slab(adslabs: Sequence[tuple[str, Atoms]], slab: Atoms | None) -> Atoms:
    name, first = adslabs[0]
    if slab is None:
        on_it = first.get_tags() == ADSORBATE
        if not on_it.any() or on_it.all():
            raise UserError(
                f"{name} does not say by tags which atoms are the adsorbate (tag {ADSORBATE}); "
                "set them, or give --slab FILE"
            )
        slab = first[~on_it]
    for name, atoms in adslabs:
        same_cell = abs(atoms.cell.array - slab.cell.array).max() < 1e-3
        if not same_cell or (atoms.pbc != slab.pbc).any():
            raise UserError(f"{name} and the slab differ in cell or pbc; take the slab of its own")
        if _composition(slab) - _composition(atoms):
            raise UserError(
                f"the slab ({slab.get_chemical_formula()}) has atoms that {name} "
                f"({atoms.get_chemical_formula()}) has not; give its own slab"
            )
    return slab


def _check_gas(adslabs: Sequence[tuple[str, Atoms]], slab: Atoms, gas: Sequence[Gas]) -> None:
    """The gas must have the composition of the adsorbate, else energies of atoms are left over."""
    if not gas:
        raise UserError(
            "a model of total energies needs the gas reference: --gas FILE, or several with "
            "numbers, such as --gas h2o.xyz --gas 'h2.xyz*-0.5' for OH; if its labels were "
            "adsorption energies, add --energies adsorption"
        )
    given: Counter[str] = Counter()
    for each in gas:
        for symbol, count in _composition(each.atoms).items():
            given[symbol] += each.number * count
    for name, atoms in adslabs:
        wanted = _composition(atoms) - _composition(slab)
        if any(abs(given[s] - wanted[s]) > 1e-6 for s in {*given, *wanted}):
            counts = " ".join(f"{s}{n:g}" for s, n in sorted(given.items()) if n)
            raise UserError(
                f"the gas reference ({counts}) is not what {name} has above its slab "
                f"({' '.join(f'{s}{n:g}' for s, n in sorted(wanted.items()))}); mend --gas"
            )


def _composition(atoms: Atoms) -> Counter[str]:
    return Counter(atoms.get_chemical_symbols())


def _warn_of_free_slabs(adslabs: Sequence[tuple[str, Atoms]]) -> None:
    free = [name for name, atoms in adslabs if not atoms.constraints]
    if free:
        warn(f"no atom is fixed in {', '.join(free[:3])}: all of the slab will relax")
