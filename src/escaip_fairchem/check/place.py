"""Where a training runs and writes: machine, SLURM, folder of the run, disk."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from escaip_fairchem.check.report import duration, gib
from escaip_fairchem.train.checkpoints import newest_whole
from escaip_fairchem.train.lock import holder
from escaip_fairchem.train.status import read_status

if TYPE_CHECKING:
    from escaip_fairchem.check.report import Report

SINFO = ("partition", "cpus", "memory", "gres", "time")


def check_machine(config: Any, report: Report) -> int:
    """Ranks, devices and how they talk.

    Args:
        config: The composed recipe.
        report: Takes the findings.

    Returns:
        Ranks of the training.
    """
    scheduler = config.job.scheduler
    slurm = scheduler.mode == "slurm"
    nodes = int(scheduler.num_nodes) if slurm else 1
    per_node = int(scheduler.ranks_per_node)
    if nodes < 1 or per_node < 1:
        report.wrong("machine", f"{nodes} nodes x {per_node} ranks: both must be at least 1")
        return 1
    if not slurm and int(scheduler.num_nodes) > 1:
        report.note(
            "machine", f"num_nodes={scheduler.num_nodes} counts on SLURM only: cluster=slurm"
        )
    ranks = nodes * per_node
    cuda = config.job.device_type == "cuda"
    backend = "nccl" if cuda else "gloo"
    words = f"{nodes} nodes x {per_node} ranks on {'GPUs' if cuda else 'CPUs'}, {backend}"
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cuda and torch.version.cuda is None and torch.version.hip is None:
        report.wrong(
            "machine",
            f"{words}: torch {torch.__version__} is a build without GPUs; install one with CUDA "
            "(docs/install.md), or set cluster=cpu",
        )
    elif cuda and ranks > 1 and not torch.distributed.is_nccl_available():
        report.wrong("machine", f"{words}: this torch has no NCCL, which several GPUs need")
    elif cuda and not slurm and 0 < found < per_node:
        report.wrong(
            "machine",
            f"{words}: this machine has {found} GPUs; set job.scheduler.ranks_per_node={found}",
        )
    elif cuda and not slurm and not found:
        report.note("machine", f"{words}: no GPU here, so start it where there is one")
    else:
        report.ok("machine", words)
    return ranks


def check_slurm(config: Any, report: Report) -> None:
    """Compare what is asked of SLURM with what its partitions have, where `sinfo` is.

    Args:
        config: The composed recipe.
        report: Takes the findings.
    """
    scheduler = config.job.scheduler
    if scheduler.mode != "slurm":
        return
    if os.environ.get("SLURM_SUBMIT_HOST"):
        report.wrong(
            "slurm",
            "this shell is inside a SLURM job, from which fairchem does not submit; use a login "
            "node, or `unset SLURM_SUBMIT_HOST`",
        )
    if shutil.which("sbatch") is None:
        report.wrong("slurm", "no sbatch here; submit on a login node, or take another cluster=")
        return
    partitions = read_partitions(report)
    if not partitions:
        return
    slurm = scheduler.slurm
    asked = slurm.partition or next((p["partition"] for p in partitions if p["default"]), None)
    if asked is None:
        report.wrong("slurm", "no default partition: set job.scheduler.slurm.partition")
        return
    names = dict.fromkeys(p["partition"] for p in partitions)
    chosen = [p for name in str(asked).split(",") for p in partitions if p["partition"] == name]
    if not chosen:
        report.wrong(
            "slurm",
            f"no partition {asked}: set job.scheduler.slurm.partition to one of {', '.join(names)}",
        )
        return
    _compare(scheduler, str(asked), chosen, config.job.device_type == "cuda", report)


def read_partitions(report: Report) -> list[dict[str, Any]]:
    """Kinds of nodes of every partition; none, with a note, where `sinfo` does not answer.

    Args:
        report: Takes the note.
    """
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%P|%c|%m|%G|%l"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or error
        report.note("slurm", f"sinfo does not answer: {' '.join(str(words).split())}")
        return []
    kinds = []
    for line in done.stdout.splitlines():
        kind: dict[str, Any] = dict(zip(SINFO, line.split("|"), strict=True))
        kind["default"] = kind["partition"].endswith("*")
        kind["partition"] = kind["partition"].rstrip("*")
        kind["cpus"], kind["memory"] = (_number(kind[key]) for key in ("cpus", "memory"))
        kind["gpus"] = sum(
            int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", kind["gres"])
        )
        kinds.append(kind)
    return kinds


def _compare(
    scheduler: Any, name: str, kinds: list[dict[str, Any]], cuda: bool, report: Report
) -> None:
    slurm, per_node = scheduler.slurm, int(scheduler.ranks_per_node)
    cpus = per_node * int(slurm.cpus_per_task)
    prefix = "job.scheduler.slurm"
    checks = [
        (
            "cpus", cpus, max(kind["cpus"] for kind in kinds),
            f"{per_node} ranks x {slurm.cpus_per_task} CPUs", f"{prefix}.cpus_per_task",
        ),
        (
            "memory", int(slurm.mem_gb) * 1024, max(kind["memory"] for kind in kinds),
            f"mem_gb {slurm.mem_gb}", f"{prefix}.mem_gb",
        ),
    ]  # fmt: skip
    if cuda:
        gpus = max(kind["gpus"] for kind in kinds)
        checks.append(("GPUs", per_node, gpus, f"{per_node} GPUs", "job.scheduler.ranks_per_node"))
    fine = True
    for what, asked, there, words, key in checks:
        if asked > there:
            fine = False
            unit = " MB" if what == "memory" else ""
            report.wrong(
                "slurm", f"{words}: a node of {name} has {there}{unit} of {what}; lower {key}"
            )
    longest = max(_hours(kind["time"]) for kind in kinds)
    hours = _limit_hours(slurm)
    if hours > longest:
        fine = False
        report.wrong(
            "slurm",
            f"a time limit of {hours:g} h: {name} allows {longest:g} h; set "
            f"{prefix}.timeout_hr={math.floor(longest)}",
        )
    if fine:
        report.ok(
            "slurm",
            f"partition {name} has nodes with {cpus} CPUs, {slurm.mem_gb or 'all their'} GB"
            + (f", {per_node} GPUs" if cuda else "")
            + f"; {hours:g} h at a time",
        )


def check_requeues(config: Any, seconds: float, doubt: float, report: Report) -> None:
    """How often a job will meet its time limit.

    Args:
        config: The composed recipe.
        seconds: Of the whole training.
        doubt: Factor that they may be off by.
        report: Takes the finding.
    """
    if config.job.scheduler.mode != "slurm":
        return
    limit = 3600 * _limit_hours(config.job.scheduler.slurm)
    again = math.ceil(seconds / limit) - 1
    worst = math.ceil(seconds * doubt / limit) - 1
    report.record("time", requeues=again, requeues_at_most=worst)
    words = f"{duration(seconds)} of training in jobs of {limit / 3600:g} h"
    if worst == 0:
        report.ok("time", f"{words}: one job")
    else:
        times = f"{again}" if again == worst else f"{again} to {worst}"
        report.ok("time", f"{words}: {times} requeues, from which the run goes on by itself")


def check_run(config: Any, report: Report) -> None:
    """State of the folder of the run.

    Args:
        config: The composed recipe.
        report: Takes the findings.
    """
    run = Path(config.job.run_dir) / str(config.job.timestamp_id)
    parent = _existing(run)
    if not os.access(parent, os.W_OK):
        report.wrong("run", f"{parent} cannot be written to; set job.run_dir")
    other = holder(run)
    if other is not None:
        job = f", SLURM job {other['slurm_job_id']}" if other.get("slurm_job_id") else ""
        report.wrong(
            "run",
            f"{run} is in use by process {other.get('pid')} on {other.get('host')}{job}; wait for "
            "it, or give another job.timestamp_id",
        )
        return
    status, newest = read_status(run), newest_whole(run / "checkpoints")
    report.record("run", folder=str(run), state=status.state, step=status.step)
    if status.state == "finished" or (newest is not None and newest.name == "final"):
        report.note(
            "run", f"{run} has finished: it would stop at once; change job.timestamp_id to train"
        )
    elif newest is not None:
        why = "" if status.state == "absent" else f" ({status.state})"
        report.note("run", f"{run} exists{why}: it goes on from {newest.name}")
    elif run.exists():
        report.note("run", f"{run} exists without a checkpoint: the run begins anew in it")
    else:
        report.ok("run", f"{run}, new")


def check_disk(config: Any, checkpoint: int, steps: int, report: Report) -> None:
    """Space that checkpoints take, against what is free.

    Args:
        config: The composed recipe.
        checkpoint: Bytes of one.
        steps: Of the whole training.
        report: Takes the finding.
    """
    every, kept = None, 2
    for callback in config.runner.get("callbacks") or []:
        every = callback.get("checkpoint_every_n_steps", every)
        kept = callback.get("max_saved_checkpoints", kept)
    if not every:
        report.note("disk", "no checkpoints: nothing is left of the run; checkpoint_every_n_steps")
        return
    written = math.ceil(steps / every) + 1
    # a new one is complete before the oldest is removed; `final` comes last
    most = min(written, int(kept) + 1)
    free = shutil.disk_usage(_existing(Path(config.job.run_dir))).free
    report.record("disk", checkpoint=checkpoint, kept=most, written=written, free=free)
    words = (
        f"{written} checkpoints of {gib(checkpoint)}, at most {most} at a time: "
        f"{gib(most * checkpoint)} of {gib(free)} free"
    )
    if most * checkpoint > free:
        report.wrong("disk", f"{words}; free space, or set job.run_dir to another disk")
    else:
        report.ok("disk", words)


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _limit_hours(slurm: Any) -> float:
    """Time limit of a job: an option of sbatch, in minutes or as SLURM writes it, wins."""
    time = (slurm.additional_parameters or {}).get("time")
    return float(slurm.timeout_hr) if time is None else _hours(str(time))


def _number(text: str) -> int:
    """A number of sinfo, which adds ``+`` where nodes differ."""
    return int(text.rstrip("+"))


def _hours(text: str) -> float:
    """A time of SLURM, ``[days-]hours:minutes:seconds`` or shorter, in hours."""
    if not re.fullmatch(r"[\d:-]+", text):
        return math.inf  # infinite, or not set
    days, _, clock = text.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    if days:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    else:
        hours, minutes, seconds = [0] * (3 - len(numbers)) + numbers if len(numbers) > 1 else (
            0, numbers[0], 0,
        )  # fmt: skip
    return 24 * int(days or 0) + hours + minutes / 60 + seconds / 3600
