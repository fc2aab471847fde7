"""Tiny random Hugging Face models with norms and biases that are not trivial and logits that are spread."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

SIZES = dict(
    vocab_size=201,  # no multiple of anything: both sides pad their vocabularies
    hidden_size=128,  # vLLM on a CPU wants heads of 32
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
FAMILIES = ("llama", "qwen2", "qwen3-tied")
WINDOW = 9  # of mistral and gemma3: shorter than prompts and responses
GEMMA3 = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 24,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
MIXTURES = ("mixtral", "qwen3-moe")


def save_tiny(kind: str, seed: int, folder: Path, **sizes: int) -> Path:
    """A random model of this family, fp32, as transformers saves it; `sizes` replace those above."""
    import transformers

    sizes = SIZES | sizes
    configs = {
        "llama": lambda: transformers.LlamaConfig(**sizes, tie_word_embeddings=False),
        "llama-deep": lambda: transformers.LlamaConfig(**sizes | {"num_hidden_layers": 5}, tie_word_embeddings=False),
        "qwen2": lambda: transformers.Qwen2Config(**sizes, tie_word_embeddings=False),
        "qwen3-tied": lambda: transformers.Qwen3Config(**sizes, head_dim=32, tie_word_embeddings=True),
        "mistral": lambda: transformers.MistralConfig(**sizes, sliding_window=WINDOW, tie_word_embeddings=False),
        "gemma3": lambda: transformers.Gemma3TextConfig(**sizes | {"num_hidden_layers": 3}, head_dim=32, **GEMMA3),
        "mixtral": lambda: transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
        "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
            **sizes, head_dim=32, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=48, norm_topk_prob=True
        ),
    }
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(configs[kind]()).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif parameter.dim() == 1:
                parameter.copy_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    path = folder / f"{kind}-{seed}"
    model.save_pretrained(path)
    return path


@dataclass(frozen=True)
class WholePiece:
    """A whole Hugging Face tensor as a piece of the bridge."""

    hf_name: str
    view: Tensor

    @property
    def box(self):
        return tuple((0, size) for size in self.view.shape)


@dataclass(frozen=True)
class WholeModel:
    """A weight owner that holds every tensor of a directory, for worlds of one rank."""

    pieces: list[WholePiece]

    @classmethod
    def of(cls, folder: Path) -> "WholeModel":
        return cls([WholePiece(name, tensor) for name, tensor in sorted(load_file(folder / "model.safetensors").items())])


def greedy_difference(model_dir: Path, completions, requests, dtype=torch.float32) -> tuple[float, float]:
    """(largest |log-prob difference| to transformers on these weights, part of tokens that are its argmax too)."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager").eval()
    worst, agree, count = 0.0, 0, 0
    for request, completion in zip(requests, completions):
        with torch.no_grad():
            logits = model(torch.tensor([[*request.token_ids, *completion.token_ids]])).logits[0].float()
        logprobs = logits.log_softmax(-1)
        for offset, (token, value) in enumerate(zip(completion.token_ids, completion.rollout_logprobs)):
            row = logprobs[len(request.token_ids) - 1 + offset]
            worst = max(worst, abs(float(row[token]) - value))
            agree += int(row.argmax()) == token
            count += 1
    return worst, agree / count
