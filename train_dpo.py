"""Align a language model with preference pairs: DPO, IPO or SimPO; or fit the chosen responses (SFT).

    python train_dpo.py configs/demo_dpo.toml --loss.beta=0.05
    torchrun --nproc_per_node=8 train_dpo.py configs/hh_dpo.toml

A pair is one prompt with a chosen and a rejected response. Each step computes the log-probs of both responses
under the policy, compares them with those of the frozen reference, and takes one step of AdamW on the mean
loss of `optim.batch_size` pairs. The same command run again goes on from the last checkpoint.
minidpo/textbook.py is the same step without packing, micro-batches, clipping, processes and checkpoints.
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
    # Data: the token ids of every pair, and the order in which steps draw them. The order is a pure function
    # of seed and step, so a resumed run continues where it was.
    tokenizer = Tokenizer.from_pretrained(config.model.path)
    train, held_out = load_run_pairs(config, tokenizer)
    train_tokens, held_out_tokens = train.tokens(loss.responses), held_out.tokens(loss.responses)  # per pair
    order = PairOrder(len(train), optim.batch_size, optim.epochs, optim.max_steps, run.seed)

    # --------------------------------------------------------------------------------------------------------
    # Policy and reference start as the same weights, unless reference.path is set. The reference is frozen,
    # so its log-probs of all pairs are computed once, before training, and become a column of the data.
    policy = load_model(config.model.path, device=run.device, prepare=run.prepare)
    optimizer = adamw(policy, optim)
    step = run.resume(policy, optimizer, tokenizer, train, len(order))  # 0, or that of the last checkpoint
    run.announce(train, held_out)
    if step == len(order):
        return run.finish(step, policy, optimizer)
    sampled = SampledEvaluation(config, run, held_out, tokenizer, policy) if config.eval.samples else None
    if loss.needs_reference:
        train, held_out = with_reference_logps(config, run, train, order.drawn(), held_out)

    @torch.no_grad()
    def evaluate() -> None:
        """Loss and metrics over all held-out pairs, and what the policy writes by itself."""
        if not len(held_out):
            return
        means = Means()
        for rows in run.micro_batches(held_out_tokens, label="evaluating"):
            pairs = pair_logps(policy, held_out, rows, loss, run.device, run.dtype)
            means.add(loss.metrics(pairs, loss(pairs)))
        run.log_evaluation(step, means.all_reduce().means() | (sampled(policy, step) if sampled else {}))

    # --------------------------------------------------------------------------------------------------------
    # Training loop
    if step == 0:
        evaluate()
    with run.stop_on_signals():  # Ctrl-C asks the loop to stop after its step.
        while step < len(order) and not run.stop_requested():
            lr = learning_rate(step, len(order), optim)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # The gradient of the mean loss over the batch, one micro-batch after the other. Each divides by
            # the size of the whole batch, and gradients are added up, over processes too: how the batch is
            # cut, and over how many processes, changes nothing but rounding.
            batch, means = order[step], Means()  # batch: the numbers of the pairs that this step draws
            for rows in run.micro_batches(train_tokens, batch):
                pairs = pair_logps(policy, train, rows, loss, run.device, run.dtype)  # the forward pass
                losses = loss(pairs)  # (B,)
                (losses.sum() / len(batch)).backward()
                means.add(loss.metrics(pairs, losses))
            metrics = means.all_reduce().means()
            norm = clip_grad_norm_(policy.parameters(), optim.grad_clip or torch.inf)  # that before clipping
            grad_norm = full_tensor(norm).item()
            run.require_finite(step + 1, metrics["loss"], grad_norm, train.select(batch))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            values = {"epoch": order.epoch(step)} | metrics | {"lr": lr, "grad_norm": grad_norm}
            run.log(step, values, tokens=train_tokens[batch].sum())
            if run.due(config.run.eval_every, step):  # every so many steps, and after the last one
                evaluate()
            if run.due(config.run.save_every, step):
                run.save(step, policy, optimizer)
        run.finish(step, policy, optimizer)  # OUT/final; or, if Ctrl-C stopped the run, a checkpoint


if __name__ == "__main__":
    exit_on_user_error(launch(main))
