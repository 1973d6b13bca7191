"""The command line: ``scale-digrap train | evaluate | report | quickstart | launch | shards | checkpoint | export``.

A subcommand imports what it needs when it runs, so that ``--help`` answers at once. Errors of the package's own are one
line on stderr and exit status 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scale_digrap import __version__
from scale_digrap.errors import RunStopped, ScaleDigrapError
from scale_digrap.runtime import console
from scale_digrap.runtime.secrets import mask
from scale_digrap.runtime.text import home, printable

_GRACE_S = 3.0
_OVERRIDE = re.compile(r"[A-Za-z_][^=\s]*=.*", re.DOTALL)
TRAIN_EXAMPLES = """\
examples:
  scale-digrap train configs/quickstart.yaml
  scale-digrap train configs/quickstart.yaml optimizer.name=adamw optimizer.lr=3e-4
  torchrun --nproc-per-node 8 -m scale_digrap train configs/paligemma_vqav2_lora.yaml training.batch_size=4
  deepspeed --module scale_digrap train configs/paligemma_vqav2_zero3.yaml
"""
EVALUATE_EXAMPLES = """\
examples:
  scale-digrap evaluate configs/evaluate_quickstart.yaml
  torchrun --nproc-per-node 8 -m scale_digrap evaluate configs/evaluate_frames_vqa.yaml batch_size=64
  deepspeed --module scale_digrap evaluate configs/evaluate_frames_vqa.yaml engine.name=deepspeed
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status.

    0: done. 2: an error that the user can put right. Of ``train`` and ``evaluate``, docs/training.md: 75 stopped as
    asked to, go on with the same command; 3 nothing but bad steps; 4 the ranks disagree; 5 a rank was lost. 130:
    interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    console.prepare(
        outlives_readers="--print-config" not in arguments
        and arguments[:1] in (["train"], ["evaluate"], ["quickstart"], ["launch"])
    )
    try:
        try:
            _check_environment()
            parsed = _parse(arguments)
            status = int(parsed.run(parsed) or 0)
            sys.stdout.flush()
        except ScaleDigrapError as error:
            _report(error)
            status = error.exit_status
        return status
    except BrokenPipeError:  # `| head`: who reads has seen enough
        console.give_up(sys.stdout)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _check_environment() -> None:
    """Launchers set these variables to numbers. One that is empty is one that is not set.

    Raises:
        ScaleDigrapError: one is something else.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value = os.environ.get(name)
        if value is not None and not value.strip():
            del os.environ[name]
        elif value is not None and not (value.isascii() and value.strip().isdecimal()):
            raise ScaleDigrapError(f"the variable {name}={value!r} is not a number: unset it, or start under torchrun")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parsed arguments. ``key=value`` may stand anywhere, and ``~`` is expanded in every path."""
    parser = _parser(arguments)
    parsed, others = parser.parse_known_args(arguments)
    given = [word for word in others if _OVERRIDE.fullmatch(word)]
    if len(given) < len(others) or (given and not hasattr(parsed, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(word for word in others if word not in given) or given[0]}")
    if given:
        parsed.overrides = [*parsed.overrides, *given]
    for name, value in vars(parsed).items():
        if isinstance(value, Path):
            setattr(parsed, name, Path(home(str(value))))
        elif isinstance(value, list) and any(isinstance(item, Path) for item in value):
            setattr(parsed, name, [Path(home(str(item))) if isinstance(item, Path) else item for item in value])
    return parsed


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scale-digrap", description="Robust fine-tuning of vision-language models at scale."
    )
    parser.add_argument("--version", action="version", version=f"scale-digrap {__version__}")
    # DeepSpeed's launcher puts it before everything else; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="fine-tune a model as a configuration says, alone or under torchrun or the deepspeed launcher",
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", metavar="CONFIG.yaml", type=Path, help="see configs/ and scale_digrap/config.py")
    train.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace the file's")
    train.add_argument("--print-config", action="store_true", help="print the whole resolved configuration and stop")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="answer and score suites with one or more models, and write a table and a report",
        epilog=EVALUATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("config", metavar="CONFIG.yaml", type=Path, help="see configs/ and docs/evaluation.md")
    evaluate.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace the file's")
    evaluate.add_argument("--print-config", action="store_true", help="print the whole resolved configuration and stop")
    evaluate.set_defaults(run=_evaluate)

    quickstart = commands.add_parser(
        "quickstart",
        help="fine-tune the built-in tiny VLM with DiGraP and with AdamW, compare, and write a report",
        description="With --pretrain: train the built-in tiny VLM from nothing (see quickstart --pretrain --help).",
    )
    _quickstart_arguments(quickstart, arguments)

    report = commands.add_parser("report", help="tables and a page of one evaluation, or of several side by side")
    _report_arguments(report, arguments)

    shards = commands.add_parser("shards", help="write, check, describe and repair data sets of webdataset tar shards")
    _shards_arguments(shards, arguments)

    launch = commands.add_parser(
        "launch", help="start a command on hosts: here, on others by ssh, on Slurm or on Kubernetes; check the hosts"
    )
    _launch_arguments(launch, arguments)

    checkpoint = commands.add_parser("checkpoint", help="list, verify and show a run's checkpoints")
    export = commands.add_parser(
        "export",
        help="write a checkpoint as a Hugging Face model or adapter, mixed with its base where asked (WiSE-FT)",
    )
    _checkpoint_arguments(checkpoint, export, arguments)
    return parser


def _quickstart_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """The quick-start's options, imported only when they are asked for."""
    parser.add_argument("--pretrain", action="store_true", help="pre-train the built-in tiny VLM instead")
    if "quickstart" not in arguments[:1]:
        return
    if "--pretrain" in arguments:
        from scale_digrap.quickstart import pretrain

        pretrain.add_arguments(parser)
        parser.set_defaults(run=pretrain.main)
    else:
        from scale_digrap.quickstart import pipeline

        pipeline.add_arguments(parser)
        parser.set_defaults(run=pipeline.main)


def _report_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """The options of reports, imported only when they are asked for."""
    if "report" not in arguments[:1]:
        return
    from scale_digrap.evaluation import compare

    compare.add_arguments(parser)


def _shards_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """The actions on shards, imported only when they are asked for; easy-VQA is a source of the quick-start's own."""
    if "shards" not in arguments[:1]:
        return
    from scale_digrap.data import shards_cli

    sources = shards_cli.add_arguments(parser)
    easy = sources.add_parser("easy-vqa", help="the quick-start's training set and suites")
    easy.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write to")
    easy.add_argument("--seed", type=int, default=0, help="seed of the choice of samples (default 0)")
    easy.set_defaults(run=_write_easy_vqa)


def _launch_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """The options of ``launch``, imported only when they are asked for."""
    if "launch" not in arguments[:1]:
        return
    from scale_digrap.launch import cli

    cli.add_arguments(parser)


def _checkpoint_arguments(
    checkpoint: argparse.ArgumentParser, export: argparse.ArgumentParser, arguments: Sequence[str]
) -> None:
    """The actions on checkpoints, imported only when they are asked for."""
    if arguments[:1] not in (["checkpoint"], ["export"]):
        return
    from scale_digrap import checkpoint_commands

    checkpoint_commands.add_checkpoint_arguments(checkpoint)
    checkpoint_commands.add_export_arguments(export)


def _train(arguments: argparse.Namespace) -> int:
    from scale_digrap.config import config_to_yaml, load_config, validate_for_training

    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        if _rank() == 0:
            print(config_to_yaml(config), end="")
        return 0
    validate_for_training(config)
    _start_logging()
    from scale_digrap.training.run import run

    run(config)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from scale_digrap.evaluation.evaluate_config import evaluate_config_to_yaml, load_evaluate_config

    config = load_evaluate_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        if _rank() == 0:
            print(evaluate_config_to_yaml(config), end="")
        return 0
    _start_logging()
    from scale_digrap.evaluation.evaluate import run

    out = run(config)
    if _rank() == 0:
        print((out / "table.md").read_text(encoding="utf-8"))
        print(f"report: {out / 'report.html'}")
    return 0


def _start_logging() -> None:
    """Rank 0 tells what happens, the others only what goes wrong; passwords of URLs are told by none."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Masked("%(message)s"))
    logging.basicConfig(level=logging.INFO if _rank() == 0 else logging.WARNING, handlers=[handler])
    for noisy in ("httpx", "torch", "deepspeed", "DeepSpeed", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Masked(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return mask(super().format(record))


def _write_easy_vqa(arguments: argparse.Namespace) -> int:
    from scale_digrap.quickstart.data import build

    data = build(arguments.to, seed=arguments.seed)
    print(f"train: {len(data.train)} shards")
    for name, shards in data.suites.items():
        print(f"suite {name}: {len(shards)} shards")
    return 0


def _report(error: ScaleDigrapError) -> None:
    """One line on stderr. Ranks mostly fail alike, and one voice is enough: the others wait, and if rank 0 fails too,
    torchrun ends them before they speak. An error of one rank alone is told by that rank."""
    rank = _rank()
    if isinstance(error, RunStopped):
        if rank == 0:
            print(f"scale-digrap: {error}", file=sys.stderr, flush=True)
        return
    if rank:
        time.sleep(_GRACE_S)
    where = f" on rank {rank}" if rank else ""
    print(f"scale-digrap: error{where}: {printable(' '.join(str(error).split()))}", file=sys.stderr, flush=True)


def _rank() -> int:
    value = os.environ.get("RANK", "").strip()
    return int(value) if value.isascii() and value.isdecimal() else 0


if __name__ == "__main__":
    sys.exit(main())
