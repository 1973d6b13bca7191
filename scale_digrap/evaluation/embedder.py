"""Three embeddings of a prompt out of a vision-language model: of its image, of its question, of both.

``tokens`` takes them out of one forward pass: the mean of the image tokens where they enter the language model, the
mean of the prompt's other tokens at its last layer, and the mean of all of its tokens there. ``frames`` follows the
code of FRAMES-VQA's authors (vlm_robustness at 459c18d): the question comes from a second pass in which no token
attends to the image, and the joint embedding is the middle between the image tokens' mean and the other tokens' mean.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scale_digrap.evaluation.gaussian import ShiftError
from scale_digrap.evaluation.shift_accuracy import SPACES

__all__ = ["EMBEDDINGS", "SPACES", "Embedder", "Embeddings", "check_embeddings"]

EMBEDDINGS = ("tokens", "frames")
"""What can be embedded, see `Embedder`."""


@dataclass(frozen=True)
class Embeddings:
    """Of one batch, float64 on the model's device."""

    image: Tensor
    """[batch, d]; meaningless where `has_image` is False."""
    question: Tensor
    """[batch, d]."""
    joint: Tensor
    """[batch, d]."""
    has_image: Tensor
    """bool [batch]."""

    def rows(self, space: str, wanted: Tensor) -> Tensor:
        """The vectors of one space where `wanted`, bool [batch], and where there is an image if it takes one."""
        return getattr(self, space)[wanted & self.has_image if space == "image" else wanted]


class Embedder:
    """Takes the embeddings out of a Hugging Face vision-language model while it reads a prompt, by two hooks on its
    language model. The model may be plain, peft, or sharded by FSDP2 or ZeRO-3.

    Args:
        model: PaliGemma, LLaVA, Qwen-VL, Gemma 3 or any other whose ``input_ids`` have one image token per image
            feature, named by ``config.image_token_id``.
        embeddings: ``tokens``: one forward pass; "question" attends to the image, and "joint" is the mean of all
            tokens, of which most are the image's. ``frames``: two; in the second the image tokens are masked out of
            attention, and "question" is the mean of the other tokens' last states in it; "joint" is
            (mean of the image tokens + mean of the others) / 2 in the first, and the others' mean for a prompt without
            an image. "image" is the same in both.

    Raises:
        ShiftError: the model has no such token or no decoder, or `embeddings` is neither.
    """

    def __init__(self, model: nn.Module, embeddings: str = "tokens") -> None:
        check_embeddings(embeddings)
        self._frames = embeddings == "frames"
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        config = getattr(base, "config", None)
        self._model = model
        self._image_token = getattr(config, "image_token_id", None)
        if self._image_token is None:
            self._image_token = getattr(config, "image_token_index", None)
        self._decoder: nn.Module | None = base.get_decoder() if hasattr(base, "get_decoder") else None
        if self._image_token is None or self._decoder is None or self._decoder is base:
            raise ShiftError(
                f"{type(base).__name__} has no {'image_token_id' if self._decoder else 'language model of its own'}: "
                "shift scores need a vision-language model that puts image features in the place of image tokens. "
                "Leave the shift section out of the configuration"
            )
        self._options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            self._options["logits_to_keep"] = 1  # a vocabulary of 257 thousand for every token would fill the memory

    def __call__(self, inputs: Mapping[str, Tensor]) -> Embeddings:
        """Embed a batch of `Collator.generate`. One forward pass, or two of ``frames``, whatever the batch holds:
        collectives where the model is sharded.

        Raises:
            ShiftError: the language model has seen other tokens than ``input_ids``.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        pictured = mask & (ids == self._image_token)
        seen = self._states(inputs)
        has_image = pictured.any(dim=1)
        image, others = _mean(seen["first"], pictured), _mean(seen["last"], mask & ~pictured)
        if not self._frames:
            return Embeddings(image=image, question=others, joint=_mean(seen["last"], mask), has_image=has_image)
        middle = (_mean(seen["last"], pictured) + others) / 2
        joint = torch.where(has_image[:, None], middle, others)
        alone = {**inputs, "attention_mask": inputs["attention_mask"].masked_fill(pictured, 0)}
        if "positions" in seen:
            # some models count positions by the mask: every token keeps the place that it had beside the image
            alone["position_ids"] = seen["positions"]
        question = _mean(self._states(alone)["last"], mask & ~pictured)
        return Embeddings(image=image, question=question, joint=joint, has_image=has_image)

    def _states(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """ "first" and "last", [batch, tokens, d]: what enters the language model and what leaves it; "positions" where
        the model hands them to it."""
        seen: dict[str, Tensor] = {}
        with self._hooks(seen):
            self._model(**inputs, **self._options)
        ids = inputs["input_ids"]
        for name in ("first", "last"):
            if name not in seen or seen[name].shape[:2] != ids.shape:
                raise ShiftError(
                    f"the language model of {type(self._model).__name__} has taken "
                    f"{tuple(seen[name].shape) if name in seen else 'no embeddings'} for input_ids of shape "
                    f"{tuple(ids.shape)}: its image tokens cannot be told from the others"
                )
        return seen

    @contextmanager
    def _hooks(self, seen: dict[str, Tensor]) -> Iterator[None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            embeds = kwargs.get("inputs_embeds")
            if embeds is not None:
                seen["first"] = embeds.detach()
            if kwargs.get("position_ids") is not None:
                seen["positions"] = kwargs["position_ids"]

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            last = getattr(output, "last_hidden_state", None)
            seen["last"] = (output[0] if last is None else last).detach()

        assert self._decoder is not None
        handles = [
            self._decoder.register_forward_pre_hook(before, with_kwargs=True),
            self._decoder.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def check_embeddings(embeddings: Any) -> None:
    """Raises `ShiftError` for anything that `Embedder` does not know."""
    if embeddings not in EMBEDDINGS:
        raise ShiftError(f"embeddings must be {' or '.join(EMBEDDINGS)}, got {embeddings!r}")


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of the mask, float64 [batch, d]; zero where there is none."""
    weights = mask.double() / mask.sum(dim=1, keepdim=True).clamp(min=1)
    # padding may hold anything, and 0 × inf is not 0
    return torch.einsum("bt,btd->bd", weights, states.double().masked_fill(~mask[..., None], 0.0))
