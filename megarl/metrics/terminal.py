"""The run's one live line: stage, steps, the headline numbers, time left. Plain lines where the output is not a terminal."""

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

PPO_HEADLINE = {
    "reward": "reward/mean",
    "KL": "kl/token_mean",
    "accuracy": "eval/accuracy",
    "length": "response/length",
    "tokens/s": "tokens_per_s",
}


def compact(value: float) -> str:
    """A number in about five characters."""
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Terminal:
    """Shows a stage of `total_steps` steps. `headline` maps the label to show to the name of the metric; the last known value stays."""

    def __init__(
        self,
        stage: str,
        total_steps: int,
        headline: Mapping[str, str],
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stage = stage
        self.total_steps = total_steps
        self.headline = headline
        self._console = console or Console()
        self._clock = clock
        self._shown: dict[str, float] = {}
        self._progress: Progress | None = None

    def start(self, step: int) -> None:
        self._first_step, self._started = step, self._clock()
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[headline]}"),
            TextColumn("{task.fields[left]}", style="dim"),
            console=self._console,
        )
        self._task = self._progress.add_task(self.stage, total=self.total_steps, completed=step, headline="", left="")
        self._progress.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        self._shown.update({label: values[name] for label, name in self.headline.items() if name in values})
        texts = [f"{label} {compact(self._shown[label])}" for label in self.headline if label in self._shown]
        left = self._time_left(step)
        if self._progress is None:
            line = "  ".join([f"{self.stage} {step}/{self.total_steps}", *texts, left]).rstrip()
            self._console.print(line, soft_wrap=True, highlight=False)
        else:
            self._progress.update(self._task, completed=step, headline="  ".join(texts), left=left)

    def _time_left(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0:
            return ""
        return f"left {duration((self._clock() - self._started) / done * (self.total_steps - step))}"

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
