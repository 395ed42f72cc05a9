"""What writing messages out promises: the ids of transformers, and responses that end where a model ends."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import train_dpo
import train_rm
from minidpo.data import BadRecord, Tokenizer, read_preferences
from minidpo.errors import UserError
from record_files import write
from tiny import write_tokenizer

jinja2 = pytest.importorskip("jinja2")

# As SmolLM2-Instruct has it: a system turn of its own unless there is one, a newline after every turn.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# In the manner of Llama 3: BOS from the template, content trimmed, no newline after a turn.
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
    """A model directory: a small tokenizer (<s> before every text, EOS <|im_end|>), the given template."""

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
    tokenizer = Tokenizer.from_pretrained(directory)
    data = directory / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": prompt, "chosen": [YES], "rejected": [NO]}))
    (pair,) = read_preferences(data, template=tokenizer.chat_template(kind))
    return tokenizer, tokenizer.encode_pair(pair)


def apply_of_transformers(directory: Path, tokenize: bool = True):
    """transformers' apply_chat_template for the tokenizer of a directory."""
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)
    keywords = {"return_dict": False} if tokenize else {"tokenize": False}

    def apply(messages: list[dict], generation_prompt: bool):
        return theirs.apply_chat_template(messages, add_generation_prompt=generation_prompt, **keywords)

    return apply


# The same as transformers


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3], ids=["smollm2", "llama3"])
@pytest.mark.parametrize(
    "prompt", [ASKED, [SYSTEM, *ASKED], TALK, [SYSTEM, *TALK]], ids=["one", "system", "multi", "system multi"]
)
def test_ids_of_apply_chat_template(model, template, prompt):
    """Ids equal those of transformers' apply_chat_template."""
    apply = apply_of_transformers(model(template))
    tokenizer, pair = ids(model(template), prompt)
    assert pair.prompt == apply(prompt, True)
    for message, response in ((YES, pair.chosen), (NO, pair.rejected)):
        whole, ours = apply([*prompt, message], False), pair.prompt + response
        assert ours == whole[: len(ours)]
        assert tokenizer.decode(whole[len(ours) :]) in ("", "\n")  # after EOS: never to be written


@pytest.mark.parametrize("kind", ["model", "chatml", "hh"])
def test_prompt_of_ids(model, kind):
    """The prompt of ids, of which a reward model is asked, becomes those ids again."""
    tokenizer, pair = ids(model(SMOLLM2), TALK, kind)
    prompt = tokenizer.prompt(pair.prompt)
    assert tokenizer.encode(prompt.text, prompt.add_special_tokens) == pair.prompt
    assert prompt.add_special_tokens == (kind != "model")
    assert (prompt.text == tokenizer.decode(pair.prompt)) == (kind == "hh")


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3, MISTRAL, TAGS])
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_text_of_apply_chat_template(model, template, generation_prompt):
    """Text equals that of transformers."""
    apply = apply_of_transformers(model(template), tokenize=False)
    ours = Tokenizer.from_pretrained(model(template)).chat_template()
    for messages in (ASKED, TALK, [*TALK, YES]):
        assert ours.render(messages, generation_prompt) == apply(messages, generation_prompt)


# Special tokens, once


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3])
def test_eos_ends_a_response(model, template):
    """A response ends with EOS, once, and nothing after it."""
    tokenizer, pair = ids(model(template), TALK)
    for response, message in ((pair.chosen, YES), (pair.rejected, NO)):
        assert response[-1] == tokenizer.eos_id and response.count(tokenizer.eos_id) == 1
        assert tokenizer.decode(response) == message["content"]


def test_bos_of_the_template(model):
    """A template that writes BOS gets no second one, and one that writes none gets none."""
    _, pair = ids(model(LLAMA3), ASKED)
    assert pair.prompt.count(1) == 1 and pair.prompt[0] == 1
    _, pair = ids(model(SMOLLM2), ASKED)
    assert 1 not in pair.prompt
    tokenizer, pair = ids(model(), ASKED, "hh")  # written out: tokenized like any text
    assert pair.prompt.count(1) == 1 and pair.prompt[0] == tokenizer.bos_id == 1


def test_eos_in_the_content(model):
    """EOS in the content is no end; if the template closes a turn with another token, EOS is added."""
    chat = Tokenizer.from_pretrained(model()).chat_template()
    assert chat.split(ASKED, [turn("assistant", "<|im_end|> so")])[1] == ["<|im_end|> so<|im_end|>"]
    tokenizer = Tokenizer.from_pretrained(model(eos_token="</s>"))
    _, (text,) = tokenizer.chat_template().split(ASKED, [turn("assistant", "It is </s> so")])
    assert text == "It is </s> so<|im_end|>\n"
    _, pair = ids(model(eos_token="</s>"), ASKED)
    closing = [tokenizer.encode("<|im_end|>", False)[0], *tokenizer.encode("\n", False), tokenizer.eos_id]
    assert pair.chosen[-len(closing) :] == closing


# The two that are written out


def test_hh_text(model):
    """hh writes messages as the published files have them."""
    chat = Tokenizer.from_pretrained(model(None)).chat_template("hh")
    prompt, responses = chat.split(TALK, [YES, NO])
    asked = "\n\nHuman: Is 2 + 2 four?\n\nAssistant: It is, 😀."
    assert prompt == asked + "\n\nHuman: Sure?\n\nReally?\n\nAssistant:"
    assert responses == [" Yes, it is.", " No.\n\nIt is not"]
    assert chat.split([SYSTEM, *ASKED], [YES])[0].startswith("Be brief <&>.\n\nHuman: Is 2")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_hh_roles(model, elsewhere):
    """hh, ours and as other programs render it, refuses roles that it does not know."""
    directory = model()
    chat = Tokenizer.from_pretrained(directory).chat_template("hh")
    if elsewhere:  # A comment makes it another's.
        (directory / "chat_template.jinja").write_text("{# theirs #}" + chat.to_keep)
        chat = Tokenizer.from_pretrained(directory).chat_template()
        assert chat.kind == "model"
    for messages in ([turn("tool", "4")], [*ASKED, SYSTEM]):
        with pytest.raises(BadRecord, match="the hh template takes user"):
            chat.split(messages, [YES])


def test_chatml_text(model):
    """chatml equals the SmolLM2 template if a system turn is given."""
    tokenizer, pair = ids(model(), [SYSTEM, *TALK], "chatml")
    _, theirs = ids(model(), [SYSTEM, *TALK], "model")
    assert pair.prompt == [tokenizer.bos_id, *theirs.prompt]  # BOS: chatml is text like any other
    assert (pair.chosen, pair.rejected) == (theirs.chosen, theirs.rejected)


@pytest.mark.parametrize("kind", ["hh", "chatml"])
@pytest.mark.parametrize("prompt", [ASKED, [SYSTEM, *TALK]], ids=["one", "system multi"])
def test_template_to_keep(model, kind, prompt):
    """A model trained on one of them has it for its own, here and in transformers."""
    directory = model()
    tokenizer, expected = ids(directory, prompt, kind)
    template = tokenizer.chat_template(kind)
    (directory / "chat_template.jinja").write_text(template.to_keep)
    _, found = ids(directory, prompt, "model")
    assert (found.prompt, found.chosen) == (expected.prompt, expected.chosen)
    assert Tokenizer.from_pretrained(directory).chat_template().identity == template.identity

    apply = apply_of_transformers(directory)
    assert apply(prompt, True) == expected.prompt
    written = len(expected.chosen) - (kind == "hh")  # hh writes no EOS: the model does
    whole = expected.prompt + expected.chosen[:written]
    assert apply([*prompt, YES], False)[: len(whole)] == whole


@pytest.mark.parametrize("script", [train_dpo, train_rm], ids=["dpo", "rm"])
def test_template_of_a_run(config, world, tmp_path, script):
    """A run leaves the template that it trained on with its model."""
    base = tmp_path / "base"
    shutil.copytree(world / "model", base)
    fields = json.loads((base / "tokenizer_config.json").read_text()) | {"chat_template": SMOLLM2}
    (base / "tokenizer_config.json").write_text(json.dumps(fields))
    data = write(tmp_path / "messages.jsonl", *[{"prompt": ASKED, "chosen": [YES], "rejected": [NO]}] * 4)
    keys = {"data__template": '"chatml"', "data__eval_pairs": 0, "optim__max_steps": 1}
    arguments = config(model__path=f'"{base}"', data__train=f'["{data}"]', **keys)
    script.main(arguments)
    for place in ("final", "checkpoints/step-1"):
        assert Tokenizer.from_pretrained(tmp_path / "out" / place).chat_template().kind == "chatml"
        fields = json.loads((tmp_path / "out" / place / "tokenizer_config.json").read_text())
        assert "chat_template" not in fields and fields["eos_token"]
    (tmp_path / "out" / "final" / "chat_template.jinja").unlink()
    script.main(arguments)  # nothing left to do, but to write it again
    assert Tokenizer.from_pretrained(tmp_path / "out" / "final").chat_template().kind == "chatml"


# Where the template comes from, and what goes wrong


def test_where_the_template_is(model):
    """The template is found where transformers finds it."""
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "from the list"}]
    directory = model(named)
    assert Tokenizer.from_pretrained(directory).chat_template().render(ASKED, False) == "from the list"
    (directory / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_pretrained(directory).chat_template().render(ASKED, False) == "from the file"


REFUSES = "pairs.jsonl:1: the chat template refuses the messages: "


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat_template in tokenizer_config.json and no chat_template.jinja; write messages as"),
        ("{% for %}", "its chat template is not jinja"),
        (7, "chat_template is of type int; give a string"),
        (MISTRAL, REFUSES + "Roles must alternate"),
        ("{{ messages[9].content }}", REFUSES + "list object has no"),
        ("{{ ''.__class__.mro() }}", REFUSES + "access to attribute"),
        ("{% set _ = messages.append(1) %}", REFUSES + "access to"),
        ("{{ messages | length }}", "does not begin with the prompt; mend the record, or write"),
    ],
)
def test_bad_template(model, template, said):
    """A template that does not serve is refused in one line."""
    with pytest.raises(UserError) as caught:
        ids(model(template), [SYSTEM, *ASKED])
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_half_a_character(model):
    """Half a character in a key that only the template reads is refused too."""
    named = "{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"pairs.jsonl:1: the text of the messages has half a surrogate pair"):
        ids(model(named), [{**ASKED[0], "name": "\ud83d"}])


def test_without_jinja2(model, monkeypatch):
    """Without jinja2 one line names what to install; hh needs none."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"needs jinja2: pip install -e '\.\[chat\]'"):
        ids(model(), ASKED)
    assert ids(model(), ASKED, "hh")[1].chosen  # needs none


def test_identity(model):
    """What changes the text changes the identity."""

    def identity(kind: str = "model", **config: object) -> str:
        return Tokenizer.from_pretrained(model(**config)).chat_template(kind).identity

    changes = (
        {"kind": "hh"},
        {"kind": "chatml"},
        {"template": LLAMA3},
        {"bos_token": "<pad>"},
        {"eos_token": "</s>"},
    )
    different = {identity(), *(identity(**change) for change in changes)}
    assert len(different) == 6 and identity() in different
