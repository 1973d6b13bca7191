"""The quick-start's data sets as shards: a biased fine-tuning set, six suites, and validation sets to tune on.

| set | pictures | questions |
|---|---|---|
| train | easy-VQA train, colour tied to shape (`easyvqa.TIES`), nine tenths | all, three quarters yes/no |
| suite `id` | easy-VQA test, tied | easy-VQA's own |
| suite `vision` | the same as `id`, turned, on dark noise | the same as `id` |
| suite `question` | the same as `id` | the same, paraphrased (half known from pre-training, half from nowhere) |
| suite `answer` | easy-VQA test, ties broken | easy-VQA's own |
| suite `multimodal` | the same as `answer`, turned, on dark noise | the same as `answer`, paraphrased |
| suite `far` | generated scenes | counting and position, half each: asked in pre-training only |
| validation `id` | easy-VQA train, tied, the remaining tenth | a random sample |
| validation `scenes` | generated scenes | all types of pre-training |

The same questions are in `id`, `vision` and `question`, and in `answer` and `multimodal`: columns differ by the shift
alone. The five easy-VQA suites hold equally many yes/no, shape and colour questions; at their natural share of three
quarters, the yes/no questions, half of them right by chance, would hide what happens to the others.
Hyper-parameters may be tuned on the validation sets, never on the suites. Everything follows from `seed`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from scale_digrap.data.sample import VqaSample
from scale_digrap.data.shards import write_shards
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.quickstart import easyvqa
from scale_digrap.quickstart.easyvqa import EasyImage, EasyQuestion
from scale_digrap.quickstart.scenes import ask, draw_scene, render

SUITE_NAMES = ("id", "vision", "question", "answer", "multimodal", "far")
VALIDATION_NAMES = ("id", "scenes")
_SETTINGS = "settings.json"
_FORMAT = 2
"""Raised when the same settings would give other samples, so that old folders are rebuilt."""

_STREAM_NAMES = ("split", "train", "choose", "vision", "words", "far", "scenes", "held-out")
_STREAMS = {name: index for index, name in enumerate(_STREAM_NAMES)}


class QuickstartDataError(ScaleDigrapError):
    """The quick-start's data cannot be built as asked."""


@dataclass(frozen=True)
class QuickstartData:
    """Shards of every set. `suites` and `validation` map names (`SUITE_NAMES`, `VALIDATION_NAMES`) to paths."""

    folder: Path
    train: list[Path]
    suites: dict[str, list[Path]]
    validation: dict[str, list[Path]]
    counts: dict[str, dict[str, int]]
    """Set (``train``, ``suites/id``, …) → question type → samples."""


def build(
    folder: str | Path, seed: int = 0, train_samples: int | None = None, suite_samples: int = 500
) -> QuickstartData:
    """Write the quick-start's shards, or reuse a finished folder with the same settings.

    The folder appears complete or not at all. One built with other settings is replaced.

    Args:
        folder: where to; its parent is created.
        seed: decides every choice.
        train_samples: size of the fine-tuning set; None for all questions about tied pictures.
        suite_samples: size of each suite and each validation set.

    Raises:
        QuickstartDataError: more samples asked for than there are, or a folder that holds something else.
        easyvqa.EasyVqaError: the package easy-vqa is missing.
    """
    if suite_samples < 1 or (train_samples is not None and train_samples < 1):
        raise QuickstartDataError(
            f"every set needs at least one sample, got train_samples={train_samples}, suite_samples={suite_samples}"
        )
    folder = Path(folder)
    settings = {
        "format": _FORMAT,
        "seed": seed,
        "train_samples": train_samples,
        "suite_samples": suite_samples,
        "easy_vqa": _easy_vqa_version(),
    }
    finished = _finished(folder, settings)
    if finished is not None:
        return finished
    if folder.exists() and any(folder.iterdir()) and not (folder / _SETTINGS).is_file():
        raise QuickstartDataError(
            f"{folder} holds files that are not the quick-start's (no {_SETTINGS}): choose another folder or empty it"
        )

    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        files: dict[str, list[str]] = {}
        counts: dict[str, dict[str, int]] = {}
        for name, samples in _sets(seed, train_samples, suite_samples):
            files[name] = [str(path.relative_to(unfinished)) for path in write_shards(samples, unfinished / name)]
            counts[name] = _count_types(samples)
        content = {"settings": settings, "files": files, "counts": counts}
        (unfinished / _SETTINGS).write_text(json.dumps(content, indent=2) + "\n")
        _swap_in(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    built = _finished(folder, settings)
    if built is None:
        raise QuickstartDataError(f"{folder} was replaced while it was built: build into a folder of your own")
    return built


def _easy_vqa_version() -> str:
    try:
        return metadata.version("easy-vqa")
    except metadata.PackageNotFoundError:
        return "unknown"  # `easyvqa.load` says what to install, if the module is missing too


def _finished(folder: Path, settings: dict) -> QuickstartData | None:
    """The data in `folder` if it is complete and was built with these settings."""
    try:
        content = json.loads((folder / _SETTINGS).read_text())
        if content["settings"] != settings:
            return None
        paths = {name: [folder / file for file in files] for name, files in content["files"].items()}
        if not all(path.is_file() for shards in paths.values() for path in shards):
            return None
        return QuickstartData(
            folder=folder,
            train=paths["train"],
            suites={name: paths[f"suites/{name}"] for name in SUITE_NAMES},
            validation={name: paths[f"validation/{name}"] for name in VALIDATION_NAMES},
            counts=content["counts"],
        )
    except (OSError, ValueError, KeyError):
        return None


def _swap_in(unfinished: Path, folder: Path) -> None:
    """Put the finished folder in its place; an older one of ours makes room."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not (folder / _SETTINGS).is_file():  # else another process was faster; the caller checks what it built
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _count_types(samples: Sequence[VqaSample]) -> dict[str, int]:
    types = [sample.extra["question_type"] for sample in samples]
    return {name: types.count(name) for name in sorted(set(types))}


def _rng(seed: int, stream: str, *more: int) -> np.random.Generator:
    """An own generator per purpose (and item): no set changes because another one drew more numbers."""
    return np.random.default_rng([seed, _STREAMS[stream], *more])


def _sets(seed: int, train_samples: int | None, suite_samples: int) -> Iterator[tuple[str, list[VqaSample]]]:
    """Every set with its samples, in a fixed order."""
    tied = [image for image in easyvqa.load("train").images if image.tied]
    order = _rng(seed, "split").permutation(len(tied))
    held_out = len(tied) // 10
    validation, train = [tied[i] for i in sorted(order[:held_out])], [tied[i] for i in sorted(order[held_out:])]
    train_questions = _questions(train)
    if train_samples is not None:
        train_questions = _subset(train_questions, train_samples, _rng(seed, "train"), "train")
    yield "train", [_plain(image, question) for image, question in train_questions]

    test = easyvqa.load("test").images
    suites = (
        ("id", [image for image in test if image.tied], ("id", "vision", "question")),
        ("answer", [image for image in test if not image.tied], ("answer", "multimodal")),
    )
    for number, (base, images, names) in enumerate(suites):
        chosen = _balanced(_questions(images), suite_samples, _rng(seed, "choose", number), base)
        for name in names:
            yield f"suites/{name}", [_SHIFTS[name](image, question, seed) for image, question in chosen]
    yield "suites/far", scene_samples("far", suite_samples, seed, ("count", "position"))

    chosen = _subset(_questions(validation), suite_samples, _rng(seed, "choose", 2), "validation id")
    yield "validation/id", [_plain(image, question) for image, question in chosen]
    yield "validation/scenes", scene_samples("scenes", suite_samples, seed, (None,))


Pair = tuple[EasyImage, EasyQuestion]


def _questions(images: Sequence[EasyImage]) -> list[Pair]:
    return [(image, question) for image in images for question in image.questions]


def _subset(pairs: list[Pair], number: int, rng: np.random.Generator, name: str) -> list[Pair]:
    """`number` random pairs, in their old order."""
    if number > len(pairs):
        raise QuickstartDataError(f"{name}: {number} samples asked for, there are {len(pairs)}")
    return [pairs[i] for i in np.sort(rng.choice(len(pairs), number, replace=False))]


def _balanced(pairs: list[Pair], number: int, rng: np.random.Generator, name: str) -> list[Pair]:
    """`number` pairs with equally many of each question type; the first types get the remainder."""
    types = ("yes/no", "shape", "colour")
    chosen: list[Pair] = []
    for index, question_type in enumerate(types):
        wanted = number // len(types) + (index < number % len(types))
        members = [pair for pair in pairs if pair[1].question_type == question_type]
        if wanted > len(members):
            raise QuickstartDataError(
                f"suite {name}: {wanted} {question_type} questions asked for, easy-VQA's test set has {len(members)}; "
                f"suite_samples can be at most {len(types) * len(members)}"
            )
        chosen += _subset(members, wanted, rng, name)
    return sorted(chosen, key=lambda pair: pair[1].index)


def _sample(
    image: EasyImage, question: EasyQuestion, picture: Image.Image | bytes, text: str, **extra: str
) -> VqaSample:
    identity = f"{image.split}-{question.index:05d}"
    return VqaSample(
        key=identity,
        image=picture,
        question=text,
        answers=[question.answer],
        question_id=identity,
        extra={
            "image_id": f"{image.split}-{image.image_id}",
            "question_type": question.question_type,
            "family": question.family,
            **extra,
        },
    )


def _plain(image: EasyImage, question: EasyQuestion, seed: int = 0) -> VqaSample:
    return _sample(image, question, image.path.read_bytes(), question.text)


def _vision(image: EasyImage, question: EasyQuestion, seed: int) -> VqaSample:
    # One generator per picture: every question about it shows the same shifted picture.
    return _sample(image, question, easyvqa.shift_vision(image, _rng(seed, "vision", image.image_id)), question.text)


def _question(image: EasyImage, question: EasyQuestion, seed: int) -> VqaSample:
    text, kind = easyvqa.paraphrase(question, _rng(seed, "words", question.index))
    return _sample(image, question, image.path.read_bytes(), text, phrasing=kind)


def _multimodal(image: EasyImage, question: EasyQuestion, seed: int) -> VqaSample:
    text, kind = easyvqa.paraphrase(question, _rng(seed, "words", question.index))
    picture = easyvqa.shift_vision(image, _rng(seed, "vision", image.image_id))
    return _sample(image, question, picture, text, phrasing=kind)


_SHIFTS: dict[str, Callable[[EasyImage, EasyQuestion, int], VqaSample]] = {
    "id": _plain,
    "vision": _vision,
    "question": _question,
    "answer": _plain,
    "multimodal": _multimodal,
}


def scene_samples(stream: str, number: int, seed: int = 0, types: Sequence[str | None] = (None,)) -> list[VqaSample]:
    """Generated scenes with one question each, none of which pre-training has drawn.

    Args:
        stream: ``far``, ``scenes`` or ``held-out``: independent sets of scenes.
        number: how many.
        seed: with `stream`, decides them all.
        types: question types that take turns; None is any.
    """
    # Pre-training seeds its generators with two numbers, this one has three: the streams never meet.
    rng = _rng(seed, stream, 1)
    samples: list[VqaSample] = []
    while len(samples) < number:
        scene = draw_scene(rng)
        asked = ask(scene, rng, question_type=types[len(samples) % len(types)])
        if asked is None:
            continue
        pixels, _ = render(scene, rng)
        identity = f"{stream}-{len(samples):05d}"
        extra = {"image_id": identity, "question_type": asked.question_type, "family": asked.family}
        samples.append(VqaSample(identity, Image.fromarray(pixels), asked.question, [asked.answer], identity, extra))
    return samples


def easy_samples(split: easyvqa.Split, number: int, seed: int = 0) -> list[VqaSample]:
    """A random sample of easy-VQA's questions in its own words, at their natural mix, tied or not."""
    pairs = _questions(easyvqa.load(split).images)
    return [_plain(*pair) for pair in _subset(pairs, number, _rng(seed, "choose", 3), f"easy-VQA {split}")]


def digest(paths: Sequence[Path]) -> str:
    """SHA-256 over shards in order: equal digests mean equal data."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(Path(path).read_bytes())
    return sha.hexdigest()
