"""Shift scores as the authors of FRAMES-VQA compute them, against a second implementation from their formulas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scale_digrap.data.loader import ShardDataset
from scale_digrap.data.sample import VqaSample
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation.embedder import Embedder
from scale_digrap.evaluation.gaussian import Mahalanobis, StreamingGaussian
from scale_digrap.evaluation.shift import SPACES, ShiftError
from scale_digrap.models.collate import PromptTemplate, VqaCollator
from tests.evaluation.test_shift import build, data, rows, scores, values  # noqa: F401
from tests.models import tiny

NAMES = ("same", "vision", "question", "alone")
FRAMES = {"embeddings": "frames", "regularization": "frames"}


def embedded(path: str) -> dict[str, list]:
    """Row by row out of Transformers' own hidden states, on the loader's batches."""
    model, collator = build("plain")
    model.eval()
    found: dict[str, list] = {space: [] for space in SPACES}
    samples = list(ShardDataset(path))
    for start in range(0, len(samples), 3):
        inputs = collator.generate(samples[start : start + 3])
        is_image = inputs["input_ids"] == model.config.image_token_id
        without = dict(inputs, attention_mask=inputs["attention_mask"] * ~is_image)
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
            masked = model(**without, output_hidden_states=True).hidden_states[-1]
        for row, there in enumerate(inputs["attention_mask"].bool().numpy()):
            image = is_image[row].numpy()
            text, last = there & ~image, states[-1][row].numpy()
            found["image"].append(states[0][row].numpy()[image].mean(0) if image.any() else None)
            found["question"].append(masked[row].numpy()[text].mean(0))
            means = [last[part].mean(0) for part in (image, text) if part.any()]
            found["joint"].append(sum(means) / len(means))
    return found


def inverse64(covariance: np.ndarray) -> np.ndarray:
    """The pseudo-inverse in float64, with the cut that float32 makes."""
    d = len(covariance)
    loaded = covariance.astype(np.float32) + np.float32(1e-8) * np.eye(d, dtype=np.float32)
    left, singular, right = np.linalg.svd(loaded.astype(np.float64))
    kept = singular > d * np.finfo(np.float32).eps * singular[0]
    assert 0 < kept.sum() < d
    return right[kept].T @ np.diag(1 / singular[kept]) @ left[:, kept].T


def inverse32(covariance: np.ndarray) -> np.ndarray:
    """torch's own, in float32 throughout."""
    loaded = torch.from_numpy(covariance).float() + 1e-8 * torch.eye(len(covariance))
    return torch.linalg.pinv(loaded).double().numpy()


def expected(data: dict[str, str], inverse) -> dict[str, dict[str, np.ndarray]]:  # noqa: F811
    train, result = embedded(data["train"]), {}
    suites = {name: embedded(data[name]) for name in NAMES}
    for space in SPACES:
        vectors = np.array([vector for vector in train[space] if vector is not None])
        sigma = inverse(np.cov(vectors.T))
        for name in NAMES:
            deltas = [None if v is None else v - vectors.mean(0) for v in suites[name][space]]
            distances = [None if delta is None else np.sqrt(delta @ sigma @ delta) for delta in deltas]
            result.setdefault(name, {})[space] = values(distances)
    return result


def equal(folder: Path, wanted: dict[str, dict[str, np.ndarray]], rtol: float) -> None:
    for name, spaces in wanted.items():
        for space, column in spaces.items():
            made = values([row[space] for row in rows(folder, name)])
            np.testing.assert_allclose(made, column, rtol=rtol, err_msg=f"{name} {space}")


def test_frames_is_the_authors_measure(data, tmp_path: Path):  # noqa: F811
    report = scores(data, tmp_path, **FRAMES)
    equal(tmp_path, expected(data, inverse64), 1e-6)
    equal(tmp_path, expected(data, inverse32), 2e-2)
    assert (report.settings["embeddings"], report.settings["regularization"]) == ("frames", "frames")
    assert report.settings["shrinkage"] == dict.fromkeys(SPACES)
    assert report.suites["alone"]["image"] is None
    json.dumps(report.to_json())


def test_frames_differs_from_the_default_in_question_and_joint_alone(data, tmp_path: Path):  # noqa: F811
    scores(data, tmp_path / "tokens")
    scores(data, tmp_path / "frames", embeddings="frames")
    for space, same in {"image": True, "question": False, "joint": False}.items():
        columns = [values([row[space] for row in rows(tmp_path / kind, "same")]) for kind in ("tokens", "frames")]
        assert np.allclose(*columns, rtol=1e-9) == same, space


def _all_ranks(data, out: str, kinds):  # noqa: F811
    return [scores(data, Path(out) / kind, kind, **FRAMES).to_json() for kind in kinds]


@pytest.mark.distributed
def test_frames_on_two_ranks(dist_pool, data, tmp_path: Path):  # noqa: F811
    """Plain and FSDP2; a suite without any image, and ranks with unequal numbers of samples."""
    ranks = dist_pool(2).run(_all_ranks, data, str(tmp_path), ["plain", "fsdp"])
    assert ranks[0] == ranks[1]
    wanted = expected(data, inverse64)
    for kind in ("plain", "fsdp"):
        equal(tmp_path / kind, wanted, 1e-6)


def picture(name: str, question: str, seed: int | None) -> VqaSample:
    image = None if seed is None else tiny.picture(("red", "blue", "green")[seed % 3], seed)
    return VqaSample(key=name, image=image, question=question, answers=["red"], question_id=name)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_question_of_every_family_does_not_see_the_image(family: str):
    torch.manual_seed(0)
    model, processor = getattr(tiny, family)()
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.1)
    collator = VqaCollator(processor, PromptTemplate("{question}"))

    def embed(kind: str, seeds):
        questions = ["what color is the shape ?", "which circle", "what is the thing"]
        samples = [picture(f"s{i}", q, seed) for i, (q, seed) in enumerate(zip(questions, seeds, strict=True))]
        inputs = collator.generate(samples)
        inputs["pixel_values"] = inputs["pixel_values"].double()
        with torch.no_grad():
            return Embedder(model, kind)(inputs), inputs

    first, inputs = embed("frames", (0, 1, None))
    second, _ = embed("frames", (1, 0, None))
    tokens, _ = embed("tokens", (0, 1, None))
    others, _ = embed("tokens", (1, 0, None))
    for made in (first, second, tokens):
        assert all(torch.isfinite(getattr(made, space)[:2]).all() for space in SPACES)
    torch.testing.assert_close(first.question, second.question, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(tokens.question[:2], others.question[:2], rtol=1e-3)
    assert not torch.allclose(first.question[:2], tokens.question[:2], rtol=1e-3)
    torch.testing.assert_close(first.image[:2], tokens.image[:2])
    # without an image the three measures of the text are one
    torch.testing.assert_close(first.question[2], tokens.question[2], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(first.joint[2], tokens.joint[2])
    # n_image mean_image + n_text mean_text = n joint (tokens), and the middle of the two means is joint (frames)
    token = collator.tokenizer.convert_tokens_to_ids(
        {"qwen2_5_vl": "<|image_pad|>", "gemma3": "<image_soft_token>"}.get(family, "<image>")
    )
    for row in range(2):
        there = int(inputs["attention_mask"][row].sum())
        image = int((inputs["input_ids"][row] == token).sum())
        mean_image = (there * tokens.joint[row] - (there - image) * tokens.question[row]) / image
        torch.testing.assert_close(first.joint[row], (mean_image + tokens.question[row]) / 2, rtol=1e-6, atol=1e-9)


def test_the_question_of_paligemma_is_what_its_language_model_makes_of_the_text_alone():
    model, collator = build("plain")
    model.eval()
    inputs = collator.generate([picture("a", "what color is the shape?", 0)])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    text = inputs["input_ids"][:, inputs["input_ids"][0] != model.config.image_token_id]
    decoder = model.get_decoder()
    with torch.no_grad():
        made = Embedder(model, "frames")(inputs).question
        embeds = model.get_input_embeddings()(text)
        everyone = torch.zeros(1, 1, text.shape[1], text.shape[1], dtype=torch.float64)
        masks = {"full_attention": everyone, "sliding_attention": everyone}
        mapping = isinstance(getattr(decoder.config, "layer_types", None), list) and "gemma2" in type(decoder).__name__
        states = decoder(inputs_embeds=embeds, attention_mask=masks if mapping else everyone).last_hidden_state
    torch.testing.assert_close(made, states.mean(1), rtol=1e-4, atol=1e-6)


def test_the_cut_of_float32_drops_directions_without_variance():
    """A steep spectrum: float64's cut keeps all of it, and float32's what float32 can tell from rounding."""
    rng = np.random.default_rng(0)
    d = 512
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    spread = np.logspace(0, -8, d)
    vectors = rng.normal(size=(3000, d)) * np.sqrt(spread) @ basis.T
    fitted = StreamingGaussian(d)
    fitted.update(torch.from_numpy(vectors))
    points = torch.from_numpy(rng.normal(size=(20, d)) * np.sqrt(spread) @ basis.T)
    loaded = fitted.covariance.float() + 1e-8 * torch.eye(d)
    kept = int(torch.linalg.matrix_rank(loaded, hermitian=True))
    assert 200 < kept < 320
    ours = Mahalanobis(fitted, "frames")
    assert abs(ours._whitener.shape[1] - kept) <= 2
    delta = (points - fitted.mean).float()
    theirs = (delta @ torch.linalg.pinv(loaded) * delta).sum(1).sqrt()
    torch.testing.assert_close(ours.distances(points), theirs.double(), rtol=2e-2, atol=0)
    assert Mahalanobis(fitted, "pinv")._whitener.shape[1] == d
    assert (Mahalanobis(fitted, "pinv").distances(points) > 1.2 * ours.distances(points)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings": "mean"}, "embeddings must be tokens or frames, got 'mean'"),
        ({"regularization": "frame"}, r"regularization must be oas, pinv, frames or a number in \[0, 1\], got 'frame'"),
        ({"regularization": True}, "got (True|'true')"),  # in a file it is the text that stands there
        ({"regularization": float("nan")}, "got (nan|'NaN')"),
        ({"regularization": [0.1]}, r"got '?\[0.1\]"),
    ],
)
def test_unknown_measures_are_refused_before_a_model_is_asked(options, message: str, data, tmp_path: Path):  # noqa: F811
    from scale_digrap.evaluation.evaluate import run
    from scale_digrap.evaluation.evaluate_config import load_evaluate_config

    with pytest.raises(ShiftError, match=message):
        scores(data, tmp_path, **options)
    file = tmp_path / "evaluate.yaml"
    file.write_text(
        json.dumps(
            {
                "out": str(tmp_path / "out"),
                "suites": {"set": "quickstart", "folder": str(tmp_path), "missing": "allow"},
                "models": {"m": {"path": "builtin:tiny-vlm"}},
                "shift": {"train": [data["train"]], **options},
            }
        )
    )
    with pytest.raises(ScaleDigrapError, match=message):
        run(load_evaluate_config(file))
    assert not (tmp_path / "out").exists()
