"""The decoder against its formulas, and against transformers on every supported family."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from minidpo.data import PairTokens
from minidpo.model import load_model, response_logps, save_model
from minidpo.model.transformer import Llama3Rope, RMSNorm, Transformer, rotary_frequencies, rotate
from minidpo.packing import pack
from tiny import gradients, random_pairs, relative_difference, tiny_config, tiny_model

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"

# Such that all three regimes of Llama 3's scaling occur among the few frequencies of a tiny head.
LLAMA3 = Llama3Rope(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
BIASED = dict(qkv_bias=True, output_bias=True)
FAMILIES = {
    "llama": {},
    "llama without grouped queries": dict(num_key_value_heads=4),
    "llama tied": dict(tie_word_embeddings=True),
    "llama attention_bias": BIASED,
    "llama mlp_bias": dict(mlp_bias=True),
    "llama explicit head_dim": dict(head_dim=12),
    "llama rope_theta": dict(rope_theta=500.0, rms_norm_eps=1e-3),
    "llama3 rope": dict(rope_scaling=LLAMA3, rope_theta=1000.0, head_dim=16),
    "mistral": dict(model_type="mistral"),
    "mistral window not reached": dict(model_type="mistral", sliding_window=64),
    "qwen2": dict(model_type="qwen2", qkv_bias=True),
    "qwen2 tied": dict(model_type="qwen2", qkv_bias=True, tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", qk_norm=True, head_dim=16),
    "qwen3 tied attention_bias": dict(model_type="qwen3", qk_norm=True, tie_word_embeddings=True, **BIASED),
}


def test_rms_norm_equals_its_formula():
    norm = RMSNorm(6, eps=0.1).double()
    norm.weight.data = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-14, atol=1e-14)


def test_rms_norm_under_autocast_rounds_only_its_result():
    norm, x = RMSNorm(64, eps=1e-5), torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low = norm(x)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, norm(x).bfloat16())


def test_rotation_turns_coordinate_pairs_by_position_times_frequency():
    model = tiny_model(dtype=torch.float64)
    theta, size = model.config.rope_theta, model.config.head_dim
    heads = torch.randn(5, 4, size, dtype=torch.float64)
    positions = torch.tensor([0, 1, 7, 2, 2])
    rotated = rotate(heads, *model.model.rotation(positions))
    for t, position in enumerate(positions.tolist()):
        for i in range(size // 2):
            angle = torch.tensor(position * theta ** (-2 * i / size), dtype=torch.float64)
            turn = torch.polar(torch.ones((), dtype=torch.float64), angle)
            pair = torch.complex(heads[t, :, i], heads[t, :, i + size // 2]) * turn
            torch.testing.assert_close(rotated[t, :, i], pair.real)
            torch.testing.assert_close(rotated[t, :, i + size // 2], pair.imag)


def test_rotated_products_depend_on_distance_alone():
    model = tiny_model(dtype=torch.float64)
    q, k = torch.randn(2, 1, 4, model.config.head_dim, dtype=torch.float64)

    def product(query_position: int, key_position: int) -> torch.Tensor:
        at_query = rotate(q, *model.model.rotation(torch.tensor([query_position])))
        return (at_query * rotate(k, *model.model.rotation(torch.tensor([key_position])))).sum(-1)

    torch.testing.assert_close(product(9, 4), product(105, 100))
    assert not torch.allclose(product(9, 4), product(9, 5))


def test_llama3_scaling_leaves_fast_frequencies_and_divides_slow_ones():
    config = tiny_config(head_dim=16, rope_theta=1000.0)
    plain = rotary_frequencies(config, torch.device("cpu"), torch.float64)
    config = tiny_config(head_dim=16, rope_theta=1000.0, rope_scaling=LLAMA3)
    scaled = rotary_frequencies(config, torch.device("cpu"), torch.float64)
    turns = 64 * plain / (2 * torch.pi)
    assert torch.equal(scaled[turns >= 4], plain[turns >= 4])
    torch.testing.assert_close(scaled[turns <= 1], plain[turns <= 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert (turns >= 4).any() and between.any() and (turns <= 1).any()
    assert (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / 8).all()


def test_nothing_is_random_in_train_mode():
    model = tiny_model().train()
    tokens = torch.randint(0, model.config.vocab_size, (3, 20))
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(model(tokens), model.eval()(tokens))


def test_later_tokens_do_not_change_earlier_logits():
    model = tiny_model()
    tokens = torch.randint(0, model.config.vocab_size, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % model.config.vocab_size
    logits, logits_of_changed = model(tokens), model(changed)
    torch.testing.assert_close(logits[:, :12], logits_of_changed[:, :12], rtol=0, atol=1e-6)
    assert (logits[:, 12:] - logits_of_changed[:, 12:]).abs().max() > 0.1


def test_activation_checkpointing_changes_no_value_and_no_gradient():
    model = tiny_model()
    tokens = torch.randint(0, model.config.vocab_size, (2, 12))
    results = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        logits = model(tokens)
        logits.square().mean().backward()
        results.append((logits, [p.grad.clone() for p in model.parameters()]))
    (plain, plain_grads), (checkpointed, checkpointed_grads) = results
    assert torch.equal(plain, checkpointed)
    for left, right in zip(plain_grads, checkpointed_grads, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_compiled_layers_change_nothing_but_rounding(monkeypatch):
    # The graphs as torch.compile captures them, run without generating C++ for a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = tiny_model(), tiny_model()
    compiled.compile_layers()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for seed, n in ((0, 3), (1, 5)):  # rows of different shapes through one compilation
        pairs = PairTokens.from_pairs(random_pairs(np.random.default_rng(seed), n))
        row = pack(pairs)
        expected, logps = response_logps(plain, row), response_logps(compiled, row)
        torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
        difference = relative_difference(gradients(compiled, logps.mean()), gradients(plain, expected.mean()))
        assert difference < 1e-5


def test_text_longer_than_the_model_was_made_for_is_refused():
    for over in (dict(max_position_embeddings=8), dict(model_type="mistral", sliding_window=8)):
        model = tiny_model(**over)
        model(torch.zeros(1, 8, dtype=torch.int64))
        with pytest.raises(ValueError, match="9 tokens; this model takes 8"):
            model(torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, tmp_path):
    model = tiny_model(seed=3, **FAMILIES[name])
    save_model(model, tmp_path)
    assert_logits_equal_transformers(model, tmp_path)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_directories_written_by_transformers_load_with_equal_logits(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes, initializer_range=0.2)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path)
    assert_logits_equal_transformers(load_model(tmp_path), tmp_path)


def test_stories260k_logits_equal_transformers():
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not there")
    assert_logits_equal_transformers(load_model(STORIES), STORIES)


def assert_logits_equal_transformers(model: Transformer, directory: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.randint(0, model.config.vocab_size, (3, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(tokens), peer(tokens).logits
    assert ours.std() > 0.1  # else equality would prove little
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
