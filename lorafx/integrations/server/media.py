"""Images and sounds in the messages of a chat: read from data URLs and base64, or fetched from
allowed hosts, bounded before anything is decoded, and made into inputs of the model by its
processor.

    {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}
    {"type": "input_audio", "input_audio": {"data": "...", "format": "wav"}}
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import wave
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.fetching import FetchError, fetched
from lorafx.integrations.server.settings import ModelSettings

#: Formats whose sizes Pillow reads without making pixels. WebP's reader takes the memory of two
#: whole images to open a file.
_FORMATS = ("PNG", "JPEG", "GIF")
_URL = re.compile(r"data:image/[a-z.+-]+;base64,", re.IGNORECASE)
#: The types of parts -> what they hold, and the part of transformers' processors that reads it.
KINDS = {"image_url": ("image", "image_processor"), "input_audio": ("audio", "feature_extractor")}


class Media:
    """The images and sounds of one request, in the order of its messages. `processor` is the
    model's, None if it takes text only."""

    def __init__(self, processor: Any, settings: ModelSettings) -> None:
        self._processor, self._settings = processor, settings
        self._found: dict[str, list[Any]] = {"image": [], "audio": []}
        self._pixels, self._seconds = 0, 0.0

    def __bool__(self) -> bool:
        return any(self._found.values())

    def part(self, part: Mapping[str, Any], place: str) -> dict[str, str]:
        """Read a part of one of `KINDS`, and return it as chat templates take it. Raises
        RequestError, which names the `place`, if it is not read or exceeds a bound."""
        name, reader = KINDS[part["type"]]
        if getattr(self._processor, reader, None) is None:
            raise _refused(place, f"the model takes no {name} ({part['type']}); leave it out")
        if sum(map(len, self._found.values())) >= self._settings.max_media:
            most = self._settings.max_media
            raise _refused(place, f"a request has at most {most} of them, as --max-media says")
        found = self._image(part, place) if name == "image" else self._audio(part, place)
        self._found[name].append(found)
        return {"type": name}

    def inputs(self, text: str, special: bool) -> dict[str, Tensor]:
        """The inputs of the model's `generate` for a prompt with these. Raises RequestError if the
        processor refuses them."""
        images, sounds = self._found["image"], self._found["audio"]
        given = {"images": images} if images else {}
        if sounds:
            rate = self._processor.feature_extractor.sampling_rate
            given |= {"audio": sounds, "sampling_rate": rate}
        try:
            made = self._processor(
                text=[text], **given, add_special_tokens=special, return_tensors="pt"
            )
        except Exception as error:  # such as for a shape, or a template that shows no images
            raise RequestError(f"the model's processor refuses it: {error!s:.500}") from error
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}

    def _bytes(self, data: object, place: str) -> bytes:
        if not isinstance(data, str):
            raise _refused(place, "its data are no string of base64")
        self._check_bytes(len(data) * 3 // 4 - 2, place)
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise _refused(place, f"its data are no base64: {error}") from error

    def _image(self, part: Mapping[str, Any], place: str) -> Any:
        from PIL import Image  # a server of text needs none

        asked = part.get("image_url")
        url: Any = asked.get("url") if isinstance(asked, dict) else asked
        data, most = self._image_bytes(url, place), self._settings.max_pixels
        too_large = f"with it the images have more than {most} pixels, which --max-pixels allows"
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)  # only the header
            self._pixels += image.width * image.height
            if self._pixels > most:
                raise _refused(place, too_large)
            if getattr(image, "is_animated", False):
                raise _refused(place, "it has several frames; send one as an image")
            return image.convert("RGB")
        except Image.DecompressionBombError as error:
            raise _refused(place, too_large) from error
        except RequestError:
            raise
        except Exception as error:  # a hostile file may raise anything
            kinds = ", ".join(_FORMATS)
            raise _refused(place, f"it cannot be read as {kinds}: {error!s:.200}") from error

    def _image_bytes(self, url: object, place: str) -> bytes:
        text = url if isinstance(url, str) else ""
        if head := _URL.match(text[:80]):
            return self._bytes(text[head.end() :], place)
        if not text.lower().startswith(("http://", "https://")):
            wanted = "images come as data:image/png;base64,... (or jpeg, gif), or by address"
            raise _refused(place, f"{wanted}; got {url!r:.40}")
        domains, most = self._settings.allowed_media_domains, self._settings.max_media_bytes
        try:
            data = fetched(text, domains, most + 1)
        except FetchError as error:
            raise _refused(place, str(error)) from error
        self._check_bytes(len(data), place)
        return data

    def _check_bytes(self, count: int, place: str) -> None:
        if count > (most := self._settings.max_media_bytes):
            raise _refused(place, f"it has more than {most} bytes, which --max-media-bytes allows")

    def _audio(self, part: Mapping[str, Any], place: str) -> np.ndarray:
        """Samples (T,) from -1 to 1, the mean of all channels."""
        asked = part.get("input_audio")
        if not isinstance(asked, dict) or asked.get("format") != "wav":
            raise _refused(place, "sounds come as base64 of the format wav")
        data, most = self._bytes(asked.get("data"), place), self._settings.max_audio_seconds
        rate = int(self._processor.feature_extractor.sampling_rate)
        try:
            with wave.open(io.BytesIO(data)) as file:
                channels, width, given, frames = file.getparams()[:4]
                if (width, given) != (2, rate) or not frames:
                    raise _refused(
                        place,
                        f"the model takes wav of 16 bits at {rate} Hz; got {8 * width} bits at "
                        f"{given} Hz, {frames} samples",
                    )
                self._seconds += frames / rate
                if self._seconds > most:
                    raise _refused(
                        place,
                        f"with it the sounds have more than {most} s, which --max-audio-seconds "
                        "allows",
                    )
                read = file.readframes(frames)
        except (wave.Error, EOFError) as error:
            raise _refused(place, f"it cannot be read as wav: {error!s:.200}") from error
        if len(read) != 2 * channels * frames:
            raise _refused(place, "it cannot be read as wav: its end is missing")
        samples = np.frombuffer(read, "<i2").reshape(frames, channels)
        return (samples.mean(1) / 32768).astype(np.float32)


def _refused(place: str, why: str) -> RequestError:
    return RequestError(f"{place}: {why}", place)
