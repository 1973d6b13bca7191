"""What the launch tests start: ``zero_launched.py CASE ... --folder F``, one process or several; results go to F.

The model and the data are made from seeds. Of every case, rank 0 writes ``CASE.pt``.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")  # DeepSpeed's launcher sets the second

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as hf_logging

import scale_digrap.deepspeed
from scale_digrap import DiGraP
from scale_digrap.integrations import AttachCallback

STEPS, WORLD, MICRO, ACCUMULATE = 10, 2, 3, 2
CLIP = 1.0
OPTIONS: dict[str, Any] = {"lr": 0.02, "eps": 1e-3, "omega_lr": 0.05, "weight_decay": 0.01}


def save_model(folder: Path) -> None:
    """Odd sizes, so that tensors and rows straddle ranks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=18, intermediate_size=27, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")


def load_model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 61, (STEPS * WORLD * MICRO * ACCUMULATE, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def ds_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": ACCUMULATE,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


class Peak:
    """The largest ω and the layers that were in conflict, over the steps so far."""

    def __init__(self) -> None:
        self.omega, self.conflicts = 0.0, 0

    def look(self, optimizer: DiGraP) -> None:
        stats = optimizer.layer_stats().values()
        self.omega = max(self.omega, max(layer.omega for layer in stats))
        self.conflicts += sum(layer.conflict for layer in stats)


def write(folder: Path, case: str, params: dict[str, Tensor], peak: Peak | None = None, **more: Any) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        figures = {"omega": peak.omega, "conflicts": peak.conflicts} if peak else {}
        torch.save({"params": params, **figures, **more}, folder / f"{case}.pt")


def zero_params(engine: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in scale_digrap.deepspeed.full_tensors(engine, "param")}


def plain_params(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


# -- Hugging Face Trainer ----------------------------------------------------------------------------------------------


class Look(TrainerCallback):
    def __init__(self, optimizer: DiGraP) -> None:
        self.peak, self._optimizer = Peak(), optimizer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.peak.look(self._optimizer)


def make_trainer(folder: Path, case: str, stage: int | None, by_class: bool = False) -> tuple[Trainer, Any]:
    """Like a script of a user's; one process alone takes the batches of all ranks."""
    processes = WORLD if stage is not None else 1
    args = TrainingArguments(
        output_dir=str(folder / case),
        per_device_train_batch_size=MICRO * WORLD // processes,
        gradient_accumulation_steps=ACCUMULATE,
        max_steps=STEPS,
        max_grad_norm=CLIP,
        weight_decay=OPTIONS["weight_decay"],
        lr_scheduler_type="cosine",
        warmup_steps=2,
        save_strategy="steps" if stage is not None else "no",
        save_steps=STEPS // 2,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        deepspeed=ds_config(stage) if stage is not None else None,
    )
    model = load_model(folder)  # after the arguments: ZeRO-3 loads it straight into its partitions
    if by_class:
        options = {"optimizer_cls_and_kwargs": (DiGraP, OPTIONS)}
        return Trainer(model, args, train_dataset=samples(), **options), None
    optimizer = DiGraP(model.named_parameters(), **OPTIONS)
    return Trainer(model, args, train_dataset=samples(), optimizers=(optimizer, None)), optimizer


def run_trainer(folder: Path, case: str, stage: int | None, resume: str | None = None) -> None:
    trainer, optimizer = make_trainer(folder, case, stage)
    look = Look(optimizer)
    trainer.add_callback(AttachCallback(trainer))
    trainer.add_callback(look)
    trainer.train(resume_from_checkpoint=resume)
    params = zero_params(trainer.model_wrapped) if stage is not None else plain_params(trainer.model)
    stats = {name: layer.omega for name, layer in optimizer.layer_stats().items()}
    write(folder, case, params, look.peak, stats=stats, step=trainer.state.global_step)


def run_trainer_by_class(folder: Path, case: str, stage: int | None) -> None:
    """``optimizer_cls_and_kwargs``: Trainer's own two groups, with and without weight decay, unnamed."""
    trainer, _ = make_trainer(folder, case, stage, by_class=True)
    trainer.add_callback(AttachCallback(trainer))
    trainer.train()
    write(folder, case, zero_params(trainer.model_wrapped) if stage is not None else plain_params(trainer.model))


def run_trainer_refused(folder: Path, case: str, optimizer_class: type, attached: bool) -> None:
    trainer, _ = make_trainer(folder, case, 2, by_class=True)
    trainer.optimizer_cls_and_kwargs = (optimizer_class, {"lr": 0.01})
    if attached:
        trainer.add_callback(AttachCallback(trainer))
    try:
        trainer.train()
    except Exception as error:
        write(folder, case, {}, error=f"{type(error).__name__}: {error}", step=trainer.state.global_step)


def run_trainer_twice(folder: Path, case: str) -> None:
    """One optimizer object cannot serve a second engine."""
    trainer, _ = make_trainer(folder, case, 2)
    trainer.add_callback(AttachCallback(trainer))
    trainer.create_optimizer()
    trainer.optimizer = None
    try:
        trainer.create_optimizer()
        trainer.optimizer = None
        trainer.create_optimizer()
    except Exception as error:
        write(folder, case, {}, error=f"{type(error).__name__}: {error}")


def forget_accelerate() -> None:
    """Let the next Trainer of this process start with another configuration."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()


# -- Accelerate and the engine itself ----------------------------------------------------------------------------------


def batches(rank: int | None, step: int) -> list[dict[str, Tensor]]:
    """The micro-batches of a rank in one training step; of all ranks together for ``None``."""
    data, found = samples(), []
    for micro in range(ACCUMULATE):
        first = (step * ACCUMULATE + micro) * WORLD * MICRO
        rows = data[first : first + WORLD * MICRO]
        rows = rows if rank is None else rows[rank * MICRO : (rank + 1) * MICRO]
        found.append({key: torch.stack([row[key] for row in rows]) for key in rows[0]})
    return found


def run_plain(folder: Path, case: str) -> None:
    model, peak = load_model(folder), Peak()
    optimizer = DiGraP(model.named_parameters(), **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        for batch in batches(None, step):
            (model(**batch).loss / ACCUMULATE).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        peak.look(optimizer)
    write(folder, case, plain_params(model), peak)


def run_engine(folder: Path, case: str, stage: int) -> None:
    model, peak = load_model(folder), Peak()
    optimizer = DiGraP(model.named_parameters(), **OPTIONS)
    engine, *_ = scale_digrap.deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(stage))
    for step in range(STEPS):
        for batch in batches(dist.get_rank(), step):
            engine.backward(engine(**batch).loss)
            engine.step()
        peak.look(optimizer)
    write(folder, case, zero_params(engine), peak)


def run_accelerate(folder: Path, case: str, stage: int) -> None:
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState

    PartialState(cpu=True)  # on GPUs not needed: without one, Accelerate counts one process under DeepSpeed
    accelerator = Accelerator(
        gradient_accumulation_steps=ACCUMULATE, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_config(stage))
    )
    model, peak = load_model(folder), Peak()
    optimizer = DiGraP(model.named_parameters(), **OPTIONS)
    loader = torch.utils.data.DataLoader(samples(), batch_size=MICRO)
    model, wrapped, loader = accelerator.prepare(model, optimizer, loader)
    scale_digrap.deepspeed.attach(model)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            wrapped.step()
            wrapped.zero_grad()
        if accelerator.sync_gradients:
            peak.look(optimizer)
    write(folder, case, zero_params(model), peak)


CASES = {
    "plain": lambda f, c: run_plain(f, c),
    "trainer": lambda f, c: run_trainer(f, c, None),
    "trainer-zero2": lambda f, c: run_trainer(f, c, 2),
    "trainer-zero3": lambda f, c: run_trainer(f, c, 3),
    "trainer-zero2-resumed": lambda f, c: run_trainer(f, c, 2, resume=f"{f}/trainer-zero2/checkpoint-{STEPS // 2}"),
    "trainer-zero3-resumed": lambda f, c: run_trainer(f, c, 3, resume=f"{f}/trainer-zero3/checkpoint-{STEPS // 2}"),
    "trainer-by-class": lambda f, c: run_trainer_by_class(f, c, None),
    "trainer-by-class-zero2": lambda f, c: run_trainer_by_class(f, c, 2),
    "trainer-unattached": lambda f, c: run_trainer_refused(f, c, DiGraP, False),
    "trainer-adamw": lambda f, c: run_trainer_refused(f, c, torch.optim.AdamW, True),
    "trainer-twice": run_trainer_twice,
    "accelerate-zero2": lambda f, c: run_accelerate(f, c, 2),
    "accelerate-zero3": lambda f, c: run_accelerate(f, c, 3),
    "engine-zero2": lambda f, c: run_engine(f, c, 2),
    "engine-zero3": lambda f, c: run_engine(f, c, 3),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+", choices=sorted(CASES))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--name", default="", help="added to the names of the results")
    parser.add_argument("--local_rank", type=int, help="passed by DeepSpeed's launcher")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    scale_digrap.deepspeed.skip_cpu_communication_op()
    for case in arguments.cases:
        CASES[case](arguments.folder, case + arguments.name)
        forget_accelerate()
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves early tears down connections that the other still uses
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
