"""The records a sample becomes, in order: Prompt -> RolloutRequest -> Completion -> Trajectory -> RolloutBatch -> Experience.

Axis letters: P prompt tokens, R response tokens, B sequences of one data-parallel replica, T tokens of the padded batch.
Per-token tensors are `[B, T]`; entry t speaks about token t (the log-probability *of* token t, the value *before* choosing
token t). Sequences are right-padded; per-token values are 0 wherever `response_mask` is False.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. `temperature` 0 means greedy. What ends a response belongs to it: a token of `stop_token_ids`, or the
    token that completes one of `stop_strings` in its text.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    min_tokens: int = 0  # of a response: none of the first so many is one of `stop_token_ids`, and no text in them ends it

    @classmethod
    def from_list(cls, values: list) -> "Sampling":
        """What `list(dataclasses.astuple(sampling))` became on its way through JSON."""
        return cls(*(tuple(value) if isinstance(value, list) else value for value in values))


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt set. `prompt_id` is its position in the epoch-independent file order.

    `text` is what was asked, of a chat its last message; a chat of more than a user's message is kept whole in `messages`.
    """

    prompt_id: int
    token_ids: tuple[int, ...]
    answer: str = ""
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class RolloutRequest:
    """One response to sample, or more of one: the last `num_sampled` of the tokens are its beginning, sampled before.

    Requests with equal fields give equal completions, whoever samples them.
    """

    prompt_id: int
    sample_index: int
    token_ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    num_sampled: int = 0

    @property
    def num_unending(self) -> int:
        """How many of the tokens asked for cannot end the response."""
        return min(max(0, self.sampling.min_tokens - self.num_sampled), self.sampling.max_tokens)


@dataclass(frozen=True)
class Completion:
    """A sampled response. `rollout_logprobs` speak of the tempered distribution it was drawn from.

    Where newer weights reached the sampler while it was on its way, `later_versions` says from which token on which weights chose:
    ((first token, policy version), ...). Otherwise it is empty, and all tokens are of `policy_version`.
    """

    prompt_id: int
    sample_index: int
    token_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    finish_reason: str  # "stop" or "length"
    policy_version: int  # of the weights that chose the first token
    later_versions: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_list(cls, values: list) -> "Completion":
        """What `list(dataclasses.astuple(completion))` became on its way through JSON."""
        prompt_id, sample_index, token_ids, logprobs, reason, version, later = values
        return cls(prompt_id, sample_index, tuple(token_ids), tuple(logprobs), reason, version, tuple(map(tuple, later)))


@dataclass(frozen=True)
class Trajectory:
    """A prompt, one response to it, and what the response earned. `reward` is the weighted sum of `reward_parts`.

    `greedy` is the likeliest response to the same prompt, judged alike, in runs that compare with it.
    """

    prompt: Prompt
    completion: Completion
    reward: float
    reward_parts: dict[str, float] = field(default_factory=dict)
    greedy: "Trajectory | None" = None


class TensorRecord:
    """Shared behaviour of records whose fields are tensors with one row a sequence."""

    def rows(self, index: torch.Tensor | slice):
        """The record with only the rows `index` (i64[n], bool[B] or a slice), in that order."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def padded(self, num_rows: int):
        """The record with rows of zeros at the end, `num_rows` in all. Such rows have length 0 and masks that are False."""
        missing = num_rows - len(self)
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: torch.cat([t, t.new_zeros((missing, *t.shape[1:]))]) for name, t in tensors.items()})

    def only(self, mine: torch.Tensor):
        """The record with zeros in every row but those of `mine` bool[B]: such rows have length 0 and masks that are False."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t.new_zeros(()).where(~mine.view(-1, *[1] * (t.dim() - 1)), t) for name, t in tensors.items()})

    def to(self, device: torch.device):
        """The record with its tensors on `device`."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))


@dataclass(frozen=True)
class TokenBatch(TensorRecord):
    """What a model needs to read a batch: i64[B, T] right-padded tokens and i64[B] lengths."""

    token_ids: torch.Tensor  # i64[B, T]
    lengths: torch.Tensor  # i64[B]

    sequences_per_row: ClassVar[int] = 1

    def sequences(self) -> "TokenBatch":
        """What a model reads: here the rows themselves."""
        return self

    def places(self) -> torch.Tensor:
        """Where each token stands among the flattened positions of the model's hidden states [S, B, H]: i64[B, T]."""
        num_rows, num_tokens = self.token_ids.shape
        index = torch.arange(num_rows * num_tokens, device=self.token_ids.device)
        return index.view(num_tokens, num_rows).t()


@dataclass(frozen=True)
class PackedTokens(TokenBatch):
    """Sequences that a model reads one behind the other, as one row: hidden states are [S, 1, H]. Padding stands nowhere."""

    def places(self) -> torch.Tensor:
        """As for `TokenBatch`; entries of padding, which nobody reads, show some token of the microbatch."""
        starts = torch.minimum(self.lengths.cumsum(0) - self.lengths, (self.lengths.sum() - 1).clamp(min=0))
        offsets = torch.arange(self.token_ids.shape[1], device=self.token_ids.device)
        return starts[:, None] + torch.minimum(offsets, (self.lengths[:, None] - 1).clamp(min=0))


@dataclass(frozen=True)
class RolloutBatch(TokenBatch):
    """Sampled sequences of one data-parallel replica, padded to a common T."""

    response_mask: torch.Tensor  # bool[B, T]: tokens the policy chose
    rollout_logprobs: torch.Tensor  # f32[B, T]
    rewards: torch.Tensor  # f32[B]
    truncated: torch.Tensor  # bool[B]: the length limit cut the response
    group_ids: torch.Tensor  # i64[B]: equal for samples of one prompt
    sample_ids: torch.Tensor  # i64[B]: position in the whole rollout, unique across all replicas
    baselines: torch.Tensor  # f32[B]: reward of the greedy response to the same prompt; 0 where there is none
    baseline_truncated: torch.Tensor  # bool[B]: the length limit cut that one
    ages: torch.Tensor  # i64[B, T]: how many policy versions ago each response token was sampled; 0 elsewhere
    must_go_on: torch.Tensor  # bool[B, T]: response tokens that could not end it (`rollout.min_response_tokens`)


@dataclass(frozen=True)
class Experience(RolloutBatch):
    """A rollout batch with what every model says about it and the credit each token gets."""

    old_logprobs: torch.Tensor  # f32[B, T]
    ref_logprobs: torch.Tensor  # f32[B, T]
    values: torch.Tensor  # f32[B, T]
    token_rewards: torch.Tensor  # f32[B, T]
    advantages: torch.Tensor  # f32[B, T]
    returns: torch.Tensor  # f32[B, T]


@dataclass(frozen=True)
class DemonstrationBatch(TokenBatch):
    """Prompt and response pairs to imitate. `loss_mask` marks the tokens that are learned."""

    loss_mask: torch.Tensor  # bool[B, T]


@dataclass(frozen=True)
class PreferenceBatch(TensorRecord):
    """Two responses to one prompt, each a whole sequence (prompt and response); row i of both sides is pair i."""

    chosen_ids: torch.Tensor  # i64[B, T]
    chosen_lengths: torch.Tensor  # i64[B]
    rejected_ids: torch.Tensor  # i64[B, T]
    rejected_lengths: torch.Tensor  # i64[B]
    margins: torch.Tensor  # f32[B]: by how much the chosen shall score higher

    sequences_per_row: ClassVar[int] = 2

    def sequences(self) -> TokenBatch:
        """What a model reads: 2 B sequences, the chosen of every pair, then the rejected of every pair."""
        return TokenBatch(torch.cat([self.chosen_ids, self.rejected_ids]), torch.cat([self.chosen_lengths, self.rejected_lengths]))


@dataclass(frozen=True)
class ResponseLists(TensorRecord):
    """K responses to one prompt a row, each a whole sequence (prompt and response). A shorter list ends with sequences of length 0."""

    token_ids: torch.Tensor  # i64[B, K, T]
    lengths: torch.Tensor  # i64[B, K]
    response_mask: torch.Tensor  # bool[B, K, T]: tokens of the responses; never the first token of a sequence

    @property
    def sequences_per_row(self) -> int:
        return self.lengths.shape[1]

    def sequences(self) -> TokenBatch:
        """What a model reads: K B sequences, the first of every list, then the second of every list, and so on."""
        return TokenBatch(self.token_ids.transpose(0, 1).flatten(0, 1), self.lengths.t().flatten())

    @property
    def sequence_mask(self) -> torch.Tensor:
        """`response_mask` of `sequences()`: bool[K B, T]."""
        return self.response_mask.transpose(0, 1).flatten(0, 1)

    def by_row(self, of_sequences: torch.Tensor) -> torch.Tensor:
        """[K B] numbers about `sequences()` as [B, K]."""
        return of_sequences.view(self.sequences_per_row, -1).t()


@dataclass(frozen=True)
class ReferencedPairs(ResponseLists):
    """The chosen and the rejected response (K = 2), and what the reference says about them."""

    ref_logprobs: torch.Tensor  # f32[B, 2]: of whole responses


@dataclass(frozen=True)
class RankedLists(ResponseLists):
    """Responses with the scores that rank them."""

    scores: torch.Tensor  # f32[B, K]
