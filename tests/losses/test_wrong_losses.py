"""Mistakes that real projects made in these losses, each with the check that refutes it.

Checks prove something only if they refute what is wrong. A form stands in place of one method of its loss.
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


def metric(name, value):
    return lambda s, p, losses: type(s).__base__.metrics(s, p, losses) | {name: value(s, p)}


def margins(form):
    """z, made of the difference of rewards, the margin of the settings and that of the data."""
    return lambda s, r: logistic(
        form(r.chosen - r.rejected, s.margin, s.margin_from_data * r.margin), s.label_smoothing
    )


def odds(form):
    """The odds ratio's part of ORPO, made of a response's sum of log-probs and its length."""
    return lambda s, p: (
        s.lambda_or * logistic(form(p.chosen, p.chosen_length) - form(p.rejected, p.rejected_length))
    )


def one_minus_exp(m):
    return m - (1 - m.exp()).log()


def of_label(form):
    """KTO's loss, made of label, log-ratio and z0."""
    return lambda s, p: form(s, p.label, p.chosen - p.ref_chosen, p.z0)


def kto(s, label, gain, weight=lambda s, label: torch.where(label, s.lambda_d, s.lambda_u)):
    """KTO's loss of beta times the log-ratio less z0."""
    return weight(s, label) * (1 - torch.sigmoid(torch.where(label, gain, -gain)))


def centred(form):
    """The penalty, made of both rewards."""
    return lambda s, r: RM.__call__(replace(s, center_weight=0.0), r) + s.center_weight * form(*r[:2])


WRONG = [
    ("beta dropped", "points", DPO, "z", lambda s, p: w(p) - v(p)),
    ("beta dropped on one response", "points", DPO, "z", lambda s, p: s.beta * w(p) - v(p)),
    ("responses swapped", "points", DPO, "z", lambda s, p: s.beta * (v(p) - w(p))),
    ("sum for difference", "points", DPO, "z", lambda s, p: s.beta * (w(p) + v(p))),
    ("reference ignored", "points", DPO, "z", lambda s, p: s.beta * (p.chosen - p.rejected)),
    ("reference of one response ignored", "points", DPO, "z", lambda s, p: s.beta * (w(p) - p.rejected)),
    ("sums for averages", "points", DPO, "z", averages(lambda w, v, n_w, n_v: w - v)),
    ("one length for both", "points", DPO, "z", averages(lambda w, v, n_w, n_v: (w - v) / n_w)),
    ("the other length", "points", DPO, "z", averages(lambda w, v, n_w, n_v: w / n_v - v / n_w)),
    ("length off by one", "points", DPO, "z", averages(lambda w, v, n_w, n_v: w / (n_w + 1) - v / (n_v + 1))),
    ("reward averaged over the batch", "alone", DPO, "z", lambda s, p: s.beta * (w(p) - v(p).mean())),
    ("response of the next pair", "alone", DPO, "z", lambda s, p: s.beta * (w(p) - v(p).roll(1))),
    ("padded length", "alone", DPO, "z", lambda s, p: s.beta * (w(p) - v(p)) / p.chosen_length.max()),
    ("policy detached", "gradient", DPO, "z", detached(DPO.z, "chosen", "rejected")),
    ("one reference detached", "gradient", DPO, "z", detached(DPO.z, "ref_rejected")),
    ("everything detached", "gradcheck", DPO, "z", detached(DPO.z, *LOGPS)),
    ("likelihood minimised", "points", DPO, "preference", of_z(lambda z, e: -logistic(z, e))),
    ("sigmoid without its log", "points", DPO, "preference", of_z(lambda z, e: -torch.sigmoid(z))),
    ("smoothing ignored", "points", DPO, "preference", of_z(lambda z, e: logistic(z))),
    (
        "robust for conservative",
        "points",
        DPO,
        "preference",
        of_z(lambda z, e: logistic(z, -e / (1 - 2 * e))),
    ),
    ("e and 1 - e exchanged", "points", DPO, "preference", of_z(lambda z, e: logistic(-z, e))),
    ("summed over the batch", "twin", DPO, "preference", of_z(lambda z, e: logistic(z, e).sum())),
    ("divided by the batch size", "alone", DPO, "preference", of_z(lambda z, e: logistic(z, e) / len(z))),
    ("log of sigmoid", "far", DPO, "preference", of_z(lambda z, e: -torch.sigmoid(z).log())),
    ("log of 1 + exp", "far", DPO, "preference", of_z(lambda z, e: (1 + torch.exp(-z)).log())),
    ("float32 called float64", "twin", DPO, "preference", of_z(lambda z, e: logistic(z.float(), e).double())),
    ("rewards without beta", "metrics", DPO, "rewards", lambda s, p: (w(p), v(p))),
    ("a tie is a win", "metrics", DPO, "metrics", metric("rewards/accuracies", lambda s, p: s.z(p) >= 0)),
    ("margin upside down", "metrics", DPO, "metrics", metric("rewards/margins", lambda s, p: -s.z(p))),
    ("every pair saturated", "metrics", DPO, "metrics", metric("saturated", lambda s, p: s(p) > 0)),
    ("beta left out", "gradient", DPO, "gradient_weights", lambda s, p: [torch.sigmoid(-s.z(p))] * 2),
    ("another default", "points", DPO, "__init__", partialmethod(DPO.__init__, beta=0.2)),
    ("target 1/beta", "points", IPO, "preference", of_h(lambda h, beta: (h - 1 / beta) ** 2)),
    (
        "target of the other sign",
        "points",
        IPO,
        "preference",
        of_h(lambda h, beta: (h + 1 / (2 * beta)) ** 2),
    ),
    ("beta inside h", "points", IPO, "preference", of_h(lambda h, beta: (beta * h - 1 / (2 * beta)) ** 2)),
    ("nothing above the target", "twin", IPO, "preference", of_h(lambda h, b: (1 / (2 * b) - h).relu() ** 2)),
    ("gamma ignored", "points", SimPO, "z", lambda s, p: SimPO.z(s, p) + s.gamma),
    ("gamma inside beta", "points", SimPO, "z", lambda s, p: SimPO.z(s, p) + s.gamma - s.beta * s.gamma),
    ("sums for averages", "points", SimPO, "z", lambda s, p: s.beta * (p.chosen - p.rejected) - s.gamma),
    ("rewards without beta", "metrics", SimPO, "rewards", lambda s, p: p.mean_logps()),
    ("reward less gamma", "metrics", SimPO, "metrics", metric("rewards/margins", lambda s, p: s.z(p))),
    ("margin of the data ignored", "points", DPO, "z", lambda s, p: s.beta * (w(p) - v(p))),
    (
        "margin of the data added",
        "points",
        DPO,
        "z",
        lambda s, p: DPO.z(s, p) + (2 * p.margin if s.margin_from_data else 0),
    ),
    (
        "margin of the data inside beta",
        "points",
        DPO,
        "z",
        lambda s, p: s.beta * (w(p) - v(p) - (p.margin if s.margin_from_data else 0)),
    ),
    ("SFT term of the other sign", "points", DPO, "sft", lambda s, p: p.chosen / p.chosen_length),
    ("SFT term on the sum", "points", DPO, "sft", lambda s, p: -p.chosen),
    ("SFT term on both responses", "points", DPO, "sft", lambda s, p: -sum(p.mean_logps())),
    ("SFT term over all tokens", "alone", DPO, "sft", lambda s, p: -p.chosen / p.chosen_length.sum()),
    ("SFT term detached", "gradient", DPO, "sft", detached(DPO.sft, "chosen")),
    ("SFT term ignored", "points", DPO, "__call__", lambda s, p: s.preference(p)),
    ("odds of sums", "points", ORPO, "preference", odds(lambda logp, n: one_minus_exp(logp))),
    ("1 - exp near P = 1", "points", ORPO, "preference", odds(lambda logp, n: one_minus_exp(logp / n))),
    ("log-probs for log odds", "points", ORPO, "preference", odds(lambda logp, n: logp / n)),
    (
        "log(1 - P) added",
        "points",
        ORPO,
        "preference",
        odds(lambda logp, n: logp / n + (-torch.expm1(logp / n)).log()),
    ),
    (
        "odds at P = 1",
        "far",
        ORPO,
        "rewards",
        lambda s, p: tuple(m - (-torch.expm1(m)).log() for m in p.mean_logps()),
    ),
    (
        "odds of probabilities without their log",
        "points",
        ORPO,
        "preference",
        odds(lambda logp, n: (logp / n).exp() / -torch.expm1(logp / n)),
    ),
    (
        "lambda on the SFT term",
        "points",
        ORPO,
        "__call__",
        lambda s, p: s.preference(p) / s.lambda_or + s.lambda_or * s.sft(p),
    ),
    ("lambda ignored", "points", ORPO, "preference", lambda s, p: logistic(s.z(p))),
    (
        "odds of the chosen response detached",
        "gradient",
        ORPO,
        "preference",
        detached(ORPO.preference, "chosen"),
    ),
    (
        "labels swapped",
        "points",
        KTO,
        "__call__",
        of_label(lambda s, label, ratio, z0: kto(s, ~label, s.beta * (ratio - z0))),
    ),
    (
        "lambdas swapped",
        "points",
        KTO,
        "__call__",
        of_label(
            lambda s, label, ratio, z0: kto(
                s, label, s.beta * (ratio - z0), lambda s, label: torch.where(label, s.lambda_u, s.lambda_d)
            )
        ),
    ),
    (
        "lambda inside sigma",
        "points",
        KTO,
        "__call__",
        of_label(
            lambda s, label, ratio, z0: kto(
                s,
                label,
                s.beta * (ratio - z0) * torch.where(label, s.lambda_d, s.lambda_u),
                lambda s, label: 1.0,
            )
        ),
    ),
    ("without reference", "points", KTO, "reward", lambda s, p: s.beta * p.chosen),
    (
        "without z0",
        "points",
        KTO,
        "__call__",
        of_label(lambda s, label, ratio, z0: kto(s, label, s.beta * ratio)),
    ),
    (
        "z0 without beta",
        "points",
        KTO,
        "__call__",
        of_label(lambda s, label, ratio, z0: kto(s, label, s.beta * ratio - z0)),
    ),
    (
        "z0 added",
        "points",
        KTO,
        "__call__",
        of_label(lambda s, label, ratio, z0: kto(s, label, s.beta * (ratio + z0))),
    ),
    (
        "z0 of the matched responses",
        "alone",
        KTO,
        "__call__",
        of_label(lambda s, label, ratio, z0: kto(s, label, s.beta * (ratio - ratio.mean().clamp(min=0)))),
    ),
    ("value for loss", "points", KTO, "__call__", lambda s, p: torch.sigmoid(s.z(p))),
    ("log of the value", "twin", KTO, "__call__", lambda s, p: logistic(s.z(p))),
    ("gradient through z0 alone", "gradient", KTO, "__call__", detached(KTO.__call__, "chosen")),
    (
        "rewards over all responses",
        "metrics",
        KTO,
        "metrics",
        metric("rewards/chosen", lambda s, p: s.reward(p)),
    ),
    (
        "conservative for robust",
        "points",
        RobustDPO,
        "preference",
        lambda s, p: logistic(s.z(p), s.flip_rate),
    ),
    (
        "not divided by 1 - 2e",
        "points",
        RobustDPO,
        "preference",
        lambda s, p: (1 - 2 * s.flip_rate) * RobustDPO.preference(s, p),
    ),
    ("the other sign", "points", Hinge, "preference", lambda s, p: torch.relu(1 + s.z(p))),
    ("1 outside the maximum", "points", Hinge, "preference", lambda s, p: 1 - torch.relu(s.z(p))),
    ("not cut off", "points", Hinge, "preference", lambda s, p: 1 - s.z(p)),
    ("beta on the 1", "points", Hinge, "preference", lambda s, p: torch.relu(s.beta - s.z(p))),
    (
        "both responses raised",
        "points",
        APOZero,
        "preference",
        lambda s, p: torch.sigmoid(-s.rewards(p)[0]) + torch.sigmoid(-s.rewards(p)[1]),
    ),
    (
        "the margin for each response",
        "points",
        APOZero,
        "preference",
        lambda s, p: 2 * torch.sigmoid(-s.z(p)),
    ),
    ("sum for mean", "points", SFT, "__call__", lambda s, p: -p.chosen),
    ("length off by one", "points", SFT, "__call__", lambda s, p: -p.chosen / (p.chosen_length + 1)),
    ("mean over all tokens", "alone", SFT, "__call__", lambda s, p: -p.chosen / p.chosen_length.sum()),
    ("labels of 0", "points", RM, "preference", margins(lambda d, m, n: -d - m - n)),
    ("margin added", "points", RM, "preference", margins(lambda d, m, n: d + m - n)),
    ("margin ignored", "points", RM, "preference", margins(lambda d, m, n: d - n)),
    ("margin of the data ignored", "points", RM, "preference", margins(lambda d, m, n: d - m)),
    ("margin of the data added", "points", RM, "preference", margins(lambda d, m, n: d - m + n)),
    ("one reward detached", "gradient", RM, "preference", detached(RM.preference, "rejected")),
    ("centring the difference", "points", RM, "__call__", centred(lambda c, r: (c - r) ** 2)),
    ("centring the mean", "points", RM, "__call__", centred(lambda c, r: (c + r) ** 2 / 4)),
    ("sign flipped", "points", RM, "language_modelling", lambda s, r: r.chosen_logps / r.chosen_length),
    ("detached", "gradient", RM, "language_modelling", detached(RM.language_modelling, "chosen_logps")),
]


@pytest.mark.parametrize(("mistake", "check", "loss", "method", "form"), WRONG)
def test_wrong(mistake, check, loss, method, form):
    """The check refutes the mistake, and says where."""
    wrong = type("Wrong", (loss,), {method: form})()
    (verdict,) = verify(wrong, claims=claims_of(loss), checks=[check]).verdicts
    assert verdict.verdict == "refuted" and "Wrong" in verdict.counterexample, verdict
