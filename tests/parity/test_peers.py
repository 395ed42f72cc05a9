"""minidpo beside TRL: one model directory, one tokenizer, one set of pairs, and both must say the same.

Pair by pair: log-probs, loss, logged rewards, gradient norm. Then 20 steps of training, loss by loss.
Where TRL means something else by a name, the test says what, and holds the conversion.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peers import (
    OurPair,
    assert_logged,
    cpo_trainer,
    dpo_trainer,
    gradient_norm,
    import_trl,
    logs_of,
    make_world,
    reward_metrics,
    reward_trainer,
)

from minidpo.data import PairTokens
from minidpo.losses import DPO, IPO, SFT, BradleyTerry, PairLogps, Rewards, SimPO
from minidpo.model import load_model, load_reward_model, response_logps
from minidpo.packing import pack

pytestmark = pytest.mark.slow
BETA = 0.1
SIMPO = dict(loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.7)
STEPS, BATCH, LR = 20, 4, 1e-3


@pytest.fixture(scope="module")
def trl():
    return import_trl()


@pytest.fixture(scope="module")
def world(trl, tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("peers"))


def test_ids_and_logps_of_every_pair_equal_trls(trl, world, tmp_path):
    trainer = dpo_trainer(trl, world, tmp_path)
    for index, pair in enumerate(world.pairs):
        example = trainer.train_dataset[index]
        assert example["prompt_ids"] == pair.prompt
        assert example["chosen_ids"] == pair.chosen and example["rejected_ids"] == pair.rejected
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(world.pairs))])
    theirs = torch.stack(trainer.compute_ref_log_probs(trainer.ref_model, batch), dim=1)
    ours = response_logps(world.models.reference, pack(PairTokens.from_pairs(world.pairs)))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def swapped(pair: PairLogps) -> PairLogps:
    return PairLogps(pair.rejected, pair.chosen, pair.ref_rejected, pair.ref_chosen)


def robust_dpo(pair: PairLogps, e: float) -> torch.Tensor:
    """Chowdhury et al. 2024 from two DPO losses: ((1-e) l(w, l) - e l(l, w)) / (1-2e)."""
    loss = DPO(beta=BETA)
    return ((1 - e) * loss(pair) - e * loss(swapped(pair))) / (1 - 2 * e)


# claim: (DPOTrainer's settings, minidpo's loss, the loss whose rewards are logged, whether TRL's are those times length)
DPO_FAMILY = {
    "dpo is sigmoid": (dict(loss_type="sigmoid"), DPO(BETA), DPO(BETA), False),
    # Per token, ours divides loss and rewards alike; TRL logs beta * summed log-ratio whatever the loss.
    "ipo per token is ipo": (
        dict(loss_type="ipo"),
        IPO(BETA, length_normalize=True),
        IPO(BETA, length_normalize=True),
        True,
    ),
    "dpo per token is sigmoid_norm": (
        dict(loss_type="sigmoid_norm"),
        DPO(BETA, length_normalize=True),
        DPO(BETA, length_normalize=True),
        True,
    ),
    "sigmoid does not read label_smoothing": (
        dict(loss_type="sigmoid", label_smoothing=0.2),
        DPO(BETA),
        DPO(BETA),
        False,
    ),
    # With z the scaled margin and l = -log sigma(z): conservative = l + e z, robust = l - e z / (1-2e).
    "label_smoothing e (conservative dpo) is (2-2e) sigmoid - (1-2e) robust": (
        dict(loss_type=["sigmoid", "robust"], loss_weights=[1.8, -0.8], label_smoothing=0.1),
        DPO(BETA, label_smoothing=0.1),
        DPO(BETA),
        False,
    ),
    "robust is made of two dpo losses": (
        dict(loss_type="robust", label_smoothing=0.2),
        lambda pair: robust_dpo(pair, 0.2),
        DPO(BETA),
        False,
    ),
}


@pytest.mark.parametrize("claim", DPO_FAMILY)
def test_dpo_and_ipo(trl, world, tmp_path, claim):
    """Loss, gradient norm, log-probs and logged rewards equal TRL's, pair by pair."""
    settings, loss, of_rewards, rewards_are_sums = DPO_FAMILY[claim]
    for index, record in enumerate(logs_of(dpo_trainer(trl, world, tmp_path, beta=BETA, **settings))):
        pair = OurPair(world, index)
        losses = loss(pair.logps)
        lengths = pair.lengths if rewards_are_sums else (1, 1)
        rewards = (r * length for r, length in zip(of_rewards.rewards(pair.logps), lengths, strict=True))
        expected = {"loss": losses, "grad_norm": gradient_norm(pair.model, losses)}
        expected |= {"logps/chosen": pair.chosen, "logps/rejected": pair.rejected}
        assert_logged(record, expected | reward_metrics(*rewards))


def test_ipo_on_sums_is_not_trls(trl, world, tmp_path):
    """The paper's equation has sums; TRL's `ipo` has per-token means."""
    for index, record in enumerate(logs_of(dpo_trainer(trl, world, tmp_path, beta=BETA, loss_type="ipo"))):
        assert abs(IPO(BETA)(OurPair(world, index).logps).item() - record["loss"]) > 0.1


# claim: (CPOTrainer's settings, minidpo's loss). There is no reference; logged logps of simpo are averages.
CPO_FAMILY = {
    "simpo is simpo with cpo_alpha 0, gamma outside beta in both": (SIMPO, SimPO(2.0, 0.7), SimPO(2.0, 0.7)),
    "simpo label_smoothing is conservative in both": (
        SIMPO | dict(label_smoothing=0.2),
        SimPO(2.0, 0.7, label_smoothing=0.2),
        SimPO(2.0, 0.7),
    ),
    "simpo at the default cpo_alpha 1 is simpo plus sft": (
        {name: value for name, value in SIMPO.items() if name != "cpo_alpha"},
        lambda pair: SimPO(2.0, 0.7)(pair) + SFT()(pair),
        SimPO(2.0, 0.7),
    ),
    "dpo with a uniform reference and label_smoothing is cpo's sigmoid": (
        dict(loss_type="sigmoid", cpo_alpha=0.0, beta=BETA, label_smoothing=0.2),
        lambda pair: DPO(BETA, 0.2)(uniform(pair)),
        lambda pair: DPO(BETA).rewards(uniform(pair)),
    ),
}


def uniform(pair: PairLogps) -> PairLogps:
    """The pair beside a reference that gives every response log-prob 0."""
    return PairLogps(pair.chosen, pair.rejected, *torch.zeros(2, 1))


@pytest.mark.parametrize("claim", CPO_FAMILY)
def test_simpo(trl, world, tmp_path, claim):
    """SimPO equals TRL's CPOTrainer, pair by pair."""
    settings, loss, of_rewards = CPO_FAMILY[claim]
    for index, record in enumerate(logs_of(cpo_trainer(world, tmp_path, **settings))):
        pair = OurPair(world, index)
        losses = loss(pair.logps)
        rewards = of_rewards.rewards(pair.logps) if hasattr(of_rewards, "rewards") else of_rewards(pair.logps)
        chosen_length, rejected_length = pair.lengths if settings["loss_type"] == "simpo" else (1, 1)
        expected = {"loss": losses, "grad_norm": gradient_norm(pair.model, losses)}
        expected["logps/chosen"] = pair.chosen / chosen_length
        expected["logps/rejected"] = pair.rejected / rejected_length
        assert_logged(record, expected | reward_metrics(*rewards))


def our_rewards(world, pair) -> tuple[torch.Tensor, torch.Tensor]:
    return world.models.reward.forward_packed(pack(PairTokens.from_pairs([pair]), scored=0))[0].T


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.3])
def test_reward_model(trl, world, tmp_path, with_margin, center):
    margins = np.random.default_rng(0).random(len(world.records)).round(3).tolist()
    rows = [record | {"margin": margins[i]} for i, record in enumerate(world.records)]
    trainer = reward_trainer(
        trl, world, tmp_path, center_rewards_coefficient=center, rows=rows if with_margin else None
    )
    for index, record in enumerate(logs_of(trainer)):
        chosen, rejected = our_rewards(world, world.pairs[index])
        loss = BradleyTerry(0.0, margins[index] if with_margin else 0.0, center_weight=center or 0.0)
        loss = loss(Rewards(chosen, rejected))
        both = torch.cat((chosen, rejected))
        expected = {"loss": loss, "grad_norm": gradient_norm(world.models.reward, loss)}
        expected |= {"mean_reward": both.mean(), "min_reward": both.min(), "max_reward": both.max()}
        expected |= {"margin": chosen - rejected, "accuracy": (chosen > rejected).float()}
        assert_logged(record, expected)


def test_reward_where_pad_is_eos(trl, world, tmp_path):
    """TRL looks for the last token that is not padding, so it passes over a response's own EOS; ours counts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.directory / "policy")
    tokenizer.pad_token = tokenizer.eos_token
    padding_with_eos = SimpleNamespace(**vars(world) | {"processing_class": tokenizer})
    for index, record in enumerate(logs_of(reward_trainer(trl, padding_with_eos, tmp_path))):
        pair = world.pairs[index]
        chosen, rejected = our_rewards(
            world, pair._replace(chosen=pair.chosen[:-1], rejected=pair.rejected[:-1])
        )
        assert_logged(record, {"margin": chosen - rejected, "mean_reward": (chosen + rejected) / 2})


def our_training(model: torch.nn.Module, world, losses_of) -> list[float]:
    """A plain loop over the pairs in file order, around and around; losses_of(batch) gives (BATCH,)."""
    tokens = PairTokens.from_pairs(world.pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    history = []
    for step in range(STEPS):
        rows = np.arange(step * BATCH, (step + 1) * BATCH) % len(tokens)
        loss = losses_of(pack(tokens, rows)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


@pytest.mark.parametrize(
    "loss", [DPO(BETA), IPO(BETA, length_normalize=True), SimPO(2.0, 0.7), BradleyTerry(0.0)]
)
def test_twenty_steps_of_training(trl, world, tmp_path, loss):
    """The losses of 20 steps of AdamW follow TRL's."""
    run = dict(batch_size=BATCH, steps=STEPS, lr=LR)
    policy = load_model(world.directory / "policy")
    reward_model = load_reward_model(world.directory / "reward")

    def preference(batch):
        with torch.no_grad():
            reference = response_logps(world.models.reference, batch)
        return loss(PairLogps(*response_logps(policy, batch).T, *reference.T, *batch.lengths.T))

    def bradley_terry(batch):
        return loss(Rewards(*reward_model.forward_packed(replace(batch, scored=0))[0].T))

    if isinstance(loss, BradleyTerry):
        theirs, ours = reward_trainer(trl, world, tmp_path, **run), (reward_model, world, bradley_terry)
    elif isinstance(loss, SimPO):
        theirs, ours = cpo_trainer(world, tmp_path, **SIMPO, **run), (policy, world, preference)
    else:
        theirs = dpo_trainer(trl, world, tmp_path, beta=BETA, loss_type=loss.trl, **run)
        ours = policy, world, preference
    theirs, ours = [record["loss"] for record in logs_of(theirs)], our_training(*ours)
    assert len(theirs) == STEPS and max(ours) - min(ours) > 0.1  # it did train
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
