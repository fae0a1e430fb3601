"""Corpora, tokenizers, memory-mapped token files and resumable samplers."""

from .baseline import bigram_loss, unigram_loss
from .corpus import Corpus, from_path, standard_library
from .prepare import Dataset, open_dataset, prepare
from .sampler import Sampler, validation_batches
from .split import Progress, Split
from .tokenizer import Tokenizer
from .tokens import TokenFile, open_token_files, write_token_files

__all__ = [
    "Corpus", "Dataset", "Progress", "Sampler", "Split", "TokenFile", "Tokenizer", "bigram_loss", "from_path",
    "open_dataset", "open_token_files", "prepare", "standard_library", "unigram_loss", "validation_batches",
    "write_token_files",
]  # fmt: skip
