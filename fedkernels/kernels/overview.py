"""Which backend every op would run on here, for real shapes, and why: what `fedkernels kernels` prints."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .dispatch import BACKENDS, MISSING, ON_ROWS, VARIABLES, Backend, Rule, choose
from .exact_sum import RULES as EXACT

# Rows [C, d] of models people train: those of the papers' settings, and one of each order of magnitude.
SHAPES: dict[str, tuple[int, int]] = {
    "lenet5 x 10": (10, 62_006),
    "vit_tiny": (1, 2_710_948),
    "vit_tiny x 10": (10, 2_710_948),
    "resnet18 x 10": (10, 11_220_132),
    "vit_b": (1, 86_567_656),
    "gpt2": (1, 124_439_808),
}

OPS: dict[str, Mapping[Backend, Rule]] = dict.fromkeys(
    (
        "fused_adamw", "fused_sgd", "fused_sam", "row_norm",
        "encode_int8", "encode_bf16", "accumulate", "square_sums",
    ),
    ON_ROWS,
) | {"exact_add": EXACT}  # fmt: skip


def overview() -> str:
    """The backends and what is missing of them, the variables, and a line for each device, op and shape."""
    lines = ["backends:"]
    for backend in BACKENDS:
        lines.append(f"  {backend:<10} {MISSING[backend] or 'available'}")
    lines.append("environment variables:")
    lines += [f"  {name:<20} {what}" for name, what in VARIABLES.items()]
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            lines.append("cuda: no GPU here")
            continue
        lines.append(f"{device}, float32:")
        for op, rules in OPS.items():
            for name, shape in SHAPES.items():
                choice = choose(op, rules, device, torch.float32, shape)
                others = "".join(f"; not {backend}: {reason}" for backend, reason in choice.refused.items())
                lines.append(f"  {op:<12} {name:<14} {choice.backend}: {choice.why}{others}")
    return "\n".join(lines)
