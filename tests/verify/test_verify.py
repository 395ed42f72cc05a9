"""verify: losses of other programs, as functions, are held to the claims of ours."""

from dataclasses import dataclass, make_dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid, softplus

from minidpo.errors import UserError
from minidpo.losses import DPO, IPO, KTO, BradleyTerry, Hinge
from minidpo.losses.log_ratios import LogRatioLoss
from minidpo.verify import Claims, claims, claims_of, verify
from minidpo.verify.claims import OF_THE_DIFFERENCE, PAIR

ALL_BUT_EXACT = "points twin gradient gradcheck tie alone mirror unmoved far bf16".split()


def margin(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
    return policy_chosen_logps - policy_rejected_logps - (reference_chosen_logps - reference_rejected_logps)


def of_margin(form):
    def loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
        return form(margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps), beta)

    return loss


def of_kto(z):
    def loss(policy_logps, reference_logps, labels, kl, beta=0.1):
        gain = beta * z(policy_logps, reference_logps, kl)
        return torch.sigmoid(torch.where(labels, -gain, gain))

    return loss


class PairWise(torch.nn.Module):
    """A reward model's loss, as in OpenRLHF."""

    def forward(self, chosen_reward, reject_reward, margin=None):
        return -logsigmoid(chosen_reward - reject_reward).mean()


# A kink refutes nothing: on the flat side of a hinge bf16 may end up elsewhere, and no z0 is drawn below 0.
RIGHT = {
    "losses": (of_margin(lambda m, beta: -logsigmoid(beta * m)), DPO()),
    "tuple": (of_margin(lambda m, beta: (-logsigmoid(beta * m), 0)), DPO()),
    "mean": (of_margin(lambda m, beta: -logsigmoid(beta * m).mean()), DPO()),
    "module": (PairWise(), BradleyTerry(lm_weight=0.0)),
    "constants": (of_kto(lambda pi, ref, z0: pi - (ref + z0).detach()), KTO()),
    "kink in z0": (of_kto(lambda pi, ref, z0: pi - ref - z0.clamp(min=0)), KTO()),
    "hinge": (of_margin(lambda m, beta: torch.relu(1 - beta * m)), Hinge(0.03)),
}


@pytest.mark.parametrize("form", RIGHT)
def test_right(form):
    """A right function passes, whatever it returns its losses in, and whichever inputs are its constants."""
    loss, like = RIGHT[form]
    report = verify(loss, like, checks=ALL_BUT_EXACT)
    claimed = [check for check in ALL_BUT_EXACT if check != "mirror" or claims_of(like).mirror]
    assert [v.check for v in report.verdicts if v.verdict == "holds"] == claimed and not report.refuted, (
        report
    )
    assert report.verdicts[3].figure.startswith(("2 inputs", "3 inputs")), report  # those that are trained


def first_trained(losses):
    """Their mean, with the gradient of the first alone."""
    return losses.mean().detach() + losses[0] - losses[0].detach()


# Mistakes of functions, and the checks that must find them. tests/losses has a longer list.
WRONG = {
    "mean of the margins": (lambda m, beta: -logsigmoid(beta * m.mean()), {"alone"}),
    "one pair trained": (lambda m, beta: first_trained(-logsigmoid(beta * m)), {"alone"}),
    "sum over the batch": (lambda m, beta: -logsigmoid(beta * m).sum(), {"alone"}),
    "exp in bf16": (lambda m, beta: (1 + (-beta * m).exp()).log(), {"far", "bf16"}),
    "beta ignored": (lambda m, beta: -logsigmoid(0.1 * m), {"points", "twin", "exact"}),
    "kept in float32": (lambda m, beta: -logsigmoid(beta * m.float()), {"twin"}),
    "no gradient at a tie": (lambda m, beta: -logsigmoid(beta * torch.where(m == 0, m.detach(), m)), {"tie"}),
    "two columns": (lambda m, beta: -logsigmoid(beta * m)[:, None], {"twin", "far"}),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong(mistake):
    """Each check that must refute the mistake does, with a counterexample; `far` does so without any claim."""
    form, must = WRONG[mistake]
    report = verify(of_margin(form), DPO(), checks=must)
    assert "far" not in must or verify(of_margin(form), checks=["far"]).refuted
    assert set(report.refuted) == must, report
    assert all(verdict.counterexample for verdict in report.verdicts)


def test_counterexample():
    """It says what was changed, and where two numbers are nearly equal, what may make them differ."""
    soft, single = lambda m, beta: softplus(-beta * m), lambda m, beta: -logsigmoid(beta * m.float()).double()
    off = lambda m, beta: -logsigmoid(1.001 * beta * m)  # noqa: E731
    for form, is_close in ((soft, True), (single, True), (off, False)):
        (verdict,) = verify(of_margin(form), DPO(), checks=["twin"]).verdicts
        assert ("by float32, or by F.softplus, which" in verdict.counterexample) == is_close, verdict
    no_reference = lambda pi_w, pi_l, ref_w, ref_l, beta=0.1: -logsigmoid(beta * (pi_w - pi_l))  # noqa: E731
    (verdict,) = verify(no_reference, DPO(), checks=["unmoved"]).verdicts
    assert "same number added to chosen and ref_chosen" in verdict.counterexample


def test_said_once():
    """What is the same in every check is said once."""
    raises, returns_none = lambda m, beta: m.no_such_method(), lambda m, beta: None
    for form, says in ((raises, "it raises AttributeError"), (returns_none, "it returns NoneType")):
        report = verify(of_margin(form), DPO(), checks=ALL_BUT_EXACT)
        assert str(report).count(says) == 1 and report.refuted == ALL_BUT_EXACT
        assert str(report).count("(as above)") == len(ALL_BUT_EXACT) - 1


def test_not_asked():
    """What a loss cannot be set to is not asked: beta is fixed, so nothing is claimed at another one."""
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
    assert "loss, held to the claims given\n" in str(report) and "no optimum is claimed" in str(report)
    assert "not tested" not in str(report)
    report = verify(right, DPO(0.2), replace(claims, optimum=lambda world, s: 0), checks=["twin", "exact"])
    assert report.title.startswith("loss, held to the claims given, with the settings of DPO(beta=0.2)\n")
    assert "the optima are those of no settings" in str(report) and not report.refuted, report
    wrong = verify(right, claims=replace(claims, mirror=z, twin=lambda p, s: z(p, s) ** 2))
    assert wrong.refuted == ["twin", "mirror", "far"], wrong


def test_untested():
    """What no check varies is named. With claims of one's own a number is a setting, and so is a switch."""

    def loss(pi_w, pi_l, ref_w, ref_l, beta=1, flip=False, smoothing=0.0, pairs=None):
        z = beta * margin(pi_w, pi_l, ref_w, ref_l) * (-1 if flip else 1)
        return (smoothing - 1) * logsigmoid(z) + smoothing * logsigmoid(-z)  # its sign is wrong

    report = verify(loss, DPO(), checks=["twin"])
    assert not report.refuted and "left at the default, not tested: flip, smoothing, pairs" in report.title
    # z = 2 * 4: ln(1 + exp(-8)), and -4: ln(1 + exp(4))
    own = Claims([(dict(beta=2), PAIR, 0.0003354064), (dict(flip=True), PAIR, 4.0181499279)])
    report = verify(loss, claims=own, checks=["points"])
    assert report.verdicts[0].figure.startswith("2 points"), report


def test_margin():
    """A tensor that is None by default is passed where it is read: a margin where that of the data is. A loss
    that needs one is asked only at points that have it: at none of DPO without margins."""

    def odpo(pi_w, pi_l, ref_w, ref_l, margin, beta=0.1):
        return -logsigmoid(beta * (pi_w - pi_l - (ref_w - ref_l)) - margin)

    def optional(pi_w, pi_l, ref_w=None, ref_l=None, margin=None, beta=0.1):
        return odpo(pi_w, pi_l, ref_w, ref_l, 0 if margin is None else margin, beta)

    for loss, from_data, asked in ((optional, False, "3"), (optional, True, "1"), (odpo, True, "1")):
        report = verify(loss, DPO(margin_from_data=from_data), checks=["points", "twin"])
        assert not report.refuted and ("margin = margin" in report.title) == from_data, report
        assert report.verdicts[0].figure.startswith(f"{asked} points"), report
    assert "ref_l = ref_rejected" in verify(optional, checks=["far"]).title
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
    assert report.title == "Plain(beta=0.3) claims to be DPO(beta=0.3)"
    assert verify(Plain, IPO(), checks=["twin"]).refuted
    smoothed = verify(Plain, DPO(label_smoothing=0.1), checks=["points"])  # at this smoothing alone
    assert "is 0.5130152524 and not 0.5530152524" in str(smoothed)


def test_sft_term():
    """Claims of one's own, whichever they are, leave out the SFT term, as ours do."""
    twin = Claims(twin=lambda p, s: np.logaddexp(0, -s.beta * claims.margin(p)))
    for own in (twin, Claims(gradient=claims_of(DPO).gradient), claims_of(DPO)):
        report = verify(DPO(sft_weight=0.5), claims=own, checks=ALL_BUT_EXACT)
        assert not report.refuted, report


def test_stop_gradient():
    """A beta of the batch may be held constant if the claimed gradient does so; no other gradient passes."""
    batch_beta = lambda m: 0.1 + 0.001 * m.mean()  # noqa: E731
    right = of_margin(lambda m, beta: -logsigmoid(batch_beta(m).detach() * m))
    wrong = of_margin(lambda m, beta: -logsigmoid(batch_beta(m) * m))
    half = of_margin(lambda m, beta: -logsigmoid(batch_beta(m).detach() * (m + m.detach()) / 2))

    def gradient(p, s):
        m = claims.margin(p)
        return claims.of_margin(p, -batch_beta(m) * claims.sigma(-batch_beta(m) * m))

    own = Claims(gradient=gradient, independent=False)
    report = verify(right, claims=own)
    assert not report.refuted and "that of a loss with a constant" in str(report), report
    assert verify(right, claims=replace(own, gradient=None)).refuted == ["gradcheck"]
    assert verify(right, claims=replace(own, independent=True), checks=["alone"]).refuted
    assert verify(wrong, claims=own, checks=["gradient"]).refuted
    assert verify(half, claims=own, checks=["gradcheck"]).refuted


@pytest.mark.parametrize(
    ("loss", "told", "says"),
    [
        (lambda x, y: x, {}, r"what is its argument 'x'\? A setting needs a default; a tensor is called"),
        (Plain, {}, "no claims for the loss 'plain': write minidpo/verify/claims/plain.py"),
        (type("Mine", (LogRatioLoss,), {})(), {}, "no claims for the loss 'Mine'"),
        (make_dataclass("Bare", ["beta"]), {}, "the loss's setting 'beta' has no default"),
        (3, {}, "3 is int; a function of tensors is needed"),
        (lambda beta=0.1: beta, {}, "none of its arguments"),
        (margin, dict(checks=["twins"]), "no check twins; there are points, twin"),
        (
            Plain(),
            dict(claims=Claims([(dict(beat=1), PAIR, 0)])),
            "no setting 'beat'; there are sft_weight, ",
        ),
        (margin, dict(claims=Claims([({}, dict(chosn=1), 0)])), "of a pair 'chosn'; there are chosen,"),
        (Plain(), dict(claims=Claims(twin=lambda p, s: p.chosn)), "the claims raise AttributeError: .*twin"),
        (margin, dict(claims=Claims(unmoved=dict(x=lambda p: 1 / 0))), "raise ZeroDivision.*unmoved, x"),
    ],
)
def test_refused(loss, told, says):
    """A description that says too little, or names what is not there, is refused in one line."""
    with pytest.raises(UserError, match=says):
        verify(loss, **told)
