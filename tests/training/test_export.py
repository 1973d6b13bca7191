"""Exported folders against the live model: read by ``from_pretrained`` or peft alone, compared by logits and bits."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from scale_digrap.config import ModelConfig
from scale_digrap.data.sample import VqaSample
from scale_digrap.evaluation.wise import WiseError, interpolate
from scale_digrap.models import load_model
from scale_digrap.models.loading import ModelLoadError
from scale_digrap.training import manifest, run_folder, train
from scale_digrap.training.deferred import Deferred
from scale_digrap.training.engine import CheckpointError
from scale_digrap.training.export import ExportError, base_name, export
from scale_digrap.training.run_folder import RunFolderError
from tests.models import tiny
from tests.training import runs

ROOT = Path(__file__).parents[2]
LORA = {"enabled": True, "rank": 2, "train": ["multi_modal_projector"]}
SAVING = {"every": 2, "keep": 3, "save_final": True}
DIGRAP = {"name": "digrap", "lr": 1e-2, "omega_lr": 2.0}
SAMPLES = [
    VqaSample(f"s{i}", tiny.picture(color, i), "what color is the shape", [color], str(i))
    for i, color in enumerate(tiny.COLORS)
]


def live(model, shards, folder, /, **sections):
    """A run of two steps in this process, still in memory."""
    return train(
        runs.config(
            model, shards, folder, **{"checkpoint": SAVING, "training": {"steps": 2, "batch_size": 4}, **sections}
        )
    )


@torch.no_grad()
def logits(model, collator):
    batch = collator.train(SAMPLES)
    return model.eval()(**batch).logits.float()


def independent(folder, dtype=torch.float32):
    """The folder as anybody else would load it."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)


def tensors(folder):
    """Everything in a folder's safetensors files."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)


@pytest.fixture(scope="module")
def full(checkpoint, shards, tmp_path_factory):
    """Full fine-tuning with a part frozen, tied embeddings, and DiGraP's anchors."""
    folder = tmp_path_factory.mktemp("full")
    frozen = {"path": str(checkpoint("paligemma")), "freeze": ["vision_tower"]}
    return live(checkpoint("paligemma"), shards, folder / "run", model=frozen, optimizer=DIGRAP)


@pytest.fixture(scope="module")
def lora(checkpoint, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return live(checkpoint("llava"), shards, folder / "run", lora=LORA, optimizer=DIGRAP)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_exported_model_has_the_live_models_logits(checkpoint, shards, tmp_path, family):
    result = live(checkpoint(family), shards, tmp_path / "run")
    done = export(tmp_path / "run", tmp_path / "model")
    assert (done.step, done.adapter, done.dtype, done.mixed) == (2, False, "float32", 0)
    expected = logits(result.model, result.collator)
    assert torch.equal(logits(independent(tmp_path / "model"), result.collator), expected)
    assert not torch.allclose(logits(independent(checkpoint(family)), result.collator), expected, atol=1e-3)
    assert same(tensors(tmp_path / "model"), tensors(tmp_path / "run/final"))
    assert AutoProcessor.from_pretrained(tmp_path / "model").tokenizer.get_vocab()


def test_frozen_and_tied_weights_come_along(full, tmp_path):
    export(full.run_dir, tmp_path / "model")
    model = independent(tmp_path / "model")
    assert torch.equal(logits(model, full.collator), logits(full.model, full.collator))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    record = json.loads((tmp_path / "model/scale_digrap.json").read_text())
    assert record["prompt_template"] == full.collator.template.to_dict()
    assert record["checkpoint"] == {"step": 2, "wise": None, "optimizer": "DiGraP"}
    again = load_model(ModelConfig(path=str(tmp_path / "model")))
    assert runs.distance(dict(full.model.named_parameters()), dict(again.model.named_parameters())) == 0


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_wise_with_stored_anchors_equals_mixing_the_live_model(full, tmp_path, alpha):
    done = export(full.run_dir, tmp_path / "model", wise=alpha)
    assert done.mixed == len(full.loaded.trained())
    with interpolate(full.model, alpha, full.anchored):
        expected = logits(full.model, full.collator)
    model = independent(tmp_path / "model")
    assert torch.equal(logits(model, full.collator), expected)
    if alpha == 0:
        assert torch.equal(expected, logits(independent(full.loaded.path), full.collator))


def test_wise_without_stored_anchors_mixes_with_the_base(checkpoint, shards, tmp_path):
    model = {"path": str(checkpoint("llava")), "new_layers": [r"multi_modal_projector\.linear_2"]}
    result = live(checkpoint("llava"), shards, tmp_path / "run", model=model)
    done = export(tmp_path / "run", tmp_path / "model", wise=0.25)
    start, mixed = independent(checkpoint("llava")).state_dict(), independent(tmp_path / "model").state_dict()
    moved = 0
    for name, value in result.model.state_dict().items():
        expected = value if "linear_2" in name else 0.75 * start[name] + 0.25 * value
        torch.testing.assert_close(mixed[name], expected, rtol=1e-6, atol=1e-7)
        moved += not torch.equal(value, start[name])
    assert moved > 10
    assert done.mixed == len(result.loaded.trained()) - 2


def test_exported_adapter_has_the_live_models_logits_and_trains_on(lora, shards, tmp_path):
    from peft import PeftModel

    done = export(lora.run_dir, tmp_path / "adapter")
    assert (done.adapter, done.files) == (True, ["adapter_model.safetensors"])
    model = PeftModel.from_pretrained(independent(lora.loaded.path), tmp_path / "adapter")
    assert torch.equal(logits(model, lora.collator), logits(lora.model, lora.collator))
    assert same(tensors(tmp_path / "adapter"), tensors(lora.run_dir / "final"))

    on = live(tmp_path / "adapter", shards, tmp_path / "on")
    assert sorted(on.loaded.trained()) == sorted(lora.loaded.trained())
    export(tmp_path / "on", tmp_path / "second")
    model = PeftModel.from_pretrained(independent(lora.loaded.path), tmp_path / "second")
    assert torch.equal(logits(model, on.collator), logits(on.model, on.collator))
    with pytest.raises(ExportError, match=r"no anchor of '.*modules_to_save.*'.*needs the anchors"):
        export(tmp_path / "on", tmp_path / "third", wise=0.5)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_an_adapter_of_which_a_part_is_frozen_is_saved_whole(lora, shards, tmp_path, alpha):
    """What the run goes on with and does not train belongs to its result too."""
    first = tensors(lora.run_dir / "final")
    frozen = {"path": str(lora.run_dir / "final"), "freeze": [r"q_proj\.lora_", "modules_to_save"]}
    again = live(frozen["path"], shards, tmp_path / "run", model=frozen, optimizer=DIGRAP)
    assert 0 < len(again.loaded.trained()) < len(first)
    export(again.run_dir, tmp_path / "out", wise=alpha)
    final, out = tensors(again.run_dir / "final"), tensors(tmp_path / "out")
    assert final.keys() == out.keys() == first.keys()
    for name in first:
        kept = "q_proj.lora_" in name or "lora_" not in name
        assert torch.equal(final[name], first[name]) == kept, name
        scale = alpha if alpha is not None and "lora_B" in name else 1.0
        assert torch.equal(out[name], final[name] * scale), name
    stored = run_folder.find(again.run_dir)
    resumed = runs.run(
        frozen["path"],
        shards,
        again.run_dir,
        model=frozen,
        optimizer=DIGRAP,
        training={"steps": 3, "batch_size": 4},
        checkpoint={"resume": str(stored)},
    )
    assert len(resumed["loss"]) == 3


def test_wise_of_an_adapter_scales_the_update(lora, tmp_path):
    """Against the merged weights: W0 + α · scaling · B·A, and the projector trained in full mixed with its anchor."""
    from peft import PeftModel

    done = export(lora.run_dir, tmp_path / "adapter", wise=0.3)
    model = PeftModel.from_pretrained(independent(lora.loaded.path), tmp_path / "adapter").merge_and_unload()
    base, trained = independent(lora.loaded.path).state_dict(), dict(lora.model.named_parameters())
    changed = 0
    for name, value in model.state_dict().items():
        expected = base[name].double()
        for tuned in trained:
            if base_name(tuned) == name and "modules_to_save" in tuned:
                expected = 0.7 * expected + 0.3 * trained[tuned].double()
        factor = f"base_model.model.{name.removesuffix('.weight')}.lora_A.default.weight"
        if factor in trained:
            update = trained[factor.replace("lora_A", "lora_B")].double() @ trained[factor].double()
            expected = expected + 0.3 * 16.0 / 2 * update
        changed += not torch.equal(expected, base[name].double())
        torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    factors = [name for name in trained if "lora_B" in name]
    assert changed == len(factors) + 4  # weight and bias of the projector's two layers
    assert done.mixed == changed


def test_wise_of_an_adapter_without_stored_anchors(checkpoint, shards, tmp_path):
    """The modules trained in full are mixed with the base, found under their own names and checked to be the right."""
    live(checkpoint("llava"), shards, tmp_path / "run", lora=LORA, training={"steps": 2, "precision": "bf16"})
    done = export(tmp_path / "run", tmp_path / "adapter", wise=0.25)
    trained, mixed = tensors(tmp_path / "run/final"), tensors(tmp_path / "adapter")
    start = independent(checkpoint("llava")).state_dict()
    assert trained.keys() == mixed.keys()
    for name, value in trained.items():
        if "lora_A" in name:
            expected = value
        elif "lora_B" in name:
            expected = 0.25 * value
        else:
            before = start[base_name(name)]
            assert not torch.equal(value, before)
            expected = 0.75 * before + 0.25 * value
        torch.testing.assert_close(mixed[name], expected, rtol=1e-6, atol=1e-7)
    assert done.mixed == sum("lora_A" not in name for name in trained)
    other = tiny.build("llava", tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="has other weights than the run began with"):
        export(tmp_path / "run", tmp_path / "refused", wise=0.25, base=str(other))


def test_files_are_bounded_and_the_model_is_never_in_memory(tmp_path, shards):
    """A model of 34 MB in files of at most 4 MB: what the process allocates stays near one file."""
    live(wide_checkpoint(tmp_path / "base"), shards, tmp_path / "run")
    # A process of its own, whose allocator gives large blocks back at once: ours would use those of the training again.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.test_export", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert peaks["model"] < 15e6
    assert peaks["whole"] > 30e6  # the measure does see a model in one file
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) >= 8
    assert all(file.stat().st_size <= 4_300_000 for file in files)
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == pytest.approx(sum(file.stat().st_size for file in files), rel=0.01)
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert same(tensors(tmp_path / "model"), tensors(tmp_path / "run/final"))


def measure(folder):
    """Peaks of the memory that two exports take; run in a process of its own."""
    peaks = {}
    for name, size in (("warm", 10**9), ("model", 4_200_000), ("whole", 10**9)):
        with AnonymousMemory() as memory:
            export(folder / "run", folder / name, max_shard_size=size)
        peaks[name] = memory.peak
    print(json.dumps(peaks))


def wide_checkpoint(folder):
    """A LLaVA with a larger language model."""
    model, processor = tiny.llava()
    config = model.config
    config.text_config.hidden_size, config.text_config.intermediate_size = 256, 1024
    config.text_config.num_hidden_layers, config.text_config.head_dim = 8, 64
    torch.manual_seed(0)
    type(model)(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class AnonymousMemory:
    """The most that the process holds of memory of its own, over what it held at the start; in bytes."""

    def __enter__(self):
        self.start = self.peak = self.now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.peak -= self.start

    def watch(self):
        while not self.stop.wait(0.001):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now():
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return 1024 * int(line.split()[1])


def test_bfloat16_rounds_once(full, tmp_path):
    export(full.run_dir, tmp_path / "model", dtype="bfloat16")
    wide, narrow = tensors(full.run_dir / "final"), tensors(tmp_path / "model")
    assert same(narrow, {name: value.bfloat16() for name, value in wide.items()})
    assert independent(tmp_path / "model", "auto").dtype == torch.bfloat16


@pytest.mark.distributed
def test_checkpoints_of_two_ranks_and_either_engine(dist_pool, checkpoint, shards, tmp_path):
    zero = {"engine": "deepspeed", "zero": {"stage": 3, "param_persistence_threshold": 0}}
    cases = {
        "fsdp": {"optimizer": DIGRAP},
        "fsdp-lora": {"lora": {"enabled": True, "rank": 2}},
        "zero": {"optimizer": DIGRAP, "sharding": zero},
        "masters": {"sharding": zero, "training": {"precision": "bf16", "steps": 2, "batch_size": 2}},
    }
    common = {"checkpoint": SAVING, "training": {"steps": 2, "batch_size": 2}}
    for name, sections in cases.items():
        model = {"path": str(checkpoint("paligemma")), "freeze": [] if "lora" in name else [r"patch_embedding"]}
        options = {**common, "model": model, **sections}
        dist_pool(2).run(runs.run, checkpoint("paligemma"), shards, tmp_path / name, **options)
        export(tmp_path / name, tmp_path / f"{name}-model")
        # What the final model was gathered from is the live weights, or the fp32 masters.
        assert same(tensors(tmp_path / f"{name}-model"), tensors(tmp_path / name / "final")), name


@pytest.fixture
def copy(full, tmp_path):
    """The full run, to be damaged."""
    shutil.copytree(full.run_dir, tmp_path / "run")
    return tmp_path / "run"


def rewrite(step, change):
    """Change a checkpoint's ``trainer.json`` and list it with its new checksum, as if it had been written so."""
    meta = json.loads((step / "trainer.json").read_text())
    change(meta)
    (step / "trainer.json").write_text(json.dumps(meta))
    files, _ = manifest.read(step)
    manifest.write(step, meta["step"], manifest.describe(step, files))


def test_damage_is_told_before_anything_is_written(copy, tmp_path):
    step = copy / "checkpoints/step-2"
    data = next((step / "state").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"step-2 is not whole: state/.*checksum.*no other checkpoint of the run"):
        export(copy, tmp_path / "model")
    assert runs.read_dir(tmp_path) == ["run"]


def test_another_base_is_refused(copy, checkpoint, tmp_path):
    other = tiny.build("paligemma", tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"has other weights than the run began with.*--base"):
        export(copy, tmp_path / "model", base=str(other))
    with pytest.raises(CheckpointError, match=r"elements, in .* its shape is .* checkpoint of another model"):
        export(copy, tmp_path / "model", base=str(checkpoint("llava")))
    with pytest.raises(ModelLoadError, match="nowhere"):
        export(copy, tmp_path / "model", base=str(tmp_path / "nowhere"))
    assert runs.read_dir(tmp_path) == ["other", "run"]
    shutil.copytree(checkpoint("paligemma"), tmp_path / "moved")
    rewrite(copy / "checkpoints/step-2", lambda meta: meta["config"]["model"].update(path="gone"))
    assert export(copy, tmp_path / "model", base=str(tmp_path / "moved")).step == 2


def test_what_cannot_be_exported_is_one_clear_error(full, lora, copy, tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RunFolderError, match=r"no checkpoint of step 7: there are those of 2"):
        export(full.run_dir, target, step=7)
    with pytest.raises(RunFolderError, match="no such run"):
        export(tmp_path / "none", target)
    with pytest.raises(WiseError, match="between 0"):
        export(full.run_dir, target, wise=1.5)
    with pytest.raises(ExportError, match="adapters are float32"):
        export(lora.run_dir, target, dtype="bfloat16")
    with pytest.raises(ExportError, match="dtype must be one of float32, bfloat16"):
        export(full.run_dir, target, dtype="float8")
    rewrite(copy / "checkpoints/step-2", lambda meta: meta.update(novelty=1))
    with pytest.raises(CheckpointError, match="another version of scale_digrap"):
        export(copy, target)
    assert not target.exists()
    target.mkdir()
    with pytest.raises(ExportError, match="exists: remove it"):
        export(full.run_dir, target)


def test_deferred_tensors_are_read_last_and_once():
    """What ``save_pretrained``'s conversions do, against the same operations on the values."""
    values = torch.arange(24.0).view(4, 6)
    reads = []

    def deferred():
        return Deferred(values.to("meta"), lambda: reads.append(1) or values.clone())

    one = deferred()
    halves = torch.chunk(one, 2, dim=1)
    joined = torch.cat([half.transpose(0, 1) for half in halves]).reshape(2, -1)
    assert isinstance(joined, Deferred)
    assert (joined.shape, joined.dtype, joined.device.type) == ((2, 12), torch.float32, "meta")
    assert not reads
    expected = torch.cat([half.T for half in torch.chunk(values, 2, dim=1)]).reshape(2, -1)
    assert torch.equal(joined.contiguous(), expected)
    assert type(joined.contiguous()) is torch.Tensor
    reads.clear()
    first, second = torch.chunk(deferred(), 2)
    first, second = first.contiguous(), second.contiguous()
    assert len(reads) == 1
    assert torch.equal(torch.cat([first, second]), values)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert torch.equal(torch.stack([deferred(), values]), torch.stack([values, values]))


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
