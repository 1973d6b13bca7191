"""`scale-digrap quickstart`: data → fine-tuning with every method on two ranks → every suite → table, figures, report.

This process builds the data, starts the ranks and reads what they leave behind; the work of a rank is in `worker.py`.
A rank leaves one file per (method, seed), so a quick-start that was killed, or is asked for more seeds, only does
what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from scale_digrap.config import Config, OptimizerConfig, config_from_dict, config_to_yaml
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation.registry import QUICKSTART
from scale_digrap.evaluation.results import Comparison, Method, MethodRun, environment, write_atomically
from scale_digrap.runtime.lock import FolderLock

WORKER = "scale_digrap.quickstart.worker"
MODEL = "builtin:tiny-vlm"
STEPS = 150
GLOBAL_BATCH = 64
EVALUATION_BATCH = 125
"""Most questions per rank and generation batch."""
MAX_NEW_TOKENS = 2
"""Every answer is one word, and so is its end."""

TRAINED: dict[str, Method] = {
    method.key: method
    for method in (
        Method(key="full-adamw", label="AdamW", family="full", baseline="zero-shot"),
        Method(key="full-digrap", label="DiGraP", family="full", baseline="full-adamw"),
        Method(key="lora-adamw", label="LoRA AdamW", family="lora", baseline="zero-shot"),
        Method(key="lora-digrap", label="LoRA DiGraP", family="lora", baseline="lora-adamw"),
    )
}
ZERO_SHOT = Method(key="zero-shot", label="Zero-shot", family="base")


_PRESENTATION = {
    "caveats.py", "cli.py", "columns.py", "compare.py", "figures.py", "gaussian.py", "layer_plots.py", "page.py",
    "plots.py", "pretrain.py", "report.py", "results.py", "shift.py", "shift_accuracy.py", "statistics.py", "tables.py",
}  # fmt: skip
"""Source files whose changes leave results valid."""


class QuickstartError(ScaleDigrapError):
    """A quick-start that could not be finished."""


@dataclass(kw_only=True)
class Settings:
    """Everything a rank needs to know, handed over as a JSON file."""

    output: str
    """Folder of the report."""
    work: str
    """Folder of results and training runs with exactly these settings."""
    seeds: list[int]
    methods: list[str]
    """Keys of `TRAINED`."""
    steps: int
    model: str
    """The pre-trained model."""
    alpha: float
    """Weight of the fine-tuned model in the WiSE-FT mixture."""
    train: list[str]
    """Shards."""
    suite_samples: int
    """Questions per suite."""
    suites: dict[str, list[str]]
    """Suite name → shards."""
    world_size: int
    device: str
    engine: str = "fsdp"
    """`fsdp` or `deepspeed`."""
    stage: int = 0
    """ZeRO stage; 0 with `fsdp`."""
    fingerprint: str = ""
    """See `fingerprint`."""

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Settings:
        return cls(**json.loads(Path(path).read_text()))


def wise(method: Method) -> Method:
    """The row of a trained method's WiSE-FT mixture."""
    return Method(
        key=f"{method.key}-wise",
        label=f"{method.label} + WiSE-FT",
        family=method.family,
        baseline=method.key,
        variant_of=method.key,
    )


def rows(methods: Sequence[str]) -> list[Method]:
    """Rows of the table: the zero-shot model, then each trained method with its mixture."""
    chosen = [ZERO_SHOT, *(row for key in methods for row in (TRAINED[key], wise(TRAINED[key])))]
    keys = {method.key for method in chosen}
    return [
        method if method.baseline in (None, *keys) else replace(method, baseline=ZERO_SHOT.key) for method in chosen
    ]


def training_config(
    method: str,
    *,
    seed: int = 0,
    steps: int = STEPS,
    world_size: int = 2,
    train: Sequence[str] = ("runs/quickstart/data/train/*.tar",),
    run_dir: str = "runs/quickstart-training",
    model: str = MODEL,
    engine: str = "fsdp",
    stage: int = 0,
) -> Config:
    """The configuration of one fine-tuning run of the quick-start.

    `configs/quickstart.yaml` is this configuration for `full-digrap`, for users to start from.

    Raises:
        QuickstartError: the global batch does not divide over the ranks.
    """
    if GLOBAL_BATCH % world_size:
        raise QuickstartError(f"{world_size} ranks do not divide the quick-start's global batch of {GLOBAL_BATCH}")
    # Learning rates: of {0.5, 1, 2}e-3 (full) and {2, 5, 10}e-3 (LoRA), the smallest with which AdamW comes within half
    # a point of its best on the fine-tuning set's validation split; the same for DiGraP, at the paper's μ = 0.5.
    family, _, optimizer = method.partition("-")
    lora = family == "lora"
    return config_from_dict(
        {
            "run_dir": run_dir,
            "model": {"path": model, "prompt": "{question}"},
            "lora": {"enabled": lora, "rank": 8, "alpha": 16.0},
            "data": {"train": list(train)},
            "optimizer": {"name": optimizer, "lr": 5e-3 if lora else 1e-3},
            "schedule": {
                "name": "cosine",
                "warmup_steps": min(10, steps // 2),
                "warmup_init_ratio": 0.1,
                "min_lr_ratio": 0.1,
            },
            "training": {
                "steps": steps,
                "batch_size": GLOBAL_BATCH // world_size,
                "seed": seed,
                "keep_anchors": True,
            },
            "checkpoint": {"every": 0, "resume": "never", "save_final": False},
            "log": {"layers_every": max(1, steps // 25)},
            "sharding": {"engine": engine, **({"zero": {"stage": stage}} if engine == "deepspeed" else {})},
        }
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scale-digrap quickstart`."""
    parser.add_argument("--seeds", type=_positive, default=1, metavar="N", help="runs per method (default 1)")
    parser.add_argument(
        "--steps", type=_positive, default=None, metavar="N", help=f"fine-tuning steps (default {STEPS})"
    )
    parser.add_argument(
        "--output", type=Path, default=None, metavar="DIR",
        help="where to (default runs/quickstart, runs/quickstart-smoke with --smoke)",
    )  # fmt: skip
    parser.add_argument(
        "--nproc", type=_positive, default=None, metavar="N", help="ranks (default: one per GPU, 2 without a GPU)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=list(TRAINED), default=list(TRAINED), metavar="METHOD",
        help=f"which to train (default: all of {', '.join(TRAINED)})",
    )  # fmt: skip
    parser.add_argument(
        "--suite-samples", type=_positive, default=None, metavar="N", help="questions per suite (default 500)"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps on tiny suites: does everything run?")
    parser.add_argument(
        "--model",
        default=MODEL,
        metavar="PATH",
        help="pre-trained model: a folder that --pretrain wrote (default: ours)",
    )
    parser.add_argument(
        "--engine", choices=["fsdp", "deepspeed"], default="fsdp", help="what shards the training (default fsdp)"
    )
    parser.add_argument(
        "--stage", type=int, choices=[0, 1, 2, 3], default=None, help="ZeRO stage of --engine deepspeed (default 3)"
    )
    parser.add_argument("--fresh", action="store_true", help="repeat runs that are there already")


def main(args: argparse.Namespace) -> int:
    """Run the quick-start.

    Returns:
        The process's exit code: 0, that of the ranks if they failed, or 130 after Ctrl-C.

    Raises:
        ScaleDigrapError: before any rank starts, if data or model are missing or the options make no sense.
    """
    _model(args)  # before there is a folder: a mistyped option leaves nothing behind
    with FolderLock(_output(args), "quick-start"):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    console = Console()
    started = time.perf_counter()
    settings = prepare(args, console)
    prepared = time.perf_counter()
    if args.fresh:
        for path in (Path(settings.work) / "results").glob("*.json"):
            path.unlink()
    done = finished(settings)
    wanted = sum(len(_keys(method)) for method in settings.methods) * len(settings.seeds) + 1
    if len(done) < wanted:
        if done:
            console.print(f"{len(done)} of {wanted} results are there already (--fresh repeats them)")
        code = launch(settings, console)
        if code:
            return code
    else:
        console.print(f"All {wanted} results with these settings are there already (--fresh repeats them)")

    trained = time.perf_counter()
    comparison = collect(settings)
    from scale_digrap.evaluation.report import write_report
    from scale_digrap.evaluation.tables import rich_differences, rich_table

    page = write_report(comparison, settings.output)
    console.print()
    console.print(rich_table(comparison, console))
    console.print(rich_differences(comparison))
    now = time.perf_counter()
    times = f"data {prepared - started:.0f} s, ranks {trained - prepared:.0f} s, report {now - trained:.0f} s"
    console.print(f"\n[bold]{page}[/]", soft_wrap=True)
    console.print(f"{now - started:.0f} s: {times}", style="dim", highlight=False)
    return 0


def _output(args: argparse.Namespace) -> Path:
    return Path(args.output or Path("runs/quickstart-smoke" if args.smoke else "runs/quickstart")).resolve()


def _model(args: argparse.Namespace) -> Path:
    """The folder of the model, with the options checked."""
    from scale_digrap.models.loading import resolve_path

    model = Path(resolve_path(args.model)).resolve()
    if not (model / "config.json").is_file():
        raise QuickstartError(f"--model {args.model}: no config.json in {model}")
    if args.stage is not None and args.engine != "deepspeed":
        raise QuickstartError(f"--stage {args.stage} is a stage of ZeRO: add --engine deepspeed")
    return model


def prepare(args: argparse.Namespace, console: Console) -> Settings:
    """Build the data and decide on every setting."""
    from scale_digrap.quickstart import data

    model = _model(args)  # before the data: a missing model should not cost a minute
    steps = args.steps or (6 if args.smoke else STEPS)
    suite_samples = args.suite_samples or (32 if args.smoke else 500)
    device, world_size = _ranks(args.nproc)
    output = _output(args)
    with console.status("Building the data: easy-VQA with tied colours, six suites"):
        built = data.build(output / "data", suite_samples=suite_samples)
    settings = Settings(
        output=str(output),
        work="",
        seeds=list(range(args.seeds)),
        methods=list(dict.fromkeys(args.methods)),
        steps=steps,
        model=args.model if args.model == MODEL else str(model),
        alpha=0.5,
        train=[str(path) for path in built.train],
        suite_samples=suite_samples,
        suites={name: [str(path) for path in built.suites[name]] for name in QUICKSTART},
        world_size=world_size,
        device=device,
        engine=args.engine,
        stage=(3 if args.stage is None else args.stage) if args.engine == "deepspeed" else 0,
    )
    settings.fingerprint = fingerprint(settings, model)
    settings.work = str(output / "runs" / settings.fingerprint[:12])
    return settings


def fingerprint(settings: Settings, model: Path) -> str:
    """Changes with everything that the numbers depend on besides method and seed: settings, data, weights, code."""
    digest = hashlib.sha256()
    configs = [config_to_yaml(_example(settings, key)) for key in TRAINED]
    digest.update(json.dumps([configs, settings.alpha, settings.device, EVALUATION_BATCH, MAX_NEW_TOKENS]).encode())
    shards = [Path(path) for paths in (settings.train, *settings.suites.values()) for path in paths]
    package = Path(__file__).resolve().parents[1]
    for path in [*shards, *sorted(model.iterdir()), *sorted(package.rglob("*.py"))]:
        if path.is_file() and path.name not in _PRESENTATION:
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def result_folder(settings: Settings) -> Path:
    return Path(settings.work) / "results"


def finished(settings: Settings) -> list[tuple[str, int]]:
    """(method, seed) of the results that are there."""
    wanted = [(ZERO_SHOT.key, settings.seeds[0])]
    wanted += [(key, seed) for seed in settings.seeds for method in settings.methods for key in _keys(method)]
    return [(key, seed) for key, seed in wanted if MethodRun.path(result_folder(settings), key, seed).is_file()]


def collect(settings: Settings) -> Comparison:
    """Put the ranks' results together."""
    runs = [MethodRun.load(MethodRun.path(result_folder(settings), key, seed)) for key, seed in finished(settings)]
    counts = f"{settings.steps} steps of {GLOBAL_BATCH}, {settings.world_size} rank{'s' * (settings.world_size > 1)}"
    if settings.engine == "deepspeed":
        counts += f", ZeRO-{settings.stage}"
    return Comparison(
        methods=rows(settings.methods),
        suites=[QUICKSTART[name].at(shards) for name, shards in settings.suites.items()],
        runs=runs,
        settings={
            "command": " ".join(["scale-digrap", *sys.argv[1:]]),
            **{
                key: value
                for key, value in asdict(settings).items()
                if key not in ("train", "suites", "output", "work")
            },
            "training": {
                key: asdict(_example(settings, key).optimizer)
                if _example(settings, key).optimizer.name == "digrap"
                else _adamw(_example(settings, key).optimizer)
                for key in settings.methods
            },
            "prompt": _example(settings, settings.methods[0]).model.prompt,
            "metric": sorted({QUICKSTART[name].metric for name in settings.suites}),
        },
        environment=environment(),
        title=f"Quick-start: tiny VLM on easy-VQA with tied colours ({counts})",
    )


def launch(settings: Settings, console: Console) -> int:
    """Start the ranks and wait for them.

    Returns:
        0, or the exit code to end with after showing the error of the rank that failed first.
    """
    work = Path(settings.work)
    work.mkdir(parents=True, exist_ok=True)
    path = work / "settings.json"
    settings.save(path)
    errors = work / "errors"
    for old in errors.glob("rank*.txt"):
        old.unlink()
    command = [sys.executable, "-m"]
    if settings.world_size > 1:
        command += ["torch.distributed.run", "--nproc-per-node", str(settings.world_size), "--log-dir", str(errors)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m"]
    process = subprocess.Popen([*command, WORKER, str(path)], env=_environment(settings))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)  # so that `finally` runs
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the ranks have got it too, and end
        process.wait()
        console.print("\nInterrupted. The same command goes on where this one was.", style="yellow")
        return 130
    finally:
        if process.poll() is None:  # this process is about to end, for whatever reason: the ranks must not stay behind
            process.terminate()
            process.wait()
    if code:
        reports = sorted(errors.glob("rank*.txt"), key=lambda report: report.stat().st_mtime_ns)
        text = reports[0].read_text() if reports else "a rank ended without an error message; see above"
        name = reports[0].stem.replace("rank", "Rank ") if reports else "The ranks"
        console.print(f"\n{name} failed:", style="bold red")
        console.print(text.rstrip(), markup=False, highlight=False)
        return code if code > 0 else 128 - code
    return 0


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _environment(settings: Settings) -> dict[str, str]:
    env = dict(os.environ)
    if settings.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
        # One thread per rank: on two cores, two ranks with two threads each are slower than with one each.
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // settings.world_size)))
    interfaces = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in interfaces), None)
    if loopback and settings.world_size > 1:
        env.setdefault("GLOO_SOCKET_IFNAME", loopback)  # one machine: no name resolution, nothing on the network
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    return env


def _ranks(asked: int | None) -> tuple[str, int]:
    """Device and number of ranks."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    world_size = asked or (gpus or 2)
    while asked is None and GLOBAL_BATCH % world_size:
        world_size -= 1
    if gpus and world_size > gpus:
        raise QuickstartError(f"--nproc {world_size}: there are {gpus} GPUs, and a rank needs its own")
    return ("cuda" if gpus else "cpu"), world_size


def _keys(method: str) -> tuple[str, str]:
    return method, wise(TRAINED[method]).key


def _example(settings: Settings, method: str) -> Config:
    """The configuration of a method's runs without what differs between them."""
    return training_config(
        method,
        steps=settings.steps,
        world_size=settings.world_size,
        train=["-"],
        model=settings.model,
        engine=settings.engine,
        stage=settings.stage,
    )


def _adamw(options: OptimizerConfig) -> dict[str, Any]:
    return {
        key: value for key, value in asdict(options).items() if key in ("name", "lr", "betas", "eps", "weight_decay")
    }


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
