"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, without systemd, containers or cgroups.

As root each node has its own network, host name, mounts and process numbers, so that the end of its first process ends
all of the node's; else both are addresses of the loopback. Only what was started here is ended.
"""

import itertools
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue", "setpriv")
NODES = ("n1", "n2")
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
ROOT = Path(__file__).parents[2]
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
STARTED = itertools.count()


class Unavailable(Exception):
    """Slurm is not installed here, or has no right to be started; the message is the reason."""


class Cluster:
    """Up while entered. ``jobs``: folder of the jobs' logs."""

    def __init__(self) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
        if missing:
            raise Unavailable(f"no {missing[0]} here (apt-get install slurmctld slurmd slurm-client munge iproute2)")
        self.apart = os.geteuid() == 0 and shutil.which("ip", path=PATH) is not None
        self.number = (os.getpid() + 67 * next(STARTED)) % 200  # tests run in several processes at once
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))  # munge's socket wants folders that everybody may enter
        self.root.chmod(0o755)
        self.daemons: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "PATH": PATH,
            "SLURM_CONF": str(self.root / "slurm.conf"),
        }

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        for name in ("log", "state", "jobs", *(f"spool.{node}" for node in NODES)):
            (self.root / name).mkdir()
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        self.gpus = self._make_devices()
        self._write_configuration()
        try:
            if self.apart:
                self._make_networks()
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"no networks of its own: {error.stderr.strip()}") from error
        self._daemon(
            "munged", "munged", "--foreground", f"--key-file={key}", f"--socket={self.root}/munge.socket",
            f"--pid-file={self.root}/munged.pid", f"--log-file={self.root}/log/munged.log",
            f"--seed-file={self.root}/munge.seed",
        )  # fmt: skip
        self._wait_for((self.root / "munge.socket").exists)
        self._daemon("slurmctld", "slurmctld", "-D", "-i")
        for node in NODES:
            argv = ["slurmd", "-D", "-N", node]
            if self.apart:
                # Not `ip netns exec`, which mounts /sys anew, without the cgroups that slurmd looks for.
                inside = f"hostname {node} && mount --bind {self.root}/hosts /etc/hosts && exec {' '.join(argv)}"
                argv = [
                    "nsenter", f"--net=/run/netns/{self._namespace(node)}", "unshare", "--uts", "--mount", "--pid",
                    "--fork", "--kill-child", "--mount-proc", "bash", "-c", inside,
                ]  # fmt: skip
            self._daemon(f"slurmd.{node}", *argv)
        self._wait_for(lambda: self._idle() == set(NODES))

    def __exit__(self, *_: object) -> None:
        if (self.root / "slurm.conf").exists():
            self.run("scancel", "--full", f"--user={os.geteuid()}", check=False)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and self.run("squeue", "--noheader", check=False).strip():
                time.sleep(0.2)
        for _, daemon in reversed(self.daemons):
            if daemon.poll() is not None:
                continue
            below = [psutil.Process(daemon.pid), *psutil.Process(daemon.pid).children(recursive=True)]
            for process in below[::-1]:
                _send(process, signal.SIGTERM)
            alive = psutil.wait_procs(below, timeout=5)[1]
            for process in alive:
                _send(process, signal.SIGKILL)
            daemon.wait()
        for process in self.processes():  # without process numbers of its own, a node leaves what has detached itself
            _send(process, signal.SIGKILL)
        if self.apart:
            for node in NODES:
                self._ip("link", "del", self._end(node), check=False)  # its namespace would take it along, but later
                self._ip("netns", "del", self._namespace(node), check=False)
            self._ip("link", "del", self._bridge, check=False)
        shutil.rmtree(self.root, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """Daemons, and all that runs in jobs of this cluster, but for this process."""
        found = []
        for process in psutil.process_iter():
            try:
                in_cluster = process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
            except psutil.Error:
                continue
            if in_cluster and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def marks(self) -> list[str]:
        """Network devices and namespaces of this cluster that the system knows of."""
        if not self.apart:
            return []
        known = [line.split(":")[1].split("@")[0].strip() for line in self._ip("-oneline", "link").splitlines()]
        known += [line.split()[0] for line in self._ip("netns").splitlines()]
        names = {self._bridge, *map(self._namespace, NODES), *map(self._end, NODES)}
        return sorted(names.intersection(known))

    def run(self, *argv: str, check: bool = True, **more: str) -> str:
        """Output of a command that knows of this cluster; ``more``: environment variables."""
        environment = {**self.environment, **more}
        done = subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, *argv: str, options: Sequence[str] = (), **more: str) -> str:
        """The number of a job that runs a script in the repository's folder; its log is in self.log(number)."""
        name = "%A_%a" if any("--array" in option for option in options) else "%j"
        command = ["sbatch", "--parsable", f"--output={self.root}/jobs/{name}.log", *options, str(script), *argv]
        return self.run(*command, **more).strip()

    def log(self, job: str) -> str:
        path = self.root / "jobs" / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def job(self, number: str) -> list[dict[str, str]]:
        """The records of a job, or of every element of an array, as Slurm shows them."""
        lines = self.run("scontrol", "show", "job", number, "--oneliner").splitlines()
        return [dict(field.partition("=")[::2] for field in line.split() if "=" in field) for line in lines if line]

    def wait(self, number: str, seconds: float = 400) -> dict[str, str]:
        """A job's last record. `sbatch --wait` would look only every ten seconds."""
        self._wait_for(lambda: all(job["JobState"] in ENDED for job in self.job(number)), seconds, number)
        return self.job(number)[0]

    def _wait_for(self, condition: Callable[[], bool], seconds: float = 60, job: str | None = None) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, daemon in self.daemons if daemon.poll() is not None]
            if ended or (job is None and time.monotonic() > deadline):
                logs = "".join(path.read_text()[-500:] for path in sorted((self.root / "log").glob("*.out")))
                # Not Unavailable: a test skipped because of our own mistake would look like success.
                raise AssertionError(f"{', '.join(ended) or 'Slurm'} did not start or has ended: {logs}")
            assert time.monotonic() < deadline, f"waited in vain for {job}: {self.log(job or '')[-3000:]}"
            time.sleep(0.2 if job is None else 1)

    def _idle(self) -> set[str]:
        return set(self.run("sinfo", "--noheader", "--states=idle", "--Node", "--format=%N", check=False).split())

    def _daemon(self, name: str, *argv: str) -> None:
        argv = ("setpriv", "--pdeathsig", "KILL", *argv)  # where this process is killed, they go with it
        with open(self.root / "log" / f"{name}.out", "wb") as log:
            daemon = subprocess.Popen(
                argv, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.daemons.append((name, daemon))

    def _make_devices(self) -> int:
        """Slurm wants device files for GPUs; these are twins of /dev/null."""
        try:
            for number in range(2):
                os.mknod(self.root / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            return 0
        return 2

    @property
    def _bridge(self) -> str:
        return f"slurmbr{self.number}"

    def _namespace(self, node: str) -> str:
        return f"slurm{self.number}-{node}"

    def _end(self, node: str) -> str:
        """Of the wire to a node, at the bridge."""
        return f"sl{self.number}{node}"

    def _address(self, node: str) -> str:
        last = 11 + NODES.index(node)
        return f"10.231.{self.number}.{last}" if self.apart else f"127.0.{self.number}.{last}"

    def _make_networks(self) -> None:
        self._ip("link", "add", self._bridge, "type", "bridge")
        self._ip("addr", "add", f"10.231.{self.number}.1/24", "dev", self._bridge)
        self._ip("link", "set", self._bridge, "up")
        for node in NODES:
            name, end = self._namespace(node), self._end(node)
            self._ip("netns", "add", name)
            self._ip("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", name)
            self._ip("link", "set", end, "master", self._bridge, "up")
            self._ip("-n", name, "addr", "add", f"{self._address(node)}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                self._ip("-n", name, "link", "set", device, "up")

    def _ip(self, *argv: str, check: bool = True) -> str:
        return subprocess.run(["ip", *argv], env=self.environment, capture_output=True, text=True, check=check).stdout

    def _write_configuration(self) -> None:
        host = socket.gethostname().partition(".")[0]
        head = f"10.231.{self.number}.1" if self.apart else "127.0.0.1"
        user = psutil.Process().username()
        lines = [
            "ClusterName=tests",
            f"SlurmctldHost={host}({head})",
            f"SlurmctldPort={17800 + self.number}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            f"AuthInfo=socket={self.root}/munge.socket,cred_expire=5",  # a job that is started again waits for so long
            f"StateSaveLocation={self.root}/state",
            f"SlurmctldPidFile={self.root}/slurmctld.pid",
            f"SlurmctldLogFile={self.root}/log/slurmctld.log",
            f"SlurmdPidFile={self.root}/slurmd.%n.pid",
            f"SlurmdLogFile={self.root}/log/slurmd.%n.log",
            f"SlurmdSpoolDir={self.root}/spool.%n",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=0,bf_interval=1",
            "SlurmdParameters=config_overrides",
            "ReturnToService=2",
            "JobRequeue=1",
            "KillWait=30",
            "MinJobAge=3600",
            *(["GresTypes=gpu"] if self.gpus else []),
        ]
        for number, node in enumerate(NODES):
            entry = f"NodeHostname={host} Port={18100 + 2 * self.number + number}"
            if self.apart:
                entry = f"NodeHostname={node} Port=17818"
            devices = f" Gres=gpu:{self.gpus}" if self.gpus else ""
            lines.append(f"NodeName={node} NodeAddr={self._address(node)} {entry} CPUs=16 RealMemory=64000{devices}")
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        (self.root / "slurm.conf").write_text("\n".join(lines) + "\n")
        if self.gpus:
            (self.root / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.root}/gpu[0-{self.gpus - 1}]\n")
        names = {"127.0.0.1": "localhost", head: host, **{self._address(node): node for node in NODES}}
        (self.root / "hosts").write_text("".join(f"{address} {name}\n" for address, name in names.items()))


def _send(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
