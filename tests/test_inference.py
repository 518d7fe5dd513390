"""Checkpoints: fairchem's predict unit and calculators, and the import from the built-in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.build import add_adsorbate, fcc111, molecule
from ase.optimize import BFGS
from fairchem.core import FAIRChemCalculator
from fairchem.core.units.mlip_unit import load_predict_unit
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

from builtin import batch_of, builtin_config, model_pair
from escaip_fairchem import UserError, calculator
from escaip_fairchem.checkpoint import import_checkpoint

BUILTIN = "fairchem.core.models.escaip.EScAIP."
RMSD = 1.7
REFERENCES = [0.1 * z for z in range(120)]


def task_config(name: str, prop: str) -> dict:
    """A task as a run stores it, with a scale and, for the energy, element references."""
    unit = "fairchem.core.units.mlip_unit.mlip_unit."
    norm = "fairchem.core.modules.normalization."
    references = {
        "_target_": norm + "element_references.ElementReferences",
        "element_references": {"_target_": "torch.DoubleTensor", "_args_": [REFERENCES]},
    }
    return {
        "_target_": unit + "Task",
        "name": name,
        "level": "atom" if prop == "forces" else "system",
        "property": prop,
        "out_spec": {
            "_target_": unit + "OutputSpec",
            "dim": [3] if prop == "forces" else [1],
            "dtype": "float32",
        },
        "normalizer": {
            "_target_": norm + "normalizer.Normalizer",
            "mean": 0.0,
            "rmsd": RMSD,
        },
        "element_references": references if prop == "energy" else None,
        "datasets": ["oc20"],
    }


def save_checkpoint(path, model, model_config, prefix="") -> None:
    """An inference checkpoint as fairchem's trainer writes it."""
    weights = model.state_dict()
    checkpoint = MLIPInferenceCheckpoint(
        model_config=model_config,
        model_state_dict=weights,
        ema_state_dict={"n_averaged": torch.tensor(1)}
        | {f"module.module.{k}": v for k, v in weights.items()},
        tasks_config=[task_config(prefix + p, p) for p in ("energy", "forces")],
    )
    torch.save(checkpoint, path)


def slab():
    atoms = fcc111("Cu", (2, 2, 3), vacuum=8, periodic=True)
    add_adsorbate(atoms, "O", 1.4, "fcc")
    atoms.rattle(0.05, seed=1)
    return atoms


def builtin_checkpoint(path, *, direct):
    """Checkpoint of the built-in model, in the form of fairchem's own recipes."""
    config = builtin_config(direct=direct, hidden_size=64, atten_num_heads=1, num_layers=1)
    reference, _ = model_pair(config)
    model = {"_target_": "fairchem.core.models.base.HydraModel"}
    if direct:
        heads = {
            "energy": {"module": BUILTIN + "EScAIPEnergyHead"},
            "forces": {"module": BUILTIN + "EScAIPDirectForceHead"},
        }
    else:
        model["pass_through_head_outputs"] = True
        heads = {
            "efs": {
                "module": "fairchem.core.models.uma.escn_moe.DatasetSpecificSingleHeadWrapper",
                "head_cls": BUILTIN + "EScAIPGradientEnergyForceStressHead",
                "head_kwargs": {"wrap_property": False},
                "dataset_names": ["oc20"],
            }
        }
        # the wrapper cannot be built in 2.24, so its weights are those of the bare head
        weights = reference.state_dict()
        reference.state_dict = lambda: {
            k.replace("output_heads.efs.", "output_heads.efs.head."): v for k, v in weights.items()
        }
    model |= {"backbone": {"model": BUILTIN + "EScAIPBackbone", **config}, "heads": heads}
    save_checkpoint(path, reference, model, prefix="" if direct else "oc20_")
    return reference


@pytest.mark.parametrize("direct", [True, False])
def test_imported_checkpoint_predicts_what_the_builtin_computes(tmp_path, direct):
    source, target = tmp_path / "builtin.pt", tmp_path / "ours.pt"
    reference = builtin_checkpoint(source, direct=direct)
    with pytest.raises(Exception, match="regress_config"):
        load_predict_unit(source, device="cpu")
    import_checkpoint(source, target)

    batch = batch_of([slab(), molecule("H2O")])
    batch.pbc[1] = True
    batch.cell[1] = 20 * torch.eye(3)
    expected = reference(batch.clone())
    if direct:
        expected = {k: v[k] for k, v in expected.items()}
    references = torch.tensor(REFERENCES, dtype=torch.float64)[batch.atomic_numbers]
    energy = expected["energy"].detach().double() * RMSD
    energy = energy.index_add(0, batch.batch, references)
    predicted = load_predict_unit(target, device="cpu").predict(batch)
    # the built-in adds up atoms, whose energies have both signs, in float32
    torch.testing.assert_close(predicted["energy"], energy, rtol=1e-5, atol=3e-5)
    scale = expected["forces"].detach().abs().max() * RMSD
    difference = predicted["forces"] - expected["forces"].detach() * RMSD
    assert float(difference.abs().max()) < 1e-5 * float(scale)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    builtin_checkpoint(folder / "builtin.pt", direct=True)
    import_checkpoint(folder / "builtin.pt", folder / "ours.pt")
    return folder / "ours.pt"


def test_calculators_agree_and_relax(checkpoint):
    own, theirs = slab(), slab()
    own.calc = calculator(checkpoint, device="cpu")
    theirs.calc = FAIRChemCalculator(load_predict_unit(checkpoint, device="cpu"), task_name="oc20")
    assert own.get_potential_energy() == pytest.approx(theirs.get_potential_energy(), rel=1e-6)
    np.testing.assert_allclose(own.get_forces(), theirs.get_forces(), atol=1e-5)
    BFGS(own, logfile=None).run(steps=2)
    assert np.isfinite(own.get_potential_energy())


def test_batch_prediction_equals_single_ones(checkpoint):
    unit = load_predict_unit(checkpoint, device="cpu")
    structures = [slab(), molecule("CO"), molecule("H")]
    together = unit.predict(batch_of(structures))
    alone = [unit.predict(batch_of([atoms])) for atoms in structures]
    torch.testing.assert_close(
        together["energy"], torch.cat([p["energy"] for p in alone]), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        together["forces"], torch.cat([p["forces"] for p in alone]), rtol=1e-5, atol=1e-5
    )


def test_float64(checkpoint):
    energies = {}
    for dtype in (torch.float32, torch.float64):
        atoms = slab()
        atoms.calc = calculator(checkpoint, device="cpu", dtype=dtype)
        energies[dtype] = atoms.get_potential_energy()
        backbone = atoms.calc.predictor.model.module.backbone
        assert {p.dtype for p in backbone.parameters()} == {dtype}
    difference = abs(energies[torch.float32] - energies[torch.float64])
    assert 0 < difference < 1e-4 * abs(energies[torch.float64])


def test_checkpoint_with_short_names_loads(tmp_path, checkpoint):
    stored = torch.load(checkpoint, weights_only=False)
    stored.model_config["backbone"]["model"] = "escaip"
    stored.model_config["heads"]["energy"]["module"] = "escaip_energy"
    stored.model_config["heads"]["forces"]["module"] = "escaip_direct_forces"
    torch.save(stored, tmp_path / "short.pt")
    energies = [
        load_predict_unit(path, device="cpu").predict(batch_of([slab()]))["energy"]
        for path in (checkpoint, tmp_path / "short.pt")
    ]
    torch.testing.assert_close(*energies, rtol=0, atol=0)


def test_default_settings_do_not_compile(checkpoint):
    unit = load_predict_unit(checkpoint, device="cpu")
    assert unit.inference_settings.compile is False


def test_import_refuses_what_it_cannot_represent(tmp_path):
    source = tmp_path / "gate.pt"
    builtin_checkpoint(source, direct=True)
    changed = torch.load(source, weights_only=False)
    changed.model_config["backbone"]["use_message_gate"] = True
    torch.save(changed, source)
    with pytest.raises(UserError, match="use_message_gate"):
        import_checkpoint(source, tmp_path / "new.pt")
    assert not (tmp_path / "new.pt").exists()
