"""Fine-tuning, piece by piece: parts, rates, low-rank updates, energy references, checkpoints."""

from __future__ import annotations

import copy
import shlex

import numpy as np
import pytest
import torch
from ase.io import write
from fairchem.core._cli import get_hydra_config_from_yaml
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint
from fairchem.core.units.mlip_unit.mlip_unit import _get_optimizer_wd
from hydra.core.override_parser.overrides_parser import OverridesParser

import unit_parts
from data_helpers import labelled_atoms, stored
from escaip_fairchem import EScAIP, calculator
from escaip_fairchem.checkpoint import import_checkpoint
from escaip_fairchem.cli import main
from escaip_fairchem.errors import UserError
from escaip_fairchem.train.finetune.energies import Comparison, settle_references
from escaip_fairchem.train.finetune.lora import LoraLinear
from escaip_fairchem.train.finetune.model import (
    FineTuneUnit,
    add_adapters,
    build_model,
    decay_rates_by_layer,
    make_plain,
    merged,
    part_names,
    part_prefixes,
)
from escaip_fairchem.train.finetune.recipe import Options, run_name, steps_per_epoch, write_recipe
from escaip_fairchem.train.finetune.start import read_start
from escaip_fairchem.train.optim import Muon
from helpers import SMALL, make_batch, slab, small_model
from test_inference import builtin_checkpoint
from vasp_files import outcar, vasprun

SHAPES = {"energy": [1], "forces": [3], "stress": [1, 9]}


def task(name: str, prop: str, datasets: list[str], references: list[float] | None = None) -> dict:
    """A task of fairchem as checkpoints hold it."""
    config = {
        "_target_": "fairchem.core.units.mlip_unit.mlip_unit.Task",
        "name": name,
        "level": "atom" if prop == "forces" else "system",
        "property": prop,
        "datasets": datasets,
        "out_spec": {"dim": SHAPES[prop], "dtype": "float32"},
        "normalizer": {
            "_target_": "fairchem.core.modules.normalization.normalizer.Normalizer",
            "mean": 0.0,
            "rmsd": 1.0,
        },
    }
    if references:
        config["element_references"] = {
            "_target_": "fairchem.core.modules.normalization.element_references.ElementReferences",
            "element_references": {"_target_": "torch.DoubleTensor", "_args_": [references]},
        }
    return config


def write_checkpoint(path, model: EScAIP, heads: dict, tasks: list[dict], last=None):
    """A checkpoint in fairchem's format; `last` are last weights that differ from the average."""
    weights = {name: value.float() for name, value in model.state_dict().items()}
    config = {
        "_target_": "escaip_fairchem.EScAIP",
        "backbone": {"model": "escaip_fairchem.EScAIPBackbone", **model.backbone.config.to_dict()},
        "heads": heads,
    }
    average = {f"module.module.{name}": value for name, value in weights.items()}
    average["n_averaged"] = torch.tensor(1)
    last = {f"module.{name}": value for name, value in (last or weights).items()}
    torch.save(MLIPInferenceCheckpoint(config, last, average, tasks), path)
    return path


HEADS = {
    "energy": {"module": "escaip_fairchem.EnergyHead"},
    "forces": {"module": "escaip_fairchem.DirectForceHead"},
}
TASKS = [task("energy", "energy", ["mine"]), task("forces", "forces", ["mine"])]


def train_loss(model: EScAIP) -> torch.Tensor:
    batch = make_batch(slab(), dtype=next(model.parameters()).dtype)
    outputs = model.train()(batch)
    return outputs["energy"]["energy"].square().sum() + outputs["forces"]["forces"].square().sum()


# parts


def test_parts_cover_the_model_and_blocks_add_up():
    model = small_model()
    names = {name for name, _ in model.named_parameters()}

    def of(part: str) -> set[str]:
        found = {name for name in names if name.startswith(tuple(part_prefixes(model, part)))}
        assert found, part
        return found

    parts = {part: of(part) for part in part_names(model)}
    assert parts["backbone"] | parts["heads"] == names
    assert parts["embedding"] | parts["blocks"] | parts["readout"] == parts["backbone"]
    assert of("blocks.0-1") == parts["blocks.0"] | parts["blocks.1"] == parts["blocks"]
    assert parts["heads.energy"] | parts["heads.forces"] == parts["heads"]
    assert parts["attributes"] < parts["blocks"]


@pytest.mark.parametrize("part", ["block.0", "blocks.2", "blocks.1-0", "heads.stress", ""])
def test_a_wrong_part_lists_the_names(part: str):
    with pytest.raises(UserError, match=r"the model has backbone, embedding, .*heads\.forces"):
        part_prefixes(small_model(), part)


def test_frozen_parts_get_no_gradient_and_the_others_do(tmp_path):
    model = small_model()
    start = write_checkpoint(tmp_path / "start.pt", model, HEADS, TASKS)
    config = torch.load(start, weights_only=False).model_config
    config.pop("_target_")
    built = build_model(start=str(start), freeze=["embedding", "blocks.0"], **config)
    train_loss(built).backward()
    for name, parameter in built.named_parameters():
        frozen = name.startswith(("backbone.input_block.", "backbone.blocks.0."))
        assert parameter.requires_grad is not frozen
        assert (parameter.grad is None) is frozen, name
        assert torch.equal(parameter, model.state_dict()[name].float())
    with pytest.raises(UserError, match="leaves nothing to train"):
        build_model(start=str(start), freeze=["backbone", "heads"], **config)
    config["backbone"] = {**config["backbone"], "num_layers": 3}
    with pytest.raises(UserError, match="do not fit the model"):
        build_model(start=str(start), **config)


# rates


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, Muon])
def test_rates_by_layer_and_no_decay_of_frozen_parts(optimizer):
    from functools import partial

    model = copy.deepcopy(small_model())
    model.backbone.input_block.requires_grad_(False)
    made = _get_optimizer_wd(partial(optimizer, lr=0.5, weight_decay=0.25), model)
    before = {id(p): g["lr"] for g in made.param_groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in made.param_groups for p in g["params"]}
    decay_rates_by_layer(made, model.named_parameters(), 0.8)
    rates = {id(p): g["lr"] for g in made.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        if "input_block" in name:
            assert id(p) not in rates
            continue
        power = 2 if "blocks.0." in name else 1 if "blocks.1." in name else 0
        assert rates[id(p)] == pytest.approx(before[id(p)] * 0.8**power), name
    after = {id(p): g["weight_decay"] for g in made.param_groups for p in g["params"]}
    assert after == decays
    assert set(decays.values()) == {0, 0.25}
    with pytest.raises(UserError, match="layer_decay"):
        decay_rates_by_layer(made, model.named_parameters(), 0.0)


@pytest.mark.parametrize("layer_decay", [1.0, 0.8])
def test_an_interrupted_run_goes_on(layer_decay: float, tmp_path):
    """Of low-rank updates alone, which leave fairchem's group without decay empty."""
    unit_parts.write_frames(tmp_path / "frames")
    data = unit_parts.batches(tmp_path / "frames", [[1, 2], [3, 4], [5, 6]])
    model = unit_parts.small_model("v2")
    tasks = copy.deepcopy(TASKS)
    tasks[0]["normalizer"] |= {"mean": unit_parts.MEAN, "rmsd": unit_parts.ENERGY_RMSD}
    start = write_checkpoint(tmp_path / "start.pt", model, HEADS, tasks)
    config = torch.load(start, weights_only=False).model_config
    config.pop("_target_")

    def make():
        torch.manual_seed(0)
        model = build_model(start=str(start), freeze=["heads"], lora_rank=4, **config)
        return unit_parts.make_unit(
            tmp_path, "v2", kind=FineTuneUnit, model=model, layer_decay=layer_decay,
            save_inference_ckpt=False,
        )  # fmt: skip

    with unit_parts.ranks(tmp_path):
        whole, first, again = make(), make(), make()
        before = unit_parts.weights(whole)
        unit_parts.train(whole, [[batch] for batch in data])
        unit_parts.train(first, [[batch] for batch in data[:2]])
        first.save_state(str(tmp_path / "state"))
        again._execute_load_state(str(tmp_path / "state"))
        unit_parts.train(again, [data[2:]])
    assert not torch.equal(unit_parts.weights(whole), before)
    assert torch.equal(unit_parts.weights(again), unit_parts.weights(whole))


# low-rank updates


@pytest.mark.parametrize("conservative", [False, True])
def test_low_rank_updates_act_and_merge(conservative: bool):
    model = copy.deepcopy(small_model(conservative=conservative))
    before = train_loss(model).item()
    add_adapters(model, rank=4, frozen=("backbone.blocks.0.",))
    adapted = {name for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    assert "backbone.blocks.1.attention.qkv" in adapted
    assert "backbone.node_readout.projection" in adapted
    assert not any(name.startswith(("backbone.blocks.0.", "output_heads.")) for name in adapted)
    assert train_loss(model).item() == pytest.approx(before)  # the update starts at zero
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    loss = train_loss(model)
    assert abs(loss.item() - before) > 1e-3 * abs(before)
    loss.backward()
    for name, parameter in model.named_parameters():
        changes = ".lora_" in name or name.startswith("output_heads.")
        assert parameter.requires_grad is changes, name
        # every update reaches the loss, also where the model reads a weight without a call
        assert (parameter.grad is not None and bool(parameter.grad.any())) is changes, name
    assert not any(".lora_" in name for name in model.no_weight_decay())
    plain = copy.deepcopy(small_model(conservative=conservative))
    plain.load_state_dict(merged(model.state_dict()))
    assert train_loss(plain).item() == pytest.approx(loss.item(), rel=1e-12)


def test_without_peft_one_line_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "escaip_fairchem.train.finetune.lora")
    with pytest.raises(UserError, match=r"pip install 'escaip-fairchem\[finetune\]'"):
        add_adapters(copy.deepcopy(small_model()), rank=4, frozen=())


def test_saved_checkpoint_is_a_plain_one(tmp_path):
    model = copy.deepcopy(small_model())
    add_adapters(model, rank=2, frozen=())
    path = write_checkpoint(tmp_path / "ckpt.pt", model, HEADS, TASKS)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint.model_config |= {
        "_target_": "escaip_fairchem.train.finetune.model.build_model",
        "start": "gone.pt",
        "freeze": [],
        "lora_rank": 2,
    }
    torch.save(checkpoint, path)
    make_plain(path)
    plain = torch.load(path, weights_only=False)
    assert plain.model_config["_target_"] == "escaip_fairchem.EScAIP"
    assert plain.model_config.keys() == {"_target_", "backbone", "heads"}
    expected = {f"module.module.{name}" for name in small_model().state_dict()}
    assert plain.ema_state_dict.keys() == expected | {"n_averaged"}


# energies

OFFSETS = {1: -13.5, 6: -1030.0, 8: -2041.25}


def frames(seed: int = 0, count: int = 12) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.repeat([1, 6, 8], rng.integers(1, 6, 3)) for _ in range(count)]


def sums(numbers: list[np.ndarray], values: dict[int, float]) -> np.ndarray:
    return np.array([sum(values[z] for z in structure) for structure in numbers])


def test_offsets_of_elements_are_absorbed():
    numbers = frames()
    model = np.random.default_rng(1).normal(-5.0, 0.5, len(numbers)) * [len(n) for n in numbers]
    comparison = Comparison(numbers, model + sums(numbers, OFFSETS), model)
    correction, words = settle_references(comparison)
    assert {z: correction[z] for z in OFFSETS} == pytest.approx(OFFSETS, rel=1e-9)
    assert np.count_nonzero(correction) == 3
    assert "refitted" in words
    assert "-> 0.0000" in words
    left = Comparison(numbers, comparison.data, model + sums(numbers, dict(enumerate(correction))))
    assert left.rms < 1e-9
    with pytest.raises(UserError, match=r"off the model .* pass --references refit"):
        settle_references(comparison, references="keep")


def test_references_that_fit_are_kept():
    numbers = frames()
    model = sums(numbers, OFFSETS)
    noise = np.random.default_rng(2).normal(0.0, 0.02, len(numbers))
    comparison = Comparison(numbers, model + noise, model)
    assert settle_references(comparison)[0] is None
    refitted, _ = settle_references(comparison, references="refit")
    assert np.abs(refitted).max() < 0.1


def test_total_energies_against_adsorption_energies():
    numbers = frames()
    total, adsorption = sums(numbers, OFFSETS), np.full(len(numbers), -0.7)
    mixed = Comparison(numbers, total, adsorption)
    with pytest.raises(UserError, match=r"holds total .* gives adsorption .* pass --energy total"):
        settle_references(mixed)
    assert settle_references(mixed, energy="total")[0] is not None
    with pytest.raises(UserError, match=r"are total energies, not adsorption energies"):
        settle_references(mixed, energy="adsorption")
    with pytest.raises(UserError, match="pass --energy adsorption"):
        settle_references(Comparison(numbers, adsorption, total))
    warning = "warning: by their size these are adsorption energies"
    assert warning in settle_references(Comparison(numbers, adsorption, total), energy="total")[1]
    # total energies of a calculator whose zero is near, on both sides
    small = Comparison(numbers, adsorption, adsorption - 1.0)
    assert "warning" not in settle_references(small, energy="total")[1]
    assert "warning" not in settle_references(mixed, energy="total")[1]


# the checkpoint


def test_tasks_of_one_data_set_under_plain_names(tmp_path):
    model = small_model(conservative=True)
    heads = {"efs": {"module": "escaip_fairchem.ConservativeHead", "prefix": ["a", "b"]}}
    tasks = [
        task(f"{name}_{prop}", prop, [name], [float(index)] * 120)
        for index, name in enumerate("ab", start=1)
        for prop in ("energy", "forces")
    ]
    path = write_checkpoint(tmp_path / "two.pt", model, heads, tasks)
    with pytest.raises(UserError, match="knows a, b; name one with --task"):
        read_start(path)
    start = read_start(path, "b")
    assert start.model["heads"] == {"efs": {"module": "escaip_fairchem.ConservativeHead"}}
    assert [t["name"] for t in start.tasks] == ["energy", "forces"]
    assert start.references[8] == 2.0
    start.save(tmp_path / "start.pt")
    config = {k: v for k, v in start.model.items() if k != "_target_"}
    built = build_model(start=str(tmp_path / "start.pt"), **config)
    assert built(make_batch(slab(), dtype=torch.float32)).keys() == {"energy", "forces", "stress"}


def test_direct_heads_are_renamed_and_others_left_out(tmp_path):
    model = small_model()
    weights = model.state_dict()
    heads = {f"{name}_{prop}": HEADS[prop] for name in "ab" for prop in HEADS}
    tasks = [task(name, name[2:], [name[0]]) for name in heads]
    path = write_checkpoint(tmp_path / "two.pt", model, heads, tasks)
    checkpoint = torch.load(path, weights_only=False)
    average = {k: v for k, v in checkpoint.ema_state_dict.items() if "output_heads" not in k}
    for name in heads:
        for key, value in weights.items():
            if key.startswith(f"output_heads.{name[2:]}."):
                inner = key.split(".", 2)[2]
                scale = 1.0 if name[0] == "a" else 2.0
                average[f"module.module.output_heads.{name}.{inner}"] = scale * value.float()
    checkpoint.ema_state_dict = average
    torch.save(checkpoint, path)
    start = read_start(path, "b")
    start.save(tmp_path / "start.pt")
    config = {k: v for k, v in start.model.items() if k != "_target_"}
    built = build_model(start=str(tmp_path / "start.pt"), **config).state_dict()
    for name, value in weights.items():
        scale = 2.0 if name.startswith("output_heads.") else 1.0
        assert torch.equal(built[name], scale * value.float()), name


@pytest.mark.parametrize("conservative", [False, True])
def test_stress_that_the_data_lacks(conservative: bool, tmp_path):
    """A head of its own goes, a derivative of the energy stays; neither is trained."""
    backbone = {"model": "escaip_fairchem.EScAIPBackbone", **SMALL}
    if conservative:
        model = small_model(conservative=True)
        heads = {"efs": {"module": "escaip_fairchem.ConservativeHead"}}
    else:
        heads = {**HEADS, "stress": {"module": "escaip_fairchem.DirectStressHead"}}
        model = EScAIP(backbone={**backbone, "direct_stress": True}, heads=copy.deepcopy(heads))
    tasks = [*TASKS, task("stress", "stress", ["mine"])]
    path = write_checkpoint(tmp_path / "ckpt.pt", model, heads, tasks)
    start = read_start(path)
    assert start.trains_stress
    start.without_stress()
    assert not start.trains_stress
    start.save(tmp_path / "start.pt")
    atoms = slab()
    atoms.calc = calculator(tmp_path / "start.pt")
    assert np.isfinite(atoms.get_forces()).all()
    assert ("stress" in atoms.calc.results) is conservative


@pytest.mark.parametrize("direct", [True, False])
def test_imported_checkpoint_of_the_builtin(direct: bool, tmp_path):
    builtin_checkpoint(tmp_path / "builtin.pt", direct=direct)
    import_checkpoint(tmp_path / "builtin.pt", tmp_path / "ours.pt")
    start = read_start(tmp_path / "ours.pt")
    assert [t["name"] for t in start.tasks] == ["energy", "forces"]
    start.save(tmp_path / "start.pt")
    results = []
    for name in ("ours.pt", "start.pt"):
        atoms = slab()
        atoms.calc = calculator(tmp_path / name)
        results.append((atoms.get_potential_energy(), atoms.get_forces()))
    assert results[0][0] == results[1][0]
    assert np.array_equal(results[0][1], results[1][1])
    heads, backbone = start.model["heads"], start.model["backbone"]
    built = build_model(start=str(tmp_path / "start.pt"), backbone=backbone, heads=heads)
    assert built(make_batch(slab(), dtype=torch.float32)).keys() >= {"energy", "forces"}


def test_elements_that_were_trained(tmp_path):
    model = small_model()
    last = {name: value.float().clone() for name, value in model.state_dict().items()}
    last["backbone.input_block.attributes.source_species.weight"][[1, 29]] += 0.1
    path = write_checkpoint(tmp_path / "ckpt.pt", model, HEADS, TASKS, last)
    assert read_start(path).seen == {1, 29}


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*gone\.pt; a run writes"):
        read_start(tmp_path / "gone.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(UserError, match=r"text\.pt is no inference checkpoint"):
        read_start(tmp_path / "text.pt")
    builtin_checkpoint(tmp_path / "builtin.pt", direct=True)
    with pytest.raises(UserError, match="import-checkpoint"):
        read_start(tmp_path / "builtin.pt")
    with pytest.raises(UserError, match=r"no checkpoints/\*/inference_ckpt\.pt"):
        read_start(tmp_path)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"layer_decay": 1.5}, "--layer-decay is 1.5"),
        ({"lora_rank": -1}, "--lora is -1"),
        ({"lora_rank": 4, "optimizer": "muon"}, "adamw"),
        ({"steps": 0}, "--steps is 0"),
        ({"max_atoms": -5}, "--max-atoms is -5"),
        ({"settings": ("lr",)}, "give KEY=VALUE"),
    ],
)
def test_options_out_of_range(given: dict, message: str):
    with pytest.raises(UserError, match=message):
        Options(**given)


def test_reading_a_checkpoint_runs_no_pickled_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    path = write_checkpoint(tmp_path / "ckpt.pt", small_model(), HEADS, TASKS)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint.tasks_config = [Payload()]
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="holds other objects"):
        read_start(path)
    assert not (tmp_path / "ran").exists()


# the recipe


@pytest.mark.parametrize(
    "name", ["2026_11_21", "0.10", "1e-3", "a,b", "null", "[x]", "k=v", "two words", 'a"b', "a'b"]
)
def test_any_name_of_a_run_arrives_as_it_is(name: str, tmp_path):
    overrides = OverridesParser.create().parse_overrides([run_name(tmp_path / name)])
    assert [override.value() for override in overrides] == [name]


@pytest.mark.parametrize(
    "options, ranks, accumulate",
    [
        ({}, 1, 1),
        ({"cluster": "node"}, 8, 1),
        ({"cluster": "slurm", "settings": ("accumulate=3",)}, 16, 3),
        ({"settings": ("job.scheduler.ranks_per_node=2", "accumulate=50")}, 2, 50),
    ],
)
def test_steps_are_those_of_all_ranks(options: dict, ranks: int, accumulate: int, tmp_path):
    """3,600 frames of which a batch takes one: ten passes, or 1,000 steps if that is longer."""
    start = read_start(write_checkpoint(tmp_path / "ckpt.pt", small_model(), HEADS, TASKS))
    recipe = write_recipe(
        tmp_path / "recipe.yml", start, Options(max_atoms=19, **options), run=tmp_path / "run",
        source="", folders=(tmp_path, tmp_path), natoms=(np.full(3600, 10), np.full(5, 10)),
    )  # fmt: skip
    epoch = 3600 / ranks / accumulate
    assert recipe["steps"] == max(1000, 10 * epoch)
    assert recipe["optim"]["warmup_epochs"] * epoch == pytest.approx(recipe["steps"] / 20, rel=1e-3)
    with pytest.raises(UserError, match="whole numbers above 0, got 1, 1, some"):
        steps_per_epoch(np.full(3, 10), 19, Options(settings=("accumulate=some",)))


# the data


@pytest.mark.parametrize("element, fits", [(92, False), (89, True)])
def test_elements_beyond_the_table_of_the_preset(element: int, fits: bool, tmp_path, capsys):
    """A recipe does not write the table's size, so neither does its checkpoint."""
    path = write_checkpoint(tmp_path / "ckpt.pt", small_model(preset="paper"), HEADS, TASKS)
    checkpoint = torch.load(path, weights_only=False)
    kept = ("model", "preset", *SMALL)
    backbone = checkpoint.model_config["backbone"]
    checkpoint.model_config["backbone"] = {key: backbone[key] for key in kept}
    torch.save(checkpoint, path)
    data = labelled_atoms(2)
    for atoms in data:
        atoms.numbers[-1] = element
    write(tmp_path / "data.extxyz", data)
    argv = ["finetune", str(path), str(tmp_path / "data.extxyz"), "--out", str(tmp_path / "run")]
    assert main([*argv, "--dry-run"]) == (0 if fits else 2)
    found = "no place for U (max_num_elements is 90)" in capsys.readouterr().err
    assert found is not fits


@pytest.mark.parametrize(
    "name, text", [("vasprun.xml", vasprun), ("OUTCAR", outcar)], ids=["vasprun", "outcar"]
)
def test_vasp_output_arrives_with_its_labels(name: str, text, tmp_path, capsys):
    frames = labelled_atoms(6)
    for atoms in frames:
        atoms.calc.results["energy"] -= 30.0
    (tmp_path / name).write_text(text(frames))
    start = write_checkpoint(tmp_path / "start.pt", small_model(), HEADS, TASKS)
    out = tmp_path / "2026_11_21"
    argv = ["finetune", str(start), str(tmp_path / name), "--out", str(out), "--dry-run"]
    argv += ["--set", "job.scheduler.ranks_per_node=2", "--set", "optim.ema_decay=0.9"]
    assert main([*argv, "--energy", "total", "--val-fraction", "0.5"]) == 0
    assert "data: 3 train and 3 val frames" in capsys.readouterr().out
    read = [atoms for part in ("train", "val") for atoms in stored(out / "data" / part)]
    assert len(read) == 6

    def by_energy(found):
        return sorted(found, key=lambda atoms: atoms.calc.results["energy"])

    for got, expected in zip(by_energy(read), by_energy(frames), strict=True):
        for key in ("energy", "forces"):
            assert np.allclose(got.calc.results[key], expected.calc.results[key], atol=1e-6)
        assert (got.numbers == expected.numbers).all()
        assert np.allclose(got.cell, expected.cell, atol=1e-6)
    assert not (out / "checkpoints").exists()
    head = [line[1:] for line in (out / "recipe.yml").read_text().splitlines() if line[:1] == "#"]
    _, resume = (shlex.split(line) for line in head if line.startswith("   fairchem"))
    config = get_hydra_config_from_yaml(resume[2], resume[3:])
    assert (config.job.run_dir, config.job.timestamp_id) == (str(tmp_path), "2026_11_21")
    assert config.job.scheduler.ranks_per_node == 2
    assert config.runner.train_eval_unit.ema_decay == 0.9
    assert config.runner.train_eval_unit.tasks[0].datasets == ["mine"]
    assert set(config.runner.train_eval_unit.model.heads) == {"energy", "forces"}
