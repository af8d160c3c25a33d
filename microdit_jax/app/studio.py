"""Samples requests one after another on the devices, tells each its progress, keeps the images."""

import base64
import collections
import dataclasses
import hashlib
import io
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from microdit_jax import images
from microdit_jax.app.limits import Limits, SampleRequest
from microdit_jax.assets import known_words
from microdit_jax.errors import UserError
from microdit_jax.prepare.given_image import decoded_image
from microdit_jax.sampling.editing import Edit
from microdit_jax.sampling.pipeline import LatentDiffusion
from microdit_jax.sampling.settings import Sampler, network_passes
from microdit_jax.sampling.student import settled

PREVIEW_SHARE = 0.25  # of a request's time, at most, is spent on previews
PREVIEW_SIDE = 256  # pixels; larger previews are shrunk

SENT = "sent to the web page"  # in an image's settings, for the files that it was made from

Event = dict[str, Any]  # one message to a page; its "event" says which kind


class PageModel(NamedTuple):
    """A model that the page offers.

    Attributes:
      pipe: its pipeline.
      settings: the fields of `images.ImageSettings` that say which model it is: "model", the flags
        of its towers, "made_with". They travel to whoever asks for an image.
      words: that it can know; None: any (`known_words.of_model`).
      guidance_scale: that its own run samples with; None: it does not say.
    """

    pipe: LatentDiffusion
    settings: dict[str, Any]
    words: Container[str] | None = None
    guidance_scale: float | None = None


class PngFile(NamedTuple):
    """A finished image as it is downloaded."""

    png: bytes
    file_name: str


class Cancelled(Exception):
    """Raised inside the sampler when nobody waits for the images any more."""


@dataclasses.dataclass(eq=False)
class Job:
    """A request on its way. `listener` is called with each event, from the studio's thread."""

    request: SampleRequest
    listener: Callable[[Event], None]
    cancelled: bool = False

    def cancel(self) -> None:
        """Leaves the queue, or stops before the next evaluation of the network."""
        self.cancelled = True


class Studio:
    """A queue of requests, and the thread that samples their images.

    The devices do one thing at a time: requests run in the order they came in, each with compiled
    programs of one of two batch sizes, so that no request makes the next one compile.

    Args:
      models: by the names that the page shows.
      batch_size: images sampled together when a request asks for several.
      sampler: fields of `sampling.settings.Sampler` beside those that requests have.
    """

    def __init__(
        self,
        models: dict[str, PageModel],
        *,
        limits: Limits,
        batch_size: int = 4,
        sampler: Mapping[str, Any] | None = None,
    ):
        self.models, self.limits, self._sampler = models, limits, dict(sampler or {})
        self._batch_size = min(batch_size, limits.count)
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._images: collections.OrderedDict[str, PngFile] = collections.OrderedDict()
        self._running = self._closed = False
        self._thread = threading.Thread(target=self._work, name="studio", daemon=True)

    def warm_up(self) -> dict[str, int]:
        """Compiles the programs that most requests need.

        The first image that is changed, and the first with another kind of guidance, wait for
        theirs.

        Returns:
          The side of each model's images, in pixels.
        """
        sides = {}
        for name, (pipe, *_) in self.models.items():
            for size in {1, self._batch_size}:
                for scale in (2.0, 1.0):
                    options = self._options(pipe, {"guidance_scale": scale})
                    pipe.warm_up(size, batch_size=size, **options)
            scale = 1.0 if pipe.student is None else None
            (batch,) = pipe.sample(
                ["a"],
                seed=0,
                guidance_scale=scale,
                num_inference_steps=1,
                batch_size=1,
                preview=lambda *_: None,
            )
            sides[name] = batch.images.shape[1]
        return sides

    def start(self) -> None:
        """Begins with the first request."""
        self._thread.start()

    def close(self) -> None:
        """Cancels the jobs that wait and ends the thread after the one that runs."""
        with self._changed:
            self._closed = True
            for job in self._waiting:
                job.cancel()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def submit(self, request: SampleRequest, listener: Callable[[Event], None]) -> Job:
        """Queues a request; the listener hears at once how many are before it.

        Raises:
          UserError: too many are waiting.
        """
        job = Job(request, listener)
        with self._changed:
            self._waiting = collections.deque(j for j in self._waiting if not j.cancelled)
            if len(self._waiting) >= self.limits.waiting:
                raise UserError(
                    f"expected at most {self.limits.waiting} requests waiting, found as many; try "
                    "again in a moment"
                )
            self._waiting.append(job)
            self._tell_queue()
            self._changed.notify_all()
        return job

    def image(self, name: str) -> PngFile | None:
        """Returns a finished image by its random name, while it is kept."""
        with self._changed:
            return self._images.get(name)

    def _tell_queue(self) -> None:
        # With the lock held, so that "queued" never comes after "started".
        for ahead, job in enumerate(self._waiting, start=int(self._running)):
            job.listener({"event": "queued", "ahead": ahead})

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = False
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job, self._running = self._waiting.popleft(), True
                self._tell_queue()
            try:
                if not job.cancelled:
                    job.listener(self._sample(job))
            except Cancelled:
                pass
            except UserError as error:
                job.listener({"event": "error", "message": str(error)})
            except Exception:
                # The page must not hang, and the next request may be fine.
                traceback.print_exc()
                message = "sampling failed; the server's log says why"
                job.listener({"event": "error", "message": message})

    def _sample(self, job: Job) -> Event:
        """Samples the images of one request, with events on the way; returns the last one."""
        request, start = job.request, time.perf_counter()
        pipe, model_settings, words, _ = self.models[request.model]
        shared = {"prompt": request.prompt, "of": request.count}
        options = self._options(pipe, self._asked(request))
        edit, about_edit = self._edit(pipe, request)
        noise = {"seed": request.seed, "noise": "jax"}
        plan = Sampler(**options).plan(pipe.edm)
        shared |= {"evaluations": len(plan), "network_passes": network_passes(plan)}
        shared |= about_edit
        job.listener({"event": "started", "of": request.count})
        (dropped,) = pipe.dropped([request.prompt])
        messages = []
        if dropped:
            messages.append(
                f"the last {dropped} tokens of this prompt are cut: the model reads no more"
            )
        messages += known_words.notes(words, [request.prompt])
        if messages:
            job.listener({"event": "warning", "message": "; ".join(messages)})
        watch = _Watch(job, pipe, start)
        files = []
        for batch in pipe.sample(
            [request.prompt] * request.count,
            **noise,
            **options,
            batch_size=1 if request.count == 1 else self._batch_size,
            progress=watch.evaluations,
            preview=watch.preview,
            edit=edit,
        ):
            for index, image in zip(batch.indices, batch.images, strict=True):
                settings = images.ImageSettings.from_dict(
                    model_settings | shared | noise | options | {"index": index}
                )
                png = images.encode_png(image, dataclasses.asdict(settings))
                files.append(PngFile(png, images.file_name(index, request.prompt)))
        names = [self._keep(file) for file in files]
        seconds = round(time.perf_counter() - start, 2)
        return {"event": "done", "images": names, "seconds": seconds}

    def _asked(self, request: SampleRequest) -> dict[str, Any]:
        """Returns the sampler's settings that a request has."""
        asked: dict[str, Any] = {
            "guidance_scale": request.guidance_scale,
            "num_inference_steps": request.num_inference_steps,
            "strength": request.strength,
        }
        if request.solver not in (None, self._sampler.get("solver")):
            asked |= {"solver": request.solver, "schedule": None, "churn": None}
        if request.guidance not in (None, self._sampler.get("guidance")):
            asked |= {"guidance": request.guidance, "guidance_interval": None, "apg": None}
        if request.negative_prompt:
            asked["negative_prompt"] = request.negative_prompt
        return asked

    def _options(self, pipe: LatentDiffusion, asked: dict[str, Any]) -> dict[str, Any]:
        """Returns the sampler's settings of a request; without guidance a negative prompt rests."""
        chosen: dict[str, Any] = self._sampler | asked
        if pipe.student is not None:
            kept = ("num_inference_steps", "strength")
            chosen = {name: asked[name] for name in kept if name in asked}
            return dataclasses.asdict(Sampler(**settled(chosen, pipe.student)))
        if chosen["guidance_scale"] == 1:
            chosen["negative_prompt"] = ""
        return dataclasses.asdict(Sampler(**settled(chosen, None)))

    def _edit(
        self, pipe: LatentDiffusion, request: SampleRequest
    ) -> tuple[Edit | None, dict[str, Any]]:
        """Decodes and encodes the image that a request changes; and what its settings say of it."""
        about, decoded = {}, {}
        for name in ("image", "mask"):
            decoded[name] = data = getattr(request, name)
            if data is not None:
                decoded[name] = decoded_image(data, f"the {name}", self.limits.image_pixels)
                digest = hashlib.sha256(data).hexdigest()
                about |= {name: SENT, f"{name}_sha256": digest}
        return pipe.edit(decoded["image"], decoded["mask"]), about

    def _keep(self, image: PngFile) -> str:
        """Keeps an image under a random name; drops the oldest where they are too many bytes."""
        name = secrets.token_urlsafe(16)
        with self._changed:
            self._images[name] = image
            kept = sum(len(image.png) for image in self._images.values())
            while kept > self.limits.kept_bytes and len(self._images) > 1:
                _, oldest = self._images.popitem(last=False)
                kept -= len(oldest.png)
        return name


class _Watch:
    """Counts a job's evaluations, sends previews, and stops the job when it is cancelled."""

    def __init__(self, job: Job, pipe: LatentDiffusion, start: float):
        self._job, self._pipe, self._start = job, pipe, start
        self._spent = self._last = 0.0
        self._fraction = 0.0

    def evaluations(self, work: Iterable[Any]) -> Iterator[Any]:
        """Passes the evaluations on, as the sampler walks through them."""
        work = list(work)
        for i, item in enumerate(work):
            if self._job.cancelled:
                raise Cancelled
            self._fraction = i / len(work)
            yield item

    def preview(self, first: int, step: int, latents: Float[np.ndarray, "m h w c"]) -> None:
        """Tells of a step; with images where decoding them delays the job but little."""
        event = {"event": "step", "step": step + 1, "fraction": self._fraction}
        event |= {"first": first, "together": len(latents)}
        now = time.perf_counter()
        if self._spent + self._last <= PREVIEW_SHARE * (now - self._start):
            event["previews"] = [_data_url(image) for image in self._pipe.decode(latents)]
            self._last = time.perf_counter() - now
            self._spent += self._last
        self._job.listener(event)


def _data_url(image: Float[np.ndarray, "H W 3"]) -> str:
    """Encodes a small image as a data: URL for the page."""
    shown, file = Image.fromarray(images.to_uint8(image)), io.BytesIO()
    if shown.width > PREVIEW_SIDE:
        shown = shown.reduce(shown.width // PREVIEW_SIDE)
    # Small images are shown pixel by pixel, where JPEG's blocks would be seen.
    form = "PNG" if shown.width <= 64 else "JPEG"
    shown.save(file, format=form, quality=80)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
