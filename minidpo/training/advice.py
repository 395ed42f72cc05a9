"""Warnings that an expert looking on would give: one line each, once per run, with what to try.

The thresholds are rules of thumb, not theorems.
"""

from collections.abc import Callable, Iterable

from minidpo.log import print0
from minidpo.losses import SATURATED, BradleyTerry, PreferenceLoss
from minidpo.settings import keys_of

APART = 30.0  # nats of KL of one short response, which as a rule is then no language any more
MOST_KL = 10.0  # nats per response; beyond it, samples are seldom what the preferences were about
FALLEN = 10.0  # nats per chosen response
RISEN = 1.01  # times the held-out loss of step 0, whatever its scale; less may be noise
OF_ADAPTERS = 10  # their best rates over those of full training (Schulman et al. 2025, "LoRA Without Regret")
FEW_PARAMETERS = 50_000_000  # published learning rates are for larger models


class Advice:
    """Looks at the logged values of a run as they come, and names only settings that the run's loss has.
    tell: where a warning goes. seen: metrics.jsonl from before a resume; what it had to tell was told."""

    def __init__(
        self,
        loss: PreferenceLoss | BradleyTerry,
        parameters: int,
        lr: float,
        adapters: bool = False,
        tell: Callable[[str], None] = print0,
        seen: Iterable[dict[str, float]] = (),
    ) -> None:
        self._tell: Callable[[str], object] = str  # tells nobody
        self._given: set[str] = set()
        self._first: dict[str, float] = {}  # values of the first evaluation
        self._overfitted_steps = 0
        self._lengths: list[float] = []
        has = keys_of(loss)
        # A beta pulls towards the reference where there is one, and elsewhere scales the reward.
        self._beta = ["a higher loss.beta"] * ("beta" in has and loss.needs_reference)
        self._smoothing = ["loss.label_smoothing"] * ("label_smoothing" in has)
        self._sft = ["loss.sft_weight above 0"] * (getattr(loss, "sft_weight", 1.0) == 0)
        self._by_length = ["loss.length_normalize", "SimPO"] * ("length_normalize" in has)
        for line in seen:
            self.on_line(line)
        self._tell = tell
        low, high = (rate * (OF_ADAPTERS if adapters else 1) for rate in loss.usual_lr)
        kind = f"{loss.name} with adapters" if adapters else loss.name
        self._warn(
            parameters >= FEW_PARAMETERS and not low / 10 <= lr <= high * 10,
            f"optim.lr = {lr:g} is far from what is published for {kind}, {low:g} to {high:g}: expect"
            f" {'no change' if lr < low else 'a model that falls apart'}",
        )

    def on_line(self, line: dict[str, float]) -> None:
        """line: of metrics.jsonl, of a training step or of an evaluation."""
        look_at = self._on_step if "loss" in line else self._on_evaluation
        look_at({name.removeprefix("eval/"): value for name, value in line.items()})

    def _on_step(self, values: dict[str, float]) -> None:
        accuracy = values.get("rewards/accuracies", values.get("accuracy"))
        learnt = accuracy == 1.0 and values.get("preference_loss", values["loss"]) < 0.01
        self._overfitted_steps = self._overfitted_steps + 1 if learnt else 0
        self._warn(
            self._overfitted_steps >= 3,
            "accuracy 1.0 and a loss near 0 in three logged steps: the pairs are learnt by heart;"
            f" try {' or '.join(['fewer optim.epochs', *self._beta, *self._smoothing])}",
        )
        saturated = values.get("saturated", 0.0)
        self._warn(
            saturated > 0.5,
            f"{saturated:.0%} of the pairs have a loss below {SATURATED:g} and almost no gradient:"
            " the rest of the run learns from few of them; stop here, or add harder pairs",
        )

    def _on_evaluation(self, values: dict[str, float]) -> None:
        self._first = self._first or values
        loss, at_first = values.get("loss", 0.0), self._first.get("loss", 0.0)
        self._warn(
            loss > RISEN * at_first,
            f"held-out loss {loss:.4f}, above the {at_first:.4f} of step 0: the run has overfitted, or its"
            " steps are too large; try fewer optim.epochs, a lower optim.lr or an earlier checkpoint",
        )
        kl, worst = values.get("kl", 0.0), values.get("kl_of_worst", 0.0)
        self._warn(
            kl > MOST_KL,
            f"KL {kl:.1f} nats from the reference, more than {MOST_KL:g}: read OUT/samples;"
            f" {' or '.join([*self._beta, 'a lower optim.lr', 'an earlier checkpoint'])} would stay closer",
        )
        self._warn(
            worst > APART and kl <= MOST_KL,
            f"one response has a KL of {worst:.0f} nats: read OUT/samples for broken text",
        )
        risen, fallen = (
            sign * (values.get(name, 0.0) - self._first.get(name, 0.0))
            for name, sign in (("rewards/margins", 1), ("logps/chosen", -1))
        )
        self._warn(
            fallen > FALLEN and risen > 0,
            f"chosen responses are {fallen:.1f} nats less likely than at the start while margins rise: both"
            " responses fall, the rejected one faster;"
            f" try {' or '.join([*self._sft, *self._beta, 'a lower optim.lr'])}",
        )
        self._warn(
            values.get("ended") == 0.0,
            "no sampled response ended within eval.max_new_tokens: raise it, or see whether the data's"
            " responses have an EOS",
        )
        if "sample_length" in values:
            self._lengths.append(values["sample_length"])
            first, *last = self._lengths[0], *self._lengths[-4:]
            self._warn(
                len(last) == 4 and last == sorted(set(last)) and last[-1] > 1.25 * first,
                f"responses get longer at every evaluation, {first:.0f} to {last[-1]:.0f} tokens: length is"
                f" what is learnt; try {' or '.join([*self._by_length, 'fewer optim.epochs'])}",
            )

    def _warn(self, condition: bool, text: str) -> None:
        kind = text.translate({ord(digit): None for digit in "0123456789.%"})
        if condition and kind not in self._given:
            self._given.add(kind)
            self._tell(f"warning: {text}")
