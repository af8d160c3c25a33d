"""Samples images from a model, scores them, and writes one JSON and a Markdown table.

Examples:
  python -m microdit_jax.evaluate --model=out/demo/finetune --num_images=2000 --guidance_scale=3
  python -m microdit_jax.evaluate --model=dit_4_channel_37M_real_and_synthetic_data \\
    --metrics=fid,clip_score --prompts=coco30k.csv --reference=coco_val2014.npz \\
    --inception=pt_inception-2015-12-05-6726825d.pth --clip=CLIP-ViT-H-14 \\
    --guidance_scale=1.5,2,3,5 --num_inference_steps=30 --seeds=2024,2025,2026
  python -m microdit_jax.evaluate --model=... --metrics=geneval \\
    --geneval_prompts=evaluation_metadata.jsonl      (then its detector, then --geneval_results=...)

The same command again goes on where it was stopped. docs/evaluation.md is the protocol.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("microdit_jax.evaluate.__main__")

import contextlib
import dataclasses
from pathlib import Path

from absl import flags

from microdit_jax import model_flags
from microdit_jax.commands import job_flags
from microdit_jax.commands.cli import absl_command
from microdit_jax.errors import UserError
from microdit_jax.files import check_writable
from microdit_jax.files.urls import url_of
from microdit_jax.machine import memory

MODEL = flags.DEFINE_string("model", None, "A network, as for sample_main.py.")
WEIGHTS = flags.DEFINE_string(
    "weights", None, "Which of a PyTorch file's that holds several: model, ema or KEY.PATH."
)
METRICS = flags.DEFINE_list(
    "metrics", ["frechet_small"],
    "Any of fid, kid, precision_recall, clip_score, geneval; or frechet_small, a distance that "
    "needs no download and is not comparable with FID.",
)  # fmt: skip
PROMPTS = flags.DEFINE_string(
    "prompts", "train", "A .csv, COCO's captions .json, a text file; or train or heldout, the "
    "captions of the embedded emoji images."
)  # fmt: skip
NUM_IMAGES = flags.DEFINE_integer(
    "num_images", 0, "Images, for prompts spread evenly; 0: one for each.", lower_bound=0
)
GUIDANCE = flags.DEFINE_list("guidance_scale", ["5"], "One scale, or several for a sweep.")
STEPS = flags.DEFINE_integer(
    "num_inference_steps", None, "Steps of the solver; default: its own, 30 of Heun's.",
    lower_bound=1,
)  # fmt: skip
SEEDS = flags.DEFINE_list("seeds", ["2024"], "Seeds of the noise; several give an interval.")
BATCH = flags.DEFINE_integer("batch_size", 32, "Images sampled at a time.", lower_bound=1)
CHUNK = flags.DEFINE_integer(
    "chunk_size", 128, "Images between two saves; a kill costs at most this many.", lower_bound=1
)
REFERENCE = flags.DEFINE_string(
    "reference", None, ".npz of statistics (ours, pytorch-fid's, clean-fid's, torch-fidelity's), a "
    "folder of real images, or train or heldout; default: train, for a run on the emoji images."
)  # fmt: skip
INCEPTION = flags.DEFINE_string(
    "inception", None, "FID's network: pt_inception-2015-12-05-6726825d.pth, or converted."
)
RESIZE = flags.DEFINE_enum(
    "resize",
    "clean",
    ["clean", "pytorch_fid", "torch_fidelity"],
    "The package whose resizing Inception sees.",
)
SIDE = flags.DEFINE_integer(
    "side", 0, "Crop and resize all images, and a folder of real ones, to this many pixels "
    "first; 0: as they are.", lower_bound=0,
)  # fmt: skip
CLIP = flags.DEFINE_string(
    "clip", None, "Folder of a CLIP with both towers (OpenCLIP's or transformers'), or converted."
)
GENEVAL_PROMPTS = flags.DEFINE_string("geneval_prompts", None, "evaluation_metadata.jsonl.")
GENEVAL_RESULTS = flags.DEFINE_string(
    "geneval_results", None, "results.jsonl of GenEval's detector over the images sampled before."
)
KEEP = flags.DEFINE_boolean("keep_images", False, "Keep all images as PNGs.")
OUT = flags.DEFINE_string("out", "out/evaluate", "Folder for everything.")
flags.adopt_module_key_flags(job_flags)
flags.adopt_module_key_flags(model_flags)


@absl_command(required=("model",))
def main():
    with job_flags.joined_job():
        _evaluate()


def _evaluate() -> None:
    import jax

    from microdit_jax.evaluate import protocol
    from microdit_jax.evaluate.request import EvaluationRequest, Subject
    from microdit_jax.machine import agreement
    from microdit_jax.machine.claim import claimed
    from microdit_jax.sampling.settings import Sampler

    check_writable(OUT.value, folder=True)
    memory.check_host(
        NUM_IMAGES.value * 2**12,
        what=f"a list of --num_images={NUM_IMAGES.value} prompts",
        fix="30,000 are what FID is published with",
    )
    scales = _numbers("guidance_scale", GUIDANCE.value, float) or (1.0,)
    request = EvaluationRequest(
        metrics=tuple(METRICS.value),
        prompts=PROMPTS.value,
        num_images=NUM_IMAGES.value,
        guidance_scales=scales,
        seeds=_numbers("seeds", SEEDS.value, int),
        sampler=Sampler(
            **model_flags.sampler_settings(),
            num_inference_steps=STEPS.value,
            guidance_scale=scales[0],
        ),
        batch_size=BATCH.value,
        chunk_size=CHUNK.value,
        reference=REFERENCE.value,
        inception=INCEPTION.value,
        resize=RESIZE.value,
        side=SIDE.value,
        clip=CLIP.value,
        geneval_prompts=GENEVAL_PROMPTS.value,
        geneval_results=GENEVAL_RESULTS.value,
        keep_images=KEEP.value,
    )
    assert MODEL.value is not None  # absl_command asks for it
    out, asked = Path(OUT.value), {"model": MODEL.value} | dataclasses.asdict(request)
    agreement.agree(agreement.software() | agreement.flat(asked))
    agreement.agree(agreement.devices())
    with contextlib.ExitStack() as stack:
        place = url_of(out)
        claimed(out, stack, place=place if place.startswith("gs:") else None)
        pipe, model = model_flags.load(MODEL.value, WEIGHTS.value)
        chosen = model_flags.sampler_settings() | {STEPS.name: STEPS.value}
        for scale in scales if GUIDANCE.present else (None,):
            settled = request.for_network(pipe.student, chosen | {GUIDANCE.name: scale})
        request = settled
        result, files = protocol.evaluate(Subject(MODEL.value, model, pipe), request, out)
    if jax.process_index():
        return
    print((out / "result.md").read_text(), end="")
    for note in result["notes"]:
        print(f"note: {note}")
    print(f"written: {', '.join(map(str, files))}")


def _numbers(flag: str, texts: list[str], kind: type) -> tuple:
    try:
        return tuple(dict.fromkeys(kind(text) for text in texts))
    except ValueError as error:
        raise UserError(f"--{flag} takes numbers divided by commas, found {texts}") from error
