"""inspect: the TempNets of a checkpoint, as numbers and as text."""

import math

import torch
from rich.table import Table
from rich.text import Text

from tempnet_kernels.nn import checkpoint
from tempnet_kernels.nn.contrastive_tempnet import ContrastiveTempNet
from tempnet_kernels.nn.tempnet import TemperatureStats, TempNet

ROWS = 64  # of each kind of input
# A sample of the state that was not visited has this value; those of estimator="official" 0.
UNVISITED = {"log_s_image": math.nan, "log_s_text": math.nan, "s_I": 0.0, "s_T": 0.0}


def report(source, prefix=None, **given):
    """What ``source`` holds, as :func:`json.dumps` takes it. ``given``: settings by name that count
    instead of those in the checkpoint; None for one that was not given."""
    read, stated = checkpoint.contents(source)
    language = checkpoint.prefixes(read)
    contrastive = checkpoint.prefixes(read, checkpoint.CONTRASTIVE)
    if (prefix is not None and prefix not in contrastive) or not (language or contrastive):
        language = [checkpoint.choose(read, prefix, source)]
    if prefix is not None:
        language = [x for x in language if x == prefix]
        contrastive = [x for x in contrastive if x == prefix]
    settings = stated | {name: value for name, value in given.items() if value is not None}
    states = sorted({_state_prefix(name) for name in read} - {None}) if prefix is None else []
    return {
        "source": str(source),
        "tempnets": [_language(read, x, source, stated, settings) for x in language],
        "contrastive_tempnets": [_contrastive(read, x, settings) for x in contrastive],
        "states": [_state(read, x) for x in states],
    }


def _language(read, prefix, source, stated, settings):
    tensors = checkpoint.tensors_of(read, prefix, source)
    h, v = tensors["proj.0.weight"].shape
    facts = {"prefix": prefix, "vocab_size": v, "hidden_size": h}
    facts |= {name: stated.get(name) for name in checkpoint.SETTINGS}
    facts["stated"] = sorted(stated)
    facts |= _weights(tensors, tensors["last.bias"])
    if facts["finite"] and {"tau_min", "tau_max"} <= settings.keys():
        net = TempNet(v, hidden_size=h, **settings)
        net.load_state_dict(tensors)
        _temperatures(facts, net, _logits(v), settings)
    return facts


def _contrastive(read, prefix, settings):
    names = ContrastiveTempNet(1, num_prototypes=1).state_dict()
    tensors = {name: read[prefix + name]() for name in names if prefix + name in read}
    try:
        k, d = tensors["prototypes"].shape
        net = ContrastiveTempNet(d, num_prototypes=k)
        net.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"inspect: the ContrastiveTempNet under {prefix!r}: {error}") from error
    steps = tensors.pop("dropout_step", None)
    facts = {"prefix": prefix, "feature_dim": d, "num_prototypes": k}
    facts["dropout_step"] = None if steps is None else int(steps)
    facts |= _weights(tensors, tensors["linear_1.bias"])
    bounds = {"tau_min": net.tau_min, "tau_max": net.tau_max}
    bounds |= {name: settings[name] for name in bounds if name in settings}
    if facts["finite"]:
        net = ContrastiveTempNet(d, num_prototypes=k, **bounds)
        net.load_state_dict(tensors)
        _temperatures(facts, net, _features(net), bounds)
    return facts


def _weights(tensors, bias):
    """Facts about the tensors of either kind of network."""
    rows = []
    for name, x in tensors.items():
        finite = x[x.isfinite()].double()
        low, high = finite.aminmax() if finite.numel() else (math.nan, math.nan)
        rows.append({"name": name, "shape": list(x.shape), "dtype": str(x.dtype)[6:]})
        rows[-1] |= {"min": _number(low), "max": _number(high)}
        rows[-1] |= {"nan": int(x.isnan().sum()), "inf": int(x.isinf().sum())}
    scaler = tensors["scaler"]
    bad = [row["name"] for row in rows if row["nan"] or row["inf"]]
    small = [row["name"] for row in rows if row["dtype"] in ("float16", "bfloat16")]
    warnings = []
    if bad:
        warnings.append(
            f"NaN or infinity in {', '.join(bad)}: take a checkpoint from before the training broke"
        )
    if small:
        names = "all tensors" if len(small) == len(rows) else ", ".join(small)
        warnings.append(
            f"16-bit weights in {names}: they load as float32, with the rounding they have"
        )
    if scaler.dtype == torch.float64 and len({row["dtype"] for row in rows}) > 1:
        warnings.append(
            "the scaler is float64, as the official code makes it: an optimizer or FSDP that wants "
            "one type refuses it; load_tempnet and load_state_dict read it as float32"
        )
    return {
        "parameters": sum(x.numel() for x in tensors.values()),
        "dtypes": sorted({row["dtype"] for row in rows}),
        "exp_scaler": _number(scaler.double().exp()),
        "bias": _number(bias),
        "finite": not bad,
        "tensors": rows,
        "temperatures": None,
        "warnings": warnings,
    }


def _temperatures(facts, net, inputs, settings):
    low, high = settings["tau_min"], settings["tau_max"]
    with torch.no_grad():
        taus = {kind: net.eval()(x) for kind, x in inputs.items()}
    facts["temperatures"] = {
        "tau_min": low,
        "tau_max": high,
        "center": settings.get("center"),
        "inputs": {
            kind: dict(zip(("mean", "min", "max"), map(_number, _stats(x)[:3]), strict=True))
            for kind, x in taus.items()
        },
    }
    _, _, _, at_min, at_max = TemperatureStats.of(torch.cat(list(taus.values())), low, high)
    for share, bound in ((at_min, "tau_min"), (at_max, "tau_max")):
        if share == 1:
            facts["warnings"].append(
                f"every temperature is at {bound} = {settings[bound]}: the network no longer tells "
                "inputs apart; train with another rho or a wider range"
            )


def _stats(x):
    return TemperatureStats.of(x, 0, 1)


def _logits(v):
    """Rows of different shape: the network divides a row by its norm, so its scale has no say."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(ROWS, v, generator=generator)
    column = torch.randint(v, (ROWS, 1), generator=generator)
    ranks = torch.rand(ROWS, v, generator=generator).argsort(1) + 1
    return {
        "all logits 0": torch.zeros(1, v),
        "normal": normal,
        "-log of a random rank": -ranks.log(),
        "normal, one logit + 20": normal.scatter_add(1, column, torch.full((ROWS, 1), 20.0)),
        "one logit 1, others 0": torch.zeros(ROWS, v).scatter_(1, column, 1),
    }


def _features(net):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(ROWS, net.proj.in_features, generator=generator)
    unit = torch.nn.functional.normalize
    return {
        "random unit vectors": unit(features, dim=1),
        "its prototypes, normalised": unit(net.prototypes.detach(), dim=1),
    }


def _state_prefix(name):
    prefix, _, last = name.rpartition(".")
    own = last in UNVISITED and (prefix == "state" or prefix.endswith(".state"))
    return prefix + "." if own else None


def _state(read, prefix):
    tensors = {
        name.removeprefix(prefix): function()
        for name, function in read.items()
        if name.startswith(prefix)
    }
    facts = {"prefix": prefix, "tensors": {}}
    for name, x in tensors.items():
        facts["num_samples"] = x.numel()
        visited = x[~x.isnan() & (x != UNVISITED.get(name, math.nan))]
        low, high = visited.aminmax() if visited.numel() else (math.nan, math.nan)
        facts["tensors"][name] = {
            "visited": visited.numel() if name in UNVISITED else None,
            "min": _number(low),
            "max": _number(high),
            "inf": int(visited.isinf().sum()),
        }
    return facts


def _number(x):
    """A float for JSON, which has no NaN and no infinity."""
    x = float(x)
    return x if math.isfinite(x) else None


def draw(console, facts):
    """Print a :func:`report`."""
    plain = {"markup": False, "highlight": False, "soft_wrap": False}
    console.print(facts["source"], **plain, overflow="fold")
    for net in facts["tempnets"]:
        size = f"V = {net['vocab_size']}, hidden_size = {net['hidden_size']}"
        _heading(console, "TempNet", net, size)
        stated = {name: str(net[name]) for name in net["stated"]}
        for name in checkpoint.SETTINGS:
            stated.setdefault(name, "not in the checkpoint")
        rows = {"exp(scaler)": _text(net["exp_scaler"]), "last.bias": _text(net["bias"])}
        console.print(_pairs(rows | {name: stated[name] for name in checkpoint.SETTINGS}))
        if not {"tau_min", "tau_max"} <= set(net["stated"]):
            console.print(f"published bounds: {checkpoint.PUBLISHED}", **plain)
        _body(console, net)
    for net in facts["contrastive_tempnets"]:
        size = f"D = {net['feature_dim']}, {net['num_prototypes']} prototypes"
        _heading(console, "ContrastiveTempNet", net, size)
        usual = ContrastiveTempNet(1)
        rows = {"exp(scaler)": _text(net["exp_scaler"]), "linear_1.bias": _text(net["bias"])}
        steps = net["dropout_step"]
        rows["dropout masks drawn"] = "not in the checkpoint" if steps is None else str(steps)
        rows["tau_min, tau_max"] = (
            f"not in the checkpoint; published: {usual.tau_min}, {usual.tau_max}"
        )
        console.print(_pairs(rows))
        _body(console, net)
    for state in facts["states"]:
        table = Table(title=f"state of {state['num_samples']} samples", title_justify="left")
        for column in (state["prefix"] + "*", "visited", "min", "max", "inf"):
            table.add_column(column, overflow="fold")
        for name, row in state["tensors"].items():
            visited = "" if row["visited"] is None else str(row["visited"])
            none = row["visited"] == 0
            ends = ("", "") if none else (_text(row["min"]), _text(row["max"]))
            table.add_row(name, visited, *ends, str(row["inf"]))
        console.print(table)


def _heading(console, kind, net, size):
    where = f"under '{net['prefix']}'" if net["prefix"] else "without a prefix"
    console.print(Text(f"\n{kind} {where}", style="bold"))
    console.print(f"{size}, {net['parameters']} parameters, {', '.join(net['dtypes'])}")


def _body(console, net):
    table = Table()
    for column in ("tensor", "shape", "type", "min", "max", "NaN", "inf"):
        table.add_column(column, overflow="fold")
    for row in net["tensors"]:
        shape = " x ".join(map(str, row["shape"])) or "0-d"
        cells = (_text(row["min"]), _text(row["max"]), str(row["nan"]), str(row["inf"]))
        table.add_row(row["name"], shape, row["dtype"], *cells)
    console.print(table)
    temperatures = net["temperatures"]
    if temperatures:
        low, high = temperatures["tau_min"], temperatures["tau_max"]
        title = f"temperatures in [{low}, {high}]"
        if "vocab_size" in net:
            title += f", center={temperatures['center']!r}"
        table = Table(title=title, title_justify="left")
        for column in ("input", "mean", "min", "max"):
            table.add_column(column)
        for kind, row in temperatures["inputs"].items():
            table.add_row(kind, *(_text(row[name]) for name in ("mean", "min", "max")))
        console.print(table)
    elif net["finite"]:
        console.print("no temperatures: give --tau-min and --tau-max", highlight=False)
    for warning in net["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"))


def _pairs(rows):
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _text(x):
    return "not finite" if x is None else f"{x:.4g}"
