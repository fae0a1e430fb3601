"""Hugging Face checkpoints: a folder with `config.json` and `model.safetensors`, or numbered parts of it with an index.

Tables of names, read in both directions. GPT-2's matrices are stored as [in, out] (its Conv1D), ours and Llama's as
[out, in] (nn.Linear). Nothing of the `transformers` library is needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..files import beside, disk_errors, sync_folder, write_synced
from ..resilience import tensor_file
from .config import ModelConfig
from .initialise import KINDS

PREFIX = {"gpt2": "transformer.", "llama": "model."}
"""Of every name but the head's; a checkpoint of the model without its head goes without."""

MODULES = {
    "gpt2": {
        "tokens": "wte",
        "positions": "wpe",
        "blocks.*.norm1": "h.*.ln_1",
        "blocks.*.attention.qkv": "h.*.attn.c_attn",
        "blocks.*.attention.out": "h.*.attn.c_proj",
        "blocks.*.norm2": "h.*.ln_2",
        "blocks.*.feed_forward.up": "h.*.mlp.c_fc",
        "blocks.*.feed_forward.out": "h.*.mlp.c_proj",
        "norm": "ln_f",
        "head": "lm_head",
    },
    "llama": {
        "tokens": "embed_tokens",
        "blocks.*.norm1": "layers.*.input_layernorm",
        "blocks.*.attention.q": "layers.*.self_attn.q_proj",
        "blocks.*.attention.k": "layers.*.self_attn.k_proj",
        "blocks.*.attention.v": "layers.*.self_attn.v_proj",
        "blocks.*.attention.out": "layers.*.self_attn.o_proj",
        "blocks.*.norm2": "layers.*.post_attention_layernorm",
        "blocks.*.feed_forward.gate": "layers.*.mlp.gate_proj",
        "blocks.*.feed_forward.up": "layers.*.mlp.up_proj",
        "blocks.*.feed_forward.out": "layers.*.mlp.down_proj",
        "norm": "norm",
        "head": "lm_head",
    },
}
COMPUTED = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Masks and frequencies that old checkpoints carry; a model computes them."""

SETTINGS = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "llama": {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0.0, None),
        "rope_type": ("default",),
    },
}
"""Keys of config.json that change what is computed, and the values that our models stand for, the default first."""

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def load_pretrained(folder: Path | str, dtype: torch.dtype | None = None) -> tuple[nn.Module, ModelConfig]:
    """The GPT-2 or Llama of a folder in Hugging Face's layout, in evaluation mode, on the CPU, in `dtype` (default:
    as stored).

    Raises CheckpointError for a file that is missing or damaged; a tensor that is missing, unknown or of another shape
    than the configuration says; and a setting that these models don't have (scaled rotary positions, for one).
    """
    folder = Path(folder)
    config = _read_config(folder)
    with torch.device("meta"):
        model = KINDS[config.kind](config)
    expected = {_theirs(config.kind, ours): ours for ours, _ in model.named_parameters()}
    weights = {}
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(file, framework="pt")) for file in _weight_files(folder)]
            stored = {name.removeprefix(PREFIX[config.kind]): (file, name) for file in files for name in file.keys()}
            if missing := sorted(expected.keys() - stored.keys()):
                raise CheckpointError(f"{folder}: tensor {_and_more(missing)} is missing, which config.json calls for.")
            for theirs, (file, name) in stored.items():
                if theirs in expected:
                    ours, t = expected[theirs], file.get_tensor(name)
                    if _transposed(config.kind, ours) and t.dim() == 2:
                        t = t.T
                    weights[ours] = t.to(dtype or t.dtype, copy=True, memory_format=torch.contiguous_format)
                elif theirs == "lm_head.weight":  # tied, and stored all the same
                    tokens_file, tokens_name = stored[_theirs(config.kind, "tokens.weight")]
                    if not torch.equal(file.get_tensor(name), tokens_file.get_tensor(tokens_name)):
                        raise CheckpointError(
                            f"{folder}: config.json says that the embeddings are tied, and lm_head.weight differs from "
                            f"the token embedding. Set tie_word_embeddings to false there."
                        )
                elif not COMPUTED.fullmatch(theirs):
                    raise CheckpointError(
                        f"{folder}: tensor {name} has no place in a {config.kind} of {config.n_layers} layers, as "
                        f"config.json describes it. A model with other parts can't be loaded here."
                    )
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{folder}: the weights can't be read: {e}. Fetch them anew.") from e
    for name, p in model.named_parameters():
        if weights[name].shape != p.shape:
            raise CheckpointError(
                f"{folder}: tensor {_theirs(config.kind, name)} gives {name} the shape {tuple(weights[name].shape)}, and "
                f"config.json calls for {tuple(p.shape)}. The two files don't belong together."
            )
    model.load_state_dict(weights, assign=True)
    return model.eval(), config


def save_pretrained(
    model: nn.Module, config: ModelConfig, folder: Path | str, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write the model into `folder` in Hugging Face's layout, in its own dtype, in several files where it is larger
    than `max_shard_bytes`; replaces a model that is there. A Llama's dropout is left out: the format has no place for it.

    Raises CheckpointError if it can't be written; what was there stays.
    """
    folder = Path(folder)
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = max_shard_bytes
    for ours, p in model.named_parameters():
        if p.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        room -= p.nbytes
        theirs = _theirs(config.kind, ours)
        theirs = theirs if theirs.startswith("lm_head") else PREFIX[config.kind] + theirs
        shards[-1][theirs] = p.detach().T if _transposed(config.kind, ours) and p.dim() == 2 else p.detach()
    count = len(shards)
    files = {WEIGHTS if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors": t for i, t in enumerate(shards, 1)}
    size = sum(p.nbytes for p in model.parameters())
    partial = beside(folder / "partial")
    with disk_errors(folder, lambda: size, CheckpointError):
        try:
            partial.mkdir(parents=True)
            for name, tensors in files.items():
                tensor_file.write(partial / name, tensors, {"format": "pt"})
            if count > 1:
                index = {"metadata": {"total_size": size}, "weight_map": {t: name for name in files for t in files[name]}}
                write_synced(partial / INDEX, json.dumps(index, indent=2).encode())
            described = _write_config(config, next(model.parameters()).dtype)
            write_synced(partial / CONFIG, json.dumps(described, indent=2).encode())
            for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
                old.unlink(missing_ok=True)
            for new in partial.iterdir():
                os.replace(new, folder / new.name)
            sync_folder(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _theirs(kind: str, ours: str) -> str:
    """`blocks.3.norm1.weight` -> `h.3.ln_1.weight`"""
    module, _, leaf = ours.rpartition(".")
    layer = re.match(r"blocks\.(\d+)\.", module)
    if layer is None:
        return f"{MODULES[kind][module]}.{leaf}"
    pattern = MODULES[kind]["blocks.*." + module[layer.end() :]]
    return f"{pattern.replace('*', layer[1])}.{leaf}"


def _transposed(kind: str, ours: str) -> bool:
    return kind == "gpt2" and ours.startswith("blocks.")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        try:
            return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{folder / INDEX}: expected a JSON object with a weight_map ({e}). Fetch it anew.") from e
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(
            f"{folder}: neither {WEIGHTS} nor {INDEX} is here. Weights in pickled files (pytorch_model.bin) aren't read, "
            f"as they can run code: convert them to safetensors."
        )
    return [folder / WEIGHTS]


def _read_config(folder: Path) -> ModelConfig:
    path = folder / CONFIG
    try:
        c = json.loads(path.read_text())
        kind = c["model_type"]
        if kind not in MODULES:
            raise CheckpointError(f"{path}: model_type {kind!r}; expected one of {', '.join(MODULES)}.")
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        c["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        for key, allowed in SETTINGS[kind].items():
            if c.get(key, allowed[0]) not in allowed:
                raise CheckpointError(
                    f"{path}: {key}={c[key]!r}; expected {' or '.join(map(repr, allowed))}: a {kind} with another can't be "
                    f"loaded here."
                )
        if kind == "gpt2":
            dropouts = {c.get(key, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
            if len(dropouts) > 1:
                raise CheckpointError(f"{path}: resid_pdrop, embd_pdrop and attn_pdrop differ; set all to one number.")
            return ModelConfig(
                kind="gpt2",
                vocab_size=c["vocab_size"],
                context=c["n_positions"],
                d_model=c["n_embd"],
                n_layers=c["n_layer"],
                n_heads=c["n_head"],
                n_kv_heads=c["n_head"],
                d_ff=c.get("n_inner") or 4 * c["n_embd"],
                dropout=dropouts.pop(),
                tie_embeddings=c.get("tie_word_embeddings", True),
                norm_eps=c.get("layer_norm_epsilon", 1e-5),
            )
        config = ModelConfig(
            kind="llama",
            vocab_size=c["vocab_size"],
            context=c["max_position_embeddings"],
            d_model=c["hidden_size"],
            n_layers=c["num_hidden_layers"],
            n_heads=c["num_attention_heads"],
            n_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            d_ff=c["intermediate_size"],
            tie_embeddings=c.get("tie_word_embeddings", False),
            norm_eps=c.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or c.get("rope_theta", 10000.0),
        )
        if (c.get("head_dim") or config.d_head) != config.d_head:
            raise CheckpointError(f"{path}: head_dim={c['head_dim']}; expected hidden_size / heads = {config.d_head}.")
        return config
    except FileNotFoundError as e:
        raise CheckpointError(f"{path} is missing; expected a folder in Hugging Face's layout.") from e
    except KeyError as e:
        raise CheckpointError(f"{path}: the key {e} is missing.") from e
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path} can't be read: {e}. Fetch it anew.") from e
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e}") from e


def _write_config(c: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    common = {
        "model_type": c.kind,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,  # the defaults may lie outside the vocabulary
        "eos_token_id": None,
    }
    if c.kind == "gpt2":
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "n_positions": c.context,
            "n_embd": c.d_model,
            "n_layer": c.n_layers,
            "n_head": c.n_heads,
            "n_inner": c.d_ff,
            "activation_function": "gelu_new",
            "resid_pdrop": c.dropout,
            "embd_pdrop": c.dropout,
            "attn_pdrop": c.dropout,
            "layer_norm_epsilon": c.norm_eps,
        }
    return common | {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": c.context,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.d_head,
        "intermediate_size": c.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
    }


def _and_more(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
