"""DiGraP in other libraries' training loops: the Hugging Face ``Trainer`` under DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from scale_digrap.deepspeed import DeepSpeedError, attach, client_optimizer
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.optim.anchored import AnchoredOptimizer

if TYPE_CHECKING:
    from transformers import Trainer


class ResumeError(ScaleDigrapError):
    """A run that would go on with other anchors than it began with."""


class AttachCallback(TrainerCallback):
    """Calls :func:`scale_digrap.deepspeed.attach` when ``Trainer`` has built its DeepSpeed engine.

    Also keeps ``optimizers=(DiGraP(...), None)`` in use: under DeepSpeed, ``Trainer`` forgets the optimizer that it was
    given and makes an AdamW of its own. Resuming (``resume_from_checkpoint``) works: the optimizer takes over at the
    attachment what the engine has loaded before. Without DeepSpeed it only looks whether a resumed run has its anchors.

    Args:
        trainer: made with ``optimizers=(DiGraP(...), None)`` or ``optimizer_cls_and_kwargs=(DiGraP, {...})``.

    Raises:
        ResumeError: when training resumes from a checkpoint without optimizer state (``save_only_model``), and the
            anchors would be its trained weights; a call of ``optimizer.init_state()`` before, on the pre-trained ones,
            prevents it.
        DeepSpeedError: when training begins, the engine has another optimizer; or the one optimizer of ``optimizers=``
            is to serve a second engine. See also :func:`scale_digrap.deepspeed.attach`.

    Example::

        trainer = Trainer(model, args, train_dataset=data, optimizers=(DiGraP(model.named_parameters(), lr=1e-5), None))
        trainer.add_callback(AttachCallback(trainer))
        trainer.train()
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._captured = _has_anchors(trainer.optimizer)
        """The anchors were there before ``Trainer`` could load any weights."""
        if trainer.is_deepspeed_enabled and isinstance(trainer.optimizer, AnchoredOptimizer):
            _keep_optimizer(trainer, trainer.optimizer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._trainer.is_deepspeed_enabled:
            self._check_resumed(_unwrapped(kwargs.get("optimizer")), state.global_step)
            return
        engine: Any = self._trainer.model_wrapped
        optimizer = client_optimizer(engine)
        if not isinstance(optimizer, AnchoredOptimizer):
            raise DeepSpeedError(
                f"the engine steps {type(optimizer).__name__}, not DiGraP: make the Trainer with "
                "optimizers=(DiGraP(...), None) or optimizer_cls_and_kwargs=(DiGraP, {...}), and remove the "
                "'optimizer' section of the DeepSpeed configuration"
            )
        if not getattr(engine.optimizer.step, "attached", False):
            attach(engine)

    def _check_resumed(self, optimizer: Any, steps: int) -> None:
        """``Trainer`` has loaded the weights by now, and the optimizer's state where there is one."""
        if not isinstance(optimizer, AnchoredOptimizer) or not steps or self._captured:
            return
        from_weights = any(group["anchor"] == "initial" for group in optimizer.param_groups)
        loaded = any(float(state.get("step", 0.0)) > 0 for state in optimizer.state.values())
        if from_weights and not loaded:
            raise ResumeError(
                f"the checkpoint of step {steps} holds no optimizer state (save_only_model), so that the anchors would "
                "be its trained weights: resume from one that was saved with save_only_model=False, or call "
                "optimizer.init_state() on the pre-trained weights before AttachCallback(trainer)"
            )


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _has_anchors(optimizer: Any) -> bool:
    optimizer = _unwrapped(optimizer)
    return isinstance(optimizer, AnchoredOptimizer) and any("anchor" in state for state in optimizer.state.values())


def _keep_optimizer(trainer: Any, given: AnchoredOptimizer) -> None:
    """Make ``create_optimizer`` return the given optimizer where ``Trainer`` has forgotten it, once: for one engine."""
    original, waiting = trainer.create_optimizer, [given]

    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        if trainer.optimizer is None:
            if not waiting:  # its tensors are the first engine's partitions now
                raise DeepSpeedError(
                    "Trainer builds a second DeepSpeed engine, but the optimizer of optimizers=(...) belongs to the "
                    "first: make a new model, optimizer and Trainer"
                )
            trainer.optimizer = waiting.pop()
        return original(*args, **kwargs)

    trainer.create_optimizer = create_optimizer
