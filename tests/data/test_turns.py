"""Responses of several turns: the assistant's turns are scored, and what others said in between is not.

In the tests a text is shown with what is not scored in braces.
"""

import pytest
import tokenizers
from chat_model import ASKED, LLAMA3, MISTRAL, NO, SMOLLM2, YES, chat_model, read, turn
from test_chat import LAST_USER, THINK
from test_messages import PLAIN, call

from characters import BOS, EOS, LETTERS, bpe, ids
from minidpo.data import DataReport, PreferencePair, Tokenizer, TokenPair, describe_pair, tokenize_pairs
from minidpo.data.messages import shared_turns
from minidpo.errors import UserError

SURE, REALLY = turn("user", "Sure?"), turn("user", "Really?")
WET = turn("tool", "wet")
MARKED = SMOLLM2.replace(
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)
# As Qwen3: of the turns after the last question, the last one has its reasoning, though it be empty.
QWEN3 = """{% set ns = namespace(asked=0) %}
{%- for m in messages if m.role == 'user' %}{% set ns.asked = ns.asked + 1 %}{% endfor %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = ns.asked - 1 %}{% endif %}
{{- '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}
{%- if not ns.asked and (loop.last or m.reasoning_content) %}<think>{{ m.reasoning_content }}</think>{% endif %}
{{- (m.content or 'call') + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def braced(text: str, ranges: tuple[tuple[int, int], ...]) -> str:
    """The text with the ranges in braces."""
    for begin, end in reversed(ranges):
        text = f"{text[:begin]}{{{text[begin:end]}}}{text[end:]}"
    return text


def first(template, directory, response: list[dict], prompt=(ASKED,)) -> PreferencePair:
    record = {"prompt": list(prompt), "chosen": response, "rejected": [NO]}
    return read(template, directory, record)[0][0]


# Characters

REASONED = call("Rome", reasoning_content="r")


@pytest.mark.parametrize(
    ("template", "eos", "turns", "shown"),
    [
        (MARKED, "<|im_end|>", [YES, SURE, NO], "it is.<|im_end|>{\n<|im_start|>user\nSure?<|im_end|>\n"),
        (LLAMA3, "<|im_end|>", [YES, SURE, NO], "Yes, it is.<|im_end|>{<|im_start|>user\n\nSure?<|im_end|>"),
        (MISTRAL, "</s>", [YES, SURE, NO], " Yes, it is.</s>{[INST] Sure? [/INST]\n} No."),
        (PLAIN, "</s>", [call("Rome"), WET, WET, YES], "</s>{<tool>wet</s><tool>wet</s><assistant>}Yes"),
        (PLAIN, "</s>", [YES, NO], "Yes, it is.</s>{<assistant>}No."),
        (THINK, "</s>", [YES, SURE, NO], "Yes, it is.</s>{<user>Sure?<assistant>}No."),
        (QWEN3, "<|im_end|>", [call("Rome"), WET, YES], "call<|im_end|>{\n<|im_start|>tool\nwet<|im_end|>\n"),
        # Qwen3 leaves out the reasoning of a turn once the user asks again, which no prompt before it shows.
        (QWEN3, "<|im_end|>", [REASONED, WET, YES, SURE, NO], "\n<|im_start|>assistant\n}Yes, it is.<|im_e"),
        # The template closes a turn with another token than EOS: all that it writes belongs to the turn.
        (MARKED, "</s>", [YES, SURE, NO], "Yes, it is.<|im_end|>\n{<|im_start|>user\nSure?<|im_end|>\n"),
        # EOS in the content is no end.
        (PLAIN, "</s>", [turn("assistant", "a</s>b"), SURE, NO], "a</s>b</s>{<user>Sure?</s><assistant>}No."),
        # Those that are written out. hh closes no turn but the last.
        ("chatml", "<|im_end|>", [YES, SURE, YES], "is.<|im_end|>{\n<|im_start|>user\nSure?<|im_end|>\n<|im"),
        ("hh", "</s>", [YES, SURE, YES], " Yes, it is.{\n\nHuman: Sure?\n\nAssistant:} Yes, it is."),
    ],
)
def test_ranges(tmp_path, template, eos, turns, shown):
    """What stands between the EOS of a turn and the end of the next one's header is not the assistant's."""
    kind = template if template in ("hh", "chatml") else "model"
    pair = first(chat_model(tmp_path, template, eos_token=eos).chat_template(kind), tmp_path, turns)
    assert shown in braced(pair.chosen, pair.others[0]) and pair.others[1] == ()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LAST_USER, "a turn of the assistant is not to be found in the text of the conversation"),
        # No EOS closes a turn, and the last one is written otherwise than those before it.
        (QWEN3.replace("|im_end|", "|end|"), "the end of a turn of the assistant is not to be found once"),
    ],
)
def test_not_found(tmp_path, template, said):
    """A template that writes turns otherwise once others follow, without a trace of them, is refused."""
    prompt = [turn("system", "Brief."), ASKED]
    with pytest.raises(UserError, match=said):
        first(chat_model(tmp_path, template).chat_template(), tmp_path, [YES, SURE, NO], prompt)


# Tokens


@pytest.mark.parametrize(
    ("template", "eos"), [(MARKED, "<|im_end|>"), (MISTRAL, "</s>"), (QWEN3, "<|im_end|>")]
)
def test_as_transformers(tmp_path, template, eos):
    """Ids and scored tokens are those of transformers' apply_chat_template for the whole conversation."""
    theirs = pytest.importorskip("transformers")
    tokenizer, turns = chat_model(tmp_path, template, eos_token=eos), [YES, SURE, NO, REALLY, YES]
    found, chat = first(tokenizer.chat_template(), tmp_path, turns), tokenizer.chat_template()
    ((alone,), _) = read(chat, tmp_path, {"messages": [ASKED, *turns]})
    of_found = (found.prompt, found.chosen, found.others[:1])
    assert (alone.prompt, alone.chosen, alone.others) == of_found  # from the assistant's first turn on
    pair = tokenizer.encode_pairs([found])[0]
    whole = theirs.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [ASKED, *turns], return_dict=True, return_assistant_tokens_mask=True
    )
    ours = pair.prompt + pair.chosen
    assert ours == whole["input_ids"][: len(ours)]
    mask = [token["scored"] for token in describe_pair(pair._replace(rejected=None), tokenizer)]
    assert mask == list(map(bool, whole["assistant_masks"][: len(ours)])) and 0 < sum(mask) < len(mask)


@pytest.mark.parametrize(
    ("merges", "prepend", "others", "unscored"),
    [  # The response is "bcd" and EOS, after "a". What others wrote:
        ([], False, (1, 2), ((1, 2),)),  # c
        ([("b", "c")], False, (1, 2), ()),  # c, in one token with b, which the assistant wrote
        ([("b", "c")], False, (0, 2), ((0, 1),)),  # b and c, one token
        ([("c", "d")], False, (0, 2), ((0, 1),)),  # b, and c, in one token with d, which the assistant wrote
        ([("a", "b")], False, (1, 2), ((1, 2),)),  # c, of a response that is tokenized alone
        ([("a", "b"), ("▁", "b")], True, (1, 2), ((1, 2),)),  # and without the space that it would get alone
    ],
)
def test_tokens(merges, prepend, others, unscored):
    """A token is not scored if the assistant wrote nothing of it."""
    pair = PreferencePair("a", "bcd", "b", others=((others,), ()))
    encoded = Tokenizer(bpe(merges, prepend=prepend, letters=LETTERS + "\n"), EOS).encode_pairs([pair])[0]
    assert encoded.unscored == ((unscored, ()) if unscored else ()) and encoded.chosen[-1] == EOS


@pytest.mark.parametrize(("others", "unscored"), [((3, 8), ["Ċ", "Ċ", "Ġis"]), ((6, 8), [])])
@pytest.mark.parametrize("trim", [False, True])
def test_trimmed_offsets(tmp_path, trim, others, unscored):
    """Spaces that a tokenizer leaves out of its offsets belong to the token that has them."""
    eos_id = chat_model(tmp_path, None).eos_id
    core = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    core.post_processor = tokenizers.processors.ByteLevel(trim_offsets=trim)
    tokenizer = Tokenizer(core, eos_id)
    #                                      0123 4 5678
    pair = PreferencePair("Is it", " it\n\n is it", "no", others=((others,), ()))
    table = [
        token for token in describe_pair(tokenizer.encode_pairs([pair])[0], tokenizer) if token["response"]
    ]
    assert [token["piece"] for token in table if not token["scored"]] == unscored


# Which turns are the prompt


U, V, A, B, C = (turn(*said) for said in (("user", "u"), ("user", "v"), *(("assistant", x) for x in "abc")))


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        ([U, A], [U, B], 1),
        ([U, A, V, B], [U, A, V, C], 3),
        ([U, A, U, B], [U, A, V, B], 1),  # Users said different things after the same answer.
        ([U, A, B], [U, A, C], 2),
        ([U, V], [U, A], 1),  # No assistant's turn in both: this pair is dropped.
        ([U], [V], 0),
    ],
)
def test_shared_turns(chosen, rejected, shared):
    """The prompt is all that both begin with, but an assistant's turn is next in both."""
    assert shared_turns(chosen, rejected, lambda name: True) == shared
    assert shared_turns(rejected, chosen, lambda name: True) == shared


# Limits


@pytest.mark.parametrize(
    ("max_length", "chosen", "unscored"),
    [  # After the prompt "a": b, (c, d), e, (f), g, EOS; others wrote what is in parentheses.
        (8, [*ids("bcdefg"), EOS], ((1, 3), (4, 5))),
        (7, ids("bcdefg"), ((1, 3), (4, 5))),
        (6, ids("bcde"), ((1, 3),)),  # Nothing of the assistant would follow f.
        (4, ids("b"), ()),
    ],
)
def test_cut(max_length, chosen, unscored):
    """A response that is cut ends with a token of the assistant."""
    pair = PreferencePair("a", "bcdefg", "h", others=(((1, 3), (4, 5)), ()))
    report = DataReport()
    (cut,) = tokenize_pairs([pair], Tokenizer(bpe(), EOS), max_length, report=report)
    left_unscored = (unscored, ()) if unscored else ()
    assert cut == TokenPair(ids("a"), chosen, [*ids("h"), EOS], -1, unscored=left_unscored)
    left = sum(end - begin for begin, end in unscored)
    line = f"  {left} tokens in responses are not scored: others wrote them"
    assert (line in report.lines()) == (left > 0)


def test_nothing_left():
    """A response of which the limits leave no scored token, because others began it, is dropped."""
    pairs = [PreferencePair("a", "cb", None, index, others=(((0, 1),),) * index) for index in (0, 1)]
    report = DataReport()
    assert len(list(tokenize_pairs(pairs, Tokenizer(bpe(), EOS), 2, report=report))) == 1
    assert report.dropped == {"truncation left a response empty": ["1"]}


# The table of tokens


def test_described():
    """Responses are scored, without what others said; positions of rejected restart behind the prompt."""
    tokenizer = Tokenizer(bpe(bos=True), EOS)
    pair = tokenizer.encode_pairs([PreferencePair("a", "bc</s>d", "ef", others=(((1, 2),), ((0, 1),)))])[0]
    keys, table = ("piece", "role", "position", "scored"), describe_pair(pair, tokenizer)
    rows = [tuple(token[key] for key in keys) for token in table]
    assert pair.prompt[0] == BOS and rows == [
        ("<s>", "prompt", 0, False),
        ("a", "prompt", 1, False),
        ("b", "chosen", 2, True),
        ("c", "other", 3, False),
        ("</s>", "chosen", 4, True),  # EOS inside is no end.
        ("d", "chosen", 5, True),
        ("</s>", "eos", 6, True),
        ("e", "other", 2, False),
        ("f", "rejected", 3, True),
        ("</s>", "eos", 4, True),
    ]
