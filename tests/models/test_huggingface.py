"""Against the `transformers` library, and every way a folder can be wrong."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuralforge.errors import CheckpointError
from neuralforge.models import ModelConfig, build, load_pretrained, save_pretrained

TOKENS = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Biases and norms too: at their initial values they would hide a mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.2)
    return model.eval()


def their_config(transformers, c: ModelConfig):
    if c.kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.context, n_embd=c.d_model, n_layer=c.n_layers, n_head=c.n_heads,
            n_inner=c.d_ff, tie_word_embeddings=c.tie_embeddings, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    return transformers.LlamaConfig(
        vocab_size=c.vocab_size, max_position_embeddings=c.context, hidden_size=c.d_model, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, intermediate_size=c.d_ff,
        rms_norm_eps=c.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_embeddings,
    )  # fmt: skip


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_loads_what_transformers_saves(transformers, config, tmp_path, shard):
    theirs = randomised(transformers.AutoModelForCausalLM.from_config(their_config(transformers, config))).double()
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    ours, ours_config = load_pretrained(tmp_path)
    assert ours_config == dataclasses.replace(config, rope_theta=ours_config.rope_theta)
    assert config.kind == "gpt2" or ours_config.rope_theta == 500.0
    assert ours.tokens.weight.dtype == torch.float64
    # Their rotary angles are float32 whatever the dtype.
    tolerance = 1e-12 if config.kind == "gpt2" else 3e-5
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shard", [10**9, 20_000])
def test_transformers_loads_what_is_saved(transformers, config, tmp_path, shard):
    ours = randomised(build(config))
    save_pretrained(ours, config, tmp_path, max_shard_bytes=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == 20_000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(ours(TOKENS), theirs.eval()(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(config, tmp_path, dtype):
    c = dataclasses.replace(config, dropout=0.1) if config.kind == "gpt2" else config
    ours = randomised(build(c)).to(dtype)
    save_pretrained(ours, c, tmp_path, max_shard_bytes=10)
    save_pretrained(ours, c, tmp_path)  # and nothing of the many files before stays
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    back, back_config = load_pretrained(tmp_path)
    assert dataclasses.replace(back_config, rope_theta=c.rope_theta) == c and not back.training
    assert back.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(back.parameters(), ours.parameters()))
    assert load_pretrained(tmp_path, torch.float64)[0].norm.weight.dtype == torch.float64
    save_pretrained(back, back_config, tmp_path)  # over the files it came from
    assert torch.equal(load_pretrained(tmp_path)[0].norm.weight, ours.norm.weight)


@pytest.fixture
def saved(config, tmp_path):
    save_pretrained(randomised(build(config)), config, tmp_path)
    return tmp_path


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder, **changes) -> None:
    c = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in c.items() if v != "delete"}))


def test_tied_weights_are_stored_once(config, saved):
    names = load_file(saved / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == (not config.tie_embeddings)


def test_names_without_the_head_model_and_computed_tensors(config, saved):
    prefix, extra = {
        "gpt2": ("transformer.", "h.0.attn.bias"),
        "llama": ("model.", "layers.0.self_attn.rotary_emb.inv_freq"),
    }[config.kind]
    before = load_pretrained(saved)[0](TOKENS)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)
        tensors[extra] = torch.ones(1)

    edit_tensors(saved, strip)
    assert torch.equal(load_pretrained(saved)[0](TOKENS), before)


@pytest.mark.parametrize("config", ["gpt2", "llama-tied"], indirect=True)
def test_a_stored_tied_head_must_be_the_embedding(config, saved):
    embedding = "transformer.wte.weight" if config.kind == "gpt2" else "model.embed_tokens.weight"
    edit_tensors(saved, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    load_pretrained(saved)
    edit_tensors(saved, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match="Set tie_word_embeddings to false"):
        load_pretrained(saved)


def test_missing_unknown_and_misshaped_tensors(config, saved):
    whole = (saved / "model.safetensors").read_bytes()
    norm = "transformer.ln_f.weight" if config.kind == "gpt2" else "model.norm.weight"
    edit_tensors(saved, lambda t: t.pop(norm))
    with pytest.raises(CheckpointError, match=f"tensor {norm.split('.', 1)[1]} is missing"):
        load_pretrained(saved)
    (saved / "model.safetensors").write_bytes(whole)
    edit_tensors(saved, lambda t: t.update({"h.0.gate": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="tensor h.0.gate has no place in a .* of 3 layers"):
        load_pretrained(saved)
    (saved / "model.safetensors").write_bytes(whole)
    edit_tensors(saved, lambda t: t.update({norm: torch.ones(41)}))
    with pytest.raises(CheckpointError, match=r"gives norm.weight the shape \(41,\), and config.json calls for \(40,\)"):
        load_pretrained(saved)


def test_files_missing_or_damaged(config, saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="can't be read.*Fetch them anew"):
        load_pretrained(saved)
    weights.unlink()
    (saved / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled"):
        load_pretrained(saved)
    (saved / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors"):
        load_pretrained(saved)
    (saved / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="weight_map"):
        load_pretrained(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json can't be read"):
        load_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json is missing"):
        load_pretrained(saved)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt2", {"model_type": "bert"}, "model_type 'bert'; expected one of gpt2, llama"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu'; expected 'gelu_new' or"),
        ("gpt2", {"attn_pdrop": 0.3}, "differ"),
        ("gpt2", {"n_embd": "delete"}, "the key 'n_embd' is missing"),
        ("gpt2", {"n_head": 7}, "doesn't divide"),
        ("gpt2", {"n_layer": "three"}, "n_layers='three'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3'; expected 'default'"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"head_dim": 12}, "head_dim=12"),
    ],
)
def test_settings_that_the_models_lack(tmp_path, kind, changes, message):
    c = ModelConfig(kind, 97, 24, 40, 1, 4, 4, 56)
    save_pretrained(build(c), c, tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path)


def test_a_failed_write_leaves_the_old_model(config, saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("neuralforge.resilience.tensor_file.os.fsync", full)
    with pytest.raises(CheckpointError, match="the disk is full: .* MB are needed"):
        save_pretrained(build(config), config, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    monkeypatch.undo()
    shutil.rmtree(saved)
    saved.write_text("a file")
    with pytest.raises(CheckpointError, match="can't be written"):
        save_pretrained(build(config), config, saved)
