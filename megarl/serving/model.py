"""The model behind the server: the reward model of a run, built and asked as in training, on one rank or over tensor-parallel ranks."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.sources import open_weights
from megarl.config import ParallelConfig
from megarl.config.run import Run
from megarl.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from megarl.errors import CheckpointError, ConfigError
from megarl.models.spec import ModelSpec
from megarl.parallel import collectives, groups
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.torchrun import rank_from_environment
from megarl.ppo.roles import RewardModel
from megarl.ppo.terms import SequenceScores
from megarl.serving.jobs import Job, Jobs
from megarl.serving.questions import Refusal, Texts

IDLE_S = 60.0  # between signs of life to the other ranks, whose collective calls have a time limit


@dataclass(frozen=True)
class ServedModel:
    """Scores of texts. Every rank holds its part; `answer` is entered by all of them."""

    texts: Texts
    scores: SequenceScores
    layout: ParallelLayout

    def answer(self, jobs: Jobs | None) -> None:
        """Do the jobs until the queue is closed and empty. Rank 0 has the `jobs`, the others hear from it what to compute."""
        world = groups.group(self.layout, "world")
        while True:
            job, rows = self._next(jobs) if jobs is not None else (None, [])
            is_over = jobs is not None and job is None and jobs.is_over
            told = collectives.broadcast_json({"rows": rows, "is_over": is_over}, 0, world)
            if told["is_over"]:
                return
            if told["rows"]:
                found = self.scores(told["rows"])
                if job is not None:
                    job.settle(checked(found))

    def _next(self, jobs: Jobs) -> tuple[Job | None, list[list[int]]]:
        """A job and the rows to compute; None and none where there is nothing to do yet."""
        job = jobs.next(IDLE_S)
        if job is None:
            return None, []
        try:
            return job, self.texts.tokens(job.questions)
        except Refusal as refusal:
            job.settle(refusal)
            return None, []


def checked(scores: list[float]) -> list[float] | Refusal:
    """The scores, or why they cannot be told: asking again would not help."""
    wrong = next((index for index, score in enumerate(scores) if not math.isfinite(score)), None)
    return scores if wrong is None else Refusal(422, f"the model scores query {wrong} as {scores[wrong]}; expected a finite number")


def load(
    path: Path, tokenizer: Path | None, precision: str, microbatch_size: int, max_tokens: int | None, chat_template: bool
) -> ServedModel:
    """The reward model at `path`, its tensors spread over all ranks. Every rank calls it; a user's mistake is raised on all of them.

    `path` is what `checkpoint.sources.open_weights` takes; `tokenizer` None: the one that lies with the model.
    """
    _, world_size, _ = rank_from_environment()
    parallel = ParallelConfig(tensor=world_size, sequence=world_size > 1, microbatch_size=microbatch_size)
    layout = groups.initialize(parallel, seed=0)
    together = partial(collectives.together, group=groups.group(layout, "world"))
    spec, source = together(lambda: open_weights(path, "reward"))
    texts = together(lambda: load_tokenizer(tokenizer or own_tokenizer(path)))
    together(lambda: check_texts(texts, spec, path, max_tokens, chat_template))
    run = Run(output_dir=path, tokenizer=texts.path, precision=precision, parallel=parallel)  # nothing is written there
    model = RewardModel(spec, run, layout, source)
    return ServedModel(Texts(texts, max_tokens or spec.max_positions, chat_template), SequenceScores(model, texts.pad_id), layout)


def own_tokenizer(path: Path) -> Path:
    """Where the tokenizer of a checkpoint, which is verified, or of a Hugging Face directory lies. Raises `CheckpointError`."""
    checkpoint = manifests.find_checkpoint(path)
    if checkpoint is None:
        return path
    files = manifests.read_manifest(checkpoint).files_of("tokenizer")
    if not files:
        raise CheckpointError(f"{checkpoint} holds no tokenizer; expected --tokenizer PATH")
    for name, file in files.items():
        manifests.verify(checkpoint, name, file)
    return checkpoint / "tokenizer"


def check_texts(tokenizer: Tokenizer, spec: ModelSpec, path: Path, max_tokens: int | None, chat_template: bool) -> None:
    """Raise `DataError` where the tokenizer is another model's or lacks a template, `ConfigError` for texts the model cannot read."""
    check_vocabulary(tokenizer, spec.vocab_size, path, "PATH")
    if max_tokens is not None and max_tokens > spec.max_positions:
        raise ConfigError(f"--max-tokens: found {max_tokens}; expected at most {spec.max_positions}, the positions of {path}")
    if chat_template:
        tokenizer.render_chat([{"role": "user", "content": "?"}], add_generation_prompt=True)
