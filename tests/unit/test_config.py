"""The configuration: recipes, overrides, and the messages for mistakes."""

from pathlib import Path

import pytest

from mirage_ds.config import TrainConfig
from mirage_ds.errors import ConfigError
from mirage_ds.recipe import load_config
from mirage_ds.zero3.engine import learning_rate

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
RECIPE = RECIPES / "tiny-stage1.yaml"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(recipe: Path) -> None:
    load_config(recipe)


def test_overrides_win_and_are_parsed_as_yaml() -> None:
    overrides = ["train.lr=1e-4", "train.betas=[0.8, 0.9]", "run.dir=elsewhere", "checkpoint.interval=5"]
    config = load_config(RECIPE, overrides)
    assert config.train.lr == 1e-4
    assert config.train.betas == (0.8, 0.9)
    assert config.run.dir == Path("elsewhere")
    assert config.checkpoint.interval == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=1", r"unknown key train\.learning_rate: .*allowed here: .*lr"),
        ("train.warmup_step=1", r"did you mean 'warmup_steps'"),
        ("trian.lr=1", r"unknown key trian: did you mean 'train'"),
        ("train.stage=stage3", r"train\.stage: .*'text', 'stage1' or 'stage2'.*got 'stage3'"),
        ("train.lr=fast", r"train\.lr: .*number.*got 'fast'"),
        ("train.lr=-1", r"train\.lr: .*greater than 0.*got -1"),
        ("train.micro_batch_size_per_gpu=0", r"train\.micro_batch_size_per_gpu: .*greater than 0"),
        ("train.max_steps=null", r"train: the length of the run is set twice or not at all; set train\.max_steps or"),
        ("train.epochs=2", r"train: the length of the run is set twice"),
        ("train.warmup_steps=500", r"warmup_steps is 500.*set train\.warmup_steps below train\.max_steps"),
        ("data.helper=grey", r"data\.helper: .*True, 'gray', 'input', 'shuffled' or 'none' \(got 'grey'\)"),
        ("data.helper=false", r"data\.helper: .*True, 'gray', 'input', 'shuffled' or 'none' \(got False\)"),
        ("data.max_pixels=0", r"data\.max_pixels: .*greater than 0"),
        ("data.max_length=-5", r"data\.max_length: .*greater than 0"),
        ("train", r"override cannot be parsed .*section\.key=value"),
        ("train.lr.peak=1", r"lr is not a section"),
        ("train.betas=[", r"not valid YAML"),
        (
            "train.global_batch_size=9",
            r"global_batch_size is 9, not a multiple of the 2 .*set train\.global_batch_size",
        ),
        (
            "model={path: m, cache_targets: t, train_tower: true}",
            r"  - model: cache_targets keeps .*unset model\.cache_targets or model\.train_tower",
        ),
        ("model.lora.rnak=8", r"unknown key model\.lora\.rnak: did you mean 'rank'\? allowed here: rank, alpha"),
        ("model.lora.dropout=0.1", r"model\.lora\.dropout: .*only 0 is possible.*set model\.lora\.dropout=0"),
        (
            "model.lora.target_modules=[q_proj, qkv]",
            r"model\.lora\.target_modules: \['q_proj', 'qkv'\] names no matrices.*allowed: attention, mlp, all, or",
        ),
        (
            "model={path: m, lora: {}, train_tower: true}",
            r"lora trains its own .*unset model\.train_tower or model\.lora",
        ),
        ("model={path: m, lora: {}, freeze: [a]}", r"lora trains its own .*unset model\.freeze or model\.lora"),
        (
            "model.cache_targets_gib=8",
            r"  - model\.cache_targets_gib limits model\.cache_targets, .*; set both or neither",
        ),
        ("model.cache_targets_gib=0", r"model\.cache_targets_gib: .*greater than 0"),
        (
            "train.micro_batch_size_per_gpu=fast",
            r"micro_batch_size_per_gpu: must be an integer .*, or auto \(got 'fast'",
        ),
        ("train.micro_batch_size_per_gpu=auto", r"is auto, .*; set train\.global_batch_size"),
        ("train.profile_steps=[5, 3]", r"profile_steps \(5, 3\) end before they begin"),
        (
            "data.packing=true",
            r"  - data: packing is true, but data\.token_budget is unset; .*; set data\.token_budget",
        ),
        (
            "data.token_budget=64",
            r"  - data: token_budget is 64, but rows are not packed .*; set data\.packing=true, or",
        ),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RECIPE, [override])


def test_auto_leaves_no_accumulation_to_set() -> None:
    settings = ["micro_batch_size_per_gpu=auto", "global_batch_size=4", "gradient_accumulation_steps=2"]
    with pytest.raises(ConfigError, match=r"steps is 2, .*; set train\.gradient_accumulation_steps=null"):
        load_config(RECIPE, [f"train.{setting}" for setting in settings])


def test_latent_targets_are_kept_in_stage_1_only() -> None:
    with pytest.raises(ConfigError, match=r"  - model\.cache_targets is set, but stage2 .*unset model\.cache_targets"):
        load_config(RECIPES / "tiny-stage2.yaml", ["model.cache_targets=targets"])


def test_the_arm_of_a_control_is_a_name_or_true() -> None:
    assert load_config(RECIPE).data.helper is True
    assert load_config(RECIPE, ["data.helper=true"]).data.helper is True
    for name in ("gray", "input", "shuffled", "none"):
        assert load_config(RECIPE, [f"data.helper={name}"]).data.helper == name
    with pytest.raises(
        ConfigError, match=r"cache_targets is set, but with data\.helper=none there is no latent target"
    ):
        load_config(RECIPE, ["data.helper=none", "model.cache_targets=targets"])
    with pytest.raises(
        ConfigError, match=r"answer_sees_image is false, .* data\.helper=none has no blocks; .*; set model"
    ):
        load_config(RECIPE, ["data.helper=none", "model.answer_sees_image=false"])


def test_samples_are_packed_where_they_may_share_a_row() -> None:
    packing = ["data.packing=true", "data.token_budget=64"]
    assert load_config(RECIPE, packing).rows_per_micro_batch == 1
    assert load_config(RECIPE, [*packing, "data.max_length=64"]).data.token_budget == 64
    with pytest.raises(
        ConfigError, match=r"token_budget is 64, below max_length=65; .*raise data\.token_budget, or low"
    ):
        load_config(RECIPE, [*packing, "data.max_length=65"])
    with pytest.raises(
        ConfigError, match=r"  - data: balance is false, but rows are packed .*; set data\.balance=true, or "
    ):
        load_config(RECIPE, [*packing, "data.balance=false"])
    with pytest.raises(
        ConfigError, match=r"  - data\.packing is true, but stage2 .*set data\.packing=false: .*balance"
    ):
        load_config(RECIPES / "tiny-stage2.yaml", packing)


HIDDEN = "model.answer_sees_image=false"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [HIDDEN, "train.stage=text"],
            r"answer_sees_image is false, .*stage text has no blocks; allowed in .*; set model\.answer_sees_image=true",
        ),
        (
            ["data.text_dropout_image=0.3", "train.stage=text"],
            r"text_dropout_image is 0\.3, .*stage text has no blocks; .*set data\.text_dropout_image=0",
        ),
        (
            [HIDDEN, "data.text_dropout_image=0.3"],
            r"text_dropout_image is 0\.3, but model\.answer_sees_image=false hides .*; one of the two is enough; set ",
        ),
        (
            [HIDDEN, "data.packing=true", "data.token_budget=64"],
            r"answer_sees_image is false, but rows are packed .*; set data\.packing=false data\.token_budget=null, or ",
        ),
        (["data.text_dropout_image=1.5"], r"data\.text_dropout_image: .*less than or equal to 1"),
    ],
    ids=str,
)
def test_images_that_cannot_be_hidden(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RECIPE, overrides)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("setting", [HIDDEN, "data.text_dropout_image=0.3"])
def test_hidden_images_take_several_passes(setting: str, stage: str) -> None:
    config = load_config(RECIPE, [setting, f"train.stage={stage}"])
    assert config.hides_images
    assert config.several_passes
    assert load_config(RECIPE, [f"train.stage={stage}"]).several_passes == (stage == "stage2")


def test_one_sample_per_rank_cannot_be_packed() -> None:
    batch = ["train.micro_batch_size_per_gpu=1", "train.global_batch_size=6", "train.gradient_accumulation_steps=null"]
    config = load_config(RECIPE, ["data.packing=true", "data.token_budget=64", *batch])
    config.check_packing(3)
    with pytest.raises(
        ConfigError, match=r"nothing to pack: .*1 sample per step \(.* 6 on 6 ranks\); allowed: 2 or more; raise train"
    ):
        config.check_packing(6)
    load_config(RECIPE, batch).check_packing(6)


def test_a_missing_key_and_a_missing_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    with pytest.raises(ConfigError, match=r"recipe cannot be read .*No such file"):
        load_config(recipe)
    recipe.write_text("train: {stage: text, max_steps: 20}\nrun: {dir: a}\ndata: {shards: b}\n")
    with pytest.raises(ConfigError, match="model is missing: set it in the recipe or with model=VALUE"):
        load_config(recipe)
    recipe.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="recipe has no sections"):
        load_config(recipe)


def test_loss_weights_follow_the_stage_unless_set() -> None:
    weights = {stage: TrainConfig(stage=stage, max_steps=20).text_weight for stage in ("text", "stage1", "stage2")}
    assert weights == {"text": 1.0, "stage1": 0.1, "stage2": 1.0}
    assert TrainConfig(stage="stage1", max_steps=20, ce_loss_weight=0).text_weight == 0


@pytest.mark.parametrize(
    ("settings", "world_size", "steps"),
    [
        ({}, 4, 1),
        ({"gradient_accumulation_steps": 3}, 4, 3),
        ({"global_batch_size": 16}, 4, 2),
        ({"global_batch_size": 16}, 8, 1),
        ({"global_batch_size": 16, "gradient_accumulation_steps": 2}, 4, 2),
    ],
)
def test_accumulation_follows_the_global_batch(settings: dict[str, int], world_size: int, steps: int) -> None:
    train = TrainConfig(stage="text", max_steps=20, micro_batch_size_per_gpu=2, **settings)
    assert train.accumulation_steps(world_size) == steps
    assert train.samples_per_step(world_size) == 2 * steps * world_size


def test_auto_is_no_number_before_the_run_chooses_one() -> None:
    """What does not depend on the choice is known before: the share of a rank, and whether the batch divides."""
    train = TrainConfig(stage="text", max_steps=20, micro_batch_size_per_gpu="auto", global_batch_size=16)
    assert (train.samples_per_rank(4), train.samples_per_step(4)) == (4, 16)
    with pytest.raises(ConfigError, match=r"does not divide over 3 ranks with .*=auto; allowed: multiples of 3; set"):
        train.samples_per_rank(3)
    for use in (lambda: train.micro_batch_size, lambda: train.accumulation_steps(4)):
        with pytest.raises(ValueError, match="still auto"):
            use()


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        ({"global_batch_size": 16}, 3, "=16 does not divide over 3 ranks .*gpu=2; .* multiples of 6; .*batch_size=18,"),
        ({"global_batch_size": 4}, 4, "=4 does not divide over 4 ranks .*gpu=2; .* multiples of 8; .*batch_size=8,"),
        (
            {"global_batch_size": 16, "gradient_accumulation_steps": 4},
            4,
            r"4 ranks .*=2 and train\.gradient_accumulation_steps=4; .* unset; .*=16 train\.gradient_.*=null",
        ),
    ],
)
def test_a_global_batch_that_does_not_match_the_ranks(settings: dict[str, int], world_size: int, message: str) -> None:
    train = TrainConfig(stage="text", max_steps=20, micro_batch_size_per_gpu=2, **settings)
    with pytest.raises(ConfigError, match=message):
        train.accumulation_steps(world_size)


def test_a_recipe_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"the recipe cannot be read .*recipe\.yaml.*give the path of one"):
        load_config(tmp_path / "recipe.yaml")


def test_epochs_become_steps() -> None:
    """The last step may reach into the next epoch; a warm-up longer than the run is refused."""
    train = TrainConfig(stage="text", epochs=1.5, micro_batch_size_per_gpu=3, warmup_steps=2)
    assert train.num_steps(num_samples=10, world_size=2) == 3
    assert TrainConfig(stage="text", max_steps=20).num_steps(num_samples=10, world_size=2) == 20
    with pytest.raises(ConfigError, match=r"warmup_steps is 2, but the run has 2 in total .*epochs=1\.5, samples: 6"):
        train.num_steps(num_samples=6, world_size=2)


def rates(**settings: object) -> list[float]:
    train = TrainConfig(stage="text", max_steps=6, warmup_steps=2, lr=1e-3, **settings)
    return [learning_rate(step, 6, train) for step in range(1, 7)]


def test_learning_rates() -> None:
    """The reference's schedule on request; in ours, the first and the last step also have a rate above 0."""
    assert rates(warmup_from_zero=True) == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert rates() == pytest.approx([5e-4, 1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
    assert rates(lr_decay="constant") == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])


def test_a_run_that_is_a_control_arm_says_so() -> None:
    assert load_config(RECIPE, []).controls == {}
    arm = load_config(RECIPE, ["data.helper=gray", "data.text_dropout_image=0.25"])
    assert arm.controls == {"data.helper": "gray", "data.text_dropout_image": 0.25}
    assert load_config(RECIPE, ["model.answer_sees_image=false"]).controls == {"model.answer_sees_image": "false"}
