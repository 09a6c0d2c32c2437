"""A small EAGLE3 draft model with random weights, in the format that the engine reads.

Its guesses are hardly ever right. The target's hidden states still go through it, its tokens through the target's
verification, and what comes out must be what the target says alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from sglang_minimax.checkpoints import SmallModel


def write_draft(folder: Path, target: SmallModel) -> Path:
    """One layer of the target's hidden size; its first projection takes the hidden states of three target layers."""
    hidden, heads, kv_heads, head_dim, width = target.hidden_size, 4, 2, 128, 512
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "dtype": target.dtype,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": 1,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": target.vocab_size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))

    generator = torch.Generator().manual_seed(0)

    def projection(rows: int, columns: int) -> torch.Tensor:
        weight = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        return weight.to(getattr(torch, target.dtype))

    ones = torch.ones(hidden, dtype=getattr(torch, target.dtype))
    save_file(
        {
            "fc.weight": projection(hidden, 3 * hidden),
            "midlayer.hidden_norm.weight": ones,
            "midlayer.input_layernorm.weight": ones.clone(),
            "midlayer.self_attn.q_proj.weight": projection(heads * head_dim, 2 * hidden),
            "midlayer.self_attn.k_proj.weight": projection(kv_heads * head_dim, 2 * hidden),
            "midlayer.self_attn.v_proj.weight": projection(kv_heads * head_dim, 2 * hidden),
            "midlayer.self_attn.o_proj.weight": projection(hidden, heads * head_dim),
            "midlayer.post_attention_layernorm.weight": ones.clone(),
            "midlayer.mlp.gate_proj.weight": projection(width, hidden),
            "midlayer.mlp.up_proj.weight": projection(width, hidden),
            "midlayer.mlp.down_proj.weight": projection(hidden, width),
            "norm.weight": ones.clone(),
            "lm_head.weight": projection(target.vocab_size, hidden),
        },
        folder / "model.safetensors",
    )
    return folder
