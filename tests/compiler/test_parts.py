"""What is put together of parts is concatenated, in its place where that can be."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf

PARTS = {
    "selected": lambda x: (x[0].sin() * x[1]).sum() + x[2].exp().sum(),
    "selected from the end": lambda x: (x[-1].sin() * x[0]).sum() + x[-2].exp().sum(),
    "selected last": lambda x: (x[..., 0].sin() * x[..., 1] * x[..., 2] * x[..., 3]).sum(),
    "sliced": lambda x: (x[:, :2].sin() * x[:, 2:4]).sum() + x[:, 4:].exp().sum(),
    "sliced and selected": lambda x: (x[0].sin() * x[1:]).sum(),
    "and read as a whole": lambda x: (x[0].sin() * x[1] * x[2]).sum() + x.exp().sum(),
    "of two dimensions": lambda x: (x[0].sin() * x[1] * x[2]).sum() + (x[:, :2] * x[:, 3:5]).sum() + x[:, 2].exp().sum(),
}
NO_PARTS = {
    "not all": lambda x: (x[0].sin() * x[2]).sum(),
    "one twice": lambda x: (x[0].sin() * x[1]).sum() + (x[1:] ** 2).sum(),
    "with a gap": lambda x: (x[:, :2].sin() * x[:, 3:5]).sum(),
    "every other": lambda x: (x[:, ::2].sin() * x[:, :3]).sum() + x[:, 1::2].exp().sum(),
    "overlapping": lambda x: (x[:, :3].sin() * x[:, 2:]).sum(),
    "of parts": lambda x: (x[0][:2].sin() * x[1][3:]).sum(),
    "nothing": lambda x: x[:, :0].sum() + (x[:, :0] * 2).sum(),
}


@pytest.mark.parametrize("name", PARTS | NO_PARTS)
def test_gradients_of_parts(name, agree):
    torch.manual_seed(0)
    f = nf.value_and_grad((PARTS | NO_PARTS)[name])
    x = torch.randn(3, 5, 4)
    ran = agree(f, x)
    assert name not in PARTS or not {"aten.select_backward", "aten.slice_backward"} & set(ran)


def places(x, whole):
    for i in range(3):
        whole[i] = x[i].sin()
    return whole


def columns(x, whole):
    for i in (3, 0, -2, 1):
        whole[..., i] = x[..., i].sin() + i
    return whole


def ranges(x, whole):
    whole[:, :2], whole[:, 3:] = x[:, :2].sin(), x[:, 3:].cos()
    whole[:, 2] = x[:, 0]
    return whole


def some_of_it(x, whole):
    whole[0], whole[2] = x[0].sin(), x[1].cos()
    return whole


def twice(x, whole):
    for i in (0, 1, 0, 2, 1):
        whole[i] = x[i].sin() * i + x[0]
    return whole


def read_back(x, whole):
    for i in range(3):
        whole[i] = x[i].sin() + whole[i - 1]
    return whole


WRITTEN = {f.__name__: f for f in (places, columns, ranges, some_of_it, twice, read_back)}


def overlapping(x, whole):
    whole[:, :3], whole[:, 2:] = x[:, :3].sin(), x[:, 2:].cos()
    return whole


def every_other(x, whole):
    whole[:, ::2], whole[:, 1::2] = x[:, ::2].sin(), x[:, 1::2].cos()
    return whole


def along_both(x, whole):
    whole[0], whole[:, 1] = x[0].sin(), x[:, 1].cos()
    return whole


def read_between(x, whole):
    whole[0] = x[0].sin()
    before = whole.exp()
    whole[1] = x[1].cos()
    return whole * before


LEFT = {f.__name__: f for f in (overlapping, every_other, along_both, read_between)}


@pytest.mark.parametrize("name", WRITTEN | LEFT)
@pytest.mark.parametrize("start", [torch.zeros_like, lambda x: x * 2], ids=["new", "given"])
def test_writes(name, start, agree):
    torch.manual_seed(0)
    write = (WRITTEN | LEFT)[name]
    f = lambda x: (write(x, start(x)).exp(),)
    x = torch.randn(3, 5, 4)
    found = {name.removeprefix("aten.") for name in agree(f, x)}
    agree(nf.value_and_grad(lambda x: (f(x)[0] * torch.arange(60.0, dtype=x.dtype).view(3, 5, 4)).sum()), x)
    assert bool(found & {"select_scatter", "slice_scatter"}) == (name in LEFT), found


STACKS = {
    "first": lambda *parts: torch.stack(parts).exp(),
    "last": lambda *parts: torch.stack(parts, -1).exp(),
    "reordered": lambda *parts: torch.stack(parts).permute(1, 3, 0, 2).reshape(3, -1).exp(),
    "transposed, and read twice": lambda *parts: (x := torch.stack(parts, 1).permute(2, 0, 3, 1)).reshape(4, -1) * 2 + x.sum(),
    "a part of it": lambda *parts: torch.stack(parts)[:2].permute(1, 0, 2, 3).reshape(3, -1),
    "one": lambda part, *_: torch.stack([part]).permute(1, 0, 3, 2).reshape(-1),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks(name, agree):
    torch.manual_seed(0)
    args = [torch.randn(3, 4, 5) for _ in range(3)]
    f = lambda *parts: (STACKS[name](*(part.sin() for part in parts)),)
    ran = agree(f, *args)
    agree(nf.grad(lambda *parts: STACKS[name](*parts).square().sum(), (0, 1, 2)), *args)
    assert name != "reordered" or not {"aten.stack", "aten.clone"} & set(ran)


def test_gradients_of_attention_stacked(agree):
    def attention(x, weight):
        q, k, v = F.linear(x, weight).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2).square().sum()

    torch.manual_seed(0)
    args = torch.randn(2, 9, 16) / 4, torch.randn(48, 16) / 4
    f = nf.grad(attention, (0, 1))
    assert not {"aten.stack", "aten.clone", "aten.cat"} & set(agree(f, *args))


def copied(jitted):
    """The concatenations of a jitted function's only program that aren't in place."""
    program = jitted.programs[0].program
    return [eq for eq in program.graph.equations if eq.name == "aten.cat" and eq not in program.plan.in_place]


SHARED = {
    "read before": lambda a, b: (torch.cat([p := a.sin(), q := b.cos()]).exp(), p @ p.t(), q @ q.t()),
    "read later": lambda a, b: (torch.cat([p := a.sin(), q := b.cos()]).exp(), (p @ q.t()).sin(), p.exp() @ q.t()),
    "read with the whole": lambda a, b: (torch.cat([p := a.sin(), b.cos()]) @ p.t() @ a,),
    "in two": lambda a, b: (torch.cat([p := a.sin(), b.cos()]) @ a.t(), torch.cat([b.exp(), p]) @ b.t(), p @ p.t()),
    "in a part": lambda a, b: (torch.cat([torch.cat([p := a.sin(), q := b.cos()]), c := (p @ q.t() @ q / 1e3).sin()]) @ a.t(), c @ p.t()),
    "twice": lambda a, b: (torch.cat([p := a.sin(), p]) @ a.t(), b + 1),
}


@pytest.mark.parametrize("name", SHARED)
def test_parts_that_others_read_too(name, agree, names):
    """They are in the whole's memory all the same, as long as anybody reads either."""
    torch.manual_seed(0)
    args = torch.randn(40, 64), torch.randn(40, 64)
    agree(SHARED[name], *args)
    f = nf.jit(SHARED[name])
    f(*args)
    assert len(copied(f)) == (name in ("in two", "twice"))


GATED = {
    "silu and product": lambda x, w: (lambda a, b: F.silu(a) * b)(*(x @ w).chunk(2, -1)),
    "F.glu": lambda x, w: F.glu(x @ w),
    "three": lambda x, w: (lambda a, b, c: a.sin() * b.cos() + c.tanh())(*(x @ w).split(16, -1)),
    "of different widths": lambda x, w: (lambda a, b: a.sin()[..., :8] * b.cos())(*(x @ w).split([40, 8], -1)),
    "in the middle": lambda x, w: (lambda a, b: a.sin() * b)(*(x @ w).unflatten(-1, (2, 24)).unbind(-2)),
    "normalised": lambda x, w: (lambda a, b: F.layer_norm(a, (24,)) * b)(*(x @ w).chunk(2, -1)),
    "of one column": lambda x, w: (lambda a, b: a.sin().sum(-1, keepdim=True) * b)(*(x @ w).split([47, 1], -1)),
    "used twice": lambda x, w: (lambda a, b: F.silu(a) * b + a.detach())(*(x @ w).chunk(2, -1)),
}


@pytest.mark.parametrize("own", [False, True], ids=["aten", "own"])
@pytest.mark.parametrize("name", GATED)
def test_gradients_side_by_side(name, own, agree, timed):
    """Gradients of the parts of a product are written where they make one gradient."""
    timed("own" if own else "aten")
    torch.manual_seed(0)
    args = torch.randn(3, 35, 20), torch.randn(20, 48)
    f = nf.grad(lambda x, w: GATED[name](x, w).square().mean(), (0, 1))
    agree(f, *args)
    jitted = nf.jit(f)
    jitted(*args)
    assert bool(copied(jitted)) == (name == "of one column")


def test_a_result_in_parts(agree):
    """The caller's own memory: parts are copied there."""
    agree(lambda a, b: (torch.cat([a.sin(), b.cos()], -1),), torch.randn(5, 7), torch.randn(5, 9))
    agree(lambda a, b: (torch.cat([a.sin(), b.cos()], -1).t(), a.exp()), torch.randn(5, 7), torch.randn(5, 9))
