"""A port of its own for each job whose ranks meet over TCP; a file for each start where by a file.

On SLURM fairchem's ranks meet at one port, so that two jobs with several ranks each cannot share a
node.

With ``job.scheduler.distributed_init_method: FILE`` fairchem's ranks meet in one file of the run's
folder. A start that was killed leaves it behind with its addresses, and the next one (requeued,
or the same command again) calls on ranks that are gone, then hangs for half an hour.

Standard library only, as `_registration` needs it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

DISTRIBUTED_MODULE = "fairchem.core.common.distutils"
FUNCTION = "get_file_init_method"
#: What tells one start from another, equal on all its ranks.
VARIABLES = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID")
#: Below those that systems give out by themselves, from 32768 on Linux.
PORTS = range(10_000, 30_000)


def install(module: ModuleType) -> None:
    """Let fairchem's `distutils` choose the port by the job, and name the file by the start.

    Args:
        module: `fairchem.core.common.distutils`, executed.
    """
    original = getattr(module, FUNCTION)
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def get_file_init_method(*, filename: str | None = None, **ranks: Any) -> str:
        if filename is not None:
            filename = _file_of_this_start(Path(filename), **ranks)
        return original(filename=filename, **ranks)

    setattr(module, FUNCTION, get_file_init_method)
    tcp = module.get_tcp_init_method

    @functools.wraps(tcp)
    def get_tcp_init_method(*, port: int | None = None, **ranks: Any) -> str:
        job = os.environ.get("SLURM_JOB_ID", "")
        if port == module.DISTRIBUTED_PORT and job.isdigit():
            port = PORTS[int(job) % len(PORTS)]
        return tcp(port=port, **ranks)

    module.get_tcp_init_method = get_tcp_init_method


def _file_of_this_start(file: Path, world_size: int | None, rank: int | None) -> str:
    start = [os.environ[name] for name in VARIABLES if name in os.environ]
    if world_size == 1:
        start.append(str(os.getpid()))
    mine = file.with_name("-".join([file.name, *start]))
    if rank == 0 and start:
        for old in set(file.parent.glob(f"{file.name}-*")) - {mine}:
            with contextlib.suppress(OSError):
                old.unlink()
    return str(mine)
