"""Every attention backend against the truth in fp64, forward and backward, under every mask; who can what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import which

import pytest
import torch
from shapes import shapes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention

from megatron_scratch import registry
from megatron_scratch.config import attention, compose
from megatron_scratch.config.attention import CAPABLE, portable, wants_dense
from megatron_scratch.config.schema import check
from megatron_scratch.models import attend, attend_check, attend_flex, attend_matmul
from megatron_scratch.models.attend import AttendMask, make_mask, reference, sdpa
from megatron_scratch.models.attend_check import ALLOWED, Case, run, worst
from megatron_scratch.util.errors import UserError

CPU = torch.device("cpu")
ON_CPU = [name for name in CAPABLE if CAPABLE[name].cpu_backward]
SHAPES = shapes((1, 7, 129), (16,))
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_matmul, "BLOCK", 10)  # 129 queries in 12 blocks of 10 and one of 9


@BOTH
@pytest.mark.parametrize("name", ON_CPU)
def test_error_is_at_most_twice_that_of_sdpa(name: str, dtype: torch.dtype) -> None:
    wrong = {case: error for case in SHAPES if (error := worst(registry.get("attention", name), case, dtype, CPU)) > ALLOWED}
    assert not wrong


def test_every_registered_backend_has_its_row() -> None:
    assert set(registry.names("attention")) == set(CAPABLE)


def looks_one_too_far(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttendMask, p: float = 0.0) -> torch.Tensor:
    window = mask.window and mask.window + 1
    return sdpa(q, k, v, make_mask(mask.queries, mask.keys, window, mask.documents_BT, q.device), p)


def forgets_the_last_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttendMask, p: float = 0.0) -> torch.Tensor:
    return sdpa(q, k, torch.cat([v[:, :, :-1], v[:, :, :-1].mean(2, keepdim=True)], 2), mask, p)


def rounds_once_more(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttendMask, p: float = 0.0) -> torch.Tensor:
    coarse = torch.bfloat16 if q.dtype == torch.float32 else torch.float8_e4m3fn
    return sdpa(q.to(coarse).to(q.dtype), k, v, mask, p)


@BOTH
@pytest.mark.parametrize("broken", [looks_one_too_far, forgets_the_last_head, rounds_once_more])
def test_a_wrong_kernel_is_found(broken: attend.Backend, dtype: torch.dtype) -> None:
    assert worst(broken, Case(40, 40, window=7), dtype, CPU) > 5 * ALLOWED


def test_sdpa_is_not_its_own_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_check, "sdpa", looks_one_too_far)
    assert worst(looks_one_too_far, Case(40, 40, window=7), torch.bfloat16, CPU) == float("inf")


def test_a_backend_is_trusted_once_it_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend_check.trusted.cache_clear()
    with torch.no_grad():
        assert attend_check.trusted("matmul", CPU, torch.bfloat16, 16)
    monkeypatch.setattr(attend_check.registry, "get", lambda kind, name: pytest.fail("asked twice"))
    assert attend_check.trusted("matmul", CPU, torch.bfloat16, 16)
    attend_check.trusted.cache_clear()
    monkeypatch.setattr(attend_check.registry, "get", lambda kind, name: 1 / 0)
    assert not attend_check.trusted("matmul", CPU, torch.bfloat16, 16)
    attend_check.trusted.cache_clear()


@BOTH
def test_run_gives_what_autograd_gives(dtype: torch.dtype) -> None:
    case = Case(7, 7)
    *qkv, grad = case.tensors(dtype, CPU)
    leaves = [x.requires_grad_() for x in qkv]
    sdpa(*leaves, case.mask(CPU)).backward(grad)
    for got, leaf in zip(run(sdpa, [*qkv, grad], case.mask(CPU))[1:], leaves, strict=True):
        assert torch.equal(got, leaf.grad)


@pytest.mark.parametrize("name", ON_CPU)
def test_last_queries_of_longer_keys(name: str) -> None:
    case = Case(24, 24)
    q, k, v, _ = case.tensors(torch.float32, CPU)
    full = reference(q, k, v, case.mask(CPU))
    for queries in (1, 3):
        out = registry.get("attention", name)(q[:, -queries:], k, v, make_mask(queries, 24, None, None, CPU), 0.0)
        torch.testing.assert_close(out, full[:, -queries:], rtol=1e-5, atol=1e-6)


def test_matmul_gradients_in_fp64() -> None:
    q, k, v, _ = (x.requires_grad_() for x in Case(12, 12, 4, 2, 4, batch=1).tensors(torch.float64, CPU))
    mask = make_mask(12, 12, 5, None, CPU)
    assert torch.autograd.gradcheck(lambda q, k, v: attend.matmul(q, k, v, mask), (q, k, v))


# masks


def test_mask_says_who_sees_whom() -> None:
    documents = torch.tensor([[0] * 5 + [1] * 14 + [2] * 5])
    mask = make_mask(24, 24, 7, documents, CPU)
    for q in range(24):
        for k in range(24):
            want = k <= q < k + 7 and bool(documents[0, q] == documents[0, k])
            assert bool(mask.allowed_BST[0, q, k]) == want


def test_a_window_as_long_as_the_sequence_is_plain_causal() -> None:
    assert make_mask(24, 24, 24, None, CPU).causal
    assert not make_mask(24, 24, 23, None, CPU).causal


def test_who_reads_the_written_out_mask_cannot_miss_it() -> None:
    assert {name for name in CAPABLE if not wants_dense(name)} == {"flex", "flash_attn"} and wants_dense("a plugin's")
    mask = make_mask(24, 24, 7, None, CPU, dense=False)
    assert mask.dense_BST is None and mask.window == 7
    for backend in (reference, sdpa, attend.matmul):
        with pytest.raises(AssertionError, match="dense=False"):
            backend(*Case(24, 24).tensors(torch.float32, CPU)[:3], mask)
    assert make_mask(24, 24, None, None, CPU, dense=False).causal
    assert make_mask(1, 24, 7, None, CPU, dense=False).allowed_BST is not None


# dropout


@pytest.mark.parametrize("name", ["matmul", "flex"])
def test_dropout_is_refused_in_the_same_words_before_and_in_the_kernel(name: str) -> None:
    want = f"model.attention={name} knows no dropout, got model.dropout=0.5; use model.attention=auto"
    with pytest.raises(UserError, match=want):
        registry.get("attention", name)(*Case(7, 7).tensors(torch.float32, CPU)[:3], make_mask(7, 7, None, None, CPU), 0.5)
    with pytest.raises(UserError, match=want):
        checked(f"model.attention={name}", "model.dropout=0.5")


@BOTH
@pytest.mark.parametrize("name", ["auto", "reference", "sdpa"])
def test_dropout_scales_what_it_keeps(name: str, dtype: torch.dtype) -> None:
    q, k, v, _ = Case(24, 24, 4, 4, 16).tensors(dtype, CPU)
    torch.manual_seed(0)
    out = registry.get("attention", name)(q, k, torch.ones_like(v), make_mask(24, 24, None, None, CPU), 0.5)
    assert abs(float(out.mean()) - 1.0) < 0.1 and float(out.std()) > 0.1


# what is refused before anything starts


def checked(*words: str, gpus: int = 0, versions: tuple[str, ...] = ()) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "local_gpus", lambda: gpus)
        patch.setattr(attention, "flash_versions", lambda: versions)
        check(compose.load(["model=llama_tiny", "model.head_dim=16", "model.vocab_size=64", *words]), 1)


@pytest.mark.parametrize(("words", "versions", "gpus", "want"), [
    ("flex", (), 0, "flex has no backward on a CPU, and nvidia-smi lists no GPU here; use model.attention=auto"),
    ("flex model.head_dim=8", (), 1, "flex wants other heads, got head_dim=8; allowed: 16 or more"),
    ("flex precision=fp64", (), 1, "flex computes in fp32 or bf16 or fp16, got precision=fp64"),
    ("flash_attn", ("4",), 1, "flash_attn computes in bf16 or fp16, got precision=fp32; give precision=bf16"),
    ("flash_attn precision=bf16", (), 1, "flash-attn is not installed; pip install .megatron-scratch.flash-attn"),
    ("flash_attn precision=bf16", ("4",), 0, "flash_attn computes on GPUs only, and nvidia-smi lists no GPU here"),
    ("flash_attn precision=bf16 model.head_dim=20", ("2",), 1, "got head_dim=20; allowed: multiples of 8 from 8 to 256"),
    ("flash_attn precision=bf16 model.dropout=0.1", ("3", "4"), 1, "only 2.x knows dropout, got model.dropout=0.1 and 3 and 4.x"),
])  # fmt: skip
def test_refusals(words: str, versions: tuple[str, ...], gpus: int, want: str) -> None:
    with pytest.raises(UserError, match=want) as caught:
        checked(*f"model.attention={words}".split(), gpus=gpus, versions=versions)
    assert "\n" not in str(caught.value)


def test_what_is_not_refused() -> None:
    checked("model.attention=flex", gpus=1)
    checked(
        "model.attention=flash_attn", "precision=bf16", "model.dropout=0.1", "model.sliding_window=9", gpus=1, versions=("2", "4")
    )
    model = compose.load(["model.attention=flash_attn"]).model
    attention.check_attention(model, "fp8", documents=True, here=False)  # its attention is bf16
    assert [portable(name) for name in ("sdpa", "flex", "flash_attn", "a plugin's")] == ["sdpa", "auto", "auto", "a plugin's"]


@pytest.mark.parametrize("missing", ["window", "documents", "gqa", "dropout"])
def test_the_table_is_what_the_checks_go_by(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CAPABLE, "sdpa", replace(CAPABLE["sdpa"], **{missing: False}))
    options = {"window": "model.sliding_window=9", "documents": "data.mask_documents=true", "gqa": "model.num_kv_heads=2",
               "dropout": "model.dropout=0.1"}  # fmt: skip
    with pytest.raises(UserError, match="model.attention=sdpa knows no .*use model.attention=auto"):
        checked("model.attention=sdpa", options[missing])
    checked("model.attention=sdpa", "model.num_kv_heads=null")


@pytest.mark.parametrize(("files", "want"), [
    ((), ()),
    (("flash_attn/__init__.py", "flash_attn/flash_attn_interface.py", "flash_attn_2_cuda.py"), ("2",)),
    (("flash_attn/cute/interface.py", "cutlass/__init__.py"), ("4",)),
    (("flash_attn/cute/interface.py",), ()),
    (("flash_attn_interface.py", "flash_attn/__init__.py", "flash_attn/flash_attn_interface.py", "flash_attn_2_cuda.py",
      "flash_attn/cute/interface.py", "cutlass/__init__.py"), ("3", "4", "2")),
])  # fmt: skip
def test_what_is_installed(files: tuple[str, ...], want: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(attention.flash_versions()):
        pytest.skip("a real flash-attn is installed")
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise ImportError('probing imports nothing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert attention.flash_versions.__wrapped__() == want


def test_docs_show_the_table() -> None:
    def words(yes: bool) -> str:
        return "yes" if yes else "no"

    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    for name, able in CAPABLE.items():
        heads = "any" if able.heads[0] == 1 else f"{able.heads[0]}+" if able.heads[2] == 1 else "8, 16, ... 256"
        marks = (getattr(able, key) for key in ("window", "documents", "gqa", "dropout", "cpu", "cpu_backward"))
        row = [f"`{name}`", *map(words, marks), ", ".join(able.dtypes), heads]
        assert f"| {' | '.join(row)} |" in page, row


# dry runs: shapes without values


@BOTH
@pytest.mark.parametrize("where", ["fake", "meta"])
@pytest.mark.parametrize("name", list(CAPABLE))
def test_shapes_without_values(name: str, where: str, dtype: torch.dtype) -> None:
    device = torch.device("meta" if where == "meta" else "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) if where == "fake" else torch.no_grad():
        for case in (Case(40, 40), Case(1, 7), Case(40, 40, window=9, documents=where == "fake")):
            shapes = [(2, case.queries, 4, 64), (2, case.keys, 2, 64), (2, case.keys, 2, 64)]
            q, k, v = (torch.empty(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)
            with torch.enable_grad():
                out = registry.get("attention", name)(q, k, v, case.mask(device), 0.0)
            grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
            assert [(t.shape, t.dtype, t.device.type) for t in (out, *grads)] == [
                (t.shape, dtype, device.type) for t in (q, q, k, v)
            ]


# flex


@pytest.fixture
def eager_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernel and block masks, not compiled: a shape takes 20 ms, not 7 s."""
    monkeypatch.setattr(attend_flex, "_kernel", lambda: flex_attention)


@pytest.mark.usefixtures("eager_flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@BOTH
def test_flex_forward(dtype: torch.dtype) -> None:
    some = [case for case in SHAPES if case.queries == 7 or case.groups == 2 or case.queries != case.keys]
    assert not {case: e for case in some if (e := worst(attend_flex.flex, case, dtype, CPU, backward=False)) > ALLOWED}


@pytest.mark.skipif(which("g++") is None, reason="torch.compile needs g++")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiled_flex_is_compiled_once_for_all_documents() -> None:
    torch.compiler.reset()
    case = Case(129, 129, window=20, documents=True)
    assert worst(attend_flex.flex, case, torch.float32, CPU, backward=False) <= ALLOWED
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    q, k, v, _ = case.tensors(torch.float32, CPU)
    mask = make_mask(129, 129, 20, torch.arange(129).expand(2, 129) // 50, CPU)
    with torch.no_grad():
        torch.testing.assert_close(attend_flex.flex(q, k, v, mask), sdpa(q, k, v, mask), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch.compiler.reset()


@pytest.mark.usefixtures("eager_flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_block_mask_is_made_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], attend_flex._make
    monkeypatch.setattr(attend_flex, "_make", lambda *args: made.append(1) or make(*args))
    q, k, v, _ = Case(24, 24).tensors(torch.float32, CPU)
    for _ in range(2):
        mask = make_mask(24, 24, 7, None, CPU, dense=False)
        for _ in range(3):  # layers
            attend_flex.flex(q, k, v, mask)
    assert len(made) == 2


def test_flex_refuses_a_gradient_on_a_cpu() -> None:
    q, k, v, _ = Case(7, 7).tensors(torch.float32, CPU)
    with pytest.raises(UserError, match="model.attention=flex has no backward on a CPU; use model.attention=auto"):
        attend_flex.flex(q.requires_grad_(), k, v, make_mask(7, 7, None, None, CPU))
