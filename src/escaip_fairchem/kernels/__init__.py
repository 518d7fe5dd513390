"""Neighbourhood attention and lean linear maps: the names that the model knows."""

from __future__ import annotations

from escaip_fairchem.kernels.again import recomputed_tree
from escaip_fairchem.kernels.attention import packed_attention
from escaip_fairchem.kernels.backends import (
    attention_backend,
    fused_edges,
    fuses_graph,
    linear_backend,
    reads_angles,
    sum_backend,
)
from escaip_fairchem.kernels.dense import linear
from escaip_fairchem.kernels.edges import SortedLengths, at_least_float32, gather_gelu, order_by
from escaip_fairchem.kernels.lean import banded_linear, recomputed_linear, rms_norm
from escaip_fairchem.kernels.reference import AttentionGeometry, neighbor_attention

__all__ = [
    "AttentionGeometry",
    "SortedLengths",
    "at_least_float32",
    "attention_backend",
    "banded_linear",
    "fused_edges",
    "fuses_graph",
    "gather_gelu",
    "linear",
    "linear_backend",
    "neighbor_attention",
    "order_by",
    "packed_attention",
    "reads_angles",
    "recomputed_linear",
    "recomputed_tree",
    "rms_norm",
    "sum_backend",
]
