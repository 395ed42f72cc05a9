"""A tokenizer of single characters, to be made as awkward as a test needs, and pairs to be cut by it."""

import tokenizers
from tokenizers import models, normalizers, processors

from minidpo.data import PreferencePair

EOS, BOS = 0, 1
LETTERS = "abcdefghij ▁"


def bpe(
    merges: list[tuple[str, str]] = (), bos: bool = False, prepend: bool = False, letters: str = LETTERS
) -> tokenizers.Tokenizer:
    """A character tokenizer with the given merges, to be made as awkward as a test needs."""
    vocab = {"</s>": EOS, "<s>": BOS}
    for token in [*letters, *(left + right for left, right in merges)]:
        vocab[token] = len(vocab)
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    core.add_special_tokens(["</s>", "<s>"])
    if prepend:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return core


def ids(text: str) -> list[int]:
    return [2 + LETTERS.index(letter) for letter in text]


def pair(prompt: str, chosen: str, rejected: str, index: int = 0) -> PreferencePair:
    return PreferencePair(prompt, chosen, rejected, index)
