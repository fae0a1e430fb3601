"""Models of the `transformers` library as they are, a training step in one nf.jit: losses and gradients as torch.autograd's."""

import pytest
import torch
from torch.func import functional_call

import neuralforge as nf

VOCABULARY, TOKENS = 128, 24
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODED = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 32,
    "dropout": 0.0, "use_cache": False, "forced_eos_token_id": None,
}  # fmt: skip
MODELS = {
    "Bert": ("ForMaskedLM", SIZES | STILL),  # packed lengths, by a mask
    "DebertaV2": ("ForMaskedLM", SIZES | STILL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),  # learned masks
    "Bart": ("ForConditionalGeneration", ENCODED),  # attention across
    "Mixtral": ("ForCausalLM", SIZES | {"num_key_value_heads": 2, "num_local_experts": 4, "use_cache": False}),  # experts
    "Gemma2": ("ForCausalLM", SIZES | {"num_key_value_heads": 2, "head_dim": 8, "use_cache": False}),  # soft caps, windows
    "RecurrentGemma": ("ForCausalLM", SIZES | {  # writes place after place
        "num_hidden_layers": 3, "num_attention_heads": 2, "attention_window_size": 16, "lru_width": 32, "use_cache": False,
    }),
    "Mamba": ("ForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "use_cache": False}),
    "Swin": ("ForImageClassification", STILL | {  # windows, rolled
        "image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "drop_path_rate": 0.0,
    }),
}  # fmt: skip


def operands(name: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    if name == "Swin":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator), "labels": torch.tensor([1, 0])}
    tokens = torch.randint(3, VOCABULARY, (2, TOKENS), generator=generator)
    mask = {"attention_mask": torch.arange(TOKENS).expand(2, -1) < torch.tensor([[TOKENS], [TOKENS - 7]])} if name == "Bert" else {}
    return {"input_ids": tokens, "labels": tokens, **mask}


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name + kind)(getattr(transformers, name + "Config")(**sizes)).train()
    given = operands(name, torch.Generator().manual_seed(0))
    expected = model(**given).loss
    expected.backward()
    params = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    step = nf.jit(lambda params, given: nf.value_and_grad(lambda p: functional_call(model, p, (), given).loss)(params))
    loss, gradients = step(params, given)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for key, p in model.named_parameters():
        if p.grad is not None:
            top = p.grad.abs().max().item()
            torch.testing.assert_close(gradients[key], p.grad, rtol=1e-3, atol=1e-4 * top + 1e-7, msg=lambda m, key=key: f"{key}: {m}")
