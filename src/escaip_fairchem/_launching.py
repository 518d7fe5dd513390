"""What fairchem's launchers fail at: reducers after several ranks, and signals before the runner.

torch's launcher puts numbers into the strings that it passes on, and makes plain ones of them.
fairchem tells its ranks by a string of an enumeration that now is to be reduced, and they fail when
they look at it.

A job of SLURM asks its runner to save before it is requeued. Until there is one, while ranks wait
for each other and the runner is made, it fails instead.

Standard library only, as `_registration` needs it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

LAUNCH_MODULE = "fairchem.core.launchers.slurm_launch"
FUNCTION = "runner_wrapper"


def install(module: ModuleType) -> None:
    """Mend both.

    Args:
        module: `fairchem.core.launchers.slurm_launch`, executed.
    """
    if not hasattr(getattr(module, FUNCTION), "__wrapped__"):
        _take_plain_strings(module)
        _requeue_before_the_runner(module)


def _take_plain_strings(module: ModuleType) -> None:
    original, run_types = getattr(module, FUNCTION), module.RunType

    @functools.wraps(original)
    def runner_wrapper(config: Any, run_type: str = run_types.RUN) -> None:
        original(config, run_types(run_type))

    setattr(module, FUNCTION, runner_wrapper)


def _requeue_before_the_runner(module: ModuleType) -> None:
    original, submission = module.SlurmSPMDProgram.checkpoint, module.DelayedSubmission

    @functools.wraps(original)
    def checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.runner is None and self.reducer is None:
            return submission(type(self)(), *args, **kwargs)
        return original(self, *args, **kwargs)

    module.SlurmSPMDProgram.checkpoint = checkpoint
