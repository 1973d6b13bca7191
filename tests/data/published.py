"""Small data sets in the forms that the real ones are published in."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed: int, size: tuple[int, int] = (48, 32), kind: str = "JPEG", **options) -> bytes:
    """A picture of width × height with smooth content, so that resized pixels can be compared."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def vqav2(folder: Path, images: int = 6, per_image: int = 3, subset: str = "train2014") -> dict[str, str]:
    """VQAv2: the arguments of `read_vqa`."""
    pictures = folder / "images" / subset
    pictures.mkdir(parents=True)
    questions, annotations = [], []
    for i in range(images):
        image_id = 9 + 16 * i
        (pictures / f"COCO_{subset}_{image_id:012d}.jpg").write_bytes(jpeg(i))
        for j in range(per_image):
            common = {"image_id": image_id, "question_id": image_id * 1000 + j}
            questions.append({**common, "question": f"What is number {j} of {i}?"})
            answers = [f"answer {i}"] * 7 + ["ü", "no", "yes"]
            annotations.append(
                {
                    **common,
                    "question_type": "what is",
                    "answer_type": "other",
                    "multiple_choice_answer": f"answer {i}",
                    "answers": [
                        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                        for number, answer in enumerate(answers, start=1)
                    ],
                }
            )
    head = {"info": {"version": "2.0"}, "license": {}, "data_subtype": subset, "data_type": "mscoco"}
    files = {
        "questions": folder / f"v2_OpenEnded_mscoco_{subset}_questions.json",
        "annotations": folder / f"v2_mscoco_{subset}_annotations.json",
    }
    files["questions"].write_text(json.dumps({**head, "task_type": "Open-Ended", "questions": questions}))
    files["annotations"].write_text(json.dumps({**head, "annotations": annotations[::-1]}))
    return {**{name: str(path) for name, path in files.items()}, "images": str(folder / "images")}


def lavis(folder: Path, images: int = 4, name: str = "vqa_val.json") -> tuple[str, str]:
    """A LAVIS annotation list and its image folder."""
    pictures = folder / "coco" / "val2014"
    pictures.mkdir(parents=True)
    entries = []
    for i in range(images):
        file = f"val2014/COCO_val2014_{i:012d}.jpg"
        (folder / "coco" / file).write_bytes(jpeg(i))
        for j in range(2):
            entries.append(
                {
                    "question_id": i * 10 + j,
                    "question": f"Is {i} before {j}?",
                    "answer": ["yes"] * 9 + ["no"],
                    "image": file,
                    "dataset": "vqa",
                }
            )
    (folder / name).write_text(json.dumps(entries))
    return str(folder / name), str(folder / "coco")


def domainnet(folder: Path, per_class: int = 3) -> tuple[str, str]:
    """A DomainNet list and its root; also a folder per class under ``real``."""
    lines = []
    for label, name in enumerate(("aircraft_carrier", "The_Eiffel_Tower", "zebra")):
        (folder / "real" / name).mkdir(parents=True)
        for i in range(per_class):
            path = f"real/{name}/real_{label:03d}_{i:06d}.jpg"
            (folder / path).write_bytes(jpeg(100 * label + i))
            lines.append(f"{path} {label}")
    (folder / "real_train.txt").write_text("\n".join(lines) + "\n")
    return str(folder / "real_train.txt"), str(folder)
