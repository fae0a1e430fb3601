"""Every C kernel at odd shapes, against its plain truth: run under sanitizers and in several threads (test_sanitized.py).

    python tests/kernels/odd_shapes.py
"""

from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.compiler.products import candidates
from neuralforge.kernels import attention, cross_entropy, embedding, matmul, rotary
from neuralforge.kernels.random import philox, random_bits

Case = Callable[[], None]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def near(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        bound = TOLERANCE[a.dtype]
        assert torch.allclose(a.double(), b.double(), rtol=bound, atol=bound, equal_nan=True), (a - b).abs().max()


def flash_attention(dtype, B, H, G, T, S, K, **options) -> Case:
    q, k, v, g = (torch.randn(B, h, n, K).to(dtype) for h, n in ((H, T), (G, S), (G, S), (H, T)))
    seed = torch.tensor([1, 2]) if "dropout_p" in options else None
    if options.pop("packed", False):
        options["q_starts"], options["k_starts"] = torch.tensor([0, 5, 5, T]), torch.tensor([0, 1, 40, S])

    def run() -> None:
        out, lse = attention.flash_attention(q, k, v, seed=seed, **options)
        near((out, lse), attention.reference(q, k, v, seed=seed, **options))
        found = attention.flash_attention_backward(g, q, k, v, out, lse, seed=seed, **options)
        near(found, attention.reference_backward(g, q, k, v, out, lse, seed=seed, **options))

    return run


def entropy(dtype, N, V) -> Case:
    logits, target, g = torch.randn(N, V).to(dtype), torch.randint(0, V, (N,)), torch.randn(N)

    def run() -> None:
        loss, lse = cross_entropy.cross_entropy(logits, target)
        near((loss, lse), cross_entropy.reference(logits, target))
        found = cross_entropy.cross_entropy_backward(g, logits, target, lse)
        near([found], [cross_entropy.reference_backward(g, logits, target, lse)])
        together = cross_entropy.cross_entropy_with_gradient(g, logits, target)
        near(together, [*cross_entropy.reference(logits, target), found])

    return run


def table(dtype, N, V, D) -> Case:
    g, index = torch.randn(N, D).to(dtype), torch.randint(0, V, (N,))
    return lambda: near([embedding.embedding_backward(g, index, V)], [embedding.reference(g, index, V)])


def turned(dtype, B, T, H, K, width) -> Case:
    x, cos, sin = torch.randn(B, T, H, K).to(dtype).transpose(1, 2), torch.randn(T, width), torch.randn(T, width)
    operands = [(x, cos, sin, back, interleaved) for back in (False, True) for interleaved in (False, True)]
    return lambda: near([rotary.rotary(*x) for x in operands], [rotary.reference(*x) for x in operands])


def product(dtype, M, N, K) -> Case:
    a, b, bias = (torch.randn(shape).to(dtype) for shape in ((M, K), (K, N), N))
    b = b.T.contiguous().T
    return lambda: near([matmul.matmul(a, b, bias)], [matmul.reference(a, b, bias)])


def product_and_sums(M, N, K) -> Case:
    a, b = torch.randn(K, M), torch.randn(K, N)

    def run() -> None:
        out, sums = torch.empty(M, N), torch.empty(M)  # of its own: several threads run it at once
        matmul.forward((out,), (a.t(), b), {}, sums=sums)
        near([out, sums], [a.t() @ b, a.sum(0)])

    return run if matmul.native(a, b) else lambda: None


def words(*shape) -> Case:
    key, start, whole = torch.tensor([7, 3]), [1] * len(shape), [n + 2 for n in shape]
    expected = philox.random_bits(key, shape, start, whole)

    def run() -> None:
        assert torch.equal(random_bits(key, shape, start, whole), expected)

    return run


def generated(dtype, *shape) -> Case:
    """Groups that the compiler writes: rows, columns, sums of everything, strides and halves."""
    x, w = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)

    def f(x, w):
        y = F.layer_norm(x * w, w.shape).softmax(-1)
        return y, y.sum(), (y * x.transpose(0, 1).contiguous().transpose(0, 1)).sum(0), F.gelu(x).tanh().log1p()

    run = nf.jit(f)
    return lambda: near(run(x, w), f(x.float(), w.float()))


def joined(dtype, M, N, K) -> Case:
    """A product whose factors groups make, and whose result one reads."""
    x, w = torch.randn(K, M).to(dtype), torch.randn(K, N).to(dtype)

    def f(x, w):
        y = F.silu((x * 2 + x[0]).T @ (w.tanh() - 1) / K)
        return y, y.sum(0)

    run = nf.jit(f)
    with mock.patch.object(candidates, "chosen", lambda seconds: "own" if "own" in seconds else "aten"):
        run(x, w)
    return lambda: near(run(x, w), f(x, w))


def cases() -> list[Case]:
    torch.manual_seed(0)
    found = []
    for dtype in TOLERANCE:
        found += [flash_attention(dtype, 1, 1, 1, 1, 1, 1), flash_attention(dtype, 2, 4, 2, 67, 71, 13, is_causal=True)]
        found += [flash_attention(dtype, 1, 2, 1, 130, 65, 40, window=9, dropout_p=0.3), flash_attention(dtype, 1, 2, 2, 5, 70, 65)]
        found += [flash_attention(dtype, 1, 2, 1, 100, 70, 33, packed=True, window=8)]
        found += [entropy(dtype, N, V) for N, V in ((1, 1), (3, 17), (5, 131))]
        found += [table(dtype, N, V, D) for N, V, D in ((1, 1, 1), (9, 4, 67), (300, 500, 129))]
        found += [turned(dtype, 1, 1, 1, 2, 1), turned(dtype, 2, 7, 3, 34, 34), turned(dtype, 2, 70, 3, 96, 48)]
        found += [generated(dtype, 3, 5), generated(dtype, 9, 131), generated(dtype, 2, 4099)]
        found += [product(dtype, M, N, K) for M, N, K in ((1, 1, 1), (7, 33, 5), (65, 17, 130), (130, 301, 67), (9, 40, 1601))]
        found += [joined(dtype, M, N, K) for M, N, K in ((2, 2, 2), (115, 33, 401), (40, 1700, 9))]
    found += [product_and_sums(1, 1, 1), product_and_sums(35, 17, 400), product_and_sums(300, 1600, 9)]
    found += [words(1), words(13), words(3, 5), words(2, 7, 65)]
    return found


if __name__ == "__main__":
    for case in cases():
        case()
    print("all kernels agree with their truth")
