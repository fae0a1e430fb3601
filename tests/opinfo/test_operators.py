"""A slice of the operator database; `python tests/opinfo/run.py` runs the whole and writes docs/operators.md."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import harness  # noqa: E402

# Common operators and one or two of each family; every sample kind of these few must pass all four checks.
NAMES = """
    add mul div_no_rounding_mode pow exp log sqrt sigmoid tanh abs clamp where maximum atan2 special_i1 lgamma angle
    sum mean prod amax std logsumexp softmax cumsum logcumsumexp linalg_vector_norm quantile median
    reshape permute expand cat stack split chunk narrow flip roll as_strided constant_pad_nd view_as_complex
    gather scatter_add scatter_reduce_amax index_select index_put masked_scatter take sort topk nn_functional_embedding
    matmul addmm einsum linalg_inv linalg_solve linalg_det linalg_slogdet linalg_cholesky linalg_qr linalg_lu
    linalg_eigh linalg_eig linalg_svd linalg_pinv matrix_exp fft_rfft fft_irfft fft_fft2 stft
    nn_functional_linear nn_functional_conv2d nn_functional_conv_transpose2d nn_functional_avg_pool2d
    nn_functional_max_pool2d nn_functional_grid_sample nn_functional_interpolate_bilinear nn_functional_layer_norm
    nn_functional_rms_norm nn_functional_group_norm nn_functional_batch_norm nn_functional_gelu nn_functional_silu
    nn_functional_cross_entropy nn_functional_dropout nn_functional_scaled_dot_product_attention
    nn_functional_embedding_bag nn_functional_linear_cross_entropy
""".split()
SAMPLES = 4
# Refused: a sample asks for a count of true elements; a shape changes in place.
REFUSED = {"index_put": "captured", "as_strided": "in place"}

OPERATORS = {op.formatted_name: op for op in harness.variants()}


@pytest.fixture(autouse=True)
def one_thread(threads_restored):
    harness.quiet()


@pytest.mark.parametrize("name", NAMES)
def test_operator(name):
    result = harness.check(OPERATORS[name], SAMPLES)
    status = dict(result.status)
    if name in REFUSED:
        assert status.pop(REFUSED[name]) == "unsupported"
    assert status["reverse"] == status["forward"] == "pass", result.reasons
    assert set(status.values()) <= {"pass", "skip"}, result.reasons


def test_a_wrong_number_is_a_failure():
    """The harness sees a derivative that is wrong by a thousandth, and one that is missing."""
    from neuralforge.autograd.rules import table

    sine = table.rules[torch.ops.aten.sin]
    try:
        table.rules[torch.ops.aten.sin] = table.Rule(lambda y, x: table.diagonal(lambda: 1.001 * x.cos()), True)
        result = harness.check(OPERATORS["sin"], SAMPLES)
        assert {c: result.status[c] for c in ("reverse", "second", "forward")} == dict.fromkeys(
            ("reverse", "second", "forward"), "fail"
        )
        del table.rules[torch.ops.aten.sin]
        assert set(harness.check(OPERATORS["sin"], SAMPLES).status.values()) == {"unsupported"}
    finally:
        table.rules[torch.ops.aten.sin] = sine
