"""APO-zero, D'Oosterlinck et al. 2024, Eq. 7: each response against the reference, not against the other."""

from minidpo.verify.claims import OF_LOG_RATIOS, PAIR, START, Claims, log_ratios, sigma


def twin(p, s):
    chosen, rejected = log_ratios(p)
    return sigma(-s.beta * chosen) + sigma(s.beta * rejected)


def gradient(p, s):
    """sigma' = sigma(r) sigma(-r), with the sign of each term; the responses do not meet."""
    chosen, rejected = (s.beta * sigma(s.beta * g) * sigma(-s.beta * g) for g in log_ratios(p))
    return dict(chosen=-chosen, rejected=rejected, ref_chosen=chosen, ref_rejected=-rejected)


CLAIMS = Claims(
    points=[
        # PAIR has rewards of 0.1 * 3 and 0.1 * -1: sigma(-0.3) + sigma(-0.1) = 0.4255574832 + 0.4750208125
        (dict(), PAIR, 0.9005782957),
        (dict(beta=1.0), PAIR, 0.3163672948),  # sigma(-3) + sigma(-1) = 0.0474258732 + 0.2689414214
        (dict(), START, 1.0),  # sigma(0) + sigma(0)
        (dict(sft_weight=0.5), PAIR, 2.1505782957),  # 0.5 * 10 / 4 = 1.25 more than the first
    ],
    twin=twin,
    gradient=gradient,
    unmoved=OF_LOG_RATIOS,
    optimum="none: with p of a response's labels saying chosen, more mass on those with p > 1/2 from those"
    " with p < 1/2 always lowers the loss, so its limit is at probability 0 (docs/derivation.md, KTO)",
)
