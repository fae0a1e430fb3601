"""The backward pass keeps no more than torch.autograd's."""

import pytest
import torch
import torch.nn.functional as F
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


OPERATORS = {
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True), "instance_norm": F.instance_norm,
    "group_norm": lambda x: F.group_norm(x, 4), "layer_norm": lambda x: F.layer_norm(x, (16,)), "softplus": F.softplus,
    "elu": F.elu, "celu": F.celu, "selu": F.selu, "mish": F.mish, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh, "leaky_relu": F.leaky_relu, "logsigmoid": F.logsigmoid, "softshrink": F.softshrink,
    "huber": lambda x: F.huber_loss(x, x.detach().neg(), reduction="none"),
    "smooth l1": lambda x: F.smooth_l1_loss(x, x.detach().neg(), reduction="none"),
    "bce": lambda x: F.binary_cross_entropy(x.sigmoid(), x.detach().sigmoid(), reduction="none"),
    "bce with logits": lambda x: F.binary_cross_entropy_with_logits(x, x.detach().sigmoid(), reduction="none"),
    "maximum": lambda x: torch.maximum(x, x.detach().neg()), "softmax": lambda x: F.softmax(x, 1),
    "heads": lambda x: torch.cat([part.sin() for part in torch.stack([x, x, x]).unbind(0)]).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_peak_of_an_operators_gradient(name):
    torch.manual_seed(0)
    x = torch.randn(16, 8, 16, 16)
    loss = lambda x: OPERATORS[name](x * 2).sum()

    def with_torch():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)

    assert peak_tensor_bytes(lambda: nf.grad(loss)(x)) <= peak_tensor_bytes(with_torch) + 4096
