"""Progress bars of long calls."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Step = TypeVar('Step')


def progress(steps: Collection[Step], description: str, hide_below: int = 2) -> Iterable[Step]:
    """Go through steps with a progress bar on stderr, unless there are fewer than ``hide_below``."""
    return track(steps, description, console=Console(stderr=True), disable=len(steps) < hide_below)
