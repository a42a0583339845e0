"""A training step as a CUDA graph: one launch instead of thousands."""

import gc
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SlowPath
from ..models.compiled import first_line

_WARMUP = 3  # steps before the capture, for compilation, tuning and allocation, which a capture does not allow


class GraphedStep:
    """A function step(batch) that runs on fixed buffers: a few calls on a side stream, then as a CUDA graph.

    Each call is one training step. A capture only records the step, so the graph is replayed once after it. If the
    capture fails, all steps run without a graph, with one SlowPath warning.
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
        """Run a step on the stream of the later capture, since libraries have handles and workspaces per stream."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.step(self.buffers)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _capture(self) -> Any:
        gc.collect()  # so that no object with CUDA memory or graphs is freed during the capture
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads' use of the device, such as monitoring, does not break the capture
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.step(self.buffers)
        return graph
