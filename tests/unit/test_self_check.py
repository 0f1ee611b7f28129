"""The self-check: its true values, worked out without a cache; packages that changed are refused."""

import subprocess
import sys
from collections.abc import Callable

import launching
import plain_loop
import pytest
import torch
from generated_rows import write_rows
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from data_tools.build import build
from mirage_ds import self_check
from mirage_ds.errors import ConfigError
from mirage_ds.hf.preset import write_tiny


def samples(answers=self_check.ANSWERS) -> list[dict]:
    rows = zip(self_check.PROMPTS, answers, strict=True)
    return [vars(self_check.tiny_sample(prompt, answer)) for prompt, answer in rows]


def test_the_loss_is_that_without_a_cache() -> None:
    """One row at a time, the growing prefix computed again for each latent, with transformers' own positions."""
    model = self_check.tiny_backbone().hf.double()
    loss = sum(plain_loop.sample_losses(model, sample, "stage2")[0] for sample in samples())
    loss.backward()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    assert loss.item() == pytest.approx(self_check.LOSS, rel=2e-6)
    assert torch.stack(norms).norm().item() == pytest.approx(self_check.GRAD_NORM, rel=2e-6)


def test_the_decoded_loss_is_that_without_a_cache() -> None:
    """The loss of <|latent_end|> alone, after NUM_FED latents."""
    ids = self_check.IDS
    answer = [ids.latent_pad] * self_check.NUM_FED + [ids.latent_end]
    model = self_check.tiny_backbone().hf.double()
    loss = 0.0
    for sample in samples((answer, answer)):
        sample["labels"] = torch.where(sample["input_ids"] == ids.latent_end, ids.latent_end, -100)
        loss += plain_loop.sample_losses(model, sample, "stage2")[0].item()
    assert loss == pytest.approx(self_check.DECODING_LOSS, rel=2e-6)


def test_what_is_installed_passes() -> None:
    self_check.check_training()
    self_check.check_decoding()


class DroppingCache:
    """A cache whose earlier columns never reach the attention."""

    def __init__(self, real) -> None:
        self.real = real

    def update(self, key, value, *others):
        self.real.update(key, value, *others)
        return key, value


class OtherCache:
    """A layer that calls the cache in another way."""

    def __init__(self, real) -> None:
        self.real = real

    def update(self, key, value, *others):
        return self.real.append_to_layer(key, value)


def with_cache(kind: type, attention: Callable) -> Callable:
    def forward(self, hidden_states, *, past_key_values, attention_mask, **others):
        mask = attention_mask if attention_mask is None else attention_mask[..., -hidden_states.shape[1] :]
        return attention(self, hidden_states, past_key_values=kind(past_key_values), attention_mask=mask, **others)

    return forward


def text_positions(rotary: Callable) -> Callable:
    """Every token counts as text, also those of an image."""
    return lambda self, x, position_ids: rotary(self, x, position_ids[:1].expand(3, -1, -1))


def no_mask(attention: Callable) -> Callable:
    """What is padded on the left is attended to."""

    def forward(self, hidden_states, *, attention_mask, **others):
        mask = (
            None
            if attention_mask is None
            else torch.ones_like(attention_mask).tril(attention_mask.shape[-1] - attention_mask.shape[-2])
        )
        return attention(self, hidden_states, attention_mask=mask, **others)

    return forward


SILENT = {
    "text positions": ("Qwen2_5_VLRotaryEmbedding", text_positions),
    "no mask": ("Qwen2_5_VLAttention", no_mask),
    "a dropped cache": ("Qwen2_5_VLAttention", lambda attention: with_cache(DroppingCache, attention)),
}


@pytest.mark.parametrize("check", [self_check.check_training, self_check.check_decoding], ids=["training", "decoding"])
@pytest.mark.parametrize("change", SILENT)
def test_a_silent_change_is_refused(monkeypatch: pytest.MonkeyPatch, change: str, check: Callable[[], None]) -> None:
    name, wrap = SILENT[change]
    monkeypatch.setattr(getattr(qwen, name), "forward", wrap(getattr(qwen, name).forward))
    with pytest.raises(ConfigError, match=r"compute something else in \w+ .*transformers \d.*: the \w+ .* pip install"):
        check()


@pytest.mark.parametrize("check", [self_check.check_training, self_check.check_decoding], ids=["training", "decoding"])
def test_a_changed_cache_interface_is_refused(monkeypatch: pytest.MonkeyPatch, check: Callable[[], None]) -> None:
    attention = qwen.Qwen2_5_VLAttention
    monkeypatch.setattr(attention, "forward", with_cache(OtherCache, attention.forward))
    with pytest.raises(ConfigError, match=r"AttributeError: .*append_to_layer.*test_self_check\.py, line \d+"):
        check()


def test_it_needs_no_files_and_leaves_no_trace() -> None:
    """A run's random numbers and later models are the same with it."""
    self_check.check_training()  # what is imported late
    self_check.check_decoding()
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()
    opened: list[str] = []
    watching = [True]
    sys.addaudithook(lambda event, arguments: watching and event == "open" and opened.append(str(arguments[0])))
    self_check.check_training()
    self_check.check_decoding()
    watching.clear()
    assert not opened
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.get_default_dtype(), torch.is_grad_enabled())


NEWER = "Metadata-Version: 2.1\nName: transformers\nVersion: 5.99.0\n"
SITE = """
import importlib.abc, importlib.util, sys

class Patch(importlib.abc.MetaPathFinder):
    # Lets the real module load, then makes every token of its rotary embedding a text token.
    def find_spec(self, name, path, target=None):
        if name != "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        real = spec.loader.exec_module

        def load(module):
            real(module)
            rotary = module.Qwen2_5_VLRotaryEmbedding
            forward = rotary.forward
            rotary.forward = lambda self, x, position_ids: forward(self, x, position_ids[:1].expand(3, -1, -1))

        spec.loader.exec_module = load
        return spec

sys.meta_path.insert(0, Patch())
"""


def test_the_trainer_refuses_a_newer_package_that_changed(tmp_path) -> None:
    """A real process: one line of warning, then the refusal, and nothing is written."""
    packages, cwd = tmp_path / "packages", tmp_path / "cwd"
    (packages / "transformers-5.99.0.dist-info").mkdir(parents=True)
    (packages / "transformers-5.99.0.dist-info" / "METADATA").write_text(NEWER)
    (packages / "sitecustomize.py").write_text(SITE)
    rows = write_rows(cwd / "rows", 10)
    write_tiny(rows, cwd / "model", seed=0)
    build(rows, cwd / "shards", maxcount=4, maxsize=10**9)
    before = sorted(cwd.rglob("*"))
    environment = launching.environment()
    environment["PYTHONPATH"] = f"{packages}:{environment['PYTHONPATH']}"
    recipe = launching.HERE.parent / "launch" / "recipes" / "tiny-stage1.yaml"
    result = subprocess.run(
        [sys.executable, "-m", "mirage_ds.train", str(recipe), "model.path=model", "data.shards=shards"],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 2, result.stderr
    warning, error = (line for line in result.stderr.splitlines() if line.startswith(("warning:", "error:")))
    assert warning.startswith("warning: newer than what was tested: transformers 5.99.0 (tested up to 5.")
    assert "compute something else in training" in error
    assert "transformers 5.99.0" in error
    assert sorted(cwd.rglob("*")) == before
