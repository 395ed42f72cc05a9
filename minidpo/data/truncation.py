"""Pairs as token ids within the limits of a run, and every token of a pair in words."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from minidpo.data.pair_tokens import Ranges, TokenPair
from minidpo.data.preferences import PreferencePair
from minidpo.data.report import PARTS, DataReport, dropped_lines
from minidpo.data.tokenizer import Tokenizer
from minidpo.errors import UserError

_CHUNK = 256  # pairs tokenized at once: enough for all threads, and little text in memory


def tokenize_pairs(
    pairs: Iterable[PreferencePair],
    tokenizer: Tokenizer,
    max_length: int,
    max_prompt_length: int | None = None,
    report: DataReport | None = None,
    whole: bool = False,
) -> Iterator[TokenPair]:
    """Yield the pairs as ids, in order, cut to `max_length` tokens for prompt + response with its EOS.

    A prompt longer than `max_prompt_length` (None: `max_length`) loses its beginning, BOS excepted. Each
    response then has the rest of `max_length` to itself and loses its end, EOS included: a model must not
    learn to stop where a text was cut. What others said at the end of what is left is cut off too. Pairs that
    this leaves without a response, or with two equal ones, are dropped and counted in `report`, as are
    prompts without a token. whole: drop what would have to be cut instead, and no equal responses.
    Raises `UserError` for limits that contradict each other, and if no pair is left.
    """
    limit = max_length if max_prompt_length is None else max_prompt_length
    if not 1 <= limit <= max_length:
        raise UserError(f"max_prompt_length = {limit} must lie between 1 and max_length = {max_length}")
    report = DataReport() if report is None else report
    report.limits = max_length, limit
    source, bos = iter(pairs), tokenizer.bos
    while chunk := list(islice(source, _CHUNK)):
        # A chat template writes BOS itself, but a text should not.
        report.own_bos += sum(p.add_special_tokens and p.prompt.startswith(bos) for p in chunk if bos)
        for uncut in tokenizer.encode_pairs(chunk):
            pair, reason = _cut(uncut, limit, max_length, tokenizer.bos_id), ""
            if not pair.prompt:
                reason = "the prompt has no token, so nothing predicts the first token of a response"
            elif whole and pair != uncut:
                reason = "longer than max_length"
            elif not all(pair.responses):
                reason = "truncation left a response empty"
            elif pair.chosen == pair.rejected and not whole:
                reason = "responses identical as tokens or after truncation"
            report.add(uncut, pair, reason)
            if not reason:
                yield pair
    if not report.kept:
        reasons = ", ".join(dropped_lines(report.dropped, "record"))
        what = f"no pair is left to use with max_length = {max_length} ({reasons})"
        raise UserError(f"{what}; raise it, up to what the model takes, or change the data")


def describe_pair(pair: TokenPair, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Every token of a pair in the order in which it is laid out, prompt | chosen | rejected.

    Positions of rejected restart where the prompt ended, because it follows the prompt too. The EOS that ends
    a response, and what others wrote in it, have roles of their own; only the latter is not scored.
    """
    laid_out, by_others = 0, {i for ranges in pair.unscored_ranges() for i in range(*ranges)}
    for part, ids in zip(PARTS, (pair.prompt, *pair.responses), strict=False):
        in_response = part != PARTS[0]
        for place, token in enumerate(ids):
            is_end = in_response and place == len(ids) - 1 and token == tokenizer.eos_id
            other = laid_out + place in by_others
            yield {
                "role": "other" if other else "eos" if is_end else part,
                "position": place + in_response * len(pair.prompt),
                "id": token,
                "piece": tokenizer.piece(token),  # A leading space may read "Ġ" or "▁".
                "scored": in_response and not other,
                "response": part if in_response else None,
            }
        laid_out += len(ids)


def _cut(pair: TokenPair, prompt_limit: int, max_length: int, bos_id: int | None) -> TokenPair:
    """The pair with its prompt cut from the left, each response from the right."""
    prompt = pair.prompt
    if len(prompt) > prompt_limit:
        head = prompt[:1] if prompt[0] == bos_id else []
        prompt = head + prompt[len(prompt) - (prompt_limit - len(head)) :]
    rest = max_length - len(prompt)
    if max(map(len, pair.responses)) <= rest:
        return pair._replace(prompt=prompt)
    responses, unscored = list[Any](), list[Ranges]()
    for ids, ranges in zip(pair.responses, pair.unscored or ((), ()), strict=False):
        left = rest
        for begin, end in reversed(ranges):  # No response ends with what is not scored.
            if begin < left <= end:
                left = begin
        responses.append(ids[:left])
        unscored.append(tuple(each for each in ranges if each[1] < left))
    chosen, rejected = [*responses, None][:2]
    return TokenPair(prompt, chosen, rejected, *pair[3:-1], tuple(unscored) if any(unscored) else ())
