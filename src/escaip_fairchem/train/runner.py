"""fairchem's training runner, with mistakes in its configuration reported in one line."""

from __future__ import annotations

import os
from typing import Any

import hydra
import torch
from fairchem.core.components.train import train_runner
from omegaconf import Container

from escaip_fairchem.errors import UserError


def instantiate(config: Any) -> Any:
    """Build what a configuration describes; a user's mistake surfaces as itself.

    Hydra wraps every exception in its own, whose last line is a configuration key, so that the
    message of a `UserError` would be buried in the middle of the traceback.

    Args:
        config: A configuration; anything else is returned as it is.

    Raises:
        UserError: When one is the cause of Hydra's exception.
    """
    if not isinstance(config, Container | dict | list):
        return config
    try:
        return hydra.utils.instantiate(config)
    except Exception as error:
        mistake = _user_error_behind(error)
        if mistake is None:
            raise
    raise mistake from None


def _user_error_behind(error: BaseException | None) -> UserError | None:
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return UserError(*error.args) if error is not None else None


def share_cores() -> None:
    """Give each rank of a machine its part of the cores, unless OMP_NUM_THREADS is set.

    fairchem's local launcher leaves every rank as many threads as the machine has cores: two
    ranks on two cores then take 1.6 times as long for a step.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))


class TrainEvalRunner(train_runner.TrainEvalRunner):
    """`fairchem.core`'s runner that builds its parts itself, when the run starts.

    Use it with ``_recursive_: false``, which hands over the configuration of the parts instead
    of the parts. Objects are accepted too. fairchem calls `load_state` before `run`, so the
    parts exist before anything needs them.

    Args:
        parts: The arguments of fairchem's runner, each as a configuration or as an object.
    """

    def __init__(self, **parts: Any) -> None:
        self._parts: dict[str, Any] | None = parts

    def load_state(self, checkpoint_location: str | None) -> None:
        """Build the parts, then take up a checkpoint: the given one, else the newest, else none.

        Args:
            checkpoint_location: Folder of a checkpoint, or None.
        """
        self._build()
        super().load_state(checkpoint_location)

    def run(self) -> None:
        """Train."""
        self._build()
        super().run()

    def _build(self) -> None:
        if self._parts is None:
            return
        share_cores()
        parts = {name: instantiate(config) for name, config in self._parts.items()}
        super().__init__(**parts)
        self._parts = None
