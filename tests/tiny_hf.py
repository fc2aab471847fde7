"""Tiny random Hugging Face models of every family, and what transformers computes with them: the oracle of the Megatron models."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SIZES = dict(
    vocab_size=101,  # no multiple of anything: Megatron pads it
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    pad_token_id=0,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA3 = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 5,
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
    "bos_token_id": 2,
    "eos_token_id": 1,
}
# kind: (family, changes of the sizes). Three layers over two stages are an uneven pipeline.
KINDS = {
    "llama": ("Llama", {}),
    "llama3-tied": ("Llama", {"num_hidden_layers": 3, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2", {}),
    "qwen3-tied": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "llama-critic": ("Llama", {"num_labels": 1}),
    "qwen3-critic": ("Qwen3", {"head_dim": 24, "num_labels": 1, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "gemma3": ("Gemma3Text", GEMMA3),
    "gemma3-critic": ("Gemma3Text", GEMMA3 | {"num_labels": 1}),
}

# mixtures of experts: kinds of their own, since they need layouts of their own
MIXTURES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 24, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": False},
    ),
    "qwen3-moe-critic": (
        "Qwen3Moe",
        {"head_dim": 24, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True, "num_labels": 1},
    ),
}
EXPERT_NAMES = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2"), "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj")}


def tiny_config(kind: str):
    """The transformers configuration of a kind."""
    import transformers

    family, changes = (KINDS | MIXTURES)[kind]
    return getattr(transformers, f"{family}Config")(**SIZES | changes)


def save_tiny(kind: str, folder: Path, seed: int = 0) -> Path:
    """A random fp32 model with norms and biases that are not trivial, as transformers saves it; returns its directory."""
    import transformers

    kinds = transformers.AutoModelForSequenceClassification if kind.endswith("critic") else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    model = kinds.from_config(tiny_config(kind)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_((0.3 if parameter.dim() == 1 else 0.08) * torch.randn_like(parameter))
    model.save_pretrained(folder / kind)
    return folder / kind


def save_oracle(directory: Path, token_ids: torch.Tensor, coefficients: torch.Tensor) -> None:
    """Write `oracle.safetensors` into a model's directory: `outputs` f32[B, T, V] (logits, or values for V = 1) of `token_ids`
    i64[B, T], and `grad.<name>` of sum(outputs * coefficients[:, :, :V]) for every weight."""
    import transformers

    is_critic = directory.name.endswith("critic")
    kinds = transformers.AutoModelForSequenceClassification if is_critic else transformers.AutoModelForCausalLM
    model = kinds.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    outputs = model.score(model.model(token_ids).last_hidden_state) if is_critic else model(token_ids).logits
    (outputs * coefficients[:, :, : outputs.shape[2]]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    tensors = {f"grad.{name}": tensor for name, tensor in as_on_disk(gradients, model.config.model_type).items()}
    tensors |= {"outputs": outputs.detach(), "token_ids": token_ids, "coefficients": coefficients}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "oracle.safetensors")


def as_on_disk(tensors: dict[str, torch.Tensor], model_type: str) -> dict[str, torch.Tensor]:
    """Tensors under the names of a live model under those of its checkpoints: one tensor an expert, not all experts stacked."""
    if model_type not in EXPERT_NAMES:
        return tensors
    block, gate, up, down = EXPERT_NAMES[model_type]
    result = {}
    for name, tensor in tensors.items():
        prefix, _, what = name.rpartition(".mlp.")
        if what == "experts.gate_up_proj":
            for part, half in zip((gate, up), tensor.chunk(2, dim=1), strict=True):
                result |= {f"{prefix}.{block}.experts.{i}.{part}.weight": half[i] for i in range(len(tensor))}
        elif what == "experts.down_proj":
            result |= {f"{prefix}.{block}.experts.{i}.{down}.weight": tensor[i] for i in range(len(tensor))}
        else:
            result[f"{prefix}.{block}.{what}" if prefix else name] = tensor
    return result


def load_oracle(directory: Path) -> dict[str, torch.Tensor]:
    """What `save_oracle` wrote."""
    return load_file(directory / "oracle.safetensors")


def edit_config(directory: Path, **changes) -> None:
    """Change keys of a directory's config.json; None removes a key."""
    path = directory / "config.json"
    values = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(values))
