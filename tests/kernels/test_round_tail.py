"""Messages of clients and sums over them: every backend against NumPy, bit for bit, and against float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from kernel_rows import BACKENDS, DEVICE, SIZES, WIDE, poison, row, rows, scalar
from torch import Tensor

from fedkernels.kernels.dispatch import INTERPRETED
from fedkernels.kernels.round_tail import Draws, Spans, accumulate, encode_bf16, encode_int8, square_sums
from fedkernels.kernels.round_tail.reference import philox

KEY, WIRE = 0x2B992DDFA23249D6, 3
CHUNKS = (
    [7, 256, 600] if INTERPRETED else [1, 7, 100, 256, 3000]
)  # within and beyond a tile, by words of a counter and not
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.float64]
ALL = [(backend, dtype) for backend in BACKENDS for dtype in DTYPES if dtype == torch.float32 or backend in WIDE]
every_backend = pytest.mark.parametrize(("backend", "dtype"), ALL)


def draws(*clients: int, key: int = KEY, wire: int = WIRE) -> Draws:
    return Draws(torch.tensor(key, device=DEVICE), torch.tensor(clients, device=DEVICE), wire)


# The random numbers


def philox_of_the_paper(counter: Sequence[Any], key: Sequence[int]) -> list[Any]:
    """Philox4x32-10 as Salmon et al. write it: `L' = B·R mod 2³²`, `R' = ⌊B·R/2³²⌋ ⊕ k ⊕ L`, twice, then swapped."""
    r0, l0, r1, l1 = (np.asarray(word, dtype=np.uint64) for word in counter)
    word = np.uint64(2**32 - 1)
    for i in range(10):
        k = [np.uint64((key[0] + i * 0x9E3779B9) % 2**32), np.uint64((key[1] + i * 0xBB67AE85) % 2**32)]
        first, second = r0 * np.uint64(0xD2511F53), r1 * np.uint64(0xCD9E8D57)
        r0, l0, r1, l1 = (
            (second >> np.uint64(32)) ^ l0 ^ k[0], second & word, (first >> np.uint64(32)) ^ l1 ^ k[1], first & word,
        )  # fmt: skip
    return [r0, l0, r1, l1]


# Of Random123, file kat_vectors: counter, key, answer.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    words, (low, high), expected = ([int(word, 16) for word in text.split()] for text in (counter, key, answer))
    assert [int(word) for word in philox_of_the_paper(words, (low, high))] == expected
    signed = int(np.uint64(high << 32 | low).astype(np.int64))
    found = philox(tuple(torch.tensor(word) for word in words), torch.tensor(signed))
    assert [int(word) for word in found] == expected


def uniforms(size: int, client: int, key: int = KEY, wire: int = WIRE) -> np.ndarray:
    i = np.arange(-(-size // 4))
    words = philox_of_the_paper([i, np.zeros_like(i), client, wire], (key % 2**32, key >> 32))
    words = [np.broadcast_to(word, i.shape) for word in words]
    return ((np.stack(words, 1).ravel()[:size] >> np.uint64(8)) | np.uint64(1)) / 2**24


def int8_of(v: np.ndarray, chunk: int, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, s and `s q` of a message, chunk by chunk in the dtype of the values."""
    limits = np.finfo(np.float32)
    q, received, scales = np.zeros(len(v), np.int8), np.zeros_like(v), []
    for k in range(0, len(v), chunk):
        part = slice(k, k + chunk)
        s = np.float32(np.clip(np.abs(v[part]).max() / v.dtype.type(127), limits.tiny, limits.max / 128))
        t = v[part] / v.dtype.type(s)
        q[part] = np.clip(np.floor(t) + (u[part] < t - np.floor(t)), -127, 127)
        received[part] = q[part].astype(v.dtype) * v.dtype.type(s)
        scales.append(s)
    return q, np.array(scales, np.float32), received


# int8

PARTS = [[slice(150, 250), slice(0, 33), slice(33, 34)], [slice(7, 257)], [slice(0, 0), slice(20, 25), slice(3, 3)]]


def strided(clients: int, d: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Rows of a wider tensor, as kept state has them."""
    return rows(clients, 2 * d + 1, seed, scale, dtype)[:, 1 : d + 1]


def sent(clients: int, d: int, dtype: torch.dtype, options: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if "x" in options:
        given["x"] = row(d, 2, dtype)
    if "residual" in options:
        given["residual"] = strided(clients, d, 3, dtype, 0.01)
    if "spans" in options:
        given["spans"] = Spans.of(PARTS[:clients], DEVICE)
    return given


@every_backend
@pytest.mark.parametrize("options", ["", "x residual", "spans residual"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("d", SIZES)
def test_int8_equals_numpy_bit_for_bit(backend: str, dtype: torch.dtype, d: int, chunk: int, options: str) -> None:
    clients, d = 1 if d > 5000 else 3, max(d, 257) if "spans" in options else d
    values, given = strided(clients, d, 1, dtype), sent(clients, d, dtype, options)
    before, ids = given["residual"].clone() if "residual" in given else None, [5, 2**32 - 1, 0][:clients]
    spans = PARTS[:clients] if "spans" in given else [[slice(0, d)]] * clients
    size = given["spans"].size if "spans" in given else d
    payload = torch.full((clients, size), 99, dtype=torch.int8, device=DEVICE)
    scale, decoded = poison(clients, -(-size // chunk)), poison(clients, d, dtype)
    encode_int8(
        values, draws=draws(*ids), chunk=chunk, payload=payload, scale=scale, decoded=decoded, backend=backend, **given
    )
    for c, client in enumerate(ids):
        at = np.concatenate([np.arange(d)[part] for part in spans[c]])
        v = values[c].cpu().numpy()[at]
        if "x" in given:
            v = v - given["x"].cpu().numpy()[at]
        if before is not None:
            v = v + before[c].cpu().numpy()[at]
        q, s, received = int8_of(v, chunk, uniforms(len(v), client))
        expected, kept = np.full(d, np.nan, v.dtype), None if before is None else before[c].cpu().numpy()
        expected[at] = received
        np.testing.assert_array_equal(payload[c].cpu().numpy(), np.append(q, np.full(size - len(q), 99)))
        np.testing.assert_array_equal(scale[c].cpu().numpy()[: len(s)], s)
        assert scale[c, len(s) :].isnan().all()
        np.testing.assert_array_equal(decoded[c].cpu().numpy(), expected)
        if kept is not None:
            kept[at] = v - received
            np.testing.assert_array_equal(given["residual"][c].cpu().numpy(), kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_spans_are_encoded_as_if_they_lay_side_by_side(backend: str) -> None:
    values, clients = rows(3, 300, 0), [4, 5, 6]
    spans, decoded = Spans.of(PARTS, DEVICE), poison(3, 300)
    encode_int8(values, draws=draws(*clients), chunk=32, spans=spans, decoded=decoded, backend=backend)
    for c, parts in enumerate(PARTS):
        together = torch.cat([values[c, part] for part in parts])[None]
        alone = poison(*together.shape)
        encode_int8(together, draws=draws(clients[c]), chunk=32, decoded=alone, backend=backend)
        assert torch.equal(torch.cat([decoded[c, part] for part in parts]), alone[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_spans(backend: str) -> None:
    """More than a tile has, in any order, most of them empty or of one value."""
    values, decoded, d = rows(2, 1200, 0), poison(2, 1200), 1200
    edges = np.sort(np.random.default_rng(0).integers(0, d + 1, 700))
    parts = [[slice(int(a), int(b)) for a, b in itertools.pairwise(edges)][::-1], [slice(3, 1199)]]
    encode_int8(values, draws=draws(1, 2), chunk=50, spans=Spans.of(parts, DEVICE), decoded=decoded, backend=backend)
    for c in range(2):
        at = np.concatenate([np.arange(d)[part] for part in parts[c]])
        v = values[c].cpu().numpy()[at]
        np.testing.assert_array_equal(decoded[c].cpu().numpy()[at], int8_of(v, 50, uniforms(len(v), c + 1))[2])
    assert decoded[1, :3].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fraction", [0.0, 1e-3, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_is_unbiased(backend: str, fraction: float, sign: int) -> None:
    """n values a fraction above a level: how many go up is binomial, within 5 standard deviations of n f. Odd multiples
    of 2⁻²⁴ are below f as often as f says, to 2⁻²⁴."""
    n = 10_000
    values = torch.full((1, n + 1), sign * (2 + fraction), device=DEVICE)
    values[0, -1] = 127  # makes the scale 1
    decoded = poison(1, n + 1)
    encode_int8(values, draws=draws(1), chunk=n + 1, decoded=decoded, backend=backend)
    assert set(decoded[0, :n].abs().tolist()) <= ({2.0} if fraction == 0 else {2.0, 3.0})
    error = float(decoded[0, :n].double().mean()) - sign * (2 + fraction)
    assert abs(error) <= 5 * (fraction * (1 - fraction) / n) ** 0.5 + 2**-22


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_keys_clients_and_wires_round_otherwise(backend: str) -> None:
    def decoded(of: Draws) -> tuple[float, ...]:
        out = poison(1, 64)
        encode_int8(row(64, 0)[None], draws=of, chunk=64, decoded=out, backend=backend)
        return tuple(out[0].tolist())

    other_high = draws(1, key=KEY ^ 1 << 40)
    found = [decoded(of) for of in (draws(1), draws(2), draws(1, key=KEY + 1), other_high, draws(1, wire=4))]
    assert len(set(found)) == 5
    assert decoded(draws(1)) == found[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [4, 600])
def test_what_is_not_finite_spoils_its_chunk_alone(backend: str, chunk: int) -> None:
    values = rows(1, 1800, 0)
    for value in (torch.nan, torch.inf, -torch.inf):
        values[0, 601] = value
        payload, scale = torch.ones(1, 1800, dtype=torch.int8, device=DEVICE), poison(1, 1800 // chunk)
        decoded = poison(1, 1800)
        encode_int8(values, draws=draws(1), chunk=chunk, payload=payload, scale=scale, decoded=decoded, backend=backend)
        k = 600 // chunk * chunk
        assert decoded.isnan().nonzero()[:, 1].tolist() == list(range(k, k + chunk))
        assert scale.isnan().nonzero()[:, 1].tolist() == [k // chunk]
        assert not payload[0, k : k + chunk].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-30, 1e30, 3.4e38])
def test_scales_are_normal_numbers(backend: str, size: float) -> None:
    values, decoded, scale = rows(1, 50, 0), poison(1, 50), poison(1, 1)
    values = values / values.abs().max() * size
    encode_int8(values, draws=draws(1), chunk=64, scale=scale, decoded=decoded, backend=backend)
    limits = torch.finfo(torch.float32)
    assert limits.tiny <= scale.item() <= limits.max / 128
    assert ((decoded.double() - values.double()).abs() <= max(1.001 * size / 127, limits.tiny)).all()


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("chunk", [7, 256, 50_000])
def test_the_same_bits_on_any_number_of_threads_and_beside_any_clients(threads: int, chunk: int) -> None:
    d = 1501 if INTERPRETED else 100_001
    before, values, clients = torch.get_num_threads(), rows(3, d, 0), [9, 8, 7]
    weights = torch.tensor([1.5, 0.3, 7.0], dtype=torch.float64, device=DEVICE)
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            decoded, narrow = poison(3, d), poison(3, d)
            encode_int8(values, draws=draws(*clients), chunk=chunk, decoded=decoded)
            encode_bf16(values, decoded=narrow)
            sums = torch.ones(d, dtype=torch.float64, device=DEVICE)
            accumulate(sums, values, weights)
            results.append((decoded, narrow, sums, square_sums(values)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        for c in range(3):
            alone = poison(1, d)
            encode_int8(values[c : c + 1], draws=draws(clients[c]), chunk=chunk, decoded=alone)
            assert torch.equal(alone[0], results[0][0][c])
            assert torch.equal(square_sums(values[c : c + 1]), results[0][3][c : c + 1])
    finally:
        torch.set_num_threads(before)


# bfloat16


@every_backend
@pytest.mark.parametrize("options", ["", "x residual", "spans residual"])
@pytest.mark.parametrize("d", SIZES)
def test_bf16_rounds_as_torch_does(backend: str, dtype: torch.dtype, d: int, options: str) -> None:
    d = max(d, 257) if "spans" in options else d
    values, given = strided(3, d, 1, dtype), sent(3, d, dtype, options)
    before = given["residual"].clone() if "residual" in given else None
    spans = PARTS if "spans" in given else [[slice(0, d)]] * 3
    size = given["spans"].size if "spans" in given else d
    payload, decoded = torch.full((3, size), 99, dtype=torch.bfloat16, device=DEVICE), poison(3, d, dtype)
    encode_bf16(values, payload=payload, decoded=decoded, backend=backend, **given)
    for c in range(3):
        at = torch.cat([torch.arange(d)[part] for part in spans[c]])
        v = values[c].cpu()[at] - (given["x"].cpu()[at] if "x" in given else 0)
        v = v if before is None else v + before[c].cpu()[at]
        rounded = v.bfloat16()
        expected = torch.full((d,), torch.nan, dtype=dtype).index_copy_(0, at, rounded.to(dtype))
        assert torch.equal(payload[c, : len(at)].cpu(), rounded)
        assert (payload[c, len(at) :] == 99).all()
        torch.testing.assert_close(decoded[c].cpu(), expected, rtol=0, atol=0, equal_nan=True)
        if before is not None:
            kept = before[c].cpu().index_copy_(0, at, v - rounded.to(dtype))
            assert torch.equal(given["residual"][c].cpu(), kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_of_every_kind_of_number(backend: str) -> None:
    """Ties to even on both sides, what overflows, subnormal numbers, NaN with any payload."""
    patterns = [0x3F808000, 0x3F818000, 0x3F808001, 0xBF808000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001]
    patterns += [0xFFFFFFFF, 0x7FC00000, 0x00000001, 0x80000000, 0x00008000, 0x00018000, 0x007FFFFF]
    values = torch.tensor(np.array(patterns, np.uint32).view(np.float32)[None], device=DEVICE)
    payload = torch.zeros(values.shape, dtype=torch.bfloat16, device=DEVICE)
    encode_bf16(values, payload=payload, backend=backend)
    nan, expected = values[0].isnan(), values[0].bfloat16().view(torch.int16)
    assert torch.equal(payload[0].view(torch.int16)[~nan], expected[~nan])
    assert torch.equal(payload[0].isnan(), nan)


# Sums


@every_backend
@pytest.mark.parametrize("sums_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clients", [1, 2, 5])
@pytest.mark.parametrize("d", SIZES)
def test_sums_have_the_bits_of_one_row_after_another(
    backend: str, dtype: torch.dtype, sums_dtype: torch.dtype, clients: int, d: int
) -> None:
    """Also where the order matters, with rows that cancel and weights no float holds exactly."""
    values, sums = strided(clients, d, 1, dtype, 1e4), row(d, 2, sums_dtype)
    if clients == 5:
        values[4] = -values[0]
    weights = torch.tensor([0.1, 3.0, 1e-9, 0.0, 0.1][:clients], dtype=torch.float64, device=DEVICE)
    values[3:4, :] = torch.nan
    expected = sums.cpu().numpy().copy()
    for r, weight in zip(values.cpu().numpy(), weights.cpu().numpy(), strict=True):
        if weight:
            expected += expected.dtype.type(weight) * r.astype(expected.dtype)
    apart = sums.clone()
    accumulate(sums, values, weights, backend=backend)
    np.testing.assert_array_equal(sums.cpu().numpy(), expected)
    for c in range(clients):
        accumulate(apart, values[c : c + 1], weights[c : c + 1], backend=backend)
    assert torch.equal(apart, sums)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_weight_for_all_and_none_for_nobody(backend: str) -> None:
    sums = row(300, 0, torch.float64)
    expected = sums + 0.5 * rows(2, 300, 1)[0].double() + 0.5 * rows(2, 300, 1)[1].double()
    before = sums.clone()
    accumulate(sums, torch.full((2, 300), torch.nan, device=DEVICE), scalar(0.0), backend=backend)
    assert torch.equal(sums, before)
    accumulate(sums, rows(2, 300, 1), scalar(0.5), backend=backend)
    assert torch.equal(sums, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 1), (1, 3)])
def test_weights_of_any_shape(backend: str, shape: tuple[int, ...]) -> None:
    """One value or one for each client, as of all scalars."""
    values, weights = rows(3, 300, 1), torch.tensor([0.5, 2.0, -1.0], device=DEVICE)[: max(shape)]
    found, expected = torch.zeros(300, device=DEVICE), torch.zeros(300, device=DEVICE)
    accumulate(found, values, weights.view(shape), backend=backend)
    accumulate(expected, values, weights.expand(3).contiguous(), backend=backend)
    assert torch.equal(found, expected)


@every_backend
@pytest.mark.parametrize("d", SIZES)
def test_square_sums(backend: str, dtype: torch.dtype, d: int) -> None:
    values = strided(3, d, 0, dtype)
    found = square_sums(values, backend=backend)
    assert found.dtype == torch.float64
    # Every term is rounded once, and every sum of fewer than d terms as often.
    torch.testing.assert_close(found, values.double().square().sum(1), rtol=d * 2.0**-52, atol=0)
    assert torch.equal(square_sums(values[1:2], backend=backend), found[1:2])
    values[0, d - 1], values[2, 0] = torch.inf, torch.nan
    assert square_sums(values, backend=backend).isfinite().tolist() == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_square_sums_of_numbers_whose_squares_leave_float32(backend: str) -> None:
    for size in (1e-30, 1e30):
        values = rows(2, 5000, 0, size)
        torch.testing.assert_close(
            square_sums(values, backend=backend), values.double().square().sum(1), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_further_apart_than_32_bits_count(backend: str) -> None:
    """Two short rows 2³¹ elements from each other; what lies between is never touched."""
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("needs 16 GiB of GPU memory, most of which nobody touches")
    memory = torch.empty(2**31 + 300, device=DEVICE)
    values = memory.as_strided((2, 300), (2**31, 1))
    values.copy_(rows(2, 300, 0))
    near, ids = values.clone(), draws(1, 2)
    found, expected = poison(2, 300), poison(2, 300)
    encode_int8(values, draws=ids, chunk=64, decoded=found, backend=backend)
    encode_int8(near, draws=ids, chunk=64, decoded=expected, backend=backend)
    assert torch.equal(found, expected)
    sums, weights = torch.zeros(300, dtype=torch.float64, device=DEVICE), scalar(1.0, torch.float64)
    accumulate(sums, values, weights, backend=backend)
    assert torch.equal(sums, near[0].double() + near[1].double())
    assert torch.equal(square_sums(values, backend=backend), square_sums(near, backend=backend))


# Contracts


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses(backend: str) -> None:
    values, of = rows(2, 5, 0), draws(1, 2)
    for chunk in (0, 2**31):
        with pytest.raises(ValueError, match=f"chunk is {chunk}, expected 1 to 2147483647"):
            encode_int8(values, draws=of, chunk=chunk, backend=backend)
    with pytest.raises(ValueError, match=r"clients has shape \[3\], expected \[2\]"):
        encode_int8(values, draws=draws(1, 2, 3), chunk=4, backend=backend)
    with pytest.raises(ValueError, match=r"scale has shape \[2, 3\], expected \[2, 2\]"):
        encode_int8(values, draws=of, chunk=4, scale=poison(2, 3), backend=backend)
    with pytest.raises(ValueError, match="payload is float32, expected int8"):
        encode_int8(values, draws=of, chunk=4, payload=poison(2, 5), backend=backend)
    with pytest.raises(ValueError, match="payload is float32, expected bfloat16"):
        encode_bf16(values, payload=poison(2, 5), backend=backend)
    with pytest.raises(ValueError, match="residual has rows that are not contiguous: strides"):
        encode_bf16(values, residual=poison(2, 10)[:, ::2], backend=backend)
    with pytest.raises(ValueError, match=r"values has shape \[5\], expected \[C, d\]"):
        encode_bf16(values[0], backend=backend)
    with pytest.raises(ValueError, match=r"spans.begins has shape \[1, 1\], expected \[2, 1\]"):
        encode_bf16(values, spans=Spans.of([[slice(0, 2)]], DEVICE), backend=backend)
    with pytest.raises(ValueError, match=r"sums has shape \[4\], expected \[5\]"):
        accumulate(torch.zeros(4, device=DEVICE), values, torch.ones(2, device=DEVICE), backend=backend)
    with pytest.raises(ValueError, match=r"weights has shape \[3\], expected one value or one for each of 2"):
        accumulate(torch.zeros(5, device=DEVICE), values, torch.ones(3, device=DEVICE), backend=backend)
    with pytest.raises(ValueError, match="rows is int64, expected float32 or float64"):
        square_sums(values.long(), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_spans_outside_a_row(backend: str) -> None:
    spans = Spans.of([[slice(0, 2)], [slice(3, 6), slice(0, 1)]], DEVICE)
    with pytest.raises(ValueError, match="spans end at 6, expected within a row of 5"):
        encode_bf16(rows(2, 5, 0), spans=spans, decoded=poison(2, 5), backend=backend)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the check is in C++, before memory is touched")
def test_the_operator_refuses_spans_outside_a_row() -> None:
    spans = Spans.of([[slice(0, 2)], [slice(3, 6)]])
    with pytest.raises(RuntimeError, match="span 0 of client 1 is not within a row of 5"):
        torch.ops.fedkernels.encode_bf16_cpp(rows(2, 5, 0), None, None, spans.begins, spans.ends, None, poison(2, 5))


def test_refuses_spans_that_overlap() -> None:
    """What is sent twice has two residuals, and a message would be longer than a row. Those of another client may."""
    for twice in ([slice(0, 3), slice(2, 4)], [slice(5, 9), slice(0, 2), slice(6, 7)], [slice(1, 2), slice(1, 2)]):
        with pytest.raises(ValueError, match=r"client 1 sends \d to \d and \d to \d, which overlap"):
            Spans.of([[slice(0, 3)], twice])
    with pytest.raises(ValueError, match="client 0 sends -1 to 3, expected 0 ≤ start ≤ stop"):
        Spans.of([[slice(-1, 3)]])
    with pytest.raises(ValueError, match="client 0 sends 4 to 3, expected 0 ≤ start ≤ stop"):
        Spans.of([[slice(4, 3)]])
    assert Spans.of([[slice(2, 4), slice(4, 9), slice(3, 3), slice(0, 2)], [slice(0, 3)]]).stop == 9


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    if backend == "triton":
        import fedkernels.kernels.round_tail.triton  # noqa: F401  defines the operators
    of, spans = draws(1, 2), Spans.of([[slice(60, 70), slice(0, 9)], [slice(3, 40)]], DEVICE)
    values, residual, decoded, x = rows(2, 70, 0), rows(2, 70, 1), rows(2, 70, 2), row(70, 3)
    payload = torch.zeros(2, spans.size, dtype=torch.int8, device=DEVICE)
    operators = {
        op: getattr(torch.ops.fedkernels, f"{op}_{backend}").default
        for op in ("encode_int8", "encode_bf16", "accumulate", "square_sums")
    }
    message = (values, x, residual, spans.begins, spans.ends)
    torch.library.opcheck(
        operators["encode_int8"],
        (*message, 16, of.key, of.clients, of.wire, payload, rows(2, -(-spans.size // 16), 4), decoded),
    )
    torch.library.opcheck(
        operators["encode_int8"], (values, None, None, None, None, 16, of.key, of.clients, 0, None, None, decoded)
    )
    torch.library.opcheck(operators["encode_bf16"], (*message, payload.bfloat16(), decoded))
    torch.library.opcheck(operators["accumulate"], (row(70, 4, torch.float64), values, torch.ones(2, device=DEVICE)))
    torch.library.opcheck(operators["square_sums"], (values,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend: str) -> None:
    def tail(y: Tensor, x: Tensor, residual: Tensor, key: Tensor, sums: Tensor) -> Tensor:
        decoded, narrow = torch.zeros_like(y), torch.zeros_like(y)
        of = Draws(key, torch.arange(2, device=DEVICE), 0)
        encode_int8(2 * y, draws=of, chunk=16, x=x, residual=residual, decoded=decoded, backend=backend)
        encode_bf16(decoded, decoded=narrow, backend=backend)
        accumulate(sums, narrow, torch.ones(2, device=DEVICE), backend=backend)
        return square_sums(narrow, backend=backend)

    def given() -> tuple[Tensor, ...]:
        return rows(2, 300, 0), row(300, 1), rows(2, 300, 2), draws(0).key, row(300, 3, torch.float64)

    found, expected = given(), given()
    norms = torch.compile(tail, fullgraph=True)(*found)
    torch.testing.assert_close(norms, tail(*expected), rtol=1e-12, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
