"""Tiny random checkpoints of real VLM families, built offline: configuration, weights, tokenizer and processor."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoProcessor, PreTrainedTokenizerFast, ProcessorMixin, Qwen2_5_VLConfig, Qwen2_5_VLProcessor

SHAPES, COLORS = ["circle", "square", "triangle"], ["red", "green", "blue"]
WORDS = ["what", "color", "is", "the", "shape", "which", "do", "you", "see", "thing"]
WORDS += ["Question", "Answer", "USER", "ASSISTANT", ":", "?", ".", ","]
FAMILIES = ["paligemma", "llava", "qwen2_5_vl", "gemma3"]
CHAT = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE {% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def tokenizer(special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """Word level, with <bos> added by the tokenizer as Llama's does unless the processor switches it off."""
    words = ["<pad>", "</s>", "<s>", "<unk>", *special, "\n", *WORDS, *SHAPES, *COLORS]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        extra_special_tokens=named or special,
    )


def text_config(**more) -> dict:
    return {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "max_position_embeddings": 256,
        **more,
    }


def paligemma():
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessorPil,
    )

    image_processor = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 4
    processor = PaliGemmaProcessor(image_processor, tokenizer(["<image>"]))
    size = len(processor.tokenizer)
    config = PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": 28,
            "patch_size": 14,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vision_use_head": False,
            "projection_dim": 32,
        },
        text_config={"model_type": "gemma", **text_config(vocab_size=size)},
        image_token_index=processor.image_token_id,
        vocab_size=size,
        projection_dim=32,
        hidden_size=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return PaliGemmaForConditionalGeneration(config), processor


def llava():
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    words = tokenizer(["<image>"])
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>\n"),
    )
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 28,
            "patch_size": 14,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "projection_dim": 32,
        },
        text_config={"model_type": "llama", **text_config()},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    return LlavaForConditionalGeneration(config), processor


class ImagesOnlyQwenProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video half, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


AutoProcessor.register(Qwen2_5_VLConfig, ImagesOnlyQwenProcessor, exist_ok=True)


def qwen2_5_vl():
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = tokenizer(special)
    ids = dict(zip(special, words.convert_tokens_to_ids(special), strict=True))
    image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = ImagesOnlyQwenProcessor(image_processor, words, chat_template=template)
    config = Qwen2_5_VLConfig(
        text_config=text_config(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def gemma3():
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
    )

    special = ["<image_soft_token>", "<start_of_image>", "<end_of_image>"]
    words = tokenizer(special, image_token=special[0], boi_token=special[1], eoi_token=special[2])
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        words,
        chat_template=CHAT.replace("IMAGE", "<start_of_image>"),
        image_seq_length=4,
    )
    config = Gemma3Config(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": 28,
            "patch_size": 7,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vision_use_head": False,
        },
        text_config={"model_type": "gemma3_text", **text_config(sliding_window=16)},
        mm_tokens_per_image=4,
        image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
        eos_token_id=1,
    )
    return Gemma3ForConditionalGeneration(config), processor


def build(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint of `family` with bf16-exact weights, stored in bf16, to `folder`."""
    torch.manual_seed(seed)
    model, processor = {"paligemma": paligemma, "llava": llava, "qwen2_5_vl": qwen2_5_vl, "gemma3": gemma3}[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.1)  # the default initialisation is so small that nothing depends on anything
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(color: str, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 80, (28, 28, 3), dtype=np.uint8)
    pixels[6:22, 6:22, COLORS.index(color)] = 230
    return Image.fromarray(pixels)


def write_shards(folder: Path, count: int = 48, text_only: tuple[int, ...] = ()) -> str:
    """Coloured squares; the answer is the colour, or two words for every third sample, so that lengths differ."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    with webdataset.TarWriter(str(folder / "vqa-000000.tar"), encoder=False) as tar:
        for i in range(count):
            color, shape = COLORS[rng.integers(3)], SHAPES[rng.integers(3)]
            question = "what color is the shape ?" if i % 2 else f"which {shape} do you see"
            answer = color if i % 3 else f"{color} {shape}"
            meta = {"question": question, "answers": [answer], "question_id": i}
            sample = {"__key__": f"s{i:04d}", "json": json.dumps(meta).encode()}
            if i not in text_only:
                buffer = io.BytesIO()
                picture(color, i).save(buffer, "png")
                sample["png"] = buffer.getvalue()
            tar.write(sample)
    return str(folder / "*.tar")
