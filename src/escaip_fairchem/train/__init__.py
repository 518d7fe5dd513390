"""What this package adds to fairchem's trainer: runner, unit, learning curve and plots."""

from __future__ import annotations
