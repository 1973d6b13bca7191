"""Shift scores against numpy in one process, with Transformers' own hidden states."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from scale_digrap.data.loader import ShardDataset
from scale_digrap.data.sample import VqaSample
from scale_digrap.evaluation.gaussian import Mahalanobis, StreamingGaussian
from scale_digrap.evaluation.shift import SPACES, Embedder, ShiftError, shift_scores
from scale_digrap.evaluation.suites import Suite
from scale_digrap.models.collate import PromptTemplate, VqaCollator
from scale_digrap.training.engine import create_engine
from tests.evaluation.tiny import shard_fsdp2, tiny_collator, tiny_model, with_lora
from tests.models import tiny
from tests.models.conftest import checkpoint  # noqa: F401
from tests.training import runs

BRIEF = ["what color is the shape?", "is there a circle?"]
LONG = ["how many red shapes are there to the left of the blue circle?", "what shape is above the green triangle?"]


def write(path: Path, count: int, *, seed: int, dark: bool = False, questions=BRIEF, text_only=(), broken=()) -> str:
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for index in range(count):
            buffer = io.BytesIO()
            pixels = rng.integers(0, 30, (64, 64, 3)) if dark else rng.integers(60, 256, (64, 64, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            meta = {"question": questions[index % len(questions)], "answers": ["circle"], "question_id": f"q{index}"}
            members = {"json": json.dumps(meta).encode()}
            if index not in text_only:
                members["png"] = b"not a picture" if index in broken else buffer.getvalue()
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{index:05d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("shift-data")
    return {
        "train": write(folder / "train.tar", 26, seed=0, questions=[*BRIEF, *LONG], text_only=(3, 17)),
        "same": write(folder / "same.tar", 8, seed=1, questions=[*BRIEF, *LONG]),
        "vision": write(folder / "vision.tar", 7, seed=2, dark=True, questions=[*BRIEF, *LONG]),
        "question": write(folder / "question.tar", 5, seed=3, questions=["red red red red?"], text_only=(1,)),
        "broken": write(folder / "broken.tar", 12, seed=4, broken=(7,)),
        "alone": write(folder / "alone.tar", 4, seed=5, text_only=range(4)),
    }


def suites(data: dict[str, str]) -> list[Suite]:
    made = [
        Suite(name="same", group="id", shift="none", shards=(data["same"],)),
        Suite(name="vision", group="near", shift="vision", shards=(data["vision"],)),
        Suite(name="question", group="near", shift="question", shards=(data["question"],)),
        Suite(name="alone", group="near", shift="multimodal", shards=(data["alone"],)),
        Suite(name="absent", group="far", shift="skill"),
    ]
    return made


def build(kind: str):
    collator = tiny_collator()
    model = tiny_model(collator).double()
    if "lora" in kind:
        model = with_lora(model).double()
    return (shard_fsdp2(model) if "fsdp" in kind else model), collator


def scores(data: dict[str, str], out: Path, kind: str = "plain", **options):
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model, collator = build(kind)
    options = {"batch_size": 3, "samples": None, **options}
    report = shift_scores(
        model.train(), collator, data["train"], suites(data), out=out, dp_rank=rank, dp_world_size=world, **options
    )
    assert model.training
    return report


def rows(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / "shift" / f"{name}.jsonl").read_text().splitlines()]


def reference(data: dict[str, str]) -> dict[str, dict[str, list]]:
    """Distances by numpy, with the inverse that the definition names."""
    model, collator = build("plain")
    model.eval()

    def embed(path):
        found = {space: [] for space in SPACES}
        samples = list(ShardDataset(path))
        for start in range(0, len(samples), 3):  # the loader's batches: Gemma's norms are in float32, whatever it is in
            inputs = collator.generate(samples[start : start + 3])
            with torch.no_grad():
                states = model(**inputs, output_hidden_states=True).hidden_states
            for row, mask in enumerate(inputs["attention_mask"].bool().numpy()):
                image = (inputs["input_ids"][row] == model.config.image_token_id).numpy()
                first, last = states[0][row].numpy(), states[-1][row].numpy()
                found["image"].append(first[image].mean(0) if image.any() else None)
                found["question"].append(last[mask & ~image].mean(0))
                found["joint"].append(last[mask].mean(0))
        return found

    train, result = embed(data["train"]), {}
    for space in SPACES:
        vectors = np.array([vector for vector in train[space] if vector is not None])
        n, d = vectors.shape
        covariance = np.cov(vectors.T)
        trace, square = np.trace(covariance), np.trace(covariance @ covariance)
        rho = min(1.0, ((1 - 2 / d) * square + trace**2) / ((n + 1 - 2 / d) * (square - trace**2 / d)))
        inverse = np.linalg.inv((1 - rho) * covariance + rho * trace / d * np.eye(d))
        for name in ("same", "vision", "question", "alone"):
            deltas = [None if v is None else v - vectors.mean(0) for v in embed(data[name])[space]]
            distances = [None if delta is None else float(np.sqrt(delta @ inverse @ delta)) for delta in deltas]
            result.setdefault(name, {})[space] = distances
    return result


def values(column: list) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in column])


def test_equal_to_numpy_and_a_planted_shift_is_further(data, tmp_path: Path):
    report = scores(data, tmp_path)
    for name, spaces in reference(data).items():
        for space, expected in spaces.items():
            made = values([row[space] for row in rows(tmp_path, name)])
            np.testing.assert_allclose(made, values(expected), rtol=1e-9)
    means = {
        name: {space: suite[space] and suite[space]["mean"] for space in SPACES}
        for name, suite in report.suites.items()
    }
    assert means["vision"]["image"] > 2 * means["same"]["image"]
    assert means["question"]["question"] > 2 * means["same"]["question"]
    assert means["question"]["joint"] > means["same"]["joint"]
    assert report.suites["question"]["without_image"] == 1
    assert means["alone"]["image"] is None
    assert report.train == {"shards": [data["train"]], "questions": 26, "samples": 26, "without_image": 2}
    assert report.missing == ["absent"]
    assert [row["question_id"] for row in rows(tmp_path, "same")] == [f"q{i}" for i in range(8)]
    json.dumps(report.to_json())


def test_subsets_are_spread_over_the_data(data, tmp_path: Path):
    report = scores(data, tmp_path, samples=20, suite_samples=3)
    assert report.train["samples"] == 20
    assert [row["index"] for row in rows(tmp_path, "same")] == [0, 4, 7]


def _all_ranks(data, out: str, kinds):
    return [scores(data, Path(out) / kind, kind).to_json() for kind in kinds]


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_the_same_on_any_number_of_ranks(dist_pool, data, tmp_path: Path, world: int):
    kinds = ["plain", "fsdp", "fsdp-lora"] if world == 2 else ["plain"]
    ranks = dist_pool(world).run(_all_ranks, data, str(tmp_path), kinds)
    assert all(rank == ranks[0] for rank in ranks)
    for kind in kinds:
        alone = tmp_path / f"{kind}-alone"
        scores(data, alone, kind.replace("fsdp", "plain"))
        for name in ("same", "vision", "question", "alone"):
            ours, expected = rows(tmp_path / kind, name), rows(alone, name)
            assert [row["question_id"] for row in ours] == [row["question_id"] for row in expected]
            for space in SPACES:
                np.testing.assert_allclose(
                    values([row[space] for row in ours]), values([row[space] for row in expected]), rtol=1e-10
                )


def _zero3(path, data, folder: str, embeddings: str):
    config = runs.config(
        path,
        data["train"],
        folder,
        sharding={"engine": "deepspeed", "zero": {"stage": 3, "param_persistence_threshold": 700}},
    )
    engine = create_engine(config)
    loaded = engine.load(config, train=False)
    spread = any(getattr(p, "ds_tensor", None) is not None for p in loaded.model.parameters())
    shift_scores(
        loaded.model, loaded.collator, data["train"], suites(data), out=folder, batch_size=3, samples=None,
        dp_rank=engine.dp_rank, dp_world_size=engine.dp_world_size, embeddings=embeddings,
    )  # fmt: skip
    return spread


@pytest.mark.distributed
@pytest.mark.parametrize("embeddings", ["tokens", "frames"])
def test_zero3(dist_pool, checkpoint, data, tmp_path: Path, embeddings: str):  # noqa: F811
    """One suite has no image at all and the ranks' batches are mixed: all of them must run the vision tower."""
    path = checkpoint("paligemma")
    assert all(dist_pool(2).run(_zero3, path, data, str(tmp_path / "two"), embeddings))
    config = runs.config(path, data["train"], str(tmp_path / "one"))
    engine = create_engine(config)
    loaded = engine.load(config, train=False)
    shift_scores(
        loaded.model,
        loaded.collator,
        data["train"],
        suites(data),
        out=tmp_path / "one",
        batch_size=3,
        samples=None,
        embeddings=embeddings,
    )
    for name in ("same", "vision", "question", "alone"):
        for ours, expected in zip(rows(tmp_path / "two", name), rows(tmp_path / "one", name), strict=True):
            assert [ours[s] for s in SPACES] == [
                v if v is None else pytest.approx(v, rel=2e-3) for v in map(expected.get, SPACES)
            ]


def _fails(data, out: str):
    messages = []
    for kind in ("plain", "fsdp"):
        model, collator = build(kind)
        suite = Suite(name="same", group="id", shift="none", shards=(data["broken"],))
        with pytest.raises(ShiftError) as caught:
            shift_scores(
                model, collator, data["train"], [suite], out=out, batch_size=3, dp_rank=dist.get_rank(),
                dp_world_size=dist.get_world_size(),
            )  # fmt: skip
        messages.append(str(caught.value))
    return messages


@pytest.mark.distributed
def test_one_ranks_bad_sample_stops_all_ranks(dist_pool, data, tmp_path: Path):
    ranks = dist_pool(2).run(_fails, data, str(tmp_path))
    for message in [message for rank in ranks for message in rank]:
        assert "suite 'same' failed on rank 0" in message
        assert "00007" in message


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_embeddings_of_every_family(family: str):
    torch.manual_seed(0)
    model, processor = getattr(tiny, family)()
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.1)  # Gemma 3's projection of images starts at zero
    collator = VqaCollator(processor, PromptTemplate("{question}"))
    samples = [
        VqaSample(
            key="a",
            image=tiny.picture("red", 0),
            question="what color is the shape ?",
            answers=["red"],
            question_id="a",
        ),
        VqaSample(key="b", image=tiny.picture("blue", 1), question="which circle", answers=["blue"], question_id="b"),
        VqaSample(key="c", image=None, question="what is the thing", answers=["blue"], question_id="c"),
    ]
    inputs = collator.generate(samples)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.no_grad():
        made = Embedder(model)(inputs)
        states = model(**inputs, output_hidden_states=True).hidden_states
    token = collator.tokenizer.convert_tokens_to_ids(
        {"qwen2_5_vl": "<|image_pad|>", "gemma3": "<image_soft_token>"}.get(family, "<image>")
    )
    for row in range(3):
        there = inputs["attention_mask"][row].bool()
        image = there & (inputs["input_ids"][row] == token)
        assert bool(image.any()) == bool(made.has_image[row]) == (row < 2)
        if row < 2:
            torch.testing.assert_close(made.image[row], states[0][row][image].mean(0))
        torch.testing.assert_close(made.question[row], states[-1][row][there & ~image].mean(0))
        torch.testing.assert_close(made.joint[row], states[-1][row][there].mean(0))


def test_models_without_image_tokens_are_refused():
    from transformers import GemmaConfig, GemmaForCausalLM

    model = GemmaForCausalLM(GemmaConfig(**{**tiny.text_config(), "vocab_size": 20, "num_hidden_layers": 1}))
    with pytest.raises(ShiftError, match="GemmaForCausalLM has no image_token_id"):
        Embedder(model)


def gaussian(vectors: np.ndarray, cuts=()) -> StreamingGaussian:
    made = StreamingGaussian(vectors.shape[1])
    for part in np.split(vectors, list(cuts)):
        made.update(torch.from_numpy(part))
    return made


def test_streaming_covariance_does_not_cancel():
    """Values far from zero: the sum of squares would lose every digit of the covariance."""
    vectors = np.random.default_rng(0).normal(size=(1000, 6)) @ np.diag([1, 2, 3, 4, 5, 6.0]) + 1e7
    whole, first, second = gaussian(vectors, [1, 1, 40, 700]), gaussian(vectors[:300]), gaussian(vectors[300:])
    first.merge(StreamingGaussian(6))
    first.merge(second)
    for made in (whole, first):
        assert made.count == 1000
        np.testing.assert_allclose(made.mean, vectors.mean(0), rtol=1e-14)
        np.testing.assert_allclose(made.covariance, np.cov((vectors - 1e7).T), rtol=1e-6, atol=1e-6)


def _reduced(vectors: np.ndarray, parts):
    made = gaussian(vectors[slice(*parts[dist.get_rank()])])
    made.all_reduce()
    return made.count, made.mean.numpy(), made.covariance.numpy()


@pytest.mark.distributed
def test_all_reduced_gaussian(dist_pool):
    """Unequal shares, one of them empty."""
    vectors = np.random.default_rng(1).normal(size=(50, 4)) + 100
    ranks = dist_pool(3).run(_reduced, vectors, [(0, 7), (0, 0), (7, 50)])
    for count, mean, covariance in ranks:
        assert count == 50
        np.testing.assert_allclose(mean, vectors.mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(vectors.T), rtol=1e-10)
        assert covariance.tobytes() == ranks[0][2].tobytes()


def test_singular_covariances():
    rng = np.random.default_rng(2)
    flat = rng.normal(size=(30, 3)) @ rng.normal(
        size=(3, 8)
    )  # rank 3 in 8 dimensions, and fewer samples than those below
    fitted = gaussian(flat)
    inside, outside = torch.from_numpy(flat[:5]), torch.from_numpy(flat[:5] + rng.normal(size=(5, 8)))
    for option in ("oas", 0.1, "pinv"):
        distances = Mahalanobis(fitted, option)
        assert (distances.distances(outside) > distances.distances(inside)).all()
    expected = [
        np.sqrt(d @ np.linalg.pinv(np.cov(flat.T) + 1e-8 * np.eye(8), hermitian=True) @ d)
        for d in inside.numpy() - flat.mean(0)
    ]
    np.testing.assert_allclose(Mahalanobis(fitted, "pinv").distances(inside), expected, rtol=1e-6)
    with pytest.raises(ShiftError, match=r"is singular with regularization=0\.0: use oas"):
        Mahalanobis(fitted, 0.0)
    with pytest.raises(ShiftError, match="must be oas, pinv, frames or a number"):
        Mahalanobis(fitted, "ridge")
    with pytest.raises(ShiftError, match="all 4 training embeddings are equal"):
        Mahalanobis(gaussian(np.ones((4, 3))))
    with pytest.raises(ShiftError, match="a covariance of 1 vectors"):
        Mahalanobis(gaussian(np.ones((1, 3))))
    with pytest.raises(ShiftError, match="infinite or undefined"):
        Mahalanobis(gaussian(np.array([[1.0, np.inf], [0.0, 1.0], [2.0, 2.0]])))


def test_distances_of_a_known_gaussian():
    """Squared distances of its own samples are χ² with d degrees of freedom."""
    from scipy import stats

    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(20000, 5)) @ rng.normal(size=(5, 5)) + 3
    squares = Mahalanobis(gaussian(vectors), 0.0).distances(torch.from_numpy(vectors)).square()
    assert stats.kstest(squares.numpy(), stats.chi2(5).cdf).pvalue > 0.001
    assert Mahalanobis(gaussian(vectors), "oas").shrinkage < 0.01
