"""Compile the kernels of a training step for GPUs that are not there, and hold their shared memory against what
each GPU has. Nothing runs.

    pip install triton           # beside a CPU build of PyTorch
    python tests/gpu/compile_kernels.py 90 89 120 80
"""

import fakecuda  # noqa: F401  # isort: skip

import subprocess
import sys
import time
from types import SimpleNamespace

import torch
import torch._dynamo.device_interface as device_interface
import torch._functorch.config as functorch_config
import torch._inductor.async_compile as async_compile
import torch._inductor.config as inductor_config
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.post_grad as post_grad
import torch._inductor.runtime.triton_helpers as triton_helpers
import triton
from torch._inductor.codecache import PyCodeCache
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minidpo import logprobs, packing
from minidpo.model import ModelConfig, attention
from minidpo.tools.bench_steps import random_pairs

# Bytes that a block of threads may use, by compute capability: A100, L4 and RTX 4090, H100, RTX 5090.
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 120: 101_376}
# Query heads, key/value heads, head size, dtype
HEADS = [
    (14, 2, 64, torch.bfloat16),
    (12, 2, 128, torch.bfloat16),
    (14, 2, 64, torch.float32),
    (12, 2, 128, torch.float32),
]
KERNELS: list[tuple[str, str]] = []  # names and sources of what PyTorch's compiler has written


def pretend(sm: int) -> GPUTarget:
    """Tell PyTorch's compiler and Triton that there is such a GPU."""
    target = GPUTarget("cuda", sm, 32)
    shared = SHARED_MEMORY[sm]
    properties = SimpleNamespace(
        **dict(name="none", major=sm // 10, minor=sm % 10, multi_processor_count=132, warp_size=32),
        **dict(regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, gcnArchName=""),
        **dict(max_threads_per_block=1024, total_memory=80 << 30, L2_cache_size=50 << 20, uuid=""),
        **dict(shared_memory_per_block=49152, shared_memory_per_block_optin=shared),
        shared_memory_per_multiprocessor=shared + 1024,
    )
    answers = {
        **dict(is_available=True, device_count=1, current_device=0, is_initialized=True, set_device=None),
        **dict(get_device_capability=(sm // 10, sm % 10), get_device_properties=properties, synchronize=None),
        **dict(
            _exchange_device=0, _maybe_exchange_device=0, get_rng_state=torch.zeros(16, dtype=torch.uint8)
        ),
        **dict(set_rng_state=None, get_device_name="none"),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        setattr(
            device_interface.CudaInterface, name.removeprefix("_"), staticmethod(getattr(torch.cuda, name))
        )
    more = dict(get_raw_stream=0, is_bf16_supported=True, get_compute_capability=sm)
    more["raise_if_triton_unavailable"] = None
    for name, answer in more.items():
        reply = staticmethod(lambda *_, answer=answer, **__: answer)
        setattr(device_interface.CudaInterface, name, reply)
    torch.version.cuda = "13.0"
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    # Shapes are all that the compiler reads.
    packing.to_device = attention.to_device = lambda values, device: torch.empty_like(values, device=device)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": shared}),
    )
    triton.runtime.driver.set_active(driver)
    inductor_config.compile_threads, inductor_config.force_disable_caches = 1, True
    inductor_config.joint_graph_constant_folding = False  # It would make real tensors.
    functorch_config.force_non_lazy_backward_lowering = True
    for module in (joint_graph, post_grad):
        module.lazy_init = lambda *_: None
    triton_helpers.set_driver_to_gpu = lambda *_: None
    async_compile.AsyncCompile.triton = remember
    return target


def remember(self, kernel_name: str, source_code: str, *others, **more) -> None:
    """In place of compiling a kernel in order to run it."""
    KERNELS.append((kernel_name, source_code))


def compile_kernels(target: GPUTarget) -> bool:
    """Triton and ptxas on what is in KERNELS; whether all of it fits."""
    fits = True
    for name, source in KERNELS:
        kernel, started = getattr(PyCodeCache.load(source), name), time.monotonic()
        config, meta = kernel.configs[0], kernel.triton_meta
        signature = dict(meta["signature"]) | dict.fromkeys(config.kwargs, "constexpr")
        constants = dict(meta.get("constants", {})) | config.kwargs
        code = ASTSource(kernel.fn, signature, constants, meta.get("configs", [{}])[0])
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        shared = triton.compile(code, target=target, options=options).metadata.shared
        ok = shared <= SHARED_MEMORY[target.arch]
        fits &= ok
        seconds = time.monotonic() - started
        print(f"    {name:<55} {shared:>7} B {'ok' if ok else 'TOO MUCH'} {seconds:.0f} s", flush=True)
    KERNELS.clear()
    return fits


def lower(function, *arguments) -> None:
    """Have PyTorch's compiler write the kernels of a call; it fails where it would run them."""
    torch._dynamo.reset()
    try:
        function(*arguments)
    except (RuntimeError, TypeError, AttributeError):
        if not KERNELS:
            raise


def main(sm: int) -> bool:
    target, fits, cuda = pretend(sm), True, torch.device("cuda")
    row = packing.pack(random_pairs(ModelConfig(512, 64, 64, 1, 1, 1, 64), 12))
    for heads, kv_heads, size, dtype in HEADS:
        print(f"sm_{sm} attention: {heads} and {kv_heads} heads of {size}, {dtype}", flush=True)
        with FakeTensorMode(allow_non_fake_inputs=True):
            on_gpu = row.to(cuda)
            attend, n = attention.masked_attention(on_gpu), len(on_gpu.tokens)
            q, k, v = (
                torch.empty(n, count, size, device=cuda, dtype=dtype, requires_grad=True)
                for count in (heads, kv_heads, kv_heads)
            )
            lower(attend, q, k, v, 0)
        fits &= compile_kernels(target)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        logits = torch.empty(400, 151_936, device=cuda, dtype=torch.bfloat16)
        targets = torch.zeros(400, 1, device=cuda, dtype=torch.int64)
        normalizers, grads = (torch.empty(400, 1, device=cuda) for _ in range(2))
        for body, more in (
            (logprobs._logps_of, [targets]),
            (logprobs._to_gradient_on_gpu, [normalizers, targets, grads]),
        ):
            print(f"sm_{sm} output layer: {body.__name__}", flush=True)
            lower(logprobs._compiled(body), logits, *more)
            fits &= compile_kernels(target)
    return fits


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.exit(not main(int(sys.argv[1])))
    # Each GPU in a process of its own, because PyTorch asks what there is only once.
    architectures = sys.argv[1:] or list(map(str, SHARED_MEMORY))
    sys.exit(any(subprocess.run([sys.executable, __file__, sm]).returncode for sm in architectures))
