"""Federated training on torch.distributed: declared algorithms over flat vectors, client groups, custom kernels."""

__version__ = "0.1.0"
