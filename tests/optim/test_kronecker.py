"""Eigenvalues of Kronecker factors where LAPACK gives up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedkernels.optim.kronecker import eigh


def test_a_matrix_that_lapack_gives_up_on_spoils_neither_itself_nor_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    roots = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    a = roots @ roots.mT
    plain, refused = torch.linalg.eigh, a[1, 2].clone()

    def gives_up(matrices: Tensor) -> object:
        if any(torch.equal(matrix, refused) for matrix in matrices.view(-1, 5, 5)):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return plain(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    values, vectors = eigh(a)
    torch.testing.assert_close((vectors * values[..., None, :]) @ vectors.mT, a, rtol=1e-12, atol=1e-12)
    expected = plain(a)
    for c, n in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        assert torch.equal(values[c, n], expected.eigenvalues[c, n])
        assert torch.equal(vectors[c, n], expected.eigenvectors[c, n])
