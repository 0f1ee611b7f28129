"""Which attention is chosen, and why not FlashAttention 2; what torch's own sdpa may use."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import golden_set
import pytest
import torch

from mirage_ds.errors import ConfigError
from mirage_ds.model import attention
from mirage_ds.model.attention import choose_attention
from mirage_ds.model.backbone import load_backbone

BROKEN = 'raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E")\n'
Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes a package flash_attn of this text, which transformers accepts; on a machine that has none."""

    def installed(text: str) -> None:
        (tmp_path / "flash_attn").mkdir()
        (tmp_path / "flash_attn" / "__init__.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)

    yield installed
    sys.modules.pop("flash_attn", None)


@pytest.mark.skipif(attention.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_attn_is_not_installed() -> None:
    assert choose_attention("auto", torch.bfloat16, "cuda") == ("sdpa", "flash-attn is not installed")
    assert choose_attention("sdpa", torch.bfloat16, "cuda") == ("sdpa", "")
    with pytest.raises(ConfigError, match=r"\(on this machine\): flash-attn is not installed; it needs .*auto or sdpa"):
        choose_attention("flash_attention_2", torch.bfloat16, "cuda")


def test_flash_attn_that_works_is_used_for_bf16_on_a_gpu(install: Install) -> None:
    """Not on the CPU: with DS_ACCELERATOR=cpu the tensors are there on a machine with GPUs too."""
    install("")
    assert choose_attention("auto", torch.bfloat16, "cuda") == ("flash_attention_2", "")
    assert choose_attention("flash_attention_2", torch.bfloat16, "cuda") == ("flash_attention_2", "")
    assert choose_attention("sdpa", torch.bfloat16, "cuda") == ("sdpa", "")
    assert choose_attention("auto", torch.float32, "cuda") == ("sdpa", "flash-attn needs bf16")
    assert choose_attention("auto", torch.bfloat16, "cpu") == ("sdpa", "flash-attn needs a GPU")


def test_flash_attn_whose_import_fails(install: Install) -> None:
    """As one that was built for another torch."""
    install(BROKEN)
    chosen, reason = choose_attention("auto", torch.bfloat16, "cuda")
    assert chosen == "sdpa"
    assert reason.startswith("flash-attn cannot be imported: ImportError: flash_attn_2_cuda.so: undefined symbol")
    with pytest.raises(ConfigError, match=r"undefined symbol.*built for this torch"):
        choose_attention("flash_attention_2", torch.bfloat16, "cuda")


def test_flash_attn_that_transformers_refuses(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("")
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    chosen, reason = choose_attention("auto", torch.bfloat16, "cuda")
    assert (chosen, "2.3.3" in reason) == ("sdpa", True)


def test_the_log_says_why() -> None:
    described = load_backbone(golden_set.MODEL, dtype=torch.float32).describe()
    assert described == "float32 on cpu, attention sdpa (flash-attn needs a GPU)"
    described = load_backbone(golden_set.MODEL, dtype=torch.float32, attention="sdpa").describe()
    assert described == "float32 on cpu, attention sdpa"


def test_a_loaded_model_never_uses_cudnn_s_attention() -> None:
    """Training and decoding both load by this function."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_backbone(golden_set.MODEL, dtype=torch.float32)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
