"""Time of the graph on one core against the number of atoms: fcc Cu, perfect and rattled.

    python benchmarks/graph.py [--search fairchem vesin]

The figure is the median process time of three, one thread. Rows are appended to
results/graph.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import time
from pathlib import Path

import torch
from ase.build import bulk

from escaip_fairchem.config import EScAIPConfig
from escaip_fairchem.graph import build_graph
from escaip_fairchem.neighbors import Structures

RESULTS = Path(__file__).parent / "results" / "graph.csv"

#: Cubic cells of 4 atoms along each axis: about 1,000, 2,500, 5,000 and 10,000 atoms.
REPEATS = {1000: (5, 5, 10), 2520: (7, 9, 10), 5040: (9, 10, 14), 10000: (10, 10, 25)}


def copper(repeats: tuple[int, int, int], rattle: float) -> Structures:
    """A crystal in float32, atoms moved by `rattle` Angstrom at random."""
    atoms = bulk("Cu", cubic=True).repeat(repeats)
    atoms.rattle(rattle, seed=0)
    return Structures(
        positions=torch.tensor(atoms.positions, dtype=torch.float32),
        cell=torch.tensor(atoms.cell.array[None], dtype=torch.float32),
        pbc=torch.ones(1, 3, dtype=torch.bool),
        natoms=torch.tensor([len(atoms)]),
        system_idx=torch.zeros(len(atoms), dtype=torch.long),
    )


def seconds(structures: Structures, config: EScAIPConfig) -> float:
    """Median process time of three graphs."""
    times = []
    for _ in range(3):
        start = time.process_time()
        build_graph(structures, config)
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> None:
    """Time every preset, search, size and structure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", nargs="+", default=["fairchem", "vesin"])
    searches = parser.parse_args().search
    torch.set_num_threads(1)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    common = {
        "device": "cpu, 1 thread",
        "torch": torch.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
    }
    rows = []
    for preset in ("paper", "v2"):
        for search in searches:
            config = EScAIPConfig.from_kwargs(preset=preset, neighbor_search=search)
            for rattle in (0.0, 0.1):
                for atoms, repeats in REPEATS.items():
                    time_taken = seconds(copper(repeats, rattle), config)
                    name = f"{preset} {search} {'rattled' if rattle else 'perfect'}"
                    rows.append({**common, "config": name, "atoms": atoms})
                    rows[-1]["seconds"] = f"{time_taken:.3f}"
                    print(name, atoms, rows[-1]["seconds"], flush=True)
    write(rows)


def write(rows: list[dict]) -> None:
    """Append to the results, with a header if the file is new."""
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
