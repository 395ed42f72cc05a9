"""The demo's world on disk, as real data and models are: HH-RLHF dialogues and a Hugging Face directory."""

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from minidpo.commands.world import sample_prompt, sample_record, split_questions
from minidpo.data import read_preferences
from minidpo.model import ModelConfig, Transformer
from minidpo.weights import save_model

END_OF_TEXT = "<|endoftext|>"
# Qwen2's pattern without English contractions: digits stay single, so that sums can be learnt.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_world(
    directory: str | Path,
    seed: int = 0,
    sft_records: int = 8000,
    train_pairs: int = 4000,
    test_pairs: int = 500,
    test_prompts: int = 150,
) -> None:
    """Write the data; equal arguments give equal bytes.

    sft.jsonl.gz                records whose `chosen` is any draw: training on it alone learns the mix
    preferences.train.jsonl.gz  records labelled by Bradley-Terry under r*
    preferences.test.jsonl.gz   the same about questions that are in neither file above
    prompts.test.jsonl          {"prompt": ...}, distinct prompts that ask such questions
    """
    rng = random.Random(seed)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    train, test = split_questions(rng)
    for name, pool, count in (
        ("sft", train, sft_records),
        ("preferences.train", train, train_pairs),
        ("preferences.test", test, test_pairs),
    ):
        records = [sample_record(rng, pool, train, labelled=name != "sft") for _ in range(count)]
        # Without mtime the time of writing would be in the bytes.
        (directory / f"{name}.jsonl.gz").write_bytes(gzip.compress(json_lines(records).encode(), mtime=0))
    prompts: dict[str, None] = {}
    while len(prompts) < test_prompts:
        prompts[sample_prompt(rng, test, train)[0]] = None
    (directory / "prompts.test.jsonl").write_text(json_lines({"prompt": prompt} for prompt in prompts))


def json_lines(records: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_model(directory: str | Path, world: str | Path, seed: int = 0) -> None:
    """Write a Hugging Face directory: a tokenizer trained on the data in `world`, a small random Llama."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pairs = list(read_preferences(Path(world) / "sft.jsonl.gz"))
    tokenizer = train_tokenizer((pair.prompt + pair.chosen for pair in pairs), vocab_size=768)
    tokenizer.save(str(directory / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": END_OF_TEXT}
    (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )
    save_model(Transformer(config), directory)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: it begins with all 256 bytes, so any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
