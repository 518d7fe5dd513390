"""Reducers after several ranks on one machine.

torch's launcher puts numbers into the strings that it passes on, and makes plain ones of them.
fairchem tells its ranks by a string of an enumeration that now is to be reduced, and they fail when
they look at it. Standard library only, as `_registration` needs it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

LAUNCH_MODULE = "fairchem.core.launchers.slurm_launch"
FUNCTION = "runner_wrapper"


def install(module: ModuleType) -> None:
    """Let fairchem's `runner_wrapper` take a plain string.

    Args:
        module: `fairchem.core.launchers.slurm_launch`, executed.
    """
    original = getattr(module, FUNCTION)
    if hasattr(original, "__wrapped__"):
        return
    run_types = module.RunType

    @functools.wraps(original)
    def runner_wrapper(config: Any, run_type: str = run_types.RUN) -> None:
        original(config, run_types(run_type))

    setattr(module, FUNCTION, runner_wrapper)
