"""The CPU choices of this package beside what they replace: `python benchmarks/cpu_kernels.py [--out FILE.md]`.

Products by oneDNN against torch's own, attention by batched products against torch's kernel, RMSNorm's backward written out against
differentiated, glibc told to keep freed memory or not, and what part of a step is matrix products. Best of several for kernels;
for steps, medians of processes that take turns. In bf16 the variant "products by torch" changes nothing, as all products are
torch's there: what it differs by is the noise.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_scratch.models import attend, gemm
from megatron_scratch.models.norms import _RMSNormCPU

TOKENS, ROUNDS = 4096, 12


def best(work: Callable[[], object]) -> float:
    """Seconds of the quickest of ROUNDS calls, after three that do not count."""
    times = []
    for _ in range(3 + ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[3:])


def products() -> list[str]:
    """fp32 products of a 384-wide model, GFLOP/s."""
    rows = ["| fp32 product (rows, in, out) | torch | oneDNN |", "|---|---|---|"]
    for n, i, o in ((TOKENS, 384, 1536), (TOKENS, 1536, 384), (384, TOKENS, 1536)):
        a, b = torch.randn(n, i), torch.randn(o, i)
        flops = 2e-9 * n * i * o
        seconds = [best(lambda a=a, b=b, f=f: f(a, b)) for f in (lambda a, b: a @ b.t(), gemm._onednn)]
        rows.append(f"| {n} {i} {o} | {flops / seconds[0]:.0f} | {flops / seconds[1]:.0f} |")
    return rows


def attention() -> list[str]:
    """Causal attention forward + backward, 6 heads of 64, ms."""
    rows = ["| attention, keys | fp32 sdpa | fp32 matmul | bf16 sdpa | bf16 matmul |", "|---|---|---|---|---|"]
    for keys in (256, 512, 1024, 2048):
        cells = []
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v, d = (torch.randn(TOKENS // keys, keys, 6, 64, dtype=dtype) for _ in range(4))
            leaves, mask = [t.requires_grad_() for t in (q, k, v)], attend.make_mask(keys, keys, None, None, q.device)
            for backend in (attend.sdpa, attend.matmul):
                cells.append(best(lambda f=backend, x=leaves, m=mask, g=d: f(*x, m).backward(g)))
        rows.append(f"| {keys} | {' | '.join(f'{1e3 * s:.1f}' for s in cells)} |")
    return rows


def rmsnorm() -> list[str]:
    """RMSNorm forward + backward of 4096 x 384, ms."""
    rows = ["| RMSNorm | F.rms_norm | written out |", "|---|---|---|"]
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, d = torch.randn(TOKENS, 384, dtype=dtype).requires_grad_(), torch.ones(384, requires_grad=True), None
        d = torch.randn_like(x)
        plain = best(lambda x=x, d=d, w=weight: F.rms_norm(x, (384,), w.to(x.dtype), 1e-5).backward(d))
        ours = best(lambda x=x, d=d, w=weight: _RMSNormCPU.apply(x, w, 1e-5).backward(d))
        rows.append(f"| {str(dtype).removeprefix('torch.')} | {1e3 * plain:.1f} | {1e3 * ours:.1f} |")
    return rows


# A step of `bench` with one choice taken back.
WITHOUT = {
    "as it is": "",
    "products by torch": "import megatron_scratch.models.gemm as g; g.onednn_is_faster = lambda: False",
    "attention by sdpa": "",
    "RMSNorm differentiated": "import megatron_scratch.models.norms as n, torch.nn.functional as F; "
    "n.RMSNorm.forward = lambda s, x: F.rms_norm(x, x.shape[-1:], n.cast(s.weight, x.dtype), s.eps)",
    "memory given back": "import megatron_scratch.train.build as b; b.keep_freed_memory = lambda: False",
}


def steps(precision: str, rounds: int) -> list[str]:
    """Tokens/s of whole training steps, the variants taking turns in processes of their own."""
    found: dict[str, list[float]] = {name: [] for name in WITHOUT}
    for _ in range(rounds):
        for name, patch in WITHOUT.items():
            words = ["bench", "experiment=bench_cpu", f"precision={precision}", "bench.steps=5"]
            words += ["model.attention=sdpa"] if name == "attention by sdpa" else []
            code = f"{patch}\nfrom megatron_scratch.cli import main\nraise SystemExit(main({words!r}))"
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            match = re.search(r"tokens/s .*median ([\d,]+)", out)
            assert match is not None, out
            found[name].append(float(match.group(1).replace(",", "")))
    rows = [f"| {precision} step | tokens/s, median of {rounds} | of it as it is |", "|---|---|---|"]
    whole = statistics.median(found["as it is"])
    return rows + [f"| {n} | {statistics.median(v):,.0f} | {statistics.median(v) / whole:.2f} |" for n, v in found.items()]


def shares() -> list[str]:
    """Part of a step's CPU time that is matrix products (aten::mm and bmm, or ours), by torch's profiler."""
    code = """
import sys, numpy as np, torch
import megatron_scratch.models.gemm as g
from megatron_scratch.config import compose
from megatron_scratch.train import bench, build
from megatron_scratch.util.env import Rank
if sys.argv[2] == "torch": g.onednn_is_faster = lambda: False
cfg = compose.load(["experiment=bench_cpu", f"precision={sys.argv[1]}"])
with build.process_group(cfg, Rank(), None) as topo:
    _, engine = build.build_engine(cfg, topo)
    rng, clock = np.random.default_rng(0), bench.Clock(topo.device)
    step = lambda: bench._step(cfg, engine, [bench._batch(cfg, rng)], clock, None)
    for _ in range(3): step()
    with torch.profiler.profile() as profile:
        for _ in range(3): step()
rows = profile.key_averages()
wanted = ("aten::mm", "aten::bmm", "mkldnn::_linear_pointwise")
print(sum(r.self_cpu_time_total for r in rows if r.key in wanted) / sum(r.self_cpu_time_total for r in rows))
"""
    rows = ["| part of a step that is products | |", "|---|---|"]
    for precision, way in (("fp32", "torch"), ("fp32", "oneDNN"), ("bf16", "oneDNN")):
        out = subprocess.run([sys.executable, "-c", code, precision, way], capture_output=True, text=True, check=True).stdout
        rows.append(f"| {precision}, products by {way} | {float(out.split()[-1]):.0%} |")
    return rows


def main() -> None:
    """Measure all, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of whole steps (3)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sections = [products(), attention(), rmsnorm(), shares(), steps("fp32", args.rounds), steps("bf16", args.rounds)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    head = f"`python benchmarks/cpu_kernels.py`, commit {commit}, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, "
    head += f"Python {platform.python_version()}, {torch.get_num_threads()} threads, load before {os.getloadavg()[0]:.1f}. "
    head += "GFLOP/s for products, ms forward + backward for the rest."
    text = "\n\n".join(["# Kernels on a CPU", head, *("\n".join(rows) for rows in sections)]) + "\n"
    print(text, end="")
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
