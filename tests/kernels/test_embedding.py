"""The embedding and its gradient: against the plain truth in float64 and PyTorch's own, on every instruction set."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.compiler.kernels import claim
from neuralforge.errors import KernelError
from neuralforge.graph import capture
from neuralforge.kernels import embedding as kernel
from neuralforge.kernels.embedding import embedding, embedding_backward, reference

aten = torch.ops.aten
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Greatest error, relative to the sum of what is added up."""


pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding_idx, by_frequency", [(-1, False), (2, False), (0, True)])
@pytest.mark.parametrize("N, V, D", [(1, 1, 1), (7, 3, 5), (40, 5, 16), (65, 300, 67), (300, 10, 129), (2, 5000, 33), (900, 3, 64)])
def test_against_float64(N, V, D, padding_idx, by_frequency, dtype):
    torch.manual_seed(0)
    g, index = torch.randn(N, D).to(dtype), torch.randint(0, V, (N,))
    options = V, padding_idx if padding_idx < V else -1, by_frequency
    found, expected = embedding_backward(g, index, *options), reference(g.double(), index, *options)
    assert found.shape == (V, D) and found.dtype == dtype
    bound = TOLERANCE[dtype] * reference(g.double().abs(), index, *options)
    assert ((found.double() - expected).abs() <= bound).all()
    assert torch.allclose(expected, aten.embedding_dense_backward(g.double(), index, *options), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_and_misaligned_operands(dtype):
    torch.manual_seed(0)
    index = torch.randint(0, 9, (8, 6)).t()[::2]
    tight = torch.randn(3, 8, 21).to(dtype)
    expected = embedding_backward(tight, index.contiguous(), 9)
    memory = torch.full((3 * 8 * 42 + 1,), float("nan"), dtype=dtype)
    apart = memory[1:].view(3, 8, 42)[..., 5:26]  # rows of a wider tensor, off by one number
    apart.copy_(tight)
    turned = tight.transpose(1, 2).contiguous().transpose(1, 2)
    for g, i in ((apart, index), (turned, index), (tight, index.int())):
        assert torch.equal(embedding_backward(g, i, 9), expected)
    one = torch.ones((), dtype=dtype).expand(3, 8, 21)  # the gradient of a sum
    assert torch.equal(embedding_backward(one, index, 9), embedding_backward(one.contiguous(), index, 9))


@pytest.mark.parametrize("N, V, D", [(0, 4, 3), (5, 4, 0), (0, 0, 3)])
def test_empty(N, V, D):
    found = embedding_backward(torch.randn(N, D), torch.zeros(N, dtype=torch.int64), V)
    assert torch.equal(found, torch.zeros(V, D))


@pytest.mark.usefixtures("threads_restored")
def test_the_same_bits_for_any_number_of_threads():
    torch.manual_seed(0)
    g, index = torch.randn(3000, 130), torch.randint(0, 900, (3000,)) ** 2 // 900
    found = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        found.append(embedding_backward(g, index, 900))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_special_values_as_in_pytorch():
    g = torch.randn(6, 20)
    g[0, 3], g[1, 4], g[2, 4] = float("nan"), float("inf"), -float("inf")
    index = torch.tensor([0, 1, 1, 2, 2, 3])
    found, expected = embedding_backward(g, index, 5), aten.embedding_dense_backward(g, index, 5, -1, False)
    assert torch.allclose(found, expected, equal_nan=True)
    assert found[0, 3].isnan() and found[1, 4].isnan()


@pytest.mark.parametrize("bad", [-1, 5])
def test_an_index_out_of_range(bad):
    with pytest.raises(KernelError, match=f"index {bad}, the 1th; expected 0 to 4"):
        embedding_backward(torch.randn(3, 4), torch.tensor([0, bad, 2]), 5)
    with pytest.raises(KernelError, match=r"g \[3, 4\] and index \[2\]; expected"):
        embedding_backward(torch.randn(3, 4), torch.tensor([0, 2]), 5)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(kernel, "native", lambda g, out: False)
    g, index = torch.randn(7, 5), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    assert torch.allclose(embedding_backward(g, index, 4), aten.embedding_dense_backward(g, index, 4, -1, False))


def test_registered_as_torch_operators():
    weight, index = torch.randn(6, 8, requires_grad=True), torch.tensor([[0, 5, 2], [2, 2, 1]])
    torch.library.opcheck(embedding, (weight, index, 2, True))
    torch.library.opcheck(embedding_backward, (torch.randn(2, 3, 8, requires_grad=True), index, 6, 2, True))
    table = lambda w: torch.ops.neuralforge.embedding(w, index, 2, True)
    assert torch.equal(table(weight), F.embedding(index, weight))
    torch.autograd.gradgradcheck(table, (weight.detach().double().requires_grad_(),))


def test_gradients_and_the_compiler():
    torch.manual_seed(0)
    weight, index = torch.randn(50, 40), torch.randint(0, 50, (3, 30))
    own = lambda w: torch.ops.neuralforge.embedding(w, index, 7).sin().sum()
    plain = lambda w: F.embedding(index, w, 7).sin().sum()
    expected = torch.func.grad(plain)(weight)
    for found in (nf.grad(own)(weight), nf.jit(nf.grad(own))(weight), nf.jit(nf.grad(plain))(weight), torch.func.grad(plain)(weight)):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    leaf = weight.clone().requires_grad_()
    own(leaf).backward()
    assert torch.allclose(leaf.grad, expected, rtol=1e-5, atol=1e-6)
    nf.testing.check_grads(own, (weight[:, :2].double(),), order=2)
    graph = capture(nf.grad(plain), weight).graph
    (gradient,) = [eq for eq in graph.equations if eq.op is aten.embedding_dense_backward.default]
    assert claim(graph)[gradient].run is kernel.backward
