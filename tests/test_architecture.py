"""The layer table of the architecture, read from the imports: who may import whom, and what must not import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from written import checkpoint

from megatron_scratch import registry
from megatron_scratch.config import compose
from megatron_scratch.config.model import check_model
from megatron_scratch.util.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_scratch"
CONFIGS = PACKAGE.parent / "configs"

# Room -> rooms it may import. A room not listed may not be imported from anywhere but cli.
L0 = {"config", "registry", "builtin", "util"}
MAY_IMPORT = {
    "config": L0, "registry": L0, "builtin": L0, "util": L0,
    "parallel": L0,
    "models": L0 | {"parallel"},
    "optim": L0,
    "data": L0,
    "engine": L0 | {"parallel", "optim"},
    "checkpoint": L0 | {"parallel", "engine"},
    "logs": L0,
    "report": L0,
    "train": L0 | {"parallel", "models", "optim", "data", "engine", "checkpoint", "logs", "report"},
    "plan": L0 | {"parallel", "models", "optim", "data", "engine", "checkpoint"},
    "corpus": L0 | {"data"},
    "launch": L0 | {"data"},
    "cli": L0 | {"data", "corpus", "launch", "logs", "report"},
}  # fmt: skip
LAZY = {
    "launch": {"train", "checkpoint"},
    "cli": {"train", "checkpoint"},
}  # inside a function only: a verb pays for what it needs, no other
TORCH_FREE = {"config", "registry", "builtin", "util", "corpus", "launch", "cli", "data", "logs", "report"}
MODULE_STATE = {"registry"}  # the one place with a module-level mutable object


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, top_only: bool = False) -> list[str]:
    nodes = tree.body if top_only and isinstance(tree, ast.Module) else ast.walk(tree)
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path: Path) -> None:
    here, tree = room(path), ast.parse(path.read_text())
    if here in ("__init__", "__main__"):
        return
    at_top = imports(tree, top_only=True)
    for name in imports(tree):
        parts = name.split(".")
        if parts[0] == "megatron_scratch" and len(parts) > 1:
            allowed = MAY_IMPORT[here] | {here} | (set() if name in at_top else LAZY.get(here, set()))
            assert parts[1] in allowed or not (PACKAGE / parts[1]).exists() and not (PACKAGE / f"{parts[1]}.py").exists(), name
        if parts[0] == "torch":
            assert here not in TORCH_FREE, f"{here} must not import torch"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_level_mutable_state(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
        value = getattr(node, "value", None)
        empty = isinstance(value, (ast.Dict, ast.List)) and ast.unparse(value) in ("{}", "[]")
        made = isinstance(value, ast.Call) and getattr(value.func, "id", "") in ("dict", "list", "set", "defaultdict")
        if target is not None and (empty or made) and getattr(target, "id", "") != "__all__":
            assert room(path) in MODULE_STATE, f"{path}:{node.lineno}"
    assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Global)]


def test_every_folder_is_packaged() -> None:
    """A folder without __init__.py works in a checkout, and is not in the wheel."""
    assert not [str(path) for path in {p.parent for p in files()} if not (path / "__init__.py").is_file()]


def test_no_import_cycles() -> None:
    graph = {}
    for path in files():
        name = "megatron_scratch." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        graph[name.removesuffix(".__init__")] = imports(ast.parse(path.read_text()), top_only=True)
    edges = {a: {b for i in names for b in (i, i.rpartition(".")[0]) if b in graph and b != a} for a, names in graph.items()}

    def visit(node: str, path: tuple[str, ...]) -> None:
        assert node not in path, " -> ".join([*path, node])
        for nxt in edges[node]:
            # A package's own __init__ gathers its modules' public names: importing one through it is no cycle of modules.
            if not nxt.startswith(node + ".") and not node.startswith(nxt + "."):
                visit(nxt, (*path, node))

    for node in edges:
        visit(node, ())


def test_nothing_dangerous() -> None:
    """No pickle, eval, shell or yaml.load anywhere: nothing that is read can run."""
    for path in files():
        tree = ast.parse(path.read_text())
        bad = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
        assert not bad & {name.split(".")[0] for name in imports(tree)}, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "os.system", "yaml.load", "torch.load", "os.popen"), f"{path}:{node.lineno}"
                for keyword in node.keywords:
                    assert keyword.arg not in ("shell", "allow_pickle"), f"{path}:{node.lineno}"


def test_environment_is_read_in_one_place() -> None:
    allowed = {"util/env.py"}
    for path in files():
        if str(path.relative_to(PACKAGE)) not in allowed:
            assert "os.environ" not in path.read_text() and "getenv" not in path.read_text(), path


def test_the_command_line_answers_without_torch() -> None:
    code = ("import sys; from megatron_scratch.cli import main; code = main(['train', 'data.dir=no/such', 'model.norm=rmsnorm']); "
            "assert code == 2, code; assert 'torch' not in sys.modules, 'torch was imported'")  # fmt: skip
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)


def test_commands_on_checkpoints_answer_without_torch(tmp_path: Path) -> None:
    """And so does the process that brings checkpoints to remote storage: it starts at once, and holds no memory for torch."""
    values = {"model.w": ("float32", np.ones((4, 3), np.float32))}
    a, b = (str(checkpoint(tmp_path / name, 1, values)) for name in "ab")
    calls = [["ls", a], ["inspect", a], ["inspect", a, "tensor=w"], ["verify", a], ["diff", a, b], ["verify", f"file://{a}"]]
    code = (f"import sys; from megatron_scratch.cli import main; import megatron_scratch.checkpoint.uploader; "
            f"codes = [main(['ckpt', *words]) for words in {calls}]; assert not any(codes), codes; "
            "assert 'torch' not in sys.modules, 'torch was imported'")  # fmt: skip
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)


def groups() -> list[str]:
    return sorted(f"{p.parent.name}={p.stem}" for p in CONFIGS.glob("*/*.yaml"))


@pytest.mark.parametrize("override", groups())
def test_every_yaml_composes_and_starts_with_its_command(override: str) -> None:
    cfg = compose.load([override])
    group, _, name = override.partition("=")
    lines = (CONFIGS / group / f"{name}.yaml").read_text().splitlines()
    first = next(line for line in lines if not line.startswith("# @package"))  # Hydra wants that one on top
    assert first.startswith("# megatron-scratch ") and override in first
    check_model(cfg.model)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("experiment/*.yaml")), ids=lambda p: p.stem)
def test_an_experiment_names_entries_where_the_command_line_can_override_them(path: Path) -> None:
    """A `name:` inside a section would win over `precision=fp32` on the command line, silently: it belongs into `defaults`."""
    plain = compose.load([f"experiment={path.stem}"])
    for section in (p.name for p in CONFIGS.iterdir() if p.is_dir() and p.name not in ("corpus", "experiment", "logging", "model")):
        for other in set(registry.names(section)) - {getattr(plain, section).name}:
            try:
                cfg = compose.load([f"experiment={path.stem}", f"{section}={other}"])
            except UserError:
                continue  # refused, as the experiment sets what the other entry does not have; but never ignored
            assert getattr(cfg, section).name == other


def test_every_registered_part_exists() -> None:
    from megatron_scratch.builtin import _ENGINES, _OPTIMIZERS, _PARTS, _SCHEDULES, _SINKS

    for kind, names in {**_PARTS, "engine": _ENGINES, "logging": _SINKS, "optim": _OPTIMIZERS, "schedule": _SCHEDULES}.items():
        for name in names:
            assert registry.get(kind, name) is not None, (kind, name)  # imports the module and finds the attribute
