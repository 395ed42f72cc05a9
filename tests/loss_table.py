"""The table of the project's losses, over which tests/test_losses.py runs the battery.

To add a loss, write the function and add an entry; what an entry leaves out is not asked.
"""

from dataclasses import replace

from battery import Arguments, Loss, Point
from equations import (
    AVERAGE_SHIFTS,
    LENGTHS,
    POLICY,
    REFERENCE,
    REWARDS,
    SUM_SHIFTS,
    adding,
    adding_per_token,
    bradley_terry_gradient,
    bradley_terry_mirror,
    bradley_terry_z,
    center_gradient,
    dpo_gradient,
    dpo_mirror,
    dpo_z,
    ipo_distance,
    ipo_gradient,
    ipo_mirror,
    logistic,
    logratio_rewards,
    moving_apart,
    repeating,
    simpo_gradient,
    simpo_mirror,
    simpo_rewards,
    simpo_z,
)
from minidpo.losses import bradley_terry_loss, center_penalty, dpo_loss, ipo_loss, sft_loss, simpo_loss

# log pi/pi_ref: -10 + 12 = 2 on the chosen, -20 + 18 = -2 on the rejected; over lengths 4 and 5: 0.5, -0.4.
PAIR: Arguments = dict(zip(POLICY + REFERENCE, (-10.0, -20.0, -12.0, -18.0), strict=True))
COUNTS: Arguments = dict(zip(LENGTHS, (4, 5), strict=True))
# Policy equals reference.
SETTLED: Arguments = dict(zip(POLICY + REFERENCE, (-7.0, -9.0, -7.0, -9.0), strict=True))

bradley_terry = Loss(
    name="Bradley-Terry",
    function=bradley_terry_loss,
    inputs=REWARDS,
    settings={"label_smoothing": 0.0},
    twin=lambda a: logistic(bradley_terry_z(a), a.label_smoothing),
    gradient=bradley_terry_gradient,
    points=(
        # z = 1.5 - 0.5 = 1; ln(1 + exp(-1)) = ln 1.3678794412
        Point({"chosen_rewards": 1.5, "rejected_rewards": 0.5}, 0.3132616875),
        Point({"chosen_rewards": -3.0, "rejected_rewards": -3.0}, 0.6931471806),  # z = 0: ln 2
    ),
    unmoved_by=(adding(*REWARDS),),
    mirror=bradley_terry_mirror,
)
dpo = Loss(
    name="DPO",
    function=dpo_loss,
    inputs=POLICY + REFERENCE,
    settings={"beta": 0.1, "label_smoothing": 0.0},
    twin=lambda a: logistic(dpo_z(a), a.label_smoothing),
    gradient=dpo_gradient,
    rewards=logratio_rewards,
    points=(
        # beta = 0.1 unless said; z = 0.1 * (2 - -2) = 0.4; ln(1 + exp(-0.4)) = ln 1.6703200460
        Point(PAIR, 0.5130152524, (0.2, -0.2)),
        # z = 0.25 * 4 = 1; ln(1 + exp(-1))
        Point(PAIR | {"beta": 0.25}, 0.3132616875, (0.5, -0.5)),
        Point(SETTLED, 0.6931471806, (0.0, 0.0)),  # ln 2
    ),
    unmoved_by=SUM_SHIFTS,
    mirror=dpo_mirror,
)
ipo = Loss(
    name="IPO",
    function=ipo_loss,
    inputs=POLICY + REFERENCE,
    settings={"beta": 0.1},
    twin=lambda a: ipo_distance(a) ** 2,
    gradient=ipo_gradient,
    rewards=logratio_rewards,
    points=(
        Point(PAIR, 1.0, (0.2, -0.2)),  # h = 2 - -2 = 4; 1/(2 * 0.1) = 5; (4 - 5)^2
        Point(PAIR | {"beta": 0.5}, 9.0, (1.0, -1.0)),  # 1/(2 * 0.5) = 1; (4 - 1)^2
        Point(SETTLED, 25.0, (0.0, 0.0)),  # 1/(4 * 0.1^2)
    ),
    unmoved_by=SUM_SHIFTS,
    mirror=ipo_mirror,
)
simpo = Loss(
    name="SimPO",
    function=simpo_loss,
    inputs=POLICY,
    lengths=LENGTHS,
    settings={"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0},
    twin=lambda a: logistic(simpo_z(a), a.label_smoothing),
    gradient=simpo_gradient,
    rewards=simpo_rewards,
    points=(
        # beta = 2 and gamma = 1 unless said; 2 * -10/4 = -5, 2 * -20/5 = -8; z = 3 - 1 = 2; ln(1 + exp(-2))
        Point({n: PAIR[n] for n in POLICY} | COUNTS, 0.1269280110, (-5.0, -8.0)),
        # -2.5 + 4 = 1.5; z = 1.5 - 0.5 = 1: gamma stands outside beta
        Point(
            {n: PAIR[n] for n in POLICY} | COUNTS | {"beta": 1.0, "gamma": 0.5}, 0.3132616875, (-2.5, -4.0)
        ),
        # equal averages: z = -gamma; ln(1 + e) = 1.3132616875
        Point(dict(zip(POLICY + LENGTHS, (-6.0, -9.0, 2, 3), strict=True)), 1.3132616875, (-6.0, -6.0)),
    ),
    unmoved_by=(adding_per_token(*POLICY), repeating(*POLICY)),
    mirror=simpo_mirror,
)

LOSSES = [
    bradley_terry,
    replace(
        bradley_terry,
        name="Bradley-Terry, a margin for each pair",
        inputs=(*REWARDS, "margin"),
        # z = 1.5 - 0.5 - 0.25 = 0.75; ln(1 + exp(-0.75)) = ln 1.4723665527
        points=(Point({"chosen_rewards": 1.5, "rejected_rewards": 0.5, "margin": 0.25}, 0.3868710061),),
    ),
    replace(
        bradley_terry,
        name="Bradley-Terry, one margin, smoothed",
        settings={"margin": 0.5, "label_smoothing": 0.1},
        # z = 0.5; ln(1 + exp(-0.5)) = 0.4740769842, and e z = 0.05 more: -log sigma(-z) = z - log sigma(z)
        points=(
            Point(
                dict(zip(REWARDS, (1.5, 0.5), strict=True)) | {"margin": 0.5, "label_smoothing": 0.1},
                0.5240769842,
            ),
        ),
    ),
    Loss(
        name="centring penalty",
        function=center_penalty,
        inputs=REWARDS,
        twin=lambda a: (a.chosen_rewards + a.rejected_rewards) ** 2,
        gradient=center_gradient,
        points=(Point({"chosen_rewards": 1.5, "rejected_rewards": 0.5}, 4.0),),  # (1.5 + 0.5)^2
        unmoved_by=(moving_apart(*REWARDS),),
        mirror=lambda a: 0 * a.chosen_rewards,
    ),
    dpo,
    replace(
        dpo,
        name="DPO, smoothed",
        settings={"beta": 0.1, "label_smoothing": 0.1},
        points=(
            Point(PAIR | {"label_smoothing": 0.1}, 0.5530152524, (0.2, -0.2)),
        ),  # z = 0.4: 0.5130152524 + 0.04
    ),
    replace(
        dpo,
        name="DPO, length-normalised",
        lengths=LENGTHS,
        points=(
            Point(
                PAIR | COUNTS, 0.6491593390, (0.05, -0.04)
            ),  # z = 0.1 * (0.5 + 0.4) = 0.09; ln(1 + exp(-0.09))
            # z = 0.9: ln(1 + exp(-0.9)) = 0.3411538747, and 0.1 * 0.9 more
            Point(PAIR | COUNTS | {"beta": 1.0, "label_smoothing": 0.1}, 0.4311538747, (0.5, -0.4)),
        ),
        unmoved_by=AVERAGE_SHIFTS,
    ),
    ipo,
    replace(
        ipo,
        name="IPO on averages",
        lengths=LENGTHS,
        points=(Point(PAIR | COUNTS, 16.81, (0.05, -0.04)),),  # h = 0.5 + 0.4 = 0.9; (0.9 - 5)^2
        unmoved_by=AVERAGE_SHIFTS,
    ),
    simpo,
    replace(
        simpo,
        name="SimPO, smoothed",
        settings={"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.1},
        # z = 2: 0.1269280110 + 0.1 * 2
        points=(
            Point(
                {n: PAIR[n] for n in POLICY} | COUNTS | {"label_smoothing": 0.1}, 0.3269280110, (-5.0, -8.0)
            ),
        ),
    ),
    Loss(
        name="maximum likelihood",
        function=sft_loss,
        inputs=POLICY[:1],
        lengths=LENGTHS[:1],
        twin=lambda a: -a.policy_chosen_logps / a.chosen_lengths,
        gradient=lambda a: {"policy_chosen_logps": -1 / a.chosen_lengths},
        points=(Point({"policy_chosen_logps": -10.0, "chosen_lengths": 4}, 2.5),),  # 10 / 4
    ),
]
