"""plot-tau: the temperatures of a text's tokens."""

import csv
import math
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from tempnet_kernels import dro_cross_entropy
from tempnet_kernels.core import register
from tempnet_kernels.nn import TemperatureStats, checkpoint, load_tempnet

COLUMNS = (
    "position", "token_id", "token", "tau", "entropy", "kl", "log_prob",
    "entropy_tempered", "kl_tempered", "log_prob_tempered",
)  # fmt: skip
WINDOW = 2048  # longest, in tokens, where the model takes more
PICTURE = 400  # tokens of the coloured text
CHARACTERS = 8  # to read for each token that is wanted; English has about 4
MARGIN = 256  # tokens
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def requirements():
    """Raises where a package or a kernel is not there."""
    try:
        import matplotlib
        import tqdm  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"plot-tau: {error.name} is missing: pip install transformers matplotlib tqdm"
        ) from error
    matplotlib.use("Agg")
    operator = "dro_cross_entropy_fwd"
    reason = register.missing(operator, register.auto_backend(operator, DEVICE), DEVICE)
    if reason is not None:
        raise ValueError(f"plot-tau: {reason}")


def network_of(model, tempnet=None, **settings):
    """The TempNet of a Hugging Face folder or name, or of ``tempnet``, a checkpoint of its own."""
    if tempnet is None:
        tempnet = _folder(model)
        read, _ = checkpoint.contents(tempnet)
        if not checkpoint.prefixes(read):
            raise ValueError(
                f"plot-tau: {model} holds no TempNet: pass its checkpoint with --tempnet, or train "
                "one with tempnet_kernels.integrations.transformers.apply_tempnet"
            )
    return load_tempnet(tempnet, **settings).to(DEVICE)


def _folder(model):
    if Path(model).is_dir():
        return model
    if Path(model).exists():
        raise ValueError(
            f"plot-tau: MODEL must be a folder or a name on the Hugging Face hub, got the file "
            f"{model}: pass the folder that it is in"
        )
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, allow_patterns=["*.safetensors", "config.json"])
    except Exception as error:
        raise ValueError(
            f"plot-tau: MODEL must be a folder or a name on the Hugging Face hub, got {model!r}, "
            f"which is no folder: {error}"
        ) from error


def pretrained(kind, model, **options):
    """``kind.from_pretrained(model)``; its errors name the file, if at all, and not the cause."""
    try:
        return kind.from_pretrained(model, **options)
    except Exception as error:
        raise ValueError(
            f"plot-tau: MODEL must hold a causal model and its tokenizer, as save_pretrained "
            f"writes them, but {kind.__name__} cannot read {model}: {error}"
        ) from error


def opened(text_file):
    path = Path(text_file)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise FileNotFoundError(
            f"plot-tau: TEXT_FILE must be a file of UTF-8 text, got {path}, which is {what}"
        )
    return path.open(encoding="utf-8")


def first_tokens(tokenizer, file, count=None):
    """:func:`pieces_of` the first ``count`` tokens of the open text ``file``, or all of them. No
    more of the file is read than that takes.

    Where a text is cut its last tokens change, and those far before them too if the tokenizer has
    no words, as Llama-2's. So MARGIN tokens must follow, and twice the text must begin with the
    same tokens.
    """
    if count is None:
        return pieces_of(tokenizer, file.read())
    text, before, size = "", None, CHARACTERS * (count + MARGIN)
    while True:
        more = file.read(size)
        text += more
        ids, pieces = pieces_of(tokenizer, text)
        found = ids[:count], pieces[:count]
        if len(more) < size or found == before:
            return found
        if len(ids) >= count + MARGIN:
            before = found
        size = len(text)


def pieces_of(tokenizer, text):
    """(ids, pieces): the tokens, and the text that each of them is."""
    if not tokenizer.is_fast:
        ids = tokenizer(text)["input_ids"]
        return ids, [tokenizer.decode([i]) for i in ids]
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, end, pieces = encoded["input_ids"], 0, []
    for i, (_, stop) in zip(ids, encoded["offset_mapping"], strict=True):
        # From the end of the last one: some tokenizers leave the space out. A character of several
        # tokens is the first one's.
        pieces.append(text[end:stop] if stop else tokenizer.decode([i]))
        end = max(end, stop)
    return ids, pieces


@torch.no_grad()
def score(lm, tempnet, ids, batch, window=None):
    """Statistics of the tokens after the first, name -> ``[n - 1]`` on the CPU, float64.

    The text is read in windows that overlap by half, so that every token has at least half a window
    before it, or all of the text.
    """
    from tqdm import tqdm

    n = len(ids)
    longest = getattr(lm.config, "max_position_embeddings", None) or WINDOW
    window = min(longest, WINDOW) if window is None else window
    if not 2 <= window <= longest:
        raise ValueError(f"plot-tau: window must be in [2, {longest}] tokens, got {window}")
    window = min(window, n)
    starts = [*range(0, n - window, window - window // 2), n - window]
    v = tempnet.vocab_size
    tokens = torch.tensor(ids, device=lm.device)
    columns, done = [], 1
    for i in tqdm(range(0, len(starts), batch), desc="windows", disable=len(starts) < 2):
        part = starts[i : i + batch]
        inputs = torch.stack([tokens[start : start + window] for start in part])
        logits = lm(input_ids=inputs, use_cache=False).logits  # (windows, window, V)
        if logits.shape[-1] != v:
            raise ValueError(
                f"plot-tau: the TempNet takes V = {v} logits, the model gives "
                f"{logits.shape[-1]}: pass the network that was trained on this model"
            )
        # By window: the network makes float32 copies of its logits.
        for start, z in zip(part, logits, strict=True):
            target = tokens[done : start + window]
            z = z[done - 1 - start : window - 1]
            columns.append(_statistics(z, target, tempnet))
            done = start + window
    return {name: torch.cat([c[name] for c in columns]).double().cpu() for name in columns[0]}


def _statistics(z, target, tempnet):
    tau = tempnet(z)
    _, plain = dro_cross_entropy(z, target, return_stats=True)
    _, tempered = dro_cross_entropy(z, target, tau, return_stats=True)
    return {"tau": tau} | {
        name + suffix: getattr(stats, name)
        for suffix, stats in (("", plain), ("_tempered", tempered))
        for name in ("entropy", "kl", "log_prob")
    }


def write_table(path, ids, pieces, statistics):
    """A row for each token after the first, with what its prediction was."""
    values = zip(*(statistics[name].tolist() for name in COLUMNS[3:]), strict=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for i, row in enumerate(values, 1):
            writer.writerow((i, ids[i], pieces[i], *(f"{x:.8g}" for x in row)))
    return path


def draw(prefix, pieces, statistics, tempnet):
    """The pictures, their paths."""
    from tempnet_kernels.cli import plots

    tau, entropy = statistics["tau"], statistics["entropy"]
    begin = _most_varied(tau)
    shown = slice(begin, begin + PICTURE)
    title = f"tokens {begin + 1} to {begin + len(tau[shown])} of {len(tau)}"
    return [
        plots.coloured_text(prefix + ".text.png", pieces[1:][shown], tau[shown], title=title),
        plots.temperature_against_entropy(prefix + ".entropy.png", entropy, tau),
        plots.histogram(prefix + ".histogram.png", tau, tempnet.tau_min, tempnet.tau_max),
    ]


def _most_varied(tau):
    """Where the picture's stretch of tokens begins, by the spread of its temperatures."""
    begins = range(0, max(len(tau) - PICTURE, 0) + 1, PICTURE // 4)
    return max(begins, key=lambda i: tau[i : i + PICTURE].std(correction=0))


def summarise(console, pieces, statistics, tempnet):
    """Print the numbers, and the tokens at either end with the text before them."""
    tau = statistics["tau"]
    stats = TemperatureStats.of(tau, tempnet.tau_min, tempnet.tau_max)
    table = Table(show_header=False, box=None)
    table.add_row("tokens", str(len(tau)))
    table.add_row("temperature", f"mean {stats.mean:.4f}, {stats.min:.4f} to {stats.max:.4f}")
    table.add_row("at tau_min, tau_max", f"{stats.at_min:.1%}, {stats.at_max:.1%} of the tokens")
    for name, column in (("z", "log_prob"), ("z / tau", "log_prob_tempered")):
        mean = statistics[column].mean().item()
        perplexity = math.exp(-mean) if mean > -700 else math.inf
        table.add_row(f"perplexity at {name}", f"{perplexity:.4g}")
    console.print(table)
    order = tau.argsort(stable=True).tolist()
    for title, ends in (("hottest", order[::-1][:10]), ("coldest", order[:10])):
        table = Table(title=f"{title} tokens", title_justify="left")
        for column in ("tau", "position", "after", "token"):
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        for i in ends:
            before = "".join(pieces[max(0, i - 40) : i + 1])[-30:]
            cells = (Text(repr(text)) for text in (before, pieces[i + 1]))  # spaces show
            table.add_row(f"{tau[i]:.4f}", str(i + 1), *cells)
        console.print(table)


def run(
    console, model, text_file, out, *, tokens=None, batch=4, window=None, tempnet=None, **settings
):
    """All of the command; returns what was written."""
    for name, value, least in (("tokens", tokens, 2), ("batch", batch, 1)):
        if value is not None and value < least:
            raise ValueError(f"plot-tau: {name} must be >= {least}, got {value}")
    out = Path(out)
    if out.is_dir():
        raise ValueError(
            f"plot-tau: --out must be the beginning of names, got the folder {out}: pass one in "
            f"it, {out / 'tau'}"
        )
    if not out.parent.is_dir():
        raise FileNotFoundError(
            f"plot-tau: the folder of --out, {out.parent}, does not exist: make it first"
        )
    with opened(text_file) as file:
        requirements()
        import transformers

        network = network_of(model, tempnet, **settings)
        tokenizer = pretrained(transformers.AutoTokenizer, model)
        try:
            ids, pieces = first_tokens(tokenizer, file, tokens)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"plot-tau: {text_file} must be UTF-8 ({error}): convert it, as iconv does"
            ) from error
    if len(ids) < 2:
        raise ValueError(
            f"plot-tau: {text_file} must have at least two tokens, for the first is not predicted, "
            f"got {len(ids)}"
        )
    lm = pretrained(transformers.AutoModelForCausalLM, model, dtype="auto").to(DEVICE).eval()
    try:
        statistics = score(lm, network, ids, batch, window)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "plot-tau: the GPU's memory is full: pass a smaller --batch or --window"
        ) from error
    broken = ~statistics["tau"].isfinite() | statistics["log_prob"].isnan()
    if broken.any():
        raise ValueError(
            f"plot-tau: {int(broken.sum())} of {len(broken)} tokens have a NaN, the first at "
            f"position {int(broken.nonzero()[0]) + 1}: the model's logits or the TempNet's weights "
            "are not finite (python -m tempnet_kernels inspect tells which)"
        )
    summarise(console, pieces, statistics, network)
    table = write_table(Path(f"{out}.csv"), ids, pieces, statistics)
    return [str(table), *draw(str(out), pieces, statistics, network)]
