"""Passes: functions from graph to graph."""

from .activations import activations_by_hand
from .attention import attention
from .constants import fold_constants
from .layers import (
    batches_by_one_matrix,
    embedding_by_index,
    linear_by_hand,
    products_of_moved_rows,
)
from .layout import transpose_products
from .losses import negative_log_likelihood, picked_log_softmax, picked_logits
from .patterns import applied
from .rotary import rotary
from .simplify import common_subexpressions, dead_code, simplify
from .softmax import log_softmax_by_hand, softmax_by_hand

rewrite_patterns = applied(
    batches_by_one_matrix, linear_by_hand, products_of_moved_rows, embedding_by_index, activations_by_hand, softmax_by_hand, log_softmax_by_hand, attention, rotary,
    negative_log_likelihood, picked_log_softmax, picked_logits,
)  # fmt: skip
"""In this order: what one rule writes, the next may match."""

__all__ = [
    "common_subexpressions", "dead_code", "fold_constants", "rewrite_patterns", "simplify",
    "transpose_products",
]  # fmt: skip
