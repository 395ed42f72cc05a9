"""Ways to get minidpo/losses.py wrong: text that stands once in it, and by name what replaces it."""

LOSS_MUTATIONS = {
    # Bradley-Terry
    "logits = chosen_rewards - rejected_rewards": {
        "preference reversed": "logits = rejected_rewards - chosen_rewards",
        "sum for difference": "logits = chosen_rewards + rejected_rewards",
        "chosen reward detached": "logits = chosen_rewards.detach() - rejected_rewards",
        "rejected reward detached": "logits = chosen_rewards - rejected_rewards.detach()",
    },
    "logits = logits - margin.to(logits.dtype)": {
        "margin of each pair added": "logits = logits + margin.to(logits.dtype)",
        "margin of each pair dropped": "pass",
        "margin of each pair averaged": "logits = logits - margin.to(logits.dtype).mean()",
    },
    "logits = logits - margin\n": {
        "one margin added": "logits = logits + margin\n",
        "one margin dropped": "pass\n",
    },
    "if margin.shape != logits.shape:": {"margin's shape unchecked": "if False:"},
    # the logistic loss and its smoothing
    "-(1 - label_smoothing) * F.logsigmoid(logits)\n": {
        "sigma(-z) for sigma(z)": "-(1 - label_smoothing) * F.logsigmoid(-logits)\n",
        "likelihood minimised": "(1 - label_smoothing) * F.logsigmoid(logits)\n",
        "1 + e for 1 - e": "-(1 + label_smoothing) * F.logsigmoid(logits)\n",
        "1 - e dropped": "-F.logsigmoid(logits)\n",
        "e for 1 - e": "-(label_smoothing or 1) * F.logsigmoid(logits)\n",
        "log of an overflowing sigmoid": "-(1 - label_smoothing) * torch.sigmoid(logits).log()\n",
        "sigmoid without its log": "-(1 - label_smoothing) * torch.sigmoid(logits)\n",
    },
    "losses = losses - label_smoothing * F.logsigmoid(-logits)": {
        "smoothed towards the same order": "losses = losses - label_smoothing * F.logsigmoid(logits)",
        "smoothing with the robust loss's sign": "losses = losses + label_smoothing * F.logsigmoid(-logits)",
        "smoothing halved": "losses = losses - label_smoothing / 2 * F.logsigmoid(-logits)",
        "smoothing dropped": "pass",
    },
    "0 <= label_smoothing < 0.5": {
        "smoothing of one half allowed": "0 <= label_smoothing <= 0.5",
        "smoothing up to one allowed": "0 <= label_smoothing < 1",
        "negative smoothing allowed": "label_smoothing < 0.5",
    },
    # centring
    "(chosen_rewards + rejected_rewards).square()": {
        "centring the difference": "(chosen_rewards - rejected_rewards).square()",
        "centring the mean": "((chosen_rewards + rejected_rewards) / 2).square()",
        "centring without the square": "(chosen_rewards + rejected_rewards).abs()",
        "centring each alone": "(chosen_rewards.square() + rejected_rewards.square())",
    },
    # log-ratios
    "policy_chosen - reference_chosen\n": {
        "reference added": "policy_chosen + reference_chosen\n",
        "reference dropped": "policy_chosen\n",
        "reference of the other response": "policy_chosen - reference_rejected\n",
        "policy detached": "policy_chosen.detach() - reference_chosen\n",
    },
    "policy_rejected - reference_rejected\n": {
        "log-ratio upside down": "reference_rejected - policy_rejected\n",
        "rejected reference dropped": "policy_rejected\n",
        "rejected reference detached": "policy_rejected - reference_rejected.detach()\n",
    },
    "policy_chosen, policy_rejected, reference_chosen, reference_rejected = ": {
        "policies swapped": "policy_rejected, policy_chosen, reference_chosen, reference_rejected = ",
        "references swapped": "policy_chosen, policy_rejected, reference_rejected, reference_chosen = ",
        "policy for reference": "reference_chosen, reference_rejected, policy_chosen, policy_rejected = ",
    },
    "if chosen_lengths is not None and rejected_lengths is not None:": {"lengths ignored": "if False:"},
    "if (chosen_lengths is None) != (rejected_lengths is None):": {"one length enough": "if False:"},
    '_per_token("chosen_lengths", chosen_logratios, chosen_lengths)': {
        "chosen over the rejected length": '_per_token("chosen_lengths", chosen_logratios, rejected_lengths)',
        "chosen not divided": "chosen_logratios",
    },
    'rejected_logratios = _per_token("rejected_lengths", rejected_logratios, rejected_lengths)': {
        "rejected not divided": "pass",
        "rejected is chosen": "rejected_logratios = chosen_logratios",
    },
    "rejected_logratios, rejected_lengths)\n": {
        "rejected over the chosen length": "rejected_logratios, chosen_lengths)\n",
        "rejected divided twice": "rejected_logratios, rejected_lengths) / rejected_lengths\n",
    },
    "return chosen_logratios, rejected_logratios": {
        "log-ratios the other way round": "return rejected_logratios, chosen_logratios",
    },
    # DPO
    "chosen_rewards = beta * chosen_logratios\n": {
        "DPO: beta dropped": "chosen_rewards = chosen_logratios\n",
        "DPO: divided by beta": "chosen_rewards = chosen_logratios / beta\n",
        "DPO: beta squared": "chosen_rewards = beta**2 * chosen_logratios\n",
    },
    "rejected_rewards = beta * rejected_logratios\n": {
        "DPO: beta dropped on rejected": "rejected_rewards = rejected_logratios\n",
        "DPO: rejected is chosen": "rejected_rewards = beta * chosen_logratios\n",
    },
    "chosen_rewards - rejected_rewards, label_smoothing)": {
        "DPO: beta twice": "beta * (chosen_rewards - rejected_rewards), label_smoothing)",
        "DPO: preference reversed": "rejected_rewards - chosen_rewards, label_smoothing)",
        "DPO: smoothing not passed on": "chosen_rewards - rejected_rewards, 0.0)",
        "DPO: averaged": "chosen_rewards - rejected_rewards, label_smoothing).mean()",
        "DPO: rejected averaged over the batch": "chosen_rewards - rejected_rewards.mean(), label_smoothing)",
        "DPO: next pair's rejected": "chosen_rewards - rejected_rewards.roll(1), label_smoothing)",
        "DPO: gradient cut": "(chosen_rewards - rejected_rewards).detach(), label_smoothing)",
    },
    "rejected_rewards, label_smoothing)\n    return PreferenceLoss(losses, ": {
        "DPO: rewards swapped": (
            "rejected_rewards, label_smoothing)\n"
            "    chosen_rewards, rejected_rewards = rejected_rewards, chosen_rewards\n"
            "    return PreferenceLoss(losses, "
        ),
        "DPO: rewards without beta": (
            "rejected_rewards, label_smoothing)\n"
            "    chosen_rewards, rejected_rewards = chosen_logratios, rejected_logratios\n"
            "    return PreferenceLoss(losses, "
        ),
        "DPO: chosen reward not detached": (
            "rejected_rewards, label_smoothing)\n"
            "    chosen_rewards.detach = lambda: chosen_rewards\n"
            "    return PreferenceLoss(losses, "
        ),
    },
    "beta: float = 0.1,\n    label_smoothing: float = 0.0,\n    chosen": {
        "DPO: default beta": "beta: float = 1.0,\n    label_smoothing: float = 0.0,\n    chosen",
        "DPO: smoothed by default": "beta: float = 0.1,\n    label_smoothing: float = 0.1,\n    chosen",
    },
    # IPO
    "losses = (margins - 1 / (2 * beta)).square()": {
        "IPO: 1/beta": "losses = (margins - 1 / beta).square()",
        "IPO: beta/2": "losses = (margins - beta / 2).square()",
        "IPO: target of the other sign": "losses = (margins + 1 / (2 * beta)).square()",
        "IPO: no target": "losses = margins.square()",
        "IPO: beta on the margin": "losses = (beta * margins - 1 / 2).square()",
        "IPO: absolute distance": "losses = (margins - 1 / (2 * beta)).abs()",
        "IPO: half the square": "losses = 0.5 * (margins - 1 / (2 * beta)).square()",
        "IPO: only below the target": "losses = (margins - 1 / (2 * beta)).clamp(max=0).square()",
    },
    "margins = chosen_logratios - rejected_logratios": {
        "IPO: preference reversed": "margins = rejected_logratios - chosen_logratios",
        "IPO: rejected left out": "margins = chosen_logratios",
        "IPO: chosen detached": "margins = chosen_logratios.detach() - rejected_logratios",
    },
    "(beta * chosen_logratios).detach()": {"IPO: reward without beta": "chosen_logratios.detach()"},
    "(beta * rejected_logratios).detach()": {
        "IPO: reward not detached": "beta * rejected_logratios",
        "IPO: reward of the wrong response": "(beta * chosen_logratios).detach()",
    },
    "beta: float = 0.1,\n    chosen_lengths": {"IPO: default beta": "beta: float = 0.2,\n    chosen_lengths"},
    # SimPO
    "chosen_rewards - rejected_rewards - gamma": {
        "SimPO: gamma dropped": "chosen_rewards - rejected_rewards",
        "SimPO: gamma added": "chosen_rewards - rejected_rewards + gamma",
        "SimPO: gamma inside beta": "chosen_rewards - rejected_rewards - beta * gamma",
        "SimPO: preference reversed": "rejected_rewards - chosen_rewards - gamma",
    },
    "rejected_rewards - gamma, label_smoothing)": {
        "SimPO: smoothing not passed on": "rejected_rewards - gamma, 0.0)",
    },
    "- gamma, label_smoothing)\n    return PreferenceLoss(losses, chosen_rewards.detach()": {
        "SimPO: gamma taken from the reward": (
            "- gamma, label_smoothing)\n    return PreferenceLoss(losses, chosen_rewards.detach() - gamma"
        ),
    },
    'beta * _per_token("chosen_lengths", policy_chosen_logps, chosen_lengths)': {
        "SimPO: beta dropped": '_per_token("chosen_lengths", policy_chosen_logps, chosen_lengths)',
        "SimPO: sum for average": "beta * policy_chosen_logps",
        "SimPO: chosen detached": (
            'beta * _per_token("chosen_lengths", policy_chosen_logps.detach(), chosen_lengths)'
        ),
    },
    'beta * _per_token("rejected_lengths"': {
        "SimPO: beta dropped on rejected": '_per_token("rejected_lengths"',
        "SimPO: divided by beta": '1 / beta * _per_token("rejected_lengths"',
    },
    "policy_rejected_logps, rejected_lengths)": {
        "SimPO: the other length": "policy_rejected_logps, chosen_lengths)",
        "SimPO: rejected is chosen": "policy_chosen_logps, rejected_lengths)",
    },
    "_check_beta(beta)\n    policy_chosen_logps": {"SimPO: beta unchecked": "policy_chosen_logps"},
    "beta: float = 2.0": {"SimPO: default beta": "beta: float = 2.5"},
    "gamma: float = 1.0": {"SimPO: default gamma": "gamma: float = 0.5"},
    # maximum likelihood
    "return -_per_token(": {"SFT: likelihood minimised": "return _per_token("},
    'return -_per_token("chosen_lengths", policy_chosen_logps, chosen_lengths)': {
        "SFT: sum for average": "return -policy_chosen_logps",
        "SFT: token count subtracted": "return -(policy_chosen_logps - chosen_lengths)",
    },
    # division and checks
    "sums / lengths.to(sums.dtype)": {
        "multiplied by length": "sums * lengths.to(sums.dtype)",
        "divided twice": "sums / lengths.to(sums.dtype) ** 2",
        "length off by one": "sums / (lengths + 1).to(sums.dtype)",
        "divided by the longest": "sums / lengths.max().to(sums.dtype)",
        "divided by the batch's mean length": "sums / lengths.to(sums.dtype).mean()",
    },
    "not (lengths >= 1).all()": {
        "zero length allowed": "(lengths < 0).any()",
        "one bad length tolerated": "not (lengths >= 1).any()",
        "one token refused": "(lengths <= 1).any()",
    },
    "if lengths.shape != sums.shape:": {"lengths' shape unchecked": "if False:"},
    'if not 0 < beta < float("inf"):': {
        "beta of zero allowed": "if not beta >= 0:",
        "beta of NaN allowed": "if beta <= 0:",
        "infinite beta allowed": "if not 0 < beta:",
    },
    "    _check_beta(beta)\n    policy_chosen,": {"DPO and IPO: beta unchecked": "    policy_chosen,"},
    "value.ndim != 1 or value.shape != first.shape": {
        "token log-probs allowed": "value.shape != first.shape",
        "broadcasting allowed": "value.ndim != 1",
    },
    "not value.is_floating_point() or value.dtype != first.dtype": {
        "integers allowed": "value.dtype != first.dtype",
        "mixed dtypes allowed": "not value.is_floating_point()",
    },
    "value.float() if half else value": {
        "bf16 computed in bf16": "value",
        "float64 computed in float32": "value.float()",
    },
}
