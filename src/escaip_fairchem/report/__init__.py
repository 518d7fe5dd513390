"""One HTML page that compares runs: what differs, how they learnt, how well, how fast."""

from __future__ import annotations
