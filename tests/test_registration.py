"""Short names in fairchem's registry: in every process, switchable, and never in the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import SplitResult, urlsplit

import pytest

PROBE = Path(__file__).with_name("registration_probe.py")
CLASSES = {
    "escaip": "EScAIPBackbone",
    "escaip_energy": "EnergyHead",
    "escaip_direct_forces": "DirectForceHead",
    "escaip_direct_stress": "DirectStressHead",
    "escaip_denoising": "DenoisingHead",
    "escaip_conservative": "ConservativeHead",
}
PROCESSES = [
    "plain process",
    "elastic rank 0",
    "elastic rank 1",
    "submitit job",
    "fork worker",
    "spawn worker",
    "forkserver worker",
]
# fairchem's registry without the ten seconds that the rest of fairchem takes to import.
LIGHT = """
import sys, types, importlib.util
core = types.ModuleType("fairchem.core")
core.__path__ = list(importlib.util.find_spec("fairchem.core").submodule_search_locations)
sys.modules["fairchem.core"] = core
import torch
"""
LOOK = """
from fairchem.core.common.registry import registry
print("escaip" in registry.mapping["model_name_mapping"])
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("probe")
    output = folder / "answers.json"
    done = subprocess.run(
        [sys.executable, PROBE, output], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("process", PROCESSES)
def test_short_names_are_known_to_every_process(answers: dict, process: str) -> None:
    assert answers[process] == list(CLASSES)


def test_short_names_are_the_public_classes(answers: dict) -> None:
    import escaip_fairchem

    expected = {
        short: f"{cls.__module__}.{cls.__qualname__}"
        for short, name in CLASSES.items()
        for cls in [getattr(escaip_fairchem, name)]
    }
    assert answers["classes"] == expected


def test_registry_still_explains_unknown_names(answers: dict) -> None:
    message = answers["error message"]
    assert "Failed to find the model 'escaipp'" in message
    assert "'escaip_energy'" in message


def test_on_by_default() -> None:
    assert run_python(LIGHT + LOOK).stdout.strip() == "True"


@pytest.mark.parametrize("switch", ["ESCAIP_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_off_switch(switch: str) -> None:
    assert run_python(LIGHT + LOOK, **{switch: "0"}).stdout.strip() == "False"


@pytest.mark.parametrize("part", ["_ModuleFinder", "_run_after_loading", "_install"])
def test_broken_hook_never_breaks_torch_or_fairchem(part: str) -> None:
    broken = f"import escaip_fairchem._registration as hook\nhook.{part} = None\n"
    done = run_python(broken + LIGHT + LOOK)
    assert done.stdout.strip() == "False", done.stderr[-2000:]


def test_registry_imported_before_the_hook() -> None:
    late = """
assert "escaip" not in registry.mapping["model_name_mapping"]
import os; os.environ["ESCAIP_AUTOLOAD"] = "1"
registry.register_model("escaip_energy")("somebody's own")
from escaip_fairchem._registration import arm; arm(); arm()
print(registry.get_model_class("escaip_energy"), list(registry.mapping["model_name_mapping"])[0])
"""
    done = run_python(LIGHT + LOOK + late, ESCAIP_AUTOLOAD="0")
    assert done.stdout.strip().splitlines()[-1] == "somebody's own escaip", done.stderr[-2000:]


def test_import_of_the_package_is_free_of_torch() -> None:
    code = (
        "import sys, escaip_fairchem, escaip_fairchem._registration\n"
        "print([name for name in ('torch', 'numpy', 'ase', 'fairchem') if name in sys.modules])"
    )
    assert run_python(code).stdout.strip() == "[]"


def test_each_start_has_a_file_of_its_own_to_meet(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    # what starts that were killed left behind, and the file of another program in the folder
    for name in (".shared-0", ".shared-0-6", ".shared-1-6"):
        (folder / name).write_text("old addresses")
    code = LIGHT + (
        "import os, sys\n"
        "from fairchem.core.common.distutils import get_init_method\n"
        "os.environ['SLURM_JOB_ID'] = '7'\n"
        "for os.environ['SLURM_RESTART_COUNT'] in '12':\n"
        "    for rank in (1, 0):\n"
        "        print(get_init_method('file', 2, rank, filename=sys.argv[1] + '/.shared-0'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True
    )
    methods = done.stdout.split()
    assert [method.partition("?")[2] for method in methods[:2]] == [
        "world_size=2&rank=1",
        "world_size=2&rank=0",
    ]
    files = [Path(method.removeprefix("file://").partition("?")[0]) for method in methods]
    assert files[0] == files[1] != files[2] == files[3]
    assert {file.parent for file in files} == {folder}
    assert not any(file.exists() for file in files)
    assert {file.name for file in folder.iterdir()} == {".shared-0", ".shared-1-6"}


def test_each_job_has_a_port_of_its_own_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    from fairchem.core.common import distutils

    monkeypatch.setattr(distutils.subprocess, "check_output", lambda *_: b"node7\nnode8\n")

    def met(job: str, rank: int) -> SplitResult:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        return urlsplit(distutils.get_init_method("tcp", 2, rank, "node[7-8]"))

    found = [met(job, rank) for job in ("4711", "4712", "19999", "4311555") for rank in (0, 1)]
    assert [each.hostname for each in found] == ["node7"] * 8
    assert [each.query for each in found[:2]] == ["world_size=2&rank=0", "world_size=2&rank=1"]
    ports = [each.port for each in found]
    assert ports[::2] == ports[1::2]
    assert len(set(ports)) == 4
    assert all(1024 < port < 32768 for port in ports)


def test_reducers_after_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's launcher makes a plain string of what is to be run; fairchem needs its own type."""
    from fairchem.core.launchers import slurm_launch
    from fairchem.core.launchers.api import RunType
    from torch.distributed.elastic.utils import macros

    found = []

    class Program:
        def __call__(self, config: object, run_type: RunType) -> None:
            found.append((config, run_type.value))

    monkeypatch.setattr(slurm_launch, "SlurmSPMDProgram", Program)
    passed_on = macros.substitute([{}, RunType.REDUCE], "0")
    assert type(passed_on[1]) is str
    slurm_launch.runner_wrapper(*passed_on)
    slurm_launch.runner_wrapper({})
    assert found == [({}, "reduce"), ({}, "run")]


def test_a_signal_before_the_runner_exists(tmp_path: Path) -> None:
    """submitit requeues the job as it was."""
    from fairchem.core.launchers.slurm_launch import SlurmSPMDProgram
    from submitit.core.job_environment import SignalHandler
    from submitit.core.utils import DelayedSubmission, JobPaths

    submission = DelayedSubmission(SlurmSPMDProgram(), {"a": 1}, "reduce")
    submission.set_timeout(60, 3)
    requeued: list[int] = []
    environment = SimpleNamespace(global_rank=0, _requeue=requeued.append)
    paths = JobPaths(tmp_path, "1")
    with pytest.raises(SystemExit):
        SignalHandler(environment, paths, submission).checkpoint_and_try_requeue(signal.SIGUSR2)
    assert requeued == [3]
    again = DelayedSubmission.load(paths.submitted_pickle)
    assert type(again.function) is SlurmSPMDProgram
    assert again.args == ({"a": 1}, "reduce")
