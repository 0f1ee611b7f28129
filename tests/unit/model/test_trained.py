"""What is trained: patterns, and an adapter that changes no output at its start, drawn alike whatever was drawn before.

tests/distributed/test_lora_training.py trains.
"""

from typing import Any

import golden_set
import pytest
import torch

from mirage_ds.config import ModelConfig
from mirage_ds.errors import ConfigError
from mirage_ds.model.backbone import Backbone, load_backbone
from mirage_ds.model.trained import choose_trained

IDS = torch.tensor([[5, 7, 3, 9]])
LATENTS = (3, 4, 5)


def chosen(seed: int = 0, **settings: Any) -> Backbone:
    backbone = load_backbone(golden_set.MODEL, dtype=torch.float32)
    choose_trained(backbone, ModelConfig.model_validate({"path": golden_set.MODEL} | settings), LATENTS, seed)
    return backbone


def trained(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in backbone.hf.named_parameters() if weight.requires_grad}


def test_patterns_freeze_what_they_name() -> None:
    every = {name for name in trained(chosen()) if not name.startswith("model.visual.")}
    patterns = ["model.language_model.layers.0.*", "*.mlp.*", "lm_head.weight"]
    left = trained(chosen(freeze=patterns)).keys()
    gone = {name for name in every if ".layers.0." in name or ".mlp." in name or name == "lm_head.weight"}
    assert gone
    assert left == every - gone
    assert {name.split(".")[2] for name in trained(chosen(train_merger=True)).keys() - every} == {"merger"}


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["model.language_model.layer.0.*"], r"matches no parameter .*such as model\.language_model\.layers\.0\."),
        (["*"], r"nothing is left to train .*leave out a pattern"),
    ],
)
def test_patterns_that_cannot_be_meant(patterns: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        chosen(freeze=patterns)


@pytest.mark.parametrize("embeddings", ["latent_rows", "none", "all"])
def test_an_adapter_changes_nothing_at_its_start(embeddings: str) -> None:
    backbone = chosen(lora={"rank": 2, "train_embeddings": embeddings})
    with torch.no_grad():
        before, after = chosen().hf(input_ids=IDS).logits, backbone.hf(input_ids=IDS).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    names = trained(backbone).keys()
    assert not any("visual" in name for name in names)
    assert {name for name in names if "lora_" not in name} == {
        "latent_rows": {"model.language_model.embed_tokens.rows", "lm_head.rows"},
        "none": set(),
        "all": {"model.language_model.embed_tokens.weight", "lm_head.weight"},
    }[embeddings]


def test_an_adapter_is_drawn_by_its_seed_alone() -> None:
    torch.manual_seed(1)
    first, state = trained(chosen(seed=7, lora={"rank": 2})), torch.get_rng_state()
    torch.rand(3)
    second, other = trained(chosen(seed=7, lora={"rank": 2})), trained(chosen(seed=8, lora={"rank": 2}))
    assert all(torch.equal(second[name], weight) for name, weight in first.items())
    assert any(not torch.equal(other[name], weight) for name, weight in first.items())
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
