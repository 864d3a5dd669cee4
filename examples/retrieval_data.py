"""The pairs of train_retrieval.py: two data sets that every machine has.

``glyphs``: the characters of the DejaVu fonts that matplotlib ships, each drawn in up to four
faces, with their Unicode names. ``code``: functions of the Python standard library without their
docstrings, with the docstrings' first paragraphs; a function's own name is on neither side, so the
one cannot be told from the other by it.
"""

import ast
import json
import re
import sysconfig
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from loop import Refused, replace
from matplotlib.ft2font import FT2Font
from safetensors.torch import load_file, save_file

FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
SIDE = 32  # pixels
HELD_OUT = 1000  # texts


@dataclass
class Bags:
    """Bags of words one after the other: bag i is words[offsets[i] : offsets[i + 1]]."""

    words: torch.Tensor  # (sum of sizes,)
    offsets: torch.Tensor  # (bags + 1,)

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, rows):
        """(words, offsets) of the bags ``rows`` as nn.EmbeddingBag takes them."""
        begin, sizes = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        offsets = sizes.cumsum(0) - sizes
        places = torch.arange(int(sizes.sum())) + torch.repeat_interleave(begin - offsets, sizes)
        return self.words[places], offsets


@dataclass
class Pairs:
    """Pair i is image i with text ``text_ids[i]``; several images may share a text."""

    images: torch.Tensor | Bags  # glyphs: (N, 32, 32) uint8, code: N bags
    text_ids: torch.Tensor  # (N,)
    faces: torch.Tensor  # (N,) places in FACES; code: 0
    texts: Bags
    names: list[str]  # of the texts

    def __len__(self):
        return len(self.text_ids)

    def of_texts(self, n):
        """The pairs of the first n texts; their order is random, so it is a random sample."""
        rows = torch.nonzero(self.text_ids < n).squeeze(1)
        images = self.images
        images = Bags(*close(*images[rows])) if isinstance(images, Bags) else images[rows]
        texts = Bags(*close(*self.texts[torch.arange(n)]))
        return Pairs(images, self.text_ids[rows], self.faces[rows], texts, self.names[:n])


def close(words, offsets):
    return words, torch.cat([offsets, offsets.new_tensor([len(words)])])


def load(data, folder):
    """(training pairs, held-out pairs, {"image" and "text": size of the vocabulary}), cached in
    ``folder``. No text, and so no image of it, is in both."""
    tensors, names = folder / "pairs.safetensors", folder / "names.json"
    if not tensors.exists():
        folder.mkdir(parents=True, exist_ok=True)
        build(data, tensors, names)
    stored, (train, held_out) = load_file(tensors), json.loads(names.read_text())
    sizes = {side: int(stored[f"{side}_words"]) for side in ("image", "text")}

    def pairs(part, names):
        x = {k.removeprefix(part): v for k, v in stored.items() if k.startswith(part)}
        images = x["images"] if "images" in x else Bags(x["image_words"], x["image_offsets"])
        texts = Bags(x["text_words"], x["text_offsets"])
        return Pairs(images, x["text_ids"], x["faces"], texts, names)

    return pairs("train.", train), pairs("held_out.", held_out), sizes


def build(data, path, names_path):
    images, texts, faces = glyphs() if data == "glyphs" else functions()
    known = sorted(set(texts))
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    known = [known[i] for i in order]
    place = {text: i for i, text in enumerate(known)}
    text_ids = torch.tensor([place[text] for text in texts])
    faces, held = torch.tensor(faces), text_ids < HELD_OUT

    # Words that no training pair has are dropped.
    tokens = [subwords(text) for text in known]
    text_words = vocabulary(tokens[HELD_OUT:])
    bags = data != "glyphs"
    rows = {"held_out.": torch.nonzero(held).squeeze(1), "train.": torch.nonzero(~held).squeeze(1)}
    image_words = vocabulary([images[i] for i in rows["train."]]) if bags else {}
    tensors = {
        "image_words": torch.tensor(len(image_words)),
        "text_words": torch.tensor(len(text_words)),
    }
    for part, row in rows.items():
        ours = slice(HELD_OUT) if part == "held_out." else slice(HELD_OUT, None)
        tensors[part + "text_ids"] = text_ids[row] - (ours.start or 0)
        tensors[part + "faces"] = faces[row]
        text_bags = bags_of(tokens[ours], text_words)
        tensors |= {part + f"text_{k}": v for k, v in vars(text_bags).items()}
        if bags:
            image_bags = bags_of([images[i] for i in row], image_words)
            tensors |= {part + f"image_{k}": v for k, v in vars(image_bags).items()}
        else:
            tensors[part + "images"] = torch.from_numpy(np.stack([images[i] for i in row]))
    # The tensors last, and renamed: they are what tells that the cache is complete.
    names_path.write_text(json.dumps([known[HELD_OUT:], known[:HELD_OUT]]))
    replace(path, lambda partial: save_file(tensors, partial))


def vocabulary(bags):
    counts = Counter(word for bag in bags for word in bag)
    return {word: i for i, (word, _) in enumerate(counts.most_common())}


def bags_of(bags, words):
    places = [[words[word] for word in bag if word in words] for bag in bags]
    sizes = torch.tensor([0, *map(len, places)])
    return Bags(torch.tensor([i for bag in places for i in bag]), sizes.cumsum(0))


def subwords(text, without=None):
    """Lower-case words, identifiers taken apart at underscores and where the case changes, but for
    the identifier ``without``."""
    identifiers = [word for word in re.findall(r"\w+", text) if word != without]
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", " ".join(identifiers))
    return [part.lower() for part in parts]


def glyphs():
    """(images, names, faces)."""
    images, names, faces = [], [], []
    for face, name in enumerate(FACES):
        path = Path(matplotlib.get_data_path(), "fonts", "ttf", name + ".ttf")
        if not path.exists():
            raise Refused(f"{path} is not there: install matplotlib with pip, which has its fonts")
        font = FT2Font(path)
        for code in sorted(font.get_charmap()):
            text = unicodedata.name(chr(code), None)
            image = None if text is None else drawn(font, code)
            if image is not None:
                images.append(image)
                names.append(text)
                faces.append(face)
    return images, names, faces


def drawn(font, code, size=22):
    """The glyph in the middle of 32 x 32 grey values; None if it has no ink. One that is too large
    is drawn smaller."""
    while True:
        font.set_size(size, 72)
        font.set_text(chr(code))
        font.draw_glyphs_to_bitmap(antialiased=True)
        image = np.asarray(font.get_image())
        if not image.any():
            return None
        rows, columns = image.any(1).nonzero()[0], image.any(0).nonzero()[0]
        image = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        if max(image.shape) <= SIDE:
            break
        size *= 0.9 * SIDE / max(image.shape)
    canvas = np.zeros((SIDE, SIDE), dtype=np.uint8)
    top, left = ((SIDE - n) // 2 for n in image.shape)
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def functions():
    """(sub-words of the code, first paragraphs of the docstrings, faces)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}
    codes, texts = [], []
    for path in sorted(root.rglob("*.py")):
        if skip & set(path.relative_to(root).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in strings
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for function, docstring in without_docstrings(tree):
            name, function.name = function.name, "_"
            text = " ".join(docstring.split("\n\n")[0].split())
            text = re.sub(rf"\b{re.escape(name)}\b", "", text).strip()
            code = subwords(ast.unparse(function), without=name)
            function.name = name
            if len(subwords(text)) >= 3 and code:
                codes.append(code)
                texts.append(text)
    if not texts:
        raise Refused(
            f"the functions are the standard library's, and there is no source under {root}: use a "
            "Python that is not stripped of it"
        )
    return codes, texts, [0] * len(texts)


def without_docstrings(tree):
    """[(function, its docstring)]; all docstrings are taken out of the tree, also those of what is
    defined within a function, which are other pairs' texts."""
    found = []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in [node for node in ast.walk(tree) if isinstance(node, kinds)]:
        docstring = ast.get_docstring(node)
        if docstring is not None:
            node.body = node.body[1:] or [ast.Pass()]
            if not isinstance(node, ast.ClassDef):
                found.append((node, docstring))
    return found
