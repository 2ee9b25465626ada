"""The benchmark as a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture
def benchmark(run_tool) -> Callable[..., dict]:
    """Run the benchmark with a file for its figures and other arguments; returns the figures."""

    def run(path: Path, *args: object) -> dict:
        threads = torch.get_num_threads()
        run_tool('speed/benchmark.py', *args, '--json', path)
        torch.set_num_threads(threads)
        return json.loads(path.read_text())

    return run
