"""Every rule that treats each parameter by itself: its paper written out in float64, a published implementation, eager and
compiled, in float32 and float64, at odd and empty shapes."""

import itertools
import math

import lion_pytorch
import pytest
import schedulefree
import torch

import neuralforge as nf
from neuralforge import optim, resilience
from neuralforge.errors import ConfigError

SHAPES = {"w": (7, 5), "wide": (3, 11), "b": (5,), "s": (), "k": (3, 2, 2, 3), "one": (1, 1), "empty": (0, 3), "none": (0,)}
STEPS = 50
LR, DECAY = 0.02, 0.1


def matrices(p):
    return p.dim() >= 2


def draw(seed, shapes=SHAPES, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def run(optimizer, shapes=SHAPES, dtype=torch.float64, compiled=False, steps=STEPS):
    """Parameters and state after each step, with random gradients."""
    params = draw(0, shapes, dtype)
    state = optimizer.init(params)

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optim.apply_updates(params, updates), state

    step = nf.jit(step) if compiled else step
    for n in range(steps):
        params, state = step(params, state, draw(n + 1, shapes, dtype))
        yield params, state


def close(found, expected, tolerance):
    for name, p in found.items():
        torch.testing.assert_close(p, expected[name].to(p.dtype), rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


# ---- the papers: generators of a parameter's values, from gradients `g` in float64


def sgd(p, grads, wd, momentum=0.0, dampening=0.0, nesterov=False):
    buffer = None
    for g in grads:
        g = g + wd * p
        buffer = g if buffer is None else momentum * buffer + (1 - dampening) * g
        p = p - LR * (g + momentum * buffer if nesterov else buffer)
        yield p


def adamw(p, grads, wd):
    m = v = 0 * p
    for t, g in enumerate(grads, start=1):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        p = p - LR * (m / (1 - 0.8**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-6) + wd * p)
        yield p


def lion(p, grads, wd):
    m = 0 * p
    for g in grads:
        p = p - LR * (torch.sign(0.8 * m + 0.2 * g) + wd * p)
        m = 0.95 * m + 0.05 * g
        yield p


def adafactor(p, grads, wd, eps=2.0**-52):
    """Algorithms 4 and 5, but with torch's names and eps: 2.2e-16 under the sum of rows, 4.9e-32 under the mean square."""
    rms = lambda x: x.square().sum().div(max(x.numel(), 1)).sqrt()
    mean = lambda x, dim: x.sum(dim) / max(x.shape[dim], 1)
    r = c = v = 0.0
    for t, g in enumerate(grads, start=1):
        b = 1 - t**-0.8
        if p.dim() > 1:
            r, c = b * r + (1 - b) * mean(g.square(), -1), b * c + (1 - b) * mean(g.square(), -2)
            v = r[..., :, None] * c[..., None, :] / mean(r, -1)[..., None, None].clamp(min=eps)
        else:
            v = b * v + (1 - b) * g**2
        u = g / v.clamp(min=eps**2).sqrt()
        rho = min(LR, t**-0.5)
        p = p - (LR * wd * p) - max(1e-3, rms(p)) * rho * u / max(1.0, rms(u))
        yield p


def schedule_free(p, grads, wd):
    """Algorithm 1: gradients at y, steps of z, x the average; here with the rate's square as the weight."""
    x = z = y = p
    v, weights, largest = 0 * p, 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        rate = LR * min(1.0, t / 10)
        v = 0.95 * v + 0.05 * g**2
        z = z - rate * (g / ((v / (1 - 0.95**t)).sqrt() + 1e-6) + wd * y)
        largest = max(largest, rate)
        weights += largest**2
        x = x + (z - x) * largest**2 / weights
        y = 0.1 * z + 0.9 * x
        yield x


def free(lr=None, wd=DECAY):
    lr = optim.schedules.constant(LR, warmup=10) if lr is None else lr
    return optim.schedule_free_adamw(lr, (0.9, 0.95), 1e-6, wd, matrices)


MINE = {
    "sgd": (lambda wd: optim.sgd(LR, weight_decay=wd), sgd),
    "momentum": (lambda wd: optim.sgd(LR, 0.9, weight_decay=wd), lambda *a: sgd(*a, momentum=0.9)),
    "dampening": (lambda wd: optim.sgd(LR, 0.9, 0.3, wd), lambda *a: sgd(*a, momentum=0.9, dampening=0.3)),
    "nesterov": (lambda wd: optim.sgd(LR, 0.9, 0.0, wd, True), lambda *a: sgd(*a, momentum=0.9, nesterov=True)),
    "adamw": (lambda wd: optim.adamw(LR, (0.8, 0.95), 1e-6, wd), adamw),
    "lion": (lambda wd: optim.lion(LR, (0.8, 0.95), wd), lion),
    "adafactor": (lambda wd: optim.adafactor(LR, weight_decay=wd), adafactor),
    "schedule_free": (lambda wd: free(wd=wd), schedule_free),
}

@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("name", MINE)
def test_equals_the_paper(name, dtype, tolerance, compiled):
    make, paper = MINE[name]
    optimizer = optim.groups({"[wk]*": make(DECAY), "*": make(0.0)})  # groups by name, one of which decays
    feeds = [draw(n + 1) for n in range(STEPS)]
    truth = {n: paper(p, [f[n] for f in feeds], DECAY if n[0] in "wk" else 0.0) for n, p in draw(0).items()}
    for params, state in run(optimizer, dtype=dtype, compiled=compiled):
        expected = {n: next(values) for n, values in truth.items()}
        close(optimizer.evaluate(params, state), expected, tolerance)
    assert all(x.isfinite().all() for x in torch.utils._pytree.tree_leaves(state))


PUBLISHED = {
    "sgd": lambda g: torch.optim.SGD(g, LR),
    "momentum": lambda g: torch.optim.SGD(g, LR, 0.9),
    "dampening": lambda g: torch.optim.SGD(g, LR, 0.9, 0.3),
    "nesterov": lambda g: torch.optim.SGD(g, LR, 0.9, nesterov=True),
    "adamw": lambda g: torch.optim.AdamW(g, LR, (0.8, 0.95), 1e-6),
    "lion": lambda g: lion_pytorch.Lion(g, LR, (0.8, 0.95)),
    "adafactor": lambda g: torch.optim.Adafactor(g, LR),
    "schedule_free": lambda g: schedulefree.AdamWScheduleFree(g, LR, (0.9, 0.95), 1e-6, warmup_steps=10),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_the_published(name):
    """Parameter by parameter, in two groups; torch's Adafactor divides by the elements of an empty tensor."""
    shapes = {n: s for n, s in SHAPES.items() if 0 not in s} if name == "adafactor" else SHAPES
    make, _ = MINE[name]
    optimizer = optim.groups({"[wk]*": make(DECAY), "*": make(0.0)})
    theirs = {n: p.requires_grad_() for n, p in draw(0, shapes).items()}
    part = lambda decays: [p for n, p in theirs.items() if (n[0] in "wk") == decays]
    groups = [{"params": part(True), "weight_decay": DECAY}, {"params": part(False), "weight_decay": 0.0}]
    reference = PUBLISHED[name](groups)
    for n, (params, state) in enumerate(run(optimizer, shapes)):
        if name == "schedule_free":
            reference.train()
        for key, g in draw(n + 1, shapes).items():
            theirs[key].grad = g
        reference.step()
        close(params, {n: p.detach() for n, p in theirs.items()}, 1e-11)
        if name == "schedule_free":
            reference.eval()
            close(optimizer.evaluate(params, state), {n: p.detach() for n, p in theirs.items()}, 1e-11)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_a_complex_number_is_two_real_ones(name, compiled):
    optimizer, generator = MINE[name][0](DECAY), torch.Generator().manual_seed(0)
    p = torch.randn(3, 4, dtype=torch.complex128, generator=generator)
    theirs, state = p.clone().requires_grad_(), optimizer.init(p)
    reference = PUBLISHED[name]([{"params": [theirs], "weight_decay": DECAY}])
    update = nf.jit(optimizer.update) if compiled else optimizer.update
    for _ in range(4):
        g = torch.randn(3, 4, dtype=torch.complex128, generator=generator)
        theirs.grad = g.clone()
        reference.step()
        updates, state = update(g.conj().resolve_conj().conj(), state, p)  # conjugated only when it is read
        p = optim.apply_updates(p, updates)
        assert torch.allclose(p, theirs, rtol=0, atol=1e-11)


PREDICATED = {
    "adamw": lambda **o: optim.adamw(LR, **o),
    "lion": lambda **o: optim.lion(LR, **o),
    "adafactor": lambda **o: optim.adafactor(LR, **o),
    "schedule_free": lambda **o: optim.schedule_free_adamw(LR, **o),
}


@pytest.mark.parametrize("name", PREDICATED)
def test_decay_by_a_predicate_is_decay_by_groups(name):
    make = PREDICATED[name]
    small = {"w": (7, 5), "b": (5,)}
    by_group = optim.groups({"w": make(weight_decay=DECAY), "*": make(weight_decay=0.0)})
    for (found, _), (expected, _) in zip(run(make(weight_decay=DECAY, decay=matrices), small), run(by_group, small)):
        close(found, expected, 0.0)


@pytest.mark.parametrize("name", MINE)
def test_a_schedule_is_the_rate_of_each_step(name):
    """Constant by a function is constant, bit for bit up to how the number is rounded; 0 moves nothing."""
    makers = {
        "sgd": optim.sgd, "momentum": lambda lr: optim.sgd(lr, 0.9), "dampening": lambda lr: optim.sgd(lr, 0.9, 0.3),
        "nesterov": lambda lr: optim.sgd(lr, 0.9, nesterov=True), "adamw": optim.adamw, "lion": optim.lion,
        "adafactor": optim.adafactor, "schedule_free": free,
    }  # fmt: skip
    small = {"w": (7, 5), "b": (5,)}
    make = makers[name]
    for (found, _), (expected, _) in zip(run(make(optim.schedules.constant(LR)), small), run(make(LR), small)):
        close(found, expected, 1e-13)
    stopped = list(run(make(lambda done: torch.where(done < 3, LR, 0.0)), small, steps=6))
    close(stopped[5][0], stopped[2][0], 0.0 if name != "schedule_free" else math.inf)


ALL = {
    **{name: lambda make=make: make(DECAY) for name, (make, _) in MINE.items()},
    "lookahead": lambda: optim.lookahead(optim.adamw(LR), 5),
    "ema": lambda: optim.ema(optim.sgd(LR, 0.9)),
    "muon": lambda: optim.groups({"w*": optim.muon(LR), "one": optim.muon(LR), "*": optim.adamw(LR)}),
    "clipped": lambda: optim.chain(optim.clip_adaptively(), optim.clip_by_global_norm(1.0), optim.lion(LR), optim.scale(0.5)),
    "sophia": lambda: squares_for_curvature(optim.sophia(LR)),
}


def squares_for_curvature(optimizer):
    curved = lambda g, s, p: optimizer.update(g, s, p, curvature={name: x.square() for name, x in g.items()})
    return optim.Optimizer(optimizer.init, curved, optimizer.evaluate)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("adafactor", "muon", "clipped")])
def test_a_shard_of_the_state_updates_as_the_whole(name):
    """What works on each element by itself may be cut anywhere; the state is tensors like the parameters, and scalars.
    Left out is what needs whole rows, matrices or norms."""
    optimizer, whole = ALL[name](), {"w": (6, 5), "b": (4,)}
    part = lambda tree, of: {n: x[of::2] for n, x in tree.items()}  # dimensions stay: decay goes by them
    params, pieces = draw(0, whole), [part(draw(0, whole), of) for of in range(2)]
    state, states = optimizer.init(params), [optimizer.init(piece) for piece in pieces]
    for n in range(10):
        grads = draw(n + 1, whole)
        updates, state = optimizer.update(grads, state, params)
        params = optim.apply_updates(params, updates)
        for of in range(2):
            updates, states[of] = optimizer.update(part(grads, of), states[of], pieces[of])
            pieces[of] = optim.apply_updates(pieces[of], updates)
            close(pieces[of], part(params, of), 1e-14)
    shapes = {tuple(p.shape) for p in params.values()} | {()}
    assert all(tuple(x.shape) in shapes for x in torch.utils._pytree.tree_leaves(state))


@pytest.mark.parametrize("name", ALL)
def test_state_saved_and_loaded_goes_on_bit_for_bit(name, tmp_path):
    optimizer = ALL[name]()
    params, state = list(run(optimizer, dtype=torch.float32, compiled=True, steps=7))[-1]
    resilience.save(tmp_path, "state", resilience.flatten({"params": params, "optimizer": state}), {})
    fresh = draw(0, dtype=torch.float32)
    tensors, _ = resilience.load(tmp_path / "state")
    back = resilience.unflatten(tensors, {"params": fresh, "optimizer": optimizer.init(fresh)})
    step = nf.jit(optimizer.update)
    for n in range(7, 14):
        grads = draw(n + 1, dtype=torch.float32)
        updates, state = step(grads, state, params)
        params = optim.apply_updates(params, updates)
        updates, back["optimizer"] = step(grads, back["optimizer"], back["params"])
        back["params"] = optim.apply_updates(back["params"], updates)
    same = zip(*(torch.utils._pytree.tree_leaves(t) for t in ((params, state), (back["params"], back["optimizer"]))))
    assert all(torch.equal(a, b) for a, b in same)


@pytest.mark.parametrize("name", ALL)
def test_compiled_equals_eager_and_frees_the_caller_s_tensors(name):
    """init copies what it keeps of the parameters: a donated step mustn't find one tensor in two places."""
    optimizer = ALL[name]()
    params = draw(0, dtype=torch.float32)
    state = optimizer.init(params)
    kept = {x.data_ptr() for x in torch.utils._pytree.tree_leaves(state) if x.numel()}
    assert not kept & {p.data_ptr() for p in params.values() if p.numel()}
    for (found, a), (expected, b) in zip(run(optimizer, dtype=torch.float64, compiled=True), run(optimizer, dtype=torch.float64)):
        close(found, expected, 1e-11)
        for x, y in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b)):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_half_the_rate_by_scale():
    small = {"w": (7, 5)}
    halved = run(optim.chain(optim.adamw(LR), optim.scale(0.5)), small)
    for (found, _), (expected, _) in zip(halved, run(optim.adamw(LR / 2), small)):
        close(found, expected, 1e-13)


def test_no_parameters_at_all():
    for name, make in ALL.items():
        if name not in ("muon", "clipped"):
            optimizer = make()
            updates, state = optimizer.update({}, optimizer.init({}), {})
            assert updates == {}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: optim.sgd(-1.0), "sgd: lr=-1.0; expected a number of at least 0, or a schedule"),
        (lambda: optim.sgd(0.1, 1.0), "sgd: momentum=1.0"),
        (lambda: optim.sgd(0.1, 0.9, -0.1), "sgd: dampening=-0.1"),
        (lambda: optim.sgd(0.1, nesterov=True), "sgd: nesterov=True; expected False without momentum"),
        (lambda: optim.sgd(0.1, weight_decay=-1), "sgd: weight_decay=-1"),
        (lambda: optim.lion(1e-4, (0.9, 1.0)), r"lion: betas=\(0.9, 1.0\)"),
        (lambda: optim.adafactor(eps=(1e-30, -1.0)), r"adafactor: eps=\(1e-30, -1.0\)"),
        (lambda: optim.adafactor(beta2_decay=0.8), "adafactor: beta2_decay=0.8"),
        (lambda: optim.adafactor(clip=0.0), "adafactor: clip=0.0"),
        (lambda: optim.schedule_free_adamw(1e-3, (0.0, 0.9)), r"schedule_free_adamw: betas=\(0.0, 0.9\); expected two numbers in \(0, 1\)"),
        (lambda: optim.schedule_free_adamw(1e-3, eps=math.nan), "schedule_free_adamw: eps=nan"),
    ],
)  # fmt: skip
def test_values_out_of_range(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_truths_move():
    """A truth that stood still would agree with anything that does."""
    for _, paper in MINE.values():
        values = list(itertools.islice(paper(draw(0)["w"], [draw(n + 1)["w"] for n in range(3)], DECAY), 3))
        assert not torch.allclose(values[0], values[2])
