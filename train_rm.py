"""Train a reward model on preference pairs: the language model, and one Linear(hidden, 1) on each response's
last token.

    python train_rm.py configs/demo_rm.toml --loss.lm_weight=0

    loss = -log sigma(r_chosen - r_rejected - margin) + lm_weight * NLL per token of the chosen response
                                                      + center_weight * (r_chosen + r_rejected)^2

Rewards and log-probs come from one forward pass over [prompt | chosen | rejected]. The loop is that of
train_dpo.py, written out again so that each script reads by itself. The same command run again goes on from
the last checkpoint.
"""

import torch
from torch.nn.utils import clip_grad_norm_

from minidpo.config import RewardConfig, load_config
from minidpo.data import PairOrder, Tokenizer
from minidpo.distributed import full_tensor, launch
from minidpo.errors import exit_on_user_error
from minidpo.log import Means
from minidpo.model import new_reward_model
from minidpo.training import Run, adamw, learning_rate, load_run_pairs, pair_rewards


def main(arguments: list[str]) -> None:
    config = load_config(RewardConfig, arguments)
    loss, optim = config.loss, config.optim  # loss: BradleyTerry(lm_weight=1.0, margin=0.0, ...)
    run = Run(config)

    # --------------------------------------------------------------------------------------------------------
    # Data, and the language model under a new head
    tokenizer = Tokenizer.from_pretrained(config.model.path)
    train, held_out = load_run_pairs(config, tokenizer)
    train_tokens, held_out_tokens = train.tokens(), held_out.tokens()  # per pair, with both responses
    order = PairOrder(len(train), optim.batch_size, optim.epochs, optim.max_steps, run.seed)
    model = new_reward_model(config.model.path, run.device, loss.lm_weight > 0, prepare=run.prepare)
    optimizer = adamw(model, optim)
    step = run.resume(model, optimizer, tokenizer, train, len(order))
    run.announce(train, held_out)
    if step == len(order):
        return run.finish(step, model, optimizer)

    @torch.no_grad()
    def evaluate() -> None:
        """Loss and metrics over all held-out pairs."""
        if not len(held_out):
            return
        means = Means()
        for rows in run.micro_batches(held_out_tokens, label="evaluating"):
            rewards = pair_rewards(model, held_out, rows, loss, run.device, run.dtype)
            means.add(loss.metrics(rewards, loss(rewards)))
        run.log_evaluation(step, means.all_reduce().means())

    # --------------------------------------------------------------------------------------------------------
    # Training loop
    if step == 0:
        evaluate()
    with run.stop_on_signals():
        while step < len(order) and not run.stop_requested():
            lr = learning_rate(step, len(order), optim)
            for group in optimizer.param_groups:
                group["lr"] = lr

            batch, means = order[step], Means()
            for rows in run.micro_batches(train_tokens, batch):
                rewards = pair_rewards(model, train, rows, loss, run.device, run.dtype)
                losses = loss(rewards)  # (B,)
                (losses.sum() / len(batch)).backward()  # divided by the size of the whole batch
                means.add(loss.metrics(rewards, losses))
            metrics = means.all_reduce().means()
            norm = clip_grad_norm_(model.parameters(), optim.grad_clip or torch.inf)
            grad_norm = full_tensor(norm).item()
            run.require_finite(step + 1, metrics["loss"], grad_norm, train.select(batch))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            values = {"epoch": order.epoch(step)} | metrics | {"lr": lr, "grad_norm": grad_norm}
            run.log(step, values, tokens=train_tokens[batch].sum())
            if run.due(config.run.eval_every, step):
                evaluate()
            if run.due(config.run.save_every, step):
                run.save(step, model, optimizer)
        run.finish(step, model, optimizer)


if __name__ == "__main__":
    exit_on_user_error(launch(main))
