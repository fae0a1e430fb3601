"""Capturing without torch._dynamo and sympy leaves them as they are for those who want them."""

import subprocess
import sys

from torch._subclasses.fake_tensor import FakeTensorMode

from neuralforge.graph.fake import FakeMode

PROGRAM = """
import sys
import torch
import neuralforge as nf
from neuralforge.graph.without_sympy import numbers_only
from neuralforge.models import ModelConfig, build, next_token_loss

def f(x, w):
    return torch.nn.functional.gelu(x @ w).clamp(min=0).softmax(-1).sum() + torch.dropout(x, 0.0, True).var()

model = build(ModelConfig("gpt2", vocab_size=50, context=16, n_layers=1, n_heads=2, n_kv_heads=2, d_model=32, d_ff=32), 0)
loss = lambda params, t: next_token_loss(torch.func.functional_call(model, params, (t[:, :-1],)), t[:, 1:])
for narrow in False, True:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
        nf.jit(nf.grad(loss))(dict(model.named_parameters()), torch.zeros(2, 9, dtype=torch.int64))
assert not {"torch.distributed.tensor", "sympy", "torch.fx.experimental.symbolic_shapes"} & sys.modules.keys()
with numbers_only():  # who imports from the stand-in may keep what it gets
    from torch.fx.experimental.symbolic_shapes import guard_or_true, is_nested_int
assert "torch.fx.experimental.symbolic_shapes" not in sys.modules and guard_or_true(True)
with numbers_only():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from sympy import Symbol
assert Symbol is sys.modules["sympy"].Symbol and ShapeEnv is sys.modules["torch.fx.experimental.symbolic_shapes"].ShapeEnv
x, w = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(0, 1, 8).view(4, 2)
torch.testing.assert_close(nf.jit(f)(x, w), f(x, w))
found = nf.jit(nf.grad(f))(x, w)
assert "torch._dynamo" not in sys.modules
assert torch._dynamo.config._custom_ops_profile is None
assert "torch._dynamo" not in sys.modules
torch._dynamo.config.cache_size_limit = 7  # now it is imported
assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.config.cache_size_limit == 7
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("neuralforge")]
marks = [f for f in vars(torch._refs).values() if getattr(getattr(f, "__wrapped__", None), "__dynamo_disable", None)]
assert not marks, marks
torch.testing.assert_close(torch.compile(f, backend="eager", fullgraph=True)(x, w), f(x, w))
torch.testing.assert_close(nf.jit(nf.grad(f))(x, w), found)
double = torch.compile(lambda x: x * 2 if guard_or_true(x.shape[0] > 2) else x, backend="eager", fullgraph=True, dynamic=True)
assert double(x)[0, 0] == 2 * x[0, 0] and double(x[:1])[0, 0] == x[0, 0]  # a symbol, for what was imported before
print("well")
"""


def test_a_program_is_captured_without_it_and_it_works_afterwards():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout == "well\n", done.stderr


def test_our_mode_has_what_pytorchs_has():
    assert vars(FakeMode()).keys() >= vars(FakeTensorMode()).keys()
    differing = {"fake_tensor_converter", "cache_enabled", "_stack", "_stack_trace"}
    own, theirs = vars(FakeMode()), vars(FakeTensorMode())
    assert {k: own[k] for k in theirs if k not in differing} == {k: theirs[k] for k in theirs if k not in differing}
