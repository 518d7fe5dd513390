"""Sweeps: many runs of one recipe, described by one file (`escaip sweep`, docs/sweeps.md)."""
