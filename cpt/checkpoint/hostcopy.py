"""A copy of training state in host memory that is taken once and used for every save.

On a GPU the memory is pinned and the copy runs on a stream of its own, beside the kernels of the step; the optimizer's
update then waits for it on the device. On a CPU it is a plain copy that leaves the interpreter to the main thread.
"""

from collections.abc import Sequence

import numpy as np
import torch

from cpt.checkpoint.portable import Fragment


class HostCopy:
    """Copies fragments into one buffer that grows to the largest set it was given."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)
        self._stream: torch.cuda.Stream | None = None
        self._ready: torch.cuda.Event | None = None
        self._copied: torch.cuda.Event | None = None

    def mark_ready(self, fragments: Sequence[Fragment]) -> None:
        """Called where the state was computed: what was queued on the device before now must come before the copy."""
        device = _cuda_device(fragments)
        self._ready = self._copied = None
        if device is not None:
            self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record(torch.cuda.current_stream(device))

    def copy(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """The fragments in host memory. Copies from a device are queued when it returns, not done: see ``wait``."""
        needed = sum(tensor.numel() for fragment in fragments for tensor in fragment.state.values())
        on_gpu = self._ready is not None and self._stream is not None
        if self._flat.numel() < needed:
            self._flat = torch.empty(0)  # free the smaller one first
            self._flat = _host_memory(needed, pinned=on_gpu)
        if self._stream is None or self._ready is None:
            return self._fill(fragments)
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            self._stream.wait_event(self._ready)
            copies = self._fill(fragments)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(self._stream)
        return copies

    def let_device_wait(self) -> None:
        """Make what is queued on the device from now on come after the copy."""
        if self._copied is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)

    def wait(self) -> None:
        """Return once the copy can be read."""
        if self._copied is not None:
            self._copied.synchronize()

    def _fill(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        copies, offset = [], 0
        for fragment in fragments:
            state = {}
            for kind, source in fragment.state.items():
                state[kind] = self._flat[offset : offset + source.numel()]
                _copy(source.detach(), state[kind])
                offset += source.numel()
            copies.append(Fragment(fragment.name, fragment.start, state))
        return copies


def _host_memory(numel: int, *, pinned: bool) -> torch.Tensor:
    if pinned:
        try:
            return torch.empty(numel, pin_memory=True)
        except RuntimeError:  # so much cannot be pinned here; plain memory only makes the copy slower
            pass
    return torch.empty(numel)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    if source.is_cuda or source.dtype != torch.float32:
        target.copy_(source, non_blocking=source.is_cuda)
    else:  # torch would start a second team of threads for it, beside the one that computes the step
        np.copyto(target.numpy(), source.numpy())


def _cuda_device(fragments: Sequence[Fragment]) -> torch.device | None:
    devices = {tensor.device for fragment in fragments for tensor in fragment.state.values() if tensor.is_cuda}
    return next(iter(devices), None)
