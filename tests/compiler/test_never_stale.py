"""A jitted function is captured again whenever what was captured may not hold, and only then; lengths share kernels."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import neuralforge as nf
from neuralforge.compiler import jitted as jit_module
from neuralforge.compiler.products import candidates
from neuralforge.errors import CaptureError
from neuralforge.kernels import choices, toolchain
from neuralforge.models import ModelConfig, build, next_token_loss


@pytest.fixture
def captures(monkeypatch):
    """One entry for each capture of a jitted function."""
    made, capture = [], jit_module.capture
    monkeypatch.setattr(jit_module, "capture", lambda *args, **kw: (made.append(1), capture(*args, **kw))[1])
    return made


def test_floats_that_are_equal_but_not_the_same(captures):
    f = lambda x, s: torch.copysign(x, torch.full_like(x, s))
    jitted, x = nf.jit(f), torch.randn(5)
    for s in (0.0, -0.0, 1.0, True, 1, float("nan"), float("nan"), -0.0):
        assert torch.equal(jitted(x, s), f(x, s))
    assert len(captures) == 6


@dataclass(frozen=True)
class Config:
    scale: float


@dataclass
class Batch:
    x: torch.Tensor
    scale: float


@pytest.mark.parametrize("kind", ["numpy", "dataclass", "dataclass with tensors", "named"])
def test_numbers_within_others_are_told_apart(captures, kind):
    of = {"numpy": np.float32, "named": lambda s: OrderedDict(s=s)}.get(kind, Config)
    number = lambda s: s.scale if isinstance(s, Config) else s["s"] if isinstance(s, dict) else s
    f = lambda x, s: x * number(s) + torch.full_like(x, float(number(s))).reciprocal()
    if kind == "dataclass with tensors":
        jitted = nf.jit(lambda batch: f(batch.x, batch.scale))
        call = lambda x, s: jitted(Batch(x, s))
    else:
        jitted = nf.jit(f)
        call = lambda x, s: jitted(x, of(s))
    x = torch.ones(2, dtype=torch.float64)
    for s in (0.0, -0.0, float("nan"), 0.5, float("nan"), -0.0):
        torch.testing.assert_close(call(x, s), f(x, s if kind == "dataclass with tensors" else of(s)), equal_nan=True)
    assert len(captures) == 4
    if kind != "numpy":
        for s in (2, 2.0, True):
            assert call(x.long(), s).dtype == f(x.long(), s).dtype


def test_what_has_no_hash_is_refused():
    f = nf.jit(lambda x: torch.ones(2))
    for x in (np.ones(2), Batch(torch.ones(2), np.ones(2)), Config(bytearray())):
        with pytest.raises(CaptureError, match="neither a tensor nor hashable. Pass tensors"):
            f(x)
    assert f(Batch(torch.ones(2), {1, 2})).tolist() == f(Batch(torch.ones(2), [1, 2])).tolist() == [1, 1]


def test_default_dtype_and_autocast(captures):
    f = lambda x: x @ x * torch.ones(4)
    jitted, x = nf.jit(f), torch.randn(4, 4)
    assert jitted(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert jitted(x).dtype == f(x).dtype
    try:
        torch.set_default_dtype(torch.float64)
        assert jitted(x).dtype == f(x).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert jitted(x).dtype == torch.float32 and len(captures) == 3


@pytest.mark.parametrize("first", ["plain", "jitted"])
def test_what_autocast_has_cast_before_is_not_captured_nor_kept(first):
    model, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    jitted = nf.jit(model)
    with torch.autocast("cpu", torch.bfloat16):
        for f in (model, jitted) if first == "plain" else (jitted, model):
            assert f(x).dtype == torch.bfloat16
    with torch.no_grad():
        model.weight.add_(1)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = [torch.autograd.grad(f(x).sum(), model.weight)[0] for f in (model, jitted)]
        torch.testing.assert_close(jitted(x), model(x), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("how", ["closed over", "argument", "torch.autograd"])
def test_modules_that_change_between_training_and_evaluation(captures, how):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).requires_grad_(
        how == "torch.autograd"
    )
    jitted = nf.jit(lambda m, x: m(x)) if how == "argument" else nf.jit(lambda x: model(x))
    call = (lambda x: jitted(model, x)) if how == "argument" else jitted
    x = torch.randn(300, 4)
    for training in (True, False, True, False):
        model.train(training)
        assert (call(x) == 0).any() == training
        assert training or torch.allclose(call(x), model(x), atol=1e-6)
    if how != "torch.autograd":
        assert len(captures) == 2, "one for each mode"


def test_views_that_are_still_to_be_negated():
    f = nf.jit(lambda x: x.exp() * 2 + x)
    x = torch.randn(50, dtype=torch.complex64).conj().imag
    assert x.is_neg() and torch.allclose(f(x), x.exp() * 2 + x)
    assert torch.allclose(f(x.clone()), x.exp() * 2 + x)


@pytest.mark.parametrize("lay_out", [lambda x: x.expand(4, 20), lambda x: x.as_strided((6, 6), (2, 1), 3)], ids=["expanded", "overlapping"])
def test_arguments_that_are_copied_first_and_whose_elements_share_memory(lay_out):
    f = lambda x, y: (x * 2, x.exp() + y, y.sum(-1))
    memory = torch.randn(20, dtype=torch.complex64)
    to_be_negated = lay_out(memory.conj().imag)
    assert to_be_negated.is_neg()
    for x, donate in ((to_be_negated, ()), (lay_out(memory.conj()), ()), (lay_out(memory.real.clone()), 0)):
        y = x.flip(0) if donate == () else lay_out(x.as_strided((20,), (1,), 0))  # a donated one that is read elsewhere too
        for found, expected in zip(nf.jit(f, donate=donate)(x, y), f(x, y)):
            torch.testing.assert_close(found, expected)


def test_arguments_that_share_memory_with_a_written_one_are_refused():
    @nf.jit
    def f(a, b):
        a += 1
        return b * 2

    x = torch.zeros(10)
    assert f(x[:5], x[5:]).tolist() == [0] * 5 and x.tolist() == [1] * 5 + [0] * 5
    with pytest.raises(CaptureError, match=r"in place to an argument of shape \(5,\).*shape \(5,\), shares"):
        f(x[:5], x[4:9])
    with pytest.raises(CaptureError, match="test_never_stale.py.*clone"):
        f(x, x)


def test_tensors_with_a_class_of_their_own_are_refused():
    class Twice(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return 2 * super().__torch_function__(func, types, args, kwargs or {})

    f, x = nf.jit(lambda x: x.exp()), torch.randn(3)
    f(x)
    with pytest.raises(CaptureError, match="class Twice.*as_subclass"):
        f(x.as_subclass(Twice))
    with torch.no_grad():
        assert torch.allclose(f(torch.nn.Parameter(x)), x.exp())


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: torch.eye(3).to_sparse_csr(), "layout torch.sparse_csr .* with .to_dense"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor .* with .to_padded_tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), "a quantized tensor .* with .dequantize"),
        (lambda: torch._efficientzerotensor(3), "zeros without memory .* with .clone"),
    ],
)
def test_tensors_that_are_not_dense_are_refused(make, why):
    x, called = make(), nf.jit(lambda x: x * 2)
    called(torch.ones(2, 3))
    for call in (lambda: called(x), lambda: nf.jit(lambda x: x * 2)(x), lambda: nf.jit(lambda y: x * y)(torch.ones(3))):
        with pytest.raises(CaptureError, match=why):
            call()
    lazy = torch.nn.LazyLinear(3)
    with pytest.raises(CaptureError, match="lazy module .* Call the module once"):
        nf.jit(lazy)(torch.ones(2, 3))
    with torch.no_grad():
        torch.testing.assert_close(lazy(torch.ones(2, 3)), nf.jit(lazy)(torch.ones(2, 3)))


def test_the_number_of_compiled_forms_is_bounded(captures, monkeypatch):
    monkeypatch.setattr(jit_module, "CACHE_SIZE", 3)
    f = nf.jit(lambda x: x + 1)
    for n in (1, 2, 3, 1, 4, 1, 2):  # the 4 puts out the 2, not used for longest
        assert f(torch.zeros(n)).tolist() == [1] * n
    assert len(captures) == 5 and len(f.programs) == 3


def test_forms_share_their_memory():
    g = lambda x: ((x.exp() @ x).tanh() @ x).sum(0)
    f = nf.jit(g)
    inputs = [torch.randn(n, n) for n in (20, 40, 30, 60, 20, 60, 40)]
    for x in inputs:
        assert torch.allclose(f(x), g(x), rtol=1e-3, atol=1e-4)
    arenas = {id(program.program.arena) for program in f.programs}
    needed = [program.program.plan.arena_bytes for program in f.programs]
    assert len(arenas) == 1 and len(set(needed)) == 4
    assert f.programs[0].program.arena.memory.numel() == max(needed), "not the sum"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lengths_share_kernels(kind, monkeypatch, tmp_path):
    """Training steps at other lengths: no product is timed and nothing of C is compiled a second time."""
    monkeypatch.setattr(choices, "cache_folder", lambda: tmp_path)
    builds, load = [], toolchain._load
    model = build(
        ModelConfig(
            kind, vocab_size=50, context=64, n_layers=1, n_heads=2, n_kv_heads=2, d_model=32, d_ff=32
        ),
        0,
    )
    params = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss_fn(params, tokens):
        return next_token_loss(torch.func.functional_call(model, params, (tokens[:, :-1],)), tokens[:, 1:])

    step = lambda params, tokens: nf.value_and_grad(loss_fn)(params, tokens)
    jitted = nf.jit(step)
    jitted(params, torch.randint(0, 50, (2, 25)))
    monkeypatch.setattr(
        toolchain, "_load", lambda source, *rest: builds.append(source) or load(source, *rest)
    )
    monkeypatch.setattr(candidates, "_fastest", lambda *args: pytest.fail("a product was timed again"))
    for length in (33, 18, 48):
        tokens = torch.randint(0, 50, (2, length))
        loss, grads = jitted(params, tokens)
        expected_loss, expected = step(params, tokens)
        assert torch.allclose(loss, expected_loss, rtol=1e-5)
        for name, g in grads.items():
            assert torch.allclose(g, expected[name], rtol=1e-3, atol=1e-6), name
    assert builds == []


def test_data_that_a_closed_over_tensor_is_given_later(captures):
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    jitted = nf.jit(lambda x: layer(x) + layer.weight.t().sum(0))
    with torch.no_grad():
        for n, data in enumerate([torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4).t(), torch.randn(8, 8)[::2, ::2]]):
            layer.weight.data = data
            for _ in range(2):
                torch.testing.assert_close(jitted(x), layer(x) + layer.weight.t().sum(0))
            assert len(captures) == max(1, n), "other memory is only looked up again; another layout is captured"
    w = torch.randn(3)
    jitted = nf.jit(lambda x: x * w)
    jitted(torch.ones(3))
    w.data = torch.tensor([1, 2, 3])
    assert jitted(torch.ones(3)).tolist() == [1, 2, 3]


@pytest.mark.parametrize("how", ["closed over", "argument", "torch.autograd"])
def test_parameters_and_buffers_that_are_replaced(captures, how):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).eval()
    model.requires_grad_(how == "torch.autograd")
    jitted = nf.jit(lambda m, x: m(x)) if how == "argument" else nf.jit(lambda x: model(x))
    x = torch.randn(3, 4)
    for _ in range(3):
        for _ in range(2):
            torch.testing.assert_close(jitted(model, x) if how == "argument" else jitted(x), model(x))
        state = {k: torch.rand_like(v) + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        model[0].weight = torch.nn.Parameter(torch.randn(4, 4), how == "torch.autograd")
    if how == "torch.autograd":  # a function that asks for gradients is captured for itself and with its derivative
        torch.testing.assert_close(*(torch.autograd.grad(f(x).sum(), model[0].weight)[0] for f in (jitted, model)))
    else:
        assert len(captures) == 3


def test_closed_over_views_that_are_still_to_be_negated():
    z = torch.randn(50, dtype=torch.complex64)
    v = z.conj().imag
    f, x = nf.jit(lambda x: x * v * 3 + v.t()), torch.randn(50)
    assert v.is_neg() and torch.allclose(f(x), x * v * 3 + v)
    z.mul_(2)
    assert torch.allclose(f(x), x * v * 3 + v)


def test_views_that_are_still_to_be_conjugated():
    z = torch.randn(3, dtype=torch.complex64).conj()
    real = lambda x: torch.view_as_real(x * 2 + z).sum(-1) + torch.view_as_real(x.resolve_conj()).prod(-1)
    for x in (z, z.resolve_conj(), torch.randn(3, dtype=torch.complex64).conj(), z.conj()):
        assert torch.allclose(nf.jit(real)(x), real(x))


def test_what_would_only_be_done_once_is_refused():
    def numbers(x):
        for n in range(3):
            yield x * n

    def seeded(x):
        torch.manual_seed(3)
        return x + torch.rand(2)

    def seeded_for_now(x):
        with torch.random.fork_rng():
            torch.manual_seed(4)
            return x + torch.rand(2)

    def backward(x):
        loss = (x.clone().requires_grad_() ** 2).sum()
        loss.backward()

    with pytest.raises(CaptureError, match="returns a generator.*as a list"):
        nf.jit(numbers)(torch.ones(1))
    with pytest.raises(CaptureError, match="seeds torch's generator.*outside"):
        nf.jit(seeded)(torch.ones(2))
    with pytest.raises(CaptureError, match="seeds torch's generator.*outside"):
        nf.jit(seeded_for_now)(torch.ones(2))
    with pytest.raises(CaptureError, match=r"test_never_stale.py:\d+: torch.autograd .* nf.grad"):
        nf.jit(backward)(torch.ones(2))
    with pytest.raises(CaptureError, match=r"test_never_stale.py:\d+: .* x\[i \+ torch.arange\(n\)\] for x\[i : i \+ n\]"):
        nf.jit(lambda x, i: x[i : i + 1])(torch.ones(2), torch.tensor(1))


def test_slices_are_static(captures):
    f, x = nf.jit(lambda x, rows: x[rows] * 2), torch.arange(6.0)
    for rows in (slice(0, 3), slice(1, 3), slice(0, 3)):
        assert torch.equal(f(x, rows), x[rows] * 2)
    assert len(captures) == 2
