"""LoRA: y = W x + b + s B A x, its gradients in closed form, and a model with its adapters on and off."""

import copy
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from minidpo.data import PairTokens
from minidpo.errors import UserError
from minidpo.logprobs import token_logps
from minidpo.model import (
    Transformer,
    load_model,
    load_reward_model,
    model_fingerprint,
    new_reward_model,
    response_logps,
    save_model,
    save_reward_model,
)
from minidpo.model.adapter_files import save_adapter
from minidpo.model.lora import LoRALinear, adapted_layers, adapters_off, add_adapters, trained_parameters
from minidpo.packing import pack
from minidpo.sections import LoRASection, OptimSection
from minidpo.training.optim import adamw
from tiny import random_pairs, tiny_model, tiny_reward_model

PAIRS = PairTokens.from_pairs(random_pairs(np.random.default_rng(0), 3))
BATCH = pack(PAIRS)
TOKENS = torch.arange(3, 43).view(2, 20)


def layer(width_in: int, width_out: int, rank: int, scale: float = 0.5) -> LoRALinear:
    """In float64, with an A and a B that are both random."""
    torch.manual_seed(0)
    made = LoRALinear(nn.Linear(width_in, width_out).double(), rank, scale)
    nn.init.normal_(made.lora_B)
    return made


def adapted(base: Transformer | None = None, trained: bool = True, **lora) -> Transformer:
    """A tiny model with adapters; B is random if they are `trained`."""
    torch.manual_seed(0)
    model = copy.deepcopy(base or tiny_model(model_type="qwen2", qkv_bias=True))
    add_adapters(model, LoRASection(**dict(rank=4) | lora))
    for name, parameter in model.named_parameters():
        if trained and name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


# --- one layer ----------------------------------------------------------------------------------------------


def test_by_hand():
    """W = [[1, 2]], b = 3, A = [[4, 5]], B = [[6]], s = 0.5, x = (1, -1): 1 - 2 + 3 + 0.5 * 6 * (4 - 5)."""
    made = layer(2, 1, rank=1)
    with torch.no_grad():
        for parameter, values in zip(made.parameters(), ([[1, 2]], [3], [[4, 5]], [[6]]), strict=True):
            parameter.copy_(torch.tensor(values))
    assert made(torch.tensor([[1.0, -1.0]], dtype=torch.float64)).item() == -1.0


def test_projected_gradient():
    """With G = dL/dW of full training: dL/dB = s G A^T and dL/dA = s B^T G."""
    made, x = layer(5, 3, rank=2), torch.randn(7, 5, dtype=torch.float64)
    full = (made.weight + made.scale * made.lora_B @ made.lora_A).detach().requires_grad_()
    (nn.functional.linear(x, full, made.bias) ** 3).sum().backward()
    (made(x) ** 3).sum().backward()
    torch.testing.assert_close(made.lora_B.grad, made.scale * full.grad @ made.lora_A.T)
    torch.testing.assert_close(made.lora_A.grad, made.scale * made.lora_B.T @ full.grad)


@pytest.mark.parametrize(("width_in", "width_out"), [(3, 6), (6, 3), (4, 4)])
def test_reachable(width_in, width_out):
    """From rank min(in, out) on, s B A can be any step of full training; one rank less leaves its smallest
    singular value."""
    step = torch.randn(width_out, width_in, dtype=torch.float64)
    smallest = torch.linalg.svdvals(step)[-1]
    for rank in (min(width_in, width_out), min(width_in, width_out) - 1):
        made = layer(width_in, width_out, rank)
        a, b = made.lora_A.detach(), made.lora_B.detach()
        for _ in range(400):  # least squares in B, then in A, and so on
            b = torch.linalg.lstsq(a.T * made.scale, step.T).solution.T
            a = torch.linalg.lstsq(b * made.scale, step).solution
        rest = torch.linalg.norm(step - made.scale * b @ a)
        left = 0.0 if rank == min(width_in, width_out) else smallest.item()
        assert rest.item() == pytest.approx(left, abs=1e-6)


def test_new_adapter():
    """A is drawn from U(-1, 1) / sqrt(in), here of 5,000 numbers up to 0.1, and B is 0."""
    made = LoRALinear(nn.Linear(100, 7).bfloat16(), rank=50, scale=1.0)
    assert 0.0995 < made.lora_A.abs().max() <= 0.1 and not made.lora_B.any()
    assert made.lora_A.dtype == made.lora_B.dtype == torch.float32  # also where W is bf16


def test_scale():
    """alpha / r, or alpha / sqrt(r): of alpha 32 and rank 16, 2 or 8."""
    for rank_scaled, scale in ((False, 32 / 16), (True, 32 / 4)):
        layers = adapted_layers(adapted(rank=16, alpha=32.0, rank_scaled=rank_scaled))
        assert {made.scale for made in layers.values()} == {scale}


# --- a model ------------------------------------------------------------------------------------------------


def test_trained_parameters():
    """r (in + out) for each layer: r = 4; q and o 32 + 32, k and v 32 + 16, the others 32 + 48."""
    count = sum(parameter.numel() for parameter in trained_parameters(adapted()).values())
    assert count == 2 * 4 * (64 + 48 + 48 + 64 + 3 * 80)
    of_two = trained_parameters(adapted(targets=["q_proj", "v_proj"]))
    assert {name.split(".")[-2] for name in of_two} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], LoRASection().targets], ids=["two", "all"])
@pytest.mark.parametrize("base_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_start(base_dtype, autocast, targets):
    """At the start B is 0, so that logits are those of the frozen weights, bit for bit."""
    base = tiny_model(qkv_bias=True)
    model = adapted(base=base, trained=False, base_dtype=base_dtype, targets=targets)
    for parameter in base.parameters() if base_dtype == "bf16" else ():
        parameter.data = parameter.data.bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(model(TOKENS), base(TOKENS))


@pytest.mark.parametrize("base_dtype", ["fp32", "bf16"])
def test_off(base_dtype):
    """After every step, a model with its adapters off is the reference, bit for bit; on, it is not."""
    model = adapted(base_dtype=base_dtype, trained=False)
    model.activation_checkpointing = True  # also of the first layer, whose input needs no gradient
    reference = copy.deepcopy(model)
    optimizer = adamw(model, OptimSection(lr=1e-2, weight_decay=0.1))
    for _ in range(3):
        response_logps(model, BATCH).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with adapters_off(model):
            assert torch.equal(response_logps(model, BATCH), response_logps(reference, BATCH))
        assert not torch.equal(response_logps(model, BATCH), response_logps(reference, BATCH))


@pytest.mark.parametrize("tied", [False, True])
def test_merged(tmp_path, tied):
    """A saved model has W + s B A for W, and no other tensor than the base."""
    base, merged = (tiny_model(seed, torch.float64, tie_word_embeddings=tied) for seed in (0, 1))
    model = adapted(base=base)
    save_model(model, tmp_path)
    merged.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert (model(TOKENS) - base(TOKENS)).abs().max() > 0.1
    torch.testing.assert_close(merged(TOKENS), model(TOKENS), rtol=1e-11, atol=1e-12)


def test_merged_in_bf16(tmp_path):
    """What is added to a frozen bf16 weight is not rounded to bf16, unless that is asked for."""
    model = adapted(base_dtype="bf16")
    for dtype, name, least, most in ((None, "float32", 0, 1e-4), (torch.bfloat16, "bfloat16", 1e-2, 1)):
        save_model(model, tmp_path, dtype=dtype)
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == name
        assert least <= (load_model(tmp_path)(TOKENS) - model(TOKENS)).abs().max() < most


def test_output_layer():
    """A frozen output matrix has no gradient, which would need 4 bytes for each of its V x D numbers."""
    vocabulary, width, peaks = 20_000, 64, []
    for frozen in (False, True):
        weight = torch.randn(vocabulary, width, requires_grad=not frozen)
        hidden = torch.randn(5, width, requires_grad=True)
        with MemTracker() as tracker:
            token_logps(hidden, weight, torch.arange(5)).sum().backward()
        peaks.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
    assert peaks[0] - peaks[1] >= 4 * vocabulary * width


# --- adapters on disk ---------------------------------------------------------------------------------------


def saved(directory: Path, model: Transformer, **lora) -> Path:
    """The adapter of a model whose base is in `directory`."""
    settings, of_base = LoRASection(**dict(rank=4) | lora), model_fingerprint(directory)
    save_adapter(model, directory / "adapter", settings, "the/base", of_base)
    return directory / "adapter"


def test_adapter_directory(directory):
    """A model is its base and its adapter, bit for bit."""
    model = adapted(base=load_model(directory), rank=2, rank_scaled=True, targets=["o_proj"])
    adapter = saved(directory, model, rank=2, rank_scaled=True, targets=["o_proj"])
    assert torch.equal(load_model(directory, adapter=adapter)(TOKENS), model(TOKENS))


def test_reward_adapter(directory):
    """A reward model's adapter has the head, which a language model lacks."""
    model = adapted(base=new_reward_model(directory))
    adapter = saved(directory, model)
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    batch = pack(PAIRS, scored=0)
    theirs = load_reward_model(directory, adapter=adapter).forward_packed(batch)[0]
    assert torch.equal(theirs, model.forward_packed(batch)[0])


def test_head_of_base(directory):
    """Beside an adapter without a head, that of a reward model stays."""
    save_reward_model(tiny_reward_model(), directory)
    file = saved(directory, adapted(base=load_reward_model(directory))) / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "lora" in name}, file)
    with_adapter, base = load_reward_model(directory, adapter=file.parent), load_reward_model(directory)
    assert torch.equal(with_adapter.score.weight, base.score.weight)


def test_same_head(directory):
    """A new head is drawn before the adapters: it is the same without them."""
    heads = []
    for rank in (0, 4):
        torch.manual_seed(0)
        prepare = partial(add_adapters, lora=LoRASection(rank))
        heads.append(new_reward_model(directory, prepare=prepare).score.weight)
    assert torch.equal(*heads)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type LORA, r, lora_alpha and a list of target_modules are needed"),
        ({"target_modules": "all-linear"}, "a list of target_modules"),
        ({"alpha_pattern": {"q_proj": 8}}, "an alpha per layer, is not known here"),
        ({"target_modules": ["q_proj"]}, "has no place in this model; it is of other layers"),
        ({"r": 2}, r"is \(4, "),
    ],
)
def test_unknown_adapter(directory, change, says):
    """What would change the numbers and is not known is told in one line."""
    file = saved(directory, adapted()) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=says):
        load_model(directory, adapter=file.parent)


def test_other_base(directory):
    """An adapter that was trained on other weights is refused, and its base named."""
    adapter = saved(directory, adapted())
    save_model(tiny_model(seed=1), directory)
    with pytest.raises(UserError, match="trained on other weights; give its base, the/base"):
        load_model(directory, adapter=adapter)
