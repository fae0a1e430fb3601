"""Operators that lay out their results otherwise than PyTorch's fake ones say."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf

WINDOWS = torch.arange(16).view(2, 1, 2, 4).mul(2).remainder(32).expand(2, 3, 2, 4).to(memory_format=torch.channels_last)
OPERATORS = {
    "batch norm": lambda x: F.batch_norm(x.flatten(2), None, None, training=True),
    "batch norm that isn't training": lambda x: F.batch_norm(x.flatten(2), x[0].mean((1, 2)), x[0].square().sum((1, 2))),
    "unpooling": lambda x: F.max_unpool2d(x, WINDOWS, 2),
    "ldexp": lambda x: torch.ldexp(x, x.mT.contiguous().mT),
}
READERS = {
    "itself": lambda y: y,
    "flat": lambda y: y.reshape(-1),
    "the last dimensions exchanged": lambda y: y.transpose(1, -1).reshape(y.shape[0], -1),
    "arithmetic": lambda y: (y.transpose(1, -1) * 2 + 1).reshape(-1),
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", OPERATORS)
def test_what_reads_the_result_reads_the_right_elements(name, read):
    f = lambda x: READERS[read](OPERATORS[name](x))
    torch.manual_seed(0)
    jitted = nf.jit(f)
    for _ in range(3):  # the first call looks
        x = torch.randn(2, 3, 2, 4).to(memory_format=torch.channels_last)
        torch.testing.assert_close(jitted(x), f(x))
