"""Time several implementations of the same work (contestants) in turns."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from rich.progress import track

from mmmilan.engine.throughput import counted_flops

Lap = Callable[[str], None]


@dataclass
class Contestant:
    """One implementation of the work.

    Attributes:
        name: Name in tables.
        run: Runs one round. It calls its argument with the name of each part at the end of the part.
        images: Number of images per round.
        counted: Whether to count floating-point operations.
        extra: More figures for the JSON file.
    """

    name: str
    run: Callable[[Lap], None]
    images: int
    counted: bool = True
    extra: dict = field(default_factory=dict)


@dataclass
class Result:
    """The figures of a contestant.

    Attributes:
        images: Number of images per round.
        extra: More figures for the JSON file.
        resident: Bytes on the GPU between rounds.
        flops: Floating-point operations per round.
        seconds: Time of each round.
        parts: Name of each part of a round -> time in each round.
        peak_memory: Peak bytes on the GPU, without those of the other contestants.
    """

    images: int
    extra: dict
    resident: int = 0
    flops: int | None = None
    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    peak_memory: int | None = None


class Stopwatch:
    """Measures the seconds since the last lap; on a GPU it waits for the work to end."""

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
    """Measure no part of a round."""


def compete(contestants: Iterable[Contestant], args: argparse.Namespace) -> dict[str, Result]:
    """Build the contestants one by one and warm them up, then time them in turns."""
    lined_up: list[Contestant] = []
    results: dict[str, Result] = {}
    before = allocated(args.device)
    for contestant in contestants:  # a generator, so that memory allocated in an iteration belongs to its contestant
        result = results[contestant.name] = Result(contestant.images, contestant.extra)
        contestant.run(no_lap)  # compiles what is to be compiled, as the counting of operations below prevents it
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
    """Time one round. On a GPU a second round times the parts, as each part needs a synchronisation."""
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
    """Bytes of tensors on a GPU; 0 for a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == 'cuda' else 0
