"""A SLURM of the tests' own on this machine: two nodes of four CPUs, all its state in one folder.

It has its own munge key, ports and folder, so that a SLURM or munge of the system is not touched.
By hand:

    python tests/slurm/cluster.py start FOLDER     prints what to export
    python tests/slurm/cluster.py stop FOLDER
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge"]
PROGRAMS = ["slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged"]
#: Daemons live outside a user's PATH.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
#: States in which a job is over.
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}

# KillWait is how long a job has between SIGTERM and SIGKILL: 30 s on most clusters.
CONFIG = """\
ClusterName=escaip-tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/spool-%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd-%n.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/slurmd-%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,sched_min_interval=0
ReturnToService=2
JobRequeue=1
KillWait=3
SlurmdTimeout=20
MinJobAge=86400
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=16000
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=16000
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=both Nodes={host},{host}-2 MaxTime=INFINITE State=UP
"""


class Unavailable(RuntimeError):
    """Why there can be no SLURM here."""


def install() -> None:
    """Get SLURM's packages if they are missing and this is root's machine with apt-get.

    Raises:
        Unavailable: With the reason.
    """
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise Unavailable(
            f"{', '.join(missing)} not found; as root on Debian or Ubuntu: "
            f"apt-get install --no-install-recommends {' '.join(PACKAGES)}"
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
    for attempt in (command, ["apt-get", "update"], command):
        done = subprocess.run(attempt, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0 and attempt is command:
            return
    raise Unavailable(f"apt-get could not install SLURM: {done.stderr.strip()[-300:]}")


class Cluster:
    """SLURM's daemons with their state in a folder.

    Args:
        state: The folder; its path must be short enough for a socket in it (100 characters).
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        self.config = state / "slurm.conf"
        self.host = socket.gethostname().partition(".")[0]
        self.nodes = [self.host, f"{self.host}-2"]

    def environment(self, **more: str) -> dict[str, str]:
        """Variables for a command outside of any job, which talks to this SLURM alone."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "SUBMITIT"))
        }
        return {**inherited, "PATH": PATH, "SLURM_CONF": str(self.config), **more}

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a command of SLURM."""
        for _ in range(3):
            done = subprocess.run(
                command, env=self.environment(), capture_output=True, text=True, timeout=60,
                check=False,
            )  # fmt: skip
            if "contact slurm controller" not in done.stderr or not self._revive_controller():
                break
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    # Start and stop

    def start(self) -> Cluster:
        """Start all daemons and wait until the nodes are idle."""
        install()
        self.state.mkdir(parents=True, exist_ok=True)
        self.state.chmod(0o755)  # munged wants its socket in a folder that all may enter
        for name in ("controller", *(f"spool-{node}" for node in self.nodes)):
            (self.state / name).mkdir(exist_ok=True)
        user = "root" if os.geteuid() == 0 else os.environ.get("USER", str(os.geteuid()))
        text = CONFIG.format(state=self.state, host=self.host, user=user, ports=_free_ports(3))
        self.config.write_text(text)
        try:
            self._start_munged()
            self._daemon("slurmctld", "-c", "-f", str(self.config))
            for node in self.nodes:
                self.start_slurmd(node)
            self._until_idle(self.nodes)
        except Exception:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Cancel what runs, and end the daemons that were started here."""
        with suppress(RuntimeError, subprocess.TimeoutExpired):
            self.run("scancel", "--state=PENDING")
            for process in self.job_processes():
                kill(process, signal.SIGKILL)
            self.run("scancel", "--state=RUNNING")
        files = [f"slurmd-{node}.pid" for node in self.nodes] + ["slurmctld.pid", "munged.pid"]
        for process in [pid for name in files if (pid := self._pid(name))]:
            kill(process, signal.SIGTERM)
            if not _within(10, lambda pid=process: not alive(pid)):
                kill(process, signal.SIGKILL)
        for process in self.job_processes():
            kill(process, signal.SIGKILL)

    def _revive_controller(self) -> bool:
        """Start the controller again if it died, as systemd would; whether it had.

        That of SLURM 22.05 is seen to crash, rarely, when a node fails and comes back.
        """
        pid = self._pid("slurmctld.pid")
        if pid is None or alive(pid):
            return False
        warnings.warn(f"slurmctld died and is started again: {self.state}", stacklevel=3)
        self._daemon("slurmctld", "-f", str(self.config))
        return True

    def _start_munged(self) -> None:
        key = self.state / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(1024)) if not key.stat().st_size else None
        files = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munged.seed",
        }
        # by force: the folder may lie in one of a user's, and root may run it
        flags = [f"--{flag}={self.state / name}" for flag, name in files.items()]
        self._daemon("munged", "--force", *flags)

    def _daemon(self, *command: str) -> None:
        """Start a daemon that goes into the background by itself."""
        log = self.state / f"{command[0]}.out"
        with log.open("ab") as file:
            done = subprocess.run(
                command, env=self.environment(), stdout=file, stderr=file, timeout=60, check=False
            )
        if done.returncode:
            raise Unavailable(f"{command[0]} did not start: {log.read_text()[-500:].strip()}")

    def _until_idle(self, nodes: list[str]) -> None:
        def idle() -> bool:
            states = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).splitlines()
            return {f"{node} idle" for node in nodes} <= set(states)

        if not _within(60, idle):
            logs = [self.state / "slurmctld.log", *self.state.glob("slurmd*.log")]
            tail = "\n".join(log.read_text()[-1000:] for log in logs if log.exists())
            raise Unavailable(f"no node became idle in a minute: {tail}")

    # A node that fails

    def start_slurmd(self, node: str | None = None) -> None:
        """Start the daemon of a node (the first), as when a node comes back."""
        node = node or self.host
        self._daemon("slurmd", "-N", node, "-f", str(self.config))

    def kill_slurmd(self, node: str | None = None, *, jobs: bool = True) -> None:
        """Kill the daemon of a node (the first), and with it everything of its jobs.

        The controller is told of a node that fails, which it would find out by itself after
        `SlurmdTimeout`; it queues the node's jobs again.

        Args:
            node: Its name.
            jobs: Whether jobs die too, as when the machine fails; else they go on.
        """
        node = node or self.host
        daemon = self._pid(f"slurmd-{node}.pid")
        for process in filter(None, [daemon, *(self.job_processes(node) if jobs else [])]):
            kill(process, signal.SIGKILL)
        if jobs:
            self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def job_processes(self, node: str | None = None) -> list[int]:
        """Processes of this cluster's jobs, and of the daemons that watch them (stepd)."""
        found = set()
        for process in _processes():
            variables = _environment_of(process)
            if variables.get("SLURM_CONF") != str(self.config):
                continue
            # those that watch a job outlive it while they cannot reach the controller
            if "SLURM_JOB_ID" not in variables and _name(process) != "slurmstepd":
                continue
            if node in (None, variables.get("SLURMD_NODENAME")):
                found.add(process)
                parent = _parent(process)
                if _name(parent) == "slurmstepd":
                    found.add(parent)
        return sorted(found)

    def rank_processes(self, job: str) -> list[int]:
        """The training processes of a job, one a rank."""
        return [
            process
            for process in _processes()
            if _environment_of(process).get("SLURM_JOB_ID") == job
            and b"submitit.core._submit" in _command_of(process)
            and b"python" in _command_of(process).split(b"\0")[0]
        ]

    # Jobs

    def jobs(self) -> dict[str, str]:
        """State of each job that is not over, by its number (``7`` or ``7_2``)."""
        lines = self.run("squeue", "-h", "-r", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def show(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode, TimeLimit and so on."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def state_of(self, job: str) -> str:
        """State of a job: PENDING, RUNNING, COMPLETED, FAILED ..."""
        return self.show(job)["JobState"]

    def wait(self, job: str, *, timeout: float = 300) -> str:
        """State of a job when it is over; a job that was requeued starts at once.

        Raises:
            TimeoutError: It was not over in time.
        """

        def over() -> bool:
            self.hurry()
            return self.state_of(job) in OVER

        self.until(over, timeout=timeout, what=lambda: f"job {job}: {self.show(job)}")
        return self.state_of(job)

    def until(
        self,
        condition: Callable[[], bool],
        *,
        timeout: float,
        what: Callable[[], str] = lambda: "",
        every: float = 0.3,
    ) -> None:
        """Wait for a condition.

        Raises:
            TimeoutError: It did not come true in time; with `what` is the matter.
        """
        if not _within(timeout, condition, every):
            raise TimeoutError(f"after {timeout} s: {what()}")

    def hurry(self) -> None:
        """Let requeued jobs begin in five seconds; SLURM makes them wait two minutes.

        At once is too early: a node that has just come back still removes what it had of the job.
        """
        for job, state in self.jobs().items():
            eligible = self.show(job)["EligibleTime"] if state == "PENDING" else "Unknown"
            with suppress(ValueError):  # not known
                wait = datetime.fromisoformat(eligible) - datetime.now()
                if wait > timedelta(seconds=10):
                    start = "StartTime=now+5seconds"
                    self.run("scontrol", "update", f"JobId={job}", start, check=False)

    def wait_running(self, job: str, *, timeout: float = 120) -> None:
        """Wait until a job runs."""

        def running() -> bool:
            self.hurry()
            return self.state_of(job) == "RUNNING"

        self.until(running, timeout=timeout, what=lambda: f"job {job}: {self.show(job)}")

    def requeue(self, job: str) -> None:
        """Stop a job and queue it again, as a preemption does."""
        self.run("scontrol", "requeue", job)

    def signal(self, job: str, name: str) -> None:
        """Send a signal (``USR2``) to all ranks of a job."""
        self.run("scancel", f"--signal={name}", job)

    def cancel(self, job: str) -> None:
        """Stop a job for good."""
        self.run("scancel", job)

    def _pid(self, name: str) -> int | None:
        with suppress(OSError, ValueError):
            return int((self.state / name).read_text())
        return None


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _within(seconds: float, condition: Callable[[], bool], every: float = 0.2) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _read(process: int, file: str) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{process}/{file}").read_bytes()
    return b""


def _command_of(process: int) -> bytes:
    return _read(process, "cmdline")


def _name(process: int) -> str:
    return _read(process, "comm").decode().strip()


def _parent(process: int) -> int:
    return int((_read(process, "stat").rpartition(b")")[2].split() or [b"", b"0"])[1])


def _environment_of(process: int) -> dict[str, str]:
    pairs = _read(process, "environ").decode(errors="replace").split("\0")
    return dict(pair.partition("=")[::2] for pair in pairs)


def alive(process: int) -> bool:
    """Whether a process is there; one that is only not yet reaped is not."""
    return Path(f"/proc/{process}").exists() and b") Z " not in _read(process, "stat")


def waiting_signals(process: int) -> int:
    """Signals that a stopped process has yet to get, as bits."""
    match = re.search(rb"^ShdPnd:\s*(\w+)", _read(process, "status"), re.MULTILINE)
    return int(match[1], 16) if match else 0


def kill(process: int, number: int) -> None:
    """Send a signal to a process if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(process, number)


def main() -> None:
    """Start or stop one by hand."""
    action, folder = sys.argv[1:]
    cluster = Cluster(Path(folder).resolve())
    if action == "start":
        cluster.start()
        print(f"export SLURM_CONF={cluster.config}")
    elif action == "stop":
        cluster.stop()
    else:
        raise SystemExit(f"start or stop, not {action}")


if __name__ == "__main__":
    main()
