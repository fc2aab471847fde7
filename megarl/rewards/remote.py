"""Rewards from a server: JSON over HTTP, in batches, from several addresses in turn, within one time limit.

Request, in the form of OpenRLHF's `remote_rm_url`: POST {"query": [prompt + response, ...], "prompts": [...], "labels": [answer, ...]}.
Reply: {"rewards": [number, ...]}, one for each query, in order.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from itertools import count

import httpx

from megarl.errors import RewardError
from megarl.records import Completion, Prompt
from megarl.rewards.scorer import checked, prompt_ids
from megarl.rewards.token import TOKEN_VARIABLE

REQUESTS_A_URL = 4  # on their way at once
ATTEMPTS_IN_TIME = 3  # a request that gets no reply is given up so that so many fit into the time limit
LARGEST_REPLY_BYTES = 1 << 20
BACK_OFF_S = (0.2, 15.0)  # first and longest pause after a failure; it doubles in between
GRACE_S = 1.0  # beyond the time limit, for a request that ends with a better message than the caller has
WORTH_ANOTHER_TRY = (408, 425, 429, 500, 502, 503, 504)


class RemoteScorer:
    """Asks `urls` for scores. A server that refuses, is slow, breaks off or answers 5xx is asked again, with growing pauses, until
    `timeout_s` from the start of the call is over. A reply that is there and wrong (no JSON, wrong length, no number, too large, a
    redirect) is an error at once: asking again would hide it.

    Raises `RewardError` that names the address and the prompts. The token appears in no message.
    """

    def __init__(self, urls: Sequence[str], per_request: int, timeout_s: float, token: str | None = None):
        self.urls, self.per_request, self.timeout_s = tuple(urls), per_request, timeout_s
        self._headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {token}"} if token else {})

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]) -> list[float]:
        deadline, turn = time.monotonic() + self.timeout_s, count()
        starts = range(0, len(prompts), self.per_request)
        most = REQUESTS_A_URL * len(self.urls)
        pool = ThreadPoolExecutor(most)
        try:
            # trust_env False: no proxy and no credentials from the environment or .netrc
            with httpx.Client(
                headers=self._headers, follow_redirects=False, trust_env=False, limits=httpx.Limits(max_connections=most)
            ) as client:

                def batch(start: int) -> list[float]:
                    rows = slice(start, start + self.per_request)
                    return self._batch(client, lambda: next(turn), deadline, prompts[rows], completions[rows], texts[rows])

                pieces = [(start, pool.submit(batch, start)) for start in starts]
                return [score for start, piece in pieces for score in self._result(piece, deadline, completions[start:])]
        finally:  # threads that still wait for a server end by themselves; nobody waits for them
            pool.shutdown(wait=False, cancel_futures=True)

    def _result(self, piece: Future[list[float]], deadline: float, completions: Sequence[Completion]) -> list[float]:
        try:
            return piece.result(max(0.0, deadline - time.monotonic()) + GRACE_S)
        except FutureTimeout:
            ids = prompt_ids(completions[: self.per_request])
            raise RewardError(f"reward http: no scores for {ids} within {self.timeout_s:g} s: a reply does not end") from None

    def _batch(
        self,
        client: httpx.Client,
        turn: Callable[[], int],
        deadline: float,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        texts: Sequence[str],
    ) -> list[float]:
        body = {
            "query": [prompt.text + text for prompt, text in zip(prompts, texts, strict=True)],
            "prompts": [prompt.text for prompt in prompts],
            "labels": [prompt.answer for prompt in prompts],
        }
        pause, tries, last = BACK_OFF_S[0], 0, ""
        while (left := deadline - time.monotonic()) > 0:
            url, share = self.urls[turn() % len(self.urls)], self.timeout_s / ATTEMPTS_IN_TIME
            until = time.monotonic() + min(left, share)
            tries += 1
            try:
                status, content = _post(client, url, body, until)
            except (httpx.TransportError, TimeoutError) as error:
                if left >= share or not last:  # an attempt that the end cut short says nothing about the server
                    last = f"{url}: {type(error).__name__} {error}".strip()
            else:
                if status == 200:
                    return _scores(url, content, completions)
                if status not in WORTH_ANOTHER_TRY:
                    raise RewardError(_refusal(url, status, content, completions))
                last = f"{url}: status {status}"
            time.sleep(max(0.0, min(pause * random.uniform(0.5, 1.0), deadline - time.monotonic())))
            pause = min(2 * pause, BACK_OFF_S[1])
        raise RewardError(
            f"reward http: no scores for {prompt_ids(completions)} within {self.timeout_s:g} s, {tries} attempts; the last:"
            f" {last or 'none'}; expected the server to answer, or a larger timeout_s"
        )


def _post(client: httpx.Client, url: str, body: dict, until: float) -> tuple[int, bytes]:
    """Status and content of the reply. A server that drips is cut off at `until`, one that floods at `LARGEST_REPLY_BYTES`."""
    with client.stream("POST", url, json=body, timeout=max(0.001, until - time.monotonic())) as reply:
        content = b""
        for chunk in reply.iter_raw():
            content += chunk
            if len(content) > LARGEST_REPLY_BYTES:
                raise RewardError(f"reward http: {url} replied with more than {LARGEST_REPLY_BYTES} bytes; expected one number a query")
            if time.monotonic() > until:
                raise TimeoutError("the reply did not end in time")
        return reply.status_code, content


def _scores(url: str, content: bytes, completions: Sequence[Completion]) -> list[float]:
    who = f"reward http: {url}"
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError):  # of the encoding, and of what is nested without end
        raise RewardError(f"{who} replied {content[:60]!r} for {prompt_ids(completions)}; expected JSON") from None
    if not isinstance(reply, dict) or "rewards" not in reply:
        raise RewardError(f'{who} replied {content[:60]!r} for {prompt_ids(completions)}; expected {{"rewards": [...]}}')
    return checked(who, reply["rewards"], completions)


def _refusal(url: str, status: int, content: bytes, completions: Sequence[Completion]) -> str:
    meaning = "; redirects are not followed: name the address itself" if 300 <= status < 400 else ""
    hint = f"; expected the token in token_file or {TOKEN_VARIABLE} to be the server's" if status in (401, 403) else ""
    said = content[:120].decode(errors="replace").strip()
    return f"reward http: {url} answered status {status} for {prompt_ids(completions)}: {said!r}{meaning}{hint}"
