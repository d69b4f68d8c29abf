"""Directions are as long as the model's filters, and slices are the loss at the points they say."""

from __future__ import annotations

import numpy as np
import torch
from support import tiny_model
from torch import nn

from fedkernels.diagnostics.slices import centred, filter_normalised, slice_1d, slice_2d
from fedkernels.layout import Layout, Role, infer_roles


def gaussian(d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_filters_of_the_direction_are_as_long_as_those_of_the_model() -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"conv": nn.Conv2d(3, 5, 2), "token": nn.Embedding(7, 4), "out": nn.Linear(6, 3)}).double()
    roles = infer_roles(module) | {"out.weight": Role("matrix", 1, ((0, 6, 6),))}  # stored transposed, (in, out)
    layout = Layout.of(module, roles)
    x = layout.flatten(dict(module.named_parameters()))
    raw = gaussian(layout.d)
    direction = filter_normalised(raw, x, layout)
    given, made, weights = layout.views(raw), layout.views(direction), layout.views(x)
    for i in range(5):
        assert torch.isclose(made["conv.weight"][i].norm(), weights["conv.weight"][i].norm(), rtol=1e-12)
        cosine = (made["conv.weight"][i] * given["conv.weight"][i]).sum()
        assert torch.isclose(cosine, made["conv.weight"][i].norm() * given["conv.weight"][i].norm(), rtol=1e-12)
    for i in range(7):
        assert torch.isclose(made["token.weight"][i].norm(), weights["token.weight"][i].norm(), rtol=1e-12)
    for j in range(6):
        assert torch.isclose(made["out.weight"][:, j].norm(), weights["out.weight"][:, j].norm(), rtol=1e-12)
    assert not torch.isclose(made["out.weight"][0].norm(), weights["out.weight"][0].norm(), rtol=1e-3)
    assert not made["conv.bias"].any()
    assert not made["out.bias"].any()


def test_a_zero_filter_stays() -> None:
    layout = Layout.of(tiny_model())
    x = gaussian(layout.d, 1)
    layout.views(x)["4.weight"][2] = 0
    direction = filter_normalised(gaussian(layout.d, 2), x, layout)
    assert not layout.views(direction)["4.weight"][2].any()
    assert torch.isfinite(direction).all()


def test_an_even_function_has_a_symmetric_slice() -> None:
    x, u, v = gaussian(9, 0), gaussian(9, 1), gaussian(9, 2)
    offsets = centred(2.0, 5)

    def f(y: torch.Tensor) -> float:
        return float((y - x).pow(4).sum() + (y - x).square().prod() + 3)

    line, square = slice_1d(f, x, u, offsets), slice_2d(f, x, u, v, offsets)
    assert line[5] == f(x) == square[5, 5] == 3
    np.testing.assert_allclose(line, line[::-1], rtol=1e-12)
    np.testing.assert_allclose(square, square[::-1, ::-1], rtol=1e-12)
    np.testing.assert_allclose(square[5], line, rtol=1e-12)  # the row of offset 0 along v
    assert not np.allclose(square, square[::-1])


def test_rows_are_offsets_along_the_second_direction() -> None:
    x = torch.zeros(2, dtype=torch.float64)
    u, v = torch.eye(2, dtype=torch.float64)
    square = slice_2d(lambda y: float(y[0] + 10 * y[1]), x, u, v, np.array([-1.0, 0.0, 2.0]))
    assert square.tolist() == [[-11.0, -10.0, -8.0], [-1.0, 0.0, 2.0], [19.0, 20.0, 22.0]]


def test_offsets_are_symmetric_around_an_exact_zero() -> None:
    assert centred(0.3, 3).tolist() == [-0.3, -0.19999999999999998, -0.09999999999999999, 0.0, *centred(0.3, 3)[4:]]
    np.testing.assert_array_equal(centred(0.7, 10), -centred(0.7, 10)[::-1])
    assert len(centred(0.7, 10)) == 21
