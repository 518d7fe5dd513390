"""What a SLURM task of a sweep runs: fairchem's program, its configuration read at the start."""

from __future__ import annotations

import os
from typing import Any

from fairchem.core._cli import get_hydra_config_from_yaml
from fairchem.core.launchers.slurm_launch import SlurmSPMDProgram
from omegaconf import OmegaConf
from submitit.helpers import DelayedSubmission

from escaip_fairchem.files import write_whole
from escaip_fairchem.sweep.halving import decide, stop_overrides
from escaip_fairchem.sweep.store import load_sweep


class PointProgram(SlurmSPMDProgram):
    """Trains one point.

    What is submitted is its name only, so that a requeued task takes up its newest checkpoint,
    and a task of a later rung can choose its point when it starts.
    """

    def __call__(self, folder: str, name: str | None, rung: int = 0, place: int = 0) -> None:
        """Train.

        Args:
            folder: Of the sweep.
            name: Of the point; None: the one that takes a place in the rung.
            rung: Of successive halving.
            place: In the rung, from 0 for the best of the rung before.
        """
        sweep = load_sweep(folder)
        if name is None:
            names = decide(sweep, rung)
            if place >= len(names):
                print(f"rung {rung} has {len(names)} points, so there is none for place {place}")
                return
            name = names[place]
        config = get_hydra_config_from_yaml(str(sweep.config(name)), stop_overrides(sweep, rung))
        if os.environ.get("SLURM_PROCID", "0") == "0":
            os.makedirs(config.job.metadata.log_dir, exist_ok=True)
            write_whole(sweep.run(name) / "canonical_config.yaml", OmegaConf.to_yaml(config))
        super().__call__(config)

    def checkpoint(self, *args: Any, **kwargs: Any) -> DelayedSubmission:
        """Called before a requeue.

        Args:
            args: Those of the call.
            kwargs: Those of the call.

        Returns:
            The same call again: it goes on from the newest checkpoint.
        """
        if self.config is not None and self.runner is not None:
            super().checkpoint(*args, **kwargs)
        return DelayedSubmission(type(self)(), *args, **kwargs)
