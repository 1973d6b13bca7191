"""What a host of a test cluster has of its own in /etc: names, and keys for ssh that are known on all beforehand."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path


def write(folder: Path, addresses: Mapping[str, str], domain: str | None) -> None:
    """Names and addresses of all hosts, nothing else, into ``folder/NAME``; also as ``NAME.domain`` where given."""
    lines = ["127.0.0.1 localhost"]
    for name, address in addresses.items():
        lines.append(" ".join([address, *([f"{name}.{domain}"] if domain else []), name]))
    for name in addresses:
        (folder / name / "hosts").write_text("\n".join(lines) + "\n")
        (folder / name / "resolv.conf").write_text("")
        (folder / name / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")


def write_ssh(folder: Path, addresses: Mapping[str, str]) -> None:
    """``folder/NAME/ssh``, an /etc/ssh with which root of any host may enter any other."""
    identity = folder / "id"
    _keygen(identity)
    known = ""
    for name, address in addresses.items():
        own = folder / name / "ssh"
        own.mkdir()
        _keygen(own / "host_key")
        known += f"{name},{address} {' '.join((own / 'host_key.pub').read_text().split()[:2])}\n"
        shutil.copy(identity, own / "id")
        (own / "id").chmod(0o600)
        shutil.copy(f"{identity}.pub", own / "authorized_keys")
        (own / "sshd_config").write_text(
            f"Port 22\nListenAddress {address}\nHostKey /etc/ssh/host_key\nPidFile /run/sshd.pid\n"
            "AuthorizedKeysFile /etc/ssh/authorized_keys\nPermitRootLogin prohibit-password\n"
            "PasswordAuthentication no\nUsePAM no\nStrictModes no\nMaxStartups 100\n"
        )
        (own / "ssh_config").write_text(
            "Host *\n  IdentityFile /etc/ssh/id\n  IdentitiesOnly yes\n  StrictHostKeyChecking yes\n"
            "  GlobalKnownHostsFile /etc/ssh/known_hosts\n  UserKnownHostsFile /dev/null\n"
            "  BatchMode yes\n  ConnectTimeout 5\n"
        )
    for name in addresses:
        (folder / name / "ssh" / "known_hosts").write_text(known)


def _keygen(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "cluster", "-f", str(path)]
    subprocess.run(command, check=True, timeout=30, stdin=subprocess.DEVNULL)
