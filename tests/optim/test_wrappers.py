"""Chains, groups by name, Lookahead, averages of the weights and adaptive clipping."""

import jax
import numpy as np
import optax
import pytest
import pytorch_optimizer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neuralforge as nf
from neuralforge import optim
from neuralforge.errors import ConfigError

SHAPES = {"w": (7, 5), "b": (5,), "s": (), "k": (3, 2, 2, 3), "empty": (0, 3)}
LR, STEPS = 0.02, 50


def draw(seed, shapes=SHAPES, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def run(optimizer, compiled, shapes=SHAPES, **extra):
    params = draw(0, shapes)
    state, update = optimizer.init(params), nf.jit(optimizer.update) if compiled else optimizer.update
    for n in range(STEPS):
        updates, state = update(draw(n + 1, shapes), state, params, **extra)
        params = optim.apply_updates(params, updates)
        yield params, state


def close(found, expected, tolerance=1e-11):
    for name, p in found.items():
        torch.testing.assert_close(p, expected[name].detach(), rtol=tolerance, atol=tolerance)


both = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])


# ---- Lookahead


@both
def test_lookahead_equals_the_paper(compiled):
    """Algorithm 1: after every five steps of the inner optimizer, phi += alpha (theta - phi) and theta = phi."""
    fast = {name: p.clone() for name, p in draw(0).items()}
    slow, m = dict(fast), {name: 0 * p for name, p in fast.items()}
    for n, (params, state) in enumerate(run(optim.lookahead(optim.sgd(LR, 0.9), 5, 0.3), compiled), start=1):
        for name, g in draw(n).items():
            m[name] = 0.9 * m[name] + g
            fast[name] = fast[name] - LR * m[name]
            if n % 5 == 0:
                slow[name] = fast[name] = slow[name] + 0.3 * (fast[name] - slow[name])
        close(params, fast)
        close(state["slow"], slow)


@both
def test_lookahead_equals_pytorch_optimizer(compiled):
    theirs = {name: p.requires_grad_() for name, p in draw(0).items()}
    reference = pytorch_optimizer.Lookahead(torch.optim.AdamW(theirs.values(), LR), k=6, alpha=0.5)
    for n, (params, _) in enumerate(run(optim.lookahead(optim.adamw(LR), 6), compiled)):
        for name, g in draw(n + 1).items():
            theirs[name].grad = g
        reference.step()
        close(params, theirs)


# ---- EMA


@both
def test_ema_equals_the_definition(compiled):
    optimizer = optim.ema(optim.sgd(LR), 0.8)
    p, average = draw(0), draw(0)
    for t, (params, state) in enumerate(run(optimizer, compiled), start=1):
        decay = min(0.8, (1 + t) / (10 + t))
        for name, g in draw(t).items():
            p[name] = p[name] - LR * g
            average[name] = decay * average[name] + (1 - decay) * p[name]
        close(params, p)
        close(optimizer.evaluate(params, state), average)


def test_ema_equals_torch_where_its_decay_is_constant():
    """(1 + t) / (10 + t) is above 0.1 from the first step on."""
    module = torch.nn.ParameterDict({n: torch.nn.Parameter(p) for n, p in draw(0, {"w": (7, 5)}).items()})
    averaged = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.1))
    averaged.update_parameters(module)  # their first call copies
    optimizer = optim.ema(optim.sgd(LR), 0.1)
    for params, state in run(optimizer, False, {"w": (7, 5)}):
        module["w"].data.copy_(params["w"])
        averaged.update_parameters(module)
        close(optimizer.evaluate(params, state), {"w": averaged.module["w"]})


def test_averages_nest():
    """The average of Schedule-Free's average; Lookahead, groups and chains give what is within."""
    inner = optim.schedule_free_adamw(LR)
    params = draw(0)
    wraps = [optim.lookahead(inner), optim.chain(optim.clip_by_global_norm(1e9), inner), optim.groups({"w": inner, "*": inner})]
    for optimizer in (*wraps, optim.loss_scaling(inner), optim.ema(inner, 0.0)):
        for params, state in run(optimizer, False):
            evaluated = optimizer.evaluate(params, state)
        assert not torch.allclose(evaluated["w"], params["w"])
    close(evaluated, inner.evaluate(params, state["optimizer"]))


# ---- adaptive clipping


@both
def test_adaptive_clipping_equals_the_paper(compiled):
    """Unit by unit, in loops."""
    grads, params = draw(1), draw(0)
    params["w"][2] = 0  # a unit of zeros counts as eps
    update = optim.clip_adaptively(1.0, 0.01).update
    found, _ = (nf.jit(update) if compiled else update)(grads, (), params)
    touched = 0
    for name, g in grads.items():
        units = [...] if g.dim() < 2 else range(len(g))
        for unit in units:
            most = 1.0 * max(params[name][unit].norm().item(), 0.01)
            clip = min(1.0, most / g[unit].norm().item())
            touched += clip < 1
            torch.testing.assert_close(found[name][unit], g[unit] * clip)
    assert 0 < touched < 12, "some are clipped, some aren't"


def test_adaptive_clipping_of_complex_numbers_is_that_of_real_ones():
    grads, params = ({"w": torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n))} for n in (0, 1))
    paired = lambda tree: {"w": torch.view_as_complex(tree["w"].unflatten(1, (3, 2)).contiguous())}
    expected, _ = optim.clip_adaptively(0.5).update(grads, (), params)
    found, _ = optim.clip_adaptively(0.5).update(paired(grads), (), paired(params))
    torch.testing.assert_close(found, paired(expected))
    assert not torch.equal(expected["w"], grads["w"])


def test_adaptive_clipping_equals_optax():
    """Which takes columns as units."""
    grads, params = draw(1, {"w": (7, 5), "b": (5,)}), draw(0, {"w": (7, 5), "b": (5,)})
    with jax.enable_x64(True):
        to_jax = lambda tree: {name: jax.numpy.asarray(x.T.numpy() if x.dim() == 2 else x.numpy()) for name, x in tree.items()}
        theirs = optax.adaptive_grad_clip(0.9, 1e-3)
        expected, _ = theirs.update(to_jax(grads), theirs.init(to_jax(params)), to_jax(params))
    found, _ = optim.clip_adaptively(0.9, 1e-3).update(grads, (), params)
    close(to_torch(found), {name: torch.tensor(np.asarray(x)) for name, x in expected.items()})
    assert not torch.equal(found["w"], grads["w"])


def to_torch(tree):
    return {name: x.T if x.dim() == 2 else x for name, x in tree.items()}


# ---- groups and chains


@both
def test_groups_are_optimizers_side_by_side(compiled):
    parts = {"[wk]": optim.adamw(LR), "b": optim.chain(optim.sgd(LR), optim.scale(0.5)), "*": optim.lion(LR)}
    apart = [optim.adamw(LR), optim.sgd(LR / 2), optim.lion(LR)]
    names = [("w", "k"), ("b",), ("s", "empty")]
    states = [o.init({n: draw(0)[n] for n in own}) for o, own in zip(apart, names)]
    expected = draw(0)
    for t, (params, _) in enumerate(run(optim.groups(parts), compiled), start=1):
        for i, (o, own) in enumerate(zip(apart, names)):
            only = lambda tree: {n: tree[n] for n in own}
            updates, states[i] = o.update(only(draw(t)), states[i], only(expected))
            expected.update(optim.apply_updates(only(expected), updates))
        assert params.keys() == expected.keys()
        close(params, expected)


def test_groups_split_extra_arguments_that_are_like_the_parameters():
    seen = {}

    def spy(label):
        def update(grads, state, params, **extra):
            seen[label] = (sorted(grads), extra)
            return grads, state

        return optim.Optimizer(lambda params: (), update)

    optimizer, params = optim.groups({"w": spy("a"), "*": spy("b")}), draw(0)
    optimizer.update(params, optimizer.init(params), params, curvature=draw(5), loss=torch.tensor(2.0), none=None)
    assert seen["a"][0] == ["w"] and seen["b"][0] == ["b", "empty", "k", "s"]
    for names, extra in seen.values():
        assert sorted(extra["curvature"]) == names and extra["loss"] == 2 and extra["none"] is None


def test_names_are_the_way_to_a_leaf():
    tree = {"blocks": [{"w": torch.zeros(2), "b": torch.zeros(1)}, {"w": torch.zeros(2), "b": torch.zeros(1)}]}
    optimizer = optim.groups({"blocks.1.*": optim.sgd(1.0), "*.w": optim.sgd(2.0), "*": optim.sgd(3.0)})
    ones = torch.utils._pytree.tree_map(torch.ones_like, tree)
    updates, _ = optimizer.update(ones, optimizer.init(tree), tree)
    first, second = updates["blocks"]
    assert [first["w"][0], first["b"][0], second["w"][0], second["b"][0]] == [-2, -3, -1, -1]


@given(st.lists(st.sampled_from(["w", "b", "s", "*"]), min_size=1, max_size=4, unique=True))
@settings(max_examples=30, deadline=None)
def test_groups_refuse_what_they_cannot_place(patterns):
    params = draw(0, {"w": (2,), "b": (2,), "s": (2,)})
    optimizer = optim.groups({pattern: optim.sgd(LR) for pattern in patterns})
    star = patterns.index("*") if "*" in patterns else None
    unmatched = star is None and len(patterns) < 3
    idle = star is not None and (star < len(patterns) - 1 or len(patterns) == 4)
    if unmatched or idle:
        with pytest.raises(ConfigError, match="no pattern matches the parameter" if unmatched else "gets no parameter"):
            optimizer.init(params)
    else:
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        assert all(torch.equal(updates[name], params[name] * -LR) for name in params)


def test_extra_arguments_flow_through_every_wrapper():
    shapes = {"w": (7, 5)}
    plain = optim.sophia(LR)
    wrapped = optim.chain(optim.scale(1.0), optim.ema(optim.lookahead(optim.groups({"*": plain}), 10**6)))
    curvature = {"curvature": {"w": torch.ones(7, 5, dtype=torch.float64)}}
    for (found, _), (expected, _) in zip(run(wrapped, True, shapes, **curvature), run(plain, True, shapes, **curvature)):
        close(found, expected)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: optim.lookahead(optim.sgd(LR), 0), "lookahead: every=0; expected at least 1"),
        (lambda: optim.lookahead(optim.sgd(LR), alpha=0.0), r"lookahead: alpha=0.0; expected a number in \(0, 1\]"),
        (lambda: optim.ema(optim.sgd(LR), 1.0), r"ema: decay=1.0; expected a number in \[0, 1\)"),
        (lambda: optim.clip_adaptively(0.0), "clip_adaptively: share=0.0; expected above 0"),
        (lambda: optim.clip_adaptively(eps=0.0), "clip_adaptively: eps=0.0"),
        (lambda: optim.clip_by_global_norm(-1.0), "clip_by_global_norm: max_norm=-1.0; expected above 0"),
        (lambda: optim.groups({"v*": optim.sgd(LR), "*": optim.sgd(LR)}).init(draw(0)), "the pattern 'v\\*' gets no parameter.*Names look like w, b"),
        (lambda: optim.groups({"w": optim.sgd(LR)}).init(draw(0)), "no pattern matches the parameter b; the patterns are w"),
    ],
)  # fmt: skip
def test_errors(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", ["adafactor", "muon", "sophia"])
def test_complex_parameters_are_refused_by_rules_of_real_numbers(name):
    with pytest.raises(ConfigError, match=rf"{name}: the parameter w is torch.complex64; expected real numbers.*adamw or sgd, with groups"):
        getattr(optim, name)(LR).init({"b": torch.ones(2, 2), "w": torch.ones(2, 2, dtype=torch.complex64)})


def test_averages_of_master_weights_and_of_rounded_ones():
    """In the parameters' dtype, rounded once from what the average is in float32."""
    params = draw(0, dtype=torch.bfloat16)
    for wrap in (optim.master_weights, optim.stochastic_rounding):
        inner = optim.ema(optim.sgd(LR), 0.5)
        optimizer = wrap(inner)
        state, trained = optimizer.init(params), params
        for n in range(5):
            updates, state = optimizer.update(draw(n + 1, dtype=torch.bfloat16), state, trained)
            trained = optim.apply_updates(trained, updates)
        evaluated = optimizer.evaluate(trained, state)
        for name, p in evaluated.items():
            assert p.dtype == torch.bfloat16
            assert torch.equal(p, state["optimizer"]["average"][name].to(torch.bfloat16))
        assert not torch.equal(evaluated["w"], trained["w"])
