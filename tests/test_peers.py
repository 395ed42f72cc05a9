"""minidpo beside TRL: one model directory, one tokenizer, one set of pairs, and both must say the same.

Pair by pair: log-probs, loss, logged rewards, gradient norm. Then 20 steps of training, loss by loss.
Where TRL means something else by a name, the test says what, and holds the conversion.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minidpo.logprobs import response_logps
from minidpo.losses import bradley_terry_loss, center_penalty, dpo_loss, ipo_loss, sft_loss, simpo_loss
from minidpo.packing import PairTokens, Wanted, pack_row
from minidpo.weights import load_model, load_reward_model
from peers import (
    LOGPS,
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
    ours = response_logps(world.models.reference, pack_row(PairTokens.from_pairs(world.pairs), LOGPS))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def robust_dpo(pair: OurPair, e: float):
    """Chowdhury et al. 2024 from two dpo_loss: ((1-e) l(w, l) - e l(l, w)) / (1-2e)."""
    chosen, rejected, reference_chosen, reference_rejected = pair.logps()
    plain = dpo_loss(*pair.logps(), BETA)
    swapped = dpo_loss(rejected, chosen, reference_rejected, reference_chosen, BETA)
    return plain._replace(losses=((1 - e) * plain.losses - e * swapped.losses) / (1 - 2 * e))


def plus(loss, more: torch.Tensor):
    return loss._replace(losses=loss.losses + more)


# claim: (DPOTrainer's settings, minidpo's loss, is TRL's logged reward minidpo's times the length?)
DPO_FAMILY = {
    "dpo is sigmoid": (dict(loss_type="sigmoid"), lambda p: dpo_loss(*p.logps(), BETA), False),
    # With lengths, ours divides loss and rewards alike; TRL logs beta * summed log-ratio whatever the loss.
    "ipo with lengths is ipo": (
        dict(loss_type="ipo"),
        lambda p: ipo_loss(*p.logps(), BETA, *p.lengths),
        True,
    ),
    "dpo with lengths is sigmoid_norm": (
        dict(loss_type="sigmoid_norm"),
        lambda p: dpo_loss(*p.logps(), BETA, 0.0, *p.lengths),
        True,
    ),
    "sigmoid does not read label_smoothing": (
        dict(loss_type="sigmoid", label_smoothing=0.2),
        lambda p: dpo_loss(*p.logps(), BETA),
        False,
    ),
    # With z the scaled margin and l = -log sigma(z): conservative = l + e z, robust = l - e z / (1-2e).
    "label_smoothing e (conservative dpo) is (2-2e) sigmoid - (1-2e) robust": (
        dict(loss_type=["sigmoid", "robust"], loss_weights=[1.8, -0.8], label_smoothing=0.1),
        lambda p: dpo_loss(*p.logps(), BETA, 0.1),
        False,
    ),
    "robust is made of two dpo losses": (
        dict(loss_type="robust", label_smoothing=0.2),
        lambda p: robust_dpo(p, 0.2),
        False,
    ),
}


@pytest.mark.parametrize("claim", DPO_FAMILY)
def test_dpo_and_ipo_equal_trl_pair_by_pair(trl, world, tmp_path, claim):
    settings, loss, rewards_are_sums = DPO_FAMILY[claim]
    for index, record in enumerate(logs_of(dpo_trainer(trl, world, tmp_path, beta=BETA, **settings))):
        pair = OurPair(world, index)
        ours = loss(pair)
        chosen_length, rejected_length = pair.lengths if rewards_are_sums else (1, 1)
        chosen, rejected = ours.chosen_rewards * chosen_length, ours.rejected_rewards * rejected_length
        expected = {"loss": ours.losses, "grad_norm": gradient_norm(pair.model, ours.losses)}
        expected |= {"logps/chosen": pair.chosen, "logps/rejected": pair.rejected}
        assert_logged(record, expected | reward_metrics(chosen, rejected))


def test_ipo_on_sums_as_the_paper_has_it_is_not_trls(trl, world, tmp_path):
    for index, record in enumerate(logs_of(dpo_trainer(trl, world, tmp_path, beta=BETA, loss_type="ipo"))):
        assert abs(ipo_loss(*OurPair(world, index).logps(), BETA).losses.item() - record["loss"]) > 0.1


# claim: (CPOTrainer's settings, minidpo's loss). There is no reference; logged logps of simpo are averages.
CPO_FAMILY = {
    "simpo is simpo with cpo_alpha 0, gamma outside beta in both": (
        SIMPO,
        lambda p: simpo_loss(p.chosen, p.rejected, *p.lengths, beta=2.0, gamma=0.7),
    ),
    "simpo label_smoothing is conservative in both": (
        SIMPO | dict(label_smoothing=0.2),
        lambda p: simpo_loss(p.chosen, p.rejected, *p.lengths, beta=2.0, gamma=0.7, label_smoothing=0.2),
    ),
    "simpo at the default cpo_alpha 1 is simpo plus sft": (
        {name: value for name, value in SIMPO.items() if name != "cpo_alpha"},
        lambda p: plus(
            simpo_loss(p.chosen, p.rejected, *p.lengths, beta=2.0, gamma=0.7),
            sft_loss(p.chosen, p.lengths[0]),
        ),
    ),
    "dpo with a uniform reference and label_smoothing is cpo's sigmoid": (
        dict(loss_type="sigmoid", cpo_alpha=0.0, beta=BETA, label_smoothing=0.2),
        lambda p: dpo_loss(p.chosen, p.rejected, *torch.zeros(2, 1), BETA, 0.2),
    ),
}


@pytest.mark.parametrize("claim", CPO_FAMILY)
def test_simpo_equals_trls_cpo_trainer_pair_by_pair(trl, world, tmp_path, claim):
    settings, loss = CPO_FAMILY[claim]
    for index, record in enumerate(logs_of(cpo_trainer(world, tmp_path, **settings))):
        pair = OurPair(world, index)
        ours = loss(pair)
        chosen_length, rejected_length = pair.lengths if settings["loss_type"] == "simpo" else (1, 1)
        expected = {"loss": ours.losses, "grad_norm": gradient_norm(pair.model, ours.losses)}
        expected["logps/chosen"] = pair.chosen / chosen_length
        expected["logps/rejected"] = pair.rejected / rejected_length
        assert_logged(record, expected | reward_metrics(ours.chosen_rewards, ours.rejected_rewards))


def our_rewards(world, pair) -> tuple[torch.Tensor, torch.Tensor]:
    row = pack_row(PairTokens.from_pairs([pair]), Wanted(rewards=True))
    return world.models.reward.pair_rewards(row)[0].T


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.3])
def test_reward_model_equals_trl_pair_by_pair(trl, world, tmp_path, with_margin, center):
    margins = np.random.default_rng(0).random(len(world.records)).round(3).tolist()
    rows = [record | {"margin": margins[i]} for i, record in enumerate(world.records)]
    trainer = reward_trainer(
        trl, world, tmp_path, center_rewards_coefficient=center, rows=rows if with_margin else None
    )
    for index, record in enumerate(logs_of(trainer)):
        chosen, rejected = our_rewards(world, world.pairs[index])
        loss = bradley_terry_loss(chosen, rejected, margins[index] if with_margin else None)
        loss = loss + (center or 0.0) * center_penalty(chosen, rejected)
        both = torch.cat((chosen, rejected))
        expected = {"loss": loss, "grad_norm": gradient_norm(world.models.reward, loss)}
        expected |= {"mean_reward": both.mean(), "min_reward": both.min(), "max_reward": both.max()}
        expected |= {"margin": chosen - rejected, "accuracy": (chosen > rejected).float()}
        assert_logged(record, expected)


def test_where_pad_is_eos_trl_reads_the_reward_one_token_early(trl, world, tmp_path):
    """It looks for the last token that is not padding, so an ending's own EOS is passed over; ours counts."""
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
    """A plain loop over the pairs in file order, around and around; losses_of(pairs) gives (BATCH,)."""
    tokens = PairTokens.from_pairs(world.pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    history = []
    for step in range(STEPS):
        rows = np.arange(step * BATCH, (step + 1) * BATCH) % len(tokens)
        loss = losses_of(tokens.select(rows)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "reward model"])
def test_twenty_steps_of_training_follow_trls(trl, world, tmp_path, name):
    policy, reward_model = (
        load_model(world.directory / "policy"),
        load_reward_model(world.directory / "reward"),
    )
    run = dict(batch_size=BATCH, steps=STEPS, lr=LR)

    def logps_and_lengths(pairs):
        row = pack_row(pairs, LOGPS)
        with torch.no_grad():
            reference = response_logps(world.models.reference, row)
        return (*response_logps(policy, row).T, *reference.T), row.scored_lengths.view(-1, 2).T

    def dpo(pairs):
        logps, _ = logps_and_lengths(pairs)
        return dpo_loss(*logps, BETA).losses

    def ipo(pairs):
        logps, lengths = logps_and_lengths(pairs)
        return ipo_loss(*logps, BETA, *lengths).losses

    def simpo(pairs):
        logps, lengths = logps_and_lengths(pairs)
        return simpo_loss(*logps[:2], *lengths, beta=2.0, gamma=0.7).losses

    def bradley_terry(pairs):
        return bradley_terry_loss(*reward_model.pair_rewards(pack_row(pairs, Wanted(rewards=True)))[0].T)

    if name == "reward model":
        theirs, ours = reward_trainer(trl, world, tmp_path, **run), (reward_model, world, bradley_terry)
    elif name == "simpo":
        theirs, ours = cpo_trainer(world, tmp_path, **SIMPO, **run), (policy, world, simpo)
    elif name == "ipo":
        theirs = dpo_trainer(trl, world, tmp_path, beta=BETA, loss_type="ipo", **run)
        ours = policy, world, ipo
    else:
        theirs, ours = dpo_trainer(trl, world, tmp_path, beta=BETA, **run), (policy, world, dpo)
    theirs, ours = [record["loss"] for record in logs_of(theirs)], our_training(*ours)
    assert len(theirs) == STEPS and max(ours) - min(ours) > 0.1  # it did train
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
