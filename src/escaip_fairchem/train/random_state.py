"""The states of the random number generators, so that a continued run draws what it would have."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import torch
from fairchem.core.common import distutils


def random_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy, and torch on the CPU and the GPU of this rank."""
    kind, keys, *position = np.random.get_state()
    state = {
        "ranks": distutils.get_world_size(),
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *position),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any] | None, seed: int) -> None:
    """Set the generators of this rank.

    Args:
        state: From `random_state` of the same rank; None if there is none.
        seed: Where to start them if the state is that of another number of ranks; must differ
            between ranks.
    """
    if state is None or state["ranks"] != distutils.get_world_size():
        if distutils.is_master():
            had = "without random states" if state is None else f"of {state['ranks']} ranks"
            logging.warning(f"the checkpoint is one {had}; dropout starts from new random numbers")
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)  # of the GPU too
        return
    random.setstate(state["python"])
    kind, keys, *position = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *position))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
