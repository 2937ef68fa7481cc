"""Hosts made of namespaces on this machine: own network, processes, /tmp and home; all of it goes with the block.

They see each other over a bridge that leads nowhere else. One more, the desk, is where a person would sit.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = Path(pwd.getpwuid(os.getuid()).pw_dir)
SHARED = Path("/mnt/mprd")
NETWORK = "10.77.0"
PROGRAMS = ("ip", "ssh", "ssh-keygen", "sshd", "rsync", "curl")
HIDDEN = (Path("/tmp"), HOME)
"""What each host has of its own, apart from what the project needs of it."""


@dataclass(frozen=True)
class Host:
    """A host: its namespace, its address, its first process."""

    name: str
    address: str
    pid: int

    def run(self, command: str, *, timeout: float) -> str:
        """Run a command as a person there would; return what it printed.

        Raises AssertionError with all of it where the command fails or takes too long.
        """
        try:
            done = subprocess.run(
                self.enter(command), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired as over:
            # bytes, whatever `text` is
            printed = [(stream or b"").decode(errors="replace") for stream in (over.stdout, over.stderr)]
            raise AssertionError("\n".join([str(over), *printed])) from None
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def enter(self, command: str) -> list[str]:
        """Return the arguments that run a command there."""
        path = f"{sys.prefix}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        settings = [f"HOME={HOME}", f"PATH={path}", "RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0", "LANG=C.UTF-8"]
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--net", "--uts"]
        return [*enter, "env", "-i", *settings, "bash", "-c", f"cd {ROOT} && {command}"]

    def processes(self) -> dict[int, str]:
        """Return the command lines of all that runs there, by process id."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        found = {}
        for pid in map(int, listed.stdout.split()):
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
            except (FileNotFoundError, ProcessLookupError):
                continue
        return {pid: line for pid, line in found.items() if line}

    def ray_processes(self) -> dict[int, str]:
        """Return those of Ray."""
        words = ("ray::", "/ray/", "raylet", "gcs_server")
        return {pid: line for pid, line in self.processes().items() if any(word in line for word in words)}

    def lose_ray(self) -> None:
        """Kill all of Ray there at once, as a power cut would."""
        for pid in self.ray_processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@contextmanager
def make_hosts(folder: Path, *, number: int) -> Iterator[tuple[Host, list[Host]]]:
    """Make the desk and so many hosts with sshd, and take them down again whatever happens."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    assert not missing, f"install {', '.join(missing)}"
    prefix = f"mprd{os.getpid()}"
    names = [f"{prefix}-desk", *(f"{prefix}-h{n}" for n in range(number))]
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    (folder / "shared").mkdir()
    started: list[subprocess.Popen[bytes]] = []
    try:
        connect(names)
        hosts = []
        for n, name in enumerate(names):
            started.append(start(folder, name, n, serve=n > 0))
            hosts.append(Host(name, f"{NETWORK}.{n + 1}", first_process(started[-1])))
        for host in hosts[1:]:
            wait_for_ssh(hosts[0], host)
        yield hosts[0], hosts[1:]
    finally:
        take_down(names, started)


def connect(names: list[str]) -> None:
    """Make the namespaces, with a bridge in the first one and a cable from it to each other one."""
    desk = names[0]
    for n, name in enumerate(names):
        ip(f"netns add {name}")
        ip(f"-n {name} link set lo up")
        if n == 0:
            ip(f"-n {desk} link add bridge type bridge")
            ip(f"-n {desk} addr add {NETWORK}.1/24 dev bridge")
            ip(f"-n {desk} link set bridge up")
            continue
        ip(f"-n {desk} link add port{n} type veth peer name eth0 netns {name}")
        ip(f"-n {desk} link set port{n} master bridge up")
        ip(f"-n {name} addr add {NETWORK}.{n + 1}/24 dev eth0")
        ip(f"-n {name} link set eth0 up")


def ip(arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


def start(folder: Path, name: str, number: int, *, serve: bool) -> subprocess.Popen[bytes]:
    """Start a host's first process, which ends when it is killed, and everything there with it."""
    own = folder / name
    script = own / "boot.sh"
    prepare_home(own / str(HOME).lstrip("/"), folder)
    (own / "tmp").mkdir()
    (own / "hosts").write_text(f"127.0.0.1 localhost\n{NETWORK}.{number + 1} {name}\n")
    script.write_text(boot_script(folder, own, name, serve=serve))
    unshare = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *unshare, "bash", str(script)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def prepare_home(home: Path, folder: Path) -> None:
    """Write a home with a key that opens all hosts, and this environment where the project's would be made."""
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    for name, target in (("key", "id_ed25519"), ("key.pub", "authorized_keys")):
        (home / ".ssh" / target).write_bytes((folder / name).read_bytes())
        (home / ".ssh" / target).chmod(0o600)
    (home / ".bashrc").touch()
    (home / ".profile").touch()
    # the hosts reach no package registry: `make` finds the environment made
    venv = home / "mprd-project" / ".venv"
    venv.mkdir(parents=True)
    for entry in Path(sys.prefix).iterdir():
        if not entry.name.startswith("installed"):
            (venv / entry.name).symlink_to(entry)
    (venv / "installed-cluster").touch()


def boot_script(folder: Path, own: Path, name: str, *, serve: bool) -> str:
    """Return the shell script that lays the host's own folders over this machine's, and waits."""
    lines = ["set -e", f"hostname {name}"]
    for path in {ROOT, Path(sys.prefix), Path(sys.base_prefix)}:
        if any(path.is_relative_to(hidden) for hidden in HIDDEN):
            inside = own / str(path).lstrip("/")
            lines += [f"mkdir -p {inside}", f"mount --bind {path} {inside}"]
    lines += [
        f"mount --bind {own}/hosts /etc/hosts",
        "mount -t tmpfs tmpfs /dev/shm",
        "mount -t tmpfs tmpfs /run",
        "mount -t tmpfs tmpfs /mnt",
        f"mkdir -p /run/sshd {SHARED}",
        f"mount --bind {folder}/shared {SHARED}",
        f"cp {folder}/key /run/sshd_key",
        "chmod 600 /run/sshd_key",
        # last the one in which these folders lie themselves
        *(f"mount --rbind {own}{hidden} {hidden}" for hidden in sorted(HIDDEN, key=folder.is_relative_to)),
    ]
    options = "UsePAM=no StrictModes=no UseDNS=no PidFile=none PermitRootLogin=prohibit-password MaxStartups=100"
    settings = " ".join(f"-o {option}" for option in options.split())
    server = f"/usr/sbin/sshd -D -e -f /dev/null -h /run/sshd_key {settings}"
    return "\n".join([*lines, f"{server if serve else 'sleep infinity'} &", "wait"]) + "\n"


def first_process(unshare: subprocess.Popen[bytes]) -> int:
    """Return the process id of a host's first process, once it is there."""
    children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
    for _ in range(200):
        found = children.read_text().split() if children.exists() else []
        if found:
            return int(found[0])
        assert unshare.poll() is None, f"a host ended at its start: {unshare.args!r}"
        time.sleep(0.05)
    raise AssertionError("a host did not start")


def wait_for_ssh(desk: Host, host: Host) -> None:
    """Wait until a host lets the desk in."""
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ConnectTimeout=2 -o LogLevel=ERROR"
    command = f"for n in $(seq 30); do ssh {options} {host.address} true && exit 0; sleep 0.5; done; exit 1"
    desk.run(command, timeout=90)


def take_down(names: list[str], started: list[subprocess.Popen[bytes]]) -> None:
    """Kill every host, and remove the namespaces with the bridge and its cables."""
    for process in started:
        process.kill()
        process.wait(timeout=30)
    for name in names:
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
        for pid in map(int, pids):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
