"""Real text with copies of known similarity, to judge deduplication by: `dedup_corpus.py OUT --mb 20`.

Text of the Python installation and of /usr/share/doc is cut into documents; those that repeat others by nature are left out; then
come copies: `exact`; `norm` (other case and spaces: J = 1, other bytes); `j95` to `j45` at that Jaccard similarity of word 5-grams,
within 0.01, by scattered words, a replaced block or an insertion; `chain`: A, B, C, D where neighbours are at 0.85.

Writes OUT/shard_NNNNN.jsonl ({"id", "text"}) and truth.jsonl ({"a", "b", "cls", "jaccard"}). One seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

WORDS = re.compile(r"\w+")
SUFFIXES = {".py", ".txt", ".md", ".rst", ".h", ".html", ".c", ".1", ".pm", ".pod"}
TARGETS = {"j95": 0.95, "j85": 0.85, "j75": 0.75, "j60": 0.60, "j45": 0.45}
NEAR = 0.01  # of a target
KNOWN = 0.1  # share of a document's shingles that came before, above which it is left out
SAMPLED = 16  # one shingle of so many is remembered for that


def shingles(text: str) -> set[tuple[str, ...]]:
    words = WORDS.findall(text.lower())
    return set(zip(*(words[k:] for k in range(5)), strict=False))


def jaccard(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / max(1, len(a | b))


def documents(roots: list[Path], rng: random.Random) -> Iterator[str]:
    """Pieces of files, cut at blank lines, of sizes like those of web pages (log-normal, median 2,400 characters)."""
    for root in roots:
        for path in sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES and p.is_file() and not p.is_symlink()):
            text = path.read_bytes().decode("utf-8", "ignore").replace("\0", "")
            while len(text) > 200:
                size = int(min(max(rng.lognormvariate(7.8, 1.0), 300), 50_000))
                cut = text.find("\n\n", size)
                piece, text = (text, "") if cut < 0 else (text[:cut], text[cut:])
                yield piece.strip() + "\n"


def different(texts: Iterator[str], limit: int) -> Iterator[str]:
    """Those of which less than KNOWN came before, up to `limit` characters of all."""
    seen: set[int] = set()
    total = 0
    for text in texts:
        found = shingles(text)
        if len(found) < 40:
            continue
        some = {h for h in map(hash_of, found) if h % SAMPLED == 0}
        if len(some & seen) <= KNOWN * len(some):
            seen |= some
            total += len(text)
            yield text
        if total > limit:
            return


def hash_of(shingle: tuple[str, ...]) -> int:
    """Not `hash`: Python's is another one in each process."""
    return int.from_bytes(" ".join(shingle).encode()[-12:], "little") * 0x9E3779B97F4A7C15 % (1 << 61) >> 8


def edited(text: str, target: float, kind: int, vocabulary: list[str], rng: random.Random) -> tuple[str, float] | None:
    """(a copy at `target` within NEAR, its exact similarity), found by bisection of how much is edited; None if there is none."""
    parts, whole = re.split(r"(\W+)", text), shingles(text)
    at, state = [i for i, part in enumerate(parts) if WORDS.fullmatch(part)], rng.getstate()
    low, high = 0, len(at)
    while low <= high:
        rng.setstate(state)
        count = (low + high) // 2
        copy = EDITS[kind](parts, at, count, vocabulary, rng)
        found = jaccard(whole, shingles(copy))
        if abs(found - target) <= NEAR:
            return copy, found
        low, high = (count + 1, high) if found > target else (low, count - 1)
    return None


def _scattered(parts: list[str], at: list[int], count: int, vocabulary: list[str], rng: random.Random) -> str:
    changed = list(parts)
    for i in rng.sample(at, len(at))[:count]:
        changed[i] = rng.choice(vocabulary)
    return "".join(changed)


def _block(parts: list[str], at: list[int], count: int, vocabulary: list[str], rng: random.Random) -> str:
    changed, first = list(parts), rng.randrange(len(at))
    for k in range(count):
        changed[at[(first + k) % len(at)]] = rng.choice(vocabulary)
    return "".join(changed)


def _inserted(parts: list[str], at: list[int], count: int, vocabulary: list[str], rng: random.Random) -> str:
    place = rng.choice(at)
    return "".join([*parts[:place], *(rng.choice(vocabulary) + " " for _ in range(3 * count)), *parts[place:]])


EDITS: list[Callable[..., str]] = [_scattered, _block, _inserted]


def copies(
    texts: list[str], per_class: int, chains: int, rng: random.Random
) -> tuple[list[str], list[tuple[int, int, str, float]]]:
    """(texts with the copies behind them, [(original, copy, class, similarity)])."""
    vocabulary = sorted({word for text in texts[:2000] for word in WORDS.findall(text)})
    picked = iter(rng.sample(range(len(texts)), len(texts)))
    truth: list[tuple[int, int, str, float]] = []

    def add(original: int, text: str, name: str, similarity: float) -> int:
        texts.append(text)
        truth.append((original, len(texts) - 1, name, similarity))
        return len(texts) - 1

    def near(original: int, name: str, target: float, kind: int) -> int | None:
        found = edited(texts[original], target, kind, vocabulary, rng)
        return add(original, found[0], name, found[1]) if found else None

    for _ in range(per_class):
        add(i := next(picked), texts[i], "exact", 1.0)
        copy = " " + re.sub(r" +", "  ", texts[i := next(picked)].lower())
        add(i, copy, "norm", jaccard(shingles(texts[i]), shingles(copy)))
    for name, target in TARGETS.items():
        made = 0
        while made < per_class:  # in a short text one word is more than NEAR: the next is tried
            made += near(next(picked), name, target, made % 3) is not None
    while chains:
        i: int | None = next(picked)
        for _ in range(3):
            i = None if i is None else near(i, "chain", 0.85, 0)
        chains -= i is not None
    return texts, truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mb", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--per-class", type=int, help="copies of each class; default: 3 a megabyte")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--roots", type=Path, nargs="*", default=[Path(sysconfig.get_paths()["stdlib"]), Path("/usr/share/doc")])
    args = parser.parse_args()
    rng = random.Random(args.seed)
    base = list(different(documents(args.roots, rng), int(args.mb * 1e6)))
    per_class = args.per_class or max(5, int(3 * args.mb))
    texts, truth = copies(base, per_class, per_class // 4, rng)
    order = rng.sample(range(len(texts)), len(texts))
    names = {old: f"d{new:07d}" for new, old in enumerate(order)}
    args.out.mkdir(parents=True, exist_ok=True)
    for s in range(args.shards):
        with open(args.out / f"shard_{s:05d}.jsonl", "w", encoding="utf-8") as f:
            for i in order[len(order) * s // args.shards : len(order) * (s + 1) // args.shards]:
                f.write(json.dumps({"id": names[i], "text": texts[i]}) + "\n")
    with open(args.out / "truth.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"a": names[a], "b": names[b], "cls": c, "jaccard": j}) + "\n" for a, b, c, j in truth)
    size = sum(len(text.encode()) for text in texts)
    print(f"{args.out}: {len(texts)} documents, {size / 1e6:.1f} MB of text, {len(truth)} copies")


if __name__ == "__main__":
    main()
