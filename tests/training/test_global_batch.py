"""training.global_batch_size: the same steps on however many ranks.

That the loss curves are equal is shown on hosts that come and go, by tests/launch/test_torchrun_cluster.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from scale_digrap.config import ConfigError, load_config
from scale_digrap.training.engine import TrainingError
from scale_digrap.training.loop import share_global_batch


def ranks(number: int) -> Any:
    return SimpleNamespace(dp_world_size=number)


@pytest.mark.parametrize(("number", "micro_batches"), [(1, 8), (2, 4), (8, 1)])
def test_the_batch_is_dealt_out_to_the_ranks_that_there_are(number, micro_batches):
    config = load_config(None, ["training.batch_size=4", "training.global_batch_size=32"])
    assert share_global_batch(config, ranks(number)).training.gradient_accumulation == micro_batches
    assert config.training.gradient_accumulation == 1
    plain = load_config(None, ["training.batch_size=4", "training.gradient_accumulation=3"])
    assert share_global_batch(plain, ranks(number)).training.gradient_accumulation == 3


def test_a_batch_that_cannot_be_dealt_out_is_refused():
    config = load_config(None, ["training.batch_size=4", "training.global_batch_size=32"])
    with pytest.raises(TrainingError, match=r"global_batch_size=32 is no multiple of training.batch_size=4 on 3 ranks"):
        share_global_batch(config, ranks(3))
    with pytest.raises(ConfigError, match="are both given: remove one of the two"):
        load_config(None, ["training.gradient_accumulation=2", "training.global_batch_size=32"])
