"""The backward pass keeps no more than torch.autograd's."""

import pytest
import torch
from torch.func import functional_call

import neuralforge as nf
from neuralforge.bench import peak_tensor_bytes
from neuralforge.models import ModelConfig, build, next_token_loss

CONFIGS = [
    ModelConfig("gpt2", 64, 128, 128, 3, 4, 4, 512),
    ModelConfig("gpt2", 2048, 64, 64, 1, 4, 4, 256, tie_embeddings=False),
    ModelConfig("llama", 64, 128, 128, 3, 4, 2, 352),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["gpt2", "gpt2-large-vocabulary", "llama"])
def test_peak_of_a_models_gradient(config):
    model = build(config)
    tokens = torch.randint(0, config.vocab_size, (2, config.context + 1))
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p):
        return next_token_loss(functional_call(model, p, (tokens[:, :-1],)), tokens[:, 1:])

    def with_torch():
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        return torch.autograd.grad(loss(leaves), list(leaves.values()))

    ours, theirs = peak_tensor_bytes(lambda: nf.value_and_grad(loss)(params)), peak_tensor_bytes(with_torch)
    assert ours <= theirs + 1024  # the seed cotangent and such
