"""The CUDA kernels on small odd shapes, without a test runner or a compiler: what compute-sanitizer watches.

Nothing else is launched: matrices come from the CPU, and are compared there.

compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitized.py
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fedkernels.kernels.dispatch import MISSING
from fedkernels.kernels.newton_schulz.cuda import newton_schulz_cuda
from fedkernels.kernels.newton_schulz.reference import newton_schulz_reference, schedule

# One block and clusters, slabs on chip and in pieces, tall and wide, a single element, a row.
SHAPES = [(1, 1, 1), (2, 1, 9), (3, 7, 3), (2, 33, 17), (1, 129, 131), (2, 193, 192), (1, 256, 256), (1, 161, 1601)]
TOLERANCE = 0.02  # relative, of products in float16
STEPS = 2  # a step after the first reuses everything that one has


def main() -> None:
    if (reason := MISSING["cuda"]) is not None:
        raise SystemExit(f"no CUDA kernels to look at: {reason}")
    coefficients, margin = schedule("newton_schulz", STEPS)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(*shape, generator=generator).cuda() for shape in SHAPES]
    batches.append(torch.randn(3, 2, 40, 131, generator=generator).cuda()[:, :1, :, 1:].mT)  # strides with gaps
    launches = [batches, *([batch] for batch in batches)]
    for launch in launches:
        outputs = newton_schulz_cuda(launch, coefficients, margin)
        torch.cuda.synchronize()
        for u, o in zip(launch, outputs, strict=True):
            expected, found = newton_schulz_reference(u.cpu().double(), coefficients, margin), o.cpu().double()
            for index in product(*map(range, u.shape[:-2])):
                error = ((found[index] - expected[index]).norm() / expected[index].norm()).item()
                if not error <= TOLERANCE:
                    raise SystemExit(f"{list(u.shape)} at {index}: error {error:.2g}, expected at most {TOLERANCE}")
    print(f"{len(launches)} launches of newton_schulz_cuda within {TOLERANCE} of the reference")


if __name__ == "__main__":
    main()
