"""The results' types by our fake tensors are the real operators', or PyTorch's own fake tensors'."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves, tree_map

from neuralforge.graph.fake import FakeMode


def types(op, sample, mode=None):
    """Of the results: shapes, strides, offsets, dtypes; or the class of the error."""
    leaves = sample.input, sample.args, sample.kwargs
    try:
        if mode is None:
            found = op.op(sample.input, *sample.args, **sample.kwargs)
        else:
            with mode:
                fake = lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if torch.is_tensor(x) else x
                given, args, kwargs = tree_map(fake, leaves)
                found = op.op(given, *args, **kwargs)
    except Exception as e:
        return type(e)
    results = [x for x in tree_leaves(found) if torch.is_tensor(x)]
    return [(tuple(x.shape), x.stride(), x.storage_offset(), x.dtype, str(x.device)) for x in results]


@pytest.mark.parametrize("part", range(4))
def test_as_the_operators(part):
    seen = 0
    for op in op_db[part::64]:
        for dtype in {torch.float32, torch.bfloat16, torch.int64} & op.supported_dtypes("cpu"):
            for sample, _ in zip(op.sample_inputs("cpu", dtype), range(4)):
                tensors = [x for x in tree_leaves((sample.input, sample.args, sample.kwargs)) if torch.is_tensor(x)]
                if any(x.layout != torch.strided for x in tensors):
                    continue
                found = types(op, sample, FakeMode())
                if found != types(op, sample, FakeTensorMode()):
                    assert found == types(op, sample), (op.name, dtype, sample)
                seen += 1
    assert seen > 20
