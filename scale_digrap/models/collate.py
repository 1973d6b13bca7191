"""Questions and answers → token batches, the same prompt in training and in generation, for every VLM family.

The processor of the model renders and tokenises the prompt, with its own image tokens. The answer is tokenised apart
and appended, so that a training prefix is token by token what the model sees before it generates.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from scale_digrap.data.decode import ImageDecoder, to_rgb
from scale_digrap.data.errors import SampleError
from scale_digrap.data.sample import VqaSample
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.models.plain_text import PlainText, media_tokens
from scale_digrap.runtime.text import one_line

log = logging.getLogger(__name__)

IGNORE = -100
"""Label of a token that the loss does not count."""

_DECODER = ImageDecoder()

_TOKEN_INPUTS = ("input_ids", "token_type_ids", "mm_token_type_ids")

Batch = dict[str, torch.Tensor]


class CollateError(ScaleDigrapError):
    """A sample that no batch can be made of."""


@dataclass(frozen=True)
class PromptTemplate:
    """The words around a question and its answer: one object for training and evaluation, stored with results."""

    prompt: str = "Question: {question} Answer:"
    answer: str = "{answer}"
    use_chat_template: bool = True

    def render(self, question: str) -> str:
        """The prompt of a question, without image tokens."""
        return self.prompt.replace("{question}", question)

    def render_answer(self, answer: str) -> str:
        """What the model is to write after the prompt."""
        return self.answer.replace("{answer}", answer)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for result files."""
        return asdict(self)


def training_answer(answers: Sequence[str]) -> str:
    """The most frequent answer; among equally frequent ones the first."""
    if not answers:
        raise CollateError("a training sample has no answer")
    counts = Counter(answers)  # keeps the order of first occurrence, and max() takes the first maximum
    return max(counts, key=counts.__getitem__)


class VqaCollator:
    """Turns lists of samples into model inputs.

    Args:
        processor: the checkpoint's ``AutoProcessor``.
        template: the prompt, one object for training and evaluation.
        max_length: longest sequence in tokens, image tokens and answer included. Longer questions lose words at their
            end; ``truncated`` counts them.

    Works for batches with one image or several a sample, without any, and mixed ones. Images come before the question,
    in order. A sample without an image gets the same prompt without image tokens; a batch without any image has no
    ``pixel_values``.

    Questions and answers are read as plain text: control tokens of the processor that stand in them (``<image>``,
    ``<|im_end|>``, ``</s>``) lose their meaning, see :mod:`scale_digrap.models.plain_text`; ``neutralised`` counts such
    texts, and the first one is named in the log.

    Raises:
        CollateError: the tokenizer has no end-of-sequence token, or the template holds a token that stands for a
            picture.

    Attributes:
        always_image: give a batch without any image one more row, its last, with a blank image and no label. It changes
            neither loss nor gradient, and every rank runs the vision tower in every batch: ZeRO's collectives follow
            the modules that a rank runs, and ranks that run others wait for each other for ever.
    """

    def __init__(self, processor: Any, template: PromptTemplate, max_length: int | None = None) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.template = template
        self.max_length = max_length
        self.truncated = 0
        self.neutralised = 0
        self._plain = PlainText(processor)
        self.always_image = False
        self._paligemma = type(processor).__name__ == "PaliGemmaProcessor"
        self._chat = template.use_chat_template and bool(getattr(processor, "chat_template", None))
        if self.tokenizer.eos_token_id is None:
            raise CollateError("the tokenizer has no end-of-sequence token: the model could not learn where to stop")
        for name, words in (("prompt", template.prompt), ("answer", template.answer)):
            if media := [token for token in media_tokens(processor) if token in words]:
                raise CollateError(
                    f"model.{name}: {media[0]!r} stands for a picture and is put in for each one that a sample has: "
                    "take it out"
                )
        pad = self.tokenizer.pad_token_id
        self.pad_id = self.tokenizer.eos_token_id if pad is None else pad
        # In PaliGemma token type 1 marks the causal suffix after the bidirectional prefix; elsewhere it marks images.
        self._answer_fill = {"token_type_ids": 1 if self._paligemma else 0, "mm_token_type_ids": 0}

    def train(self, samples: Sequence[VqaSample]) -> Batch:
        """Right-padded inputs with ``labels``: -100 everywhere but on the answer and its end-of-sequence token.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` int64 [batch, length]; ``token_type_ids`` or
            ``mm_token_type_ids`` alike where the processor makes them; ``pixel_values`` and whatever else its image
            processor makes (no such keys if no sample has an image).
        """
        _check_not_empty(samples)
        texts = [
            self.template.render_answer(self._plainly(training_answer(sample.answers), sample)) for sample in samples
        ]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        answers = [[*ids, self.tokenizer.eos_token_id] for ids in encoded]
        rows, image_inputs = self._prompts(samples, reserve=[len(answer) for answer in answers])
        for row, answer in zip(rows, answers, strict=True):
            row["labels"] = [IGNORE] * len(row["input_ids"]) + answer
            for name, fill in self._answer_fill.items():
                if name in row:
                    row[name] = row[name] + [fill] * len(answer)
            row["input_ids"] = row["input_ids"] + answer
            row["attention_mask"] = [1] * len(row["input_ids"])
        if self.always_image and not image_inputs:
            row, image_inputs = self._blank()
            rows.append({**row, "labels": [IGNORE] * len(row["input_ids"])})
        return {**self._pad(rows, left=False), **image_inputs}

    def generate(self, samples: Sequence[VqaSample]) -> Batch:
        """Left-padded prompts for ``model.generate``: as :meth:`train` without answers and ``labels``."""
        _check_not_empty(samples)
        rows, image_inputs = self._prompts(samples, reserve=[0] * len(samples))
        for row in rows:
            row["attention_mask"] = [1] * len(row["input_ids"])
        if self.always_image and not image_inputs:
            row, image_inputs = self._blank()
            rows.append(row)
        return {**self._pad(rows, left=True), **image_inputs}

    def decode(self, tokens: torch.Tensor, prompt_length: int) -> list[str]:
        """Answers out of ``model.generate``'s result [batch, prompt_length + new tokens], special tokens removed."""
        texts = self.tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _prompts(
        self, samples: Sequence[VqaSample], reserve: Sequence[int]
    ) -> tuple[list[dict[str, list[int]]], dict[str, torch.Tensor]]:
        """Unpadded token rows of all prompts, in order, and the image tensors of those samples that have one."""
        questions = [self._plainly(sample.question, sample) for sample in samples]
        pictured = [index for index, sample in enumerate(samples) if sample.image is not None]
        plain = [index for index, sample in enumerate(samples) if sample.image is None]
        images = {index: _decode_all(samples[index]) for index in pictured}
        try:
            rows, image_inputs = self._tokenise(questions, pictured, plain, images)
        except (MemoryError, CollateError):
            raise
        except Exception as error:  # a processor's own, of any kind: which sample it is about must not be lost
            raise CollateError(self._whose(samples, questions, images, error)) from error
        if self.max_length is not None:
            for index, row in enumerate(rows):
                over = len(row["input_ids"]) + reserve[index] - self.max_length
                if over > 0:
                    row = self._shorten(samples[index], questions[index], images.get(index), over, reserve[index])
                    rows[index] = row
        return rows, image_inputs

    def _plainly(self, text: str, sample: VqaSample) -> str:
        plain = self._plain(text)
        if plain != text:
            self.neutralised += 1
            if self.neutralised == 1:
                log.warning(
                    "sample %r: its text holds what the model's processor reads as a signal, or half a character; it "
                    "is read as plain text: %s (said once; `scale-digrap shards validate` counts)",
                    sample.key,
                    one_line(plain, 120),
                )
        return plain

    def _whose(
        self,
        samples: Sequence[VqaSample],
        questions: Sequence[str],
        images: dict[int, list[Image.Image]],
        error: Exception,
    ) -> str:
        """Which sample of a batch a processor cannot take, found by trying them one by one."""
        for index, (sample, question) in enumerate(zip(samples, questions, strict=True)):
            selection = ([0], [], {0: images[index]}) if index in images else ([], [0], {})
            try:
                self._tokenise([question], *selection)
            except Exception as own:
                return f"sample {sample.key!r}: the model's processor cannot take it: {one_line(own)}"
        keys = ", ".join(repr(sample.key) for sample in samples[:8])
        return f"the model's processor cannot take the batch of samples {keys}: {one_line(error)}"

    def _shorten(
        self, sample: VqaSample, question: str, images: list[Image.Image] | None, over: int, reserve: int
    ) -> dict[str, list[int]]:
        """The row of a sample whose question has lost as many words at its end as it takes to fit."""
        words = question.split()
        assert self.max_length is not None
        while words and over > 0:
            # A word is at least one token, so `over` words would often be too many: drop half of them at a time.
            words = words[: max(0, len(words) - max(1, over // 2))]
            selection = ([0], [], {0: images}) if images else ([], [0], {})
            (row,), _ = self._tokenise([" ".join(words)], *selection)
            over = len(row["input_ids"]) + reserve - self.max_length
        if over > 0:
            raise CollateError(
                f"sample {sample.key!r}: prompt, image and answer take {over} tokens more than model.max_length="
                f"{self.max_length} even without its question: raise model.max_length"
            )
        self.truncated += 1
        if self.truncated == 1:  # loader processes count for themselves, so the first one of each is told at once
            log.warning(
                "sample %r: its question was cut to fit model.max_length=%d; this is said once, summary.json counts",
                sample.key,
                self.max_length,
            )
        return row

    def _tokenise(
        self, questions: Sequence[str], pictured: list[int], plain: list[int], images: dict[int, list[Image.Image]]
    ) -> tuple[list[dict[str, list[int]]], dict[str, torch.Tensor]]:
        rows: list[dict[str, list[int]]] = [{} for _ in questions]
        image_inputs: dict[str, torch.Tensor] = {}
        if pictured:
            texts = [self._prompt_text(questions[index], images=len(images[index])) for index in pictured]
            # Padded, because PaliGemma's processor makes a rectangular array of labels; the padding is stripped below.
            encoded = self.processor(
                text=texts,
                images=[images[index] for index in pictured],
                padding=True,
                **self._special_tokens(texts[0]),
            )
            token_rows = _token_rows(encoded, len(pictured))
            for index, row in zip(pictured, token_rows, strict=True):
                rows[index] = row
            image_inputs = {
                name: _tensor(value)
                for name, value in encoded.items()
                if name not in (*_TOKEN_INPUTS, "attention_mask", "labels")
            }
        if plain:
            texts = [self._prompt_text(questions[index], images=0) for index in plain]
            encoded = self.tokenizer(texts, **self._special_tokens(texts[0]))
            for index, ids in zip(plain, encoded["input_ids"], strict=True):
                rows[index] = {"input_ids": list(ids), **{name: [0] * len(ids) for name in self._token_inputs}}
        return rows, image_inputs

    @cached_property
    def _token_inputs(self) -> list[str]:
        """Names of the per-token inputs besides ``input_ids`` that this processor makes: asked by trying it once."""
        row, _ = self._blank()
        return [name for name in row if name not in ("input_ids", "attention_mask")]

    def _blank(self) -> tuple[dict[str, list[int]], dict[str, torch.Tensor]]:
        """The row of a question about a blank image, and its image tensors."""
        (row,), image_inputs = self._tokenise(["?"], [0], [], {0: [Image.new("RGB", (64, 64))]})
        return {**row, "attention_mask": [1] * len(row["input_ids"])}, image_inputs

    def _prompt_text(self, question: str, *, images: int) -> str:
        prompt = self.template.render(question)
        if self._paligemma:
            # Its processor adds <bos> after the image tokens and a newline; without an image we write the same layout.
            return "<image>" * images + prompt if images else f"{self.tokenizer.bos_token}{prompt}\n"
        if self._chat:
            content: list[dict[str, str]] = [{"type": "image"}] * images
            content.append({"type": "text", "text": prompt})
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        return f"{self.processor.image_token}\n" * images + prompt

    def _special_tokens(self, text: str) -> dict[str, bool]:
        """A chat template that writes the <bos> itself must not get a second one from the tokenizer."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if self._chat and bos and text.startswith(bos) else {}

    def _pad(self, rows: list[dict[str, list[int]]], *, left: bool) -> Batch:
        length = max(len(row["input_ids"]) for row in rows)
        fills = {"input_ids": self.pad_id, "labels": IGNORE}
        batch = {}
        for name in rows[0]:
            padded = np.full((len(rows), length), fills.get(name, 0), dtype=np.int64)
            for target, row in zip(padded, rows, strict=True):
                values = row[name]
                target[slice(length - len(values), None) if left else slice(0, len(values))] = values
            batch[name] = torch.from_numpy(padded)
        return batch


def _check_not_empty(samples: Sequence[VqaSample]) -> None:
    if not samples:
        raise CollateError("cannot collate an empty batch")


def _token_rows(encoded: Any, count: int) -> list[dict[str, list[int]]]:
    """Per-token inputs of each sample without its padding."""
    mask = np.asarray(encoded["attention_mask"], dtype=bool)
    names = [name for name in _TOKEN_INPUTS if name in encoded]
    arrays = {name: np.asarray(encoded[name]) for name in names}
    return [{name: arrays[name][index][mask[index]].tolist() for name in names} for index in range(count)]


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.from_numpy(np.stack([np.asarray(item) for item in value]))


def _decode_all(sample: VqaSample) -> list[Image.Image]:
    try:
        return [_DECODER(image) if isinstance(image, bytes) else to_rgb(image) for image in sample.images]
    except SampleError as error:
        raise CollateError(f"sample {sample.key!r}: {error}") from None
