import pytest
import torch

from neuralforge.errors import ConfigError
from neuralforge.models import ModelConfig, build, generate


def sharp(config: ModelConfig) -> torch.nn.Module:
    """Logits far apart, so that rounding can't change the likeliest token, and not one token again and again."""
    model = build(config, 1).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(12)
    return model


def prompt(length: int) -> torch.Tensor:
    return torch.randint(0, 97, (2, length), generator=torch.Generator().manual_seed(5))


def without_cache(model: torch.nn.Module, tokens: torch.Tensor, new: int) -> torch.Tensor:
    context, window = model.config.context, min(tokens.shape[1], model.config.context)
    for _ in range(new):
        if window > context:
            window = context // 2 + 1
        tokens = torch.cat([tokens, model(tokens[:, -window:])[:, -1:].argmax(-1)], dim=1)
        window += 1
    return tokens


@pytest.mark.parametrize(("length", "new"), [(1, 23), (7, 60), (24, 30), (40, 15)])
def test_greedy_equals_a_model_without_a_cache(config, length, new):
    model = sharp(config)
    expected = without_cache(model, prompt(length), new)
    assert len(expected[0].unique()) > 5
    assert torch.equal(generate(model, prompt(length), new, temperature=0), expected)


def test_sampled_frequencies(config):
    model = build(config, 0)
    with torch.no_grad():
        model.tokens.weight.mul_(20)
    model.eval()
    logits = model(prompt(5)[:1])[0, -1] / 0.7
    drawn = generate(model, prompt(5)[:1].expand(20_000, 5), 1, 0.7, generator=torch.Generator().manual_seed(0))[:, -1]
    share = drawn.bincount(minlength=97) / 20_000
    expected = logits.softmax(0).detach()
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt() + 1e-4).all()


def test_top_k_draws_from_the_k_likeliest(config):
    model = build(config).eval()
    best = set(model(prompt(5)[:1])[0, -1].topk(3).indices.tolist())
    drawn = generate(model, prompt(5)[:1].expand(500, 5), 1, 5.0, top_k=3)[:, -1]
    assert set(drawn.tolist()) == best
    assert generate(model, prompt(3), 2, top_k=1000).shape == (2, 5)


def test_a_generator_decides_and_a_tiny_temperature_is_greedy(config):
    model = sharp(config)
    a, b = (generate(model, prompt(4), 20, generator=torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(generate(model, prompt(4), 20, 1e-38), generate(model, prompt(4), 20, 0))


def test_on_token_and_training_mode(config):
    model, seen = build(config).train(), []
    out = generate(model, prompt(4), 6, on_token=seen.append)
    assert torch.equal(torch.stack(seen, 1), out[:, 4:]) and out.dtype == torch.int64
    assert model.training
    assert torch.equal(generate(model, prompt(4), 0), prompt(4))


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"max_new_tokens": -1}]
)
def test_arguments_out_of_range(config, bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        generate(build(config), prompt(3), **({"max_new_tokens": 1} | bad))
    with pytest.raises(ConfigError, match="time >= 1"):
        generate(build(config), prompt(0), 1)
