"""What a sweep costs: at most, by the time limits, and as measured, by points that ran."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING, Any

from escaip_fairchem.sweep.states import look

if TYPE_CHECKING:
    from escaip_fairchem.sweep.plan import Plan


def cost_lines(plan: Plan) -> list[str]:
    """Resource shapes, and GPU hours (core hours without GPUs) of all points.

    Args:
        plan: The sweep; nothing of it need have run.
    """
    shapes: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, config in plan.configs.items():
        shapes[_shape(config["job"])].append(name)
    lines = []
    for (mode, nodes, per_node, unit, limit, partition), names in shapes.items():
        line = f"{len(names)} points on {nodes} x {per_node} {unit}"
        if mode == "SLURM":
            most = len(names) * nodes * per_node * limit
            where = f", partition {partition}" if partition else ""
            line += f", up to {limit:g} h each{where}: at most {most:,.4g} {unit} hours"
        else:
            line += " of this machine, without a time limit"
        lines.append(line)
    if plan.sweep.halving:
        lines.append(_halving_line(plan))
    measured = _measured(plan)
    return [*lines, measured] if measured else lines


def _shape(job: dict[str, Any]) -> tuple[Any, ...]:
    scheduler = job["scheduler"]
    slurm = scheduler["slurm"]
    gpu = job["device_type"] != "CPU"
    per_node = scheduler["ranks_per_node"] * (1 if gpu else slurm["cpus_per_task"])
    if not gpu and scheduler["mode"] != "SLURM":
        per_node = scheduler["ranks_per_node"]
    return (
        scheduler["mode"], scheduler["num_nodes"], per_node, "GPU" if gpu else "core",
        slurm["timeout_hr"], slurm["partition"],
    )  # fmt: skip


def _halving_line(plan: Plan) -> str:
    halving = plan.spec.halving
    sizes = halving.sizes(len(plan.configs))
    steps = [str(step) for step in halving.steps] + ["the end"]
    rungs = ", ".join(f"{n} to {step}" for n, step in zip(sizes, steps, strict=True))
    ends = {config["runner"].get("max_steps") for config in plan.configs.values()}
    line = f"halving by {halving.metric} ({halving.mode}): {rungs}"
    if len(ends) == 1 and (end := ends.pop()) is not None:
        marks = [0, *halving.steps, end]
        done = sum(n * (b - a) for n, a, b in zip(sizes, marks, marks[1:], strict=False))
        line += f"; {100 * done / (end * len(plan.configs)):.0f} % of the steps of all points"
    return line


def _measured(plan: Plan) -> str | None:
    """From the speed of points that ran: time of one, and of all that are left."""
    seen = [state for state in look(plan.sweep) if state.name in plan.configs]
    hours = {
        state.name: state.status.total_steps / state.status.steps_per_second / 3600
        for state in seen
        if state.status.steps_per_second and state.status.total_steps
    }
    if not hours:
        return None
    typical = median(hours.values())
    left = total = 0.0
    unit = ""
    for state in seen:
        _, nodes, per_node, unit, *_ = _shape(plan.configs[state.name]["job"])
        whole = hours.get(state.name, typical) * nodes * per_node
        share = state.status.step / state.status.total_steps if state.status.total_steps else 0.0
        total += whole
        left += whole * (1 - share)
    return (
        f"measured on {len(hours)} points, {typical:.3g} h each: {total:.3g} {unit} hours in all, "
        f"{left:.3g} of them left"
    )
