"""The decoder against its formulas, and against transformers for every supported family."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from minidpo.data import PairTokens
from minidpo.model import load_model, response_logps, save_model
from minidpo.model.transformer import Llama3Rope, RMSNorm, rotary_frequencies, rotate
from minidpo.packing import pack
from tiny import gradients, random_pairs, relative_difference, tiny_config, tiny_model

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
TOKENS = torch.randint(0, 61, (3, 50), generator=torch.Generator().manual_seed(1))


def test_rms_norm():
    """x = (3, 4): the mean square is 12.5; with eps = 3.5 the divisor is sqrt(16) = 4. Weights 1 and 2."""
    norm = RMSNorm(2, eps=3.5)
    norm.weight.data = torch.tensor([1.0, 2.0])
    assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([0.75, 2.0]))


def test_rms_norm_under_autocast():
    """Only the result is rounded to bf16."""
    norm, x = RMSNorm(64, eps=1e-5), torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low = norm(x)
    assert low.dtype == torch.bfloat16 and torch.equal(low, norm(x).bfloat16())


def test_rotation():
    """A head of 4 with theta = 100 has frequencies 1 and 100^(-2/4) = 0.1: at position 2 the coordinates
    (0, 2) turn by 2 radians and (1, 3) by 0.2, so (1, 0, 0, 1) becomes (cos 2, -sin 0.2, sin 2, cos 0.2)."""
    model = tiny_model(dtype=torch.float64, head_dim=4, rope_theta=100.0)
    head = torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)
    rotated = rotate(head, *model.model.rotation(torch.tensor(2)))[0]
    two, fifth = torch.tensor([2, 0.2], dtype=torch.float64)
    expected = torch.stack((two.cos(), -fifth.sin(), two.sin(), fifth.cos()))
    assert_close(rotated, expected, rtol=1e-14, atol=0)


def test_llama3_rope():
    """Over 63 positions frequency f makes 63 f / 2 pi turns: 10.027, 1.003 and 0.1. More than 4 keep f, fewer
    than 0.5 give f / 8; 1.003 keeps (1.003 - 0.5) / (4 - 0.5) = 0.1436: 0.1436 * 0.1 + 0.8564 * 0.1 / 8."""
    scaling = Llama3Rope(8.0, low_freq_factor=0.5, high_freq_factor=4.0, original_max_position_embeddings=63)
    config = tiny_config(head_dim=6, rope_theta=1000.0, rope_scaling=scaling)
    frequencies = rotary_frequencies(config, torch.device("cpu"), torch.float64)
    assert frequencies.tolist() == pytest.approx([1, 0.025067, 0.01 / 8], rel=1e-4)


def test_nothing_is_random():
    """There is no dropout, even in train mode."""
    model = tiny_model().train()
    logits = model(TOKENS)
    assert torch.equal(logits, model(TOKENS)) and torch.equal(logits, model.eval()(TOKENS))


def test_activation_checkpointing():
    """It changes no value and no gradient."""
    plain, model = tiny_model(), tiny_model()
    model.activation_checkpointing = True
    assert torch.equal(model(TOKENS), plain(TOKENS))
    ours, theirs = (gradients(m, m(TOKENS).square().mean()) for m in (model, plain))
    assert relative_difference(ours, theirs) < 1e-6


@pytest.mark.slow
def test_compiled_layers(monkeypatch):
    """torch.compile changes nothing but rounding; one compilation serves rows of different lengths."""
    # The graphs as torch.compile captures them, run without generating C++ for a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = tiny_model(), tiny_model()
    compiled.compile_layers()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for n in (3, 5):
        row = pack(PairTokens.from_pairs(random_pairs(np.random.default_rng(n), n)))
        expected, logps = response_logps(plain, row), response_logps(compiled, row)
        assert_close(logps, expected, rtol=1e-5, atol=1e-5)
        assert (
            relative_difference(gradients(compiled, logps.mean()), gradients(plain, expected.mean())) < 1e-5
        )


@pytest.mark.parametrize("limit", [dict(max_position_embeddings=8), dict(sliding_window=8)])
def test_too_long(limit):
    """A text longer than the model was made for is refused."""
    model = tiny_model(model_type="mistral", **limit)
    model(TOKENS[:, :8])
    with pytest.raises(ValueError, match="9 tokens; this model takes 8"):
        model(TOKENS[:, :9])


# All three regimes of Llama 3's scaling occur among the frequencies of these heads.
LLAMA3 = Llama3Rope(8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
FAMILIES = {
    "llama": {},
    "llama, a key head per query head": dict(num_key_value_heads=4),
    "llama biases": dict(qkv_bias=True, output_bias=True, mlp_bias=True),
    "llama other numbers": dict(head_dim=12, rope_theta=500.0, rms_norm_eps=1e-3),
    "llama 3": dict(rope_scaling=LLAMA3, rope_theta=1000.0, head_dim=16),
    "mistral, window not reached": dict(model_type="mistral", sliding_window=64),
    "qwen2": dict(model_type="qwen2", qkv_bias=True),
    "qwen3": dict(model_type="qwen3", qk_norm=True, head_dim=16),
    "qwen3 tied, biases": dict(
        model_type="qwen3", qk_norm=True, tie_word_embeddings=True, qkv_bias=True, output_bias=True
    ),
}


def require_equal_logits(directory: Path) -> None:
    """load_model and transformers give the same logits."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = load_model(directory)
    assert peer.state_dict().keys() - model.state_dict().keys() <= {"lm_head.weight"}  # a tied copy
    with torch.no_grad():
        ours, theirs = model(TOKENS), peer(TOKENS).logits
    assert ours.std() > 0.1  # else equality would prove little
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_directories(family, tmp_path):
    """What minidpo writes, transformers opens as the same model."""
    save_model(tiny_model(seed=3, **FAMILIES[family]), tmp_path)
    require_equal_logits(tmp_path)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_their_directories(family, tmp_path):
    """What transformers writes, minidpo opens as the same model."""
    transformers = pytest.importorskip("transformers")
    sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    sizes += "num_key_value_heads head_dim max_position_embeddings initializer_range".split()
    config = {name: getattr(tiny_config(), name) for name in sizes}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config))
    model.save_pretrained(tmp_path)
    require_equal_logits(tmp_path)


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/models/stories260k")
def test_stories260k():
    """A published model."""
    require_equal_logits(STORIES)
