"""``scale-digrap shards …``: its arguments. What they do is in `shards_commands`, imported when a command runs."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scale_digrap.runtime.secrets import is_secret_key
from scale_digrap.runtime.text import TextError, home

READER_GONE = 141
"""Exit status where the reader of the output went away first: what a shell gives for SIGPIPE."""

_UNITS = {"k": 10, "m": 20, "g": 30, "t": 40}

EXAMPLES = """\
examples:
  scale-digrap shards write vqa --questions v2_OpenEnded_mscoco_train2014_questions.json \\
      --annotations v2_mscoco_train2014_annotations.json --images train2014 --to shards/vqav2-train
  scale-digrap shards write lavis --annotations vqa_val.json --images coco --to shards/vqav2-val --resize 448
  scale-digrap shards write image-list real_train.txt --images domainnet --to shards/real
  scale-digrap shards validate shards/vqav2-train --decode
  scale-digrap shards repair damaged --to repaired --drop-bad
"""

Subparsers = Any  # argparse's own type is private


def add_arguments(parser: argparse.ArgumentParser) -> Subparsers:
    """Add all actions; returns the sources of ``write``, for those that other rooms of the package add."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    write = actions.add_parser("write", help="write a published data set as shards")
    sources = write.add_subparsers(title="sources", metavar="SOURCE", required=True)
    _add_sources(sources)
    _add_index(actions)
    _add_validate(actions)
    _add_info(actions)
    _add_peek(actions)
    _add_repair(actions)
    return sources


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        from scale_digrap.data import shards_commands

        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding shows what it has no sign for so
                stream.reconfigure(errors="backslashreplace")
        try:
            status = int(getattr(shards_commands, name)(arguments))
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            # Whoever read the output has seen enough (`| head`). Python would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return READER_GONE

    return run


def path(text: str) -> Path:
    """A path of a person's: ``~`` is expanded, also where the shell has not done it (``--to=~/shards``)."""
    try:
        return Path(home(text))
    except TextError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def option(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` for a store: true, false, null and numbers are read as such, all else is text."""
    key, found, value = text.partition("=")
    if not (key and found):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, such as profile=lab")
    if any(is_secret_key(part) for part in key.split(".")):
        raise argparse.ArgumentTypeError(
            f"{key} is a secret, which every user of this machine could read on the command line: put it into the "
            "environment or a profile"
        )
    try:
        plain = json.loads(value)
    except ValueError:
        plain = value
    return key, plain if isinstance(plain, (bool, int, float)) or plain is None else value


def size(text: str) -> int:
    """Bytes: ``500M``, ``1G``, ``65536``."""
    plain = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = _UNITS.get(plain[-1:], 0)
    number = plain[:-1] if unit else plain
    try:
        return int(float(number) * 2**unit)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 65536, 500M or 1.5G") from None


def _add_sources(sources: Subparsers) -> None:
    vqa = sources.add_parser("vqa", help="VQAv2 and its kin: questions and annotations JSON, COCO pictures")
    vqa.add_argument("--questions", nargs="+", required=True, metavar="FILE", type=path)
    vqa.add_argument("--annotations", nargs="+", required=True, metavar="FILE", type=path)
    _add_images(vqa)
    vqa.add_argument(
        "--only", metavar="FILE", type=path, help="JSON list of the question_ids to keep, such as VQA-CE's"
    )
    vqa.add_argument(
        "--derived",
        choices=["edited", "rephrased"],
        help="the questions were made from VQAv2's: edited (IV-VQA, CV-VQA) or rephrased (VQA-Rephrasings)",
    )
    vqa.add_argument("--subset", help="in the pictures' names, such as val2014 (default: as the files say)")
    _add_drop(vqa)
    _add_writing(vqa, "vqa", grouping=True)

    lavis = sources.add_parser("lavis", help="LAVIS annotation lists, such as those of FRAMES-VQA")
    lavis.add_argument("--annotations", nargs="+", required=True, metavar="FILE", type=path)
    _add_images(lavis, "folder that image paths begin in")
    _add_drop(lavis)
    _add_writing(lavis, "lavis", grouping=True)

    textvqa = sources.add_parser("textvqa", help="TextVQA: its JSON, pictures by image_id")
    textvqa.add_argument("--annotations", nargs="+", required=True, metavar="FILE", type=path)
    _add_images(textvqa)
    _add_drop(textvqa)
    _add_writing(textvqa, "textvqa", grouping=True)

    vizwiz = sources.add_parser("vizwiz", help="VizWiz: its JSON, one question a picture")
    vizwiz.add_argument("--annotations", nargs="+", required=True, metavar="FILE", type=path)
    _add_images(vizwiz)
    vizwiz.add_argument("--drop-unanswerable", action="store_true", help="leave such questions out, and count them")
    _add_drop(vizwiz)
    _add_writing(vizwiz, "vizwiz")

    gqa = sources.add_parser("gqa", help="GQA and GQA-OOD: questions JSON, pictures by imageId")
    gqa.add_argument("--questions", nargs="+", required=True, metavar="FILE", type=path)
    _add_images(gqa)
    _add_drop(gqa)
    _add_writing(gqa, "gqa", grouping=True)

    folder = sources.add_parser("image-folder", help="a folder of pictures per class")
    folder.add_argument("folder", metavar="DIR", type=path)
    _add_labelled(folder, "folder names, one per line, in the order of their numbers (default: sorted)")
    _add_writing(folder, "image-folder")

    lists = sources.add_parser("image-list", help="lists of 'path label' lines, such as DomainNet's")
    lists.add_argument("lists", nargs="+", metavar="LIST.txt", type=path)
    _add_images(lists, "folder that paths begin in")
    _add_labelled(lists, "class names, one per line, in the order of their numbers (default: the pictures' folders)")
    _add_writing(lists, "image-list")


def _add_images(parser: argparse.ArgumentParser, text: str | None = None) -> None:
    parser.add_argument("--images", required=True, metavar="DIR", type=path, help=text)


def _add_drop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--drop-incomplete",
        action="store_true",
        help="leave out questions without text or answers, and count them (default: an error)",
    )


def _add_labelled(parser: argparse.ArgumentParser, classes: str) -> None:
    parser.add_argument("--classes", metavar="FILE", type=path, help=classes)
    parser.add_argument("--question", metavar="TEXT", help="of every sample (default: what is in the image)")


def _add_writing(parser: argparse.ArgumentParser, source: str, grouping: bool = False) -> None:
    add = parser.add_argument
    add("--to", type=path, required=True, metavar="DIR", help="folder to write; must be new or empty")
    if grouping:
        add("--group", action="store_true", help="all questions about a picture in one record, which has it once")
    add("--max-count", type=int, metavar="N", help="records in a shard at most (default: no limit)")
    add("--max-size", type=size, default="256M", metavar="SIZE", help="of a shard at most (default 256M)")
    add("--seed", type=int, default=0, help="of the shuffle of all records before they are written (default 0)")
    add("--no-shuffle", action="store_true", help="keep the source's order")
    add("--resize", type=int, metavar="PIXELS", help="reduce larger pictures (default: store every file untouched)")
    add("--resize-side", choices=["shortest", "longest"], default="shortest", help="side that PIXELS is about")
    add("--quality", type=int, default=95, help="of JPEG and WebP pictures that were reduced (default 95)")
    add("--verify", action="store_true", help="decode every picture before it is stored")
    add(
        "--allow-missing",
        type=int,
        default=0,
        metavar="N",
        help="leave out the records of up to N missing or unreadable pictures (default 0: an error)",
    )
    _add_workers(parser)
    parser.set_defaults(run=_command("write"), source=source)


def _add_index(actions: Subparsers) -> None:
    parser = actions.add_parser("index", help="index shards and write their manifest.json")
    parser.add_argument("folder", metavar="DIR", type=path, help="its *.tar make one data set")
    _add_require(parser)
    parser.add_argument(
        "--classes", metavar="FILE", type=path, help="class names to put into the manifest, one per line"
    )
    parser.add_argument("--cache-dir", type=path, metavar="DIR", help="for indexes, where DIR is read-only")
    _add_workers(parser)
    parser.set_defaults(run=_command("index"))


def _add_validate(actions: Subparsers) -> None:
    parser = actions.add_parser(
        "validate",
        help="look for damage; exit status 1 if there is any",
        description="Needs neither an index nor a manifest; where there is a manifest, shards are compared with it.",
    )
    _add_shards(parser)
    parser.add_argument("--decode", action="store_true", help="decode every image too")
    parser.add_argument("--no-checksums", action="store_true", help="do not compare SHA-256 with the manifest")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    _add_require(parser)
    _add_workers(parser)
    parser.set_defaults(run=_command("validate"))


def _add_info(actions: Subparsers) -> None:
    parser = actions.add_parser("info", help="counts, sizes, fields, answers")
    _add_shards(parser)
    parser.add_argument("--json", action="store_true", help="print as JSON")
    _add_workers(parser)
    parser.set_defaults(run=_command("info"))


def _add_peek(actions: Subparsers) -> None:
    parser = actions.add_parser("peek", help="print records")
    _add_shards(parser)
    parser.add_argument("-n", "--count", type=int, default=3, help="records (default 3)")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="records to leave out first")
    parser.add_argument("--key", help="only the record of this key")
    parser.add_argument("--save-image", type=path, metavar="FILE", help="write the first image printed to FILE")
    parser.set_defaults(run=_command("peek"))


def _add_repair(actions: Subparsers) -> None:
    parser = actions.add_parser("repair", help="write new shards without the bad records")
    _add_shards(parser)
    parser.add_argument("--to", type=path, required=True, metavar="DIR", help="new folder; old shards are not touched")
    parser.add_argument(
        "--drop-bad", action="store_true", required=True, help="say that records may be lost; each one is listed"
    )
    parser.add_argument("--no-decode", action="store_true", help="keep images that cannot be decoded")
    _add_require(parser)
    _add_workers(parser)
    parser.set_defaults(run=_command("repair"))


def _add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="folders, tars, patterns, manifest.json or URLs")
    parser.add_argument("--cache-dir", type=path, metavar="DIR", help="where remote shards are fetched to")
    parser.add_argument(
        "--store",
        action="append",
        default=[],
        type=option,
        metavar="KEY=VALUE",
        help="an option of remote stores, such as profile=lab, endpoint_url=https://…, anon=true, "
        "client_kwargs.region_name=… (data.storage_options in a configuration); may be repeated",
    )


def _add_require(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--require",
        default="json",
        metavar="FIELDS",
        help="fields that every record must have, by commas; 'image' is any image (default json)",
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default 0: this one alone)")
