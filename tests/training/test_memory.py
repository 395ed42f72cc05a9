"""What a training step holds in memory: a share of the states, a chunk of the logits, and no reference."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from minidpo import logprobs
from minidpo.data import PairTokens
from minidpo.distributed import shard
from minidpo.model import Transformer, response_logps
from minidpo.packing import pack
from minidpo.sections import DPOConfig, ModelSection, OptimSection
from minidpo.training import reference
from minidpo.training.optim import adamw
from tiny import random_pairs, tiny_config

SMALL = dict(hidden_size=64, intermediate_size=160, head_dim=16, vocab_size=700)
PAIRS = PairTokens.from_pairs(random_pairs(np.random.default_rng(0), 3, (60, 100), (60, 100)))
BATCH = pack(PAIRS)
CPU = torch.device("cpu")


@pytest.fixture(params=[1, 8], ids=["one process", "one of eight"])
def ranks(request, monkeypatch):
    """A process group of one real and seven imaginary processes: the sizes are right, the numbers are not."""
    if request.param > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    if request.param > 1:
        dist.destroy_process_group()


def memory_of_a_step(checkpointing: bool = False, **over) -> tuple[int, int]:
    """Bytes of weights, gradients and moments together, and the most bytes that the second step holds."""
    torch.manual_seed(0)
    model = Transformer(tiny_config(**SMALL | over))
    model.activation_checkpointing = checkpointing
    shard(model, CPU, "fp32")
    optimizer = adamw(model, OptimSection())

    def step() -> None:
        response_logps(model, BATCH).sum().backward()
        optimizer.step()

    step()  # Now there are gradients and moments.
    with MemTracker() as tracker:
        tracker.track_external(model, optimizer)
        states = tracker.get_tracker_snapshot("current")[CPU]["Total"]
        step()
    return states, tracker.get_tracker_snapshot("peak")[CPU]["Total"]


def test_states(ranks):
    """A process holds its share of weights, gradients and moments: 16 bytes per parameter in all."""
    parameters = sum(parameter.numel() for parameter in Transformer(tiny_config(**SMALL)).parameters())
    states, _ = memory_of_a_step()
    assert states == pytest.approx(16 * parameters / ranks, rel=0.02)


def test_activation_checkpointing(ranks):
    """With it, a layer keeps its input alone: 4 bytes per token and channel, and the states that it adds."""

    def activations_per_layer(checkpointing: bool) -> float:
        of_2 = memory_of_a_step(checkpointing, num_hidden_layers=2)
        of_5 = memory_of_a_step(checkpointing, num_hidden_layers=5)
        states, peak = (more - less for more, less in zip(of_5, of_2, strict=True))
        return (peak - states) / 3

    kept = activations_per_layer(checkpointing=True)
    assert kept == pytest.approx(4 * len(BATCH.tokens) * SMALL["hidden_size"], rel=0.05)
    assert activations_per_layer(checkpointing=False) > 5 * kept


def test_logits(monkeypatch):
    """Logits are never whole: a step that computes 15 positions at a time holds less than half of all."""
    vocabulary = 20_000
    monkeypatch.setattr(logprobs, "tokens_per_chunk", lambda *_: 15)
    model = Transformer(tiny_config(vocab_size=vocabulary))
    with MemTracker() as tracker:
        tracker.track_external(model)
        response_logps(model, BATCH).sum().backward()
    all_logits = 4 * vocabulary * len(BATCH.targets)
    assert tracker.get_tracker_snapshot("peak")[CPU]["Total"] < all_logits / 2


def test_reference(world, tmp_path, monkeypatch, ranks):
    """When its log-probs are there the reference is gone, before garbage collection comes round by itself."""
    models, load = [], reference.load_model

    def load_model(*arguments, **named):
        model = load(*arguments, **named)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(reference, "load_model", load_model)
    run = SimpleNamespace(out=tmp_path, device=CPU, dtype="bf16", identity={"reference": "x"})
    config = DPOConfig(model=ModelSection(str(world / "model")))
    gc.disable()  # The policy's first step, which needs the memory, does not wait for it.
    try:
        reference.with_reference_logps(config, run, PAIRS, np.arange(len(PAIRS)), PAIRS, policy=None)
        assert [model() for model in models] == [None]
    finally:
        gc.enable()
