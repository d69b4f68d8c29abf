"""What the parameters of transformers are, as far as optimizers care."""

from __future__ import annotations

import re

from torch import nn

from ..layout import Role, infer_roles


def transformer_roles(module: nn.Module, head_dim: int) -> dict[str, Role]:
    """What every parameter of a ViT, DeiT, Swin, GPT-2, Llama or RoBERTa of `transformers` is, by name.

    Queries and keys have one curvature block per head, also where fewer heads of keys serve all queries, and where one
    weight holds queries, keys and values side by side; other matrices, LoRA's two factors among them, one per output,
    embeddings one per token, tables of relative positions one per head.

    Args:
        module: the model, or a module around it, with or without adapters of `peft`; its output layer is called as
            `transformers` does, or `head`.
        head_dim: outputs of one attention head.
    """
    inferred = infer_roles(module)
    roles = {}
    # By parameter, not by module: a tied head would show up a second time under its own name.
    for name, p in module.named_parameters():
        roles[name] = inferred[name]
        # What peft wraps keeps its role.
        plain = name.replace("modules_to_save.default.", "").replace("base_layer.", "")
        if re.search(r"\b(q_proj|k_proj|query|key)\.weight$", plain):
            roles[name] = Role("matrix", 0, ((0, p.shape[0], p.shape[0] // head_dim),))
        elif plain.endswith("c_attn.weight"):  # GPT-2's matrices are (in, out)
            dim, out = p.shape
            roles[name] = Role("matrix", 1, ((0, 2 * dim, 2 * dim // head_dim), (2 * dim, out, out - 2 * dim)))
        elif re.search(r"\b(c_proj|c_fc)\.weight$", plain):
            roles[name] = Role("matrix", 1, ((0, p.shape[1], p.shape[1]),))
        elif re.search(r"\b(cls_token|distillation_token|mask_token|position_embeddings)$", plain):
            roles[name] = Role("embedding", p.dim() - 2, ((0, p.shape[-2], p.shape[-2]),))
        elif plain.endswith("relative_position_bias_table"):
            roles[name] = Role("embedding", 1, ((0, p.shape[1], p.shape[1]),))
        elif re.search(
            r"\b(classifier|classifier\.out_proj|cls_classifier|distillation_classifier|lm_head|score|head)\.weight$",
            plain,
        ):
            roles[name] = Role("head", 0, ((0, p.shape[0], p.shape[0]),))
    return roles
