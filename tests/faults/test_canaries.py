"""Nothing that is read can run: a pickle in the place of any file of a run, before any command, leaves no trace."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import config, run

from megatron_scratch.cli import main
from megatron_scratch.util.exits import exit_code


class Evil:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.canary,))


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its data beside it."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(corpus, root / "data")
    assert run(config(root / "data", root / "run", "train.steps=2", "model.num_layers=1")) == [0]
    return root


def _goes_on(root: Path) -> int:
    return run(config(root / "data", root / "run", "train.steps=3", "model.num_layers=1"))[0]


# What is attacked: one file, or (for a folder) every file in it at once; and what is then done.
FILES = ["run/checkpoints/step_00000002/manifest.json", "run/checkpoints/step_00000002/rank_00000_000.safetensors",
         "run/checkpoints/step_00000002", "run/config.yaml", "run/metrics.jsonl", "run/ledger.jsonl"]  # fmt: skip
DATA = ["data/train.bin", "data/train.idx", "data/manifest.json", "data"]
COMMANDS: dict[str, Callable[[Path], int]] = {
    "train": _goes_on,
    "eval": lambda root: main(["eval", str(root / "run"), "batches=1"]),
    "generate": lambda root: main(["generate", str(root / "run"), "max_new_tokens=1"]),
    "ls": lambda root: main(["ckpt", "ls", str(root / "run"), "verify=true"]),
    "inspect": lambda root: main(["ckpt", "inspect", str(root / "run")]),
    "verify": lambda root: main(["ckpt", "verify", str(root / "run")]),
    "diff": lambda root: main(["ckpt", "diff", str(root / "run"), str(root / "run")]),
    "export": lambda root: main(["ckpt", "export-hf", str(root / "run"), str(root / "out")]),
    "import": lambda root: main(["ckpt", "import-hf", str(root / "run/checkpoints/step_00000002"), str(root / "out")]),
    "data": lambda root: main(["data", "inspect", str(root / "data"), "document=0"]),
}


@pytest.mark.parametrize("victim", [*FILES, *DATA])
def test_no_pickle_is_ever_loaded(victim: str, trained: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    content = pickle.dumps(Evil(canary))
    pickle.loads(content)
    assert canary.exists(), "the pickle works"
    canary.unlink()
    for name, command in COMMANDS.items():
        if victim.startswith("data") and name not in ("train", "data", "eval"):
            continue
        root = tmp_path / name
        shutil.copytree(trained, root)
        text = (root / "run/config.yaml").read_text().replace(str(trained), str(root))
        (root / "run/config.yaml").write_text(text)
        path = root / victim
        for file in [path] if path.is_file() else [p for p in path.iterdir() if p.is_file()] + [path / ".metadata", path / "x.bin"]:
            file.write_bytes(content)
        code = _try(command, root)
        assert not canary.exists(), (victim, name)
        assert code is not None, (victim, name)
        shutil.rmtree(root)


def _try(command: Callable[[Path], int], root: Path) -> int | None:
    """The exit code; None where it came to a traceback."""
    try:
        return exit_code(lambda: command(root))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return None
