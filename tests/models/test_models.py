from __future__ import annotations

import copy
import dataclasses
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedkernels.layout import CurvatureBlocks, Layout
from fedkernels.models import (
    MODELS,
    Cnn,
    Cnn3x3,
    Deit,
    Gpt2,
    LeNet5,
    Llama,
    Mlp,
    ResNet18,
    Roberta,
    Swin,
    Vit,
)
from fedkernels.models.attention import attention

# Flash attention on CPU has no batching rule: vmap falls back to a loop over clients and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

CLASSES = 5
TINY_VIT = Vit(dim=8, depth=2, heads=2, patch=4, mlp_ratio=2)
TINY_GPT2 = Gpt2(dim=8, depth=2, heads=2)
TINY_LLAMA = Llama(dim=8, depth=2, heads=4, key_heads=2, hidden=12)
TINY = {
    "mlp": (Mlp(hidden=(7, 6)), "image", (1, 4, 4)),
    "lenet5": (LeNet5(), "image", (1, 8, 8)),
    "cnn": (Cnn(), "image", (1, 4, 4)),
    "cnn3x3": (Cnn3x3(), "image", (1, 6, 6)),
    "resnet18": (ResNet18(width=2), "image", (3, 8, 8)),
    "vit": (TINY_VIT, "image", (3, 8, 8)),
    "deit": (Deit(dim=8, depth=2, heads=2, patch=4, mlp_ratio=2), "image", (3, 8, 8)),
    "swin": (Swin(dim=4, depths=(2, 2), heads=(1, 2), window=2, patch=2, mlp_ratio=2), "image", (3, 16, 16)),
    "gpt2": (TINY_GPT2, "language", (6,)),
    "gpt2-text": (TINY_GPT2, "text", (6,)),
    "llama": (TINY_LLAMA, "language", (6,)),
    "llama-text": (TINY_LLAMA, "text", (6,)),
    "roberta": (Roberta(dim=8, depth=2, heads=2, mlp_ratio=2), "text", (6,)),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, str, tuple[int, ...]]:
    config, kind, shape = TINY[name]
    torch.manual_seed(0)
    return config.build(kind, shape, CLASSES).to(dtype), kind, shape


def sample(kind: str, shape: tuple[int, ...], *lead: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs and targets; token sequences end in padding now and then."""
    if kind == "image":
        return torch.randn(*lead, *shape, dtype=dtype), torch.randint(CLASSES, lead)
    tokens = torch.randint(CLASSES, (*lead, *shape))
    return tokens, torch.randint(CLASSES, tokens.shape if kind == "language" else lead)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def meta_count(config: object, shape: tuple[int, ...], classes: int, kind: str = "image") -> int:
    with torch.device("meta"):
        return count(config.build(kind, shape, classes))


def test_table_names_every_model() -> None:
    assert set(MODELS) == {
        "mlp", "lenet5", "cnn", "cnn3x3", "resnet18", "vit", "deit", "swin", "gpt2", "llama", "roberta", "pretrained",
    }  # fmt: skip
    for model in MODELS.values():
        assert dataclasses.is_dataclass(model)
        assert model.__dataclass_params__.frozen
        assert len((model.__doc__ or "").splitlines()[0]) > 20


@pytest.mark.parametrize(
    ("config", "kind", "shape", "classes", "published"),
    [
        (LeNet5(), "image", (3, 32, 32), 10, 62_006),
        (LeNet5(), "image", (1, 28, 28), 10, 61_706),
        (Cnn(), "image", (1, 28, 28), 10, 1_663_370),
        (Cnn3x3(), "image", (1, 28, 28), 62, 1_206_590),
        (ResNet18(), "image", (3, 32, 32), 10, 11_173_962),
        (ResNet18(), "image", (3, 224, 224), 1000, 11_689_512),
        (Vit(768, 12, 12, 16), "image", (3, 224, 224), 1000, 86_567_656),
        (Deit(192, 12, 3, 16), "image", (3, 224, 224), 1000, 5_910_800 - 193_000),  # less the second head
        (Swin(96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 4), "image", (3, 224, 224), 1000, 28_288_354),
        (Gpt2(768, 12, 12), "language", (1024,), 50_257, 124_439_808),
        (Llama(2048, 16, 32, 8, 8192), "language", (1024,), 128_256, 1_235_814_400),
    ],
)
def test_parameter_counts_are_the_published_ones(config, kind, shape, classes, published) -> None:
    assert meta_count(config, shape, classes, kind) == published


def test_parameter_counts_follow_closed_forms() -> None:
    assert meta_count(Cnn(), (3, 32, 32), 10) == (
        32 * 3 * 25 + 32 + 64 * 32 * 25 + 64 + 512 * 64 * 8 * 8 + 512 + 10 * 512 + 10
    )
    # 8x8 images: both convolutions padded, 8 -> 4 -> 2.
    assert meta_count(LeNet5(), (1, 8, 8), 10) == (
        6 * 25 + 6 + 16 * 6 * 25 + 16 + 120 * 16 * 2 * 2 + 120 + 84 * 120 + 84 + 10 * 84 + 10
    )
    assert meta_count(Mlp(hidden=(7, 6)), (1, 4, 4), 5) == 16 * 7 + 7 + 7 * 6 + 6 + 6 * 5 + 5
    d = 192
    layer = 4 * (d * d + d) + (d * 4 * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
    assert meta_count(Vit(), (3, 32, 32), 100) == d * 3 * 16 + d + d + 65 * d + 6 * layer + 2 * d + 100 * d + 100
    d = 128
    layer = (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
    assert meta_count(Gpt2(), (64,), 96, "language") == (96 + 64) * d + 2 * layer + 2 * d
    assert meta_count(Gpt2(), (64,), 3, "text") == (256 + 64) * d + 2 * layer + 2 * d + 3 * d
    layer = 2 * d * d + 2 * d * 64 + 3 * d * 352 + 2 * d
    assert meta_count(Llama(), (64,), 96, "language") == 96 * d + 2 * layer + d
    assert meta_count(Llama(), (64,), 3, "text") == 256 * d + 2 * layer + d + 3 * d
    layer = 4 * (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
    head = d * d + d + 3 * d + 3
    assert meta_count(Roberta(), (64,), 3, "text") == (256 + 65 + 1) * d + 2 * d + 2 * layer + head


@pytest.mark.parametrize("name", TINY)
def test_logit_shapes_and_no_buffers_but_constants(name: str) -> None:
    module, kind, shape = build(name)
    x, _ = sample(kind, shape, 3)
    assert module(x).shape == ((3, *shape, CLASSES) if kind == "language" else (3, CLASSES))
    constants = {"position_ids", "token_type_ids", "relative_position_index", "inv_freq", "original_inv_freq"}
    before = {name: value.clone() for name, value in module.named_buffers()}
    assert {name.rpartition(".")[2] for name in before} <= constants
    module.train()(x)
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())


@pytest.mark.parametrize("name", TINY)
def test_batched_client_gradients_match_a_loop_over_clients(name: str) -> None:
    module, kind, shape = build(name, torch.float64)
    clients = 3
    x, targets = sample(kind, shape, clients, 4, dtype=torch.float64)
    own = {n: p.detach() + 0.1 * torch.randn(clients, *p.shape, dtype=p.dtype) for n, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, targets: Tensor) -> Tensor:
        return loss_of(functional_call(module, parameters, (x,)), targets)

    batched = vmap(grad(loss))(own, x, targets)
    for c in range(clients):
        client = copy.deepcopy(module)
        for n, p in client.named_parameters():
            p.data = own[n][c].clone()
        loss_of(client(x[c]), targets[c]).backward()
        for n, p in client.named_parameters():
            torch.testing.assert_close(batched[n][c], p.grad, rtol=0, atol=1e-10, msg=f"{n} of client {c}")
            assert p.grad is not None
            # Softmax cancels a key bias: it shifts every score of a query alike.
            assert p.grad.abs().max() > 0 or re.search(r"k_proj\.bias|self\.key\.bias", n), n


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_autocast_stays_near_float32(name: str) -> None:
    module, kind, shape = build(name)
    x, targets = sample(kind, shape, 4)
    exact = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = module(x)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.05)
    loss_of(logits.float(), targets).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_build_draws_from_torchs_generator() -> None:
    for name, (config, kind, shape) in TINY.items():
        first, _, _ = build(name)
        following = config.build(kind, shape, CLASSES)
        again, _, _ = build(name)
        flat = [nn.utils.parameters_to_vector(m.parameters()) for m in (first, following, again)]
        assert torch.equal(flat[0], flat[2])
        assert not torch.equal(flat[0], flat[1])


def test_mlp_is_affine_maps_with_exact_gelu() -> None:
    module, _, shape = build("mlp", torch.float64)
    x, _ = sample("image", shape, 3, dtype=torch.float64)
    h = x.reshape(3, -1)
    weights = [p.detach() for p in module.parameters()]
    for weight, bias in ((weights[0], weights[1]), (weights[2], weights[3])):
        z = h @ weight.T + bias
        h = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    torch.testing.assert_close(module(x), h @ weights[4].T + weights[5])


def test_resnet_strides() -> None:
    for side, out in ((32, 4), (64, 8), (224, 7)):
        with torch.device("meta"):
            module = ResNet18().build("image", (3, side, side), 10)
            seen: list[torch.Size] = []
            module.blocks.register_forward_hook(lambda _m, _i, y, seen=seen: seen.append(y.shape))
            module(torch.empty(2, 3, side, side))
        assert seen == [(2, 512, out, out)]


def test_resnet_blocks_add_to_their_input() -> None:
    module, _, _ = build("resnet18")
    x = torch.rand(2, 2, 8, 8)
    block = module.blocks[0]
    block.norm2.weight.data.zero_()
    assert torch.equal(block(x), x)


def test_vit_matches_the_library_with_its_own_attention() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    module, _, shape = build("vit")
    oracle = ViTForImageClassification(
        ViTConfig(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=4,
            num_labels=CLASSES,
            attn_implementation="eager",
        )
    )
    oracle.load_state_dict(module.model.state_dict())
    x, _ = sample("image", shape, 3)
    torch.testing.assert_close(module(x), oracle(x).logits, rtol=1e-4, atol=1e-6)


def gpt2_oracle_config(**fields: object) -> object:
    from transformers import GPT2Config

    return GPT2Config(
        n_positions=6, n_embd=8, n_layer=2, n_head=2, use_cache=False, attn_implementation="eager", **fields
    )


def test_language_model_matches_the_library_and_ties_its_head() -> None:
    from transformers import GPT2LMHeadModel

    module, kind, shape = build("gpt2")
    # Larger weights, so that attention is far from uniform and a missing mask shows.
    torch.nn.utils.vector_to_parameters(torch.randn(count(module)), module.parameters())
    oracle = GPT2LMHeadModel(gpt2_oracle_config(vocab_size=CLASSES)).eval()
    oracle.load_state_dict(module.model.state_dict())
    x, _ = sample(kind, shape, 3)
    torch.testing.assert_close(module(x), oracle(x).logits, rtol=1e-4, atol=1e-4)
    later = x.clone()
    later[:, 4] = (x[:, 4] + 1) % CLASSES
    changed = (module(later) - module(x)).abs().amax((0, 2)) > 1e-4
    assert changed.tolist() == [False] * 4 + [True] * 2
    assert module.model.lm_head.weight is module.model.transformer.wte.weight


def test_text_classifier_matches_the_library_and_ignores_padding() -> None:
    from transformers import GPT2ForSequenceClassification

    module, _, _ = build("gpt2-text")
    oracle = GPT2ForSequenceClassification(
        gpt2_oracle_config(vocab_size=256, num_labels=CLASSES, pad_token_id=0)
    ).eval()
    oracle.load_state_dict(module.model.state_dict())
    x = torch.tensor([[3, 255, 7, 0, 0, 0], [9, 0, 4, 0, 0, 0], [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(module(x), oracle(x).logits, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(module(x[:2, :3]), module(x[:2]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_bf16_attention_is_the_formula_up_to_rounding(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8).bfloat16() for _ in range(3))
    out, _ = attention(SimpleNamespace(is_causal=causal), q, k, v, None, scaling=0.5)
    scores = 0.5 * q.double() @ k.double().mT
    if causal:
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    expected = (scores.softmax(-1) @ v.double()).transpose(1, 2)
    # Scores are rounded once, which scales weights by up to e^2δ; weights and outputs are rounded once each.
    unit = 2.0**-9
    bound = v.double().abs().max() * (math.expm1(2 * unit * float(scores[scores.isfinite()].abs().max())) + 3 * unit)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).abs().max() <= bound


def test_roles_say_what_every_parameter_is() -> None:
    for name in TINY:
        module, _, _ = build(name)
        roles = TINY[name][0].roles(module)
        assert list(roles) == [n for n, _ in module.named_parameters()]
        for n, p in module.named_parameters():
            if re.search(r"_token$|position_embeddings|_embeddings\.weight|embed_tokens|\.wte\.|\.wpe\.|bias_table", n):
                kind = "embedding"
            elif re.fullmatch(r"head.weight|model.(classifier|score|classifier.out_proj).weight", n):
                kind = "head"
            elif "norm" in n.lower() or ".ln_" in n or ".shortcut.1." in n:
                kind = "norm"
            else:
                kind = "matrix" if p.dim() > 1 else "bias"
            assert roles[n].kind == kind, n


def test_vit_curvature_blocks_and_slabs() -> None:
    module, _, _ = build("vit")
    layout = Layout.of(module, TINY_VIT.roles(module))
    dim, heads, tokens, mlp = 8, 2, 5, 16
    layer = 2 * (heads + dim) + 2 * (dim + dim) + (mlp + mlp) + (dim + dim) + 4
    assert CurvatureBlocks(layout, "hessian").size == 1 + tokens + 2 * dim + 2 * layer + 2 + 2 * CLASSES
    slabs = {(s.count, s.rows, s.cols, s.scale) for s in layout.slabs}
    assert slabs == {(1, 8, 48, 1.0), (8, 8, 8, 1.0), (2, 16, 8, math.sqrt(2)), (2, 8, 16, 1.0)}
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert {e.name for e in layout.entries if e.role.kind == "matrix"} == {
        "model.vit.embeddings.patch_embeddings.projection.weight",
        *(f"model.vit.layers.{i}.attention.{leaf}.weight" for i in range(2) for leaf in leaves),
        *(f"model.vit.layers.{i}.mlp.{leaf}.weight" for i in range(2) for leaf in ("fc1", "fc2")),
    }
    v = torch.randn(layout.d)
    expanded = layout.views(expand_means(layout, v))
    q = layout.views(v)["model.vit.layers.1.attention.q_proj.weight"]
    expected = torch.stack([q[:4].mean(), q[4:].mean()]).repeat_interleave(4)[:, None].expand(8, 8)
    torch.testing.assert_close(expanded["model.vit.layers.1.attention.q_proj.weight"], expected)
    positions = layout.views(v)["model.vit.embeddings.position_embeddings"]
    expected = positions.mean(2, keepdim=True).expand_as(positions)
    torch.testing.assert_close(expanded["model.vit.embeddings.position_embeddings"], expected)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-text"])
def test_gpt2_curvature_blocks_and_slabs(name: str) -> None:
    module, kind, (length,) = build(name)
    layout = Layout.of(module, TINY_GPT2.roles(module))
    dim, heads = 8, 2
    vocabulary, head = (CLASSES, 0) if kind == "language" else (256, CLASSES)
    layer = (2 * heads + dim + 3 * dim) + (dim + dim) + (4 * dim + 4 * dim) + (dim + dim) + 4
    assert CurvatureBlocks(layout, "hessian").size == vocabulary + length + 2 * layer + 2 + head
    slabs = {(s.count, s.rows, s.cols, s.scale) for s in layout.slabs}
    assert slabs == {(2, 8, 24, math.sqrt(3)), (2, 8, 8, 1.0), (2, 8, 32, 2.0), (2, 32, 8, 1.0)}
    v = torch.randn(layout.d)
    key = next(e.name for e in layout.entries if e.name.endswith("h.1.attn.c_attn.weight"))
    fused = layout.views(v)[key]
    expected = [fused[:, i : i + 4].mean() for i in range(0, 16, 4) for _ in range(4)]
    expected += [fused[:, j].mean() for j in range(16, 24)]
    torch.testing.assert_close(layout.views(expand_means(layout, v))[key], torch.stack(expected).expand(8, 24))


def expand_means(layout: Layout, v: Tensor) -> Tensor:
    blocks = CurvatureBlocks(layout, "hessian")
    return blocks.expand(blocks.mean(v[None])[0])


@pytest.mark.parametrize(
    ("config", "kind", "shape", "message"),
    [
        (Mlp(), "language", (16,), r"mlp takes images .*not language of shape \(16,\)"),
        (Cnn(), "image", (28, 28), r"\(28, 28\)"),
        (LeNet5(), "image", (1, 3, 8), "at least 4x4 pixels, not 3x8"),
        (ResNet18(groups=3), "image", (3, 8, 8), "width 64 .* groups 3"),
        (Vit(), "image", (3, 30, 32), "30x32 .* patch 4"),
        (Vit(dim=10), "image", (3, 32, 32), "dim 10 .* heads 3"),
        (Vit(), "text", (64,), "vit takes images"),
        (Gpt2(), "image", (3, 8, 8), r"gpt2 takes language or text .* not image"),
        (Gpt2(dim=10), "text", (8,), "dim 10 .* heads 4"),
        (Llama(heads=6, dim=12, key_heads=4), "language", (8,), "heads 6 .* key_heads 4"),
        (Roberta(), "language", (8,), "roberta classifies texts.* not language"),
        (Deit(), "text", (8,), "deit takes images"),
        (Swin(patch=3), "image", (3, 32, 32), "32x32 .* patch 3"),
        (Swin(depths=(2,)), "image", (3, 32, 32), r"depths \(2,\) and heads \(3, 6\)"),
        (Swin(heads=(3, 3)), "image", (3, 32, 32), r"heads \(3, 3\) must double"),
    ],
)
def test_build_refuses_what_the_model_cannot_take(config, kind, shape, message) -> None:
    with pytest.raises(ValueError, match=message):
        config.build(kind, shape, CLASSES)


@pytest.mark.parametrize(
    ("name", "config", "shape"), [("vit", Vit(), (3, 32, 32)), ("gpt2", Gpt2(), (8,))], ids=["vit", "gpt2"]
)
def test_build_without_transformers_says_what_to_install(name, config, shape, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = f"model: {name} needs the transformers package: pip install 'fedkernels[hf]'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        config.build("image" if name == "vit" else "text", shape, CLASSES)


def test_transformers_is_imported_only_to_build_one() -> None:
    code = (
        "import sys; from fedkernels.models import MODELS; MODELS['mlp']().build('image', (1, 2, 2), 2); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
