"""In a world small enough to list, every loss leads where it was derived to lead."""

import math
from dataclasses import replace

import pytest
import torch

from minidpo.errors import UserError
from minidpo.losses import DPO, IPO, SimPO
from minidpo.tools import exact
from minidpo.verify.exact_train import (
    label_weights,
    rlhf_loss,
    train_reward_model,
    train_to_convergence,
)
from minidpo.verify.exact_world import (
    beats_sampler,
    best_scores,
    divergence,
    expected_reward,
    make_world,
    optimal_policy,
    total_variation,
)

TOLERANCE = 1e-5
SMALL = make_world(seed=1, prompts=1, words=1, max_tokens=1, hidden_size=8)  # two responses: EOS or one word
NAMES = [claim.name for claim in exact.claims(SMALL)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world():
    """Two prompts with 15 responses each."""
    return make_world(seed=0, prompts=2, words=2, max_tokens=3, hidden_size=16)


# --- the world ----------------------------------------------------------------------------------------------


def test_world(world):
    """The listed responses are all there is, and so are the pairs."""
    torch.testing.assert_close(world.reference_logps.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    assert label_weights(world).sum().item() == pytest.approx(1, abs=1e-14)
    assert sorted(set(world.lengths.flatten().tolist())) == [1, 2, 3]


def test_reference_logps(world):
    """Each is what one textbook forward pass of the prompt and this response alone gives."""
    for (start, prompt_end, end), packed in zip(
        world.alone.bounds, world.reference_logps.flatten(), strict=True
    ):
        tokens = torch.tensor(world.alone.ids[start:end]).long()
        with torch.no_grad():
            steps = world.reference(tokens[None])[0].log_softmax(-1)
        first = int(prompt_end - start)
        logp = sum(steps[t - 1, tokens[t]].item() for t in range(first, len(tokens)))
        assert logp == pytest.approx(packed.item(), abs=1e-12)


# --- where each loss leads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", range(len(NAMES)), ids=NAMES)
def test_claims(world, row):
    """Training ends at the optimum derived on paper, policy and objective."""
    claim = exact.claims(world)[row]
    trained = claim.train()
    assert total_variation(world.reference_logps, claim.policy) > 0.05  # there was something to learn
    assert total_variation(claim.to_policy(trained.values), claim.policy) < TOLERANCE
    assert trained.objective == pytest.approx(claim.minimum, abs=1e-12)


def test_reward_model(world):
    """It learns the true reward up to a constant per prompt."""
    offset = train_reward_model(world).values - world.rewards
    assert (offset - offset.mean(-1, keepdim=True)).abs().max() < TOLERANCE


def test_rlhf_gradient(world):
    """It is the policy gradient with the mean as baseline."""
    logps = (world.reference_logps + 0.3 * world.rewards).log_softmax(-1).requires_grad_()
    (gradient,) = torch.autograd.grad(rlhf_loss(world, 0.7, logps), logps)
    probabilities = logps.detach().exp()
    advantages = world.rewards - 0.7 * (logps.detach() - world.reference_logps)
    baseline = (probabilities * advantages).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, -probabilities * (advantages - baseline) / 2)  # mean over 2 prompts


def test_sampler(world):
    """Who draws the pairs matters to IPO, and not to DPO."""
    other = replace(world, sampler=world.sampler.flip(-1))
    ipo = [optimal_policy(w.reference_logps, beats_sampler(w), 0.2) for w in (world, other)]
    assert total_variation(*ipo) > 0.01
    best = optimal_policy(world.reference_logps, world.rewards, 0.5)
    assert total_variation(train_to_convergence(other, DPO(0.5)).values, best) < TOLERANCE


def test_frontier(world):
    """No optimum lies above it: at equal KL the RLHF optimum earns the most."""
    betas = torch.logspace(-1.5, 2, 400).tolist()
    frontier = [optimal_policy(world.reference_logps, world.rewards, beta) for beta in betas]
    for claim in exact.claims(world):
        kl, reward = divergence(world, claim.policy), expected_reward(world, claim.policy)
        within = [expected_reward(world, policy) for policy in frontier if divergence(world, policy) >= kl]
        assert reward <= min(within) + 1e-12, claim.name


def test_kink():
    """A hinge has no second derivative at its optimum; softplus(k (1 - z)) / k is a hinge that has."""
    with pytest.raises(RuntimeError, match="kink|not converged"):
        train_to_convergence(SMALL, lambda pairs: torch.relu(1 - DPO(0.5).z(pairs)))


# --- two responses: every loss on pairs has a closed form ---------------------------------------------------


def difference(table: torch.Tensor) -> float:
    return (table[0, 0] - table[0, 1]).item()


def test_smoothed_dpo_of_two_responses():
    p, e, beta = SMALL.preferences[0, 0, 1].item(), 0.2, 0.5
    q = (1 - e) * p + e * (1 - p)
    learned = train_to_convergence(SMALL, DPO(beta, label_smoothing=e)).values - SMALL.reference_logps
    assert difference(learned) == pytest.approx(math.log(q / (1 - q)) / beta, abs=1e-6)


def test_ipo_of_two_responses():
    """p*(y beats mu) = mu(y)/2 + mu(y') p, so h* has no mu left: (2p - 1) / (2 beta)."""
    p, beta = SMALL.preferences[0, 0, 1].item(), 0.3
    learned = train_to_convergence(SMALL, IPO(beta)).values - SMALL.reference_logps
    assert difference(learned) == pytest.approx((2 * p - 1) / (2 * beta), abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_simpo_of_two_responses(gamma):
    """The quadratic in `best_scores`: from a difference of rewards to one of average log-probs."""
    trained = train_to_convergence(SMALL, SimPO(beta=2.0, gamma=gamma))
    ratio, k = math.exp(difference(SMALL.rewards)), math.exp(-gamma)
    u = ((ratio - 1) + math.sqrt((ratio - 1) ** 2 + 4 * k * k * ratio)) / (2 * k)
    assert 2.0 * difference(trained.values / SMALL.lengths) == pytest.approx(math.log(u), abs=1e-6)


def test_gamma_stretches_small_differences_most():
    """(1 + exp(gamma)) / 2 times near zero, gamma more far out."""
    gamma = 1.0
    for rewards, stretched in [(1e-4, 1e-4 * (1 + math.e) / 2), (12.0, 12.0 + gamma)]:
        pair = replace(SMALL, rewards=torch.tensor([[rewards, 0.0]], dtype=torch.float64))
        assert difference(best_scores(pair, gamma=gamma)[0]) == pytest.approx(stretched, rel=1e-4)


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_table(capsys):
    """The command prints one row per claim, each at its optimum."""
    exact.main([])
    lines = capsys.readouterr().out.splitlines()
    assert "40 responses" in lines[0] and len(lines) == 3 + len(NAMES)
    assert [line[:32].strip() for line in lines[2:-1]] == NAMES
    assert float(lines[-1].split()[-1]) < TOLERANCE


def test_missed_optimum(monkeypatch):
    """It ends the command with an error."""
    wrong = optimal_policy(SMALL.reference_logps, SMALL.rewards, 2.0)
    first = exact.claims(SMALL)[0]
    monkeypatch.setattr(exact, "make_world", lambda seed: SMALL)
    monkeypatch.setattr(exact, "claims", lambda world: [first._replace(policy=wrong)])
    with pytest.raises(SystemExit, match="missed"):
        exact.main([])


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    exact.plot_frontier(SMALL, [claim.policy for claim in exact.claims(SMALL)], tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"


def test_refused_figures(monkeypatch, tmp_path):
    """A figure that cannot be drawn is refused before minutes of training."""
    with pytest.raises(UserError, match=r"must end in .png, .svg or .pdf"):
        exact.main(["--plot", str(tmp_path / "frontier.jpeg")])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[plot\]'"):
        exact.main(["--plot", str(tmp_path / "frontier.png")])
