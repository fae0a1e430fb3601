import pytest

from neuralforge.models import ModelConfig


@pytest.fixture(params=["gpt2", "gpt2-untied", "llama", "llama-tied", "llama-all-heads"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """Small, with sizes that are all different, so that no two can be mistaken for one another."""
    kind = request.param.split("-")[0]
    return ModelConfig(
        kind=kind,
        vocab_size=97,
        context=24,
        d_model=40,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2 if request.param in ("llama", "llama-tied") else 4,
        d_ff=56,
        tie_embeddings=request.param in ("gpt2", "llama-tied"),
        norm_eps=1e-5,
        rope_theta=500.0,
    )
