"""Train a language model on preference pairs: DPO and its relatives; on labelled responses: KTO; or on the
chosen responses alone: SFT.

    python train_dpo.py configs/demo_dpo.toml --loss.beta=0.05
    torchrun --nproc_per_node=8 train_dpo.py configs/hh_dpo.toml

A pair is one prompt with a chosen and a rejected response. Each step computes the log-probs of both responses
under the policy (SFT: of the chosen one), compares them with those under the frozen reference (losses that
have one), and takes one step of AdamW on the mean loss of `optim.batch_size` pairs (KTO: labelled responses).
The same command, run again, resumes from the last checkpoint. minidpo/textbook.py is the same step without
packing, micro-batches, clipping, processes and checkpoints.
"""

import torch
from torch.nn.utils import clip_grad_norm_

from minidpo.config import DPOConfig, load_config
from minidpo.data import PairOrder, Tokenizer
from minidpo.distributed import full_tensor, launch
from minidpo.errors import exit_on_user_error
from minidpo.log import Means
from minidpo.model import load_model
from minidpo.training import (
    ReferencePoint,
    Run,
    SampledEvaluation,
    adamw,
    learning_rate,
    load_run_pairs,
    pair_logps,
    with_reference_logps,
)


def main(arguments: list[str]) -> None:
    config = load_config(DPOConfig, arguments)
    loss, optim = config.loss, config.optim  # loss: an object of minidpo/losses, such as DPO(beta=0.1)
    run = Run(config)  # device and processes, the directory run.out, its log, checkpoints and stop signal

    # --------------------------------------------------------------------------------------------------------
    # Data: the token ids of every pair, and the order in which steps draw them. It follows from PairOrder's
    # arguments alone, so a resumed run goes on with the pairs that the interrupted one would have drawn next.
    tokenizer = Tokenizer.from_pretrained(config.model.path)
    train, held_out = load_run_pairs(config, tokenizer)
    # Tokens of each pair in a packed row, (n,): micro-batches are cut by tokens and not by pairs.
    train_token_counts = train.token_counts(loss.responses)
    held_out_token_counts = held_out.token_counts(loss.responses)
    order = PairOrder(len(train), optim.batch_size, optim.epochs, optim.max_steps, run.seed)
    total_steps = len(order)

    # --------------------------------------------------------------------------------------------------------
    # Policy and reference start with the same weights, unless reference.path is set. With lora.rank > 0 only
    # adapters are trained (minidpo/model/lora.py). run.prepare adds them, shards the model over processes and
    # compiles its layers.
    policy = load_model(config.model.path, device=run.device, prepare=run.prepare)
    optimizer = adamw(policy, optim)
    step = run.resume(policy, optimizer, tokenizer, train, held_out, total_steps)  # 0, or the last step saved
    if step >= total_steps:
        return run.finish(step, policy, optimizer)
    sampled = SampledEvaluation(config, run, held_out, tokenizer, policy) if config.eval.samples else None
    # The reference is frozen: its log-probs are computed once, for all pairs that are drawn or held out, and
    # become a column of the data, kept in run.out. With adapters, it is by default `policy` without them.
    if loss.needs_reference:
        train, held_out = with_reference_logps(config, run, train, order.drawn(), held_out, policy)
    # KTO's z0; the other losses have none.
    reference_point = ReferencePoint(config, run, train, order, held_out, policy) if loss.needs_z0 else None

    @torch.no_grad()
    def evaluate() -> None:
        """Log loss and metrics over all held-out pairs, and those of sampled responses."""
        if not len(held_out):
            return
        totals = Means()
        z0 = reference_point.of_held_out(policy) if reference_point else None
        # indices: the numbers of the pairs of one micro-batch
        for indices in run.micro_batches(held_out_token_counts, label="evaluating"):
            logps = pair_logps(policy, held_out, indices, loss, run.device, run.dtype, z0)
            totals.add(loss.metrics(logps, loss(logps)))
        metrics = totals.means()
        run.log_evaluation(step, metrics | (sampled(policy, step) if sampled else {}))

    # --------------------------------------------------------------------------------------------------------
    # Training loop
    if step == 0:
        evaluate()
    # In this block, Ctrl-C only asks the loop to stop after the current step.
    with run.stop_on_signals():
        while step < total_steps and not run.stop_requested():
            lr = learning_rate(step, total_steps, optim)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # KTO only: a pass without gradients over mismatched prompts and responses. Their mean log-ratio
            # over the whole batch is a constant of the loss, so it is computed before the first micro-batch.
            z0 = reference_point.of_step(policy, step) if reference_point else None

            # Forward and backward pass, one micro-batch after the other. backward() adds to the gradients,
            # and each micro-batch divides by the size of the whole batch. So the sum is the gradient of the
            # batch's mean loss, however the batch is cut. With several processes, backward() sums theirs.
            batch, totals = order[step], Means()  # batch: the numbers of the pairs that this step draws
            for indices in run.micro_batches(train_token_counts, batch):
                logps = pair_logps(policy, train, indices, loss, run.device, run.dtype, z0)
                losses = loss(logps)  # (B,)
                (losses.sum() / len(batch)).backward()
                totals.add(loss.metrics(logps, losses))
            # Every process has seen its share of the pairs; an all-reduce in here adds up what all have seen.
            metrics = totals.means()

            # Clip, check, update. The norm that is logged is the one before clipping. A NaN must not reach
            # the weights, where no later step could remove it; the error names the records of the batch.
            norm = clip_grad_norm_(policy.parameters(), optim.grad_clip or torch.inf)  # 0: no clipping
            grad_norm = full_tensor(norm).item()  # With several processes, full_tensor gathers it.
            run.require_finite(step + 1, metrics["loss"], grad_norm, train.select(batch))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            # Log, evaluate, save: every so many steps, and after the last one.
            values = {"epoch": order.epoch(step)} | metrics | {"lr": lr, "grad_norm": grad_norm}
            run.log(step, values, tokens=train_token_counts[batch].sum())
            if run.due(config.run.eval_every, step):
                evaluate()
            if run.due(config.run.save_every, step):
                run.save(step, policy, optimizer)
        # run.out/final; or, if Ctrl-C stopped the run, a checkpoint.
        run.finish(step, policy, optimizer)


if __name__ == "__main__":
    exit_on_user_error(launch(main))
