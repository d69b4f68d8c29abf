"""Federated training on torch.distributed: declared algorithms over flat vectors, ranks as groups of clients."""

__version__ = "0.1.0"
