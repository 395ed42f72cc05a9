"""The demo's world on disk, as real data and models are: HH-RLHF dialogues and a Hugging Face directory."""

import gzip
import json
import random
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers, trainers

from minidpo.data import read_preferences
from minidpo.files import write_json_lines
from minidpo.model import ModelConfig, Transformer, save_model
from minidpo.tools.demo.world import Question, sample_prompt, sample_record, split_questions

END_OF_TEXT = "<|endoftext|>"
# Qwen2's pattern without English contractions. Digits stay single tokens, so that sums can be learnt.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_world(
    directory: Path,
    seed: int = 0,
    sft_records: int = 8000,
    train_pairs: int = 6000,
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
    directory.mkdir(parents=True, exist_ok=True)
    train, test = split_questions(rng)

    def write_records(name: str, pool: list[Question], count: int, labelled: bool) -> None:
        records = (sample_record(rng, pool, train, labelled) for _ in range(count))
        lines = "".join(json.dumps(record) + "\n" for record in records)
        # mtime=0 keeps the time of writing out of the bytes.
        (directory / name).write_bytes(gzip.compress(lines.encode(), mtime=0))

    write_records("sft.jsonl.gz", train, sft_records, labelled=False)
    write_records("preferences.train.jsonl.gz", train, train_pairs, labelled=True)
    write_records("preferences.test.jsonl.gz", test, test_pairs, labelled=True)
    prompts: dict[str, None] = {}
    while len(prompts) < test_prompts:
        prompts[sample_prompt(rng, test, train)[0]] = None
    write_json_lines(directory / "prompts.test.jsonl", ({"prompt": prompt} for prompt in prompts))


def write_model(directory: Path, world: Path, seed: int = 0) -> None:
    """Write a Hugging Face directory: a tokenizer trained on the data in `world`, a small random Llama."""
    directory.mkdir(parents=True, exist_ok=True)
    # Byte-level BPE: its alphabet is all 256 bytes, so any text can be encoded.
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs = read_preferences(world / "sft.jsonl.gz")
    tokenizer.train_from_iterator((pair.prompt + pair.chosen for pair in pairs), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": END_OF_TEXT}
    (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )
    save_model(Transformer(config), directory)
