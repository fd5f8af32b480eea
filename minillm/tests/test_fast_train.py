"""Blocks by hand and the loss in parts: the loss and all gradients of the plain model, for every shape, or the plain model itself."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm import fast_train
from minillm.fast_train import AttentionHalf, BlockByHand, FeedForwardHalf, LinearCrossEntropy, by_hand, chunked_loss, tiles
from minillm.generate import make_caches
from minillm.lora import add_lora
from minillm.model import Llama, LlamaConfig
from minillm.quantize import quantize_model
from minillm.rope import rope_cache
from minillm.train import token_loss


def build(seed=0, dtype=torch.float32, std=0.3, **shape):
    """A model with weights so large, and gains so different, that no part of a gradient is small enough to hide."""
    torch.manual_seed(seed)
    small = {"vocab_size": 53, "dim": 32, "n_layers": 2, "n_kv_heads": 2, "hidden_dim": 40, "max_seq_len": 640}
    model = Llama(LlamaConfig(**small | shape))
    for p in model.parameters():
        nn.init.normal_(p, 0, std) if p.ndim == 2 else nn.init.uniform_(p, 0.5, 1.5)
    return model.to(dtype)


def batch(b=3, t=20, masked="some", vocab=53):
    ids = torch.randint(vocab, (b, t + 1), generator=torch.Generator().manual_seed(b * t))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    hidden = {"none": slice(0, 0), "some": (slice(None), slice(0, t // 3)), "row": 0, "all": slice(None)}[masked]
    targets[hidden] = -100
    return inputs, targets


def gradients(model, loss, data, precision="float32", forward=None):
    """The loss, and {name: gradient}, of the parameters of `model`; forward: what is called instead of it."""
    model.zero_grad()
    value = loss(forward or model, *data, precision)
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, plain, tolerance):
    """Two results of `gradients`: each parameter's own gradient agrees, relative to its size. One that
    is nothing but rounding, as of queries where there is one key to look at, is measured by the
    largest."""
    assert ours[0] == pytest.approx(plain[0], rel=tolerance) and ours[1].keys() == plain[1].keys()
    largest = max(torch.linalg.vector_norm(grad) for grad in plain[1].values())
    for name, grad in plain[1].items():
        gap, size = (torch.linalg.vector_norm(z) for z in (ours[1][name] - grad, grad))
        assert ours[1][name].dtype == grad.dtype
        assert gap <= tolerance * max(size, 0.1 * largest), f"{name}: off by {gap:.1e} of {size:.1e}"


def by_both(model, data):
    return gradients(model, chunked_loss, data, forward=by_hand(model)), gradients(model, token_loss, data)


@pytest.fixture
def in_float64(monkeypatch):
    """The plain model computes norms, rotations and its loss in float32, whatever its dtype. Here it does so in float64."""
    def make(**shape):
        model = build(dtype=torch.float64, **shape)
        model.rope = tuple(z.double() for z in model.rope)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return model
    return make


@pytest.mark.parametrize("shape", [{"n_kv_heads": 4}, {}, {"n_kv_heads": 1}, {"tie_embeddings": True}, {"n_heads": 1, "n_kv_heads": 1},
                                   {"dim": 24, "n_heads": 6, "n_kv_heads": 3, "hidden_dim": 7, "n_layers": 3, "vocab_size": 101},
                                   {"norm_eps": 0.5, "rope_theta": 50.0}])
def test_every_shape(shape, in_float64):
    data = batch(5, 70)
    for dtype in (torch.float32, torch.float64):             # both against statistics, rotations and a loss in float32
        assert_same(*by_both(build(dtype=dtype, **shape), data), 2e-5)
    assert_same(*by_both(in_float64(**shape), data), 1e-11)


@pytest.mark.parametrize("b, t", [(3, 1), (1, 5), (3, 63), (4, 64), (5, 65), (1, 130), (5, 256), (9, 129)])
def test_every_length_and_batch(b, t, in_float64):
    assert_same(*by_both(build(), batch(b, t)), 2e-5)
    assert_same(*by_both(in_float64(n_layers=1), batch(b, t)), 1e-11)


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
    attention = block.input_layernorm.weight, *block.self_attn.parameters()
    feed = block.post_attention_layernorm.weight, *block.mlp.parameters()
    assert torch.autograd.gradcheck(lambda x, *w: AttentionHalf.apply(x, cos, sin, 1e-2, x.dtype, *w), (x, *attention), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x, *w: FeedForwardHalf.apply(x, 1e-2, x.dtype, *w), (x.flatten(0, 1), *feed), fast_mode=True)


def test_the_loss_against_finite_differences_and_as_a_part_of_another():
    x, weight = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (7, 11))
    targets = torch.tensor([3, -100, 10, 0, -100, 3, 5])
    loss = lambda x, weight: LinearCrossEntropy.apply(x, weight, targets, x.dtype)
    assert torch.autograd.gradcheck(loss, (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: 3 * loss(x.tanh(), w) ** 2, (x, weight))


@pytest.mark.parametrize("masked", ["none", "some", "row"])
@pytest.mark.parametrize("b, t", [(3, 20), (5, 256), (8, 256), (7, 300)])            # up to 2100 rows, also exactly 2048
def test_the_loss_in_parts(b, t, masked):
    data, model = batch(b, t, masked), build(n_layers=1)
    nn.init.normal_(model.lm_head.weight, std=50 if masked == "row" else 0.3)           # logits of some hundreds, too
    assert_same(gradients(model, chunked_loss, data), gradients(model, token_loss, data), 1e-5)
    if hasattr(F, "linear_cross_entropy"):
        of_torch = lambda model, inputs, targets, precision: F.linear_cross_entropy(
            model(inputs, head=False).flatten(0, 1), model.lm_head.weight, targets.flatten(), reduction="sum")
        assert_same(gradients(model, chunked_loss, data), gradients(model, of_torch, data), 1e-5)


def test_no_target_counts():
    model = build()
    value, grads = gradients(model, chunked_loss, batch(masked="all"), forward=by_hand(model))
    assert value == 0 and grads.keys() == dict(model.named_parameters()).keys()
    assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("trained", [lambda name: "lm_head" not in name, lambda name: "lm_head" in name])
def test_frozen_parts_get_no_gradient(trained):
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_(trained(name))
    ours, plain = by_both(model, batch())
    assert set(ours[1]) == {name for name, _ in model.named_parameters() if trained(name)}
    assert trained("lm_head") == (chunked_loss(model, *batch()).grad_fn.saved_tensors[1] is not None)          # nor is it computed
    assert_same(ours, plain, 1e-5)


def off(values, exact):
    return torch.linalg.vector_norm(values - exact) / torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 1}, {"tie_embeddings": True}])
def test_bf16_is_as_far_off_as_autocast(shape):
    model, data = build(dim=64, hidden_dim=96, vocab_size=211, n_layers=3, std=0.12, **shape), batch(4, 96, vocab=211)
    flat = lambda *how, **more: torch.cat([g.flatten() for g in gradients(model, *how, **more)[1].values()])
    exact, plain = flat(token_loss, data), flat(token_loss, data, "bf16")
    for loss in (chunked_loss, token_loss):
        assert 0.5 < off(flat(loss, data, "bf16", forward=by_hand(model)), exact) / off(plain, exact) <= 1.1
    value = {(loss, how): loss(model, *data, how).item() for loss in (token_loss, chunked_loss) for how in ("float32", "bf16")}
    assert value[chunked_loss, "bf16"] == pytest.approx(value[token_loss, "bf16"], rel=1e-6) != value[token_loss, "float32"]


def test_where_bf16_rounds():
    block, x = build(dim=64, hidden_dim=96).model.layers[0], torch.randn(500, 64)
    block.post_attention_layernorm.weight.data = 2.0 ** torch.randint(-1, 2, (64,))       # in x or in the weights, such gains change no rounding
    exact = x + block.mlp(block.post_attention_layernorm(x))
    with torch.autocast("cpu", torch.bfloat16):
        plain = x + block.mlp(block.post_attention_layernorm(x))
    ours = FeedForwardHalf.apply(x, 1e-5, torch.bfloat16, block.post_attention_layernorm.weight, *block.mlp.parameters())
    assert off(ours, plain) < 0.2 * off(exact, plain)    # the stream and the norm in float32, each product in bfloat16


def test_the_loss_in_bf16_is_as_far_off_as_autocast():
    torch.manual_seed(0)
    x, weight, targets = torch.randn(8192, 16).requires_grad_(), (torch.randn(50, 16) / 4).requires_grad_(), torch.randint(50, (8192,))
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(x, weight)
    losses = (LinearCrossEntropy.apply(x, weight, targets, torch.bfloat16), F.cross_entropy(logits.float(), targets, reduction="sum"),
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
    assert_same((0, {name: p.grad for name, p in model.named_parameters()}), (0, {name: a[1][name] + b[1][name] for name in a[1]}), 1e-5)


def test_the_twin_shares_the_parameters_and_leaves_the_model_alone():
    for model in (build(), build(tie_embeddings=True)):
        names, twin = model.state_dict().keys(), by_hand(model)
        assert list(map(id, twin.parameters())) == list(map(id, model.parameters())) and twin.config == model.config
        assert all(type(layer) is BlockByHand for layer in twin.model.layers) and model.state_dict().keys() == names
        assert by_hand(twin) is twin                     # a twin holds blocks that are not the course's own


def test_a_twin_still_takes_caches_and_positions():
    model, (ids, _) = build(), batch(2, 12)
    twin, caches, plain = by_hand(model), make_caches(model, 2, 12), make_caches(model, 2, 12)
    with torch.no_grad():
        for start, end in ((0, 7), (7, 12)):
            assert torch.equal(twin(ids[:, start:end], caches, start), model(ids[:, start:end], plain, start))
        assert torch.allclose(twin(ids, start=9), model(ids, start=9), atol=1e-4)


@pytest.mark.parametrize("change", [
    lambda m: add_lora(m, rank=2, alpha=4).requires_grad_(True), lambda m: quantize_model(m),
    lambda m: m.model.layers[1].mlp.register_forward_hook(lambda *args: None),
    lambda m: m.model.norm.register_forward_pre_hook(lambda *args: None),
    lambda m: m.model.layers[0].mlp.up_proj.weight.requires_grad_(False),
    lambda m: setattr(m, "__class__", type("Mine", (Llama,), {})),
    lambda m: setattr(m.model.layers[1].self_attn, "o_proj", nn.Sequential(nn.Linear(32, 32, bias=False))), lambda m: m.to("meta"),
    lambda m: m.model.layers[0].mlp.register_full_backward_hook(lambda *args: None),
    lambda m: m.model.layers[0].mlp.register_full_backward_pre_hook(lambda *args: None), lambda m: m.bfloat16(), lambda m: m.lm_head.double(),
    lambda m: setattr(m.model.layers[0].self_attn, "forward", lambda x, *rest: x), lambda m: setattr(m, "lm_head", nn.Linear(32, 53))],
    ids=["lora", "int8", "hook", "pre-hook", "frozen", "subclass", "other part", "not on a CPU", "backward hook", "backward pre-hook",
         "bf16", "two dtypes", "patched", "bias"])
def test_falls_back_to_the_model_itself(change):
    model = build()
    assert by_hand(model) is not model
    change(model)
    assert by_hand(model) is model


def test_long_texts_take_the_plain_block(monkeypatch):
    calls, model, apply = [], build(n_layers=1), AttentionHalf.apply
    monkeypatch.setattr(AttentionHalf, "apply", lambda x, *rest: calls.append(x.shape[1]) or apply(x, *rest))
    for t in (512, 513, 600):
        assert_same(*by_both(model, batch(1, t)), 2e-5)
    assert calls == [512]


def test_a_step_holds_less_memory():
    peak_memory = pytest.importorskip("minillm.bench.memory").peak_memory
    model, data = build(dim=128, hidden_dim=344, vocab_size=1024, n_kv_heads=4), batch(4, 256, "none", vocab=1024)
    plain = peak_memory(lambda: gradients(model, token_loss, data))
    blocks, both = (peak_memory(lambda: gradients(model, loss, data, forward=by_hand(model))) for loss in (token_loss, chunked_loss))
    assert both < 0.95 * blocks < 0.95 * plain and both < 0.9 * plain, (plain, blocks, both)
    model, data = build(n_layers=1, vocab_size=2000), batch(16, 256, "none", vocab=2000)
    assert peak_memory(lambda: gradients(model, chunked_loss, data)) < 0.4 * peak_memory(lambda: gradients(model, token_loss, data))
