"""Timing of contestants that take turns."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from rich.progress import track

from mmmilan.engine.flops import counted_flops

Lap = Callable[[str], None]


@dataclass
class Contestant:
    """One way to do the work.

    Attributes:
        name: What it is called in tables.
        run: One round. It calls its argument with the name of each part when that part has ended.
        images: Images of a round.
        counted: Whether the work is floating-point operations, to be counted.
        extra: More figures for the JSON file.
    """

    name: str
    run: Callable[[Lap], None]
    images: int
    counted: bool = True
    extra: dict = field(default_factory=dict)


@dataclass
class Result:
    """Seconds of each round and of its parts; FLOPs of a round; bytes on a GPU."""

    images: int
    extra: dict
    resident: int = 0
    flops: int | None = None
    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    peak_memory: int | None = None


class Stopwatch:
    """Seconds since the last lap; on a GPU it waits for the work to end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self.last = self.now()

    def now(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, part: str) -> None:
        now = self.now()
        self.laps[part] = now - self.last
        self.last = now


def no_lap(part: str) -> None:
    """Let a round run through."""


def compete(contestants: Iterable[Contestant], args: argparse.Namespace) -> dict[str, Result]:
    """Build the contestants one by one and warm them up, then time them in turns."""
    lined_up: list[Contestant] = []
    results: dict[str, Result] = {}
    before = allocated(args.device)
    for contestant in contestants:  # a generator: what is allocated meanwhile belongs to this contestant
        result = results[contestant.name] = Result(contestant.images, contestant.extra)
        contestant.run(no_lap)  # what is to be compiled is compiled now; while operations are counted, nothing is
        if contestant.counted:
            with counted_flops() as counter:
                contestant.run(no_lap)
            result.flops = counter.get_total_flops()
        for _ in range(args.warmup):
            contestant.run(no_lap)
        lined_up.append(contestant)
        result.resident = allocated(args.device) - before
        before = allocated(args.device)
    for _ in track(range(args.rounds), description='rounds', transient=True):
        for contestant in lined_up:
            time_round(contestant, results[contestant.name], args.device)
    return results


def time_round(contestant: Contestant, result: Result, device: torch.device) -> None:
    """Time one round. On a GPU its parts get a round of their own, as its queue has to be waited for after each."""
    on_gpu = device.type == 'cuda'
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    others = allocated(device) - result.resident
    watch = Stopwatch(device)
    start = watch.last
    contestant.run(no_lap if on_gpu else watch)
    result.seconds.append(watch.now() - start)
    if on_gpu:
        result.peak_memory = torch.cuda.max_memory_allocated(device) - others
        watch = Stopwatch(device)
        contestant.run(watch)
    for part, seconds in watch.laps.items():
        result.parts.setdefault(part, []).append(seconds)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == 'cuda' else 0
