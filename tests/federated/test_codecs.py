"""Codecs against their definitions one value at a time, and what the engine makes of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, state
from support import CLIENTS, run_rounds, tiny_engine, tiny_model, tiny_roles
from torch import Tensor

from fedkernels.algorithms import FedAdamW, FedAvg, FedBcgd, FedBcgdPlus, FedLada, FedMuon, FedSmoo, Scaffold
from fedkernels.contract import Algorithm, Task, Vectors
from fedkernels.federated.codecs import CODECS, Bf16, Encoder, Int8, LowRank, TopK, codec_notes, with_codec
from fedkernels.federated.engine import Engine, NonFiniteUpdateError
from fedkernels.federated.intake import Upload
from fedkernels.federated.schedule import assign_blocks, place, sample_cohort
from fedkernels.kernels.round_tail import Draws
from fedkernels.layout import Layout, Role, Slab
from fedkernels.wire import Codec, Payload, Wire

DTYPES = [torch.float32, torch.float64]
EVERY_CODEC: list[Codec] = [
    Int8(), Int8(chunk=7), Int8(chunk=1), Bf16(), TopK(), TopK(fraction=1.0), TopK(fraction=1e-9), LowRank(),
    LowRank(fraction=1.0),
]  # fmt: skip


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def flat(n: int) -> Payload:
    return Payload((slice(0, n),))


def draws(*clients: int, key: int = 0) -> Draws:
    return Draws(torch.tensor(key), torch.tensor(clients or [0]), 0)


def roundtrip(codec: Codec, values: Tensor, payload: Payload | None = None, seed: int = 0) -> Tensor:
    """What the server makes of one client's message, which `transmit` does not form."""
    payload = payload or flat(len(values))
    kept = values.clone()
    message = codec.encode(values, payload, draws(key=seed))
    assert torch.equal(values, kept), "the payload was written to"
    assert sum(part.numel() * part.element_size() for part in message) == codec.n_bytes(payload, values.element_size())
    decoded = codec.decode(message, payload, values.dtype)
    assert (decoded.shape, decoded.dtype) == (values.shape, values.dtype)
    assert torch.equal(codec.transmit(values[None], [payload], draws(key=seed), None)[0], decoded)
    return decoded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 50, 256, 1000])
@pytest.mark.parametrize("codec", EVERY_CODEC, ids=repr)
def test_a_message_has_the_bytes_it_says(codec: Codec, n: int, dtype: torch.dtype) -> None:
    slabs = (Slab(3, 3 + 2 * 36, 0, 72, 2, 9, 4, 1.0), Slab(100, 100 + 160, 72, 232, 1, 16, 10, 1.0))
    payload = Payload((slice(0, n),), tuple(slab for slab in slabs if slab.stop <= n))
    for values in (normal(n, dtype=dtype), torch.zeros(n, dtype=dtype)):
        assert roundtrip(codec, values, payload).isfinite().all()
    assert not roundtrip(codec, torch.zeros(n, dtype=dtype), payload).any()


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        (Int8(), 1000 + 4 * 4),
        (Int8(chunk=7), 1000 + 143 * 4),
        (Bf16(), 2000),
        (TopK(fraction=0.25), 250 * (4 + 4)),
        (TopK(fraction=1e-9), 4 + 4),
        (LowRank(), 4 * 1000),
    ],
    ids=repr,
)
def test_bytes_of_a_thousand_floats(codec: Codec, expected: int) -> None:
    assert codec.n_bytes(flat(1000), 4) == expected


# int8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 5, 12, 100])
def test_int8_rounds_to_a_neighbouring_multiple_of_the_scale(n: int, dtype: torch.dtype) -> None:
    values = normal(n, dtype=dtype) * torch.logspace(-6, 6, n, dtype=torch.float64).to(dtype)
    decoded = roundtrip(Int8(chunk=5), values)
    for start in range(0, n, 5):
        chunk, found = (vector[start : start + 5].double().numpy() for vector in (values, decoded))
        scale = float(np.float32(np.abs(chunk).max() / 127))
        q = found / scale
        np.testing.assert_allclose(q, np.round(q), rtol=1e-6, atol=0)
        assert np.abs(np.round(q)).max() == 127
        assert (np.abs(found - chunk) <= scale * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_unbiased(dtype: torch.dtype) -> None:
    """The mean of n draws lies within 5 standard errors; rounding by s has a variance of f(1 − f)s², f the fraction."""
    values = normal(40, dtype=dtype)
    n = 4000
    drawn = torch.stack([roundtrip(Int8(chunk=16), values, seed=seed) for seed in range(n)]).double()
    scale = torch.cat([v.abs().max().expand(len(v)) for v in values.double().split(16)]) / 127
    f = (values.double() / scale).frac().abs()
    error = (scale.square() * f * (1 - f) / n).sqrt()
    assert ((drawn.mean(0) - values).abs() <= 5 * error + 1e-7 * values.abs()).all()
    assert float(drawn.var(0).sum()) == pytest.approx(float(n * error.square().sum()), rel=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e30, 2e38])
def test_int8_of_huge_and_tiny_values(scale: float, dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, -0.5, 0.25, 0.0], dtype=torch.float64).mul(scale).to(dtype)
    found = roundtrip(Int8(), values)
    coarse = max(scale / 127, float(torch.finfo(torch.float32).tiny))
    assert ((found.double() - values.double()).abs() <= 1.001 * coarse).all()


def test_int8_of_values_beyond_float32() -> None:
    """They saturate or vanish; the other chunks do not notice."""
    values = torch.tensor([1e300, 1.0, 1e-300, -1e-300, 3.0, 3.0], dtype=torch.float64)
    huge, one, *rest = roundtrip(Int8(chunk=2), values).tolist()
    assert 3e38 < huge < 4e38
    assert one == 0
    assert rest == [0, 0, pytest.approx(3.0, rel=1e-6), pytest.approx(3.0, rel=1e-6)]
    largest = torch.tensor([torch.finfo(torch.float32).max])
    assert roundtrip(Int8(), largest).item() == pytest.approx(largest.item(), rel=0.01)


def test_int8_has_no_python_loop_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    for n in (10, 10_000):
        with torch.profiler.profile() as profile:
            Int8(chunk=4).encode(normal(n), flat(n), draws())
        calls.append(sum(event.count for event in profile.key_averages()))
    assert calls[0] == pytest.approx(calls[1], abs=4)


# bf16, topk


def test_bf16_rounds_to_the_nearest_even() -> None:
    values = torch.cat([normal(1000, dtype=torch.float32), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1e-40])])
    bits = values.numpy().view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    assert np.array_equal(roundtrip(Bf16(), values).numpy(), rounded.astype(np.uint32).view(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fraction", "kept"), [(0.1, 4), (0.25, 10), (1e-6, 1), (1.0, 41)])
def test_topk_keeps_the_largest_magnitudes(fraction: float, kept: int, dtype: torch.dtype) -> None:
    values = normal(41, dtype=dtype)
    found = roundtrip(TopK(fraction=fraction), values)
    largest = np.argsort(-np.abs(values.numpy()))[:kept]
    expected = torch.zeros_like(values)
    expected[largest] = values[largest]
    assert torch.equal(found, expected)


# lowrank


@pytest.mark.parametrize(
    ("fraction", "m", "n", "rank"),
    [
        (0.25, 64, 32, 5),  # 512/97 = 5.28
        (0.5, 8, 16, 2),  # 64/25 = 2.56
        (0.5, 8, 8, 1),
        (1e-6, 8, 8, 1),  # at least one: 17 floats of 64
        (1.0, 8, 8, 3),  # 3 · 17 < 64 = 3.76 · 17
        (1.0, 2, 3, None),  # 6 floats against 6
        (0.5, 1, 9, None),  # 11 floats would be sent of 9
        (0.5, 4, 2, 1),  # 7 of 8
    ],
)
def test_ranks(fraction: float, m: int, n: int, rank: int | None) -> None:
    assert LowRank(fraction=fraction).rank(m, n) == LowRank(fraction=fraction).rank(n, m) == rank


@pytest.mark.parametrize("fraction", [0.2, 0.6, 1.0])
def test_lowrank_is_the_best_approximation_of_its_rank(fraction: float) -> None:
    """Eckart and Young: the error is that of the singular values left out; what is no matrix stays as it is."""
    slabs = (Slab(4, 4 + 3 * 60, 0, 180, 3, 10, 6, 1.0), Slab(184, 184 + 2 * 9, 180, 198, 2, 1, 9, 1.0))
    payload, values = Payload((slice(0, 210),), slabs), normal(210)
    codec = LowRank(fraction=fraction)
    found = roundtrip(codec, values, payload)
    assert torch.equal(found[:4], values[:4])
    assert torch.equal(found[184:], values[184:])
    r = codec.rank(10, 6)
    assert r is not None
    assert codec.n_bytes(payload, 8) == 8 * (30 + 3 * r * 17)
    for before, after in zip(values[4:184].view(3, 10, 6).numpy(), found[4:184].view(3, 10, 6).numpy(), strict=True):
        assert np.linalg.matrix_rank(after, rtol=1e-12) == r
        left_out = np.linalg.svd(before, compute_uv=False)[r:]
        assert np.linalg.norm(before - after) == pytest.approx(np.sqrt((left_out**2).sum()), rel=1e-10, abs=1e-12)


def test_lowrank_of_a_low_rank_matrix_is_exact() -> None:
    values = (normal(12, 2) @ normal(2, 9, seed=1)).flatten()
    payload = Payload((slice(0, 108),), (Slab(0, 108, 0, 108, 1, 12, 9, 1.0),))
    assert LowRank(fraction=0.5).rank(12, 9) == 2
    torch.testing.assert_close(roundtrip(LowRank(fraction=0.5), values, payload), values, rtol=1e-12, atol=1e-12)


# Wires


def tiny_layout(**options: Any) -> Layout:
    module = tiny_model()
    return Layout.of(module, tiny_roles(module), **options)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_the_payload_of_a_block_is_its_block_and_the_shared_one(block: int) -> None:
    layout = tiny_layout(blocks=3, shared=("8.*", "4.weight"))
    payload = Wire(only_block=True).payload(layout, block)
    own, shared = layout.block(block), layout.block(3)
    vector = normal(layout.d)
    taken = payload.take(vector)
    assert torch.equal(taken, torch.cat([vector[own], vector[shared]]))
    assert payload.size == len(taken)
    back = torch.zeros_like(vector)
    payload.put(back, taken)
    assert torch.equal(back[own], vector[own])
    assert torch.equal(back[shared], vector[shared])
    assert back.count_nonzero() == len(taken)
    matrices = [
        vector[e.start : e.stop]
        for e in layout.entries
        if any(part.start <= e.start < part.stop for part in (own, shared)) and e.role.kind == "matrix"
    ]
    found = [m for slab in payload.slabs for m in taken[slab.start : slab.stop].chunk(slab.count)]
    assert len(found) == len(matrices) > 0 or block == 1
    assert all(torch.equal(a, b) for a, b in zip(found, matrices, strict=True))


@pytest.mark.parametrize("like", ["params", "matrices", "scalar", 5])
def test_the_payload_of_a_whole_wire(like: Any) -> None:
    layout = tiny_layout()
    wire = Wire(like)
    payload = wire.payload(layout, None)
    assert payload.size == wire.size(layout)
    inside = sum(slab.stop - slab.start for slab in payload.slabs)
    assert inside == (layout.d_matrix if like in ("params", "matrices") else 0)
    if like == "matrices":
        vector = normal(layout.d)
        for whole, cut in zip(layout.slabs, payload.slabs, strict=True):
            assert torch.equal(layout.matrices(vector)[cut.start : cut.stop], vector[whole.start : whole.stop])


@pytest.mark.parametrize("like", ["matrices", "scalar", 5])
def test_error_feedback_needs_a_wire_like_params(like: Any) -> None:
    with pytest.raises(ValueError, match=rf"TopK\(.*\) on a wire like {like!r}: error feedback needs an update"):
        Wire(like, codec=TopK())
    Wire(like, codec=TopK(error_feedback=False))
    with pytest.raises(ValueError, match="on a wire a state: error feedback needs an update"):
        Wire(state=True, codec=Int8(error_feedback=True))


def test_the_codec_of_the_run_goes_to_wires_without_their_own() -> None:
    wires = {
        "delta": Wire(),
        "own": Wire(codec=Bf16()),
        "v": Wire(state=True),
        "q": Wire(state=True, codec=Bf16()),
        "M": Wire("matrices"),
        "loss": Wire("scalar"),
        "watched": Wire(diagnostic=True),
    }
    assert with_codec(wires, None) == wires
    int8, topk = ({name: wire.codec for name, wire in with_codec(wires, codec).items()} for codec in (Int8(), TopK()))
    none = {"v": None, "M": None, "loss": None, "watched": None}
    assert int8 == {"delta": Int8(), "own": Bf16(), "q": Bf16()} | none
    assert topk == {"delta": TopK(), "own": Bf16(), "q": Bf16()} | none


def test_notes_say_what_a_codec_does_not_shrink() -> None:
    layout = Layout({"a": (2, 3), "b": (8, 8), "c": (1, 9)}, dict.fromkeys("abc", Role("matrix")))
    wires = {"delta": Wire(codec=TopK(fraction=0.6)), "M": Wire("matrices", codec=LowRank(fraction=1.0))}
    assert codec_notes(wires, layout) == [
        "wire delta: 47 of 79 values with their indices are no smaller than all values",
        "wire M: 2 of 3 matrices are sent whole, low rank would not be smaller: 1x9, 2x3",
    ]
    assert (
        codec_notes({"x": Wire(), "y": Wire(codec=TopK()), "z": Wire(codec=Int8()), "w": Wire(codec=Bf16())}, layout)
        == []
    )


def test_the_table_names_every_codec() -> None:
    assert {"int8": Int8, "bf16": Bf16, "topk": TopK, "lowrank": LowRank} == CODECS


# In the engine


UNCODED = [name for name, case in CASES.items() if not case.private and "codec" not in case.settings]


@pytest.mark.parametrize("codec", [Int8(), TopK()], ids=["int8", "topk"])
@pytest.mark.parametrize("name", UNCODED)
def test_every_algorithm_trains_with_a_codec_and_sends_less(name: str, codec: Codec) -> None:
    """Also where units are dead: a second moment of their weights is as it was, or zero."""
    plain, coded = CASES[name].engine(), CASES[name].engine(codec=codec)
    coded.named_parameters()["1.bias"][:4] = -1e3
    _, rows = run_rounds(coded, 4)
    assert [key for key, value in state(coded).items() if not np.isfinite(value).all()] == []
    for row in rows:
        assert math.isfinite(row["train_loss"])
        assert row["protocol_up_bytes"] < plain.run_round()["protocol_up_bytes"]


def encoded(codec: Codec, clients: list[int], r: int = 0, seed: int = 0, rows: Tensor | None = None) -> Tensor:
    layout = tiny_layout()
    rows = normal(1, layout.d).expand(len(clients), -1) if rows is None else rows
    encoder = Encoder({"first": Wire(codec=codec), "second": Wire(codec=codec)}, layout, seed)
    kept = {name: torch.zeros(len(clients), layout.d, dtype=torch.float64) for name in encoder.residuals.values()}
    both = encoder({"first": rows, "second": rows}, clients, [None] * len(clients), r, kept)
    return torch.stack([both["first"], both["second"]])


def test_rounding_is_drawn_by_seed_round_client_and_wire() -> None:
    codec = Int8()
    found = encoded(codec, [3, 8])
    assert torch.equal(encoded(codec, [8]), found[:, 1:])
    assert torch.equal(encoded(codec, [8, 3]), found.flip(1))
    draws = [found[0, 0], found[1, 0], found[0, 1], encoded(codec, [3], r=1)[0, 0], encoded(codec, [3], seed=1)[0, 0]]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


class Recorder:
    """What the clients of an engine mean to send on `delta`, and what of it reaches the sum, by client."""

    def __init__(self, engine: Engine) -> None:
        self.meant: dict[int, Tensor] = {}
        self.summed: dict[int, Tensor] = {}
        layout, take, add = engine.layout, engine._intake.take, engine._aggregator.add

        def spied_take(upload: Upload, r: int) -> list[str]:
            self._upload = upload
            return take(upload, r)

        def spied_add(up: dict[str, Tensor], weights: list[float], blocks: list[int | None], *rest: Any) -> list[bool]:
            for c, block in enumerate(blocks):
                sent = torch.zeros(layout.d, dtype=torch.float64)
                for span in engine.wires["delta"].payload(layout, block).spans:
                    sent[span] = 1
                client = self._upload.ids[c]
                for record, value in ((self.meant, self._upload.up["delta"][c]), (self.summed, up["delta"][c])):
                    record[client] = record.get(client, 0) + sent * value
            return add(up, weights, blocks, *rest)

        engine._intake.take = spied_take  # type: ignore[method-assign]
        engine._aggregator.add = spied_add  # type: ignore[method-assign]


@pytest.mark.parametrize("together", [1, 6])
@pytest.mark.parametrize("codec", [TopK(), TopK(fraction=0.01), Int8(chunk=40, error_feedback=True)], ids=repr)
@pytest.mark.parametrize("algorithm", [FedAvg(), Scaffold(), FedBcgd(blocks=3)], ids=lambda a: type(a).__name__)
def test_what_was_decoded_and_what_is_kept_are_all_that_was_to_be_sent(
    algorithm: Algorithm, codec: Codec, together: int
) -> None:
    """By client, over its rounds: Σ decoded + residual = Σ updates, on the coordinates it was to send."""
    engine = tiny_engine(algorithm, codec=codec, rounds=9, lr=0.5, clients_per_batch=together)
    record = Recorder(engine)
    run_rounds(engine, 5)
    assert set(record.meant) == set(engine.store.ids)
    residuals = []
    for client, meant in record.meant.items():
        residual = engine.store.get([client])["codec.delta"][0]
        torch.testing.assert_close(record.summed[client] + residual, meant, rtol=0, atol=1e-14)
        residuals.append(float(residual.abs().max()))
    assert max(residuals) > 1e-5


def test_only_sent_coordinates_change_the_residual() -> None:
    engine = tiny_engine(FedBcgd(blocks=3), codec=TopK(fraction=0.01), lr=0.5)
    engine.run_round()
    ids, blocks = sample_cohort("uniform", 0, 0, CLIENTS, 6).tolist(), assign_blocks(0, 0, 6, 3).tolist()
    for client, block in zip(ids, blocks, strict=True):
        residual = engine.store.get([client])["codec.delta"][0].clone()
        for part in (engine.layout.block(block), engine.layout.block(3)):
            assert residual[part].any()
            residual[part] = 0
        assert not residual.any()


def test_feedback_sends_a_constant_update_in_the_long_run() -> None:
    """A client that always means u sends u on average: after n rounds the mean is u less residual/n."""
    layout = tiny_layout()
    u = normal(1, layout.d)
    encoder = Encoder({"delta": Wire(codec=TopK(fraction=0.1))}, layout, 0)
    kept = {"codec.delta": torch.zeros_like(u)}
    errors = []
    for r in range(400):
        encoder({"delta": u}, [0], [None], r, kept)
        errors.append(float(kept["codec.delta"].norm()) / (r + 1))
    # Every coordinate is sent before it has grown far beyond the others: the residual stays bounded.
    assert errors[-1] < 0.15 * u.norm()
    assert errors[-1] < errors[99] / 3 < errors[9] / 9
    without = Encoder({"delta": Wire(codec=TopK(fraction=0.1, error_feedback=False))}, layout, 0)
    assert float((without({"delta": u}, [0], [None], 0, {})["delta"] - u).norm()) > 0.5 * u.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("algorithm", "codec", "expected"),
    [
        (FedAvg(), None, lambda size: 332 * size),
        (FedAvg(), Int8(), lambda size: 332 + 2 * 4),
        (FedAvg(), Bf16(), lambda size: 2 * 332),
        (FedAvg(), TopK(fraction=0.5), lambda size: 166 * (size + 4)),
        # 8 x 16 at rank ⌊32/25⌋ = 1, 8 x 8 at ⌊16/17⌋ = 0, so 1.
        (FedAvg(), LowRank(), lambda size: (332 - 256 + 25 + 2 * 17) * size),
        (Scaffold(), Int8(), lambda size: 2 * (332 + 2 * 4)),
        (FedAdamW(second_moment="full"), Int8(), lambda size: 332 + 2 * 4 + 332 * size),
        (FedAdamW(second_moment="full"), TopK(), lambda size: 33 * (size + 4) + 332 * size),
        (FedLada(), Int8(), lambda size: 332 + 2 * 4 + 332 * size),
        (FedSmoo(), Bf16(), lambda size: 2 * 332 + 332 * size),
        (FedBcgdPlus(blocks=1), Bf16(), lambda size: 2 * 2 * 332),
        (FedBcgdPlus(blocks=1, control="ema"), Bf16(), lambda size: 2 * 332 + 332 * size),
        (FedAdamW(), Bf16(), lambda size: 2 * 332 + 58 * size),
        (FedMuon(), Int8(), lambda size: 332 + 2 * 4 + 256 * size),
        (FedMuon(momentum_rank=0.25), Bf16(), lambda size: 2 * 332 + (25 + 2 * 17) * size),
    ],
)  # fmt: skip
def test_bytes_of_a_round(algorithm: Algorithm, codec: Codec | None, expected: Any, dtype: torch.dtype) -> None:
    row = tiny_engine(algorithm, codec=codec, dtype=dtype).run_round()
    assert row["protocol_up_bytes"] == 6 * expected(torch.finfo(dtype).bits // 8)
    assert row["link_bytes"] == 0


@pytest.mark.parametrize("codec", [Int8(chunk=20), TopK(fraction=0.3), LowRank(fraction=0.5)], ids=repr)
@pytest.mark.parametrize("cut_rows", [True, False])
def test_bytes_of_blocks(codec: Codec, cut_rows: bool) -> None:
    """A message per client, of its block and the shared one together; rows of a cut matrix are sent as they are."""
    engine = tiny_engine(FedBcgd(blocks=3, cut_rows=cut_rows), codec=codec)
    sizes = [engine.layout.block(b).stop - engine.layout.block(b).start for b in range(4)]
    expected = 0
    for b in assign_blocks(0, 0, 6, 3).tolist():
        n = sizes[b] + sizes[3]
        if isinstance(codec, Int8):
            expected += n + 4 * math.ceil(n / 20)
        elif isinstance(codec, TopK):
            expected += round(0.3 * n) * 12
        else:
            low = {"1.weight": 2 * 25 - 128, "4.weight": 17 - 64, "6.weight": 17 - 64}
            block, entries = engine.layout.block(b), [engine.layout[name] for name in low]
            inside = [entry.name for entry in entries if block.start <= entry.start and entry.stop <= block.stop]
            expected += 8 * (n + sum(low[name] for name in inside))
    assert engine.run_round()["protocol_up_bytes"] == expected


def test_no_codec_costs_nothing() -> None:
    engine = tiny_engine(FedAvg())
    assert not engine._intake._encoder
    assert engine.store.names == ()


@pytest.mark.parametrize("codec", EVERY_CODEC, ids=repr)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_codec_does_not_hide_what_is_not_finite(codec: Codec, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def client(self: FedAvg, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        up = original(self, s, k, task)
        up["delta"][2, 5] = value
        return up

    original = FedAvg.client
    monkeypatch.setattr(FedAvg, "client", client)
    engine = tiny_engine(FedAvg(), codec=codec, clients_per_batch=6)
    ids = sample_cohort("uniform", 0, 0, CLIENTS, 6).tolist()
    (order,) = place(ids, engine.batches.steps(ids).tolist(), {}, [1.0])
    with pytest.raises(NonFiniteUpdateError, match=f"^client {ids[order[2]]} sent NaN or infinity in round 1$"):
        engine.run_round()


def test_what_overflows_in_the_codec_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    def client(self: FedAvg, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        return {"delta": 1e300 * original(self, s, k, task)["delta"]}

    original = FedAvg.client
    monkeypatch.setattr(FedAvg, "client", client)
    with pytest.raises(NonFiniteUpdateError, match="sent NaN or infinity in round 1"):
        tiny_engine(FedAvg(), codec=Bf16()).run_round()


def test_a_dropped_client_keeps_its_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(FedAvg(), codec=TopK(), on_nonfinite="drop_client", cohort=CLIENTS, lr=0.5)
    engine.run_round()
    before = {i: engine.store.get([i])["codec.delta"] for i in range(CLIENTS)}
    monkeypatch.setattr(
        FedAvg, "client", lambda self, s, k, task: {"delta": torch.full((len(task.steps), 332), math.nan)}
    )
    assert engine.run_round()["dropped"] == CLIENTS
    assert all(torch.equal(engine.store.get([i])["codec.delta"], residual) for i, residual in before.items())


def test_an_algorithm_does_not_see_residuals() -> None:
    class Looks(Scaffold):
        def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
            assert list(k) == ["c_i"]
            return super().client(s, k, task)

    engine = tiny_engine(Looks(), codec=TopK())
    run_rounds(engine, 2)
    assert engine.store.names == ("c_i", "codec.delta", "codec.delta_c")


def test_kept_state_may_be_what_is_sent() -> None:
    """A codec works on copies: state that shares memory with an upload stays as the algorithm left it."""

    class Sends(FedAvg):
        keep = ("last",)

        def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
            up = super().client(s, k, task)
            k.last = up["delta"]
            return up

    exact, coded = (tiny_engine(Sends(), codec=codec) for codec in (None, TopK(fraction=0.01)))
    for engine in (exact, coded):
        engine.run_round()
    for client in exact.store.ids:
        assert torch.equal(exact.store.get([client])["last"], coded.store.get([client])["last"])
