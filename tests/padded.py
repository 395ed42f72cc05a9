"""Five pairs, and what the scripts compute from them done the plain way.

Two padded rows per pair, all logits, float64: nothing is shared with the packed rows, their tokens, their
micro-batches or the loss functions. All five pairs are one batch in the tests that use them, so the order in
which a run draws its pairs plays no part either.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor

from minidpo.data import TokenPair
from minidpo.model import RewardModel
from tiny import EOS, naive_logps, naive_rewards, tiny_reward_model

PAIRS = [  # prompt, chosen, rejected, margin
    ("a cat?", " yes", " no it was the dog and then the dog runs", 0.5),
    ("the dog runs well?", " maybe it runs", " no", 0.0),
    ("yes?", " the cat sleeps and then it runs badly", " maybe", 1.5),
    ("was it good?", " it was good and then it was well", " no it was the cat", 0.25),
    ("and then the cat runs and the dog sleeps?", " yes it runs", " no it sleeps and it sleeps", 1.0),
]
MARGINS = torch.tensor([margin for *_, margin in PAIRS], dtype=torch.float64)


class Values(NamedTuple):
    """Of both responses of B pairs, chosen first."""

    logps: Tensor  # (B, 2) nats, summed over the response
    lengths: Tensor  # (B, 2) scored tokens, EOS included
    rewards: Tensor  # (B, 2) of the reward head


def write_pairs(file: Path, pairs: Iterable[tuple] = PAIRS) -> str:
    """Writes a preference file; returns the value of data.train or data.eval that names it."""
    names = ("prompt", "chosen", "rejected", "margin")
    file.write_text("".join(json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in pairs))
    return f'["{file}"]'


def pair_ids(model_directory: Path) -> list[TokenPair]:
    """The token ids of PAIRS: BOS and the prompt, then what the response adds, then EOS."""
    encode = tokenizers.Tokenizer.from_file(str(model_directory / "tokenizer.json")).encode
    ids = []
    for index, (prompt, chosen, rejected, _) in enumerate(PAIRS):
        before = encode(prompt).ids
        responses = [encode(prompt + response).ids[len(before) :] + [EOS] for response in (chosen, rejected)]
        ids.append(TokenPair(before, *responses, index))
    return ids


def saved_weights(model_directory: Path) -> dict[str, Tensor]:
    return load_file(model_directory / "model.safetensors")


def model_of(weights: dict[str, Tensor]) -> RewardModel:
    """A float64 model that holds `weights`; what they lack (a head that the run does not have) is random."""
    model = tiny_reward_model(vocab_size=300)
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model.double()


def padded_values(model: RewardModel, pairs: list[TokenPair]) -> Values:
    """Log-probs, lengths and rewards of all responses."""
    lengths = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    return Values(naive_logps(model, pairs), lengths, naive_rewards(model, pairs))
