"""Progress for people, on stderr: bars with rate and time left on a terminal, plain lines otherwise."""

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddengine.given import Watch

SECONDS_BETWEEN_LINES = 10.0


class Console:
    """A context that shows what a recipe reports; `watch()` is what the recipe gets."""

    def __init__(self) -> None:
        self.rich = RichConsole(stderr=True, highlight=False)
        self.progress: Progress | None = None

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def watch(self) -> Watch:
        """Where a recipe reports to."""
        return Watch(notice=self._notice, bar=self._bar if self.rich.is_terminal else _lines)

    def _notice(self, text: str) -> None:
        self.rich.print(text, markup=False, emoji=False, soft_wrap=True)

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _bar(self, title: str) -> Callable[[int, int, Mapping[str, float]], None]:
        self._stop()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.rich)
        self.progress.start()
        bar, began, first = self.progress.add_task(title, total=None, values=""), time.monotonic(), [-1]

        def show(done: int, total: int, values: Mapping[str, float]) -> None:
            if first[0] < 0:
                first[0] = done
            if self.progress is not None:
                text = " ".join(f"{key} {value:.4g}" for key, value in values.items())
                rate = (done - first[0]) / max(time.monotonic() - began, 1e-9)
                speed = f" {rate:.2f}/s" if rate > 0 else ""
                self.progress.update(bar, completed=done, total=total, values=f"{text}{speed}")

        return show


def _lines(title: str) -> Callable[[int, int, Mapping[str, float]], None]:
    began, last, first = time.monotonic(), [0.0], [-1]

    def show(done: int, total: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        if first[0] < 0:
            first[0] = done
        if now - last[0] < SECONDS_BETWEEN_LINES and done < total:
            return
        last[0] = now
        rate = (done - first[0]) / max(now - began, 1e-9)
        speed = f", {rate:.2f}/s" if rate > 0 else ""
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
        text = "".join(f", {key} {value:.4g}" for key, value in values.items())
        print(f"{title}: {done}/{total}{text}{speed}{left}", file=sys.stderr, flush=True)

    return show
