"""Submitting points to SLURM: one array, and one call of sbatch, for each shape of resources."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from escaip_fairchem.errors import UserError
from escaip_fairchem.sweep.halving import decide, decision, reached, rungs
from escaip_fairchem.sweep.plan import read_config
from escaip_fairchem.sweep.states import open_jobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from escaip_fairchem.sweep.store import Sweep


def executor_parameters(job: dict[str, Any]) -> dict[str, Any]:
    """Arguments of submitit for a job, as fairchem's launcher sets them.

    Args:
        job: The part ``job`` of a resolved configuration.
    """
    scheduler = job["scheduler"]
    slurm = scheduler["slurm"]
    ranks = scheduler["ranks_per_node"]
    return {
        "mem_gb": slurm["mem_gb"],
        "timeout_min": slurm["timeout_hr"] * 60,
        "slurm_partition": slurm["partition"],
        "gpus_per_node": 0 if job["device_type"] == "CPU" else ranks,
        "cpus_per_task": slurm["cpus_per_task"],
        "tasks_per_node": ranks,
        "nodes": scheduler["num_nodes"],
        "slurm_qos": slurm["qos"],
        "slurm_account": slurm["account"],
        "slurm_additional_parameters": slurm["additional_parameters"],
    }


def submit(sweep: Sweep, names: Sequence[str]) -> list[str]:
    """Submit points; with halving, all rungs that are left.

    Args:
        sweep: Its folder must be locked. The jobs are noted in it.
        names: Points that are to run.

    Returns:
        A line for each array.

    Raises:
        UserError: SLURM is not here, or refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here; choose cluster=cpu, gpu or node, or log in there")
    if "SLURM_SUBMIT_HOST" in os.environ:
        raise UserError("this is a SLURM job itself, from which fairchem submits none; leave it")
    if sweep.halving:
        return _submit_rungs(sweep, names)
    shapes: dict[str, list[str]] = defaultdict(list)
    for name in names:
        shapes[_shape(sweep, name)].append(name)
    return [_array(sweep, json.loads(shape), members) for shape, members in shapes.items()]


def _shape(sweep: Sweep, name: str) -> str:
    return json.dumps(executor_parameters(read_config(sweep.config(name))["job"]), sort_keys=True)


def _submit_rungs(sweep: Sweep, names: Sequence[str]) -> list[str]:
    """Each rung waits for all of the rung before it to end, well or not."""
    if open_jobs(sweep):
        return []  # later rungs are waiting already, and will choose among what there is then
    shapes = {_shape(sweep, name) for name in sweep.points}
    if len(shapes) > 1:
        raise UserError("halving on SLURM needs the same resources for all points")
    parameters = json.loads(shapes.pop())
    sizes = rungs(sweep).sizes(len(sweep.points))
    lines, before = [], None
    for rung, size in enumerate(sizes):
        if rung == 0 or decision(sweep, rung) is not None:
            members = [name for name in decide(sweep, rung) if name in names]
            tasks: list[str | None] = [name for name in members if not reached(sweep, name, rung)]
        else:
            tasks = [None] * size
        if tasks:
            after = {"slurm_dependency": f"afterany:{before}"} if before else {}
            lines.append(_array(sweep, parameters | after, tasks, rung))
            before = sweep.submissions[-1]["job_id"]
    return lines


def _array(
    sweep: Sweep, parameters: dict[str, Any], tasks: Sequence[str | None], rung: int = 0
) -> str:
    from submitit import AutoExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from escaip_fairchem.sweep.program import PointProgram

    executor = AutoExecutor(folder=sweep.log_folder, cluster="slurm", slurm_max_num_timeout=3)
    executor.update_parameters(name=sweep.folder.name, **parameters)
    if sweep.parallel:
        executor.update_parameters(slurm_array_parallelism=sweep.parallel)
    try:
        with executor.batch():
            jobs = [
                executor.submit(PointProgram(), str(sweep.folder), name, rung, place)
                for place, name in enumerate(tasks)
            ]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"SLURM refuses: {' '.join(str(error).split())}") from error
    ids = [job.job_id for job in jobs]
    number = ids[0].partition("_")[0]
    sweep.submissions.append(
        {"job_id": number, "rung": rung, "tasks": list(zip(ids, tasks, strict=True))}
    )
    sweep.save()
    limit = f", {sweep.parallel} at a time" if sweep.parallel else ""
    which = f" of rung {rung}" if sweep.halving else ""
    return f"SLURM job {number}: {len(ids)} points{which}{limit}"
