"""Shared fixtures of the data tests: a small trained tokenizer, an image processor, rows and shards."""

from pathlib import Path

import pytest
from generated_rows import make_row, write_rows
from real_vocabulary import real_tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data_tools.build import build
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.shards import ShardFolder, load_manifest
from mirage_ds.hf.preset import train_tokenizer

__all__ = ["real_tokenizer"]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(
        f"system user assistant {row['text_input']} {row['text_output']}" for row in map(make_row, range(10))
    )


@pytest.fixture(scope="session")
def image_processor() -> ImageProcessor:
    return ImageProcessor(Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows")


@pytest.fixture
def shards(rows: Path, tmp_path: Path) -> ShardFolder:
    """10 samples in shards of 4, 4 and 2."""
    build(rows, tmp_path / "shards", maxcount=4, maxsize=10**9)
    return load_manifest(tmp_path / "shards")
