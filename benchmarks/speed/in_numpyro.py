"""The step in NumPyro: ``svi.update`` jitted, and a loop of them inside one jitted function."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.example_libraries.optimizers import OptimizerState
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import Tensor, nn

from benchmarks.speed.cases import FLOOR, LR, Case, Shift, networks, rows
from benchmarks.speed.runner import Runner

__all__ = ["make", "run", "weights"]


def make(case: Case, device: str, pick: bool, way: str) -> Runner:
    """``way`` is ``"numpyro"``, one call of ``svi.update`` a step, or ``"numpyro-loop"``."""
    jax.config.update("jax_platforms", device)
    jax.config.update("jax_default_matmul_precision", "highest")  # as torch: float32, not TF32
    svi = SVI(*programs(case), numpyro.optim.Adam(LR), loss=_loss(case))
    steps = case.rows // case.batch
    data = _array(rows(case, case.rows if pick else case.batch))
    state = svi.init(jax.random.PRNGKey(0), data[: case.batch])
    first = state.optim_state[1].packed_state

    def batch(data: Any, order: Any, i: Any) -> Any:
        if not pick:
            return data
        return data[jax.lax.dynamic_slice(order, (i * case.batch,), (case.batch,))]

    def one(state: Any, data: Any, order: Any, i: Any) -> Any:
        return svi.update(state, batch(data, order, i))

    def several(state: Any, n: Any, data: Any, order: Any) -> Any:
        def body(i: Any, carry: Any) -> Any:
            return one(carry[0], data, order, i)

        return jax.lax.fori_loop(0, n, body, (state, jnp.zeros(())))

    update, loop = jax.jit(one), jax.jit(several)
    shuffled = jax.jit(partial(jax.random.permutation, x=case.rows))

    def take(n: int, order: Any) -> Any:
        nonlocal state
        if way == "numpyro-loop":
            state, loss = loop(state, n, data, order)
            return loss
        for i in range(n):
            state, loss = update(state, data, order, i)
        return loss

    def repeat(n: int) -> Any:
        if not pick:
            return take(n, None) / case.batch
        for epoch in range(n):
            loss = take(steps, shuffled(jax.random.PRNGKey(epoch)))
        return loss / case.batch

    def reset() -> None:
        """The parameters alone: Adam keeps (parameter, first moment, second moment) of each."""
        nonlocal state
        taken, now = state.optim_state
        like = now.packed_state
        packed = type(like)(type(q)((p[0], *q[1:])) for p, q in zip(first, like, strict=True))
        back = OptimizerState(packed, now.tree_def, now.subtree_defs)
        state = state._replace(optim_state=(taken, back))

    def wait() -> None:
        jax.block_until_ready(state)

    return Runner(repeat, reset, wait, steps if pick else 1)


def _loss(case: Case) -> Any:
    if case.particles > 1:
        return RenyiELBO(alpha=0, num_particles=case.particles)
    return Trace_ELBO()


def programs(case: Case) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    """Model and guide."""
    nets: Any = networks(case)
    upper = case.upper is not None

    def apply(name: str, y: Any) -> Any:
        return run(nets[name], numpyro.param(name, weights(nets[name])), y)

    def model(x: Any) -> None:
        top = case.upper[1] if case.upper else case.latent
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z2" if upper else "z", dist.Normal(jnp.zeros(top), 1.0).to_event(1))
            if upper:
                z = numpyro.sample("z1", _gaussian(apply("downward", z)))
            numpyro.sample("x", _likelihood(case, apply("decoder", z)), obs=x)

    def guide(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            encoded = apply("encoder", x / case.counts if case.counts > 1 else x)
            z = numpyro.sample("z1" if upper else "z", _gaussian(encoded))
            if upper:
                numpyro.sample("z2", _gaussian(apply("upward", z)))

    return model, guide


def _gaussian(parameters: Any) -> Any:
    loc, raw = jnp.split(parameters, 2, -1)
    return dist.Normal(loc, jax.nn.softplus(raw) + FLOOR).to_event(1)


def _likelihood(case: Case, logits: Any) -> Any:
    if case.counts > 1:
        return dist.Binomial(case.counts, logits=logits).to_event(len(case.event))
    return dist.Bernoulli(logits=logits).to_event(len(case.event))


# ---------------------------------------------------------------------------------------------
# Networks: those of torch, layer by layer, images with channels last as JAX has it fastest


def run(net: nn.Sequential, given: list[Any], x: Any) -> Any:
    for layer, own in zip(net, given, strict=True):
        x = LAYERS[type(layer)](layer, own, x)
    return x


def weights(net: nn.Sequential) -> list[Any]:
    """What a user would train: matrices ``[in, out]``, kernels ``[h, w, in, out]``, pixels ordered
    before channels where an image is flattened."""
    layers, given = [*net], []
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Linear):
            before = layers[i - 1] if i else None
            after = layers[i + 2] if i + 2 < len(layers) else None
            given.append(_matrix(layer, isinstance(before, nn.Flatten), layers[:i], after))
        elif isinstance(layer, nn.Conv2d):
            given.append((_array(layer.weight.permute(2, 3, 1, 0)), _array(layer.bias)))
        elif isinstance(layer, nn.ConvTranspose2d):
            kernel = layer.weight.flip(2, 3).permute(2, 3, 0, 1)
            given.append((_array(kernel), _array(layer.bias)))
        else:
            given.append(())
    return given


def _matrix(layer: nn.Linear, flattened: bool, before: list[nn.Module], after: Any) -> Any:
    weight, bias = layer.weight, layer.bias
    if flattened:
        channels = next(m.out_channels for m in before[::-1] if isinstance(m, nn.Conv2d))
        weight = weight.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1)
    if isinstance(after, nn.Unflatten):
        channels = after.unflattened_size[0]
        weight = weight.unflatten(0, (channels, -1)).transpose(0, 1).flatten(0, 1)
        bias = bias.unflatten(0, (channels, -1)).transpose(0, 1).flatten()
    return _array(weight.T), _array(bias)


def _array(tensor: Tensor | None) -> Any:
    assert tensor is not None
    return jnp.asarray(tensor.detach().contiguous().numpy())


def _convolved(layer: Any, own: Any, x: Any, transposed: bool) -> Any:
    kernel, bias = own
    around = (1, 2) if transposed else (1, 1)  # of what the stride puts zeros between
    out = jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1) if transposed else layer.stride,
        (around, around),
        lhs_dilation=layer.stride if transposed else None,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return out + bias


def _unflattened(layer: Any, own: Any, x: Any) -> Any:
    channels, *size = layer.unflattened_size
    return x.reshape(len(x), *(size if len(size) == 2 else x.shape[1:]), channels)


def _flattened(layer: Any, own: Any, x: Any) -> Any:
    return x[..., 0] if layer.end_dim == 2 else x.reshape(len(x), math.prod(x.shape[1:]))


LAYERS: dict[type[nn.Module], Callable[[Any, Any, Any], Any]] = {
    nn.Linear: lambda layer, own, x: x @ own[0] + own[1],
    nn.ReLU: lambda layer, own, x: jax.nn.relu(x),
    nn.Tanh: lambda layer, own, x: jnp.tanh(x),
    nn.Conv2d: partial(_convolved, transposed=False),
    nn.ConvTranspose2d: partial(_convolved, transposed=True),
    nn.Unflatten: _unflattened,
    nn.Flatten: _flattened,
    Shift: lambda layer, own, x: x + _array(layer.start),
}
