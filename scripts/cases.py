"""Runs the cases of a file and writes a JSON line when one begins and when it has ended, so that
whatever happens to this process, what was done is known.

    python scripts/cases.py FILE [PART] --device cuda --out LINES [--after CASE]

``FILE`` defines ``cases(device, part)``: pairs of a name and a function. What a function returns, a
dict, is the case's result; "status" is "ok" unless it says "wrong" or "unable", "row" is its row in
the summary's table, and "rows" a table of its own. ``--after`` goes on behind a case that took its
process with it.
"""

import argparse
import gc
import importlib.util
import json
import sys
import time
import traceback
from pathlib import Path

import torch

LOST_DEVICE = 75  # exit status: nothing more can run on the GPU in this process


def load(path):
    path = Path(path).resolve()
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def one_line(error):
    words = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {words}"[:300]


def device_is_lost():
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.empty(1, device="cuda").fill_(1).cpu()
    except Exception:
        return True
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("part", nargs="?", default="")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--after", default="")
    options = parser.parse_args()
    pairs = load(options.file).cases(options.device, options.part)
    after = options.after
    with options.out.open("a", buffering=1) as out:
        for name, case in pairs:
            if after:
                after = "" if name == after else after
                continue
            out.write(json.dumps({"case": name, "begins": True}) + "\n")
            begin = time.monotonic()
            torch.manual_seed(0)
            try:
                result = {"status": "ok", **(case() or {})}
            except Exception as error:
                traceback.print_exc()
                result = {"status": "exception", "error": one_line(error)}
            result["seconds"] = round(time.monotonic() - begin, 3)
            lost = result["status"] == "exception" and device_is_lost()
            out.write(json.dumps({"case": name, **result}) + "\n")
            if lost:
                sys.exit(LOST_DEVICE)
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
