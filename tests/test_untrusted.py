"""Model directories from someone else: whatever is in the files, they load or are refused in one line."""

import json
import resource
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minidpo.chat import ChatTemplate
from minidpo.errors import UserError
from minidpo.tokenizer import Tokenizer
from minidpo.weights import load_model, load_reward_model

HUGE = (2**31, 2**31 - 2, 10**9, 10**12, 2**63, 10**400)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(HUGE) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
fuzzed = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


@pytest.fixture
def directory(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture(autouse=True)
def no_huge_allocation():
    """2 GiB more of address space, and an allocation fails with MemoryError or RuntimeError: a failed test."""
    pages = int(open("/proc/self/statm").read().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused_or_loaded(directory) -> str:
    """What was said against a model directory; empty if it loads. Anything but a UserError goes through."""
    said = ""
    for load in (load_model, load_reward_model, Tokenizer.from_directory):
        try:
            load(directory)
        except UserError as error:
            assert "\n" not in str(error)
            said += str(error)
    return said


def edit(file, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


SIZES = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
         " head_dim").split()  # fmt: skip


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("name", SIZES)
def test_absurd_sizes_are_refused_before_anything_is_allocated(directory, name, value):
    edit(directory / "config.json", **{name: value})
    with pytest.raises(UserError):
        load_model(directory)


def test_layers_without_tensors_are_refused_before_modules_are_made(directory):
    edit(directory / "config.json", num_hidden_layers=9999)
    with pytest.raises(UserError, match=r"9999 layers \(num_hidden_layers\), but there are \d+ tensors"):
        load_model(directory)


@pytest.mark.parametrize("value", [2**24, 2**31])
def test_sizes_whose_product_overflows_are_refused(directory, value):
    edit(directory / "config.json", **(dict.fromkeys(SIZES, value) | {"num_hidden_layers": 2}))
    with pytest.raises(UserError):
        load_model(directory)


def test_a_chat_template_of_half_a_character_has_a_fingerprint(directory):
    edit(directory / "tokenizer_config.json", chat_template="\ud800")
    assert ChatTemplate("model", directory, eos="</s>").identity


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_not_plain_floats_are_refused_by_name(directory, dtype):
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, directory / "model.safetensors")
    with pytest.raises(UserError, match=f"tensor '{name}' holds .*F32"):
        load_model(directory)


@pytest.mark.parametrize(
    "content",
    ["{}", "[", '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}', "[" * 100_000],
)
def test_a_tokenizer_that_is_none_is_refused(directory, content):
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.from_directory(directory)


def test_json_nested_without_end_or_with_endless_numbers_is_refused(directory):
    for name in ("config.json", "tokenizer_config.json"):
        good = (directory / name).read_text()
        for bad in ("[" * 100_000, '{"a":' * 100_000, '{"vocab_size": ' + "9" * 5000 + "}", "\ud800"):
            (directory / name).write_bytes(bad.encode(errors="surrogatepass"))
            assert name in refused_or_loaded(directory)
        (directory / name).write_text(good)


@fuzzed
@given(data=st.data())
def test_no_config_json_does_worse_than_be_refused(world, tmp_path_factory, data):
    fields = json.loads((world / "model" / "config.json").read_text())
    names = data.draw(
        st.lists(st.sampled_from(sorted(fields) + ["sliding_window", "layer_types"]), max_size=3)
    )
    directory = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.copytree(world / "model", directory, dirs_exist_ok=True)
    edit(directory / "config.json", **{name: data.draw(JSON) for name in names})
    refused_or_loaded(directory)


@fuzzed
@given(data=st.data())
def test_no_tokenizer_config_does_worse_than_be_refused(world, tmp_path_factory, data):
    directory = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.copytree(world / "model", directory, dirs_exist_ok=True)
    names = ("eos_token", "bos_token", "pad_token", "chat_template", "eos_token_id")
    edit(directory / "tokenizer_config.json", **{data.draw(st.sampled_from(names)): data.draw(JSON)})
    refused_or_loaded(directory)
    try:
        assert ChatTemplate("model", directory, eos="</s>").identity
    except UserError as error:
        assert "\n" not in str(error)


@fuzzed
@given(data=st.data())
def test_no_safetensors_header_does_worse_than_be_refused(world, tmp_path_factory, data):
    directory = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.copytree(world / "model", directory, dirs_exist_ok=True)
    content = (directory / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    if data.draw(st.booleans()):  # a header that is one, and lies
        name = data.draw(st.sampled_from(sorted(header)))
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        kinds = st.sampled_from(["F32", "I64", "F8_E4M3", "F4", "BOOL"]) | st.lists(
            st.sampled_from([0, 1, *HUGE])
        )
        header[name] = (
            data.draw(JSON) if name == "__metadata__" else header[name] | {key: data.draw(kinds | JSON)}
        )
        spoilt = json.dumps(header).encode()
        content = struct.pack("<Q", len(spoilt)) + spoilt + content[8 + length :]
    else:  # any bytes over any place of it
        start = data.draw(st.integers(0, 8 + length))
        new = data.draw(st.binary(min_size=1, max_size=9))
        content = content[:start] + new + content[start + len(new) :]
    (directory / "model.safetensors").write_bytes(content)
    refused_or_loaded(directory)
