"""Five pairs, and what the scripts compute from them done the plain way.

Two padded rows per pair, all logits, a full log-softmax, float64: nothing is shared with the packed rows,
their tokens, their micro-batches or the loss functions. All five pairs are one batch in the tests that
use them, so the order in which a run draws its pairs plays no part either.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minidpo.model import RewardModel
from tiny import EOS, tiny_reward_model

PAIRS = [  # prompt, chosen, rejected, margin
    ("a cat?", " yes", " no it was the dog and then the dog runs", 0.5),
    ("the dog runs well?", " maybe it runs", " no", 0.0),
    ("yes?", " the cat sleeps and then it runs badly", " maybe", 1.5),
    ("was it good?", " it was good and then it was well", " no it was the cat", 0.25),
    ("and then the cat runs and the dog sleeps?", " yes it runs", " no it sleeps and it sleeps", 1.0),
]
MARGINS = torch.tensor([margin for *_, margin in PAIRS], dtype=torch.float64)
Ids = list[tuple[list[int], list[int], list[int]]]  # of each pair: prompt, chosen, rejected


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


def pair_ids(model_directory: Path) -> Ids:
    """The token ids of PAIRS: BOS and the prompt, then what the response adds, then EOS."""
    encode = tokenizers.Tokenizer.from_file(str(model_directory / "tokenizer.json")).encode
    ids = []
    for prompt, chosen, rejected, _ in PAIRS:
        before = encode(prompt).ids
        responses = [encode(prompt + response).ids[len(before) :] + [EOS] for response in (chosen, rejected)]
        ids.append((before, *responses))
    return ids


def saved_weights(model_directory: Path) -> dict[str, Tensor]:
    return load_file(model_directory / "model.safetensors")


def model_of(weights: dict[str, Tensor]) -> RewardModel:
    """A float64 model that holds `weights`; what they lack (a head that the run does not have) is random."""
    model = tiny_reward_model(vocab_size=300)
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model.double()


def padded_values(model: RewardModel, ids: Ids) -> Values:
    """Log-probs, lengths and rewards of all responses, from two padded rows per pair."""
    texts = [(p, chosen) for p, chosen, _ in ids] + [(p, rejected) for p, _, rejected in ids]
    tokens = pad_sequence([torch.tensor(p + response) for p, response in texts], batch_first=True)  # (2B, T)
    last_hidden: list[Tensor] = []
    with model.model.norm.register_forward_hook(lambda module, inputs, output: last_hidden.append(output)):
        logits = model(tokens)  # (2B, T, V)

    # The logits at t - 1 predict token t.
    logps = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)  # (2B, T - 1)
    sums, rewards = [], []
    for row, (prompt, response) in enumerate(texts):
        end = len(prompt) + len(response)
        sums.append(logps[row, len(prompt) - 1 : end - 1].sum())
        rewards.append(last_hidden[0][row, end - 1] @ model.score.weight[0])

    def by_pair(values: list[Tensor]) -> Tensor:  # the first B rows are chosen, the others rejected
        return torch.stack(values).view(2, -1).T

    lengths = [torch.tensor(len(response)) for _, response in texts]
    return Values(by_pair(sums), by_pair(lengths), by_pair(rewards))


def chosen_minus_rejected(values: Tensor) -> Tensor:
    """(B, 2) -> (B,)."""
    return values[:, 0] - values[:, 1]
