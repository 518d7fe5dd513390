"""What the `fairchem` command imports and compiles with a recipe of this package."""

from __future__ import annotations

import numpy as np
import torch
from fairchem.core.datasets.samplers.max_atom_distributed_sampler import get_batches

import escaip_fairchem.data.datasets
import escaip_fairchem.data.loaders
import escaip_fairchem.train.optim
import escaip_fairchem.train.runner
import escaip_fairchem.train.unit  # noqa: F401

torch.set_num_threads(1)
get_batches(np.array([1, 2]), np.array([0, 1]), 2, 0)  # compiled by numba
