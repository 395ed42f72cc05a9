"""One run over several processes: `torchrun --nproc_per_node=N train_dpo.py CONFIG`, sharded by FSDP2.

Every process ("rank") runs the same script and takes its share of each batch's micro-batches. Rank 0 alone
prints and writes. All must see the same files. With one process, nothing here does anything.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from minidpo.errors import RunStopped, UserError, remedy

Value = TypeVar("Value")

# Rank 0 may tokenize for hours while the others wait. They end at once all the same if a process dies.
_PATIENCE = timedelta(hours=12)
# What PyTorch says when another process of the run has ended: gloo, and then NCCL.
_PEER_LOST = (
    *("closed by peer", "reset by peer", "Broken pipe", "Socket closed", "recvValue failed"),
    *("remote process exited", "ncclRemoteError", "communicator was aborted"),
)


def ranks() -> int:
    """The number of processes of the run: one, unless `launch` has joined those that torchrun started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if ranks() > 1 else 0


def launch(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """`main` as one process of the group that torchrun started. An error is told once, by the process that
    meets it first; the others end silently. If a process was killed, one of the others raises RunStopped."""

    def run(arguments: list[str]) -> None:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return main(arguments)
        store, number, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        # Both by name: by default PyTorch takes the accelerator's backend alone, and CPU tensors have none.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=_PATIENCE)
        try:
            main(arguments)
            if ranks() > 1:
                leave(0)
        except Exception as error:
            if (told := _in_one_line(error, size)) is None:
                raise
            raise (SystemExit(1) if store.add("errors told", 1) > 1 else told) from None

    return run


def _in_one_line(error: Exception, size: int) -> Exception | None:
    """What to say of an error, or of one of the connection to the other processes; None if it is a bug."""
    if isinstance(error, UserError | RunStopped) or remedy(error):
        return error
    hint = "the same command goes on from the last checkpoint, with any number of processes"
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _PEER_LOST):
        return RunStopped(f"another of the {size} processes ended; {hint}")
    if isinstance(error, dist.DistBackendError):  # NCCL's, whose message has many lines, the cause last
        *_, cause = str(error).strip().splitlines()
        return RunStopped(f"NCCL: {cause} (NCCL_DEBUG=INFO says more); {hint}")
    return None


def leave(status: int) -> NoReturn:
    """End this process with an exit status once all processes have come this far: after a status other than
    0, torchrun ends the others at once, while rank 0 may still be writing."""
    if ranks() == 1:
        raise SystemExit(status)
    with suppress(RuntimeError):  # A peer that has already exited is fine here.
        any_rank(True)
        if torch.cuda.is_available():  # NCCL warns of connections that are left open.
            torch.cuda.synchronize()
            dist.destroy_process_group()
    # os._exit, because the threads of PyTorch's connections now and then abort a process that shuts down
    # beside its peers, and torchrun would then call a run failed that has ended well.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def first_before_others() -> Iterator[None]:
    """Rank 0 runs the block before the others do, which then find on disk what it wrote."""
    if rank() > 0:
        all_gather(None)  # returns once rank 0 has come to it, below
    yield
    if rank() == 0:
        all_gather(None)


def require_same(values: dict[str, object]) -> None:
    """Raises UserError, on all ranks, if one has other values than rank 0: it does not see the same files."""
    first, *others = all_gather(values)
    for number, theirs in enumerate(others, start=1):
        for name, value in first.items():
            if theirs[name] != value:
                what = f"process {number} has {name} = {theirs[name]!r}, process 0 has {value!r}"
                raise UserError(f"{what}; model, data and run.out must be the same files for all processes")


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(values)
    return values


def all_gather(value: Value) -> list[Value]:
    """The values of all ranks, in the order of ranks."""
    values = [value] * ranks()
    if ranks() > 1:
        dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank. A signal, for one, reaches the processes at different steps."""
    return bool(all_reduce_sum(torch.tensor(int(flag))))


def shard(model: nn.Module, device: torch.device, dtype: str) -> None:
    """Split each parameter of a decoder over the ranks by its first dimension, before it has weights.

    A layer's weights are gathered while it computes, in bf16 if dtype is "bf16"; the shards, their gradients,
    the reduction and AdamW stay float32. The parameters outside the layers form one more group. Gradients are
    summed, not averaged: every micro-batch already divides by the whole batch's size.
    """
    if ranks() == 1:
        return
    mesh = init_device_mesh(device.type, (ranks(),))
    # Inputs are not cast: autocast does it for each product, and the residual stream stays float32.
    gathered = torch.bfloat16 if dtype == "bf16" else None
    policy = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    for module in (*model.get_submodule("model.layers").children(), model):
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden_states")


def reshard(model: nn.Module) -> None:
    """Free the weights that a forward without a backward has left gathered."""
    if ranks() > 1:
        model.reshard()  # type: ignore[operator]  # FSDP2 gives a sharded module this method


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered on every rank; all ranks call it together. Other tensors are returned."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `full`, which every rank has, if `like` is sharded; otherwise `full` itself."""
    if not isinstance(like, DTensor):
        return full
    # src_data_rank=None: each rank cuts its part out of what it has, without any communication.
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
