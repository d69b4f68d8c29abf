"""Low-rank adapters by `peft`: the base stays frozen, clients train and send two thin factors a matrix."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from .vision import Size, TaskKind

_QUERIES_AND_VALUES = ("q_proj", "v_proj", "query", "value", "c_attn")
_HEADS = ("classifier", "score")
_TASKS = {"text": "SEQ_CLS", "language": "CAUSAL_LM"}


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters, `W + (α/r) B A` with `A [r, in]` random and `B [out, r]` zero.

    Only adapters, and the head of a classifier, are trainable: nothing else is in the flat vectors and on the wires.

    Args:
        rank: r.
        alpha: α.
        targets: names of the modules that get adapters, as they end; empty: queries and values of every layer.

    Reference: Hu et al., LoRA: Low-rank adaptation of large language models, 2022 (arXiv 2106.09685), section 4.1.
    """

    rank: Size = 16
    alpha: Size = 32
    targets: tuple[str, ...] = ()

    def apply(self, model: nn.Module, kind: TaskKind) -> nn.Module:
        """The model of `transformers` inside a `PeftModel`, adapters drawn from torch's generator.

        Raises:
            ValueError: targets that the model has not, or no `peft` package.
        """
        try:
            import peft
            from transformers.pytorch_utils import Conv1D
        except ModuleNotFoundError:
            raise ValueError("model.lora needs the peft package: pip install 'fedkernels[hf]'") from None
        leaves = {name.rpartition(".")[2]: child for name, child in model.named_modules()}
        targets = self.targets or tuple(name for name in _QUERIES_AND_VALUES if name in leaves)
        if unknown := [name for name in targets if name.rpartition(".")[2] not in leaves]:
            linear = sorted(name for name, child in leaves.items() if isinstance(child, (nn.Linear, Conv1D)))
            raise ValueError(
                f"model.lora.targets: {unknown[0]!r} is no module; those with matrices: {', '.join(linear)}"
            )
        heads = [name for name, _ in model.named_children() if name in _HEADS]
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(targets),
            lora_dropout=0.0,
            # GPT-2's matrices are (in, out).
            fan_in_fan_out=any(isinstance(leaves[name.rpartition(".")[2]], Conv1D) for name in targets),
            modules_to_save=heads if kind != "language" else None,
        )
        with warnings.catch_warnings():
            # peft asks transformers by a name that is on its way out.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            adapted: Any = peft.get_peft_model(model, config)
        # What readers of the saved adapter wrap it in; here it stays the plain one, which passes all arguments on.
        config.task_type = _TASKS.get(kind)
        return adapted
