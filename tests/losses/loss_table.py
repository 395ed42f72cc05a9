"""The project's losses, described for the battery of battery.py, which test_losses.py runs over CASES.

A new loss needs one entry here: a point computed by hand, and the optimum that it leads to in the exact world
(or the reason why none is known). Every further field is one more claim that is put to the test; equations.py
has the equations that the entries below claim.
"""

from dataclasses import replace

import equations as eq
import torch
from case import Case, Optimum, Point

from minidpo.losses import DPO, IPO, SFT, BradleyTerry, Rewards, SimPO
from minidpo.verify.exact_world import beats_sampler, best_scores, optimal_policy

# log pi/pi_ref: -10 + 12 = 2 on the chosen, -20 + 18 = -2 on the rejected; per token, of 4 and 5: 0.5, -0.4.
PAIR = dict(chosen=-10.0, rejected=-20.0, ref_chosen=-12.0, ref_rejected=-18.0)
COUNTED = PAIR | dict(chosen_length=4, rejected_length=5)
SETTLED = dict(chosen=-7.0, rejected=-9.0, ref_chosen=-7.0, ref_rejected=-9.0)  # policy equals reference

dpo = Case(
    DPO(),
    points=(
        # beta = 0.1 by default; z = 0.1 * (2 - -2) = 0.4; ln(1 + exp(-0.4)) = ln 1.6703200460
        Point(PAIR, 0.5130152524, (0.2, -0.2)),
        # z = 0.25 * 4 = 1; ln(1 + exp(-1)) = ln 1.3678794412
        Point(PAIR, 0.3132616875, (0.5, -0.5), dict(beta=0.25)),
        Point(SETTLED, 0.6931471806, (0.0, 0.0)),  # ln 2
    ),
    optimum=Optimum(DPO(beta=0.5), lambda w: optimal_policy(w.reference_logps, w.rewards, 0.5)),
    twin=eq.dpo,
    gradient=eq.dpo_gradient,
    metrics=eq.pair_metrics(eq.log_ratio_rewards),
    unmoved_by=eq.SUM_SHIFTS,
    mirror=eq.logistic_mirror(eq.dpo_z),
)
ipo = Case(
    IPO(),
    points=(
        Point(PAIR, 1.0, (0.2, -0.2)),  # h = 2 - -2 = 4; 1/(2 * 0.1) = 5; (4 - 5)^2
        Point(PAIR, 9.0, (1.0, -1.0), dict(beta=0.5)),  # 1/(2 * 0.5) = 1; (4 - 1)^2
        Point(SETTLED, 25.0, (0.0, 0.0)),  # 1/(4 * 0.1^2)
    ),
    optimum=Optimum(IPO(beta=0.2), lambda w: optimal_policy(w.reference_logps, beats_sampler(w), 0.2)),
    twin=eq.ipo,
    gradient=eq.ipo_gradient,
    metrics=eq.pair_metrics(eq.log_ratio_rewards),
    unmoved_by=eq.SUM_SHIFTS,
    mirror=eq.ipo_mirror,
)
simpo = Case(
    SimPO(),
    points=(
        # beta = 2 and gamma = 1 by default; 2 * -10/4 = -5, 2 * -20/5 = -8; z = 3 - 1 = 2; ln(1 + exp(-2))
        Point(COUNTED, 0.1269280110, (-5.0, -8.0)),
        # -2.5 + 4 = 1.5; z = 1.5 - 0.5 = 1: gamma stands outside beta
        Point(COUNTED, 0.3132616875, (-2.5, -4.0), dict(beta=1.0, gamma=0.5)),
        # equal averages: z = -gamma; ln(1 + e)
        Point(COUNTED | dict(chosen=-12.0, rejected=-15.0), 1.3132616875, (-6.0, -6.0)),
    ),
    optimum=Optimum(
        SimPO(),
        lambda w: optimal_policy(torch.zeros_like(w.rewards), best_scores(w, gamma=1.0)[0], 2.0, w.lengths),
    ),
    twin=eq.simpo,
    gradient=eq.simpo_gradient,
    metrics=eq.pair_metrics(eq.simpo_rewards),
    unmoved_by=(eq.adding_per_token, eq.repeating),
    mirror=eq.logistic_mirror(eq.simpo_z),
)
sft = Case(
    SFT(),
    points=(Point(dict(chosen=-10.0, chosen_length=4), 2.5),),  # 10 / 4
    # The winner of a pair is y with probability proportional to mu(y) p*(y beats mu), and its loss is
    # -log pi(y) / |y|. The sum of -w(y) log pi(y) is least at pi = w / sum of w.
    optimum=Optimum(SFT(), lambda w: (w.sampler * beats_sampler(w) / w.lengths).log().log_softmax(-1)),
    twin=eq.sft,
    gradient=eq.sft_gradient,
    metrics=lambda p, s: {"logps/chosen": p.chosen, "response_length/chosen": p.chosen_length},
)
ALIKE, APART = dict(chosen=-3.0, rejected=-3.0), dict(chosen=1.5, rejected=0.5)
bradley_terry = Case(
    BradleyTerry(lm_weight=0.0),
    points=(
        Point(APART, 0.3132616875),  # z = 1.5 - 0.5 = 1
        Point(ALIKE, 0.6931471806),  # z = 0
        Point(APART, 0.4740769842, settings=dict(margin=0.5)),  # z = 1 - 0.5; ln(1 + exp(-0.5))
        Point(APART, 2.3132616875, settings=dict(center_weight=0.5)),  # 0.5 (1.5 + 0.5)^2 = 2 more
        Point(ALIKE, 36.6931471806, settings=dict(center_weight=1.0)),  # (-3 - 3)^2 = 36 more
    ),
    optimum="tools/exact.py trains it: its optimum is a reward, not a policy",
    twin=eq.bradley_terry,
    gradient=eq.bradley_terry_gradient,
    metrics=eq.reward_metrics,
    unmoved_by=(eq.adding("chosen", "rejected"),),
    mirror=eq.logistic_mirror(eq.bradley_terry_z),
    of=Rewards,
    inputs=("chosen", "rejected"),
    label="rm",
)

CASES = [
    dpo,
    replace(
        dpo,
        label="dpo, smoothed",
        loss=DPO(label_smoothing=0.1),
        # z = 0.4: 0.5130152524 as above, and e z = 0.04 more, because -log sigma(-z) = z - log sigma(z)
        points=(Point(PAIR, 0.5530152524, (0.2, -0.2)),),
    ),
    replace(
        dpo,
        label="dpo, per token",
        loss=DPO(length_normalize=True),
        points=(
            # z = 0.1 * (0.5 + 0.4) = 0.09; ln(1 + exp(-0.09))
            Point(COUNTED, 0.6491593390, (0.05, -0.04)),
            # z = 0.9: ln(1 + exp(-0.9)) = 0.3411538747, and 0.1 * 0.9 more
            Point(COUNTED, 0.4311538747, (0.5, -0.4), dict(beta=1.0, label_smoothing=0.1)),
        ),
        unmoved_by=eq.AVERAGE_SHIFTS,
    ),
    ipo,
    replace(
        ipo,
        label="ipo, per token",
        loss=IPO(length_normalize=True),
        points=(Point(COUNTED, 16.81, (0.05, -0.04)),),  # h = 0.5 + 0.4 = 0.9; (0.9 - 5)^2
        unmoved_by=eq.AVERAGE_SHIFTS,
    ),
    simpo,
    replace(
        simpo,
        label="simpo, smoothed",
        loss=SimPO(label_smoothing=0.1),
        points=(Point(COUNTED, 0.3269280110, (-5.0, -8.0)),),  # z = 2: 0.1269280110 + 0.1 * 2
    ),
    sft,
    bradley_terry,
    replace(
        bradley_terry,
        label="rm, a margin and smoothing",
        loss=BradleyTerry(lm_weight=0.0, margin=0.5, label_smoothing=0.1),
        points=(Point(APART, 0.5240769842),),  # z = 0.5: 0.4740769842 + 0.1 * 0.5
    ),
    replace(
        bradley_terry,
        label="rm, margins from the data",
        loss=BradleyTerry(lm_weight=0.0, margin_from_data=True),
        inputs=("chosen", "rejected", "margin"),
        # z = 1 - 0.25 = 0.75; ln(1 + exp(-0.75)) = ln 1.4723665527; with a margin of 0.5 besides, z = 0.25
        points=(
            Point(APART | dict(margin=0.25), 0.3868710061),
            Point(APART | dict(margin=0.25), 0.5759394199, settings=dict(margin=0.5)),
        ),
    ),
    replace(
        bradley_terry,
        label="rm, with language modelling",
        loss=BradleyTerry(center_weight=0.01),
        inputs=("chosen", "rejected", "chosen_logps"),
        # z = 1, 0.01 * 2^2 = 0.04, and -(-10) / 4 = 2.5
        points=(Point(APART | dict(chosen_logps=-10.0, chosen_length=4), 2.8532616875),),
        unmoved_by=(),
        mirror=None,
    ),
]
