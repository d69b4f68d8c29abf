"""The objective's module under DeepSpeed ZeRO-3; what it partitions are a client's parameters and gradients.

The optimizer step is not DeepSpeed's: it sees one that does nothing, and the algorithm's own works on the shards.
"""

from __future__ import annotations

import logging
import os
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .collectives import Collectives
from .parallel import DeepSpeedSettings
from .sharding import ShardedLayout


def require_deepspeed(device: torch.device) -> ModuleType:
    """The optional package, imported only where a run asks for it.

    Raises:
        ValueError: it is not installed.
    """
    # DeepSpeed otherwise takes the first kind of device that it finds.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        install = "DS_BUILD_OPS=0 pip install --no-build-isolation 'fedkernels[deepspeed]'"
        raise ValueError(f"sharding: deepspeed needs the deepspeed package: {install}") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


class _Mesh:
    """What DeepSpeed asks of a mesh: its data-parallel ranks are those of the client group, others are replicas."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._collectives.group.process_group

    def get_data_parallel_rank(self) -> int:
        return self._collectives.group.index

    def get_data_parallel_world_size(self) -> int:
        return self._collectives.group.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._collectives.across

    def get_model_parallel_rank(self) -> int:
        return self._collectives.rank

    def get_model_parallel_world_size(self) -> int:
        return self._collectives.world_size


class Zero3:
    """A `ShardedModule` of DeepSpeed: partitions of single elements, gathered module by module.

    DeepSpeed reduces gradients in float32, so it takes parameters of that type alone.

    Raises:
        ValueError: DeepSpeed is missing, or a parameter is not float32 or has no dimension.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: ShardedLayout,
        device: torch.device,
        collectives: Collectives,
        settings: DeepSpeedSettings,
    ) -> None:
        deepspeed = require_deepspeed(device)
        for name, parameter in module.named_parameters():
            if parameter.dtype != torch.float32:
                raise ValueError(f"sharding: deepspeed takes float32 parameters, and {name} is {parameter.dtype}")
            if parameter.dim() == 0:
                raise ValueError(f"sharding: deepspeed takes no parameter without a dimension, as {name} is; use fsdp2")
        stage_3: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
        if settings.offload == "cpu":
            stage_3["offload_param"] = stage_3["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.SGD(trainable, lr=0.0),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": stage_3,
            },
            mpu=_Mesh(collectives),
            dist_init_required=False,
        )
        self._deepspeed = deepspeed
        self._size = layout.group.size
        self._first = layout.group.index == 0
        self._runs = [(module.get_parameter(entry.name), slice(entry.start, entry.stop)) for entry in layout.entries]
        self._grad_row: Tensor | None = None

    @torch.no_grad()
    def bind(self, row: Tensor, grad_row: Tensor | None) -> None:
        self._grad_row = grad_row
        # Parameters that are still gathered from the last pass would hide the new ones.
        self._engine.optimizer.empty_partition_cache()
        for parameter, run in self._runs:
            partition: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            partition[: run.stop - run.start] = row[run]

    def forward(self, inputs: Tensor) -> Tensor:
        # Not through the engine, which would end the caller's autocast.
        logits: Tensor = self._engine.module(inputs)
        return logits

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self._size)  # DeepSpeed takes the mean over ranks, and losses carry their share
        row = self._grad_row
        assert row is not None
        for parameter, run in self._runs:
            if run.start < run.stop:
                grad = self._deepspeed.utils.safe_get_local_grad(parameter)
                row[run] += grad[: run.stop - run.start]
                # Of a parameter that the next loss does not depend on, DeepSpeed would keep this gradient.
                self._deepspeed.utils.safe_set_local_grad(parameter, torch.zeros_like(grad))
        self._engine.optimizer.zero_grad()

    def frozen(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                with self._deepspeed.zero.GatheredParameters(parameter):
                    if self._first:
                        found[name] = parameter.detach().cpu().clone()
        return found
