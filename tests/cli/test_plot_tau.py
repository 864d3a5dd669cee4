"""plot-tau: its table and pictures of a text, what it reads, and what it refuses."""

import csv
import json
import random
import re
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from command_line import PAGE, ROOT, call, error

from tempnet_kernels.cli import plot_tau
from tempnet_kernels.core import register
from tempnet_kernels.nn import (
    TempNet,
    load_tempnet,
    save_tempnet,
)


@pytest.fixture
def ordinary_memory():
    """A model of transformers is no test of unwritten memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the page makes."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    path = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        torch.manual_seed(0)
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
            exec(block, {"__name__": "__main__"})
    return path


def model_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model").eval()


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_commands_of_the_page_run(folder, ordinary_memory):
    commands = "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S)).splitlines()
    assert len(commands) >= 4
    for command in commands[1:]:  # env has a test of its own
        result = subprocess.run(
            command.replace("python", sys.executable, 1), shell=True, cwd=folder, text=True,
            capture_output=True, env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, timeout=120,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "perplexity at z / tau" in result.stdout and "hottest tokens" in result.stdout
    assert json.loads((folder / "facts.json").read_text())["tempnets"][0]["vocab_size"] == 256
    assert len(rows_of(folder / "tau.csv")) == 499
    from matplotlib.image import imread

    for name in ("text", "entropy", "histogram"):
        picture = imread(folder / f"tau.{name}.png")[..., :3]
        assert picture.shape[0] > 200 and picture.std() > 0.05, "something is drawn"


def test_table_equals_a_direct_computation(folder, tmp_path, ordinary_memory):
    """Windows of 64, the model's context: a token after the first window has at least 32 before."""
    text = (folder / "text.py").read_text()[:300] + "é\n\"quoted\",\t'x'"
    (tmp_path / "text.txt").write_text(text)
    result = call("plot-tau", folder / "model", tmp_path / "text.txt", "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "a.csv")
    assert text[0] + "".join(row["token"] for row in rows) == text
    assert [int(row["position"]) for row in rows] == list(range(1, len(text.encode())))
    model, net = model_of(folder), load_tempnet(folder / "model")
    ids = torch.tensor([int(row["token_id"]) for row in rows])
    ids = torch.cat([torch.tensor([sorted_id(folder, text[0])]), ids])
    n = len(ids)
    for p in (1, 40, 63, 64, 95, 96, 97, n - 1):
        # The window that scores the token at p: its end is the first that reaches it.
        end = next(e for e in (*range(64, n, 32), n) if e > p)
        with torch.no_grad():
            z = model(ids[None, max(0, end - 64) : p]).logits[0, -1].double()
        tau = net(z.float()).item()
        expected = {"tau": tau}
        for suffix, x in (("", z), ("_tempered", z / tau)):
            log_p = x.log_softmax(0)
            entropy = torch.special.entr(log_p.exp()).sum().item()
            expected |= {f"entropy{suffix}": entropy, f"log_prob{suffix}": log_p[ids[p]].item()}
            expected[f"kl{suffix}"] = torch.tensor(256.0).log().item() - entropy
        got = {name: float(rows[p - 1][name]) for name in expected}
        assert got == pytest.approx(expected, abs=1e-5)
    taus = torch.tensor([float(row["tau"]) for row in rows])
    assert taus.std() > 1e-3 and f"mean {taus.mean():.4f}" in result.stdout


def sorted_id(folder, character):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model")(character)["input_ids"][0]


def test_batches_do_not_change_the_table_and_tokens_cut_it(folder, tmp_path, ordinary_memory):
    tables = []
    for batch in (1, 3):
        options = ("--batch", batch, "--tokens", 150, "--window", 32)
        out = tmp_path / str(batch)
        result = call("plot-tau", folder / "model", folder / "text.py", "--out", out, *options)
        assert result.exit_code == 0, result.output
        tables.append([float(row["tau"]) for row in rows_of(f"{out}.csv")])
    assert len(tables[0]) == 149
    assert tables[0] == pytest.approx(tables[1], abs=1e-5)


def test_another_network_and_its_prefix(folder, tmp_path, ordinary_memory):
    net = TempNet(256, hidden_size=8)
    torch.save({"a": net.state_dict(), "b": net.state_dict()}, tmp_path / "a.pt")
    command = ("plot-tau", folder / "model", folder / "text.py", "--out", tmp_path / "a")
    command += ("--tokens", 40, "--tempnet", tmp_path / "a.pt")
    assert "choose with prefix, one of 'a.', 'b.'" in error(*command)
    assert "does not say tau_min" in error(*command, "--prefix", "a.")
    bounds = ("--tau-min", 3, "--tau-max", 4)
    assert call(*command, "--prefix", "a.", *bounds).exit_code == 0
    assert all(3 <= float(row["tau"]) <= 4 for row in rows_of(tmp_path / "a.csv"))


def test_plot_tau_refuses(folder, tmp_path, monkeypatch, ordinary_memory):
    model, text = folder / "model", folder / "text.py"
    out = ("--out", tmp_path / "a")
    command = ("plot-tau", model, text, *out)
    assert "gone, which is not there" in error("plot-tau", model, tmp_path / "gone", *out)
    assert f"{model}, which is a folder" in error("plot-tau", model, model, *out)
    assert "does not exist" in error("plot-tau", model, text, "--out", tmp_path / "b" / "a")
    assert f"pass one in it, {tmp_path / 'tau'}" in error(
        "plot-tau", model, text, "--out", tmp_path
    )
    assert "tokens must be >= 2, got 1" in error(*command, "--tokens", 1)
    assert "batch must be >= 1, got 0" in error(*command, "--batch", 0)
    assert "window must be in [2, 64] tokens, got 65" in error(*command, "--window", 65)
    nowhere = error("plot-tau", tmp_path / "nowhere", text, *out)
    assert "MODEL must be a folder or a name on the Hugging Face hub" in nowhere
    assert "pass the folder that it is in" in error("plot-tau", model / "config.json", text, *out)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert "latin.txt must be UTF-8" in error("plot-tau", model, tmp_path / "latin.txt", *out)
    (tmp_path / "short.txt").write_text("a")
    assert "at least two tokens" in error("plot-tau", model, tmp_path / "short.txt", *out)
    save_tempnet(TempNet(255, hidden_size=4), tmp_path / "other.safetensors")
    other = error(*command, "--tempnet", tmp_path / "other.safetensors")
    assert "takes V = 255 logits, the model gives 256" in other
    broken = TempNet(256, hidden_size=4)
    torch.nn.init.constant_(broken.last.bias, torch.nan)
    save_tempnet(broken, tmp_path / "broken.safetensors")
    nan = error(*command, "--tempnet", tmp_path / "broken.safetensors", "--tokens", 9)
    assert "8 of 8 tokens have a NaN" in nan
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "tempnet.safetensors").unlink()
    assert f"{bare} holds no TempNet: pass its checkpoint" in error("plot-tau", bare, text, *out)
    given = ("plot-tau", bare, text, *out, "--tempnet", model / "tempnet.safetensors")
    weights = (bare / "model.safetensors").read_bytes()
    (bare / "model.safetensors").write_bytes(weights[:500])
    assert f"AutoModelForCausalLM cannot read {bare}" in error(*given)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    assert f"AutoTokenizer cannot read {bare}" in error(*given)
    full = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
    with monkeypatch.context() as patch:
        patch.setattr(plot_tau, "_statistics", Mock(side_effect=full))
        assert "pass a smaller --batch or --window" in error(*command)
    with monkeypatch.context() as patch:
        patch.setattr(register, "missing", lambda *_: "the kernels are not built: build them")
        assert "plot-tau: the kernels are not built: build them" in error(*command)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers matplotlib" in error(*command)
    assert not list(tmp_path.glob("a.*"))


def trained(kind, text):
    """A tokenizer of transformers that was trained on ``text``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"special_tokens": ["<unk>"], "vocab_size": 400, "show_progress": False}
    if kind == "bytes":  # as GPT-2
        tokens = Tokenizer(models.BPE())
        tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokens.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **special
        )
    elif kind == "no words":  # as Llama-2
        tokens = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        tokens.normalizer = normalizers.Replace(" ", "▁")
        trainer = trainers.BpeTrainer(max_token_length=8, **special)
    elif kind == "unigram":  # as T5
        tokens = Tokenizer(models.Unigram())
        tokens.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **special)
    else:  # as BERT
        tokens = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokens.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**special)
    tokens.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>")


TEXTS = {
    "code": lambda code: code,
    "one long word": lambda code: "".join(random.Random(0).choices("ab", k=20_000)),
    "spaces": lambda code: ("a" + 3000 * " " + "\n" * 3000) * 5,
    "many bytes a character": lambda code: "é漢\r\n" * 4000,
    "short": lambda code: code[:60],
}


@pytest.mark.parametrize("kind", ["bytes", "no words", "unigram", "words"])
@pytest.mark.parametrize("text", TEXTS)
def test_first_tokens_are_those_of_the_whole_text(kind, text, folder, tmp_path, monkeypatch):
    """Little is read at first, so that there are many cuts."""
    code = (folder / "text.py").read_text()
    tokenizer = trained(kind, code)
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[text](code), encoding="utf-8", newline="")
    ids, pieces = plot_tau.pieces_of(tokenizer, path.read_text(encoding="utf-8"))
    assert kind == "words" or len(set(ids)) > 1
    monkeypatch.setattr(plot_tau, "CHARACTERS", 1)
    for count in (2, 3, 17, 100, 1001, len(ids), 10**6):
        with path.open(encoding="utf-8") as file:
            assert plot_tau.first_tokens(tokenizer, file, count) == (ids[:count], pieces[:count])


def test_a_long_text_is_read_as_far_as_its_tokens_are_wanted(folder, tmp_path, ordinary_memory):
    """What comes later is not UTF-8, which would be refused."""
    text = (folder / "text.py").read_bytes()
    assert len(text) > 8000
    (tmp_path / "text.txt").write_bytes(text * 20 + b"\xff" * 10**6)
    tables = []
    for path in (folder / "text.py", tmp_path / "text.txt"):
        command = ("plot-tau", folder / "model", path, "--out", tmp_path / "a", "--tokens", 100)
        result = call(*command)
        assert result.exit_code == 0, result.output
        tables.append(rows_of(tmp_path / "a.csv"))
    assert len(tables[0]) == 99 and tables[0] == tables[1]
    whole = error("plot-tau", folder / "model", tmp_path / "text.txt", "--out", tmp_path / "b")
    assert "text.txt must be UTF-8" in whole
