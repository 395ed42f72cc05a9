"""What only a GPU can show; skipped without one. Start here on a new kind of GPU:

pytest tests/gpu
"""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

import train_dpo
import train_rm
from minidpo.data import PairTokens
from minidpo.logprobs import token_logps
from minidpo.model import Transformer, response_logps
from minidpo.model import attention as attention_module
from minidpo.packing import pack
from minidpo.training.device import autocast
from tiny import random_pairs, tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def logps_and_gradients(attention: str, dtype: str, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Log-probs of the responses in a row of about that many tokens, and the gradient of every weight."""
    attention_module.KINDS.update(dict.fromkeys(attention_module.KINDS, attention))
    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=head, hidden_size=4 * head)
    model = Transformer(tiny_config(**heads, initializer_range=0.05, max_position_embeddings=512)).to(CUDA)
    sizes = (20, 60), (20, 60)
    pairs = PairTokens.from_pairs(random_pairs(np.random.default_rng(0), max(2, tokens // 120), *sizes))
    with autocast(CUDA, dtype):
        logps = response_logps(model, pack(pairs).to(CUDA))
    logps.square().sum().backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("tokens", [2560, 301])
@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize(("kind", "dtype"), [("flash", "bf16"), ("flex", "fp32"), ("flex", "bf16")])
def test_attention(monkeypatch, kind, dtype, head, tokens):
    """FlashAttention and the compiled FlexAttention give what SDPA per piece gives, in backward too."""
    for each in (torch.bfloat16, torch.float32):
        monkeypatch.setitem(attention_module.KINDS, each, kind)  # so that the changes below are undone
    one_call, sdpa = (logps_and_gradients(each, dtype, head, tokens) for each in (kind, "sdpa"))
    for ours, expected in zip(one_call, sdpa, strict=True):
        # bf16: q, k and v are rounded to 8 bits in one of the two.
        worst = (ours - expected).abs().max() / expected.abs().max()
        assert ours.isfinite().all() and worst < (1e-3 if dtype == "fp32" else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_layer(dtype):
    """The compiled output layer, in one chunk and in three, agrees with a CPU."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(301, 64), torch.randn(1001, 64) / 8, torch.randint(0, 1001, (301,))
    found = []
    for device, chunk in (("cpu", 301), ("cuda", 301), ("cuda", 110)):
        h, w = (values.to(device, copy=True).requires_grad_() for values in (hidden, weight))
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logps = token_logps(h, w, targets.to(device), chunk)
        logps.sum().backward()
        found.append([values.detach().float().cpu() for values in (logps, h.grad, w.grad)])
    for ours in found[1:]:
        for values, expected in zip(ours, found[0], strict=True):
            worst = (values - expected).abs().max() / expected.abs().max()
            assert worst < (1e-4 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize(
    "setting", ["run.attention=auto", "run.attention=flex", "run.attention=sdpa", "run.compile=false"]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("script", [train_dpo, train_rm])
def test_runs(config, script, tmp_path, dtype, setting):
    """Ten steps on a GPU: the held-out loss falls, the peak is logged, and a run that stops halfway resumes."""
    arguments = config(run__dtype=f'"{dtype}"', run__device='"cuda"', optim__lr=1e-2, optim__epochs=2)
    arguments.append(f"--{setting}")
    script.main([*arguments, "--optim.max_steps=5"])
    script.main([*arguments, "--optim.max_steps=10"])
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    assert max(held_out) == 10 and held_out[10] < held_out[0]
    assert all(line["peak_memory_gb"] > 0 for line in lines if "loss" in line)


def test_nothing_waits(config, monkeypatch):
    """Within a micro-batch the CPU never waits for the GPU: PyTorch's own check is silent."""
    real = train_dpo.pair_logps

    def checked(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    train_dpo.main(config(run__device='"cuda"', optim__max_steps=1))  # Compiling may wait.
    monkeypatch.setattr(train_dpo, "pair_logps", checked)
    train_dpo.main(config(run__device='"cuda"', optim__max_steps=3))
