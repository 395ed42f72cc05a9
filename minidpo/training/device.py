"""Where a run computes and in what precision."""

import os
import time
from contextlib import AbstractContextManager

import torch

from minidpo.distributed import ranks
from minidpo.errors import UserError
from minidpo.sections import RunSection


def choose_device(name: str, threads: int = 0) -> torch.device:
    """The device that `name` (auto, cpu, cuda) means. Raises UserError if cuda is asked for and absent."""
    if threads:
        torch.set_num_threads(threads)
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' is asked for, but PyTorch sees no CUDA device; use 'cpu' or 'auto'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if ranks() == 1:
        return torch.device("cuda")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.index >= (gpus := torch.cuda.device_count()):
        raise UserError(
            f"process {device.index} of this machine has no GPU of its own ({gpus} there);"
            " start one process per GPU (--nproc_per_node), or set run.device = cpu"
        )
    torch.cuda.set_device(device)
    return device


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """bf16 matrix products over float32 weights for "bf16"; no change of precision for "fp32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16")


def slowdown_of_threads() -> float:
    """How many times faster one CPU thread is than all of this process, for products like those of a layer.

    Threads wait for each other after every product. Where other programs use the processors, the wait is for
    a thread that has none. It is measured for half a second, because nothing else tells it beforehand.
    """
    matrix, threads = torch.ones(256, 256), torch.get_num_threads()

    def products_per_second(count: int) -> float:
        torch.set_num_threads(count)
        torch.mm(matrix, matrix)  # The first one starts the threads.
        done, begin = 0, time.perf_counter()
        while (seconds := time.perf_counter() - begin) < 0.2:
            torch.mm(matrix, matrix)
            done += 1
        return done / seconds

    if threads == 1:
        return 1.0
    return products_per_second(1) / products_per_second(threads)  # In this order: all of them stay set.


def describe(device: torch.device, run: RunSection) -> str:
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} CPU threads"
    many = f"{ranks()} processes, each on " if ranks() > 1 else ""
    return f"{many}{name}, {'bf16 over float32 weights' if run.dtype == 'bf16' else 'float32'}"
