"""A sample as consecutive members of a tar shard: KEY.json, KEY.input_0.png, KEY.helper_0.png.

Writes and reads this format; no other file depends on it. Needs no torch.
"""

import io
import re
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mirage_ds import strict_json
from mirage_ds.data.images import IMAGE_FORMATS
from mirage_ds.data.places import Place
from mirage_ds.data.rows import Sample, num_latent_blocks, parse_row, read_latent_sizes, read_texts
from mirage_ds.data.shards import Shard, error_of
from mirage_ds.data.turns import turn_fields
from mirage_ds.errors import DataError

_SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"BM": "bmp", b"GIF8": "gif"}
_MEMBER = re.compile(r"(input|helper)_(0|[1-9]\d*)\.\w+")


def to_members(sample: Sample) -> dict[str, bytes]:
    """The sample as webdataset names it: {"json": ..., "input_0.png": ..., "helper_0.jpg": ...}.

    The extension follows the image's bytes, whatever the user's file was called.

    Raises:
        DataError: an image is not in one of IMAGE_FORMATS.
    """
    fields: dict[str, Any] = {"text_input": sample.text_input, "text_output": sample.text_output}
    if sample.context:
        fields = turn_fields(sample.turns)
    if sample.latent_sizes:
        fields["latent_size"] = list(sample.latent_sizes)
    members = {"json": strict_json.dumps({**fields, **sample.extra}).encode("ascii")}
    for kind, images in (("input", sample.input_images), ("helper", sample.helper_images)):
        for number, data in enumerate(images):
            members[f"{kind}_{number}.{_extension(data, f'{sample.key}.{kind}_{number}')}"] = data
    return members


def _extension(data: bytes, where: str) -> str:
    for signature, extension in _SIGNATURES.items():
        if data.startswith(signature):
            return extension
    raise DataError(f"unknown image format ({where}); allowed: {', '.join(IMAGE_FORMATS)}; convert the image")


def from_members(key: str, members: Mapping[str, bytes]) -> Sample:
    """The inverse of `to_members`. Images stay bytes; slots are checked when the sample is encoded.

    Raises:
        DataError: members are missing, unknown, or not as `to_members` writes them; the message names `key`.
    """
    if "json" not in members:
        raise DataError(f"{key}.json is missing; a sample needs it; build the shards again")
    fields = parse_row(members["json"], f"{key}.json")
    images: dict[str, dict[int, bytes]] = {"input": {}, "helper": {}}
    for name, data in members.items():
        if match := _MEMBER.fullmatch(name):
            images[match[1]][int(match[2])] = data
        elif name != "json":
            raise DataError(
                f"unknown member {key}.{name}; a sample has .json, .input_N.EXT and .helper_N.EXT; remove it, or build "
                "the shards again"
            )
    sample = replace(
        read_texts(fields, key=key, where=f"{key}.json"),
        input_images=_numbered(images["input"], f"{key}.input"),
        helper_images=_numbered(images["helper"], f"{key}.helper"),
    )
    return replace(sample, latent_sizes=read_latent_sizes(fields, num_latent_blocks(sample), f"{key}.json"))


def _numbered(images: Mapping[int, bytes], where: str) -> tuple[bytes, ...]:
    if sorted(images) != list(range(len(images))):
        raise DataError(
            f"{where} images are numbered {sorted(images)}; expected 0, 1, 2, ... without a gap; build the shards again"
        )
    return tuple(images[number] for number in range(len(images)))


def read_range(place: Place, shard: Shard, offset: int, size: int, where: str, *, again: bool = False) -> bytes:
    """Reads the bytes of one sample in a shard, including headers and padding.

    Args:
        again: what was read before cannot be used, so not from what this node keeps of a server's shard.

    Raises:
        DataError: the shard cannot be read or is too short; the message names `where`.
        StallError: likewise: its server does not answer.
    """
    try:
        data = place.read_range(shard, offset, size, again=again)
    except OSError as error:
        raise error_of(error)(
            f"cannot read the shard: {error.strerror} ({where}); restore {place.where(shard.name)}"
        ) from error
    if len(data) != size:
        raise DataError(
            f"only {len(data)} of {size} bytes from byte {offset} can be read ({where}); the index needs them all; the "
            "shard changed after the start: copy it again, or build again"
        )
    return data


def parse_members(data: bytes, key: str, where: str) -> dict[str, bytes]:
    """The members of one sample, {"json": ..., "input_0.png": ...}, from its range of a tar file.

    As plain bytes: webdataset's decoders unpickle, which would run code from a data set.

    Raises:
        DataError: the range has anything but consecutive regular files of this key up to its end.
    """
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                stem, _, name = info.name.partition(".")
                if not info.isreg() or stem != key or name in members:
                    raise tarfile.TarError(f"unexpected member {info.name}")
                # A regular member always has a stream.
                members[name] = tar.extractfile(info).read()  # type: ignore[union-attr]
            # tarfile treats a damaged header after a good member as the end.
            if tar.offset != len(data):
                raise tarfile.TarError(f"damaged header at byte {tar.offset}")
    except tarfile.TarError as error:
        raise DataError(
            f"damaged shard: {error} ({where}); the range must have only the members of this key; copy the shard "
            "again, or build again"
        ) from error
    return members
