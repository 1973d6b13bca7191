"""What ``scale-digrap shards …`` does. Results go to standard output, progress and warnings to standard error."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from scale_digrap.data import describe
from scale_digrap.data.describe import as_json, save_image, shard_figures
from scale_digrap.data.errors import DataError
from scale_digrap.data.index import Manifest, index_shards
from scale_digrap.data.listing import shards_in
from scale_digrap.data.repair import REPORT_NAME, repair_shards
from scale_digrap.data.sources.gqa import read_gqa
from scale_digrap.data.sources.labelled import QUESTION, read_classes, read_image_folder, read_image_lists
from scale_digrap.data.sources.lavis import read_lavis
from scale_digrap.data.sources.records import Source
from scale_digrap.data.sources.textvqa import read_textvqa
from scale_digrap.data.sources.vizwiz import read_vizwiz
from scale_digrap.data.sources.vqa import read_vqa
from scale_digrap.data.store import MANIFEST_NAME, ShardStore
from scale_digrap.data.validate import ShardReport, find_shards, validate_shards
from scale_digrap.data.writing import RECORD_NAME, write_source
from scale_digrap.data.written import WriteOptions
from scale_digrap.runtime.text import printable

DAMAGED = 1
"""Exit status of ``validate`` when something is wrong with the shards; 2 is an error in the call."""

_SHOWN = 20


def write(arguments: argparse.Namespace) -> int:
    """``write SOURCE``: exit status 0."""
    options = WriteOptions(
        max_count=arguments.max_count,
        max_size=arguments.max_size,
        shuffle_seed=None if arguments.no_shuffle else arguments.seed,
        resize=arguments.resize,
        resize_side=arguments.resize_side,
        quality=arguments.quality,
        verify=arguments.verify,
        allow_missing=arguments.allow_missing,
    )
    options.check()
    source = _source(arguments)
    written = write_source(source, arguments.to, options, workers=arguments.workers, progress=sys.stderr.isatty())
    if written.resumed:
        print(f"went on after {written.resumed} shards that an interrupted call had finished")
    print(
        f"{arguments.to}: {len(written.shards)} shards, {written.records} records, {written.samples} samples, "
        f"{_human(written.bytes)}"
    )
    for note in source.notes:
        print(printable(f"left out: {note}"))
    if source.left_out:
        print(f"left out: {', '.join(f'{count} questions {reason}' for reason, count in source.left_out.items())}")
    if written.left_out:
        images = len({one["image"] for one in written.left_out})
        print(
            f"left out: {len(written.left_out)} records, for {images} missing or unreadable images "
            f"(listed in {arguments.to / RECORD_NAME})"
        )
    return 0


def index(arguments: argparse.Namespace) -> int:
    """``index DIR``: exit status 0."""
    if not arguments.folder.is_dir():
        raise DataError(f"no such folder: {arguments.folder}")
    paths = shards_in(arguments.folder)
    if not paths:
        raise DataError(f"{arguments.folder} holds no *.tar")
    manifest = index_shards(
        paths,
        workers=arguments.workers,
        cache_dir=arguments.cache_dir,
        require=_required(arguments),
        progress=sys.stderr.isatty(),
    )
    place = arguments.folder / MANIFEST_NAME
    if arguments.classes is not None:
        manifest.classes = read_classes(arguments.classes)
    elif place.is_file():
        manifest.classes = Manifest.load(place).classes
    try:
        manifest.save(place)
    except OSError as error:
        raise DataError(f"cannot write {place}: {error.strerror}") from None
    total = sum(entry.bytes for entry in manifest.shards)
    print(f"{place}: {len(manifest.shards)} shards, {manifest.samples} samples, {_human(total)}")
    return 0


def validate(arguments: argparse.Namespace) -> int:
    """``validate``: exit status 0, or `DAMAGED`."""
    store = _store(arguments)
    reports = validate_shards(
        find_shards(arguments.shards, store),
        store,
        decode=arguments.decode,
        checksums=not arguments.no_checksums,
        require=_required(arguments),
        workers=arguments.workers,
        progress=sys.stderr.isatty(),
    )
    bad = [report for report in reports if not report.ok]
    if arguments.json:
        summary = {"ok": not bad, "shards": [{**asdict(report), "ok": report.ok} for report in reports]}
        print(json.dumps(summary, indent=1))
    else:
        _print_findings(bad)
        _print_notes(reports)
        samples, total = sum(report.samples for report in reports), sum(report.bytes for report in reports)
        checked = f"{len(reports)} shards, {samples} samples, {_human(total)}"
        print(f"{checked}: {'all whole' if not bad else f'{len(bad)} shards with damage'}")
    return DAMAGED if bad else 0


def _print_findings(bad: Sequence[ShardReport]) -> None:
    for report in bad:
        if report.damage is not None:
            place = "" if report.offset is None else f", byte {report.offset}"
            print(printable(f"{report.shard}{place}: {report.damage}"))
        for record in report.bad[:_SHOWN]:
            print(printable(f"{report.shard}, byte {record.offset}: sample {record.key!r}: {record.problem}"))
        if len(report.bad) > _SHOWN:
            print(f"{report.shard}: and {len(report.bad) - _SHOWN} more bad samples (--json lists all)")


def _print_notes(reports: Sequence[ShardReport]) -> None:
    """What a loader leaves out: alike in many shards, so the same note is printed once, with their number."""
    shards: dict[str, list[str]] = {}
    for report in reports:
        for note in report.notes:
            shards.setdefault(note, []).append(report.shard)
    for note, names in list(shards.items())[:_SHOWN]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(printable(f"{names[0]}{more}: {note}"))
    if len(shards) > _SHOWN:
        print(f"and {len(shards) - _SHOWN} more notes (--json lists all)")


def info(arguments: argparse.Namespace) -> int:
    """``info``: exit status 0."""
    store = _store(arguments)
    shards = find_shards(arguments.shards, store)
    figures = shard_figures(shards, store, workers=arguments.workers, progress=sys.stderr.isatty())
    content = figures.as_dict()
    if arguments.json:
        print(json.dumps(content, indent=1))
        return 0
    print(f"shards     {figures.shards}, {_human(figures.bytes)}")
    print(f"records    {figures.records}")
    print(f"samples    {figures.samples}")
    for name, count in content["fields"].items():
        print(printable(f".{name:<9} {count} records, {figures.field_bytes[name] / count:,.0f} bytes on average"))
    print(f"images     {_counts(content['images'])} (images in a record: records)")
    if figures.ignored:
        print(f"ignored    {figures.ignored} members that belong to no record")
    questions = sum(figures.answers.values())
    if questions:
        print(f"questions  {figures.question_words / questions:.1f} words on average")
        print(f"answers    {_counts(content['answers_per_question'])} (answers to a question: questions)")
        print(f"different  {content['different_answers']} (most frequent answer of each question); the first ones:")
        for answer, count in list(content["top_answers"].items())[:10]:
            print(printable(f"           {answer}: {count} ({count / questions:.1%})"))
    for name, counts in content["types"].items():
        print(printable(f"{name:<10} {_counts(counts)}"))
    if figures.classes:
        ends = sorted(figures.classes.values())
        print(f"classes    {len(figures.classes)}, {ends[0]} to {ends[-1]} records each")
    return 0


def peek(arguments: argparse.Namespace) -> int:
    """``peek``: exit status 0."""
    if arguments.count < 1 or arguments.skip < 0:
        raise DataError(f"peek needs --count ≥ 1 and --skip ≥ 0, got {arguments.count} and {arguments.skip}")
    store = _store(arguments)
    found = describe.peek(
        find_shards(arguments.shards, store), store, count=arguments.count, skip=arguments.skip, key=arguments.key
    )
    if not found:
        raise DataError(f"no record {f'of key {arguments.key!r}' if arguments.key else f'after {arguments.skip}'}")
    for record, _ in found:
        print(printable(f"{record.shard}: {record.key}"))
        for image in record.images:
            seen = image.get("error") or f"{image['width']} × {image['height']}"
            print(printable(f"  .{image['field']}: {seen}, {image['bytes']} bytes"))
        for name, length in record.other.items():
            print(printable(f"  .{name}: {length} bytes"))
        if record.label is not None:
            print(f"  .cls: {record.label}")
        if record.json is not None:
            print("  .json: " + as_json(record.json).replace("\n", "\n  "))
    if arguments.save_image is not None:
        data = next((images[0] for _, images in found if images), None)
        if data is None:
            raise DataError("none of the records printed has an image to save")
        save_image(data, arguments.save_image)
    return 0


def repair(arguments: argparse.Namespace) -> int:
    """``repair --drop-bad``: exit status 0."""
    store = _store(arguments)
    repairs = repair_shards(
        find_shards(arguments.shards, store),
        store,
        arguments.to,
        require=_required(arguments),
        decode=not arguments.no_decode,
        workers=arguments.workers,
        progress=sys.stderr.isatty(),
    )
    if all(repair.whole for repair in repairs):
        print(f"{len(repairs)} shards, nothing wrong with them; nothing written")
        return 0
    for repair in repairs:
        for stretch in repair.stretches:
            print(printable(f"{repair.shard}, byte {stretch.offset}: {stretch.size} bytes cannot be read"))
        for record in repair.dropped[:_SHOWN]:
            print(printable(f"{repair.shard}, byte {record.offset}: dropped {record.key!r}: {record.problem}"))
        if len(repair.dropped) > _SHOWN:
            print(f"{repair.shard}: and {len(repair.dropped) - _SHOWN} more dropped")
        if not repair.kept:
            print(f"{repair.shard}: nothing left, left out")
    kept, dropped = sum(repair.kept for repair in repairs), sum(len(repair.dropped) for repair in repairs)
    print(f"{arguments.to}: {kept} records kept, {dropped} dropped (listed in {arguments.to / REPORT_NAME})")
    return 0


def _source(arguments: argparse.Namespace) -> Source:
    if arguments.source == "vqa":
        return read_vqa(
            arguments.questions,
            arguments.annotations,
            arguments.images,
            grouped=arguments.group,
            only=arguments.only,
            derived=arguments.derived,
            subset=arguments.subset,
            drop_incomplete=arguments.drop_incomplete,
        )
    if arguments.source == "vizwiz":
        return read_vizwiz(
            arguments.annotations,
            arguments.images,
            drop_unanswerable=arguments.drop_unanswerable,
            drop_incomplete=arguments.drop_incomplete,
        )
    if arguments.source in ("lavis", "textvqa", "gqa"):
        read = {"lavis": read_lavis, "textvqa": read_textvqa, "gqa": read_gqa}[arguments.source]
        files = arguments.questions if arguments.source == "gqa" else arguments.annotations
        return read(files, arguments.images, grouped=arguments.group, drop_incomplete=arguments.drop_incomplete)
    question = arguments.question if arguments.question is not None else QUESTION
    if arguments.source == "image-folder":
        return read_image_folder(arguments.folder, question=question, classes=arguments.classes)
    return read_image_lists(arguments.lists, arguments.images, question=question, classes=arguments.classes)


def _store(arguments: argparse.Namespace) -> ShardStore:
    options: dict[str, Any] = {}
    for key, value in arguments.store:
        *outer, last = key.split(".")
        inner = options
        for name in outer:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise DataError(f"--store {key}: {name} was given a value of its own")
        inner[last] = value
    return ShardStore(cache_dir=arguments.cache_dir, storage_options=options)


def _required(arguments: argparse.Namespace) -> list[str]:
    return [name.strip().lower().lstrip(".") for name in arguments.require.split(",") if name.strip()]


def _counts(counts: dict[Any, int]) -> str:
    shown = [f"{name}: {count}" for name, count in list(counts.items())[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else "")


def _human(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} TiB"
