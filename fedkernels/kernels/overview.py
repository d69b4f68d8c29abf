"""Which backend every op would run on here, for real shapes, and why: what `fedkernels kernels` prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from . import muon_step, newton_schulz
from .dispatch import BACKENDS, MISSING, ON_ROWS, VARIABLES, Backend, BackendError, Rule, choose
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

# Hidden matrices [count, rows, cols] of models people train, a batch for each shape; of Llama 3.2 the one with 1 B
# parameters, and the adapters of its queries and values.
MATRICES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "vit_tiny": ((48, 192, 192), (24, 192, 768)),
    "vit_b": ((48, 768, 768), (24, 768, 3072)),
    "gpt2": ((12, 768, 2304), (12, 768, 768), (24, 768, 3072)),
    "llama_1b": ((32, 2048, 2048), (32, 512, 2048), (48, 2048, 8192)),
    "lora_r16": ((32, 16, 2048), (16, 2048, 16), (16, 512, 16)),
}

# Their rules depend on what the environment asks for.
MATRIX_OPS: dict[str, Callable[[], Mapping[Backend, Rule]]] = {
    "newton_schulz": newton_schulz.rules_of,
    "muon_step": muon_step.rules_of,
}


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
            lines += [_line(op, name, rules, device, shape) for name, shape in SHAPES.items()]
        for op, rules_of in MATRIX_OPS.items():
            for name, shapes in MATRICES.items():
                lines += [_line(op, f"{name} {'x'.join(map(str, s))}", rules_of(), device, s) for s in shapes]
    return "\n".join(lines)


def _line(op: str, what: str, rules: Mapping[Backend, Rule], device: str, shape: tuple[int, ...]) -> str:
    start = f"  {op:<13} {what:<14} "
    try:
        choice = choose(op, rules, device, torch.float32, shape)
    except BackendError as error:
        return f"{start}{error}"
    others = "".join(f"; not {backend}: {reason}" for backend, reason in choice.refused.items())
    return f"{start}{choice.backend}: {choice.why}{others}"
