"""Memory and peak rates of accelerators."""

from __future__ import annotations

from dataclasses import dataclass

from escaip_fairchem.errors import UserError


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        memory: GiB.
        fp32: Peak of float32, TFLOP/s.
        tf32: Peak of TF32 matrix products, dense, TFLOP/s.
        half: Peak of bf16 or fp16 matrix products, dense, TFLOP/s.
    """

    memory: float
    fp32: float
    tf32: float
    half: float

    def peak(self, *, tf32: bool, half: bool) -> float:
        """Peak in the precision of a training, FLOP/s."""
        return 1e12 * (self.half if half else self.tf32 if tf32 else self.fp32)


#: From the data sheets of NVIDIA and AMD; the largest memory that a card is sold with.
DEVICES = {
    "v100": Device(32, 15.7, 15.7, 125),
    "a100": Device(80, 19.5, 156, 312),
    "h100": Device(80, 67, 495, 989),
    "h200": Device(141, 67, 495, 989),
    "b200": Device(180, 75, 1100, 2250),
    "l40s": Device(48, 91.6, 183, 362),
    "a40": Device(48, 37.4, 74.8, 150),
    "rtx4090": Device(24, 82.6, 82.6, 165),
    "mi250x": Device(64, 23.9, 23.9, 191.5),  # one of its two halves
    "mi300x": Device(192, 163.4, 653, 1307),
}


def find_device(name: str) -> Device:
    """A device by name.

    Raises:
        UserError: An unknown one.
    """
    key = name.lower().replace(" ", "").replace("-", "")
    if key not in DEVICES:
        raise UserError(
            f"--gpu {name}: known are {', '.join(DEVICES)}; or give --gpu-memory and "
            "--atoms-per-second"
        )
    return DEVICES[key]
