"""The tiny VLM: an ordinary PaliGemma to Transformers, exact in bf16, trained as it generates, and good at its job."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PaliGemmaForConditionalGeneration
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor

from scale_digrap.models.collate import VqaCollator
from scale_digrap.quickstart import pretrain, tiny_vlm
from scale_digrap.quickstart.data import scene_samples
from scale_digrap.quickstart.questions import ANSWERS
from scale_digrap.quickstart.scenes import Asked


@pytest.fixture(scope="module")
def base():
    """The committed weights, through the public classes only."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlm.FOLDER, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(tiny_vlm.FOLDER)


def test_transformers_own_classes_load_it(base):
    model, processor = base
    assert isinstance(model, PaliGemmaForConditionalGeneration)
    assert isinstance(processor, PaliGemmaProcessor)
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    assert len(processor.tokenizer) == model.get_input_embeddings().num_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    assert not model.generation_config.do_sample


def test_weights_are_small_and_exact_in_bf16(base):
    model, _ = base
    files = list(tiny_vlm.FOLDER.iterdir())
    assert sum(path.stat().st_size for path in files) <= 12e6
    stored = tiny_vlm.stored_tensors()
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameter.to(torch.bfloat16).float()), name
        assert torch.isfinite(parameter).all(), name
        assert parameter.abs().max() > 0, f"{name} was never trained"


def test_saved_processor_is_the_one_that_is_built(base):
    _, saved = base
    built = tiny_vlm.build_processor()
    assert saved.tokenizer.get_vocab() == built.tokenizer.get_vocab()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    inputs = {"images": image, "text": "<image>Is there a circle?", "suffix": "yes", "return_tensors": "pt"}
    for one, other in zip(saved(**inputs).values(), built(**inputs).values(), strict=True):
        assert torch.equal(one, other)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(saved(**inputs)["pixel_values"][0], pixels)


def test_answers_decode_to_the_plain_word(base):
    _, processor = base
    for word in ANSWERS:
        (token,) = processor.tokenizer(word, add_special_tokens=False)["input_ids"]
        assert processor.tokenizer.decode([token, processor.tokenizer.eos_token_id], skip_special_tokens=True) == word


def test_pretraining_feeds_the_tokens_that_the_processor_makes(base):
    _, processor = base
    asked = [
        Asked("has_shape", "is there a circle?", "yes"),
        Asked("side_of_colour", "on which side is the purple figure, left or right?", "left"),
        Asked("shape", "name the figure you see", "cross"),
    ]
    ours = pretrain.QuestionEncoder(processor)(asked)
    image = Image.new("RGB", (64, 64))
    theirs = processor(
        images=[image] * 3,
        text=["<image>" + one.question for one in asked],
        suffix=[one.answer for one in asked],
        return_tensors="pt",
        padding=True,
    )
    assert set(ours) <= set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_pretraining_loss_is_the_models_own(base):
    model, processor = base
    samples = scene_samples("held-out", 6, seed=5)
    batch = VqaCollator(processor, pretrain.TEMPLATE).train(samples)
    own = model(**batch).loss
    asked = [Asked(sample.extra["family"], sample.question, sample.answers[0]) for sample in samples]
    encoded = pretrain.QuestionEncoder(processor)(asked)
    features = model.model.get_image_features(batch["pixel_values"]).pooler_output
    loss, _ = pretrain.question_loss(model, features, encoded)
    torch.testing.assert_close(loss, own, rtol=1e-4, atol=1e-6)


def test_training_forward_and_generation_agree(base):
    """Teacher forcing's first answer token is generate's, though one is padded on the right, the other on the left."""
    model, processor = base
    collator = VqaCollator(processor, pretrain.TEMPLATE)
    samples = scene_samples("held-out", 64, seed=9)
    train, prompt = collator.train(samples), collator.generate(samples)
    with torch.no_grad():
        logits = model(**{name: value for name, value in train.items() if name != "labels"}).logits
        first = (train["labels"] != -100).long().argmax(dim=1) - 1
        forced = logits[torch.arange(len(samples)), first]
        out = model.generate(**prompt, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(out.logits[0], forced, rtol=1e-3, atol=1e-3)
    assert torch.equal(out.sequences[:, -1], forced.argmax(dim=-1))


def test_the_base_is_worth_protecting(base):
    pytest.importorskip("easy_vqa")
    results = pretrain.evaluate(*base, scenes=250, easy=250, seed=1)
    for name, least in (("generated scenes", 0.88), ("easy-VQA test", 0.72)):
        right, asked = results[name]["all"]
        assert right / asked >= least, results
    by_type = results["generated scenes"]
    assert set(by_type) == {"yes/no", "shape", "colour", "count", "position", "all"}
    assert all(right / asked > 0.75 for right, asked in by_type.values()), by_type


def test_the_recipe_runs_end_to_end_and_is_reproducible(tmp_path, monkeypatch):
    """A few small steps of both stages; the committed weights took the same path for an hour."""
    pytest.importorskip("easy_vqa")
    monkeypatch.setattr(pretrain, "Recipe", partial(pretrain.Recipe, vision_batch=8, question_batch=4))

    def run(name: str, seed: int) -> dict[str, torch.Tensor]:
        options = {"seed": seed, "vision_steps": 3, "question_steps": 3, "evaluate": 10}
        assert pretrain.main(Namespace(output=tmp_path / name, **options)) == 1  # written, but below the targets
        return tiny_vlm.stored_tensors(tmp_path / name)

    first, again, other = run("a", 0), run("b", 0), run("c", 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "a")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o644}


def test_schedule_rises_holds_and_falls_to_nothing():
    factors = [pretrain.schedule(step, 100, 0.1, 0.3) for step in range(100)]
    assert all(a < b for a, b in pairwise(factors[:10]))
    assert factors[9:70] == [1.0] * 61
    assert all(a > b for a, b in pairwise(factors[69:]))
    assert 0 < factors[-1] < 0.01
    assert 0 < pretrain.schedule(0, 1, 0.1, 0.3) <= 1
