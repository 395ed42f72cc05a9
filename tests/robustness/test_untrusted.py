"""Model directories from someone else: whatever is in the files, they load or are refused in one line."""

import json
import resource
import shutil
import struct
from itertools import product
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minidpo.data.chat_template import ChatTemplate
from minidpo.data.tokenizer import Tokenizer
from minidpo.errors import UserError
from minidpo.model import load_model, load_reward_model
from minidpo.model.hf_config import FIELDS

HUGE = (2**31, 2**31 - 2, 10**9, 10**12, 2**63, 10**400)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(HUGE) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SIZES = "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim".split()
ABSURD = [{name: value} for name in (*SIZES, "num_hidden_layers") for value in HUGE]
ABSURD += [{"num_hidden_layers": 9999}, dict.fromkeys(SIZES, 2**20), dict.fromkeys(SIZES, 2**24)]
BAD_JSON = ("[", "[" * 100_000, '{"a":' * 100_000, '{"vocab_size": ' + "9" * 5000 + "}", "\ud800")
NO_TOKENIZERS = ("{}", '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}')


def fuzzed(**drawn):
    """Many examples of what hypothesis draws."""
    often = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
    return lambda test: often(given(**drawn)(test))


@pytest.fixture
def directory(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def fresh(world, tmp_path):
    """Makes the directory anew, for each of hypothesis' examples."""
    return lambda: Path(shutil.copytree(world / "model", tmp_path / "m", dirs_exist_ok=True))


@pytest.fixture(autouse=True)
def no_huge_allocation():
    """2 GiB more of address space; past that an allocation fails, with an error that fails the test."""
    pages = int(open("/proc/self/statm").read().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused_or_loaded(directory) -> str:
    """What was said against a model directory; empty if it loads. Anything but a UserError goes through."""
    said = ""
    for load in (load_model, load_reward_model, Tokenizer.from_pretrained):
        try:
            load(directory)
        except UserError as error:
            assert "\n" not in str(error)
            said += str(error)
    return said


def edit(file, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("fields", ABSURD, ids=str)
def test_absurd_sizes_are_refused_before_anything_is_allocated(directory, fields):
    """Neither weights nor the modules of thousands of layers; and no product of sizes overflows."""
    edit(directory / "config.json", **fields)
    with pytest.raises(UserError):
        load_model(directory)


def test_a_chat_template_of_half_a_character_has_a_fingerprint(directory):
    edit(directory / "tokenizer_config.json", chat_template="\ud800")
    assert ChatTemplate("model", directory, eos="</s>").identity


@pytest.mark.parametrize(
    ("name", "content"),
    [*product(("config.json", "tokenizer_config.json", "tokenizer.json"), BAD_JSON)]
    + [("tokenizer.json", content) for content in NO_TOKENIZERS],
    ids=range(17),
)
def test_json_that_is_none_is_refused(directory, name, content):
    """Cut short, nested without end, with endless numbers, half a character; or no tokenizer."""
    (directory / name).write_bytes(content.encode(errors="surrogatepass"))
    assert name in refused_or_loaded(directory)


@fuzzed(fields=st.dictionaries(st.sampled_from(sorted(FIELDS)), JSON, max_size=3))
def test_no_config_json_does_worse_than_be_refused(fresh, fields):
    directory = fresh()
    edit(directory / "config.json", **fields)
    refused_or_loaded(directory)


TOKENS = ("eos_token", "bos_token", "pad_token", "chat_template", "eos_token_id")


@fuzzed(name=st.sampled_from(TOKENS), value=JSON)
def test_no_tokenizer_config_does_worse_than_be_refused(fresh, name, value):
    directory = fresh()
    edit(directory / "tokenizer_config.json", **{name: value})
    refused_or_loaded(directory)
    try:
        assert ChatTemplate("model", directory, eos="</s>").identity
    except UserError as error:
        assert "\n" not in str(error)


@fuzzed(data=st.data())
def test_no_safetensors_header_does_worse_than_be_refused(fresh, data):
    directory = fresh()
    content = (directory / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    if data.draw(st.booleans()):  # a header that is one, and lies
        name = data.draw(st.sampled_from(sorted(header)))
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        kinds = st.sampled_from(["F32", "I64", "F8_E4M3", "F4", "BOOL"])
        lie = data.draw(kinds | st.lists(st.sampled_from([0, 1, *HUGE])) | JSON)
        header[name] = lie if name == "__metadata__" else header[name] | {key: lie}
        spoilt = json.dumps(header).encode()
        content = struct.pack("<Q", len(spoilt)) + spoilt + content[8 + length :]
    else:  # any bytes over any place of it
        start = data.draw(st.integers(0, 8 + length))
        new = data.draw(st.binary(min_size=1, max_size=9))
        content = content[:start] + new + content[start + len(new) :]
    (directory / "model.safetensors").write_bytes(content)
    refused_or_loaded(directory)
