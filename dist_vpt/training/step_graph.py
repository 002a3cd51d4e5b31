"""A step of training on a GPU as one launch: captured in a CUDA graph, and replayed with other inputs.

A step of many small readers is hundreds of kernels, which take the GPU less time than Python takes to launch them. A
graph launches them all, on the memory that they were captured on. So whatever differs from step to step is a tensor
among the inputs, which are copied into the graph's own, or a random source, which is seeded before each replay. The
step reads nothing from the device.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dist_vpt.frozen_stream.prefetch import side_stream

# Steps of a shape before it is captured, as make_graphed_callables takes: libraries set themselves up in the first.
WARM_UP = 3


# The allocator may ask a graph whose capture could not be ended which memory it has, as long as the process lives.
NOT_ENDED: list[torch.cuda.CUDAGraph] = []


class Capture(Protocol):
    """What a step launches, on fixed memory."""

    made: Tensor  # what each replay computes anew

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Runs steps as they are to be captured, and captures them."""

    def rehearse(self, step: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """Run a step; its result, and whether it has waited for the device."""
        ...

    def capture(self, step: Callable[[], Tensor], sources: Sequence[torch.Generator], beside: Any = None) -> Capture:
        """Capture a step, without computing it. Raises RuntimeError where that is not possible.

        ``beside``: a capture of before whose memory may be used, too: their replays alternate.
        """
        ...


class StepGraph:
    """Calls a step as it is for some times, then its captures: one for each combination of the inputs' shapes."""

    def __init__(self, recorder: Recorder | None, report: Callable[[str], None], reason: str = ""):
        """``report``: gets "" when the first capture is made, or else why there is none.

        ``recorder``: None where a step is always called as it is, for this ``reason`` ("": that is not reported).
        """
        self._recorder, self._report = recorder, report
        self._rehearsed: dict[Any, int] = {}
        self._captures: dict[Any, tuple[Any, Capture]] = {}  # with the inputs that it reads
        if reason:
            self._report(reason)

    def forget(self) -> None:
        """Free the captures: the tensors that they work on are replaced."""
        self._rehearsed, self._captures = {}, {}

    def __call__(self, step: Callable[[Any], Tensor], inputs: Any, sources: Sequence[torch.Generator]) -> Tensor:
        """``step(inputs)``, which has no other effect than on tensors. The result holds until the next call.

        ``inputs``: tensors in any nesting of tuples, lists and dicts. ``sources``: that the step draws from,
        seeded.
        """
        recorder = self._recorder
        if recorder is None:
            return step(inputs)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tree_leaves(inputs))
        if shapes in self._captures:
            own, capture = self._captures[shapes]
            for mine, given in zip(tree_leaves(own), tree_leaves(inputs), strict=True):
                mine.copy_(given)
            capture.replay()
            return capture.made
        count = self._rehearsed[shapes] = self._rehearsed.get(shapes, 0) + 1
        if count <= WARM_UP:
            made, waited = recorder.rehearse(partial(step, inputs))
            if waited and count == WARM_UP:  # what is set up in the first ones may have to
                self._give_up("it waits for the GPU")
            return made
        own = tree_map(torch.clone, inputs)
        if not self._capture(recorder, partial(step, own), sources, shapes, own):
            return step(inputs)
        _, capture = self._captures[shapes]
        capture.replay()
        return capture.made

    def _capture(
        self, recorder: Recorder, step: Callable[[], Tensor], sources: Sequence[torch.Generator], shapes: Any, own: Any
    ) -> bool:
        """Whether that was possible."""
        _, beside = next(iter(self._captures.values()), (None, None))
        try:
            capture = recorder.capture(step, sources, beside)
        except RuntimeError as error:  # torch's errors, and those of CUDA
            self._give_up(str(error).splitlines()[0] if str(error) else type(error).__name__)
            return False
        if not self._captures:
            self._report("")
        self._captures[shapes] = own, capture
        return True

    def _give_up(self, reason: str) -> None:
        self._recorder = None
        self.forget()
        self._report(reason)


class CudaRecorder:
    """Captures CUDA graphs, on a stream on which steps have been run before: capturing needs one of its own."""

    def __init__(self, device: torch.device):
        self._stream = side_stream(device, "steps")

    def rehearse(self, step: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        current, before = torch.cuda.current_stream(self._stream.device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(current)
        with warnings.catch_warnings(record=True) as caught, torch.cuda.stream(self._stream):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                made = step()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        current.wait_stream(self._stream)
        waits = [w for w in caught if "synchroniz" in str(w.message).lower()]  # and that not all of them are noticed
        for other in caught:
            if other not in waits:
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        return made, any("called a synchronizing" in str(wait.message) for wait in waits)

    def capture(
        self, step: Callable[[], Tensor], sources: Sequence[torch.Generator], beside: "CudaCapture | None" = None
    ) -> "CudaCapture":
        graph, pool = torch.cuda.CUDAGraph(), None if beside is None else beside.graph.pool()
        for source in sources:
            graph.register_generator_state(source)
        inside = False
        try:
            # The outer context restores the stream where the inner one fails. Another thread copies the next rows
            # meanwhile: what it does is no error ("thread_local").
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                inside = True
                made = step()
                inside = False
        except RuntimeError as error:
            if not inside or error.__context__ is not None:  # raised as the capture was ended
                NOT_ENDED.append(graph)
            raise
        return CudaCapture(graph, made)


class CudaCapture:
    """A CUDA graph and what it computes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, made: Tensor):
        self.graph, self.made = graph, made

    def replay(self) -> None:
        self.graph.replay()


def recorder_of(device: torch.device) -> Recorder | None:
    """What captures steps on a device, or None where nothing does."""
    return CudaRecorder(device) if device.type == "cuda" else None
