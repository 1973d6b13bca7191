"""The built-in suites, and the suites that a configuration asks for.

Four benchmarks: FRAMES-VQA (Huang et al., CVPR 2025), whose near average is over six suites, whose far average over
three and whose OOD average over nine; GQA with GQA-OOD; DomainNet; and the quick-start's six. ``docs/suites.md`` says
of each set where it comes from and which command makes its shards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scale_digrap.evaluation.scorers import VQA_METRICS
from scale_digrap.evaluation.suites import Group, Shift, Suite, SuiteError, SuiteRegistry

_QUESTIONS, _ANNOTATIONS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"


def _vqa(
    name: str,
    group: Group,
    shift: Shift,
    title: str,
    description: str,
    questions: str = _QUESTIONS,
    annotations: str = _ANNOTATIONS,
    *,
    images: str = "COCO val2014",
    expected: int | None = None,
    verified: bool = False,
    options: str = "",
    more: tuple[str, ...] = (),
) -> Suite:
    """A suite in the form of VQAv2: a questions file, an annotations file, pictures."""
    return Suite(
        name=name,
        group=group,
        shift=shift,
        title=title,
        description=description,
        expected=expected,
        verified=verified,
        files=(questions, annotations, *more, f"pictures: {images}"),
        command=f"vqa --questions {questions} --annotations {annotations} --images DIR{options}",
    )


FRAMES_VQA = SuiteRegistry(
    [
        _vqa(
            "vqav2",
            "id",
            "none",
            "VQAv2",
            "Validation set of VQAv2, whose training set the models are fine-tuned on.",
            expected=214_354,
            verified=True,
        ),
        _vqa(
            "iv_vqa",
            "near",
            "vision",
            "IV-VQA",
            "VQAv2 validation pictures from which an object that the question does not need was removed; the answer "
            "stays.",
            images="IV-VQA's edited val2014",
            options=" --derived edited",
        ),
        _vqa(
            "cv_vqa",
            "near",
            "vision",
            "CV-VQA",
            "Counting questions of VQAv2 after one of the counted objects was removed; the answer is one less.",
            images="CV-VQA's edited val2014",
            options=" --derived edited",
        ),
        _vqa(
            "vqa_rephrasings",
            "near",
            "question",
            "VQA-Rephrasings",
            "Validation questions of VQAv2 with three human rephrasings of each.",
            "v2_OpenEnded_mscoco_valrep2014_humans_og_questions.json",
            "v2_mscoco_valrep2014_humans_og_annotations.json",
            expected=162_016,
            verified=True,
            options=" --derived rephrased",
        ),
        _vqa(
            "vqa_cp_v2",
            "near",
            "answer",
            "VQA-CP v2",
            "VQAv2 re-split so that the answers to a type of question are distributed differently in the test set.",
            "vqacp_v2_test_questions.json",
            "vqacp_v2_test_annotations.json",
            images="COCO train2014 and val2014",
        ),
        _vqa(
            "vqa_ce",
            "near",
            "multimodal",
            "VQA-CE",
            "Validation questions of VQAv2 that shortcuts between words, objects and answers get wrong.",
            more=("counterexamples.json",),
            options=" --only counterexamples.json",
            expected=63_298,
            verified=True,
        ),
        _vqa(
            "advqa",
            "near",
            "adversarial",
            "AdVQA",
            "Questions that people wrote until a state-of-the-art model answered wrongly.",
            "v1_OpenEnded_mscoco_val2017_advqa_questions.json",
            "v1_mscoco_val2017_advqa_annotations.json",
            images="COCO val2017, or val2014 which contains them",
            expected=10_000,
        ),
        Suite(
            name="textvqa",
            group="far",
            shift="skill",
            title="TextVQA",
            description="Questions whose answer must be read in the picture.",
            expected=5_000,
            verified=False,
            files=("TextVQA_0.5.1_val.json", "pictures: train_images (Open Images)"),
            command="textvqa --annotations TextVQA_0.5.1_val.json --images train_images",
        ),
        Suite(
            name="vizwiz",
            group="far",
            shift="skill",
            title="VizWiz",
            description="Spoken questions of blind people about pictures that they took.",
            expected=4_319,
            verified=False,
            files=("val.json", "pictures: val"),
            command="vizwiz --annotations val.json --images val",
        ),
        _vqa(
            "okvqa",
            "far",
            "skill",
            "OK-VQA",
            "Questions that need knowledge from outside the picture.",
            "OpenEnded_mscoco_val2014_questions.json",
            "mscoco_val2014_annotations.json",
            expected=5_046,
        ),
    ],
    benchmark="frames-vqa",
    title="FRAMES-VQA",
)

GQA = SuiteRegistry(
    [
        Suite(
            name="gqa",
            group="id",
            shift="none",
            title="GQA",
            metric="exact",
            description="Compositional questions about real pictures, balanced test-dev set.",
            expected=12_578,
            verified=False,
            files=("testdev_balanced_questions.json", "pictures: GQA's images"),
            command="gqa --questions testdev_balanced_questions.json --images images",
        ),
        Suite(
            name="gqa_ood",
            group="near",
            shift="answer",
            title="GQA-OOD",
            metric="exact",
            description="Questions of GQA by how rare their answer is in their group: head and tail.",
            expected=2_796,
            files=("ood_testdev_head.json", "ood_testdev_tail.json", "pictures: GQA's images"),
            command="gqa --questions ood_testdev_head.json ood_testdev_tail.json --images images",
        ),
    ],
    benchmark="gqa",
    title="GQA",
)


def _domain(name: str, group: Group, expected: int, description: str) -> Suite:
    return Suite(
        name=f"domainnet_{name}",
        group=group,
        shift="none" if group == "id" else "vision",
        title=name.capitalize(),
        metric="top1",
        description=description,
        expected=expected,
        files=(f"{name}_test.txt", f"pictures: {name}/"),
        command=f"image-list {name}_test.txt --images domainnet",
    )


#: Near OOD are the four domains that FTP (Tian et al., 2023) averages over; quickdraw, which it leaves out, is far.
DOMAINNET = SuiteRegistry(
    [
        _domain("real", "id", 52_764, "Photographs of 345 classes."),
        _domain("sketch", "near", 21_271, "Sketches of the same classes."),
        _domain("painting", "near", 22_892, "Paintings of the same classes."),
        _domain("infograph", "near", 16_114, "Infographics with an object of the class in them."),
        _domain("clipart", "near", 14_814, "Clip art of the same classes."),
        _domain("quickdraw", "far", 51_750, "Strokes that players of a drawing game drew in seconds."),
    ],
    benchmark="domainnet",
    title="DomainNet",
)

#: The six of the embedded default, named as `quickstart.data.build` names their shards.
QUICKSTART = SuiteRegistry(
    [
        Suite(
            name="id",
            group="id",
            shift="none",
            title="ID",
            description="Real easy-VQA test images whose colour goes with the shape as in the training set.",
        ),
        Suite(
            name="vision",
            group="near",
            shift="vision",
            title="Vision",
            description="The same questions with the picture turned and its background replaced.",
        ),
        Suite(
            name="question",
            group="near",
            shift="question",
            title="Question",
            description="The same pictures with unseen phrasings of the questions.",
        ),
        Suite(
            name="answer",
            group="near",
            shift="answer",
            title="Answer",
            description="Real test images that break the training set's ties between colour and shape.",
        ),
        Suite(
            name="multimodal",
            group="near",
            shift="multimodal",
            title="Multimodal",
            description="Broken ties, unseen phrasings and changed pictures together.",
        ),
        Suite(
            name="far",
            group="far",
            shift="skill",
            title="Far",
            description="What the base model learnt before and fine-tuning never shows: counting and position.",
        ),
    ],
    benchmark="quickstart",
    title="Quick-start",
)

REGISTRIES: Mapping[str, SuiteRegistry] = {
    registry.benchmark: registry for registry in (FRAMES_VQA, GQA, DOMAINNET, QUICKSTART)
}

_KEYS = ("set", "folder", "only", "missing", "custom", "metric")
_CUSTOM = ("group", "shift", "metric", "shards", "expected", "title", "description", "benchmark")
_OVERRIDES = ("shards", "expected", "title", "description", "metric")


def load_suites(section: Mapping[str, Any], folder: str | Path | None = None) -> list[Suite]:
    """The suites that a configuration asks for, with their shards.

    Args:
        section: the keys ``set`` (a registry's name or a list of them), ``folder`` (the shards of a built-in suite lie
            in ``FOLDER/NAME``), ``only`` (names, to take fewer), ``missing`` (``error``, or ``allow``: a suite of the
            set without shards stays in the list as missing), ``custom`` (name → fields of `Suite`; for a name of the
            set: what to override, such as ``expected``), ``metric`` (``vqa/official`` or ``vqa/lavis`` for all VQA
            suites). All are optional.
        folder: instead of the section's.

    Returns:
        Suites in the order of columns: the sets', then the custom ones.

    Raises:
        SuiteError: nothing to evaluate, an unknown key, set, suite or value, a name twice, shards that are missing.
    """
    _check_keys("suites", section, _KEYS)
    missing = section.get("missing") or "error"
    if missing not in ("error", "allow"):
        raise SuiteError(f"suites.missing must be error or allow, got {missing!r}")
    metric = section.get("metric")
    if metric is not None and metric not in VQA_METRICS:
        raise SuiteError(f"suites.metric must be one of {', '.join(VQA_METRICS)}, got {metric!r}")
    suites = {suite.name: suite for suite in _of_sets(section.get("set"))}
    built_in = set(suites)
    custom = section.get("custom") or {}
    if not isinstance(custom, Mapping):
        raise SuiteError(f"suites.custom must map names of suites to their fields, got {custom!r}")
    for name, fields in custom.items():
        suites[str(name)] = _custom(str(name), fields, suites.get(str(name)))
    if not suites:
        raise SuiteError(f"no suites: name a set in suites.set ({', '.join(REGISTRIES)}), or define suites.custom")

    only = [str(name) for name in section.get("only") or ()]
    unknown = [name for name in only if name not in suites]
    if unknown:
        raise SuiteError(f"suites.only names {', '.join(unknown)}; there are: {', '.join(suites)}")
    chosen = [suite for name, suite in suites.items() if not only or name in only]
    place = folder if folder is not None else section.get("folder")
    found = []
    for suite in chosen:
        if not suite.shards and suite.name in built_in and place is not None:
            suite = _found(suite, Path(place))
        if metric is not None and suite.metric in VQA_METRICS:
            suite = dataclasses.replace(suite, metric=metric)
        found.append(suite)
    absent = [suite for suite in found if suite.missing]
    if absent and (missing == "error" or len(absent) == len(found)):
        raise SuiteError(_absent(absent, place, missing))
    return found


def _of_sets(names: str | Sequence[str] | None) -> list[Suite]:
    if names is None:
        return []
    suites: list[Suite] = []
    for name in [names] if isinstance(names, str) else names:
        if name not in REGISTRIES:
            raise SuiteError(f"suites.set: no set named {name!r}; there are: {', '.join(REGISTRIES)}")
        twice = [suite.name for suite in suites if suite.name in REGISTRIES[name]]
        if twice:
            raise SuiteError(f"suites.set: {', '.join(twice)} would be evaluated twice; name each set once")
        suites += REGISTRIES[name].values()
    return suites


def _custom(name: str, fields: Any, existing: Suite | None) -> Suite:
    """A suite of the user's own, or a built-in one with some fields replaced."""
    where = f"suites.custom.{name}"
    if not isinstance(fields, Mapping):
        raise SuiteError(f"{where} must be a section, got {fields!r}")
    values = dict(fields)
    if "shards" in values:
        shards = values["shards"]
        values["shards"] = tuple(str(one) for one in ([shards] if isinstance(shards, (str, Path)) else shards or ()))
    if existing is not None:
        _check_keys(where, values, _OVERRIDES, " (of a built-in suite the rest is fixed)")
        if "expected" in values:
            values["verified"] = True
        return dataclasses.replace(existing, **values)
    _check_keys(where, values, _CUSTOM)
    lacking = [key for key in ("group", "shift", "shards") if not values.get(key)]
    if lacking:
        raise SuiteError(
            f"{where} lacks {', '.join(lacking)}: a suite of your own needs group (id, near, far), shift and shards"
        )
    return Suite(name=name, **values)


def _check_keys(where: str, values: Mapping[str, Any], known: Sequence[str], more: str = "") -> None:
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise SuiteError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(known)}{more}")


def _found(suite: Suite, folder: Path) -> Suite:
    place = folder / suite.name
    return suite.at(place) if any(place.glob("*.tar")) else suite


def _absent(suites: Sequence[Suite], place: str | Path | None, missing: str) -> str:
    """What to do about suites without shards."""
    names = ", ".join(suite.name for suite in suites)
    if place is None and not any(suite.name for suite in suites if suite.files):
        return f"suites without shards: {names}; name them in suites.custom.{suites[0].name}.shards"
    where = f"{place}/{suites[0].name}" if place is not None else f"FOLDER/{suites[0].name}, suites.folder: FOLDER,"
    message = f"no shards of {names}: expected *.tar in {where}"
    if suites[0].command:
        message += (
            f". Write them with `scale-digrap shards write {suites[0].command} --to {place or 'FOLDER'}/"
            f"{suites[0].name}` from the official {', '.join(suites[0].files)}"
        )
    if missing == "error":
        message += "; or set suites.missing: allow to leave their column and its averages empty"
    return message
