"""Which structures are the same geometry, whatever the order, place and rounding of their atoms.

A hash of rounded numbers misses equal structures whose numbers lie on either side of a rounding
step. Here a structure has a few smooth invariants, and two are equal where all of them agree within
a tolerance: moving every atom by 1e-4 A stays within it, and by 1e-2 A does not.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from escaip_fairchem.data.checks import with_images

REACH = 5.0  # A, of the invariants of periodic structures
TOLERANCE = 3e-5  # relative to the largest possible value of an invariant
RADIAL = 4  # radial functions, each with two weights by species
WINDOW = 64  # structures compared with each one; more equal ones form chains


def fingerprint(
    numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray
) -> np.ndarray:
    """Invariants of a structure under translation, rotation, permutation and choice of cell.

    Args:
        numbers: Atomic numbers, (N,).
        positions: A, (N, 3).
        cell: Cell vectors as rows, A, (3, 3).
        pbc: (3,).

    Returns:
        Sums over pairs, (2 RADIAL,): of radial functions with the one weight, then the other.
        The first of each kind is the largest possible value of the kind.
    """
    points, owner = with_images(positions, cell, pbc, REACH)
    if pbc.any():
        pairs = cKDTree(points[: len(numbers)]).sparse_distance_matrix(
            cKDTree(points), REACH, output_type="ndarray"
        )
        i, j, d = pairs["i"], owner[pairs["j"]], pairs["v"]
        decay = (1.0 - np.square(d / REACH)) ** 2
    else:  # a molecule has no images, and parts of it may be far apart
        i, j = np.triu_indices(len(numbers), 1)
        d = np.linalg.norm(points[i] - points[j], axis=1)
        decay = 1.0 / (1.0 + np.square(d / REACH))
    real = d > 0  # an atom with itself
    i, j, d, decay = i[real], j[real], d[real], decay[real]
    waves = np.cos(np.pi * np.outer(np.arange(RADIAL), np.minimum(d, 20.0)) / REACH) * decay
    z = numbers.astype(float)
    weights = np.stack([z[i] * z[j], z[i] + z[j]])
    return (weights @ waves.T).ravel()


def composition_key(numbers: np.ndarray) -> str:
    """Composition as text, elements by atomic number, such as ``1:4 6:1``."""
    elements, counts = np.unique(numbers, return_counts=True)
    return " ".join(f"{z}:{n}" for z, n in zip(elements, counts, strict=True))


def equal_structures(compositions: np.ndarray, prints: np.ndarray) -> np.ndarray:
    """Number the geometries of structures.

    Args:
        compositions: A number for each composition, (F,).
        prints: `fingerprint` of each structure, (F, P).

    Returns:
        A number for each structure, (F,), the same for equal geometries: the index of the first.
    """
    order = np.lexsort((prints[:, 0], compositions))
    sorted_prints, sorted_compositions = prints[order], compositions[order]
    scale = TOLERANCE * np.repeat(sorted_prints[:, ::RADIAL], RADIAL, axis=1) + 1e-12
    label = np.arange(len(order))
    for step in range(1, min(WINDOW, len(order) - 1) + 1):
        near = (np.abs(sorted_prints[step:, 0] - sorted_prints[:-step, 0]) <= scale[:-step, 0]) & (
            sorted_compositions[step:] == sorted_compositions[:-step]
        )
        (first,) = near.nonzero()
        if not len(first):
            break
        difference = np.abs(sorted_prints[first + step] - sorted_prints[first])
        for index in first[(difference <= scale[first]).all(axis=1)]:
            label[index + step] = label[index]
    found = np.empty(len(order), dtype=int)
    found[order] = label
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    return first[inverse]
