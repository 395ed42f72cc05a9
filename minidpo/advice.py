"""Warnings that an expert looking on would give: one line each, once a run, with what to try.

The thresholds are rules of thumb, no theorems; each is named where it is used.
"""

from minidpo.metrics import say
from minidpo.objective import IDLE

APART = 30.0  # nats of KL on one short response: as a rule it holds text that nobody wrote
MOST_KL = 10.0  # nats a response: past it, samples are seldom what the preferences were about
FALLEN = 10.0  # nats a chosen response
SATURATED = 10.0  # of a margin in units of reward: a pair's gradient is 9e-5 of that at 0
FEW_PARAMETERS = 50_000_000  # published rates are for models larger than this

# Published: DPO 5e-7 (Zephyr, Llama 3's 1e-5 the highest), IPO and SimPO the same range, SFT and reward models 1e-6 to 2e-5.
RATES = {
    "dpo": (5e-7, 1e-5),
    "ipo": (5e-7, 1e-5),
    "simpo": (3e-7, 5e-6),
    "sft": (1e-6, 5e-5),
    "rm": (1e-6, 5e-5),
}


class Advice:
    """Looks at the logged values of a run as they come. loss: a key of RATES, or one of which no rate is known."""

    def __init__(self, loss: str, parameters: int, lr: float) -> None:
        self._given: set[str] = set()
        self._first: dict[str, float] = {}
        self._overfitted_steps = 0
        self._lengths: list[float] = []
        low, high = RATES.get(loss, (lr, lr))
        if parameters >= FEW_PARAMETERS and not low / 10 <= lr <= high * 10:
            self._give(
                f"optim.lr = {lr:g} is far from what is published for {loss}, {low:g} to {high:g}: expect"
                f" {'no change' if lr < low else 'a model that falls apart'}"
            )

    def on_step(self, values: dict[str, float]) -> None:
        """values: what is logged of a training step."""
        accuracy = values.get("rewards/accuracies", values.get("accuracy", 0.0))
        loss = values.get("preference_loss", values["loss"])
        self._overfitted_steps = self._overfitted_steps + 1 if accuracy == 1.0 and loss < 0.01 else 0
        if self._overfitted_steps == 3:
            self._give(
                "accuracy 1.0 and a loss near 0 in three logged steps: the pairs are learnt by heart; fewer epochs, a"
                " higher loss.beta or label smoothing keep more of the model"
            )
        margin = values.get("rewards/margins", values.get("margin", 0.0))
        if margin > SATURATED:
            self._give(
                f"rewards saturate: a mean margin of {margin:.1f} leaves no gradient; fewer epochs, a lower optim.lr"
                " or label smoothing"
            )
        if values.get("idle", 0.0) > 0.5:
            self._give(
                f"{values['idle']:.0%} of the pairs have a loss below {IDLE:g} and no gradient to speak of: what is left"
                " of the run learns from few of them; stop here, or add harder pairs"
            )

    def on_evaluation(self, values: dict[str, float]) -> None:
        """values: what is logged of an evaluation, without "eval/"."""
        for name in ("logps/chosen", "rewards/margins"):
            if name in values:
                self._first.setdefault(name, values[name])
        if values.get("kl", 0.0) > MOST_KL:
            self._give(
                f"KL {values['kl']:.1f} nats from the reference, more than {MOST_KL:g}: a higher loss.beta, a lower"
                " optim.lr or an earlier checkpoint stays closer; read OUT/samples"
            )
        elif values.get("kl_of_worst", 0.0) > APART:
            self._give(
                f"one response has a KL of {values['kl_of_worst']:.0f} nats: read OUT/samples for text that has fallen apart"
            )
        fallen, risen = (
            values.get(name, 0.0) - self._first.get(name, 0.0) for name in ("logps/chosen", "rewards/margins")
        )
        if -fallen > FALLEN and risen > 0:
            self._give(
                f"chosen responses are {-fallen:.1f} nats less likely than at the start while margins rise: both endings"
                " fall, the rejected one faster; a higher loss.beta or lower optim.lr, and read samples for new text"
            )
        if values.get("ended") == 0.0:
            self._give(
                "no sampled answer ended within eval.max_new_tokens: raise it, or see whether the data's endings have an EOS"
            )
        if "sample_length" in values:
            self._lengths.append(values["sample_length"])
            last = self._lengths[-4:]
            if len(last) == 4 and last == sorted(set(last)) and last[-1] > 1.25 * self._lengths[0]:
                self._give(
                    f"responses get longer at every evaluation, {self._lengths[0]:.0f} to {last[-1]:.0f} tokens: length"
                    " is what is learnt; loss.length_normalize or SimPO"
                )

    def _give(self, text: str) -> None:
        kind = text.translate({ord(digit): None for digit in "0123456789.%"})
        if kind not in self._given:
            self._given.add(kind)
            say(f"warning: {text}")
