"""What a user writes is taken as meant or refused: keys that stand twice, numbers that are none, `~` and variables."""

import json
import math
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from launch.slurm.cluster import load_cluster
from mirage_ds import strict_json, strict_yaml
from mirage_ds.errors import ConfigError
from mirage_ds.paths import expand, expanded
from mirage_ds.recipe import load_config
from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "launch" / "recipes" / "tiny-stage1.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint.interval=yes", "valid integer .got True"),
        ("checkpoint.interval=2.0", "valid integer"),
        ("train.max_steps=010", "valid integer .got '010'"),
        ("train.max_steps=0x10", "valid integer"),
        ("train.max_steps=10000000000", "less than or equal to"),
        ("train.betas=[0.9, 1.5]", r"betas\.1: .*less than 1"),
        ("train.betas=[0.9, .nan]", r"betas\.1: .*finite"),
        ("train.lr=.inf", "finite"),
        ("train.lr='1e-4'", "valid number"),
        ("train.epochs=.inf", "finite"),
        ("run.seed=-1", "greater than or equal to 0"),
        ("distributed.timeout_s=100000000000", "less than or equal to"),
        ("data.system_turn=1", "valid boolean"),
        ("run.dir=7", "7 is no path"),
        ("run.dir=$NOT_SET/a", "NOT_SET is not set"),
        ("run.dir=~no_such_user/a", "~no_such_user is no home folder"),
    ],
)
def test_what_is_no_number_and_no_path_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RECIPE, [override])


def test_numbers_as_people_write_them() -> None:
    config = load_config(
        RECIPE, ["train.lr=1e-4", "train.max_steps=10_000", "data.max_length=null", "run.dir=2026-01-31"]
    )
    assert (config.train.lr, config.train.max_steps, config.run.dir) == (1e-4, 10_000, Path("2026-01-31"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("checkpoint: {interval: 2}\ntrain: {stage: text}\ncheckpoint: {keep_latest_k: 3}\n", r"checkpoint .*1 and 3"),
        ("train: {lr: 1e-3, dtype: fp32, lr: 1e-6}\n", r"lr stands twice \(lines 1 and 1\)"),
    ],
)
def test_a_key_that_stands_twice_in_yaml(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)
    with pytest.raises(ConfigError, match="stands twice"):
        load_cluster(str(file))


def test_a_key_that_stands_twice_in_deepspeeds_json(tmp_path: Path) -> None:
    text = (ROOT / "ds_configs" / "zero3.json").read_text().replace("{", '{\n"steps_per_print": 1,', 1)
    (tmp_path / "a.json").write_text(text.rstrip().removesuffix("}") + ',\n"steps_per_print": 2}')
    config = load_config(RECIPE, [f"distributed.deepspeed_config={tmp_path}/a.json"])
    with pytest.raises(ConfigError, match=r'"steps_per_print" stands twice \(lines 2 and \d+\)'):
        resolve_deepspeed_config(config)


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": [-Infinity]}', '{"a": 1e999}', '{"a": 1, "a": 1}', "{"])
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"NaN|Infinity|1e999|twice|Expecting"):
        strict_json.loads(text)


def test_the_lines_are_those_of_the_same_object() -> None:
    text = json.dumps({"x": [{"b": 1}, ":"], "a": {"b": 2}}, indent=1).replace('"a": {', '"a": {"b": 0,')
    with pytest.raises(ValueError, match=r'"b" stands twice \(lines 8 and 9\)'):
        strict_json.loads(text)


def test_written_json_has_no_nan() -> None:
    record = {"loss": math.nan, "all": (1.5, -math.inf), "text": "NaN"}
    assert json.loads(strict_json.dumps(record), parse_constant=pytest.fail) == {
        "loss": None,
        "all": [1.5, None],
        "text": "NaN",
    }


def test_yaml_merges_and_equal_keys_of_other_maps_are_fine() -> None:
    text = "base: &base {a: 1}\nother:\n  <<: *base\n  a: 2\n"
    assert strict_yaml.load(text, "the file", "f") == {"base": {"a": 1}, "other": {"a": 2}}


def test_paths_of_recipes_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "run: {dir: $SCRATCH/a, init_from: ~/b}\nmodel: {path: ~/m, cache_dir: '${SCRATCH}/c'}\ndata: {shards: ~/s}\n"
        "train: {stage: text, max_steps: 20}\ncheckpoint: {copy_to: ~/copies}\nevaluation: {shards: $SCRATCH/e}\n"
        "distributed: {deepspeed_config: ~/d/z.json}\n"
    )
    config = load_config(recipe, ["run.dir=~/runs/a"])
    assert (config.run.dir, config.run.init_from) == (Path("/home/me/runs/a"), Path("/home/me/b"))
    assert (config.model.path, config.model.cache_dir) == ("/home/me/m", Path("/scratch/me/c"))
    assert (config.data.shards, config.evaluation.shards) == (Path("/home/me/s"), Path("/scratch/me/e"))
    assert config.checkpoint.copy_to == Path("/home/me/copies")
    assert config.distributed.deepspeed_config == "/home/me/d/z.json"


def test_options_are_expanded_and_questions_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    app = typer.Typer()

    @app.command()
    @expanded("model")
    def show(model: str, prompt: str, image: list[Path], output: Path | None = None) -> None:
        typer.echo(f"{model} {prompt} {image} {output}")

    result = CliRunner().invoke(app, ["~/m", "$5 or ~?", "~/a", "b"])
    assert result.output == "/home/me/m $5 or ~? [PosixPath('/home/me/a'), PosixPath('b')] None\n"
    result = CliRunner().invoke(app, ["$NOT_SET/m", "q", "b"])
    assert isinstance(result.exception, ConfigError)


def test_a_dollar_that_names_no_variable_stays() -> None:
    assert expand("a$/b c~") == "a$/b c~"


def test_empty_sections_have_their_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(b"\xef\xbb\xbf" + RECIPE.read_bytes() + b"\nlaunch:\n  # max_restarts: 1\n")
    assert load_config(recipe).launch.max_restarts == 3
    assert load_config(recipe, ["launch.max_restarts=5"]).launch.max_restarts == 5
    cluster = tmp_path / "c.yaml"
    cluster.write_text("partition: gpu\ntime: 24:00:00\nsetup:\nenvironment:\n")
    assert load_cluster(str(cluster)).time == "24:00:00"
