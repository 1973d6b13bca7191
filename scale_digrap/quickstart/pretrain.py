"""Pre-train the tiny VLM on generated scenes: the recipe that made the committed weights.

Two stages, both on scenes generated on the fly (`scenes.py`; no easy-VQA picture or question-answer pair is used):

1. *Vision*: the SigLIP tower alone learns, through throw-away linear heads, which shape and colour each patch shows
   and where the shapes' centres are. Answers alone teach the tower this far too slowly.
2. *Questions*: the whole model learns to answer through the language-model loss, several questions a picture,
   with the vision heads kept as a second loss.

Run it by `scale-digrap quickstart --pretrain`.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from scale_digrap.data.sample import VqaSample
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.models.collate import PromptTemplate, VqaCollator
from scale_digrap.quickstart import easyvqa, tiny_vlm
from scale_digrap.quickstart.data import easy_samples, scene_samples
from scale_digrap.quickstart.questions import COLOURS, QUESTION_TYPES, SHAPES, split_words
from scale_digrap.quickstart.scenes import Asked, Scene, ask, draw_scene, render

_SHAPE_INDEX = {name: index + 1 for index, name in enumerate(SHAPES)}  # 0: nothing
_COLOUR_INDEX = {name: index + 1 for index, name in enumerate(COLOURS)}
_MIN_COVERAGE = 8.0
"""Pixels of a 16×16 patch that a shape must cover for the patch to be labelled with it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 0
    vision_steps: int = 1100
    vision_batch: int = 256
    vision_lr: float = 1e-2
    question_steps: int = 1000
    question_batch: int = 96
    questions_per_picture: int = 4
    question_lr: float = 5e-3
    vision_loss_weight: float = 0.3
    weight_decay: float = 0.05
    warmup: float = 0.05
    """Share of a stage's steps in which the learning rate rises linearly."""
    vision_decay: float = 0.95
    """Share of the stage's steps, its last, in which the learning rate falls as a cosine to zero; constant before."""
    question_decay: float = 0.3


@dataclass
class Pictures:
    """A batch of rendered scenes with the vision heads' targets."""

    pixel_values: torch.Tensor
    """float32 [batch, 3, 64, 64] in [-1, 1], as the processor makes them."""
    shape: torch.Tensor
    """int64 [batch, 16]: the shape that covers most of each patch, 0 for none."""
    colour: torch.Tensor
    """int64 [batch, 16], likewise."""
    centre: torch.Tensor
    """float32 [batch, 16]: how many shapes have their centre in the patch."""
    count: torch.Tensor
    """int64 [batch]: shapes in the picture, less one."""
    scenes: list[Scene] = field(default_factory=list)


def draw_pictures(rng: np.random.Generator, batch: int) -> Pictures:
    """Draw and render a batch of scenes."""
    pixels = np.empty((batch, tiny_vlm.IMAGE_SIZE, tiny_vlm.IMAGE_SIZE, 3), dtype=np.uint8)
    shape = np.zeros((batch, tiny_vlm.IMAGE_TOKENS), dtype=np.int64)
    colour = np.zeros_like(shape)
    centre = np.zeros(shape.shape, dtype=np.float32)
    count = np.zeros(batch, dtype=np.int64)
    side = tiny_vlm.IMAGE_SIZE // tiny_vlm.PATCH
    scenes = []
    for index in range(batch):
        scene = draw_scene(rng)
        pixels[index], coverage = render(scene, rng)
        owner = coverage.argmax(axis=0)
        covered = coverage.max(axis=0) >= _MIN_COVERAGE
        shape[index] = np.array([_SHAPE_INDEX[item.shape] for item in scene.items])[owner] * covered
        colour[index] = np.array([_COLOUR_INDEX[item.colour] for item in scene.items])[owner] * covered
        for item in scene.items:
            column, row = (min(side - 1, int(v) // tiny_vlm.PATCH) for v in (item.x, item.y))
            centre[index, row * side + column] += 1.0
        count[index] = len(scene.items) - 1
        scenes.append(scene)
    normalised = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
    return Pictures(
        pixel_values=normalised,
        shape=torch.from_numpy(shape),
        colour=torch.from_numpy(colour),
        centre=torch.from_numpy(centre),
        count=torch.from_numpy(count),
        scenes=scenes,
    )


class VisionHeads(nn.Module):
    """Throw-away linear read-outs of the vision tower's tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = nn.Linear(width, len(SHAPES) + 1)
        self.colour = nn.Linear(width, len(COLOURS) + 1)
        self.centre = nn.Linear(width, 1)
        self.count = nn.Linear(width, 3)

    def loss(self, tokens: torch.Tensor, pictures: Pictures) -> tuple[torch.Tensor, dict[str, float]]:
        """Summed loss over tokens [batch, 16, width], with the read-outs' accuracies."""
        shape, colour = self.shape(tokens).float(), self.colour(tokens).float()
        centre, count = self.centre(tokens).squeeze(-1).float(), self.count(tokens.mean(dim=1)).float()
        loss = (
            cross_entropy(shape.flatten(0, 1), pictures.shape.flatten())
            + cross_entropy(colour.flatten(0, 1), pictures.colour.flatten())
            + binary_cross_entropy_with_logits(centre, pictures.centre.clamp(max=1.0))
            + 0.3 * cross_entropy(count, pictures.count)
        )
        shown = pictures.shape > 0
        with torch.no_grad():
            accuracy = {
                "shape": (shape.argmax(-1) == pictures.shape)[shown].float().mean().item(),
                "colour": (colour.argmax(-1) == pictures.colour)[shown].float().mean().item(),
                "count": (count.argmax(-1) == pictures.count).float().mean().item(),
            }
        return loss, accuracy


class QuestionEncoder:
    """Tensorises questions and answers as `PaliGemmaProcessor` does, without its cost.

    A sequence is 16 ``<image>`` tokens, ``<bos>``, the question's words, a newline, the answer, ``<eos>``.
    """

    def __init__(self, processor: PaliGemmaProcessor) -> None:
        tokenizer = processor.tokenizer
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.prefix = [processor.image_token_id] * tiny_vlm.IMAGE_TOKENS + [tokenizer.bos_token_id]
        self.eos, self.pad, self.newline = tokenizer.eos_token_id, tokenizer.pad_token_id, self.vocabulary["\n"]

    def __call__(self, asked: Sequence[Asked]) -> dict[str, torch.Tensor]:
        """→ input_ids, attention_mask, token_type_ids, labels; int64 [questions, longest], padded on the right."""
        vocabulary = self.vocabulary
        prompts = [
            [*self.prefix, *(vocabulary[word] for word in split_words(one.question)), self.newline] for one in asked
        ]
        length = max(map(len, prompts)) + 2
        input_ids = np.full((len(asked), length), self.pad, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        token_type_ids = np.zeros_like(input_ids)
        labels = np.full_like(input_ids, -100)
        for row, (prompt, one) in enumerate(zip(prompts, asked, strict=True)):
            start, end = len(prompt), len(prompt) + 2
            input_ids[row, :start] = prompt
            input_ids[row, start:end] = labels[row, start:end] = (vocabulary[one.answer], self.eos)
            attention_mask[row, :end] = 1
            token_type_ids[row, start:end] = 1
        arrays = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "labels": labels,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def question_loss(
    model: PaliGemmaForConditionalGeneration, image_features: torch.Tensor, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, float]:
    """The model's own language-model loss, with the vision tower run once per picture rather than per question.

    Args:
        model: the tiny VLM.
        image_features: projected image tokens, one row per question [questions, 16, width].
        batch: what `QuestionEncoder` returns.

    Returns:
        Mean cross-entropy over answer and end tokens, and the share of right answers.
    """
    outputs = model.model(
        input_ids=batch["input_ids"][:, :-1],
        attention_mask=batch["attention_mask"][:, :-1],
        token_type_ids=batch["token_type_ids"][:, :-1],
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=image_features)},
        use_cache=False,
    )
    targets = batch["labels"][:, 1:]
    wanted = targets != -100
    logits = model.lm_head(outputs.last_hidden_state[wanted]).float()  # the few answer positions only
    targets = targets[wanted]
    right = (logits.argmax(-1) == targets).view(-1, 2)[:, 0]
    return cross_entropy(logits, targets), right.float().mean().item()


def build_optimizers(modules: Sequence[nn.Module], lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, fused AdamW for everything else (embeddings, heads, norms, biases)."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            (matrices if parameter.ndim == 2 and ".layers." in f".{name}" else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=lr, momentum=0.9, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def schedule(step: int, steps: int, warmup: float, decay: float) -> float:
    """The learning rate's factor at 0-based `step`: linear warm-up, constant, then a cosine to zero.

    Args:
        step: 0 to `steps` - 1.
        steps: of the whole stage.
        warmup: share of the steps in which it rises.
        decay: share of the steps, at the end, in which it falls.
    """
    rising = max(1, round(steps * warmup))
    falling = max(1, round(steps * decay))
    rise = min(1.0, (step + 1) / rising)
    fall = max(0.0, (step + 1 - (steps - falling)) / (falling + 1))
    return rise * 0.5 * (1.0 + math.cos(math.pi * fall))


class PretrainingError(ScaleDigrapError):
    """Pre-training cannot run here."""


StepFunction = Callable[[np.random.Generator], tuple[torch.Tensor, dict[str, float]]]
"""One step's loss, and figures to print."""


class Pretraining:
    """The recipe as it runs: holds the model, the throw-away heads and the stream of scenes."""

    def __init__(self, recipe: Recipe, *, console: Console, checkpoint: Path | None = None) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise PretrainingError(
                f"pre-training needs torch 2.9 or newer (torch.optim.Muon), this is {torch.__version__}"
            )
        self.recipe, self.console, self.checkpoint = recipe, console, checkpoint
        self.processor = tiny_vlm.build_processor()
        self.model = tiny_vlm.build_model(self.processor, seed=recipe.seed)
        self.model.set_attn_implementation("eager")  # the CPU's fused attention is twice as slow in bf16 backward
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed + 1)
            self.heads = VisionHeads(tiny_vlm.WIDTH)
        self.encode = QuestionEncoder(self.processor)

    def run(self) -> PaliGemmaForConditionalGeneration:
        """Both stages. Ends with bf16-exact weights."""
        self._vision_stage()
        self._question_stage()
        tiny_vlm.round_to_bf16(self.model)
        return self.model

    def _vision_stage(self) -> None:
        recipe = self.recipe
        trained = [self.model.model.vision_tower, self.heads]
        self._stage("vision", 0, trained, recipe.vision_steps, recipe.vision_lr, recipe.vision_decay, self._vision_step)

    def _question_stage(self) -> None:
        recipe = self.recipe
        trained = [self.model, self.heads]
        steps, lr, decay = recipe.question_steps, recipe.question_lr, recipe.question_decay
        self._stage("questions", 1, trained, steps, lr, decay, self._question_step)

    def _vision_step(self, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        pictures = draw_pictures(rng, self.recipe.vision_batch)
        with _autocast():
            tokens = self.model.model.vision_tower(pictures.pixel_values).last_hidden_state
            return self.heads.loss(tokens, pictures)

    def _question_step(self, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        recipe = self.recipe
        pictures = draw_pictures(rng, recipe.question_batch)
        asked = [one for scene in pictures.scenes for one in draw_questions(scene, rng, recipe.questions_per_picture)]
        batch = self.encode(asked)
        with _autocast():
            features = self.model.model.get_image_features(pictures.pixel_values)
            per_question = features.pooler_output.repeat_interleave(recipe.questions_per_picture, dim=0)
            loss, right = question_loss(self.model, per_question, batch)
            vision_loss, accuracy = self.heads.loss(features.last_hidden_state, pictures)
        return loss + recipe.vision_loss_weight * vision_loss, {"answers": right, "loss": loss.item(), **accuracy}

    def _stage(
        self,
        name: str,
        stream: int,
        trained: Sequence[nn.Module],
        steps: int,
        lr: float,
        decay: float,
        step_fn: StepFunction,
    ) -> None:
        rng = np.random.default_rng([self.recipe.seed, stream])
        optimizers = build_optimizers(trained, lr, self.recipe.weight_decay)
        parameters = [p for module in trained for p in module.parameters()]
        self.model.train()
        started = time.monotonic()
        window: list[dict[str, float]] = []
        for step in self._progress(name, steps):
            factor = schedule(step, steps, self.recipe.warmup, decay)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * factor
            loss, metrics = step_fn(rng)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            window.append(metrics)
            if (step + 1) % 100 == 0 or step + 1 == steps:
                means = {key: sum(m[key] for m in window) / len(window) for key in window[0]}
                text = "  ".join(f"{key} {value:.3f}" for key, value in means.items())
                self.console.print(f"{name} {step + 1}/{steps}  {text}  {time.monotonic() - started:.0f} s")
                window = []
            if self.checkpoint is not None and ((step + 1) % 250 == 0 or step + 1 == steps):
                torch.save({"model": self.model.state_dict(), "heads": self.heads.state_dict()}, self.checkpoint)

    def _progress(self, name: str, steps: int) -> Iterator[int]:
        columns = (TextColumn(f"pre-training: {name}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console) as progress:
            yield from progress.track(range(steps))


def draw_questions(scene: Scene, rng: np.random.Generator, number: int) -> list[Asked]:
    """`number` random questions about one scene."""
    questions: list[Asked] = []
    while len(questions) < number:
        one = ask(scene, rng)
        if one is not None:
            questions.append(one)
    return questions


def _autocast() -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", dtype=torch.bfloat16)


TEMPLATE = PromptTemplate(prompt="{question}")
"""The tiny VLM's prompt: the question and nothing else."""

TARGETS = {"generated scenes": 0.90, "easy-VQA test": 0.75}
"""What makes the base worth protecting: accuracy on unseen scenes, and zero-shot on easy-VQA's own questions."""


def answer(model: Any, collator: VqaCollator, samples: Sequence[VqaSample], *, batch: int = 250) -> list[str]:
    """Greedy answers by `generate`, in order."""
    model.eval()
    answers: list[str] = []
    for start in range(0, len(samples), batch):
        inputs = collator.generate(list(samples[start : start + batch]))
        with torch.inference_mode():
            tokens = model.generate(**inputs)
        answers += collator.decode(tokens, inputs["input_ids"].shape[1])
    return answers


def accuracies(
    model: PaliGemmaForConditionalGeneration, processor: PaliGemmaProcessor, samples: Sequence[VqaSample]
) -> dict[str, tuple[int, int]]:
    """Exact matches: question type (and ``all``) → (right, asked)."""
    predictions = answer(model, VqaCollator(processor, TEMPLATE), samples)
    counts: dict[str, tuple[int, int]] = {}
    for sample, prediction in zip(samples, predictions, strict=True):
        for name in (sample.extra["question_type"], "all"):
            right, asked = counts.get(name, (0, 0))
            counts[name] = (right + (prediction == sample.answers[0]), asked + 1)
    return counts


def evaluate(
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    *,
    scenes: int = 2000,
    easy: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, tuple[int, int]]]:
    """Accuracy by question type on generated scenes no training saw, and zero-shot on easy-VQA's test set.

    easy-VQA's questions are a random sample at their natural mix, in its own words.
    """
    return {
        "generated scenes": accuracies(model, processor, scene_samples("held-out", scenes, seed)),
        "easy-VQA test": accuracies(model, processor, easy_samples("test", easy, seed)),
    }


def report(results: dict[str, dict[str, tuple[int, int]]], console: Console) -> bool:
    """Print a table of `evaluate`'s figures; whether `TARGETS` are met."""
    types = (*QUESTION_TYPES, "all")
    table = Table("accuracy %", *types)
    for name, counts in results.items():
        cells = [f"{100 * counts[t][0] / counts[t][1]:.1f} ({counts[t][1]})" if t in counts else "" for t in types]
        table.add_row(name, *cells)
    console.print(table)
    met = True
    for name, target in TARGETS.items():
        right, asked = results[name]["all"]
        if right < target * asked:
            met = False
            console.print(f"[yellow]{name}: {100 * right / asked:.1f} % is below the target of {100 * target:.0f} %")
    return met


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of pre-training, for `main` and for whoever embeds it."""
    default = Recipe()
    parser.add_argument("--output", type=Path, default=Path("tiny_vlm"), help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    parser.add_argument("--vision-steps", type=int, default=default.vision_steps)
    parser.add_argument("--question-steps", type=int, default=default.question_steps)
    parser.add_argument("--evaluate", type=int, default=2000, help="questions of each kind to evaluate on at the end")
    parser.add_argument("--checkpoint", type=Path, default=None, help="file to save raw progress in now and then")


def main(args: argparse.Namespace | Sequence[str] | None = None) -> int:
    """`scale-digrap quickstart --pretrain`: run the recipe, write the model, print what it can do.

    Args:
        args: parsed options (those of `add_arguments`; absent ones take their defaults), or a command line.

    Returns:
        0 when the targets are met, else 1. The weights are written either way.
    """
    parser = argparse.ArgumentParser(prog="scale-digrap quickstart --pretrain", description=__doc__)
    add_arguments(parser)
    if not isinstance(args, argparse.Namespace):
        args = parser.parse_args(args)
    options = argparse.Namespace(**{**vars(parser.parse_args([])), **vars(args)})
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console()
    easyvqa.load("test")  # an hour from now would be too late to learn that the package is missing
    recipe = Recipe(seed=options.seed, vision_steps=options.vision_steps, question_steps=options.question_steps)
    started = time.monotonic()
    training = Pretraining(recipe, console=console, checkpoint=options.checkpoint)
    model = training.run()
    folder = tiny_vlm.save(model, training.processor, options.output)
    size = sum(path.stat().st_size for path in folder.iterdir())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{folder}: {parameters / 1e6:.2f} M parameters, {size / 1e6:.1f} MB, {time.monotonic() - started:.0f} s"
    )
    results = evaluate(model, training.processor, scenes=options.evaluate, easy=options.evaluate)
    return 0 if report(results, console) else 1


if __name__ == "__main__":
    raise SystemExit(main())
