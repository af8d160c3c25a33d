"""Images and captions to latents that training reads; the same command again resumes.

Examples:
  python -m microdit_jax.prepare --source=emoji --output=latents/emoji --resolutions=256 \\
      --text_encoder=table:width=256,tokens=24,seed=0 --vae=FOLDER_OF_A_VAE
  python -m microdit_jax.prepare --source=cc12m --input=data/cc12m --output=latents/cc12m \\
      --resolutions=256,512 --fraction=0.01

Sources: a folder of images with .txt files or a table of captions; webdataset tars; Parquet or
Arrow files with images in a column (Hugging Face); MDS or TFDS datasets of images; the emoji set;
the paper's datasets (docs/datasets.md). On several hosts, run the same command on each, writing to
one shared folder: each claims part after part, those of hosts that are lost too.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("microdit_jax.prepare.__main__")

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from microdit_jax import images
from microdit_jax.checkpoints.run import read_run_metadata
from microdit_jax.commands.parser import Parser
from microdit_jax.commands.paths import local_places
from microdit_jax.data.stores import open_latents
from microdit_jax.files import OutputFolder, check_writable, output_folder
from microdit_jax.files.urls import scheme_of, url_of
from microdit_jax.machine import compilation_cache, memory
from microdit_jax.prepare import job, job_folder, ray_engine
from microdit_jax.prepare.encoding import make_towers
from microdit_jax.prepare.options import PrepareOptions
from microdit_jax.prepare.request import PrepareRequest
from microdit_jax.prepare.sources import registry
from microdit_jax.prepare.sources.caption_choice import CHOICES
from microdit_jax.towers import Codec

DEFAULT_VAE = "stabilityai/stable-diffusion-xl-base-1.0"
DEFAULT_TEXT_ENCODER = "openclip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378"
_SOURCE_OPTIONS = (
    *("split", "captions", "cache", "image_column", "caption_column", "captions_of_a_list"),
)
_SHEET_IMAGES, _SHEET_COLUMNS = 24, 6


def contact_sheet(output: Path, codec: Codec, options: PrepareOptions) -> Path:
    """Saves images decoded back from random latents of the output, with their captions."""
    url = url_of(output)
    options_of_urls: dict[str, Any] = {"shuffled": True} if url else {}
    source = open_latents(
        url or output,
        resolution=options.resolutions[0],
        captions="tokens" if options.caption_store == "tokens" else "embeddings",
        **options_of_urls,
    )
    count = min(_SHEET_IMAGES, len(source))
    chosen = np.random.default_rng(options.seed).choice(len(source), count, replace=False)
    records = [source[int(index)] for index in chosen]
    latents = np.stack([record["latents"] for record in records])
    decoded = codec.decode(latents / np.float32(codec.scaling_factor)) / 2 + 0.5
    sheet = images.captioned_grid(
        [decoded], [record["caption"] for record in records], columns=_SHEET_COLUMNS
    )
    path = output / "contact_sheet.png"
    about = {"ids": [record["id"] for record in records], "attribution": source.info.attribution}
    images.save_png(path, sheet, about)
    return path


def _parser() -> Parser:
    parser = Parser("microdit_jax.prepare", __doc__)
    add = parser.add_argument
    add("--source", required=True, choices=registry.KINDS, help="what --input holds")
    add("--input", help="the folder of the source; emoji and openmoji have none")
    add("--output", required=True, help="the folder to write")
    add("--resolutions", help="pixels of a side, with commas (default: --model's, or 256,512)")
    add("--model", help="a network to be trained on the data, as sample_main.py takes it: its VAE "
        "and text encoder, and for small ones its resolution, are taken")  # fmt: skip
    add("--vae", help="a VAE's name or path (default: --model's, or SDXL's)")
    add("--text_encoder", help="name or path (default: --model's, or DFN5B CLIP)")
    add(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="type of the towers",
    )
    add("--captions", help="a table of captions, for --source=folder")
    add("--split", help="a part of the dataset, for sources that have splits")
    add("--image_column", help="column (webdataset: ending) of the images")
    add("--caption_column", help="column (webdataset: ending, field) of captions")
    add("--captions_of_a_list", choices=CHOICES, help="which caption of several: the first "
        "(default), or one at random, by the image's id and --seed")  # fmt: skip
    add("--cache", help="a local folder, for --source=mds from a URL")
    add("--fraction", type=float, default=1.0, help="share of the source's parts, for a trial")
    add("--min_size", type=int, help="shorter side of a usable image (default: as small as the "
        "smallest resolution)")  # fmt: skip
    add("--keep_captions", action="store_true", help="do not clean the captions")
    add("--exif", action=argparse.BooleanOptionalAction, help="turn images as the camera's "
        "orientation says (default: for folder and parquet; the reference never does)")  # fmt: skip
    add("--captions_as", default="embeddings", choices=("embeddings", "tokens", "both"),
        help="store embeddings, token ids to embed while training, or both")  # fmt: skip
    add("--batch", type=int, default=16, help="images that a device encodes at a time")
    add("--threads", type=int, default=8, help="threads that decode images")
    add("--seed", type=int, default=2024, help="seed of the noise that latents are sampled with")
    add("--append", action="store_true", help="the source has grown: make new parts of what is new")
    add("--process_index", type=int, default=0, help="which of several processes "
        "this is: each begins with other parts")  # fmt: skip
    add("--engine", default="local", choices=("local", "ray"), help="where parts are made: in this "
        "process, or on the nodes of a Ray cluster")  # fmt: skip
    add("--ray_address", help="of the cluster (default: RAY_ADDRESS, or the one on this machine)")
    add("--ray_cpus", type=float, help="CPUs of an actor (default: 1 beside a GPU, else those of "
        "the smallest node)")  # fmt: skip
    add("--ray_gpus", type=float, help="GPUs of an actor (default: 1, where there are any)")
    add("--process_count", type=int, default=1, help="how many begin together")
    return parser


def main(arguments: Sequence[str]) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    _take_from_model(args)
    try:
        resolutions = tuple(int(side) for side in args.resolutions.split(","))
    except ValueError:
        parser.error(f"argument --resolutions: expected 256,512, found {args.resolutions!r}")
    if args.append and args.fraction != 1:
        parser.error("argument --append: it takes a whole source; leave --fraction out")
    for name in ("ray_address", "ray_cpus", "ray_gpus"):
        if args.engine != "ray" and getattr(args, name) is not None:
            parser.error(f"argument --{name}: it is for --engine=ray; leave it out")
    job_folder.check_counts(args.process_index, args.process_count, threads=args.threads)
    options = PrepareOptions(
        resolutions=resolutions,
        min_size=min(resolutions) if args.min_size is None else args.min_size,
        seed=args.seed,
        batch=args.batch,
        clean=not args.keep_captions,
        caption_store=args.captions_as,
        exif=registry.KINDS[args.source].photographs if args.exif is None else args.exif,
    )
    if args.engine == "ray" and scheme_of(args.output):
        parser.error("argument --output: --engine=ray writes to a disk that all hosts share")
    check_writable(args.output, folder=True)
    memory.check_host(
        args.batch * sum(side**2 for side in resolutions) * 3 * 4,  # float32
        what=f"--batch={args.batch} images of {args.resolutions} px",
        fix="encode fewer at a time",
    )
    request = PrepareRequest(
        source=args.source,
        input=args.input,
        fraction=args.fraction,
        source_options={name: getattr(args, name) for name in _SOURCE_OPTIONS},
        vae=args.vae,
        text_encoder=args.text_encoder,
        dtype=args.dtype,
        output=args.output,
        options=options,
        threads=args.threads,
    )
    if args.engine == "ray":
        ray_engine.import_ray()  # before the work
        jax.config.update("jax_platforms", "cpu")  # its devices are the actors'
    with (
        local_places("microdit_jax.prepare", vars(args)) as local,
        output_folder(args.output, drop=lambda name: ".mds" in name) as output,
    ):
        request.source_options.update(local)
        _run(args, request, options, output)


def _take_from_model(args: argparse.Namespace) -> None:
    """Fills in the flags that were left out, by the network that the data are for."""
    vae, text_encoder, resolutions = DEFAULT_VAE, DEFAULT_TEXT_ENCODER, "256,512"
    if args.model is not None:
        from microdit_jax.assets import load  # here, so that --help answers at once

        model = load.load_model(args.model, with_params=False)
        vae, text_encoder = model.vae or vae, model.text_encoder or text_encoder
        if model.folder is not None:  # a run, which says what it was trained on
            data = read_run_metadata(model.folder, "config.data.resolution")["config"]["data"]
            resolutions = f"{data['resolution']}"
        else:
            resolutions = f"{8 * model.config.input_size}"  # of the VAEs that there are
    args.vae, args.text_encoder = args.vae or vae, args.text_encoder or text_encoder
    args.resolutions = args.resolutions or resolutions


def _run(
    args: argparse.Namespace, request: PrepareRequest, options: PrepareOptions, into: OutputFolder
) -> None:
    source = request.open_source()
    for note in source.notes:
        print(note, flush=True)
    compilation_cache.enable()
    codec, text_encoder = request.load_towers()
    output, start = into.path, time.monotonic()
    done_before = job.count_records(output)
    towers = make_towers(codec, text_encoder, args.seed)
    if args.engine == "ray":
        ray_engine.run(
            request,
            source,
            towers[0],
            address=args.ray_address,
            cpus=args.ray_cpus,
            gpus=args.ray_gpus,
            append=args.append,
        )
    else:
        job.run(
            source,
            towers,
            output,
            options,
            request=request.settings(),
            into=into if scheme_of(into.name) else None,
            process_index=args.process_index,
            process_count=args.process_count,
            threads=args.threads,
            append=args.append,
        )
    into.flush()
    count = job.count_records(output) - done_before
    rate = count / (time.monotonic() - start)
    print(f"{output}: {count:,} images now, {rate:.1f} images/s of all processes")
    sheet = contact_sheet(output, codec, options)
    print(f"{(output / job.REPORT).read_text().rstrip()}\nlook at {sheet}")
