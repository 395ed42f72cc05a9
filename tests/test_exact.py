"""In a world small enough to list, every loss leads where it was derived to lead."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from minidpo.commands import exact
from minidpo.commands.exact_train import (
    AllPairs,
    label_weights,
    population_loss,
    rlhf_loss,
    train_rlhf,
    train_to_convergence,
)
from minidpo.commands.exact_world import (
    beats_sampler,
    best_scores,
    divergence,
    expected_reward,
    make_world,
    optimal_policy,
    total_variation,
)
from minidpo.errors import UserError
from minidpo.losses import dpo_loss

TOLERANCE = 1e-5
CLAIMS = ["DPO", "RLHF objective, policy gradient", "reward model, closed form", "DPO, smoothing 0.1",
          "DPO, averages", "IPO", "IPO, averages", "SimPO, gamma 0", "SimPO, gamma 1"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world():
    """Two prompts with 15 responses each: odd, so the last of a prompt is paired with itself."""
    return make_world(seed=0, prompts=2, words=2, max_tokens=3, hidden_size=16)


# --- the world ----------------------------------------------------------------------------------------------


def test_the_listed_responses_are_all_there_is(world):
    torch.testing.assert_close(world.reference_logps.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    assert label_weights(world).sum().item() == pytest.approx(1, abs=1e-14)
    assert sorted(set(world.lengths.flatten().tolist())) == [1, 2, 3]


def test_the_packed_table_is_what_sampling_token_by_token_gives(world):
    """log pi(y|x) of each response, from one textbook forward pass of the prompt and this response alone."""
    for x in range(2):
        seen = {}
        for pair in range(8 * x, 8 * (x + 1)):
            start, prompt_end, chosen_end, end = world.pairs.bounds[pair]
            prompt = world.pairs.ids[start:prompt_end].tolist()
            for begin, stop in pairwise((prompt_end, chosen_end, end)):
                response = world.pairs.ids[begin:stop].tolist()
                tokens = torch.tensor([prompt + response])
                with torch.no_grad():
                    steps = world.reference(tokens)[0].log_softmax(-1)
                logp = sum(steps[len(prompt) - 1 + t, token].item() for t, token in enumerate(response))
                seen[tuple(response)] = logp
        torch.testing.assert_close(world.reference_logps[x], torch.tensor(list(seen.values())).double())


# --- where each loss leads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLAIMS)
def test_training_lands_on_the_analytic_optimum(world, name):
    (claim,) = [claim for claim in exact.claims(world) if claim.name == name]
    trained = claim.train()
    assert total_variation(world.reference_logps, claim.policy) > 0.05  # there was something to learn
    assert total_variation(claim.to_policy(trained.values), claim.policy) < TOLERANCE
    assert trained.objective == pytest.approx(claim.minimum, abs=1e-12)


def test_every_claim_of_the_table_is_tested(world):
    assert [claim.name for claim in exact.claims(world)] == CLAIMS


def test_a_reward_model_learns_the_true_reward_up_to_a_constant_a_prompt(world):
    learned = exact.train_reward_model(world).values
    offset = learned - world.rewards
    assert (offset - offset.mean(-1, keepdim=True)).abs().max() < TOLERANCE


def test_rlhf_and_dpo_reach_the_same_policy(world):
    """What Rafailov et al. 2023 section 4 proves: no reward model, no sampling, the same end."""
    by_policy_gradient = train_rlhf(world, 0.7).values
    by_dpo = train_to_convergence(world, lambda b: dpo_loss(*b.logps, 0.7).losses).values
    assert total_variation(by_policy_gradient, by_dpo) < TOLERANCE


def test_the_rlhf_gradient_is_the_policy_gradient_with_the_mean_as_baseline(world):
    logps = (world.reference_logps + 0.3 * world.rewards).log_softmax(-1).requires_grad_()
    (gradient,) = torch.autograd.grad(rlhf_loss(world, 0.7, logps), logps)
    probabilities = logps.detach().exp()
    advantages = world.rewards - 0.7 * (logps.detach() - world.reference_logps)
    baseline = (probabilities * advantages).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, -probabilities * (advantages - baseline) / 2)  # mean over 2 prompts


def test_smoothing_and_gamma_do_more_than_rescale_rewards(world):
    """With three responses or more, small differences of scores grow by another factor than great ones."""
    for settings in ({"label_smoothing": 0.1}, {"gamma": 1.0}):
        scores, _ = best_scores(world, **settings)
        slope = (scores - scores.mean(-1, keepdim=True)) / (
            world.rewards - world.rewards.mean(-1, keepdim=True)
        )
        assert slope.max() - slope.min() > 0.01


def test_who_draws_the_pairs_matters_to_ipo_and_not_to_dpo(world):
    other = replace(world, sampler=world.sampler.flip(-1))
    assert (
        total_variation(*(optimal_policy(w.reference_logps, beats_sampler(w), 0.2) for w in (world, other)))
        > 0.01
    )
    trained = train_to_convergence(other, lambda b: dpo_loss(*b.logps, 0.5).losses)
    best = optimal_policy(world.reference_logps, world.rewards, 0.5)
    assert total_variation(trained.values, best) < TOLERANCE


def test_no_optimum_lies_above_the_frontier(world):
    """At equal KL the RLHF optimum earns the most."""
    betas = torch.logspace(-1.5, 2, 400).tolist()
    frontier = [optimal_policy(world.reference_logps, world.rewards, beta) for beta in betas]
    for claim in exact.claims(world):
        kl, reward = divergence(world, claim.policy), expected_reward(world, claim.policy)
        within = [expected_reward(world, policy) for policy in frontier if divergence(world, policy) >= kl]
        assert reward <= min(within) + 1e-12, claim.name


# --- add your own loss --------------------------------------------------------------------------------------


def exponential_loss(b: AllPairs, beta: float) -> Tensor:
    """exp(-h beta), h = g(winner) - g(loser): a member of GPO (Tang et al. 2024), and no part of minidpo.

    Its optimum: a lone pair wants p exp(-z) + (1-p) exp(z) least, z = beta h, so z = logit(p) / 2 = (r* -
    r*') / 2. That is a difference of scores, s = r*/2, so all pairs agree and pi* is proportional to pi_ref
    exp(r* / (2 beta)). The minimum is E 2 sqrt(p (1-p)).
    """
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = b.logps
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return torch.exp(-beta * h)


def test_own_loss_lands_on_its_own_optimum(world):
    trained = train_to_convergence(world, lambda b: exponential_loss(b, 0.3))
    best = optimal_policy(world.reference_logps, world.rewards / 2, 0.3)
    assert total_variation(trained.values, best) < TOLERANCE
    p = world.preferences
    assert trained.objective == pytest.approx(
        (world.meetings * 2 * (p * (1 - p)).sqrt()).sum().item(), abs=1e-12
    )


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_prints_the_table(capsys):
    exact.main([])
    lines = capsys.readouterr().out.splitlines()
    assert "40 responses" in lines[0] and len(lines) == 3 + len(CLAIMS)
    assert [line[:32].strip() for line in lines[2:-1]] == CLAIMS
    assert float(lines[-1].split()[-1]) < TOLERANCE


def test_a_missed_optimum_ends_the_command_with_an_error(monkeypatch, world):
    wrong = optimal_policy(world.reference_logps, world.rewards, 2.0)
    first = exact.claims(world)[0]
    monkeypatch.setattr(exact, "make_world", lambda seed: world)
    monkeypatch.setattr(exact, "claims", lambda world: [first._replace(policy=wrong)])
    with pytest.raises(SystemExit, match="missed"):
        exact.main([])


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    small = make_world(seed=1, prompts=1, words=1, max_tokens=1, hidden_size=8)
    exact.plot_frontier(small, [claim.policy for claim in exact.claims(small)], tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_one_line_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[plot\]'"):
        exact.main(["--plot", str(tmp_path / "frontier.png")])


def test_a_figure_that_cannot_be_written_is_refused_before_training(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="no such directory"):
        exact.main(["--plot", str(tmp_path / "missing" / "frontier.png")])


def test_population_loss_at_the_reference_is_ln_2(world):
    start = population_loss(world, lambda b: dpo_loss(*b.logps, 0.5).losses, world.reference_logps)
    assert start.item() == pytest.approx(math.log(2), abs=1e-14)
