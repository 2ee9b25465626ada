"""Where models run."""

from __future__ import annotations


def choose_device(device: str | None) -> str:
    """The device that the user chose; by default 'cuda' if there is a GPU, else 'cpu'."""
    import torch

    return device or ('cuda' if torch.cuda.is_available() else 'cpu')


def count(number: int, thing: str) -> str:
    """A number of things in words: '1 epoch', '2 epochs'."""
    return f'{number} {thing}{"s" * (number != 1)}'


def device_name(device: str) -> str:
    """The name of the GPU, or the number of threads on a CPU."""
    import torch

    return (
        torch.cuda.get_device_name()
        if device.startswith('cuda')
        else f'a CPU ({count(torch.get_num_threads(), "thread")})'
    )
