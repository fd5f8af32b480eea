"""Attention beyond chapter 02: bad input, grouped queries against a loop, cached chunks."""
import pytest
import torch
import torch.nn.functional as F

from minillm.attention import Attention, attend, causal_mask, padded_mask
from minillm.rope import rope_cache


class ToyCache:
    k = v = None

    def append(self, k, v):
        self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
        return self.k, self.v


def by_loop(q, k, v):
    """One query of one head at a time, in plain sums."""
    out = torch.empty_like(q)
    h, g, t, s = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    for head in range(h):
        kv = head // (h // g)
        for i in range(t):
            seen = s - t + i + 1
            scores = torch.einsum("bk,bsk->bs", q[:, head, i], k[:, kv, :seen]) / q.shape[-1] ** 0.5
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            out[:, head, i] = torch.einsum("bs,bsk->bk", weights, v[:, kv, :seen])
    return out


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("h, g", [(1, 1), (4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("t, s", [(1, 1), (7, 7), (1, 7), (2, 7), (6, 7)])
def test_attend_equals_a_loop(h, g, t, s):
    q, k, v = torch.randn(2, h, t, 8), torch.randn(2, g, s, 8), torch.randn(2, g, s, 8)
    close(attend(q, k, v), by_loop(q, k, v))


@pytest.mark.parametrize("h, g", [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("t", [1, 2, 4, 7])
def test_a_row_with_filler_equals_the_row_alone(h, g, t):
    q, k, v = torch.randn(3, h, t, 8), torch.randn(3, g, 7, 8), torch.randn(3, g, 7, 8)
    padding = torch.tensor([0, 3, 6])
    for row, n in enumerate(padding):
        k[row, :, :n], v[row, :, :n] = 1e4, -1e4
    out = attend(q, k, v, padding)
    assert out.isfinite().all()
    for row, n in enumerate(padding):
        real = min(t, 7 - n)
        alone = by_loop(q[row:row + 1, :, -real:], k[row:row + 1, :, n:], v[row:row + 1, :, n:])
        close(out[row, :, -real:], alone[0])


def test_filler_leaves_two_layers_finite_with_finite_gradients():
    class Hidden:
        padding = torch.tensor([0, 4])

        def append(self, k, v):
            return k, v

    first, second = Attention(32, 4, 2), Attention(32, 4, 2)
    x = torch.randn(2, 6, 32, requires_grad=True)
    cache, turn = Hidden(), rope_cache(8, 6)
    out = second(first(x, *turn, cache), *turn, cache)
    out[1, 4:].square().sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert (x.grad[1, :4] == 0).all() and (x.grad[1, 4:] != 0).any()


@pytest.mark.parametrize("t, s", [(1, 1), (1, 5), (3, 5), (5, 5)])
def test_padded_mask_one_position_at_a_time(t, s):
    padding = torch.arange(s)
    mask = padded_mask(padding, t, s)
    assert mask.shape == (s, 1, t, s)
    for n in range(s):
        for i in range(t):
            here = s - t + i
            assert mask[n, 0, i].tolist() == [n <= j <= here or j == here for j in range(s)]


@pytest.mark.parametrize("t, s", [(5, 5), (3, 5), (1, 5)])
def test_gradients_equal_those_of_a_loop(t, s):
    shapes = (1, 4, t, 4), (1, 2, s, 4), (1, 2, s, 4)
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    ours = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    theirs = torch.autograd.grad(by_loop(q, k, v).square().sum(), (q, k, v))
    for a, b in zip(ours, theirs):
        close(a, b)


@pytest.mark.parametrize("n_kv_heads", [None, 1, 2, 4])
@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 5], [5, 1, 3], [1, 8]])
def test_cached_pieces_equal_the_full_text(n_kv_heads, pieces):
    layer, x = Attention(32, 4, n_kv_heads), torch.randn(2, 9, 32)
    cos, sin = rope_cache(8, 9)
    cache, start, parts = ToyCache(), 0, []
    for part in x.split(pieces, dim=1):
        end = start + part.shape[1]
        parts.append(layer(part, cos[start:end], sin[start:end], cache))
        start = end
    close(torch.cat(parts, dim=1), layer(x, cos, sin))
    assert cache.k.shape == (2, n_kv_heads or 4, 9, 8)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_the_future_leaves_the_past_exactly_as_it_was(n_kv_heads):
    layer, x = Attention(32, 4, n_kv_heads), torch.randn(2, 9, 32)
    cos, sin = rope_cache(8, 9)
    before = layer(x, cos, sin)
    for i in range(1, 9):
        changed = x.clone()
        changed[:, i:] = 1e4 * torch.randn(2, 9 - i, 32)
        assert torch.equal(layer(changed, cos, sin)[:, :i], before[:, :i])


def test_large_scores_stay_finite():
    q = k = 1e3 * torch.randn(1, 2, 6, 8)
    assert attend(q, k, torch.randn(1, 2, 6, 8)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    layer = Attention(32, 4, 2).to(dtype)
    assert layer(torch.randn(2, 5, 32, dtype=dtype), *rope_cache(8, 5)).dtype == dtype


def test_names_and_shapes_of_the_weights():
    shapes = {name: tuple(w.shape) for name, w in Attention(32, 4, 2).state_dict().items()}
    assert shapes == {"q_proj.weight": (32, 32), "k_proj.weight": (16, 32),
                      "v_proj.weight": (16, 32), "o_proj.weight": (32, 32)}


def test_attention_of_any_length_is_one_graph_for_the_compiler():
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="eager")
    for t in (3, 5, 7, 1):
        q, k, v = torch.randn(1, 4, t, 8), torch.randn(1, 2, t, 8), torch.randn(1, 2, t, 8)
        close(compiled(q, k, v), attend(q, k, v))


def test_mask_equals_torchs_lower_right_bias():
    from torch.nn.attention.bias import causal_lower_right
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    mask = causal_lower_right(3, 7)
    close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


@pytest.mark.parametrize("heads, expected", [
    ((30, 4), "got dim=30, n_heads=4"), ((32, 0), "n_heads=0"), ((32, -4), "n_heads=-4"),
    ((0, 4), "dim=0"), ((12, 4), "even width"),
    ((32, 4, 3), "n_kv_heads=3"), ((32, 4, 0), "n_kv_heads=0"), ((32, 4, 8), "n_kv_heads=8"),
    ((32, 4, -2), "n_kv_heads=-2"),
])
def test_wrong_numbers_of_heads(heads, expected):
    with pytest.raises(ValueError, match=expected):
        Attention(*heads)


@pytest.mark.parametrize("shape", [(5, 32), (2, 5, 31), (1, 2, 5, 32)])
def test_wrong_shape_of_x(shape):
    with pytest.raises(ValueError, match=r"shape \(batch, time, 32\)"):
        Attention(32, 4)(torch.randn(shape), *rope_cache(8, 5))


def test_too_few_angles():
    with pytest.raises(ValueError, match="5 tokens"):
        Attention(32, 4)(torch.randn(2, 5, 32), *rope_cache(8, 4))


@pytest.mark.parametrize("h, g, t, s, expected", [
    (4, 3, 5, 5, "3 key-value heads"), (2, 4, 5, 5, "4 key-value heads"), (4, 4, 5, 4, "4 keys"),
])
def test_attend_refuses_what_does_not_fit(h, g, t, s, expected):
    with pytest.raises(ValueError, match=expected):
        attend(torch.randn(1, h, t, 8), torch.randn(1, g, s, 8), torch.randn(1, g, s, 8))


@pytest.mark.parametrize("q, k, v", [
    ((4, 5, 8), (4, 5, 8), (4, 5, 8)), ((1, 4, 5, 8), (4, 5, 8), (4, 5, 8)),
    ((1, 4, 5, 8), (2, 4, 5, 8), (2, 4, 5, 8)), ((1, 4, 5, 8), (1, 4, 5, 6), (1, 4, 5, 6)),
    ((1, 4, 5, 8), (1, 4, 5, 8), (1, 2, 5, 8))])
def test_attend_names_the_shapes_that_do_not_fit_together(q, k, v):
    """A missing batch dimension, other batches, widths or heads of values."""
    with pytest.raises(ValueError, match="batch, heads, time, width") as refused:
        attend(*(torch.randn(shape) for shape in (q, k, v)))
    assert f"got {q}, {k}, {v}" in str(refused.value)


@pytest.mark.parametrize("t, s", [(0, 3), (4, 3), (-1, 3)])
def test_causal_mask_refuses_more_queries_than_keys(t, s):
    with pytest.raises(ValueError, match=f"got t={t}, s={s}"):
        causal_mask(t, s)
