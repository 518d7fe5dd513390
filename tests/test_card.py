"""The model card: what it says against the files that it is made of."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest
import torch
import yaml

from data_helpers import labelled_atoms
from escaip_fairchem.cli import main
from run_helpers import make_run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 3 GPUs and 2 hours."""
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path / "data"))
    run = make_run(tmp_path, labelled_atoms(4), conservative=False, stress=False)
    content = yaml.safe_load((run / "canonical_config.yaml").read_text())
    content["runner"]["train_dataloader"] = content["runner"]["eval_dataloader"]
    (run / "canonical_config.yaml").write_text(yaml.safe_dump(content))
    summary = {
        "wall_time_s": 7200.0, "ranks": 3, "device": "NVIDIA H100", "steps": 1500, "epochs": 2.5,
        "metrics": {}, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def metrics_of(run: Path, folder: Path, **changes: str) -> Path:
    checkpoint = run / "checkpoints" / "final" / "inference_ckpt.pt"
    entry = {"value": 0.0213, "unit": "eV/A", "count": 3, "of": "force components"}
    content = {
        "checkpoint": "inference_ckpt.pt",
        "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "forces_on": "free atoms",
        "splits": {"ood_cat": {"counts": {"structures": 7}, "metrics": {"forces_mae": entry}}},
        **changes,
    }
    path = folder / "metrics.json"
    path.write_text(json.dumps(content))
    return path


def test_card(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = metrics_of(run, tmp_path)
    words = [str(run), "--metrics", str(metrics), "--name", "A model", "--license", "mit"]
    options = ["--authors", "Ada", "--repository", "ada/model", "--out", str(tmp_path / "card")]
    assert main(["submission", "card", *words, *options]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"  hf upload ada/model {tmp_path / 'card'} ."
    assert not any("fill in" in line for line in said)
    text = (tmp_path / "card" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    assert (data["license"], data["library_name"]) == ("mit", "fairchem")
    (model,) = data["model-index"]
    (result,) = model["results"]
    assert result["dataset"]["name"] == "mine, ood_cat"
    assert result["metrics"] == [{"type": "forces_mae", "value": 0.0213, "name": "force MAE, eV/A"}]
    checkpoint = torch.load(run / "checkpoints" / "final" / "inference_ckpt.pt", weights_only=False)
    parameters = sum(weight.numel() for weight in checkpoint.model_state_dict.values())
    for line in (
        f"| parameters | {parameters:,} |", "| hardware hours | 6.00 (3 x 2.00 h) |",
        "| hardware | 3 x NVIDIA H100 |", "| data | train: set/val; val: set/val |",
        "| force MAE | eV/A | 0.0213 |", "Structures: ood_cat 7.", "hf download ada/model",
    ):  # fmt: skip
        assert line in body
    assert str(tmp_path) not in text
    torch.testing.assert_close(
        torch.load(tmp_path / "card" / "inference_ckpt.pt", weights_only=False).model_state_dict,
        checkpoint.model_state_dict,
    )


def test_what_is_not_known(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said, and never made up; metrics of other weights are refused."""
    words = ["submission", "card", str(run), "--name", "A", "--license", "mit"]
    out = ["--out", str(tmp_path / "card")]
    other = metrics_of(run, tmp_path, checkpoint_sha256="0")
    assert main([*words, *out, "--metrics", str(other)]) == 2
    assert "holds metrics of another checkpoint" in capsys.readouterr().err
    other.write_text("{}")
    assert main([*words, *out, "--metrics", str(other)]) == 2
    assert "is no metrics.json of an evaluation" in capsys.readouterr().err
    assert not (tmp_path / "card").exists()
    (run / "summary.json").unlink()
    assert main([*words, *out]) == 0
    said = capsys.readouterr().out
    assert "without metrics" in said
    assert "fill in or leave out: hardware hours | not recorded" in said
    assert said.splitlines()[-1].startswith("  hf upload USER/NAME ")
