"""The cache changes nothing, the published story comes out, draws follow the stated distribution."""

from pathlib import Path

import pytest
import torch

from minidpo.data.tokenizer import Tokenizer
from minidpo.errors import UserError
from minidpo.model import Sampling, generate, load_model
from minidpo.model.generate import draw
from minidpo.tools.sample import main as sample
from tiny import EOS, tiny_model

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/models/stories260k")
GREEDY = Sampling(max_new_tokens=12, temperature=0)
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16], [20, 21]]


@needs_stories
def test_greedy_decoding():
    """It reproduces the published story word for word."""
    published = (STORIES / "expected.md").read_text().split("\n\n", 1)[1]
    published = "\n".join(line.strip() for line in published.strip().splitlines())
    tokenizer = Tokenizer.from_pretrained(STORIES)
    tokens = generate(load_model(STORIES), [tokenizer.encode("")], Sampling(300, 0.0), tokenizer.eos_id)[0]
    assert tokenizer.decode(tokens).strip().startswith(published)


def test_the_cache_gives_the_tokens_that_whole_forward_passes_give():
    model = tiny_model()
    for prompt, response in zip(PROMPTS, generate(model, PROMPTS, GREEDY, eos_id=None), strict=True):
        text = list(prompt)
        for _ in range(GREEDY.max_new_tokens):
            text.append(model(torch.tensor([text]))[0, -1].argmax().item())
        assert response == text[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batch_mates_and_their_padding_change_nothing(batch_size):
    together = generate(tiny_model(), PROMPTS, GREEDY, eos_id=None)
    assert together == generate(tiny_model(), PROMPTS, GREEDY, eos_id=None, batch_size=batch_size)


def test_a_response_ends_with_its_first_eos_or_at_the_limit():
    responses = generate(tiny_model(), [[5, 6]] * 64, Sampling(20, temperature=3.0), EOS, seed=1)
    ended = [r for r in responses if r[-1] == EOS]
    assert ended
    assert all(EOS not in r[:-1] for r in responses)
    assert all(len(r) == 20 for r in responses if r[-1] != EOS)


def test_the_same_seed_gives_the_same_samples_and_another_seed_others():
    one, same, other = (generate(tiny_model(), PROMPTS, Sampling(8), EOS, seed) for seed in (3, 3, 4))
    assert one == same != other


def test_frequencies_of_draws():
    """They are those of the softmax at that temperature."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    drawn = draw(logits.expand(40_000, 4), Sampling(temperature=2.0), torch.Generator().manual_seed(0))
    frequencies = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(frequencies, (logits / 2).softmax(-1), atol=0.01, rtol=0)  # 4 standard errors


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.5, {0}), (0.51, {0, 1}), (0.85, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(top_p, kept):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    drawn = draw(logits.expand(2000, 4), Sampling(top_p=top_p), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == kept


def test_what_cannot_be_continued_or_drawn_is_refused():
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(tiny_model(), [[5], []], GREEDY, EOS)
    with pytest.raises(ValueError, match="exceed the model's 256"):
        generate(tiny_model(), [[5] * 250], GREEDY, EOS)
    for wrong in (dict(top_p=0.0), dict(max_new_tokens=0), dict(temperature=float("inf"))):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; it must be"):
            Sampling(**wrong)


def test_sample_prints_the_responses(world, capsys):
    sample(["--model", str(world / "model"), "--human", "a cat", "--n", "2", "--max-new-tokens", "5"])
    assert capsys.readouterr().out.count("--- prompt 0") == 2
    with pytest.raises(UserError, match="temperature is -1"):
        sample(["--model", str(world / "model"), "--prompt", "a", "--temperature", "-1"])
