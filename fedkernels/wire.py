"""What crosses from client to server: wires, what of them one client sends, and how it is packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from .kernels.round_tail import Draws
from .layout import Layout, Slab


@dataclass(frozen=True)
class Payload:
    """What one client sends on a wire: the parts of the wire's vector, side by side, and the matrices among them.

    Args:
        spans: the parts, in the order they are sent.
        slabs: matrices, with `start` and `stop` counted in the payload.
    """

    spans: tuple[slice, ...]
    slabs: tuple[Slab, ...] = ()

    @property
    def size(self) -> int:
        return sum(span.stop - span.start for span in self.spans)

    def take(self, vector: Tensor) -> Tensor:
        """The payload `[size]` of a wire's vector."""
        return vector[self.spans[0]] if len(self.spans) == 1 else torch.cat([vector[span] for span in self.spans])

    def put(self, vector: Tensor, values: Tensor) -> None:
        """Write a payload `[size]` to where it lies in a wire's vector."""
        at = 0
        for span in self.spans:
            stop = at + span.stop - span.start
            vector[span], at = values[at:stop], stop


class Codec(Protocol):
    """How one client's payload is packed for the way up; lossy, so the server sums what it decodes.

    What is sent has the same number of bytes whatever the values.
    """

    @property
    def error_feedback(self) -> bool:
        """Whether a client adds what the codec lost of its last payload to its next one."""
        ...

    def n_bytes(self, payload: Payload, itemsize: int) -> int:
        """Bytes of the message, where a float of the wire has `itemsize`."""
        ...

    def encode(self, values: Tensor, payload: Payload, draws: Draws) -> tuple[Tensor, ...]:
        """The message for finite `values [size]`: tensors of the dtypes that are sent, `n_bytes` in all.

        Args:
            draws: what random numbers follow from, of this client, wire and round alone.
        """
        ...

    def decode(self, message: tuple[Tensor, ...], payload: Payload, dtype: torch.dtype) -> Tensor:
        """The values `[size]` in `dtype` that the server makes of a message."""
        ...

    def transmit(self, rows: Tensor, payloads: Sequence[Payload], draws: Draws, residual: Tensor | None) -> Tensor:
        """What the server decodes of the messages of `C` clients, `[C, d]`; zero where nothing is sent.

        A row with NaN or infinity among what is sent has one in what is decoded, too.

        Args:
            rows: what the clients mean to send, `[C, d]`.
            payloads: the part of its row that each sends.
            residual: `[C, d]`, added to it; what the codec loses becomes the new one, in place.
        """
        ...

    def notes(self, payload: Payload) -> list[str]:
        """What a user should know about this codec on this payload, a line each."""
        ...


@dataclass(frozen=True)
class Wire:
    """One tensor that crosses from client to server each round.

    Args:
        like: its shape per client: `params` is `[d]`, `matrices` is `[d_matrix]`, `scalar` is `[1]`, an int is `[n]`.
        reduce: `mean` over the cohort (weighted when the run weights clients) or `sum`.
        only_block: the client sends its own block and the shared block only; mean or sum of a block are over the
            clients that were assigned that block, and the collective moves only those slices. Needs `like="params"`.
        diagnostic: rides along for `Algorithm.metrics`; a federation would not send it, so it is no protocol byte.
        private: released by the Gaussian mechanism alone: a client's private wires get one l2 clip together, the sum
            over the cohort gets noise once, and the aggregate is that sum over the expected cohort, whoever came.
        state: the wire carries a state, not an update. The codec of the run leaves it as floats, since a state may be
            divided by, and error feedback would add states of earlier rounds to it.
        codec: packs what a client sends; None sends floats, or takes the codec of the run where the wire is an update
            like params.

    Raises:
        ValueError: a codec on a private wire, or one with error feedback on a wire not like params, or of a state.

    Example:
        >>> Wire("scalar").size(Layout.of(torch.nn.Linear(3, 2)))
        1
    """

    like: Literal["params", "matrices", "scalar"] | int = "params"
    reduce: Literal["mean", "sum"] = "mean"
    only_block: bool = False
    diagnostic: bool = False
    private: bool = False
    state: bool = False
    codec: Codec | None = None

    def __post_init__(self) -> None:
        # Here it is decided which codec goes with which wire.
        if self.codec is not None and self.private:
            raise ValueError(f"{self.codec} on a private wire: what it loses would come before the clip and the noise")
        if self.codec is not None and self.codec.error_feedback and (self.like != "params" or self.state):
            what = "a state" if self.state else f"like {self.like!r}"
            raise ValueError(f"{self.codec} on a wire {what}: error feedback needs an update that is like 'params'")

    def size(self, layout: Layout) -> int:
        """Floats per client on this wire, were it sent whole."""
        named = {"params": layout.d, "matrices": layout.d_matrix, "scalar": 1}
        return self.like if isinstance(self.like, int) else named[self.like]

    def payload(self, layout: Layout, block: int | None) -> Payload:
        """What a client that was assigned `block` sends; None is the whole wire."""
        if self.like == "matrices":
            slabs = tuple(replace(slab, start=slab.matrix_start, stop=slab.matrix_stop) for slab in layout.slabs)
        else:
            slabs = layout.slabs if self.like == "params" else ()
        if not self.only_block or block is None:
            return Payload((slice(0, self.size(layout)),), slabs)
        spans = (layout.block(block), layout.block(layout.n_blocks))
        at, inside = 0, []
        for span in spans:
            shift = at - span.start
            inside += [
                replace(slab, start=slab.start + shift, stop=slab.stop + shift)
                for slab in slabs
                if span.start <= slab.start and slab.stop <= span.stop  # rows of a cut matrix are none themselves
            ]
            at += span.stop - span.start
        return Payload(spans, tuple(inside))
