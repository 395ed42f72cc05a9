"""The pairs of a run. What does not fit together is refused here, before anything is computed or kept."""

from pathlib import Path

from minidpo.config import DPOConfig, RewardConfig
from minidpo.data import PairTokens, Tokenizer, load_pairs, longest_pair, require_fit, require_margins
from minidpo.distributed import first_before_others
from minidpo.errors import UserError
from minidpo.log import print0
from minidpo.model import read_config, require_reward_model


def load_run_pairs(config: DPOConfig | RewardConfig, tokenizer: Tokenizer) -> tuple[PairTokens, PairTokens]:
    """The pairs to train on and those held out, tokenized once and kept in OUT/tokens.

    Raises UserError if the data does not fit the model, the reference, the reward model of the evaluation or
    optim.micro_tokens. Then nothing is left behind on disk.
    """
    max_length = config.data.max_length
    require_fit("model", read_config(Path(config.model.path)), tokenizer, max_length)
    if isinstance(config, DPOConfig):
        _check_evaluation(config)
        if config.loss.needs_reference:
            require_fit("reference", read_config(config.reference_path), tokenizer, max_length)

    def check(train: PairTokens, held_out: PairTokens) -> None:
        longest = longest_pair(train, held_out)
        if longest > config.optim.micro_tokens:
            raise UserError(
                f"optim.micro_tokens = {config.optim.micro_tokens}, but one pair has {longest} tokens;"
                " it must be at least that"
            )
        if isinstance(config, RewardConfig) and config.loss.margin_from_data:
            require_margins(train)
            require_margins(held_out)

    with first_before_others():  # The other processes read the token ids that rank 0 has made.
        cache = Path(config.run.out) / "tokens"
        return load_pairs(config.data, tokenizer, config.run.seed, cache, check)


def _check_evaluation(config: DPOConfig) -> None:
    """Fail now rather than at the first evaluation, and name what is given and not read."""
    reward_model, samples = config.eval.reward_model, config.eval.samples
    if samples and reward_model:
        require_reward_model(Path(reward_model))
    elif reward_model:
        print0("eval.reward_model is not read: eval.samples is 0")
    if config.reference.path and not config.loss.needs_reference and not samples:
        print0(f"{config.loss.name} has no reference: {config.reference.path} is not read")
