"""Training, read top to bottom."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from ml_collections import ConfigDict

from microdit_jax import optim, run_checkpoint, sample, train_step
from microdit_jax.data import latents, pipeline
from microdit_jax.diffusion import EdmConfig
from microdit_jax.encoders import registry
from microdit_jax.encoders.patch_pca import PatchPCA
from microdit_jax.errors import UserError, disk_errors
from microdit_jax.models import dit, masking
from microdit_jax.models.dit import DiT, DiTConfig
from microdit_jax.run_checkpoint import RunCheckpoints
from microdit_jax.train_step import TrainState

# What of a record goes to the device
BATCH_KEYS = ("latents", "caption_latents", "keep_caption")


def model_config(config: ConfigDict) -> DiTConfig:
    """The network of a run configuration."""
    arches = {
        "MicroDiT_XL_2": dit.MicroDiT_XL_2,
        "MicroDiT_Tiny_2": dit.MicroDiT_Tiny_2,
        "DiT": DiTConfig,
    }
    arch, options = config.model.arch, config.model.options.to_dict()
    if arch not in arches:
        raise UserError(f"model.arch must be one of {', '.join(arches)}, found {arch!r}")
    known = {field.name for field in dataclasses.fields(DiTConfig)}
    if unknown := sorted(set(options) - known):
        raise UserError(
            f"model.options takes fields of DiTConfig, found {', '.join(unknown)}; known are "
            f"{', '.join(sorted(known))}"
        )
    return arches[arch](**options)


def load_data(config: ConfigDict) -> latents.Prepared:
    """The prepared pictures of a run; prepares them first where that has not been done."""
    data = config.data
    if data.source != "twemoji":
        raise UserError(f"data.source must be twemoji, found {data.source!r}")
    folder = Path(data.folder)
    latents.prepare_twemoji(
        folder,
        resolution=data.resolution,
        fit_codec=PatchPCA.fit,
        codec_settings={"patch": data.patch, "channels": data.channels},
        text_encoder=registry.text_encoder(data.text_encoder),
    )
    return latents.load_prepared(folder, PatchPCA.load)


def check_fit(cfg: DiTConfig, data: latents.Prepared) -> None:
    """Raises UserError where latents or captions are not of the network's sizes."""
    source = data.train
    expected = (cfg.input_size, cfg.input_size, cfg.in_channels)
    if source.latents.shape[1:] != expected:
        raise UserError(
            f"the model takes latents {expected}, found {source.latents.shape[1:]} in the data; "
            "set model.options.input_size and in_channels, or prepare data of that size"
        )
    if source.caption_latents.shape[-1] != cfg.caption_channels:
        raise UserError(
            f"the model takes caption embeddings {cfg.caption_channels} wide, found "
            f"{source.caption_latents.shape[-1]}; set model.options.caption_channels"
        )


def heldout_losses(
    eval_step: Callable, params: Any, source: latents.LatentSource, *, draws: int
) -> dict[str, float]:
    """Loss on held-out pictures with their own captions, and with those of other pictures.

    A network that ignores its captions has a ratio of 1; the lower, the more it follows them.
    """
    batch = {"latents": jnp.asarray(source.latents, jnp.float32)}
    captions = jnp.asarray(source.caption_latents, jnp.float32)
    losses = {}
    for name, y in (("right", captions), ("shuffled", jnp.roll(captions, len(source) // 2, 0))):
        draw = [
            eval_step(params, batch | {"caption_latents": y, "draw": jnp.uint32(i)}).mean()
            for i in range(draws)
        ]
        losses[name] = float(np.mean(draw))
    return losses | {"ratio": losses["right"] / losses["shuffled"]}


def heldout_grid(
    model: DiT, params: Any, edm: EdmConfig, data: latents.Prepared, config: ConfigDict
) -> np.ndarray:
    """Held-out pictures as decoded from their latents, each beside a sample of its caption."""
    chosen = sample.choose_heldout(data, config.eval.num_samples)
    captions = [data.heldout.captions[i] for i in chosen]
    encoder = registry.text_encoder(data.meta["text_encoder"])
    pipe = sample.LatentDiffusion(model, params, edm, encoder, data.codec)
    images = pipe.generate(
        captions,
        guidance_scale=config.eval.guidance_scale,
        num_inference_steps=config.eval.num_inference_steps,
        seed=config.seed,
    )
    real = pipe.decode(data.heldout.latents[chosen])
    return sample.captioned_grid([real, images], captions, columns=6)


def train(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains one stage; the same call again resumes, and returns at once when all is done.

    Leaves in the workdir: config.json, vae/ (the codec), checkpoints/, metrics.jsonl (a line each
    `log_every` steps and each evaluation) and samples/.

    Raises:
      UserError: a config that cannot be run, data or checkpoints that do not fit it, a loss that is
        not finite.
    """
    workdir = Path(workdir)
    # ---------------------------------------------------------------- data and network
    cfg, edm, run = model_config(config), EdmConfig(**config.edm), config.train
    masking.num_kept(cfg.num_tokens, run.mask_ratio)
    data = load_data(config)
    check_fit(cfg, data)
    model = DiT(cfg)
    schedule = optim.learning_rate(
        config.optim.learning_rate,
        warmup_steps=config.optim.warmup_steps,
        decay_steps=config.optim.decay_steps,
        final_ratio=config.optim.final_ratio,
    )
    optimizer = optim.adamw(
        schedule, weight_decay=config.optim.weight_decay, clip_norm=config.optim.clip_norm
    )

    # ---------------------------------------------------------------- workdir
    with disk_errors(workdir / "config.json"):
        (workdir / "samples").mkdir(parents=True, exist_ok=True)
        if not (workdir / "vae").exists():
            shutil.copytree(Path(config.data.folder) / "codec", workdir / "vae")
        run_checkpoint.write_run_metadata(
            workdir,
            {
                "dit": dataclasses.asdict(cfg),
                "edm": dataclasses.asdict(edm),
                "has_ema": config.ema.enabled,
                "vae": data.meta["vae"],
                "text_encoder": data.meta["text_encoder"],
                "attribution": data.meta["attribution"],
                "config": config.to_dict(),
            },
        )

    # ---------------------------------------------------------------- state
    def init(key):
        return train_step.init_state(model, optimizer, key, with_ema=config.ema.enabled)

    init_key = jax.random.fold_in(jax.random.key(config.seed), 0x1217)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract_state = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        jax.eval_shape(init, init_key),
    )
    with RunCheckpoints(workdir) as checkpoints:
        # Where the state comes from, in this order:
        # 1. the newest checkpoint of this workdir: the same command resumes;
        # 2. the newest checkpoint of another run: the next stage goes on from it;
        # 3. the initialisation.
        if checkpoints.latest_step() is not None:
            state, _ = checkpoints.restore(abstract_state)
        elif config.init_from:
            with RunCheckpoints(config.init_from) as earlier:
                state, _ = earlier.restore(abstract_state)
        else:
            state = jax.jit(init)(init_key)
        start = int(state.step)
        print(
            f"{workdir}: {sum(p.size for p in jax.tree.leaves(state.params)):,} parameters, "
            f"step {start} of {run.steps}, {len(data.train):,} training and "
            f"{len(data.heldout):,} held-out pictures, mask ratio {run.mask_ratio}"
        )
        if start >= run.steps:
            print(f"{workdir}: done already")
            return state

        # ------------------------------------------------------------ loop
        step_fn = jax.jit(
            train_step.make_train_step(
                model,
                optimizer,
                schedule,
                edm=edm,
                mask_ratio=run.mask_ratio,
                seed=config.seed,
                ema_smoothing=config.ema.smoothing,
                ema_start_step=config.ema.start_step,
            ),
            donate_argnums=0,
        )
        eval_step = jax.jit(train_step.make_eval_step(model, edm=edm, seed=config.seed))
        dataset = pipeline.make_dataset(
            [data.train],
            seed=config.seed,
            batch_size=run.batch_size,
            caption_drop=config.data.caption_drop,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        batches = pipeline.batches(dataset, start)
        bar = tqdm.tqdm(total=run.steps, initial=start, desc=workdir.name, unit="step")
        since, window = time.perf_counter(), []
        with open(workdir / "metrics.jsonl", "a") as log:
            for step in range(start + 1, run.steps + 1):
                batch = next(batches)
                state, metrics = step_fn(state, {k: batch[k] for k in BATCH_KEYS})
                window.append(metrics["loss"])
                bar.update()
                if step % run.log_every == 0 or step == run.steps:
                    loss = float(np.mean(jax.device_get(window)))
                    if not np.isfinite(loss):
                        raise UserError(
                            f"the loss is not finite around step {step}; start again from the "
                            "last checkpoint with a lower optim.learning_rate or clip_norm"
                        )
                    seconds = time.perf_counter() - since
                    line = {"step": step, "loss": loss} | {
                        name: float(metrics[name]) for name in ("grad_norm", "learning_rate")
                    }
                    line["images_per_second"] = len(window) * run.batch_size / seconds
                    bar.set_postfix(loss=f"{loss:.3f}", lr=f"{line['learning_rate']:.1e}")
                    print(json.dumps(line), file=log, flush=True)
                    since, window = time.perf_counter(), []
                if step % run.checkpoint_every == 0 or step == run.steps:
                    checkpoints.save(step, state, {"step": step, "seed": config.seed})
                if step % run.eval_every == 0 or step == run.steps:
                    params = state.ema if config.ema.enabled else state.params
                    losses = heldout_losses(
                        eval_step, params, data.heldout, draws=config.eval.draws
                    )
                    print(json.dumps({"step": step, "heldout": losses}), file=log, flush=True)
                    bar.write(
                        f"step {step}: held-out loss {losses['right']:.4f} with right captions, "
                        f"{losses['shuffled']:.4f} with shuffled ones, ratio {losses['ratio']:.3f}"
                    )
                    grid = heldout_grid(model, params, edm, data, config)
                    settings = {"step": step, "attribution": data.meta["attribution"]}
                    sample.save_png(workdir / "samples" / f"step_{step:07d}.png", grid, settings)
                    since = time.perf_counter()
        bar.close()
        batches.close()
    return state
