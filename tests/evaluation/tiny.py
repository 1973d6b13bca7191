"""A random tiny VLM and small suites on disk, the same in every process."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from scale_digrap.evaluation.registry import QUICKSTART
from scale_digrap.evaluation.suites import Suite
from scale_digrap.models.collate import PromptTemplate, VqaCollator
from scale_digrap.quickstart.tiny_vlm import build_model, build_processor

QUESTIONS = ["what color is the shape?", "is there a circle?", "what shape is it?", "how many shapes are there?"]


def write_suite(folder: Path, name: str, count: int, *, seed: int = 0, corrupt: int | None = None) -> Suite:
    """`count` questions on noise pictures in two shards; the image of sample number `corrupt` is not an image."""
    rng = np.random.default_rng(seed)
    for shard in range(2):
        with tarfile.open(folder / f"{name}-{shard}.tar", "w") as tar:
            for index in range(shard, count, 2):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(picture, "PNG")
                data = b"not a picture" if index == corrupt else picture.getvalue()
                meta = {
                    "question": QUESTIONS[index % len(QUESTIONS)],
                    "answers": ["circle"],
                    "question_id": f"{index:05d}",
                    "question_type": ("color", "yes/no", "shape", "count")[index % 4],
                }
                for extension, content in (("png", data), ("json", json.dumps(meta).encode())):
                    info = tarfile.TarInfo(f"{index:05d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return QUICKSTART[name].at([folder / f"{name}-0.tar", folder / f"{name}-1.tar"])


def tiny_collator() -> VqaCollator:
    return VqaCollator(build_processor(), PromptTemplate("{question}", use_chat_template=False))


def tiny_model(collator: VqaCollator) -> nn.Module:
    """Random weights, larger than at initialisation and with a random last norm (the output embedding is the input one,
    and would repeat the last token), so that answers differ between questions."""
    model = build_model(collator.processor, seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
            elif name.endswith("language_model.norm.weight"):
                parameter.copy_(3.0 * torch.randn(parameter.shape, generator=generator))
    return model


def with_lora(model: nn.Module) -> nn.Module:
    """LoRA adapters with B away from zero, the same in every process."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model


def shard_fsdp2(model: nn.Module) -> nn.Module:
    """FSDP2 over the default process group: decoder layers as units, the rest in the root."""
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()):
        if type(module).__name__ == "GemmaDecoderLayer":
            fully_shard(module)
    return fully_shard(model)
