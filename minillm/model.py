from dataclasses import dataclass
import math
import torch
from torch import nn
from minillm.attention import Attention
from minillm.layers import RMSNorm, SwiGLU
from minillm.rope import rope_cache


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA. Raises ValueError, naming the value, for shapes that do not fit together."""

    vocab_size: int = 1024
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 4
    hidden_dim: int = 344
    max_seq_len: int = 256
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: got {getattr(self, name)}")
        if self.dim % self.n_heads or self.dim // self.n_heads % 2:
            raise ValueError(f"n_heads must divide dim into an even width: got dim={self.dim}, n_heads={self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads: got n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}")


class Block(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)): the pre-norm block of LLaMA (Touvron et al. 2023, section 2.2)."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c.dim, c.n_heads, c.n_kv_heads)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = SwiGLU(c.dim, c.hidden_dim)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """LLaMA (Touvron et al. 2023). Its state dict has the names of transformers' LlamaForCausalLM."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.model = nn.Module()            # the level that Hugging Face's names have
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.model.layers = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.model.norm = RMSNorm(c.dim, c.norm_eps)
        self.lm_head = nn.Linear(c.dim, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        # Not a buffer: .to(bfloat16) would round the angles, and loading on the meta device would lose them.
        self.rope_shape = c.dim // c.n_heads, c.max_seq_len, c.rope_theta
        self.rope = rope_cache(*self.rope_shape)
        self.apply(self.init_weights)

    def init_weights(self, module):
        """Normal(0, 0.02) as GPT-2; the two layers of a block that write to the residual stream start 1/sqrt(2 n_layers) smaller."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, Block):
            for layer in (module.self_attn.o_proj, module.mlp.down_proj):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * self.config.n_layers))

    def forward(self, ids, caches=None, start=0):
        """ids (b, t), integers at positions start to start + t -> logits (b, t, vocab_size).

        caches: one a layer, see Attention. Raises ValueError if start + t exceeds max_seq_len, TypeError if ids are not integers.
        """
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids must be int64 or int32 token ids: got {ids.dtype}")
        end = start + ids.shape[-1]
        if end > self.config.max_seq_len:
            raise ValueError(f"sequence of {end} tokens is longer than max_seq_len={self.config.max_seq_len}")
        if self.rope[0].device != ids.device:
            self.rope = rope_cache(*self.rope_shape, device=ids.device)
        cos, sin = (z[start:end] for z in self.rope)
        x = self.model.embed_tokens(ids)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, caches[i] if caches else None)
        return self.lm_head(self.model.norm(x))
