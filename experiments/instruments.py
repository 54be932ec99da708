"""What ``keyveil benchmark`` reads: a clock, how much memory is held, and how much arithmetic is done."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(device: torch.device, *, peak: bool) -> int:
    """Bytes now, which begins a new count, or at most since; elsewhere than on Linux, ``ru_maxrss`` for both."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else 0
    with contextlib.suppress(OSError, StopIteration):
        if not peak:
            Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark of the imports
        return _of_status("VmHWM" if peak else "VmRSS")
    return _largest()


def resident() -> int:
    """Bytes of main memory that this process holds; elsewhere than on Linux, that it held at most."""
    with contextlib.suppress(OSError, StopIteration):
        return _of_status("VmRSS")
    return _largest()


def _of_status(word: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith(word)).split()[1])


def _largest() -> int:
    import resource  # not on Windows

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


class Flops(TorchDispatchMode):
    """Counts multiplications and additions within, by torch's formulas.

    Torch's own counter follows modules, which a gradient of a gradient forbids, and forgets the groups of a convolution
    in the gradient of its weights: of one channel by channel it makes as many times too much as there are channels.

    Attributes:
        total: So far.

    Example:
        >>> with Flops() as flops:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
        >>> flops.total
        60
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made, kind = func(*args, **(kwargs or {})), func._overloadpacket
        if kind is torch.ops.aten.convolution_backward:
            gradient, image, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
            forward = conv_flop_count(image.shape, weight.shape, gradient.shape, transposed)
            self.total += forward * sum(wanted[:2])  # of the picture and of the weights; each costs the same
        elif kind in flop_registry:
            self.total += flop_registry[kind](*args, **(kwargs or {}), out_val=made)
        return made
