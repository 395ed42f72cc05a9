"""minidpo beside TRL: one model directory, one tokenizer, one set of pairs, and both must say the same.

Pair by pair: log-probs, loss, logged rewards, gradient norm. Then 20 steps of training, loss by loss.
Where TRL means something else by a name, the test says what, and does the conversion.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peers import assert_logged, gradient_norm, our_pair, trainer, trl_logs

from minidpo.data import PairTokens, Tokenizer, read_preferences
from minidpo.log import Means
from minidpo.losses import DPO, KTO, BradleyTerry, PairLogps, Rewards, SimPO
from minidpo.model import load_model, load_reward_model, response_logps, save_reward_model
from minidpo.packing import pack
from tiny import tiny_reward_model

pytestmark = pytest.mark.slow
BETA = 0.1
SIMPO = dict(loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.7)
STEPS, BATCH, LR = 20, 4, 1e-3


@pytest.fixture(scope="module")
def peers(world, tmp_path_factory):
    """Two models and the pairs of conftest.py's world, these as TRL's records and as ids; a reward model."""
    pairs = list(read_preferences(world / "pairs.jsonl.gz"))
    tokenizer = Tokenizer.from_pretrained(world / "model")
    reward_model = tiny_reward_model(vocab_size=300, pad_token_id=0)
    save_reward_model(reward_model, reward := tmp_path_factory.mktemp("reward"))
    return SimpleNamespace(
        directories=dict(policy=world / "model", reference=world / "other", reward=reward),
        policy=load_model(world / "model"),
        reference=load_model(world / "other"),
        reward_model=reward_model,
        records=[dict(prompt=pair.prompt, chosen=pair.chosen, rejected=pair.rejected) for pair in pairs],
        pairs=tokenizer.encode_pairs(pairs),
    )


def test_ids_and_logps(peers, tmp_path):
    """Every pair has TRL's token ids and log-probs."""
    theirs = trainer(peers, tmp_path, "DPO")
    for index, pair in enumerate(peers.pairs):
        example = theirs.train_dataset[index]
        assert example["prompt_ids"] == pair.prompt
        assert example["chosen_ids"] == pair.chosen and example["rejected_ids"] == pair.rejected
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(len(peers.pairs))])
    logps = torch.stack(theirs.compute_ref_log_probs(theirs.ref_model, batch), dim=1)
    ours = response_logps(peers.reference, pack(PairTokens.from_pairs(peers.pairs)))
    torch.testing.assert_close(ours, logps, rtol=1e-5, atol=1e-5)


# TRL's trainer, what it is told, and minidpo's loss: one of each kind. test_conformance.py has all others.
LOSSES = {
    "dpo is sigmoid": ("DPO", dict(loss_type="sigmoid"), DPO(BETA)),
    "sft_weight is a second loss, sft": (
        "DPO",
        dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3]),
        DPO(BETA, sft_weight=0.3),
    ),
    "simpo is simpo with cpo_alpha 0": ("CPO", SIMPO, SimPO(2.0, 0.7)),
}


@pytest.mark.parametrize("claim", LOSSES)
def test_losses(peers, tmp_path, claim):
    """Loss, gradient norm, log-probs and logged rewards equal TRL's, pair by pair."""
    kind, settings, loss = LOSSES[claim]
    for index, record in enumerate(trl_logs(peers, tmp_path, kind, **dict(beta=BETA) | settings)):
        pair = our_pair(peers, index)
        if kind == "CPO":  # log pi_ref = 0: there is no reference
            pair = pair._replace(ref_chosen=torch.zeros(1), ref_rejected=torch.zeros(1))
        losses = loss(pair)
        # Except for simpo, TRL logs beta * summed log-ratio as the reward, whatever the loss.
        expected = DPO(BETA).metrics(pair, losses)
        if settings["loss_type"] == "simpo":
            expected = SimPO(2.0).metrics(pair, losses)
            expected["logps/chosen"], expected["logps/rejected"] = pair.mean_logps()
        ours = {name: x for name, x in expected.items() if name.startswith(("loss", "logps", "rewards"))}
        assert_logged(record, ours | {"grad_norm": gradient_norm(peers.policy, losses)})


def test_kto(peers, tmp_path):
    """The loss, z0, rewards and gradient norms of batches equal those of TRL's KTOTrainer. Its prompts, too,
    meet the response of the record before."""
    # Policy and reference change places, so that z0 is not 0.
    both = dict(policy=peers.directories["reference"], reference=peers.directories["policy"])
    swapped = dict(directories=peers.directories | both, policy=peers.reference, reference=peers.policy)
    peers = SimpleNamespace(**vars(peers) | swapped)
    labels = [True, False, False, True, True, False]
    records = [
        dict(prompt=record["prompt"], completion=record["chosen" if liked else "rejected"], label=liked)
        for record, liked in zip(peers.records, labels, strict=False)
    ]
    settings = dict(beta=BETA, desirable_weight=1.5, undesirable_weight=2.0, max_steps=2)
    logs = trl_logs(peers, tmp_path, "KTO", records, per_device_train_batch_size=3, **settings)
    assert any(record["kl"] > 0.1 for record in logs)  # Else z0 would not matter here.
    single = PairTokens.from_pairs(peers.pairs[:6]).unpaired()
    single = single.select(np.array([row + 6 * (not liked) for row, liked in enumerate(labels)]))
    for step, record in enumerate(logs):
        rows, loss = np.arange(3 * step, 3 * step + 3), KTO(BETA, lambda_d=1.5, lambda_u=2.0)
        own, other = pack(single, rows), pack(single.mismatched([rows], 512))
        with torch.no_grad():
            mismatched = response_logps(peers.policy, other) - response_logps(peers.reference, other)
            z0 = mismatched.mean().clamp(min=0)
            reference = response_logps(peers.reference, own)[:, 0]
        pairs = PairLogps(
            response_logps(peers.policy, own)[:, 0],
            ref_chosen=reference,
            chosen_length=own.lengths[:, 0],
            label=torch.from_numpy(single.label[rows]),
            z0=z0.expand(3),
        )
        losses = loss(pairs)
        means = Means()
        means.add(loss.metrics(pairs, losses))
        expected = {n: torch.tensor(x) for n, x in means.means().items() if "rewards" in n}
        norm = gradient_norm(peers.policy, losses.mean())
        assert_logged(record, expected | dict(loss=losses.mean(), kl=z0, grad_norm=norm))


def test_reward_model(peers, tmp_path):
    """Loss, gradient norm and logged rewards equal those of TRL's RewardTrainer, pair by pair."""
    records = [record | {"margin": 0.4 * i} for i, record in enumerate(peers.records)]
    logs = trl_logs(peers, tmp_path, "Reward", records, center_rewards_coefficient=0.3)
    for index, record in enumerate(logs):
        row = pack(PairTokens.from_pairs([peers.pairs[index]]), scored=0)
        chosen, rejected = peers.reward_model.forward_packed(row)[0].T
        loss = BradleyTerry(0.0, 0.4 * index, center_weight=0.3)
        losses, both = loss(Rewards(chosen, rejected)), torch.cat((chosen, rejected))
        expected = dict(loss=losses, grad_norm=gradient_norm(peers.reward_model, losses))
        expected |= dict(mean_reward=both.mean(), min_reward=both.min(), max_reward=both.max())
        assert_logged(record, expected | dict(margin=chosen - rejected, accuracy=chosen > rejected))


@pytest.mark.parametrize(
    ("kind", "settings", "loss"),
    [("DPO", dict(beta=BETA), DPO(BETA)), ("CPO", SIMPO, SimPO(2.0, 0.7)), ("Reward", {}, BradleyTerry(0.0))],
)
def test_training(peers, tmp_path, kind, settings, loss):
    """The losses of 20 steps of AdamW follow TRL's. Ours is a plain loop over the pairs in file order."""
    of_run = dict(per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=LR)
    logs = trl_logs(peers, tmp_path, kind, **settings | of_run)
    load, name = (load_reward_model, "reward") if kind == "Reward" else (load_model, "policy")
    model = load(peers.directories[name])

    tokens, ours = PairTokens.from_pairs(peers.pairs), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for step in range(STEPS):
        batch = pack(tokens, np.arange(step * BATCH, (step + 1) * BATCH) % len(tokens))
        if kind == "Reward":
            losses = loss(Rewards(*model.forward_packed(replace(batch, scored_responses=0))[0].T))
        else:
            reference = response_logps(peers.reference, batch).detach()
            losses = loss(PairLogps(*response_logps(model, batch).T, *reference.T, *batch.lengths.T))
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        ours.append(losses.mean().item())
    assert len(logs) == STEPS and max(ours) - min(ours) > 0.1  # it did train
    np.testing.assert_allclose(ours, [record["loss"] for record in logs], rtol=1e-4, atol=1e-4)
