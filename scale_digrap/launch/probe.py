"""What one host tells about itself before a run: versions, environment, GPUs, folder, shards, model, limits, names."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from scale_digrap.config import Config
from scale_digrap.data.errors import DataError
from scale_digrap.data.store import ShardStore
from scale_digrap.data.streams import FetchOptions, TryAgainError, open_stream
from scale_digrap.data.urls import is_local, local_path, show
from scale_digrap.training import manifest
from scale_digrap.training.run_folder import CHECKPOINTS

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "peft", "numpy")
_VARIABLES = (
    "NCCL_", "GLOO_", "OMP_", "MKL_", "KMP_", "CUDA_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH_", "PYTORCH_",
    "DS_", "FI_", "UCX_", "RDMAV_", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "WANDB_", "AWS_", "SCALE_DIGRAP_",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
_OWN_PER_HOST = re.compile(r"CUDA_VISIBLE_DEVICES|TORCHELASTIC_.*|TORCH_CPP_LOG_LEVEL|SCALE_DIGRAP_LAUNCH")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PROXY|CREDENTIAL", re.IGNORECASE)
_TOKEN_WAIT_S = 15.0  # NFS shows another host's new file when its cache of the folder has expired
_REMOTE_SAMPLE = 4
_SHARD_TIMEOUT_S = 15.0


def report(config: Config, environment: Mapping[str, str]) -> dict[str, Any]:
    """All that :func:`scale_digrap.launch.verdict.judge` asks for but the folder, as JSON."""
    gpus = _gpus()
    return {
        "host": socket.gethostname(),
        "versions": versions(gpus),
        "environment": variables(environment),
        "gpus": gpus,
        "visible_gpus": _visible_gpus(),
        "shards": shards(config),
        "model": model(config.model.path),
        "limits": {
            "shm_bytes": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        },
        "network": names(environment),
    }


def versions(gpus: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """Of the interpreter, the packages, CUDA, NCCL and the driver. None: not installed."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["scale_digrap"] = _own_version()
    found["CUDA"] = torch.version.cuda
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    drivers = sorted({gpu["driver"] for gpu in gpus})
    found["NVIDIA driver"] = ", ".join(drivers) or None
    return found


def _own_version() -> str:
    """The version and a digest of the code: hosts may have checked out different commits of one version."""
    import scale_digrap

    package = Path(scale_digrap.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return f"{scale_digrap.__version__} (code {digest.hexdigest()[:8]})"


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that must be the same; of those that may hold a secret, a digest."""
    found = {}
    for name, value in environment.items():
        if name.startswith(_VARIABLES) and not _OWN_PER_HOST.fullmatch(name):
            if _SECRET.search(name):
                value = f"(secret {hashlib.sha256(value.encode()).hexdigest()[:6]})"
            found[name] = value
    return found


def _gpus() -> list[dict[str, Any]]:
    query = "name,memory.total,memory.used,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return gpu_lines(done.stdout) if done.returncode == 0 else []


def gpu_lines(text: str) -> list[dict[str, Any]]:
    """The lines of ``nvidia-smi --query-gpu=name,memory.total,memory.used,driver_version --format=csv,…``."""
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4:
            total, used = (int(field) if field.isdigit() else 0 for field in fields[1:3])
            found.append({"name": fields[0], "memory_mib": total, "used_mib": used, "driver": fields[3]})
    return found


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def shards(config: Config) -> dict[str, Any]:
    """Whether the data can be read: all that is local, a few of what is remote, and what is wrong with the rest."""
    data = config.data
    store = ShardStore(
        cache_dir=None if data.cache_dir is None else Path(data.cache_dir),  # the store expands ~
        timeout_s=min(data.store_timeout_s, _SHARD_TIMEOUT_S),
        retries=1,
        allow_pipe=data.allow_pipe,
        storage_options=data.storage_options,
        cache_shared=data.cache_shared,
        redirect_hosts=data.redirect_hosts,
    )
    sets = {"data.train": data.train} if data.train else {}
    sets |= {f"data.mixture.{name}": source.shards for name, source in data.mixture.items()}
    sets |= {f"evaluation.suites.{name}": suite.shards for name, suite in config.evaluation.suites.items()}
    errors, urls = [], []
    for key, patterns in sets.items():
        try:
            urls += store.expand(patterns)
        except DataError as error:
            errors.append(f"{key}: {error}")
    digest, size = hashlib.sha256(), 0
    for url in urls:
        bytes_ = _local_size(local_path(url), errors) if is_local(url) else 0
        digest.update(f"{Path(url).name if is_local(url) else url} {bytes_}\n".encode())
        size += bytes_
    remote = [url for url in urls if not is_local(url)]
    every = max(1, len(remote) // _REMOTE_SAMPLE)
    errors += filter(None, (_remote_problem(url, store.options) for url in remote[::every][: _REMOTE_SAMPLE + 1]))
    content = f"{len(urls)} files, {size} bytes (digest {digest.hexdigest()[:8]})"
    return {"errors": errors, "content": content, "count": len(urls), "bytes": size}


def _local_size(path: str, errors: list[str]) -> int:
    try:
        with open(path, "rb") as file:
            if len(file.read(512)) < 512:
                errors.append(f"shard {path} is cut off: it has not even a tar header")
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        errors.append(f"shard {path} cannot be read: {error.strerror}")
        return 0


def _remote_problem(url: str, options: FetchOptions) -> str | None:
    try:
        stream = open_stream(url, 0, None, options)
        try:
            return None if stream.read() else f"shard {show(url)} is empty"
        finally:
            stream.close()
    except (DataError, TryAgainError) as error:
        return f"shard {show(url)} cannot be read: {error}"


def model(path: str) -> dict[str, str | None]:
    """Whether the model is there: a folder's files with their sizes, or the hub's cache."""
    folder = model_folder(path)
    if folder is None:
        if path.startswith(("/", "./", "../", "~")):
            return {"content": None, "error": f"model.path {path} is no folder"}
        # A hub id: it can be downloaded, if the hub can be reached.
        return {"content": path, "error": _hub_problem(path)}
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        return {"content": None, "error": f"model.path {path} holds neither config.json nor adapter_config.json"}
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:8]
    return {"content": f"{len(sizes)} files, {sum(sizes.values())} bytes (digest {digest})", "error": None}


def model_folder(path: str) -> Path | None:
    """The folder of a model that is on this host, or None."""
    if path.startswith("builtin:"):
        import scale_digrap

        name = path.partition(":")[2].replace("-", "_")
        folder = Path(scale_digrap.__file__).parent / "quickstart" / name
    else:
        folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    cached = _cached_config(path)
    return None if cached is None else cached.parent


def _cached_config(path: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _hub_problem(path: str) -> str | None:
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
    if offline:
        return f"model.path {path} is not in the hub's cache here, and HF_HUB_OFFLINE is set"
    where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    host = where.partition("://")[2].partition("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or (80 if where.startswith("http:") else 443))), timeout=5).close()
    except OSError as error:
        return f"model.path {path} is not in the hub's cache here, and {host} cannot be reached: {error}"
    return None


def names(environment: Mapping[str, str]) -> dict[str, Any]:
    """This host's own address and its interfaces."""
    interfaces = sorted(name for _, name in socket.if_nameindex())
    missing = {}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
        wanted = environment.get(variable, "")
        # NCCL's are prefixes, all but "^prefix" (not these) and "=name"; gloo's are names.
        exact = variable != "NCCL_SOCKET_IFNAME" or wanted.startswith("=")
        choices = [name for name in wanted.lstrip("=").split(",") if name]
        fits = any(name == choice if exact else name.startswith(choice) for name in interfaces for choice in choices)
        if choices and not wanted.startswith("^") and not fits:
            missing[variable] = wanted
    try:
        own: str | None = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = None
    return {
        "own_address": own,
        "interfaces": interfaces,
        "interface_given": bool(environment.get("GLOO_SOCKET_IFNAME")),
        "no_such_interface": missing,
    }


class SharedFolder:
    """Proof that ``run_dir`` is one folder: every host leaves a file in it, and looks for that of the first.

    Args:
        run_dir: the folder; made where it is missing, and removed again if it stays empty.
        rank: of this host.
        token: what the first host has drawn; the same on all.
    """

    def __init__(self, run_dir: str, rank: int, token: str) -> None:
        self.path = Path(run_dir).absolute()
        self._rank, self._token = rank, token
        self.error: str | None = None
        try:
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._file(rank).write_text(token)
        except OSError as error:
            self.error = f"cannot be written to: {error.strerror}"

    def _file(self, rank: int) -> Path:
        return self.path / f".preflight-{self._token}-{rank}"

    def look(self, wait_s: float = _TOKEN_WAIT_S) -> dict[str, Any]:
        """What this host has to tell, once all have written; the first host's file is the one to be seen."""
        deadline = time.monotonic() + wait_s
        sees = self._sees_first()
        while not sees and self.error is None and time.monotonic() < deadline:
            time.sleep(0.1)
            sees = self._sees_first()
        return {
            "path": str(self.path),
            "error": self.error,
            "sees_first": sees,
            "free_bytes": shutil.disk_usage(self.path).free if self.path.is_dir() else None,
        }

    def _sees_first(self) -> bool:
        try:
            return self._file(0).read_text() == self._token
        except OSError:
            return False

    def remove(self) -> None:
        """Take this host's file away."""
        try:
            self._file(self._rank).unlink(missing_ok=True)
            if self._rank == 0 and self._made:
                self.path.rmdir()
        except OSError:
            pass  # not empty, or not ours


def checkpoint_bytes(config: Config) -> int | None:
    """Room that the run's checkpoints and its final model will take besides what is there; None: not known.

    A checkpoint holds fp32 weights and two fp32 moments of what is trained, and DiGraP's anchors. One more than are
    kept is on disk while the next is written. The size is that of the newest checkpoint where the run has one.
    """
    there = manifest.checkpoints(Path(config.run_dir) / CHECKPOINTS)
    weights = _weights(config.model.path)
    final = 0
    if config.checkpoint.save_final and weights and not config.lora.enabled:
        final = sum(count for count, _, _ in weights.values()) * (
            4 if config.checkpoint.final_dtype == "float32" else 2
        )
    if there:
        sizes = [sum(entry[0] for entry in manifest.read(path)[0].values()) for _, path in there]
        one, present = sizes[-1], sum(sizes)
    else:
        state = _state_bytes(config, weights)
        if state is None:
            return None
        one, present = state, 0
    number = config.checkpoint.keep + 1 if config.checkpoint.every else 1  # a stop writes one in any case
    return max(0, number * one - present) + final


def _state_bytes(config: Config, weights: Mapping[str, tuple[int, Sequence[int], str]]) -> int | None:
    trained, anchors = 0, 0
    anchored = config.optimizer.name != "adamw" and config.checkpoint.anchors and config.optimizer.anchor != "none"
    for name, (count, shape, dtype) in weights.items():
        module = name.removesuffix(".weight")
        if config.lora.enabled:
            if len(shape) == 2 and any(re.search(pattern, module) for pattern in config.lora.targets):
                trained += config.lora.rank * sum(shape)
            if any(re.search(pattern, module) for pattern in config.lora.train):
                trained += count
        elif not any(re.search(pattern, name) for pattern in config.model.freeze):
            trained += count
            if anchored:
                anchors += count * (2 if dtype == "BF16" and config.optimizer.anchor_dtype != "float32" else 4)
    return trained * 12 + anchors if trained else None


def _weights(path: str) -> dict[str, tuple[int, Sequence[int], str]]:
    """Name → (number of elements, shape, dtype), from the headers of safetensors files."""
    folder = model_folder(path)
    found = {}
    for file in sorted(glob.glob(f"{glob.escape(str(folder))}/*.safetensors")) if folder else []:
        try:
            with open(file, "rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        except (OSError, ValueError):
            continue
        for name, entry in header.items():
            if name != "__metadata__":
                count = 1
                for size in entry["shape"]:
                    count *= size
                found[name] = (count, entry["shape"], entry["dtype"])
    return found
