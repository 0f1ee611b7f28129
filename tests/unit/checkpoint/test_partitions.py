"""Weights of ZeRO-3 checkpoints, against DeepSpeed's own zero_to_fp32; and every way a copy can be damaged."""

import os
import re
from pathlib import Path

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from zero3_files import write_run

from mirage_ds.checkpoint.find import find_named
from mirage_ds.checkpoint.partitions import stored_parameters
from mirage_ds.errors import CheckpointError
from mirage_ds.model.mirage import hf_name

SHAPES = {
    "model.visual.patch_embed.proj.weight": (6, 3, 2, 2, 2),
    "model.visual.merger.ln_q.weight": (7,),
    "model.language_model.embed_tokens.weight": (11, 5),
    "model.language_model.layers.0.mlp.up_proj.weight": (13, 5),
    "model.language_model.layers.0.input_layernorm.weight": (5,),
    "model.language_model.norm.weight": (1,),
    "lm_head.weight": (11, 5),
}


def random_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("sub_group_numel", [10**9, 30, 1])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "tower"])
def test_every_parameter_is_what_deepspeed_reads(tmp_path: Path, ranks: int, sub_group_numel: int, kind: str) -> None:
    """Includes parameters with fewer elements than there are ranks."""
    weights = random_weights()
    settings = {"tower": {"model": {"train_tower": True}}, "bf16": {"train": {"dtype": "bf16"}}, "fp32": {}}[kind]
    folder = write_run(tmp_path, "model", weights, ranks=ranks, sub_group_numel=sub_group_numel, settings=settings)
    stored = stored_parameters(folder, ranks)
    expected = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent))
    assert stored.keys() == weights.keys() == {hf_name(name) for name in expected}
    for name, tensor in expected.items():
        read = stored[hf_name(name)].read()
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read, tensor)
        assert torch.equal(read, weights[hf_name(name)].to(read.dtype))
    frozen_dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    assert stored["model.visual.merger.ln_q.weight"].dtype == frozen_dtype


def read_all(folder: Path) -> None:
    for parameter in stored_parameters(folder, 2).values():
        parameter.read()


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_a_missing_file_is_named(tmp_path: Path, kind: str) -> None:
    folder = write_run(tmp_path, "model", random_weights())
    (folder / f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt").unlink()
    with pytest.raises(
        CheckpointError, match=rf"0 files match .*rank_1_mp_rank_00_{kind}_states.pt \({folder}\).*from all nodes"
    ):
        read_all(folder)


@pytest.mark.parametrize("kind", ["model", "optim"])
@pytest.mark.parametrize("size", [0, 100, -200])
def test_a_truncated_file_is_named(tmp_path: Path, kind: str, size: int) -> None:
    folder = write_run(tmp_path, "model", random_weights())
    file = folder / f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt"
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    with pytest.raises(CheckpointError, match=rf"cannot be read \({re.escape(str(file))}\): .* copy it again"):
        read_all(folder)


def test_a_file_that_is_truncated_while_it_is_read(tmp_path: Path) -> None:
    """Or a disk that fails: a short read never becomes a weight."""
    folder = write_run(tmp_path, "model", random_weights())
    stored = stored_parameters(folder, 2)
    os.truncate(folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt", 300)
    with pytest.raises(CheckpointError, match=r"rank_1_.*optim_states.pt\): 0 of \d+ bytes from byte \d+"):
        stored["lm_head.weight"].read()


def test_ranks_of_another_model_do_not_fit(tmp_path: Path) -> None:
    """A rank's file from a checkpoint of another size."""
    folder = write_run(tmp_path / "a", "model", random_weights())
    small = random_weights() | {"lm_head.weight": torch.zeros(3, 5), "model.visual.merger.ln_q.weight": torch.zeros(3)}
    other = write_run(tmp_path / "b", "model", small)
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (other / name).rename(folder / name)
    with pytest.raises(CheckpointError, match=r"rank_1_.*optim_states.pt\): \d+ elements instead of \d+"):
        read_all(folder)

    folder = write_run(tmp_path / "c", "model", random_weights())
    name = "zero_pp_rank_1_mp_rank_00_model_states.pt"
    (other / name).rename(folder / name)
    with pytest.raises(CheckpointError, match=r"rank_1_.*model_states.pt\): 1 of 7 elements are missing"):
        read_all(folder)


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_no_code_of_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "run", "model", random_weights())
    file = folder / f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt"
    torch.save(torch.load(file, weights_only=False) | {"more": Harmful()}, file)
    with pytest.raises(CheckpointError, match=r"rank_0_.*objects that DeepSpeed does not write"):
        read_all(folder)
    assert not Path("harm").exists()
    torch.load(file, weights_only=False)
    assert Path("harm").exists()


@pytest.mark.parametrize(("kind", "key"), [("model", "param_shapes"), ("optim", "optimizer_state_dict")])
def test_a_file_that_is_not_from_zero3(tmp_path: Path, kind: str, key: str) -> None:
    folder = write_run(tmp_path, "model", random_weights())
    file = folder / f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt"
    content = torch.load(file, weights_only=False)
    del content[key]
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=f"it has no '{key}'"):
        read_all(folder)


def test_a_checkpoint_is_found_by_its_run_or_its_own_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "model", random_weights())
    assert find_named(tmp_path / "run") == find_named(folder) == folder
    half = folder.with_name("global_step4")
    half.mkdir()
    with pytest.raises(CheckpointError, match=rf"damaged \({half}\): files.json is missing; .* delete it to use"):
        find_named(tmp_path / "run")
    for path in (half, tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match=rf"no complete checkpoint \({path}\); expected .*; name one"):
            find_named(path)
