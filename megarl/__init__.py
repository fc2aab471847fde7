"""megarl: reinforcement learning for large language models on Megatron parallelism, with vLLM generation."""

__version__ = "0.1.0"
