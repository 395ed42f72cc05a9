"""minidpo beside TRL: one model directory, one tokenizer, one set of pairs, and both must say the same.

Pair by pair: log-probs, loss, logged rewards, gradient norm. Then 20 steps of training, loss by loss.
Where TRL means something else by a name, the test says what, and holds the conversion.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peers import assert_logged, gradient_norm, make_world, our_pair, our_rewards, trainer, trl_logs

from minidpo.data import PairTokens
from minidpo.losses import (
    DPO,
    IPO,
    KTO,
    ORPO,
    APOZero,
    BradleyTerry,
    Hinge,
    PairLogps,
    Rewards,
    RobustDPO,
    SimPO,
)
from minidpo.model import load_model, load_reward_model, response_logps
from minidpo.packing import pack

pytestmark = pytest.mark.slow
BETA = 0.1
SIMPO = dict(loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.7)
STEPS, BATCH, LR = 20, 4, 1e-3


@pytest.fixture(scope="module")
def peers(world, tmp_path_factory):
    return make_world(world, tmp_path_factory.mktemp("reward"))


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


# TRL's trainer, what it is told, and minidpo's loss.
LOSSES = {
    "dpo is sigmoid": ("DPO", dict(loss_type="sigmoid"), DPO(BETA)),
    "ipo per token is ipo": ("DPO", dict(loss_type="ipo"), IPO(BETA, length_normalize=True)),
    "dpo per token is sigmoid_norm": (
        "DPO",
        dict(loss_type="sigmoid_norm"),
        DPO(BETA, length_normalize=True),
    ),
    "sigmoid ignores label_smoothing": ("DPO", dict(loss_type="sigmoid", label_smoothing=0.2), DPO(BETA)),
    "robust is robust": (
        "DPO",
        dict(loss_type="robust", label_smoothing=0.2),
        RobustDPO(BETA, flip_rate=0.2),
    ),
    "hinge is hinge": ("DPO", dict(loss_type="hinge"), Hinge(BETA)),
    "apo_zero is apo_zero": ("DPO", dict(loss_type="apo_zero"), APOZero(BETA)),
    "sft_weight is a second loss, sft": (
        "DPO",
        dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3]),
        DPO(BETA, sft_weight=0.3),
    ),
    # With z the scaled margin and l = -log sigma(z): conservative = l + e z, robust = l - e z / (1-2e).
    "smoothed dpo is (2-2e) sigmoid - (1-2e) robust": (
        "DPO",
        dict(loss_type=["sigmoid", "robust"], loss_weights=[1.8, -0.8], label_smoothing=0.1),
        DPO(BETA, label_smoothing=0.1),
    ),
    "smoothed dpo with a uniform reference is cpo": (
        "CPO",
        dict(loss_type="sigmoid", cpo_alpha=0.0, label_smoothing=0.2),
        DPO(BETA, label_smoothing=0.2),
    ),
    "simpo is simpo with cpo_alpha 0": ("CPO", SIMPO, SimPO(2.0, 0.7)),
    "simpo, smoothed": ("CPO", SIMPO | dict(label_smoothing=0.2), SimPO(2.0, 0.7, label_smoothing=0.2)),
    "cpo_alpha 1 adds sft": ("CPO", SIMPO | dict(cpo_alpha=1.0), SimPO(2.0, 0.7, sft_weight=1.0)),
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
        ours = {
            name: value for name, value in expected.items() if name.startswith(("loss", "logps", "rewards"))
        }
        assert_logged(record, ours | {"grad_norm": gradient_norm(peers.policy, losses)})


def test_ipo_on_sums(peers, tmp_path):
    """TRL's `ipo` has per-token means; the paper's equation has sums."""
    for index, record in enumerate(trl_logs(peers, tmp_path, "DPO", beta=BETA, loss_type="ipo")):
        assert abs(IPO(BETA)(our_pair(peers, index)).item() - record["loss"]) > 0.1


def test_orpo(peers, tmp_path):
    """Odds ratios and their part of the loss equal those of TRL's ORPOTrainer, pair by pair. Its other part, the
    SFT loss, is over prompt and response, where the paper and minidpo have the response alone."""
    for index, record in enumerate(trl_logs(peers, tmp_path, "ORPO", beta=0.3)):
        pair, loss = our_pair(peers, index), ORPO(lambda_or=0.3, sft_weight=0.0)
        chosen, rejected = pair.mean_logps()
        expected = {"log_odds_chosen": loss.z(pair), "log_odds_ratio": -loss(pair) / 0.3}
        assert_logged(record, expected | {"logps/chosen": chosen, "logps/rejected": rejected})
        np.testing.assert_allclose(
            record["loss"] - record["nll_loss"], loss(pair).item(), rtol=1e-5, atol=1e-5
        )


def test_kto(peers, tmp_path):
    """The loss, z0, rewards and gradient norms of batches equal those of TRL's KTOTrainer. Its prompts, too, meet
    the response of the record before."""
    files = peers.directories | dict(
        policy=peers.directories["reference"], reference=peers.directories["policy"]
    )
    swapped = dict(directories=files, policy=peers.reference, reference=peers.policy)  # so that z0 is not 0
    peers = SimpleNamespace(**vars(peers) | swapped)
    labels = [True, False, False, True, True, False]
    both = zip(peers.records, labels, strict=False)
    records = [
        dict(prompt=r["prompt"], completion=r["chosen" if liked else "rejected"], label=liked)
        for r, liked in both
    ]
    settings = dict(beta=BETA, desirable_weight=1.5, undesirable_weight=2.0, max_steps=2)
    logs = trl_logs(peers, tmp_path, "KTO", records, per_device_train_batch_size=3, **settings)
    assert any(record["kl"] > 0.1 for record in logs)  # Else z0 would not matter here.
    single = PairTokens.from_pairs(peers.pairs[:6]).unpaired()
    single = single.select(
        np.array([row if liked else len(labels) + row for row, liked in enumerate(labels)])
    )
    for step, record in enumerate(logs):
        rows, loss = np.arange(3 * step, 3 * step + 3), KTO(BETA, lambda_d=1.5, lambda_u=2.0)
        own, other = pack(single, rows), pack(single.mismatched([rows], 512))
        with torch.no_grad():
            z0 = (
                (response_logps(peers.policy, other) - response_logps(peers.reference, other))
                .mean()
                .clamp(min=0)
            )
            reference = response_logps(peers.reference, own)[:, 0]
        pairs = PairLogps(
            response_logps(peers.policy, own)[:, 0],
            ref_chosen=reference,
            chosen_length=own.lengths[:, 0],
            label=torch.from_numpy(single.label[rows]),
            z0=z0.expand(3),
        )
        losses = loss(pairs)
        expected = {
            name: value.mean() for name, value in loss.metrics(pairs, losses).items() if "rewards" in name
        }
        norm = gradient_norm(peers.policy, losses.mean())
        assert_logged(record, expected | dict(loss=losses.mean(), kl=z0, grad_norm=norm))


@pytest.mark.parametrize(("margin", "center"), [(0.0, None), (0.4, None), (0.4, 0.3)])
def test_reward_model(peers, tmp_path, margin, center):
    """Loss, gradient norm and logged rewards equal those of TRL's RewardTrainer, pair by pair."""
    records = [record | {"margin": margin * i} for i, record in enumerate(peers.records)]
    logs = trl_logs(peers, tmp_path, "Reward", records, center_rewards_coefficient=center)
    for index, record in enumerate(logs):
        chosen, rejected = our_rewards(peers, peers.pairs[index])
        loss = BradleyTerry(0.0, margin * index, center_weight=center or 0.0)
        losses, both = loss(Rewards(chosen, rejected)), torch.cat((chosen, rejected))
        expected = dict(loss=losses, grad_norm=gradient_norm(peers.reward_model, losses))
        expected |= dict(mean_reward=both.mean(), min_reward=both.min(), max_reward=both.max())
        assert_logged(record, expected | dict(margin=chosen - rejected, accuracy=chosen > rejected))


def test_pad_is_eos(peers, tmp_path):
    """If padding is EOS, TRL takes the EOS of a response for padding and reads one token earlier; minidpo
    reads at it."""
    for pair, record in zip(peers.pairs, trl_logs(peers, tmp_path, "Reward", pad_is_eos=True), strict=False):
        without_eos = pair._replace(chosen=pair.chosen[:-1], rejected=pair.rejected[:-1])
        chosen, rejected = our_rewards(peers, without_eos)
        assert_logged(record, dict(margin=chosen - rejected, mean_reward=(chosen + rejected) / 2))


@pytest.mark.parametrize("loss", [DPO(BETA), IPO(BETA, True), SimPO(2.0, 0.7), BradleyTerry(0.0)], ids=str)
def test_training(peers, tmp_path, loss):
    """The losses of 20 steps of AdamW follow TRL's. Ours is a plain loop over the pairs in file order."""
    model = load_model(peers.directories["policy"])
    if isinstance(loss, BradleyTerry):
        kind, settings, model = "Reward", {}, load_reward_model(peers.directories["reward"])
    elif isinstance(loss, SimPO):
        kind, settings = "CPO", dict(SIMPO)
    else:
        kind, settings = "DPO", dict(beta=BETA, loss_type=loss.trl)
    settings |= dict(per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=LR)
    logs = trl_logs(peers, tmp_path, kind, **settings)

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
