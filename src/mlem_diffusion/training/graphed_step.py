"""A step of training as a CUDA graph: one launch instead of thousands."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SlowPath
from ..models.torch_compile import first_line

_WARMUP = 3  # real steps before the capture: they compile, tune and allocate what must not be allocated in it


class GraphedStep:
    """step(batch) on fixed buffers: the first calls as they are, on a side stream, then captured and replayed.

    Every call is one step of training. A capture only records, so the step that is captured is then replayed once like all
    later ones. Where the capture fails, it goes on without, with one SlowPath warning.
    """

    def __init__(self, step: Callable[[Sequence[Tensor]], None], device: torch.device, name: str):
        self.step, self.device, self.name = step, device, name
        self.buffers: list[Tensor] = []
        self.graph: Any = None
        self.calls, self.failed = 0, False
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Sequence[Tensor]) -> None:
        if self.failed:
            self.step(batch)
            return
        if not self.buffers:
            self.buffers = [tensor.clone() for tensor in batch]
        else:
            for buffer, tensor in zip(self.buffers, batch, strict=True):
                buffer.copy_(tensor)
        self.calls += 1
        if self.calls <= _WARMUP:
            self._on_side_stream()
            return
        if self.graph is None:
            try:
                self.graph = self._capture()
            except Exception as error:
                self.failed, self.buffers = True, []
                reason = f"CUDA graph capture failed ({first_line(error)})"
                warnings.warn(f"{self.name} runs without a CUDA graph: {reason}.", SlowPath, stacklevel=2)
                self.step(batch)
                return
        self.graph.replay()

    def _on_side_stream(self) -> None:
        """A step on the stream that the capture will use: libraries keep handles and workspaces per stream."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.step(self.buffers)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _capture(self) -> Any:
        gc.collect()  # what holds CUDA memory or graphs should not be freed in the middle of the capture
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what other threads do to the device (monitoring, say) does not break the capture
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.step(self.buffers)
        return graph
