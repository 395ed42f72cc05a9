"""Small random models and pairs, and the naive computation that the packed one must equal."""

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor

from minidpo.data.tokenizer import TokenPair
from minidpo.logprobs import sequence_logps
from minidpo.model.reward_model import RewardModel
from minidpo.model.transformer import ModelConfig, Transformer, causal_attention
from minidpo.textbook import pad

BOS, EOS, VOCABULARY = 1, 2, 61

# Tensors this small run ten times faster on one thread than on two that share busy cores.
torch.set_num_threads(1)


def tiny_config(**over) -> ModelConfig:
    """Two layers, grouped queries, weights large enough that every part moves the logits."""
    fields = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return ModelConfig(**(fields | over))


def tiny_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, kind: type = Transformer, **over
) -> Transformer:
    """A random model of `tiny_config(**over)`, norms and biases included: one left out must show."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(tiny_config(**over))
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
    return model.to(dtype)


def tiny_reward_model(seed: int = 0, dtype: torch.dtype = torch.float32, **over) -> RewardModel:
    return tiny_model(seed, dtype, RewardModel, **over)


def random_pairs(rng: np.random.Generator, n: int, prompt=(1, 9), response=(1, 12)) -> list[TokenPair]:
    """Pairs of random ids, with lengths from closed ranges; responses end in EOS."""

    def ids(shortest: int, longest: int) -> list[int]:
        return rng.integers(EOS + 1, VOCABULARY, rng.integers(shortest, longest + 1)).tolist()

    shorter = (response[0] - 1, response[1] - 1)
    return [TokenPair(ids(*prompt), [*ids(*shorter), EOS], [*ids(*shorter), EOS], i) for i in range(n)]


def naive_logps(model: Transformer, pairs: list[TokenPair]) -> Tensor:
    """Summed log-probs (B, 2), chosen first: two padded rows per pair, all logits, a full log-softmax."""
    tokens, scored = pad([pair[:3] for pair in pairs])
    return sequence_logps(model(tokens), tokens, scored)[0].view(2, -1).T


def naive_rewards(model: RewardModel, pairs: list[TokenPair]) -> Tensor:
    """Rewards (B, 2), chosen first: the score of each text's last token, one unpadded row per text."""

    def reward(text: list[int]) -> Tensor:
        tokens, positions = torch.tensor([text]), torch.arange(len(text))
        hidden = model.hidden_states(tokens, positions, lambda q, k, v, layer: causal_attention(q, k, v))
        return hidden[0, -1] @ model.score.weight[0]

    rewards = [reward(pair.prompt + text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    return torch.stack(rewards).view(-1, 2)


def gradients(model: torch.nn.Module, value: Tensor) -> dict[str, Tensor]:
    """d value / d parameter, by name; zeros where a parameter has no part in it."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(value, parameters, materialize_grads=True, allow_unused=True)
    return dict(zip(names, grads, strict=True))


def relative_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest |left - right| / |right| of any parameter, in norms.

    A gradient below a tenth of all together counts as that tenth: where one vanishes by algebra (queries of a
    one-token text) only rounding is left of it.
    """
    tenth = torch.stack([grad.norm() for grad in right.values()]).norm() / 10
    return max(
        float((left[n] - grad).norm() / torch.maximum(grad.norm(), tenth)) for n, grad in right.items()
    )


def write_tokenizer(directory: Path, texts: list[str], vocabulary: int = 300) -> None:
    """Train a byte-level BPE tokenizer on `texts`; it puts <s> before a text and knows </s> as EOS."""
    core = tokenizers.ByteLevelBPETokenizer()
    special = ["<pad>", "<s>", "</s>"]
    core.train_from_iterator(texts, vocabulary, min_frequency=0, show_progress=False, special_tokens=special)
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    directory.mkdir(parents=True, exist_ok=True)
    core.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def edit_config(directory: Path, edit: Callable[[dict], None]) -> None:
    fields = json.loads((directory / "config.json").read_text())
    edit(fields)
    (directory / "config.json").write_text(json.dumps(fields))


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a forked child to its end; its exit status, negative for the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file can grow past `limit` bytes: a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
