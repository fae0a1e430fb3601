"""Our embedding: PyTorch's, to the derivatives."""

from __future__ import annotations

from ...kernels import embedding  # noqa: F401  (it registers its operators)
from .table import aten, definition

definition("neuralforge::embedding")(aten.embedding.default)
definition("neuralforge::embedding_backward")(
    lambda g, index, rows, padding_idx=-1, scale_grad_by_freq=False: aten.embedding_dense_backward(
        g, index, rows, padding_idx, scale_grad_by_freq
    )
)
