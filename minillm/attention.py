import torch
from torch import nn
import torch.nn.functional as F
from einops import rearrange
from minillm.rope import apply_rope


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries.

    n_kv_heads < n_heads lets groups of n_heads / n_kv_heads query heads share a key and a value head (GQA, Ainslie et al.
    2023); 1 is multi-query attention (Shazeer 2019). Raises ValueError if n_heads does not divide dim or n_kv_heads not n_heads.
    """

    def __init__(self, dim, n_heads, n_kv_heads=None):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if dim % n_heads:
            raise ValueError(f"dim must be a multiple of n_heads: got dim={dim}, n_heads={n_heads}")
        if n_heads % n_kv_heads:
            raise ValueError(f"n_heads must be a multiple of n_kv_heads: got n_heads={n_heads}, n_kv_heads={n_kv_heads}")
        self.head_dim = dim // n_heads
        self.q_proj = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * self.head_dim, dim, bias=False)

    def forward(self, x, cos, sin, cache=None):
        """x (b, t, d) -> (b, t, d); cos, sin (t, k/2): the angles of the positions of x.

        A cache is any object whose append(k, v) returns the keys and values (b, h, s, k) of all s positions so far.
        """
        q, k, v = (rearrange(p(x), "b t (h k) -> b h t k", k=self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)
        out = attend(q, k, v)
        return self.o_proj(rearrange(out, "b h t k -> b t (h k)"))


def attend(q, k, v):
    """Causal attention of the last t positions, q (b, h, t, k), to all s, k and v (b, g, s, k), where g divides h.

    The result is (b, h, t, k). SDPA's is_causal aligns the mask at the top left, which is right only for t = s.
    """
    t, s = q.shape[-2], k.shape[-2]
    if q.shape[1] != k.shape[1]:
        k, v = (z.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for z in (k, v))
    mask = None if t == s or t == 1 else torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=t == s and t > 1)
