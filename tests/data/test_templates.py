"""A chat template is a program that came with a download: where it is found, and what a bad one gets."""

import sys

import pytest
from chat_model import ASKED, LLAMA3, MISTRAL, RECORD, SMOLLM2, YES, chat_model, read, turn

from minidpo.data import Tokenizer
from minidpo.errors import UserError
from tiny import write_tokenizer


def test_where_it_is(tmp_path):
    """The template is found where transformers finds it, and another one for records with tools."""
    named = [{"name": "tool_use", "template": "with tools"}, {"name": "default", "template": "from the list"}]
    chat = chat_model(tmp_path, named).chat_template()
    assert chat.render([ASKED], False) == "from the list"
    assert chat.render([ASKED], False, {"tools": [{}]}) == "with tools"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_pretrained(tmp_path).chat_template().render([ASKED], False) == "from the file"
    more = tmp_path / "additional_chat_templates"  # where transformers 5 saves it
    more.mkdir()
    (more / "tool_use.jinja").write_text("from its file")
    chat = Tokenizer.from_pretrained(tmp_path).chat_template()
    assert chat.render([ASKED], False) == "from the file"
    assert chat.render([ASKED], False, {"tools": [{}]}) == "from its file"


REFUSES = "pairs.jsonl:1: the chat template refuses the messages: "


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat_template in tokenizer_config.json and no chat_template.jinja; write messages as"),
        (7, "chat_template is of type int; give a string"),
        ("{% for %}", "its chat template is not jinja"),
        ("{% if x %}" * 2000 + "{% endif %}" * 2000, "is not jinja (maximum recursion depth"),
        ("{{ " + "9" * 5000 + " }}", "its chat template is not jinja (Exceeds the limit"),
        ("{{ 'a' * 10**12 }}", REFUSES + "MemoryError"),
        (MISTRAL, REFUSES + "Roles must alternate"),
        ("{{ ''.__class__.mro() }}", REFUSES + "access to attribute"),
        ("{% set _ = messages.append(1) %}", REFUSES + "access to"),
        ("{{ messages | length }}", "does not begin with the prompt; mend the record, or write"),
        ("{% for m in messages %}{{ m.name }}{% endfor %}", "text of the messages has half a surrogate pair"),
    ],
)
def test_bad_template(tmp_path, template, said):
    """A template that does not serve is refused in one line. It can run no code and change no message."""
    with pytest.raises(UserError) as caught:
        prompt = [turn("system", "Be brief."), ASKED | {"name": "\ud83d"}]
        read(chat_model(tmp_path, template).chat_template(), tmp_path, RECORD | {"prompt": prompt})
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_without_jinja2(tmp_path, monkeypatch):
    """Without jinja2 one line names what to install."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"needs jinja2: pip install -e '\.\[chat\]'"):
        chat_model(tmp_path, SMOLLM2).chat_template().render([ASKED], True)


def test_identity(tmp_path):
    """What changes the text changes the identity."""
    given = {"template": SMOLLM2}
    changes = ({}, {"template": LLAMA3}, {"bos_token": "<pad>"}, {"eos_token": "<pad>"})
    made = [chat_model(tmp_path, **given | change).chat_template().identity for change in changes]
    tokenizer = chat_model(tmp_path, SMOLLM2)
    made += [tokenizer.chat_template(kind).identity for kind in ("hh", "chatml")]
    assert len(set(made)) == 6 and tokenizer.chat_template().identity == made[0]


@pytest.mark.parametrize(("template", "kind"), [(SMOLLM2, "model"), (None, "chatml")])
def test_markers(tmp_path, capsys, template, kind):
    """Markers of the template for which there is no token are told once, those of a message never."""
    prompt = [turn("user", "What is <|this|>?")]
    chat_model(tmp_path, template).chat_template(kind).split(prompt, [[YES]])
    assert capsys.readouterr().out == ""
    write_tokenizer(tmp_path / "small", ["user assistant"])
    (tmp_path / "small" / "chat_template.jinja").write_text(template or "")
    Tokenizer.from_pretrained(tmp_path / "small").chat_template(kind).split(prompt, [[YES]])
    told = "warning: the tokenizer has no token for <|im_start|>, <|im_end|> of the chat template\n"
    assert capsys.readouterr().out == told
