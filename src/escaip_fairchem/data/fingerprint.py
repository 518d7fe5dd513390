"""Which structures are the same geometry, whatever the order, place and rounding of their atoms.

A hash of rounded numbers misses equal structures whose numbers lie on either side of a rounding
step. Here a structure has a few smooth invariants, and two are equal where all of them agree to
what rounding of positions to 1e-4 A may change.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from escaip_fairchem.data.checks import with_images

REACH = 5.0  # A, of the invariants of periodic structures
RADIAL = 8  # waves over the distance, each with two weights by species
# What a sum may differ by, times the square root of its pairs: above what positions rounded to
# four decimals change. In relaxations of OC20, the atom that moved most between frames taken for
# equal moved by 1e-3 A in the median, and by 6e-3 A at most.
ALLOWED = 3e-4
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
        What the others may differ by in equal structures, then sums of radial functions over
        pairs, (1 + 2 RADIAL,).
    """
    points, owner = with_images(positions, cell, pbc, REACH)
    if pbc.any():
        near = cKDTree(points[: len(numbers)]).sparse_distance_matrix(
            cKDTree(points), REACH, output_type="ndarray"
        )
        i, j, d = near["i"], owner[near["j"]], near["v"]
        decay = (1.0 - np.square(d / REACH)) ** 2
    else:  # a molecule has no images, and parts of it may be far apart
        i, j = np.triu_indices(len(numbers), 1)
        d = np.linalg.norm(points[i] - points[j], axis=1)
        decay = 1.0 / (1.0 + d / REACH)
    pair = d > 0  # not an atom with itself
    i, j, d, decay = i[pair], j[pair], d[pair], decay[pair]
    waves = np.cos(np.pi / REACH * np.outer(np.arange(RADIAL), d)) * decay
    # of the order of 1 for any element, so that a light atom counts as much as a heavy one
    species = np.sin(numbers)
    weights = np.stack([np.ones(len(d)), species[i] * species[j]])
    return np.append(ALLOWED * np.sqrt(len(d)), weights @ waves.T)


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
    order = np.lexsort((prints[:, 1], compositions))
    allowed, sums = prints[order, :1] + 1e-9, prints[order, 1:]
    compositions = compositions[order]
    label = np.arange(len(order))
    for step in range(1, min(WINDOW, len(order) - 1) + 1):
        near = np.abs(sums[step:, 0] - sums[:-step, 0]) <= allowed[:-step, 0]
        (first,) = (near & (compositions[step:] == compositions[:-step])).nonzero()
        if not len(first):
            break
        equal = np.abs(sums[first + step] - sums[first]) <= allowed[first]
        for index in first[equal.all(axis=1)]:
            label[index + step] = label[index]
    found = np.empty(len(order), dtype=int)
    found[order] = label
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    return first[inverse]
