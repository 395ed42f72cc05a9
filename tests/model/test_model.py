"""The decoder against its formulas, and against transformers for every supported family."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from families import FAMILIES, GRANITE, OLMO2, SMOLLM3
from minidpo.data import PairTokens
from minidpo.model import RewardModel, Transformer, load_model, response_logps, save_model
from minidpo.model.rotary import Llama3Rope, LongRope, YarnRope, rotary_frequencies, rotate
from minidpo.model.transformer import RMSNorm
from minidpo.packing import pack
from tiny import gradients, naive_logps, random_pairs, relative_difference, tiny_config, tiny_model

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
TOKENS = torch.randint(0, 61, (3, 50), generator=torch.Generator().manual_seed(1))


def test_new_model():
    """Weights are drawn with a standard deviation of initializer_range, here 0.2; norms are 1 and biases 0."""
    for name, values in Transformer(tiny_config(**FAMILIES["llama biases"])).named_parameters():
        if values.ndim == 2:
            assert values.std().item() == pytest.approx(0.2, rel=0.2)
        else:
            assert (values == (0 if name.endswith("bias") else 1)).all()


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
    frequencies = rotary_frequencies(6, 1000.0, scaling, torch.device("cpu"), torch.float64)
    assert frequencies.tolist() == pytest.approx([1, 0.025067, 0.01 / 8], rel=1e-4)


def test_yarn():
    """Over 100 positions frequency 2^-i makes 100 / (2 pi 2^i) = 15.9, 8.0, 4.0 and 2.0 turns. 9 turns lie at
    i = 0.8 and 2.5 at i = 2.7, rounded outwards 0 and 3: between them the share that is divided by 4 rises in
    thirds, and f becomes f (1 - 3/4 share). Queries and keys grow by 0.1 ln 4 + 1."""
    scaling = YarnRope(4.0, original_max_position_embeddings=100, beta_fast=9.0, beta_slow=2.5)
    frequencies = rotary_frequencies(8, 16.0, scaling, torch.device("cpu"), torch.float64)
    assert frequencies.tolist() == pytest.approx([1, 0.5 * 0.75, 0.25 * 0.5, 0.125 * 0.25])
    assert scaling.magnitude == pytest.approx(1.138629)
    # 32 turns would lie at i = -1.0 and 0.01 at 10.6: the ramp ends at 0 and at D - 1 = 7, and rises in sevenths.
    scaling = YarnRope(4.0, original_max_position_embeddings=100, beta_slow=0.01)
    shares = torch.arange(4) / 7
    frequencies = rotary_frequencies(8, 16.0, scaling, torch.device("cpu"), torch.float64)
    assert_close(frequencies, 0.5 ** torch.arange(4) * (1 - 0.75 * shares), check_dtype=False)
    assert YarnRope(0.5, 64).magnitude == LongRope(0.5, 64, (), ()).magnitude == 1  # nothing is stretched


def test_granite():
    """Its four multipliers are those of Llama's weights; the scale of heads of 8 would be 1 / sqrt(8). Logits
    are divided, rewards are not."""
    granite, llama = (tiny_model(dtype=torch.float64, kind=RewardModel, **family) for family in (GRANITE, {}))
    part = {"embed_tokens": 3.0, "q_proj": 0.2 * 8**0.5, "o_proj": 0.4, "down_proj": 0.4, "lm_head": 1 / 1.7}
    with torch.no_grad():
        for name, weight in llama.named_parameters():
            weight *= part.get(name.split(".")[-2], 1)
    assert_close(granite(TOKENS), llama(TOKENS))
    row = pack(PairTokens.from_pairs(random_pairs(np.random.default_rng(0), 3)))
    assert_close(granite.forward_packed(row)[0], llama.forward_packed(row)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed(family):
    """A packed row has the log-probs and gradients of padded rows, and every parameter takes part."""
    model = tiny_model(dtype=torch.float64, **FAMILIES[family])
    pairs = random_pairs(np.random.default_rng(0), 3)
    ours, naive = response_logps(model, pack(PairTokens.from_pairs(pairs))), naive_logps(model, pairs)
    assert_close(ours, naive, rtol=1e-11, atol=1e-11)
    of_ours, of_naive = (gradients(model, logps[:, 0].sum()) for logps in (ours, naive))
    assert relative_difference(of_ours, of_naive) < 1e-11 and all(grad.any() for grad in of_ours.values())


@pytest.mark.parametrize("family", ["llama", "olmo2", "granite"])
def test_activation_checkpointing(family):
    """It changes no value and no gradient."""
    plain, model = tiny_model(**FAMILIES[family]), tiny_model(**FAMILIES[family])
    model.activation_checkpointing = True
    assert torch.equal(model(TOKENS), plain(TOKENS))
    ours, theirs = (gradients(m, m(TOKENS).square().mean()) for m in (model, plain))
    assert relative_difference(ours, theirs) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [{}, OLMO2, SMOLLM3 | GRANITE], ids=["llama", "olmo2", "smollm3 + granite"]
)
def test_compiled_layers(monkeypatch, family):
    """torch.compile changes nothing but rounding; one compilation serves rows of different lengths."""
    # The graphs as torch.compile captures them, run without generating C++ for a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = tiny_model(**family), tiny_model(**family)
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


def require_equal_logits(directory: Path) -> None:
    """load_model and transformers give the same logits."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = load_model(directory)
    # Nothing of the file is left out; a tied copy counts as used.
    assert peer.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        ours, theirs = model(TOKENS), peer(TOKENS).logits
    assert ours.std() > 0.1  # else equality would prove little
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_directories(family, tmp_path):
    """What is saved is loaded, every field and every number, and transformers opens it as the same model."""
    model = tiny_model(seed=3, **FAMILIES[family])
    save_model(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and torch.equal(loaded(TOKENS), model(TOKENS))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    require_equal_logits(tmp_path)


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/models/stories260k")
def test_stories260k():
    """A published model."""
    require_equal_logits(STORIES)
