import torch


def rope_cache(head_dim, max_seq_len, theta=10000.0, device=None):
    """cos and sin of the angles position * theta^(-2i/head_dim), each (max_seq_len, head_dim / 2), in float32.

    RoFormer (Su et al. 2021), section 3.2.2. Raises ValueError if head_dim is odd.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, since RoPE turns pairs of numbers: got {head_dim}")
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(max_seq_len, dtype=torch.float32, device=device), frequency)
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Turn the pairs (x[i], x[i + k/2]) of x (..., t, k) by the angles of their positions; cos, sin (>= t, k/2).

    Row j of x is at the position of row j of cos. The pairs are those of Hugging Face (halves), not of the LLaMA
    release (neighbours). Computed in float32, returned in the dtype of x. Raises ValueError if t exceeds the rows.
    """
    t = x.shape[-2]
    if t > cos.shape[0]:
        raise ValueError(f"sequence of {t} tokens is longer than the {cos.shape[0]} positions of the rotary cache")
    cos, sin = cos[:t], sin[:t]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)
