"""Decodes with latents in plain transformers, which runs this file instead of its own `generate`.

`mirage export` puts a copy into the folder of a model, DIR. Either of these uses it:

    model = AutoModelForImageTextToText.from_pretrained(DIR, trust_remote_code=True); model.generate(**inputs)
    model.generate(**inputs, custom_generate=DIR, trust_remote_code=True)

transformers prepares a call as for its own decoding: lengths, logits processors, stopping criteria, cache. The loop is
this file's, and emits what `mirage generate` does: each row that emits <|latent_start|> enters latent mode, in which
each next input is its own hidden state after the final norm, emitted as <|latent_pad|>, until <|latent_end|>. A model
that was trained as text decodes as text. Needs torch and transformers only.

Shape legend: B rows, L columns of the prompts, D hidden size, V vocabulary, N images, T emitted tokens.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput

LATENT_OPTIONS = ("latent_size", "latent_end", "seed", "keys")
# What a call may not have, and why. An option that is None counts as left out.
UNSUPPORTED = {
    "inputs_embeds": "images are found by the ids of the prompts: give input_ids",
    "past_key_values": "a call starts with an empty cache: give the whole conversation as the prompt",
    "cache": "a call starts with an empty cache: give the whole conversation as the prompt",
    "position_ids": "they are computed from image_grid_thw",
    "pixel_values_videos": "the model was trained on images",
    "assistant_model": "an assistant has no latents",
    "synced_gpus": "no rank waits for another: load the whole model on each",
}


class Call(NamedTuple):
    """What a call says that transformers does not hand on to the loop, and what the model was trained with."""

    latent_size: int  # K: states per block
    ends_itself: bool  # a block also ends where the model chooses <|latent_end|>
    answer_sees_image: bool  # whether a row attends to its images from its first <|latent_end|> on
    pad: int
    start: int
    end: int
    image_grids: Sequence[Sequence[int]]  # N times time, height, width, in patches
    seed: int | None
    keys: Sequence[str] | None
    streamer: Any


def generate(*inputs: Any, model: Any, custom_generate: Any = None, **arguments: Any) -> Any:
    """Decodes prompts, padded on the left; takes what transformers' `generate` takes, and four options.

    Args:
        latent_size: K, the states of a block; None: as the model was trained.
        latent_end: `fixed`, or None: a block ends after K states. `model`: or where the model chooses <|latent_end|>.
        seed: with do_sample=True, the draws of `mirage generate --seed`: those of a row depend on the seed and its key
            only. None: torch's own generator.
        keys: of the rows, for the seed; None: each row has the key of the one question of `mirage generate`.

    Returns:
        Ids [B, L + T], prompts first; or with return_dict_in_generate=True an output with `sequences` and `latents`:
        for each row a list of its blocks, each the states [n, D] that were fed.

    Raises:
        ValueError: an option that decoding with latents does not have, or prompts that it cannot decode.
    """
    if custom_generate is not None:  # asked for by name, of a model that was loaded with this function
        return type(model).generate(model, *inputs, custom_generate=custom_generate, **arguments)
    options = {name: arguments.pop(name) for name in LATENT_OPTIONS if arguments.get(name) is not None}
    entry = getattr(model.config, "mirage", None)
    if entry is None:
        raise ValueError(
            f"the number of latents is not known ({model.name_or_path}: config.json has no entry `mirage`); expected "
            "a model that `mirage export` wrote; load the folder that this file lies in"
        )
    if entry["stage"] != "text":
        return decode(model, entry, options, *inputs, **arguments)
    if options:
        raise ValueError(
            f"{', '.join(options)} for a model without latents ({model.name_or_path}: its stage is text); expected "
            "transformers' own options; leave the others out"
        )
    return type(model).generate(model, *inputs, **arguments)


def decode(
    model: Any,
    entry: dict[str, Any],
    options: dict[str, Any],
    *inputs: Any,
    streamer: Any = None,
    stopping_criteria: Any = None,
    tokenizer: Any = None,
    stop_strings: str | list[str] | None = None,
    **arguments: Any,
) -> Any:
    """Checks a call, and has transformers prepare it; with the entry of config.json, and the call's LATENT_OPTIONS."""
    for name, reason in UNSUPPORTED.items():
        if arguments.get(name) is not None and arguments[name] is not False:
            raise ValueError(f"{name} cannot be given when decoding with latents: {reason}")
    configs = (model.generation_config, *inputs[1:2], arguments.get("generation_config"))
    for name in ("stop_strings", "token_healing"):
        if arguments.get(name) or any(getattr(each, name, None) for each in configs):
            raise ValueError(f"{name} in the configuration; expected none there; give stop_strings to the call itself")
    latent_size, latent_end = options.get("latent_size", entry["latent_size"]), options.get("latent_end", "fixed")
    if type(latent_size) is not int or latent_size < 1 or latent_end not in ("fixed", "model"):
        raise ValueError(
            f"latent_size={latent_size!r}, latent_end={latent_end!r}; expected a whole number of at least 1, and "
            "`fixed` or `model`; leave them out to decode as the model was trained"
        )
    criteria = StoppingCriteriaList(stopping_criteria or [])
    if stop_strings is not None:  # transformers hands no tokenizer on to a loop that is not its own
        if tokenizer is None:
            raise ValueError("stop_strings without a tokenizer; expected the model's own; give it as tokenizer=")
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    grids = arguments.get("image_grid_thw")
    trained = {"answer_sees_image": entry.get("answer_sees_image", True)} | entry["latent_token_ids"]
    call = Call(
        latent_size,
        latent_end == "model",
        **trained,
        image_grids=[] if grids is None else grids.tolist(),
        seed=options.get("seed"),
        keys=options.get("keys"),
        streamer=streamer,
    )
    # Of the first, transformers would make positions. It gives prompts to the streamer, and the loop the answers.
    arguments |= {"mm_token_type_ids": None, "streamer": streamer, "stopping_criteria": criteria}
    return type(model).generate(model, *inputs, custom_generate=partial(loop, call=call), **arguments)


def loop(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    call: Call,
    **prepared: Any,
) -> Any:
    """Decodes until every row has ended; called by transformers' `generate`, see there for the arguments."""
    check_supported(model, generation_config, prepared)
    config: Any = generation_config
    wanted, device = config.return_dict_in_generate, input_ids.device
    choose = chooser(config, call, len(input_ids))
    forward = Forward(model, input_ids, prepared, call, config.num_return_sequences or 1)
    all_scores: Any = () if wanted and config.output_scores else None
    all_logits: Any = () if wanted and config.output_logits else None
    kept = []  # of each step: the tokens [B], the states [B, D] and whether they are fed [B]
    steps = torch.full((len(input_ids),), -1, device=device)  # states fed in the current block; -1 outside of one
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=device)
    hidden = forward.step(forward.positions, input_ids=forward.input_ids, **forward.images)
    while True:
        logits = model.lm_head(hidden).to(device, torch.float32, copy=True)
        if not (logits.isfinite().all(dim=-1) | done).all():
            raise ValueError(f"logits not finite ({model.name_or_path}); expected finite ones; try dtype=torch.float32")
        scores = logits_processor(input_ids, logits)
        emitted, steps = next_tokens(choose(scores), steps, call)
        emitted = torch.where(done, config._pad_token_tensor.to(device), emitted)
        feeds_state = (steps > 0) & ~done
        all_scores = None if all_scores is None else (*all_scores, scores)
        all_logits = None if all_logits is None else (*all_logits, logits)
        if wanted:
            kept.append((emitted.to(hidden.device), hidden, feeds_state.to(hidden.device)))
        input_ids = torch.cat([input_ids, emitted[:, None]], dim=1)
        if call.streamer is not None:
            call.streamer.put(emitted.cpu())
        done = done | stopping_criteria(input_ids, all_scores)
        if done.all():
            break
        hidden = forward.tokens(emitted, hidden, feeds_state)
    if call.streamer is not None:
        call.streamer.end()
    if not wanted:
        return input_ids
    sequences: Any = input_ids  # no cache: transformers' decoding would continue from it at other positions
    output = GenerateDecoderOnlyOutput(sequences, all_scores, all_logits)
    output["latents"] = blocks(kept, call.start)
    return output


def check_supported(model: Any, config: Any, prepared: dict[str, Any]) -> None:
    """Raises: ValueError: on what the loop does not do, see the keys of `refused`."""
    mode, cache = config.get_generation_mode().value, config.cache_implementation
    refused = {
        f"the generation mode {mode}": mode not in ("greedy_search", "sample"),
        "use_cache=False": prepared.get("use_cache") is False,
        f"cache_implementation={cache!r}": cache not in (None, "dynamic", "offloaded"),
        "guidance_scale": config.guidance_scale not in (None, 1),
        "output of attentions or states": bool(config.output_attentions or config.output_hidden_states),
        "no eos_token_id": config._pad_token_tensor is None,
        "weights sharded by ZeRO-3": any(hasattr(weight, "ds_id") for weight in model.parameters()),
    }
    if found := [name for name, is_so in refused.items() if is_so]:
        raise ValueError(
            f"{found[0]} when decoding with latents; expected greedy or sampled decoding of a whole model with a "
            "cache that grows and an end token; change it, or decode as text with type(model).generate(model, **inputs)"
        )


class Forward:
    """The model's passes over prompts and over one token of each row, with mask, positions and cache."""

    def __init__(self, model: Any, input_ids: torch.Tensor, prepared: dict[str, Any], call: Call, copies: int) -> None:
        """Takes input_ids [B, L], in which each prompt stands `copies` times in a row.

        Raises:
            ValueError: the prompts have latents, or padding on the right, or other images than `call`.
        """
        self.cache_name = "cache" if "cache" in prepared else "past_key_values"  # before transformers 5.24
        self.model, self.call, self.cache = model, call, prepared[self.cache_name]
        self.device = model.get_input_embeddings().weight.device
        self.input_ids = input_ids.to(self.device)
        mask = prepared.get("attention_mask")
        self.mask = (torch.ones_like(input_ids) if mask is None else mask).to(self.device).bool()
        self.is_image = self.input_ids == model.config.image_token_id
        if ((self.input_ids == call.pad) & self.mask).any():
            raise ValueError(
                "a prompt has the token <|latent_pad|>, and the state that was fed there is not known; expected "
                "earlier answers as text; leave out their blocks, from <|latent_start|> to <|latent_end|>"
            )
        if not self.mask[:, -1].all():
            raise ValueError("prompts with padding on the right; expected padding_side='left'; set it in the tokenizer")
        merge_size = model.config.vision_config.spatial_merge_size
        positions = mrope_positions(self.is_image[::copies], self.mask[::copies], call.image_grids, merge_size)
        self.positions = positions.repeat_interleave(copies, dim=1).to(self.device)
        self.last_position = self.positions.amax(dim=(0, 2))  # [B]: images count as grids, so not by the length
        names = ("pixel_values", "image_grid_thw", "mm_encoder_outputs")
        self.images = {name: prepared[name] for name in names if prepared.get(name) is not None}

    def tokens(self, emitted: torch.Tensor, hidden: torch.Tensor, feeds_state: torch.Tensor) -> torch.Tensor:
        """The state [B, D] after one more token: `emitted` [B], or where `feeds_state` [B] the state `hidden`."""
        emitted = emitted.to(self.device)
        embeds = self.model.get_input_embeddings()(emitted)
        embeds = torch.where(feeds_state.to(self.device)[:, None], hidden.to(embeds), embeds)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(emitted), 1)], dim=1)
        if not self.call.answer_sees_image:
            self.mask[:, : self.is_image.shape[1]] &= ~(self.is_image & (emitted == self.call.end)[:, None])
        self.last_position = self.last_position + 1
        return self.step(self.last_position.expand(3, -1)[..., None], inputs_embeds=embeds[:, None])

    def step(self, position_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """One pass: the state [B, D] after the final norm in the last column.

        Raises:
            RuntimeError: the cache does not have every column.
        """
        inputs |= {"attention_mask": self.mask.long(), self.cache_name: self.cache, "use_cache": True}
        output = self.model.model(position_ids=position_ids, **inputs)
        if self.cache.get_seq_length() != self.mask.shape[1]:
            raise RuntimeError(
                f"the cache has {self.cache.get_seq_length()} columns after {self.mask.shape[1]} inputs; expected one "
                "for each; call model.eval(), which ends gradient checkpointing too"
            )
        state: torch.Tensor = output.last_hidden_state[:, -1]
        return state


def mrope_positions(
    is_image: torch.Tensor, mask: torch.Tensor, grids: Sequence[Sequence[int]], merge_size: int
) -> torch.Tensor:
    """Positions [3, B, L]: grid coordinates for an image's tokens; text positions for all others; 0 at padding.

    After an image the position advances by max(height, width) of its merged grid.

    Args:
        is_image, mask: [B, L] bool.
        grids: of the images of all rows, in order: time, height, width in patches.

    Raises:
        ValueError: the image pads of the prompts are not those of the grids.
    """
    mismatch = ValueError(
        f"the image pads of the prompts are not those of {len(grids)} images (image_grid_thw); expected the ids, "
        "pixel_values and image_grid_thw of one call of the processor; give all three"
    )
    positions = torch.zeros(3, *is_image.shape, dtype=torch.int64)
    remaining = [[time, height // merge_size, width // merge_size] for time, height, width in grids]
    for row, seen in enumerate(mask.cpu()):
        columns = seen.nonzero().flatten()
        images = is_image[row].cpu()[columns].tolist()
        place = position = 0
        while place < len(images):
            if images[place]:
                sides = [torch.arange(side) for side in (remaining.pop(0) if remaining else (0, 0, 0))]
                own, size = torch.stack(torch.meshgrid(*sides, indexing="ij")).flatten(1), max(map(len, sides[1:]))
            else:  # up to the next image
                size = [*images[place:], True].index(True)
                own = torch.arange(size).expand(3, -1)
            end = place + own.shape[1]
            if end == place or images[place:end] != [images[place]] * own.shape[1]:
                raise mismatch
            positions[:, row, columns[place:end]] = position + own
            place, position = end, position + size
    if remaining:
        raise mismatch
    return positions


def next_tokens(chosen: torch.Tensor, steps: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows emit when the model chooses `chosen` [B], and then the steps in their blocks: both [B]."""
    inside, over = steps >= 0, (steps >= call.latent_size) | ((chosen == call.end) & call.ends_itself)
    ends, continues = inside & over, inside & ~over
    emitted = torch.where(ends, call.end, torch.where(continues, call.pad, chosen))
    starts = ~inside & (chosen == call.start)
    steps = torch.where(continues, steps + 1, torch.where(ends, -1, steps))
    return emitted, torch.where(starts, 0, steps)


def chooser(config: Any, call: Call, num_rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What chooses tokens [B] from processed scores [B, V].

    Raises:
        ValueError: there are not as many keys as rows, or keys or a seed that nothing is drawn with.
    """
    if (call.keys is not None and call.seed is None) or (call.seed is not None and not config.do_sample):
        raise ValueError("keys without seed, or seed without do_sample=True; expected both of a pair, or neither")
    if not config.do_sample:
        return lambda scores: scores.argmax(dim=-1)
    if call.seed is None:
        return lambda scores: scores.softmax(dim=-1).multinomial(1)[:, 0]
    # Copies of a prompt with one key would have the same answer.
    alike = call.keys is None and (config.num_return_sequences or 1) == 1
    keys = ["prompt"] * num_rows if alike else call.keys or []
    if len(keys) != num_rows:
        raise ValueError(f"{len(keys)} keys for {num_rows} rows; expected one for each answer; give as many as keys=")
    digests = [hashlib.sha256(f"{call.seed}/{key}".encode()).digest()[:8] for key in keys]
    generators = [torch.Generator().manual_seed(int.from_bytes(digest, "big")) for digest in digests]

    def draw(scores: torch.Tensor) -> torch.Tensor:
        likely, ids = scores.double().softmax(dim=-1).sort(dim=-1, descending=True)
        cumulative = likely.cumsum(dim=-1)
        draws = torch.cat([torch.rand(1, generator=each, dtype=torch.float64) for each in generators])
        places = torch.searchsorted(cumulative, draws.to(scores.device)[:, None] * cumulative[:, -1:], right=True)
        return ids.gather(1, places)[:, 0]

    return draw


def blocks(kept: Sequence[Sequence[torch.Tensor]], start: int) -> list[list[torch.Tensor]]:
    """Of each row its blocks, each the states [n, D] that were fed; from the tokens, states and marks of each step."""
    emitted, states, fed = (torch.stack(each, dim=1) for each in zip(*kept, strict=True))
    number = (emitted == start).cumsum(dim=1)  # of the last block that was opened
    return [
        [states[row][fed[row] & (number[row] == block)] for block in range(1, int(number[row].max()) + 1)]
        for row in range(len(states))
    ]
