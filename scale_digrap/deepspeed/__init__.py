"""DiGraP under DeepSpeed: ``initialize`` or ``attach``, and what a checkpoint needs on another number of ranks.

Example::

    optimizer = DiGraP(model.named_parameters(), lr=1e-5)
    engine, *_ = scale_digrap.deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    # or, where something else calls deepspeed.initialize:
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    scale_digrap.deepspeed.attach(engine)
"""

from scale_digrap.deepspeed.checkpoint import (
    load_checkpoint,
    load_portable,
    refresh_model,
    save_portable,
    to_universal,
)
from scale_digrap.deepspeed.engine import (
    attach,
    client_optimizer,
    full_tensors,
    initialize,
    skip_cpu_communication_op,
)
from scale_digrap.deepspeed.support import DeepSpeedError

__all__ = [
    "DeepSpeedError",
    "attach",
    "client_optimizer",
    "full_tensors",
    "initialize",
    "load_checkpoint",
    "load_portable",
    "refresh_model",
    "save_portable",
    "skip_cpu_communication_op",
    "to_universal",
]
