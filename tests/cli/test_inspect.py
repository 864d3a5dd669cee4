"""inspect: what it says of a checkpoint, and what it refuses."""

import pytest
import torch
from command_line import call, error, facts
from safetensors.torch import save_file

from tempnet_kernels.nn import (
    ContrastiveTempNet,
    RobustContrastiveLoss,
    TempNet,
    save_tempnet,
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
