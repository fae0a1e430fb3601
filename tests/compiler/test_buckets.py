"""Buckets: few compiled forms for all lengths, the results of the plain function, and refusal where padding changes them."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.compiler import jitted as jit_module
from neuralforge.errors import CaptureError

T = (8, 16)


@pytest.fixture
def captures(monkeypatch):
    made, capture = [], jit_module.capture
    monkeypatch.setattr(jit_module, "capture", lambda *args, **kw: (made.append(1), capture(*args, **kw))[1])
    return made


def model(params, tokens):
    """A causal model of one attention layer."""
    h = params["table"][tokens]
    a = F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], is_causal=True)[:, 0]
    return F.gelu(h + a) @ params["out"]


def loss_fn(params, tokens, targets):
    logits = model(params, tokens)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def setup(n, batch=3):
    torch.manual_seed(0)
    params = {"table": torch.randn(20, 6), "out": torch.randn(6, 20)}
    return params, torch.randint(0, 20, (batch, n)), torch.randint(0, 20, (batch, n))


def test_a_training_step_at_every_length(captures):
    optimizer = nf.optim.adamw(1e-2)

    def step(state, tokens, targets):
        loss, grads = nf.value_and_grad(loss_fn)(state["params"], tokens, targets)
        updates, new = optimizer.update(grads, state["optimizer"], state["params"])
        return {"params": nf.optim.apply_updates(state["params"], updates), "optimizer": new}, loss

    jitted = nf.jit(step, donate=0, buckets={"tokens": {1: T}, 2: {1: T}}, pad={2: -100})
    params = setup(1)[0]
    state = {"params": params, "optimizer": optimizer.init(params)}
    plain = {"params": {k: v.clone() for k, v in params.items()}, "optimizer": optimizer.init(params)}
    for n in (5, 8, 3, 16, 12, 9, 7, 1):
        _, tokens, targets = setup(n)
        state, loss = jitted(state, tokens, targets=targets) if n == 3 else jitted(state, tokens, targets)
        plain, expected = step(plain, tokens, targets)
        assert torch.allclose(loss, expected, rtol=1e-4)
    assert all(torch.allclose(state["params"][k], plain["params"][k], rtol=1e-3, atol=1e-4) for k in params)
    assert len(captures) == 3, "a form for each bucket, and one for the call by keyword"


def test_results_are_cut_back(captures):
    params, tokens, _ = setup(11)
    f = nf.jit(
        lambda p, batch: {"logits": model(p, batch["tokens"]), "n": (batch["tokens"] > 0).sum(1)},
        buckets={"batch.tokens": {-1: T}},
    )
    for n in (11, 10, 16):
        found = f(params, {"tokens": tokens[:, :n].clone() if n < 16 else setup(16)[1]})
        given = tokens[:, :n] if n < 16 else setup(16)[1]
        assert found["logits"].shape == (3, n, 20)
        assert torch.allclose(found["logits"], model(params, given), rtol=1e-4, atol=1e-5)
        assert torch.equal(found["n"], (given > 0).sum(1))
    assert len(captures) <= 2


def test_lengths_that_come_apart_are_told_apart():
    f = nf.jit(lambda a, b: (a.exp(), b.exp(), a.sum() + b.sum()), buckets={"a": {0: T}, "b": {0: T}})
    for n, m in ((5, 5), (5, 7), (7, 5), (8, 3), (3, 12), (12, 12), (12, 16)):
        a, b = torch.randn(n), torch.randn(m)
        x, y, s = f(a, b)
        assert (
            torch.allclose(x, a.exp())
            and torch.allclose(y, b.exp())
            and torch.allclose(s, a.sum() + b.sum(), atol=1e-5)
        )
    g = nf.jit(lambda a, b: a + b, buckets={"a": {0: T}, "b": {0: T}})
    g(torch.randn(5), torch.randn(5))
    with pytest.raises(RuntimeError, match="must match the size"):  # the error of the plain function
        g(torch.randn(5), torch.randn(6))


@pytest.mark.parametrize(
    "f, expected",
    [
        (
            lambda x: x.mean(0),
            "padding x from 5 to 8 along dimension 0 changes the result.*Mask what is padded",
        ),
        (lambda x: x.softmax(0).sum(1), "changes the result"),
        (lambda x: {"n": x.shape[0]}, r"makes output\['n'\] 8 instead of 5"),
        (lambda x: x.flatten(), r"shape \(24,\) instead of \(15,\): it isn't clear"),
        (lambda x: torch.cat([x, x]), "isn't clear"),
        (lambda x: x.flip(0), "changes the result"),
        (lambda x: (x[0], x) if len(x) > 6 else x, "changes the structure"),
        (lambda x: x.add_(1), "writes in place to an argument that buckets pads"),
        (lambda x: x.argmin(0), "changes the result"),
        (lambda x: 1 / x.sum(1), None),
        (lambda x: x.amax(0) / 0, None),
    ],
)
def test_what_padding_changes_is_refused(f, expected):
    x = torch.rand(5, 3) + 0.5
    jitted = nf.jit(f, buckets={"x": {0: T}})
    if expected is None:
        assert torch.allclose(jitted(x.clone()), f(x))
    else:
        with pytest.raises(CaptureError, match=expected):
            jitted(x.clone())
        with pytest.raises(CaptureError, match=expected):  # and is not trusted the second time
            jitted(x.clone())


def test_a_refused_call_leaves_donated_arguments_alone():
    f = nf.jit(lambda s, x: s + x.mean(), donate=0, buckets={"x": {0: T}})
    s = torch.zeros(4)
    with pytest.raises(CaptureError):
        f(s, torch.rand(5))
    assert s.tolist() == [0] * 4


def test_random_functions_warn_once_and_keep_their_shapes():
    f = nf.jit(lambda x: F.dropout(x, 0.5), buckets={"x": {0: T}})
    with pytest.warns(UserWarning, match="draws random numbers"):
        assert f(torch.ones(5)).shape == (5,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(f(torch.ones(7)).tolist()) <= {0.0, 2.0}


def test_gradients_by_torch_autograd_and_by_transforms():
    f = lambda w, x: (w * x.square().sum()).exp().sum()
    jitted = nf.jit(f, buckets={"x": {0: T}})
    w, x = torch.randn(3) / 9, torch.rand(5, requires_grad=True)
    (found,) = torch.autograd.grad(jitted(w, x), x)
    (expected,) = torch.autograd.grad(f(w, x), x)
    assert found.shape == (5,) and torch.allclose(found, expected, rtol=1e-4)
    assert torch.allclose(nf.grad(jitted, argnums=1)(w, x.detach()), expected, rtol=1e-4)


def test_errors_name_what_to_mend():
    f = lambda x, n=1: x * n
    for buckets, pad, expected in [
        ({"x": (8, 16)}, None, "expected {dimension"),
        ({"x": {0: (16, 8)}}, None, "growing sizes"),
        ({"x": {0: T}}, {"y": 1}, r"pad names \['y'\]"),
    ]:
        with pytest.raises(CaptureError, match=expected):
            nf.jit(f, buckets=buckets, pad=pad)
    for buckets, pad, args, expected in [
        ({"x": {0: T}}, None, (torch.ones(17),), "x has 17 along dimension 0, and its largest bucket is 16"),
        ({"x": {2: T}}, None, (torch.ones(3),), "has 1 dimensions"),
        ({"z": {0: T}}, None, (torch.ones(3),), "buckets names 'z'; the function has x, n"),
        ({"x.a": {0: T}}, None, ({"b": torch.ones(3)},), "there is no 'a'"),
        ({"n": {0: T}}, None, (torch.ones(3), 2), "which is a int; expected a tensor"),
        ({"x": {0: T}}, {"x": 0.5}, (torch.ones(3, dtype=torch.int64),), "expected a whole number"),
    ]:
        with pytest.raises(CaptureError, match=expected):
            nf.jit(f, buckets=buckets, pad=pad)(*args)


def test_explain_shows_the_padded_program():
    told = nf.explain(nf.jit(lambda x: x.exp() * 2, buckets={"x": {0: T}}), torch.ones(5))
    assert tuple(told.graph.inputs[0].shape) == (8,)


def test_a_module_is_tried_anew_in_training():
    """What it computes in evaluation, row by row, may be padded; the mean of a batch may not."""

    class Centred(torch.nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True) if self.training else x * 2

    module, x = Centred().eval(), torch.randn(5, 3) + 3
    jitted = nf.jit(lambda x: module(x), buckets={0: {0: (8, 16)}})
    torch.testing.assert_close(jitted(x), x * 2)
    module.train()
    with pytest.raises(CaptureError, match="padding 0 from 5 to 8"):
        jitted(x)
    torch.testing.assert_close(jitted(x := torch.randn(8, 3)), x - x.mean(0))
    module.eval()
    torch.testing.assert_close(jitted(x[:3]), x[:3] * 2)
