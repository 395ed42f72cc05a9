"""Mistakes that real projects made in these losses, each with the check that refutes it.

Checks (minidpo/verify/checks.py) prove something only if they refute what is wrong. A form replaces one
attribute of its loss, mostly a method of the loss s, which reads p (`PairLogps`) or r (`Rewards`).
"""

from dataclasses import replace
from functools import partialmethod

import pytest
import torch

from minidpo.losses import DPO, IPO, KTO, ORPO, SFT, APOZero, Hinge, RobustDPO, SimPO, logistic
from minidpo.losses import BradleyTerry as RM
from minidpo.verify.claims import LOGPS, claims_of
from minidpo.verify.report import verify


def w(p):
    """The log-ratio of the chosen response; v has that of the rejected one."""
    return p.chosen - p.ref_chosen


def v(p):
    return p.rejected - p.ref_rejected


def averages(form):
    """A mistake of length_normalize alone, made of log-ratios and lengths."""
    return lambda s, p: s.beta * form(w(p), v(p), *p[4:6]) if s.length_normalize else DPO.z(s, p)


def of_z(form):
    return lambda s, p: form(s.z(p), s.label_smoothing)


def of_h(form):
    return lambda s, p: form(s.z(p), s.beta)


def detached(method, *names):
    return lambda s, p: method(s, p._replace(**{name: getattr(p, name).detach() for name in names}))


def margins(form):
    """z, made of the difference of rewards, the margin of the settings and that of the data."""
    return lambda s, r: logistic(
        form(r.chosen - r.rejected, s.margin, s.margin_from_data * r.margin), s.label_smoothing
    )


def overwritten(s, p):
    z = DPO.z(s, p)
    p.rejected.data.zero_()
    return z


def within_70(z):
    """z, as a constant beyond +-70."""
    return torch.where(z.abs() < 70, z, z.detach())


def odds(form):
    """The odds ratio's part of ORPO, made of each response's mean log-prob."""
    return lambda s, p: s.lambda_or * logistic(form(p.mean_logps()[0]) - form(p.mean_logps()[1]))


def one_minus_exp(m):
    return m - (1 - m.exp()).log()


def kto(s, label, gain):
    """KTO's loss of beta times the log-ratio less z0."""
    return torch.where(label, s.lambda_d, s.lambda_u) * (1 - torch.sigmoid(torch.where(label, gain, -gain)))


WRONG = {
    (DPO, "z"): {
        "beta dropped": ("points", lambda s, p: w(p) - v(p)),
        "responses swapped": ("points", lambda s, p: s.beta * (v(p) - w(p))),
        "reference ignored": ("points", lambda s, p: s.beta * (p.chosen - p.rejected)),
        "sums for averages": ("points", averages(lambda w, v, n_w, n_v: w - v)),
        "the other length": ("points", averages(lambda w, v, n_w, n_v: w / n_v - v / n_w)),
        "length off by one": ("points", averages(lambda w, v, n_w, n_v: w / (n_w + 1) - v / (n_v + 1))),
        "reward averaged over the batch": ("alone", lambda s, p: s.beta * (w(p) - v(p).mean())),
        "response of the next pair": ("alone", lambda s, p: s.beta * (w(p) - v(p).roll(1))),
        "padded length": ("alone", lambda s, p: s.beta * (w(p) - v(p)) / p.chosen_length.max()),
        "policy detached": ("gradient", detached(DPO.z, "chosen", "rejected")),
        "one reference detached": ("gradient", detached(DPO.z, "ref_rejected")),
        "everything detached": ("gradcheck", detached(DPO.z, *LOGPS)),
        "margin of the data ignored": ("points", lambda s, p: s.beta * (w(p) - v(p))),
        "log-prob overwritten": ("points", overwritten),
        "no gradient at the start": ("tie", lambda s, p: DPO.z(s, p) * torch.where(w(p) == 0, 0, 1)),
    },
    (DPO, "preference"): {
        "likelihood minimised": ("points", of_z(lambda z, e: -logistic(z, e))),
        "smoothing ignored": ("points", of_z(lambda z, e: logistic(z))),
        "robust for conservative": ("points", of_z(lambda z, e: logistic(z, -e / (1 - 2 * e)))),
        "summed over the batch": ("twin", of_z(lambda z, e: logistic(z, e).sum())),
        "divided by the batch size": ("alone", of_z(lambda z, e: logistic(z, e) / len(z))),
        "exp of log z": ("twin", of_z(lambda z, e: logistic(z.log().exp(), e))),  # NaN below 0
        "log of sigmoid": ("far", of_z(lambda z, e: -torch.sigmoid(z).log())),
        "no gradient at a tie": ("tie", of_z(lambda z, e: logistic(torch.where(z == 0, z.detach(), z), e))),
        "no gradient beyond 70": ("far", of_z(lambda z, e: logistic(within_70(z), e))),
        "float32 called float64": ("twin", of_z(lambda z, e: logistic(z.float(), e).double())),
    },
    (DPO, "__init__"): {
        "another default": ("points", partialmethod(DPO.__init__, beta=0.2)),
    },
    (IPO, "preference"): {
        "target 1/beta": ("points", of_h(lambda h, beta: (h - 1 / beta) ** 2)),
        "beta inside h": ("points", of_h(lambda h, beta: (beta * h - 1 / (2 * beta)) ** 2)),
        "nothing above the target": ("twin", of_h(lambda h, b: (1 / (2 * b) - h).relu() ** 2)),
    },
    (SimPO, "z"): {
        "gamma ignored": ("points", lambda s, p: SimPO.z(s, p) + s.gamma),
        "gamma inside beta": ("points", lambda s, p: SimPO.z(s, p) + s.gamma - s.beta * s.gamma),
        "sums for averages": ("points", lambda s, p: s.beta * (p.chosen - p.rejected) - s.gamma),
    },
    (DPO, "sft"): {
        "SFT term of the other sign": ("points", lambda s, p: p.chosen / p.chosen_length),
        "SFT term on the sum": ("points", lambda s, p: -p.chosen),
        "SFT term over all tokens": ("alone", lambda s, p: -p.chosen / p.chosen_length.sum()),
        "SFT term detached": ("gradient", detached(DPO.sft, "chosen")),
    },
    (DPO, "__call__"): {
        "SFT term ignored": ("points", lambda s, p: s.preference(p)),
        "long responses left out": ("far", lambda s, p: DPO.__call__(s, p) * (p.chosen_length <= 512)),
    },
    (DPO, "needs_reference"): {"reference needed, but not said to be": ("reads", False)},
    (KTO, "needs_z0"): {"z0 needed, but not said to be": ("reads", False)},
    (ORPO, "preference"): {
        "odds of sums": (
            "points",
            lambda s, p: s.lambda_or * logistic(one_minus_exp(p.chosen) - one_minus_exp(p.rejected)),
        ),
        "1 - exp near P = 1": ("points", odds(one_minus_exp)),
        "log-probs for log odds": ("points", odds(lambda m: m)),
        "lambda ignored": ("points", lambda s, p: logistic(s.z(p))),
        "odds of the chosen response detached": ("gradient", detached(ORPO.preference, "chosen")),
    },
    (ORPO, "rewards"): {
        "odds at P = 1": ("far", lambda s, p: tuple(m - (-torch.expm1(m)).log() for m in p.mean_logps())),
    },
    (ORPO, "__call__"): {
        "lambda on the SFT term": (
            "points",
            lambda s, p: s.preference(p) / s.lambda_or + s.lambda_or * s.sft(p),
        ),
    },
    (KTO, "__call__"): {
        "labels swapped": ("points", lambda s, p: kto(s, ~p.label, s.beta * (w(p) - p.z0))),
        "lambdas swapped": (
            "points",
            lambda s, p: KTO.__call__(replace(s, lambda_d=s.lambda_u, lambda_u=s.lambda_d), p),
        ),
        "without z0": ("points", lambda s, p: kto(s, p.label, s.beta * w(p))),
        "z0 added": ("points", lambda s, p: kto(s, p.label, s.beta * (w(p) + p.z0))),
        "z0 of the matched responses": (
            "alone",
            lambda s, p: kto(s, p.label, s.beta * (w(p) - w(p).mean().clamp(min=0))),
        ),
        "log of the value": ("twin", lambda s, p: logistic(s.z(p))),
        "gradient through z0 alone": ("gradient", detached(KTO.__call__, "chosen")),
    },
    (KTO, "reward"): {
        "without reference": ("points", lambda s, p: s.beta * p.chosen),
    },
    (RobustDPO, "preference"): {
        "conservative for robust": ("points", lambda s, p: logistic(s.z(p), s.flip_rate)),
        "not divided by 1 - 2e": ("points", lambda s, p: (1 - 2 * s.flip_rate) * RobustDPO.preference(s, p)),
    },
    (Hinge, "preference"): {
        "the other sign": ("points", lambda s, p: torch.relu(1 + s.z(p))),
        "not cut off": ("points", lambda s, p: 1 - s.z(p)),
    },
    (APOZero, "preference"): {
        "the margin for each response": ("points", lambda s, p: 2 * torch.sigmoid(-s.z(p))),
    },
    (SFT, "__call__"): {
        "sum for mean": ("points", lambda s, p: -p.chosen),
    },
    (RM, "preference"): {
        "labels of 0": ("points", margins(lambda d, m, n: -d - m - n)),
        "margin ignored": ("points", margins(lambda d, m, n: d - n)),
        "margin of the data ignored": ("points", margins(lambda d, m, n: d - m)),
        "one reward detached": ("gradient", detached(RM.preference, "rejected")),
    },
    (RM, "__call__"): {
        # (r_w + r_l)^2 - 4 r_w r_l = (r_w - r_l)^2
        "difference centred": ("points", lambda s, r: RM.__call__(s, r) - 4 * s.center_weight * r[0] * r[1]),
    },
    (RM, "language_modelling"): {
        "sign flipped": ("points", lambda s, r: r.chosen_logps / r.chosen_length),
        "detached": ("gradient", detached(RM.language_modelling, "chosen_logps")),
    },
}

CASES = [
    pytest.param(loss, method, check, form, id=f"{loss.__name__}: {mistake}")
    for (loss, method), mistakes in WRONG.items()
    for mistake, (check, form) in mistakes.items()
]


@pytest.mark.parametrize(("loss", "method", "check", "form"), CASES)
def test_wrong(loss, method, check, form):
    """The check refutes the mistake, and says where."""
    wrong = type("Wrong", (loss,), {method: form})()
    (verdict,) = verify(wrong, claims=claims_of(loss), checks=[check]).verdicts
    assert verdict.verdict == "refuted" and "Wrong" in verdict.counterexample, verdict
