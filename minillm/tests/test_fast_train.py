"""Blocks by hand and the loss in parts: the loss and all gradients of the plain model, for every
shape, or the plain model itself."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm import fast_train
from minillm.fast_train import (AttentionHalf, BlockByHand, FeedForwardHalf, LinearCrossEntropy,
                                by_hand, chunked_loss, tiles)
from minillm.generate import make_caches
from minillm.lora import add_lora
from minillm.model import Llama, LlamaConfig
from minillm.quantize import quantize_model
from minillm.rope import rope_cache
from minillm.train import token_loss


def build(seed=0, dtype=torch.float32, std=0.3, **shape):
    """A model with weights so large, and gains so different, that no part of a gradient is small
    enough to hide."""
    torch.manual_seed(seed)
    small = {"vocab_size": 53, "dim": 32, "n_layers": 2, "n_kv_heads": 2, "hidden_dim": 40,
             "max_seq_len": 640}
    model = Llama(LlamaConfig(**small | shape))
    for p in model.parameters():
        nn.init.normal_(p, 0, std) if p.ndim == 2 else nn.init.uniform_(p, 0.5, 1.5)
    return model.to(dtype)


def batch(b=3, t=20, masked="some", vocab=53):
    ids = torch.randint(vocab, (b, t + 1), generator=torch.Generator().manual_seed(b * t))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    if masked == "some":
        targets[:, :t // 3] = -100
    elif masked == "row":
        targets[0] = -100
    elif masked == "all":
        targets[:] = -100
    return inputs, targets


def gradients(model, loss, data, precision="float32", forward=None):
    """The loss, and {name: gradient}, of the parameters of `model`; forward: what is called instead
    of it."""
    model.zero_grad()
    value = loss(forward or model, *data, precision)
    value.backward()
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    return value.item(), {name: p.grad.clone() for name, p in trained.items()}


def assert_same(ours, plain, tolerance):
    """Two results of `gradients`: each parameter's own gradient agrees, relative to its size. One
    that is nothing but rounding, as of queries where there is one key to look at, is measured by
    the largest."""
    assert ours[0] == pytest.approx(plain[0], rel=tolerance)
    assert ours[1].keys() == plain[1].keys()
    largest = max(torch.linalg.vector_norm(grad) for grad in plain[1].values())
    for name, grad in plain[1].items():
        gap, size = (torch.linalg.vector_norm(z) for z in (ours[1][name] - grad, grad))
        assert ours[1][name].dtype == grad.dtype
        limit = tolerance * max(size, 0.1 * largest)
        assert gap <= limit, f"{name}: off by {gap:.1e} of {size:.1e}"


def by_both(model, data):
    ours = gradients(model, chunked_loss, data, forward=by_hand(model))
    return ours, gradients(model, token_loss, data)


@pytest.fixture
def in_float64(monkeypatch):
    """The plain model computes norms, rotations and its loss in float32, whatever its dtype. Here
    it does so in float64."""
    def make(**shape):
        model = build(dtype=torch.float64, **shape)
        model.rope = tuple(z.double() for z in model.rope)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return model
    return make


# Relative errors of gradients, each a few times that of rounding alone: of float32 and of float64.
ROUNDING, ROUNDING_64 = 2e-5, 1e-11


@pytest.mark.parametrize("shape", [
    {"n_kv_heads": 4}, {}, {"n_kv_heads": 1}, {"tie_embeddings": True},
    {"n_heads": 1, "n_kv_heads": 1},
    {"dim": 24, "n_heads": 6, "n_kv_heads": 3, "hidden_dim": 7, "n_layers": 3, "vocab_size": 101},
    {"norm_eps": 0.5, "rope_theta": 50.0}])
def test_every_shape(shape, in_float64):
    data = batch(5, 70)
    # Both against statistics, rotations and a loss in float32.
    for dtype in (torch.float32, torch.float64):
        assert_same(*by_both(build(dtype=dtype, **shape), data), ROUNDING)
    assert_same(*by_both(in_float64(**shape), data), ROUNDING_64)


@pytest.mark.parametrize("b, t", [(3, 1), (1, 5), (3, 63), (4, 64), (5, 65), (1, 130), (5, 256),
                                  (9, 129)])
def test_every_length_and_batch(b, t, in_float64):
    assert_same(*by_both(build(), batch(b, t)), ROUNDING)
    assert_same(*by_both(in_float64(n_layers=1), batch(b, t)), ROUNDING_64)


@pytest.mark.parametrize("t", [1, 64, 65, 200])
def test_tiles_cover_what_the_mask_leaves_once(t):
    seen = torch.zeros(t, t, dtype=torch.int)
    for i, j in tiles(t):
        seen[i, j] += 1
    assert seen.max() == 1 and torch.equal(seen.tril(), torch.ones_like(seen).tril())
    assert t < 128 or seen.float().mean() < 0.75


def test_the_halves_against_finite_differences(monkeypatch):
    monkeypatch.setattr(fast_train, "QUERIES", 2)
    block = build(dim=8, n_heads=4, n_layers=1, hidden_dim=5, dtype=torch.float64).model.layers[0]
    cos, sin = (z.double() for z in rope_cache(2, 5))
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)

    def attention(x, *weights):
        return AttentionHalf.apply(x, cos, sin, 1e-2, x.dtype, *weights)

    def feed(x, *weights):
        return FeedForwardHalf.apply(x, 1e-2, x.dtype, *weights)

    of_attention = block.input_layernorm.weight, *block.self_attn.parameters()
    of_feed = block.post_attention_layernorm.weight, *block.mlp.parameters()
    assert torch.autograd.gradcheck(attention, (x, *of_attention), fast_mode=True)
    assert torch.autograd.gradcheck(feed, (x.flatten(0, 1), *of_feed), fast_mode=True)


def test_the_loss_against_finite_differences_and_as_a_part_of_another():
    x, weight = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (7, 11))
    targets = torch.tensor([3, -100, 10, 0, -100, 3, 5])

    def loss(x, weight):
        return LinearCrossEntropy.apply(x, weight, targets, x.dtype)

    assert torch.autograd.gradcheck(loss, (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: 3 * loss(x.tanh(), w) ** 2, (x, weight))


@pytest.mark.parametrize("masked", ["none", "some", "row"])
@pytest.mark.parametrize("b, t", [(3, 20), (5, 256), (8, 256), (7, 300)])
def test_the_loss_in_parts(b, t, masked):
    """Of up to 2100 rows, also of exactly 2048, and of logits of some hundreds."""
    data, model = batch(b, t, masked), build(n_layers=1)
    nn.init.normal_(model.lm_head.weight, std=50 if masked == "row" else 0.3)
    assert_same(gradients(model, chunked_loss, data), gradients(model, token_loss, data), 1e-5)
    if hasattr(F, "linear_cross_entropy"):
        assert_same(gradients(model, chunked_loss, data), gradients(model, of_torch, data), 1e-5)


def of_torch(model, inputs, targets, precision):
    states = model(inputs, head=False).flatten(0, 1)
    return F.linear_cross_entropy(states, model.lm_head.weight, targets.flatten(), reduction="sum")


def test_no_target_counts():
    model = build()
    value, grads = gradients(model, chunked_loss, batch(masked="all"), forward=by_hand(model))
    assert value == 0 and grads.keys() == dict(model.named_parameters()).keys()
    assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("trained", [lambda name: "lm_head" not in name,
                                     lambda name: "lm_head" in name])
def test_frozen_parts_get_no_gradient(trained):
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_(trained(name))
    ours, plain = by_both(model, batch())
    assert set(ours[1]) == {name for name, _ in model.named_parameters() if trained(name)}
    of_head = chunked_loss(model, *batch()).grad_fn.saved_tensors[1]      # nor is it computed
    assert trained("lm_head") == (of_head is not None)
    assert_same(ours, plain, 1e-5)


def off(values, exact):
    return torch.linalg.vector_norm(values - exact) / torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 1}, {"tie_embeddings": True}])
def test_bf16_is_as_far_off_as_autocast(shape):
    model = build(dim=64, hidden_dim=96, vocab_size=211, n_layers=3, std=0.12, **shape)
    data = batch(4, 96, vocab=211)

    def flat(*how, **more):
        return torch.cat([g.flatten() for g in gradients(model, *how, **more)[1].values()])

    exact, plain = flat(token_loss, data), flat(token_loss, data, "bf16")
    for loss in (chunked_loss, token_loss):
        ours = flat(loss, data, "bf16", forward=by_hand(model))
        assert 0.5 < off(ours, exact) / off(plain, exact) <= 1.1
    value = {(loss, how): loss(model, *data, how).item()
             for loss in (token_loss, chunked_loss) for how in ("float32", "bf16")}
    assert value[chunked_loss, "bf16"] == pytest.approx(value[token_loss, "bf16"], rel=1e-6)
    assert value[chunked_loss, "bf16"] != value[token_loss, "float32"]


def test_where_bf16_rounds():
    block, x = build(dim=64, hidden_dim=96).model.layers[0], torch.randn(500, 64)
    norm = block.post_attention_layernorm
    norm.weight.data = 2.0 ** torch.randint(-1, 2, (64,))     # in x or in weights: no more rounding
    exact = x + block.mlp(norm(x))
    with torch.autocast("cpu", torch.bfloat16):
        plain = x + block.mlp(norm(x))
    ours = FeedForwardHalf.apply(x, 1e-5, torch.bfloat16, norm.weight, *block.mlp.parameters())
    # The stream and the norm are in float32, each product in bfloat16.
    assert off(ours, plain) < 0.2 * off(exact, plain)


def test_the_loss_in_bf16_is_as_far_off_as_autocast():
    torch.manual_seed(0)
    x, weight = torch.randn(8192, 16).requires_grad_(), (torch.randn(50, 16) / 4).requires_grad_()
    targets = torch.randint(50, (8192,))
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(x, weight)
    losses = (LinearCrossEntropy.apply(x, weight, targets, torch.bfloat16),
              F.cross_entropy(logits.float(), targets, reduction="sum"),
              F.cross_entropy(F.linear(x, weight), targets, reduction="sum"))
    for ours, plain, exact in zip(*(torch.autograd.grad(loss, (x, weight)) for loss in losses)):
        assert 0.5 < off(ours, exact) / off(plain, exact) < 1.1


def test_gradients_add_up():
    model, first, second = build(), batch(3, 20), batch(2, 30)
    twin = by_hand(model)
    a, b = (gradients(model, token_loss, data) for data in (first, second))
    model.zero_grad()
    for data in (first, second):
        chunked_loss(twin, *data).backward()
    both = {name: p.grad for name, p in model.named_parameters()}
    assert_same((0, both), (0, {name: a[1][name] + b[1][name] for name in a[1]}), 1e-5)


def test_the_twin_shares_the_parameters_and_leaves_the_model_alone():
    for model in (build(), build(tie_embeddings=True)):
        names, twin = model.state_dict().keys(), by_hand(model)
        assert list(map(id, twin.parameters())) == list(map(id, model.parameters()))
        assert twin.config == model.config and model.state_dict().keys() == names
        assert all(type(layer) is BlockByHand for layer in twin.model.layers)
        assert by_hand(twin) is twin             # a twin holds blocks that are not the course's own


def test_a_twin_still_takes_caches_and_positions():
    model, (ids, _) = build(), batch(2, 12)
    twin, caches, plain = by_hand(model), make_caches(model, 2, 12), make_caches(model, 2, 12)
    with torch.no_grad():
        for start, end in ((0, 7), (7, 12)):
            some = ids[:, start:end]
            assert torch.equal(twin(some, caches, start), model(some, plain, start))
        assert torch.allclose(twin(ids, start=9), model(ids, start=9), atol=1e-4)


def nothing(*args):
    """A hook that changes nothing."""


CHANGES = {
    "lora": lambda m: add_lora(m, rank=2, alpha=4).requires_grad_(True),
    "int8": lambda m: quantize_model(m),
    "hook": lambda m: m.model.layers[1].mlp.register_forward_hook(nothing),
    "pre-hook": lambda m: m.model.norm.register_forward_pre_hook(nothing),
    "frozen": lambda m: m.model.layers[0].mlp.up_proj.weight.requires_grad_(False),
    "subclass": lambda m: setattr(m, "__class__", type("Mine", (Llama,), {})),
    "other part": lambda m: setattr(m.model.layers[1].self_attn, "o_proj",
                                    nn.Sequential(nn.Linear(32, 32, bias=False))),
    "not on a CPU": lambda m: m.to("meta"),
    "backward hook": lambda m: m.model.layers[0].mlp.register_full_backward_hook(nothing),
    "backward pre-hook": lambda m: m.model.layers[0].mlp.register_full_backward_pre_hook(nothing),
    "bf16": lambda m: m.bfloat16(),
    "two dtypes": lambda m: m.lm_head.double(),
    "patched": lambda m: setattr(m.model.layers[0].self_attn, "forward", lambda x, *rest: x),
    "bias": lambda m: setattr(m, "lm_head", nn.Linear(32, 53)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_falls_back_to_the_model_itself(change):
    model = build()
    assert by_hand(model) is not model
    CHANGES[change](model)
    assert by_hand(model) is model


def test_long_texts_take_the_plain_block(monkeypatch):
    calls, model, apply = [], build(n_layers=1), AttentionHalf.apply

    def counted(x, *rest):
        calls.append(x.shape[1])
        return apply(x, *rest)

    monkeypatch.setattr(AttentionHalf, "apply", counted)
    for t in (512, 513, 600):
        assert_same(*by_both(model, batch(1, t)), ROUNDING)
    assert calls == [512]


def test_a_step_holds_less_memory():
    """By what the operations of a step allocate, on any machine alike."""
    peak_memory = pytest.importorskip("minillm.bench.memory").peak_memory

    def peak(loss, forward=None):
        return peak_memory(lambda: gradients(model, loss, data, forward=forward))

    model = build(dim=128, hidden_dim=344, vocab_size=1024, n_kv_heads=4)
    data = batch(4, 256, "none", vocab=1024)
    plain = peak(token_loss)
    blocks, both = peak(token_loss, by_hand(model)), peak(chunked_loss, by_hand(model))
    assert both < 0.95 * blocks < 0.95 * plain and both < 0.9 * plain, (plain, blocks, both)
    model, data = build(n_layers=1, vocab_size=2000), batch(16, 256, "none", vocab=2000)
    assert peak(chunked_loss) < 0.4 * peak(token_loss)
