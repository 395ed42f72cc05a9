"""What writing messages out promises: the ids are those of transformers, and an ending stops where the model stops."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import train_dpo
import train_rm
from minidpo.chat import TemplateError
from minidpo.data import read_preferences
from minidpo.errors import UserError
from minidpo.tokenizer import Tokenizer
from tiny import write_tokenizer

jinja2 = pytest.importorskip("jinja2")

# As SmolLM2-Instruct has it: a system turn of its own unless there is one, a newline after every turn.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# In the manner of Llama 3: BOS from the template, content trimmed, no newline after a turn, whitespace control.
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n\\n' + message.content | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n\\n' }}
{%- endif %}"""
# In the manner of Mistral: alternation demanded, eos_token by name; and the tags and filters others use.
MISTRAL = """{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}
{% endfor %}"""
TAGS = """{% set ns = namespace(n=0) %}{% for message in messages %}{% if loop.index > 9 %}{% break %}{% endif %}
{% if tools is not none or documents %}never{% endif %}
    {%- set ns.n = ns.n + 1 -%}
{{ message | tojson }} {{ ns.n }} {{ strftime_now('%Y') }} {{ dict(a=1).a }}
{% endfor %}{% if add_generation_prompt %}{"role": "assistant"{% endif %}"""


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


SYSTEM = turn("system", "Be brief <&>.")
ASKED = [turn("user", "Is 2 + 2 four?")]
TALK = [*ASKED, turn("assistant", "It is, 😀."), turn("user", "Sure?\n\nReally?")]
YES, NO = turn("assistant", "Yes, it is."), turn("assistant", "No.\n\nIt is not")


@pytest.fixture
def model(tmp_path):
    """A model directory with a small tokenizer (<s> before every text, EOS <|im_end|>) and the given template."""

    def make(template: object = SMOLLM2, **config: object) -> Path:
        write_tokenizer(tmp_path, [f"{m['role']} {m['content']}" for m in [*TALK, SYSTEM, YES, NO]])
        file = tmp_path / "tokenizer.json"
        content = json.loads(file.read_text())
        vocabulary = content["model"]["vocab"]
        for spelled in ("<|im_start|>", "<|im_end|>"):
            vocabulary[spelled] = len(vocabulary)
            special = {"id": vocabulary[spelled], "content": spelled, "special": True, "normalized": False}
            content["added_tokens"].append(special | {"single_word": False, "lstrip": False, "rstrip": False})
        file.write_text(json.dumps(content))
        names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": template} | config
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names)
        )
        return tmp_path

    return make


def ids(directory: Path, prompt: list[dict], kind: str = "model"):
    """The ids of one record of messages, read from a file as a run reads it."""
    tokenizer = Tokenizer.from_directory(directory)
    data = directory / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": prompt, "chosen": [YES], "rejected": [NO]}))
    (pair,) = read_preferences(data, template=tokenizer.chat_template(kind))
    return tokenizer, tokenizer.encode_pair(pair)


# The same as transformers


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3], ids=["smollm2", "llama3"])
@pytest.mark.parametrize(
    "prompt", [ASKED, [SYSTEM, *ASKED], TALK, [SYSTEM, *TALK]], ids=["one", "system", "multi", "system multi"]
)
def test_ids_equal_those_of_transformers_apply_chat_template(model, template, prompt):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(model(template))
    tokenizer, pair = ids(model(template), prompt)

    def apply(messages: list[dict], generation_prompt: bool) -> list[int]:
        return theirs.apply_chat_template(
            messages, add_generation_prompt=generation_prompt, return_dict=False
        )

    assert pair.prompt == apply(prompt, True)
    for answer, ending in ((YES, pair.chosen), (NO, pair.rejected)):
        whole = apply([*prompt, answer], False)
        assert (pair.prompt + ending) == whole[: len(pair.prompt + ending)]
        assert tokenizer.decode(whole[len(pair.prompt + ending) :]) in (
            "",
            "\n",
        )  # after EOS: never to be written


@pytest.mark.parametrize("kind", ["model", "chatml", "hh"])
def test_the_prompt_of_ids_becomes_those_ids_again(model, kind):
    """What a reward model is asked about a held-out prompt: turns are marked by special tokens, too."""
    tokenizer, pair = ids(model(SMOLLM2), TALK, kind)
    prompt = tokenizer.prompt(pair.prompt)
    assert tokenizer.encode(prompt.text, prompt.add_special_tokens) == pair.prompt
    assert prompt.add_special_tokens == (kind != "model")
    assert (prompt.text == tokenizer.decode(pair.prompt)) == (kind == "hh")


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3, MISTRAL, TAGS])
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_text_equals_that_of_transformers(model, template, generation_prompt):
    transformers = pytest.importorskip("transformers")
    directory = model(template)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer.from_directory(directory).chat_template()
    for messages in (ASKED, TALK, [*TALK, YES]):
        assert ours.render(messages, generation_prompt) == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt
        )


# Special tokens, once


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3])
def test_an_ending_ends_with_eos_once_and_nothing_after_it(model, template):
    tokenizer, pair = ids(model(template), TALK)
    for ending in (pair.chosen, pair.rejected):
        assert ending[-1] == tokenizer.eos_id and ending.count(tokenizer.eos_id) == 1
    assert (tokenizer.decode(pair.chosen), tokenizer.decode(pair.rejected)) == (YES["content"], NO["content"])


def test_a_template_that_writes_bos_gets_no_second_one_and_one_that_writes_none_gets_none(model):
    _, pair = ids(model(LLAMA3), ASKED)
    assert pair.prompt.count(1) == 1 and pair.prompt[0] == 1
    _, pair = ids(model(SMOLLM2), ASKED)
    assert 1 not in pair.prompt
    tokenizer, pair = ids(model(), ASKED, "hh")  # written out: tokenized like any text
    assert pair.prompt.count(1) == 1 and pair.prompt[0] == tokenizer.bos_id == 1


def test_where_the_template_closes_a_turn_with_another_token_eos_still_comes_last(model):
    tokenizer, pair = ids(model(eos_token="</s>"), ASKED)
    closing = [tokenizer.encode("<|im_end|>", False)[0], *tokenizer.encode("\n", False), tokenizer.eos_id]
    assert pair.chosen[-len(closing) :] == closing


def test_eos_that_a_reply_speaks_of_is_no_end(model):
    chat = Tokenizer.from_directory(model()).chat_template()
    _, (text,) = chat.split(ASKED, [turn("assistant", "It is <|im_end|> so")])
    assert text == "It is <|im_end|> so<|im_end|>"
    chat = Tokenizer.from_directory(model(eos_token="</s>")).chat_template()
    assert chat.split(ASKED, [turn("assistant", "It is </s> so")])[1] == ["It is </s> so<|im_end|>\n"]


# The two that are written out


def test_hh_writes_messages_as_the_published_files_do(model):
    chat = Tokenizer.from_directory(model(None)).chat_template("hh")
    prompt, endings = chat.split(TALK, [YES, NO])
    asked = "\n\nHuman: Is 2 + 2 four?\n\nAssistant: It is, 😀."
    assert prompt == asked + "\n\nHuman: Sure?\n\nReally?\n\nAssistant:"
    assert endings == [" Yes, it is.", " No.\n\nIt is not"]
    assert chat.split([SYSTEM, *ASKED], [YES])[0].startswith("Be brief <&>.\n\nHuman: Is 2")


def test_hh_refuses_roles_it_does_not_know(model):
    chat = Tokenizer.from_directory(model()).chat_template("hh")
    for messages in ([turn("tool", "4")], [*ASKED, SYSTEM]):
        with pytest.raises(TemplateError, match=r"message \d has role '\w+'; the hh template takes user"):
            chat.split(messages, [YES])


def test_chatml_equals_the_smollm2_template_where_a_system_turn_is_given(model):
    tokenizer, pair = ids(model(), [SYSTEM, *TALK], "chatml")
    _, theirs = ids(model(), [SYSTEM, *TALK], "model")
    assert pair.prompt == [tokenizer.bos_id, *theirs.prompt]  # BOS: chatml is text like any other
    assert (pair.chosen, pair.rejected) == (theirs.chosen, theirs.rejected)


@pytest.mark.parametrize("kind", ["hh", "chatml"])
@pytest.mark.parametrize("prompt", [ASKED, [SYSTEM, *TALK]], ids=["one", "system multi"])
def test_a_model_trained_on_one_of_them_has_it_for_its_own_here_and_in_transformers(model, kind, prompt):
    transformers = pytest.importorskip("transformers")
    directory = model()
    tokenizer, expected = ids(directory, prompt, kind)
    template = tokenizer.chat_template(kind)
    (directory / "chat_template.jinja").write_text(template.to_keep)
    _, found = ids(directory, prompt, "model")
    assert (found.prompt, found.chosen) == (expected.prompt, expected.chosen)
    assert Tokenizer.from_directory(directory).chat_template().identity == template.identity

    theirs = transformers.AutoTokenizer.from_pretrained(directory)

    def apply(messages: list[dict], generation_prompt: bool) -> list[int]:
        return theirs.apply_chat_template(
            messages, add_generation_prompt=generation_prompt, return_dict=False
        )

    assert apply(prompt, True) == expected.prompt
    ending = expected.chosen if kind == "chatml" else expected.chosen[:-1]  # hh writes no EOS: the model does
    assert apply([*prompt, YES], False)[: len(expected.prompt + ending)] == expected.prompt + ending


@pytest.mark.parametrize("script", [train_dpo, train_rm], ids=["dpo", "rm"])
def test_a_run_leaves_the_template_it_trained_on_with_its_model(config, world, tmp_path, script):
    base = tmp_path / "base"
    shutil.copytree(world / "model", base)
    fields = json.loads((base / "tokenizer_config.json").read_text()) | {"chat_template": SMOLLM2}
    (base / "tokenizer_config.json").write_text(json.dumps(fields))
    data = tmp_path / "messages.jsonl"
    record = json.dumps({"prompt": ASKED, "chosen": [YES], "rejected": [NO]})
    data.write_text(f"{record}\n" * 4)
    arguments = config(
        model__path=f'"{base}"', data__train=f'["{data}"]', data__template='"chatml"', data__eval_pairs=0
    )
    script.main([*arguments, "--optim.max_steps=1"])
    for place in ("final", "checkpoints/step-1"):
        assert Tokenizer.from_directory(tmp_path / "out" / place).chat_template().kind == "chatml"
        fields = json.loads((tmp_path / "out" / place / "tokenizer_config.json").read_text())
        assert "chat_template" not in fields and fields["eos_token"]
    (tmp_path / "out" / "final" / "chat_template.jinja").unlink()
    script.main([*arguments, "--optim.max_steps=1"])  # nothing left to do, but to write it again
    assert Tokenizer.from_directory(tmp_path / "out" / "final").chat_template().kind == "chatml"


def test_hh_for_other_programs_refuses_the_roles_that_ours_refuses(model):
    directory = model()
    (directory / "chat_template.jinja").write_text(
        "{# ours, as another's #}" + Tokenizer.from_directory(directory).chat_template("hh").to_keep
    )
    chat = Tokenizer.from_directory(directory).chat_template()
    assert chat.kind == "model"
    for messages in ([turn("tool", "4")], [*ASKED, SYSTEM]):
        with pytest.raises(TemplateError, match="the hh template takes user"):
            chat.split(messages, [YES])


# Where the template comes from, and what goes wrong


def test_the_template_is_found_where_transformers_finds_it(model):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "from the list"}]
    directory = model(named)
    assert Tokenizer.from_directory(directory).chat_template().render(ASKED, False) == "from the list"
    (directory / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_directory(directory).chat_template().render(ASKED, False) == "from the file"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            None,
            "no chat_template in tokenizer_config.json and no chat_template.jinja; messages can be written as",
        ),
        ("{% for %}", "its chat template is not jinja"),
        (7, "chat_template is of type int; give a string"),
        (MISTRAL, "pairs.jsonl:1: the chat template refuses the messages: Roles must alternate"),
        (
            "{{ messages[9].content }}",
            "pairs.jsonl:1: the chat template refuses the messages: list object has no",
        ),
        (
            "{{ ''.__class__.mro() }}",
            "pairs.jsonl:1: the chat template refuses the messages: access to attribute",
        ),
        (
            "{% set _ = messages.append(1) %}",
            "pairs.jsonl:1: the chat template refuses the messages: access to",
        ),
        (
            "{{ messages | length }}",
            "does not begin with the prompt as it writes it; mend the record, or write",
        ),
    ],
)
def test_a_template_that_does_not_serve_is_refused_in_one_line(model, template, said):
    with pytest.raises(UserError) as caught:
        ids(model(template), [SYSTEM, *ASKED])
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_half_a_character_in_a_key_that_only_the_template_reads_is_refused_too(model):
    named = "{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"pairs.jsonl:1: the text of the messages has half a surrogate pair"):
        ids(model(named), [{**ASKED[0], "name": "\ud83d"}])


def test_without_jinja2_one_line_names_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"needs jinja2: pip install -e '\.\[chat\]'"):
        ids(model(), ASKED)
    assert ids(model(), ASKED, "hh")[1].chosen  # needs none


def test_what_changes_the_text_changes_the_identity(model):
    def identity(kind: str = "model", **config: object) -> str:
        return Tokenizer.from_directory(model(**config)).chat_template(kind).identity

    different = [identity(), identity("hh"), identity("chatml"), identity(template=LLAMA3)]
    different += [identity(bos_token="<pad>"), identity(eos_token="</s>")]
    assert len(set(different)) == len(different) and identity() == different[0]
