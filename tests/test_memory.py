"""The table of memory a GPU: its formula against what a small model's step really holds, one process and sharded."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidpo import reference
from minidpo.commands import memory as command
from minidpo.distributed import shard
from minidpo.logprobs import response_logps
from minidpo.memory import STATE_BYTES, parameter_counts, step_memory
from minidpo.model import Transformer
from minidpo.optim import AdamW
from minidpo.packing import Wanted, pack_row
from minidpo.reference import load_reference, stored_logps
from minidpo.sections import OptimSection
from minidpo.shapes import PUBLISHED, named_shape
from minidpo.token_store import PairTokens
from tiny import random_pairs, tiny_config

SMALL = dict(hidden_size=64, intermediate_size=160, head_dim=16, vocab_size=700)
PAIRS = PairTokens.from_pairs(random_pairs(np.random.default_rng(0), 16, (20, 40), (20, 40)))
ROW = pack_row(PAIRS, Wanted(chosen_logps=True, rejected_logps=True))


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made under it, or given to it, ever held at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self._bound = 0
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int):  # how FSDP frees and takes gathered weights
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
                self._note(getattr(value, "_local_tensor", value).untyped_storage())

    def _note(self, storage: torch.UntypedStorage) -> None:
        known = self._live.get(storage._cdata)
        if known and not known[0].expired() and known[1] == storage.nbytes():
            return
        self._bound += storage.nbytes()
        self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self._bound > self.peak:  # with what is gone meanwhile: only now is it worth looking
            self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
            self._bound = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._bound)


def measured(monkeypatch, layers: int, checkpointing: bool) -> int:
    """Peak bytes of the second step, whose optimizer has its moments."""
    torch.manual_seed(0)
    model = Transformer(tiny_config(**SMALL, num_hidden_layers=layers))
    model.activation_checkpointing = checkpointing
    shard(model, torch.device("cpu"), "bf16")
    optimizer = AdamW(model, OptimSection())

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logps = response_logps(model, ROW)
        logps.sum().backward()
        optimizer.step()

    step()
    with PeakMemory(monkeypatch) as memory:
        memory.add(*model.parameters(), *(p.grad for p in model.parameters()))
        memory.add(*optimizer.state.values())
        step()
    return memory.peak


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


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("layers", [2, 8])
def test_the_formula_gives_what_a_small_step_holds(monkeypatch, layers, checkpointing, ranks):
    config = tiny_config(**SMALL, num_hidden_layers=layers)
    scored = len(ROW.queries) / len(ROW.tokens)
    counted = step_memory(config, len(ROW.tokens), ranks, checkpointing, scored, "cpu")
    peak = measured(monkeypatch, layers, checkpointing)
    print(f"measured {peak:,} counted {counted.total:,} {peak / counted.total:.3f} {counted}")
    assert counted.total == pytest.approx(peak, rel=0.12)


def test_the_reference_leaves_nothing_behind(world, tmp_path, monkeypatch, ranks):
    models = []

    def load(*arguments):
        model = load_reference(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(reference, "load_reference", load)
    gc.disable()  # it comes some time; the policy's first step, which needs the memory, does not wait for it
    try:
        where = tmp_path / "reference.safetensors", world / "model"
        stored_logps(*where, "", {"train": (PAIRS, np.arange(len(PAIRS)))}, 2000, torch.device("cpu"), "bf16")
        assert [model() for model in models] == [None]
    finally:
        gc.enable()


def test_states_are_divided_by_the_ranks_and_activations_are_not():
    config = tiny_config(**SMALL)
    layer, outside = parameter_counts(config)
    one, eight = step_memory(config, 1000, 1), step_memory(config, 1000, 8)
    assert one.states == STATE_BYTES * (2 * layer + outside)
    assert eight.states == pytest.approx(one.states / 8, abs=STATE_BYTES)
    assert eight.activations == one.activations and eight.work == one.work


def test_the_command_prints_the_formula_and_takes_a_directory(world, capsys):
    command.main(["7B", str(world / "model"), "--gpus", "1", "8", "--micro-tokens", "4096"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    eight = step_memory(named_shape("7B"), 4096, 8).total / 1e9
    assert rows[0] == ["GPUs", "1", "8"] and rows[1][0] == "7.62B" and len(rows) == 3
    assert rows[1][3] == f"{eight:.0f}"


def test_published_shapes_have_their_published_sizes():
    sizes = {name: parameter_counts(named_shape(name)) for name in PUBLISHED}
    total = {
        name: layer * named_shape(name).num_hidden_layers + outside
        for name, (layer, outside) in sizes.items()
    }
    # As their model cards say: 0.49B, 1.54B, 7.62B and 70.6B.
    assert total == {"0.5B": 494_032_768, "1.5B": 1_543_714_304, "7B": 7_615_616_512, "70B": 70_553_706_496}
