"""Codecs for the way up: int8, bfloat16, the largest entries, low rank; and what a client keeps of what they lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..kernels.round_tail import Draws, Spans, encode_bf16, encode_int8
from ..layout import Layout, Slab
from ..rng import Purpose, stream
from ..wire import Codec, Payload, Wire

Fraction = Annotated[float, Field(gt=0, le=1)]


def _spans(payloads: Sequence[Payload], d: int, device: torch.device) -> Spans | None:
    """The parts of rows of `d` values that clients send; None where all send whole rows."""
    if all(payload.spans == (slice(0, d),) for payload in payloads):
        return None
    return Spans.of([payload.spans for payload in payloads], device)


class _OneByOne:
    """Transmits the messages of clients one after another."""

    def transmit(
        self: Codec, rows: Tensor, payloads: Sequence[Payload], draws: Draws, residual: Tensor | None
    ) -> Tensor:
        decoded = torch.zeros_like(rows)
        finite = rows.sum(1, dtype=torch.float64).isfinite().tolist()
        for c, payload in enumerate(payloads):
            if not finite[c]:
                decoded[c] = torch.nan
                continue
            values = payload.take(rows[c])
            if residual is not None:
                values = values + payload.take(residual[c])
            received = self.decode(self.encode(values, payload, draws), payload, values.dtype)
            payload.put(decoded[c], received)
            if residual is not None:
                payload.put(residual[c], values - received)
        return decoded


@dataclass(frozen=True, kw_only=True)
class Int8:
    """Stochastic rounding to 8 bits, with one scale per chunk of values.

    `s = max|v|/127` of a chunk, `q = ⌊v/s⌋`, and one more where `u < v/s − ⌊v/s⌋` with u uniform in (0, 1), decoded as
    `s q`: unbiased, for values within the range of float32. Beyond it they saturate.

    Args:
        chunk: values that share a scale.
        error_feedback: add what rounding lost to the client's next payload.

    Reference: Alistarh et al., QSGD: Communication-efficient SGD via gradient quantization and encoding, 2017
    (arXiv 1610.02132).
    """

    chunk: Annotated[int, Field(ge=1, lt=2**31)] = 256
    error_feedback: bool = False

    def n_bytes(self, payload: Payload, itemsize: int) -> int:
        return payload.size + 4 * self._chunks(payload)

    def encode(self, values: Tensor, payload: Payload, draws: Draws) -> tuple[Tensor, ...]:
        q = values.new_empty(1, len(values), dtype=torch.int8)
        scale = values.new_empty(1, self._chunks(payload), dtype=torch.float32)
        encode_int8(values[None], draws=draws, chunk=self.chunk, payload=q, scale=scale)
        return q[0], scale[0]

    def decode(self, message: tuple[Tensor, ...], payload: Payload, dtype: torch.dtype) -> Tensor:
        q, scale = message
        return q.to(dtype).mul_(scale.to(dtype).repeat_interleave(self.chunk)[: len(q)])

    def transmit(self, rows: Tensor, payloads: Sequence[Payload], draws: Draws, residual: Tensor | None) -> Tensor:
        spans, decoded = _spans(payloads, rows.shape[1], rows.device), torch.zeros_like(rows)
        encode_int8(rows, draws=draws, chunk=self.chunk, spans=spans, residual=residual, decoded=decoded)
        return decoded

    def notes(self, payload: Payload) -> list[str]:
        return []

    def _chunks(self, payload: Payload) -> int:
        return -(-payload.size // self.chunk)


@dataclass(frozen=True, kw_only=True)
class Bf16:
    """Rounding to the nearest bfloat16, two bytes a value."""

    error_feedback: ClassVar[bool] = False

    def n_bytes(self, payload: Payload, itemsize: int) -> int:
        return 2 * payload.size

    def encode(self, values: Tensor, payload: Payload, draws: Draws) -> tuple[Tensor, ...]:
        return (values.bfloat16(),)

    def decode(self, message: tuple[Tensor, ...], payload: Payload, dtype: torch.dtype) -> Tensor:
        return message[0].to(dtype)

    def transmit(self, rows: Tensor, payloads: Sequence[Payload], draws: Draws, residual: Tensor | None) -> Tensor:
        spans, decoded = _spans(payloads, rows.shape[1], rows.device), torch.zeros_like(rows)
        encode_bf16(rows, spans=spans, residual=residual, decoded=decoded)
        return decoded

    def notes(self, payload: Payload) -> list[str]:
        return []


@dataclass(frozen=True, kw_only=True)
class TopK(_OneByOne):
    """The values of largest magnitude and where they are; the others are zero to the server.

    Args:
        fraction: of the payload that is sent, at least one value.
        error_feedback: add what was not sent to the client's next payload.

    Reference: Stich, Cordonnier and Jaggi, Sparsified SGD with memory, 2018 (arXiv 1809.07599).
    """

    fraction: Fraction = 0.1
    error_feedback: bool = True

    def kept(self, payload: Payload) -> int:
        """Values that are sent, k."""
        return max(1, round(self.fraction * payload.size))

    def n_bytes(self, payload: Payload, itemsize: int) -> int:
        return self.kept(payload) * (itemsize + 4)

    def encode(self, values: Tensor, payload: Payload, draws: Draws) -> tuple[Tensor, ...]:
        at = values.abs().topk(self.kept(payload), sorted=False).indices
        return values[at], at.int()

    def decode(self, message: tuple[Tensor, ...], payload: Payload, dtype: torch.dtype) -> Tensor:
        values, at = message
        return torch.zeros(payload.size, dtype=dtype, device=values.device).index_put_((at.long(),), values.to(dtype))

    def notes(self, payload: Payload) -> list[str]:
        # Of four-byte floats, which is what a run trains.
        if self.n_bytes(payload, 4) < 4 * payload.size:
            return []
        return [f"{self.kept(payload):,} of {payload.size:,} values with their indices are no smaller than all values"]


@dataclass(frozen=True, kw_only=True)
class LowRank(_OneByOne):
    """A truncated singular value decomposition `U S Vᵀ` of every matrix; what is no matrix is sent as it is.

    A matrix of m rows and n columns is sent at rank `r = max(1, ⌊ρmn/(m+n+1)⌋)`, that is as r(m+n+1) floats, or whole
    where that is not less than mn.

    Args:
        fraction: ρ, of a matrix's floats that are sent.

    Example:
        >>> LowRank(fraction=0.25).rank(64, 32)
        5
    """

    fraction: Fraction = 0.25

    error_feedback: ClassVar[bool] = False

    def rank(self, m: int, n: int) -> int | None:
        """The rank at which an m × n matrix is sent; None where it is sent whole."""
        r = max(1, int(self.fraction * m * n / (m + n + 1)))
        return r if r * (m + n + 1) < m * n else None

    def n_bytes(self, payload: Payload, itemsize: int) -> int:
        saved = sum(
            slab.count * (slab.rows * slab.cols - r * (slab.rows + slab.cols + 1)) for slab, r in self._cut(payload)
        )
        return (payload.size - saved) * itemsize

    def encode(self, values: Tensor, payload: Payload, draws: Draws) -> tuple[Tensor, ...]:
        message = [values[whole] for whole in self._whole(payload)]
        for slab, r in self._cut(payload):
            matrices = values[slab.start : slab.stop].view(slab.count, slab.rows, slab.cols)
            u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
            message += [u[..., :r], s[..., :r], vh[..., :r, :]]
        return tuple(message)

    def decode(self, message: tuple[Tensor, ...], payload: Payload, dtype: torch.dtype) -> Tensor:
        values = torch.empty(payload.size, dtype=dtype, device=message[0].device)
        parts = iter(message)
        for whole in self._whole(payload):
            values[whole] = next(parts)
        for slab, _ in self._cut(payload):
            u, s, vh = next(parts), next(parts), next(parts)
            values[slab.start : slab.stop] = ((u * s.unsqueeze(-2)) @ vh).flatten()
        return values

    def notes(self, payload: Payload) -> list[str]:
        cut = {slab for slab, _ in self._cut(payload)}
        whole = [slab for slab in payload.slabs if slab not in cut]
        if not whole:
            return []
        shapes = ", ".join(sorted({f"{slab.rows}x{slab.cols}" for slab in whole}))
        total = sum(slab.count for slab in payload.slabs)
        few = sum(slab.count for slab in whole)
        return [f"{few} of {total} matrices are sent whole, low rank would not be smaller: {shapes}"]

    def _cut(self, payload: Payload) -> list[tuple[Slab, int]]:
        """The slabs that are sent at a rank."""
        ranks = ((slab, self.rank(slab.rows, slab.cols)) for slab in payload.slabs)
        return [(slab, r) for slab, r in ranks if r is not None]

    def _whole(self, payload: Payload) -> list[slice]:
        """The runs between those slabs."""
        edges = [0, *(edge for slab, _ in self._cut(payload) for edge in (slab.start, slab.stop)), payload.size]
        return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


CODECS: dict[str, type] = {"int8": Int8, "bf16": Bf16, "topk": TopK, "lowrank": LowRank}


def with_codec(wires: Mapping[str, Wire], codec: Codec | None) -> dict[str, Wire]:
    """The wires of an algorithm, with the codec of the run on every update like params that has none of its own.

    Diagnostic wires are never sent. Wires of states go as floats, but for a codec of their own: a zero decoded where a
    second moment was would be divided by.
    """

    def takes(wire: Wire) -> bool:
        return wire.like == "params" and not (wire.codec or wire.diagnostic or wire.state)

    return {name: replace(wire, codec=codec) if takes(wire) else wire for name, wire in wires.items()}


def codec_notes(wires: Mapping[str, Wire], layout: Layout) -> list[str]:
    """What the codecs of the wires have to say about this model, a line each."""
    coded = ((name, wire.codec, wire.payload(layout, None)) for name, wire in wires.items() if wire.codec is not None)
    return [f"wire {name}: {note}" for name, codec, payload in coded for note in codec.notes(payload)]


class Encoder:
    """Puts what the server decodes in the place of what clients send, and keeps what error feedback sends later.

    Args:
        wires: of the algorithm, with their codecs.
        seed: of the run.

    Attributes:
        residuals: by wire with error feedback, the name `codec.WIRE` of the vector `[d]` that stays with a client: the
            sum of what it wanted to send less the sum of what was decoded, and 0 where it was not to send anything.
    """

    def __init__(self, wires: Mapping[str, Wire], layout: Layout, seed: int) -> None:
        self._layout = layout
        self._seed = seed
        self._coded = [
            (number, name, wire, wire.codec) for number, (name, wire) in enumerate(wires.items()) if wire.codec
        ]
        self.residuals = {name: f"codec.{name}" for _, name, _, codec in self._coded if codec.error_feedback}

    def __bool__(self) -> bool:
        return bool(self._coded)

    def __call__(
        self,
        up: Mapping[str, Tensor],
        clients: Sequence[int],
        blocks: Sequence[int | None],
        r: int,
        kept: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The uploads as decoded, in new tensors; what is not finite stays so, and what is not sent is zero.

        Args:
            up: what the clients send, `[C, size]` each.
            clients: their ids.
            blocks: the block of each, None where wires are whole.
            r: the round.
            kept: the residuals `[C, d]` by name, updated in place.
        """
        decoded = dict(up)
        secret = int(stream(self._seed, Purpose.CODEC, r).integers(2**63))
        for number, name, wire, codec in self._coded:
            key, ids = (torch.tensor(value, device=up[name].device) for value in (secret, list(clients)))
            payloads = [wire.payload(self._layout, block) for block in blocks]
            residual = kept[self.residuals[name]] if name in self.residuals else None
            decoded[name] = codec.transmit(up[name], payloads, Draws(key, ids, number), residual)
        return decoded
