"""Messages as text: the same as in transformers, and responses that end where a model ends."""

import json
import shutil

import pytest
from chat_model import ASKED, LLAMA3, MISTRAL, RECORD, SMOLLM2, YES, chat_model, read, turn

import train_dpo
import train_rm
from minidpo.data import BadRecord, PreferencePair, Tokenizer, TokenPair, pair_of, prompt_of, shape_of
from minidpo.errors import UserError
from record_files import GOOD, write
from tiny import BOS

TALK = [turn("system", "Be brief <&>."), ASKED, turn("assistant", "It is, 😀."), turn("user", "Sure?\n\nOh?")]
TAGS = """{% set ns = namespace(n=0) %}
{% for message in messages %}{% if loop.index > 9 %}{% break %}{% endif %}
{% if tools is not none or documents %}never{% endif %}
    {%- set ns.n = ns.n + 1 -%}
{{ message | tojson }} {{ ns.n }} {{ strftime_now('%Y') }} {{ dict(a=1).a }}
{% endfor %}{% if add_generation_prompt %}{"role": "assistant"{% endif %}"""
# As DeepSeek-R1: asked, the model begins to think; what it thought is no part of a conversation.
THINK = """{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% else %}
{{- '<assistant>' + m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<assistant><think>
{% endif %}"""
# As Mistral 7B v0.3: the system turn stands in the last message, and nowhere if that is a response.
LAST_USER = """{% set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- for m in messages if m.role != 'system' %}{% if m.role == 'user' -%}
[{{ system if loop.last }}{{ m.content }}]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"""


def encode(tokenizer: Tokenizer, prompt: list[dict], kind: str = "model") -> TokenPair:
    record = RECORD | {"prompt": prompt}
    shape = shape_of(record)
    pair = pair_of(record, shape, shape.readings(record)[0], tokenizer.chat_template(kind))
    return tokenizer.encode_pairs([pair])[0]


# The same as transformers


@pytest.mark.parametrize("prompt", [[ASKED], TALK, TALK[1:]], ids=["one", "system", "multi"])
@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3], ids=["smollm2", "llama3"])
def test_ids(tmp_path, template, prompt):
    """Prompts and responses have the ids of transformers' apply_chat_template."""
    pair = encode(chat_model(tmp_path, template, eos_token="<|im_end|>"), prompt)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert pair.prompt == theirs.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    whole = theirs.apply_chat_template([*prompt, YES], return_dict=False)
    after = 1 if template == SMOLLM2 else 0  # the newline after EOS: a model never gets to write it
    assert pair.prompt + pair.chosen == whole[: len(whole) - after]


@pytest.mark.parametrize("template", [MISTRAL, TAGS], ids=["mistral", "tags"])
def test_text(tmp_path, template):
    """The text is that of transformers, whatever statements and filters a template has."""
    ours = chat_model(tmp_path, template).chat_template()
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    text = theirs.apply_chat_template([*TALK[1:], YES], add_generation_prompt=True, tokenize=False)
    assert ours.render([*TALK[1:], YES], True) == text


# Special tokens


@pytest.mark.parametrize(
    ("template", "kind", "starts", "chosen"),
    [
        (LLAMA3, "model", [BOS], "Yes, it is."),  # The template writes BOS.
        (SMOLLM2, "model", [], "Yes, it is."),  # It writes none, and gets none.
        (SMOLLM2, "chatml", [BOS], "Yes, it is."),  # What is written out is tokenized like any text.
        (SMOLLM2, "hh", [BOS], " Yes, it is."),
    ],
)
def test_special_tokens(tmp_path, template, kind, starts, chosen):
    """A prompt has BOS as its template wants, a response ends with EOS, once, and ids are text again."""
    tokenizer = chat_model(tmp_path, template, eos_token="<|im_end|>")
    pair = encode(tokenizer, TALK, kind)
    assert [i for i in pair.prompt if i == BOS] == starts and pair.prompt[: len(starts)] == starts
    assert pair.chosen[-1] == tokenizer.eos_id and pair.chosen.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(pair.chosen) == chosen
    prompt = tokenizer.prompt(pair.prompt)  # as a reward model is asked of it
    assert tokenizer.prompt_ids(prompt) == pair.prompt and prompt.add_special_tokens == bool(starts)


def test_eos_in_the_content(tmp_path):
    """EOS in the content is no end; where the template closes a turn with another token, EOS is added."""
    chat = chat_model(tmp_path, SMOLLM2, eos_token="<|im_end|>").chat_template()
    assert chat.split([ASKED], [[turn("assistant", "<|im_end|> so")]])[1] == ["<|im_end|> so<|im_end|>"]
    tokenizer = chat_model(tmp_path, SMOLLM2)
    chat = tokenizer.chat_template()
    assert chat.split([ASKED], [[turn("assistant", "It is </s> so")]])[1] == ["It is </s> so<|im_end|>\n"]
    end = [*tokenizer.encode("<|im_end|>\n", add_special_tokens=False), tokenizer.eos_id]
    assert encode(tokenizer, [ASKED]).chosen[-len(end) :] == end


# The two that are written out


@pytest.mark.parametrize("kind", ["hh", "chatml"])
def test_template_to_keep(tmp_path, kind):
    """A model that is trained on hh or chatml has it for its own, here and in transformers."""
    tokenizer = chat_model(tmp_path, SMOLLM2, eos_token="<|im_end|>")
    template, expected = tokenizer.chat_template(kind), encode(tokenizer, TALK, kind)
    (tmp_path / "chat_template.jinja").write_text(template.to_keep)
    kept = Tokenizer.from_pretrained(tmp_path)
    assert encode(kept, TALK) == expected and kept.chat_template().identity == template.identity
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False) == expected.prompt
    response = expected.chosen[:-1] if kind == "hh" else expected.chosen  # hh writes no EOS: the model does.
    whole = theirs.apply_chat_template([*TALK, YES], return_dict=False)
    assert whole[: len(expected.prompt + response)] == expected.prompt + response


@pytest.mark.parametrize("script", [train_dpo, train_rm], ids=["dpo", "rm"])
def test_template_of_a_run(config, world, tmp_path, script):
    """A run leaves the template that was asked for with its model, and takes none that no record needs."""
    texts, dialogues = write(tmp_path / "a.jsonl", GOOD), world / "pairs.jsonl.gz"
    run = [*config(optim__max_steps=1, data__eval_pairs=0)]
    for kind, file in (("hh", texts), ("chatml", texts), ("chatml", dialogues)):
        with pytest.raises(UserError, match=f"--data.template = {kind} is for messages, and the records are"):
            script.main([*run, f"--data.train={file}", f"--data.template={kind}"])
    messages = [f"--data.eval={write(tmp_path / 'b.jsonl', RECORD)}", "--data.template=chatml"]
    with pytest.raises(UserError, match="is for messages, and those of data.train are text; leave it out"):
        script.main([*run, f"--data.train={texts}", *messages])
    assert not (tmp_path / "out").exists()
    script.main([*run, "--data.template=hh"])  # HH dialogues are what hh writes.
    for place in ("final", "checkpoints/step-1"):
        assert Tokenizer.from_pretrained(tmp_path / "out" / place).chat_template().kind == "hh"


@pytest.mark.parametrize("asked_for", [False, True])
def test_files_of_a_run(config, world, tmp_path, asked_for, capsys):
    """A trained model keeps the files of its tokenizer, and a second template unless one was asked for."""
    shutil.copytree(world / "model", tmp_path / "chat")
    fields = json.loads((tmp_path / "chat" / "tokenizer_config.json").read_text())
    fields |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    more = {"tokenizer_config.json": json.dumps(fields), "added_tokens.json": '{"<x>": 300}'}
    more |= {"chat_template.jinja": "{{ 1 }}", "additional_chat_templates/tool_use.jinja": "{{ 2 }}"}
    for name, text in more.items():
        (tmp_path / "chat" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "chat" / name).write_text(text)
    settings = ["--data.template=hh"] if asked_for else []
    train_dpo.main([*config(optim__max_steps=1), f"--model.path={tmp_path / 'chat'}", *settings])
    final = tmp_path / "out" / "final"
    assert json.loads((final / "added_tokens.json").read_text()) == {"<x>": 300}
    assert (final / "additional_chat_templates" / "tool_use.jinja").exists() != asked_for
    assert capsys.readouterr().out.count("add_prefix_space = true, which transformers follows, contra") == 1


# Templates that ask in one way, and write a conversation in another


def test_thinking_prompt(tmp_path):
    """A prompt stops where the text of a given response parts from it, and the report counts that."""
    chat = chat_model(tmp_path, THINK).chat_template()
    # "<" is where <think> and this response begin alike: no reason to cut there.
    (pair, _), lines = read(chat, tmp_path, RECORD | {"rejected": [turn("assistant", "<No")]}, RECORD)
    asked = "<user>Is 2 + 2 four?<assistant>"
    assert pair == PreferencePair(asked, "Yes, it is.</s>", "<No</s>", add_special_tokens=False)
    assert any(line.startswith("  warning: 2 prompts stop before '<think>\\n', because") for line in lines)
    assert prompt_of(RECORD, chat).text == asked + "<think>\n"  # A sample begins to think.


def test_lost_system_turn(tmp_path):
    """A prompt has its system turn as the model is asked with it, though a conversation loses it."""
    chat = chat_model(tmp_path, LAST_USER).chat_template()
    one, two = [turn("system", "Brief. "), ASKED], [turn("system", "Brief. "), ASKED, YES, ASKED]
    assert chat.split(one, [[YES]])[:2] == ("[Brief. Is 2 + 2 four?]", [" Yes, it is.</s>"])
    asked = "[Is 2 + 2 four?] Yes, it is.</s>[Brief. Is 2 + 2 four?]"
    assert chat.split(two, [[YES]])[:2] == (asked, [" Yes, it is.</s>"])
    spoilt = LAST_USER.replace("{{ m.content }}</s>", "{{ m.content }}{{ system }}</s>")
    with pytest.raises(BadRecord, match="not begin with the prompt; without its system turn it would; mend"):
        chat_model(tmp_path, spoilt).chat_template().split(one, [[YES]])
