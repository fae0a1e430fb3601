"""Keys and values of the tokens a model has seen, for generation."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class KeyValueCache:
    """Grows by the new tokens at each pass. `length` is the number of tokens seen in finished passes."""

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def extend(self, layer: int, k_BHTK: torch.Tensor, v_BHTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new keys and values of a layer; returns all of them."""
        if layer in self._layers:
            old_k, old_v = self._layers[layer]
            k_BHTK, v_BHTK = torch.cat([old_k, k_BHTK], dim=2), torch.cat([old_v, v_BHTK], dim=2)
        self._layers[layer] = k_BHTK, v_BHTK
        return k_BHTK, v_BHTK


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KeyValueCache | None, layer: int, dropout: float = 0.0
) -> torch.Tensor:
    """Causal attention of queries [B, H, T, K] on keys and values [B, G, S, K], S counting the cached tokens before
    the T new ones; H a multiple of G."""
    grouped = k.shape[1] != q.shape[1]
    if cache is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=grouped)
    k, v = cache.extend(layer, k, v)
    T, S = q.shape[2], k.shape[2]
    mask_TS = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS, enable_gqa=grouped)
