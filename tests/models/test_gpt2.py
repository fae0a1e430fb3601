"""What GPT-2 and Llama share is tested on both; their arithmetic in test_huggingface.py."""

import dataclasses

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from neuralforge.models import build


def test_no_token_sees_the_future(config):
    model = build(config).double()
    tokens = torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 97
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :8], b[:, :8], rtol=0, atol=1e-14)
    assert (a[:, 8] - b[:, 8]).abs().max() > 1e-3


def test_runs_on_fake_tensors(config):
    with FakeTensorMode():
        huge = dataclasses.replace(config, vocab_size=10**9)
        logits = build(huge)(torch.zeros(5, config.context, dtype=torch.int64))
    assert logits.shape == (5, config.context, 10**9) and logits.dtype == torch.float32


def test_parameters_are_all_there_is(config):
    """A training step sees the parameters and nothing else, each once."""
    model, other = build(config, 1), build(config, 2)
    tokens = torch.arange(10).view(1, 10)
    params = dict(model.named_parameters())
    assert model.state_dict().keys() == params.keys()
    assert torch.equal(functional_call(other, params, (tokens,)), model(tokens))


def test_every_parameter_gets_a_gradient(config):
    model = build(config)
    model(torch.arange(config.context).view(1, -1)).square().mean().backward()
    dead = {name for name, p in model.named_parameters() if not p.grad.abs().max() > 0}
    assert not dead


def test_dropout_only_when_training(config):
    model = build(dataclasses.replace(config, dropout=0.5))
    tokens = torch.arange(10).view(1, 10)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
