"""The most memory that tensors held while some code ran, on any device, activations included."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorPeak(TorchDispatchMode):
    """Follows the storages that operations make, until they are freed.

    Attributes:
        peak_bytes: the most that lived at once, of those made inside.

    Example:
        >>> import torch
        >>> with TensorPeak() as memory:
        ...     kept = torch.ones(100)
        ...     total = float((kept + 1).sum())
        >>> 800 <= memory.peak_bytes < 900
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live_bytes = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._follow(leaf)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        # The storage object lives as long as the memory does.
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._live_bytes -= self._sizes.pop(key)
