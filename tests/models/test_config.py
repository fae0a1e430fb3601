import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from neuralforge.errors import ConfigError
from neuralforge.models import ModelConfig, build


def test_parameter_count_is_the_number_of_weights(config):
    assert config.parameter_count() == sum(p.numel() for p in build(config).parameters())


def test_published_sizes():
    gpt2 = ModelConfig("gpt2", 50257, 1024, 768, 12, 12, 12, 3072)
    llama2 = ModelConfig("llama", 32000, 4096, 4096, 32, 32, 32, 11008, tie_embeddings=False)
    llama3 = ModelConfig("llama", 128256, 8192, 4096, 32, 32, 8, 14336, tie_embeddings=False)
    assert gpt2.parameter_count() == 124_439_808
    assert llama2.parameter_count() == 6_738_415_616
    assert llama3.parameter_count() == 8_030_261_248


def test_flops_are_those_of_the_matrix_products(config):
    B, T = 2, 11
    model, tokens = build(config), torch.zeros(B, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        logits = model(tokens)
    # The counter takes attention over T tokens as full; causal attention over 2 T - 1 costs as much.
    assert forward.get_total_flops() == B * T * config.flops_per_token(training=False, context=2 * T - 1)
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        logits.sum().backward()
    assert forward.get_total_flops() + backward.get_total_flops() == B * T * config.flops_per_token(True, 2 * T - 1)


def test_attention_counts_what_each_token_sees():
    c = ModelConfig("gpt2", context=256)
    ends = [c.flops_per_token(False, t) for t in (1, 2, 3)]
    assert ends[2] - ends[1] == ends[1] - ends[0] == 2 * c.n_layers * c.d_model
    assert c.flops_per_token() == c.flops_per_token(True, 256) == 3 * c.flops_per_token(False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "gpt3"}, "'gpt3'; expected one of gpt2, llama"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"d_model": 384.0}, "d_model=384.0; expected a whole number"),
        ({"d_model": 380}, "d_model=380 doesn't divide by model.n_heads=6. Take d_model=378"),
        ({"n_kv_heads": 2}, "n_kv_heads=2 with model.n_heads=6, kind gpt2; expected the same number"),
        ({"kind": "llama", "n_kv_heads": 4}, "a divisor of n_heads"),
        ({"kind": "llama", "d_model": 6 * 3}, "odd"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        dataclasses.replace(ModelConfig(), **changes)
