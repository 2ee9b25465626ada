"""Where models run."""

from __future__ import annotations


def choose_device(device: str | None) -> str:
    """The device that the user chose; by default 'cuda' if there is a GPU, else 'cpu'."""
    import torch

    return device or ('cuda' if torch.cuda.is_available() else 'cpu')


def device_name(device: str) -> str:
    """The name of the GPU, or the number of threads on a CPU."""
    import torch

    return torch.cuda.get_device_name() if device.startswith('cuda') else f'a CPU ({torch.get_num_threads()} threads)'
