"""Named validation sets: opened beside the run's own, with the same tokenizer, and without a say in what is trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_scratch.config import compose
from megatron_scratch.config.data import DataConfig, check_data
from megatron_scratch.data.loader import open_data
from megatron_scratch.data.tokenizer import ByteTokenizer
from megatron_scratch.data.writer import IndexedWriter
from megatron_scratch.parallel import SINGLE
from megatron_scratch.train import build
from megatron_scratch.util.errors import UserError

EOD = 256


def write(prefix: Path, documents: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    with IndexedWriter(prefix, "<u2") as writer:
        for _ in range(documents):
            writer.add_document([*rng.integers(0, 250, size=20).tolist(), EOD])
    return prefix


def folder(path: Path, sha256: str | None = None, valid: int = 3) -> Path:
    """A prepared folder in small."""
    path.mkdir()
    tokenizer = ByteTokenizer()
    tokenizer.save(path)
    files = {}
    for split, documents in (("train", 40), ("valid", valid)):
        if documents:
            size = write(path / split, documents, seed=documents).with_suffix(".bin").stat().st_size
            files[f"{split}.bin"] = {"bytes": size, "sha256": f"sum of {path.name} {split}"}
    manifest = {"format": 1, "tokenizer": {"sha256": sha256 or tokenizer.sha256}, "files": files}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_sets_are_opened_by_name(tmp_path: Path) -> None:
    """A folder means its valid split; a prefix is what it says."""
    own, wiki, bare = folder(tmp_path / "own"), folder(tmp_path / "wiki", valid=5), write(tmp_path / "code_text_document", 7)
    data = DataConfig(dir=str(own), valid_sets={"wiki": str(wiki), "code": str(bare), "train-0": str(wiki / "train")})
    source = open_data(data, 16, 1)
    assert list(source.evaluated) == ["", "wiki", "code", "train-0"] and source.evaluated[""] is source.valid
    tokens = {name: documents * 21 for name, documents in {"": 3, "wiki": 5, "code": 7, "train-0": 40}.items()}
    assert {name: len(s) for name, s in source.evaluated.items()} == {n: -(-(count - 1) // 16) for n, count in tokens.items()}
    for name, windows in source.evaluated.items():
        assert sum(max(windows[i].valid - 1, 0) for i in range(len(windows))) == tokens[name] - 1, "each token but the first"


def test_they_change_nothing_of_the_training(tmp_path: Path) -> None:
    own, wiki = folder(tmp_path / "own"), folder(tmp_path / "wiki", valid=5)
    plain, more = (open_data(DataConfig(dir=str(own), valid_sets=sets), 16, 1) for sets in ({}, {"wiki": str(wiki)}))
    assert (plain.fingerprint, plain.vocab_size, len(plain.valid)) == (more.fingerprint, more.vocab_size, len(more.valid))
    bare = write(tmp_path / "bare", 40)
    source = open_data(DataConfig(train=str(bare), valid_sets={"wiki": str(wiki)}), 16, 1)
    assert source.tokenizer is None and source.vocab_size is None, "a named set does not choose the tokenizer"
    assert source.valid is None and list(source.evaluated) == ["wiki"]


def test_an_evaluation_of_a_checkpoint_leaves_them_alone(tmp_path: Path) -> None:
    own = folder(tmp_path / "own")
    source = open_data(DataConfig(dir=str(own), valid_sets={"gone": str(tmp_path / "gone")}), 16, 1, need_train=False)
    assert list(source.evaluated) == [""]


@pytest.mark.parametrize(("name", "words"), [("other", "was made with abababababab"), ("gone", "is neither a dataset folder nor"),
                                             ("own-train", "has no valid.idx")])  # fmt: skip
def test_a_set_that_cannot_be_evaluated_is_refused(name: str, words: str, tmp_path: Path) -> None:
    own = folder(tmp_path / "own")
    folder(tmp_path / "other", sha256="ab" * 32)
    folder(tmp_path / "own-train", valid=0)
    with pytest.raises(UserError) as error:
        open_data(DataConfig(dir=str(own), valid_sets={"x": str(tmp_path / name)}), 16, 1)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_other_tokenizers_are_refused_where_data_tokenizer_is_given(tmp_path: Path) -> None:
    own, other, bare = folder(tmp_path / "own"), folder(tmp_path / "other", sha256="ab" * 32), write(tmp_path / "bare", 40)
    data = DataConfig(train=str(bare), tokenizer=str(own), valid_sets={"x": str(other)})
    with pytest.raises(UserError, match="was made with abababababab"):
        open_data(data, 16, 1)


@pytest.mark.parametrize("name", ["a/b", "", "a b", "\u00e9", "a\n"])
def test_names_that_make_no_metric_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"data\.valid_sets has the name .*; allowed: letters, digits"):
        check_data(DataConfig(dir="x", valid_sets={name: "x"}))


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.valid_sets\.wiki is empty"):
        check_data(DataConfig(dir="x", valid_sets={"wiki": ""}))


def test_they_are_given_on_the_command_line() -> None:
    cfg = compose.load(["data.valid_sets.wiki=data/wiki", "data.valid_sets.code_2=data/code/valid"])
    assert cfg.data.valid_sets == {"wiki": "data/wiki", "code_2": "data/code/valid"}
    check_data(cfg.data)


def test_batches_of_a_set(tmp_path: Path) -> None:
    """Each token of the set is predicted once, whichever set it is."""
    own, wiki = folder(tmp_path / "own"), folder(tmp_path / "wiki", valid=5)
    cfg = compose.load(["train.seq_len=16", "train.micro_batch_size=2", "model.vocab_size=257"])
    cfg.data = DataConfig(dir=str(own), valid_sets={"wiki": str(wiki)}, mask_eod=False)
    source = open_data(cfg.data, 16, 1)
    found = {name: sum(batch.predicted for batch in build.validation(cfg, s, SINGLE)) for name, s in source.evaluated.items()}
    assert found == {"": 3 * 21 - 1, "wiki": 5 * 21 - 1}
