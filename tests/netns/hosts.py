"""Two hosts on one machine: network namespaces with a name and an address each, joined by a bridge, so that ranks talk real TCP."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "torchrun.sh"
STEPS = 12  # of the run that is compared
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
ENTER = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


class Hosts:
    """`names` as hosts; the first has the address .1. Raises CalledProcessError where the kernel allows no namespaces."""

    def __init__(self, folder: Path, tag: str, names: tuple[str, ...], network: str = "10.79.0") -> None:
        self.tag, self.names, self.file = tag, names, folder / "hosts"
        self.file.write_text("127.0.0.1 localhost\n" + "".join(f"{network}.{n} {name}\n" for n, name in enumerate(names, 1)))
        try:
            ip("netns", "add", f"{tag}-bridge")
            ip("-n", f"{tag}-bridge", "link", "add", "br0", "type", "bridge")
            ip("-n", f"{tag}-bridge", "link", "set", "br0", "up")
            for number, name in enumerate(names, 1):
                self._add(f"{tag}-{name}", number, f"{network}.{number}/24")
            self.command(names[0], "true", run=True)
        except BaseException:
            self.close()
            raise

    def _add(self, host: str, number: int, address: str) -> None:
        bridge = f"{self.tag}-bridge"
        ip("netns", "add", host)
        ip("-n", bridge, "link", "add", f"p{number}", "type", "veth", "peer", "name", "eth0", "netns", host)
        ip("-n", bridge, "link", "set", f"p{number}", "master", "br0", "up")
        ip("-n", host, "addr", "add", address, "dev", "eth0")
        ip("-n", host, "link", "set", "eth0", "up")
        ip("-n", host, "link", "set", "lo", "up")

    def command(self, host: str, *words: str, run: bool = False) -> list[str]:
        """The words that run `words` on `host`: its network, its name, its /etc/hosts."""
        whole = ["nsenter", f"--net=/run/netns/{self.tag}-{host}", "unshare", "-m", "-u", "sh", "-c", ENTER, "sh", str(self.file),
                 host, *words]  # fmt: skip
        if run:
            subprocess.run(whole, check=True, capture_output=True, env={**os.environ, "PATH": PATH})
        return whole

    def torchrun(self, number: int, log: Path, *words: str, **env: str) -> subprocess.Popen[bytes]:
        """launch/torchrun.sh on host `number`, two ranks there, started with `words`; what it says goes to `log`."""
        settings = {"NNODES": str(len(self.names)), "NODE_RANK": str(number), "NPROC_PER_NODE": "2", "MASTER_ADDR": self.names[0],
                    "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PATH": PATH}  # fmt: skip
        with open(log, "ab") as out:
            return subprocess.Popen(self.command(self.names[number], str(SCRIPT), *words), stdout=out, stderr=out,
                                    env={**os.environ, **settings, **env}, start_new_session=True)  # fmt: skip

    def pids(self, host: str) -> list[int]:
        """The processes in its network."""
        listed = subprocess.run([_ip(), "netns", "pids", f"{self.tag}-{host}"], capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]

    def close(self) -> None:
        """End what runs there, remove the hosts."""
        for name in (*self.names, "bridge"):
            for pid in self.pids(name):
                subprocess.run(["kill", "-9", str(pid)], capture_output=True, check=False)
            subprocess.run([_ip(), "netns", "del", f"{self.tag}-{name}"], capture_output=True, check=False)


def missing() -> str:
    """Why there can be no hosts here, or an empty string."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in ("ip", "nsenter", "unshare") if shutil.which(name, path=PATH) is None]
    return f"{absent[0]} is not installed: apt-get install --no-install-recommends iproute2 util-linux" if absent else ""


def _ip() -> str:
    return shutil.which("ip", path=PATH) or "ip"


def ip(*words: str) -> None:
    subprocess.run([_ip(), *words], check=True, capture_output=True)
