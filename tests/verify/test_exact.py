"""In a world whose responses can be listed, each loss that has an optimum with gradient 0 leads to it."""

import math
from dataclasses import replace

import pytest
import torch

from minidpo.losses import DPO, IPO, Hinge, SimPO
from minidpo.tools import exact
from minidpo.verify.exact_train import rlhf_loss, train_to_convergence
from minidpo.verify.exact_world import beats_sampler, make_world, newton, optimal_policy, total_variation

torch.set_num_threads(1)  # matrices this small are faster so
WORLD = make_world(seed=0, prompts=2, words=2, max_tokens=2, hidden_size=8)  # seven responses to each prompt
SMALL = make_world(seed=1, prompts=1, words=1, max_tokens=1, hidden_size=8)  # two responses: EOS or one word
NAMES = [row.name for row in exact.table(SMALL)]


def test_world():
    """The listed responses are all there is, and so are the pairs."""
    torch.testing.assert_close(WORLD.reference_logps.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    assert WORLD.wins().sum().item() == pytest.approx(1, abs=1e-14)
    assert sorted(WORLD.lengths[0].tolist()) == [1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("name", NAMES[-2:])
def test_rlhf(name):
    """RLHF ends at the derived optimum, policy and objective, in one stage or two. (tests/losses asks it of
    the other rows.)"""
    row = exact.table(WORLD)[NAMES.index(name)]
    trained = row.train()
    assert total_variation(trained.values, row.policy) < 1e-5
    assert trained.objective == pytest.approx(row.minimum, abs=1e-12)


def test_minima():
    """The least DPO loss is the entropy of the labels; that of IPO 1/(4 beta^2) - 2 Var_mu(p*(y beats mu)) /
    beta^2, because the residual of least squares is orthogonal to the fit; the best RLHF objective is beta
    log Z."""
    least = {row.name: row.minimum for row in exact.table(WORLD)}
    p, mu, wins = WORLD.preferences, WORLD.sampler, beats_sampler(WORLD)
    entropy = (WORLD.wins() * -p.log()).sum().item()
    for name in ("DPO", "DPO, averages", "SimPO, gamma 0", "robust DPO, 10 % swapped", NAMES[-1]):
        assert least[name] == pytest.approx(entropy, abs=1e-12)
    variance = (mu * wins.square()).sum(-1) - (mu * wins).sum(-1).square()
    assert least["IPO"] == pytest.approx((1 / (4 * 0.2**2) - 2 * variance / 0.2**2).mean().item(), abs=1e-12)
    log_z = (WORLD.reference_logps + WORLD.rewards / 0.5).logsumexp(-1)
    assert least[NAMES[-2]] == pytest.approx(-0.5 * log_z.mean().item(), abs=1e-12)


def test_rlhf_gradient():
    """The gradient of the RLHF loss is the policy gradient with the mean as baseline."""
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


def test_newton(monkeypatch):
    """A minimum is certified: near a top the step goes downhill; at one, or without a bottom, it says so."""
    # In forward mode PyTorch 2.14 warns of a function of its own, in the middle of the table of `exact`.
    monkeypatch.delattr(torch.autograd.forward_ad, "make_dual")
    wells, zeros = lambda x: ((x**2 - 1) ** 2).sum(), torch.zeros(1, 2, dtype=torch.float64)
    table = newton(wells, torch.tensor([[0.1, -0.2]], dtype=torch.float64))
    assert table.tolist() == [[pytest.approx(1), pytest.approx(-1)]]
    for objective, says in ((wells, "gradient 0.0"), (lambda x: -x.sum() - x.square().sum(), "found in")):
        with pytest.raises(RuntimeError, match=f"no minimum.* {says}"):
            newton(objective, zeros)
    # The hinge loss has no second derivative at its optimum, so it is refused.
    with pytest.raises(RuntimeError, match="kink|not converged"):
        train_to_convergence(SMALL, Hinge(0.5))


def learned(loss) -> float:
    """What training adds to the difference of the two responses' log-probs, here of 1 token each."""
    moved = train_to_convergence(SMALL, loss).values - loss.needs_reference * SMALL.reference_logps
    return (moved[0, 0] - moved[0, 1]).item()


def test_two_responses():
    """DPO with smoothing e goes to logit(q) / beta, IPO to (2p - 1) / (2 beta), whatever the sampler.

    p is how often y wins over y', and q = (1-e) p + e (1-p). Against a response drawn from mu, y wins
    mu(y)/2 + mu(y') p of the time, which is the score that IPO learns. Of SimPO, with u = exp(z) and
    k = exp(-gamma), p/(1-p) = sigma(z + gamma) / sigma(gamma - z) is the quadratic k u^2 + (1 - R) u - R k = 0.
    """
    p = SMALL.preferences[0, 0, 1].item()
    q = 0.8 * p + 0.2 * (1 - p)
    assert learned(DPO(0.5, label_smoothing=0.2)) == pytest.approx(math.log(q / (1 - q)) / 0.5, abs=1e-6)
    assert learned(IPO(0.3)) == pytest.approx((2 * p - 1) / (2 * 0.3), abs=1e-6)
    ratio, k = p / (1 - p), math.exp(-2.0)
    u = ((ratio - 1) + math.sqrt((ratio - 1) ** 2 + 4 * k * k * ratio)) / (2 * k)
    assert learned(SimPO(beta=2.0, gamma=2.0)) == pytest.approx(math.log(u) / 2.0, abs=1e-6)


def test_table(monkeypatch, capsys):
    """The command prints one row per claim; an optimum that is missed, or is no number, ends it with an error."""
    monkeypatch.setattr(exact, "make_world", lambda seed: {3: SMALL}[seed])
    exact.main(["--seed", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert "2 responses" in lines[0] and [line[:32].strip() for line in lines[2:-1]] == NAMES
    assert float(lines[-1].split()[-1]) < 1e-5
    right = exact.table(SMALL)[0]
    for policy in (SMALL.reference_logps, SMALL.reference_logps * math.nan):
        monkeypatch.setattr(exact, "table", lambda world, wrong=policy: [right._replace(policy=wrong), right])
        with pytest.raises(SystemExit, match="missed"):
            exact.main(["--seed", "3"])
