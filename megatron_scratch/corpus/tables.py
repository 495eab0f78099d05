"""Records in columns: parquet by row groups, and Hugging Face datasets as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any
from urllib.parse import parse_qsl

from megatron_scratch.corpus.records import Bad, Keys, Record, empty, field, too_large, unreadable
from megatron_scratch.corpus.sources import DATASETS, SourceFile
from megatron_scratch.corpus.stages import batches
from megatron_scratch.util.errors import RunFailed, UserError, choice

ROWS, BATCH = 1024, 1 << 23  # of a parquet file held at once: so many rows, or about so many bytes
OPTIONS = ("name", "split", "revision", "data_files", "data_dir")  # of datasets://


def _pyarrow(file: SourceFile) -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(f"{file.name} needs the package pyarrow; run: pip install 'megatron-scratch[corpus]'") from error
    return pyarrow


def row_groups(file: SourceFile, limit: int) -> list[tuple[int, int | None]]:
    """Ranges of row groups of about `limit` bytes; the whole file where it does not say, then reading it says why."""
    arrow = _pyarrow(file)
    try:
        with file.open() as f, arrow.parquet.ParquetFile(f) as table:
            meta = table.metadata
            sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
    except (OSError, ValueError, arrow.ArrowException) as error:
        unreadable(error)
        return [(0, None)]
    return list(batches(sizes, limit)) or [(0, None)]


def parquet(file: SourceFile, begin: int, end: int | None, keys: Keys) -> Iterator[Record | Bad]:
    """Rows of row groups [begin, end), by the columns `keys.text` and `keys.id`. A damaged group leaves the others readable."""
    arrow = _pyarrow(file)
    failures = (OSError, ValueError, arrow.ArrowException)
    try:
        with file.open() as f, arrow.parquet.ParquetFile(f) as table:
            names, meta = table.schema_arrow.names, table.metadata
            if not begin and not meta.num_rows:
                yield empty()
            elif keys.text not in names:
                if not begin:  # once, however the file is cut
                    yield Bad(f"no field {keys.text!r}", 0)
                return
            row = sum(meta.row_group(i).num_rows for i in range(begin))
            for group in range(begin, meta.num_row_groups if end is None else end):
                try:
                    yield from _rows(arrow, table, group, row, keys)
                except failures as error:
                    yield unreadable(error, row)
                row += meta.row_group(group).num_rows
    except failures as error:
        yield unreadable(error)


def _rows(arrow: Any, table: Any, group: int, row: int, keys: Keys) -> Iterator[Record | Bad]:
    """The rows of one group, the first of which is number `row`."""
    meta = table.metadata.row_group(group)
    count = max(1, min(ROWS, meta.num_rows * BATCH // max(meta.total_byte_size, 1)))
    columns = [keys.text, *([keys.id] if keys.id in table.schema_arrow.names else [])]
    for batch in table.iter_batches(count, row_groups=[group], columns=columns):
        names = batch.column(keys.id).to_pylist() if keys.id in columns else [None] * len(batch)
        for text, name in zip(_raw(arrow, batch.column(keys.text)), names, strict=True):
            yield _text(text, name, row, keys)
            row += 1


def _raw(arrow: Any, column: Any) -> list[Any]:
    """Text as bytes, which need not be UTF-8; anything else as it is."""
    kinds = {arrow.string(): arrow.binary(), arrow.large_string(): arrow.large_binary()}
    return column.cast(kinds[column.type]).to_pylist() if column.type in kinds else column.to_pylist()


def _text(value: Any, name: Any, row: int, keys: Keys) -> Record | Bad:
    if isinstance(value, (bytes, str)) and len(value) > keys.most:
        return Bad(too_large(keys.most), row, head=value[:200] if isinstance(value, bytes) else value[:200].encode())
    try:
        return field(value.decode("utf-8") if isinstance(value, bytes) else value, name, row, None, keys)
    except UnicodeDecodeError:
        return Bad("not UTF-8", row, head=value[:200])


def check_dataset(file: SourceFile) -> None:
    """Refuse a datasets:// that cannot be read. Nothing is connected to."""
    if find_spec("datasets") is None:
        raise UserError(f"{file.name} needs the package datasets; run: pip install 'megatron-scratch[datasets]'")
    name, options = _dataset_of(file)
    for option in options:
        choice(f"option of corpus.input={file.name}", option, OPTIONS)
    if not name:
        raise UserError(f"corpus.input={file.name} names no dataset; give {DATASETS}NAME?name=CONFIG&split=train")


def _dataset_of(file: SourceFile) -> tuple[str, dict[str, str]]:
    name, _, query = file.url.removeprefix(DATASETS).partition("?")
    return name, {"split": "train", **dict(parse_qsl(query, keep_blank_values=True))}


def dataset(file: SourceFile, begin: int, end: int | None, keys: Keys) -> Iterator[Record | Bad]:
    """A Hugging Face dataset as a stream, in its own order: datasets://NAME?name=CONFIG&split=train&data_files=..."""
    import datasets

    name, options = _dataset_of(file)
    row = -1
    try:
        for row, value in enumerate(datasets.load_dataset(name, streaming=True, **options)):
            if keys.text in value:
                yield _text(value[keys.text], value.get(keys.id), row, keys)
            else:
                yield Bad(f"no field {keys.text!r}", row)
    except Exception as error:  # of the package, of what it reads from, of the network: which, it does not say
        told = " ".join(str(error).split())[:200]
        raise RunFailed(f"{file.name} cannot be read after row {row}: {type(error).__name__}: {told}") from error
    if row < 0:
        yield empty()
