"""Chat files and Monet's messages become rows of ours: texts, order and kind of images, turns. Against expectations
written by hand."""

import base64
from pathlib import Path
from typing import Any

from imported import import_made, png, put


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": value} for role, value in turns]


def test_sharegpt(tmp_path: Path) -> None:
    put(tmp_path, "red.png", "lime.png", "blue.png")
    rows = [
        {
            "id": "one",
            "conversations": said(("human", "<image>What is it?"), ("gpt", "Look: <image> a flag \u2691")),
            "images": ["red.png", "lime.png"],
            "source": "x",
        },
        {"conversations": said(("user", "Two?"), ("assistant", "Yes.")), "images": ["red.png", "blue.png"]},
        {"conversations": said(("human", "<image><image>?"), ("gpt", "No.")), "images": ["red.png"]},
        {"conversations": said(("human", "<image>?"), ("gpt", "No.")), "images": ["red.png", "blue.png"]},
        {"conversations": said(("human", "<image>?"), ("gpt", "No.")), "images": ["none.png"]},
        {"conversations": said(("human", "?"), ("tool", "4"), ("gpt", "No."))},
        {"conversations": said(("human", "?"), ("gpt", ""))},
        {"conversations": said(("human", "?"), ("gpt", "<|im_start|>"))},
        {"conversations": "human: ?"},
    ]
    imported = import_made(tmp_path, "sharegpt", rows)
    assert imported.shown() == [
        {
            "text_input": "<image>What is it?",
            "text_output": "Look: <output_image> a flag \u2691",
            "image_input": ["red"],
            "image_output": ["lime"],
            "id": "one",
        },
        {"text_input": "<image><image>Two?", "text_output": "Yes.", "image_input": ["red", "blue"]},
    ]
    assert imported.report["left_out"] == {
        "no image behind a marker": 1,
        "images without a marker": 1,
        "image_input cannot be read": 1,
        "a turn of another role": 1,
        "a turn is empty": 1,
        "text_output contains <|im_start|>": 1,
        "no turns in conversations": 1,
    }
    assert imported.report["fields_ignored"] == {"source": 1}
    lines = [int(each["where"].rpartition(":")[2]) for each in imported.left_out]
    assert lines == [3, 4, 5, 6, 7, 8, 9]
    assert len(list((imported.folder / "images").rglob("*.png"))) == 3, "an image that two rows have is written once"


def test_turns_before_the_last_are_context(tmp_path: Path) -> None:
    put(tmp_path, "red.png", "lime.png", "blue.png")
    turns = said(
        ("system", "Be brief."),
        ("human", "<image>What is it?"),
        ("gpt", "<image>A flag."),
        ("human", "And now?"),
        ("gpt", "<image>Red."),
    )
    row = {"conversations": turns, "images": ["red.png", "lime.png", "blue.png"]}
    (last,) = import_made(tmp_path, "sharegpt", [row]).shown()
    assert last == {
        "conversations": said(
            ("system", "Be brief."),
            ("human", "<image>What is it?"),
            ("gpt", "<image>A flag."),
            ("human", "And now?"),
            ("gpt", "<output_image>Red."),
        ),
        "image_input": ["red", "lime"],
        "image_output": ["blue"],
    }
    first, second = import_made(tmp_path, "sharegpt", [row], all_turns=True).shown()
    assert second == last
    assert first == {
        "conversations": said(
            ("system", "Be brief."), ("human", "<image>What is it?"), ("gpt", "<output_image>A flag.")
        ),
        "image_input": ["red"],
        "image_output": ["lime"],
    }


def test_a_chat_is_taken_with_all_its_turns_or_not_at_all(tmp_path: Path) -> None:
    put(tmp_path, "red.png")
    turns = said(("human", "?"), ("gpt", "<image>"), ("human", "?"), ("gpt", "<image>"))
    rows = [{"conversations": turns, "images": ["red.png", second]} for second in ("red.png", "none.png")]
    imported = import_made(tmp_path, "sharegpt", rows, all_turns=True)
    assert len(imported.rows) == 2
    assert (imported.report["rows_taken"], imported.report["rows_written"]) == (1, 2)
    assert imported.report["left_out"] == {"image_output cannot be read": 1}


def test_turns_in_another_order_are_left_out(tmp_path: Path) -> None:
    good = ("human", "?"), ("gpt", "!")
    rows = [said(*good), said(*good, ("human", "?")), said(("gpt", "!"), *good), said(("human", "?"), *good), []]
    imported = import_made(tmp_path, "sharegpt", [{"conversations": turns} for turns in rows])
    assert len(imported.rows) == 1
    assert imported.report["left_out"] == {"the turns are in another order": 4}


def test_videos_and_sound_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"conversations": said(("human", "?"), ("gpt", "!")), "videos": [], "audios": None},
        {"conversations": said(("human", "<video>?"), ("gpt", "!"))},
        {"conversations": said(("human", "What is said? <audio>"), ("gpt", "!"))},
        {"conversations": said(("human", "?"), ("gpt", "!")), "videos": ["a.mp4"]},
        {"conversations": said(("human", "?"), ("gpt", "!")), "audios": ["a.wav"]},
        {"conversations": said(("human", "?"), ("gpt", "!")), "video": "a.mp4"},
    ]
    imported = import_made(tmp_path, "sharegpt", rows)
    assert imported.rows == [{"text_input": "?", "text_output": "!"}]
    assert imported.report["left_out"] == {"a video or sound": 5}


def test_what_else_stands_in_a_turn(tmp_path: Path) -> None:
    """Weight 0 is an answer that is not trained; other fields are counted; calls of tools are the reason."""

    def chat(*answers: dict[str, Any]) -> dict[str, Any]:
        turns = [({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"} | each) for each in answers]
        return {"messages": [turn for pair in turns for turn in pair]}

    rows = [
        chat({"content": "1", "weight": 1, "reasoning_content": "x", "name": None}, {"content": "2", "weight": 0}),
        chat({"content": "3", "weight": 0}, {"content": "4", "reasoning_content": "x"}),
        chat({"weight": 0}),
        chat({"weight": 0.5}),
        chat({"content": None, "tool_calls": [{"id": "a"}]}),
    ]
    context = said(("human", "?"), ("gpt", "3"), ("human", "?"), ("gpt", "4"))
    for all_turns in (False, True):
        imported = import_made(tmp_path, "openai", rows, all_turns=all_turns)
        assert imported.rows == [{"text_input": "?", "text_output": "1"}, {"conversations": context}]
        assert imported.report["fields_ignored"] == {"messages.reasoning_content": 2}
        assert imported.report["left_out"] == {
            "no answer to train": 1,
            "a turn with a weight": 1,
            "a turn with calls of tools": 1,
        }


def test_openai(tmp_path: Path) -> None:
    put(tmp_path, "red.png")
    encoded = base64.b64encode(png("lime")).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [image, {"type": "text", "text": "What?"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "A "}, {"type": "image", "image": "red.png"}],
                },
            ]
        },
        {  # LLaMA-Factory's and trl's: markers and placeholders, the images beside them
            "messages": [
                {"role": "user", "content": "<image>What?"},
                {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "That."}]},
            ],
            "images": [{"path": "red.png"}, {"bytes": base64.b64encode(png("blue")).decode(), "path": "none.png"}],
        },
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, {"role": "assistant", "content": "!"}]},
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": None}]},
        {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}]},
        {
            "messages": [{"role": "user", "content": [image]}, {"role": "assistant", "content": "!"}],
            "images": ["red.png"],
        },
    ]
    imported = import_made(tmp_path, "openai", rows)
    assert imported.shown() == [
        {
            "conversations": said(("system", "Be brief."), ("human", "<image>What?"), ("gpt", "A <output_image>")),
            "image_input": ["lime"],
            "image_output": ["red"],
        },
        {
            "text_input": "<image>What?",
            "text_output": "<output_image>That.",
            "image_input": ["red"],
            "image_output": ["blue"],
        },
    ]
    assert imported.report["left_out"] == {
        "a part of another type": 1,
        "a turn without a text": 1,
        "no image behind a marker": 1,
        "images without a marker": 1,
    }


def test_covt(tmp_path: Path) -> None:
    put(tmp_path, "coco/red.png")
    turns = said(("human", "<image>\nHow far?"), ("gpt", "2 m"))
    rows = [
        {"id": 1, "image": "coco/red.png", "conversations": turns},
        {"id": 2, "conversations": said(("human", "No image"), ("gpt", "2 m"))},
        {"id": 3, "image": "coco/none.png", "conversations": turns},
    ]
    imported = import_made(tmp_path, "covt", rows)
    assert imported.shown() == [
        {"text_input": "<image>\nHow far?", "text_output": "2 m", "image_input": ["red"], "id": 1},
        {"text_input": "No image", "text_output": "2 m", "id": 2},
    ]
    assert [each["id"] for each in imported.left_out] == [3]


def monet_row(*answer: dict[str, str], number: int = 0) -> dict[str, Any]:
    system = {"type": "text", "text": "You can generate <abs_vis_token>...</abs_vis_token>."}
    question = [{"type": "image", "image": "images/in.png"}, {"type": "text", "text": "How many?"}]
    return {
        "metadata": {"dataset_name": "Zebra_CoT_count", "sample_id": number, "split": "a"},
        "data": [
            {"role": "system", "content": [system]},
            {"role": "user", "content": question},
            {"role": "assistant", "content": list(answer)},
        ],
    }


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def image(path: str) -> dict[str, str]:
    return {"type": "image", "image": path}


def test_monet(tmp_path: Path) -> None:
    put(tmp_path, "images/in.png", "images/a.png", "images/b.png")
    marker = "<abs_vis_token></abs_vis_token>"
    rows = [
        monet_row(
            text(f"I crop. {marker}"),
            image("images/a.png"),
            text(f"<observation>Two flags</observation>, so {marker}\n"),
            image("images/b.png"),
            text("\\boxed{2}"),
        ),
        monet_row(text("Only text: \\boxed{3}"), number=1),
        monet_row(text(f"{marker} nothing behind"), number=2),
        monet_row(text(marker), image("images/none.png"), number=3),
        monet_row(image("images/a.png"), text("\u0416"), number=4),
    ]
    imported = import_made(tmp_path, "monet", rows)
    fields = {"dataset_name": "Zebra_CoT_count"}
    assert imported.shown() == [
        {
            "text_input": "<image>How many?",
            "text_output": "I crop. <output_image>Two flags, so <output_image>\\boxed{2}",
            "image_input": ["red"],
            "image_output": ["lime", "blue"],
            **fields,
            "sample_id": 0,
        },
        {
            "text_input": "<image>How many?",
            "text_output": "Only text: \\boxed{3}",
            "image_input": ["red"],
            **fields,
            "sample_id": 1,
        },
        {
            "text_input": "<image>How many?",
            "text_output": "<output_image>\u0416",
            "image_input": ["red"],
            "image_output": ["lime"],
            **fields,
            "sample_id": 4,
        },
    ]
    assert imported.report["left_out"] == {"no image behind a marker": 1, "image_output cannot be read": 1}
