"""A quick pipeline, prompts and folders of real images for the tests of microdit_jax/evaluate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import tiny_model
from PIL import Image

from microdit_jax.assets.load import Model
from microdit_jax.diffusion import EdmConfig
from microdit_jax.encoders.patch_pca import PatchPCA
from microdit_jax.encoders.token_table import TokenTable
from microdit_jax.evaluate.prompts import PromptSet
from microdit_jax.evaluate.request import EvaluationRequest, Subject
from microdit_jax.evaluate.sample_set import SamplerSettings, SampleSet
from microdit_jax.sampling.pipeline import LatentDiffusion
from microdit_jax.sampling.settings import Sampler

STEPS = Sampler(guidance_scale=2.0, num_inference_steps=2)
SAMPLER = SamplerSettings(seed=7, sampler=STEPS, batch_size=4)
PROMPTS = PromptSet(
    "p", [f"a {word}" for word in "cat dog cow hen owl bat elk fox ape".split()], []
)


@functools.cache
def make_pipe() -> LatentDiffusion:
    """An untrained pipeline of 32 px images, quick enough to sample with; never changed."""
    model, rng = tiny_model(), np.random.default_rng(0)
    cfg = model.config
    x = jnp.zeros((1, 8, 8, 4))
    params = jax.jit(model.init)(jax.random.key(1), x, jnp.zeros(1), jnp.zeros((1, 1, 24)))
    # Away from the initialisation, where the network's output is zero.
    params = jax.tree.map(
        lambda p: p + jnp.asarray(0.05 * rng.standard_normal(p.shape), p.dtype), params["params"]
    )
    images = rng.uniform(-1, 1, (8, 32, 32, 3))
    codec = PatchPCA.fit(images, patch=4, channels=cfg.in_channels)
    text = TokenTable.from_name("table:width=24,tokens=6,seed=0")
    return LatentDiffusion(model, params, EdmConfig(), text, codec, "tiny")


def make_subject() -> Subject:
    """The pipeline as what `evaluate` evaluates."""
    pipe = make_pipe()
    model = Model(pipe.model.config, pipe.params, pipe.edm, "vae", "text", None, "tiny")
    return Subject("tiny", model, pipe)


def mean_colours(images, texts):
    """A measure: the mean colour of each image."""
    assert len(images) == len(texts) and images[0].dtype == np.uint8
    return np.array([image.mean((0, 1)) for image in images], np.float32)


def measured(folder, measures=None, **changes):
    """The mean colours of a set in the folder, or what the measures give."""
    options = {"made_by": {"weights": "a"}, "chunk_size": 4} | changes
    sampler = options.pop("sampler", SAMPLER)
    samples = SampleSet(make_pipe(), PROMPTS, sampler, folder, **options)
    return samples.measure({"colours": mean_colours} if measures is None else measures)


def references(tmp_path, n=12):
    """A folder of images, some below, of two sizes."""
    rng, folder = np.random.default_rng(3), tmp_path / "real"
    (folder / "more").mkdir(parents=True)
    for i in range(n):
        image = rng.integers(0, 256, (40, 32 + 8 * (i % 2), 3)).astype(np.uint8)
        Image.fromarray(image).save(folder / ("more" if i % 3 else ".") / f"{i}.png")
    return folder


def ask(tmp_path, **changes) -> EvaluationRequest:
    """A request for the prompts above, sampled quickly."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS.texts) + "\n")
    defaults = {
        "prompts": str(prompts), "sampler": STEPS, "batch_size": 4, "chunk_size": 8,
        "guidance_scales": (1.0, 2.0), "seeds": (1, 2),
    }  # fmt: skip
    return EvaluationRequest(**defaults | changes)
