"""Which implementations of attention, edges and linear maps run: chosen once, with the model.

| backend | devices | second derivative | attention dropout | chosen |
|---|---|---|---|---|
| ``torch`` | all | closed form | yes | by default |
| ``triton`` | CUDA GPUs | closed form, in one kernel | no | by ``ESCAIP_KERNELS=triton`` |
| ``reference`` | all | autograd | yes | by ``ESCAIP_KERNELS=reference`` |

With ``triton`` edges are embedded by fused kernels, too (`fused_edges`), elsewhere in PyTorch,
and their states summed by atom without atomics (`sum_backend`).
``triton`` also takes linear maps after an RMS norm, a GELU or both, on tensor cores (bf16, fp16,
TF32); those after dropout or after other norms and activations, and float64, stay with torch.
"""

from __future__ import annotations

import logging
import os
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch

from escaip_fairchem.errors import UserError
from escaip_fairchem.kernels.attention import packed_attention
from escaip_fairchem.kernels.edges import sum_edges
from escaip_fairchem.kernels.reference import AttentionGeometry, neighbor_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

VARIABLE = "ESCAIP_KERNELS"


def attention_backend(*, dropout: float) -> Callable[..., Tensor]:
    """The function that computes attention, with the signature of `packed_attention`.

    Args:
        dropout: Attention dropout that training will use.

    Raises:
        UserError: `ESCAIP_KERNELS` names no backend, or one that cannot run here.
    """
    name = _chosen()
    reason = f"{VARIABLE}={name}" if os.environ.get(VARIABLE) else "the default"
    if name == "triton":
        _require_triton()
        if dropout:
            name, reason = "torch", "the Triton kernel has no attention dropout"
    _log_once("attention", name, reason)
    return _BACKENDS[name]


def fused_edges(activation: str) -> bool:
    """Whether edges are embedded by the Triton kernels of `edges.py`, which know GELU only.

    Raises:
        UserError: Triton is asked for and cannot be imported.
    """
    if os.environ.get(VARIABLE) != "triton":
        return False
    _require_triton()
    if activation != "gelu":
        _log_once("edge", "torch", f"the Triton kernels have no {activation}")
        return False
    _log_once("edge", "triton", f"{VARIABLE}=triton")
    return True


def linear_backend(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function that computes linear maps with what comes before them.

    Args:
        plain: `layers.prologue_linear`, whose signature that function has.

    Raises:
        UserError: As `attention_backend`.
    """
    if _chosen() != "triton":
        return plain
    _require_triton()
    return partial(_triton_linear, plain)


def sum_backend() -> Callable[..., Tensor]:
    """The function that sums edges by their atom, with the signature of `sum_edges`.

    Raises:
        UserError: As `attention_backend`.
    """
    if _chosen() != "triton":
        return sum_edges
    _require_triton()
    return _triton_sum


def _chosen() -> str:
    name = os.environ.get(VARIABLE, "") or "torch"
    if name not in _BACKENDS:
        raise UserError(f"{VARIABLE}={name} is not one of {', '.join(_BACKENDS)}")
    return name


def fuses_graph() -> bool:
    """Whether Triton kernels make the soft k nearest neighbours: with ``ESCAIP_KERNELS=triton``."""
    if os.environ.get(VARIABLE) != "triton":
        return False
    _require_triton()
    return True


def reads_angles(backend: Callable[..., Tensor]) -> bool:
    """Whether a backend reads the angles of `AttentionGeometry`; Triton computes them itself."""
    return backend is not _triton


def _torch(qkv: Tensor, geometry: AttentionGeometry, **options) -> Tensor:
    if torch.compiler.is_compiling():
        return _reference(qkv, geometry, **options)
    return packed_attention(qkv, geometry, **options)


def _reference(qkv: Tensor, geometry: AttentionGeometry, **options) -> Tensor:
    return neighbor_attention(*qkv.unbind(1), geometry, **options)


def _triton(qkv: Tensor, geometry: AttentionGeometry, *, dropout: float, **options) -> Tensor:
    from escaip_fairchem.kernels.triton_attention import triton_attention_packed

    return triton_attention_packed(
        qkv,
        geometry.directions,
        geometry.log_envelope,
        geometry.starts,
        geometry.counts,
        num_slots=geometry.shape[1],
        **options,
    )


def _triton_linear(*args, **options) -> Tensor:
    from escaip_fairchem.kernels.triton_linear import triton_linear

    return triton_linear(*args, **options)


def _triton_sum(*args) -> Tensor:
    from escaip_fairchem.kernels.triton_pool import pool_op

    return pool_op(*args)


def _require_triton() -> None:
    try:
        import escaip_fairchem.kernels.triton_attention
        import escaip_fairchem.kernels.triton_linear  # noqa: F401
    except ImportError as error:
        raise UserError(f"{VARIABLE}=triton needs the package triton; install it") from error


@lru_cache
def _log_once(part: str, name: str, reason: str) -> None:
    logging.getLogger(__name__).info("%s kernel: %s (%s)", part, name, reason)


_BACKENDS = {"torch": _torch, "triton": _triton, "reference": _reference}
