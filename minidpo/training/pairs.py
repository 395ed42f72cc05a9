"""The pairs of a run. What does not fit together is refused here, before anything is computed or kept."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from minidpo.config import DPOConfig, RewardConfig, settings_of_run
from minidpo.data import (
    PairTokens,
    Tokenizer,
    load_pairs,
    require_fit,
    require_margins,
    require_messages,
)
from minidpo.data.paths import data_files
from minidpo.data.tokenizer_files import CONFIG, prefix_space
from minidpo.distributed import first_before_others
from minidpo.errors import UserError
from minidpo.log import print0
from minidpo.losses import LOSSES, BradleyTerry, PreferenceLoss
from minidpo.model import read_config, require_language_model, require_reward_model
from minidpo.settings import keys_of, toml
from minidpo.training.reference import require_reference


def load_run_pairs(config: DPOConfig | RewardConfig, tokenizer: Tokenizer) -> tuple[PairTokens, PairTokens]:
    """The pairs to train on and those held out, tokenized once and kept in OUT/tokens. Raises UserError if
    they do not fit the models or the settings; then nothing is left behind on disk."""
    model = Path(config.model.path)
    require_fit("model", read_config(model), tokenizer, config.data.max_length)
    if (theirs := prefix_space(model)) not in (None, tokenizer.prepends):
        what = "which transformers follows, contradicts tokenizer.json, which is followed here"
        print0(f"warning: {model / CONFIG}: add_prefix_space = {toml(theirs)}, {what}")
    _require_others(config, tokenizer)
    with first_before_others():  # The other processes read the token ids that rank 0 has made.
        out = Path(config.run.out)
        # A run that is resumed on a later day goes on with the date of its first one.
        data = replace(config.data, date=config.data.date or settings_of_run(out, "data").get("date", ""))
        checks = partial(require_usable, config, tokenizer), partial(require_responses, config.loss)
        train, held_out = load_pairs(data, tokenizer, config.run.seed, out / "tokens", *checks)
        config.data.date = train.date or held_out.date or config.data.date
    if not len(held_out) and isinstance(config, DPOConfig) and config.eval.samples:
        print0("warning: no pair is held out, so eval.samples is not read")
    if config.loss.unpaired and train.label is None:  # Labelled responses stay as they are.
        n = len(train)
        print0(
            f"{config.loss.name} reads responses one by one: {n} pairs are {n} desirable responses (chosen)"
            f" and {n} undesirable ones (rejected); batch_size counts responses"
        )
        train = train.unpaired()
    if config.loss.unpaired and held_out.label is None and len(held_out):
        held_out = held_out.unpaired()
    if config.loss.unpaired and train.label is not None and len(kinds := set(train.label)) == 1:
        only = "desirable" if kinds.pop() else "undesirable"
        print0(f"warning: all responses to train on are {only}: {config.loss.name} is made for both kinds")
    return train, held_out


def require_usable(
    config: DPOConfig | RewardConfig, tokenizer: Tokenizer, train: PairTokens, held_out: PairTokens
) -> None:
    """Raises UserError unless a run with these settings can train on and evaluate with these pairs."""
    template = tokenizer.chat_template(config.data.template)
    records = "those of data.train" if config.data.eval else "the records"
    require_messages(config.named("data.template"), template, train, tokenizer, records)
    for pairs in filter(len, (train, held_out)):
        require_responses(config.loss, ", ".join(pairs.files), pairs.responses, pairs.label is not None)
        if config.loss.margin_from_data:
            require_margins(pairs)
    longest = max(int(pairs.token_counts().max(initial=0)) for pairs in (train, held_out))
    if longest > config.optim.micro_tokens:
        given = config.as_set("optim", "micro_tokens")
        raise UserError(f"{given}, but one pair has {longest} tokens; it must be at least that")
    if config.loss.needs_z0 and config.optim.batch_size < 2:
        what = f"but {config.loss.name} compares with the other responses of a batch"
        raise UserError(f"{config.as_set('optim', 'batch_size')}, {what}; give 2 or more")


def require_responses(
    loss: PreferenceLoss | BradleyTerry, files: str, responses: int, labelled: bool
) -> None:
    """Raises UserError unless records have what the loss reads: two responses, one, or one with a label."""
    if responses == 2 or (loss.responses == 1 and labelled == loss.unpaired):
        return
    has = f"{files}: one response per record" + (" and a label" if labelled else "")
    fit = [name for name, each in LOSSES.items() if each.responses == 1 and each.unpaired == labelled]
    right = f"the loss for that is {' or '.join(map(toml, fit))} (train_dpo.py, loss.name); or give "
    if loss.responses > 1:
        reads, right = "two responses", right + "records with chosen and rejected"
    elif loss.unpaired:
        reads, right = "responses with a label", right + "each record `label`, true or false"
    else:
        reads = "responses that are all desirable"
        right += 'records with chosen and rejected, or leave the label out (data.columns.label = "")'
    raise UserError(f"{has}, but the loss {loss.name} reads {reads}; {right}")


def _require_others(config: DPOConfig | RewardConfig, tokenizer: Tokenizer) -> None:
    """Fail now rather than at the first evaluation, and name what is given and not read."""
    _tell_unread(config, "lora", "rank")
    if isinstance(config, DPOConfig):
        _tell_unread(config, "eval", "samples")
        samples, reference = config.eval.samples, config.reference.path
        config.naming("model.path", require_language_model, Path(config.model.path))
        if samples and config.eval.reward_model:
            config.naming("eval.reward_model", require_reward_model, Path(config.eval.reward_model))
        if reference and (config.loss.needs_reference or samples):
            limit = config.data.max_length
            config.naming("reference.path", require_reference, Path(reference), tokenizer, limit)
        elif reference:
            print0(f"warning: {config.loss.name} has no reference: {reference} is not read")
    config.naming("data.eval", data_files, config.data.eval)
    config.naming("data.train", data_files, config.data.train)


def _tell_unread(config: DPOConfig | RewardConfig, section: str, switch: str) -> None:
    """Name the keys of a section that are given and not read, because its key `switch` is 0."""
    values = getattr(config, section)
    given = [name for name in keys_of(values) if getattr(values, name) != getattr(type(values)(), name)]
    if given and not getattr(values, switch):
        print0(f"warning: {section}.{switch} is 0: {', '.join(given)} of [{section}] is not read")
