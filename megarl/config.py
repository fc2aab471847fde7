"""Every knob of a run: its meaning, its unit, its check. Configurations are frozen; unknown keys are refused.

A run is one YAML file plus `a.b=c` overrides. `PpoRun`, `SftRun` and `RewardRun` share the sections of `Run`.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("a path that is not empty")
    return value


def _expand_user(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # "~name" of somebody this machine does not know
        raise ValueError("a path whose ~ names a user of this machine") from error


def _whole_distribution(value: float, neutral: tuple[float, ...]) -> float:
    """Truncated sampling draws from another distribution than the one whose log-probabilities are trained."""
    if value not in neutral:
        raise ValueError(
            f"{' or '.join(map(str, neutral))}: the sampler's log-probabilities would speak of another distribution than the trainer's,"
            " which does not replay vLLM's sampling mask; sharpen with rollout.temperature"
        )
    return value


# A leading ~ is expanded; relative paths count from the current directory.
UserPath = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(_expand_user)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A group of knobs: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ParallelConfig(Section):
    """How one model is spread over ranks; data parallelism is what the world leaves over."""

    tensor: Positive = 1  # tensor-parallel ranks a model
    pipeline: Positive = 1  # pipeline stages a model
    virtual_pipeline: Positive = 1  # chunks of layers a stage; more than 1: Megatron's interleaved schedule
    context: Positive = 1  # context-parallel ranks a model: every sequence's tokens are spread over them
    expert: Positive = 1  # ranks that share out the experts of a mixture; a divisor of the ranks of a pipeline stage
    sequence: bool = False  # sequence parallelism: activations between tensor-parallel regions are split along tokens
    microbatch_size: Positive = 8  # sequences (pairs, for a reward model) a forward pass of one data-parallel replica
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


class ModelConfig(Section):
    """Where a model's weights come from."""

    path: UserPath  # Hugging Face directory, or a megarl checkpoint of an earlier stage
    shape: UserPath | None = None  # directory whose config.json `path` must agree with; lets --check count before the weights are there
    random_init: bool = False  # use only the directory's config.json and start from random weights


class TrainedModelConfig(ModelConfig):
    """A model that learns."""

    optimizer: OptimizerConfig = OptimizerConfig()


class CheckpointConfig(Section):
    """When the run is saved and whether it continues from what is there."""

    every_steps: NotNegative = 0  # 0: only at the end
    keep_last: Positive = 2  # the newest so many stay
    keep_every_steps: NotNegative = 0  # those of every so many steps stay, too; 0: none
    keep_best: str | None = None  # so does the one whose step reported the highest value of this metric; -name: the lowest
    background: Literal["off", "wait", "skip"] = "wait"  # write behind the training; when one is due and the last still being written
    timeout_s: Positive = 1800  # a save that takes longer has failed
    max_failures: NotNegative = 0  # failed saves in a row that the run survives with a warning
    resume: bool = True  # continue from the newest undamaged checkpoint in output_dir
    strict: bool = False  # refuse to continue where the newest one is damaged


class LogConfig(Section):
    """Where metrics go beside `metrics.jsonl` and the terminal."""

    tensorboard: bool = False
    wandb_project: str | None = None  # needs the package wandb and WANDB_API_KEY (or wandb's offline mode)
    samples: NotNegative = 2  # rollouts written to samples.jsonl a step


class ClusterConfig(Section):
    """The machines a run is written for. `--check` counts with them; a real run refuses to start on another number of ranks."""

    nodes: Positive = 1
    ranks_per_node: Positive = 8  # one a GPU

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


class Run(Section):
    """What every stage of the course has."""

    output_dir: UserPath
    seed: NotNegative = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    tokenizer: UserPath  # sentencepiece .model file or Hugging Face directory
    cluster: ClusterConfig | None = None  # none: as many ranks as there are
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


class MemoryConfig(Section):
    """What leaves the accelerator between the phases of a step (docs/bridge.md, "Memory phases")."""

    # frozen: reference and reward models wait in host memory. all: so do weights, optimizer and gradients while a phase does without them.
    offload: Literal["auto", "none", "frozen", "all"] = "auto"  # auto: all on a GPU host (frozen: generators elsewhere), none on a CPU


class PromptData(Section):
    """A JSONL file of prompts, one object a line, with `prompt` (text) or `messages`, and `answer` where a verifier needs one."""

    path: UserPath
    max_prompt_tokens: Positive = 512
    overlong: Literal["refuse", "skip", "truncate_left"] = "refuse"  # what happens to a longer prompt
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    chat_template: bool = False  # render `messages` (or the prompt as a user turn) through the tokenizer's template


class RolloutConfig(Section):
    """How responses are sampled by vLLM."""

    placement: Literal["colocated", "separate", "remote"] = "colocated"  # in the trainer's processes, beside them on its nodes, elsewhere
    replicas: NotNegative = 0  # generators: separate: on each node (0: one); remote: in all, brought by megarl.rollout.worker --join
    listen: Annotated[str, Field(min_length=1)] = "127.0.0.1"  # remote: address of the first node that generators connect to
    tensor_parallel: Positive = 1  # tensor-parallel ranks a generator replica
    prompts_per_step: Positive = 64
    samples_per_prompt: Positive = 1
    max_response_tokens: Positive = 128
    temperature: Annotated[float, Field(ge=0.01, le=2)] = 1.0  # vLLM samples hotter than a lower one and refuses a higher one
    kv_cache_bytes: NotNegative = 0  # a rank, for vLLM's KV cache; 0: a part of the GPU (gpu_memory_fraction) or 256 MiB on a CPU
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    eager: bool = False  # True: no CUDA graphs
    top_p: Annotated[float, AfterValidator(partial(_whole_distribution, neutral=(1.0,)))] = 1.0
    top_k: Annotated[int, AfterValidator(partial(_whole_distribution, neutral=(0, -1)))] = 0
    parity_tolerance: Annotated[float, Field(gt=0)] | None = None  # largest mean |rollout - trainer log-prob|; null: by precision
    digest_every_syncs: NotNegative = 50  # every so many weight syncs each slice is compared at both ends, as in the first two; 0: never


class RewardPart(Section):
    """One term of the weighted reward sum (docs/rewards.md). Every kind has knobs of its own; a knob of another kind is refused."""

    kind: Literal["exact", "numeric", "math", "regex", "length", "repetition", "function", "http", "code", "model"]
    weight: float = 1.0
    path: UserPath | None = None  # model: a megarl checkpoint
    shape: UserPath | None = None  # model: as for the other models
    tolerance: Annotated[float, Field(ge=0)] = 1e-6  # numeric: largest difference, as a part of the answer (of 1 for a smaller one)
    pattern: str | None = None  # regex: what the whole response has to match
    target: Positive | None = None  # length: tokens that cost nothing; from there the score falls to -1 at rollout.max_response_tokens
    ngram: Positive = 4  # repetition: tokens of what may not come twice
    function: str | None = None  # function: module:function or file.py:function
    urls: tuple[str, ...] = ()  # http: addresses of the reward server, used in turn
    hosts: tuple[str, ...] = ()  # http: hosts that urls may name beside this machine's loopback
    per_request: Positive = 16  # http: responses a request
    token_file: UserPath | None = None  # http: file that holds the bearer token; none: the environment's MEGARL_REWARD_TOKEN, if set
    timeout_s: Positive | None = None  # http, function: all of a step's scores (300); math (5), code (10): one response
    accept: tuple[Literal["root", "no_namespaces"], ...] = ()  # code: run responses as root; run them without namespaces


class KlConfig(Section):
    """KL against the reference, taken off the reward or added to the loss (semantics sections 1 and 3)."""

    coef: Annotated[float, Field(ge=0)] = 0.05
    place: Literal["reward", "loss"] = "reward"  # reward: off every token's reward; loss: of the policy as it learns, with gradient
    estimator: Literal["k1", "abs", "k2", "k3"] = "k1"
    target: Annotated[float, Field(gt=0)] | None = None  # with a target the coefficient adapts (Ziegler et al. 2019)
    horizon: Positive = 10000  # sequences


class CorrectionConfig(Section):
    """The policy loss times w, trainer's over sampler's probability of what was sampled (semantics section 3). `low` is for mask alone."""

    kind: Literal["none", "tis", "mask"] = "none"  # tis: min(w, high); mask: w, but 0 outside low to high
    level: Literal["token", "sequence"] = "token"  # w of each token, or of the whole response (their product)
    low: Annotated[float, Field(ge=0)] = 0.5
    high: Annotated[float, Field(gt=0)] = 2.0


class PpoConfig(Section):
    """The algorithm (docs/algorithms.md; semantics sections 1 to 4 and 6)."""

    total_steps: Positive
    num_epochs: Positive = 1
    minibatch_size: Positive  # sequences an optimizer step, over all data-parallel ranks
    # gae and single_step learn values with a critic; the others hold none, and those with a group need several samples a prompt
    advantage: Literal["gae", "single_step", "rloo", "grpo", "dr_grpo", "reinforce_pp", "reinforce_pp_baseline"] = "gae"
    gamma: Fraction = 1.0
    lam: Fraction = 0.95  # gae alone
    loss: Literal["clip", "cispo"] = "clip"  # clip: PPO's surrogate; cispo: log-prob times advantage and the clipped ratio, no gradient cut
    ratio_level: Literal["token", "sequence"] = "token"  # new over old probability of each token, or of a response, geometric mean (GSPO)
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    value_clip: Annotated[float, Field(gt=0)] | None = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum_fixed"] = "token_mean"
    whiten: bool | None = None  # advantages over the whole rollout; null: as the estimator's paper does (docs/algorithms.md)
    critic_warmup_steps: NotNegative = 0
    reward_clip: Annotated[float, Field(gt=0)] | None = None
    reward_scale: Literal["none", "std", "normal"] = "none"  # by the run's rewards so far: over their std; less their mean first
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 0.0  # off the reward of a response that the length limit cut
    bootstrap_truncated: bool = False
    correction: CorrectionConfig = CorrectionConfig()
    kl: KlConfig = KlConfig()


class EvalConfig(Section):
    """Greedy accuracy on held-out prompts, at the start, every N steps and at the end."""

    path: UserPath
    every_steps: NotNegative = 0
    num_prompts: Positive = 256


class PpoRun(Run):
    """`megarl ppo CONFIG`"""

    actor: TrainedModelConfig
    critic: TrainedModelConfig | None = None  # with gae and single_step alone
    reference: ModelConfig | None = None  # default: the actor's start
    rewards: tuple[RewardPart, ...]
    reward_hook: str | None = None  # module:function or file.py:function that changes the weighted sums of a step
    data: PromptData
    rollout: RolloutConfig
    ppo: PpoConfig
    memory: MemoryConfig = MemoryConfig()
    eval: EvalConfig | None = None


class LessonData(Section):
    """Demonstrations (`prompt`/`response` or `messages`) or preferences (`prompt`/`chosen`/`rejected`), JSONL."""

    path: UserPath
    eval_path: UserPath | None = None
    max_tokens: Positive = 2048
    overlong: Literal["refuse", "skip", "truncate"] = "refuse"
    chat_template: bool = False


class LessonConfig(Section):
    """How long a supervised lesson lasts."""

    total_steps: Positive
    batch_size: Positive = 128  # examples an optimizer step, over all data-parallel ranks
    eval_every_steps: NotNegative = 0


class SftRun(Run):
    """`megarl sft CONFIG`"""

    model: TrainedModelConfig
    data: LessonData
    train: LessonConfig


class RewardRun(Run):
    """`megarl reward CONFIG`"""

    model: TrainedModelConfig
    data: LessonData
    train: LessonConfig
