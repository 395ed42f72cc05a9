"""Sampling: the cache changes nothing, and draws follow the stated distribution."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from families import FAMILIES
from minidpo.data.tokenizer import Tokenizer
from minidpo.model import Sampling, generate, load_model
from minidpo.model.generate import draw
from tiny import EOS, tiny_model

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
GREEDY = Sampling(max_new_tokens=12, temperature=0)
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16], [20, 21]]


@pytest.mark.parametrize(
    ("batch_size", "family"), [(1, "llama"), (2, "llama"), *((64, family) for family in FAMILIES)]
)
def test_cache(batch_size, family):
    """Greedy tokens are those that a whole forward pass per token gives, with any prompts beside."""
    model = tiny_model(**FAMILIES[family])
    responses = generate(model, PROMPTS, GREEDY, eos_id=None, batch_size=batch_size)
    for prompt, response in zip(PROMPTS, responses, strict=True):
        text = list(prompt)
        for _ in range(12):
            text.append(model(torch.tensor([text]))[0, -1].argmax().item())
        assert response == text[len(prompt) :]


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/models/stories260k")
def test_published_story():
    """Greedy decoding writes it word for word."""
    published = (STORIES / "expected.md").read_text().split("\n\n", 1)[1]
    published = "\n".join(line.strip() for line in published.strip().splitlines())
    tokenizer = Tokenizer.from_pretrained(STORIES)
    tokens = generate(load_model(STORIES), [tokenizer.encode("")], Sampling(300, 0.0), tokenizer.eos_id)[0]
    assert tokenizer.decode(tokens).strip().startswith(published)


@pytest.mark.parametrize("ends", [{EOS}, {EOS, 5, 9}])
def test_end(ends):
    """A response ends with its first EOS, of which there may be several, or at the limit of 20 tokens."""
    responses = generate(tiny_model(), [[5, 6]] * 64, Sampling(20, temperature=3.0), ends, seed=1)
    assert {r[-1] for r in responses} >= ends
    assert all(not ends & {*r[:-1]} and (r[-1] in ends or len(r) == 20) for r in responses)


def test_seed():
    """The same seed gives the same samples, and another one others."""
    one, same, other = (generate(tiny_model(), PROMPTS, Sampling(8), EOS, seed) for seed in (3, 3, 4))
    assert one == same != other


def frequencies(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """How often each token comes in 40,000 draws."""
    drawn = draw(logits.expand(40_000, 4), sampling, torch.Generator().manual_seed(0))
    return torch.bincount(drawn, minlength=4) / 40_000


def test_cold():
    """A temperature so low that logits / temperature would be infinite gives the likeliest token."""
    assert frequencies(torch.tensor([1.0, 2.0, 0.0, -1.0]), Sampling(temperature=1e-45))[1] == 1


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.5, [1]), (0.51, [0, 1]), (0.85, [0, 1, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p(top_p, kept):
    """Of probabilities 0.3, 0.5, 0.05, 0.15, which a temperature of 2 makes, the fewest tokens that reach the
    mass stay, in proportion: all of softmax(logits / 2) at 1. The tolerance is 4 standard errors."""
    probabilities = torch.tensor([0.3, 0.5, 0.05, 0.15], dtype=torch.float64)
    found = frequencies(2 * probabilities.log(), Sampling(temperature=2.0, top_p=top_p))
    assert found.nonzero()[:, 0].tolist() == kept
    expected = (probabilities / probabilities[kept].sum())[kept].float()
    assert_close(found[kept], expected, atol=0.01, rtol=0)


def test_refused():
    """An empty prompt, one that leaves no room in the model's 256 tokens, and settings out of range."""
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(tiny_model(), [[5], []], GREEDY, EOS)
    with pytest.raises(ValueError, match="exceed the model's 256"):
        generate(tiny_model(), [[5] * 250], GREEDY, EOS)
    for wrong in (dict(top_p=0.0), dict(max_new_tokens=0), dict(temperature=float("inf"))):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; it must be"):
            Sampling(**wrong)
