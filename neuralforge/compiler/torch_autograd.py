"""A jitted function inside ordinary PyTorch code: its outputs carry torch.autograd gradients, computed by our own
backward program."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from ..autograd.tape import Tape, differentiable
from ..errors import CaptureError, DifferentiationError
from ..graph import Captured, Graph, capture
from ..graph.ir import Value
from ..graph.operators import draws
from ..graph.source import user_line
from ..graph.tree import TreeSpec, tree_flatten, tree_unflatten
from .compiled import Compiled, check_apart
from .space import memory_order


class Differentiable:
    """Forward and backward programs of a function whose tensor arguments at `wanted` (among all tensor leaves) need
    gradients, as do the tensors it closes over that require grad: a module's parameters. Those, `hidden`, are the
    last inputs. Forward returns, after the outputs, the new values of tensors that the function closes over and writes to, and
    the values that backward reads."""

    def __init__(
        self, f: Callable, args: tuple, kwargs: dict, wanted: list[int], memory_budget: int | None, max_rewrites: int | None
    ):
        leaves, tree = tree_flatten((args, kwargs))
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[i].detach() for i in at]

        def call(*given: torch.Tensor) -> Any:
            full = list(leaves)
            for i, t in zip(at, given):
                full[i] = t
            a, k = tree_unflatten(full, tree)
            return f(*a, **k)

        plain = capture(call, *tensors, writes=True)
        if plain.writes:
            raise CaptureError(
                f"{user_line()}: a jitted function that writes in place to its arguments can't take part in torch.autograd. "
                f"Return the new values, or call it under torch.no_grad()."
            )
        self.out_tree: TreeSpec = plain.out_tree
        self.count = plain.out_tree.num_leaves
        outputs = plain.graph.outputs[: self.count]
        # Outputs that can have a gradient; the others (indices, plain Python values) pass through.
        self.smooth = [i for i, v in enumerate(outputs) if isinstance(v, Value) and differentiable(v.fake)]
        cotangents = [_cotangent(outputs[i]) for i in self.smooth]
        self.cotangents = [(g.shape, g.stride(), g.dtype, g.device) for g in cotangents]

        hidden = {v: t for v, t in plain.graph.constants.items() if t.requires_grad}
        self.hidden = [*hidden.values()]
        sources = [*(plain.graph.inputs[i] for i in wanted), *hidden]
        self.reads = reads(plain.graph, sources, [outputs[i] for i in self.smooth])
        self.wanted = [*wanted, *range(len(tensors), len(tensors) + len(self.hidden))]

        def joint(given: list[torch.Tensor], gs: list[torch.Tensor]) -> tuple:
            tape, full = Tape(), list(given)
            with tape:
                for i in wanted:
                    full[i] = tape.watch(given[i])
                for x in self.hidden:
                    tape.watch_itself(x)
                flat = [tape.now(y) for y in tree_flatten(call(*full))[0]]
            sources = [*(full[i] for i in wanted), *self.hidden]
            grads = tape.pull([flat[i] for i in self.smooth], gs, sources)
            tape.write_back()
            for x in self.hidden:
                tape.forget(x)
            return flat, [torch.zeros_like(x) if g is None else g for g, x in zip(grads, sources)]

        captured = capture(joint, tensors, cotangents, writes=True)
        graph, self.closed = captured.graph, captured.closed
        inputs, gs = graph.inputs[: len(tensors)], graph.inputs[len(tensors) :]
        known = {id(t): v for v, t in graph.constants.items()}
        inputs += [known[id(t)] for t in self.hidden]
        constants = {v: t for v, t in graph.constants.items() if v not in inputs}
        outputs, new = graph.outputs, len(graph.outputs) - len(self.closed)
        outputs = [*outputs[: self.count], *outputs[new:], *outputs[self.count : new]]
        graph = graph.replace(inputs=[*inputs, *gs], constants=constants, outputs=outputs)
        written = {known[id(t)] for t in self.closed if id(t) in known}
        forward, backward = split(graph, inputs, outputs[: self.count + len(self.closed)], written)
        self.forward = _compiled(forward, memory_budget, max_rewrites)
        self.backward = _compiled(backward, memory_budget, max_rewrites)
        self._joint, self._limits, self._again = joint, (memory_budget, max_rewrites), {}

    def differentiable_backward(self, tensors: Sequence[torch.Tensor], gs: list[torch.Tensor]) -> list[torch.Tensor]:
        """What backward gives, as a function that torch.autograd can differentiate in its turn. It computes the forward
        values again."""
        if any(draws(eq.op, eq.args, eq.kwargs) for eq in (*self.forward.graph.equations, *self.backward.graph.equations)):
            raise DifferentiationError(
                f"{user_line()}: a second derivative by torch.autograd of a jitted function that draws random numbers, which "
                f"would draw others when it is computed again. Take it with nf.grad of nf.grad or nf.hvp inside nf.jit, or "
                f"draw from nf.random with a key."
            )
        if self.closed:
            raise DifferentiationError(
                f"{user_line()}: a second derivative by torch.autograd of a jitted function that writes in place to a tensor of shape "
                f"{tuple(self.closed[0].shape)} that it closes over, and would do so again. Take it with nf.grad of nf.grad or nf.hvp inside nf.jit."
            )
        arguments = [*tensors[: len(tensors) - len(self.hidden)], *gs]
        wanted = tuple(i for i, t in enumerate(arguments) if t.requires_grad)
        program = self._again.get(wanted)
        if program is None or program.stale:
            count = len(arguments) - len(gs)
            f = lambda *given: self._joint(list(given[:count]), list(given[count:]))[1]
            program = self._again[wanted] = Differentiable(f, tuple(arguments), {}, list(wanted), *self._limits)
        return program(arguments)

    def __call__(self, tensors: list[torch.Tensor]) -> Any:
        return tree_unflatten(list(Function.apply(self, *tensors, *self.hidden)), self.out_tree)

    @property
    def outside(self) -> list[torch.Tensor]:
        """The tensors that it closes over, and constants of its own."""
        return [*self.hidden, *self.closed, *self.forward.outside, *self.backward.outside]

    @property
    def stale(self) -> bool:
        """A tensor that the function closes over has come to require grad."""
        return closes_over_grad(self.forward) or closes_over_grad(self.backward)


def closes_over_grad(compiled: Compiled) -> bool:
    return any(t.requires_grad for t in compiled.graph.constants.values())


class Function(torch.autograd.Function):
    """The bridge."""

    @staticmethod
    def forward(ctx: Any, program: Differentiable, *tensors: torch.Tensor) -> tuple:
        given = [t.detach() for t in tensors]
        if program.closed:
            check_apart(given, [], program.closed)
        flat = program.forward(given)
        ctx.program, ctx.total = program, len(tensors)
        kept = program.count + len(program.closed)
        # Constants too, though backward reads them itself: torch.autograd raises if they are written to until then.
        ctx.kept = len(tensors) + len(flat) - kept
        ctx.save_for_backward(*tensors, *flat[kept:], *program.backward.graph.constants.values())
        for x, new in zip(program.closed, flat[program.count : kept]):
            x.copy_(new)
        # Of an argument that is returned as it is, torch.autograd makes a view.
        same = {id(y): t for y, t in zip(given, tensors)}
        outputs = tuple(same.get(id(y), y) for y in flat[: program.count])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *[y for i, y in enumerate(outputs) if isinstance(y, torch.Tensor) and i not in program.smooth]
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *gs: Any) -> tuple:
        program, saved = ctx.program, ctx.saved_tensors
        cotangents = [_laid_out(gs[i], *described) for i, described in zip(program.smooth, program.cotangents)]
        if torch.is_grad_enabled():  # create_graph=True
            grads = program.differentiable_backward(saved[: ctx.total], cotangents)
        else:
            grads = program.backward([*saved[ctx.total : ctx.kept], *cotangents])
        result: list[Any] = [None] * ctx.total
        read = {n for i, found in zip(program.smooth, program.reads) if gs[i] is not None for n in found}
        for n, (i, g) in enumerate(zip(program.wanted, grads)):
            result[i] = g if n in read else None  # for optimizers, which decay what has a gradient of zeros
        return None, *result


def split(graph: Graph, primals: list[Value], outputs: list[Any], written: Collection[Value] = ()) -> tuple[Graph, Graph]:
    """A joint graph as forward, which returns after `outputs` the values that backward reads, and backward, which takes
    those and then the other inputs. Backward is what depends on an input that isn't among `primals`. Constants that are `written`
    between the two are among what forward returns too."""
    late = set(graph.inputs) - set(primals)
    early_equations, late_equations = [], []
    for eq in graph.equations:
        if any(v in late for v in eq.inputs):
            late.update(eq.results)
            late_equations.append(eq)
        else:
            early_equations.append(eq)
    needed = [v for eq in late_equations for v in eq.inputs]
    needed += [v for v in graph.outputs[len(outputs) :] if isinstance(v, Value)]
    kept = [v for v in dict.fromkeys(needed) if v not in late and (v not in graph.constants or v in written)]
    forward = Graph(list(primals), graph.constants, early_equations, [*outputs, *kept])
    cotangents = [v for v in graph.inputs if v not in set(primals)]
    constants = {v: t for v, t in graph.constants.items() if v not in written}
    backward = Graph([*kept, *cotangents], constants, late_equations, graph.outputs[len(outputs) :])
    return forward, backward


def _cotangent(v: Value) -> torch.Tensor:
    """A fake one of an output, which itself may be the same memory many times."""
    if memory_order(v) is not None:
        return v.fake
    with v.fake.fake_mode:
        return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def reads(graph: Graph, sources: list[Value], outputs: list[Value]) -> list[set[int]]:
    """For each output, which of the sources it is made of."""
    made_of = {v: 1 << n for n, v in enumerate(sources)}  # sets as bits: there may be a thousand parameters
    for eq in graph.equations:
        found = 0
        for v in eq.inputs:
            found |= made_of.get(v, 0)
        made_of.update(dict.fromkeys(eq.results, found))
    return [{n for n in range(len(sources)) if made_of.get(v, 0) >> n & 1} for v in outputs]


def _laid_out(g: torch.Tensor | None, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A cotangent with the strides that the program was compiled for: torch.autograd gives any, and none for outputs that aren't used."""
    if g is not None and g.stride() == strides:
        return g
    new = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    return new.zero_() if g is None else new.copy_(g)


def _compiled(graph: Graph, memory_budget: int | None, max_rewrites: int | None) -> Compiled:
    return Compiled(Captured(graph, tree_flatten(list(graph.outputs))[1], []), [], memory_budget, max_rewrites)
