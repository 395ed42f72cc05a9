"""Prompt and response are tokenized apart, the response's tokens are scored, and limits cut and count."""

import weakref
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers, processors

from characters import BOS, EOS, bpe, ids, pair
from minidpo.data import DataReport, FileReport, PreferencePair, Prompt, Tokenizer, TokenPair, tokenize_pairs
from minidpo.errors import UserError

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"


@pytest.mark.parametrize(
    ("core", "texts", "expected"),
    [
        # The tokenizer merges "bc" across the boundary of one response, and of both.
        (bpe([("b", "c")]), ("ab", "cd", "dc"), (ids("ab"), ids("cd"), ids("dc"))),
        (bpe([("b", "c")], bos=True), ("ab", "cc", "ce"), ([BOS, *ids("ab")], ids("cc"), ids("ce"))),
        # It prepends a space to every text, but a response is not a text of its own.
        (bpe(bos=True, prepend=True), ("ab", "cd", " d"), ([BOS, *ids("▁ab")], ids("cd"), ids("▁d"))),
        # EOS is in the response already; EOS inside is no end.
        (bpe(), ("a", "bc", "de</s>"), (ids("a"), ids("bc"), ids("de"))),
        (bpe(), ("a", "b</s>c", "d"), (ids("a"), [*ids("b"), EOS, *ids("c")], ids("d"))),
    ],
)
def test_boundary(core, texts, expected):
    """Prompt ids are those of the prompt alone, response ids what follows them, then EOS, once."""
    prompt, chosen, rejected = expected
    encoded = Tokenizer(core, EOS).encode_pairs([pair(*texts)])[0]
    assert encoded == TokenPair(prompt, [*chosen, EOS], [*rejected, EOS], 0)


@pytest.mark.parametrize(
    ("single", "last"), [("$A </s>", "</s>"), ("<s> $A </s>", "</s>"), ("<s> $A j", "j")]
)
def test_post_processor(single, last):
    """A post-processor that ends every text with EOS, or another token, ends neither prompt nor response."""
    core = bpe([("b", "c")])
    special = [("<s>", BOS), (last, core.token_to_id(last))]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer, prompt = Tokenizer(core, EOS), [BOS, *ids("a")] if "<s>" in single else ids("a")
    assert tokenizer.prompt_ids(Prompt("a")) == prompt
    bc = core.token_to_id("bc")  # not "b" and "c": the response is not taken for one that merges
    assert tokenizer.encode_pairs([pair("a", "bc", "d")])[0][:3] == (prompt, [bc, EOS], [*ids("d"), EOS])


def test_bos_in_the_text():
    """A prompt that begins with BOS gets no second one, and the report counts it; a template's gets none."""
    tokenizer, report = Tokenizer(bpe(bos=True), EOS), DataReport()
    templated = PreferencePair("<s>a", "b", "c", 2, add_special_tokens=False)
    pairs = [pair("<s>a", "b", "c", 0), pair("a", "b", "c", 1), templated, pair("a", "b", "c", 3)]
    encoded = list(tokenize_pairs(pairs, tokenizer, 9, report=report))
    assert [(p.index, p.prompt) for p in encoded] == [(i, [BOS, *ids("a")]) for i in range(4)]
    assert "  1 prompts begin with BOS, and get no second one" in report.lines()
    assert Tokenizer(bpe(), EOS).encode("<s>a") == [BOS, *ids("a")]  # A tokenizer that adds none keeps it.


@pytest.mark.parametrize("response", ["cd", "c d", "\nd", ".c"])
@pytest.mark.parametrize(
    ("before", "space"),
    [
        (None, "▁"),  # The normalizer puts a space before every text.
        (pre_tokenizers.Metaspace(prepend_scheme="always", split=True), "▁"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "Ġ"),  # It writes a line break as Ċ.
    ],
)
def test_space(before, space, response):
    """If a prompt ends in a space that merges with the response, no other space takes its place."""
    core = bpe([(space, "c"), ("\n", "c"), (space, "\n")], prepend=not before, letters=f"abcd{space}\nĊ.")
    core.pre_tokenizer = before
    tokenizer = Tokenizer(core, EOS)
    encoded = tokenizer.encode_pairs([pair("ab ", response, "d")])[0]
    spelled = "".join(map(tokenizer.piece, encoded.prompt + encoded.chosen[:-1]))
    assert spelled.translate({ord("Ġ"): " ", ord("▁"): " ", ord("Ċ"): "\n"}) == " ab " + response


@pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/models/stories260k is not here")
def test_published():
    """A published Llama tokenizer puts BOS first and no space before a response, like transformers."""
    tokenizer = Tokenizer.from_pretrained(STORIES)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (2, 1, 512)
    prompt, response = "\n\nHuman: Tell me a story.\n\nAssistant:", ", Lily 😀\n\n"
    encoded = tokenizer.encode_pairs([pair(prompt, response, " and")])[0]
    assert encoded.prompt.index(1) == 0 and 1 not in encoded.prompt[1:] + encoded.chosen
    foil = tokenizer.encode(response, add_special_tokens=False)
    assert [tokenizer.piece(first[0])[0] for first in (foil, encoded.chosen)] == ["▁", ","]
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(STORIES)
    assert encoded.prompt + encoded.chosen == [*theirs(prompt + response)["input_ids"], theirs.eos_token_id]
    assert tokenizer.decode(encoded.chosen) == theirs.decode(encoded.chosen, skip_special_tokens=True)
    assert tokenizer.encode("") == theirs("")["input_ids"] == [1]


# Limits

EMPTY, IDENTICAL = "truncation left a response empty", "responses identical as tokens or after truncation"


@pytest.mark.parametrize(
    ("texts", "left", "cuts"),
    [  # max_length 5: a prompt of 2 tokens leaves 3 to each response, EOS included.
        (("ab", "cde", "fghi"), (ids("ab"), ids("cde"), ids("fgh")), 2),  # To lose only EOS is a cut, too.
        (("ab", "c", "cd"), (ids("ab"), [*ids("c"), EOS], [*ids("cd"), EOS]), 0),
        (("ab", "c", "defghij"), (ids("ab"), [*ids("c"), EOS], ids("def")), 1),
        # max_prompt_length 3: the prompt loses its beginning, and 2 tokens are left to each response.
        (("abcdef", "g", "hij"), (ids("def"), [*ids("g"), EOS], ids("hi")), 1),
    ],
)
def test_cut(texts, left, cuts):
    """Each response has the rest of max_length to itself, and no EOS after a cut."""
    report = DataReport()
    kept = list(tokenize_pairs([pair(*texts)], Tokenizer(bpe(), EOS), 5, 3, report))
    assert kept == [TokenPair(*left, 0)] and report.truncated_responses == cuts


@pytest.mark.parametrize(
    ("core", "prompt", "limit", "left"),
    [
        (bpe(), "abcdefgh", 4, ids("efgh")),
        (bpe(bos=True), "abcdefgh", 4, [BOS, *ids("fgh")]),
        (bpe(bos=True), "abcdefgh", 1, [BOS]),
        (bpe(), "<s>abcd", 2, ids("cd")),  # BOS that only the text has is cut like any other token.
        # Responses are tokenized before the cut, so none gets the space of a text's beginning.
        (bpe(prepend=True), "abcd", 1, ids("d")),
    ],
)
def test_long_prompt(core, prompt, limit, left):
    """A long prompt keeps its end, and the BOS of its tokenizer."""
    report = DataReport()
    (cut,) = tokenize_pairs([pair(prompt, "i", "j")], Tokenizer(core, EOS), 9, limit, report)
    assert cut == TokenPair(left, [*ids("i"), EOS], [*ids("j"), EOS], 0) and report.truncated_prompts == 1


@pytest.mark.parametrize(
    ("texts", "options", "reason"),
    [
        (("", "f", "g"), {}, "the prompt has no token, so nothing predicts the first token of a response"),
        (("abcde", "f", "g"), {}, EMPTY),
        (("a", "bcde", "bcdf"), {}, IDENTICAL),
        (("a", "b", "b"), {}, IDENTICAL),
        (("a", "b", "b"), {"whole": True}, None),
        (("a", "bc", "bcd"), {"whole": True}, "longer than max_length"),  # a, b, c, d, EOS
        (("a", "bc", "b"), {"whole": True}, None),
    ],
)
def test_dropped(texts, options, reason):
    """A pair of which the limits leave nothing to compare is dropped, and counted by file and record."""
    files = [FileReport("x/a.jsonl", "text", 1), FileReport("x/b.jsonl", "text", 4)]
    report, pairs = DataReport(files), [PreferencePair(*texts, 3, file=1), pair("a", "f", "g", 0)]
    kept = list(tokenize_pairs(pairs, Tokenizer(bpe(), EOS), 4, report=report, **options))
    assert [p.index for p in kept] == ([0] if reason else [3, 0])
    assert report.dropped == ({reason: ["b.jsonl:3"]} if reason else {})


@pytest.mark.parametrize(
    ("max_length", "max_prompt_length", "said"),
    [
        (3, 3, "no pair is left to use with max_length = 3 .dropped 1: truncation left a response empty"),
        (9, 0, "max_prompt_length = 0 must lie between 1 and max_length = 9"),
        (9, 10, "max_prompt_length = 10 must lie between 1 and max_length = 9"),
    ],
)
def test_limits(max_length, max_prompt_length, said):
    """Limits that contradict each other, or leave no pair, are refused with the reasons."""
    with pytest.raises(UserError, match=said):
        list(tokenize_pairs([pair("abc", "d", "e")], Tokenizer(bpe(), EOS), max_length, max_prompt_length))


def test_report():
    """The report counts tokens before and after the cut, and warns of messages that lost their beginning,
    where a system turn stands."""
    of_messages, report = PreferencePair("bcd", "e", "f", 1, messages=True), DataReport()
    list(tokenize_pairs([pair("abcd", "e", "fghij"), of_messages], Tokenizer(bpe(), EOS), 5, 2, report))
    lost = "1 prompts of messages lost their beginning, with any system turn"
    assert list(report.lines()) == [
        "tokenized 2 pairs, 2 kept",
        "  truncated 2 prompts and 1 responses (max_length 5, max_prompt_length 2)",
        f"  warning: {lost}; raise data.max_prompt_length to keep them whole",
        "  prompt tokens before any cut: median 4, 95 % at most 4, longest 4",
        "  chosen tokens before any cut: median 2, 95 % at most 2, longest 2",
        "  rejected tokens before any cut: median 4, 95 % at most 6, longest 6",
    ]


def test_memory():
    """Pairs come out in order, and only a part of the texts is in memory."""
    alive, counts = weakref.WeakSet(), []

    def texts():
        for i in range(2000):
            text = pair("a", "b", "c", i)
            alive.add(text)
            yield text
            counts.append(len(alive))

    kept = tokenize_pairs(texts(), Tokenizer(bpe(), EOS), 50)
    assert [p.index for p in kept] == list(range(2000)) and max(counts) < 1000
