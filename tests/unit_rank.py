"""One of two ranks that train and evaluate; leaves what it found in a file for `test_unit.py`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

from escaip_fairchem.train.optim import Muon
from unit_parts import (
    DENOISING,
    Answers,
    batches,
    corrupted,
    evaluate,
    gradient,
    make_tasks,
    make_unit,
    ranks,
    train,
    weights,
)

#: Structures of each batch: different numbers, of different sizes.
GROUPS = [[1, 2, 3], [4], [0, 5], [6, 7, 8], [9, 10], [2]]
STEPS = 3


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that this rank holds in states of an optimizer."""
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    found = {}
    mine = batches(folder / "frames", GROUPS[rank::2])
    noisy = corrupted(batches(folder / "frames", GROUPS))[rank::2]
    with ranks(folder, rank, 2):
        for form in ("paper", "v2"):
            unit = make_unit(folder, form)
            found["gradient", form] = gradient(unit, mine[:1])
            # two batches of two ranks in a step; the second pass alone sends gradients
            found["four", form] = gradient(unit, mine[:2])
            denoised = make_unit(folder, form, denoising=DENOISING)
            found["denoised", form] = gradient(denoised, noisy[:2])
            train(unit, [[batch] for batch in mine])
            found["plain", form] = weights(unit)
        found["bytes", "plain"] = state_bytes(unit.optimizer)
        unit.save_state(str(folder / "plain"))

        unit = make_unit(folder, "v2", shard_optimizer=True)
        train(unit, [[batch] for batch in mine])
        found["sharded", "v2"] = weights(unit)
        found["bytes", "sharded"] = state_bytes(unit.optimizer)
        unit.save_state(str(folder / "sharded"))
        train(unit, [mine[:1]])
        found["one more"] = weights(unit)

        again = make_unit(folder, "v2", shard_optimizer=True)
        again._execute_load_state(str(folder / "plain"))
        train(again, [mine[:1]])
        found["one more after plain"] = weights(again)
        found["bytes", "loaded"] = state_bytes(again.optimizer)

        muon = partial(Muon, lr=2e-3, weight_decay=1e-3)
        for key in (False, True):
            unit = make_unit(folder, "v2", optimizer=muon, shard_optimizer=key)
            train(unit, [[batch] for batch in mine])
            found["muon", key] = weights(unit)

        both = {"accumulate": 2, "fp16": True, "shard_optimizer": True}
        unit = make_unit(folder, "v2", backbone={"checkpointing": "block"}, **both)
        before = weights(unit)
        unit.scaler.load_state_dict({**unit.scaler.state_dict(), "scale": 2.0**120})
        train(unit, [mine[:2]])
        found["overflow"] = bool((weights(unit) == before).all()), unit.scaler.get_scale()
        unit.scaler.load_state_dict({**unit.scaler.state_dict(), "scale": 2.0**4})
        train(unit, [mine[:2]])
        found["after overflow"] = weights(unit), unit.scaler.get_scale()

        model = Answers(torch.load(folder / "answers.pt", weights_only=False))
        for max_atoms in (20, 10_000):  # ranks with different numbers of batches, one with none
            tasks = make_tasks(stress=True)
            found["metrics", max_atoms] = evaluate(model, folder, max_atoms, tasks)
    torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
