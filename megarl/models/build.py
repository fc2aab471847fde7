"""Role + family + layout -> this rank's Megatron model chunks.

Layers are Transformer Engine's where it is installed, the model is bf16 and nothing about it is unusual; elsewhere Megatron's local ones
with our RMSNorm and core attention. Both carry the same weight keys. Weights are zero until `pieces.load_pieces` fills them: padding of
the vocabulary stays zero.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.config import ParallelConfig
from megarl.models.attention import CausalAttention, LocalRotaryAttention
from megarl.models.heads import ScalarHead
from megarl.models.mixture import BalancedRouter, MixtureLayer
from megarl.models.norm import NormedRowParallelLinear, RMSNorm
from megarl.models.rotary import rotary_frequencies
from megarl.models.spec import ModelSpec, Role, check_layout, padded_vocab, stage_layers
from megarl.parallel import device
from megarl.parallel.layout import EXPERT_TENSOR_PARALLEL_SIZE, ParallelLayout

device.prepare()

from megatron.core.models.gpt import GPTModel  # noqa: E402  (the host is prepared first)
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tensor_parallel.layers import (  # noqa: E402
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402

Precision = Literal["bf16", "fp32"]
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class DecoderChunk(GPTModel):
    """The layers of one pipeline stage, or one of its chunks. The last one returns hidden states; `token_stats` applies `output_layer`.

    Axis letters: S positions (a rank's part under sequence parallelism), B sequences, H hidden width.
    `output_layer` of the last stage is the vocabulary head of an actor (without a weight of its own where embedding and head are
    one tensor on one stage: ask `output_weight`) or the `ScalarHead` of a critic.
    """

    def __init__(self, spec: ModelSpec, role: Role, config: TransformerConfig, layers: ModuleSpec, layout: ParallelLayout, chunk: int):
        num_chunks = config.virtual_pipeline_model_parallel_size or 1
        super().__init__(
            config=config,
            transformer_layer_spec=layers,
            vocab_size=padded_vocab(spec.vocab_size, layout.tensor),
            max_sequence_length=spec.max_positions,
            pre_process=layout.is_first_stage and chunk == 0,
            post_process=layout.is_last_stage and chunk == num_chunks - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=spec.tied and role == "actor",
            position_embedding_type="rope",
            rotary_base=spec.rope_theta,
            vp_stage=chunk if num_chunks > 1 else None,
        )
        self.spec = spec
        self.role = role
        self.rotary_pos_emb.inv_freq = rotary_frequencies(spec).to(device.device())
        if self.post_process and role == "critic":
            self.output_layer = ScalarHead(config)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sequence_of: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs,
    ) -> Tensor:
        """input_ids i64[B, T], right-padded -> hidden states [S, B, H] for the next stage, or after the final norm on the last one.

        Later stages take their input from `set_input_tensor`, as Megatron's schedules do. Attention is causal; no mask is needed.
        `sequence_of` i64[B, T] numbers the sequence of each position, -1 for padding: the routers of a mixture balance over sequences.
        """
        if self.config.num_moe_experts is None:
            sequence_of = None
        elif sequence_of is not None and self.config.sequence_parallel and not self.pre_process:
            # Megatron splits what it calls the padding mask like the activations, but on the first stage alone
            sequence_of = scatter_to_sequence_parallel_region(sequence_of.t().contiguous()).t()
        if (
            packed_seq_params is not None
            and _uses_transformer_engine(self.spec, self.config.bf16)
            and self.config.context_parallel_size == 1
        ):
            packed_seq_params = replace(packed_seq_params, qkv_format="thd")  # rotary embeddings and attention sequence by sequence
        return super().forward(
            input_ids, position_ids, attention_mask, padding_mask=sequence_of, packed_seq_params=packed_seq_params, **kwargs
        )

    def _preprocess(self, *, position_ids: Tensor, packed_seq_params: PackedSeqParams | None, **kwargs) -> tuple:
        is_one_row = packed_seq_params is not None and packed_seq_params.qkv_format != "thd"
        embedded, rotary, *others = super()._preprocess(
            position_ids=position_ids, packed_seq_params=None if is_one_row else packed_seq_params, **kwargs
        )
        if is_one_row:  # sequences start again at position 0, wherever in the row this rank's part begins
            rotary = self.rotary_pos_emb(packed_seq_params.max_seqlen_q, packed_seq=True)[position_ids[0]]
        if embedded is not None and self.spec.embedding_scale != 1.0:
            embedded = embedded * torch.tensor(self.spec.embedding_scale, dtype=embedded.dtype)  # rounded as transformers and vLLM do
        return embedded, rotary, *others

    def _postprocess(self, hidden_states: Tensor, **kwargs) -> Tensor:
        return hidden_states

    def output_weight(self) -> Tensor:
        """The head's weight on the last stage: [padded vocabulary / tensor, H], or [1, H] of a critic."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight


def build_model(spec: ModelSpec, role: Role, parallel: ParallelConfig, precision: Precision, layout: ParallelLayout) -> list[DecoderChunk]:
    """The model chunks of this rank on its device, `virtual_pipeline` of them. Every rank of the world calls it.

    Needs `groups.initialize`. Raises `LayoutError` when the model does not fit the layout.
    """
    check_layout(spec, parallel.tensor, parallel.pipeline * parallel.virtual_pipeline, parallel.sequence, parallel.expert)
    config = transformer_config(spec, parallel, precision)
    chunks = []
    for number in range(parallel.virtual_pipeline):
        num_layers = stage_layers(spec.num_layers, parallel.pipeline * parallel.virtual_pipeline)[number * layout.pipeline + layout.pp_rank]
        layers = _layer_specs(spec, config, num_layers, is_packed=parallel.max_tokens_per_microbatch > 0)
        chunk = DecoderChunk(spec, role, config, layers, layout, number).to(device.device())
        _mark_split_parameters(chunk)
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.zero_()
        chunks.append(chunk)
    return chunks


def _mark_split_parameters(chunk: torch.nn.Module) -> None:
    """Says which weights are split over tensor-parallel ranks, what Megatron does only where it initialises them, and which are experts.

    Without the mark a weight counts as a copy of the first rank's, and the gradient norm (and so the clipping) leaves the rest out.
    Megatron takes experts for dense weights without expert parallelism; but tensor-parallel ranks send their own tokens through whole
    experts, so that gradients must be summed over them, too.
    """
    for module in chunk.modules():
        if isinstance(module, MixtureLayer):
            for weight in module.experts.parameters():
                weight.allreduce = False
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
    for module in chunk.modules():
        axis = 1 if isinstance(module, RowParallelLinear) else 0
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=axis, stride=1)


def transformer_config(spec: ModelSpec, parallel: ParallelConfig, precision: Precision) -> TransformerConfig:
    """Megatron's configuration of this model: no dropout, no biases but the family's, fusions where the host has them."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.ffn_size,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[spec.activation],
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        layernorm_zero_centered_gamma=spec.zero_centered_norms,
        qk_layernorm=spec.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        softmax_scale=spec.softmax_scale,
        window_size=None if spec.window is None else (spec.window.num_tokens - 1, 0),
        window_attn_skip_freq=None if spec.window is None else [int(is_local) for is_local in spec.window.layers],
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        bf16=precision == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=False,
        use_cpu_initialization=not device.is_cuda(),
        calculate_per_token_loss=True,  # losses arrive divided by global denominators and are summed, never averaged
        deallocate_pipeline_outputs=True,
        gradient_accumulation_fusion=device.has_gradient_accumulation_fusion(),
        bias_activation_fusion=device.is_cuda() and spec.activation == "silu",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=_uses_transformer_engine(spec, precision == "bf16"),
        persist_layer_norm=False,
        **_mixture_options(spec, parallel, precision == "bf16"),
        **_pipeline_options(spec, parallel),
        **_recompute_options(parallel),
    )


def _uses_transformer_engine(spec: ModelSpec, is_bf16: bool) -> bool:
    """Transformer Engine multiplies float32 in TF32, 10 bits of mantissa: a model in fp32 takes the local layers, exact everywhere."""
    return is_bf16 and spec.fits_transformer_engine and device.has_transformer_engine()


def _mixture_options(spec: ModelSpec, parallel: ParallelConfig, is_bf16: bool) -> dict:
    """Router in float32, no dropped tokens, whole experts: they are spread over ranks, never cut over tensor-parallel ones."""
    if spec.mixture is None:
        return {}
    return {
        "num_moe_experts": spec.mixture.num_experts,
        "moe_router_topk": spec.mixture.experts_per_token,
        "moe_ffn_hidden_size": spec.ffn_size,
        "moe_router_pre_softmax": not spec.mixture.norm_topk_prob,  # a softmax over the chosen ones is the renormalised softmax over all
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # `BalancedRouter` has its own
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": _uses_transformer_engine(spec, is_bf16),
        "moe_permute_fusion": _uses_transformer_engine(spec, is_bf16),
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": EXPERT_TENSOR_PARALLEL_SIZE,
    }


def _pipeline_options(spec: ModelSpec, parallel: ParallelConfig) -> dict:
    """Which layers each chunk holds, told to Megatron only where they do not divide evenly, and how chunks send to each other."""
    num_chunks = parallel.pipeline * parallel.virtual_pipeline
    options = {}
    if parallel.virtual_pipeline > 1:
        # Of two stages each is the other's next and previous: batched sends between them would cross. Overlapped ones would still
        # read an output whose memory `deallocate_pipeline_outputs` has given back.
        options = {"batch_p2p_comm": False, "overlap_p2p_comm": False}
    if spec.num_layers % num_chunks == 0:
        return options
    stages = [["decoder"] * layers for layers in stage_layers(spec.num_layers, num_chunks)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return {**options, "pipeline_model_parallel_layout": stages}


def _recompute_options(parallel: ParallelConfig) -> dict:
    """`selective` computes attention again in backward, `full` every layer from its input."""
    if parallel.recompute == "none":
        return {}
    if parallel.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _layer_specs(spec: ModelSpec, config: TransformerConfig, num_layers: int, is_packed: bool) -> ModuleSpec | TransformerBlockSubmodules:
    num_experts = config.num_moe_experts
    if _uses_transformer_engine(spec, config.bf16):
        layer = get_gpt_layer_with_transformer_engine_spec(num_experts, config.moe_grouped_gemm, qk_layernorm=spec.qk_norm)
    else:
        layer = get_gpt_layer_local_spec(num_experts, qk_layernorm=spec.qk_norm, normalization="RMSNorm")
    if num_experts is not None:
        layer.submodules.mlp.module, layer.submodules.mlp.submodules.router = MixtureLayer, BalancedRouter
    if _uses_transformer_engine(spec, config.bf16):
        if is_packed and config.context_parallel_size > 1:  # its own attention would cut each sequence of a pack apart
            layer.submodules.self_attention.submodules.core_attention = CausalAttention
        return layer
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CausalAttention
    if spec.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if spec.window is not None and spec.window.rope_theta is not None:
        layer.submodules.self_attention.module = LocalRotaryAttention
    if spec.output_norms:
        attention.linear_proj = layer.submodules.mlp.submodules.linear_fc2 = NormedRowParallelLinear
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
