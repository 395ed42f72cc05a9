"""Model directories from someone else: whatever is in the files, they load or are refused in one line."""

import json
import resource
import shutil
import struct
from itertools import product

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from characters import EOS, bpe
from minidpo.data.tokenizer import Tokenizer
from minidpo.errors import UserError
from minidpo.model import load_model, load_reward_model
from minidpo.model.hf_fields import FIELDS
from minidpo.training.saved_tokenizer import tokenizer_files

HUGE = (2**31, 2**31 - 2, 10**9, 10**12, 2**63, 10**400)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(HUGE) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
often = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


@pytest.fixture
def directory(world, tmp_path):
    return shutil.copytree(world / "model", tmp_path / "m")


@pytest.fixture(autouse=True)
def no_huge_allocation():
    """2 GiB more of address space; past that an allocation fails, with an error that fails the test."""
    pages = int(open("/proc/self/statm").read().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def template(directory) -> None:
    assert Tokenizer(bpe(), EOS, directory).chat_template().identity


def refusal(directory) -> str:
    """What is said against a model directory; empty if it loads. Anything but a UserError goes through."""
    said = ""
    for load in (load_model, load_reward_model, Tokenizer.from_pretrained, template):
        try:
            load(directory)
        except UserError as error:
            assert "\n" not in str(error)
            said += str(error)
    return said


def edit(world, directory, name: str, **fields) -> None:
    """The world's file with other fields."""
    fields = json.loads((world / "model" / name).read_text()) | fields
    (directory / name).write_text(json.dumps(fields))


OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


@pytest.mark.parametrize("name", [*OBJECTS, "chat_template.jinja"])
def test_link_to_something_else(directory, tmp_path, name):
    """Model caches are made of links; what one leads to is copied to final/ only if it is what its name says."""
    secret, file = tmp_path / "secret", directory / name
    file.unlink(missing_ok=True)
    file.symlink_to(secret)
    content = '{"a": "{{ messages }}"}'  # an object, and a template
    secret.write_text(content)
    assert tokenizer_files(directory)[name] == content.encode()
    for other in (b"root:x:0:0:root:/root:/bin/bash\n", b"[1]", b"\xff"):
        secret.write_bytes(other)
        with pytest.raises(UserError, match=name):
            tokenizer_files(directory)


SIZES = "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim".split()
ABSURD = [{name: value} for name in (*SIZES, "num_hidden_layers") for value in HUGE]
ABSURD += [{"num_hidden_layers": 9999}, dict.fromkeys(SIZES, 2**20), dict.fromkeys(SIZES, 2**24)]


@pytest.mark.parametrize("fields", ABSURD, ids=str)
def test_absurd_sizes(world, directory, fields):
    """They are refused before weights or thousands of layers are allocated; no product of sizes overflows."""
    edit(world, directory, "config.json", **fields)
    with pytest.raises(UserError):
        load_model(directory)


JSON_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")
BAD_JSON = ("[", "[" * 100_000, '{"a":' * 100_000, '{"vocab_size": ' + "9" * 5000 + "}", "\ud800")
NO_TOKENIZERS = ("{}", '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}')


@pytest.mark.parametrize(
    ("name", "content"),
    [*product(JSON_FILES, BAD_JSON), *product(["tokenizer.json"], NO_TOKENIZERS)],
    ids=range(17),
)
def test_bad_json(directory, name, content):
    """Cut short, nested without end, with endless numbers, half a character; or no tokenizer."""
    (directory / name).write_bytes(content.encode(errors="surrogatepass"))
    assert name in refusal(directory)


TOKENS = ("eos_token", "bos_token", "pad_token", "chat_template", "eos_token_id")


@often
@given(
    st.dictionaries(st.sampled_from(sorted(FIELDS)), JSON, max_size=3),
    st.dictionaries(st.sampled_from(TOKENS), JSON, max_size=1),
)
@example({}, {"chat_template": "\ud800"})  # half a character
def test_any_json(world, directory, of_model, of_tokenizer):
    """Whatever is in the fields of either configuration does no worse than be refused."""
    edit(world, directory, "config.json", **of_model)
    edit(world, directory, "tokenizer_config.json", **of_tokenizer)
    refusal(directory)


@often
@given(st.data())
def test_any_safetensors_header(world, directory, data):
    """So does a header that lies, or any bytes over any place of it."""
    content = (world / "model" / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(header)))
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        kinds = st.sampled_from(["F32", "I64", "F8_E4M3", "F4", "BOOL"])
        lie = data.draw(kinds | st.lists(st.sampled_from([0, 1, *HUGE])) | JSON)
        header[name] = lie if name == "__metadata__" else header[name] | {key: lie}
        spoilt = json.dumps(header).encode()
        content = struct.pack("<Q", len(spoilt)) + spoilt + content[8 + length :]
    else:
        start = data.draw(st.integers(0, 8 + length))
        new = data.draw(st.binary(min_size=1, max_size=9))
        content = content[:start] + new + content[start + len(new) :]
    (directory / "model.safetensors").write_bytes(content)
    refusal(directory)
