"""Small random models and pairs for the tests, and the naive computation that the packed one must equal."""

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
from minidpo.model.transformer import ModelConfig, Transformer
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


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **over) -> Transformer:
    """A random Transformer of `tiny_config(**over)`."""
    return _randomized(Transformer, seed, dtype, over)


def tiny_reward_model(seed: int = 0, dtype: torch.dtype = torch.float32, **over) -> RewardModel:
    """A random RewardModel of `tiny_config(**over)`."""
    return _randomized(RewardModel, seed, dtype, over)


def random_pairs(
    rng: np.random.Generator,
    n: int,
    prompt: tuple[int, int] = (1, 9),
    response: tuple[int, int] = (1, 12),
) -> list[TokenPair]:
    """Pairs of random ids with lengths drawn from closed ranges; responses end in EOS."""

    def ids(length: int) -> list[int]:
        return rng.integers(EOS + 1, VOCABULARY, length).tolist()

    def length(bounds: tuple[int, int]) -> int:
        return int(rng.integers(bounds[0], bounds[1] + 1))

    def one_response() -> list[int]:
        return [*ids(length(response) - 1), EOS]

    return [TokenPair(ids(length(prompt)), one_response(), one_response(), index) for index in range(n)]


def padded_rows(pairs: list[TokenPair]) -> tuple[Tensor, Tensor]:
    """The textbook's tokens (2B, T) and response_mask (2B, T): all chosen texts, then all rejected."""
    return pad([pair[:3] for pair in pairs])


def naive_logps(model: Transformer, pairs: list[TokenPair]) -> Tensor:
    """Summed log-probs (B, 2), chosen first: two padded rows per pair, all logits, a full log-softmax."""
    tokens, scored = padded_rows(pairs)
    return sequence_logps(model(tokens), tokens, scored)[0].view(2, -1).T


def naive_rewards(model: RewardModel, pairs: list[TokenPair]) -> Tensor:
    """Rewards (B, 2), chosen first: the score of each text's last token, one unpadded row per text."""
    return torch.stack([
        torch.stack([_score_of_last(model, pair.prompt + text) for text in (pair.chosen, pair.rejected)])
        for pair in pairs
    ])  # fmt: skip


def gradients(model: torch.nn.Module, value: Tensor) -> dict[str, Tensor]:
    """d value / d parameter, by name; zeros where a parameter has no part in it."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(value, parameters, materialize_grads=True, allow_unused=True)
    return dict(zip(names, grads, strict=True))


def relative_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest |left - right| / |right| of any parameter, in norms.

    A gradient below a tenth of the whole counts as that tenth: where one vanishes by algebra (queries
    of a one-token text) only rounding is left of it.
    """
    whole = float(torch.stack([grad.norm() for grad in right.values()]).norm())
    sizes = {name: max(float(grad.norm()), whole / 10) for name, grad in right.items()}
    return max(float((left[name] - right[name]).norm()) / size for name, size in sizes.items())


def write_tokenizer(directory: Path, texts: list[str], vocabulary: int = 300) -> None:
    """Train a byte-level BPE tokenizer on `texts`; it puts <s> before a text and knows </s> as EOS."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    directory.mkdir(parents=True, exist_ok=True)
    core.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | names
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def edit_config(directory: Path, edit: Callable[[dict], None]) -> None:
    fields = json.loads((directory / "config.json").read_text())
    edit(fields)
    (directory / "config.json").write_text(json.dumps(fields))


def _randomized(kind: type, seed: int, dtype: torch.dtype, over: dict):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(tiny_config(**over))
        for name, parameter in model.named_parameters():  # ones and zeros would hide a norm or bias left out
            if name.endswith(("norm.weight", "bias")):
                torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
    return model.to(dtype)


def _score_of_last(model: RewardModel, text: list[int]) -> Tensor:
    tokens = torch.tensor(text)
    positions = torch.arange(len(text))

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:  # plain causal attention, spelled out
        k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
        scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(len(q), len(k)).triu(1).bool(), -torch.inf)
        return torch.einsum("hqk,khe->qhe", scores.softmax(-1), v)

    hidden = model.hidden_states(tokens, positions, attend)
    return hidden[-1] @ model.score.weight[0]


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
