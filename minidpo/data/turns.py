"""Responses of several turns: the assistant's turns are scored, what others said in between is not.

    text        Rome is <call> ...<eos> | \n<tool> 21 C <eos>\n<assistant>\n | It is 21 C.<eos>
    scored      yes                     | no                               | yes

A turn of the assistant begins where its generation prompt ends, and ends with the EOS that closes it, because
that is what a model is asked with, and where generation ends. First the ranges of characters that others
wrote, then those of tokens.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import tokenizers

from minidpo.data.chat_template import ChatTemplate
from minidpo.data.messages import ASSISTANT, Given, Message, without_reasoning
from minidpo.data.token_pair import Ranges
from minidpo.data.written_templates import refused


def others_in_text(
    template: ChatTemplate,
    prompt: Sequence[Message],
    response: Sequence[Message],
    texts: tuple[str, str],
    given: Given | None = None,
) -> Ranges:
    """The ranges of characters of a response that the assistant did not write.

    texts: those of the prompt and the response, as `ChatTemplate.split` gives them. A turn ends where the
    text of the messages up to it ends, and there at its EOS. Templates that write the last turn otherwise
    than those before it (Qwen3: with its reasoning) write another text up to it; then the turn ends at its
    first EOS. Raises `BadRecord` if a turn is not to be found.
    """
    ranges = []
    whole, start = "".join(texts), len(texts[0])  # start: of the assistant's turn that was found last
    last = 0  # its place among the messages of the response
    for place in range(1, len(response)):
        if response[place]["role"] != ASSISTANT:
            continue
        begin = _begin_of_turn(template, [*prompt, *response[:place]], whole, given)
        so_far = template.render([*prompt, *response[: last + 1]], False, given)
        if whole.startswith(so_far):
            end = start + len(template.to_eos(so_far[start:]))
        else:
            words, eos, _ = whole[start:begin].partition(template.eos)
            end = start + len(words + eos) if eos else -1
        if not start <= end <= begin:
            raise refused("the end of a turn of the assistant is not to be found once others follow it")
        ranges.append((end - len(texts[0]), begin - len(texts[0])))
        start, last = begin, place
    return tuple(ranges)


def others_in_tokens(
    core: tokenizers.Tokenizer, prompt: str, response: str, ids: list[int], others: Ranges
) -> Ranges:
    """The ranges of a response's tokens that lie within `others`, ranges of its characters.

    ids: of the response, with the EOS that may have been appended. They are made in batches without offsets,
    which cost time, so the text is encoded once more here.
    """
    # A response that was tokenized apart from its prompt stood alone, or behind a character that keeps a
    # space from it.
    for before in (prompt, "", "\n", "."):
        encoding = core.encode(before + response, add_special_tokens=False)
        for own in (ids, ids[:-1]):
            if encoding.ids[-len(own) :] == own:
                return _tokens_within(others, encoding.offsets[-len(own) :], len(before))
    raise ValueError("a response is encoded otherwise than before")


def _begin_of_turn(template: ChatTemplate, before: Sequence[Message], whole: str, given: Given | None) -> int:
    """Where the assistant's turn after the messages `before` begins in the text of a conversation."""
    # Some templates leave out the reasoning of turns once the user has asked again.
    for messages in (before, list(map(without_reasoning, before))):
        asked = template.render(messages, True, given)
        if whole.startswith(asked):
            return len(asked)
        shared = template.shared_begin([asked, whole])
        if shared.startswith(template.render(messages, False, given)):
            return len(shared)
    raise refused("a turn of the assistant is not to be found in the text of the conversation")


def _tokens_within(characters: Ranges, offsets: Sequence[tuple[int, int]], before: int) -> Ranges:
    """The ranges of those tokens that lie wholly within one of the ranges of characters.

    A token that reaches beyond the range has a part that the assistant wrote, so it is scored. offsets: where
    each token begins and ends in its text. before: how many characters stand there before those that the
    ranges count.
    """
    ends = [end - before for _, end in offsets]
    starts = [start - before for start, _ in offsets]
    # Some tokenizers leave the spaces of a token out of its offsets.
    starts = [*starts[:1], *map(min, ends, starts[1:])]
    ranges = []
    for begin, end in characters:
        first, last = bisect_left(starts, begin), bisect_right(ends, end)
        if first < last:
            ranges.append((first, last))
    return tuple(ranges)
