"""One rank computes what transformers and plain autograd compute; layouts in bf16 stay near it.

That layouts in float32 compute what one rank computes is the matter of `tests/multi_rank/invariance`.
"""

from dataclasses import replace

import pytest
import torch

from megarl.metrics import Metrics
from megarl.ppo.losses import aggregate, count_for, entropy_loss, policy_loss, value_loss
from tests.multi_rank.role_cases import Case, assembled, hf_config, make_experience, make_run, rows_of, run_cases, weights
from tests.ranks import run_ranks

BASE = Case()
TIED = Case(model={"tie_word_embeddings": True})
QWEN2 = Case(model={"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})  # query, key and value biases
QWEN3 = Case(model={"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16})  # norms of queries and keys
ON_ONE = [BASE, TIED, replace(TIED, precision="bf16")]
ON_FOUR = [Case({"tensor": 2, "pipeline": 2, "sequence": True}, model=TIED.model, precision="bf16")]
AGGREGATED = ["sequence_mean", "sequence_sum_fixed"]


def by_case(results: list[list[dict]]) -> list[list[dict]]:
    """[rank][case] -> [case][rank]"""
    return [list(ranks) for ranks in zip(*results, strict=True)]


@pytest.fixture(scope="module")
def one_rank() -> dict:
    cases = [*ON_ONE, *(Case(ppo={"aggregation": name}) for name in AGGREGATED)]
    return dict(zip(map(repr, cases), by_case(run_ranks(run_cases, 1, cases)), strict=True))


def reference_of(case: Case, one_rank: dict) -> list[dict]:
    return one_rank[repr(Case(ppo=case.ppo, model=case.model, precision=case.precision))]


def assert_same(found: list[dict], expected: list[dict], case: Case, smallest_update: float = 1e-3) -> None:
    is_exact = case.precision == "fp32"
    rtol, atol = (1e-5, 2e-6) if is_exact else (5e-2, 5e-2)
    for key in ("logprobs", "ref_logprobs", "values", "scores", "new_logprobs"):
        worst = (rows_of(found, key) - rows_of(expected, key)).abs() - rtol * rows_of(expected, key).abs()
        assert worst.max() < 5 * atol, f"{key} differs by {worst.max():.2e}"
    for key in ("actor_weights", "critic_weights"):
        start = weights_before(key, case)
        whole, whole_expected = assembled(found, key, case), assembled(expected, key, case)
        for name, before in start.items():
            step, expected_step = whole[name] - before, whole_expected[name] - before
            size = expected_step.abs().max().item()
            assert size > smallest_update, f"{key} {name} did not learn"
            worst = (step - expected_step).abs().max().item() / size
            assert worst < (1e-4 if is_exact else 0.2), f"{key} {name}: relative difference {worst:.2e} of the update"
    for key in ("actor_metrics", "critic_metrics"):
        metrics, metrics_expected = total(found, key), total(expected, key)
        assert metrics.keys() == metrics_expected.keys()
        for name, value in metrics_expected.items():
            assert metrics[name] == pytest.approx(value, rel=2e-5 if is_exact else 0.1, abs=1e-6 if is_exact else 2e-2), f"{key} {name}"


def weights_before(key: str, case: Case) -> dict[str, torch.Tensor]:
    from megarl.models.family import spec_from_hf_config

    spec = spec_from_hf_config(hf_config(**case.model))
    start = weights(spec, "actor", 1) if key.startswith("actor") else weights(spec, "critic", 2)
    return {name: t.to(torch.bfloat16).float() if case.precision == "bf16" else t for name, t in start.items()}


def total(results: list[dict], key: str) -> dict[str, float]:
    """Metrics added over replicas; ranks of one replica hold equal ones."""
    by_replica = {result["dp_rank"]: result[key] for result in results}
    assert all(result[key] == by_replica[result["dp_rank"]] for result in results)
    entire = Metrics()
    for entries in by_replica.values():
        entire = entire + Metrics.from_json(entries)
    return entire.values_by_name()


@pytest.mark.parametrize("world_size, cases", [(4, ON_FOUR)])
def test_layouts_agree_with_one_rank(world_size, cases, one_rank):
    faults = []
    for case, found in zip(cases, by_case(run_ranks(run_cases, world_size, cases)), strict=True):
        try:
            assert_same(found, reference_of(case, one_rank), case)
        except AssertionError as fault:
            faults.append(f"{case}: {fault}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("case", [BASE, TIED, *(Case(ppo={"aggregation": name}) for name in AGGREGATED)], ids=str)
def test_one_rank_agrees_with_transformers(case, one_rank):
    """Log-probabilities and the gradient of the loss, from the definition: whole logits, log_softmax, one backward."""
    transformers = pytest.importorskip("transformers")
    run, batch = make_run(case), make_experience()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_config(**case.model))).float()
    start = weights_before("actor_weights", case)
    model.load_state_dict(start, strict=not case.model)
    logits = model(batch.token_ids).logits[:, :-1] / run.rollout.temperature
    log_p = torch.nn.functional.pad(logits.log_softmax(-1), (0, 0, 1, 0))  # entry t speaks about token t
    logprobs = log_p.gather(2, batch.token_ids[..., None]).squeeze(2) * batch.response_mask
    entropy = -(log_p.exp() * log_p).sum(2)
    found = one_rank[repr(case)]
    torch.testing.assert_close(rows_of(found, "logprobs"), logprobs.detach(), rtol=1e-5, atol=2e-5)

    mask = batch.response_mask
    losses = policy_loss(logprobs, batch.old_logprobs, batch.advantages, mask, run.ppo)[0]
    losses = losses + entropy_loss(entropy, mask, run.ppo.entropy_coef)
    aggregate(losses, mask, run.ppo.aggregation, count_for(run.ppo.aggregation, mask, run.rollout.max_response_tokens)).backward()
    assert_first_adam_step(assembled(found, "actor_weights", case), start, dict(model.named_parameters()))


def test_the_critic_agrees_with_transformers(one_rank):
    transformers = pytest.importorskip("transformers")
    run, batch = make_run(BASE), make_experience()
    start = weights_before("critic_weights", BASE)
    model = transformers.LlamaModel(transformers.LlamaConfig(**hf_config())).float()
    model.load_state_dict({name.removeprefix("model."): t for name, t in start.items() if name.startswith("model.")})
    head = start["score.weight"].clone().requires_grad_()
    outputs = (model(batch.token_ids).last_hidden_state @ head.t()).squeeze(-1)
    values = torch.nn.functional.pad(outputs[:, :-1], (1, 0))
    mask = batch.response_mask
    found = one_rank[repr(BASE)]
    torch.testing.assert_close(rows_of(found, "values"), (values * mask).detach(), rtol=1e-5, atol=2e-5)
    aggregate(value_loss(values, batch.values, batch.returns, mask, run.ppo.value_clip)[0], mask, "token_mean", mask.sum()).backward()
    parameters = {f"model.{name}": parameter for name, parameter in model.named_parameters()} | {"score.weight": head}
    assert_first_adam_step(assembled(found, "critic_weights", BASE), start, parameters)


def assert_first_adam_step(after: dict, before: dict, parameters: dict) -> None:
    """lr 1, eps 1: the update is -g / (|g| + 1)."""
    for name, start in before.items():
        grad = parameters[name].grad
        expected = -grad / (grad.abs() + 1)
        size = expected.abs().max().item()
        worst = (after[name] - start - expected).abs().max().item() / size
        assert worst < 1e-4, f"{name}: relative difference {worst:.2e} of the update"
