"""How a model is spread over ranks, where its weights come from and how it learns."""

from typing import Annotated, Literal

from pydantic import Field

from megarl.config.section import Beta, Fraction, NotNegative, Positive, Section, UserPath


class ParallelConfig(Section):
    """How one model is spread over ranks; data parallelism is what the world leaves over."""

    tensor: Positive = 1  # tensor-parallel ranks a model
    pipeline: Positive = 1  # pipeline stages a model
    virtual_pipeline: Positive = 1  # chunks of layers a stage; more than 1: Megatron's interleaved schedule
    context: Positive = 1  # context-parallel ranks a model: every sequence's tokens are spread over them
    expert: Positive = 1  # ranks that share out the experts of a mixture; a divisor of the ranks of a pipeline stage
    sequence: bool = False  # sequence parallelism: activations between tensor-parallel regions are split along tokens
    microbatch_size: Positive = 8  # sequences a forward pass of one data-parallel replica, both of a pair counted
    max_tokens_per_microbatch: NotNegative = 0  # sequences packed without padding up to so many tokens; 0: padded, microbatch_size of them
    recompute: Literal["none", "selective", "full"] = "none"  # activations computed again in backward
    distributed_optimizer: bool = True  # optimizer state sharded over data-parallel ranks (ZeRO-1)
    logits_bytes: Positive = 256 << 20  # largest block of float32 logits a rank ever holds
    head: Literal["auto", "last_stage", "sharded"] = "auto"  # who runs the output layer and the loss; auto: all stages where it pays
    timeout_s: Positive = 600  # a collective that takes longer fails the run


class OptimizerConfig(Section):
    """Adam with decoupled weight decay, warm-up and decay (semantics section 6)."""

    lr: Annotated[float, Field(gt=0)] = 1e-6
    min_lr_ratio: Fraction = 0.0  # learning rate at the end of a decay, as a part of lr
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: NotNegative = 0  # optimizer steps of linear warm-up
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-5
    router_balance: Annotated[float, Field(ge=0)] = 0.0  # coefficient of the load-balancing loss of a mixture's routers
    clip_grad: Annotated[float, Field(ge=0)] = 1.0  # largest global gradient norm; 0 turns clipping off
    skip_above: Annotated[float, Field(ge=0)] = 0.0  # gradient norm above which an update is skipped; 0: it is clipped like others
    max_skipped_updates: Positive = 8  # updates in a row that are skipped (skip_above, or no finite number), before the run stops


class ModelConfig(Section):
    """Where a model's weights come from."""

    path: UserPath  # Hugging Face directory, or a megarl checkpoint of an earlier stage
    shape: UserPath | None = None  # directory whose config.json `path` must agree with; lets --check count before the weights are there
    random_init: bool = False  # use only the directory's config.json and start from random weights


class TrainedModelConfig(ModelConfig):
    """A model that learns."""

    frozen_layers: NotNegative = 0  # so many lowest layers, and the embedding, keep their start's weights; 0: everything learns
    optimizer: OptimizerConfig = OptimizerConfig()
