"""The hosts among themselves before a run: who is there, reports, clocks, links, all-reduce. Every wait is bounded."""

from __future__ import annotations

import errno
import hmac
import ipaddress
import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.launch.verdict import slow_links
from scale_digrap.runtime.text import TextError, parse_json

MEET_S = 60.0
"""Longest wait for what all hosts do at the same time, once they have met."""
_POLL_S = 0.05
_MIB = 1 << 20
_MOST = 256 * _MIB
"""Of a block that measures a link."""
_LINK_TIME_S = 0.25
_RETESTS = 8


class PreflightError(ScaleDigrapError):
    """The hosts cannot be compared: nobody listens, or this one lost the others."""


@dataclass(frozen=True)
class Place:
    """This host among the others.

    Attributes:
        rank, nodes: which of how many.
        endpoint: (host, port) where rank 0 listens; None: the store of torchrun's agents.
        hosts: names by rank, where they are known beforehand.
    """

    rank: int
    nodes: int
    endpoint: tuple[str, int] | None
    hosts: tuple[str, ...] | None = None

    @property
    def expected(self) -> list[str]:
        """Names by rank, or numbers."""
        return list(self.hosts) if self.hosts else [f"host {rank} of {self.nodes}" for rank in range(self.nodes)]


def meet(place: Place, join_timeout_s: float) -> Any:
    """The store of all hosts.

    Raises:
        PreflightError: rank 0 cannot listen there, or does not answer in time.
    """
    import torch.distributed as dist

    if place.endpoint is None:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=join_timeout_s)))
        return dist.PrefixStore("preflight", store)
    name, port = place.endpoint
    try:
        if place.rank == 0:
            host, listens = _listen(name, port, place.nodes)
            # From here on the store closes it.
            settings: dict[str, Any] = {"is_master": True, "master_listen_fd": listens.detach()}
        else:
            _knock(place.expected[0], name, port, join_timeout_s)
            host, settings = name, {"is_master": False}
        return dist.TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=MEET_S), **settings)
    except (RuntimeError, OSError) as error:
        text = " ".join(str(error).split())
        raise PreflightError(f"cannot meet at {name}:{port}: {text}") from None


def _listen(name: str, port: int, nodes: int) -> tuple[str, socket.socket]:
    """A socket that listens at the address that the name of rank 0's host means, and at no other interface.

    Where that address is none of this machine's (NAT in front of it, a pod behind a service), it listens at all, and
    says so. A name that means the loopback here means another address to the other hosts (Debian writes the own name
    as 127.0.1.1 into /etc/hosts), unless it is the loopback's own.

    Returns:
        The address to reach it by from here, and the socket.

    Raises:
        PreflightError: the port is taken.
    """
    try:
        addresses = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        addresses = []
    for family, _, _, _, address in addresses:
        if nodes > 1 and _is_loopback(str(address[0])) and not (name == "localhost" or _is_loopback(name)):
            continue
        if (found := _bound(family, address, name)) is not None:
            return str(address[0]), found
    means = ", ".join(dict.fromkeys(str(address[0]) for *_, address in addresses)) or "nothing"
    print(
        f"preflight: {name} means {means} here, which is no address that others reach this machine by: listening on "
        f"port {port} of all its interfaces",
        flush=True,
    )
    everywhere = (socket.AF_INET6, ("::", port)) if socket.has_dualstack_ipv6() else (socket.AF_INET, ("", port))
    listens = _bound(*everywhere, name)
    if listens is None:
        raise PreflightError(f"port {port} of {name} cannot be listened at: this machine has no address")
    return "localhost", listens


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _bound(family: int, address: tuple[Any, ...], name: str) -> socket.socket | None:
    """A listening socket; None: the address is not this machine's."""
    try:
        listens = socket.socket(family, socket.SOCK_STREAM)
    except OSError:  # no IPv6 here
        return None
    try:
        listens.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and address[0] == "::":
            listens.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listens.bind(address)
        listens.listen(1024)
    except OSError as error:
        listens.close()
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return None
        raise PreflightError(
            f"port {address[1]} of {name} cannot be listened at ({error.strerror}): another job? Choose another one "
            f"(rendezvous.port in launch.yaml, or --endpoint)"
        ) from None
    return listens


def _knock(head: str, name: str, port: int, timeout_s: float) -> None:
    """Wait until rank 0 listens; the last reason why it did not is the one that counts."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((name, port), timeout=3).close()
            return
        except socket.gaierror as error:
            reason = f"its name is not known here ({error.strerror}): check DNS or /etc/hosts"
        except ConnectionRefusedError:
            reason = "it is up, but nobody listens there: did the job start on it?"
        except OSError as error:
            reason = f"it does not answer ({error.strerror or error}): is it up, is there a firewall between?"
        if time.monotonic() > deadline:
            raise PreflightError(
                f"{socket.gethostname()} could not reach {head} at {name}:{port} for {timeout_s:.0f} s: {reason}"
            )
        time.sleep(0.2)


SECRET = "SCALE_DIGRAP_SECRET"
"""Variable with what the hosts of one launch share, and nobody else: the port of the store is open to the network."""

UNSIGNED = (
    f"what the hosts tell each other is not signed: give all of them one {SECRET} (`scale-digrap launch` does), or be "
    "alone in the network"
)
"""Said by a preflight of several hosts without it."""


def _seal(key: str, value: Any) -> str:
    text = json.dumps(value)
    return _code(key, text) + text


def _unseal(key: str, data: bytes) -> Any:
    """What a host of this launch has stored under a key.

    Raises:
        PreflightError: somebody else has, or another program.
    """
    try:
        text = data.decode("utf-8")
        code = _code(key, text[_CODE_LENGTH:] if os.environ.get(SECRET) else text)
        if not hmac.compare_digest(text[: len(code)].encode(), code.encode()):
            raise _garbage(key)
        return parse_json(text[len(code) :], key)
    except (UnicodeDecodeError, TextError):
        raise _garbage(key) from None


def _code(key: str, text: str) -> str:
    secret = os.environ.get(SECRET, "")
    return hmac.new(secret.encode(), f"{key}\n{text}".encode(), "sha256").hexdigest() if secret else ""


_CODE_LENGTH = 64


def _garbage(key: str) -> PreflightError:
    return PreflightError(
        f"what stands under {key!r} in the preflight's store does not come from a host of this launch: another program "
        "uses the port, or the hosts were started by different launches. Choose another port (rendezvous.port)"
    )


class Exchange:
    """What the hosts tell each other through the store.

    Args:
        place: this host.
        store: of :func:`meet`.
    """

    def __init__(self, place: Place, store: Any) -> None:
        self.place, self._store = place, store
        self._present = [True] * place.nodes

    def gather(self, key: str, value: Any, wait_s: float = MEET_S) -> list[Any]:
        """Every host's value by rank, on all hosts; None for one that told nothing in time: it is not waited for again.

        Raises:
            PreflightError: rank 0 is gone.
        """
        mine = f"{key}/{self.place.rank}"
        self._store.set(mine, _seal(mine, value))
        if self.place.rank:
            return list(_unseal(f"{key}/all", self._get(f"{key}/all", wait_s + MEET_S)))
        deadline = time.monotonic() + wait_s
        values: list[Any] = [None] * self.place.nodes
        missing = [rank for rank, there in enumerate(self._present) if there]
        while missing and (time.monotonic() < deadline or missing[0] == 0):
            for rank in list(missing):
                if self._store.check([f"{key}/{rank}"]):
                    values[rank] = _unseal(f"{key}/{rank}", self._store.get(f"{key}/{rank}"))
                    missing.remove(rank)
            time.sleep(_POLL_S if missing else 0)
        for rank in missing:
            self._present[rank] = False
        self._store.set(f"{key}/all", _seal(f"{key}/all", values))
        return values

    def leave(self) -> None:
        """Rank 0, which keeps the store, goes last."""
        try:
            self._store.set(f"left/{self.place.rank}", "1")
            deadline = time.monotonic() + 5
            keys = [f"left/{rank}" for rank, there in enumerate(self._present) if there]
            while self.place.rank == 0 and not self._store.check(keys) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        except RuntimeError:
            pass  # torchrun's store may be gone already

    def _get(self, key: str, wait_s: float) -> bytes:
        try:
            self._store.wait([key], timedelta(seconds=wait_s))
            return bytes(self._store.get(key))
        except (RuntimeError, OSError):
            raise PreflightError(
                f"{socket.gethostname()} lost {self.place.expected[0]}, or it told nothing for {wait_s:.0f} s: see its "
                f"output"
            ) from None

    def clocks(self, now: Callable[[], float] = time.time) -> dict[int, tuple[float, float]]:
        """On rank 0: rank → (s ahead of rank 0, uncertainty), from the fastest of three questions. Elsewhere empty."""
        if self.place.rank:
            for number in range(3):
                self._get(f"clock/{self.place.rank}/ask{number}", MEET_S)
                told_key = f"clock/{self.place.rank}/told{number}"
                self._store.set(told_key, _seal(told_key, now()))
            return {}
        found = {}
        for rank in range(1, self.place.nodes):
            answers = []
            for number in range(3):
                before = now()
                self._store.set(f"clock/{rank}/ask{number}", "")
                told_key = f"clock/{rank}/told{number}"
                told = _unseal(told_key, self._get(told_key, MEET_S))
                if not isinstance(told, int | float):
                    raise _garbage(told_key)
                after = now()
                answers.append(((after - before) / 2, told - (before + after) / 2))
            error, skew = min(answers)
            found[rank] = (skew, error)
        return found


def network(place: Place, store: Any, device: str, minimum: float) -> tuple[dict[tuple[int, int], float], float]:
    """Speeds of a ring of links and of an all-reduce; collective over one process per host.

    NCCL between the first GPUs where the run uses GPUs, else gloo.

    Args:
        place, store: of this host.
        device: ``training.device``.
        minimum: links below it (10⁶ bit/s) are measured again, alone.

    Returns:
        Pair of ranks → 10⁶ bit/s there and back, and 10⁶ bytes/s that an all-reduce takes in.

    Raises:
        RuntimeError: torch.distributed's, where hosts cannot be connected.
    """
    import torch
    import torch.distributed as dist

    on_gpu = device != "cpu" and torch.cuda.is_available()
    where = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("network", store),
        rank=place.rank,
        world_size=place.nodes,
        timeout=timedelta(seconds=MEET_S / 2),
        device_id=where if on_gpu else None,
    )
    try:
        links = _ring(place, where)
        for pair in slow_links(links, minimum)[:_RETESTS]:
            # Links are measured side by side; what looks slow gets a second chance alone.
            links[pair] = max(links[pair], _together([pair], _measure(place.rank, [pair], where), where)[pair])
        slowest = min(links.values(), default=8000.0)
        count = int(min(64 * _MIB, max(_MIB, slowest / 8 * 1e6 * _LINK_TIME_S)))
        return links, _all_reduce(count, where)
    finally:
        dist.destroy_process_group()


def _ring(place: Place, where: Any) -> dict[tuple[int, int], float]:
    """Neighbours, in rounds of pairs that have no host in common: as fast for hundreds of hosts as for four."""
    nodes = place.nodes
    pairs = [(rank, rank + 1) for rank in range(nodes - 1)]
    rounds = [pairs[0::2], pairs[1::2], [(0, nodes - 1)] if nodes > 2 else []]
    found: dict[tuple[int, int], float] = {}
    for number in rounds:
        if number:
            found |= _together(number, _measure(place.rank, number, where), where)
    return found


def _together(
    pairs: Sequence[tuple[int, int]], mine: Mapping[tuple[int, int], float], where: Any
) -> dict[tuple[int, int], float]:
    """What each pair has found. Numbers alone go over the network: a pickle of an unknown host would be code."""
    import torch
    import torch.distributed as dist

    speeds = torch.tensor([mine.get(pair, 0.0) for pair in pairs], dtype=torch.float64, device=where)
    dist.all_reduce(speeds)
    found = dict(zip(pairs, speeds.tolist(), strict=True))
    for pair, speed in found.items():
        if not (math.isfinite(speed) and speed > 0):
            raise RuntimeError(f"hosts {pair[0]} and {pair[1]} tell a speed of {speed:g}")
    return found


def _measure(rank: int, pairs: Sequence[tuple[int, int]], where: Any) -> dict[tuple[int, int], float]:
    """What the first of a pair finds: as many bytes there and back as take about a quarter of a second."""
    import torch
    import torch.distributed as dist

    mine = next((pair for pair in pairs if rank in pair), None)
    if mine is None:
        return {}
    first, second = mine
    peer = second if rank == first else first

    def there_and_back(count: int) -> float:
        block = torch.zeros(count, dtype=torch.uint8, device=where)
        _synchronize(where)
        began = time.perf_counter()
        for sends in (True, False) if rank == first else (False, True):
            dist.send(block, peer) if sends else dist.recv(block, peer)
        _synchronize(where)
        return time.perf_counter() - began

    there_and_back(_MIB // 16)  # connects
    rough = there_and_back(_MIB)
    size = torch.tensor([int(min(_MOST, max(_MIB, _MIB * _LINK_TIME_S / rough)))], device=where)
    if rank == first:
        dist.send(size, peer)
    else:
        dist.recv(size, peer)
    if not _MIB <= int(size) <= _MOST:
        raise RuntimeError(f"host {peer} asks for a block of {int(size)} bytes")
    seconds = min(there_and_back(int(size)) for _ in range(2))
    return {mine: 2 * int(size) * 8 / seconds / 1e6} if rank == first else {}


def _all_reduce(count: int, where: Any) -> float:
    import torch
    import torch.distributed as dist

    block = torch.zeros(count // 4, device=where)
    best = float("inf")
    for _ in range(3):
        dist.barrier()
        _synchronize(where)
        began = time.perf_counter()
        dist.all_reduce(block)
        _synchronize(where)
        best = min(best, time.perf_counter() - began)
    return count / best / 1e6


def _synchronize(where: Any) -> None:
    if where.type == "cuda":
        import torch

        torch.cuda.synchronize(where)


def quiet() -> None:
    """Before torch is imported: its store warns of every attempt to connect."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
