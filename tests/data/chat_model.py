"""Models that write messages out: their chat templates, and a small tokenizer for them."""

import json
from pathlib import Path

import tokenizers

from minidpo.data import ChatTemplate, DataReport, PreferencePair, Tokenizer, read_preferences
from minidpo.sections import DataSection
from record_files import write
from tiny import write_tokenizer

# As SmolLM2-Instruct: a system turn of its own unless there is one, a newline after every turn.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3: BOS from the template, content trimmed, no newline after a turn.
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n\\n' + message.content | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n\\n' }}
{%- endif %}"""
# As Mistral: user and assistant must alternate, and EOS is written by its name.
MISTRAL = """{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}
{% endfor %}"""
DATED = """{{ strftime_now('%d %b') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


def turn(role: str, content: object = "", **more: object) -> dict:
    return {"role": role, "content": content} | more


ASKED = turn("user", "Is 2 + 2 four?")
YES, NO = turn("assistant", "Yes, it is."), turn("assistant", "No.\n\nIt is not")
RECORD = {"prompt": [ASKED], "chosen": [YES], "rejected": [NO]}


def chat_model(directory: Path, template: object, **config: object) -> Tokenizer:
    """A tokenizer that puts <s> before a text and </s> after it, in a directory with this chat template."""
    write_tokenizer(directory, [ASKED["content"], YES["content"], NO["content"]])
    core = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    core.save(str(directory / "tokenizer.json"))
    fields = json.loads((directory / "tokenizer_config.json").read_text())
    fields |= {"chat_template": template} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    return Tokenizer.from_pretrained(directory)


def read(
    template: ChatTemplate, directory: Path, *records: dict, **settings: object
) -> tuple[list[PreferencePair], list[str]]:
    """The pairs of a file of records, read with these settings of [data], and the lines of its report."""
    report, path = DataReport(), write(directory / "pairs.jsonl", *records)
    pairs = list(read_preferences(path, report, template=template, data=DataSection(**settings)))
    return pairs, list(report.lines())
