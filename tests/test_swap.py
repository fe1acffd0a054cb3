"""Swapping tensors under a program, and leaving no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_vae.objectives.swap import evaluating, owner, preserved, swapped
from tests.small_pairs import (
    Guide,
    MethodPair,
    PyroParamGuide,
    VampModel,
    batch_norm,
    data,
)


def detached(module: nn.Module) -> dict[int, torch.Tensor]:
    return {id(p): p.detach() + 1 for p in module.parameters()}


def gaussian(trace: Any) -> Any:
    """The distribution of site z, under its Independent."""
    return trace.nodes["z"]["fn"].base_dist


def identities(module: nn.Module) -> dict[str, int]:
    return {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}


def test_owner():
    pair = MethodPair()
    assert owner(pair) is pair
    assert owner(pair.guide) is pair
    assert owner(lambda x: None) is None


def test_a_module_with_two_names_keeps_its_parameters():
    guide = Guide()
    model = VampModel(guide)
    both = nn.ModuleDict({"model": model, "guide": guide})
    before = identities(both)
    with swapped(both, detached(both)):
        assert not isinstance(guide.net.weight, nn.Parameter)
        assert model.guide.net.weight is guide.net.weight
    assert identities(both) == before
    assert all(isinstance(p, nn.Parameter) for p in both.parameters())


def test_a_tied_parameter_is_swapped_at_both_places():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.weight = a.weight
    both = nn.Sequential(a, b)
    before = identities(both)
    with swapped(both, detached(both)):
        assert a.weight is b.weight
        assert not a.weight.requires_grad
    assert identities(both) == before


def test_buffers_are_swapped_too():
    net = batch_norm()
    kept = [buffer.clone() for buffer in net.buffers()]
    with swapped(net, {id(b): b.clone() for b in net.buffers()}):
        net(data())
    for buffer, before in zip(net.buffers(), kept, strict=True):
        torch.testing.assert_close(buffer, before)


def test_an_error_inside_restores():
    net = nn.Linear(2, 2)
    before = identities(net)
    with pytest.raises(RuntimeError), swapped(net, detached(net)):
        raise RuntimeError
    assert identities(net) == before


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_pyro_params_are_swapped_whatever_the_store_holds(local: bool):
    with pyro.settings.context(module_local_params=local):
        guide, x = PyroParamGuide(), data()
        trace = pyro.poutine.trace(guide).get_trace(x)  # fills the store, unless local
        before = identities(guide)
        stored = {name: id(p) for name, p in pyro.get_param_store()._params.items()}
        assert bool(stored) is not local
        with swapped(guide, detached(guide)):
            inside = gaussian(pyro.poutine.trace(guide).get_trace(x))
            assert not inside.scale.requires_grad
            assert not inside.loc.requires_grad
        outside = gaussian(trace)
        torch.testing.assert_close(inside.scale, outside.scale * torch.e)  # log scale + 1
        assert identities(guide) == before
        assert {n: id(p) for n, p in pyro.get_param_store()._params.items()} == stored


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_parameters_that_pyro_module_registered_are_swapped_in_the_store():
    pair, x = MethodPair(), data()
    pair.guide(x)
    stored = {name: id(p) for name, p in pyro.get_param_store()._params.items()}
    with swapped(pair, detached(pair)), pyro.poutine.block():
        inside = gaussian(pyro.poutine.trace(pair.guide).get_trace(x))
        assert not inside.loc.requires_grad
    assert {n: id(p) for n, p in pyro.get_param_store()._params.items()} == stored


class Restless(PyroModule):
    """Uses every random generator and moves buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = batch_norm()

    def forward(self) -> list[float]:
        mean = self.net(torch.randn(6, 3)).mean()
        return [
            float(mean.detach()),
            random.random(),
            float(np.random.rand()),
            float(torch.rand(())),
        ]


@pytest.mark.parametrize("fails", [False, True])
def test_preserved_undoes_random_state_and_buffers(fails: bool):
    program = Restless()
    before = [buffer.clone() for buffer in program.buffers()]
    pyro.set_rng_seed(3)
    try:
        with preserved(program, program.forward):
            first = program()
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    for buffer, kept in zip(program.buffers(), before, strict=True):
        torch.testing.assert_close(buffer, kept)
    assert program() == first
    assert any(not torch.equal(b, k) for b, k in zip(program.buffers(), before, strict=True))


def modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


def everything(module: nn.Module) -> list[Any]:
    return [modes(module), [buffer.tolist() for buffer in module.buffers()]]


@pytest.mark.parametrize("owned", [True, False], ids=["owned", "called"])
@pytest.mark.parametrize("fails", [False, True])
def test_evaluating_restores_every_mode(owned: bool, fails: bool):
    net = nn.Sequential(batch_norm(), nn.Dropout().eval())
    before, x = modes(net), data()
    net.eval()
    wanted = net(x)
    for part, training in zip(net.modules(), before, strict=True):
        part.training = training
    try:
        with evaluating(net if owned else lambda: net(x)):
            assert modes(net) == ([False] * len(before) if owned else before)
            torch.testing.assert_close(net(x), wanted)
            assert not any(modes(net))
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert modes(net) == before


@pytest.mark.parametrize("context", [preserved, evaluating])
def test_a_module_that_is_called_after_a_part_of_it(context: Any):
    net, x = batch_norm(), data()
    first, part, *_ = net.children()
    before = everything(net)
    with context(lambda: None):
        part(first(x))
        net(x)
    assert everything(net) == before
    net(x)
    assert everything(net) != before


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("owned", [True, False], ids=["owned", "called"])
def test_modules_that_make_their_buffers_later(owned: bool):
    net = nn.LazyBatchNorm1d()
    with preserved(net if owned else print):
        net(data())
    assert net.get_buffer("running_mean").shape == data().shape[1:]
