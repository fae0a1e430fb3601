"""What the tracer does to keep programs pure and numbers right."""

import copy
import pickle

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
    for compare in (torch.equal, torch.allclose):
        with pytest.raises(CaptureError, match=rf"test_tracer.py.*gives a number of Python's.*\(\) for torch.{compare.__name__}"):
            capture(lambda x, y: x if compare(x, y) else y, torch.ones(2), torch.ones(2))


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


FACTORIES = {
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "empty_like": lambda x: torch.empty_like(x).fill_(2),
    "zeros": lambda x: torch.zeros(x.shape, dtype=x.dtype),
    "new_zeros": lambda x: x.new_zeros(x.shape),
    "full": lambda x: torch.full(x.shape, 2.0, dtype=x.dtype),
    "in a list": lambda x: [torch.ones_like(y) for y in (x, x)][1],
    "mapped": lambda x: list(map(torch.ones_like, (x, x)))[0],
}


@pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)
def test_gradients_pass_what_is_written_into_new_tensors(make):
    """torch.zeros and the like detach what they made, where a capture holds it: that is no detachment of what is written later."""

    def f(x):
        whole, h = make(x), 0
        for i in range(4):
            h = x[:, i] * h + x[:, i].sin()
            whole[:, i] = h
        return (whole * torch.arange(20.0, dtype=x.dtype).view(5, 4)).sum()

    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    (truth,) = torch.autograd.grad(f(x), x)
    for step in (nf.grad(f), nf.jit(nf.grad(f)), nf.jit(nf.grad(f), max_rewrites=0)):
        torch.testing.assert_close(step(x.detach()), truth)
    (found,) = nf.jit(lambda x: nf.hvp(f, (x,), (x,)))(x.detach())
    torch.testing.assert_close(found, torch.func.jvp(torch.func.grad(f), (x,), (x,))[1])


def written_through_detached(x):
    a = torch.zeros_like(x)
    a.detach().copy_(x)
    return a.exp() * x


def data_scaled(x):
    a = x * 2
    a.data.mul_(3)
    return a * a


def detached_and_read(x):
    a = x * 2
    b = a.detach()
    b.mul_(x)
    return (a * b).exp() + b


@pytest.mark.parametrize("f", [
    written_through_detached, data_scaled, detached_and_read, lambda x: torch.ones_like(x).mul_(x).detach() * x,
])  # fmt: skip
def test_what_is_detached_by_the_program_stays_detached(f):
    f = lambda x, f=f: f(x).sum()
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (truth,) = torch.autograd.grad(f(x), x)
    for step in (nf.grad(f), nf.jit(nf.grad(f))):
        torch.testing.assert_close(step(x.detach()), truth)


@pytest.mark.parametrize("through", [lambda x: x, lambda x: x.view(2, -1, 3).flatten(0, 1), lambda x: x.t().t()])
def test_many_writes(through):
    """Hundreds of them, one after the other, are no matter for Python's stack."""

    def f(x):
        whole = torch.zeros(700, 3)
        part = through(whole)
        for i in range(700):
            part[i] = x * i
        return whole.sum(0), part[-1]

    x = torch.randn(3)
    for found, truth in zip(traced(f, x), f(x)):
        torch.testing.assert_close(found, truth)
    torch.testing.assert_close(nf.grad(lambda x: f(x)[0].sum())(x), torch.full((3,), 699 * 350.0))


def test_pooling_of_channels_last():
    """Pooling to one place sets strides in place, of dimensions of one element."""
    f = torch.nn.functional.adaptive_avg_pool2d
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    torch.testing.assert_close(capture(lambda x: f(x, 1) * 2, x).graph(x)[0], f(x, 1) * 2)


class Converted(torch.nn.Module):
    """Converts a layer whenever it runs, as some models do."""

    def __init__(self, dtype):
        super().__init__()
        self.layer, self.dtype = torch.nn.Linear(4, 2), dtype

    def forward(self, x):
        self.layer = self.layer.to(self.dtype)
        return self.layer(x)


def test_modules_converted_while_they_run():
    x = torch.randn(3, 4)
    module = Converted(torch.float32)
    params = {name: p.detach() for name, p in module.named_parameters()}
    loss = lambda params: torch.func.functional_call(module, params, (x,)).sum()
    for step in (nf.grad(loss), nf.jit(nf.grad(loss))):
        torch.testing.assert_close(step(params)["layer.weight"], x.sum(0).expand(2, 4))
    module = Converted(torch.float64)
    with pytest.raises(RuntimeError, match="Linear.weight") as raised:
        nf.jit(nf.grad(loss))(params)
    assert "test_tracer.py" in str(raised.value.__cause__) and "Convert the module before" in str(raised.value.__cause__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_torch_func_makes_for_itself(dtype):
    """Zeros without memory, and numbers where tensors are expected: of a network's second derivatives in an equation."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(dtype)
    params = {name: p.detach() for name, p in net.named_parameters()}
    x = torch.rand(5, 2, dtype=dtype)

    def loss(params, x):
        u = lambda z: torch.func.functional_call(net, params, (z,)).squeeze(-1)
        residual = lambda z: torch.func.grad(u)(z)[1] + u(z) * torch.func.grad(u)(z)[0] - 0.01 * torch.func.hessian(u)(z)[0, 0]
        return torch.func.vmap(residual)(x).square().mean()

    found, value = nf.jit(nf.value_and_grad(loss))(params, x), torch.func.grad_and_value(loss)(params, x)
    torch.testing.assert_close(found, value[::-1])


@pytest.mark.parametrize("name", ["floor_divide_", "ldexp_", "pow_", "float_power_"])
def test_in_place_operators_whose_overloads_have_other_names(name):
    x, y = torch.rand(3, dtype=torch.float64) + 2, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    f = lambda x, y: (z := x * 3, getattr(z, name)(y), z)[1:]
    for found, expected in zip(capture(f, x, y).graph(x, y), f(x, y)):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype, number", [(torch.int64, 0.5), (torch.bool, 1), (torch.float32, 1j)])
def test_what_the_written_tensor_cannot_hold(dtype, number):
    f = lambda x: x.clone().add_(number)
    with pytest.raises(RuntimeError, match="can't be cast"):
        f(torch.zeros(3, dtype=dtype))
    with pytest.raises(CaptureError, match=rf"test_tracer.py:\d+: aten.add_.* into a tensor of {dtype}, which can't hold it"):
        nf.jit(f)(torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("transform", [
    nf.jit, nf.grad, lambda f: nf.jit(nf.grad(f)), lambda f: nf.grad(nf.checkpoint(f)), lambda f: lambda x: nf.jvp(f, (x,), (x,)),
    lambda f: lambda x: nf.explain(f, x), lambda f: nf.jit(nf.grad(lambda x: f(x) + float(f(x)))),
], ids=["jit", "grad", "jitted grad", "checkpoint", "jvp", "explain", "an error"])  # fmt: skip
def test_modules_with_buffers_can_be_copied_and_pickled_after_they_were_written(transform):
    """The running statistics of batch norms mean something else while a tracer follows the writes, and no longer."""
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    x = torch.randn(5, 8)
    try:
        transform(lambda x: module(x).square().sum())(x)
    except CaptureError:
        pass
    assert not any(t.__dict__ for t in (*module.parameters(), *module.buffers()))
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        torch.testing.assert_close(twin(x), module(x))
