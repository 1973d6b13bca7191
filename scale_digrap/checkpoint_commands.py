"""``scale-digrap checkpoint list | verify | show`` and ``scale-digrap export``."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scale_digrap.runtime.text import one_line
from scale_digrap.training import manifest, run_folder

DAMAGED = 1
"""Exit status of ``checkpoint verify`` when a checkpoint is not whole; 2 is an error in the call."""

_EXAMPLES = """\
examples:
  scale-digrap checkpoint list runs/vqav2
  scale-digrap checkpoint verify runs/vqav2
  scale-digrap checkpoint show runs/vqav2 --step 2000 --layers
"""
_EXPORT_EXAMPLES = """\
examples:
  scale-digrap export runs/vqav2 --to models/vqav2
  scale-digrap export runs/vqav2 --to models/vqav2-wise --step 2000 --wise 0.5 --dtype bfloat16
"""


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions on checkpoints."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    listing = actions.add_parser("list", help="steps, sizes, ages, and what a kill has left behind; reads no tensors")
    _add_run(listing)
    listing.set_defaults(run=list_checkpoints)

    verify = actions.add_parser("verify", help="compare every file with its checksum; exit status 1 if any is wrong")
    _add_run(verify)
    _add_step(verify, "only this one (default: all)")
    verify.set_defaults(run=verify_checkpoints)

    show = actions.add_parser("show", help="what is in a checkpoint: step, versions, tensors, layers")
    _add_run(show)
    _add_step(show, "which one (default: the newest)")
    show.add_argument("--layers", action="store_true", help="one line per layer: elements, optimizer's numbers")
    show.set_defaults(run=show_checkpoint)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``export``."""
    from scale_digrap.data.shards_cli import size

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPORT_EXAMPLES
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="folder of a run (run_dir)")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to create")
    _add_step(parser, "which checkpoint (default: the newest)")
    parser.add_argument(
        "--wise",
        type=float,
        metavar="ALPHA",
        help="WiSE-FT: mix with the pre-trained weights; 0 is the pre-trained model, 1 the trained one",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of a whole model (default: the run's checkpoint.final_dtype)"
    )
    parser.add_argument("--base", metavar="PATH", help="base checkpoint, in place of the run's model.path")
    parser.add_argument(
        "--max-shard-size", type=size, default=size("4G"), metavar="SIZE", help="of one safetensors file (default 4G)"
    )
    parser.set_defaults(run=export_run)


def list_checkpoints(arguments: argparse.Namespace) -> int:
    """``checkpoint list RUN``: exit status 0."""
    rows: list[tuple[str, ...]] = [("step", "written", "samples", "engine", "ranks", "files", "size")]
    damaged: list[str] = []
    for step, path in run_folder.checkpoints(arguments.run_dir):
        files, wrong = manifest.read(path)
        meta = _read_meta(path)
        rows.append(
            (
                str(step),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime)),
                *(str(meta.get(key, "?")) for key in ("samples", "engine", "ranks")),
                str(len(files)) if files else "?",
                human(sum(size for size, _ in files.values())) if files else "?",
            )
        )
        damaged += [f"{path.name} is not whole: {line}" for line in wrong[:1]]
    _print_table(rows)
    for line in damaged:
        print(line)
    for path in run_folder.unfinished(arguments.run_dir):
        print(f"unfinished: {path.name} (the next run of this folder removes it or puts it back)")
    return 0


def verify_checkpoints(arguments: argparse.Namespace) -> int:
    """``checkpoint verify RUN``: exit status 0, or 1 where a checkpoint is not whole."""
    found = run_folder.checkpoints(arguments.run_dir)
    if arguments.step is not None:
        found = [(arguments.step, run_folder.find(arguments.run_dir, arguments.step))]
    status = 0
    for _, path in found:
        wrong = manifest.problems(path)
        if wrong:
            status = DAMAGED
            print(f"{path.name}: NOT WHOLE: {len(wrong)} problem{'s' if len(wrong) > 1 else ''}")
            for line in wrong:
                print(f"  {line}")
        else:
            files, _ = manifest.read(path)
            print(f"{path.name}: whole ({len(files)} files, {human(sum(size for size, _ in files.values()))})")
    return status


def show_checkpoint(arguments: argparse.Namespace) -> int:
    """``checkpoint show RUN``: exit status 0. Tensors are not read, only their sizes."""
    path = run_folder.find(arguments.run_dir, arguments.step)
    from scale_digrap.training.run_state import configured, read_meta

    meta = read_meta(path)
    from scale_digrap.training.stored import StoredState

    state = StoredState(path / run_folder.STATE)
    scalars = state.scalars() if arguments.layers else {}  # before anything is printed: it may be refused
    missing = [what for what, absent in (("frozen weights", meta.frozen), ("anchors", not meta.anchors)) if absent]
    facts = {
        "checkpoint": path,
        "step": meta.step,
        "samples": meta.samples,
        "optimizer": meta.optimizer,
        "written by": f"{meta.engine} on {meta.ranks} rank{'s' if meta.ranks > 1 else ''}",
        "versions": ", ".join(f"{name} {version}" for name, version in meta.versions.items()),
        "base": f"{configured(meta, 'model', 'path')} (fingerprint {meta.base})",
        "left out": f"{' and '.join(missing)}: those of the base" if missing else "nothing",
        "layers": f"{len(state.layers())}",
    }
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {one_line(str(fact))}")
    print()
    rows: list[tuple[str, ...]] = [("tensors", "number", "elements", "dtype", "size")]
    for kind, entries in state.kinds().items():
        dtypes = {str(entry.properties.dtype).removeprefix("torch.") for entry in entries}
        elements = sum(entry.size.numel() for entry in entries)
        size = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in entries)
        rows.append((kind, str(len(entries)), f"{elements:,}", "/".join(sorted(dtypes)), human(size)))
    _print_table(rows)
    if arguments.layers:
        print()
        _print_layers(state, scalars)
    return 0


def export_run(arguments: argparse.Namespace) -> int:
    """``export RUN --to DIR``: exit status 0."""
    run_folder.find(arguments.run_dir, arguments.step)  # a wrong name is told before the seconds that imports take
    from scale_digrap.training.export import export

    done = export(
        arguments.run_dir,
        arguments.to,
        step=arguments.step,
        wise=arguments.wise,
        dtype=arguments.dtype,
        base=arguments.base,
        max_shard_size=arguments.max_shard_size,
    )
    what = "adapter" if done.adapter else "model"
    count = f"{len(done.files)} file{'s' if len(done.files) > 1 else ''}"
    print(f"{done.folder}: {what} of step {done.step}, {done.dtype}, {count}, {human(done.bytes)}")
    if arguments.wise is not None:
        print(f"WiSE-FT: {done.mixed} tensors mixed, {arguments.wise:g} of the trained ones")
    return 0


def human(size: int) -> str:
    """Bytes with a decimal unit."""
    power = min(4, int(math.log10(size)) // 3) if size >= 1 else 0
    return f"{size / 1000**power:.{0 if power == 0 else 1}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="folder of a run (run_dir)")


def _add_step(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--step", type=int, metavar="N", help=text)


def _read_meta(path: Path) -> dict[str, Any]:
    """``trainer.json`` for a list, which shows damaged checkpoints too."""
    from scale_digrap.training.run_state import CheckpointError, read_meta

    try:
        return asdict(read_meta(path))
    except CheckpointError:
        return {}


def _print_layers(state: Any, scalars: dict[str, dict[str, Any]]) -> None:
    names = list(dict.fromkeys(key for values in scalars.values() for key in values))
    rows: list[tuple[str, ...]] = [("layer", "elements", *names)]
    for layer in state.layers():
        elements = state.tensors[f"param.{layer}"].size.numel()
        values = (scalars.get(layer, {}).get(name) for name in names)
        rows.append((layer, f"{elements:,}", *("" if value is None else _number(value) for value in values)))
    _print_table(rows)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _print_table(rows: list[tuple[str, ...]]) -> None:
    """Columns as wide as what is in them; the first is left-aligned."""
    rows = [tuple(one_line(cell) for cell in row) for row in rows]  # names in a checkpoint may hold terminal escapes
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        print("  ".join([f"{first:<{widths[0]}}", *map(str.rjust, others, widths[1:])]))
