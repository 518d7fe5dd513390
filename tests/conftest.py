"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# triton decides when it is imported whether its kernels are compiled or interpreted, and other
# tests import packages that import it
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real DFT frames that is not part of the project."""
    path = Path(os.environ.get("ESCAIP_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data at {path}; set ESCAIP_TEST_DATA")
    return path
