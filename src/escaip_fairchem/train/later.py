"""Numbers of a GPU that are read a step later, so that the GPU never waits for the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Later:
    """Values on their way from the device.

    The copy begins when a value is put and takes its turn among the kernels; by the time the next
    step is prepared it has long ended. On the CPU nothing is copied.
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def put(self, value: Tensor) -> None:
        """Send a tensor, in place of the one before."""
        if value.is_cuda:
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value = host.copy_(value.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._value = value.detach().clone()

    def take(self) -> Tensor | None:
        """The tensor on the CPU, once; None if there is none."""
        if self._arrived is not None:
            self._arrived.synchronize()
        value, self._value, self._arrived = self._value, None, None
        return value
