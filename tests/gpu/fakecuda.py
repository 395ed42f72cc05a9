"""Load fakecuda.cpp: import this first, before anything that uses PyTorch. It needs a C++ compiler, and a build
of PyTorch for CPUs."""

import ctypes
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent


def build() -> Path:
    """The shared library, built once for each version of PyTorch."""
    spec = find_spec("torch")
    assert spec and spec.origin
    torch_path = Path(spec.origin).parent
    library = Path(tempfile.gettempdir()) / f"minidpo-fakecuda-{version('torch')}.so"
    if not library.exists():
        include, lib = torch_path / "include", torch_path / "lib"
        command = ["g++", "-std=c++20", "-shared", "-fPIC", str(HERE / "fakecuda.cpp"), "-o", str(library)]
        command += [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
        subprocess.run([*command, f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-lc10"], check=True)
    return library


# Before `import torch`, which asks once whether there is a GPU.
ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import torch  # noqa: E402
import torch.cuda.amp.common  # noqa: E402

# Autocast and pinned memory ask for a driver, too.
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda *_, **__: True
torch.Tensor.pin_memory = lambda self, *_: self
