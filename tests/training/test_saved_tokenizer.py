"""Tokens that must agree: EOS and pad of final/ with what was trained, a reference's ids with the model's."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from minidpo.data import Tokenizer
from minidpo.errors import UserError
from minidpo.model import read_config, save_model, save_reward_model
from minidpo.training.saved_tokenizer import NEW_PAD
from runs import run_dpo, run_rm
from tiny import edit_config, tiny_model, tiny_reward_model, write_tokenizer


@pytest.fixture
def base(tmp_path) -> Path:
    """A model directory with 304 rows, of which the tokenizer has 300: 0 is <pad>, 1 <s>, 2 </s>."""
    write_tokenizer(tmp_path / "base", ["yes no maybe"], 300)
    save_model(tiny_model(vocab_size=304), tmp_path / "base")
    return tmp_path / "base"


def fields(file: Path) -> dict:
    return json.loads(file.read_text())


@pytest.mark.parametrize("run", [run_dpo, run_rm])
@pytest.mark.parametrize(
    ("of_model", "of_generation", "saved", "saved_generation", "stops"),
    [
        (5, {"top_p": 0.9}, [2, 5], {"eos_token_id": 2, "top_p": 0.9}, {2, 5}),  # the tokenizer's is 2
        ([5, 6], {"eos_token_id": [6, 2]}, [2, 5, 6], {"eos_token_id": [2, 6]}, {2, 5, 6}),
        (None, {"eos_token_id": 5}, 2, {"eos_token_id": [2, 5]}, {2, 5}),
    ],
)
def test_eos(config, base, tmp_path, run, of_model, of_generation, saved, saved_generation, stops):
    """The EOS that was trained is the first of those at which final/ stops, and others stay."""
    edit_config(base, lambda config: config.update(eos_token_id=of_model))
    (base / "generation_config.json").write_text(json.dumps(of_generation))
    run(config(), f"--model.path={base}", "--optim.max_steps=1")
    final = tmp_path / "out" / "final"
    assert fields(final / "config.json")["eos_token_id"] == saved
    assert fields(final / "generation_config.json") == saved_generation
    assert Tokenizer.from_pretrained(final).stop_ids == stops


@pytest.mark.parametrize(
    ("named", "of_model", "pad"),
    [
        ({"pad_token": "<pad>"}, None, "<pad>"),
        ({"pad_token": "</s>"}, 2, "<zz>"),  # EOS cannot be it, so another special token is
        ({"pad_token": "</s>", "extra_special_tokens": ["<x>", "<|image_pad|>"]}, None, "<|image_pad|>"),
        ({"chat_template": "<pad> and <s>"}, None, NEW_PAD),  # what a text may end with cannot be it
        ({"pad_token": "<x>"}, 304, "<x>"),  # config.json's has no row
        ({"pad_token": "<x>"}, -1, "<x>"),
    ],
)
def test_pad(config, base, tmp_path, named, of_model, pad):
    """A reward model's is a special token with a row, never EOS; a padded batch has the rewards of its texts."""
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"} | named))
    if pad not in ("<pad>", NEW_PAD):  # There is no token of that name.
        (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text().replace("<pad>", "<zz>"))
    before = Tokenizer.from_pretrained(base)
    edit_config(base, lambda config: config.update(pad_token_id=of_model, bos_token_id=None))
    assert read_config(base).pad_token_id == (2 if of_model == 2 else None)  # never one beyond the rows
    run_rm(config(), f"--model.path={base}", "--optim.max_steps=1")
    final = tmp_path / "out" / "final"
    after = Tokenizer.from_pretrained(final)
    assert not after.conflict(before) and before.special_ids.items() <= after.special_ids.items()
    assert fields(final / "tokenizer_config.json")["pad_token"] == pad
    assert fields(final / "config.json")["pad_token_id"] == after.special_ids[pad] < 304

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(final).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    texts = ["yes no maybe</s>", "no</s>"]
    batch = theirs(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    alone = torch.cat([theirs(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(batch, alone, rtol=1e-5, atol=1e-5)


def test_no_row_for_pad(config, base, tmp_path):
    """Where no special token can be pad, and the embedding has no unused row, the reward model has none."""
    (base / "tokenizer_config.json").write_text('{"eos_token": "</s>", "chat_template": "<pad> and <s>"}')
    save_model(tiny_model(vocab_size=Tokenizer.from_pretrained(base).next_id), base)
    run_rm(config(), f"--model.path={base}", "--optim.max_steps=1")
    saved = tmp_path / "out" / "final"
    assert "pad_token_id" not in fields(saved / "config.json")
    assert "pad_token" not in fields(saved / "tokenizer_config.json")


def test_byte_order_mark(config, base, tmp_path):
    """Files that were edited on Windows are read, and final/ has none of their marks."""
    arguments = config()
    for file in (*base.glob("*.json"), Path(arguments[0])):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    run_dpo(arguments, f"--model.path={base}", "--optim.max_steps=1")
    for file in (tmp_path / "out" / "final").glob("*.json"):
        assert not file.read_bytes().startswith(b"\xef\xbb\xbf")


def test_other_tokenizer(config, world, tmp_path, capsys):
    """A reference that reads other tokens under the model's ids is refused; a reward model may read other
    text."""
    german = shutil.copytree(world / "other", tmp_path / "german")
    write_tokenizer(german, ["Wie bitte? Das ist nicht wahr, oder etwa doch?"] * 3, 270)
    for keys in ([], ["--loss.name=sft", "--eval.samples=2"]):
        with pytest.raises(UserError, match="its tokenizer has other ids than the model's"):
            run_dpo(config(), f"--reference.path={german}", *keys)
    assert not (tmp_path / "out").exists()

    save_reward_model(tiny_reward_model(vocab_size=300), german)
    sampled = ["--eval.samples=2", "--eval.max_new_tokens=3", f"--eval.reward_model={german}"]
    run_dpo(config(), *sampled, "--optim.max_steps=1")
    assert "the reward model has another tokenizer than the model" in capsys.readouterr().out
