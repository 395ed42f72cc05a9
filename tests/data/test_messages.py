"""Whatever a record says beside role and content reaches the template, or is named in the report."""

import json

import pytest
from chat_model import ASKED, NO, RECORD, YES, chat_model, read, turn
from test_chat import encode

from minidpo.data import BadRecord, Prompt, prompt_of
from minidpo.data.messages import without_reasoning
from minidpo.errors import UserError

# It has no guard against nulls: it prints a null name as "None", and cannot loop over null tool calls.
PLAIN = """{% if effort %}({{ effort }}){% endif %}{% if tools %}({{ tools | tojson }}){% endif %}
{%- for m in messages %}<{{ m.role }}>{% if 'name' in m %}({{ m.name }}){% endif %}
{%- if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}
{{- (m.content or '').split('</think>')[-1] }}
{%- if 'tool_calls' in m %}{% for c in m.tool_calls %}({{ c.function | tojson }}){% endfor %}{% endif %}</s>
{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def call(city: object, **more: object) -> dict:
    """An assistant's turn that calls a tool."""
    function = {"name": "weather", "arguments": {"city": city}}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]} | more


def parts(role: str, *texts: str) -> dict:
    return turn(role, [{"type": "text", "text": text} for text in texts])


@pytest.mark.parametrize(
    "changed",
    [
        {"tools": TOOLS},
        {"tools": json.dumps(TOOLS)},
        {"tools": None, "chat_template_kwargs": {"effort": "low"}},
        {"prompt": [ASKED | {"name": None, "tool_calls": None}]},
        {"chosen": [YES | {"reasoning": "clouds"}]},
        {"chosen": [YES | {"thinking": "clouds", "reasoning": None}]},
        {"prompt": [ASKED, call("Rome", content=None), turn("tool", "wet")]},
        {"prompt": [ASKED, call(None, content="")]},  # a null inside is an argument's value
        {"prompt": json.dumps([ASKED])},
        {"prompt": [parts("user", "Is 2 + ", "2 four?")]},
        {"system": "Be brief."},
    ],
)
def test_as_transformers(tmp_path, changed):
    """Prompt and responses, and the prompt of a sample, are what transformers writes of the same record."""
    ours, record = chat_model(tmp_path, PLAIN).chat_template(), RECORD | changed
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    tools = json.loads(record["tools"]) if isinstance(record.get("tools"), str) else record.get("tools")
    given = {"tools": tools, "tokenize": False} | record.get("chat_template_kwargs", {})
    messages = json.loads(record["prompt"]) if isinstance(record["prompt"], str) else record["prompt"]
    if "system" in record:
        messages = [turn("system", record["system"]), *messages]
    if isinstance(messages[0]["content"], list):  # transformers would print the list.
        messages = [ASKED]
    ((pair,), _) = read(ours, tmp_path, record)
    assert pair.prompt == theirs.apply_chat_template(messages, add_generation_prompt=True, **given)
    assert pair.prompt + pair.chosen == theirs.apply_chat_template(messages + record["chosen"], **given)
    assert pair.prompt + pair.rejected == theirs.apply_chat_template(messages + record["rejected"], **given)
    prompt = prompt_of(record, ours)
    assert prompt == Prompt(pair.prompt, prompt.messages, False, prompt.tail, prompt.given)


@pytest.mark.parametrize(
    ("chosen", "rejected", "dropped"),
    [
        (call("Rome"), call("Oslo"), None),
        (YES | {"reasoning_content": "clouds"}, YES | {"reasoning_content": "sun"}, None),
        (YES | {"id": 1}, YES | {"id": 2}, "chosen and rejected are identical"),  # not in the text
        (turn("assistant", " \n"), NO, "nothing but blanks in a response"),
        (parts("assistant", " "), NO, "nothing but blanks in a response"),
        (turn("assistant", "<think>no answer</think>"), NO, "nothing but blanks in a response"),
        (turn("assistant", "assistant"), NO, None),
        # Of several turns all of the assistant's must be blank.
        ([turn("assistant", " "), ASKED, turn("assistant", "")], [NO], "nothing but blanks in a response"),
        ([turn("assistant", " "), ASKED, YES], [NO], None),
        ([call("Rome"), turn("tool", "wet"), turn("assistant", "")], [NO], None),
    ],
)
def test_as_rendered(tmp_path, chosen, rejected, dropped):
    """Responses are blank, or alike, if the template writes them so, whatever their `content` is."""
    chat = chat_model(tmp_path, PLAIN).chat_template()
    pairs, lines = read(chat, tmp_path, RECORD, RECORD | {"chosen": chosen, "rejected": rejected})
    assert len(pairs) == (1 if dropped else 2)
    assert not dropped or f"  dropped 1: {dropped} (line 2)" in lines


def test_without_reasoning():
    """What follows the last "</think>" is no reasoning, as templates have it."""
    said = turn("assistant", "<think>a</think>b</think>\n\nc", thinking="d")
    assert without_reasoning(said) == turn("assistant", "c")


def test_shared_tool_calls(tmp_path):
    """Turns are shared if all that the template reads is equal, tool calls included."""
    rome, again, oslo = call("Rome"), call("Rome", id=7), call("Oslo")
    chosen = [ASKED, rome, ASKED, YES]
    records = [{"chosen": chosen, "rejected": [ASKED, other, ASKED, NO]} for other in (again, oslo)]
    pairs, _ = read(chat_model(tmp_path, PLAIN).chat_template(), tmp_path, *records)
    assert ["Rome" in pair.prompt for pair in pairs] == [True, False]
    assert ["Rome" in pair.chosen for pair in pairs] == [False, True]


@pytest.mark.parametrize(
    ("changed", "kind", "unread"),
    [
        ({"id": 7, "note": None, "system": ""}, "model", "id"),
        ({"prompt": [turn("system", "a"), ASKED], "system": "b"}, "model", "system"),
        ({"chat_template_kwargs": {"effort": "low", "x": 1}}, "model", "chat_template_kwargs.x"),
        ({"tools": TOOLS}, "chatml", "tools"),
        ({"chosen": [YES | call("Rome")]}, "hh", "tool_calls of messages"),
        ({"prompt": "p", "chosen": "y", "rejected": "n", "system": "a", "b\n": 1}, "model", "'b\\n', system"),
    ],
)
def test_unread_keys(tmp_path, changed, kind, unread):
    """A key that holds something and does not reach the text is named in the report."""
    _, lines = read(chat_model(tmp_path, PLAIN).chat_template(kind), tmp_path, RECORD | changed)
    assert lines[-1] == f"  keys that are not read: {unread}"


@pytest.mark.parametrize(
    ("changed", "kind", "said"),
    [
        ({"tools": "[{"}, "model", "'tools' is not JSON (Expecting"),
        ({"tools": ["weather"]}, "model", "'tools' is no list of objects; give one object per tool"),
        ({"chat_template_kwargs": "effort"}, "model", "'chat_template_kwargs' is no object; give one"),
        ({"prompt": [turn("human")]}, "model", "has the role 'human', which the chat template does not n"),
        ({"chosen": [turn("bot")]}, "chatml", "which the chat template does not name; call it 'assistant'"),
        ({"prompt": [turn("System"), ASKED]}, "hh", "the chat template does not name; call it 'system'"),
        ({"prompt": [turn("tool", "4")]}, "hh", "the hh template takes user"),
        ({"prompt": [ASKED, turn("system", "a")]}, "hh", "the hh template takes user"),
        ({"chosen": [turn("assistant", [{"type": "image"}])]}, "model", "has a part of type 'image'; a part"),
        ({"chosen": [turn("assistant", None, tool_calls=[])]}, "model", "has no text under 'content'"),
        ({"chosen": [call("Rome")]}, "hh", "a message has no text under 'content', and hh and chatml"),
    ],
)
def test_refused(tmp_path, changed, kind, said):
    """What a template cannot be given is refused in one line."""
    with pytest.raises(UserError) as caught:
        read(chat_model(tmp_path, PLAIN).chat_template(kind), tmp_path, RECORD | changed)
    assert str(caught.value).startswith(f"{tmp_path}/pairs.jsonl:1: ") and said in str(caught.value)


def test_roles(tmp_path, capsys):
    """A role that the template does not name is told once; one that it names may mean a usual one."""
    record = RECORD | {"prompt": [turn("critic", "Hm."), turn("human", "Hi."), ASKED]}
    chat = chat_model(tmp_path, PLAIN + "{# 'human' #}").chat_template()
    assert len(read(chat, tmp_path, record, record)[0]) == 2
    told = "warning: a message has the role 'critic', which the chat template does not name\n"
    assert capsys.readouterr().out == told


def test_deep_nesting(tmp_path):
    """Messages that are nested deeper than Python goes are refused."""
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(BadRecord, match="messages are nested too deeply; give fewer levels"):
        encode(chat_model(tmp_path, PLAIN), [ASKED | {"x": deep}])
