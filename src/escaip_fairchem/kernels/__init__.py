"""Neighbourhood attention: the names that the model knows."""

from __future__ import annotations

from escaip_fairchem.kernels.reference import AttentionGeometry, neighbor_attention

__all__ = ["AttentionGeometry", "neighbor_attention"]
