"""A conversion ends in the same bytes, however often it is killed and whoever does the work."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from ase.io import write

from convert_helpers import contents, driver, start
from data_helpers import labelled_atoms, stored
from escaip_fairchem.data import journal, rows, work
from escaip_fairchem.data.convert import convert
from escaip_fairchem.errors import UserError

N_FRAMES = 800
KILLS = int(os.environ.get("ESCAIP_KILLS", "2"))  # more of them take about 3 s each


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Four files of different length; some frames cannot be used."""
    folder = tmp_path_factory.mktemp("source")
    frames = labelled_atoms(40)
    shares = [40, 360, 240, 160]
    assert sum(shares) == N_FRAMES
    for number, n_frames in enumerate(shares):
        some = [frames[(7 * number + i) % 40] for i in range(n_frames)]
        write(folder / f"{number}.extxyz", some)
    text = (folder / "1.extxyz").read_text().replace("energy=", "energy=nan enrgy=", 3)
    (folder / "1.extxyz").write_text(text)
    return folder


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("ESCAIP_DATA", str(folder / "root"))
        monkeypatch.setattr(work, "RECORDS_PER_CHUNK", 20)
        convert([f"{source}/*.extxyz"], folder / "out")
    return contents(folder / "out")


def same_but_for_the_folder(found, expected):
    """Whether all bytes are the same, except where ``dataset.yaml`` names the folder itself."""
    found, expected = dict(found), dict(expected)
    lines = [
        [line for line in files.pop("dataset.yaml").splitlines() if b"/out/" not in line]
        for files in (found, expected)
    ]
    assert found.keys() == expected.keys()
    different = [name for name in found if found[name] != expected[name]]
    return not different and lines[0] == lines[1]


def test_the_frames_are_in_order(undisturbed, source, tmp_path):
    for name, content in undisturbed.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    train, val = stored(tmp_path / "train"), stored(tmp_path / "val")
    assert (len(train), len(val)) == (717, 80)
    for side in (train, val):
        order = [tuple(map(int, atoms.info["sid"].split("-"))) for atoms in side]
        assert order == sorted(order)
    assert undisturbed["rejected.csv"].decode().splitlines() == [
        "file,index,name,reason",
        *(f"{source}/1.extxyz,{i},,the energy is nan; remove the structure" for i in range(3)),
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_it_ends_in_the_same_bytes(workers, source, undisturbed, tmp_path):
    """Kills at random moments, each run going on from the one before; then it may finish."""
    moments = random.Random(workers)
    out = tmp_path / "out"
    command = [*driver(tmp_path), f"{source}/*.extxyz", out, "--workers", workers]
    killed = 0
    for _ in range(KILLS):
        process = start(command, start_new_session=True)
        deadline = time.monotonic() + 60
        while not (tmp_path / ".out.partial/plan.json").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.2))
        process.kill()  # the process alone: its workers must notice by themselves
        killed += process.wait() == -signal.SIGKILL
        process.stderr.close()
        if out.exists() and process.returncode == 0:
            assert same_but_for_the_folder(contents(out), undisturbed)
            shutil.rmtree(out)  # it was too quick: begin again
            shutil.rmtree(Path(os.environ["ESCAIP_DATA"]), ignore_errors=True)
    assert killed
    finished = start(command)
    _, errors = finished.communicate(timeout=120)
    assert finished.returncode == 0, errors
    assert same_but_for_the_folder(contents(out), undisturbed)
    assert not (tmp_path / ".out.partial").exists()


@pytest.fixture(autouse=True)
def data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path / "root"))


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "RECORDS_PER_CHUNK", 5)
    write(tmp_path / "in.traj", labelled_atoms(23))
    return tmp_path


class Killed(BaseException):
    """Stands for the end of the process."""


def test_killed_before_and_after_each_single_file(small, monkeypatch):
    """Every file that a conversion puts in its place may be the last thing that it does."""
    source, out, real = small / "in.traj", small / "out", os.replace
    convert([source], out)
    expected, n_files = contents(out), 0

    def until(fatal, after):
        calls = iter(range(1000))

        def replace(old, new):
            number = next(calls)
            if number != fatal or after:
                real(old, new)
            if number == fatal:
                raise Killed

        return replace

    for after in (False, True):
        for fatal in range(100):
            shutil.rmtree(out)
            shutil.rmtree(small / "root")
            with monkeypatch.context() as patch, suppress(Killed):
                patch.setattr(os, "replace", until(fatal, after))
                convert([source], out)
                n_files = fatal
                break
            convert([source], out)
            assert contents(out) == expected, fatal
            assert not (small / ".out.partial").exists()
    assert 12 < n_files < 99


def counted(reads, take):
    """Note how many records the resumed run still had to read: the length of a list of calls."""
    reads.append(0)

    def counting(*arguments):
        reads[-1] += 1
        return take(*arguments)

    return counting


def interrupted(source, out, monkeypatch, after=3, **options):
    """Convert until a number of chunks is kept."""
    add, calls = journal.PartJournal.add, iter(range(100))

    def failing(self, *arguments):
        if next(calls) == after:
            raise Killed
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(journal.PartJournal, "add", failing)
        with pytest.raises(Killed):
            convert(source, out, **options)


def test_what_is_read_is_not_read_again(small, monkeypatch):
    interrupted([small / "in.traj"], small / "out", monkeypatch)
    reads = []
    monkeypatch.setattr(work, "_take", counted(reads, work._take))
    convert([small / "in.traj"], small / "out")
    assert reads == [23 - 3 * 5]


def test_other_options_or_inputs_do_not_go_on(small, monkeypatch):
    source, out = small / "in.traj", small / "out"
    interrupted([source], out, monkeypatch)
    with pytest.raises(UserError, match=r"other options \(check_units\).* --overwrite"):
        convert([source], out, check_units=False)
    write(source, labelled_atoms(9))
    with pytest.raises(UserError, match=r"other inputs \(.*in\.traj is new, gone or changed\)"):
        convert([source], out)
    assert convert([source], out, overwrite=True)[0].n_train == 8


def test_other_spellings_of_the_inputs_go_on(small, monkeypatch):
    interrupted([small / "in.traj"], small / "out", monkeypatch)
    (small / "elsewhere").mkdir()
    monkeypatch.chdir(small / "elsewhere")
    reads = []
    monkeypatch.setattr(work, "_take", counted(reads, work._take))
    convert(["../in.traj"], small / "out")
    assert reads == [23 - 3 * 5]


def test_the_split_may_change(small, monkeypatch):
    """It is made in the end, so nothing is read again for another seed."""
    from escaip_fairchem.data.convert import SplitOptions

    source, out = small / "in.traj", small / "out"
    interrupted([source], out, monkeypatch)
    summary, _ = convert([source], out, split=SplitOptions(0.5, seed=3))
    assert summary.n_val == 12
    found = contents(out)
    convert([source], out, split=SplitOptions(0.5, seed=3), overwrite=True)
    assert contents(out) == found


def test_two_at_once(small):
    folder = small / ".out.partial"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another process is converting into .*out; wait"):
            convert([small / "in.traj"], small / "out")
    convert([small / "in.traj"], small / "out")


@pytest.mark.parametrize("where", ["journal", "rows"])
def test_a_full_disk_loses_nothing(where, small, monkeypatch):
    source, out = small / "in.traj", small / "out"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))

    def fail(*_, **__):
        raise full

    with monkeypatch.context() as patch:
        if where == "journal":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(rows, "blake2b", fail)
        with pytest.raises(UserError, match=r"No space left .*; it goes on where it stopped"):
            convert([source], out)
    assert not out.exists()
    assert convert([source], out)[0].n_train == 21


def test_a_folder_that_cannot_be_made(small):
    (small / "file").write_text("")
    with pytest.raises(
        UserError, match=r"\.out\.partial cannot be made \(Not a directory\); choose"
    ):
        convert([small / "in.traj"], small / "file" / "out")


def test_a_file_size_limit_in_the_middle_of_a_shard(source, undisturbed, tmp_path):
    """The system refuses to write, as on a full disk, also inside LMDB."""
    out = tmp_path / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n"
    command = [*driver(tmp_path), f"{source}/*.extxyz", out]
    script = Path(command[1])
    plain = script.read_text()
    for size in (10_000, 400_000):  # a chunk, a shard
        script.write_text(limit.format(size) + plain)
        process = start(command)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert errors.strip().splitlines()[-1].endswith("it goes on where it stopped")
        # LMDB calls a write that stops half-way an input/output error
        assert "File too large" in errors or "Input/output error" in errors
        assert not out.exists()
    script.write_text(plain)
    subprocess.run([str(argument) for argument in command], check=True, stdout=subprocess.DEVNULL)
    assert same_but_for_the_folder(contents(out), undisturbed)
