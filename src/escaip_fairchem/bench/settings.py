"""What a comparison runs on, checked once."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from escaip_fairchem.errors import UserError
from escaip_fairchem.kernels.backends import VARIABLE

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


@dataclass(frozen=True)
class Settings:
    """Model, structures and numerics of a comparison; see ``escaip bench forward --help``."""

    hidden: int = 256
    layers: int = 4
    neighbors: int = 30
    kind: str = "direct"
    stress: bool = False
    domain: str = "slabs"
    atoms: int = 150
    seed: int = 0
    repeats: int = 5
    threads: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    checkpointing: str = "pointwise"
    inference_chunk: int = 0
    compile: bool = False
    kernels: str = "torch"

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Settings:
        """From the command line.

        Raises:
            UserError: A number is not positive, or the device or precision is not there.
        """
        names = cls.__dataclass_fields__
        settings = cls(**{k: v for k, v in vars(args).items() if k in names and v is not None})
        for name in ("hidden", "layers", "neighbors", "atoms", "repeats", "threads"):
            if getattr(settings, name) < 1:
                raise UserError(f"--{name} is {getattr(settings, name)}; give a positive number")
        if settings.hidden % 64:
            raise UserError(f"--hidden is {settings.hidden}; give a multiple of 64, the head size")
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
        if settings.precision == "tf32" and settings.device == "cpu":
            raise UserError("--precision tf32 exists on GPUs only; use fp32 or bf16")
        if settings.stress and (settings.direct or settings.domain == "molecules"):
            raise UserError("--stress needs --kind conservative and a periodic --domain")
        return settings

    @property
    def direct(self) -> bool:
        """Whether forces come from a head of their own."""
        return self.kind == "direct"

    @property
    def torch_device(self) -> torch.device:
        """The device as torch names it."""
        return torch.device(self.device)

    def config(self, **changes: Any) -> dict[str, Any]:
        """Backbone keys of both models, see `pair.builtin_config`."""
        from escaip_fairchem.bench.pair import builtin_config

        keys = {
            "hidden_size": self.hidden,
            "num_layers": self.layers,
            "atten_num_heads": self.hidden // 64,
            "knn_k": self.neighbors,
            "knn_pad_size": -(-3 * self.neighbors // 2),
        }
        return builtin_config(
            direct=self.direct,
            stress=self.stress,
            use_pbc=self.domain != "molecules",
            **(keys | changes),
        )

    def own_keys(self) -> dict[str, Any]:
        """Backbone keys of ours that the built-in lacks."""
        return {
            "checkpointing": self.checkpointing,
            "inference_chunk": self.inference_chunk,
            "compile": self.compile,
        }

    @contextmanager
    def chosen_kernels(self) -> Iterator[None]:
        """What is built inside takes `kernels`, whatever the environment says."""
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = self.kernels
        try:
            yield
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before

    def columns(self, preset: str = "v2") -> dict[str, Any]:
        """The columns of a row that say what was run."""
        config = f"{preset} H{self.hidden} L{self.layers} K{self.neighbors}"
        if self.checkpointing != type(self).checkpointing:
            config += f" checkpointing={self.checkpointing}"
        if self.inference_chunk:
            config += f" inference_chunk={self.inference_chunk}"
        if self.kernels != type(self).kernels:
            config += f" {self.kernels}"
        if self.compile:
            config += " compiled"
        return {
            "device": self.device,
            "threads": self.threads,
            "config": config,
            "kind": self.kind + (" with stress" if self.stress else ""),
            "domain": self.domain,
            "precision": self.precision,
        }
