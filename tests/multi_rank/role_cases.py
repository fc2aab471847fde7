"""A tiny model, a made-up experience, and what the four roles make of them under one layout: shared by the role tests."""

from dataclasses import dataclass, field

import torch

from megarl.config import PpoRun
from megarl.models.family import spec_from_hf_config
from megarl.models.spec import ModelSpec
from megarl.parallel import groups
from megarl.ppo.roles import Actor, Critic, Reference, RewardModel
from megarl.records import Experience

NUM_ROWS, NUM_TOKENS, VOCAB = 10, 11, 100  # no multiple of a microbatch, of tensor ranks, of 64
MIXTURE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


@dataclass(frozen=True)
class Case:
    """One way to run the same update: keys of `parallel`, of `ppo`, of the optimizer, of the model."""

    parallel: dict = field(default_factory=dict)
    ppo: dict = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    precision: str = "fp32"
    end_ids: tuple[int, ...] = ()  # tokens that the first two of every response could not be


class DictSource:
    """Weights from a dictionary."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def names(self):
        return self.tensors

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def read(self, name, box):
        return self.tensors[name][tuple(slice(offset, offset + size) for offset, size in box)]


def hf_config(**settings) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    } | settings


def weights(spec: ModelSpec, role: str, seed: int) -> dict[str, torch.Tensor]:
    """Random weights that give logits some spread and norms that matter."""
    generator, table = torch.Generator().manual_seed(seed), spec.table(role)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in sorted(table.hf_shapes.items())}
    return {name: table.new_norm + 0.2 * t if name.endswith("norm.weight") else 0.15 * t for name, t in drawn.items()}


def make_run(case: Case) -> PpoRun:
    """lr 1 and eps 1 make the first Adam update gradient / (|gradient| + 1): weights then show the gradient."""
    optimizer = {"lr": 1.0, "eps": 1.0, "clip_grad": 0.0} | case.optimizer
    model = {"path": "model", "optimizer": optimizer}
    return PpoRun.model_validate(
        {
            "output_dir": "out",
            "tokenizer": "tokenizer",
            "precision": case.precision,
            "parallel": {"microbatch_size": 4} | case.parallel,
            "actor": model,
            "critic": model,
            "rewards": [{"kind": "exact"}],
            "data": {"path": "prompts.jsonl"},
            "rollout": {"prompts_per_step": NUM_ROWS, "max_response_tokens": 8, "temperature": 0.7},
            "ppo": {"total_steps": 10, "minibatch_size": NUM_ROWS, "entropy_coef": 0.05, "dual_clip": 3.0} | case.ppo,
        }
    )


def make_experience() -> Experience:
    """Ten sequences whose responses differ in length; one has no response at all."""
    generator = torch.Generator().manual_seed(7)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    lengths = torch.tensor([11, 8, 5, 9, 11, 4, 7, 10, 6, 11])
    prompts = torch.tensor([3, 2, 5, 4, 1, 2, 3, 6, 2, 5])  # row 2: prompt only
    position = torch.arange(NUM_TOKENS)[None]
    mask = (position >= prompts[:, None]) & (position < lengths[:, None])
    tokens = torch.randint(1, VOCAB, (NUM_ROWS, NUM_TOKENS), generator=generator).masked_fill(position >= lengths[:, None], 0)

    def on_response(tensor):
        return torch.where(mask, tensor, 0.0)

    shape = (NUM_ROWS, NUM_TOKENS)
    return Experience(
        token_ids=tokens,
        lengths=lengths,
        response_mask=mask,
        rollout_logprobs=on_response(-4.6 + 0.5 * noise(*shape)),
        rewards=noise(NUM_ROWS),
        truncated=torch.zeros(NUM_ROWS, dtype=torch.bool),
        group_ids=torch.arange(NUM_ROWS),
        sample_ids=torch.arange(NUM_ROWS),
        baselines=torch.zeros(NUM_ROWS),
        baseline_truncated=torch.zeros(NUM_ROWS, dtype=torch.bool),
        ages=torch.zeros_like(tokens),
        must_go_on=mask & (position < prompts[:, None] + 2),
        old_logprobs=on_response(-4.6 + 0.5 * noise(*shape)),
        ref_logprobs=on_response(-4.6 + 0.5 * noise(*shape)),
        values=on_response(0.1 * noise(*shape)),
        token_rewards=on_response(noise(*shape)),
        advantages=on_response(noise(*shape)),
        returns=on_response(noise(*shape)),
    )


def updated_weights(pieces) -> list:
    return [(piece.hf_name, piece.box, piece.view.clone()) for piece in pieces if piece.is_owner]


def run_case(case: Case) -> dict:
    """Every role's answers and one update of actor and critic; entered by every rank."""
    run = make_run(case)
    layout = groups.initialize(run.parallel, seed=0)
    spec = spec_from_hf_config(hf_config(**case.model))
    actor = Actor(spec, run, layout, DictSource(weights(spec, "actor", 1)), end_ids=case.end_ids)
    critic = Critic(spec, run, layout, DictSource(weights(spec, "critic", 2)))
    reference = Reference(spec, run, layout, DictSource(weights(spec, "actor", 3)), case.end_ids)
    reward_model = RewardModel(spec, run, layout, DictSource(weights(spec, "critic", 4)))
    share = NUM_ROWS // layout.data
    mine = make_experience().rows(slice(layout.dp_rank * share, (layout.dp_rank + 1) * share))
    result = {
        "dp_rank": layout.dp_rank,
        "logprobs": actor.logprobs(mine),
        "ref_logprobs": reference.logprobs(mine),
        "values": critic.values(mine),
        "scores": reward_model.scores(mine),
        "actor_metrics": actor.update(mine).to_json(),
        "critic_metrics": critic.update(mine).to_json(),
        "actor_weights": updated_weights(actor.pieces),
        "critic_weights": updated_weights(critic.pieces),
        "new_logprobs": actor.logprobs(mine),
    }
    return result


def run_cases(rank: int, world_size: int, cases: list[Case]) -> list[dict]:
    return [run_case(case) for case in cases]


def assembled(results: list[dict], key: str, case: Case) -> dict[str, torch.Tensor]:
    """Whole Hugging Face tensors from every rank's pieces; every element comes from exactly one rank."""
    table = spec_from_hf_config(hf_config(**case.model)).table("actor" if key.startswith("actor") else "critic")
    whole = {name: torch.full(shape, float("nan")) for name, shape in table.hf_shapes.items()}
    for result in results:
        for name, box, view in result[key]:
            target = whole[name][tuple(slice(offset, offset + size) for offset, size in box)]
            assert torch.isnan(target).all(), f"{name} {box} is owned twice"
            target.copy_(view)
    assert not any(torch.isnan(t).any() for t in whole.values()), "a part of the model is owned by no rank"
    return whole


def rows_of(results: list[dict], key: str) -> torch.Tensor:
    """A per-row result of the whole batch; ranks of one replica must agree bit for bit."""
    parts = {}
    for result in results:
        first = parts.setdefault(result["dp_rank"], result[key])
        assert torch.equal(first, result[key]), f"ranks of replica {result['dp_rank']} differ in {key}"
    return torch.cat([parts[dp_rank] for dp_rank in sorted(parts)])
