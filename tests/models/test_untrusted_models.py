"""A model's folder from someone else: no code of its own runs, neither from Python files nor from pickles."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from scale_digrap.config import ModelConfig
from scale_digrap.models import load_model, load_processor
from scale_digrap.models.loading import ModelLoadError
from tests.training.planted import Payload


@pytest.fixture
def folder(checkpoint, tmp_path):
    shutil.copytree(checkpoint("llava"), tmp_path / "model")
    return tmp_path / "model"


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_code_of_a_checkpoint_is_refused_in_one_line_without_a_question(folder, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass C: pass\n")
    edit(folder / "config.json", model_type="nobodys", auto_map={"AutoConfig": "own.C"})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    with pytest.raises(ModelLoadError, match="asks to run Python code of its own") as told:
        load_model(ModelConfig(path=str(folder)))
    assert "\n" not in str(told.value)
    edit(folder / "processor_config.json", processor_class="Own", auto_map={"AutoProcessor": "own.C"})
    with pytest.raises(ModelLoadError, match="cannot load a processor"):
        load_processor(ModelConfig(path=str(folder)))
    assert not marker.exists()


def test_weights_that_are_a_pickle_with_a_call_are_refused(folder, tmp_path):
    marker = tmp_path / "ran"
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    weights.unlink()
    torch.save({**tensors, "extra": Payload(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="nothing of it was run") as told:
        load_model(ModelConfig(path=str(folder)))
    assert "\n" not in str(told.value)
    assert not marker.exists()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert load_model(ModelConfig(path=str(folder)))


def test_an_adapter_that_is_a_pickle_or_asks_for_code_is_refused(folder, tmp_path):
    from scale_digrap.config import LoraConfig

    marker, adapter = tmp_path / "ran", tmp_path / "adapter"
    model = load_model(ModelConfig(path=str(folder)), lora=LoraConfig(enabled=True, rank=2)).model
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    torch.save({**tensors, "extra": Payload(marker)}, adapter / "adapter_model.bin")
    with pytest.raises(ModelLoadError, match="nothing of it was run"):
        load_model(ModelConfig(path=str(adapter)))
    assert not marker.exists()
    for wrong, told in (
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'"),
        ({"megatron_config": {"a": 1}, "megatron_core": "own"}, "imports a module that the file names"),
        ({"base_model_name_or_path": None}, "does not name its base model"),
    ):
        before = (adapter / "adapter_config.json").read_text()
        edit(adapter / "adapter_config.json", **wrong)
        with pytest.raises(ModelLoadError, match=told):
            load_model(ModelConfig(path=str(adapter)))
        (adapter / "adapter_config.json").write_text(before)
    for damaged in ("null", "[]", "{", "\udcff"):
        (adapter / "adapter_config.json").write_bytes(damaged.encode("utf-8", "surrogateescape"))
        with pytest.raises(ModelLoadError, match="adapter_config"):
            load_model(ModelConfig(path=str(adapter)))
