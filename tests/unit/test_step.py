"""The loss of a step is the mean over predicted tokens, by the plainest possible computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import config

from megatron_scratch.data.loader import Loader, open_data
from megatron_scratch.parallel import SINGLE
from megatron_scratch.train import build
from megatron_scratch.train.batches import BatchPlan
from megatron_scratch.train.evaluate import evaluate
from megatron_scratch.train.passes import WholeModel, to_device
from megatron_scratch.train.step import TrainStep


@pytest.mark.parametrize("extra", [[], ["data.mask_documents=true"], ["data.mask_eod=false"]])
def test_loss_is_the_mean_over_predicted_tokens(extra: list[str], corpus: Path, tmp_path: Path) -> None:
    cfg = config(corpus, tmp_path, *extra)
    data = open_data(cfg.data, cfg.train.seq_len, cfg.seed)
    (model,), engine = build.build_engine(cfg, SINGLE)
    loader = build.loader(cfg, data.train, SINGLE)
    masked = Loader(data.train, cfg.train.micro_batch_size)  # to find a batch with the end of a document in it
    size = cfg.train.global_batch_size
    first = next(f for f in range(0, 100 * size, size) if any(b.predicted < b.labels_BS.size for b in masked.microbatches(f, size)))
    losses = []
    for batch in loader.microbatches(first, size):
        tokens, labels, positions, documents = to_device(batch, torch.device("cpu"))
        logits = model.decoder.logits(model.decoder(tokens, positions, documents))[..., : cfg.model.vocab_size]
        losses.append(
            F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")[labels.flatten() >= 0]
        )
    plain = torch.cat(losses)
    assert (plain.numel() < size * cfg.train.seq_len) == ("data.mask_eod=false" not in extra)
    plan = BatchPlan(cfg.train)
    plan.rebase(0, first)
    step = TrainStep(WholeModel(engine, SINGLE), loader, plan, SINGLE, lambda s: 0.0, None, lambda: False)
    assert step(0).loss == pytest.approx(plain.mean().item(), rel=1e-6)


def test_evaluation_is_the_mean_over_the_whole_set(corpus: Path, tmp_path: Path) -> None:
    cfg = config(corpus, tmp_path)
    data = open_data(cfg.data, cfg.train.seq_len, cfg.seed)
    (model,), engine = build.build_engine(cfg, SINGLE)
    assert data.valid is not None and data.tokenizer is not None
    cfg.train.micro_batch_size = 7  # does not divide the number of windows
    batches, sizes = build.validation(cfg, data.valid, SINGLE), data.tokenizer.bytes_per_id
    found = evaluate([model], WholeModel(engine, SINGLE).loss, batches, SINGLE, sizes, None)
    total, count, length = 0.0, 0, 0
    with torch.no_grad():
        for i in range(len(data.valid)):
            sample = data.valid[i]
            tokens, labels = torch.from_numpy(sample.tokens[:-1])[None], torch.from_numpy(sample.tokens[1:]).clone()
            labels[sample.valid - 1 :] = -100
            labels[torch.from_numpy(sample.starts[1:])] = -100
            logits = model.decoder.logits(model.decoder(tokens))[0, :, : cfg.model.vocab_size]
            total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels >= 0).sum())
            length += int(((labels >= 0) & (labels < 256)).sum())  # bytes; 256 is the end of a document
    assert (found.tokens, found.bytes) == (count, length)
    assert found.loss == pytest.approx(total / count, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(total / length / 0.6931471805599453, rel=1e-6)
