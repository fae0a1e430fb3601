"""Random numbers from keys (after JAX): the same key, the same numbers, eagerly, under `nf.jit` and `nf.checkpoint`,
on any machine and any number of ranks.

    key = nf.random.key(0)
    noise = nf.random.normal(key, (8, 16))
    with nf.random.stream(nf.random.fold_in(key, step)):  # PyTorch's own operators draw from a key too
        y = F.dropout(x, 0.1)

A key is a tensor, int64 [2] (a seed and an offset of Philox's), so it is passed to jitted functions and saved like any
other. Use a key for one draw (or one stream), and make more with `split` and `fold_in`.

`shard` says that a draw is one part of a larger one: `{0: (rank, ranks)}` that dimension 0 is cut into as many equal
parts as there are ranks, and this is part `rank`. The ranks' parts together are what one process draws for the whole.
A draw without that dimension is the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import KernelError
from .graph.in_place import functional
from .graph.operators import draws, operator_traits
from .graph.source import user_line
from .kernels.random import random_bits

aten = torch.ops.aten
Shard = Mapping[int, tuple[int, int]]
_SPLIT, _FOLD = 0x6A09E667F3BCC908, 0x3B67AE8584CAA73B  # digits of roots of 2 and 3: apart from what a key itself draws


# ---- keys


def key(seed: int | torch.Tensor) -> torch.Tensor:
    """A key from a seed, an integer or an integer tensor []."""
    if isinstance(seed, torch.Tensor):
        return torch.stack([seed.to(torch.int64), torch.zeros((), dtype=torch.int64, device=seed.device)])
    return torch.tensor([(seed + 2**63) % 2**64 - 2**63, 0])


def fold_in(key: torch.Tensor, data: int | torch.Tensor) -> torch.Tensor:
    """A key for each number: of a step, a layer, a rank. `data` is 0 to 2^32 - 1, or such a tensor []."""
    data = torch.full_like(key[0], data) if isinstance(data, int) else data.to(torch.int64)
    return _keys(random_bits(torch.stack([key[0] ^ _FOLD, data]), [2], [0], [2]))


def split(key: torch.Tensor, count: int = 2) -> torch.Tensor:
    """[count, 2]: keys, independent of each other and of `key`."""
    return _keys(random_bits(torch.stack([key[0] ^ _SPLIT, key[1]]), [count, 2], [0, 0], [count, 2]))


def _keys(words: torch.Tensor) -> torch.Tensor:
    """Keys [..., 2], the seed of each made of two words."""
    high, low = words.to(torch.int64).unbind(-1)
    seed = high << 32 | low & 0xFFFFFFFF
    return torch.stack([seed, torch.zeros_like(seed)], -1)


# ---- draws


def bits(key: torch.Tensor, shape: Sequence[int], shard: Shard | None = None, offset: int = 0, words: int = 1) -> torch.Tensor:
    """Uniform int32, -2^31 to 2^31 - 1, [*shape]; [*shape, words] for more words than one. `offset` is added to the key's.
    Raises KernelError for what isn't a key, and a part that isn't one of its shard."""
    start, whole = [0] * len(shape), list(shape)
    for dim, (index, count) in (shard or {}).items():
        if not 0 <= index < count:
            raise KernelError(f"{user_line()}: shard {{{dim}: ({index}, {count})}}; expected part 0 to {count - 1} of {count}.")
        if -len(shape) <= dim < len(shape):
            start[dim], whole[dim] = index * shape[dim], count * shape[dim]
    more = [words] if words > 1 else []
    return random_bits(key, [*shape, *more], [*start, *[0] * len(more)], [*whole, *more], offset)


def uniform(
    key: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None, shard: Shard | None = None, offset: int = 0
) -> torch.Tensor:
    """Uniform in [0, 1): multiples of 2^-d, where d is how many binary digits the dtype (by default PyTorch's) holds."""
    dtype = dtype or torch.get_default_dtype()
    if dtype == torch.float64:
        high, low = (bits(key, shape, shard, offset, words=2).to(dtype) + 2.0**31).unbind(-1)
        return high * 2.0**-32 + (low * 2.0**-11).floor() * 2.0**-53
    digits = 1 - round(math.log2(torch.finfo(dtype).eps))
    return ((bits(key, shape, shard, offset) >> 32 - digits) + 2 ** (digits - 1)).to(dtype) * 2.0**-digits


def normal(
    key: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None, shard: Shard | None = None, offset: int = 0
) -> torch.Tensor:
    """Normal, of mean 0 and variance 1 (half of it in each part of a complex number)."""
    dtype = dtype or torch.get_default_dtype()
    if dtype.is_complex:
        shard = {d if d >= 0 else d - 1: part for d, part in (shard or {}).items()}
        return torch.view_as_complex(normal(key, [*shape, 2], dtype.to_real(), shard, offset) * 0.5**0.5)
    if dtype == torch.float64:
        middle = 2 * uniform(key, shape, dtype, shard, offset) - (1 - 2.0**-53)
    else:  # odd multiples of 2^-24 in (-1, 1)
        middle = ((bits(key, shape, shard, offset) >> 8 << 1) + 1).to(torch.float32) * 2.0**-24
    return (middle.erfinv() * 2**0.5).to(dtype)


def bernoulli(
    key: torch.Tensor, p: float | torch.Tensor, shape: Sequence[int], shard: Shard | None = None, offset: int = 0
) -> torch.Tensor:
    """Bool, true with probability `p`, a number or a tensor that broadcasts to `shape`."""
    if isinstance(p, torch.Tensor):
        return uniform(key, shape, p.dtype, shard, offset) >= 1 - p
    drawn = bits(key, shape, shard, offset)
    return drawn >= round((1 - p) * 2**32) - 2**31 if p > 0 else torch.zeros_like(drawn, dtype=torch.bool)


def dropout(key: torch.Tensor, x: torch.Tensor, p: float = 0.5, shard: Shard | None = None, offset: int = 0) -> torch.Tensor:
    """`x` with each element zero with probability `p`, else divided by 1 - p."""
    if not 0 <= p <= 1:
        raise KernelError(f"{user_line()}: dropout with p={p}; expected a probability, 0 to 1.")
    keep = bernoulli(key, 1 - p, x.shape, shard, offset)
    return torch.where(keep, x * (1 / (1 - p) if p < 1 else 0.0), 0.0)


# ---- PyTorch's random operators


class stream(TorchDispatchMode):
    """Within, PyTorch's random operators (`F.dropout`, `torch.rand`, `x.normal_()`, ...) draw from `key`: the first from
    the key as it is, each further one at the next offset. torch's own generator is neither read nor advanced, and
    recomputation in a checkpoint draws the same numbers again. Enter it inside a jitted function (the key being an
    argument of it): around a call of one it makes the function run eagerly. `shard`: see above; each rank draws its part.

    Raises KernelError for an operator that draws in some other way (torch.poisson, say).
    """

    def __init__(self, key: torch.Tensor, shard: Shard | None = None):
        super().__init__()
        self.key, self.shard, self.drawn = key, shard, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or every operator would pass through a wrapper of torch._dynamo's

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not draws(func, args, kwargs):
            return func(*args, **kwargs)
        if operator_traits(func).written:
            with self:
                written, result = functional(func, args, kwargs)
            for x, value in written:
                x.copy_(value)
            return result
        if operator_traits(func).composite:
            with self:
                return func.decompose(*args, **kwargs)
        self.drawn += 1
        return self.draw(self.drawn - 1, func, args, kwargs)

    def draw(self, offset: int, func: Callable, args: tuple, kwargs: dict) -> Any:
        """The result of a random operator as draw number `offset`."""
        found = _DRAWS.get(func.overloadpacket)
        if found is None:
            raise KernelError(
                f"{user_line()}: {func} can't draw from nf.random.stream. Compute what it gives from nf.random.uniform or "
                f"nf.random.normal, or call it outside the stream."
            )
        kwargs = {k: v for k, v in kwargs.items() if k != "generator"}
        return found(_Draw(self.key, self.shard, offset), *args, **kwargs)


class _Draw(NamedTuple):
    key: torch.Tensor
    shard: Shard | None
    offset: int

    def uniform(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        return uniform(self.key, shape, dtype, self.shard, self.offset)

    def normal(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        return normal(self.key, shape, dtype, self.shard, self.offset)

    def bernoulli(self, p: Any, shape: Sequence[int]) -> torch.Tensor:
        return bernoulli(self.key, p, shape, self.shard, self.offset)


def _normal_of(d: _Draw, mean: Any, std: Any = 1.0, size: Sequence[int] | None = None, dtype: torch.dtype | None = None, **_: Any):
    tensors = [x for x in (mean, std) if isinstance(x, torch.Tensor)]
    size = torch.broadcast_shapes(*(x.shape for x in tensors)) if size is None else size
    return d.normal(size, dtype or (tensors[0].dtype if tensors else None)) * std + mean


def _integers(d: _Draw, size: Sequence[int], low: int, high: int, dtype: torch.dtype | None) -> torch.Tensor:
    if not 0 < high - low <= 2**31:
        raise KernelError(f"{user_line()}: random integers from {low} to {high}; expected a range of 1 to 2^31 numbers.")
    words = bits(d.key, size, d.shard, d.offset).to(torch.int64) + 2**31
    return ((words * (high - low) >> 32) + low).to(dtype or torch.int64)


def _randint(d: _Draw, *given: Any, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    *bounds, size = given
    return _integers(d, size, *[0, *bounds][-2:], dtype)


def _randint_like(d: _Draw, x: torch.Tensor, *bounds: int, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    return _integers(d, x.shape, *[0, *bounds][-2:], dtype or x.dtype)


def _randperm(d: _Draw, n: int, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    return uniform(d.key, [n], torch.float64, None, d.offset).argsort().to(dtype or torch.int64)


def _dropout(d: _Draw, x: torch.Tensor, p: float, train: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    if train is False:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    keep = d.bernoulli(1 - p, x.shape)
    return torch.where(keep, x * (1 / (1 - p) if p < 1 else 0.0), 0.0), keep


def _rrelu(d: _Draw, x: torch.Tensor, noise: torch.Tensor, lower: float = 0.125, upper: float = 1 / 3, training: bool = False):
    if not training:
        return torch.where(x > 0, x, x * ((lower + upper) / 2)), noise.clone()
    slope = torch.where(x > 0, 1, d.uniform(x.shape, x.dtype) * (upper - lower) + lower)
    return x * slope, slope


def _multinomial(d: _Draw, weights: torch.Tensor, count: int, replacement: bool = False) -> torch.Tensor:
    if not replacement:  # the first of exponential clocks to ring (Efraimidis & Spirakis 2006)
        return (weights / -torch.log1p(-d.uniform(weights.shape, weights.dtype))).topk(count).indices
    total = weights.cumsum(-1)
    drawn = d.uniform([*weights.shape[:-1], count], weights.dtype) * total[..., -1:]
    return torch.searchsorted(total, drawn, right=True).clamp(max=weights.shape[-1] - 1)


_DRAWS: dict[Any, Callable] = {
    aten.rand: lambda d, size, dtype=None, **_: d.uniform(size, dtype),
    aten.rand_like: lambda d, x, dtype=None, **_: d.uniform(x.shape, dtype or x.dtype),
    aten.randn: lambda d, size, dtype=None, **_: d.normal(size, dtype),
    aten.randn_like: lambda d, x, dtype=None, **_: d.normal(x.shape, dtype or x.dtype),
    aten.uniform: lambda d, x, low=0.0, high=1.0: d.uniform(x.shape, x.dtype) * (high - low) + low,
    aten.normal: _normal_of,
    aten.normal_functional: lambda d, x, mean=0.0, std=1.0: d.normal(x.shape, x.dtype) * std + mean,
    aten.bernoulli: lambda d, x, p=None: d.bernoulli(x if p is None else p, x.shape).to(x.dtype),
    aten.native_dropout: _dropout,
    aten.rrelu_with_noise_functional: _rrelu,
    aten.exponential: lambda d, x, rate=1.0: -torch.log1p(-d.uniform(x.shape, x.dtype)) / rate,
    aten.cauchy: lambda d, x, median=0.0, sigma=1.0: ((d.uniform(x.shape, x.dtype) - 0.5) * math.pi).tan() * sigma + median,
    aten.log_normal: lambda d, x, mean=1.0, std=2.0: (d.normal(x.shape, x.dtype) * std + mean).exp(),
    aten.randint: _randint,
    aten.randint_like: _randint_like,
    aten.random: lambda d, x, *bounds: _randint_like(d, x, *(bounds or (2**31,))),
    aten.randperm: _randperm,
    aten.multinomial: _multinomial,
}
