"""Relax an oxygen atom on copper with a trained checkpoint, from ASE.

python examples/relax_slab.py runs/<time>/checkpoints/final/inference_ckpt.pt
"""

from __future__ import annotations

import sys

import numpy as np
from ase.build import add_adsorbate, fcc111
from ase.constraints import FixAtoms
from ase.optimize import BFGS

import escaip_fairchem


def main(checkpoint: str) -> None:
    """Relax the slab and print energy and largest force before and after.

    Args:
        checkpoint: Inference checkpoint of a run.
    """
    slab = fcc111("Cu", (3, 3, 3), vacuum=8.0, periodic=True)
    bottom = slab.get_tags() > 1
    # OC20's meaning of tags: 0 fixed, 1 surface, 2 adsorbate.
    slab.set_tags(np.where(bottom, 0, 1))
    slab.set_constraint(FixAtoms(mask=bottom))
    add_adsorbate(slab, "O", height=1.7, position="fcc")
    slab.set_tags([*slab.get_tags()[:-1], 2])

    slab.calc = escaip_fairchem.calculator(checkpoint)
    for steps in (0, 30):
        BFGS(slab, logfile=None).run(fmax=0.1, steps=steps)
        force = np.linalg.norm(slab.get_forces(), axis=1).max()
        energy = slab.get_potential_energy()
        print(f"after {steps:2d} steps: energy {energy:.3f} eV, largest force {force:.3f} eV/A")


if __name__ == "__main__":
    main(sys.argv[1])
