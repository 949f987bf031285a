"""scripts/inspect_data.py: what it tells of a corpus, of rows, of a step, and of what is wrong."""

import itertools
import json
import random
import re
import shutil

import inspect_data
import numpy as np
import prepare_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import checkpoint
from config import load
from dataset import open_dataset
from documents import read_unit
from resume import STATE_FILE, TrainState, learned
from stream import PADDING, Cursor

WORDS = [f"word{i}" for i in range(300)]


def some_text(seed, words=120):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "a.parquet"
    texts = [some_text(seed, 20 + seed % 200) for seed in range(300)]
    pq.write_table(pa.table({"text": [*texts, texts[5], ""]}), path, row_group_size=40)
    return path


SETTINGS = ["data.tokenizer=bytes", "data.val_fraction=0.1", "data.seq_len=64", "train.batch_tokens=256",
            "train.micro_batch=2", "run.name=never-run"]  # fmt: skip


def run(capsys, command, corpus, *more):
    code = inspect_data.main([command, "--config", "quickstart", f"data.sources={corpus}", *SETTINGS, *more])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_stats_counts_what_is_there(corpus, capsys):
    texts = [text for text in pq.read_table(corpus)["text"].to_pylist() if text]
    code, out, _ = run(capsys, "stats", corpus)
    told = {line[:26].strip(): line[26:].split()[0] for line in out.splitlines() if len(line) > 26}
    assert code == 0 and told["documents"] == "301" and told["exact repetitions"] == "1"
    size = sum(map(len, texts))
    assert told["tokens"] == f"{size + 301:,}" and told["bytes"] == told["characters"] == f"{size:,}"
    assert told["unique characters"] == str(len(set("".join(texts)))) and told["lines"] == "301"
    assert float(told["bytes per token"]) == pytest.approx(size / (size + 301), abs=1e-3)
    longest = max(map(len, texts))
    assert f"most {longest:,}" in out
    past = sum(max(0, len(text) + 1 - 64) for text in texts) / (size + 301)
    assert f"past data.seq_len = 64: {past:.1%}" in out
    assert "documents                                7\n" in run(capsys, "stats", corpus, "--documents", "7")[1]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_trace_names_the_documents_of_a_step(corpus, capsys, packing):
    code, out, _ = run(capsys, "trace", corpus, "--step", "5", f"data.packing={packing}")
    assert code == 0
    config = load("quickstart", [f"data.sources={corpus}", *SETTINGS, f"data.packing={packing}"])
    dataset = open_dataset(config)
    batch = next(itertools.islice(dataset.feed(config, Cursor()).batches(), 4, None))
    rows = re.split(r"row \d of step 5: \d+ tokens\n", out)[1:]
    assert len(rows) == config.rows_per_step
    for row, told in zip(batch.tokens, rows, strict=True):
        ids = []
        for line in told.splitlines():
            start, stop, group, number = map(
                int, re.search(r"tokens (\d+)-(\d+) of .*a\.parquet, row group (\d+), document (\d+):", line).groups()
            )
            documents = read_unit(dataset.manifest.units[group])
            text = documents.items[documents.rows.tolist().index(number)]
            whole = [*dataset.encoder([text])[0].tolist(), dataset.encoder.eos]
            if packing == "best_fit":
                ids.append(dataset.encoder.eos)
                assert start == 0
            ids += whole[start:stop] if packing == "concat" else whole[: stop - start]
        kept = row[row != PADDING][: len(ids)] if packing == "best_fit" else row
        assert np.array_equal(ids[: len(kept)], kept[: len(ids)]) and len(ids) >= 60


def a_run(folder, config, dataset, steps):
    """What a run of 9 steps leaves: lines of the metrics at `steps`, a checkpoint of the last."""
    batches = list(itertools.islice(dataset.feed(config, Cursor()).batches(), 9))
    lines = [{"step": step, "cursor": batches[step - 1].cursor.to_dict()} for step in steps]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "cur')
    state = TrainState(learned(config), dataset.manifest.fingerprint, dataset.fingerprint, "fp32", step=9)
    checkpoint.save(folder / "checkpoints", 9, {}, {STATE_FILE: state.to_json()}, keep=1)
    return batches


def test_trace_goes_on_from_the_nearest_line_of_the_metrics(corpus, tmp_path, capsys):
    config = load("quickstart", [f"data.sources={corpus}", f"run.dir={tmp_path / 'nothing'}", *SETTINGS])
    dataset = open_dataset(config)
    batches = a_run(tmp_path / "run", config, dataset, (3, 6, 9))
    capsys.readouterr()
    near = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(tmp_path / "run")})})
    assert inspect_data.cursor_before(near, dataset, 8) == (6, batches[5].cursor)
    assert inspect_data.cursor_before(near, dataset, 3) == (0, Cursor())
    assert inspect_data.trace(config, dataset, 8) == 0
    far = capsys.readouterr().out
    assert inspect_data.trace(near, dataset, 8) == 0
    assert capsys.readouterr().out == far and far.count("of step 8") == config.rows_per_step


def test_a_run_s_place_is_not_taken_for_that_of_other_data(corpus, tmp_path, capsys):
    """What another configuration deals to a step is not told from where this run was."""
    here = f"run.dir={tmp_path / 'run'}"
    config = load("quickstart", [f"data.sources={corpus}", *SETTINGS, here])
    a_run(tmp_path / "run", config, open_dataset(config), (4,))
    other = tmp_path / "other.txt"
    other.write_text("something else, and more of it\n\n" * 3000)
    capsys.readouterr()
    for changed, said in (
        (
            f"data.sources={other}",
            "the checkpoint was trained with ['a.parquet'], the configuration says ['other.txt']",
        ),
        ("data.seq_len=32", "data.seq_len: the checkpoint was trained with 64, the configuration says 32"),
        ("data.packing=best_fit", "trained with 'concat', the configuration says 'best_fit'"),
        ("train.seed=5", "train.seed: the checkpoint was trained with 1337, the configuration says 5"),
        ("data.tokenizer=chars", "data.tokenizer: the checkpoint was trained with 'bytes'"),
    ):
        code, out, err = run(capsys, "peek" if "seed" in changed else "trace", corpus, here, changed, "--step", "6")
        last = err.splitlines()[-1]
        assert (code, out) == (2, "") and said in last and "run.name=..." in last, err
    same_rows = ("optim.lr=1e-4", "data.workers=0", "model.aux_loss_alpha=0.01")
    assert run(capsys, "trace", corpus, here, *same_rows, "--step", "6")[0] == 0
    code, out, _ = run(capsys, "peek", corpus, here, f"data.sources={other}")  # from the start: of no run
    assert code == 0 and "something else" in out
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # this run will begin again, with whatever it is given
    code, out, _ = run(capsys, "trace", corpus, here, f"data.sources={other}", "--step", "6")
    assert code == 0 and out == run(capsys, "trace", corpus, f"data.sources={other}", "--step", "6")[1]


def test_peek_shows_rows_as_text(corpus, capsys):
    code, out, _ = run(capsys, "peek", corpus, "--rows", "3", "data.packing=best_fit")
    assert code == 0 and out.count("==== row ") == 3 and "==== row 0: 64 tokens, " in out
    texts = pq.read_table(corpus)["text"].to_pylist()
    body = out.split("\n---- ")[1]
    assert re.match(r".*a\.parquet, row group \d+, document \d+\n", body)
    shown = body.split("\n", 1)[1].split("\n====")[0].strip().removesuffix("<|endoftext|>")
    assert any(text.startswith(shown[:60]) for text in texts)


def test_control_characters_do_not_reach_the_terminal(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "evil \x1b[31m " * 40}) + "\n" + json.dumps({"text": "x"}))
    for command in ("peek", "trace", "stats", "doctor"):
        more = ["--step", "1"] if command == "trace" else []
        code, out, _ = run(capsys, command, tmp_path / "a.jsonl", *more)
        assert code == 0 and "\x1b" not in out


def test_the_doctor_finds_nothing_in_good_data(corpus, capsys):
    code, out, _ = run(capsys, "doctor", corpus)
    assert code == 0 and "FAIL" not in out and "warn" not in out.replace("warn about", ""), out
    for said in ("a.parquet is local", "301 documents in 8 of 8 units", "epochs", "fit model.vocab_size = 2,048",
                 "documents come back from their tokens unchanged", "0 held-out documents are also trained on",
                 "GiB free"):  # fmt: skip
        assert said in out


def test_the_doctor_finds_leaks_bad_documents_and_repetition(tmp_path, capsys):
    texts = [some_text(seed, 200) for seed in range(150)]
    near = [f"{text} and one more thing {i}" for i, text in enumerate(texts)]  # nearly the same, on either side
    lines = [json.dumps({"text": text}) for text in (*texts, *near)] + ["{broken"] * 40
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    code, out, _ = run(capsys, "doctor", tmp_path / "a.jsonl", "train.steps=100000")
    assert code == 1 and "FAIL 300 documents in 1 of 1 units read, 11.76% unreadable" in out
    found = re.search(r"warn (\d+) of (\d+) held-out documents .* nearly repeat one of", out)
    assert found and int(found[1]) > 0.6 * int(found[2]) > 10
    assert re.search(r"warn about [\d,]+ tokens there, 25,600,000 asked for: [\d.]+ epochs", out)


def test_the_doctor_warns_of_row_groups_that_fill_the_memory(corpus, capsys, monkeypatch):
    """pandas writes a million documents to a group, and sixteen groups are held."""
    monkeypatch.setattr(inspect_data, "HELD_BYTES", 1000)
    code, out, _ = run(capsys, "doctor", corpus)
    assert code == 0 and "warn two shuffle windows of 8 units take over 0.0 GiB of memory in each rank; lower" in out


def test_near_duplicates_are_those_of_the_theory():
    """A pair of Jaccard J is caught with probability 1 - (1 - J^8)^14; what is far apart is not told at all."""
    draw = random.Random(0)
    training, held_out = [], []
    for i in range(150):
        words = [f"w{draw.randrange(10**6)}" for _ in range(200)]
        training.append(" ".join(words))
        changed = list(words)
        for place in range(10, 200, 45):  # five words changed: 25 of 196 word 5-grams, Jaccard 171 / 221
            changed[place] = f"other{i}"
        held_out.append(" ".join(changed))
    held_out += [" ".join(f"w{draw.randrange(10**6)}" for _ in range(200)) for _ in range(150)]
    near = inspect_data.near_duplicates(held_out, training)
    assert all(mine == theirs < 150 and jaccard == pytest.approx(171 / 221, abs=0.01) for mine, theirs, jaccard in near)
    expected = 1 - (1 - (171 / 221) ** 8) ** 14
    assert abs(len(near) / 150 - expected) < 3 * (expected * (1 - expected) / 150) ** 0.5


def test_shards_are_inspected_like_text(corpus, tmp_path, capsys):
    out = tmp_path / "shards"
    arguments = ["--config", "quickstart", "--out", str(out), f"data.sources={corpus}", *SETTINGS]
    assert prepare_data.main(arguments) == 0
    capsys.readouterr()
    given = ["--config", "quickstart", f"data.sources={out}", *SETTINGS[1:], f"data.tokenizer={out / 'tokenizer'}"]
    assert inspect_data.main(["trace", *given, "--step", "5"]) == 0
    mapped = capsys.readouterr().out
    assert (
        inspect_data.main(["trace", "--config", "quickstart", f"data.sources={corpus}", *SETTINGS, "--step", "5"]) == 0
    )
    streamed = capsys.readouterr().out
    assert re.sub(r"of .*?a\.parquet( \(in .*?\))?", "of a.parquet", mapped) == re.sub(
        r"of .*?a\.parquet", "of a.parquet", streamed
    )
    for command in ("stats", "doctor", "peek"):
        assert inspect_data.main([command, *given]) == 0


def test_mistakes_are_one_line(corpus, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text("{broken\n" * 5)
    once = f"data.sources=[{{path: {corpus}, epochs: 1}}]"
    for given, said in (
        (["trace", "--config", "quickstart"], "trace needs --step S"),
        (["trace", "--config", "quickstart", "--step", "0"], "'0' is not a number from 1 on"),
        (["look", "--config", "quickstart"], "invalid choice: 'look'"),
        (["stats", "--config", "quickstart", "data.sources=none.txt"], "no such file"),
        (
            ["stats", "--config", "quickstart", f"data.sources={tmp_path / 'bad.jsonl'}", "data.tokenizer=bytes"],
            "no document can be read; 5 are unreadable",
        ),
        (["peek", "--config", "quickstart", once, *SETTINGS, "--step", "9999"], "last epoch ends before it"),
        (["trace", "--config", "quickstart", once, *SETTINGS, "--step", "9999"], "last epoch ends before it"),
    ):
        assert inspect_data.main(given) == 2
        told = capsys.readouterr().err.removeprefix(
            "making a tokenizer (bytes, at most 2048 tokens) from the sources\n"
        )
        assert said in told and told.count("\n") == 1, told
