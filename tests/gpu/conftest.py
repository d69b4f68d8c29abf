"""Tests that need a GPU: left out where there is none, and an error where they were asked for by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if torch.cuda.is_available() or collection_path.parent != HERE:
        return None
    asked = [Path(str(argument).split("::")[0]).resolve() for argument in config.invocation_params.args]
    if any(path == HERE or HERE in path.parents for path in asked):
        raise pytest.UsageError(f"{HERE.name}: torch {torch.__version__} sees no GPU, which these tests need")
    return True
