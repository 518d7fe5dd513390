"""Processes that load data."""

from __future__ import annotations

import multiprocessing

import torch

from escaip_fairchem.data.loaders import get_dataloader

#: A traceback, too, may keep the iterator whose end would end its worker.
KEPT = []


def _stop_while_a_worker_waits() -> None:
    numbers = torch.arange(4)
    loader = get_dataloader(numbers, lambda **_: [[0, 1], [2, 3]], list, num_workers=1)
    KEPT.append(iter(loader))
    next(KEPT[0])
    raise SystemExit(143)


def test_process_ends_though_workers_leave_signals_to_it() -> None:
    process = multiprocessing.get_context("fork").Process(target=_stop_while_a_worker_waits)
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    assert code == 143
