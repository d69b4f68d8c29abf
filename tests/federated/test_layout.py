"""The flat layout: names, blocks, matrix slabs and curvature blocks against tensors taken one by one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_model, tiny_roles
from torch import nn

from fedkernels.layout import Layout, Role, infer_roles

# Shapes of every kind: equal shapes apart from each other, tall and wide, a transposed square, convolutions, tokens.
SHAPES = {
    "a.weight": (6, 4),
    "a.bias": (6,),
    "b.weight": (4, 6),
    "conv.weight": (2, 3, 2, 2),
    "c.weight": (6, 4),
    "norm.weight": (4,),
    "tall.weight": (10, 2, 1, 2),
    "square.weight": (4, 4),
    "turned.weight": (4, 4),
    "fused.weight": (3, 18),
    "tokens": (1, 5, 3),
    "scalar": (1,),
    "head.weight": (7, 4),
}
ROLES = {
    "a.weight": Role("matrix", 0, ((0, 6, 6),)),
    "a.bias": Role("bias"),
    "b.weight": Role("matrix", 0, ((0, 4, 2),)),
    "conv.weight": Role("matrix", 0, ((0, 2, 2),)),
    "c.weight": Role("matrix", 0, ((0, 6, 3),)),
    "norm.weight": Role("norm", 0, ((0, 4, 1),)),
    "tall.weight": Role("matrix", 0, ((0, 10, 10),)),
    "square.weight": Role("matrix", 0, ((0, 4, 4),)),
    "turned.weight": Role("matrix", 1, ((0, 4, 2),)),
    "fused.weight": Role("matrix", 1, ((0, 12, 4), (12, 18, 6))),
    "tokens": Role("embedding", 1, ((0, 5, 5),)),
    "scalar": Role("other"),
    "head.weight": Role("head", 0, ((0, 7, 7),)),
}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}


def layouts() -> list[Any]:
    return [
        pytest.param(Layout(SHAPES, ROLES, n_blocks=n, shared=shared, route=route), id=f"{n}-{len(shared)}-{route}")
        for n, shared, route in itertools.product((1, 3), ((), ("head.*", "tokens")), ("hidden", "all_matrices"))
    ]


every_layout = pytest.mark.parametrize("layout", layouts())


def vector(layout: Layout, *lead: int) -> torch.Tensor:
    return torch.randn(*lead, layout.d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@every_layout
def test_entries_tile_the_vector(layout: Layout) -> None:
    assert layout.d == sum(SIZES.values())
    assert {entry.name: entry.shape for entry in layout.entries} == SHAPES
    assert [entry.start for entry in layout.entries] == [0, *(entry.stop for entry in layout.entries[:-1])]
    assert all(entry.stop - entry.start == SIZES[entry.name] for entry in layout.entries)
    assert all(layout[entry.name] is entry for entry in layout.entries)


@every_layout
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_views_are_the_memory_of_the_vector(layout: Layout, lead: tuple[int, ...]) -> None:
    v = vector(layout, *lead)
    views = layout.views(v)
    for name, view in views.items():
        entry = layout[name]
        assert view.shape == (*lead, *SHAPES[name])
        assert view.data_ptr() == v[..., entry.start :].data_ptr()
        view.fill_(entry.start)
    for entry in layout.entries:
        assert (v[..., entry.start : entry.stop] == entry.start).all()


@every_layout
def test_flatten_is_the_inverse_of_views(layout: Layout) -> None:
    v = vector(layout)
    flat = layout.flatten(layout.views(v))
    assert torch.equal(flat, v)
    assert flat.data_ptr() != v.data_ptr()


def test_gradients_of_bound_parameters_land_flat() -> None:
    module, reference = tiny_model(), tiny_model(seed=1)
    layout = Layout.of(module, tiny_roles(module), n_blocks=3)
    row = layout.flatten(dict(reference.named_parameters()))
    gradient = torch.zeros_like(row)
    layout.bind(layout.parameters(module), row, gradient)
    inputs = torch.linspace(-1, 1, 48, dtype=torch.float64).view(3, 1, 4, 4)
    for model in (module, reference):
        model(inputs).square().sum().backward()
    expected = layout.flatten({name: p.grad for name, p in reference.named_parameters() if p.grad is not None})
    assert gradient.abs().max() > 0
    torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=1e-14)
    row.zero_()
    assert not any(p.any() for p in module.parameters())
    layout.bind(layout.parameters(module), row, None)
    assert all(p.grad is None for p in module.parameters())


def test_frozen_parameters_are_left_out() -> None:
    module = tiny_model()
    module.get_parameter("4.weight").requires_grad_(False)
    layout = Layout.of(module, tiny_roles(module))
    assert [p.shape for p in layout.parameters(module)] == [entry.shape for entry in layout.entries]
    assert {entry.name for entry in layout.entries} == {n for n, _ in module.named_parameters()} - {"4.weight"}


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("seed", range(8))
def test_blocks_are_contiguous_and_balanced(seed: int, n_blocks: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = {f"p{i}": (int(n),) for i, n in enumerate(rng.integers(1, 200, 12))}
    layout = Layout(shapes, {name: Role("other") for name in shapes}, n_blocks=n_blocks)
    labels = [layout[name].block for name in shapes]
    assert labels == sorted(labels)
    assert set(labels) == set(range(n_blocks))
    assert layout.block(n_blocks) == slice(layout.d, layout.d)
    sizes = [sum(shapes[name][0] for name in shapes if layout[name].block == b) for b in range(n_blocks)]
    assert [layout.block(b) for b in range(n_blocks)] == [
        slice(sum(sizes[:b]), sum(sizes[: b + 1])) for b in range(n_blocks)
    ]
    # No run of the same number of tensors is much better: the largest block exceeds the best by half a tensor.
    lengths = [n for (n,) in shapes.values()]
    best = min(
        max(sum(lengths[a:b]) for a, b in itertools.pairwise((0, *cuts, len(lengths))))
        for cuts in itertools.combinations(range(1, len(lengths)), n_blocks - 1)
    )
    assert max(sizes) <= best + max(lengths) / 2


@pytest.mark.parametrize(
    ("sizes", "n_blocks", "expected"),
    [
        ([10, 10, 10, 10], 2, [0, 0, 1, 1]),
        ([100, 1, 1, 1], 2, [0, 1, 1, 1]),
        ([1, 1, 1, 100], 2, [0, 0, 0, 1]),
        ([1, 1, 100], 3, [0, 1, 2]),
        ([5, 5, 5, 5, 5, 5], 3, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_blocks_of_clear_cases(sizes: list[int], n_blocks: int, expected: list[int]) -> None:
    shapes = {f"p{i}": (n,) for i, n in enumerate(sizes)}
    layout = Layout(shapes, {name: Role("other") for name in shapes}, n_blocks=n_blocks)
    assert [layout[name].block for name in shapes] == expected


def test_the_shared_block_lies_last() -> None:
    layout = Layout(SHAPES, ROLES, n_blocks=2, shared=("head.*", "*norm*"))
    shared = SIZES["head.weight"] + SIZES["norm.weight"]
    assert layout.block(2) == slice(layout.d - shared, layout.d)
    assert {entry.name for entry in layout.entries if entry.block == 2} == {"head.weight", "norm.weight"}


MATRICES = {"a.weight", "b.weight", "conv.weight", "c.weight", "tall.weight", "square.weight", "turned.weight"}
HIDDEN = MATRICES | {"fused.weight"}
# As (rows, columns) and √max(1, out/in).
AS_MATRIX = {
    "a.weight": (6, 4, math.sqrt(1.5)),
    "b.weight": (4, 6, 1.0),
    "conv.weight": (2, 12, 1.0),
    "c.weight": (6, 4, math.sqrt(1.5)),
    "tall.weight": (10, 4, math.sqrt(2.5)),
    "square.weight": (4, 4, 1.0),
    "turned.weight": (4, 4, 1.0),
    "fused.weight": (3, 18, math.sqrt(6)),
    "tokens": (5, 3, math.sqrt(5 / 3)),
    "head.weight": (7, 4, math.sqrt(1.75)),
}


@pytest.mark.parametrize(("route", "names"), [("hidden", HIDDEN), ("all_matrices", HIDDEN | {"tokens", "head.weight"})])
@pytest.mark.parametrize("n_blocks", [1, 3])
def test_slabs_are_the_matrices(route: Any, names: set[str], n_blocks: int) -> None:
    layout = Layout(SHAPES, ROLES, n_blocks=n_blocks, route=route)
    v = vector(layout)
    matrices = layout.matrices(v)
    found = []
    for slab in layout.slabs:
        batch = v[slab.start : slab.stop].view(slab.count, slab.rows, slab.cols)
        assert torch.equal(matrices[slab.matrix_start : slab.matrix_stop], batch.flatten())
        inside = [entry for entry in layout.entries if slab.start <= entry.start < slab.stop]
        assert len(inside) == slab.count
        for matrix, entry in zip(batch, inside, strict=True):
            assert (slab.rows, slab.cols, slab.scale) == pytest.approx(AS_MATRIX[entry.name])
            assert torch.equal(matrix.flatten(), layout.views(v)[entry.name].flatten())
            found.append(entry.name)
    assert set(found) == names
    assert len(found) == len(names)
    assert layout.d_matrix == sum(SIZES[name] for name in names)
    if n_blocks == 1:
        together = [slab for slab in layout.slabs if (slab.rows, slab.cols) == (6, 4)]
        assert [slab.count for slab in together] == [2]


@every_layout
@pytest.mark.parametrize("lead", [(), (3,)])
def test_merge_is_the_inverse_of_taking_apart(layout: Layout, lead: tuple[int, ...]) -> None:
    v = vector(layout, *lead)
    matrices, vectors = layout.matrices(v), layout.vectors(v)
    assert matrices.shape == (*lead, layout.d_matrix)
    assert vectors.shape == (*lead, layout.d - layout.d_matrix)
    assert torch.equal(layout.merge(matrices, vectors), v)


def test_contiguous_matrices_are_a_view() -> None:
    layout = Layout(SHAPES, ROLES)
    v = vector(layout, 2)
    assert layout.matrices(v).data_ptr() == v.data_ptr()
    assert layout.vectors(v).data_ptr() == v[:, layout.d_matrix :].data_ptr()


def test_a_model_without_matrices() -> None:
    layout = Layout({"bias": (5,)}, {"bias": Role("bias")})
    v = vector(layout)
    assert layout.slabs == ()
    assert layout.matrices(v).numel() == 0
    assert torch.equal(layout.merge(layout.matrices(v), layout.vectors(v)), v)


def naive_blocks(name: str, rule: str) -> list[list[int]]:
    """Offsets inside a tensor of every curvature block, by a loop over its coordinates."""
    groups, out_dim = ROLES[name].groups, ROLES[name].out_dim
    if rule == "tensor":
        return [list(range(SIZES[name]))]
    if not groups:
        return [[i] for i in range(SIZES[name])]
    blocks: dict[tuple[int, int], list[int]] = {}
    for offset, index in enumerate(np.ndindex(SHAPES[name])):
        for run, (low, high, n) in enumerate(groups):
            if low <= index[out_dim] < high:
                blocks.setdefault((run, (index[out_dim] - low) // ((high - low) // n)), []).append(offset)
    return [blocks[key] for key in sorted(blocks)]


@every_layout
@pytest.mark.parametrize("rule", ["hessian", "tensor"])
def test_curvature_blocks(layout: Layout, rule: Any) -> None:
    blocks = layout.curvature_blocks(rule)
    assert layout.curvature_blocks(rule) is blocks
    v = vector(layout, 3)
    expected, spread = [], torch.full((layout.d,), torch.nan, dtype=torch.float64)
    for entry in layout.entries:
        for offsets in naive_blocks(entry.name, rule):
            at = entry.start + torch.tensor(offsets)
            spread[at] = len(expected)
            expected.append(v[:, at].mean(1))
    assert blocks.size == len(expected)
    torch.testing.assert_close(blocks.mean(v), torch.stack(expected, 1), rtol=1e-14, atol=1e-14)
    assert torch.equal(blocks.expand(torch.arange(blocks.size, dtype=torch.float64)), spread)


def test_inferred_roles() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.conv = nn.Conv1d(3, 2, 2)
            self.group_norm = nn.GroupNorm(1, 4)
            self.batch_norm = nn.BatchNorm1d(4)
            self.linear = nn.Linear(3, 2)
            self.token = nn.Parameter(torch.zeros(1, 2, 3))
            self.scale = nn.Parameter(torch.zeros(()))

    roles = infer_roles(Net())
    assert roles == {
        "token": Role("other"),
        "scale": Role("bias"),
        "embed.weight": Role("embedding", 0, ((0, 5, 5),)),
        "conv.weight": Role("matrix", 0, ((0, 2, 2),)),
        "conv.bias": Role("bias"),
        **{f"{norm}.{leaf}": Role("norm", 0, ((0, 4, 1),))
           for norm in ("group_norm", "batch_norm") for leaf in ("weight", "bias")},
        "linear.weight": Role("matrix", 0, ((0, 2, 2),)),
        "linear.bias": Role("bias"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("roles", "options", "message"),
    [
        ({"b": Role("bias")}, {}, "parameters without a role: a"),
        (None, {"shared": ("head*",)}, r"shared block pattern 'head\*' matches no parameter of a, b"),
        (None, {"n_blocks": 3}, "3 blocks asked for, but the model has 2 tensors"),
        (None, {"n_blocks": 2, "shared": ("a",)}, "2 blocks asked for, but the model has 1 tensors"),
        (None, {"n_blocks": 0}, "0 blocks asked for"),
    ],
)
def test_bad_layouts(roles: dict[str, Role] | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout({"a": (3, 2), "b": (3,)}, roles or {"a": Role("matrix"), "b": Role("bias")}, **options)


@pytest.mark.parametrize("groups", [((0, 2, 2),), ((0, 1, 1), (2, 3, 1))])
def test_groups_must_cover_the_output_dimension(groups: tuple[tuple[int, int, int], ...]) -> None:
    layout = Layout({"a": (3, 2)}, {"a": Role("matrix", 0, groups)})
    with pytest.raises(ValueError, match="of a do not cover its dimension 0"):
        layout.curvature_blocks("hessian")
