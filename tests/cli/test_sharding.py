"""Client groups of several ranks through the command line."""

from __future__ import annotations

import numpy as np
import pytest
from cli.small_runs import TIMEOUT_S, Runs

SHARDED = ("--sharding=fsdp2", "--shard_size=2")


def check_close(runs: Runs, name: str, other: str) -> None:
    """Equal parameters and metrics, to the rounding of float32."""
    one, two = runs.weights(name), runs.weights(other)
    assert one.keys() == two.keys()
    for key, value in one.items():
        np.testing.assert_allclose(value.numpy(), two[key].numpy(), rtol=1e-5, atol=1e-6, err_msg=key)
    told = [[(row["round"], row["cohort"], row["protocol_up_bytes"]) for row in runs.rows(n)] for n in (name, other)]
    assert told[0] == told[1]
    losses = [[row["test_loss"] for row in runs.rows(n)] for n in (name, other)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.usefixtures("no_report")
def test_a_sharded_run_goes_on_unsharded(runs: Runs) -> None:
    assert runs.train("alone") == 0
    processes = runs.start("shards", *SHARDED, "--rounds=2", ranks=2)
    outputs = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "2 ranks in groups of 2 by fsdp2 on cpu" in "".join(out + err for out, err in outputs)
    newest = runs / "shards" / "checkpoints" / "round-000002"
    assert sorted(path.name for path in newest.glob("server*")) == ["server-0.safetensors", "server-1.safetensors"]
    assert runs.train("shards", "--resume") == 0
    check_close(runs, "shards", "alone")


def test_ranks_that_make_no_groups_are_refused(runs: Runs) -> None:
    processes = runs.start("a", *SHARDED, ranks=3)
    errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
    assert {process.returncode for process in processes} == {2}
    lines = [line for error in errors for line in error.splitlines() if "fedkernels: error" in line]
    expected = "fedkernels: error: shard_size: groups of 2 ranks are not to be made of 3; start a multiple"
    assert lines[0] == expected
    assert not (runs / "a").exists()
