"""Forward pass of preset ``v2`` against fairchem's built-in EScAIP: same weights, same batches.

    python benchmarks/forward.py [--repeats 5] [--threads 1]

Both models run in turn on every structure of the parity tests; the figure is the smallest
process time of the repeats. Rows are appended to results/forward.csv. A structure whose energies
differ by more than 1e-4 is reported instead of timed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from builtin import (  # noqa: E402
    batch_of,
    builtin_config,
    model_pair,
    molecular_structures,
    outputs,
    periodic_structures,
)

DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "forward.csv"


def main() -> None:
    """Time every structure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = DATA if DATA.is_dir() else None
    rows = []
    for kind, changes in {
        "direct": {"direct": True},
        "conservative": {"direct": False, "stress": True},
    }.items():
        for use_pbc, structures in (
            (True, periodic_structures(data)),
            (False, molecular_structures(data)),
        ):
            # stress of a molecule does not exist
            options = changes | ({"stress": False} if not use_pbc else {})
            pair = model_pair(builtin_config(use_pbc=use_pbc, **options))
            for name, atoms in structures.items():
                batch = batch_of(atoms)
                difference = energy_difference(pair, batch)
                if not difference <= 1e-4:
                    print(f"{kind} {name}: energies differ by {difference:.1e}; not timed")
                    continue
                row = {"kind": kind, "structure": name, "atoms": sum(map(len, atoms))}
                rows.append(row | time_one(pair, kind, batch, arguments.repeats))
                print("{kind} {structure} {atoms} {ratio}".format(**rows[-1]), flush=True)
    if not rows:
        sys.exit("the energies of every structure differ; nothing was timed")
    write(rows, arguments.threads)
    ratios = [float(row["ratio"]) for row in rows]
    print(f"built-in time / ours: min {min(ratios)}, median {statistics.median(ratios):.2f}")


def energy_difference(pair, batch) -> float:
    """Largest difference of both models' energies, relative to the largest energy."""
    builtin, ours = (outputs(model, batch)["energy"].detach() for model in pair)
    return float((builtin - ours).abs().max() / builtin.abs().max())


def time_one(pair, kind: str, batch, repeats: int) -> dict[str, str]:
    """Smallest times of both models on one batch, in turn."""
    times: list[list[float]] = [[], []]
    for _ in range(repeats):
        for index, model in enumerate(pair):
            copy = batch.clone()
            start = time.process_time()
            with torch.set_grad_enabled(kind == "conservative"):
                model(copy)
            times[index].append(time.process_time() - start)
    builtin, ours = (min(t) for t in times)
    return {
        "builtin_ms": f"{1e3 * builtin:.1f}",
        "ours_ms": f"{1e3 * ours:.1f}",
        "ratio": f"{builtin / ours:.2f}",
    }


def write(rows: list[dict], threads: int) -> None:
    """Append rows with what identifies the run."""
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    common = {
        "device": "cpu",
        "threads": threads,
        "torch": torch.__version__,
        "commit": commit.strip(),
        "config": "H128 L2 A2",
    }
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*common, *rows[0]])
        if new:
            writer.writeheader()
        writer.writerows(common | row for row in rows)


if __name__ == "__main__":
    main()
