"""A function of tensors as one CUDA graph: all its kernels for the price of one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Replay"]

WARM_UPS = 3  # libraries set themselves up in the first calls, which a capture can't hold


class Replay:
    """Runs ``function`` again and again at the addresses of one call.

    Capturing it runs it several times; whoever asks for it puts back what that changes.

    Args:
        function: without gradient, and without a look at values on the host.
        inputs: of a call; the first ``changing`` are copied in at each call, the rest has to stay
            where it is and may be changed in place.
    """

    def __init__(
        self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], changing: int
    ) -> None:
        self.given = [tensor.detach().clone() for tensor in inputs[:changing]]
        call = [*self.given, *(tensor.detach() for tensor in inputs[changing:])]
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    function(*call)
            torch.cuda.current_stream().wait_stream(aside)
            # a thread that makes batches ready may ask CUDA for memory meanwhile
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.out = function(*call)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        torch._foreach_copy_(self.given, list(inputs[: len(self.given)]))
        self.graph.replay()
        return [tensor.clone() for tensor in self.out]  # the next replay writes over them
