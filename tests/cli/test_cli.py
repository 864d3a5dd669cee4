"""inspect and plot-tau: what they say of a checkpoint and of a text, and what they refuse."""

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import tempnet_kernels
from tempnet_kernels.cli import app, plot_tau
from tempnet_kernels.core import register
from tempnet_kernels.nn import (
    ContrastiveTempNet,
    RobustContrastiveLoss,
    TempNet,
    load_tempnet,
    save_tempnet,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/integrations/command_line.md").read_text()


def call(*arguments):
    return CliRunner().invoke(app, [str(x) for x in arguments])


def facts(*arguments):
    result = call("inspect", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def error(*arguments):
    result = call(*arguments)
    # transformers and tqdm show their progress before it.
    _, found, message = result.stderr.partition("error: ")
    assert result.exit_code == 1 and found and message.count("\n") == 1, result.output
    return message


@pytest.fixture
def ordinary_memory():
    """A model of transformers is no test of unwritten memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False


def test_version():
    assert call("--version").stdout == f"tempnet_kernels {tempnet_kernels.__version__}\n"


@pytest.fixture
def elsewhere(tmp_path):
    """Stands for a built copy in site-packages."""
    package = tmp_path / "site" / "tempnet_kernels"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "lib" / "libtempnet_cpu.so").touch()
    return package


def test_a_hidden_installation_is_found(elsewhere, tmp_path, monkeypatch):
    here = Path(tempnet_kernels.__file__).parent
    (tmp_path / "link").symlink_to(here.parent)
    (tmp_path / "tempnet_kernels").mkdir()  # a folder without __init__.py is no package
    own = ["", str(tmp_path), str(here.parent), str(tmp_path / "link"), str(tmp_path / "gone")]
    monkeypatch.setattr(sys, "meta_path", [PathFinder])
    monkeypatch.setattr(sys, "path", own)
    monkeypatch.chdir(here.parent)
    assert register.hidden_installation() is None
    monkeypatch.setattr(sys, "path", [*own, str(elsewhere.parent)])
    assert register.hidden_installation() == elsewhere

    class Editable:
        """As the finder that setuptools installs."""

        folder = here

        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return spec_from_file_location(name, cls.folder / "__init__.py")

    monkeypatch.setattr(sys, "path", own)
    monkeypatch.setattr(sys, "meta_path", [PathFinder, Editable])
    assert register.hidden_installation() is None, "an editable one of this folder hides nothing"
    Editable.folder = elsewhere
    assert register.hidden_installation() == elsewhere


def test_env_in_a_checkout_that_is_not_built_names_the_installation_it_hides(elsewhere, tmp_path):
    checkout = tmp_path / "checkout" / "tempnet_kernels"
    built = shutil.ignore_patterns("*.so", "lib", "__pycache__")
    shutil.copytree(Path(tempnet_kernels.__file__).parent, checkout, ignore=built)
    result = subprocess.run(
        [sys.executable, "-m", "tempnet_kernels", "env"], cwd=checkout.parent, text=True,
        capture_output=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(elsewhere.parent), "COLUMNS": "1000"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"hides {elsewhere}: to use that one, run from another folder" in result.stdout
    assert (
        f"native, cpu, every op: the C++ kernels are not built in {checkout}, which hides the "
        f"installed {elsewhere}, where they are: run from another folder" in result.stdout
    )


def test_inspect_of_a_saved_network(tmp_path):
    net = TempNet(40, 0.5, 2.0, hidden_size=16, center="max").eval()
    torch.nn.init.constant_(net.scaler, 0.5)
    torch.nn.init.constant_(net.last.bias, -1)
    save_tempnet(net, tmp_path / "a.safetensors")
    (got,) = facts(tmp_path / "a.safetensors")["tempnets"]
    assert (got["prefix"], got["vocab_size"], got["hidden_size"]) == ("tempnet.", 40, 16)
    assert (got["tau_min"], got["tau_max"], got["center"]) == (0.5, 2.0, "max")
    assert got["parameters"] == sum(p.numel() for p in net.parameters())
    assert got["exp_scaler"] == pytest.approx(1.6487213) and got["bias"] == -1
    assert got["dtypes"] == ["float32"] and got["warnings"] == []
    first = next(row for row in got["tensors"] if row["name"] == "proj.0.weight")
    assert first["min"] == net.proj[0].weight.min() and first["shape"] == [16, 40]
    zero = got["temperatures"]["inputs"]["all logits 0"]
    assert zero["mean"] == pytest.approx(net(torch.zeros(40)).item(), rel=1e-6)
    peaked = got["temperatures"]["inputs"]["one logit 1, others 0"]
    assert peaked["min"] < peaked["max"]


def test_inspect_is_readable_at_80_columns(tmp_path):
    save_tempnet(TempNet(32000), tmp_path / "a.safetensors")
    loss = RobustContrastiveLoss(
        50, rho=1.0, image_temp_gen=ContrastiveTempNet(8), text_temp_gen=ContrastiveTempNet(8)
    )
    state = {f"module.loss.{name}": x for name, x in loss.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "b.pt")
    for name in ("a.safetensors", "b.pt"):
        out = call("inspect", tmp_path / name).stdout
        assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    assert "state of 50 samples" in out


def test_inspect_of_a_published_network(tmp_path):
    net = TempNet(40, hidden_size=16)
    state = {f"tempnet.{name}": x.detach().half() for name, x in net.state_dict().items()}
    save_file(state, tmp_path / "tempnet.safetensors", {"format": "pt"})
    (got,) = facts(tmp_path)["tempnets"]
    assert got["tau_min"] is None and got["temperatures"] is None
    assert ["16-bit weights in all tensors" in x for x in got["warnings"]] == [True]
    out = call("inspect", tmp_path).stdout
    assert "not in the checkpoint" in out and "0.01 and 1.2" in out and "--tau-min" in out
    (got,) = facts(tmp_path, "--tau-min", 0.01, "--tau-max", 1.2, "--center", "max")["tempnets"]
    assert got["temperatures"]["tau_max"] == 1.2 and got["temperatures"]["center"] == "max"
    assert "0 < tau_min < tau_max, got 2.0 and 1.0" in error(
        "inspect", tmp_path, "--tau-min", 2, "--tau-max", 1
    )


def test_inspect_warns(tmp_path):
    net = TempNet(40, 0.5, 2.0, hidden_size=16)
    broken = net.state_dict() | {"scaler": torch.tensor(0.0, dtype=torch.float64)}
    broken["proj.3.bias"] = torch.full((16,), torch.nan)
    broken["last.weight"] = torch.full((1, 16), -torch.inf)
    stuck = net.state_dict() | {"last.bias": torch.tensor([-20.0])}
    torch.save({"a": broken, "b": stuck}, tmp_path / "a.pt")
    a, b = facts(tmp_path / "a.pt", "--tau-min", 0.5, "--tau-max", 2)["tempnets"]
    assert "NaN or infinity in proj.3.bias, last.weight" in a["warnings"][0]
    assert "the scaler is float64" in a["warnings"][1] and a["temperatures"] is None
    rows = {row["name"]: row for row in a["tensors"]}
    assert rows["proj.3.bias"]["nan"] == 16 and rows["proj.3.bias"]["min"] is None
    assert rows["last.weight"]["inf"] == 16
    assert len(b["warnings"]) == 1 and "every temperature is at tau_min = 0.5" in b["warnings"][0]
    out = call("inspect", tmp_path / "a.pt").stdout
    assert "warning: NaN" in out and "not finite" in out


def test_inspect_of_a_contrastive_loss(tmp_path):
    nets = {f"{side}_temp_gen": ContrastiveTempNet(8) for side in ("image", "text")}
    loss = RobustContrastiveLoss(50, rho=1.0, **nets)
    features = torch.nn.functional.normalize(torch.randn(2, 6, 8), dim=-1)
    loss(*features, torch.arange(10, 16)).backward()
    torch.save(loss.state_dict(), tmp_path / "a.pt")
    got = facts(tmp_path / "a.pt")
    assert got["tempnets"] == []
    image, text = got["contrastive_tempnets"]
    assert (image["prefix"], text["prefix"]) == ("image_temp_gen.", "text_temp_gen.")
    assert (image["feature_dim"], image["num_prototypes"], image["dropout_step"]) == (8, 256, 1)
    assert image["temperatures"]["tau_max"] == 0.05
    (state,) = got["states"]
    log_s = loss.state.log_s_image[10:16]
    assert state["num_samples"] == 50 and state["tensors"]["log_s_image"] == {
        "visited": 6, "min": pytest.approx(log_s.min().item()),
        "max": pytest.approx(log_s.max().item()), "inf": 0,
    }  # fmt: skip
    one = facts(tmp_path / "a.pt", "--prefix", "text_temp_gen.")
    assert [x["prefix"] for x in one["contrastive_tempnets"]] == ["text_temp_gen."]


def test_inspect_of_isogclrs_table_beside_a_network(tmp_path):
    loss = RobustContrastiveLoss(50, rho=1.0, method="isogclr")
    state = {f"loss.{name}": x for name, x in loss.state_dict().items()}
    torch.save(state | TempNet(9, hidden_size=4).state_dict(), tmp_path / "a.pt")
    (got,) = facts(tmp_path / "a.pt")["states"]
    assert got["tensors"]["log_s_text"]["visited"] == 0
    assert got["tensors"]["tau_text"]["visited"] is None
    assert got["tensors"]["tau_text"]["min"] == pytest.approx(0.01)


def test_inspect_refuses(tmp_path):
    assert "gone does not exist: pass the file or" in error("inspect", tmp_path / "gone")
    assert f"error: {tmp_path} holds none of" in "error: " + error("inspect", tmp_path)
    torch.save({"model.weight": torch.zeros(2)}, tmp_path / "a.pt")
    plain = error("inspect", tmp_path / "a.pt")
    assert "got none in 1 tensors" in plain and "which TempNetCrossEntropyLoss or" in plain
    torch.save(TempNet(9, hidden_size=4), tmp_path / "module.pt")
    module = error("inspect", tmp_path / "module.pt")
    assert "a module that was saved whole, save the state dict, torch.save(module.state" in module
    torch.save({"x": TempNet(9, hidden_size=4).state_dict()}, tmp_path / "b.pt")
    assert "one of 'x.', got 'y.'" in error("inspect", tmp_path / "b.pt", "--prefix", "y.")
    (tmp_path / "b.pt").write_bytes((tmp_path / "b.pt").read_bytes()[:200])
    assert "cannot read" in error("inspect", tmp_path / "b.pt")
    state = ContrastiveTempNet(8).state_dict()
    torch.save(state | {"proj.weight": torch.zeros(3, 3)}, tmp_path / "c.pt")
    assert "ContrastiveTempNet under ''" in error("inspect", tmp_path / "c.pt")
    for name in ("empty.pt", "garbage.pt", "empty.safetensors", "garbage.safetensors"):
        (tmp_path / name).write_text("" if "empty" in name else "no checkpoint" * 9)
        assert "copy it again" in error("inspect", tmp_path / name)


def test_a_checkpoint_that_may_not_be_read_is_not_called_broken(tmp_path, monkeypatch):
    def refused(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.pt").touch()
    monkeypatch.setattr(torch, "load", refused)
    assert error("inspect", tmp_path / "a.pt").startswith("[Errno 13] Permission denied")


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
