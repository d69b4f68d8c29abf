"""Attention as the models of `transformers` call it: no mask is built that the model does not need."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_NAME = "fedkernels_sdpa"


def register_attention() -> str:
    """Name of our attention, made known to `transformers`.

    For a name it has no mask function for, `transformers` builds no mask: its "sdpa" inspects the positions each
    forward, which waits for the GPU and swaps the causal flag for a dense mask under capture and compilation. Its
    "eager" takes the softmax in float32 even for float64 models. A mask of four dimensions is handed through as it is.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, attention)
    return _NAME


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of `[b, heads, length, dim]` queries, keys and values as `[b, length, heads, dim]`.

    Args:
        attention_mask: True where a key counts, or what to add to the scores, as `[b, heads, length, length]` or what
            broadcasts to it; None for all keys, or all up to the query where the module is causal.
        key, value: may have fewer heads, each of which serves as many neighbouring queries.
    """
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    causal = module.is_causal and attention_mask is None
    if query.dtype == torch.bfloat16 and not query.is_cuda:
        # The fused CPU kernel's bf16 backward is several times slower than its fp32 one; plain products are fast.
        scores = (query @ key.mT).float() * scaling
        if causal:
            length = query.shape[-2]
            attention_mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, -torch.inf)
        elif attention_mask is not None:
            scores = scores + attention_mask
        return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2), None
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, is_causal=causal, scale=scaling)
    return out.transpose(1, 2), None
