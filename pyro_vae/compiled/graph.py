"""What a function does with tensors, recorded once as a flat graph and done again without Python."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from pyro_vae.compiled.attributes import Attributes
from pyro_vae.compiled.products import by_onednn, onednn_is_faster
from pyro_vae.objectives.swap import preserved
from pyro_vae.operators import fused

__all__ = ["Graph", "put_back", "record", "told"]

OURS = Path(__file__).parents[1]
ELSEWHERE = tuple(
    str(Path(str(package.__file__)).parent) for package in (torch, pyro)
)  # whose frames do not say where a user's program is at fault


OF_VALUES = "the program wants the value of a tensor (.item(), .numpy(), float(), `if tensor`)"
READING = {
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__complex__,
    Tensor.__index__,
    Tensor.__contains__,
    torch.equal,
    torch.allclose,
}


class Graph:
    """A recorded function of tensors.

    Attributes:
        module: the operations, first those on the inputs it was recorded with, then on ``held``.
        held: tensors that the function read without being given them, by reference: what they hold
            when the graph runs is what counts.
    """

    def __init__(self, module: fx.GraphModule, held: list[Tensor]) -> None:
        self.module, self.held = module, held

    def __len__(self) -> int:
        """Number of operations."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)

    def entries(self) -> int:
        """Numbers that the operations write, all together."""
        made = [node.meta.get("val") for node in self.module.graph.nodes]
        return sum(value.numel() for value in made if isinstance(value, Tensor))

    def first(self, outputs: int) -> Graph:
        """The graph that returns only the first outputs."""
        graph = fx.Graph()
        end = graph.graph_copy(self.module.graph, {})
        graph.output(list(end)[:outputs])  # type: ignore[arg-type]
        return Graph(fx.GraphModule(self.module, graph), self.held)

    def lowered(self, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        """The graph as machine code, for inputs of these shapes; a cache on disk keeps it.

        Random numbers are torch's own and come in the order of the program, so that a seed means
        what it means elsewhere.
        """
        try:  # kernels called from C++: less time between them
            lowered = self._lowered(inputs, cpp_wrapper=inputs[0].device.type == "cpu")
        except Exception:
            lowered = self._lowered(inputs, cpp_wrapper=False)
        held = self.held
        if not held:
            return lowered
        return lambda *tensors: lowered(*tensors, *held)

    def _lowered(self, inputs: Sequence[Tensor], cpp_wrapper: bool) -> Callable[..., Any]:
        from torch import _inductor as inductor
        from torch._guards import TracingContext, tracing
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        options = {
            "fallback_random": True,
            "reorder_for_peak_memory": False,  # it takes random numbers out of their order
            "size_asserts": False,
            "cpp_wrapper": cpp_wrapper,
        }
        mode = FakeTensorMode(shape_env=ShapeEnv())  # the cache asks for one
        with (
            torch.no_grad(),
            tracing(TracingContext(mode)),
            warnings.catch_warnings(),
            _silent("torch._inductor.ir"),  # of operators that C++ calls through Python
        ):
            warnings.filterwarnings(
                "ignore", ".*is deprecated", DeprecationWarning
            )  # torch of itself
            given: list[Any] = [tensor.detach() for tensor in (*inputs, *self.held)]
            module = fused(self.module, given)
            if onednn_is_faster():
                module = by_onednn(module)
            for node, tensor in zip(module.graph.find_nodes(op="placeholder"), given, strict=True):
                node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
            lowered: Any = inductor.compile(module, given, options=options)
            return lowered  # type: ignore[no-any-return]

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        # not the call of a module, which others may have hooks on
        return self.module.forward(*inputs, *self.held)  # type: ignore[no-any-return]


def record(function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> Graph:
    """Run a function once and note what it does.

    Args:
        function: reads ``inputs``, the very objects, wherever it finds them; may change them in place.
        inputs: what may be another tensor when the graph runs.

    Raises:
        ValueError: the shape of a tensor depends on values, which a graph has as a constant.
        Exception: whatever a function raises that wants to know the value of a tensor.
    """
    with ExitStack() as stack:
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(enable_python_dispatcher())  # BatchNorm says what it changes
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_without_onednn())
        module = make_fx(lambda *tensors: _without_values(function))(*inputs)
    if found := next(filter(_shaped_by_values, module.graph.nodes), None):
        raise ValueError(
            f"the program makes a tensor ({found.target}) whose shape depends on values, as in x[x > 0]"
        )
    return _closed(module)


@contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _Unread(TorchFunctionMode):
    """Refuses to tell the values of tensors: of one that a function holds, torch would."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in READING:
            raise ValueError(OF_VALUES)
        return func(*args, **(kwargs or {}))


def _without_values(function: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    with _Unread():
        return list(function())


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Its LSTM can't be recorded. What is recorded in its place takes oneDNN's kernels elsewhere."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _shaped_by_values(node: fx.Node) -> bool:
    """Whether the shape of what an operation makes is known from its result alone."""
    tags: set[torch.Tag] = set(getattr(node.target, "tags", ()))
    if node.target is torch.ops.aten.index.Tensor:
        values = [index.meta.get("val") for index in node.args[1] if index is not None]  # type: ignore[union-attr]
        return any(isinstance(v, Tensor) and v.dtype in (torch.bool, torch.uint8) for v in values)
    return torch.Tag.dynamic_output_shape in tags


def _closed(module: fx.GraphModule) -> Graph:
    """With the tensors that a function held as further inputs: a constant in a graph is a copy that
    nobody can change."""
    graph, held = module.graph, dict[int, tuple[Tensor, fx.Node]]()
    graph.set_codegen(fx.graph.CodeGen())  # the call takes tensors one by one
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(module, str(node.target), None)
        if not isinstance(value, Tensor):
            continue
        if value.dim() == 0 and all(map(_is_literal, node.users)):
            _write_out(graph, node, value)
            continue
        if id(value) not in held:
            with graph.inserting_after(last):
                last = graph.placeholder(f"held_{len(held)}")
            held[id(value)] = value, last
        node.replace_all_uses_with(held[id(value)][1])
        graph.erase_node(node)
    module.recompile()
    return Graph(module, [value for value, _ in held.values()])


def _write_out(graph: fx.Graph, node: fx.Node, value: Tensor) -> None:
    """A number that the program wrote down as a number in the graph."""
    for user in list(node.users):
        with graph.inserting_before(user):
            kind: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
            number = graph.call_function(torch.ops.aten.full.default, ([], value.item()), kind)
        number.meta = dict(user.meta)
        user.replace_all_uses_with(number)
        graph.erase_node(user)
    graph.erase_node(node)


def _is_literal(user: fx.Node) -> bool:
    """Whether what a node uses is a number that the program wrote down."""
    return user.target in (
        torch.ops.aten.lift_fresh_copy.default,
        torch.ops.aten.lift_fresh.default,
    )


@contextmanager
def put_back(tensors: Sequence[Tensor], *programs: Callable[..., Any]) -> Iterator[None]:
    """Undo what the body does to tensors, to what programs hold and to the random state."""
    attributes = Attributes(*programs)
    with preserved(*programs), torch.no_grad():
        kept = [tensor.detach().clone() for tensor in tensors]
        try:
            with torch.enable_grad():
                yield
        finally:
            attributes.put_back()
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)


def told(error: BaseException) -> str:
    """An error as one line, with the place in the user's program that it came from."""
    text = str(error).strip() or type(error).__name__
    if "_local_scalar_dense" in text or "DataDependent" in type(error).__name__:
        text = OF_VALUES
    line = text.splitlines()[0][:200]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*ELSEWHERE, str(OURS), "<"))
    ]
    return f"{line} at {frames[-1].filename}:{frames[-1].lineno}" if frames else line
