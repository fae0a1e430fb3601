"""Keys and values of the tokens a model has seen, for generation.

Shapes: B batch, H query heads, G key/value heads, T new tokens, S all tokens, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class KeyValueCache:
    """Room for `capacity` tokens. `length` is the number of tokens seen in finished passes."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def extend(self, layer: int, k_BGTK: torch.Tensor, v_BGTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values of a layer; returns all of them, [B, G, S, K]."""
        if layer not in self._layers:
            B, G, _, K = k_BGTK.shape
            self._layers[layer] = k_BGTK.new_empty(B, G, self.capacity, K), v_BGTK.new_empty(B, G, self.capacity, K)
        keys, values = self._layers[layer]
        S = self.length + k_BGTK.shape[2]
        keys[:, :, self.length : S], values[:, :, self.length : S] = k_BGTK, v_BGTK
        return keys[:, :, :S], values[:, :, :S]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KeyValueCache | None, layer: int, dropout: float = 0.0
) -> torch.Tensor:
    """Causal attention of queries [B, H, T, K] on keys and values [B, G, T, K] and the cached ones before them; H a
    multiple of G. Returns [B, H, T, K]."""
    grouped = k.shape[1] != q.shape[1]
    if cache is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=grouped)
    k, v = cache.extend(layer, k, v)
    T, S = q.shape[2], k.shape[2]
    mask_TS = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if T > 1 else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS, dropout_p=dropout, enable_gqa=grouped)
