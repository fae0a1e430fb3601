"""Memory budgets: met in the plan and in fact, monotone, bit for bit the same results, dropout too, clear refusal."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.errors import MemoryBudgetError

WIDTH, LAYERS = 64, 8


def stack(params, x, dropout=0.0):
    for w1, w2 in params:
        h = F.gelu(F.layer_norm(x, (WIDTH,)) @ w1)
        x = x + F.dropout(h, dropout) @ w2
    return x.square().mean()


@pytest.fixture
def problem():
    torch.manual_seed(0)
    params = [(torch.randn(WIDTH, 256) * 0.1, torch.randn(256, WIDTH) * 0.1) for _ in range(LAYERS)]
    return params, torch.randn(512, WIDTH)


def compiled(f, *args, budget=None):
    step = nf.jit(f, memory_budget=budget)
    result = step(*args)
    return result, next(iter(step._compiled.values()))


def peak(program):
    return program.program.plan.peak_bytes


def test_budgets_are_met_and_results_are_the_same_bit_for_bit(problem):
    f = nf.value_and_grad(stack)
    (loss, grads), free = compiled(f, *problem)
    peaks = []
    for share in (1.0, 0.9, 0.75, 0.6, 0.5):
        budget = int(share * peak(free))
        (loss2, grads2), held = compiled(f, *problem, budget=budget)
        assert peak(held) <= budget
        assert torch.equal(loss, loss2)
        for a, b in zip(torch.utils._pytree.tree_leaves(grads), torch.utils._pytree.tree_leaves(grads2)):
            assert torch.equal(a, b)
        again = [eq for eq in held.graph.equations if eq.origin == "recomputed"]
        assert bool(again) == (share < 1.0)
        peaks.append(peak(held))
    assert peaks == sorted(peaks, reverse=True), "a smaller budget never gives a larger peak"


def test_what_the_plan_says_is_what_is_allocated(problem):
    """The tensors alive during a call, counted, against the predicted peak."""
    from torch.utils._python_dispatch import TorchDispatchMode

    f = nf.value_and_grad(stack)
    _, free = compiled(f, *problem)
    _, held = compiled(f, *problem, budget=int(0.6 * peak(free)))

    class Count(TorchDispatchMode):
        """Bytes of the storages that operators made and that are still referenced."""

        def __init__(self):
            super().__init__()
            self.live, self.most = {}, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            import weakref

            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    self.live[id(t)] = weakref.ref(t)
            storages = {}
            for ref in self.live.values():
                if (t := ref()) is not None:
                    storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            self.most = max(self.most, sum(n for p, n in storages.items() if p not in self.outside))
            return out

    for program in (free, held):
        tensors = torch.utils._pytree.tree_leaves(problem)
        arena = program.program._arena
        count = Count()
        count.outside = {t.untyped_storage().data_ptr() for t in (*tensors, arena)}
        with count:
            program.program._run(*tensors)
        measured = count.most + arena.untyped_storage().nbytes()
        assert 0.9 * peak(program) <= measured <= 1.05 * peak(program), (measured, peak(program))


def test_dropout_draws_the_same_numbers(problem):
    f = nf.value_and_grad(lambda p, x: stack(p, x, 0.3))
    results = []
    for budget in (None, "12MB"):
        torch.manual_seed(3)
        results.append(compiled(f, *problem, budget=budget)[0])
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, results)):
        assert torch.equal(a, b)


def test_a_budget_that_cannot_be_met_names_the_smallest(problem):
    f = nf.value_and_grad(stack)
    with pytest.raises(MemoryBudgetError, match=r"memory_budget=0\.1 MB can't be met.* down to (\d+\.\d) MB at best") as e:
        compiled(f, *problem, budget="100KB")
    smallest = float(str(e.value).split("down to ")[1].split(" MB")[0]) + 0.1
    compiled(f, *problem, budget=f"{smallest}MB")


@pytest.mark.parametrize("text", ["lots", "10", "-5MB", "5 XB"])
def test_bad_text(text):
    with pytest.raises(MemoryBudgetError, match="expected bytes, or a number with a unit"):
        nf.jit(lambda x: x, memory_budget=text)


def test_donation_and_budget_together(problem):
    params, x = problem

    def step(params, x):
        loss, grads = nf.value_and_grad(stack)(params, x)
        return torch.utils._pytree.tree_map(lambda p, g: p - 0.1 * g, params, grads), loss

    expected, _ = compiled(step, params, x)
    held = nf.jit(step, donate=0, memory_budget="7MB")
    found = held(torch.utils._pytree.tree_map(torch.clone, params), x)
    for a, b in zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(found)):
        assert torch.equal(a, b)
