"""vLLM as any user would start it: a fresh engine on a Hugging Face directory, its weights read by vLLM itself. For checking exports."""

from collections.abc import Sequence
from pathlib import Path

from megarl.parallel import device
from megarl.rollout.vllm_platform import import_vllm


def generate_greedy(
    directory: Path, prompts: Sequence[Sequence[int]], max_tokens: int, stop_token_ids: Sequence[int], dtype: str = "float32"
) -> list[tuple[int, ...]]:
    """The likeliest response to each prompt (token ids in, token ids out; a stop token ends a response and belongs to it).

    Needs a process of its own without torch.distributed: the engine makes a world of one rank.
    """
    vllm = import_vllm()
    share = {"gpu_memory_utilization": 0.5} if device.is_cuda() else {}  # of the GPU, which must be free: others may use the rest
    engine = vllm.LLM(
        model=str(directory),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=dtype,
        max_model_len=max(map(len, prompts)) + max_tokens,
        kv_cache_memory_bytes=256 << 20,
        seed=0,
        disable_log_stats=True,
        **share,
    )
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=max_tokens, stop_token_ids=list(stop_token_ids), ignore_eos=True, detokenize=False
    )
    outputs = engine.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]
