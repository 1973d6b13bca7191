"""The Hugging Face Trainer without DeepSpeed: a resumed run has the anchors that it began with, or none begins."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from scale_digrap import DiGraP
from scale_digrap.integrations import AttachCallback, ResumeError


def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16))


def trainer(folder, steps, *, weights_alone, early=False):
    data = [{"input_ids": [i % 16, 1, 2, 3], "labels": [i % 16, 1, 2, 3]} for i in range(8)]
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        save_only_model=weights_alone,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    net = model()
    optimizer = DiGraP(net.named_parameters(), lr=1e-2)
    if early:
        optimizer.init_state()
    made = Trainer(net, args, train_dataset=data, optimizers=(optimizer, None))
    made.add_callback(AttachCallback(made))
    return made, optimizer


def assert_anchored_at_the_base(made, optimizer):
    for parameter, value in zip(made.model.parameters(), model().parameters(), strict=True):
        anchor = optimizer.state[parameter].get("anchor")
        assert anchor is not None
        assert torch.equal(anchor.float(), value)


def test_resuming_weights_alone_is_refused_in_one_line(tmp_path):
    trainer(tmp_path, 2, weights_alone=True)[0].train()
    made, _ = trainer(tmp_path, 4, weights_alone=True)
    with pytest.raises(ResumeError, match=r"checkpoint of step 2 holds no optimizer state \(save_only_model\)") as told:
        made.train(resume_from_checkpoint=True)
    assert "\n" not in str(told.value)


def test_anchors_that_were_captured_before_are_kept(tmp_path):
    trainer(tmp_path, 2, weights_alone=True)[0].train()
    made, optimizer = trainer(tmp_path, 4, weights_alone=True, early=True)
    made.train(resume_from_checkpoint=True)
    assert_anchored_at_the_base(made, optimizer)


def test_resuming_with_the_optimizers_state_keeps_the_anchors(tmp_path):
    trainer(tmp_path, 2, weights_alone=False)[0].train()
    made, optimizer = trainer(tmp_path, 4, weights_alone=False)
    made.train(resume_from_checkpoint=True)
    assert_anchored_at_the_base(made, optimizer)
