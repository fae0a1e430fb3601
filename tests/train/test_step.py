"""The captured step follows eager PyTorch, and accumulation equals the large batch."""

from dataclasses import replace

import pytest
import torch

import neuralforge as nf
from neuralforge.models import build, next_token_loss
from neuralforge.train.config import Config, Data, Model, Optimizer, Schedule, Train, resolve
from neuralforge.train.step import curvature_due, make_optimizer, make_step, weights


def config(kind="gpt2", **train):
    return resolve(
        Config(
            model=Model(kind=kind, depth=2, context=16, d_model=32, n_heads=4, n_kv_heads=4 if kind == "gpt2" else 2),
            data=Data(vocab_size=300),
            optimizer=Optimizer(lr=1e-2),
            schedule=Schedule(name="cosine", warmup=10, final=0.1),
            train=Train(**{"steps": 100, "batch": 4, **train}),
        )
    )


@pytest.mark.parametrize("dtype, lr, tolerance", [(torch.float64, 1e-2, 1e-9), (torch.float32, 1e-3, 1e-4)])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_100_steps_follow_eager_pytorch(kind, dtype, lr, tolerance):
    c = config(kind)
    c = replace(c, optimizer=replace(c.optimizer, lr=lr))
    model = build(c.model_config(), 0).to(dtype)
    init, step, _ = make_step(build(c.model_config(), 0).to(dtype), c)
    step, state = nf.jit(step, donate=0), init()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    schedule = nf.optim.schedules.cosine(lr, 100, 10, 0.1)
    generator = torch.Generator().manual_seed(0)
    for n in range(100):
        tokens = torch.randint(0, 300, (4, 17), generator=generator) % (n % 7 + 3)  # something to learn
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(torch.tensor(n)))
        expected = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state, metrics = step(state, tokens)
        assert abs(metrics["loss"] - expected) < tolerance * expected, n
        assert abs(metrics["grad_norm"] - norm) < 10 * tolerance * norm, n
    for name, p in model.named_parameters():
        assert (state["params"][name] - p).norm() < 10 * tolerance * p.norm(), name


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_500_optimised_steps_follow_the_plain_ones(kind):
    """Every pass and kernel against the step's own operators, one by one, on a Markov chain to be learnt."""
    c = config(kind, steps=500)
    c = replace(c, model=replace(c.model, depth=1), optimizer=replace(c.optimizer, lr=3e-3))
    init, step, _ = make_step(build(c.model_config(), 0), c)
    compiled, fast, plain = nf.jit(step, donate=0), init(), init()
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(0, 300, (300, 3), generator=generator)
    losses = []
    for _ in range(500):
        tokens = [torch.randint(0, 300, (4,), generator=generator)]
        for _ in range(16):
            tokens.append(successors[tokens[-1], torch.randint(0, 3, (4,), generator=generator)])
        fast, found = compiled(fast, torch.stack(tokens, 1))
        plain, expected = step(plain, torch.stack(tokens, 1))
        losses.append((found["loss"].item(), expected["loss"].item()))
    found, expected = torch.tensor(losses).T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert expected[-50:].mean() < 0.6 * expected[:50].mean()


def test_accumulation_equals_the_large_batch():
    tokens = torch.randint(0, 300, (8, 17), generator=torch.Generator().manual_seed(0))
    results = []
    for accumulate in (1, 4):
        c = config(batch=8 // accumulate, accumulate=accumulate)
        c = replace(c, optimizer=replace(c.optimizer, eps=1e-3))  # where Adam's sign-like steps don't amplify rounding
        init, step, _ = make_step(build(c.model_config(), 0), c)
        results.append(nf.jit(step)(init(), tokens))
    (a, ma), (b, mb) = results
    assert abs(ma["loss"] - mb["loss"]) < 1e-5 and abs(ma["grad_norm"] - mb["grad_norm"]) < 1e-4
    for name in a["params"]:
        assert (a["params"][name] - b["params"][name]).abs().max() < 1e-5, name


def test_dropout_trains_and_is_off_in_evaluation():
    c = config()
    c = replace(c, model=replace(c.model, dropout=0.5))
    model = build(c.model_config(), 0)
    init, step, loss = make_step(model, c)
    tokens = torch.randint(0, 300, (4, 17))
    state = init()
    step = nf.jit(step)
    assert step(state, tokens)[1]["loss"] != step(state, tokens)[1]["loss"]
    model.eval()
    evaluate = nf.jit(loss)
    assert evaluate(state["params"], tokens) == evaluate(state["params"], tokens)


@pytest.mark.parametrize("name", ["sophia_h", "sophia_g"])
def test_sophia_learns_from_the_curvature(name):
    """The jitted steps follow the rule written out on gradients and estimates taken apart from the step."""
    c = config(accumulate=2, batch=4)
    c = resolve(replace(c, optimizer=Optimizer(name=name, lr=3e-3, curvature_every=4)))
    model = build(c.model_config(), 0)
    init, step, loss_fn = make_step(model, c)
    step, state = nf.jit(step), init()
    p, m, h = state["params"], *({n: torch.zeros_like(x) for n, x in state["params"].items()} for _ in range(2))
    key, schedule, losses = nf.random.key(0), nf.optim.schedules.cosine(3e-3, 100, 10, 0.1), []
    logits = lambda p: torch.func.functional_call(model, p, (tokens[:4, :-1],))
    generator = torch.Generator().manual_seed(0)
    for n in range(40):
        tokens = torch.randint(0, 300, (8, 17), generator=generator) % (n % 3 + 2)
        due = curvature_due(c, n)
        assert due == (n % 4 == 0)
        state, metrics = step(state, tokens, due)
        losses.append(metrics["loss"].item())
        assert ("unclipped" in metrics) == due and (not due or 0 <= metrics["unclipped"] <= 1)
        if n < 9:  # then rounding has grown
            grads, _ = nf.optim.clip_gradients(nf.grad(loss_fn)(p, tokens), 1.0)
            m = {k: 0.96 * m[k] + 0.04 * grads[k] for k in p}
            if due:
                key, probe = nf.random.split(key).unbind()
                if name == "sophia_h":
                    estimate = nf.optim.hutchinson(lambda p: loss_fn(p, tokens[:4]), p, probe)
                else:
                    estimate = nf.optim.gauss_newton_bartlett(logits, p, probe)
                h = {k: 0.99 * h[k] + 0.01 * estimate[k] for k in p}
            gamma = 0.01 if name == "sophia_h" else 0.05
            rate, before = schedule(torch.tensor(n)).item(), p
            p = {k: x - rate * ((m[k] / (gamma * h[k]).clamp(min=1e-12)).clamp(-1, 1) + 0.1 * x * (x.dim() >= 2)) for k, x in p.items()}
            ours, moved = (torch.cat([(new[k] - before[k]).flatten() for k in p]) for new in (state["params"], p))
            assert ((ours - moved).abs() > 1e-3 * rate).double().mean() < 0.01, "signs of near zeros may differ"
            p = state["params"]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["sgd", "adafactor", "lion", "muon", "schedule_free_adamw"])
def test_every_optimizer_learns(name, kind):
    """And the jitted step does what the optimizer does by hand, on the same gradients."""
    wrapped = {"clip_share": 0.1, "lookahead": 2, "ema": 0.5} if kind == "llama" else {}
    c = config(kind)
    c = resolve(replace(c, optimizer=Optimizer(name=name, **wrapped), schedule=Schedule(warmup=10)))
    init, step, loss_fn = make_step(build(c.model_config(), 0).double(), c)
    step, grad, state = nf.jit(step), nf.jit(nf.grad(loss_fn)), init()
    rate = {"schedule_free_adamw": nf.optim.schedules.constant(c.optimizer.lr, 10)}
    schedule = rate.get(name, nf.optim.schedules.cosine(c.optimizer.lr, 100, 10, 0.1))
    generator, losses = torch.Generator().manual_seed(0), []
    for n in range(40):
        tokens = torch.randint(0, 300, (4, 17), generator=generator) % (n % 3 + 2)
        before = state
        state, metrics = step(state, tokens)
        losses.append(metrics["loss"].item())
        if n < 5:
            grads = grad(before["params"], tokens)
            if wrapped:
                grads, _ = nf.optim.clip_adaptively(0.1).update(grads, (), before["params"])
            grads, _ = nf.optim.clip_gradients(grads, 1.0)
            updates, _ = make_optimizer(c, schedule).update(grads, before["optimizer"], before["params"])
            for key, p in nf.optim.apply_updates(before["params"], updates).items():
                torch.testing.assert_close(state["params"][key], p, rtol=1e-6, atol=1e-9)
    assert losses[-1] < losses[0] - 0.2
    differ = any(not torch.equal(p, state["params"][key]) for key, p in weights(c, state).items())
    assert differ == (bool(wrapped) or name == "schedule_free_adamw")


def test_muon_takes_the_hidden_matrices_alone():
    for kind, count in (("gpt2", 4), ("llama", 7)):
        c = resolve(replace(config(kind), optimizer=Optimizer(name="muon")))
        hidden, rest = make_step(build(c.model_config(), 0), c)[0]()["optimizer"]
        assert len(hidden["m"]) == 2 * count and all(p.dim() == 2 for p in hidden["m"].values())
        assert {name for name, p in rest[0]["m"].items() if p.dim() == 2} <= {"tokens.weight", "positions.weight"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_few_bits_learn_as_float32_does(precision):
    """Weights and moments stay float32; fp16 begins with a scale of the loss that overflows, and recovers."""
    curves = {}
    for name in ("fp32", precision):
        c = config(precision=name)
        init, step, _ = make_step(build(c.model_config(), 0), c)
        step, state = nf.jit(step, donate=0), init()
        if name == "fp16":
            state["optimizer"]["scale"] = torch.tensor(2.0**40)
        generator, losses = torch.Generator().manual_seed(0), []
        for n in range(100):
            tokens = torch.randint(0, 300, (4, 17), generator=generator) % (n % 7 + 3)
            state, metrics = step(state, tokens)
            losses.append(metrics["loss"].item())
        assert all(p.dtype == torch.float32 for p in state["params"].values())
        curves[name] = torch.tensor(losses)
    if precision == "fp16":
        assert 0 < metrics["skipped"] < 40 and metrics["loss_scale"] < 2.0**40
    assert (curves[precision][-20:].mean() - curves["fp32"][-20:].mean()).abs() < 0.05 * curves["fp32"][-20:].mean()
    assert curves[precision][-20:].mean() < 0.6 * curves[precision][:5].mean()


def test_statistics_of_micro_batches_are_among_the_metrics():
    c = config(batch=2, accumulate=4)
    model = build(c.model_config(), 0)
    init, step, loss_fn = make_step(model, c)
    tokens = torch.randint(0, 300, (8, 17), generator=torch.Generator().manual_seed(0))
    state = init()
    _, metrics = nf.jit(step)(state, tokens)
    parts = [list(nf.grad(loss_fn)(state["params"], part).values()) for part in tokens.split(2)]
    flat = torch.stack([torch.cat([g.flatten() for g in part]) for part in parts]).double()
    small, big = flat.square().sum(1).mean(), flat.mean(0).square().sum()
    signal, noise = (4 * big - small) / 3, (small - big) / 3 * 8 * 16  # for a token
    torch.testing.assert_close(metrics["noise_scale"].double(), (noise / signal if signal > 0 else torch.tensor(torch.inf)).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(metrics["snr"].double(), signal * 8 * 16 / noise, rtol=1e-3, atol=1e-6)
    norms = [sum(part[i] for part in parts).norm() / 4 for i in range(len(parts[0]))]
    torch.testing.assert_close(metrics["grad_norms"], torch.stack(norms), rtol=1e-4, atol=1e-7)
