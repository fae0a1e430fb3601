"""What is concatenated is written where the whole will be, and then nothing is copied."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf


def compiled(f, *args):
    """The result of the compiled function, and its program's lines."""
    jitted = nf.jit(f)
    result = jitted(*args)
    (form,) = jitted.programs
    return result, form.program.source


def attention(x, weight, bias, heads=2):
    q, k, v = F.linear(x, weight, bias).split(x.shape[-1], -1)
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2).square().sum()


def operands(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype) / 4 for shape in ((2, 9, 16), (48, 16), (48,))]


def test_gradients_of_attention(isa):
    gradients = nf.grad(attention, (0, 1, 2))
    found, lines = compiled(gradients, *operands())
    expected = gradients(*(x.double() for x in operands()))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    assert "backward" in lines and "cat" not in lines
    names = [row.name for row in nf.explain(gradients, *operands()).rows]
    assert "aten.cat" not in names and any("attention" in name for name in names)


def test_gradients_that_others_read_are_copied():
    def f(q, k, v, g):
        out, pull = nf.vjp(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), q, k, v)
        dq, dk, dv = pull(g)
        return torch.cat([dq, dk, dv], -1) * 2, dq.exp()

    args = [torch.randn(2, 2, 9, 8) for _ in range(4)]
    found, lines = compiled(f, *args)
    for a, b in zip(found, f(*(x.double() for x in args))):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    assert "cat" in lines


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_rows_of_any_kernel(parts):
    def f(*xs):
        whole = torch.cat([x.exp() + n for n, x in enumerate(xs)])
        return whole.sum(0), whole.t() @ whole

    xs = [torch.randn(3 + n, 20) for n in range(parts)]
    found, lines = compiled(f, *xs)
    for a, b in zip(found, f(*xs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert parts == 1 or "cat" not in lines


def test_a_whole_that_is_a_part_is_copied():
    def f(x, y):
        inner = torch.cat([x.exp(), y.exp()])
        return (torch.cat([inner, x.sin()]) @ y.t()).square()

    x, y = torch.randn(3, 20), torch.randn(4, 20)
    found, _ = compiled(f, x, y)
    torch.testing.assert_close(found, f(x, y), rtol=1e-4, atol=1e-4)


def test_results_and_what_is_read_twice_are_copied():
    def f(x, y):
        a, b = x.exp(), y.exp()
        return torch.cat([a, b]), torch.cat([a, a, b]) @ y.t()

    x, y = torch.randn(3, 20), torch.randn(4, 20)
    for a, b in zip(compiled(f, x, y)[0], f(x, y)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
