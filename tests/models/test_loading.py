"""Loading: what is trained, in which dtype, with which seed; and the errors of patterns that match nothing."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from scale_digrap.config import LoraConfig, ModelConfig
from scale_digrap.models.loading import ModelLoadError, load_model
from scale_digrap.models.select import SelectionError, match_names
from tests.models import tiny


def trained(loaded):
    return set(loaded.trained())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_full_fine_tuning_trains_everything_in_fp32_with_the_stored_values(checkpoint, family):
    folder = checkpoint(family)
    loaded = load_model(ModelConfig(path=str(folder)), precision="bf16")
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.model.parameters())
    stored = load_file(folder / "model.safetensors")
    # names may differ (Qwen2.5-VL), the multiset of sums may not
    assert sorted(float(t.double().sum()) for t in stored.values()) == pytest.approx(
        sorted(float(p.detach().double().sum()) for p in loaded.model.parameters())
    )
    assert loaded.new_layers == set()
    assert loaded.adapters == set()


def test_tied_weights_stay_one_parameter(checkpoint):
    model = load_model(ModelConfig(path=str(checkpoint("paligemma")))).model
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_lora_trains_fp32_adapters_of_the_language_model_alone(checkpoint, family, precision, dtype):
    lora = LoraConfig(enabled=True, rank=3)
    loaded = load_model(ModelConfig(path=str(checkpoint(family))), lora=lora, precision=precision)
    assert trained(loaded) == loaded.adapters
    assert len(loaded.adapters) == 2 * 4 * 2  # A and B of q, k, v, o in two blocks
    for name, parameter in loaded.model.named_parameters():
        if name in loaded.adapters:
            assert "language_model" in name
            assert parameter.dtype == torch.float32
            assert 3 in parameter.shape
        else:
            assert not parameter.requires_grad
            assert parameter.dtype == dtype


def test_lora_starts_the_same_for_the_same_seed_and_leaves_the_generator_alone(checkpoint):
    config, lora = ModelConfig(path=str(checkpoint("llava"))), LoraConfig(enabled=True)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, again, other = (load_model(config, lora=lora, seed=seed).trained() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_lora_with_a_module_trained_in_full(checkpoint):
    lora = LoraConfig(enabled=True, train=["multi_modal_projector.linear$"])
    loaded = load_model(ModelConfig(path=str(checkpoint("paligemma"))), lora=lora, precision="bf16")
    whole = trained(loaded) - loaded.adapters
    assert len(whole) == 2
    assert all("multi_modal_projector" in name for name in whole)
    assert all(p.dtype == torch.float32 for p in loaded.trained().values())


def test_freeze(checkpoint):
    config = ModelConfig(path=str(checkpoint("paligemma")), freeze=["vision_tower", r"multi_modal_projector.*bias"])
    loaded = load_model(config)
    for name, parameter in loaded.model.named_parameters():
        frozen = "vision_tower" in name or name.endswith("multi_modal_projector.linear.bias")
        assert parameter.requires_grad != frozen, name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"freeze": ["vision_towr"]}, ["model.freeze", "'vision_towr' matches nothing", "vision_tower"]),
        ({"freeze": ["."]}, ["leaves nothing to train"]),
        ({"new_layers": ["projecter"]}, ["model.new_layers", "projector"]),
    ],
)
def test_patterns_without_a_match_name_what_is_near(checkpoint, change, words):
    with pytest.raises(SelectionError) as caught:
        load_model(ModelConfig(path=str(checkpoint("paligemma")), **change))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_lora_targets_without_a_match(checkpoint):
    with pytest.raises(SelectionError, match=r"lora\.targets: 'query_proj\$' matches nothing"):
        load_model(ModelConfig(path=str(checkpoint("llava"))), lora=LoraConfig(enabled=True, targets=["query_proj$"]))


def test_match_names():
    names = ["a.0.w", "a.1.w", "b.w"]
    assert match_names(["b", r"a\.0"], names, key="k") == ["a.0.w", "b.w"]
    assert match_names([r"a\.\d+\.w"], names, key="k", full=True) == ["a.0.w", "a.1.w"]
    with pytest.raises(SelectionError):
        match_names(["a"], names, key="k", full=True)


def test_weights_missing_from_the_checkpoint_must_be_declared_new(checkpoint, tmp_path):
    import shutil

    folder = tmp_path / "cut"
    shutil.copytree(checkpoint("paligemma"), folder)
    tensors = load_file(folder / "model.safetensors")
    cut = {name: t for name, t in tensors.items() if "multi_modal_projector" not in name}
    save_file(cut, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 2 weights.*multi_modal_projector.*model\.new_layers"):
        load_model(ModelConfig(path=str(folder)))
    loaded = load_model(ModelConfig(path=str(folder), new_layers=["multi_modal_projector"]))
    assert len(loaded.new_layers) == 2
    again = load_model(ModelConfig(path=str(folder), new_layers=["multi_modal_projector"]))
    for name in loaded.new_layers:
        assert torch.equal(loaded.trained()[name], again.trained()[name])


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(ModelLoadError, match="builtin:tiny-vlm"):
        load_model(ModelConfig(path="builtin:large-vlm"))
    with pytest.raises(ModelLoadError, match="cannot load a model from"):
        load_model(ModelConfig(path=str(tmp_path / "nothing")))
