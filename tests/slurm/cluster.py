"""A Slurm of its own on one machine, on loopback: two nodes with four GPUs each, which are only names.

`python tests/slurm/cluster.py COMMAND...` runs a command beside it. Daemons, their files and the links in /etc/slurm,
which `srun` within a job reads, are gone when it ends.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
ETC = Path("/etc/slurm")
FILES = ("slurm.conf", "gres.conf")
NODES, GPUS, CPUS, MEMORY_MB = 2, 4, 8, 8000
TIMEOUT_S = 30
# UnkillableStepTimeout: a step that ends while the controller is down waits for it, and is no reason to drain its node.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdParameters=config_overrides
SlurmdTimeout=15
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MinJobAge=600
KillWait=10
UnkillableStepTimeout=600
JobRequeue=1
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
"""


def install() -> str | None:
    """Why there is no Slurm here, after an attempt to install it; None if there is."""
    if os.geteuid() != 0:
        return "Slurm is started by root only"
    if not all(map(shutil.which, DAEMONS)) and shutil.which("apt-get"):
        command = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for each in (["apt-get", "update"], command):
            subprocess.run(each, env=env, check=False, capture_output=True)
    if missing := [name for name in DAEMONS if shutil.which(name) is None]:
        return f"no {missing[0]}: apt-get install {' '.join(PACKAGES)}"
    for path in (ETC / name for name in FILES):
        if path.is_symlink() and not runs("slurmctld", path.readlink().parent):
            path.unlink()  # left by a cluster that was killed
        elif os.path.lexists(path):
            return f"a Slurm is configured in {ETC} already"
    return None


class Cluster:
    """Daemons by name, in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def configure(self) -> None:
        host, ports = socket.gethostname(), free_ports(1 + NODES)
        lines = [CONFIG.format(host=host, folder=self.folder, ports=ports)]
        for i in range(NODES):
            lines.append(
                f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1 + i]} CPUs={CPUS}"
                f" RealMemory={MEMORY_MB} Gres=gpu:t1:{GPUS}\n"
            )
            (self.folder / f"spool-n{i}").mkdir()
        lines.append("PartitionName=gpu Nodes=n[0-1] Default=YES MaxTime=60 State=UP\n")
        (self.folder / "slurm.conf").write_text("".join(lines))
        for i in range(GPUS):  # further names of /dev/null: Slurm wants a device
            os.mknod(self.folder / f"gpu{i}", 0o600 | 0o020000, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu Type=t1 File={self.folder}/gpu[0-{GPUS - 1}]\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def start(self, name: str) -> None:
        """Starts `munged`, `slurmctld` or the `slurmd` of a node, `n0`."""
        conf = self.folder / "slurm.conf"
        files = {part: str(self.folder / f"munge.{part}") for part in ("key", "socket", "pid", "log", "seed")}
        munge = ["munged", "--foreground", "--force"]
        munge += [f"--{option}-file={files[option]}" for option in ("key", "pid", "log", "seed")]
        command = {
            "munged": [*munge, f"--socket={files['socket']}"],
            "slurmctld": ["slurmctld", "-D", "-i", "-f", str(conf)],
        }.get(name, ["slurmd", "-D", "-f", str(conf), "-N", name])
        with (self.folder / f"{name}.out").open("ab") as out:
            self._running[name] = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)

    def stop(self, name: str, signum: int = signal.SIGTERM) -> None:
        process = self._running.pop(name)
        process.send_signal(signum)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def wait_until_idle(self) -> None:
        end = time.monotonic() + TIMEOUT_S
        while say("sinfo", "-hNp", "gpu", "-o%T").split() != ["idle"] * NODES:
            if time.monotonic() > end:
                logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.log"))
                raise RuntimeError(f"the nodes did not start:\n{say('sinfo', '-N', '-l')}\n{logs}")
            time.sleep(0.2)

    def wait_until_it_answers(self) -> None:
        end = time.monotonic() + TIMEOUT_S
        while not say("sinfo", "-h"):
            if time.monotonic() > end:
                raise RuntimeError("slurmctld does not answer")
            time.sleep(0.2)

    def kill_node(self, name: str) -> None:
        """Kills a node's daemon and every process of its jobs, as when its power fails."""
        lost = [each for each in psutil.process_iter() if node_of(each) == name]
        steps = [step for each in lost if (step := each.parent()) and step.name().startswith("slurmstepd")]
        self._running[name].kill()
        for process in [*steps, *lost]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._running.pop(name).wait()

    def end(self) -> None:
        """Cancels every job, and ends the daemons."""
        if "slurmctld" in self._running:
            subprocess.run(["scancel", "--user=root"], check=False, timeout=TIMEOUT_S)
            end = time.monotonic() + TIMEOUT_S
            while say("squeue", "-h") and time.monotonic() < end:
                time.sleep(0.5)
        for name in reversed(list(self._running)):
            self.stop(name)
        for process in [*self._steps(), *filter(node_of, psutil.process_iter())]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _steps(self) -> list[psutil.Process]:
        """The processes with which Slurm watches a job; they write to a node's log."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.name().startswith("slurmstepd") and any(
                    file.path.startswith(str(self.folder)) for file in process.open_files()
                ):
                    found.append(process)
        return found


def say(*command: str) -> str:
    """What a command of Slurm's prints; nothing if it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def node_of(process: psutil.Process) -> str | None:
    """The node on which a job's process runs."""
    with suppress(psutil.Error):
        return process.environ().get("SLURMD_NODENAME")
    return None


def runs(daemon: str, folder: Path) -> bool:
    """Whether a daemon with its files in `folder` is alive."""
    processes = psutil.process_iter(["name", "cmdline"])
    return any(
        each.info["name"] == daemon and str(folder) in " ".join(each.info["cmdline"] or []) for each in processes
    )


def free_ports(num: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(num)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def running() -> Iterator[Cluster]:
    """A Slurm that takes jobs, for the duration of the block."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path has at most 107 characters
    folder.chmod(0o755)
    cluster = Cluster(folder)
    made_etc = not ETC.exists()
    ETC.mkdir(exist_ok=True)
    try:
        cluster.configure()
        (folder / "state").mkdir()
        for name in FILES:
            (ETC / name).symlink_to(folder / name)
        for name in ("munged", "slurmctld", *(f"n{i}" for i in range(NODES))):
            cluster.start(name)
            if name == "munged":
                wait_for(folder / "munge.socket")
        cluster.wait_until_idle()
        yield cluster
    finally:
        cluster.end()
        for name in FILES:
            (ETC / name).unlink(missing_ok=True)
        if made_etc:
            ETC.rmdir()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(path: Path) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not path.exists():
        if time.monotonic() > end:
            raise RuntimeError(f"{path} did not appear")
        time.sleep(0.05)


if __name__ == "__main__":
    if reason := install():
        sys.exit(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the cluster ends with this process
    with running():
        sys.exit(subprocess.run(sys.argv[1:], check=False).returncode)
