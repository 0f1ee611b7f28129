"""What ranks read and keep when a model is loaded under ZeRO-3: who reads the weights, and what stays float32."""

import json
import shutil
from pathlib import Path

import golden_set
import launching
import pytest
import torch
from deepspeed import zero
from safetensors.torch import load_file, save_file

from mirage_ds.config import Config
from mirage_ds.model.backbone import file_name, load_backbone
from mirage_ds.train import make_model
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config
from mirage_ds.zero3.engine import initialize, parameter_groups


def load(folders: list[str], config: Config, report: Path) -> None:
    """Each rank loads the model from its own folder; rank 1 reports what it then has."""
    distributed.init(timeout_s=300)
    deepspeed_config = resolve_deepspeed_config(config)
    rank = distributed.rank()
    backbone = load_backbone(folders[rank], dtype=torch.bfloat16, deepspeed_config=deepspeed_config)
    model = make_model(config, backbone)
    engine = initialize(model, parameter_groups(model, 0.0), config.train, deepspeed_config)
    with zero.GatheredParameters(list(backbone.hf.parameters())):
        equal = weights_equal(backbone.hf.state_dict(), golden_set.MODEL)
    rotary = backbone.rotary_emb.inv_freq
    if rank == 1:
        report.write_text(json.dumps({"equal": equal, "dtype": str(rotary.dtype), "inv_freq": rotary.tolist()}))
    engine.destroy()
    distributed.shut_down()


def weights_equal(state: dict[str, torch.Tensor], folder: str) -> bool:
    """Whether all weights are those of another folder, in bf16."""
    files = load_file(f"{folder}/model.safetensors")
    return all(torch.equal(state[name], files[file_name(name)].bfloat16()) for name in state)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What rank 1 has, in whose own folder every weight is NaN."""
    folder = tmp_path_factory.mktemp("loading")
    spoiled = folder / "model"
    shutil.copytree(golden_set.MODEL, spoiled)
    weights = load_file(spoiled / "model.safetensors")
    nothing = {name: torch.full_like(weight, float("nan")) for name, weight in weights.items()}
    save_file(nothing, spoiled / "model.safetensors", metadata={"format": "pt"})
    config = Config.model_validate(
        {
            "run": {"dir": folder / "run"},
            "model": {"path": golden_set.MODEL},
            "data": {"shards": "unused"},
            "train": {"stage": "stage1", "max_steps": 20},
        }
    )
    folders, report = [golden_set.MODEL, str(spoiled)], folder / "report.json"
    with launching.start(2, folders, config, report, main=load, log=folder / "log") as ranks:
        ranks.finish(timeout_s=600)
    return json.loads(report.read_text())


def test_rank_0_alone_reads_the_weights(found: dict) -> None:
    """Else every rank of a node would hold the complete model in host memory: 17 GB each for 7B."""
    assert found["equal"]


def test_the_frequencies_of_the_positions_stay_float32(found: dict) -> None:
    """In bf16 far positions would be wrong: DeepSpeed casts parameters alone, not buffers."""
    config = json.loads((Path(golden_set.MODEL) / "config.json").read_text())
    dim = config["hidden_size"] // config["num_attention_heads"]
    expected = 1 / config["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    assert found["dtype"] == "torch.float32"
    assert found["inv_freq"] == pytest.approx(expected.tolist(), rel=1e-6)
