"""Molecules, as in SPICE, labelled by GFN2-xTB through tblite, or by ASE's EMT without it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from escaip_fairchem.data.sample import Maker, trajectory

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from ase import Atoms
    from ase.calculators.calculator import Calculator

# Of ASE's G2 set: H, C, N and O only, because EMT knows no others; closed shells.
MOLECULES = (
    "CH3CH2OH", "CH3CHO", "CH3CONH2", "CH3NO2", "C6H6", "HCOOH", "CH3CN", "CH3COOH", "C5H5N",
    "H2CO", "CH3CH2NH2", "C4H4O", "CH3OCH3", "C4H4NH", "HCOOCH3", "trans-butane", "N2H4",
    "isobutene", "CH3COCH3", "H2O2",
)  # fmt: skip
# Added to EMT's energies, eV per atom: about what GFN2-xTB's are more, so that the references in
# the package fit either sample.
EMT_OFFSETS = {"H": -14.0, "C": -58.4, "N": -78.9, "O": -110.4}


def maker() -> Maker:
    """What `escaip_fairchem.data.sample` makes the sample with."""
    try:
        import tblite.ase  # noqa: F401
    except ImportError:
        return Maker(
            frames,
            note="labels: EMT, which is no model of molecules; "
            "pip install 'escaip-fairchem[xtb]' for GFN2-xTB",
        )
    return Maker(frames, labels="GFN2-xTB, tblite", note="labels: GFN2-xTB (tblite)")


def frames(index: int, n_frames: int, rng: np.random.Generator) -> Iterator[Atoms]:
    """Make labelled frames of a molecule without a cell; ``charge`` and ``spin`` in ``info``."""
    from ase.build import molecule

    name = MOLECULES[index % len(MOLECULES)]
    atoms = molecule(name)
    with _calculator(atoms) as (calculator, offset):
        for frame in trajectory(atoms, calculator, n_frames, rng):
            frame.calc.results["energy"] += offset
            frame.info = {"name": name, "charge": 0, "spin": 1}
            yield frame


@contextmanager
def _calculator(atoms: Atoms) -> Iterator[tuple[Calculator, float]]:
    """The calculator at hand, and what to add to its energy, eV."""
    try:
        from tblite.ase import TBLite
    except ImportError:
        from ase.calculators.emt import EMT

        yield EMT(), sum(EMT_OFFSETS[symbol] for symbol in atoms.symbols)
        return
    from threadpoolctl import threadpool_limits

    # several threads add in any order, and dynamics makes rounding errors grow
    with threadpool_limits(1):
        yield TBLite(method="GFN2-xTB", verbosity=0), 0.0
