"""Nodes of a network on one machine: network namespaces with names and addresses of their own, and a link between them
that can be cut (ip-netns(8), veth(4), iptables(8)).  Needs root; nothing outside of the namespaces is touched.

    with Network() as network:
        n1, n2 = network.nodes
        process = n1.start(["farspan", ...], log, environment)
        network.cut()
        network.mend()

With ``ssh`` each node answers ssh from the other and from itself, with keys that exist for this network alone.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

TOOLS = ("ip", "iptables", "unshare", "hostname", "sh")
_ETC = Path("/etc/netns")  # what `ip netns exec` mounts over /etc, by namespace
_SSHD_ROOT = Path("/run/sshd")  # must be there for sshd (its privilege separation)
_SSHD = """\
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/id.pub
StrictModes no
PasswordAuthentication no
PidFile none
"""
_SSH = """\
IdentityFile /etc/ssh/id
IdentitiesOnly yes
GlobalKnownHostsFile /etc/ssh/known_hosts
UserKnownHostsFile /dev/null
"""


@functools.cache
def why_not(*tools: str) -> str | None:
    """Why there can be no namespaces here, or one of ``tools`` is missing; None where all is well."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    missing = [tool for tool in (*TOOLS, *tools) if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: iproute2 iptables openssh-server pdsh)"
    try:
        with Network():
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {' '.join(str(error.stderr).split())}"


class Node:
    """One of them: ``name`` is its host name, ``address`` that of its end of the link."""

    def __init__(self, name: str, namespace: str, interface: str, address: str) -> None:
        self.name, self.namespace, self.interface, self.address = name, namespace, interface, address

    def command(self, words: Sequence[str]) -> list[str]:
        """What runs there what ``words`` say."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh", *words]
        return ["ip", "netns", "exec", self.namespace, *named]

    def start(self, words: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start it in a process group of its own; what it says is added to ``log``."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command(words), env=dict(env), stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0
            )

    def run(self, *words: str) -> str:
        done = subprocess.run(self.command(words), check=True, capture_output=True, text=True, timeout=60)
        return done.stdout

    def pids(self) -> list[int]:
        return [int(pid) for pid in _run("ip", "netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """SIGKILL to all that runs there, as if the power went."""
        limit = time.monotonic() + 30
        while pids := self.pids():
            assert time.monotonic() < limit, f"{pids} do not end"
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


class Network:
    """Two nodes, n1 and n2, and a link between them; they go, and all that runs on them, when the block ends."""

    def __init__(self, *, ssh: bool = False) -> None:
        key, self._ssh = secrets.token_hex(3), ssh
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.nodes = [Node(f"n{i}", f"farspan-{key}-{i}", f"fs{key}{i}", f"192.0.2.{i}") for i in (1, 2)]

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self) -> None:
        hosts = "127.0.0.1 localhost\n" + "".join(f"{node.address} {node.name}\n" for node in self.nodes)
        for node in self.nodes:
            folder = _ETC / node.namespace
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(hosts)
            _run("ip", "netns", "add", node.namespace)
        if self._ssh:
            self._make_keys()
        one, two = self.nodes
        veth = ["ip", "link", "add", one.interface, "netns", one.namespace, "type", "veth"]
        _run(*veth, "peer", "name", two.interface, "netns", two.namespace)
        for node in self.nodes:
            inside = ["ip", "-n", node.namespace]
            _run(*inside, "address", "add", f"{node.address}/24", "dev", node.interface)
            for interface in ("lo", node.interface):
                _run(*inside, "link", "set", interface, "up")
        if self._ssh:
            _SSHD_ROOT.mkdir(exist_ok=True)
            for node in self.nodes:
                self._daemons.append(node.start([str(shutil.which("sshd")), "-D"], Path(os.devnull), os.environ))
            for node in self.nodes:
                _run(*node.command(["ssh", "-o", "ConnectionAttempts=20", node.name, "true"]))

    def _make_keys(self) -> None:
        """/etc/ssh of both nodes: the same keys for all."""
        one, two = (_ETC / node.namespace / "ssh" for node in self.nodes)
        one.mkdir()
        for name in ("host_key", "id"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(one / name))
        (one / "known_hosts").write_text(
            f"{','.join(node.name for node in self.nodes)} {(one / 'host_key.pub').read_text()}"
        )
        (one / "sshd_config").write_text(_SSHD)
        (one / "ssh_config").write_text(_SSH)
        shutil.copytree(one, two)

    def cut(self, how: Literal["down", "silent"] = "down") -> None:
        """From now on nothing arrives.  ``down``: the second node sees that its interface is down, the first that the
        cable is out; ``silent``: nobody is told."""
        if how == "down":
            _run("ip", "-n", self.nodes[1].namespace, "link", "set", self.nodes[1].interface, "down")
        for node in self.nodes:
            if how == "silent":
                node.run("iptables", "-A", "INPUT", "-i", node.interface, "-j", "DROP")

    def mend(self) -> None:
        """The reverse of ``cut``."""
        _run("ip", "-n", self.nodes[1].namespace, "link", "set", self.nodes[1].interface, "up")
        for node in self.nodes:
            node.run("iptables", "-F", "INPUT")

    def close(self) -> None:
        for node in self.nodes:
            with contextlib.suppress(subprocess.CalledProcessError):  # it was not made
                node.kill()
                _run("ip", "netns", "delete", node.namespace)  # its interfaces go with it
            shutil.rmtree(_ETC / node.namespace, ignore_errors=True)
        for daemon in self._daemons:
            daemon.wait(30)
        with contextlib.suppress(OSError):  # others have theirs there
            _ETC.rmdir()


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout
