import math

import pytest
import torch

from neuralforge.models import ModelConfig, build, next_token_loss


def test_depends_on_the_seed_only(config):
    before = torch.get_rng_state()
    a, b, c = build(config, 3), build(config, 3), build(config, 4)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.tokens.weight, c.tokens.weight)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_spread_of_the_weights(kind):
    model = build(ModelConfig(kind, 512, 64, 192, 4, 4, 4, 768))
    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert torch.equal(p, torch.ones_like(p)), name
        elif name.endswith("bias"):
            assert torch.equal(p, torch.zeros_like(p)), name
        else:  # the standard error of a spread over n numbers is 1/sqrt(2 n) of it
            std = 0.02 / math.sqrt(8) if name.endswith("out.weight") else 0.02
            assert abs(p.std().item() / std - 1) < 5 / math.sqrt(2 * p.numel()), name


def test_loss_is_the_mean_of_minus_log_probability():
    logits = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 6, 3, 3, 1], [2, 2, 5, 0, 4]])
    by_hand = [-math.log(logits[b, t].softmax(0)[targets[b, t]]) for b in range(2) for t in range(5)]
    assert next_token_loss(logits, targets).item() == pytest.approx(sum(by_hand) / 10, rel=1e-14)


def test_an_untrained_model_guesses(config):
    tokens = torch.arange(20).view(1, 20)
    loss = next_token_loss(build(config)(tokens[:, :-1]), tokens[:, 1:])
    assert loss.item() == pytest.approx(math.log(97), abs=0.1)
