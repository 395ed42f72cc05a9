"""What a command cannot do is refused in one line that says what would be right, and nothing is written."""

import shutil
import sys
from pathlib import Path

import pytest

from minidpo.__main__ import main
from minidpo.errors import UserError
from minidpo.model import save_model, save_reward_model
from record_files import GOOD, write
from tiny import tiny_model, tiny_reward_model, write_tokenizer

MODEL = "--model {world}/model "
SCORE = f"score {MODEL}--data {{world}}/pairs.jsonl.gz --out {{files}}/scores.jsonl "
EXPLAIN = f"explain {MODEL}--json "
RECORD = f"{EXPLAIN}--data {{world}}/pairs.jsonl.gz "
TYPED = f"{EXPLAIN}--prompt a --chosen b --rejected c "
SAMPLE = f"sample {MODEL}--max-new-tokens 6 "
BEST = f"{SAMPLE}--prompt a --reward-model {{files}}/reward --n 2 "
DATA = f"data {MODEL}{{files}}/one.jsonl "
BENCH = "bench --shape B "
LONG = "'" + "a" * 999 + "'"

ROWS = [
    (SCORE + "--max-length 0", "max_prompt_length = 0 must lie between 1"),
    (SCORE + "--max-length 999", "the model takes 256"),
    (SCORE + "--reference nowhere", "nowhere"),
    (SCORE + "--reference {files}/foreign", "its tokenizer has other ids than the model's"),
    (SCORE + "--model {files}/run/final", "the run is not finished: .*/checkpoints has what it has saved"),
    (SCORE + "--model {files}/reward", "'score.weight' .* a reward model's .score: --reward-model."),
    (SCORE + "--adapter {files}", "an adapter is needed, .*; .*/adapter is one"),
    (SCORE + "--beta 0.1", "--beta goes with --reference"),
    (SCORE + "--reference {world}/other --beta nan", "dpo: beta is nan; it must be > 0"),
    (SCORE + "--data {files}/many.jsonl --by id", "--by id: 51 different values"),
    (EXPLAIN, "give a pair either as --data"),
    (RECORD + "--index 1 --prompt a", "give a pair either as --data"),
    (RECORD + "--index -1", "K from 0 on"),
    (RECORD + "--index 40", "has 40 records; the last is 39"),
    (RECORD + "--index 1" + "0" * 20, "has 40 records; the last is 39"),
    (EXPLAIN + "--data nowhere.jsonl --index 0", "nowhere.jsonl: No such file"),
    (EXPLAIN + "--data {files}/bad.jsonl --index 0", "bad.jsonl:1: no key 'chosen'"),
    (EXPLAIN + "--data {files}/bad.jsonl --index 1", "bad.jsonl:3: nothing but blanks"),
    (TYPED + "--index 0", "all three and no --index"),
    (TYPED + "--max-length 2", "more than max_length = 2; raise it"),
    (TYPED + "--max-length 999", "the model takes 256"),
    (TYPED + f"--prompt {LONG}", "more than max_length = 256; the model takes no longer one"),
    (TYPED + "--reference {files}/foreign", "other ids than the model's"),
    (TYPED + "--loss kto", "--loss kto: it compares with z0, a mean over a whole batch"),
    (TYPED + "--margin-from-data", "reads the record's margin, and this pair has none"),
    (TYPED + "--gamma 2", "the loss dpo has no such setting; it has --beta, --label-smoothing"),
    (TYPED + "--loss sft --beta 2", "the loss sft has no such setting; it has no settings"),
    (SAMPLE + "--data {files}/bad.jsonl", "bad.jsonl:1: no prompt; "),
    (SAMPLE + "--data {files}/messages.jsonl", "no chat_template in .*--template hh"),
    (SAMPLE + "--data {files}/torn.jsonl", "torn.jsonl:1: not JSON in UTF-8"),
    (SAMPLE + "--data {files}/empty.jsonl", "no prompt in the file"),
    (SAMPLE + "--prompt caf\udce9", "^--prompt: .* has half a surrogate pair"),
    (BEST + "--n 1", "--n is 1; give at least 2"),
    (BEST + "--reward-model nowhere", "nowhere"),
    (SAMPLE + "--prompt a --pairs-out {files}/p", "--pairs-out goes with --reward-model"),
    (SAMPLE + "--prompt a --system b", "--system goes with --human"),
    (BEST + "--pairs-out {files}", "--pairs-out .*: a file in a directory"),
    (BEST + "--out {files}/p --pairs-out {files}/p", "give two files"),
    (f"score {MODEL}--data {{files}}/one.jsonl --out {{files}}/one.jsonl", "is read here"),
    (SAMPLE + "--data {files}/one.jsonl --out {files}/one.jsonl", "is read here"),
    (SAMPLE + "--prompts-file {files}/one.jsonl --out {files}/one.jsonl", "is read here"),
    (f"explain {MODEL}--data {{files}}/one.jsonl --index 0 --html {{files}}/one.jsonl", "is read here"),
    (DATA + "--out {files}/one.jsonl", "--out .*one.jsonl: is read here, or in a directory"),
    (DATA + "--column question", "--column question: give NAME=KEY, NAME one of prompt, system, chosen"),
    (DATA + "--column question=q", "--column question=q: give NAME=KEY"),
    (DATA + "--limit -1", "data: limit is -1; it must be >= 0"),
    (DATA + "--held-out=a", "goes with the configuration of .*: python -m minidpo data RUN.toml --data"),
    ("report {files}/begun --out {files}/begun/metrics.jsonl", "is read here"),
    ("report {files}/spoken --out {files}/one.jsonl", "--out .*one.jsonl: is read here"),
    ("report {files}/begun/metrics.jsonl", "not the final/ or a file in it"),
    ("report {files}/begun --out nowhere/a.html", "--out nowhere/a.html: a file in a directory that exists"),
    ("plot {files}/begun", "no step in it yet"),
    ("plot {files}/others", "nothing that plot draws"),
    ("plot {files}/huge", "nothing that plot draws"),
    ("plot {files}/spoilt", "metrics.jsonl:2: "),
    ("plot" + " x" * 10, "10 runs; at most 9"),
    ("frontier --out {files}/f --quick --demo runs/demo", "leave out --demo"),
    ("frontier --out {files}/f --demo {files}", "prompts.test.jsonl: no such file; .* the demo has written"),
    (BENCH + "--steps 0", "--steps 0; it must be >= 1"),
    (BENCH + "--data pairs.jsonl", "--data needs a tokenizer"),
    (BENCH + "--against trl --loss sft", "--loss sft has no counterpart"),
    (BENCH + "--against textbook --loss ipo", "plain DPO alone"),
    (BENCH + "--against trl", "extra `peers`"),
    (BENCH + "--their-passes 3", "must divide the 8 pairs"),
]
METRICS = {
    "begun": '{"step": 1',
    "others": '{"step": 1, "other": 2}\n',
    "huge": '{"step": 1, "loss": 1' + "0" * 400 + "}\n",
    "spoken": '{"step": 1, "loss": 1}\n',
    "spoilt": '{"step": 1}\n{"step": 2, "loss": 0.\n{"step": 3}\n',
}


@pytest.fixture(scope="module")
def files(world, tmp_path_factory) -> Path:
    """Records, models and runs that something is wrong with, or that are right elsewhere."""
    files = tmp_path_factory.mktemp("files")
    write(files / "one.jsonl", {"prompt": "a", "chosen": "b"})
    write(files / "bad.jsonl", {"answer": "b"}, "", {**GOOD, "chosen": " "})
    write(files / "many.jsonl", *({**GOOD, "id": k} for k in range(51)))
    write(files / "messages.jsonl", {"prompt": [{"role": "user", "content": "a"}]})
    write(files / "torn.jsonl", "{")
    write(files / "empty.jsonl", "")
    for name, lines in METRICS.items():
        (files / name).mkdir()
        (files / name / "metrics.jsonl").write_text(lines)
    run = (f'model.path = "{world}"', f'data.train = ["{files}/one.jsonl"]', f'run.out = "{files}/spoken"')
    write(files / "spoken" / "config.toml", *run)
    (files / "run" / "checkpoints").mkdir(parents=True)
    (files / "adapter").mkdir()
    (files / "adapter" / "adapter_config.json").touch()
    shutil.copytree(world / "model", files / "sft" / "final")
    shutil.copytree(world / "model", files / "reward")
    save_reward_model(tiny_reward_model(vocab_size=300), files / "reward")
    write_tokenizer(files / "foreign", ["Human: a cat"], vocabulary=290)
    save_model(tiny_model(vocab_size=300), files / "foreign")
    return files


@pytest.mark.parametrize(("command", "says"), ROWS)
def test_refused(world, files, monkeypatch, command, says):
    """A wrong argument is one line that says what would be right, and no file is written."""
    if command.startswith(("plot", "frontier")):
        pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it were not installed
    before = {path: path.is_file() and path.read_bytes() for path in files.rglob("*")}
    with pytest.raises(UserError, match=says) as error:
        main(command.format(world=world, files=files).split())
    assert "\n" not in str(error.value)
    assert {path: path.is_file() and path.read_bytes() for path in files.rglob("*")} == before
