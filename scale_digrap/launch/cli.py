"""``scale-digrap launch``: one configuration, one launch file, any scheduler."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from scale_digrap.launch.plan import (
    NodeContext,
    Plan,
    make_plan,
    masked,
    node_command,
    submit_command,
)
from scale_digrap.launch.spec import LAUNCHERS, PLACES, LaunchError, load_spec
from scale_digrap.launch.workload import COMMANDS, load_workload
from scale_digrap.runtime.secrets import mask
from scale_digrap.runtime.text import home

EXAMPLES = """\
examples:
  scale-digrap launch configs/quickstart.yaml
  scale-digrap launch configs/paligemma_vqav2_lora.yaml run_dir=/shared/run1 --on slurm --dry-run
  scale-digrap launch configs/paligemma_vqav2_zero3.yaml run_dir=/shared/run2 --on hosts --with deepspeed
  scale-digrap launch configs/paligemma_vqav2_lora.yaml run_dir=/shared/run1 --on hosts --check
  scale-digrap launch --command quickstart --on slurm -- --seeds 3

Where and how is in launch.yaml beside CONFIG (--spec names another file); launch/launch.example.yaml shows it,
launch/README.md explains each scheduler.
"""
_BESIDE = "launch.yaml"
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``launch``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="what `scale-digrap COMMAND` takes")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="replace the file's values; of the quick-start its options",
    )
    parser.add_argument("--on", choices=PLACES, default="local", dest="place", help="where to (default local)")
    parser.add_argument(
        "--with",
        choices=LAUNCHERS,
        default="torchrun",
        dest="launcher",
        help="starts the ranks (default torchrun)",
    )
    parser.add_argument("--spec", type=Path, metavar="FILE", help=f"launch file (default: {_BESIDE} beside CONFIG)")
    parser.add_argument("--command", choices=COMMANDS, default="train", help="what is started (default train)")
    parser.add_argument("--dry-run", action="store_true", help="print scripts, environment and commands; start nothing")
    parser.add_argument("--check", action="store_true", help="preflight only: compare the hosts, and say what is wrong")
    parser.add_argument("--submit-only", action="store_true", help="slurm, kubernetes: submit and do not follow")
    parser.set_defaults(run=main)

    # argparse gives all positional words to the first place where some stand; key=value may stand anywhere.
    parse = parser.parse_known_args

    def parse_known_args(words: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        parsed, others = parse(words, namespace)
        parsed.overrides = [*parsed.overrides, *filter(_OVERRIDE.fullmatch, others)]
        return parsed, [word for word in others if not _OVERRIDE.fullmatch(word)]

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]


def main(arguments: argparse.Namespace) -> int:
    """Run ``scale-digrap launch``.

    Returns:
        0 done (or printed, checked, submitted); 75 stopped with a checkpoint; 2 the preflight found something wrong;
        1 failed.

    Raises:
        ScaleDigrapError: anything wrong that can be told before something is started.
    """
    config, overrides = arguments.config and home(arguments.config), list(arguments.overrides)
    if arguments.command == "quickstart":
        config, overrides = "", [*([config] if config else []), *overrides]
    elif config is None:
        raise LaunchError(f"launch --command {arguments.command}: name the configuration")
    spec_file = arguments.spec
    if spec_file is None and config and (beside := Path(config).parent / _BESIDE).is_file():
        spec_file = beside
    spec = load_spec(spec_file)
    workload = load_workload(arguments.command, config, overrides)
    plan = make_plan(spec, workload, arguments.place, arguments.launcher, os.environ)
    if arguments.submit_only and plan.place in ("local", "hosts"):
        raise LaunchError(f"--submit-only is for slurm and kubernetes, not for --on {plan.place}")
    if arguments.dry_run:
        print(describe(plan), end="")
        return 0

    from scale_digrap.launch import hosts, queue, run

    if arguments.check:
        if plan.hosts:
            run.write_files(plan)
            hosts.ready(plan)
        return hosts.preflight(plan)
    if plan.place in ("slurm", "kubernetes"):
        return queue.submit(plan, follow=not arguments.submit_only)
    return run.start(plan)


def describe(plan: Plan) -> str:
    """Every file of a plan and every command, as they would be written and run. Values of secrets are left out."""
    parts = []
    for name, text in plan.files.items():
        place = name if plan.place == "kubernetes" else plan.folder / name  # a manifest is not written anywhere
        parts.append(f"# ===== {place}\n{masked(name, text)}")
    if plan.launcher == "deepspeed" and "hostfile" not in plan.files:
        parts.append(
            f"# ===== {plan.folder / 'hostfile'}\n# a line per host: NAME slots=GPUS, or 2 where it has none\n"
        )
    if plan.place in ("slurm", "kubernetes"):
        commands = [str(submit_command(plan))]
    else:
        hosts = [None] if not plan.hosts or plan.pdsh else plan.hosts
        commands = [str(node_command(plan, NodeContext(rank, host, "START_ID"))) for rank, host in enumerate(hosts)]
    parts.append("# ===== commands\n" + "".join(f"{mask(command)}\n" for command in commands))
    return "\n".join(parts)
