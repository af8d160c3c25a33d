"""Draws requests one after another on the devices, tells each how far it is, keeps the pictures."""

import base64
import collections
import dataclasses
import io
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from microdit_jax import images
from microdit_jax.app.limits import DrawRequest, Limits
from microdit_jax.errors import UserError
from microdit_jax.sampling.pipeline import LatentDiffusion

PREVIEW_SHARE = 0.25  # of the time of a drawing, at most, goes into previews
PREVIEW_SIDE = 256  # pixels; larger previews are shrunk

Event = dict[str, Any]  # what a page is told; "event" says which kind


class PageModel(NamedTuple):
    """A pipeline, and what a PNG says to be made again: sample_main.py's flags for it."""

    pipe: LatentDiffusion
    settings: dict[str, Any]


class Picture(NamedTuple):
    """A finished picture as it is downloaded."""

    png: bytes
    file_name: str


class Cancelled(Exception):
    """Nobody waits for this drawing any more."""


@dataclasses.dataclass(eq=False)
class Drawing:
    """A request on its way. `listener` is called with each event, from the studio's thread."""

    request: DrawRequest
    listener: Callable[[Event], None]
    cancelled: bool = False

    def cancel(self) -> None:
        """Leaves the queue, or stops before the next evaluation of the network."""
        self.cancelled = True


class Studio:
    """A queue of requests, and the thread that draws them.

    The devices do one thing at a time: requests are drawn in the order they came in, each with
    compiled programs of one of two batch sizes, so that no request makes the next one compile.

    Args:
      models: by the names that the page shows.
      batch_size: pictures drawn together when a request asks for several.
    """

    def __init__(self, models: dict[str, PageModel], *, limits: Limits, batch_size: int = 4):
        self.models, self.limits = models, limits
        self._together = min(batch_size, limits.count)
        self._waiting: collections.deque[Drawing] = collections.deque()
        self._changed = threading.Condition()
        self._pictures: collections.OrderedDict[str, Picture] = collections.OrderedDict()
        self._drawing = self._closed = False
        self._thread = threading.Thread(target=self._work, name="studio", daemon=True)

    def warm_up(self) -> dict[str, int]:
        """Compiles all that requests need; the side of each model's pictures, in pixels."""
        sides = {}
        for name, (pipe, _) in self.models.items():
            for size in {1, self._together}:
                for guide in (True, False):
                    pipe.warm_up(size, batch_size=size, guide=guide)
            options = {"guidance_scale": 1.0, "num_inference_steps": 1, "batch_size": 1}
            (batch,) = pipe.sample(["a"], seed=0, preview=lambda *_: None, **options)
            sides[name] = batch.images.shape[1]
        return sides

    def start(self) -> None:
        """Begins to draw."""
        self._thread.start()

    def close(self) -> None:
        """Cancels what waits and ends the thread after what it draws."""
        with self._changed:
            self._closed = True
            for drawing in self._waiting:
                drawing.cancel()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def submit(self, request: DrawRequest, listener: Callable[[Event], None]) -> Drawing:
        """Queues a request; the listener hears at once how many are before it.

        Raises:
          UserError: too many are waiting.
        """
        drawing = Drawing(request, listener)
        with self._changed:
            self._waiting = collections.deque(d for d in self._waiting if not d.cancelled)
            if len(self._waiting) >= self.limits.waiting:
                raise UserError(
                    f"expected at most {self.limits.waiting} drawings waiting, found as many; try "
                    "again in a moment"
                )
            self._waiting.append(drawing)
            self._tell_places()
            self._changed.notify_all()
        return drawing

    def picture(self, name: str) -> Picture | None:
        """A finished picture by its random name, while it is kept."""
        with self._changed:
            return self._pictures.get(name)

    def _tell_places(self) -> None:
        # With the lock held, so that "queued" never comes after "started".
        for ahead, drawing in enumerate(self._waiting, start=int(self._drawing)):
            drawing.listener({"event": "queued", "ahead": ahead})

    def _work(self) -> None:
        while True:
            with self._changed:
                self._drawing = False
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                drawing, self._drawing = self._waiting.popleft(), True
                self._tell_places()
            try:
                if not drawing.cancelled:
                    drawing.listener(self._draw(drawing))
            except Cancelled:
                pass
            except UserError as error:
                drawing.listener({"event": "error", "message": str(error)})
            except Exception:
                # The page must not hang, and the next request may be fine.
                traceback.print_exc()
                message = "the drawing failed; the server's log says why"
                drawing.listener({"event": "error", "message": message})

    def _draw(self, drawing: Drawing) -> Event:
        """Draws one request, with events on the way; the last one is returned."""
        request, start = drawing.request, time.perf_counter()
        pipe, settings = self.models[request.model]
        count = request.count
        settings = settings | {
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "seed": request.seed,
            "noise": "jax",
            "of": count,
            "made_with": pipe.description,
            "prompt": request.prompt,
        }
        drawing.listener({"event": "started", "of": count})
        (dropped,) = pipe.dropped([request.prompt])
        if dropped:
            message = f"the last {dropped} tokens of this prompt are cut: the model reads no more"
            drawing.listener({"event": "warning", "message": message})
        watch = _Watch(drawing, pipe, start)
        batches = pipe.sample(
            [request.prompt] * count,
            seed=request.seed,
            guidance_scale=request.guidance_scale,
            num_inference_steps=request.num_inference_steps,
            batch_size=1 if count == 1 else self._together,
            progress=watch.evaluations,
            preview=watch.preview,
        )
        pngs = [
            Picture(
                images.encode_png(image, settings | {"index": i}),
                images.file_name(i, request.prompt),
            )
            for batch in batches
            for i, image in zip(batch.indices, batch.images, strict=True)
        ]
        return {
            "event": "done",
            "pictures": [self._keep(picture) for picture in pngs],
            "seconds": round(time.perf_counter() - start, 2),
        }

    def _keep(self, picture: Picture) -> str:
        """A random name for a picture; the oldest are dropped where there are too many."""
        name = secrets.token_urlsafe(16)
        with self._changed:
            self._pictures[name] = picture
            kept = sum(len(picture.png) for picture in self._pictures.values())
            while kept > self.limits.kept_bytes and len(self._pictures) > 1:
                _, oldest = self._pictures.popitem(last=False)
                kept -= len(oldest.png)
        return name


class _Watch:
    """Counts a drawing's evaluations, shows what it comes to, and stops it when it is cancelled."""

    def __init__(self, drawing: Drawing, pipe: LatentDiffusion, start: float):
        self._drawing, self._pipe, self._start = drawing, pipe, start
        self._spent = self._last = 0.0
        self._fraction = 0.0

    def evaluations(self, work: Iterable[Any]) -> Iterator[Any]:
        """The evaluations to be done, as `denoise` walks through them."""
        work = list(work)
        for i, item in enumerate(work):
            if self._drawing.cancelled:
                raise Cancelled
            self._fraction = i / len(work)
            yield item

    def preview(self, first: int, step: int, latents: Float[np.ndarray, "m h w c"]) -> None:
        """Tells of a step; with pictures where decoding them delays the drawing but little."""
        event = {"event": "step", "step": step + 1, "fraction": self._fraction}
        event |= {"first": first, "together": len(latents)}
        now = time.perf_counter()
        if self._spent + self._last <= PREVIEW_SHARE * (now - self._start):
            event["previews"] = [_data_url(image) for image in self._pipe.decode(latents)]
            self._last = time.perf_counter() - now
            self._spent += self._last
        self._drawing.listener(event)


def _data_url(image: Float[np.ndarray, "H W 3"]) -> str:
    """A small picture for a page, as a data: address."""
    shown, file = Image.fromarray(images.to_uint8(image)), io.BytesIO()
    if shown.width > PREVIEW_SIDE:
        shown = shown.reduce(shown.width // PREVIEW_SIDE)
    # Small pictures are shown pixel by pixel, where JPEG's blocks would be seen.
    form = "PNG" if shown.width <= 64 else "JPEG"
    shown.save(file, format=form, quality=80)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
