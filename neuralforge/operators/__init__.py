"""Torch custom operators, `torch.ops.neuralforge.*`, for code that isn't jitted: importing this registers all of them.

Each is a plain definition, of which the compiler makes a kernel for each combination of shapes; those written by hand are
in `kernels/`.
"""

from ..kernels.attention import flash_attention
from ..kernels.cross_entropy import cross_entropy
from ..kernels.embedding import embedding
from ..kernels.matmul import matmul
from ..kernels.rotary import rotary
from .adamw import adamw_
from .norms import layer_norm, rms_norm
from .softmax import softmax

__all__ = [
    "adamw_", "cross_entropy", "embedding", "flash_attention", "layer_norm", "matmul", "rms_norm", "rotary", "softmax",
]  # fmt: skip
