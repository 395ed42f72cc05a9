"""Where prompt and response meet: the responses that were meant are scored, from their first token to EOS."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import pre_tokenizers, processors

from characters import BOS, EOS, bpe, ids, pair
from minidpo.data import (
    DataReport,
    PreferencePair,
    Prompt,
    Tokenizer,
    TokenPair,
    describe_pair,
    tokenize_pairs,
)

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"


@pytest.mark.parametrize(
    ("core", "texts", "expected"),
    [
        # The tokenizer merges "bc" across the boundary of one response, and of both.
        (bpe([("b", "c")]), ("ab", "cd", "dc"), (ids("ab"), ids("cd"), ids("dc"))),
        (bpe([("b", "c")], bos=True), ("ab", "cc", "ce"), ([BOS, *ids("ab")], ids("cc"), ids("ce"))),
        # It prepends a space to every text, but a response is none.
        (bpe(bos=True, prepend=True), ("ab", "cd", " d"), ([BOS, *ids("▁ab")], ids("cd"), ids("▁d"))),
        # EOS is in the response already; EOS inside is no end.
        (bpe(), ("a", "bc", "de</s>"), (ids("a"), ids("bc"), ids("de"))),
        (bpe(), ("a", "b</s>c", "d"), (ids("a"), [*ids("b"), EOS, *ids("c")], ids("d"))),
    ],
)
def test_boundary(core, texts, expected):
    """Prompt ids are those of the prompt alone, response ids what follows them, then EOS, once."""
    prompt, chosen, rejected = expected
    encoded = Tokenizer(core, EOS).encode_pair(pair(*texts))
    assert encoded == TokenPair(prompt, [*chosen, EOS], [*rejected, EOS], 0)


@pytest.mark.parametrize(
    ("single", "last"), [("$A </s>", "</s>"), ("<s> $A </s>", "</s>"), ("<s> $A j", "j")]
)
def test_tokens_behind(single, last):
    """A post-processor that ends every text with EOS, or another token, ends neither prompt nor response."""
    core = bpe([("b", "c")])
    special = [("<s>", BOS), (last, core.token_to_id(last))]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer, prompt = Tokenizer(core, EOS), [BOS, *ids("a")] if "<s>" in single else ids("a")
    assert tokenizer.prompt_ids(Prompt("a")) == prompt
    bc = core.token_to_id("bc")  # not "b" and "c": the response is not taken for one that merges
    assert tokenizer.encode_pair(pair("a", "bc", "d"))[:3] == (prompt, [bc, EOS], [*ids("d"), EOS])


def test_bos_in_the_text():
    """A prompt that begins with BOS gets no second one, and the report counts it; a template's gets none."""
    tokenizer, report = Tokenizer(bpe(bos=True), EOS), DataReport()
    templated = PreferencePair("<s>a", "b", "c", 2, add_special_tokens=False)
    pairs = [pair("<s>a", "b", "c", 0), pair("a", "b", "c", 1), templated, pair("a", "b", "c", 3)]
    encoded = list(tokenize_pairs(pairs, tokenizer, 9, report=report))
    assert [(p.index, p.prompt) for p in encoded] == [(i, [BOS, *ids("a")]) for i in range(4)]
    assert "  1 prompts begin with BOS, and get no second one" in report.lines()
    assert Tokenizer(bpe(), EOS).encode("<s>a") == [BOS, *ids("a")]  # A tokenizer that adds none keeps it.


def with_space(how: str) -> tokenizers.Tokenizer:
    """A tokenizer that puts a space before every text, and makes one token of a space and "c"."""
    if how == "byte level":  # It writes a space as Ġ, and a line break as Ċ.
        core = bpe([("Ġ", "c")], letters="abcdĠĊ.")
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return core
    core = bpe([("▁", "c"), ("▁", "\n")], prepend=how == "prepend", letters="abcd▁\n.")
    if how == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    return core


@pytest.mark.parametrize("response", ["cd", "c d", "\nc", ".c"])
@pytest.mark.parametrize("how", ["prepend", "metaspace", "byte level"])
def test_space(how, response):
    """If a prompt ends in a space that merges with the response, no other space takes its place."""
    tokenizer, report = Tokenizer(with_space(how), EOS, rewards=True), DataReport()
    (encoded,) = tokenize_pairs([pair("ab ", response, "d")], tokenizer, 30, report=report)
    merged = response[0] == "c" or (response[0] == "\n" and how != "byte level")
    (said,) = [line for line in report.lines() if "1 responses tokenized apart" in line] or [""]
    assert said.endswith("transformers makes other ids of the whole text there") == merged
    spelled = "".join(map(tokenizer.piece, encoded.prompt + encoded.chosen[:-1]))
    assert spelled.translate({ord("Ġ"): " ", ord("▁"): " ", ord("Ċ"): "\n"}) == " ab " + response


def test_positions():
    """Positions of rejected restart where the prompt ended, and only responses are scored."""
    tokenizer = Tokenizer(bpe(), EOS)
    rows = describe_pair(tokenizer.encode_pair(pair("a</s>", "</s>d", "e")), tokenizer)
    assert [(row["role"], row["position"], row["piece"], row["scored"]) for row in rows] == [
        ("prompt", 0, "a", False),
        ("prompt", 1, "</s>", False),
        ("chosen", 2, "</s>", True),  # EOS inside is no end.
        ("chosen", 3, "d", True),
        ("eos", 4, "</s>", True),
        ("rejected", 2, "e", True),
        ("eos", 3, "</s>", True),
    ]


@pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/models/stories260k is not here")
def test_published():
    """A published Llama tokenizer puts BOS first and no space before a response, like transformers."""
    tokenizer = Tokenizer.from_pretrained(STORIES)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (2, 1, 512)
    prompt, response = "\n\nHuman: Tell me a story.\n\nAssistant:", ", Lily 😀\n\n"
    encoded = tokenizer.encode_pair(pair(prompt, response, " and"))
    assert encoded.prompt.index(1) == 0 and 1 not in encoded.prompt[1:] + encoded.chosen
    foil = tokenizer.encode(response, add_special_tokens=False)
    assert [tokenizer.piece(first[0])[0] for first in (foil, encoded.chosen)] == ["▁", ","]
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(STORIES)
    assert encoded.prompt + encoded.chosen == [*theirs(prompt + response)["input_ids"], theirs.eos_token_id]
    assert tokenizer.decode(encoded.chosen) == theirs.decode(encoded.chosen, skip_special_tokens=True)
    assert tokenizer.encode("") == theirs("")["input_ids"] == [1]
