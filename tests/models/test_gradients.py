"""Gradients of the models equal torch.autograd's in float64, eagerly and compiled."""

import pytest
import torch
from torch.func import functional_call

import neuralforge as nf
from neuralforge.models import ModelConfig, build, next_token_loss

CONFIGS = {
    "gpt2": ModelConfig("gpt2", 67, 16, 48, 3, 4, 4, 96),
    "gpt2-untied": ModelConfig("gpt2", 67, 16, 48, 2, 4, 4, 96, tie_embeddings=False),
    "llama": ModelConfig("llama", 67, 16, 48, 3, 4, 4, 96),
    "llama-grouped": ModelConfig("llama", 67, 16, 48, 2, 4, 2, 96, tie_embeddings=False),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def test_gradients_equal_torch_autograd(config):
    torch.manual_seed(0)
    model = build(config).double()
    with torch.no_grad():  # away from the symmetric start, so that every gradient is far from zero
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    tokens = torch.randint(0, config.vocab_size, (2, 17))
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params):
        return next_token_loss(functional_call(model, params, (tokens[:, :-1],)), tokens[:, 1:])

    expected = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
    expected.backward()
    for differentiate in (nf.value_and_grad(loss), nf.jit(nf.value_and_grad(loss))):
        value, grads = differentiate(params)
        assert abs(value - expected) < 1e-12
        for name, p in model.named_parameters():
            assert (grads[name] - p.grad).norm() <= 1e-10 * p.grad.norm(), name
