"""Writes a complete small random Qwen2.5-VL folder offline, so that the trainer needs no special case for tests.

mirage init --preset tiny --text rows.jsonl --output models/tiny
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_ds.data.conversation import ROLES
from mirage_ds.data.rows import read_json_lines
from mirage_ds.data.turns import has_turns, read_turns
from mirage_ds.hf.written_folder import finish
from mirage_ds.model.backbone import ROW_MULTIPLE, random_model
from mirage_ds.output_folder import new_folder
from mirage_ds.tokens import END_OF_TEXT, IM_END, LATENT_TOKENS, TokenIds

# In the order of the real vocabulary, where their ids are 151643 to 151664.
QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)

# Qwen2.5-VL's public chat template: a default system turn; images and videos as one pad between their markers.
CHAT_TEMPLATE = (
    "{% set images = namespace(count=0) %}{% set videos = namespace(count=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{% set images.count = images.count + 1 %}"
    "{% if add_vision_id %}Picture {{ images.count }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}{% set videos.count = videos.count + 1 %}"
    "{% if add_vision_id %}Video {{ videos.count }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The limits of Qwen2.5-VL's own preprocessor_config.json: 4 to 16384 merged tokens.
MIN_IMAGE_PIXELS = 3136
MAX_IMAGE_PIXELS = 12845056

MAX_BASE_VOCABULARY = 2048


def write_tiny(text: Path, output: Path, seed: int) -> None:
    """Writes tokenizer, chat template, image processor, generation defaults and a random model to `output`.

    Raises:
        DataError: the rows cannot be read, or `output` exists and is not empty.
    """
    tokenizer = train_tokenizer(_row_texts(text))
    ids = TokenIds.of(tokenizer)
    vocab_size = -(-len(tokenizer) // ROW_MULTIPLE) * ROW_MULTIPLE
    with new_folder(output) as folder:
        random_model(vocab_size, ids, seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        Qwen2VLImageProcessorPil(min_pixels=MIN_IMAGE_PIXELS, max_pixels=MAX_IMAGE_PIXELS).save_pretrained(folder)
        GenerationConfig(
            bos_token_id=ids.end_of_text,
            eos_token_id=[ids.im_end, ids.end_of_text],
            pad_token_id=ids.end_of_text,
        ).save_pretrained(folder)
        finish(folder)


def _row_texts(path: Path) -> Iterator[str]:
    """The conversation of each row as text, so that the tokenizer also learns the words of the template."""
    for where, row in read_json_lines(path):
        question, answer = (str(row.get(name, "")) for name in ("text_input", "text_output"))
        said = f"user\n{question}\nassistant\n{answer}"
        if has_turns(row):
            turns = read_turns(row, where, answered=False)
            said = "\n".join(f"{ROLES[turn.role]}\n{turn.text}" for turn in turns)
        yield f"system\nYou are a helpful assistant.\n{said}"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer that splits text like Qwen2's, with Qwen2.5's special tokens and the latent tokens."""
    qwen = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = qwen.normalizer, qwen.pre_tokenizer, qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_BASE_VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    bpe.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*QWEN_SPECIAL_TOKENS, *LATENT_TOKENS)]
    )
    return Qwen2Tokenizer(tokenizer_object=bpe, eos_token=IM_END, pad_token=END_OF_TEXT, chat_template=CHAT_TEMPLATE)
