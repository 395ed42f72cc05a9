"""Whatever a file holds, any bytes or any JSON: pairs that can be used, or one line."""

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from minidpo.chat import ChatTemplate
from minidpo.data import read_preferences
from minidpo.errors import UserError
from record_files import GOOD

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
words = st.sampled_from(
    ["prompt", "chosen", "rejected", "role", "content", "margin", "user", "assistant", "x"]
)
values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)
message = st.fixed_dictionaries({"role": words | values, "content": values})
record = st.dictionaries(words, values, max_size=5) | st.fixed_dictionaries(
    {"chosen": values | st.lists(message, max_size=3), "rejected": values | st.lists(message, max_size=3)},
    optional={"prompt": values | st.lists(message, max_size=2), "margin": values},
)


def pairs_or_one_line(path: Path, skip_bad: bool) -> None:
    try:
        pairs = list(read_preferences(path, template=ChatTemplate("hh", None, "</s>"), skip_bad=skip_bad))
    except UserError as error:
        assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1
    else:
        assert pairs and all(pair.chosen.strip() and pair.rejected.strip() for pair in pairs)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.binary(max_size=60) | st.sampled_from([json.dumps(GOOD).encode(), b"", b"{}", b"\x1f\x8b"])),
    st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.json"]),
    st.booleans(),
)
def test_any_bytes_give_pairs_or_one_line(tmp_path_factory, lines, name, skip_bad):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(b"\n".join(lines))
    pairs_or_one_line(path, skip_bad)


@settings(max_examples=150, deadline=None)
@given(st.lists(record | values, max_size=4), st.booleans(), st.booleans())
def test_any_json_gives_pairs_or_one_line(tmp_path_factory, content, as_list, skip_bad):
    path = tmp_path_factory.mktemp("fuzz") / ("a.json" if as_list else "a.jsonl")
    path.write_text(json.dumps(content) if as_list else "\n".join(map(json.dumps, content)))
    pairs_or_one_line(path, skip_bad)
