"""Train a reward model on preference pairs: a language model with Linear(hidden, 1) on each response's last
token.

    python train_rm.py configs/demo_rm.toml --loss.lm_weight=0

    loss = -log sigma(r_chosen - r_rejected - margin) + lm_weight * NLL per token of the chosen response
                                                      + center_weight * (r_chosen + r_rejected)^2

r is a reward, margin a target margin (0 by default), NLL the negative log-likelihood -log pi(chosen | prompt)
under the language model. Rewards and log-probs come from one forward pass over [prompt | chosen | rejected].
The loop is that of train_dpo.py, written out again so that each script can be read alone.
The same command, run again, resumes from the last checkpoint.
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
    # Data: the token ids of every pair, and the order in which steps draw them.
    # rewards=True: a chat response keeps what the template writes after its EOS; r is read at its last token.
    tokenizer = Tokenizer.from_pretrained(config.model.path, rewards=True)
    train, held_out = load_run_pairs(config, tokenizer)
    # Tokens of each pair in a packed row, (n,): micro-batches are cut by tokens and not by pairs.
    train_token_counts, held_out_token_counts = train.token_counts(), held_out.token_counts()
    order = PairOrder(len(train), optim.batch_size, optim.epochs, optim.max_steps, run.seed)
    total_steps = len(order)

    # --------------------------------------------------------------------------------------------------------
    # The language model with a new head. All of it is trained, not only the head. With lora.rank > 0 the head
    # and adapters are trained, and the layers are frozen (minidpo/model/lora.py).
    model = new_reward_model(
        config.model.path, run.device, language_modelling=loss.lm_weight > 0, prepare=run.prepare
    )
    optimizer = adamw(model, optim)
    step = run.resume(model, optimizer, tokenizer, train, held_out, total_steps)
    if step >= total_steps:
        return run.finish(step, model, optimizer)

    @torch.no_grad()
    def evaluate() -> None:
        """Log loss and metrics over all held-out pairs."""
        if not len(held_out):
            return
        totals = Means()
        for indices in run.micro_batches(held_out_token_counts, label="evaluating"):
            rewards = pair_rewards(model, held_out, indices, loss, run.device, run.dtype)
            totals.add(loss.metrics(rewards, loss(rewards)))
        run.log_evaluation(step, totals.means())

    # --------------------------------------------------------------------------------------------------------
    # Training loop
    if step == 0:
        evaluate()
    with run.stop_on_signals():
        while step < total_steps and not run.stop_requested():
            lr = learning_rate(step, total_steps, optim)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Forward and backward pass, one micro-batch after the other. Each divides by the size of the
            # whole batch, so the gradients add up to that of the batch's mean loss.
            batch, totals = order[step], Means()
            for indices in run.micro_batches(train_token_counts, batch):
                rewards = pair_rewards(model, train, indices, loss, run.device, run.dtype)
                losses = loss(rewards)  # (B,)
                (losses.sum() / len(batch)).backward()
                totals.add(loss.metrics(rewards, losses))
            metrics = totals.means()

            # Clip, check, update: a NaN must not reach the weights.
            norm = clip_grad_norm_(model.parameters(), optim.grad_clip or torch.inf)
            grad_norm = full_tensor(norm).item()
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
                run.save(step, model, optimizer)
        run.finish(step, model, optimizer)


if __name__ == "__main__":
    exit_on_user_error(launch(main))
