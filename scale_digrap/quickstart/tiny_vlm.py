"""The tiny VLM: PaliGemma's architecture and processor at a size that two CPU cores train in a minute.

SigLIP vision tower (64 px, patch 16 → 16 image tokens) → linear projector → Gemma decoder, under
`PaliGemmaForConditionalGeneration`, so that it takes the very code path PaliGemma-3B takes: `AutoProcessor`,
`AutoModelForImageTextToText`, image tokens, prefix attention through ``token_type_ids``, ``generate``.
The tokenizer knows whole words only: the words of `questions.vocabulary`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    GemmaConfig,
    GenerationConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from scale_digrap.quickstart.questions import vocabulary

FOLDER = Path(__file__).parent / "tiny_vlm"
"""The committed, pre-trained model: what `builtin:tiny-vlm` names."""

IMAGE_SIZE = 64
PATCH = 16
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
WIDTH = 128
_SPECIAL_TOKENS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower-cased words, punctuation apart, and the newline that ends PaliGemma's prompts."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<image>", "\n", *vocabulary()]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Split(Regex(r"[ \t]+"), "removed"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=128,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> PaliGemmaProcessor:
    """PaliGemma's processor over the word tokenizer. It adds its 1,152 ``<loc>``/``<seg>`` tokens, as for the 3B."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = SiglipImageProcessorPil(size=size, image_seq_length=IMAGE_TOKENS)
    return PaliGemmaProcessor(image_processor=image_processor, tokenizer=build_tokenizer())


def build_config(vocabulary_size: int, image_token_id: int) -> PaliGemmaConfig:
    """The tiny PaliGemma configuration. Every option that differs from the 3B model is a size."""
    vision = SiglipVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        vision_use_head=False,
    )
    text = GemmaConfig(
        vocab_size=vocabulary_size,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=WIDTH // 4,
        max_position_embeddings=128,
        **_SPECIAL_TOKENS,
    )
    return PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        vocab_size=vocabulary_size,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        **_SPECIAL_TOKENS,
    )


def build_model(processor: PaliGemmaProcessor, seed: int = 0) -> PaliGemmaForConditionalGeneration:
    """A randomly initialised tiny VLM in float32; the same seed gives the same weights."""
    config = build_config(len(processor.tokenizer), processor.image_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PaliGemmaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=4, **_SPECIAL_TOKENS)
    return model


def round_to_bf16(model: torch.nn.Module) -> None:
    """Round every floating parameter and buffer to the nearest bfloat16 value, keeping its dtype.

    An anchor that bf16 holds exactly costs DiGraP two bytes an element instead of four.
    """
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(torch.bfloat16))


def save(model: PaliGemmaForConditionalGeneration, processor: PaliGemmaProcessor, folder: str | Path) -> Path:
    """Write configuration, bf16 safetensors and processor so that `from_pretrained(folder)` needs no network."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    round_to_bf16(model)
    state: dict[str, Any] = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]  # tied to the embedding: loading ties them again
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    return folder


def stored_tensors(folder: str | Path = FOLDER) -> dict[str, torch.Tensor]:
    """The tensors of a saved tiny VLM as they lie in the file."""
    return load_file(Path(folder) / "model.safetensors")
