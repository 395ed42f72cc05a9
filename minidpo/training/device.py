"""Where a run computes and in what precision."""

import os
import shutil
import sysconfig
import time
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path

import torch

from minidpo.distributed import ranks
from minidpo.errors import UserError
from minidpo.log import print0
from minidpo.model.attention import KINDS
from minidpo.sections import RunSection


def choose_device(name: str, threads: int = 0, dtype: str = "fp32", attention: str = "auto") -> torch.device:
    """The device that `name` (auto, cpu, cuda, mps) means; attention is computed on it as run.attention says.
    Raises UserError if the device is absent, or cannot do what is asked for."""
    if threads:
        torch.set_num_threads(threads)
    device = _device(name)
    if device.type == "cuda":
        _choose_attention(device, attention)
        if dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            gpu = torch.cuda.get_device_name(device)
            raise UserError(f'{gpu} does not compute in bf16; set run.dtype = "fp32" (--dtype fp32)')
    elif attention == "flex":
        raise UserError(f'run.attention = "flex" needs a CUDA GPU, and this is {device.type}; set "auto"')
    elif device.type == "mps" and (dtype == "bf16" or ranks() > 1):  # Never run: no such machine was there.
        raise UserError('run.device = "mps" computes in one process, with run.dtype = "fp32"')
    return device


def _device(name: str) -> torch.device:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        sees = "CUDA device" if name == "cuda" else "Apple GPU"
        raise UserError(f"device {name!r} is asked for, but PyTorch sees no {sees}; use 'cpu' or 'auto'")
    if name in ("cpu", "mps") or not cuda:
        return torch.device("mps" if name == "mps" else "cpu")
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


def _choose_attention(device: torch.device, attention: str) -> None:
    obstacle = compile_obstacle(device)
    if obstacle and attention == "flex":
        raise UserError(f'run.attention = "flex" is compiled, but {obstacle}; or set run.attention = "sdpa"')
    if obstacle:
        # What is compiled on GPUs in any case (logprobs.py) then runs as it is written.
        torch.compiler.set_stance("force_eager")
        print0(f"nothing is compiled, so that steps take longer, in float32 many times longer: {obstacle}")
    # FlashAttention comes with PyTorch for NVIDIA's GPUs from Ampere on. It has no float32.
    nvidia = not torch.version.hip
    flash = attention == "auto" and nvidia and torch.cuda.get_device_capability(device) >= (8, 0)
    compiled = "sdpa" if obstacle or attention == "sdpa" else "flex"
    KINDS.update({torch.bfloat16: "flash" if flash else compiled, torch.float32: compiled})


def compile_obstacle(device: torch.device) -> str:
    """Why PyTorch cannot compile for this GPU, and what would help; empty if it can."""
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than the compiler supports"
    if find_spec("triton") is None:
        return "the package triton is missing: pip install triton"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"there is no C compiler ({' or '.join(compilers)}): apt install gcc"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers are missing: apt install python3-dev"
    return ""


def compiles_layers(setting: bool | str, device: torch.device) -> bool:
    """What run.compile = true, false or "auto" means on this device. "auto": on a GPU, where nothing
    forbids it. On a CPU compiling takes longer than most runs gain by it."""
    obstacle = compile_obstacle(device) if device.type == "cuda" else ""
    if setting is True and obstacle:
        raise UserError(f'run.compile = true, but {obstacle}; or set run.compile = "auto"')
    return device.type == "cuda" and not obstacle if setting == "auto" else bool(setting)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """bf16 matrix products over float32 weights for "bf16"; no change of precision for "fp32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16")


def products_per_second(dtype: torch.dtype = torch.float32) -> float:
    """How many matrix products like those of a layer the CPU makes, measured for a fifth of a second."""
    matrix = torch.ones(256, 256, dtype=dtype)
    torch.mm(matrix, matrix)  # The first one starts the threads.
    done, begin = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < 0.2:
        torch.mm(matrix, matrix)
        done += 1
    return done / seconds


def tell_slow_cpu(dtype: str) -> None:
    """Warn where this CPU computes more than twice as slowly as it could, and say what to set."""
    # Some CPUs have no instructions for bf16.
    if dtype == "bf16" and (slowdown := products_per_second() / products_per_second(torch.bfloat16)) > 2:
        what = f"bf16 is {slowdown:.0f} times slower than float32 on this CPU: stop with Ctrl-C, and"
        print0(f'warning: {what} start another run with run.dtype = "fp32"')
    # Threads wait for each other after every product. Where other programs use the processors, the wait is
    # for a thread that has none. It is measured, because nothing else tells it beforehand.
    if (threads := torch.get_num_threads()) == 1:
        return
    together = products_per_second()
    torch.set_num_threads(1)
    slowdown = products_per_second() / together
    torch.set_num_threads(threads)
    if slowdown > 2:
        what = f"{slowdown:.0f} times slower than on one thread, because other programs use the processors"
        print0(f"warning: {what}: stop with Ctrl-C and go on with --run.threads=1")


def describe(device: torch.device, run: RunSection) -> str:
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} CPU threads"
    many = f"{ranks()} processes, each on " if ranks() > 1 else ""
    return f"{many}{name}, {'bf16 over float32 weights' if run.dtype == 'bf16' else 'float32'}"
