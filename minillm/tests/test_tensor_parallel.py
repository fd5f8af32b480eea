"""The layers of tensor parallelism one by one, and what they refuse."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.attention import Attention
from minillm.collectives import LocalGroup
from minillm.layers import SwiGLU
from minillm.model import Llama, LlamaConfig
from minillm.parallel import ColumnParallelLinear, RowParallelLinear    # also found there
from minillm.rope import rope_cache
from minillm.tensor_parallel import (ParallelAttention, ParallelSwiGLU, TensorParallelLlama,
                                     VocabParallelEmbedding, copy_in, parallel_cross_entropy,
                                     sum_out)

CONFIG = LlamaConfig(vocab_size=32, dim=32, n_layers=2, n_heads=8, n_kv_heads=4, hidden_dim=24,
                     max_seq_len=16)


def copies(x, n):
    return [x.clone().requires_grad_() for _ in range(n)]


def test_f_and_g_are_each_others_mirror():
    group, xs = LocalGroup(3), [torch.full((2,), 10.0**r, requires_grad=True) for r in range(3)]
    for out in sum_out(group, xs):
        assert out.tolist() == [111, 111]
    torch.autograd.backward([(r + 1) * y.sum() for r, y in enumerate(sum_out(group, xs))])
    assert [x.grad.tolist() for x in xs] == [[1, 1], [2, 2], [3, 3]]
    xs = copies(torch.ones(2), 3)
    torch.autograd.backward([(r + 1) * y.sum() for r, y in enumerate(copy_in(group, xs))])
    assert [x.grad.tolist() for x in xs] == [[6, 6]] * 3


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("layer", ["attention", "mlp"])
def test_layers_are_the_whole_ones(layer, n):
    torch.manual_seed(0)
    group, x = LocalGroup(n), torch.randn(2, 7, 32)
    if layer == "attention":
        whole = Attention(32, 8, 4)
        parts, more = ParallelAttention(group, whole), tuple(z[:7] for z in rope_cache(4, 16))
    else:
        whole, more = SwiGLU(32, 24), ()
        parts = ParallelSwiGLU(group, whole)
    one, xs, weights = x.clone().requires_grad_(), copies(x, n), torch.randn(2, 7, 32)
    (whole(one, *more) * weights).sum().backward()
    outs = parts(xs, *more)
    torch.autograd.backward([(out * weights).sum() for out in outs])
    for out, mine in zip(outs, xs):
        torch.testing.assert_close(out, whole(x, *more))
        torch.testing.assert_close(mine.grad, one.grad)


def test_several_matrices_are_cut_one_by_one():
    """And not after they were put below one another."""
    q, k = torch.arange(8.0)[:, None], 100 + torch.arange(4.0)[:, None]
    layer = ColumnParallelLinear(LocalGroup(2), q, k)
    assert [w.flatten().tolist() for w in layer.weights] == [
        [0, 1, 2, 3, 100, 101], [4, 5, 6, 7, 102, 103]]


def test_parts_are_copies():
    """Training the parts leaves the model that was cut as it was."""
    weight = nn.Parameter(torch.zeros(4, 4))
    layers = (ColumnParallelLinear(LocalGroup(2), weight), RowParallelLinear(LocalGroup(2), weight),
              VocabParallelEmbedding(LocalGroup(2), weight))
    for layer in layers:
        for w in layer.weights:
            assert w.requires_grad and w.is_contiguous()
            w.data.add_(1)
    assert weight.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_loss_is_cross_entropy(n, dtype):
    numbers = torch.Generator().manual_seed(n)
    logits = (20 * torch.randn(3, 5, 32, generator=numbers)).to(dtype)
    logits[0, 0, 31], logits[0, 1] = 500, -500
    targets = torch.randint(32, (3, 5), generator=numbers)
    targets[1], targets[2, 2:] = -100, -100
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole.float().flatten(0, 1) if dtype == torch.bfloat16
                               else whole.flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    parts = [z.clone().requires_grad_() for z in logits.chunk(n, -1)]
    losses = parallel_cross_entropy(LocalGroup(n), parts, targets)
    torch.autograd.backward(losses)
    for loss in losses:
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.cat([z.grad for z in parts], -1), whole.grad)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_bytes(tied):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**{**vars(CONFIG), "tie_embeddings": tied}))
    ids = torch.randint(32, (3, 8))
    for n in 2, 4:
        group = LocalGroup(n)
        parallel = TensorParallelLlama(group, model)
        torch.testing.assert_close(torch.cat(parallel(ids), -1), model(ids))
        held = sum(p.numel() for p in parallel.parameters())
        norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
        assert held == sum(p.numel() for p in model.parameters()) + (n - 1) * norms
        group.sent = dict.fromkeys(group.ranks, 0)
        torch.autograd.backward(parallel.loss(ids, ids))
        times = (4 * CONFIG.n_layers + 2) * CONFIG.dim + 3          # numbers per token
        assert group.sent[0] == 2 * (n - 1) * times * ids.numel() * 4 / n


@pytest.mark.parametrize("changes, n, said", [
    ({"n_kv_heads": 2}, 4, "4 ranks cannot share 2 key-value heads"),
    ({}, 8, "8 ranks cannot share 4 key-value heads"),
    ({"vocab_size": 33}, 2, "33 tokens of the vocabulary cannot be cut into 2 equal parts"),
    ({"hidden_dim": 26}, 4, "26 outputs cannot be cut into 4 equal parts"),
])
def test_what_cannot_be_cut_is_refused(changes, n, said):
    with pytest.raises(ValueError, match=said):
        TensorParallelLlama(LocalGroup(n), Llama(LlamaConfig(**{**vars(CONFIG), **changes})))
