import dataclasses

import torch

from neuralforge.models import ModelConfig, build
from neuralforge.models.llama import rotary, rotate


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    cos, sin = rotary(0, 60, 16, 100.0, torch.device("cpu"))
    turned_q, turned_k = rotate(q.expand(60, 16), cos, sin), rotate(k.expand(60, 16), cos, sin)
    score = turned_q @ turned_k.T
    for distance in (0, 1, 17):
        diagonal = score.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert (score[5, 5] - score[5, 4]).abs() > 1e-3


def test_rotary_starts_anywhere():
    whole = rotary(0, 20, 8, 1e4, torch.device("cpu"))
    part = rotary(13, 7, 8, 1e4, torch.device("cpu"))
    for w, p in zip(whole, part):
        torch.testing.assert_close(w[13:], p, rtol=0, atol=0)


def test_grouped_heads_are_shared_heads():
    """Two key/value heads for four query heads equal four of them, each written twice."""
    grouped = ModelConfig("llama", 64, 16, 32, 2, 4, 2, 48, tie_embeddings=False)
    few, many = build(grouped).double(), build(dataclasses.replace(grouped, n_kv_heads=4)).double()
    weights = few.state_dict()
    for name in weights:
        if name.endswith(("attention.k.weight", "attention.v.weight")):
            weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    many.load_state_dict(weights)
    tokens = torch.arange(16).view(1, 16)
    torch.testing.assert_close(few(tokens), many(tokens), rtol=1e-12, atol=1e-14)
