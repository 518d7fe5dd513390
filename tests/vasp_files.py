"""VASP's output files, reduced to what carries structures and labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ase import Atoms


def _rows(name: str, values: np.ndarray) -> str:
    lines = "".join(f"<v>{' '.join(f'{x:.9f}' for x in row)}</v>" for row in values)
    return f'<varray name="{name}">{lines}</varray>'


def vasprun(frames: Sequence[Atoms]) -> str:
    """Text of a ``vasprun.xml``; the first atom is fixed."""

    def structure(atoms: Atoms, name: str = "", more: str = "") -> str:
        cell, positions = atoms.cell.array, atoms.get_scaled_positions()
        return (
            f"<structure{name}><crystal>{_rows('basis', cell)}</crystal>"
            f"{_rows('positions', positions)}{more}</structure>"
        )

    species = "".join(f"<rc><c>{symbol}</c><c>1</c></rc>" for symbol in frames[0].symbols)
    flags = "".join(f"<v>{' '.join('F' if i == 0 else 'T' for _ in 'xyz')}</v>"
                    for i in range(len(frames[0])))  # fmt: skip
    steps = []
    for atoms in frames:
        energy = atoms.calc.results["energy"]
        both = f'<i name="e_fr_energy">{energy:.8f}</i><i name="e_0_energy">{energy:.8f}</i>'
        steps.append(
            f"<calculation><scstep><energy>{both}</energy></scstep>{structure(atoms)}"
            f"{_rows('forces', atoms.calc.results['forces'])}<energy>{both}</energy></calculation>"
        )
    initial = structure(
        frames[0], ' name="initialpos"', f'<varray name="selective">{flags}</varray>'
    )
    return (
        '<?xml version="1.0"?><modeling><kpoints><varray name="kpointlist"></varray>'
        '<varray name="weights"></varray></kpoints><parameters></parameters>'
        f'<atominfo><array name="atoms"><set>{species}</set></array></atominfo>'
        f"{initial}{''.join(steps)}</modeling>"
    )


def outcar(frames: Sequence[Atoms]) -> str:
    """Text of an ``OUTCAR`` of structures with one species."""
    symbol = frames[0].get_chemical_symbols()[0]
    potential = f" POTCAR:    PAW_PBE {symbol} 22Jun2005\n"
    lines = [
        f"{potential}{potential}   ions per type =            {len(frames[0]):4d}\n",
        "   k-points           NKPTS =      1   k-points in BZ     NKDIM =      1   number of bands"
        "    NBANDS=      8\n",
        " k-points in reciprocal lattice and weights: \n   0.0 0.0 0.0    1.000\n",
        "   ISPIN  =      1    spin polarized calculation?\n",
        "--------- Iteration      1(   1)  ---------\n",
    ]
    for atoms in frames:
        energy = atoms.calc.results["energy"]
        cell = "".join(" ".join(f"{x:13.9f}" for x in [*row, *row]) + "\n" for row in atoms.cell)
        table = np.hstack([atoms.positions, atoms.calc.results["forces"]])
        rows = "".join(" ".join(f"{x:14.9f}" for x in row) + "\n" for row in table)
        lines += [
            f"      direct lattice vectors                 reciprocal lattice vectors\n{cell}",
            f" POSITION                                       TOTAL-FORCE (eV/Angst)\n ---\n{rows}",
            "  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)\n  ---\n",
            f"  free  energy   TOTEN  =     {energy:18.8f} eV\n\n",
            f"  energy  without entropy= {energy:18.8f}  energy(sigma->0) = {energy:18.8f}\n",
        ]
    return "".join(lines)
