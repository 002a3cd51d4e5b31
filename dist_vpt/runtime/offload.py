"""Activations kept in host memory between forward and backward.

On a GPU they are copied by streams of their own, beside what is computed: out while the blocks after them run, and back
while backward is still in the block after theirs.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dist_vpt.runtime.run_block import RunBlock, is_block_weight

if TYPE_CHECKING:
    from dist_vpt.backbones.vit import Backbone

Offload = Callable[[Tensor], Callable[[], Tensor]]


def apply_offload(backbone: "Backbone", offload: Offload | None = None) -> None:
    """Move what blocks keep for backward to host memory until it is used; weights stay on the device.

    ``offload`` stores a tensor and returns a function that brings it back; by default, host memory. If that function
    has an attribute ``prefetch``, this is called before: as soon as backward begins with the block after.
    """
    backbone.run_block = _Offloaded(offload or _to_host, backbone.run_block)


class _Offloaded:
    """Runs blocks, and knows the order in which they came."""

    def __init__(self, offload: Offload, run: RunBlock):
        self.offload, self.run = offload, run
        self.last: Callable[[], _BlockCopies | None] = lambda: None

    def __call__(self, block: nn.Module, tokens_BND: Tensor) -> Tensor:
        copies = _BlockCopies(self.last)
        self.last = weakref.ref(copies)

        def pack(tensor: Tensor) -> Tensor | _Kept:
            return tensor if is_block_weight(tensor, block) else _Kept(self.offload(tensor), copies)

        with saved_tensors_hooks(pack, _unpack):
            return self.run(block, tokens_BND)


def _unpack(packed: "Tensor | _Kept") -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.fetch()


class _BlockCopies:
    """The copies of one block that can be fetched early. Only autograd's graph keeps them, and them this."""

    def __init__(self, before: "Callable[[], _BlockCopies | None]"):
        self.before = before  # of the block before; none where that has kept nothing or its graph is gone
        self.copies: list[weakref.ref[Any]] = []
        self.fetched = False

    def prefetch(self) -> None:
        if not self.fetched:
            self.fetched = True
            for copy in self.copies:
                if (found := copy()) is not None:
                    found.prefetch()


class _Kept:
    """A tensor that has left the device, in place of which autograd holds this."""

    def __init__(self, bring_back: Callable[[], Tensor], block: _BlockCopies):
        self.bring_back, self.block = bring_back, block
        if hasattr(bring_back, "prefetch"):
            block.copies.append(weakref.ref(bring_back))

    def fetch(self) -> Tensor:
        self.block.prefetch()
        if (before := self.block.before()) is not None:
            before.prefetch()
        return self.bring_back()


def _to_host(tensor: Tensor) -> Callable[[], Tensor]:
    if tensor.is_cuda:
        return _PinnedCopy(tensor)
    # With its strides: what selective checkpointing returns must have the same layout.
    host = torch.empty_like(tensor, device="cpu", pin_memory=False)
    return partial(host.copy_(tensor).to, tensor.device)


class _PinnedCopy:
    """A GPU's tensor in pinned host memory. Its copies are ordered with the stream that computes by events alone."""

    def __init__(self, tensor: Tensor):
        self.device, computing = tensor.device, torch.cuda.current_stream(tensor.device)
        outward, self.inward = _streams(tensor.device)
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=True)  # with its strides, as above
        outward.wait_stream(computing)  # which may not have computed it yet
        with torch.cuda.stream(outward):
            self.host.copy_(tensor, non_blocking=True)
        self.left = outward.record_event()
        tensor.record_stream(outward)  # its memory is not reused before it has been read
        self.back: Tensor | None = None

    def prefetch(self) -> None:
        """Begin to copy it back."""
        # In memory of the stream that computes: another one would keep memory of its own for it.
        self.back = torch.empty_like(self.host, device=self.device)
        self.inward.wait_event(self.left)
        self.inward.wait_stream(torch.cuda.current_stream(self.device))  # what this memory held before may be in use
        with torch.cuda.stream(self.inward):
            self.back.copy_(self.host, non_blocking=True)
        self.arrived = self.inward.record_event()
        self.back.record_stream(self.inward)  # if it is never used, its memory is not reused while it is written

    def __call__(self) -> Tensor:
        """The tensor, once more on its device; what is computed from here on waits for it, and the host does not."""
        if self.back is None:
            self.prefetch()
        back, self.back = self.back, None
        assert back is not None
        torch.cuda.current_stream(self.device).wait_event(self.arrived)
        return back


_STREAMS: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}


def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The streams of copies from a GPU and to it, the same for all blocks: a bus each way is all that there is."""
    if device not in _STREAMS:
        _STREAMS[device] = (torch.cuda.Stream(device), torch.cuda.Stream(device))
    return _STREAMS[device]
