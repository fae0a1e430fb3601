"""The captured step follows eager PyTorch, and accumulation equals the large batch."""

from dataclasses import replace

import pytest
import torch

import neuralforge as nf
from neuralforge.models import build, next_token_loss
from neuralforge.train.config import Config, Data, Model, Optimizer, Schedule, Train, resolve
from neuralforge.train.step import make_step


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
