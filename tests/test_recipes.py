"""The recipes compose as fairchem's command composes them, with the published numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from fairchem.core._cli import get_hydra_config_from_yaml
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from escaip_fairchem.config import EScAIPConfig
from escaip_fairchem.train.loss import HuberNormLoss
from escaip_fairchem.train.optim import Muon

RECIPES = Path(__file__).parents[1] / "configs" / "oc20"
PAPER, V2 = RECIPES / "escaip_2m.yml", RECIPES / "escaip_v2_direct.yml"
FEW = RECIPES / "escaip_few_frames.yml"

# By hand from the authors' files (see the headers of the recipes), not from ours.
PUBLISHED = {
    PAPER: {
        "backbone.hidden_size": 512,
        "backbone.num_layers": 10,
        "backbone.num_heads": 8,
        "backbone.cutoff": 12.0,
        "backbone.max_neighbors": 20,
        "backbone.mlp_dropout": 0.05,
        "backbone.attention_dropout": 0.1,
        "optimizer_fn.lr": 1e-4,
        "optimizer_fn.weight_decay": 0.01,
        "cosine_lr_scheduler_fn.warmup_factor": 0.2,
        "cosine_lr_scheduler_fn.warmup_epochs": 0.1,
        "cosine_lr_scheduler_fn.lr_min_factor": 0.5,
        "cosine_lr_scheduler_fn.epochs": 30,
        "clip_grad_norm": 10,
        "ema_decay": 0.999,
        "max_atoms": 12 * 73,
        "energy.loss": "MAELoss",
        "energy.coefficient": 4,
        "energy.mean": -0.7554450631141663,
        "energy.rmsd": 2.887317180633545,
        "forces.loss": "L2NormLoss",
        "forces.reduction": "mean",
        "forces.coefficient": 100,
        "forces.rmsd": 2.887317180633545,
    },
    V2: {
        "backbone.hidden_size": 512,
        "backbone.num_layers": 10,
        "backbone.num_heads": 8,
        "backbone.cutoff": 6.0,
        "backbone.max_neighbors": 30,
        "optimizer_fn.lr": 4e-4,
        "optimizer_fn.weight_decay": 1e-3,
        "cosine_lr_scheduler_fn.warmup_factor": 0.2,
        "cosine_lr_scheduler_fn.warmup_epochs": 0.2,
        "cosine_lr_scheduler_fn.lr_min_factor": 0.01,
        "cosine_lr_scheduler_fn.epochs": 12,
        "clip_grad_norm": 100,
        "ema_decay": 0.999,
        "max_atoms": 500,
        "energy.loss": "PerAtomMAELoss",
        "energy.coefficient": 20,
        "energy.mean": 0.0,
        "energy.rmsd": 1.423,
        "forces.loss": "L2NormLoss",
        "forces.reduction": "per_structure",
        "forces.coefficient": 60,
        "forces.rmsd": 1.423,
    },
}


@pytest.fixture(autouse=True)
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "configs").mkdir(parents=True)
    return tmp_path / "data"


def compose(recipe: Path, *overrides: str) -> Any:
    return get_hydra_config_from_yaml(str(recipe), list(overrides))


def facts(config: Any) -> dict[str, Any]:
    """The composed numbers under the names of the table above."""
    unit = config.runner.train_eval_unit
    flat = {"clip_grad_norm": unit.clip_grad_norm, "ema_decay": unit.ema_decay}
    flat["max_atoms"] = config.runner.train_dataloader.batch_sampler_fn.max_atoms
    for part in ("optimizer_fn", "cosine_lr_scheduler_fn"):
        flat |= {f"{part}.{key}": value for key, value in unit[part].items()}
    flat |= {f"backbone.{key}": value for key, value in unit.model.backbone.items()}
    for task in unit.tasks:
        flat[f"{task.name}.loss"] = task.loss_fn.loss_fn._target_.rpartition(".")[2]
        flat[f"{task.name}.reduction"] = task.loss_fn.get("reduction", "mean")
        flat[f"{task.name}.coefficient"] = task.loss_fn.coefficient
        flat[f"{task.name}.mean"] = task.normalizer.mean
        flat[f"{task.name}.rmsd"] = task.normalizer.rmsd
        assert task.get("train_on_free_atoms", True)
    return flat


@pytest.mark.parametrize("recipe", [PAPER, V2], ids=lambda path: path.stem)
def test_published_numbers(recipe: Path) -> None:
    found = facts(compose(recipe))
    assert {key: found[key] for key in PUBLISHED[recipe]} == PUBLISHED[recipe]


@pytest.mark.parametrize("recipe", [PAPER, V2, FEW], ids=lambda path: path.stem)
def test_names_that_checkpoints_store(recipe: Path) -> None:
    model = compose(recipe).runner.train_eval_unit.model
    assert model._target_ == "escaip_fairchem.EScAIP"
    assert model.backbone.model == "escaip_fairchem.EScAIPBackbone"
    assert {name: head.module for name, head in model.heads.items()} == {
        "energy": "escaip_fairchem.EnergyHead",
        "forces": "escaip_fairchem.DirectForceHead",
    }


def test_the_command_of_the_readme() -> None:
    arguments = ["cluster=cpu", "backbone=tiny", "dataset=sample", "epochs=2"]
    config = compose(PAPER, *arguments)
    unit = config.runner.train_eval_unit
    assert config.job.device_type == "cpu"
    assert config.job.scheduler.ranks_per_node == 1
    assert (unit.model.backbone.hidden_size, unit.model.backbone.num_layers) == (64, 2)
    assert config.runner.max_epochs == unit.cosine_lr_scheduler_fn.epochs == 2
    references = unit.tasks[0].element_references.element_references._args_[0]
    assert len(references) == 120
    assert any(value != 0 for value in references), "the sample brings its own references"
    assert not unit.bf16
    assert not unit.tf32


def test_few_frames_keeps_its_scale_for_any_data(data_root: Path) -> None:
    """The rms of the forces, which data brings, is no scale where a few frames decide it."""
    group = data_root / "configs" / "dataset" / "mine.yaml"
    group.parent.mkdir()
    dataset = {"name": "mine", "train": "a", "val": "b"}
    text = {
        "dataset": dataset,
        "normalizer": {"rmsd": 7.0},
        "element_refs": {"energy": [1.0] * 120},
    }
    group.write_text("# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.create(text)))
    unit = compose(FEW, "dataset=mine").runner.train_eval_unit
    assert [task.normalizer.rmsd for task in unit.tasks] == [0.3, 0.3]
    assert unit.tasks[0].element_references.element_references._args_[0] == [1.0] * 120
    assert compose(FEW, "normalizer.rmsd=2").runner.train_eval_unit.tasks[0].normalizer.rmsd == 2


def test_parts_of_few_frames_can_be_built_and_chosen_elsewhere() -> None:
    unit = compose(FEW).runner.train_eval_unit
    net = torch.nn.Linear(8, 8)
    optimizer = hydra.utils.instantiate(unit.optimizer_fn)(params=net.parameters())
    assert isinstance(optimizer, Muon)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 5e-4]
    loss = hydra.utils.instantiate(unit.tasks[1].loss_fn)
    assert isinstance(loss.loss_fn, HuberNormLoss)
    backbone = {key: value for key, value in unit.model.backbone.items() if key != "model"}
    assert EScAIPConfig.from_kwargs(**backbone).init == "resolved"
    published = compose(PAPER, "optimizer=muon", "tasks=huber").runner.train_eval_unit
    assert published.optimizer_fn._target_ == unit.optimizer_fn._target_
    assert published.tasks[1].loss_fn.loss_fn == unit.tasks[1].loss_fn.loss_fn


def test_copied_recipe_composes_the_same(tmp_path: Path) -> None:
    copied = shutil.copy(PAPER, tmp_path / "mine.yml")
    same = ["job.timestamp_id=x", "cluster=cpu", "backbone=mini"]
    assert compose(copied, *same) == compose(PAPER, *same)


def test_plain_overrides() -> None:
    config = compose(
        PAPER, "job.run_dir=here", "job.run_name=n", "job.timestamp_id=t", "seed=7", "lr=3e-4",
        "steps=50", "epochs=null", "num_workers=1", "backbone.num_layers=3",
    )  # fmt: skip
    unit = config.runner.train_eval_unit
    assert Path(config.job.metadata.log_dir).parts[-3:] == ("here", "t", "logs")
    assert config.job.run_name == "n"
    assert config.job.seed == config.runner.train_dataloader.batch_sampler_fn.seed == 7
    assert unit.optimizer_fn.lr == pytest.approx(3e-4)
    assert (config.runner.max_steps, unit.cosine_lr_scheduler_fn.steps) == (50, 50)
    assert config.runner.max_epochs is None
    assert config.runner.eval_dataloader.num_workers == 1
    assert unit.model.backbone.num_layers == 3


@pytest.mark.parametrize(
    "cluster, device, mode, ranks",
    [("gpu", "cuda", "local", 1), ("node", "cuda", "local", 8), ("slurm", "cuda", "slurm", 8)],
)
def test_clusters(cluster: str, device: str, mode: str, ranks: int) -> None:
    job = compose(PAPER, f"cluster={cluster}").job
    found = (job.device_type, job.scheduler.mode, job.scheduler.ranks_per_node)
    assert found == (device, mode, ranks)


@pytest.mark.parametrize(
    "size, shape",
    [
        ("mini", (192, 4, 6)), ("medium", (768, 8, 12)), ("large", (1024, 10, 16)),
        ("h1024l8", (1024, 8, 16)), ("h640l6", (640, 6, 10)),
    ],
)  # fmt: skip
def test_sizes(size: str, shape: tuple[int, int, int]) -> None:
    backbone = compose(V2, f"backbone={size}").runner.train_eval_unit.model.backbone
    assert (backbone.hidden_size, backbone.num_layers, backbone.num_heads) == shape


def test_user_data_brings_its_references(data_root: Path) -> None:
    group = data_root / "configs" / "dataset" / "mine.yaml"
    group.parent.mkdir()
    text = {
        "dataset": {"name": "mine", "train": "a", "val": "b"},
        "element_refs": {"energy": [0.5] * 120},
        "normalizer": {"rmsd": 0.25},
    }
    group.write_text("# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.create(text)))
    runner = compose(PAPER, "dataset=mine").runner
    energy, forces = runner.train_eval_unit.tasks
    assert runner.train_dataloader.dataset.src == "a"
    assert energy.element_references.element_references._args_[0] == [0.5] * 120
    assert (energy.normalizer.mean, forces.normalizer.rmsd) == (0.0, 0.25)
    assert energy.datasets == ["mine"]


@pytest.mark.parametrize("wrong", ["dataset=smaple", "backbone=tny", "cluster=laptop"])
def test_unknown_choice_lists_the_known_ones(wrong: str) -> None:
    with pytest.raises(MissingConfigException, match="Available options"):
        compose(PAPER, wrong)


def test_absent_data_root_is_no_error(data_root: Path) -> None:
    (data_root / "configs").rmdir()
    with pytest.warns(UserWarning, match="configs is not available"):
        assert compose(PAPER).job.run_name == "escaip_2m"


def test_wandb_is_a_choice() -> None:
    logger = compose(PAPER, "logger=wandb").job.logger
    assert logger._target_.endswith("WandBSingletonLogger.init_wandb")
    assert compose(PAPER).job.logger is None


@pytest.mark.parametrize("overrides, expected", [
    ((), (False, True)), (("logger=tensorboard",), (True, True)),
    (("logger=wandb", "tensorboard=true", "progress=false"), (True, False)),
])  # fmt: skip
def test_tensorboard_and_progress_are_choices(
    overrides: tuple[str, ...], expected: tuple[bool, bool]
) -> None:
    config = compose(PAPER, *overrides)
    metrics, _, progress, _ = config.runner.callbacks
    assert (metrics.tensorboard, progress.enabled) == expected
    assert (config.job.logger is not None) == ("logger=wandb" in overrides)
