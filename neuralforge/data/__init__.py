"""Corpora, tokenizers, memory-mapped token files and resumable samplers."""

from neuralforge.data.baseline import bigram_loss, unigram_loss
from neuralforge.data.corpus import Corpus, from_path, standard_library
from neuralforge.data.prepare import Dataset, open_dataset, prepare
from neuralforge.data.sampler import Sampler, validation_batches
from neuralforge.data.split import Progress, Split
from neuralforge.data.tokenizer import Tokenizer
from neuralforge.data.tokens import TokenFile, open_token_files, write_token_files

__all__ = [
    "Corpus", "Dataset", "Progress", "Sampler", "Split", "TokenFile", "Tokenizer", "bigram_loss",
    "from_path", "open_dataset", "open_token_files", "prepare", "standard_library", "unigram_loss",
    "validation_batches", "write_token_files",
]
