"""Several processes, one run: `torchrun --nproc_per_node=N train_dpo.py CONFIG`, parameters sharded by PyTorch's FSDP2.

Every process runs the same script on the same batches and takes its share of each batch's micro-batches; rank 0
alone speaks and writes. Without torchrun (or with one process) there is one rank and nothing here does anything.
Model, data and run.out must lie at the same paths for all machines of a run.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minidpo.errors import RunStopped, UserError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Value = TypeVar("Value")

# A first start may tokenize for hours on rank 0 while the others wait. A process that dies ends the run at once:
# torchrun sees to that, and a closed connection.
_PATIENCE = timedelta(hours=12)
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "recvValue failed",
)


def ranks() -> int:
    """How many processes the run has: one, unless `launch` has joined those that torchrun started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if ranks() > 1 else 0


def leave(status: int) -> NoReturn:
    """End this process with an exit status, once all have come as far: torchrun ends the others when one has failed, and
    rank 0 may still be writing what they gave it."""
    if ranks() > 1:
        with suppress(RuntimeError):  # who has left, or was killed, takes nothing with it that is wanted here
            any_rank(True)  # waits for all
        # At once: seldom, the threads of PyTorch's connections abort a process that takes itself down beside its peers,
        # and torchrun would call a run failed that has ended well.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def launch(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """`main` as one process of a group that torchrun started.

    An error is told once: by the process that meets it first. The others, which lose their peer by it or meet the
    same error, end without a word. A peer that was killed raises RunStopped.
    """

    def run(arguments: list[str]) -> None:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return main(arguments)
        store, number, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        # Both by name: without one PyTorch takes the accelerator's alone, and tensors on the CPU have none.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=_PATIENCE)
        try:
            main(arguments)
            if ranks() > 1:
                leave(0)
        except (UserError, RunStopped, RuntimeError) as error:
            lost = not isinstance(error, UserError | RunStopped) and any(text in str(error) for text in _LOST)
            if not (lost or isinstance(error, UserError | RunStopped)):
                raise
            if store.add("errors told", 1) > 1:
                raise SystemExit(1) from None
            if lost:
                raise RunStopped(
                    f"another of the {size} processes ended; the same command goes on from the last checkpoint,"
                    " with any number of processes"
                ) from None
            raise

    return run


@contextmanager
def first_before_others() -> Iterator[None]:
    """Rank 0 goes through the block, then the others: they find what it left on disk."""
    if ranks() > 1 and rank() > 0:
        dist.barrier()
    yield
    if ranks() > 1 and rank() == 0:
        dist.barrier()


def from_first(value: Value) -> Value:
    """Rank 0's value, for all: what is read from a disk that rank 0 writes to must not differ between ranks."""
    if ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def require_same(values: dict[str, object]) -> None:
    """Raises UserError, on all ranks, where one has other values than rank 0: it does not see the same files."""
    if ranks() == 1:
        return
    of_ranks: list[dict[str, object]] = [{}] * ranks()
    dist.all_gather_object(of_ranks, values)
    for number, theirs in enumerate(of_ranks):
        for name, value in of_ranks[0].items():
            if theirs[name] != value:
                raise UserError(
                    f"process {number} has {name} = {theirs[name]!r}, process 0 has {value!r}; model, data and run.out"
                    " must be the same files for all processes"
                )


def summed(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(values)
    return values


def gathered(value: Value) -> list[Value]:
    """Every rank's value, by rank."""
    values = [value] * ranks()
    if ranks() > 1:
        dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether it is true anywhere: signals reach the processes at different steps, and all must leave at the same."""
    return bool(summed(torch.tensor(int(flag))))


def shard(model: nn.Module, device: torch.device, dtype: str) -> None:
    """Split each parameter of a decoder over the ranks by its first dimension, before it has weights or an optimizer.

    A layer's weights are gathered when it computes and let go after it, in bf16 for dtype "bf16" (the shards, their
    gradients, the reduction and AdamW stay float32). What lies outside the layers (embedding, last norm, output
    matrix, reward head) is one more group, which stays gathered from the start of a forward to the end of its backward.
    Gradients are summed, not averaged: every micro-batch already divides by the whole batch's count.
    """
    if ranks() == 1:
        return
    # Here, for they take a second to import, which one process alone need not wait for.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (ranks(),))
    # Inputs are not cast: autocast does it per product, and the residual stream stays float32.
    gathered = torch.bfloat16 if dtype == "bf16" else None
    policy = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    for module in (*model.get_submodule("model.layers").children(), model):
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden_states")


def let_go(model: nn.Module) -> None:
    """Free what a forward without a backward has left gathered; its parameters are the sharded ones again."""
    if ranks() > 1:
        model.reshard()  # type: ignore[operator]  # FSDP2 gives a sharded module this method


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered on every rank; all ranks must ask together. Other tensors as they are."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def own_rows(tensor: Tensor) -> slice | None:
    """Which rows of the whole `tensor` this rank holds; None: all there is, for it is not sharded."""
    if not _is_sharded(tensor):
        return None
    a_rank = -(-tensor.shape[0] // ranks())  # as torch.chunk cuts: the last ones may have less, or nothing
    start = min(rank() * a_rank, tensor.shape[0])
    return slice(start, min(start + a_rank, tensor.shape[0]))


def from_rows(rows: Tensor, tensor: Tensor) -> Tensor:
    """`rows`, those that `own_rows(tensor)` names, as a tensor sharded as `tensor` is."""
    if not _is_sharded(tensor):
        return rows
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def own_part(full: Tensor, tensor: Tensor) -> Tensor:
    """`full`, which every rank has, sharded as `tensor` is."""
    rows = own_rows(tensor)
    return full if rows is None else from_rows(full[rows].clone(), tensor)


def _is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    return ranks() > 1 and hasattr(
        tensor, "placements"
    )  # a DTensor, whose class is not imported for one process
