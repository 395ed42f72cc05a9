"""Mistakes that real projects made in these losses, each with the check of loss_checks.py that refutes it.

Checks prove something only if they refute what is wrong. A form stands in place of one method of its loss.
"""

from dataclasses import replace
from functools import partialmethod

import loss_checks
import pytest
import torch
from test_losses import CLAIMS

from minidpo.losses import DPO, IPO, SFT, SimPO, logistic
from minidpo.losses import BradleyTerry as RM


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
    ("everything detached", "gradcheck", DPO, "z", detached(DPO.z, *loss_checks.LOGPS)),
    ("likelihood minimised", "points", DPO, "__call__", of_z(lambda z, e: -logistic(z, e))),
    ("sigmoid without its log", "points", DPO, "__call__", of_z(lambda z, e: -torch.sigmoid(z))),
    ("smoothing ignored", "points", DPO, "__call__", of_z(lambda z, e: logistic(z))),
    ("robust for conservative", "points", DPO, "__call__", of_z(lambda z, e: logistic(z, -e / (1 - 2 * e)))),
    ("e and 1 - e exchanged", "points", DPO, "__call__", of_z(lambda z, e: logistic(-z, e))),
    ("summed over the batch", "twin", DPO, "__call__", of_z(lambda z, e: logistic(z, e).sum())),
    ("divided by the batch size", "alone", DPO, "__call__", of_z(lambda z, e: logistic(z, e) / len(z))),
    ("log of sigmoid", "far", DPO, "__call__", of_z(lambda z, e: -torch.sigmoid(z).log())),
    ("log of 1 + exp", "far", DPO, "__call__", of_z(lambda z, e: (1 + torch.exp(-z)).log())),
    ("float32 called float64", "twin", DPO, "__call__", of_z(lambda z, e: logistic(z.float(), e).double())),
    ("rewards without beta", "metrics", DPO, "rewards", lambda s, p: (w(p), v(p))),
    ("a tie is a win", "metrics", DPO, "metrics", metric("rewards/accuracies", lambda s, p: s.z(p) >= 0)),
    ("margin upside down", "metrics", DPO, "metrics", metric("rewards/margins", lambda s, p: -s.z(p))),
    ("every pair saturated", "metrics", DPO, "metrics", metric("saturated", lambda s, p: s(p) > 0)),
    ("beta left out", "gradient", DPO, "gradient_weights", lambda s, p: [torch.sigmoid(-s.z(p))] * 2),
    ("another default", "points", DPO, "__init__", partialmethod(DPO.__init__, beta=0.2)),
    ("target 1/beta", "points", IPO, "__call__", of_h(lambda h, beta: (h - 1 / beta) ** 2)),
    ("target of the other sign", "points", IPO, "__call__", of_h(lambda h, beta: (h + 1 / (2 * beta)) ** 2)),
    ("beta inside h", "points", IPO, "__call__", of_h(lambda h, beta: (beta * h - 1 / (2 * beta)) ** 2)),
    ("nothing above the target", "twin", IPO, "__call__", of_h(lambda h, b: (1 / (2 * b) - h).relu() ** 2)),
    ("gamma ignored", "points", SimPO, "z", lambda s, p: SimPO.z(s, p) + s.gamma),
    ("gamma inside beta", "points", SimPO, "z", lambda s, p: SimPO.z(s, p) + s.gamma - s.beta * s.gamma),
    ("sums for averages", "points", SimPO, "z", lambda s, p: s.beta * (p.chosen - p.rejected) - s.gamma),
    ("rewards without beta", "metrics", SimPO, "rewards", lambda s, p: p.mean_logps()),
    ("reward less gamma", "metrics", SimPO, "metrics", metric("rewards/margins", lambda s, p: s.z(p))),
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
    """The check refutes the mistake."""
    wrong = type("Wrong", (loss,), {method: form})
    with pytest.raises(AssertionError):
        getattr(loss_checks, f"check_{check}")(wrong(), CLAIMS[loss])
