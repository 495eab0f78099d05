"""EleutherAI's lm-evaluation-harness on a checkpoint of ours, as it is: nothing is converted.

What it asks of a model is in `scorer.py`; here is its own interface around that, the tasks, and what becomes of the results. The
package lm-eval is optional, and imported only here, inside of functions.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_scratch.config.verbs import EvalArgs
from megatron_scratch.train import resume
from megatron_scratch.train.inference import Trained, load_run, run_tokenizer
from megatron_scratch.train.scorer import Scorer, sampling
from megatron_scratch.util.errors import UserError, nearest
from megatron_scratch.util.files import write_json

NEW_TOKENS = 256  # of a generation whose task says nothing: lm-eval's own default
FEWSHOT_SEED, SEEDS = 1234, (0, 1234, 1234)  # its defaults, too: Python, numpy, torch
LONGEST_NAME = 100  # characters of a file


def run_tasks(args: EvalArgs) -> Iterator[str]:
    """Run tasks of lm-eval on a run's checkpoint: lines of a table, and a JSON file.

    Raises:
        UserError: lm-eval is not installed, there is no such task, its data cannot be had.
    """
    assert args.tasks is not None
    if find_spec("lm_eval") is None:
        raise UserError('tasks= needs the package lm-eval; run: pip install "megatron-scratch[eval]"')
    resume.named(_existing(args.run))  # before minutes are spent on data
    with _quiet():
        loaded = _load(args)
        _set_fewshot(loaded["tasks"], args.fewshot)
        trained = load_run(args.run, args.precision)
        scorer = Scorer(trained.model.decoder, run_tokenizer(trained.folder.parent.parent), args.micro_batch_size)
        results = _evaluate(scorer, loaded, args.limit)
    yield f"{trained.folder}, precision {trained.cfg.precision.name}"
    yield from table(results)
    if scorer.cut:
        yield f"{scorer.cut:,} requests were longer than the model's context of {scorer.room} tokens and lost their beginning"
    path = Path(args.out) if args.out else _default_out(args, trained)
    _write(path, args, trained, scorer, results)
    yield f"written to {path}"


def _existing(run: str) -> Path:
    if not Path(run).exists():
        raise UserError(f"run={run!r} does not exist; give a run directory (with config.yaml and checkpoints/) or one checkpoint")
    return Path(run)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets warn of their own insides, and retry aloud; what is wrong with a task we say in a line."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "filelock", "httpx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _load(args: EvalArgs) -> dict[str, Any]:
    """The tasks, their data read. lm-eval's own list (14,000 files, 12 s) is not read where `include` has them all."""
    from lm_eval.tasks import TaskManager

    names = args.tasks or []
    manager = TaskManager(include_path=args.include, include_defaults=False) if args.include else None
    if manager is None or not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=args.include)
    chosen: list[str] = []
    for name in names:
        matching = manager.match_tasks([name])  # patterns, too: mmlu_*
        if not matching:
            where = f"lm-eval and include={args.include} have" if args.include else "lm-eval has"
            raise UserError(f"tasks: {where} no task {name!r}{nearest(name, manager.all_tasks)}; `lm-eval ls tasks` lists them, "
                            "include=DIR adds your own")  # fmt: skip
        chosen += [match for match in matching if match not in chosen]
    return {"tasks": {}, "groups": {}, "group_map": {}} | _with_data(manager, chosen)


def _with_data(manager: Any, names: list[str]) -> Any:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = not are_progress_bars_disabled()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        loaded = manager.load(names)
    except Exception as error:  # datasets, huggingface_hub and tasks' own code raise whatever they like
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"tasks={','.join(names)} could not be loaded: {told}; without a network, bring the cache of Hugging Face "
                        "(HF_HOME) from elsewhere, or give tasks of your own with include=DIR") from error  # fmt: skip
    finally:
        if bars:
            enable_progress_bars()
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise UserError(f"task {unsafe[0]} runs code that the model writes, which is not done here; leave it out")
    return loaded


def _set_fewshot(tasks: Mapping[str, Any], given: int | None) -> None:
    """As lm-eval's own command does; but a number that it would pass over is refused."""
    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        if given is not None and own == 0 and given != 0:
            raise UserError(f"fewshot={given} has no effect on task {name}, which is always asked without examples; leave it out")
        if given is not None or own is None:
            task.set_config(key="num_fewshot", value=given or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _evaluate(scorer: Scorer, loaded: dict[str, Any], limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    torch.manual_seed(SEEDS[2])
    return evaluate(lm=_adapter(scorer), task_dict=loaded, limit=limit, log_samples=False)  # type: ignore[return-value]


def _adapter(scorer: Scorer) -> Any:
    """The harness's view of a model: texts in, numbers and texts out."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm

    tokenizer = scorer.tokenizer

    class Adapter(TemplateLM):  # type: ignore[misc]
        @property
        def eot_token_id(self) -> int:
            """The end of a document, which also stands before a text that has nothing before it, as in training."""
            return tokenizer.eod_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return tokenizer.encode(string)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            return scorer.loglikelihoods([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            """Each token of a text once, in windows of the model's context."""
            windows, owners = [], []
            for number, request in enumerate(requests):
                ids = tokenizer.encode(request.args[0])
                pieces = get_rolling_token_windows(ids, tokenizer.eod_id, scorer.room, context_len=1)
                windows += [make_disjoint_window(piece) for piece in pieces]
                owners += [number] * (len(windows) - len(owners))
            totals = [0.0] * len(requests)
            for owner, (logp, _) in zip(owners, scorer.loglikelihoods(windows), strict=True):
                totals[owner] += logp
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            texts, default = [], min(NEW_TOKENS, scorer.room // 2)
            for number, request in enumerate(tqdm(requests, desc="generating", disable=None)):
                context, given = request.args
                options = sampling(normalize_gen_kwargs(given, default), default)
                texts.append(scorer.text(tokenizer.encode(context), options, seed=number))
            return texts

    return Adapter()


def table(results: Mapping[str, Any]) -> list[str]:
    """Task, metric, value, standard error: one line a number. Groups follow their tasks."""
    rows = [("task", "metric", "value", "stderr")]
    for name, metric, filtered, value in numbers(results):
        error = results["results"][name].get(f"{metric}_stderr,{filtered}", "")
        label = metric if filtered == "none" else f"{metric} ({filtered})"
        rows.append((name, label, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in rows]


def numbers(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """(task, metric, filter, value) of all that is a number and no standard error."""
    for name, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                yield name, metric, filtered, float(value)


def _default_out(args: EvalArgs, trained: Trained) -> Path:
    """RUN/eval/step_N/TASKS.json, with what else was asked for in the name: no result takes the place of another one."""
    more = [f"{args.fewshot}shot"] * (args.fewshot is not None) + [f"first{args.limit}"] * (args.limit is not None)
    more += [args.precision] * (args.precision is not None)
    name = ".".join(["+".join(args.tasks or ()).replace("/", "_"), *more])
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{sha256(name.encode()).hexdigest()[:8]}"
    return trained.folder.parent.parent / "eval" / trained.folder.name / f"{name}.json"


def _write(path: Path, args: EvalArgs, trained: Trained, scorer: Scorer, results: Mapping[str, Any]) -> None:
    from importlib.metadata import version

    kept = {
        key: results[key] for key in ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better") if key in results
    }
    facts = {"checkpoint": str(trained.folder), "step": int(trained.folder.name.removeprefix("step_")),
             "precision": trained.cfg.precision.name, "tasks": args.tasks, "fewshot": args.fewshot, "limit": args.limit,
             "cut_requests": scorer.cut, "lm_eval": version("lm_eval")}  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, json.loads(json.dumps({**facts, **kept}, default=str)))
    except OSError as error:
        raise UserError(f"the results above could not be written to {path}: {error.strerror}; give another out=FILE") from error
