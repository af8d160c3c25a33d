"""A web page to sample images with, on this machine.

Examples:
  python -m microdit_jax.app
  python -m microdit_jax.app --model=out/demo/finetune
  python -m microdit_jax.app --model=dit_4_channel_37M_real_and_synthetic_data --model=runs/mine
  python -m microdit_jax.app --model=... --host=0.0.0.0 --port=8080     (for everybody near)

Then open the address it prints. Needs `pip install microdit_jax[ui]`.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("microdit_jax.app.__main__")

import dataclasses
import logging
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from microdit_jax import model_flags
from microdit_jax.assets import hub, known_words
from microdit_jax.commands.cli import absl_command
from microdit_jax.errors import UserError, visible
from microdit_jax.machine import memory

if TYPE_CHECKING:  # loading these takes a second, and --help should not
    from microdit_jax.app.limits import Limits
    from microdit_jax.app.studio import PageModel

MODEL = flags.DEFINE_multi_string(
    "model", [hub.INSTANT], "A network, as for sample_main.py; may be given several times."
)
BATCH = flags.DEFINE_integer(
    "batch_size", 4, "Images sampled at a time, of one request.", lower_bound=1
)
HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Address to listen at; 0.0.0.0 lets other machines in. There is no login."
)
PORT = flags.DEFINE_integer(
    "port", 7860, "Port; 0 takes any that is free.", lower_bound=0, upper_bound=65535
)
MAX_PROMPT = flags.DEFINE_integer("max_prompt", 1000, "Characters of a prompt.", lower_bound=1)
MAX_STEPS = flags.DEFINE_integer("max_steps", 100, "Steps of the sampler.", lower_bound=1)
MAX_COUNT = flags.DEFINE_integer("max_count", 8, "Images of a request.", lower_bound=1)
MAX_WAITING = flags.DEFINE_integer("max_waiting", 20, "Requests in the queue.", lower_bound=1)
flags.adopt_module_key_flags(model_flags)

# To try first: names of embedded emoji images, and scenes that models of photographs know.
EMOJI = ["hot pepper", "woman mechanic dark skin tone", "red apple", "crying cat face"]
PHOTOS = [
    "An elegant squirrel pirate on a ship",
    "A lighthouse above a stormy sea, oil painting",
    "A bowl of ramen on a wooden table",
]


@absl_command(words="a model goes into --model")
def main():
    try:  # before minutes of loading
        import uvicorn  # noqa: F401

        from microdit_jax.app import server  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"the page needs the package {error.name}, found none; pip install 'microdit_jax[ui]'"
        ) from error
    from microdit_jax.app.limits import Limits

    limits = Limits(
        prompt_characters=MAX_PROMPT.value,
        steps=MAX_STEPS.value,
        count=MAX_COUNT.value,
        waiting=MAX_WAITING.value,
    )
    memory.check_host(
        MAX_COUNT.value * 2**20,  # an image of 256 px in float32 and its PNG
        what=f"a request for --max_count={MAX_COUNT.value} images",
        fix="allow fewer",
    )
    with listen(HOST.value, PORT.value) as listening:
        _serve(listening, limits)


def _serve(listening: socket.socket, limits: "Limits") -> None:
    """Loads the models and answers at the socket until a signal comes."""
    import uvicorn

    from microdit_jax.app.connections import BoundedConnection, Rarely, possible_connections
    from microdit_jax.app.limits import GUIDANCES
    from microdit_jax.app.server import make_app
    from microdit_jax.app.studio import Studio
    from microdit_jax.machine.compilation_cache import compiled_programs
    from microdit_jax.sampling.settings import Sampler
    from microdit_jax.sampling.solvers import SOLVERS, STUDENT

    options = model_flags.sampler_settings()
    if options["guidance"] == "cfgpp":
        raise UserError(
            "the page's guidance goes up from 1, found --guidance=cfgpp, which takes less; give "
            "another, or sample with sample_main.py"
        )
    if options["guidance"] == "auto":
        raise UserError("the page has no weaker network, found --guidance=auto; give another")
    sampler = Sampler(**options)  # raises before anything is loaded
    options["solver"] = sampler.solver
    studio = Studio(_load(), limits=limits, batch_size=BATCH.value, sampler=options)
    start = time.perf_counter()
    sides = studio.warm_up()
    print(f"compiled in {time.perf_counter() - start:.1f} s{compiled_programs()}")
    choices = {
        "models": [
            {"name": name, "side": sides[name]} | _suggested(model)
            for name, model in studio.models.items()
        ],
        "limits": dataclasses.asdict(limits),
        "solvers": {
            name: {"steps": solver.steps, "least": solver.min_steps}
            for name, solver in SOLVERS.items()
            if name != STUDENT
        },
        "guidances": GUIDANCES,
        "defaults": {
            "num_inference_steps": min(sampler.steps, limits.steps),
            "solver": sampler.solver,
            "guidance": sampler.guidance,
            "negative_prompt": sampler.negative_prompt,
            "count": 1,
        },
    }
    everywhere = HOST.value in ("0.0.0.0", "::", "")
    # Addresses hold the port off by brackets where they have colons themselves.
    named = f"[{HOST.value}]" if ":" in HOST.value else HOST.value
    hosts = ["*"] if everywhere else ["127.0.0.1", "localhost", named]
    config = uvicorn.Config(
        make_app(studio, choices, hosts),
        http=BoundedConnection,
        ws="none",
        log_level="warning",
        use_colors=False,  # a protected output shows them as escapes
        limit_concurrency=possible_connections(limits.connections),
        h11_max_incomplete_event_size=2**14,  # of a request's headers
        timeout_graceful_shutdown=1,
    )
    for logger in ("uvicorn.error", "asyncio"):
        logging.getLogger(logger).addFilter(Rarely())
    shown = "127.0.0.1" if everywhere else named
    print(f"Open http://{shown}:{listening.getsockname()[1]}/", flush=True)
    studio.start()
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        studio.close()


def listen(host: str, port: int) -> socket.socket:
    """Opens a socket at an IPv4 or IPv6 address; "::" listens at all of both kinds."""
    try:
        if ":" not in host:
            return socket.create_server((host, port))
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a machine
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"could not listen at {host}, port {port}: {reason}; give another --port or --host"
        ) from error


def _load() -> "dict[str, PageModel]":
    """Loads the models, by the names that the page shows: never their whole paths."""
    from microdit_jax.app.studio import PageModel

    models = {}
    for given in MODEL.value:
        pipe, model = model_flags.load(given)
        name = short = _short_name(given)
        if name in models:
            name = f"{name} ({len(models) + 1})"
        settings: dict[str, Any] = {
            flag: _short_name(value) if isinstance(value, str) else value
            for flag, value in model_flags.image_settings().items()
        }
        # Descriptions begin with the model's path, as given or as its library writes it.
        made_with = pipe.description
        for path in (visible(given), visible(Path(given))):
            made_with = made_with.replace(path, short)
        settings |= {"model": short, "made_with": made_with}
        words = known_words.of_model(model)
        models[name] = PageModel(pipe, settings, words, model.guidance_scale)
    return models


def _short_name(given: str) -> str:
    """Returns a name as it is, a path by its last two parts: others need not know where it lies."""
    if not Path(given).exists():
        return given
    return "/".join(Path(given).absolute().parts[-2:]).strip("/") or "model"


def _suggested(model: "PageModel") -> dict[str, Any]:
    """Returns prompts and a guidance scale to begin with."""
    from microdit_jax.sampling import guidance

    pipe, student = model.pipe, model.pipe.student
    scale = guidance.default_scale(pipe.text_encoder, recorded=model.guidance_scale)
    return {
        "examples": PHOTOS if pipe.text_encoder.pretrained else EMOJI,
        "guidance_scale": scale if student is None else student.guidance_scale,
        "student": student is not None,
    }
