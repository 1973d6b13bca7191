"""The portable form knows no wrapper's part of a name, and drops no layer."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from scale_digrap import DiGraP
from scale_digrap.optim.portable import PortableStateError, canonical_names, load_portable, save_portable


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.encoder(x))


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def plain():
    torch.manual_seed(0)
    return Net()


def compiled(net):
    return torch.compile(net, backend="eager")


def compiled_part(net):
    net.encoder = torch.compile(net.encoder, backend="eager")
    return net


def checkpointed(net):
    net.encoder[0] = checkpoint_wrapper(net.encoder[0])
    return net


def ddp_part(net):
    net.encoder = DistributedDataParallel(net.encoder)
    return net


WRAPPED = {
    "plain": lambda net: net,
    "DDP": DistributedDataParallel,
    "compiled": compiled,
    "DDP of compiled": lambda net: DistributedDataParallel(compiled(net)),
    "compiled DDP": lambda net: compiled(DistributedDataParallel(net)),
    "a compiled part": compiled_part,
    "a checkpointed part": checkpointed,
    "DDP of a checkpointed part": lambda net: DistributedDataParallel(checkpointed(net)),
    "a part in DDP": ddp_part,
}


def stepped(model, steps):
    optimizer = DiGraP(model.named_parameters(), lr=1e-2)
    optimizer.init_state()
    train(model, optimizer, range(steps))
    return optimizer


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_what_a_model_is_wrapped_in_is_not_in_the_names_that_are_stored(group, tmp_path, wrap):
    model = wrap(plain())
    optimizer = stepped(model, 4)
    save_portable(optimizer, tmp_path / "state")
    stored = dcp.FileSystemReader(tmp_path / "state").read_metadata().state_dict_metadata
    assert {key for key in stored if key.startswith("param.")} == {f"param.{n}" for n, _ in plain().named_parameters()}
    expected = list(model.parameters())
    for other in WRAPPED.values():
        again = other(plain())
        fresh = DiGraP(again.named_parameters(), lr=1e-2)
        load_portable(fresh, tmp_path / "state")
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), expected, strict=True))
        assert list(fresh.layer_state().values()) == list(optimizer.layer_state().values())
        assert all(
            torch.equal(fresh.state[a]["anchor"], optimizer.state[b]["anchor"])
            for a, b in zip(again.parameters(), expected, strict=True)
        )
    assert any(values["step"] == 4 for values in fresh.layer_state().values())


def test_a_model_that_has_a_module_of_that_name_keeps_it_where_it_tells_layers_apart():
    assert canonical_names(["module.a.module.weight", "module.a.weight"]) == {
        "module.a.module.weight": "a.module.weight",
        "module.a.weight": "a.weight",
    }
    assert canonical_names(["a.module._orig_mod.weight"]) == {"a.module._orig_mod.weight": "a.weight"}
    with pytest.raises(
        PortableStateError, match=r"'a\.weight' and 'module\.a\.weight' differ by the part of a wrapper"
    ):
        canonical_names(["a.weight", "module.a.weight"])


def test_a_trained_layer_that_the_optimizer_does_not_step_is_refused_by_name(tmp_path):
    save_portable(stepped(plain(), 2), tmp_path / "state")
    model = plain()
    model.encoder.requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = DiGraP(model.named_parameters(), lr=1e-2)
    with pytest.raises(PortableStateError, match=r"layer 'encoder\.0\.bias' and 3 more layers, which this optimizer"):
        load_portable(optimizer, tmp_path / "state")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
