"""Capture: what a graph holds, purity, and errors that name the user's line."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import neuralforge as nf
from neuralforge.errors import CaptureError
from neuralforge.graph import capture, verify
from neuralforge.graph.ir import substitute
from neuralforge.models import ModelConfig, build, next_token_loss


def check(f, *args):
    """The captured graph computes what eager code does, and leaves the arguments as eager code does."""
    captured = capture(f, *args)
    verify(captured.graph, types=True)
    eager_args = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    torch.manual_seed(0)
    expected = f(*eager_args)
    torch.manual_seed(0)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    before = [t.clone() for t in tensors]
    results = captured.graph(*tensors)
    flat = expected if isinstance(expected, tuple) else (expected,)
    for got, want in zip(results, flat):
        assert torch.equal(got, want)
    for position, new in zip(captured.writes, results[len(flat):]):
        assert torch.equal(new, eager_args[position])
    for tensor, old in zip(tensors, before):
        assert torch.equal(tensor, old), "running a graph must not write to its inputs"
    return captured


def test_a_layer():
    def f(x, w, b):
        return F.gelu(F.linear(x, w, b)).softmax(-1)

    graph = check(f, torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)).graph
    assert "aten.addmm" in str(graph)
    assert "test_capture.py:" in str(graph), "every equation names the user's line"


def test_structure_of_results_and_static_values():
    captured = capture(lambda x: {"a": x + 1, "n": 3, "none": None}, torch.ones(2))
    assert captured.graph.outputs[1] == 3
    assert captured.out_tree.num_leaves == 3


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(1),
        lambda x: x[0].mul_(3),
        lambda x: x.view(-1)[1:3].fill_(7.0),
        lambda x: x.t().select(0, 1).copy_(torch.arange(2.0)),
        lambda x: x.diagonal().zero_(),
        lambda x: x.unbind(0)[1].sub_(2),
        lambda x: x.split(1, dim=1)[2].neg_(),
        lambda x: x.permute(1, 0)[2].add_(5),
        lambda x: x.unsqueeze(0).squeeze(0).mul_(2),
        lambda x: torch.mul(x, 2, out=x),
        lambda x: x.as_strided((2,), (3,)).add_(1),
    ],
)
def test_writes_through_views_are_functional(write):
    def f(x):
        y = x * 1
        view = y[1]
        write(y)
        write(y)
        return y, view * 2, y.sum()

    check(f, torch.randn(2, 3))


BY_STORAGE = {
    "the diagonal": lambda x: x.fill_diagonal_(2.0),
    "a part's diagonal": lambda x: x[1:].clone().fill_diagonal_(2.0),
    "a part": lambda x: x.as_strided((2, 3), (4, 1), 2),
    "a copy": lambda x: torch.as_strided_copy(x, (2, 3), (4, 1), 1),
    "written": lambda x: x.as_strided((2,), (5,), 1).mul_(2) + x.sum(),
    "scattered": lambda x: torch.as_strided_scatter(x, x[:2, :3] * 2, (2, 3), (4, 1), 1),
}


@pytest.mark.parametrize("name", BY_STORAGE)
def test_as_strided_counts_from_its_operand(name):
    """Compiled programs put tensors elsewhere than at the beginning of a memory of their own."""
    torch.manual_seed(0)
    f = lambda x, w: BY_STORAGE[name](w @ (w @ x)).sin().sum()
    x, w = torch.randn(4, 4), torch.randn(4, 4)
    torch.testing.assert_close(nf.jit(f)(x, w), f(x, w), rtol=1e-4, atol=1e-4)
    step = nf.grad(f, (0, 1))
    torch.testing.assert_close(nf.jit(step)(x, w), step(x, w), rtol=1e-4, atol=1e-4)


def test_memory_before_the_operand_is_refused():
    with pytest.raises(CaptureError, match="test_capture.py.*begins 4 elements before its operand.*larger tensor"):
        nf.jit(lambda x: x.sin()[1:].as_strided((4,), (1,), 0) * 2)(torch.randn(4, 4))


def test_write_through_a_view_made_after_a_write():
    def f(x):
        y = x * 1
        y.add_(1)
        row = y[0]
        row.mul_(2)
        y.sub_(3)
        row.add_(10)
        return y, row

    check(f, torch.randn(2, 3))


def test_writes_to_arguments_are_reported():
    def f(x, y):
        x[0].add_(y[0])
        return x.sum()

    assert check(f, torch.ones(2, 3), torch.ones(2, 3)).writes == [0]


def test_dtype_of_an_in_place_result_is_kept():
    def f(x):
        y = x.to(torch.int64)
        y.add_(1)
        return y

    check(f, torch.ones(3))


def test_random_operators_are_captured_not_baked_in():
    captured = check(lambda x: F.dropout(x, 0.5), torch.ones(64))
    first, second = captured.graph(torch.ones(64))[0], captured.graph(torch.ones(64))[0]
    assert not torch.equal(first, second)


def test_constants_are_held_by_reference():
    weight = torch.ones(3)
    captured = capture(lambda x: x * weight, torch.ones(3))
    weight.fill_(5.0)
    assert captured.graph(torch.ones(3))[0].tolist() == [5, 5, 5]


def test_a_large_model_costs_no_memory():
    layer = torch.nn.Linear(100_000, 100_000, device="meta")
    w = layer.weight
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        w, x = torch.empty(100_000, 100_000), torch.empty(1, 100_000)
    del mode
    captured = capture(lambda x, w: x @ w.t(), x, w)  # 40 GB, if it were real
    assert captured.graph.outputs[0].shape == (1, 100_000)


def branch(x):
    if x.sum() > 0:
        return x
    return -x


def test_data_dependent_branch():
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+: the program asks for the value of a tensor"):
        capture(branch, torch.ones(2))


def test_data_dependent_shape():
    with pytest.raises(CaptureError, match="shape depends on the data"):
        capture(lambda x: x[x > 0], torch.ones(2))


LENGTHS = torch.tensor([3, 1])
FIXED_SHAPE = {
    "output_size": (lambda x, n: x.repeat_interleave(n, 0), lambda x, n: x.repeat_interleave(n, 0, output_size=4)),
    "index_add": (lambda x, n: torch.bincount(n), lambda x, n: n.new_zeros(4).index_add(0, n, torch.ones_like(n))),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED_SHAPE)
def test_what_to_do_about_a_data_dependent_shape(name):
    refused, mended = FIXED_SHAPE[name]
    x = torch.randn(2, 5)
    with pytest.raises(CaptureError, match=rf"test_capture\.py:\d+: .*shape depends on the data.*{name}"):
        nf.jit(lambda x, n: refused(x, n) * 1)(x, LENGTHS)
    torch.testing.assert_close(nf.jit(lambda x, n: mended(x, n) * 1)(x, LENGTHS), refused(x, LENGTHS))
    if name != "index_add":
        slope = nf.grad(lambda x, n: mended(x, n).sum())
        wanted = x.clone().requires_grad_()
        refused(wanted, LENGTHS).sum().backward()
        torch.testing.assert_close(nf.jit(slope)(x, LENGTHS), wanted.grad)


def test_write_to_a_captured_constant():
    total = torch.zeros(2)
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+: in-place write to a captured constant.*\(2,\)"):
        capture(lambda x: total.add_(x), torch.ones(2))
    assert total.tolist() == [0, 0]


def test_refused_in_place_operator():
    with pytest.raises(CaptureError, match="changes a tensor's shape in place"):
        capture(lambda x: (x * 1).t_(), torch.ones(2, 3))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_types_are_those_that_pytorch_itself_infers(kind):
    """The types of a whole training graph, most of them out of the cache, against fresh fake tensors."""
    config = ModelConfig(kind, 50, 16, 32, 3, 4, 4, 48)
    model = build(config)
    params = {name: p.detach() for name, p in model.named_parameters()}
    tokens = torch.zeros(2, 9, dtype=torch.int64)

    def loss(p, tokens):
        return next_token_loss(torch.func.functional_call(model, p, (tokens[:, :-1],)), tokens[:, 1:])

    graph = capture(nf.value_and_grad(loss), params, tokens).graph
    mode, plain = FakeTensorMode(), {}
    with mode:
        for v in (*graph.inputs, *graph.constants):
            plain[v] = torch.empty_strided(v.shape, v.strides, dtype=v.dtype)
        for eq in graph.equations:
            out = eq.op(*substitute(eq.args, plain), **substitute(eq.kwargs, plain))
            for v, x in zip(eq.results, out if isinstance(out, (tuple, list)) else [out]):
                plain[v] = x
                assert (x.shape, x.stride(), x.storage_offset(), x.dtype) == (
                    v.shape, v.strides, v.fake.storage_offset(), v.dtype,
                ), eq  # fmt: skip
    pairs = {(x.untyped_storage()._cdata, v.fake.untyped_storage()._cdata) for v, x in plain.items()}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}), "the same tensors share memory"


def test_the_collector_is_left_as_it_was():
    seen = []
    capture(lambda x: seen.append(gc.isenabled()) or x, torch.ones(2))
    assert seen == [False] and gc.isenabled()
    with pytest.raises(CaptureError):
        capture(lambda x: x if x.sum() > 0 else -x, torch.ones(2))
    assert gc.isenabled()


def test_asking_for_data_names_the_line():
    x = torch.randn(3)
    for f in (lambda x: x * x.numpy(), lambda x: torch.tensor([x[0], x[1]]), lambda x: f"{x.sum():.3f}"):
        with pytest.raises(CaptureError, match=r"test_capture\.py:\d+: the program asks for the data .*nf\.opaque"):
            capture(f, x)


def test_a_tensor_that_outlives_its_capture():
    kept = []
    capture(lambda x: kept.append(x * 2), torch.randn(3))
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+: a tensor of shape \(3,\) that was made while another"):
        capture(lambda x: x + kept[0], torch.randn(3))


def test_values_that_depend_on_literals_alone_are_known():
    """As those of a mask made within, which nn.TransformerEncoder compares with a causal one."""

    def f(x):
        mask = torch.nn.Transformer.generate_square_subsequent_mask(4)
        causal = torch.full((4, 4), float("-inf")).triu_(1)
        count = int(torch.tensor([1, 2, 3]).sum())
        if torch.equal(mask, causal) and bool((mask == causal).all()):
            return x * count
        return x

    x = torch.randn(3)
    torch.testing.assert_close(capture(f, x).graph(x)[0], x * 6)
    torch.testing.assert_close(nf.jit(nf.grad(lambda x: f(x).sum()))(x), torch.full((3,), 6.0))


def off_diagonal(x):
    scores, others = x @ x.t(), ~torch.eye(len(x), dtype=torch.bool)
    return scores[others].view(len(x), -1).logsumexp(1).mean() + torch.masked_select(scores, others).sin().sum()


def triangles(x):
    rows, columns = torch.where(torch.ones(4, 3).tril() > 0)
    part = x[torch.tensor([True, False, True, True]), 1]
    return (x[rows, columns] * part.sum()).cumsum(0).sin().sum() + torch.combinations(x[0]).prod(1).sum()


def written(x):
    scores, others = x @ x.t(), ~torch.eye(len(x), dtype=torch.bool)
    scores[others] = scores[others] * torch.arange(len(x) * (len(x) - 1))
    return (scores.sin() * torch.arange(4).repeat_interleave(torch.tensor([0, 1, 2, 1]))).sum()


@pytest.mark.parametrize("f", [off_diagonal, triangles, written])
def test_shapes_that_depend_on_literals_alone_are_known(f):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    value = f(x)
    value.backward()
    torch.testing.assert_close(nf.jit(nf.value_and_grad(f))(x.detach()), (value.detach(), x.grad))
    hvp = lambda x: nf.hvp(f, (x,), (x,))
    torch.testing.assert_close(nf.jit(hvp)(x.detach()), hvp(x.detach()))


@pytest.mark.parametrize("ask", [lambda x, w: x.sum(), lambda x, w: torch.rand(3).sum(), lambda x, w: w.sum()])
def test_other_values_are_asked_for_in_vain(ask):
    w = torch.ones(2)
    with pytest.raises(CaptureError, match="asks for the value of a tensor"):
        capture(lambda x: x * int(ask(x, w)), torch.randn(3))


def test_distributions_arent_validated_while_a_graph_is_captured():
    normal, categorical = torch.distributions.Normal, torch.distributions.Categorical
    f = lambda mean, logits: normal(mean, 1.0).log_prob(torch.tensor(2.0)).sum() + categorical(logits=logits).log_prob(torch.tensor(1))
    mean, logits = torch.randn(3), torch.randn(4)
    torch.testing.assert_close(nf.jit(f)(mean, logits), f(mean, logits))
    torch.testing.assert_close(nf.jit(nf.grad(f))(mean, logits), normal(mean, 1.0).mean * -1 + 2)
    with pytest.raises(ValueError, match="Expected parameter scale"):
        normal(mean, -1.0)
