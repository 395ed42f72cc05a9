"""Responses of several turns: the assistant's turns are scored, what others said in between is not.

    text        Rome is <call> ...<eos> | \n<tool> 21 C <eos>\n<assistant>\n | It is 21 C.<eos>
    scored      yes                     | no                               | yes

A turn of the assistant begins where its generation prompt ends, and ends with the EOS that closes it, because
that is what a model is asked with, and where generation ends.
"""

from bisect import bisect_left, bisect_right
from itertools import product

import tokenizers

from minidpo.data.chat_template import ChatTemplate
from minidpo.data.jinja import refused
from minidpo.data.messages import ASSISTANT, Given, Turns, without_reasoning
from minidpo.data.pair_tokens import Ranges


def others_in_text(
    template: ChatTemplate, prompt: Turns, response: Turns, texts: tuple[str, str], given: Given | None = None
) -> Ranges:
    """The ranges of characters of a response that the assistant did not write.

    texts: those of the prompt and the response, as `ChatTemplate.split` gives them. A turn ends where the
    text of the messages up to it ends, and there at its EOS; in templates that write another text up to it
    (Qwen3 writes the last turn with its reasoning) at its first EOS. Raises `BadRecord` if a turn is not to
    be found.
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
    """The ranges of a response's tokens that lie wholly within one of `others`, ranges of its characters:
    what reaches beyond has a part that the assistant wrote. ids: of the response, with the EOS that may have
    been appended; made in batches without offsets, which cost time, so the text is encoded once more here."""
    # A response that was tokenized apart from its prompt stood alone, or behind a character that keeps a
    # space from it.
    for before, own in product((prompt, "", "\n", "."), (ids, ids[:-1])):
        encoding = core.encode(before + response, add_special_tokens=False)
        if encoding.ids[-len(own) :] == own:
            break
    else:
        raise ValueError("a response is encoded otherwise than before")
    offsets = [(start - len(before), end - len(before)) for start, end in encoding.offsets[-len(own) :]]
    ends = [end for _, end in offsets]
    # Some tokenizers leave the spaces of a token out of its offsets.
    starts = [offsets[0][0], *(min(end, start) for end, (start, _) in zip(ends, offsets[1:], strict=False))]
    ranges = ((bisect_left(starts, begin), bisect_right(ends, end)) for begin, end in others)
    return tuple((first, last) for first, last in ranges if first < last)


def _begin_of_turn(template: ChatTemplate, before: Turns, whole: str, given: Given | None) -> int:
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
