# ruff: noqa: E501 (expected lines stand as they are printed)
"""The corpus of wrong configurations, as data: what is changed in a run that works, and the lines that this earns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """`old` -> `new` in the YAML, overrides and flags of the command line, and the lines they earn (`run.yaml` and root left out)."""

    name: str
    expected: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    change: tuple[str, str] = ("", "")
    kind: str = "ppo"
    flags: tuple[str, ...] = ("--check",)


HERE = "command line: "
CASES = [
    Case(
        "misspelt key",
        ("ROOT/run.yaml:4: parallel.tensr: unknown key; did you mean parallel.tensor?",),
        change=("tensor: 2\n  p", "tensr: 2\n  p"),
    ),
    Case(
        "key of another section", (HERE + "microbatch_size: unknown key; did you mean parallel.microbatch_size?",), ("microbatch_size=3",)
    ),
    Case("key of another command", (HERE + "train.total_steps: unknown key; did you mean ppo.total_steps?",), ("train.total_steps=3",)),
    Case("two knobs equally near", (HERE + "lr: unknown key; did you mean actor.optimizer.lr or critic.optimizer.lr?",), ("lr=1e-3",)),
    Case(
        "nothing near",
        (
            HERE
            + "parallel.zzzz: unknown key; expected one of tensor, pipeline, virtual_pipeline, context, expert, sequence, microbatch_size,"
            " max_tokens_per_microbatch, recompute, distributed_optimizer, logits_bytes, head, timeout_s",
        ),
        ("parallel.zzzz=1",),
    ),
    Case(
        "dots in YAML",
        (
            "ROOT/run.yaml:3: parallel.recompute: a dotted name is for the command line; expected `recompute:` inside the section `parallel:`",
        ),
        change=("\nparallel:", "\nparallel.recompute: full\nparallel:"),
    ),
    Case(
        "written twice",
        ("ROOT/run.yaml:5: parallel.tensor: written twice, first on line 4; expected one value",),
        change=("tensor: 2\n  p", "tensor: 4\n  tensor: 2\n  p"),
    ),
    Case("text for a number", (HERE + "parallel.tensor: found 'two'; expected a whole number",), ("parallel.tensor=two",)),
    Case(
        "a temperature vLLM would change",
        (HERE + "rollout.temperature: found 0.001; expected at least 0.01",),
        ("rollout.temperature=0.001",),
    ),
    Case(
        "a coefficient that cannot adapt",
        (
            HERE + "ppo.kl.coef: found 0 with ppo.kl.target; expected more than 0: 0 never adapts",
            HERE + "ppo.kl.horizon: found 6; expected more than 6, a fifth of the 32 sequences a step",
        ),
        ("ppo.kl={coef: 0.0, target: 6.0, horizon: 6}",),
    ),
    Case(
        "truncated sampling",
        (
            HERE + "rollout.top_p: found 0.9; expected 1.0: the sampler's log-probabilities would speak of another distribution than the"
            " trainer's, which does not replay vLLM's sampling mask; sharpen with rollout.temperature",
            HERE + "rollout.top_k: found 50; expected 0 or -1: the sampler's log-probabilities would speak of another distribution than the"
            " trainer's, which does not replay vLLM's sampling mask; sharpen with rollout.temperature",
        ),
        ("rollout.top_p=0.9", "rollout.top_k=50"),
    ),
    Case(
        "a correction that lets nothing through",
        (HERE + "ppo.correction.low: found 2 with ppo.correction.high 1.5; expected less: every weight would be 0",),
        ("ppo.correction={kind: mask, low: 2.0, high: 1.5}",),
    ),
    Case(
        "no offload of that name",
        (HERE + "memory.offload: found 'host'; expected one of 'auto', 'none', 'frozen' or 'all'",),
        ("memory.offload=host",),
    ),
    Case("quoted number", (HERE + "seed: found '1'; expected a whole number",), ("seed='1'",)),
    Case("a part of a rank", (HERE + "parallel.tensor: found 1.5; expected a whole number",), ("parallel.tensor=1.5",)),
    Case("truth for a number", (HERE + "seed: found true; expected a whole number",), ("seed=true",)),
    Case("number for truth", (HERE + "ppo.whiten: found 1; expected true or false",), ("ppo.whiten=1",)),
    Case("yes is text", (HERE + "ppo.whiten: found 'yes'; expected true or false",), ("ppo.whiten=yes",)),
    Case("below the bound", (HERE + "parallel.pipeline: found 0; expected at least 1",), ("parallel.pipeline=0",)),
    Case("above the bound", (HERE + "ppo.gamma: found 1.5; expected at most 1",), ("ppo.gamma=1.5",)),
    Case("open bound", (HERE + "actor.optimizer.beta2: found 1.0; expected less than 1",), ("actor.optimizer.beta2=1.0",)),
    Case("learning rate of nothing", (HERE + "actor.optimizer.lr: found 0; expected more than 0",), ("actor.optimizer.lr=0",)),
    Case("not finite", (HERE + "actor.optimizer.lr: found inf; expected a finite number",), ("actor.optimizer.lr=.inf",)),
    Case("not a number", (HERE + "ppo.kl.coef: found nan; expected a finite number",), ("ppo.kl.coef=.nan",)),
    Case("not a choice", (HERE + "precision: found 'fp16'; expected one of 'bf16' or 'fp32'",), ("precision=fp16",)),
    Case("empty path", (HERE + "tokenizer: found ''; expected a path that is not empty",), ("tokenizer=''",)),
    Case(
        "nobody's home",
        (HERE + "tokenizer: found '~nobody-of-that-name/x'; expected a path whose ~ names a user of this machine",),
        ("tokenizer=~nobody-of-that-name/x",),
    ),
    Case(
        "scalar for a section",
        (HERE + "actor: found 3; expected a section with the keys path, shape, random_init, frozen_layers, optimizer",),
        ("actor=3",),
    ),
    Case("section for a scalar", (HERE + "seed: found a section with the keys a; expected a whole number",), ("seed={a: 1}",)),
    Case("scalar for a list", (HERE + "rewards: found 'exact'; expected a list",), ("rewards=exact",)),
    Case(
        "null for a section",
        (
            HERE
            + "parallel: found nothing; expected a section with the keys tensor, pipeline, virtual_pipeline, context, expert, sequence,"
            " microbatch_size, max_tokens_per_microbatch, recompute, distributed_optimizer, logits_bytes, head, timeout_s",
        ),
        ("parallel=null",),
    ),
    Case(
        "missing section",
        (
            "ROOT/run.yaml: data: missing; expected a section with the keys path, format, columns, template, split, sources, malformed, chat_template,"
            " max_prompt_tokens, overlong, min_pass_rate, max_pass_rate",
        ),
        change=("data:\n  path: {root}/prompts.jsonl\n  max_prompt_tokens: 16\n", ""),
    ),
    Case("missing key", ("ROOT/run.yaml:23: ppo.total_steps: missing; expected a whole number",), change=("  total_steps: 3\n", "")),
    Case("override without a value", (HERE + "found 'seed'; expected key=value, such as parallel.tensor=2",), ("seed",)),
    Case(
        "override of a wrong list entry",
        (HERE + "rewards.7: the list has 1 entries; expected an index from 0 to 1, found 7",),
        ("rewards.7.weight=1",),
    ),
    Case("override through a scalar", (HERE + "seed.x: seed is 3; expected a section or a list there",), ("seed=3", "seed.x=1")),
    Case("override that is not YAML", (HERE + "seed: not valid YAML: expected ',' or ']', but got '<stream end>'",), ("seed=[1",)),
    Case(
        "anchor in itself",
        ("ROOT/run.yaml:3: log.samples: an anchor that contains itself; expected a tree of values",),
        change=("\nparallel:", "\nlog: &a {{samples: *a}}\nparallel:"),
    ),
    Case(
        "tensor does not divide heads",
        (
            HERE + "parallel.tensor: found 3; expected a divisor of the 4 attention heads of actor: 1, 2, 4",
            HERE + "parallel.tensor: found 3; expected a divisor of the 64 channels of actor: 1, 2, 4, 8, 16, 32, 64",
            HERE + "parallel.tensor: found 3; expected a divisor or a multiple of the 2 key-value heads of actor",
            HERE + "parallel.tensor: found 3; expected a divisor of the 4 attention heads of critic: 1, 2, 4",
            HERE + "parallel.tensor: found 3; expected a divisor of the 64 channels of critic: 1, 2, 4, 8, 16, 32, 64",
            HERE + "parallel.tensor: found 3; expected a divisor or a multiple of the 2 key-value heads of critic",
        ),
        ("parallel.tensor=3",),
    ),
    Case(
        "more stages than layers",
        (
            HERE + "parallel.pipeline: found 5; expected at most the 4 layers of actor",
            HERE + "parallel.pipeline: found 5; expected at most the 4 layers of critic",
        ),
        ("parallel.pipeline=5",),
    ),
    Case(
        "layout x world size",
        (
            "ROOT/run.yaml:4: tensor 2 x pipeline 2 x context 1 = 4 ranks a replica does not divide the world of 6 ranks: change parallel.tensor,"
            " parallel.pipeline or parallel.context, or the number of ranks",
        ),
        flags=("--check", "--world", "6"),
    ),
    Case(
        "cluster too small",
        (
            "ROOT/run.yaml:4: tensor 2 x pipeline 2 x context 1 = 4 ranks a replica does not divide the world of 2 ranks: change parallel.tensor,"
            " parallel.pipeline or parallel.context, or the number of ranks",
        ),
        ("cluster={nodes: 1, ranks_per_node: 2}",),
    ),
    Case(
        "generation TP against the world",
        ("ROOT/run.yaml:19: rollout.tensor_parallel: found 2; expected a divisor of the world of 1 ranks: 1",),
        ("parallel={microbatch_size: 4}",),
        flags=("--check", "--world", "1"),
    ),
    Case(
        "generation TP against the heads",
        (HERE + "rollout.tensor_parallel: found 8; expected a divisor of the 4 attention heads of actor: 1, 2, 4",),
        ("rollout.tensor_parallel=8",),
    ),
    Case(
        "generators that have no place",
        (
            HERE + "rollout.replicas: found 2 with rollout.placement colocated; expected 0: there are as many generators as fit the ranks"
            " (world / rollout.tensor_parallel), or rollout.placement separate or remote",
        ),
        ("rollout.replicas=2",),
    ),
    Case(
        "generators from elsewhere, but how many",
        ("ROOT/run.yaml:18: rollout.replicas: found 0 with rollout.placement remote; expected how many generators will join",),
        ("rollout.placement=remote",),
    ),
    Case(
        "generators that nobody can reach",
        (
            "ROOT/run.yaml:18: rollout.listen: found 127.0.0.1 with rollout.placement separate on 2 nodes; expected an address of the first node that the"
            " others reach",
        ),
        ("rollout.placement=separate", "cluster={nodes: 2, ranks_per_node: 4}"),
    ),
    Case(
        "sequence parallel alone",
        (HERE + "parallel.sequence: found true with parallel.tensor 1; expected false, or parallel.tensor of at least 2",),
        ("parallel={sequence: true, microbatch_size: 4}",),
    ),
    Case(
        "virtual pipeline without stages",
        (
            HERE
            + "parallel.virtual_pipeline: found 2 with parallel.pipeline 1; expected 1, or parallel.pipeline of at least 2: chunks take"
            " turns only where there are stages to take turns with",
        ),
        ("parallel.pipeline=1", "parallel.virtual_pipeline=2"),
    ),
    Case(
        "a shared head without stages",
        (HERE + "parallel.head: found sharded with parallel.pipeline 1; expected auto or last_stage, or parallel.pipeline of at least 2",),
        ("parallel.pipeline=1", "parallel.head=sharded"),
    ),
    Case(
        "a shared head with chunks",
        (HERE + "parallel.head: found sharded with parallel.virtual_pipeline 2; expected auto or last_stage (or virtual_pipeline 1)",),
        ("parallel.virtual_pipeline=2", "parallel.head=sharded"),
    ),
    Case(
        "more chunks than layers",
        (
            HERE
            + "parallel.virtual_pipeline: found 3 with parallel.pipeline 2; expected at most 2: actor has 4 layers, too few for 6 chunks",
            HERE
            + "parallel.virtual_pipeline: found 3 with parallel.pipeline 2; expected at most 2: critic has 4 layers, too few for 6 chunks",
        ),
        ("parallel.virtual_pipeline=3",),
    ),
    Case(
        "context x world size",
        (
            "ROOT/run.yaml:4: tensor 2 x pipeline 2 x context 3 = 12 ranks a replica does not divide the world of 8 ranks: change parallel.tensor,"
            " parallel.pipeline or parallel.context, or the number of ranks",
        ),
        ("parallel.context=3",),
        flags=("--check", "--world", "8"),
    ),
    Case(
        "minibatches do not make up the rollout",
        (
            HERE + "ppo.minibatch_size: found 12; expected a divisor of the 32 sequences a step (rollout.prompts_per_step 8 x"
            " rollout.samples_per_prompt 4): 1, 2, 4, 8, 16, 32",
        ),
        ("ppo.minibatch_size=12",),
    ),
    Case(
        "prompts over replicas",
        (
            "ROOT/run.yaml:20: rollout.prompts_per_step: found 8; expected a multiple of the 3 data-parallel replicas: the nearest are 6 or 9",
            "ROOT/run.yaml:25: ppo.minibatch_size: found 16; expected a multiple of the 3 data-parallel replicas: the nearest are 15 or 18",
        ),
        flags=("--check", "--world", "12"),
    ),
    Case(
        "microbatch larger than its share",
        (
            HERE
            + "parallel.microbatch_size: found 16; expected a divisor of the 8 sequences that a data-parallel replica has of ppo.minibatch_size"
            " (16 / 2 replicas): 1, 2, 4, 8",
        ),
        ("parallel.microbatch_size=16",),
        flags=("--check", "--world", "8"),
    ),
    Case(
        "a pair cut in two",
        (
            HERE
            + "parallel.microbatch_size: found 1; expected 2 (the sequences of a pair) times a divisor of the 8 pairs that a data-parallel"
            " replica has of train.batch_size (16 / 2 replicas): 2, 4, 8, 16",
        ),
        ("parallel.microbatch_size=1",),
        kind="dpo",
        flags=("--check", "--world", "2"),
    ),
    Case(
        "pairs that do not divide",
        (
            HERE
            + "parallel.microbatch_size: found 12; expected 2 (the sequences of a pair) times a divisor of the 16 pairs that a data-parallel"
            " replica has of train.batch_size (16 / 1 replicas): 2, 4, 8, 16, 32",
        ),
        ("parallel.microbatch_size=12",),
        kind="reward",
    ),
    Case(
        "a microbatch smaller than a list",
        (
            "ROOT/run.yaml:4: parallel.microbatch_size: found 4; expected 8 (the sequences of a list) times a divisor of the 16 lists that a"
            " data-parallel replica has of train.batch_size (16 / 1 replicas): 8, 16, 32, 64, 128",
        ),
        kind="rrhf",
    ),
    Case(
        "pairs over replicas",
        ("ROOT/run.yaml:13: train.batch_size: found 16; expected a multiple of the 3 data-parallel replicas: the nearest are 15 or 18",),
        kind="dpo",
        flags=("--check", "--world", "3"),
    ),
    Case(
        "longer than the positions",
        (
            HERE + "data.max_prompt_tokens 16 + rollout.max_response_tokens 49 = 65 tokens; expected at most the 64 positions of actor",
            HERE + "data.max_prompt_tokens 16 + rollout.max_response_tokens 49 = 65 tokens; expected at most the 64 positions of critic",
        ),
        ("rollout.max_response_tokens=49",),
    ),
    Case(
        "a pack smaller than a sequence",
        (
            HERE + "parallel.max_tokens_per_microbatch: found 31; expected 0 (no packing) or at least 32: data.max_prompt_tokens 16 +"
            " rollout.max_response_tokens 16 = 32 tokens",
        ),
        ("parallel.max_tokens_per_microbatch=31",),
    ),
    Case(
        "a pack smaller than a pair",
        (
            HERE
            + "parallel.max_tokens_per_microbatch: found 120; expected 0 (no packing) or at least 128: data.max_tokens: found 64, and a pair"
            " is two of them",
        ),
        ("parallel.max_tokens_per_microbatch=120",),
        kind="reward",
    ),
    Case("no reward", (HERE + "rewards: found an empty list; expected at least one part, such as {kind: exact}",), ("rewards=[]",)),
    Case(
        "reward without weight",
        ("ROOT/run.yaml:13: rewards: every weight is 0; expected at least one part that counts",),
        ("rewards.0.weight=0",),
    ),
    Case(
        "reward model without a path",
        (HERE + "rewards.0.path: missing; expected the path of a reward model for kind model",),
        ("rewards=[{kind: model}]",),
    ),
    Case(
        "verifier with a path",
        (HERE + "rewards.0.path: found 'x' with kind exact; expected no path, or kind: model",),
        ("rewards.0.path=x",),
    ),
    Case(
        "vocabularies of two tokenizers",
        (
            HERE + "critic.path: a vocabulary of 128; expected the actor's 120: all models of a run read the same token ids, so critic must"
            " come from a model with the same tokenizer",
        ),
        ("critic.path=ROOT/wide",),
    ),
    Case(
        "tokenizer larger than the model",
        (
            HERE
            + "tokenizer: ROOT/wide has 130 tokens but actor has a vocabulary of 120; expected the tokenizer that actor was trained with",
            HERE
            + "tokenizer: ROOT/wide has 130 tokens but critic has a vocabulary of 120; expected the tokenizer that critic was trained with",
        ),
        ("tokenizer=ROOT/wide",),
    ),
    Case(
        "another model than its shape",
        (
            "ROOT/run.yaml:8: actor.path: ROOT/actor is another model than actor.shape ROOT/wide says: vocab_size 120 instead of 128; expected the same shape",
        ),
        ("actor.shape=ROOT/wide",),
    ),
    Case(
        "config.json is not JSON",
        (HERE + "actor.path: ROOT/broken/config.json is not JSON: Expecting value: line 1 column 1 (char 0)",),
        ("actor.path=ROOT/broken",),
    ),
    Case(
        "output in a file",
        (HERE + "output_dir: ROOT/run.yaml is a file; expected a directory or nothing there yet",),
        ("output_dir=ROOT/run.yaml",),
    ),
    Case(
        "evaluation of a lesson without data",
        (HERE + "train.eval_every_steps: found 5 without data.eval_path; expected both or 0",),
        ("train.eval_every_steps=5",),
        kind="sft",
    ),
    Case(
        "batch of a lesson",
        ("ROOT/run.yaml:13: train.batch_size: found 16; expected a multiple of the 3 data-parallel replicas: the nearest are 15 or 18",),
        kind="reward",
        flags=("--check", "--world", "3"),
    ),
    Case(
        "lesson longer than the positions",
        (HERE + "data.max_tokens: found 65; expected at most the 64 positions of model",),
        ("data.max_tokens=65",),
        kind="reward",
    ),
    Case(
        "everything at once",
        (
            HERE + "found 'seed'; expected key=value, such as parallel.tensor=2",
            HERE + "ppo.lam: found 'high'; expected a number",
            HERE + "ppo.minibatchsize: unknown key; did you mean ppo.minibatch_size?",
            HERE + "parallel.tensor: found 8; expected a divisor of the 4 attention heads of actor: 1, 2, 4",
            HERE + "parallel.tensor: found 8; expected a divisor of the 4 attention heads of critic: 1, 2, 4",
            "ROOT/run.yaml:22: data.max_prompt_tokens 999 + rollout.max_response_tokens 16 = 1015 tokens; expected at most the 64 positions of actor",
            "ROOT/run.yaml:22: data.max_prompt_tokens 999 + rollout.max_response_tokens 16 = 1015 tokens; expected at most the 64 positions of critic",
            HERE + "output_dir: ROOT/run.yaml is a file; expected a directory or nothing there yet",
        ),
        ("seed", "ppo.lam=high", "ppo.minibatchsize=7", "parallel.tensor=8", "data.max_prompt_tokens=999", "output_dir=ROOT/run.yaml"),
    ),
    Case(
        "a start without its files",
        (HERE + "tokenizer: nowhere does not exist; expected a sentencepiece .model file or a Hugging Face directory",),
        ("tokenizer=nowhere", "parallel={microbatch_size: 4}", "rollout.tensor_parallel=1"),
        flags=(),
    ),
    Case(
        "a start on another cluster",
        (
            HERE + "cluster: 2 nodes x 8 ranks_per_node = 16 ranks, but this run was started on 1: NPROC=8 bash launch/torchrun.sh ppo ..."
            " on each node, or change cluster (cluster=null: any)",
        ),
        ("cluster={nodes: 2, ranks_per_node: 8}", "parallel={microbatch_size: 4}", "rollout.tensor_parallel=1"),
        flags=(),
    ),
    Case(
        "a start without weights",
        ("ROOT/run.yaml:8: actor.path: ROOT/actor holds no *.safetensors; expected weights, or actor.random_init: true",),
        ("actor.random_init=false", "parallel={microbatch_size: 4}", "rollout.tensor_parallel=1"),
        flags=(),
    ),
    Case(
        "a start without the package",
        (HERE + "log.wandb_project: needs the package wandb, which is not installed here; run pip install wandb",),
        ("log.wandb_project=x", "parallel={microbatch_size: 4}", "rollout.tensor_parallel=1"),
        flags=(),
    ),
    Case("a world without a check", ("--world is for --check; a run has as many ranks as were started",), flags=("--world", "4")),
    Case(
        "the file missing",
        ("ROOT/other.yaml: no such file; expected the YAML file of a run, such as one in configs/",),
        change=("FILE", "other.yaml"),
    ),
]
