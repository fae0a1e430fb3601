"""The whole system in ten seconds: the first file to run after a change."""

import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.cli.main import main


def loss_fn(params, x, y):
    return F.cross_entropy(F.gelu(x @ params["up"]) @ params["down"], y)


def problem():
    g = torch.Generator().manual_seed(0)
    params = {"up": torch.randn(8, 32, generator=g) / 3, "down": torch.randn(32, 5, generator=g) / 6}
    return params, torch.randn(64, 8, generator=g), torch.randint(0, 5, (64,), generator=g)


def test_gradients_are_torch_autograds():
    params, x, y = problem()
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    expected = torch.autograd.grad(loss_fn(leaves, x, y), list(leaves.values()))
    for grads in (nf.grad(loss_fn)(params, x, y), nf.jit(nf.grad(loss_fn))(params, x, y)):
        torch.testing.assert_close(list(grads.values()), list(expected))


def test_second_derivatives():
    params, x, y = problem()
    nf.testing.check_grads(lambda p: loss_fn(p, x.double(), y), ({k: p.double() for k, p in params.items()},), order=2)


def test_a_captured_step_learns():
    params, x, y = problem()
    optimizer = nf.optim.adamw(1e-2)

    @nf.jit(donate=0)
    def step(state, x, y):
        loss, grads = nf.value_and_grad(loss_fn)(state["params"], x, y)
        grads, _ = nf.optim.clip_gradients(grads, 1.0)
        updates, moments = optimizer.update(grads, state["optimizer"], state["params"])
        return {"params": nf.optim.apply_updates(state["params"], updates), "optimizer": moments}, loss

    state, losses = {"params": params, "optimizer": optimizer.init(params)}, []
    for _ in range(50):
        state, loss = step(state, x, y)
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_command_trains_and_goes_on(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(800)))
    small = [
        f"--data={text}", f"--data.cache={tmp_path / 'cache'}", "--data.vocab_size=280", "--model.depth=1", "--model.context=16",
        "--model.d_model=16", "--train.batch=4", "--train.eval_batches=1", "--sample.tokens=5", f"--out={tmp_path / 'run'}",
    ]  # fmt: skip
    assert main(["train", *small, "--steps=5"]) == 0
    assert main(["train", "--resume", "--steps=8", f"--out={tmp_path / 'run'}"]) == 0
    assert main(["generate", f"--out={tmp_path / 'run'}", "--prompt=def", "--tokens=5"]) == 0
    assert "validation loss" in capsys.readouterr().out
