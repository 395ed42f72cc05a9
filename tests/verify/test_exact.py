"""In a world small enough to list, every loss leads where it was derived to lead."""

import math
from dataclasses import replace

import pytest
import torch

from minidpo.errors import UserError
from minidpo.losses import DPO, IPO, KTO, Hinge, PairLogps, RobustDPO, SimPO
from minidpo.tools import exact
from minidpo.verify.exact_train import (
    Trained,
    label_weights,
    rlhf_loss,
    train_to_convergence,
    winners_and_losers,
)
from minidpo.verify.exact_world import (
    beats_sampler,
    divergence,
    expected_reward,
    make_world,
    optimal_policy,
    total_variation,
)
from minidpo.verify.optima import best_policy, best_scores, newton

torch.set_num_threads(1)  # matrices this small are faster so
WORLD = make_world(seed=0, prompts=2, words=2, max_tokens=2, hidden_size=8)  # seven responses to each prompt
SMALL = make_world(seed=1, prompts=1, words=1, max_tokens=1, hidden_size=8)  # two responses: EOS or one word
NAMES = [claim.name for claim in exact.claims(SMALL)]


def test_world():
    """The listed responses are all there is, and so are the pairs."""
    torch.testing.assert_close(WORLD.reference_logps.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    assert label_weights(WORLD).sum().item() == pytest.approx(1, abs=1e-14)
    assert sorted(WORLD.lengths[0].tolist()) == [1, 2, 2, 2, 2, 2, 2]


def test_reference():
    """Its log-probs are those of one textbook forward pass of each prompt and response alone."""
    bounds, logps = WORLD.alone.bounds, WORLD.reference_logps.flatten().tolist()
    for (start, prompt_end, end), logp in zip(bounds, logps, strict=True):
        tokens = torch.tensor(WORLD.alone.ids[start:end]).long()
        with torch.no_grad():
            steps = WORLD.reference(tokens[None])[0].log_softmax(-1)
        scored = range(int(prompt_end - start), len(tokens))
        assert sum(steps[t - 1, tokens[t]].item() for t in scored) == pytest.approx(logp, abs=1e-12)


@pytest.mark.parametrize("row", range(len(NAMES)), ids=NAMES)
def test_claims(row):
    """Training ends at the optimum derived on paper, policy and objective."""
    claim = exact.claims(WORLD)[row]
    trained = claim.train()
    assert total_variation(WORLD.reference_logps, claim.policy) > 0.05  # there was something to learn
    assert total_variation(claim.to_policy(trained.values), claim.policy) < 1e-5
    assert trained.objective == pytest.approx(claim.minimum, abs=1e-12)


def test_rlhf_gradient():
    """It is the policy gradient with the mean as baseline."""
    logps = (WORLD.reference_logps + 0.3 * WORLD.rewards).log_softmax(-1).requires_grad_()
    (gradient,) = torch.autograd.grad(rlhf_loss(WORLD, 0.7, logps), logps)
    probabilities = logps.detach().exp()
    advantages = WORLD.rewards - 0.7 * (logps.detach() - WORLD.reference_logps)
    baseline = (probabilities * advantages).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, -probabilities * (advantages - baseline) / 2)  # mean over 2 prompts


def test_sampler():
    """Who draws the pairs matters to IPO, and not to DPO."""
    other = replace(WORLD, sampler=WORLD.sampler.flip(-1))
    ipo = [optimal_policy(world.reference_logps, beats_sampler(world), 0.2) for world in (WORLD, other)]
    assert total_variation(*ipo) > 0.01
    best = optimal_policy(WORLD.reference_logps, WORLD.rewards, 0.5)
    assert total_variation(train_to_convergence(other, DPO(0.5)).values, best) < 1e-5


def test_frontier():
    """No optimum lies above it: at equal KL the RLHF optimum earns the most."""
    betas = torch.logspace(-1.5, 2, 400).tolist()
    frontier = [optimal_policy(WORLD.reference_logps, WORLD.rewards, beta) for beta in betas]
    for claim in exact.claims(WORLD):
        kl, reward = divergence(WORLD, claim.policy), expected_reward(WORLD, claim.policy)
        within = [expected_reward(WORLD, policy) for policy in frontier if divergence(WORLD, policy) >= kl]
        assert reward <= min(within) + 1e-12, claim.name


def test_offset():
    """With the same margin for all pairs, ODPO's offset is SimPO's gamma on DPO's reward."""
    odpo = DPO(0.5, margin_from_data=True)
    trained = train_to_convergence(WORLD, lambda p: odpo(p._replace(margin=torch.full_like(p.chosen, 0.7))))
    best = optimal_policy(WORLD.reference_logps, best_scores(WORLD, gamma=0.7)[0], 0.5)
    assert total_variation(trained.values, best) < 1e-5


@pytest.mark.parametrize("loss", [DPO(0.5), IPO(0.3), SimPO(2.0), RobustDPO(0.5, flip_rate=0.01)], ids=repr)
def test_sft_term(loss):
    """Beside any loss of pairs, with any weight, training ends where Newton's method finds the minimum."""
    mixed = replace(loss, sft_weight=0.3)

    def losses(logps):
        tables = (logps, WORLD.reference_logps, WORLD.lengths)
        return mixed(PairLogps(*(x for table in tables for x in winners_and_losers(table)))).reshape(2, 7, 7)

    policy, least = best_policy(WORLD, losses)
    trained = train_to_convergence(WORLD, mixed)
    assert total_variation(trained.values, policy) < 1e-5 and trained.objective == pytest.approx(
        least, abs=1e-12
    )
    assert total_variation(trained.values, train_to_convergence(WORLD, loss).values) > 0.01


def test_newton():
    """A minimum is certified: at a saddle the step goes downhill, and where there is no bottom it says so."""
    table, least = newton(
        lambda x: ((x**2 - 1) ** 2).sum() + 2, torch.tensor([[0.1, -0.2]], dtype=torch.float64)
    )
    assert table.tolist() == [[pytest.approx(1), pytest.approx(-1)]] and least == pytest.approx(2)
    with pytest.raises(RuntimeError, match="no minimum"):
        newton(lambda x: -x.sum() - x.square().sum(), torch.zeros(1, 2, dtype=torch.float64))


def test_kink():
    """The hinge loss has no second derivative at its optimum, so it is refused."""
    with pytest.raises(RuntimeError, match="kink|not converged"):
        train_to_convergence(SMALL, Hinge(0.5))


def test_kto_has_no_optimum():
    """Moving all probability from what is undesirable more often than not lowers the loss further and further."""
    wins = (WORLD.sampler * beats_sampler(WORLD))[:, :, None]  # how often y is seen, and seen as desirable
    seen = torch.cat((wins, WORLD.sampler[:, :, None] - wins), dim=2) / 2  # (X, Y, 2), mean over 2 prompts
    bad = beats_sampler(WORLD) < 0.5
    assert bad.any(1).all() and not bad.all(1).any()

    def loss(share: float) -> float:
        """KTO's, of a policy that has moved this share of the probability of bad responses to good ones."""
        p = WORLD.reference_logps.exp()
        moved = torch.where(bad, share * p, 0.0).sum(1, keepdim=True)
        p = torch.where(bad, (1 - share) * p, p + moved / (~bad).sum(1, keepdim=True))
        logps, ref = (x[:, :, None].expand(seen.shape).flatten() for x in (p.log(), WORLD.reference_logps))
        label = torch.tensor([True, False]).expand(seen.shape).flatten()
        records = PairLogps(logps, ref_chosen=ref, label=label, z0=torch.full_like(ref, 0.1))
        return (seen.flatten() * KTO(0.5)(records)).sum().item()

    losses = [loss(share) for share in (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999)]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 6


def difference(table: torch.Tensor) -> float:
    return (table[0, 0] - table[0, 1]).item()


def learned(loss) -> float:
    return difference(train_to_convergence(SMALL, loss).values - SMALL.reference_logps)


def test_two_responses():
    """DPO with smoothing e goes to logit(q) / beta, IPO to (2p - 1) / (2 beta), whatever the sampler.

    p is how often the first wins and q = (1-e) p + e (1-p). IPO: p*(y beats mu) = mu(y)/2 + mu(y') p.
    """
    p = SMALL.preferences[0, 0, 1].item()
    q = 0.8 * p + 0.2 * (1 - p)
    assert learned(DPO(0.5, label_smoothing=0.2)) == pytest.approx(math.log(q / (1 - q)) / 0.5, abs=1e-6)
    assert learned(IPO(0.3)) == pytest.approx((2 * p - 1) / (2 * 0.3), abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_two_responses_simpo(gamma):
    """The quadratic in `best_scores`: from a difference of rewards to one of average log-probs."""
    trained = train_to_convergence(SMALL, SimPO(beta=2.0, gamma=gamma))
    ratio, k = math.exp(difference(SMALL.rewards)), math.exp(-gamma)
    u = ((ratio - 1) + math.sqrt((ratio - 1) ** 2 + 4 * k * k * ratio)) / (2 * k)
    assert 2.0 * difference(trained.values / SMALL.lengths) == pytest.approx(math.log(u), abs=1e-6)


# --- the command --------------------------------------------------------------------------------------------


def test_table(monkeypatch, capsys):
    """The command prints one row per claim; an optimum that is missed ends it with an error."""
    monkeypatch.setattr(exact, "make_world", lambda seed: SMALL)
    exact.main([])
    lines = capsys.readouterr().out.splitlines()
    assert "2 responses" in lines[0] and [line[:32].strip() for line in lines[2:-1]] == NAMES
    assert float(lines[-1].split()[-1]) < 1e-5
    wrong = exact.claims(SMALL)[0]._replace(policy=SMALL.reference_logps)
    monkeypatch.setattr(exact, "claims", lambda world: [wrong])
    with pytest.raises(SystemExit, match="missed"):
        exact.main([])


def test_figure(monkeypatch, tmp_path):
    """The policies trained at three strengths are drawn; a stand-in trains here."""
    pytest.importorskip("matplotlib")
    for train in ("train_to_convergence", "train_rlhf", "train_reward_model"):
        monkeypatch.setattr(exact, train, lambda world, *_: Trained(world.reference_logps, 0.0, 1))
    exact.plot_frontier(SMALL, [claim.policy for claim in exact.claims(SMALL)], tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"


def test_refused_figure(monkeypatch, tmp_path):
    """A figure that cannot be drawn is refused before minutes of training."""
    with pytest.raises(UserError, match=r"must end in .png, .svg or .pdf"):
        exact.main(["--plot", str(tmp_path / "frontier.jpeg")])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[plot\]'"):
        exact.main(["--plot", str(tmp_path / "frontier.png")])
