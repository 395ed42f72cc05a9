"""What a training step holds in memory: a share of the states, a chunk of the logits, and no reference."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidpo import logprobs
from minidpo.data import PairTokens
from minidpo.distributed import shard
from minidpo.model import Transformer, response_logps
from minidpo.packing import pack
from minidpo.sections import OptimSection
from minidpo.training import reference
from minidpo.training.optim import adamw
from minidpo.training.reference import with_reference_logps
from tiny import random_pairs, tiny_config

SMALL = dict(hidden_size=64, intermediate_size=160, head_dim=16, vocab_size=700)
PAIRS = PairTokens.from_pairs(random_pairs(np.random.default_rng(0), 16, (20, 40), (20, 40)))
BATCH = pack(PAIRS)


class Memory(TorchDispatchMode):
    """The most bytes that tensors made under it or given to it held at once, and the largest of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self._bound = self.largest = 0
        resize = torch.UntypedStorage.resize_

        def resized(
            storage: torch.UntypedStorage, size: int
        ):  # This is how FSDP frees and takes gathered weights.
            result = resize(storage, size)
            self._note(storage)
            return result

        monkeypatch.setattr(torch.UntypedStorage, "resize_", resized)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.add(*tree_leaves(made))
        return made

    def add(self, *values: object) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
                self._note(getattr(value, "_local_tensor", value).untyped_storage())

    def _note(self, storage: torch.UntypedStorage) -> None:
        known = self._live.get(storage._cdata)
        if known and not known[0].expired() and known[1] == storage.nbytes():
            return
        self._bound += storage.nbytes()
        self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self._bound > self.peak:  # Only now is it worth looking which tensors are gone.
            self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
            self._bound = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._bound)


def measured(monkeypatch, checkpointing: bool = False, **over) -> tuple[int, int]:
    """Peak bytes of the second step, whose optimizer has moments; bytes of weights, gradients and moments."""
    torch.manual_seed(0)
    model = Transformer(tiny_config(**SMALL | over))
    model.activation_checkpointing = checkpointing
    shard(model, torch.device("cpu"), "bf16")
    optimizer = adamw(model, OptimSection())

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logps = response_logps(model, BATCH)
        logps.sum().backward()
        optimizer.step()

    step()
    states = [*model.parameters(), *(p.grad for p in model.parameters())]
    states += [tensor for state in optimizer.state.values() for tensor in state.values()]
    with Memory(monkeypatch) as memory:
        memory.add(*states)
        step()
    return memory.peak, sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in states)


@pytest.fixture(params=[1, 8], ids=["one process", "one of eight"])
def ranks(request, monkeypatch):
    """A process group of one real and seven imaginary processes: the sizes are right, the numbers are not."""
    if request.param > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        monkeypatch.setenv("WORLD_SIZE", str(request.param))
        monkeypatch.setenv("RANK", "0")
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    if request.param > 1:
        dist.destroy_process_group()


def test_states_are_shared(monkeypatch, ranks):
    """A process holds its share of weights, gradients and moments: 16 bytes per parameter in all."""
    _, states = measured(monkeypatch)
    parameters = sum(p.numel() for p in Transformer(tiny_config(**SMALL)).parameters())
    assert states == pytest.approx(16 * parameters / ranks, rel=0.02)


def test_activation_checkpointing(monkeypatch, ranks):
    """With it, a layer keeps its input alone: 4 bytes per token and channel, and the states that it adds."""
    peaks, states = {}, {}
    for layers in (2, 8):
        for checkpointing in (False, True):
            found = measured(monkeypatch, checkpointing, num_hidden_layers=layers)
            peaks[layers, checkpointing], states[layers] = found
    more = {c: (peaks[8, c] - peaks[2, c] - (states[8] - states[2])) / 6 for c in (False, True)}  # per layer
    inputs = 4 * len(BATCH.tokens) * SMALL["hidden_size"]
    assert more[True] == pytest.approx(inputs, rel=0.05)
    assert more[False] > 5 * more[True]


def test_logits_are_never_whole(monkeypatch):
    """No tensor of a step has as many numbers as all logits: they exist one chunk at a time."""
    vocabulary, chunk = 20_000, 30
    monkeypatch.setattr(logprobs, "LOGITS", chunk * vocabulary * 4)
    model = Transformer(tiny_config(vocab_size=vocabulary))
    with Memory(monkeypatch) as memory:
        response_logps(model, BATCH).sum().backward()
    assert len(BATCH.targets) > 20 * chunk
    assert memory.largest <= vocabulary * max(chunk, tiny_config().hidden_size)


def test_reference_leaves_nothing(world, tmp_path, monkeypatch, ranks):
    """When its log-probs are there the reference is gone, before garbage collection comes round by itself."""
    models, load = [], reference.load_reference

    def load_reference(*arguments):
        model = load(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(reference, "load_reference", load_reference)
    run = SimpleNamespace(
        out=tmp_path, device=torch.device("cpu"), dtype="bf16", fingerprints={"reference": "x"}
    )
    config = SimpleNamespace(reference_path=world / "model", optim=SimpleNamespace(micro_tokens=2000))
    gc.disable()  # The policy's first step, which needs the memory, does not wait for it.
    try:
        with_reference_logps(config, run, PAIRS, np.arange(len(PAIRS)), PAIRS)
        assert [model() for model in models] == [None]
    finally:
        gc.enable()
