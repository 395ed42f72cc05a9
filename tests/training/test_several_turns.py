"""Records of one response, and responses of several turns, from the file to the loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minidpo.config import DPOConfig
from minidpo.data import PairTokens, Tokenizer, TokenPair, read_preferences
from minidpo.logprobs import sequence_logps
from minidpo.losses import DPO, SFT
from minidpo.model import load_model
from minidpo.textbook import pad
from minidpo.training.reference import with_reference_logps
from minidpo.training.scoring import all_logps
from minidpo.training.step import pair_logps
from record_files import write
from runs import run_dpo, run_rm
from tiny import EOS, tiny_model

HERE = (torch.device("cpu"), "fp32")


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


ASKED, WELL, SLEEPS = (
    turn("user", "a cat?"),
    turn("assistant", "it runs well"),
    turn("assistant", "it sleeps"),
)
RECORDS = [
    {
        "prompt": [ASKED],
        "chosen": [WELL, turn("user", "and then?"), SLEEPS],
        "rejected": [turn("assistant", "no")],
    },
    {"prompt": [ASKED], "chosen": [SLEEPS], "rejected": [WELL, turn("tool", "yes"), SLEEPS]},
]


@pytest.mark.parametrize(("run", "metric"), [(run_dpo, "loss"), (run_rm, "lm_loss")], ids=["sft", "rm"])
def test_turns(config, world, tmp_path, run, metric):
    """The language-modelling loss of a run is the mean over the tokens that the assistant wrote."""
    data, rm = write(tmp_path / "turns.jsonl", *RECORDS), run is run_rm
    limits = dict(data__max_length=250, data__max_prompt_length=100, optim__micro_tokens=500)
    arguments = config(data__train=f'["{data}"]', data__eval_pairs=0, optim__max_steps=1, **limits)
    logged = run(arguments, "--data.template=chatml", *([] if rm else ["--loss.name=sft"]))[0][metric]

    tokenizer = Tokenizer.from_pretrained(world / "model", rewards=rm)
    texts = read_preferences(data, template=tokenizer.chat_template("chatml"))
    pairs = tokenizer.encode_pairs(list(texts))
    tokens, mask = pad([(pair.prompt, pair.chosen, pair.chosen) for pair in pairs])
    for row, pair in enumerate(pairs):
        for begin, end in pair.unscored[0] if pair.unscored else ():
            mask[row, len(pair.prompt) + begin : len(pair.prompt) + end] = False
    with torch.no_grad():
        sums, counts = sequence_logps(load_model(world / "model")(tokens[:2]), tokens[:2], mask[:2])
    assert pairs[0].unscored[0] and logged == pytest.approx((-sums / counts).mean().item(), rel=1e-5)


def test_needs_two():
    """A loss that compares two responses is not computed from one."""
    pairs = PairTokens.from_pairs([TokenPair([3, 4], [5, EOS], None, 0)])
    model, every = tiny_model(), np.arange(1)
    assert pair_logps(model, pairs, every, SFT(), *HERE).rejected is None
    with pytest.raises(ValueError, match="2 responses of each prompt are needed, the data has 1"):
        pair_logps(model, pairs, every, DPO(), *HERE)


def test_reference(world, tmp_path):
    """The reference's log-probs of one response per record are a single column."""
    pairs = PairTokens.from_pairs([TokenPair([3, 4], [5, EOS], None, 0), TokenPair([6], [EOS], None, 1)])
    config = DPOConfig()
    config.reference.path = str(world / "other")
    run = SimpleNamespace(out=tmp_path, fingerprints={"reference": "x"}, device=HERE[0], dtype=HERE[1])
    with_logps, _ = with_reference_logps(config, run, pairs, np.array([1]), pairs.select(np.array([0])))
    expected = all_logps(load_model(world / "other"), pairs, 64, *HERE)
    assert np.isnan(with_logps.ref_logps[0]).all()
    assert with_logps.ref_logps.shape == (2, 1) and with_logps.ref_logps[1] == pytest.approx(expected[1])
