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

NAMED = (("*.bias", "[ac].*"), ("norm*", "*.weight"), ("scalar", "*"))


def layouts() -> list[Any]:
    return [
        pytest.param(
            Layout(SHAPES, ROLES, blocks=blocks, cut_rows=cut, shared=shared, route=route),
            id=f"{blocks if isinstance(blocks, int) else 'named'}-{'cut' if cut else 'whole'}-{len(shared)}-{route}",
        )
        for (blocks, cut), shared, route in itertools.product(
            ((1, False), (3, False), (3, True), (20, True), (NAMED, True)),
            ((), ("head.*", "tokens")),
            ("hidden", "all_matrices"),
        )
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
    layout = Layout.of(module, tiny_roles(module), blocks=7, cut_rows=True)
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


def lengths(layout: Layout) -> list[int]:
    return [layout.block(b).stop - layout.block(b).start for b in range(layout.n_blocks + 1)]


def held(layout: Layout, name: str) -> list[int]:
    """The blocks that hold a part of a tensor."""
    entry = layout[name]
    blocks = [layout.block(b) for b in range(layout.n_blocks + 1)]
    return [b for b, block in enumerate(blocks) if entry.start < block.stop and block.start < entry.stop]


def random_shapes(seed: int) -> dict[str, tuple[int, ...]]:
    """Tensors of all dimensions, some of one shape, some far wider than others."""
    rng = np.random.default_rng(seed)
    kinds = [(4, 6), (6, 4), (1, 5, 7), (3, 2, 3, 3), (8,), (1,), (), (40, 9), (2, 50)]
    return {f"p{i}": kinds[kind] for i, kind in enumerate(rng.integers(0, len(kinds), 14))}


@every_layout
def test_blocks_partition_the_vector(layout: Layout) -> None:
    blocks = [layout.block(b) for b in range(layout.n_blocks + 1)]
    assert blocks[0].start == 0
    assert all(a.stop == b.start for a, b in itertools.pairwise(blocks))
    assert blocks[-1].stop == layout.d
    assert min(lengths(layout)[:-1]) > 0


@pytest.mark.parametrize("cut_rows", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_any_number_of_blocks(seed: int, cut_rows: bool) -> None:
    """Blocks are runs in module order, cut at rows; what is in one block whole is nowhere else, and slabs are views."""
    shapes = random_shapes(seed)
    roles = {name: Role("matrix" if len(shape) > 1 else "bias") for name, shape in shapes.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    row = {name: sizes[name] // next((n for n in shape if n > 1), 1) for name, shape in shapes.items()}
    most = sum(sizes[name] // row[name] for name in shapes) if cut_rows else len(shapes)
    for n_blocks in {*range(1, 15), 40, most - 1, most}:
        if n_blocks > most:
            continue
        layout = Layout(shapes, roles, blocks=n_blocks, cut_rows=cut_rows)
        assert layout.n_blocks == n_blocks
        assert len(layout.entries) == len(shapes)
        found = lengths(layout)
        assert sum(found) == layout.d == sum(sizes.values())
        assert min(found[:-1]) > 0
        assert found[-1] == 0
        runs = [held(layout, name) for name in shapes]
        assert all(run == list(range(run[0], run[-1] + 1)) for run in runs)
        assert all(a[-1] <= b[0] for a, b in itertools.pairwise(runs))
        borders = {layout.block(b).stop for b in range(n_blocks)}
        for entry in layout.entries:
            inside = {border - entry.start for border in borders if entry.start < border < entry.stop}
            assert all(at % row[entry.name] == 0 for at in inside)
            assert cut_rows or not inside
        # Half a unit at every border, and what that shifts the rest by.
        widest = max(row.values() if cut_rows else sizes.values())
        share = layout.d / n_blocks
        if widest < share:
            slack = widest / 2 * sum(1 / b for b in range(1, n_blocks))
            assert max(abs(length - share) for length in found[:-1]) <= slack + 1e-9
        v = vector(layout)
        views = layout.views(v)
        assert torch.equal(layout.flatten(views), v)
        for slab in layout.slabs:
            batch = v[slab.start : slab.stop].view(slab.count, slab.rows, slab.cols)
            names = [entry.name for entry in layout.entries if slab.start <= entry.start < slab.stop]
            assert len(names) == slab.count
            assert all(torch.equal(m.flatten(), views[name].flatten()) for m, name in zip(batch, names, strict=True))
            # A matrix that is cut is alone; those of a block lie in it.
            assert len(names) == 1 or len({tuple(held(layout, name)) for name in names}) == 1
        # Same-shape matrices of a block are together.
        whole = [(held(layout, e.name)[0], e.shape) for e in layout.entries if len(held(layout, e.name)) == 1]
        matrices = {(b, shape) for b, shape in whole if len(shape) > 1}
        cut = sum(len(held(layout, name)) > 1 for name, shape in shapes.items() if len(shape) > 1)
        assert len(layout.slabs) == len(matrices) + cut


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("seed", range(8))
def test_whole_tensors_are_balanced(seed: int, n_blocks: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = {f"p{i}": (int(n),) for i, n in enumerate(rng.integers(1, 200, 12))}
    layout = Layout(shapes, {name: Role("other") for name in shapes}, blocks=n_blocks)
    # No run of the same number of tensors is much better: the largest block exceeds the best by half a tensor.
    sizes = [n for (n,) in shapes.values()]
    best = min(
        max(sum(sizes[a:b]) for a, b in itertools.pairwise((0, *cuts, len(sizes))))
        for cuts in itertools.combinations(range(1, len(sizes)), n_blocks - 1)
    )
    assert max(lengths(layout)) <= best + max(sizes) / 2


@pytest.mark.parametrize(
    ("sizes", "n_blocks", "expected"),
    [
        ([10, 10, 10, 10], 2, [0, 0, 1, 1]),
        ([100, 1, 1, 1], 2, [0, 1, 1, 1]),
        ([1, 1, 1, 100], 2, [0, 0, 0, 1]),
        ([1, 1, 100], 3, [0, 1, 2]),
        ([5, 5, 5, 5, 5, 5], 3, [0, 0, 1, 1, 2, 2]),
        ([100, 1, 1, 1, 1, 1, 1], 3, [0, 1, 1, 1, 2, 2, 2]),
    ],
)
def test_blocks_of_clear_cases(sizes: list[int], n_blocks: int, expected: list[int]) -> None:
    shapes = {f"p{i}": (n,) for i, n in enumerate(sizes)}
    layout = Layout(shapes, {name: Role("other") for name in shapes}, blocks=n_blocks)
    assert [held(layout, name) for name in shapes] == [[b] for b in expected]


@pytest.mark.parametrize(
    ("shapes", "n_blocks", "expected"),
    [
        ({"wide": (8, 10), "bias": (4,)}, 4, [20, 20, 20, 24]),
        ({"bias": (4,), "wide": (8, 10)}, 4, [24, 20, 20, 20]),
        ({"wide": (1, 3, 10), "other": (3, 10)}, 2, [30, 30]),
        ({"wide": (2, 50), "a": (), "b": (2,)}, 5, [50, 50, 1, 1, 1]),
        ({"a": (2,), "wide": (3, 100)}, 5, [1, 1, 100, 100, 100]),
    ],
)
def test_rows_of_clear_cases(shapes: dict[str, tuple[int, ...]], n_blocks: int, expected: list[int]) -> None:
    layout = Layout(shapes, {name: Role("other") for name in shapes}, blocks=n_blocks, cut_rows=True)
    assert lengths(layout) == [*expected, 0]


def test_a_cut_tensor_lies_across_the_border() -> None:
    """a and the first rows of b; the rest of b, then d before c, which is no matrix; e fills blocks of its own."""
    shapes = {"a": (3, 4), "b": (4, 4), "c": (6,), "d": (2, 4), "e": (20, 4)}
    roles = {name: Role("bias" if name == "c" else "matrix") for name in shapes}
    layout = Layout(shapes, roles, blocks=5, cut_rows=True)
    assert [entry.name for entry in layout.entries] == ["a", "b", "d", "c", "e"]
    assert [held(layout, name) for name in shapes] == [[0], [0, 1], [1], [1], [1, 2, 3, 4]]
    assert lengths(layout) == [24, 26, 24, 24, 24, 0]


def test_named_blocks_lie_in_the_order_given_and_the_first_match_wins() -> None:
    layout = Layout(SHAPES, ROLES, blocks=(("*.bias", "c.*"), ("[ab].*",), ("*",)), shared=("head.*",), cut_rows=True)
    members = [{name for name in SHAPES if held(layout, name) == [b]} for b in range(4)]
    assert members[0] == {"a.bias", "c.weight"}
    assert members[1] == {"a.weight", "b.weight"}
    assert members[2] == set(SHAPES) - members[0] - members[1] - members[3]
    assert members[3] == {"head.weight"}
    assert lengths(layout) == [sum(SIZES[name] for name in names) for names in members]


def test_the_shared_block_lies_last() -> None:
    layout = Layout(SHAPES, ROLES, blocks=2, shared=("head.*", "*norm*"))
    shared = SIZES["head.weight"] + SIZES["norm.weight"]
    assert layout.block(2) == slice(layout.d - shared, layout.d)
    assert {name for name in SHAPES if held(layout, name) == [2]} == {"head.weight", "norm.weight"}


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
@pytest.mark.parametrize(("n_blocks", "cut_rows"), [(1, False), (3, False), (4, True), (30, True)])
def test_slabs_are_the_matrices(route: Any, names: set[str], n_blocks: int, cut_rows: bool) -> None:
    layout = Layout(SHAPES, ROLES, blocks=n_blocks, cut_rows=cut_rows, route=route)
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
        (None, {"blocks": 3}, "3 blocks asked for, but the model has 2 tensors"),
        (None, {"blocks": 2, "shared": ("a",)}, "2 blocks asked for, but the model has 1 tensors"),
        (None, {"blocks": 7, "cut_rows": True}, "7 blocks asked for, but the model has 6 rows of tensors"),
        (None, {"blocks": 4, "cut_rows": True, "shared": ("a",)}, "4 blocks asked for, but the model has 3 rows"),
        (None, {"blocks": 0}, "0 blocks asked for"),
        (None, {"blocks": 0, "cut_rows": True}, "0 blocks asked for"),
        (None, {"blocks": ()}, "the list of blocks is empty; expected a number, or patterns of at least one block"),
        (None, {"blocks": (("a",), ())}, r"block 1 is empty: earlier blocks leave nothing to \[\]"),
        (None, {"blocks": (("*",), ("b",))}, r"block 1 is empty: earlier blocks leave nothing to \['b'\]"),
        (None, {"blocks": (("b",),)}, "parameters in no block: a$"),
        (None, {"blocks": (("a", "c*"), ("*",))}, r"block 0 pattern 'c\*' matches no parameter of a, b"),
        (None, {"blocks": (("a",), ("b",)), "shared": ("b",)}, "block 1 pattern 'b' matches no parameter of a$"),
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
