"""What every rank needs, imported once by the process that they are forked from; it starts no thread."""

import sklearn.datasets  # noqa: F401
import torch

import fedkernels.report
import fedkernels.train  # noqa: F401

torch.set_num_threads(1)
