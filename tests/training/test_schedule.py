"""Schedules against those of Transformers and torch."""

from itertools import pairwise

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from scale_digrap.config import ScheduleConfig
from scale_digrap.training.schedule import build_schedule, lr_ratio


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def lrs(scheduler, steps):
    values = []
    for _ in range(steps):
        values.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_after_the_warm_up_it_is_transformers(name, warmup):
    theirs = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}[name]
    expected = lrs(theirs(optimizer(), warmup, 20), 20)
    ours = lrs(build_schedule(optimizer(), ScheduleConfig(name=name, warmup_steps=warmup), 20), 20)
    assert ours[warmup:] == pytest.approx(expected[warmup:])
    # theirs spends its first warm-up step at zero; ours is one step ahead of it
    assert ours[: max(0, warmup - 1)] == pytest.approx(expected[1:warmup])


def test_bounds():
    config = ScheduleConfig(name="cosine", warmup_steps=10, warmup_init_ratio=0.1, min_lr_ratio=0.2)
    ratio = lr_ratio(config, 100)
    values = [ratio(step) for step in range(101)]
    assert values[0] == pytest.approx(0.1 + 0.9 / 10)
    assert values[9] == values[10] == 1.0
    assert values[100] == ratio(500) == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(values[10:]))
    assert lr_ratio(ScheduleConfig(name="constant"), 10)(7) == 1.0


def test_a_resumed_schedule_goes_on():
    config = ScheduleConfig(name="cosine", warmup_steps=3)
    whole = lrs(build_schedule(optimizer(), config, 12), 12)
    first = build_schedule(optimizer(), config, 12)
    lrs(first, 5)
    second = build_schedule(optimizer(), config, 12)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert lrs(second, 7) == pytest.approx(whole[5:])
