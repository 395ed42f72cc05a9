"""verify: losses of other programs, as functions, are held to the claims of ours."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from minidpo.errors import UserError
from minidpo.losses import DPO, IPO, KTO, BradleyTerry, SimPO
from minidpo.losses.log_ratios import LogRatioLoss
from minidpo.verify import Claims, claims, claims_of, verify
from minidpo.verify.claims import OF_THE_DIFFERENCE, PAIR

ALL_BUT_EXACT = "points twin gradient gradcheck tie alone mirror unmoved far bf16".split()
RESPONSES = ("chosen", "rejected")


def margin(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
    return policy_chosen_logps - policy_rejected_logps - (reference_chosen_logps - reference_rejected_logps)


def of_margin(form):
    def loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
        return form(margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps), beta)

    return loss


@pytest.mark.parametrize(
    "returns", [lambda x: x, lambda x: (x, 0), torch.mean], ids=["losses", "tuple", "mean"]
)
def test_right(returns):
    """A function that is DPO passes, whatever it returns its losses in."""
    report = verify(of_margin(lambda m, beta: returns(-logsigmoid(beta * m))), DPO(), checks=ALL_BUT_EXACT)
    assert {verdict.verdict for verdict in report.verdicts} == {"holds"}, report


def test_constants():
    """A reference and a z0 that are taken as constants refute nothing."""

    def kto(policy_logps, reference_logps, labels, kl, beta=0.1):
        z = beta * (policy_logps - (reference_logps + kl).detach())
        return torch.sigmoid(torch.where(labels, -z, z))

    report = verify(kto, KTO(), checks=ALL_BUT_EXACT)
    assert not report.refuted and report.verdicts[3].figure.startswith("2 inputs"), report


def first_trained(losses):
    """Their mean, with the gradient of the first alone."""
    return losses.mean().detach() + losses[0] - losses[0].detach()


# Mistakes of functions, and the checks that must find them. tests/losses has a longer list.
WRONG = {
    "mean of the margins": (lambda m, beta: -logsigmoid(beta * m.mean()), {"alone"}),
    "one pair trained": (lambda m, beta: first_trained(-logsigmoid(beta * m)), {"alone"}),
    "sum over the batch": (lambda m, beta: -logsigmoid(beta * m).sum(), {"alone"}),
    "exp in bf16": (lambda m, beta: (1 + (-beta * m).exp()).log(), {"far", "bf16"}),
    "responses swapped": (lambda m, beta: -logsigmoid(-beta * m), {"points", "twin", "gradient", "mirror"}),
    "beta ignored": (lambda m, beta: -logsigmoid(0.1 * m), {"points", "twin", "exact"}),
    "kept in float32": (lambda m, beta: -logsigmoid(beta * m.float()), {"twin"}),
    "two columns": (lambda m, beta: -logsigmoid(beta * m)[:, None], {"twin", "far"}),
    "cut off": (lambda m, beta: -logsigmoid(beta * m.detach()), {"twin", "gradcheck"}),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong(mistake):
    """Each check that must refute the mistake does, with a counterexample."""
    form, must = WRONG[mistake]
    report = verify(of_margin(form), DPO(), checks=must)
    assert set(report.refuted) == must, report
    assert all(verdict.counterexample for verdict in report.verdicts)


def test_reference_ignored():
    """A number added to policy and reference alike must not matter."""

    def no_reference(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
        return -logsigmoid(beta * (chosen_logps - rejected_logps))

    report = verify(no_reference, DPO(), checks=["unmoved"])
    assert "same number added to chosen and ref_chosen" in report.verdicts[0].counterexample


def test_said_once():
    """What is the same in every check is said once."""
    raises, returns_none = lambda m, beta: m.no_such_method(), lambda m, beta: None
    for form, says in ((raises, "it raises AttributeError"), (returns_none, "it returns NoneType")):
        report = verify(of_margin(form), DPO(), checks=ALL_BUT_EXACT)
        assert str(report).count(says) == 1 and report.refuted == ALL_BUT_EXACT
        assert str(report).count("(as above)") == len(ALL_BUT_EXACT) - 1


def test_not_asked():
    """What its settings cannot express is not asked: beta is fixed, so nothing is claimed at another one."""
    report = verify(
        lambda pi_w, pi_l, ref_w, ref_l: -logsigmoid(0.3 * margin(pi_w, pi_l, ref_w, ref_l)), DPO(0.3)
    )
    verdicts = {verdict.check: verdict.verdict for verdict in report.verdicts}
    assert verdicts["points"] == verdicts["exact"] == "not asked" and verdicts["twin"] == "holds"
    assert "and this loss cannot be set to one of them" in str(report)


def test_own_claims():
    """Claims of one's own need no loss of ours: a squared hinge, where z = 0.1 * (3 - -1) = 0.4 on PAIR."""
    z = lambda p, s: s.beta * (p.chosen - p.ref_chosen - p.rejected + p.ref_rejected)  # noqa: E731
    points = [(dict(), PAIR, 0.36), (dict(beta=0.2), PAIR, 0.04)]  # (1 - 0.4)^2, (1 - 0.8)^2
    claims = Claims(points, twin=lambda p, s: np.maximum(0, 1 - z(p, s)) ** 2, unmoved=OF_THE_DIFFERENCE)
    right = of_margin(lambda m, beta: torch.relu(1 - beta * m).square())
    asked = ["points", "twin", "gradcheck", "tie", "alone", "unmoved", "far", "bf16"]
    report = verify(right, claims=claims)
    assert [v.check for v in report.verdicts if v.verdict == "holds"] == asked, report
    assert "loss, held to the claims given" in str(report) and "not tested" not in str(report)
    wrong = verify(right, claims=replace(claims, mirror=z, twin=lambda p, s: z(p, s) ** 2))
    assert wrong.refuted == ["twin", "mirror", "far"], wrong


def test_untested():
    """What no check varies is named. A number is a setting, if it is an integer too."""

    def smoothed(m, beta, smoothing=0.0, pairs=None):
        return (smoothing - 1) * logsigmoid(beta * m) + smoothing * logsigmoid(-beta * m)  # its sign is wrong

    def loss(chosen_logps, rejected_logps, ref_w, ref_l, beta=1, smoothing=0.0, pairs=None):
        return smoothed(margin(chosen_logps, rejected_logps, ref_w, ref_l), beta, smoothing, pairs)

    report = verify(loss, DPO(), checks=["twin"])
    assert not report.refuted and "left at the default, not tested: smoothing, pairs\n" in str(report)
    claims = Claims([(dict(beta=2), PAIR, 0.3711006659)])  # z = 2 * 0.4 / 2; ln(1 + exp(-0.8))
    report = verify(
        lambda pi_w, pi_l, ref_w, ref_l, beta=1: loss(pi_w, pi_l, ref_w, ref_l, 0.1 * beta), claims=claims
    )
    assert not report.refuted and report.verdicts[0].verdict == "holds", report


def test_switch():
    """A switch, True or False, is a setting of a function with claims of its own."""

    def loss(chosen_logps, rejected_logps, flip=False):
        return -logsigmoid((chosen_logps - rejected_logps) * (-1 if flip else 1))

    # chosen - rejected is -10 + 20: ln(1 + exp(-10)), and ln(1 + exp(10)) if flipped
    own = Claims([(dict(), PAIR, 0.0000453989), (dict(flip=True), PAIR, 10.0000453989)])
    report = verify(loss, claims=own, checks=["points"])
    assert report.verdicts[0].figure.startswith("2 points"), report


def test_margin():
    """What only some points have is asked at those: at none, if it claims to be DPO without margins."""

    def odpo(pi_w, pi_l, ref_w, ref_l, margin, beta=0.1):
        return -logsigmoid(beta * (pi_w - pi_l - (ref_w - ref_l)) - margin)

    report = verify(odpo, DPO(margin_from_data=True), checks=["points", "twin"])
    assert not report.refuted and report.verdicts[0].figure.startswith("1 points"), report
    points, twin = verify(odpo, DPO(), checks=["points", "twin"]).verdicts
    assert points.verdict == "not asked" and twin.verdict == "refuted"


@dataclass(frozen=True)
class Plain(LogRatioLoss):
    """DPO with no setting but beta."""

    name, equation = "plain", "-log sigma(z)"

    def preference(self, logps):
        return -logsigmoid(self.z(logps))


def test_own_class():
    """A class of one's own is held to the claims of a loss, with the settings that it has."""
    report = verify(Plain, DPO(beta=0.3), checks=[*ALL_BUT_EXACT, "reads"])
    assert not report.refuted and report.verdicts[0].figure.startswith("4 points"), report
    assert report.title == "Plain(beta=0.3)" and verify(Plain, IPO(), checks=["twin"]).refuted
    with pytest.raises(
        UserError, match="no claims for the loss 'plain': write minidpo/verify/claims/plain.py"
    ):
        verify(Plain)


def test_sft_term():
    """Claims of one's own leave out the SFT term, as ours do, and any equation."""
    twin = Claims(twin=lambda p, s: np.logaddexp(0, -s.beta * claims.margin(p)))
    gradient = Claims(
        gradient=lambda p, s: claims.of_margin(p, -s.beta * claims.sigma(-s.beta * claims.margin(p)))
    )
    for own in (twin, gradient, claims_of(DPO)):
        report = verify(DPO(sft_weight=0.5), claims=own, checks=ALL_BUT_EXACT)
        assert not report.refuted, report


def test_stop_gradient():
    """A beta of the batch, taken as a constant, is right where the gradient says so; another gradient is not."""
    batch_beta = lambda m: 0.1 + 0.001 * m.mean()  # noqa: E731
    right = of_margin(lambda m, beta: -logsigmoid(batch_beta(m).detach() * m))
    wrong = of_margin(lambda m, beta: -logsigmoid(batch_beta(m) * m))
    half = of_margin(lambda m, beta: -logsigmoid(batch_beta(m).detach() * (m + m.detach()) / 2))

    def gradient(p, s):
        m = claims.margin(p)
        return claims.of_margin(p, -batch_beta(m) * claims.sigma(-batch_beta(m) * m))

    own = Claims(gradient=gradient, independent=False)
    report = verify(right, claims=own)
    gradcheck = next(v for v in report.verdicts if v.check == "gradcheck")
    assert not report.refuted and "with a constant" in gradcheck.counterexample, report
    assert verify(right, claims=replace(own, gradient=None)).refuted == ["gradcheck"]
    assert verify(wrong, claims=own, checks=["gradient"]).refuted
    assert verify(half, claims=own, checks=["gradcheck"]).refuted


def test_not_independent():
    """A loss that compares with the batch says so, and is not asked whether a pair is the same alone."""
    centred = of_margin(lambda m, beta: -logsigmoid(beta * (m - m.mean())))
    for independent, verdict in ((True, "refuted"), (False, "not asked")):
        report = verify(centred, claims=Claims(independent=independent), checks=["alone"])
        assert report.verdicts[0].verdict == verdict


def test_arguments():
    """What names do not tell is told: here averages under the names of sums, and beta as tau."""

    def loss(chosen_logps, rejected_logps, tau, gamma=1.0):
        return -logsigmoid(tau * (chosen_logps - rejected_logps) - gamma)

    told = dict(chosen_logps=lambda p: p.mean_logps()[0], rejected_logps=lambda p: p.mean_logps()[1])
    report = verify(loss, SimPO(), arguments=told, settings=dict(tau="beta"), checks=ALL_BUT_EXACT)
    assert not report.refuted and report.verdicts[0].figure.startswith("3 points"), report
    float32 = {
        f"{y}_logps": lambda p, y=y: getattr(p, y) / getattr(p, f"{y}_length").float() for y in RESPONSES
    }
    assert not verify(loss, SimPO(), arguments=float32, settings=dict(tau="beta"), checks=["bf16"]).refuted
    assert verify(loss, SimPO(), settings=dict(tau="beta"), checks=["twin"]).refuted


def test_rewards():
    """A reward model's loss, an nn.Module as in OpenRLHF."""

    class PairWise(torch.nn.Module):
        def forward(self, chosen_reward, reject_reward, margin=None):
            return -logsigmoid(chosen_reward - reject_reward).mean()

    assert not verify(PairWise(), BradleyTerry(lm_weight=0.0)).refuted


@pytest.mark.parametrize(
    ("loss", "told", "says"),
    [
        (lambda x, y: x, {}, r"what is its argument 'x'\? Say it with minidpo.verify.verify\(..., arguments"),
        (lambda x: x, dict(arguments=dict(x="chosn")), "'x' cannot be 'chosn'; there are chosen, rejected"),
        (margin, dict(arguments=dict(z="chosen")), "no argument 'z'; it has policy_chosen_logps"),
        (lambda beta=0.1: beta, {}, "none of its arguments"),
        (DPO(), dict(arguments=dict(chosen="chosen")), "arguments and settings are for a function's"),
        (margin, dict(checks=["twins"]), "no check twins; there are points, twin"),
        (
            Plain(),
            dict(claims=Claims([(dict(beat=1), PAIR, 0)])),
            "no setting 'beat'; there are sft_weight, beta",
        ),
        (
            margin,
            dict(claims=Claims([({}, dict(chosn=1), 0)])),
            "no number of a pair 'chosn'; there are chosen,",
        ),
        (Plain(), dict(claims=Claims(twin=lambda p, s: p.chosn)), "the claims raise AttributeError: .*twin"),
        (
            margin,
            dict(claims=Claims(unmoved=dict(x=lambda p: 1 / 0))),
            "raise ZeroDivisionError: .*unmoved, x",
        ),
    ],
)
def test_refused(loss, told, says):
    """A description that says too little, or what is not there, is one line."""
    with pytest.raises(UserError, match=says):
        verify(loss, **told)
