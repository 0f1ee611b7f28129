"""The model card of an exported folder: README.md, with what the run's files say and nothing else.

It names no folder of the machine that trained: such a page is published. What the run did not write is left out: losses
without a record of the step, an evaluation that there was not, a base model that is no hub id.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import GenerationConfig

from mirage_ds.config import Config, Stage
from mirage_ds.housekeeping import warn_once

# Of the recipe, in the card where they differ from the defaults.
SECTIONS = ("model", "data", "train")
OF_A_MACHINE = {
    "model": {"path", "cache_dir", "cache_targets", "cache_targets_gib", "attention", "gather"},
    "data": {"shards", "cache_dir", "cache_gib", "read_timeout_s", "num_workers"},
    "train": {"log_freq", "profile_steps", "max_skipped_steps"},
}
LOSSES: dict[Stage, dict[str, str]] = {  # a record's keys, and their names
    "text": {"ce_loss": "text loss"},
    "stage1": {"loss": "loss", "ce_loss": "text loss", "latent_loss": "latent loss"},
    "stage2": {"ce_loss": "text loss"},
}
GREEDY = {"do_sample": False, "repetition_penalty": 1.0}

WHAT_IT_DOES = {
    "text": "answers in text alone. It is the baseline of a run with latents, on the same rows.",
    "stage1": "writes latent tokens between its words: blocks of {size} states, trained towards helper images.",
    "stage2": "writes latent tokens between its words: blocks of {size} of its own states, which it is fed.",
}
USE = """## Use

With mirage_ds:

```bash
mirage generate --model FOLDER --image IMAGE.png --prompt "QUESTION"
```

With transformers (5.5.4 or later) and torchvision, where FOLDER is this folder:

```python
from transformers import pipeline
ask = pipeline("image-text-to-text", "FOLDER"{trust})
print(ask(text={messages}, max_new_tokens=1024, return_full_text=False))
```
"""
MESSAGES = (
    '[{"role": "user", "content": [{"type": "image", "path": "IMAGE.png"}, {"type": "text", "text": "QUESTION"}]}]'
)
TRUST = """
`trust_remote_code=True` runs `custom_generate/generate.py` of this folder, which decodes with latents; its docstring
has the options. So does `model.generate(**inputs, custom_generate="FOLDER", trust_remote_code=True)` of a loaded model.
Batches must be padded on the left: load the tokenizer with padding_side="left".

As text only: the same lines without `trust_remote_code`. What is lost: no state is fed back. The tokens of a block are
chosen and embedded as ordinary ones, for which the model was not trained{hidden}. Its answers are then not those of the
evaluation.
"""
HIDDEN = ", and the images stay visible after the first block"
SYSTEM_TURN = """
The model was trained without the system turn that the chat template adds: cut it off the prompt.
"""


def model_card(config: Config, facts: Mapping[str, Any], run_dir: Path, base: str, generation: GenerationConfig) -> str:
    """The page.

    Args:
        facts: of the checkpoint (run.json).
        run_dir: where the run may have left records and an evaluation of the checkpoint's step.
        base: hub id or folder of the model that the run started from.
    """
    stage, step = config.train.stage, facts["step"]
    hub_id = None if Path(base).exists() else base
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        **({"base_model": hub_id} if hub_id else {}),
        "tags": ["mirage_ds", *(["latent-visual-tokens", "custom_generate"] if stage != "text" else [])],
    }
    does = WHAT_IT_DOES[stage].format(size=config.model.latent_size)
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n",
        f"# {(hub_id or 'Qwen2.5-VL').rpartition('/')[2]}, mirage_ds {stage}\n",
        f"A Qwen2.5-VL that {does} `mirage export` wrote this page from the files of the run.\n",
        _use(config),
        _defaults(generation),
        _training(config, facts, hub_id),
        _losses(run_dir, stage, step),
        _evaluation(run_dir / "evaluations" / f"step_{step}.jsonl.summary.json"),
    ]
    return "\n".join(part for part in parts if part)


def _use(config: Config) -> str:
    system_turn = "" if config.data.system_turn else SYSTEM_TURN
    if config.train.stage == "text":
        return USE.format(trust="", messages=MESSAGES) + system_turn
    hidden = "" if config.model.answer_sees_image else HIDDEN
    use = USE.format(trust=", trust_remote_code=True", messages=MESSAGES)
    return use + TRUST.format(hidden=hidden) + system_turn


def _defaults(generation: GenerationConfig) -> str:
    """How transformers' defaults differ from those of `mirage generate`."""
    values = generation.to_diff_dict()
    found = {name: values[name] for name, greedy in GREEDY.items() if values.get(name, greedy) != greedy}
    if not found:
        return ""
    given = ", ".join(f"{name}={value}" for name, value in found.items())
    wanted = ", ".join(f"{name}={GREEDY[name]}" for name in found)
    return (
        f"`generation_config.json` is the base model's ({given}), and transformers follows it. `mirage generate` is "
        f"greedy; give `{wanted}` for its answers.\n"
    )


def _training(config: Config, facts: Mapping[str, Any], hub_id: str | None) -> str:
    rows = {
        "base model": hub_id or "a folder, not a hub id",
        "weights at the start": "of another run of mirage_ds" if config.run.init_from else "of the base model",
        "stage": config.train.stage,
        "step": f"{facts['step']} of {facts['max_steps']}" if "max_steps" in facts else facts["step"],
        "samples per step": facts.get("global_batch_size"),
        "digest of the data": facts.get("manifest_digest"),
        "seed": config.run.seed,
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value is not None)
    recipe = {
        name: values
        for name in SECTIONS
        if (values := getattr(config, name).model_dump(mode="json", exclude_defaults=True, exclude=OF_A_MACHINE[name]))
    }
    return (
        f"## Training\n\n| | |\n| --- | --- |\n{table}\nThe recipe, where it differs from the defaults and not only in "
        f"folders:\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```\n"
    )


def _losses(run_dir: Path, stage: Stage, step: int) -> str:
    """The records of the step itself."""
    columns = LOSSES[stage]
    lines = []
    for name, file in (("training", "metrics.jsonl"), ("validation", "validation.jsonl")):
        if record := _record(run_dir / file, step):
            lines.append(f"| {name} | {' | '.join(f'{record[key]:.4g}' for key in columns)} |\n")
    if not lines:
        return ""
    head = f"| | {' | '.join(columns.values())} |\n| --- |{' ---: |' * len(columns)}\n"
    return f"Losses at step {step}:\n\n{head}{''.join(lines)}"


def _record(path: Path, step: int) -> dict[str, Any]:
    """The record of a step in a file of the run; empty if it has none."""
    if not path.is_file():
        return {}
    with path.open(errors="replace") as file:
        for line in file:
            if line.startswith(f'{{"step": {step},'):
                try:
                    record: dict[str, Any] = json.loads(line)
                except ValueError:  # cut short by a full disk, as the log said
                    continue
                return record
    return {}


def _evaluation(path: Path) -> str:
    """The rates of an evaluation after the step, by arm and way of scoring."""
    if not path.is_file():
        return ""
    try:
        summary = json.loads(path.read_text())
        arms, settings = summary["arms"], summary["settings"]
        lines = [
            f"| {arm} | {way} | {rate['rate']:.1%} | {rate['low']:.1%} - {rate['high']:.1%} | {rate['num_rows']} |\n"
            for arm, found in arms.items()
            for way, rate in found.get("rates", {}).items()
        ]
        told = f"task `{summary['task']}`, at most {settings['max_new_tokens']} tokens, rows {settings['rows']:.12}"
    except (ValueError, KeyError, TypeError) as error:
        warn_once(f"the model card has no evaluation ({path}): {error!r}; expected the summary that the run wrote")
        return ""
    if not lines:
        return ""
    head = "| latents | scored by | success | 95% interval | rows |\n| --- | --- | ---: | --- | ---: |\n"
    return f"## Evaluation\n\nBy the run itself after this step, greedy: {told}.\n\n{head}{''.join(lines)}"
