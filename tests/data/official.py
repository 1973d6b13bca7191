"""The built-in suites' files, small, in the forms that they are published in: names, fields, types and oddities."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.data.published import jpeg

COCO = [9, 262148, 581929]
"""Pictures of val2014."""


def save(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def pictures(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(jpeg(number))


def ten(answer: str, other: str = "no") -> list[dict]:
    given = [answer] * 8 + [other, "yes"]
    return [{"answer": one, "answer_confidence": "yes", "answer_id": i} for i, one in enumerate(given, start=1)]


def _pair(folder: Path, questions: str, annotations: str, rows: list[tuple], head: dict | None, **more: dict) -> None:
    """Two files of (question_id, image_id, text, answer, fields of the question) rows; lists where head is None."""
    asked = [{"image_id": image, "question": text, "question_id": qid, **own} for qid, image, text, _, own in rows]
    told = [
        {
            "question_type": "what is",
            "multiple_choice_answer": answer,
            "answers": ten(answer),
            "image_id": image,
            "answer_type": "number" if answer.isdecimal() else "other",
            "question_id": qid,
            **more.get("annotation", {}),
        }
        for qid, image, _, answer, _ in rows
    ]
    save(folder / questions, asked if head is None else {**head, "questions": asked})
    save(folder / annotations, told if head is None else {**head, "annotations": told})


def vqav2(folder: Path) -> int:
    pictures(folder / "DIR" / "val2014", [f"COCO_val2014_{image:012d}.jpg" for image in COCO])
    rows = [(image * 1000 + i, image, f"What is {i} of {image}?", f"thing {i}", {}) for image in COCO for i in range(2)]
    head = {"info": {"version": "2.0"}, "data_subtype": "val2014", "data_type": "mscoco", "license": {}}
    _pair(folder, "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", rows, head)
    return len(rows)


def edited(folder: Path) -> int:
    """One question about two edits of its picture; ids repeat, and nothing but the names tells the subset."""
    names = [f"{262148:012d}_{removed:012d}" for removed in (5, 27)] + [f"{9:012d}_{1:012d}"]
    pictures(folder / "DIR", [f"COCO_val2014_{name}.jpg" for name in names])
    rows = [(int(name[:12]) * 1000, name, "How many dogs are there?", "2", {}) for name in names]
    _pair(folder, "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", rows, {})
    return len(rows)


def rephrasings(folder: Path) -> int:
    """The id of a rephrasing, ten times the original's and a number, is that of another original."""
    pictures(folder / "DIR" / "val2014", [f"COCO_val2014_{image:012d}.jpg" for image in (9, 90)])
    rows = [
        (9000, 9, "What is it?", "dog", {}),
        (90000, 9, "Which thing is it?", "dog", {"rephrasing_of": 9000}),
        (90001, 9, "It is what?", "dog", {"rephrasing_of": 9000}),
        (90000, 90, "Who is there?", "man", {}),
        (900000, 90, "Which person is there?", "man", {"rephrasing_of": 90000}),
    ]
    name = "mscoco_valrep2014_humans_og"
    head = {"data_subtype": "val2014", "info": {}}
    _pair(folder, f"v2_OpenEnded_{name}_questions.json", f"v2_{name}_annotations.json", rows, head)
    return len(rows)


def vqa_cp(folder: Path) -> int:
    """Lists; each entry names its subset."""
    for subset in ("train2014", "val2014"):
        pictures(folder / "DIR" / subset, [f"COCO_{subset}_{image:012d}.jpg" for image in COCO])
    rows = [
        (image * 1000, image, "What is it?", "cat", {"coco_split": subset})
        for image, subset in ((9, "train2014"), (262148, "val2014"))
    ]
    _pair(folder, "vqacp_v2_test_questions.json", "vqacp_v2_test_annotations.json", rows, None)
    return len(rows)


def vqa_ce(folder: Path) -> int:
    vqav2(folder)
    save(folder / "counterexamples.json", [9001, 262148000])
    return 2


def advqa(folder: Path) -> int:
    """COCO 2017's name for pictures, which also lie in val2014."""
    pictures(folder / "DIR", [f"{image:012d}.jpg" for image in COCO])
    rows = [(1 + i, image, "Adversarial?", "yes", {}) for i, image in enumerate(COCO)]
    name = "mscoco_val2017_advqa"
    head = {"data_subtype": "val2017", "info": {}}
    _pair(folder, f"v1_OpenEnded_{name}_questions.json", f"v1_{name}_annotations.json", rows, head)
    return len(rows)


def textvqa(folder: Path) -> int:
    images = ["003a8ae2ef43b901", "0054c91397f2fe05"]
    pictures(folder / "train_images", [f"{image}.jpg" for image in images])
    entries = [
        {
            "question": "what is the brand of this camera?",
            "image_id": image,
            "image_classes": ["Cassette deck"],
            "flickr_original_url": "https://host/x.jpg",
            "flickr_300k_url": "https://host/y.jpg",
            "image_width": 1024,
            "image_height": 664,
            "answers": ["dakota", "nous les gosses", "dakota digital"] + ["dakota"] * 7,
            "question_tokens": ["what", "is"],
            "question_id": 34602 + i,
            "set_name": "val",
        }
        for i, image in enumerate(images)
    ]
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    save(folder / "TextVQA_0.5.1_val.json", {**head, "data": entries})
    return len(entries)


def vizwiz(folder: Path) -> int:
    names = [f"VizWiz_val_{i:08d}.jpg" for i in range(3)]
    pictures(folder / "val", names)
    entries = [
        {
            "image": name,
            "question": "Can you tell me what this medicine is please?",
            "answers": [{"answer": "no", "answer_confidence": "yes"}] * 9
            + [{"answer": "x", "answer_confidence": "no"}],
            "answer_type": "unanswerable" if i == 1 else "other",
            "answerable": int(i != 1),
        }
        for i, name in enumerate(names)
    ]
    save(folder / "val.json", entries)
    return len(entries)


def okvqa(folder: Path) -> int:
    pictures(folder / "DIR" / "val2014", [f"COCO_val2014_{image:012d}.jpg" for image in COCO])
    rows = [(image * 10 + 5, image, "What sport can you use this for?", "race", {}) for image in COCO]
    head = {"info": {}, "task_type": "Open-Ended", "data_subtype": "val2014", "question_types": {"one": "Sports"}}
    more = {"annotation": {"question_type": "one", "confidence": 3}}
    _pair(folder, "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", rows, head, **more)
    return len(rows)


def _gqa(image: str, answer: str, structural: str = "query") -> dict:
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
        "entailed": [],
        "equivalent": ["1"],
        "question": "What kind of furniture is brown?",
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": "furniture", "local": "12q-furniture_brown"},
        "answer": answer,
        "semanticStr": "select: scene",
        "annotations": {"answer": {"0": "17"}, "question": {"3": "17"}, "fullAnswer": {}},
        "types": {"detailed": "categoryThat", "semantic": "cat", "structural": structural},
        "fullAnswer": f"The furniture is a {answer}.",
    }


def gqa(folder: Path) -> int:
    pictures(folder / "images", ["n54424.jpg", "2370799.jpg"])
    content = {"201030415": _gqa("n54424", "couch"), "20602949": _gqa("2370799", "yes", "verify")}
    save(folder / "testdev_balanced_questions.json", content)
    return len(content)


def gqa_ood(folder: Path) -> int:
    pictures(folder / "images", ["n54424.jpg", "2370799.jpg"])
    save(folder / "ood_testdev_head.json", {"1": _gqa("n54424", "chair"), "2": _gqa("2370799", "table")})
    save(folder / "ood_testdev_tail.json", {"3": _gqa("n54424", "ottoman")})
    return 3


def _domain(name: str) -> Callable[[Path], int]:
    def make(folder: Path) -> int:
        lines = []
        for label, kind in enumerate(("aircraft_carrier", "airplane")):
            pictures(folder / "domainnet" / name / kind, [f"{name}_{label:03d}_{i:06d}.jpg" for i in range(2)])
            lines += [f"{name}/{kind}/{name}_{label:03d}_{i:06d}.jpg {label}" for i in range(2)]
        (folder / f"{name}_test.txt").write_text("\n".join(lines) + "\n")
        return len(lines)

    return make


MAKERS: dict[str, Callable[[Path], int]] = {
    "vqav2": vqav2,
    "iv_vqa": edited,
    "cv_vqa": edited,
    "vqa_rephrasings": rephrasings,
    "vqa_cp_v2": vqa_cp,
    "vqa_ce": vqa_ce,
    "advqa": advqa,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "okvqa": okvqa,
    "gqa": gqa,
    "gqa_ood": gqa_ood,
    **{
        f"domainnet_{name}": _domain(name)
        for name in ("real", "sketch", "painting", "infograph", "clipart", "quickdraw")
    },
}
"""Suite → what writes its official files to a folder, with pictures where its command looks for them; returns the
number of questions."""
