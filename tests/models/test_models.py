"""The models: sizes, gradients against torch.autograd, generation, initialisation."""

import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import neuralforge as nf
from neuralforge.errors import ConfigError
from neuralforge.models import ModelConfig, build, generate, next_token_loss

CONFIGS = {
    "gpt2": ModelConfig("gpt2", 67, 16, 48, 3, 4, 4, 96),
    "gpt2-untied": ModelConfig("gpt2", 67, 16, 48, 2, 4, 4, 96, tie_embeddings=False),
    "llama": ModelConfig("llama", 67, 16, 48, 3, 4, 4, 96),
    "llama-grouped": ModelConfig("llama", 67, 16, 48, 2, 4, 2, 96, tie_embeddings=False),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def test_parameter_count(config):
    assert sum(p.numel() for p in build(config).parameters()) == config.parameter_count()


def test_flops_are_those_of_the_products(config):
    model, tokens = build(config), torch.zeros(2, 16, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens)
    causal = config.flops_per_token(training=False) * 32
    attention = 2 * 2 * 32 * config.n_layers * config.d_model * 16  # PyTorch counts all pairs, we the causal ones
    ours_attention = 2 * 32 * config.n_layers * (2 * config.d_model * 17 // 2)
    assert counter.get_total_flops() - attention == causal - ours_attention


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


def test_build_is_deterministic_and_leaves_the_global_generator(config):
    state = torch.get_rng_state()
    a, b, c = build(config, 1), build(config, 1), build(config, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.tokens.weight, c.tokens.weight)
    assert abs(a.tokens.weight.std() - 0.02) < 0.002


def test_the_future_is_not_seen(config):
    model = build(config)
    tokens = torch.randint(0, config.vocab_size, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % config.vocab_size
    assert torch.allclose(model(tokens)[0, :10], model(changed)[0, :10], atol=1e-6)


def test_generation_with_the_cache_equals_generation_without(config):
    model = build(config).double()
    start = torch.randint(0, config.vocab_size, (2, 5))
    expected = start
    for _ in range(11):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    columns = []
    assert torch.equal(generate(model, start, 11, temperature=0, on_token=columns.append), expected)
    assert torch.equal(torch.stack(columns, 1), expected[:, 5:])


def test_generation_beyond_the_context_and_sampling(config):
    model = build(config)
    start = torch.randint(0, config.vocab_size, (2, 40))  # longer than the context
    draw = lambda seed: generate(model, start, 30, 1.0, 5, torch.Generator().manual_seed(seed))
    assert draw(0).shape == (2, 70)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert model.training


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"d_model": 50, "n_heads": 4, "n_kv_heads": 4}, r"d_model=50 doesn't divide by model.n_heads=4. Take d_model=48"),
        ({"kind": "gpt3"}, "gpt3"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"kind": "llama", "n_kv_heads": 4}, "a divisor of n_heads"),
        ({"n_kv_heads": 3}, "the same number"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_sizes_that_do_not_fit(bad, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**bad)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": 0}])
def test_bad_sampling(bad):
    with pytest.raises(ConfigError, match="generate"):
        generate(build(CONFIGS["gpt2"]), torch.zeros(1, 1, dtype=torch.int64), 1, **bad)
