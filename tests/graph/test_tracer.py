"""What the tracer does to keep programs pure and numbers right."""

import pytest
import torch

import neuralforge as nf
from neuralforge.compiler.passes import dead_code
from neuralforge.errors import CaptureError
from neuralforge.graph import capture
from neuralforge.graph.tracer import Tracer


def traced(f, *args):
    tracer = Tracer()
    with torch.no_grad(), tracer:
        return tracer.now(f(*args))


def test_lazy_conjugates_are_resolved():
    """Inside a dispatch mode's handler the dispatcher leaves them as they are, and linalg.pinv would be wrong."""
    a = torch.randn(4, 3, dtype=torch.complex128)
    torch.testing.assert_close(traced(torch.linalg.pinv, a), torch.linalg.pinv(a))
    torch.testing.assert_close(traced(lambda a: (a.conj() * 2).conj().imag + 1, a), 2 * a.imag + 1)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.quantile(x, 0.3, dim=1),
        lambda x: torch.stft(x.flatten(), 4, window=torch.ones(4, dtype=x.dtype), return_complex=True).abs(),
    ],
    ids=["quantile", "stft"],
)
def test_functions_that_reshape_their_temporaries_in_place(f):
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(traced(f, x), f(x))
    torch.testing.assert_close(capture(f, x).graph(x)[0], f(x))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x + 1).unsqueeze_(0),
        lambda x: torch.Tensor.t_(x + 1),
        lambda x: torch.ops.aten.transpose_((x + 1), 0, 1),
        lambda x: x.squeeze_(),
        lambda x: (x + 1).resize_(2),
    ],
)
def test_reshaping_in_place_from_python_is_refused(f):
    with pytest.raises(CaptureError, match="test_tracer.py:.* changes a tensor's shape in place"):
        traced(f, torch.randn(3, 2))


def test_running_statistics():
    """An operator that writes beside its result gives both."""
    x, w = torch.randn(4, 3), torch.ones(3)

    def f(x, mean, var):
        return torch.ops.aten._native_batch_norm_legit(x, w, w, mean, var, True, 0.1, 1e-5)[0] + 0 * mean[:, None].T

    args = lambda: (torch.zeros(3), torch.ones(3))
    eager, (mean, var) = args(), args()
    expected = f(x, *eager)
    captured = capture(f, x, mean, var)
    out, new_mean, new_var = captured.graph(x, mean, var)
    assert captured.writes == [1, 2]
    torch.testing.assert_close((out, new_mean, new_var), (expected, *eager))
    assert mean.eq(0).all()


def test_memory_around_an_input_is_refused():
    big = torch.arange(20.0)
    strided = lambda x: torch.as_strided(x, (2, 3), (3, 1), 1)
    torch.testing.assert_close(capture(strided, big).graph(big)[0], strided(big))
    with pytest.raises(CaptureError, match="a part of a larger one"):
        capture(strided, big[5:15])


def test_comparing_values_is_refused():
    with pytest.raises(CaptureError, match="test_tracer.py"):
        capture(lambda x, y: x if torch.equal(x, y) else y, torch.ones(2), torch.ones(2))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_tensors_are_refused():
    with pytest.raises(CaptureError, match="torch.sparse_csr"):
        capture(lambda x: x + x, torch.eye(3).to_sparse_csr())


def test_writes_beside_tensors_made_from_numbers():
    """torch.tensor hands its new tensor to lift_fresh, a view operator that returns its own argument. It belongs to
    the function, which may write to it."""

    def f(x):
        index = torch.tensor([0, 2])
        y = x * 2
        y[0] = 5
        index += 1
        return y[index - 1]

    x = torch.arange(3.0)
    assert traced(f, x).tolist() == [5, 4] and capture(f, x).graph(x)[0].tolist() == [5, 4]


def test_writes_to_parts_that_know_nothing_of_each_other():
    def f(x):
        y = x * 2
        a, b, c = y.unsafe_chunk(3, 1)
        a.add_(1).sigmoid_()
        b.mul_(a)
        c.add_(c + b)
        read = y.sum(0)  # the base, after writes to its parts
        y.mul_(3)
        return a + b * c, read, y, a

    x = torch.randn(4, 6, dtype=torch.float64)
    for found, expected in zip(nf.jit(f)(x), f(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_recurrent_cells_read_their_gates_as_they_wrote_them():
    cell, x, h = torch.nn.GRUCell(8, 8).double(), torch.randn(3, 8).double(), torch.randn(3, 8).double()
    params = {name: p.detach() for name, p in cell.named_parameters()}
    loss = lambda p: torch.func.functional_call(cell, p, (x, h)).square().sum()
    graph = capture(nf.grad(loss), params).graph
    assert not any("scatter" in eq.name for eq in dead_code(graph).equations)
    cell(x, h).square().sum().backward()
    for name, gradient in nf.jit(nf.grad(loss))(params).items():
        torch.testing.assert_close(gradient, cell.get_parameter(name).grad)
