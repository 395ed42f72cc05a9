"""Align a language model with preference pairs: DPO, IPO or SimPO; or fit the chosen endings (SFT).

    python train_dpo.py configs/demo_dpo.toml --loss.beta=0.05

1. read pairs of one prompt and two endings, chosen and rejected
2. start the policy from model.path, the frozen reference from reference.path (by default the same weights)
3. each step: log-probs of both endings under policy and reference -> loss -> AdamW
4. watch rewards, margins, accuracy and lengths on held-out pairs
The same command run again goes on from the last checkpoint.
"""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from minidpo import device as devices
from minidpo.advice import Advice
from minidpo.checkpoint import resume, run_identity, save_checkpoint, save_final
from minidpo.config import load_config, to_dict, write_config
from minidpo.dataset import load_pairs, longest_pair, require_fit
from minidpo.distributed import any_rank, first_before_others, launch, leave, rank, ranks, shard, whole
from minidpo.errors import STOPPED, exit_on_user_error
from minidpo.evaluate import SampledEvaluation
from minidpo.guards import MicroTokens, require_finite, stop_on_signals
from minidpo.hf_config import read_config
from minidpo.logprobs import response_logps
from minidpo.metrics import Averages, MetricsFile, Progress, console_line, say
from minidpo.objective import preference
from minidpo.optim import AdamW, learning_rate
from minidpo.out_directory import claim
from minidpo.packing import (
    PairTokens,
    Wanted,
    batch_rows,
    drawn_rows,
    micro_batches,
    pack_row,
    padded_pass,
    total_draws,
    total_steps,
)
from minidpo.reference import LiveReference, StoredReference, load_reference, pairs_fingerprint, stored_logps
from minidpo.sections import NEEDS_REFERENCE, PreferenceConfig
from minidpo.tokenizer import Tokenizer
from minidpo.weights import load_model, model_fingerprint, require_reward_model


def main(arguments: list[str]) -> None:
    config = load_config(PreferenceConfig, arguments)
    loss, optim, run = config.loss, config.optim, config.run
    out, model_path, reference_path = Path(run.out), Path(config.model.path), config.reference_path
    device = devices.choose_device(run.device, run.threads)

    if config.eval.samples and config.eval.reward_model:  # wanted hours later, but told now
        require_reward_model(Path(config.eval.reward_model))
    elif config.eval.reward_model:
        say("eval.reward_model is not read: eval.samples is 0")

    # --- data and policy
    sharded = partial(
        shard, device=device, dtype=run.dtype
    )  # over torchrun's processes, if there are several
    policy = load_model(model_path, device=device, prepare=sharded)
    tokenizer = Tokenizer.from_directory(model_path)
    template = tokenizer.chat_template(config.data.template).to_keep
    with first_before_others():
        train, held_out = load_pairs(config.data, optim, tokenizer, policy.config, run.seed, out / "tokens")
    policy.activation_checkpointing = run.activation_checkpointing
    if run.compile:
        policy.compile_layers()
    optimizer = AdamW(policy, optim)
    steps = total_steps(len(train), optim.batch_size, optim.epochs, optim.max_steps)

    # --- take up an earlier run of this directory, if there is one and it is this run
    fingerprints = {"model": model_fingerprint(model_path), "data": pairs_fingerprint(train)}
    if loss.name in NEEDS_REFERENCE:
        require_fit("reference", read_config(reference_path), tokenizer, config.data.max_length)
        same = reference_path == model_path  # then its weights are not read a second time
        fingerprints["reference"] = fingerprints["model"] if same else model_fingerprint(reference_path)
    identity = run_identity(to_dict(config), fingerprints)
    claim(out)
    first_step = resume(out, policy, optimizer, identity, run.keep_checkpoints)
    write_config(config, out)
    parameters = sum(p.numel() for p in policy.parameters())
    metrics = MetricsFile(out / "metrics.jsonl", first_step, run.tensorboard)
    say(
        f"{loss.name}: {parameters:,} parameters, {len(train)} pairs to train on,"
        f" {len(held_out)} held out, {steps} steps of {optim.batch_size} pairs on {devices.describe(device, run)}"
    )
    advice = Advice(loss.name, parameters, optim.lr)
    if optim.warmup_steps > steps:
        say(
            f"warning: warm-up takes {optim.warmup_steps} steps and the run {steps}: lr never reaches {optim.lr}"
        )
    if first_step >= steps:
        # Written again, for it may have been moved away since.
        final = save_final(out, policy, model_path, template)
        say(f"nothing left to do: step {first_step} of {steps} is done, {final}")
        return

    sampled = None
    if config.eval.samples and len(held_out):
        sampled = SampledEvaluation(config, held_out, tokenizer, policy, device)

    # --- the frozen reference: log-probs of every pair once, or a second model alongside
    train_reference: StoredReference | LiveReference | None = None
    eval_reference: StoredReference | LiveReference | None = None
    if loss.name in NEEDS_REFERENCE and config.reference.precompute:
        wanted_rows = drawn_rows(steps, len(train), optim.batch_size, optim.epochs, run.seed)
        stored = stored_logps(
            out / "reference.safetensors",
            reference_path,
            fingerprints["reference"],
            {"train": (train, wanted_rows), "held_out": (held_out, np.arange(len(held_out)))},
            optim.micro_tokens,
            device,
            run.dtype,
        )
        train_reference = StoredReference(stored["train"], device)
        eval_reference = StoredReference(stored["held_out"], device)
    elif config.reference.path and loss.name not in NEEDS_REFERENCE and not sampled:
        say(f"{loss.name} has no reference: {config.reference.path} is not read")
    elif loss.name in NEEDS_REFERENCE:
        train_reference = eval_reference = LiveReference(load_reference(reference_path, device, run.dtype))

    wanted = Wanted(chosen_logps=True, rejected_logps=loss.name != "sft")
    tokens = train.lengths[:, : 2 + wanted.rejected].sum(axis=1)  # what each pair lays out
    place = rank(), ranks()  # each process of the run takes its share of the micro-batches
    longest, row = longest_pair(train, held_out), optim.micro_tokens
    if device.type == "cuda":  # where rows are padded to one length
        row = max(longest, padded_pass(tokens, optim.batch_size, optim.micro_tokens, ranks()))
    room = MicroTokens(row, longest)

    def compare(pairs: PairTokens, rows: np.ndarray, reference: StoredReference | LiveReference | None):
        """The loss of each pair in `rows` (one micro-batch), and what to watch, both (B,) a quantity."""
        packed = pack_row(pairs.select(rows), wanted, devices.row_length(device, room.tokens)).to(device)
        with devices.autocast(device, run.dtype):
            policy_logps = response_logps(policy, packed)  # (B, 2): chosen, rejected; sft (B, 1)
            reference_logps = reference.logps(rows, packed) if reference else None
        return preference(loss, policy_logps, reference_logps, packed.scored_lengths.view_as(policy_logps))

    def accumulate(batch: np.ndarray) -> Averages:
        """Add up the gradient of the batch's mean loss, one micro-batch after the other; returns what to watch."""
        optimizer.zero_grad()  # a pass that ran out of memory may have left a part of it
        averages = Averages()
        for rows in micro_batches(batch, tokens[batch], room.tokens, *place):
            losses, watched = compare(train, rows, train_reference)
            # Over the whole batch's pairs, so that the cut into micro-batches changes nothing but rounding.
            (losses.sum() / len(batch)).backward()
            averages.add(watched)
        return averages.over_all_ranks()

    @torch.no_grad()
    def losses_one_by_one(batch: np.ndarray) -> list[float]:
        return [compare(train, batch[i : i + 1], train_reference)[0].item() for i in range(len(batch))]

    def evaluate(step: int) -> None:
        """Loss and metrics over all held-out pairs, to the console and metrics.jsonl."""
        if not len(held_out):
            return
        averages = Averages()
        own = micro_batches(np.arange(len(held_out)), held_out.lengths.sum(axis=1), room.tokens, *place)
        progress = Progress("evaluating", sum(map(len, own)), "pairs")
        with torch.no_grad():
            for rows in own:
                averages.add(compare(held_out, rows, eval_reference)[1])
                progress.advance(len(rows))
        progress.clear()
        values = averages.over_all_ranks().means()
        if sampled:
            values |= sampled(policy, step)
        advice.on_evaluation(values)
        values = {"step": step} | {f"eval/{name}": value for name, value in values.items()}
        metrics.write(values)
        say(console_line(values, steps, 0, "eval/"))

    # --- the loop
    if first_step == 0:
        evaluate(0)
    started, first_pass = time.monotonic(), first_step
    trained, seconds = 0, 0.0  # tokens since the last line of the log, and the time their steps took
    with stop_on_signals() as stop:
        for step in range(first_step, steps):
            step_started = time.monotonic()
            optimizer.lr = lr = learning_rate(step, steps, optim)
            batch = batch_rows(step, len(train), optim.batch_size, optim.epochs, run.seed)
            averages = room.fit(step + 1, partial(accumulate, batch))
            norm = clip_grad_norm_(policy.parameters(), optim.grad_clip or float("inf"))
            grad_norm = whole(norm).item()
            require_finite(
                step + 1,
                averages.mean("loss"),
                grad_norm,
                out,
                train.select(batch),
                tokenizer,
                partial(losses_one_by_one, batch),
            )
            optimizer.step()
            optimizer.zero_grad()

            trained, seconds = trained + tokens[batch].sum(), seconds + time.monotonic() - step_started

            done = step + 1
            if done == 1 or done % run.log_every == 0 or done == steps:
                drawn = min(done * optim.batch_size, total_draws(len(train), optim.epochs))
                values = {"step": done, "epoch": drawn / len(train)}
                values |= averages.means() | {"lr": lr, "grad_norm": grad_norm}
                values["tokens_per_s"] = trained / seconds
                trained, seconds = 0, 0.0
                metrics.write(values)
                advice.on_step(values)
                seconds_left = (time.monotonic() - started) / (done - first_pass) * (steps - done)
                say(console_line(values, steps, seconds_left))
            if done == steps or (run.eval_every and done % run.eval_every == 0):
                evaluate(done)
            if done == steps:  # before its checkpoint, which says that nothing is left to do
                final = save_final(out, policy, model_path, template)
            stopping = any_rank(bool(stop))
            if stopping or done == steps or (run.save_every and done % run.save_every == 0):
                saved = save_checkpoint(
                    out, done, policy, optimizer, identity, run.keep_checkpoints, model_path, template
                )
                if stopping and done < steps:
                    say(f"stopped after step {done}, saved {saved}; the same command goes on from there")
                    leave(STOPPED)
    say(f"done: {final}")
    if stopping:  # while it was finishing: nothing is lost, but whoever pressed Ctrl-C wants nothing more
        leave(STOPPED)


if __name__ == "__main__":
    exit_on_user_error(launch(main))
